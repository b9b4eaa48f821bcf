//! Start-up parameters that no server connection takes later: their client has one that was opened with them, and nobody else
//! gets it.

use std::time::Duration;

use pgweir_harness::wire::build::{query, startup};
use pgweir_harness::wire::{Message, ServerError, Wire, WireError, cancel};
use pgweir_harness::{wait_until, wait_until_async};

use super::{refusal, words};
use crate::stage::{Stage, read_to_end};
use crate::support::{PASSWORD, SOON, Site, assert_value, server_pid};

/// Any role may give it a value, at the beginning of a session alone.
const OWN: (&str, &str) = ("ignore_system_indexes", "on");
const SHOW: &str = "SHOW ignore_system_indexes";

fn pinned(site: &Site<'_>) -> f64 {
    site.metric("pgweir_servers_pinned", &[])
}

fn logins(site: &Site<'_>) -> f64 {
    site.metric("pgweir_server_logins_total", &[])
}

async fn try_client(site: &Site<'_>, parameters: &[(&str, &str)]) -> Result<Wire, WireError> {
    let mut wire = Wire::connect(site.pgweir.addr()).await?;
    let own = [("user", site.name()), ("database", site.name())];
    let all: Vec<(&str, &str)> = own.iter().chain(parameters).copied().collect();
    wire.login_with(&all, PASSWORD).await.map(|_| wire)
}

#[tokio::test]
async fn a_client_with_a_session_of_its_own_keeps_it_and_it_is_closed_when_the_client_leaves() {
    for mode in ["transaction", "session", "statement"] {
        let site = Site::start(&[("pool_mode", mode), ("default_pool_size", "1")]);
        let watch = site.place.cap_watch(1);
        let mut client = site.client_with(&[OWN, ("work_mem", "1MB")]).await;
        let pid = server_pid(&mut client).await;
        assert_eq!(client.pid, pid, "{mode}: it is told the real one");
        assert_value(&client.query(SHOW).await.unwrap(), "on");
        assert_eq!(client.query("SET work_mem = '2MB'").await.unwrap().error, None, "{mode}");
        assert_value(&client.query("SHOW work_mem").await.unwrap(), "2MB");
        assert_eq!(server_pid(&mut client).await, pid, "{mode}");
        let counts = f64::from(u8::from(mode != "session"));
        wait_until(SOON, || site.metric("pgweir_pins_total", &["reason=\"startup\""]) >= counts);
        wait_until(SOON, || pinned(&site) >= counts);
        client.terminate().await.unwrap();
        let mut next = site.client().await;
        assert_ne!(server_pid(&mut next).await, pid, "{mode}");
        assert_value(&next.query(SHOW).await.unwrap(), "off");
        assert_value(&next.query("SHOW work_mem").await.unwrap(), "4MB");
        wait_until(SOON, || pinned(&site) < 0.5);
        assert_eq!(watch.finish(), 1, "{mode}");
    }
}

#[tokio::test]
async fn a_client_beyond_max_pinned_is_refused_and_others_are_not() {
    let site = Site::start(&[("default_pool_size", "2"), ("max_pinned", "1")]);
    let mut first = site.client_with(&[OWN]).await;
    for parameters in [OWN, ("options", "-P"), ("post_auth_delay", "0")] {
        let all = [("user", site.name()), ("database", site.name()), parameters];
        let error = refusal(site.pgweir.addr(), &all, PASSWORD).await;
        assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "53300"), "{error}");
        assert!(error.to_string().contains("max_pinned"), "{error}");
    }
    // Who is in the wrong is told so.
    let all = [("user", site.name()), ("database", site.name()), ("work_mem", "nonsense")];
    assert_eq!(refusal(site.pgweir.addr(), &all, PASSWORD).await.sqlstate(), "22023");
    assert_value(&site.client().await.query(SHOW).await.unwrap(), "off");
    assert_value(&first.query(SHOW).await.unwrap(), "on");
    first.terminate().await.unwrap();
    wait_until_async(SOON, async || try_client(&site, &[OWN]).await.is_ok()).await;
}

#[tokio::test]
async fn a_session_of_its_own_is_waited_for_as_any_server_connection() {
    let site = Site::start(&[("default_pool_size", "1"), ("query_wait_timeout", "2s")]);
    let watch = site.place.cap_watch(1);
    let waiting = || site.metric("pgweir_clients", &["state=\"waiting\""]) >= 1.0;
    let mut holder = site.client().await;
    assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');

    // In vain.
    let all = [("user", site.name()), ("database", site.name()), OWN];
    let error = refusal(site.pgweir.addr(), &all, PASSWORD).await;
    assert_eq!(error.sqlstate(), "53300", "{error}");
    assert!(error.to_string().contains("query_wait_timeout"), "{error}");

    // Until it has left.
    let mut goner = Wire::connect(site.pgweir.addr()).await.unwrap();
    goner.send(&startup(&all)).await.unwrap();
    wait_until(SOON, waiting);
    goner.abort().unwrap();

    // Until there is one.
    let (client, ()) = tokio::join!(site.client_with(&[OWN]), async {
        wait_until_async(SOON, async || waiting()).await;
        assert_eq!(holder.query("COMMIT").await.unwrap().status, b'I');
    });
    let mut client = client;
    assert_value(&client.query(SHOW).await.unwrap(), "on");
    client.terminate().await.unwrap();
    assert_value(&holder.query(SHOW).await.unwrap(), "off");
    wait_until(SOON, || pinned(&site) < 0.5);
    assert_eq!(watch.finish(), 1);
}

#[tokio::test]
async fn a_client_whose_own_session_is_lost_is_ended_and_comes_again() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    for busy in [false, true] {
        let mut client = stage.client_with(&[OWN]).await;
        let pid = server_pid(&mut client).await;
        if busy {
            client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
            wait_until(SOON, || stage.is_running("pg_sleep"));
        }
        stage.terminate(pid);
        let end = read_to_end(&mut client).await;
        assert_eq!(end.sqlstate(), "57P01", "{end:?}");
        wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 0.5);
        let mut plain = stage.client().await;
        assert_value(&plain.query(SHOW).await.unwrap(), "off");
    }
}

#[tokio::test]
async fn a_query_of_a_session_of_its_own_is_cancelled_and_one_left_behind_is_rolled_back() {
    let stage = Stage::new(&[("default_pool_size", "1")]);
    stage.own_sql("CREATE TABLE kept (id int)");
    let mut client = stage.client_with(&[OWN]).await;
    client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
    wait_until(SOON, || stage.is_running("pg_sleep"));
    cancel(stage.addr(), client.pid, &client.secret).await.unwrap();
    assert_eq!(client.outcome().await.unwrap().sqlstate(), "57014");
    assert_eq!(client.query("BEGIN; INSERT INTO kept VALUES (1)").await.unwrap().status, b'T');
    client.send(&query("SELECT pg_sleep(60)")).await.unwrap();
    wait_until(SOON, || stage.is_running("pg_sleep"));
    client.abort().unwrap();
    let mut next = stage.client().await;
    assert_value(&next.query("SELECT count(*) FROM kept").await.unwrap(), "0");

    // What was sent before the goodbye is done.
    let mut client = stage.client_with(&[OWN]).await;
    let bye = [query("SELECT pg_sleep(0.3)"), query("INSERT INTO kept VALUES (2)"), vec![b'X', 0, 0, 0, 4]].concat();
    client.send(&bye).await.unwrap();
    wait_until(SOON, || stage.sql("SELECT count(*) FROM kept") == "1");
    wait_until(SOON, || stage.metric("pgweir_servers_pinned") < 0.5);
}

#[tokio::test]
async fn refusals_say_nothing_against_the_pool_and_are_remembered_if_they_will_last() {
    let site = Site::start(&[("default_pool_size", "2")]);
    let watch = site.place.cap_watch(2);
    let mut other = site.client().await;
    assert_value(&other.query("SELECT 1").await.unwrap(), "1");
    let lasting =
        [("options", "nonsense"), ("work_mem", "nonsense"), ("post_auth_delay", "soon"), ("wal_level", "minimal")];
    let rights = [("log_disconnections", "on")];
    for round in 0..3 {
        for parameters in lasting.iter().chain(&rights) {
            let all = [("user", site.name()), ("database", site.name()), *parameters];
            let want = refusal(site.place.cluster.addr(), &all, PASSWORD).await;
            let got = refusal(site.pgweir.addr(), &all, PASSWORD).await;
            assert_eq!(words(&got), words(&want), "{round}: {parameters:?}");
        }
        assert_value(&other.query("SELECT 1").await.unwrap(), "1");
    }
    // One for each that is not remembered, or not any more. What is counted last is published last.
    let all = [("user", site.name()), ("database", site.name()), ("options", "no more")];
    assert_eq!(refusal(site.pgweir.addr(), &all, PASSWORD).await.sqlstate(), "42601");
    let dirty = || site.metric("pgweir_server_discards_total", &["reason=\"dirty\""]);
    wait_until(SOON, || dirty() >= 6.0);
    assert!(dirty() < 8.5, "{} were closed", dirty());
    assert!(site.metric("pgweir_server_login_failures_total", &[]) < 0.5 && pinned(&site) < 0.5);
    watch.finish();

    // A right that is granted counts soon.
    site.place.psql(&format!("GRANT SET ON PARAMETER log_disconnections TO {}", site.name()));
    wait_until_async(SOON, async || try_client(&site, &rights).await.is_ok()).await;
    assert_value(&site.client_with(&rights).await.query("SHOW log_disconnections").await.unwrap(), "on");
}

#[tokio::test]
async fn a_session_that_would_begin_when_nobody_waits_for_it_any_more_is_not_begun() {
    let stage = Stage::new(&[]);
    let table: [&[(&str, &str)]; 5] = [
        &[("post_auth_delay", "1")],
        &[("options", "-W 3600")],
        &[("options", "-c post-auth-delay=1h")],
        &[("options", "-e"), ("post_auth_delay", "2147")],
        &[("Post_Auth_Delay", "2147"), ("options", "-P -W0")],
    ];
    for parameters in table {
        let mut wire = Wire::connect(stage.addr()).await.unwrap();
        let own = [("user", stage.name()), ("database", stage.name())];
        let all: Vec<_> = own.iter().chain(parameters).copied().collect();
        match wire.login_with(&all, "").await {
            Err(WireError::Refused(error)) => assert!(error.message().contains("post_auth_delay"), "{error}"),
            other => panic!("{other:?}"),
        }
    }
    assert_value(
        &stage.client_with(&[("post_auth_delay", "0")]).await.query("SHOW post_auth_delay").await.unwrap(),
        "0",
    );
}

#[tokio::test]
async fn who_would_have_a_session_of_its_own_waits_while_the_server_is_full() {
    let site =
        Site::start(&[("default_pool_size", "2"), ("query_wait_timeout", "3s"), ("server_login_retry", "200ms")]);
    let mut plain = site.client().await;
    assert_value(&plain.query("SELECT 1").await.unwrap(), "1");
    let limit = |most: i32| site.place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT {most}", site.name()));
    let failures = || site.metric("pgweir_server_login_failures_total", &[]);
    limit(0);

    // In vain: at its limit it is told of ours.
    let all = [("user", site.name()), ("database", site.name()), OWN];
    let error = refusal(site.pgweir.addr(), &all, PASSWORD).await;
    assert_eq!(error.sqlstate(), "53300", "{error}");
    assert!(error.to_string().contains("query_wait_timeout"), "{error}");
    wait_until(SOON, || failures() >= 1.0);

    // Until there is room.
    let before = failures();
    let (mut client, ()) = tokio::join!(site.client_with(&[OWN]), async {
        wait_until_async(SOON, async || failures() > before).await;
        limit(-1);
    });
    assert_value(&client.query(SHOW).await.unwrap(), "on");
    assert_value(&plain.query(SHOW).await.unwrap(), "off");
}

#[tokio::test]
async fn what_a_role_may_is_asked_again_when_it_is_there() {
    let site = Site::start(&[("default_pool_size", "1")]);
    let role = format!("{}_late", site.name());
    let all = [("user", site.name()), ("database", site.name()), ("role", &*role)];
    assert_eq!(refusal(site.pgweir.addr(), &all, PASSWORD).await.sqlstate(), "22023");
    site.place.psql(&format!("CREATE ROLE {role}; GRANT {role} TO {}", site.name()));
    assert_value(&site.client_with(&[("role", &role)]).await.query("SELECT current_user").await.unwrap(), &role);
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_told_and_the_next_login_is_good() {
    let (stage, proxy) = Stage::behind_proxy(&[("default_pool_size", "1")]);
    let mut other = stage.client().await;
    assert_value(&other.query("SELECT 1").await.unwrap(), "1");
    proxy.refuse_new(true);
    let mut wire = Wire::connect(stage.addr()).await.unwrap();
    let all = [("user", stage.name()), ("database", stage.name()), OWN];
    match wire.login_with(&all, "").await {
        Err(WireError::Refused(error)) => assert_eq!(error.sqlstate(), "08006", "{error}"),
        other => panic!("{other:?}"),
    }
    proxy.refuse_new(false);
    assert_value(&stage.client_with(&[OWN]).await.query(SHOW).await.unwrap(), "on");
    assert_value(&other.query(SHOW).await.unwrap(), "off");
}

#[tokio::test]
async fn the_operators_query_gives_way_to_what_a_session_of_its_own_begins_with() {
    let settings = [
        ("default_pool_size", "3"),
        (
            "databases.PLACE.connect_query",
            "SET work_mem = '7MB'; SET statement_timeout = '7s'; SET application_name = 'operator'",
        ),
    ];
    let stage = Stage::new(&settings);
    let mut plain = stage.client().await;
    assert_value(&plain.query("SHOW work_mem").await.unwrap(), "7MB");
    // With options that are read here, and with those that only the server can read.
    for own in [OWN, ("options", "-P")] {
        let mut client = stage.client_with(&[own, ("work_mem", "1MB"), ("application_name", "mine")]).await;
        assert_value(&client.query(SHOW).await.unwrap(), "on");
        assert_value(&client.query("SHOW application_name").await.unwrap(), "mine");
        assert_value(&client.query("SHOW work_mem").await.unwrap(), "1MB");
        assert_value(&client.query("SHOW statement_timeout").await.unwrap(), "7s");
        assert_eq!(client.query("SET work_mem = '2MB'; SET application_name = 'other'").await.unwrap().error, None);
        assert_value(&client.query("SHOW application_name").await.unwrap(), "other");
        assert_eq!(client.query("RESET ALL").await.unwrap().error, None);
        assert_value(&client.query("SHOW work_mem").await.unwrap(), "1MB");
        assert_value(&client.query("SHOW application_name").await.unwrap(), "mine");
    }
}

#[tokio::test]
async fn where_the_fleet_allows_logins_nobody_has_a_session_of_its_own() {
    // Others are on that server, too.
    for budget in [("fleet_budget", "true"), ("db_connections", "1000")] {
        let stage = Stage::new(&[budget]);
        let mut plain = stage.client_with(&[("work_mem", "1MB")]).await;
        assert_value(&plain.query("SHOW work_mem").await.unwrap(), "1MB");
        let refused = [
            (OWN, "55P02"),
            (("options", "-P"), "42601"),
            (("post_auth_delay", "0"), "55P02"),
            // A SET would be accepted, and do nothing.
            (("local_preload_libraries", "auto_explain"), "55P02"),
            (("options", "-c session_preload_libraries=auto_explain"), "55P02"),
        ];
        for (parameters, code) in refused {
            let mut wire = Wire::connect(stage.addr()).await.unwrap();
            let all = [("user", stage.name()), ("database", stage.name()), parameters];
            match wire.login_with(&all, "").await {
                Err(WireError::Refused(error)) => {
                    assert_eq!((error.severity(), error.sqlstate()), ("FATAL", code), "{error}");
                }
                other => panic!("{parameters:?}: {other:?}"),
            }
        }
        assert_value(&plain.query(SHOW).await.unwrap(), "off");
        let mut nothing = stage.client_with(&[("local_preload_libraries", "")]).await;
        assert_value(&nothing.query("SHOW local_preload_libraries").await.unwrap(), "");
    }
}

#[tokio::test]
async fn wrong_values_cost_no_server_connection_where_nobody_gets_one_of_its_own() {
    let pins = ("max_pinned", "1");
    for settings in [[("fleet_budget", "true")], [("db_connections", "1000")], [pins]] {
        let is_full = settings[0] == pins;
        let size = if is_full { "2" } else { "1" };
        let stage = Stage::new(&[settings[0], ("default_pool_size", size), ("query_wait_timeout", "2s")]);
        let _own = if is_full { Some(stage.client_with(&[OWN]).await) } else { None };
        let mut plain = stage.client().await;
        assert_value(&plain.query("SELECT 1").await.unwrap(), "1");
        let open = stage.backends();
        let dirty = || stage.metric("pgweir_server_discards_total");
        let before = dirty();
        let half = "-c client_encoding=LATIN1 -c search_path=nowhere -c app.x=1 -c work_mem=nonsense";
        let lasting = [("work_mem", "nonsense"), ("options", half), ("no_such_setting", "1")];
        let role = ("options", "-c search_path=nowhere -c role=no_such_role");
        for _ in 0..3 {
            for parameters in lasting.iter().chain([&role]) {
                let all = [("user", stage.name()), ("database", stage.name()), *parameters];
                let want = refusal(stage.place.cluster.addr(), &all, PASSWORD).await;
                let got = refusal(stage.addr(), &all, "").await;
                assert_eq!((got.severity(), got.sqlstate()), ("FATAL", want.sqlstate()), "{parameters:?}: {got}");
                for (setting, want) in
                    [("search_path", "\"$user\", public"), ("client_encoding", "UTF8"), ("work_mem", "4MB")]
                {
                    assert_value(&plain.query(&format!("SHOW {setting}")).await.unwrap(), want);
                }
                assert_value(&plain.query("SELECT current_user = session_user").await.unwrap(), "t");
            }
        }
        // What will last is remembered: nobody is asked.
        assert_eq!(plain.query("BEGIN").await.unwrap().status, b'T');
        for parameters in &lasting {
            let all = [("user", stage.name()), ("database", stage.name()), *parameters];
            let got = refusal(stage.addr(), &all, "").await;
            assert!(got.sqlstate() != "53300", "{settings:?}, {parameters:?}: {got}");
        }
        assert_eq!(stage.backends(), open, "{settings:?}");
        assert!(dirty() - before < 0.5, "{settings:?}: {} were closed", dirty() - before);
    }
}

#[tokio::test]
async fn a_name_that_is_too_long_is_told_of_though_there_is_a_tag() {
    let stage = Stage::new(&[("fleet_budget", "true")]);
    let long = "x".repeat(70);
    for _ in 0..2 {
        let mut wire = Wire::connect(stage.addr()).await.unwrap();
        let all = [("user", stage.name()), ("database", stage.name()), ("application_name", &*long)];
        let told = wire.login_with(&all, "").await.unwrap();
        let notices: Vec<_> = told.iter().filter(|told| told.tag == b'N').filter_map(Message::server_error).collect();
        let notices: Vec<_> = notices.iter().map(ServerError::sqlstate).collect();
        assert_eq!(notices, ["42622"]);
    }
}

#[tokio::test]
async fn many_who_come_at_once_stay_within_the_pool() {
    let site = Site::start(&[("default_pool_size", "4"), ("max_pinned", "3")]);
    let watch = site.place.cap_watch(4);
    let come = async |number: usize| {
        let parameters = if number.is_multiple_of(2) { vec![OWN] } else { Vec::new() };
        loop {
            match try_client(&site, &parameters).await {
                Ok(mut client) => {
                    let want = if parameters.is_empty() { "off" } else { "on" };
                    assert_value(&client.query(SHOW).await.unwrap(), want);
                    return if number.is_multiple_of(3) { client.abort() } else { client.terminate().await };
                }
                Err(error) => {
                    assert_eq!(error.server_error().map(|e| e.sqlstate().to_owned()).as_deref(), Some("53300"));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    for done in futures_util::future::join_all((0..60).map(come)).await {
        done.unwrap();
    }
    wait_until(SOON, || pinned(&site) < 0.5);
    wait_until(SOON, || logins(&site) >= 30.0);
    watch.finish();
}
