//! Users that are looked up on the server.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::wire::{Wire, WireError};
use pgweir_harness::{ConnectionFilter, wait_until_async};

use super::refusal;
use crate::support::{CapWatch, PASSWORD, Place, SOON, Site, assert_value, primary};

const SCRAM: (&str, &str) = ("auth_type", "scram-sha-256");

/// A place with a role that may look users up; its name.
fn place() -> (Place<'static>, String) {
    let place = Place::on(primary());
    let auth = format!("{}_auth", place.name);
    place.psql(&format!("CREATE ROLE {auth} LOGIN SUPERUSER PASSWORD 'auth-secret'"));
    (place, auth)
}

/// A pgweir that looks users up there; clients use the place's own role, whoever they are.
fn site(settings: &[(&str, &str)]) -> (Site<'static>, String) {
    let (place, auth) = place();
    (before(place, &auth, settings), auth)
}

fn before(place: Place<'static>, auth: &str, settings: &[(&str, &str)]) -> Site<'static> {
    let key = format!("users.{auth}.password");
    let mut all = vec![SCRAM, ("auth_user", auth), (key.as_str(), "auth-secret")];
    all.extend_from_slice(settings);
    Site::before(place, &all)
}

/// A role of the server with this password; its name.
fn role(site: &Site<'_>, suffix: &str, rest: &str) -> String {
    let name = format!("{}_{suffix}", site.name());
    site.place.psql(&format!("CREATE ROLE \"{name}\" LOGIN PASSWORD 'first-secret' {rest}"));
    name
}

async fn enter(site: &Site<'_>, user: &str, password: &str) -> Result<Wire, WireError> {
    let mut wire = Wire::connect(site.pgweir.addr()).await?;
    wire.login(user, site.name(), password).await?;
    Ok(wire)
}

#[tokio::test]
async fn who_is_known_to_the_server_gets_in_and_nobody_else() {
    for auth_type in ["scram-sha-256", "md5", "plain"] {
        let (site, auth) = site(&[("auth_type", auth_type), ("auth_plain_without_tls", "true")]);
        let user = role(&site, "user", "");
        assert_value(
            &enter(&site, &user, "first-secret").await.unwrap().query("SELECT current_user").await.unwrap(),
            site.name(),
        );
        // Those of the configuration are asked for nothing there.
        assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
        let (cannot, without) = (role(&site, "cannot", ""), role(&site, "without", ""));
        site.place.psql(&format!("ALTER ROLE {cannot} NOLOGIN; ALTER ROLE {without} PASSWORD NULL"));
        let wrong = refusal(site.pgweir.addr(), &user, site.name(), "wrong").await;
        assert_eq!(wrong.sqlstate(), "28P01", "{auth_type}");
        for other in [cannot.as_str(), without.as_str(), "nobody-here", ""] {
            let other = if other.is_empty() { user.to_uppercase() } else { other.to_owned() };
            // The password of auth_user opens nothing for others either.
            for password in ["first-secret", "auth-secret"] {
                let error = refusal(site.pgweir.addr(), &other, site.name(), password).await;
                let words = error.message().replace(&other, &user);
                assert_eq!((words.as_str(), error.sqlstate()), (wrong.message(), "28P01"), "{auth_type} {other}");
            }
        }
        // A database that does not exist is told to who has proven himself, and to nobody else.
        assert_eq!(refusal(site.pgweir.addr(), &user, "nowhere", "first-secret").await.sqlstate(), "3D000");
        assert_eq!(refusal(site.pgweir.addr(), &user, "nowhere", "wrong").await.sqlstate(), "28P01");
        let log = site.pgweir.log();
        assert!(!log.contains("SCRAM-SHA-256$") && !log.contains("auth-secret"), "a secret is in the log");
        site.place.psql(&format!("DROP ROLE {auth}"));
    }
}

#[tokio::test]
async fn a_password_that_is_no_longer_valid_opens_nothing() {
    let (site, _) = site(&[]);
    let over = role(&site, "over", "VALID UNTIL '2001-01-01'");
    let soon = role(&site, "soon", "VALID UNTIL '2101-01-01'");
    let ever = role(&site, "ever", "VALID UNTIL 'infinity'");
    assert_eq!(refusal(site.pgweir.addr(), &over, site.name(), "first-secret").await.sqlstate(), "28P01");
    assert!(enter(&site, &soon, "first-secret").await.is_ok());
    assert!(enter(&site, &ever, "first-secret").await.is_ok());
    site.place.psql(&format!("ALTER ROLE {soon} VALID UNTIL '2001-01-01'"));
    wait_until_async(SOON, async || enter(&site, &soon, "first-secret").await.is_err()).await;
}

#[tokio::test]
async fn a_changed_password_holds_after_one_failed_login_however_long_answers_are_kept() {
    let (site, _) = site(&[("auth_query_ttl", "1h")]);
    let user = role(&site, "user", "");
    assert!(enter(&site, &user, "first-secret").await.is_ok());
    site.place.psql(&format!("ALTER ROLE {user} PASSWORD 'second-secret'"));
    // What was found is kept, ...
    assert!(enter(&site, &user, "first-secret").await.is_ok());
    // ... until it fails: then it is asked for again, once in a second.
    wait_until_async(SOON, async || enter(&site, &user, "second-secret").await.is_ok()).await;
    assert!(enter(&site, &user, "first-secret").await.is_err());
    // That there is no such user is kept no longer either.
    assert!(enter(&site, &format!("{}_late", site.name()), "first-secret").await.is_err());
    let late = role(&site, "late", "");
    wait_until_async(SOON, async || enter(&site, &late, "first-secret").await.is_ok()).await;
}

#[tokio::test]
async fn an_answer_is_used_until_it_is_too_old_and_then_asked_for_again() {
    let ttl = Duration::from_secs(10);
    let (site, _) = site(&[("auth_query_ttl", "10s")]);
    let user = role(&site, "user", "");
    let asked = Instant::now();
    assert!(enter(&site, &user, "first-secret").await.is_ok());
    site.place.psql(&format!("ALTER ROLE {user} PASSWORD 'second-secret'"));
    // No login fails until it is too old: nothing else makes it be asked for again.
    let mut entries = 0;
    wait_until_async(ttl + SOON, async || {
        let entered = enter(&site, &user, "first-secret").await.is_ok();
        entries += u32::from(entered);
        !entered
    })
    .await;
    assert!(asked.elapsed() >= ttl, "asked for again after {:?}", asked.elapsed());
    assert!(entries > 0, "a new password, and the old one not used once in {ttl:?}");
    assert!(enter(&site, &user, "second-secret").await.is_ok());
}

#[tokio::test]
async fn a_name_is_a_parameter_and_never_text_of_the_query() {
    let (site, _) = site(&[]);
    site.place.psql("CREATE TABLE precious (n int)");
    for name in
        ["o'brien", "back\\slash", "'; DROP TABLE precious; --", "x' OR '1'='1", "$1", "\u{fc}ml\u{e4}ut", "%s\t"]
    {
        let role = name.replace('"', "\"\"");
        site.place.psql(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'first-secret'"));
        assert!(enter(&site, name, "first-secret").await.is_ok(), "{name}");
        assert!(enter(&site, name, "wrong").await.is_err(), "{name}");
        site.place.psql(&format!("DROP ROLE \"{role}\""));
    }
    // Longer than a name of the server, and cut to one by it.
    let long = format!("{}_{}", site.name(), "x".repeat(60));
    site.place.psql(&format!("CREATE ROLE \"{}\" LOGIN PASSWORD 'first-secret'", &long[..63]));
    assert!(enter(&site, &long[..63], "first-secret").await.is_ok());
    assert_eq!(refusal(site.pgweir.addr(), &long, site.name(), "first-secret").await.sqlstate(), "28P01");
    assert_eq!(site.place.psql("SELECT count(*) FROM precious"), "0");
}

#[tokio::test]
async fn no_parameter_of_a_client_or_of_the_role_changes_what_the_query_finds() {
    // Careless on purpose: with another search_path this reads another table.
    let query = "SELECT usename, passwd FROM pg_shadow WHERE usename = $1";
    let (place, auth) = place();
    let name = place.name.clone();
    place.psql(&format!(
        "CREATE SCHEMA evil; CREATE TABLE evil.pg_shadow (usename text, passwd text); \
         INSERT INTO evil.pg_shadow VALUES ('{name}_user', 'evil'), ('nobody-here', 'evil'); \
         GRANT ALL ON SCHEMA evil TO PUBLIC; GRANT ALL ON evil.pg_shadow TO PUBLIC; \
         ALTER ROLE {auth} SET search_path = evil, pg_catalog"
    ));
    for forced in [true, false] {
        let (user, password) = (format!("databases.{name}.user"), format!("databases.{name}.password"));
        let mut settings = vec![("auth_query", query), ("auth_query_ttl", "0s"), ("default_pool_size", "1")];
        if !forced {
            // Then the place's role comes with its own password, and auth_user's clients share its pool.
            settings.extend([(user.as_str(), name.as_str()), (password.as_str(), PASSWORD)]);
        }
        let site = before(place.clone(), &auth, &settings);
        if forced {
            role(&site, "user", "");
        }
        let real = format!("{name}_user");
        for parameters in [
            vec![],
            vec![("search_path", "evil, pg_catalog")],
            vec![("options", "-c search_path=evil,pg_catalog")],
            vec![("search_path", "evil, pg_catalog"), ("client_encoding", "LATIN1"), ("role", auth.as_str())],
        ] {
            for (user, password, want) in [(real.as_str(), "evil", "28P01"), ("nobody-here", "evil", "28P01")] {
                let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
                let all: Vec<_> =
                    [("user", user), ("database", name.as_str())].into_iter().chain(parameters.clone()).collect();
                let error = wire.login_with(&all, password).await.unwrap_err().server_error().unwrap();
                assert_eq!(error.sqlstate(), want, "{parameters:?}");
            }
            let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
            let all: Vec<_> =
                [("user", real.as_str()), ("database", &name)].into_iter().chain(parameters.clone()).collect();
            // Whatever becomes of its parameters later.
            let login = wire.login_with(&all, "first-secret").await;
            assert!(login.is_ok() || parameters.iter().any(|(name, _)| *name == "role"), "{parameters:?} {login:?}");
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_not_the_users_lets_nobody_in() {
    let (place, auth) = place();
    let name = place.name.clone();
    place.psql(&format!("CREATE ROLE {name}_user LOGIN PASSWORD 'first-secret'"));
    let secret = "(SELECT rolpassword FROM pg_authid WHERE rolname = $1)";
    #[rustfmt::skip]
    let table: Vec<(&str, String, &str)> = vec![
        ("right",           format!("SELECT $1::text, {secret}"),                            "ok"),
        ("auth_user's",     format!("SELECT rolname, rolpassword FROM pg_authid WHERE rolname = '{auth}' AND $1 <> ''"), "28P01"),
        ("two rows",        format!("SELECT $1::text, {secret} UNION ALL SELECT $1, 'x'"),   "28P01"),
        ("half a verifier", "SELECT $1::text, 'SCRAM-SHA-256$4096:AAAA$x'".to_owned(),       "28P01"),
        ("no name",         format!("SELECT NULL::text, {secret}"),                          "28P01"),
        ("an empty secret", "SELECT $1::text, ''".to_owned(),                                "28P01"),
        ("plain",           "SELECT $1::text, 'first-secret'".to_owned(),                           "ok"),
        ("one column",      "SELECT $1::text".to_owned(),                                    "F0000"),
        ("three columns",   format!("SELECT $1::text, {secret}, 1"),                         "F0000"),
        ("no rows ever",    "SET work_mem = '4MB'".to_owned(),                               "F0000"),
        ("not SQL",         "SELEKT".to_owned(),                                             "F0000"),
        ("no parameter",    "SELECT 'a', 'b'".to_owned(),                                    "F0000"),
        ("two statements",  "SELECT 1; SELECT $1, 'x'".to_owned(),                           "F0000"),
        ("a fatal one",     "SELECT $1::text, pg_terminate_backend(pg_backend_pid())::text".to_owned(), "57P03"),
        ("a huge one",      "SELECT $1::text, repeat('x', 1000000)".to_owned(),              "57P03"),
    ];
    for (case, query, want) in table {
        let site = before(place.clone(), &auth, &[("auth_query", &query)]);
        let user = format!("{name}_user");
        match enter(&site, &user, "first-secret").await {
            Ok(_) => assert_eq!("ok", want, "{case}"),
            Err(error) => {
                let error = error.server_error().unwrap();
                assert_eq!(error.sqlstate(), want, "{case}: {error}");
                assert!(!error.to_string().contains(&auth), "{case}: {error}");
            }
        }
        if want == "F0000" || want == "57P03" {
            site.pgweir.wait_log("auth_query failed", SOON).unwrap();
        }
        // Those of the configuration are none the worse for it.
        assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    }
}

#[tokio::test]
async fn looking_up_stays_within_the_cap_and_waits_for_nobody_who_waits_for_it() {
    let (site, _) = site(&[("default_pool_size", "1"), ("max_db_connections", "1"), ("auth_query_ttl", "0s")]);
    let users: Vec<String> = (0..12).map(|n| role(&site, &format!("user{n}"), "")).collect();
    let filter = ConnectionFilter { database: Some(site.name().to_owned()), ..ConnectionFilter::default() };
    let watch = CapWatch::start(site.place.cluster, &filter, 1);
    for round in 0..3 {
        let clients = users.iter().map(async |user| {
            let mut wire = enter(&site, user, "first-secret").await.unwrap();
            wire.query("SELECT pg_sleep(0.01)").await.unwrap().tags.len()
        });
        let done: usize = join_all(clients).await.into_iter().sum();
        assert_eq!(done, users.len(), "round {round}");
    }
    assert!(watch.finish() > 0);
}

#[tokio::test]
async fn the_server_is_asked_once_for_all_that_ask_at_once_and_guessing_does_not_storm_it() {
    let (place, auth) = place();
    place.psql(
        "CREATE TABLE public.asked (name text); \
         CREATE FUNCTION public.look(text) RETURNS TABLE (a text, b text) LANGUAGE sql SECURITY DEFINER AS \
         'INSERT INTO public.asked VALUES ($1); SELECT pg_sleep(0.1)::text; \
          SELECT rolname::text, rolpassword FROM pg_authid WHERE rolname = $1'",
    );
    let site = before(place, &auth, &[("auth_query", "SELECT * FROM public.look($1)"), ("login_failure_rate", "0")]);
    let user = role(&site, "user", "");
    let asked = || site.place.psql("SELECT count(*) FROM asked").parse::<u64>().unwrap();
    let logins = join_all((0..50).map(async |_| enter(&site, &user, "first-secret").await.is_ok())).await;
    assert!(logins.iter().all(|ok| *ok));
    assert!((1..=2).contains(&asked()), "{}", asked());
    let start = Instant::now();
    let before = asked();
    while start.elapsed() < Duration::from_secs(2) {
        assert!(enter(&site, &user, "wrong").await.is_err());
    }
    let most = start.elapsed().as_secs() + 2;
    assert!(asked() - before <= most, "{} in {:?}", asked() - before, start.elapsed());
}

/// The users are in one database, and nothing that tells of them in the others.
#[tokio::test]
async fn users_are_looked_up_where_auth_dbname_says() {
    let (of_users, port) = (Place::on(primary()), primary().port().to_string());
    of_users.psql(
        "CREATE FUNCTION public.look(text) RETURNS TABLE (a text, b text) LANGUAGE sql SECURITY DEFINER AS \
         'SELECT rolname::text, rolpassword FROM pg_authid WHERE rolname = $1'",
    );
    let with_users = [
        ("auth_query", "SELECT * FROM public.look($1)"),
        ("databases.of-users.host", "127.0.0.1"),
        ("databases.of-users.port", port.as_str()),
        ("databases.of-users.dbname", of_users.name.as_str()),
    ];
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], bool); 4] = [
        ("where the client wants to go", &[],                                                            false),
        ("globally",                     &[("auth_dbname", "of-users")],                                 true),
        ("by the database's own",        &[("databases.PLACE.auth_dbname", "of-users")],                 true),
        ("the database's own wins",      &[("auth_dbname", "of-users"), ("databases.PLACE.auth_dbname", "app")], false),
    ];
    for (name, own, want) in table {
        let (site, auth) = site(&[&with_users[..], own].concat());
        let user = role(&site, "user", "");
        let entered = enter(&site, &user, "first-secret").await;
        assert_eq!(entered.is_ok(), want, "{name}");
        if let Ok(mut wire) = entered {
            assert_value(&wire.query("SELECT current_database()").await.unwrap(), site.name());
            assert!(enter(&site, &user, "wrong").await.is_err(), "{name}");
        }
        let asked = format!("SELECT count(*) > 0 FROM pg_stat_activity WHERE usename = '{auth}' AND datname = ");
        let there = primary().psql("postgres", &format!("{asked}'{}'", of_users.name)).unwrap();
        assert_eq!(there, if want { "t" } else { "f" }, "{name}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_meanwhile_costs_no_server_connection() {
    let (place, auth) = place();
    let query = "SELECT a.rolname, a.rolpassword FROM pg_authid a, pg_sleep(0.3) WHERE a.rolname = $1";
    let settings = [("auth_query", query), ("auth_query_ttl", "0s"), ("default_pool_size", "1")];
    let site = before(place, &auth, &settings);
    let user = role(&site, "user", "");
    let pid = || {
        let sql = format!("SELECT string_agg(pid::text, ',') FROM pg_stat_activity WHERE usename = '{auth}'");
        site.place.cluster.psql("postgres", &sql).unwrap()
    };
    assert!(enter(&site, &user, "first-secret").await.is_ok());
    let first = pid();
    assert!(!first.is_empty() && !first.contains(','), "{first}");
    for _ in 0..3 {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        wire.startup(&[("user", &user), ("database", site.name())]).await.unwrap();
        assert!(
            wire.recv_within(Duration::from_millis(50)).await.unwrap().is_none(),
            "answered before it was looked up"
        );
        wire.abort().unwrap();
    }
    assert!(enter(&site, &user, "first-secret").await.is_ok());
    assert_eq!(pid(), first);
}

#[tokio::test]
async fn a_server_that_is_away_is_told_to_everyone_alike() {
    let (place, auth) = place();
    let port = format!("databases.{}.port", place.name);
    let settings = [(port.as_str(), "1"), ("client_login_timeout", "30s"), ("query_wait_timeout", "1s")];
    let site = before(place, &auth, &settings);
    for user in ["nobody-here", "somebody-else"] {
        let error = refusal(site.pgweir.addr(), user, site.name(), "x").await;
        assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "57P03"), "{error}");
        assert!(!error.to_string().contains(user), "{error}");
    }
    site.pgweir.wait_log("auth_query failed", SOON).unwrap();
}
