//! Logging in to servers: every method, where the password comes from, what is refused, and what happens when the
//! server refuses us.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgweir_harness::mock_server::say;
use pgweir_harness::wire::{ServerError, Wire};
use pgweir_harness::{Auth, Cluster, ClusterOptions, MockServer, Step, secrets, wait_until};

use crate::storms::{Threads, Took};
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, primary, start_pgweir};

/// A client's login at a site, whose database may be out of reach.
pub(crate) async fn try_login(address: std::net::SocketAddr, name: &str) -> Result<Wire, ServerError> {
    let mut wire = Wire::connect(address).await.unwrap();
    match wire.login(name, name, PASSWORD).await {
        Ok(_) => Ok(wire),
        Err(error) => Err(error.server_error().unwrap_or_else(|| panic!("{error}"))),
    }
}

/// The configuration of a pgweir whose database `db` is at `address`, as user `db`; clients are trusted.
pub(crate) fn toml_before(address: std::net::SocketAddr, settings: &[(&str, &str)]) -> String {
    let port = address.port().to_string();
    let fixed = [
        ("auth_type", "trust"),
        ("databases.db.host", "127.0.0.1"),
        ("databases.db.port", port.as_str()),
        ("databases.db.user", "db"),
        ("databases.db.password", PASSWORD),
        ("users.db.password", "client-secret"),
    ];
    // One way to give a password takes the place of the other.
    let replaced = settings.iter().any(|(key, _)| key.starts_with("databases.db.password_"));
    let fixed = fixed.iter().filter(|(key, _)| !(replaced && *key == "databases.db.password"));
    let all: Vec<(&str, &str)> = fixed.chain(settings).copied().collect();
    let text = pgweir_harness::pgweir_toml(primary(), &all);
    text.replace("[databases.app]", "[databases.unused]")
}

/// As [`Place::toml`], with the password from elsewhere.
fn place_toml(place: &Place<'_>, settings: &[(&str, &str)]) -> String {
    let text = place.toml(settings);
    let (own, other) = (format!("[databases.{}]", place.name), format!("password = \"{PASSWORD}\"\n"));
    let (before, section) = text.split_once(&own).unwrap();
    format!("{before}{own}{}", section.replacen(&other, "", 1))
}

/// A folder that is gone with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pgweir-it-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Replaces a file whole.
fn write(path: &str, text: &str) {
    secrets::keep(text.trim_end());
    let fresh = format!("{path}.new");
    fs::write(&fresh, text).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(fresh, path).unwrap();
}

/// How often the server refused the place's role.
fn refusals(place: &Place<'_>) -> usize {
    let complaint = format!("password authentication failed for user \"{}\"", place.name);
    place.cluster.log_text().matches(&complaint).count()
}

#[tokio::test]
async fn every_method_that_postgres_asks_for_is_answered() {
    for auth in [Auth::Trust, Auth::Scram, Auth::Md5, Auth::Cleartext] {
        let cluster = Cluster::start(ClusterOptions::auth(auth)).unwrap();
        if auth == Auth::Md5 {
            cluster.psql("postgres", "ALTER SYSTEM SET password_encryption = 'md5'").unwrap();
            cluster.psql("postgres", "SELECT pg_reload_conf()").unwrap();
            wait_until(SOON, || cluster.psql("postgres", "SHOW password_encryption").unwrap() == "md5");
        }
        let site = Site::before(Place::on(&cluster), &[("databases.PLACE.allow_cleartext_password", "true")]);
        assert_value(&site.client().await.query("SELECT current_user").await.unwrap(), site.name());

        // The same again, where each method is excluded by itself, and where it alone is allowed.
        for method in ["none", "password", "md5", "scram-sha-256"] {
            let own = matches!(
                (auth, method),
                (Auth::Trust, "none")
                    | (Auth::Scram, "scram-sha-256")
                    | (Auth::Md5, "md5")
                    | (Auth::Cleartext, "password")
            );
            for (text, allowed) in [(method.to_owned(), own), (format!("!{method}"), !own)] {
                let place = Place { cluster: &cluster, name: site.name().to_owned() };
                let settings = [
                    ("databases.PLACE.allow_cleartext_password", "true"),
                    ("databases.PLACE.require_auth", text.as_str()),
                ];
                let pgweir = start_pgweir(place.toml(&settings));
                match (try_login(pgweir.addr(), &place.name).await, allowed) {
                    (Ok(mut wire), true) => assert_value(&wire.query("SELECT 1").await.unwrap(), "1"),
                    (Err(error), false) => {
                        assert_eq!(error.sqlstate(), "08006", "{auth:?} {text}: {error}");
                        assert!(error.message().contains(&format!("require_auth = \"{text}\"")), "{auth:?}: {error}");
                    }
                    (got, _) => panic!("{auth:?} {text}: {:?}", got.map(drop)),
                }
            }
        }
    }
}

#[tokio::test]
async fn a_server_gets_nothing_secret_by_a_method_that_is_not_allowed() {
    const CLEARTEXT: u32 = 3;
    const MD5: u32 = 5;
    const SASL: u32 = 10;
    #[rustfmt::skip]
    let table: [(&str, u32, &[u8], &[(&str, &str)], &str); 13] = [
        ("clear, by default",        CLEARTEXT, b"",     &[], "asks for the password in clear on a connection without TLS"),
        ("clear, excluded",          CLEARTEXT, b"",     &[("databases.db.require_auth", "!password"), ("databases.db.allow_cleartext_password", "true")], "asks for the password in clear, which require_auth"),
        ("md5, excluded",            MD5,       b"salt", &[("server_require_auth", "scram-sha-256")], "asks for the authentication method md5, which require_auth"),
        ("md5, global or own",       MD5,       b"salt", &[("server_require_auth", "md5"), ("databases.db.require_auth", "!md5")], "asks for the authentication method md5, which require_auth"),
        ("nothing, excluded",        0,         b"",     &[("server_require_auth", "!none")], "asks for no authentication, which require_auth"),
        ("nothing, binding wanted",  0,         b"",     &[("databases.db.channel_binding", "require")], "channel_binding = \"require\", and the server asks for no authentication"),
        ("md5, binding wanted",      MD5,       b"salt", &[("server_channel_binding", "require")], "channel_binding = \"require\", and the server asks for the authentication method md5"),
        ("SCRAM, binding wanted",    SASL,      b"SCRAM-SHA-256\0\0", &[("server_channel_binding", "require")], "channel_binding = \"require\", and the connection is without TLS"),
        ("SCRAM, excluded",          SASL,      b"SCRAM-SHA-256\0\0", &[("server_require_auth", "md5")], "asks for the authentication method scram-sha-256, which require_auth"),
        ("PLUS without TLS",         SASL,      b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0", &[], "SCRAM-SHA-256-PLUS on a connection without TLS"),
        ("another mechanism",        SASL,      b"OAUTHBEARER\0PLAIN\0\0", &[], "method OAUTHBEARER, PLAIN, which is not supported"),
        ("no mechanism",             SASL,      b"\0", &[], "SASL without any mechanism, which is not supported"),
        ("GSSAPI",                   7,         b"",     &[], "method GSSAPI, which is not supported"),
    ];
    for (name, kind, data, settings, want) in table {
        let script = vec![Step::Startup, Step::Send(say::auth(kind, data)), Step::Hang];
        let server = MockServer::start(move |_| script.clone()).unwrap();
        let pgweir = start_pgweir(toml_before(server.addr(), settings));
        let start = Instant::now();
        let error = try_login(pgweir.addr(), "db").await.map(drop).unwrap_err();
        // And not when its wait for a server connection ends.
        assert!(start.elapsed() < SOON, "{name}: {:?}", start.elapsed());
        assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "08006"), "{name}: {error}");
        assert!(error.message().contains(want), "{name}: {error}");
        assert!(server.heard().iter().all(|(_, message)| message.tag != b'p'), "{name}: {:?}", server.heard());
        wait_until(SOON, || pgweir.http_get("/readyz").unwrap().0 == 503);
    }
}

#[tokio::test]
async fn passwords_of_any_script_open_what_postgres_made_of_them() {
    let cluster = primary();
    #[rustfmt::skip]
    let table = [
        "plain-secret", "p\u{e4}ss w\u{f6}rd", "secret \u{2168}", "\u{ad}soft\u{ad}hyphen", "secret a\u{a0}b", "\u{5e9}\u{5dc}\u{5d5}\u{5dd}",
        "mixed \u{5d0}\u{5d1}", "\u{1f511}\u{1f512}", "secret e\u{301}", "secret \u{e9}", "quote'\"\\ $", "secret \u{fb01}ne\u{2460}",
    ];
    let folder = Folder::new("scripts");
    for (number, password) in table.iter().enumerate() {
        let place = Place::on(cluster);
        place.psql(&format!(
            "ALTER ROLE {} PASSWORD E'{}'",
            place.name,
            password.replace('\\', "\\\\").replace('\'', "''")
        ));
        let file = folder.path(&number.to_string());
        write(&file, password);
        for settings in [("databases.PLACE.password", *password), ("databases.PLACE.password_file", file.as_str())] {
            let toml =
                if settings.0.ends_with("file") { place_toml(&place, &[settings]) } else { place.toml(&[settings]) };
            let pgweir = start_pgweir(toml);
            let mut wire =
                try_login(pgweir.addr(), &place.name).await.unwrap_or_else(|error| panic!("{password}: {error}"));
            assert_value(&wire.query("SELECT 1").await.unwrap(), "1");
        }
    }
}

#[tokio::test]
async fn a_password_file_is_read_at_every_login_and_a_wrong_one_costs_few_logins() {
    let place = Place::on(primary());
    let folder = Folder::new("file");
    let file = folder.path("password");
    let settings = [("databases.PLACE.password_file", file.as_str()), ("server_login_retry", "2s")];
    let pgweir = start_pgweir(place_toml(&place, &settings));
    let site = Site { place, pgweir };

    // Not there: told at once, and without its path.
    let error = try_login(site.pgweir.addr(), site.name()).await.map(drop).unwrap_err();
    assert_eq!(
        (error.sqlstate(), error.message()),
        ("08006", "the pooler cannot log in to the server: its password_file is of no use")
    );
    site.pgweir.wait_log(&format!("password_file {file}: No such file"), SOON).unwrap();

    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 503);

    // There, with a newline; readiness does not wait for a client.
    write(&file, &format!("{PASSWORD}\n"));
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 200);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");

    // Changed on the server: whoever comes is refused at once, by few logins.
    site.place.psql(&format!("ALTER ROLE {} PASSWORD 'changed-secret'", site.name()));
    site.place
        .psql(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{}'", site.name()));
    wait_until(SOON, || site.place.servers() == 0);
    let begun = Instant::now();
    let mut tried = 0;
    while begun.elapsed() < Duration::from_secs(3) || tried <= 20 {
        let mut wire = Wire::connect(site.pgweir.addr()).await.unwrap();
        // Later ones are let in by what the pool has learnt, and refused at their first query.
        let error = match wire.login(site.name(), site.name(), PASSWORD).await {
            Ok(_) => match wire.query("SELECT 1").await {
                Ok(outcome) => outcome.error.unwrap(),
                Err(error) => error.server_error().unwrap(),
            },
            Err(error) => error.server_error().unwrap(),
        };
        assert_eq!((error.severity(), error.sqlstate()), ("FATAL", "28P01"), "{error}");
        tried += 1;
    }
    // 100 ms, doubled up to 2 s, with jitter: at most seven in three seconds, and one in each further one. Whoever comes
    // in between is told at once: one after the other, they do not wait for the next.
    let most = 8 + usize::try_from(begun.elapsed().saturating_sub(Duration::from_secs(3)).as_secs()).unwrap();
    let refused = refusals(&site.place);
    assert!((1..=most).contains(&refused), "{refused} logins for {tried} clients");
    assert!(tried > 2 * refused, "{refused} logins for {tried} clients");
    wait_until(SOON, || {
        let (status, body) = site.pgweir.http_get("/readyz").unwrap();
        status == 503 && body.contains("28P01")
    });

    write(&file, "changed-secret");
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 200);
    assert_value(&site.client().await.query("SELECT 1").await.unwrap(), "1");
    let log = site.pgweir.log();
    assert!(!log.contains("changed-secret") && !log.contains(PASSWORD), "{log}");
}

#[tokio::test]
async fn a_password_file_that_anyone_may_read_is_warned_of_once() {
    let place = Place::on(primary());
    let folder = Folder::new("mode");
    let file = folder.path("password");
    write(&file, PASSWORD);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let settings = [("databases.PLACE.password_file", file.as_str()), ("server_lifetime", "0s")];
    let pgweir = start_pgweir(place_toml(&place, &settings));
    let site = Site { place, pgweir };
    let mut client = site.client().await;
    for _ in 0..5 {
        assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    }
    assert_eq!(site.pgweir.log().matches("can be read by others").count(), 1);
}

/// A command that prints what is in `file`, and notes that it ran in `file.runs`.
fn token_command(file: &str, before: &str) -> String {
    secrets::keep("hush-hush");
    format!("sh -c 'echo run >> {file}.runs; echo hush-hush >&2; {before} cat {file}'")
}

fn runs(file: &str) -> usize {
    fs::read_to_string(format!("{file}.runs")).unwrap_or_default().lines().count()
}

#[tokio::test]
async fn a_password_command_is_run_once_for_all_logins_and_again_when_its_token_is_refused() {
    let place = Place::on(primary());
    let folder = Folder::new("command");
    let file = folder.path("token");
    write(&file, PASSWORD);
    let command = token_command(&file, "sleep 0.3;");
    let settings = [
        ("databases.PLACE.password_command", command.as_str()),
        ("server_lifetime", "0s"),
        ("max_server_logins", "8"),
        ("server_login_retry", "1s"),
    ];
    let pgweir = start_pgweir(place_toml(&place, &settings));
    let site = Site { place, pgweir };
    let mut clients = join_all((0..8).map(|_| site.client())).await;
    for _ in 0..3 {
        let queries = clients.iter_mut().map(|client| client.query("SELECT 1, pg_sleep(0.02)"));
        for outcome in join_all(queries).await {
            assert_value(&outcome.unwrap(), "1");
        }
    }
    assert!(site.metric("pgweir_server_logins_total", &[]) >= 8.0 || runs(&file) == 1);
    assert_eq!(runs(&file), 1, "concurrent logins share a run, later ones its token");

    // The token is replaced while the old one is still believed good: clients notice nothing.
    write(&file, "second-token");
    site.place.psql(&format!("ALTER ROLE {} PASSWORD 'second-token'", site.name()));
    for _ in 0..3 {
        let queries = clients.iter_mut().map(|client| client.query("SELECT 2, pg_sleep(0.02)"));
        for outcome in join_all(queries).await {
            assert_value(&outcome.unwrap(), "2");
        }
    }
    assert_eq!(runs(&file), 2, "the refused token is fetched anew, once");

    // A token that is wrong and stays wrong: 28P01 at once, a few runs, a few logins.
    let before = refusals(&site.place);
    write(&file, "wrong-token");
    site.place.psql(&format!("ALTER ROLE {} PASSWORD 'third-token'", site.name()));
    let error = clients[0].query("SELECT 3").await;
    let error = error.map_or_else(|error| error.server_error().unwrap(), |outcome| outcome.error.unwrap());
    assert_eq!(error.sqlstate(), "28P01", "{error}");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (ran, refused) = (runs(&file), refusals(&site.place) - before);
    assert!((3..=8).contains(&ran) && (2..=16).contains(&refused), "{ran} runs, {refused} logins");

    write(&file, "third-token");
    wait_until(SOON, || site.pgweir.http_get("/readyz").unwrap().0 == 200);
    let log = site.pgweir.log();
    for secret in [PASSWORD, "second-token", "third-token", "wrong-token", "hush-hush"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn a_password_command_runs_again_when_its_token_is_too_old() {
    let place = Place::on(primary());
    let folder = Folder::new("ttl");
    let file = folder.path("token");
    write(&file, PASSWORD);
    let command = token_command(&file, "");
    for (ttl, least, each) in [
        ("0s", 5, Duration::from_millis(10)),
        ("700ms", 2, Duration::from_millis(700)),
        ("1h", 1, Duration::from_hours(1)),
    ] {
        let _ = fs::remove_file(format!("{file}.runs"));
        let settings = [
            ("databases.PLACE.password_command", command.as_str()),
            ("databases.PLACE.password_command_ttl", ttl),
            // Each query has a server connection of its own.
            ("server_lifetime", "0s"),
        ];
        let pgweir = start_pgweir(place_toml(&place, &settings));
        let begun = Instant::now();
        let mut client = try_login(pgweir.addr(), &place.name).await.unwrap();
        for _ in 0..6 {
            assert_value(&client.query("SELECT 1, pg_sleep(0.15)").await.unwrap(), "1");
        }
        let most = 1 + usize::try_from(begun.elapsed().as_millis() / each.as_millis()).unwrap();
        assert!((least..=most).contains(&runs(&file)), "{ttl}: {} runs, not {least} to {most}", runs(&file));
    }
}

#[tokio::test]
async fn a_password_command_knows_for_whom_it_is_run_and_its_failures_are_told() {
    let place = Place::on(primary());
    let exact = format!(
        "sh -c 'test \"$PGUSER $PGDATABASE $PGHOST $PGPORT\" = \"{0} {0} 127.0.0.1 {1}\" && echo {PASSWORD}'",
        place.name,
        place.cluster.port()
    );
    #[rustfmt::skip]
    let table: [(&str, &str, Option<&str>); 5] = [
        ("its variables",  &exact,                                     None),
        ("no program",     "/no/such/program",                         Some("it cannot be run: No such file or directory")),
        ("a failure",      "sh -c 'echo secret-on-stderr >&2; exit 3'", Some("exit status: 3; its standard error is not shown")),
        ("nothing",        "sh -c true",                              Some("there is no password in it")),
        ("too slow",       "sleep 600",                                Some("not done within password_command_timeout, 300ms")),
    ];
    for (name, command, trouble) in table {
        let is_slow = name == "too slow";
        let settings = [
            ("databases.PLACE.password_command", command),
            ("password_command_timeout", if is_slow { "300ms" } else { "30s" }),
            ("query_wait_timeout", if trouble.is_some() { "2s" } else { "1min" }),
        ];
        let pgweir = start_pgweir(place_toml(&place, &settings));
        match (try_login(pgweir.addr(), &place.name).await, trouble) {
            (Ok(mut wire), None) => assert_value(&wire.query("SELECT 1").await.unwrap(), "1"),
            (Err(error), Some(trouble)) => {
                // It may well work the next time: the client waits.
                assert_eq!(error.sqlstate(), "53300", "{name}: {error}");
                assert!(error.to_string().contains("its password_command failed"), "{name}: {error}");
                let log = pgweir.log();
                assert!(log.contains(trouble) && !log.contains("secret-on-stderr"), "{name}: {log}");
            }
            (got, _) => panic!("{name}: {:?}", got.map(drop)),
        }
    }
}

#[tokio::test]
async fn a_password_command_that_runs_when_pgweir_stops_is_ended_with_all_that_it_started() {
    let place = Place::on(primary());
    for (number, signal) in [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT].into_iter().enumerate() {
        // A number of seconds that nobody else sleeps for.
        let mark = format!("9{number}{}", std::process::id());
        let command = format!("sh -c 'sleep {mark} & sleep {mark}'");
        let settings = [
            ("databases.PLACE.password_command", command.as_str()),
            ("password_command_timeout", "10min"),
            ("shutdown_timeout", "1s"),
        ];
        let pgweir = start_pgweir(place_toml(&place, &settings));
        let line = format!("sleep\0{mark}\0");
        let sleeping = || {
            let processes = fs::read_dir("/proc").unwrap().flatten();
            let lines = processes.map(|process| fs::read(process.path().join("cmdline")).unwrap_or_default());
            lines.filter(|found| *found == line.as_bytes()).count()
        };
        let mut client = Wire::connect(pgweir.addr()).await.unwrap();
        client.startup(&[("user", &place.name), ("database", &place.name)]).await.unwrap();
        wait_until(SOON, || sleeping() == 2);
        pgweir.signal(signal).unwrap();
        wait_until(SOON, || sleeping() == 0);
        pgweir.wait_exit(SOON).unwrap();
    }
}

#[tokio::test]
async fn keys_are_derived_once_and_a_changed_password_has_keys_of_its_own() {
    const ITERATIONS: u32 = 150_000;
    let place = Place::on(primary());
    let folder = Folder::new("keys");
    let file = folder.path("password");
    let set = |password: &str| {
        write(&file, password);
        let salt = b"0123456789abcdef";
        let verifier =
            pgweir_proto::scram::Keys::derive(password.as_bytes(), salt, ITERATIONS).verifier(salt, ITERATIONS);
        place.psql(&format!("ALTER ROLE {} PASSWORD '{}'", place.name, verifier.encode()));
    };
    set("first-secret");
    let settings = [
        ("databases.PLACE.password_file", file.as_str()),
        ("server_lifetime", "0s"),
        ("max_server_logins", "8"),
        ("server_login_retry", "1s"),
    ];
    let pgweir = start_pgweir(place_toml(&place, &settings));
    let cpu = || {
        let (user, system) = pgweir.cpu_time().unwrap();
        (user + system).as_secs_f64()
    };
    let begun = cpu();
    let mut clients = join_all((0..8).map(|_| async { try_login(pgweir.addr(), &place.name).await.unwrap() })).await;
    let queries = clients.iter_mut().map(|client| client.query("SELECT 1, pg_sleep(0.05)"));
    for outcome in join_all(queries).await {
        assert_value(&outcome.unwrap(), "1");
    }
    let first = cpu() - begun;
    let begun = cpu();
    for _ in 0..40 {
        assert_value(&clients[0].query("SELECT 1").await.unwrap(), "1");
    }
    let later = cpu() - begun;
    // Forty derivations would be forty times the first, of which two ticks of the kernel's clock are seen at least.
    assert!(first > 0.015 && later < first * 3.0, "first logins {first} s, forty more {later} s");

    set("second-secret");
    for _ in 0..3 {
        assert_value(&clients[0].query("SELECT 1").await.unwrap(), "1");
    }
}

/// On the thread that serves clients, it would hold all of them up for as long as it takes.
#[tokio::test]
async fn nobody_is_held_up_while_keys_are_derived() {
    const ITERATIONS: u32 = 1_000_000;
    let (place, slow) = (Place::on(primary()), Place::on(primary()));
    let salt = b"0123456789abcdef";
    let begun = Instant::now();
    let verifier = pgweir_proto::scram::Keys::derive(PASSWORD.as_bytes(), salt, ITERATIONS).verifier(salt, ITERATIONS);
    let derivation = begun.elapsed();
    slow.psql(&format!("ALTER ROLE {} PASSWORD '{}'", slow.name, verifier.encode()));
    let port = slow.cluster.port().to_string();
    let site = Site::before(
        place,
        &[
            ("databases.slow.host", slow.cluster.host()),
            ("databases.slow.port", &port),
            ("databases.slow.dbname", &slow.name),
            ("databases.slow.user", &slow.name),
            ("databases.slow.password", PASSWORD),
            ("server_connect_timeout", "5min"),
            ("query_wait_timeout", "5min"),
            ("client_login_timeout", "5min"),
        ],
    );
    let mut served = site.client().await;
    let mut late = Wire::connect(site.pgweir.addr()).await.unwrap();
    late.set_patience(Duration::from_mins(5));
    let begun = Instant::now();
    let login = async {
        late.login(site.name(), "slow", PASSWORD).await.unwrap();
        begun.elapsed()
    };
    let mut login = std::pin::pin!(login);
    let (mut times, mut took) = (Vec::new(), None);
    // Nor by what else this machine has to do.
    let threads = Threads::of(&site.pgweir);
    while took.is_none() {
        let (one, before) = (Instant::now(), threads.kept_waiting());
        let asked = async { assert_value(&served.query("SELECT 1").await.unwrap(), "1") };
        let mut asked = std::pin::pin!(asked);
        loop {
            tokio::select! {
                biased;
                all = &mut login, if took.is_none() => took = Some(all),
                () = &mut asked => break,
            }
        }
        times.push(Took::since(one, &threads, before).ours());
    }
    let (took, longest) = (took.unwrap(), times.iter().max().copied().unwrap());
    let told =
        format!("{} queries, the longest {longest:?}, in {took:?}; a derivation takes {derivation:?}", times.len());
    assert!(took > derivation / 4, "no derivation: {told}");
    assert!(longest < took / 4 && times.len() > 20, "{told}");
}

#[tokio::test]
async fn a_server_chooses_no_more_iterations_than_it_may() {
    let place = Place::on(primary());
    let salt = b"0123456789abcdef";
    let verifier = pgweir_proto::scram::Keys::derive(PASSWORD.as_bytes(), salt, 20_000).verifier(salt, 20_000);
    place.psql(&format!("ALTER ROLE {} PASSWORD '{}'", place.name, verifier.encode()));
    for (limit, fits) in [("20000", true), ("19999", false)] {
        let pgweir = start_pgweir(place.toml(&[("server_scram_iterations_max", limit)]));
        match (try_login(pgweir.addr(), &place.name).await, fits) {
            (Ok(_), true) => {}
            (Err(error), false) => assert!(error.message().contains("20000 SCRAM iterations, limit 19999"), "{error}"),
            (got, _) => panic!("{limit}: {:?}", got.map(drop)),
        }
    }
}
