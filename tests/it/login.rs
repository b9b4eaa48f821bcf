//! Logging in: who gets in, what the others are told, and what a client is told when it is in.

mod own;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pgweir_harness::mock_server::say;
use pgweir_harness::wire::build::{message_lying, sasl_initial, ssl_request, startup};
use pgweir_harness::wire::{Message, ServerError, Wire, WireError};
use pgweir_harness::{MockServer, Step, wait_until, wait_until_async};

use crate::server_auth::toml_before;
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, metric_in, primary, start_pgweir};

const SCRAM: (&str, &str) = ("auth_type", "scram-sha-256");

/// The error that a login is refused with; the peer must close after it.
async fn refusal(address: std::net::SocketAddr, parameters: &[(&str, &str)], password: &str) -> ServerError {
    let mut wire = Wire::connect(address).await.unwrap();
    match wire.login_with(parameters, password).await {
        Err(WireError::Refused(error)) => {
            assert!(wire.eof().await, "not closed after {error}");
            error
        }
        Err(other) => other.server_error().unwrap_or_else(|| panic!("{other}")),
        Ok(messages) => panic!("let in: {messages:?}"),
    }
}

/// What an operator or a driver reads of an error: severity, SQLSTATE and text.
fn words(error: &ServerError) -> (String, String, String) {
    (error.severity().to_owned(), error.sqlstate().to_owned(), error.message().to_owned())
}

#[tokio::test]
async fn a_trusted_client_is_asked_for_nothing() {
    let site = Site::start(&[("auth_type", "trust")]);
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.startup(&[("user", site.name()), ("database", site.name())]).await.unwrap();
    assert_eq!(wire.recv().await.unwrap().authentication(), Some((0, Vec::new())));
    wire.recv_until_ready().await.unwrap();
    assert_value(&wire.query("SELECT current_user = session_user").await.unwrap(), "t");
}

#[tokio::test]
async fn scram_lets_in_who_knows_the_password_and_tells_the_others_what_postgres_tells_them() {
    let site = Site::start(&[SCRAM]);
    let names = [("user", site.name()), ("database", site.name())];
    assert_value(&site.client().await.query("SELECT current_user").await.unwrap(), site.name());
    for wrong in ["", "wrong", "place-secret ", "PLACE-SECRET", "p\u{e4}ssw\u{f6}rd"] {
        let want = refusal(site.place.cluster.addr(), &names, wrong).await;
        let got = refusal(site.pgweir.addr(), &names, wrong).await;
        assert_eq!(words(&got), words(&want), "{wrong:?}");
        assert_eq!(got.sqlstate(), "28P01", "{wrong:?}");
    }
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
}

#[tokio::test]
async fn a_stored_verifier_serves_instead_of_the_password() {
    let place = Place::on(primary());
    let verifier = place.psql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", place.name));
    assert!(verifier.starts_with("SCRAM-SHA-256$4096:"), "{verifier}");
    let site = Site::before(place, &[SCRAM, ("users.PLACE.password", &verifier)]);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    let names = [("user", site.name()), ("database", site.name())];
    for wrong in ["wrong", verifier.as_str()] {
        assert_eq!(refusal(site.pgweir.addr(), &names, wrong).await.sqlstate(), "28P01", "{wrong}");
    }
}

/// What the first message of the SCRAM exchange tells an attacker: the mechanisms, and the salt and
/// the iterations that the server claims.
async fn scram_challenge(site: &Site<'_>, user: &str) -> (Vec<u8>, String, String) {
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.startup(&[("user", user), ("database", site.name())]).await.unwrap();
    let (kind, mechanisms) = wire.recv().await.unwrap().authentication().unwrap();
    assert_eq!(kind, 10);
    wire.send(&sasl_initial("SCRAM-SHA-256", b"n,,n=,r=0123456789abcdefghijklmn")).await.unwrap();
    let (kind, challenge) = wire.recv().await.unwrap().authentication().unwrap();
    assert_eq!(kind, 11);
    let challenge = String::from_utf8(challenge).unwrap();
    let fields: BTreeMap<&str, &str> = challenge.split(',').map(|field| field.split_once('=').unwrap()).collect();
    assert!(fields["r"].starts_with("0123456789abcdefghijklmn") && fields["r"].len() > 40, "{challenge}");
    (mechanisms, fields["s"].to_owned(), fields["i"].to_owned())
}

#[tokio::test]
async fn an_unknown_user_cannot_be_told_from_a_wrong_password() {
    let site = Site::start(&[SCRAM]);
    let known = scram_challenge(&site, site.name()).await;
    let unknown = scram_challenge(&site, "nobody-here").await;
    let another = scram_challenge(&site, "nobody-else").await;
    assert_eq!((&known.0, &known.2, known.1.len()), (&unknown.0, &unknown.2, unknown.1.len()));
    assert_ne!(unknown.1, another.1, "every name has its own salt");
    // A salt that changed with every attempt would give the mock away.
    assert_eq!(scram_challenge(&site, "nobody-here").await, unknown);
    assert_eq!(scram_challenge(&site, site.name()).await, known);

    let wrong = refusal(site.pgweir.addr(), &[("user", site.name()), ("database", site.name())], "wrong").await;
    let nobody = refusal(site.pgweir.addr(), &[("user", "nobody-here"), ("database", site.name())], "wrong").await;
    let fields = |error: &ServerError, name: &str| -> Vec<(u8, String)> {
        error.fields.iter().map(|(code, text)| (*code, text.replace(name, "NAME"))).collect()
    };
    assert_eq!(fields(&wrong, site.name()), fields(&nobody, "nobody-here"));
}

#[tokio::test]
async fn a_verifier_that_is_made_here_takes_as_many_rounds_as_wanted_and_so_does_a_mock() {
    for (settings, want) in [(&[SCRAM][..], "4096"), (&[SCRAM, ("scram_iterations", "10000")], "10000")] {
        let site = Site::start(settings);
        for user in [site.name(), "nobody-here"] {
            assert_eq!(scram_challenge(&site, user).await.2, want, "{user}");
        }
        assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
        let names = [("user", site.name()), ("database", site.name())];
        assert_eq!(refusal(site.pgweir.addr(), &names, "wrong").await.sqlstate(), "28P01");
    }
}

/// What the refusal takes, in pairs one behind the other, so that a busy machine slows both down.
#[tokio::test]
async fn an_unknown_user_is_refused_in_the_time_that_a_wrong_password_takes() {
    let site = Site::start(&[SCRAM, ("login_failure_rate", "0")]);
    let timed = async |user: &str| {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        let begun = Instant::now();
        let refused = wire.login_with(&[("user", user), ("database", site.name())], "not-the-password").await;
        assert!(refused.is_err());
        begun.elapsed().as_secs_f64()
    };
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for n in 0..150 {
        known.push(timed(site.name()).await);
        unknown.push(timed(&format!("nobody-{}", n % 5)).await);
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let ratio = median(&mut unknown) / median(&mut known);
    assert!((0.8..1.25).contains(&ratio), "an unknown user takes {ratio:.2} times as long");
}

#[tokio::test]
async fn an_unknown_database_is_told_only_to_who_has_proven_himself() {
    let site = Site::start(&[SCRAM]);
    let names = [("user", site.name()), ("database", "nowhere")];
    let want = refusal(site.place.cluster.addr(), &names, PASSWORD).await;
    let got = refusal(site.pgweir.addr(), &names, PASSWORD).await;
    assert_eq!((words(&got), got.sqlstate()), (words(&want), "3D000"));
    assert_eq!(refusal(site.pgweir.addr(), &names, "wrong").await.sqlstate(), "28P01");
    let nobody = [("user", "nobody-here"), ("database", "nowhere")];
    assert_eq!(refusal(site.pgweir.addr(), &nobody, "wrong").await.sqlstate(), "28P01");
}

#[tokio::test]
async fn a_database_that_the_server_does_not_know_is_told_in_the_servers_words() {
    let site = Site::start(&[("databases.PLACE.dbname", "gone")]);
    let names = [("user", site.name()), ("database", site.name())];
    let got = refusal(site.pgweir.addr(), &names, PASSWORD).await;
    assert_eq!((got.sqlstate(), got.message()), ("3D000", "database \"gone\" does not exist"));
}

#[tokio::test]
async fn the_user_must_be_named_and_is_the_databases_name_if_none_is_given() {
    let site = Site::start(&[SCRAM]);
    let want = refusal(site.place.cluster.addr(), &[("database", site.name())], PASSWORD).await;
    let got = refusal(site.pgweir.addr(), &[("database", site.name())], PASSWORD).await;
    assert_eq!((words(&got), got.sqlstate()), (words(&want), "28000"));
    let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
    wire.login_with(&[("user", site.name())], PASSWORD).await.unwrap();
    assert_value(&wire.query("SELECT current_database()").await.unwrap(), site.name());
}

#[tokio::test]
async fn whoever_does_not_log_in_within_the_deadline_is_disconnected() {
    let site = Site::start(&[SCRAM, ("client_login_timeout", "1s")]);
    let greeting = startup(&[("user", site.name()), ("database", site.name())]);
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>); 5] = [
        ("silence",                 Vec::new()),
        ("half a greeting",         greeting[..10].to_vec()),
        ("encryption, then silence", ssl_request()),
        ("no password",             greeting.clone()),
        ("half a password",         [greeting, message_lying(b'p', 100, b"SCRAM-SHA-256\0")].concat()),
    ];
    for (name, bytes) in table {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        let start = Instant::now();
        wire.send(&bytes).await.unwrap();
        // Whatever it says meanwhile; what counts is the end.
        while wire.recv_raw(1).await.is_ok() {}
        let took = start.elapsed();
        // Exact to a tick of pgweir's clock, 100 ms.
        assert!(took > Duration::from_millis(890) && took < SOON, "{name}: {took:?}");
    }
    wait_until(SOON, || site.metric("pgweir_clients_refused_total", &["reason=\"deadline\""]) >= 5.0);
    let mut client = site.client().await;
    assert_value(&client.query("SELECT 1, pg_sleep(1.2)").await.unwrap(), "1");
}

#[tokio::test]
async fn clients_beyond_max_client_conn_are_refused_with_53300_until_one_leaves() {
    let site = Site::start(&[("max_client_conn", "3"), ("default_pool_size", "1")]);
    let names = [("user", site.name()), ("database", site.name())];
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(site.client().await);
    }
    for _ in 0..5 {
        let error = refusal(site.pgweir.addr(), &names, PASSWORD).await;
        assert_eq!((error.sqlstate(), error.severity()), ("53300", "FATAL"), "{error}");
        assert!(error.to_string().contains("max_client_conn"), "{error}");
    }
    for client in &mut clients {
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    }
    clients.pop().unwrap().terminate().await.unwrap();
    wait_until_async(SOON, async || {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login_with(&names, PASSWORD).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn clients_that_have_not_logged_in_are_limited_on_their_own() {
    let site = Site::start(&[SCRAM, ("max_login_clients", "3"), ("client_login_timeout", "60s")]);
    let mut ready = site.client().await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.send(&ssl_request()).await.unwrap();
        assert_eq!(wire.recv_raw(1).await.unwrap(), b"N");
        silent.push(wire);
    }
    // The fourth takes the place of the one that has had it for longest.
    drop(site.client().await);
    assert_value(&ready.query("SELECT 1").await.unwrap(), "1");
    let mut silent = silent.into_iter();
    assert!(silent.next().unwrap().eof().await, "the oldest gave way");
    for mut wire in silent {
        assert_eq!(wire.recv_within(Duration::from_millis(200)).await.unwrap(), None, "the others did not");
    }
}

#[tokio::test]
async fn startup_parameters_hold_for_their_client_whoever_had_the_server_connection_before() {
    const SHOWN: [&str; 5] = ["search_path", "TimeZone", "statement_timeout", "work_mem", "application_name"];
    type Settings = &'static [(&'static str, &'static str)];
    #[rustfmt::skip]
    let table: [(Settings, [&str; 5]); 4] = [
        (&[],                                                                                             ["\"$user\", public", "", "0", "4MB", ""]),
        (&[("search_path", "a, \"B c\""), ("TimeZone", "Asia/Tokyo"), ("application_name", "it's \"me\"")], ["a, \"B c\"", "Asia/Tokyo", "0", "4MB", "it's \"me\""]),
        (&[("statement_timeout", "12345"), ("timezone", "America/New_York")],                             ["\"$user\", public", "America/New_York", "12345ms", "4MB", ""]),
        (&[("options", "-c work_mem=7MB -csearch_path=\"b\\ c\" --statement-timeout=9s")],                    ["\"b c\"", "", "9s", "7MB", ""]),
    ];
    for pool in ["1", "3"] {
        let site = Site::start(&[("default_pool_size", pool)]);
        let mut plain = site.place.direct().await;
        let server_zone = plain.query("SHOW TimeZone").await.unwrap().value().unwrap().to_owned();
        let mut clients = Vec::new();
        for (settings, want) in table {
            clients.push((site.client_with(settings).await, settings, want));
        }
        for round in 0..5 {
            for (client, settings, want) in &mut clients {
                for (name, want) in SHOWN.iter().zip(want.iter()) {
                    let want = if *name == "TimeZone" && want.is_empty() { server_zone.as_str() } else { want };
                    let got = client.query(&format!("SHOW {name}")).await.unwrap();
                    assert_eq!(
                        (got.value(), got.sqlstate()),
                        (Some(want), ""),
                        "pool of {pool}, round {round}, {settings:?}: {name}"
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn a_client_is_told_the_parameters_that_postgres_would_tell_it() {
    let site = Site::start(&[]);
    #[rustfmt::skip]
    let table: [&[(&str, &str)]; 4] = [
        &[],
        &[("application_name", "me"), ("TimeZone", "asia/tokyo"), ("DateStyle", "german")],
        &[("client_encoding", "latin1"), ("options", "-c IntervalStyle=iso_8601")],
        &[("client_encoding", "UTF8"), ("extra_float_digits", "3")],
    ];
    // Twice: the first client of a pool is told what comes from its server, the next what was learnt.
    for settings in table.iter().chain(&table) {
        let own = [("user", site.name()), ("database", site.name())];
        let all: Vec<(&str, &str)> = own.iter().chain(*settings).copied().collect();
        let mut direct = Wire::connect(site.place.cluster.addr()).await.unwrap();
        direct.login_with(&all, PASSWORD).await.unwrap();
        let client = site.client_with(settings).await;
        assert_eq!(client.parameters, direct.parameters, "{settings:?}");
    }
}

#[tokio::test]
async fn a_start_up_value_is_its_clients_though_connect_query_sets_another_and_all_are_told_what_is() {
    let query = "SET TimeZone TO 'Europe/Berlin'";
    let site = Site::start(&[("default_pool_size", "2"), ("databases.PLACE.connect_query", query)]);
    let direct = Wire::open(site.place.cluster.addr(), site.name(), site.name(), PASSWORD).await.unwrap();
    let default = direct.parameters.get("TimeZone").unwrap().as_str();
    assert_ne!(default, "Europe/Berlin");
    let (own, other) = (("ignore_system_indexes", "on"), ("IntervalStyle", "iso_8601"));
    #[rustfmt::skip]
    let table: [(&[(&str, &str)], &str, &str); 7] = [
        (&[],                                    "Europe/Berlin", "Europe/Berlin"),
        (&[("TimeZone", default)],               default,         default),
        (&[("TimeZone", "Europe/Berlin")],       "Europe/Berlin", "Europe/Berlin"),
        (&[("TimeZone", "Asia/Tokyo")],          "Asia/Tokyo",    "Asia/Tokyo"),
        (&[other],                               "Europe/Berlin", "Europe/Berlin"),
        (&[own],                                 "Europe/Berlin", default),
        (&[own, ("TimeZone", default)],          default,         default),
    ];
    let mut plain = site.client().await;
    for (settings, want, after_reset) in table.iter().chain(&table) {
        let mut client = site.client_with(settings).await;
        assert_eq!(client.parameters.get("TimeZone").unwrap(), want, "{settings:?}");
        for _ in 0..2 {
            assert_value(&client.query("SHOW TimeZone").await.unwrap(), want);
            assert_value(&plain.query("SHOW TimeZone").await.unwrap(), "Europe/Berlin");
        }
        assert_eq!(client.query("RESET TimeZone").await.unwrap().error, None, "{settings:?}");
        assert_value(&client.query("SHOW TimeZone").await.unwrap(), after_reset);
        client.terminate().await.unwrap();
    }
}

#[tokio::test]
async fn a_bad_startup_parameter_is_refused_in_the_servers_words() {
    let site = Site::start(&[("default_pool_size", "1")]);
    #[rustfmt::skip]
    let table = [
        ("TimeZone", "Nowhere/Nothing"),
        ("no_such_setting", "1"),
        ("statement_timeout", "soon"),
        ("work_mem", "1"),
        ("DateStyle", "whatever"),
        ("client_encoding", "nonsense"),
        ("max_connections", "5"),
        ("session_replication_role", "replica"),
        ("options", "-c no_such_setting=1"),
        ("options", "-c TimeZone=Nowhere"),
    ];
    // Twice: once refused by the server, then from memory.
    for (name, value) in table.iter().chain(&table) {
        let parameters = [("user", site.name()), ("database", site.name()), (name, value)];
        let want = refusal(site.place.cluster.addr(), &parameters, PASSWORD).await;
        let got = refusal(site.pgweir.addr(), &parameters, PASSWORD).await;
        assert_eq!(words(&got), words(&want), "{name}={value}");
    }
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
}

#[tokio::test]
async fn the_login_notice_reaches_every_client_once() {
    let site = Site::start(&[("login_notify_message", "maintenance at noon"), ("default_pool_size", "1")]);
    for _ in 0..3 {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        let messages = wire.login(site.name(), site.name(), PASSWORD).await.unwrap();
        assert_eq!(notices(&messages), ["maintenance at noon"]);
        assert_eq!(wire.query("SELECT 1").await.unwrap().notices, []);
    }
}

/// What a client was told by notices.
fn notices(messages: &[Message]) -> Vec<String> {
    messages.iter().filter(|message| message.tag == b'N').filter_map(|notice| notice.error_field(b'M')).collect()
}

#[tokio::test]
async fn what_the_server_says_at_its_newest_login_every_client_is_told_once() {
    let server = MockServer::start(|number| {
        let words = if number == 0 { [say::notice("one"), say::notice("two")].concat() } else { say::notice("three") };
        vec![Step::Startup, Step::Send([say::auth(0, b""), words, say::greeting()].concat()), Step::Serve]
    });
    let server = server.unwrap();
    let settings =
        [("default_pool_size", "1"), ("server_lifetime", "0s"), ("login_notify_message", "and the pooler's")];
    let pgweir = start_pgweir(toml_before(server.addr(), &settings));
    for (client, want) in [&["one", "two"][..], &["one", "two"], &["three"], &["three"]].into_iter().enumerate() {
        if client == 2 {
            // The first is too old by now: this is told by another.
            let mut wire = Wire::open(pgweir.addr(), "db", "db", PASSWORD).await.unwrap();
            let outcome = wire.query("SELECT 1").await.unwrap();
            assert_value(&outcome, "mock");
            assert_eq!(outcome.notices, [], "what is said at a login is no answer to a query");
            assert!(server.logins() > 1);
        }
        let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
        let told = notices(&wire.login("db", "db", PASSWORD).await.unwrap());
        assert_eq!(told, [want, &["and the pooler's"]].concat(), "client {client}");
    }
}

#[tokio::test]
async fn a_wrong_password_upstream_is_told_at_once_and_not_tried_again_and_again() {
    const CLIENTS: usize = 40;
    let place = Place::on(primary());
    let pgweir = start_pgweir(place.toml(&[("databases.PLACE.password", "upstream-wrong")]));
    let site = Site { place, pgweir };
    let names = [("user", site.name()), ("database", site.name())];
    let start = Instant::now();
    let attempts = (0..CLIENTS).map(|_| refusal(site.pgweir.addr(), &names, PASSWORD));
    for error in futures_util::future::join_all(attempts).await {
        assert_eq!((error.sqlstate(), error.severity()), ("28P01", "FATAL"), "{error}");
    }
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    let complaint = format!("password authentication failed for user \"{}\"", site.name());
    let tried = site.place.cluster.log_text().matches(&complaint).count();
    assert!((1..=10).contains(&tried), "the server was tried {tried} times for {CLIENTS} clients");
    wait_until(SOON, || {
        let (status, body) = site.pgweir.http_get("/readyz").unwrap();
        status == 503 && body.contains("wrong_credentials") && body.contains("28P01")
    });
    // Once the password is right, clients get in without a restart.
    site.place.psql(&format!("ALTER ROLE {} PASSWORD 'upstream-wrong'", site.name()));
    wait_until_async(SOON, async || {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.login_with(&names, PASSWORD).await.is_ok()
    })
    .await;
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 200);
}

#[tokio::test]
async fn passwords_never_reach_the_log_or_the_metrics() {
    let place = Place::on(primary());
    let verifier = place.psql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{}'", place.name));
    let settings =
        [SCRAM, ("log_level", "trace"), ("users.other.password", &verifier), ("users.third.password", "third-secret")];
    let site = Site::before(place, &settings);
    site.client().await.query("SELECT 1").await.unwrap();
    let database = ("database", site.name());
    for user in [site.name(), "other", "third", "nobody"] {
        refusal(site.pgweir.addr(), &[("user", user), database], "guessed-secret").await;
    }
    site.client().await.terminate().await.unwrap();
    wait_until(SOON, || site.metric("pgweir_clients_refused_total", &["reason=\"auth_failed\""]) >= 4.0);
    let (log, metrics) = (site.pgweir.log(), site.pgweir.http_get("/metrics").unwrap().1);
    assert!(log.contains(site.name()), "the log tells nothing: {log}");
    assert!(metric_in(&metrics, "pgweir_client_logins_total", &[]) >= 2.0, "{metrics}");
    let keys: Vec<&str> = verifier.split(['$', ':']).skip(2).collect();
    for secret in [PASSWORD, "third-secret", "guessed-secret", "SCRAM-SHA-256$"].into_iter().chain(keys) {
        assert!(!log.contains(secret), "{secret} is in the log");
        assert!(!metrics.contains(secret), "{secret} is in the metrics");
    }
}

#[tokio::test]
async fn no_server_connection_is_opened_before_the_first_client_and_later_logins_need_none() {
    let site = Site::start(&[("default_pool_size", "1"), ("min_pool_size", "1")]);
    let watch = site.place.cap_watch(1);
    // Several ticks of its housekeeping.
    wait_until(SOON, || site.pgweir.http_get("/healthz").unwrap().0 == 200);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(watch.most(), 0);
    let mut first = site.client().await;
    assert_eq!(first.query("BEGIN").await.unwrap().status, b'T');
    // The only server connection is taken, and yet others log in.
    let mut second = site.client().await;
    assert_eq!(second.parameters, first.parameters);
    assert_eq!(first.query("COMMIT").await.unwrap().status, b'I');
    assert_value(&second.query("SELECT 1").await.unwrap(), "1");
    wait_until(SOON, || watch.most() == 1);
}
