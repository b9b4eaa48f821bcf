//! What the application gets, and what it is served by.

use super::lives::get;
use super::wrapped::Wrapping;
use super::{place, url};
use crate::limits::assert_valid_as_shipped;
use crate::routing::family;
use crate::support::{PASSWORD, Place, SOON, primary};
use crate::tls::TlsPrimary;
use crate::tls::pki::self_signed;
use pgweir_harness::wait_until;

#[test]
fn the_application_is_pooled_by_its_url_and_has_its_own_beside_it() {
    let (place, url, psql) = place();
    let script = format!(
        "{psql} 'SELECT current_user || current_database()'; echo \"$DATABASE_URL_DIRECT\"; echo \"$DATABASE_URL\""
    );
    let out = Wrapping::sh(&format!("{url}?application_name=mine"), &script).finish().well();
    let lines: Vec<&str> = out.lines().collect();
    let name = &place.name;
    assert_eq!(lines[0], format!("{name}{name}"));
    assert_eq!(lines[1], format!("{url}?application_name=mine"));
    let rewritten = lines[2].strip_prefix(&format!("postgres://{name}:{PASSWORD}@127.0.0.1:")).unwrap();
    let (port, rest) = rewritten.split_once('/').unwrap();
    assert_ne!(port.parse::<u16>().unwrap(), place.cluster.port());
    assert_eq!(rest, format!("{name}?application_name=mine&sslmode=disable"));
}

#[test]
fn nothing_reaches_the_server_before_the_first_login_and_nothing_is_left_behind_the_end() {
    let (place, url, psql) = place();
    let script = format!("echo started; read line; {psql} 'SELECT 1'; echo asked; read line; true");
    let mut wrapped = Wrapping::sh(&url, &script).start();
    wrapped.await_said("started");
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(place.servers(), 0);
    wrapped.tell("go on");
    wrapped.await_said("asked");
    assert_eq!(place.servers(), 1, "it is kept for the next one");
    wrapped.finish().well();
    // Said goodbye to before the end, and so gone at once or nearly so.
    wait_until(SOON, || place.servers() == 0);
    let log = place.cluster.log_text();
    let lost = log.lines().any(|line| line.contains(&place.name) && line.contains("unexpected EOF"));
    assert!(!lost, "the server was told goodbye");
}

#[test]
fn applications_that_insist_on_tls_get_it() {
    let (_place, url, psql) = place();
    let tls = psql.replace("$DATABASE_URL", "$DATABASE_URL&sslmode=require");
    let script = format!("{tls} '\\conninfo'; {psql} '\\conninfo'");
    let out = Wrapping::sh(&url, &script).finish().well();
    let lines: Vec<&str> = out.lines().filter(|line| line.contains("SSL connection")).collect();
    assert_eq!(lines.len(), 1, "{out}");
    let off =
        Wrapping::sh(&url, &format!("{tls} 'SELECT 1'; true")).var("PGWEIR_CLIENT_TLS_SSLMODE", "disable").finish();
    assert!(off.err.contains("server does not support SSL"), "{}", off.err);
}

#[test]
fn the_urls_sslmode_is_the_servers() {
    let primary = TlsPrimary::take();
    primary.show(&self_signed(|_| {}));
    primary.hba("hostssl all all 127.0.0.1/32 scram-sha-256");
    let place = Place::on(&primary.0);
    let psql = super::psql(&place);
    let script = format!("{psql} 'SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()'");
    let ask = |query: &str| Wrapping::sh(&format!("{}{query}", url(&place)), &script);
    assert_eq!(ask("?sslmode=require").finish().well(), "t\n");
    assert_eq!(ask("").finish().well(), "t\n", "preferred as libpq does");
    assert_eq!(ask("").var("DYNO", "web.1").finish().well(), "t\n", "required on a dyno");
    let refused = ask("?sslmode=disable").finish();
    assert!(!refused.status.success() && refused.err.contains("pg_hba.conf"), "{}", refused.err);
    primary.hba("host all all 127.0.0.1/32 trust");
}

#[test]
fn a_user_without_a_password_and_a_second_server_by_the_same_names_are_pooled_each() {
    let trusting = TlsPrimary::take();
    let place = Place::on(&trusting.0);
    let bare = format!("postgres://{0}@{1}/{0}", place.name, place.cluster.addr());
    let script = format!(
        "{} 'SHOW port'; {} 'SHOW port'",
        super::psql(&place),
        super::psql(&place).replace("DATABASE_URL", "HEROKU_POSTGRESQL_PINK_URL")
    );
    // The same user and database, as a follower has them.
    let pink = format!("postgres://postgres:{}@{}/postgres", pgweir_harness::SUPERUSER_PASSWORD, primary().addr());
    let own = format!("postgres://postgres@{}/postgres", place.cluster.addr());
    let out = Wrapping::sh(&own, &script).var("HEROKU_POSTGRESQL_PINK_URL", &pink).finish().well();
    assert_eq!(out, format!("{}\n{}\n", place.cluster.port(), primary().port()));
    assert_eq!(Wrapping::sh(&bare, &format!("{} 'SELECT 1'", super::psql(&place))).finish().well(), "1\n");
}

#[test]
fn what_is_told_of_several_urls_is_told_of_all_under_their_names() {
    let (place, url, psql) = place();
    // Another server by the same names.
    let other = TlsPrimary::take();
    other.0.psql("postgres", &format!("CREATE ROLE {} LOGIN", place.name)).unwrap();
    other.0.psql("postgres", &format!("CREATE DATABASE {0} OWNER {0}", place.name)).unwrap();
    let pink = url.replace(&place.cluster.addr().to_string(), &other.0.addr().to_string());
    let script =
        format!("{psql} 'SELECT 1'; {} 'SELECT 2'; echo asked; read line", psql.replace("DATABASE_URL", "PINK_URL"));
    let mut wrapped = Wrapping::sh(&url, &script)
        .var("PGWEIR_URLS", "DATABASE_URL PINK_URL")
        .var("PINK_URL", &pink)
        .var("PGWEIR_HTTP_LISTEN", "127.0.0.1:0")
        .start();
    wrapped.await_said("asked");
    let log = wrapped.log();
    let line = log.lines().find(|line| line.contains("role=http")).unwrap();
    let port = line.split("addr=127.0.0.1:").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let json = |path: &str| -> serde_json::Value { serde_json::from_str(&get(port, path)).unwrap() };
    let urls = ["DATABASE_URL", "PINK_URL"];
    // Published once a second.
    wait_until(SOON, || {
        let metrics = get(port, "/metrics");
        urls.iter().all(|url| {
            let is_it =
                |line: &&str| line.starts_with("pgweir_queries_total{") && line.contains(&format!("url=\"{url}\""));
            metrics.lines().find(is_it).is_some_and(|line| line.ends_with(" 1"))
        })
    });
    let metrics = get(port, "/metrics");
    assert!(metrics.lines().any(|line| line == "pgweir_sessions_total 2"), "{metrics}");
    let limits = json("/limits");
    let servers = limits["servers"].as_array().unwrap();
    let mut told: Vec<&str> = servers.iter().map(|server| server["pools"][0]["url"].as_str().unwrap()).collect();
    told.sort_unstable();
    assert_eq!(told, urls, "{limits}");
    let blame = json("/blame");
    assert_eq!(blame["pools"].as_array().unwrap().len(), 2, "{blame}");
    assert_eq!(json("/readyz")["ready"], true);
    let status = Wrapping::new(&["status"]).finish().well();
    for url in urls {
        assert!(status.contains(&format!("  pool {url} {0}/{0}: usable", place.name)), "{status}");
    }
    wrapped.tell("go on");
    wrapped.finish().well();
}

#[test]
fn the_url_of_the_followers_leads_to_one_of_them_and_to_the_primary_where_there_is_none() {
    let family = family();
    let place = family.place();
    let psql = super::psql(&place);
    let by_follower = psql.replace("DATABASE_URL", "DATABASE_FOLLOWER_URL");
    let follower = format!("postgres://{0}:{PASSWORD}@{1}/{0}", place.name, family.list().split(", ").next().unwrap());
    let in_recovery = "'SELECT pg_is_in_recovery()'";
    // It is led to a follower as soon as one has proved to be one. What a follower is asked for, it refuses to write.
    let script = format!(
        "until [ \"$({by_follower} {in_recovery})\" = t ]; do :; done; {by_follower} 'SELECT current_database()'; \
         {by_follower} 'CREATE TABLE t ()' 2>&1; {psql} {in_recovery}; echo \"$DATABASE_FOLLOWER_URL\""
    );
    let out = Wrapping::sh(&url(&place), &script)
        .var("PGWEIR_READ_ROUTING", "auto")
        .var("HEROKU_POSTGRESQL_PINK_URL", &follower)
        .finish()
        .well();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], place.name, "{out}");
    assert!(lines[1].contains("read-only transaction"), "{out}");
    assert_eq!(lines[2], "f", "{out}");
    assert!(lines[3].contains(&format!("/{}_followers?", place.name)), "{out}");

    // Where no other URL may be a follower's.
    let script = format!("{by_follower} {in_recovery}");
    let alone = Wrapping::sh(&url(&place), &script).var("PGWEIR_READ_ROUTING", "auto").finish().well();
    assert_eq!(alone, "f\n");
}

#[test]
fn a_wrapper_inside_another_changes_nothing() {
    let (_place, url, psql) = place();
    let pgweir = env!("CARGO_BIN_EXE_pgweir");
    let inner = format!("{psql} 'SELECT 1'; echo \"$DATABASE_URL\"");
    let script = format!("echo \"$DATABASE_URL\"; {pgweir} exec -- sh -c '{}'", inner.replace('\'', "'\\''"));
    let ended = Wrapping::sh(&url, &script).finish();
    let log = ended.err.clone();
    let out = ended.well();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[1]), (lines[2], "1"), "{out}");
    assert_eq!(log.matches("application started").count(), 1, "{log}");
}

#[test]
fn urls_shows_what_would_be_rewritten_without_secrets() {
    let (place, url, _) = place();
    let ended = Wrapping::new(&["urls"]).var("DATABASE_URL", &url).finish();
    let name = &place.name;
    let address = place.cluster.addr();
    let out = ended.well();
    pgweir_harness::secrets::assert_none_in("pgweir urls", &out);
    let want = format!(
        "DATABASE_URL=postgres://{name}:***@127.0.0.1:PORT/{name}?sslmode=disable\n\
         DATABASE_URL_DIRECT=postgres://{name}:***@{address}/{name}\n"
    );
    assert_eq!(out, want);
    let broken = Wrapping::new(&["urls"]).var("DATABASE_URL", "postgres://u:secret-secret@a,b/d").finish();
    assert_eq!(broken.status.code(), Some(1));
    assert!(
        broken.out.starts_with("# DATABASE_URL stays as it is: the host of the URL is not one name"),
        "{}",
        broken.out
    );
    pgweir_harness::secrets::assert_none_in("pgweir urls", &broken.out);
}

#[test]
fn check_without_a_configuration_checks_what_exec_would_run() {
    let (_place, url, _) = place();
    let ended = Wrapping::new(&["check"]).var("DATABASE_URL", &url).finish();
    let out = ended.well();
    assert!(out.contains("(default of exec)") && out.contains("(DATABASE_URL)") && out.contains("no faults"), "{out}");
    pgweir_harness::secrets::assert_none_in("pgweir check", &out);
    let wrong = url.replace(PASSWORD, "wrong-secret");
    let ended = Wrapping::new(&["check"]).var("DATABASE_URL", &wrong).finish();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.out);
    let broken = Wrapping::new(&["check"]).var("DATABASE_URL", "mysql://h/d").finish();
    assert_eq!(broken.status.code(), Some(2), "{}", broken.out);
    assert!(broken.err.contains("not a Postgres URL"), "{}", broken.err);
}

#[test]
fn status_tells_how_things_stand() {
    let (place, url, psql) = place();
    // So few that no other limit of the server leaves less room.
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 5", place.name));
    let mut wrapped = Wrapping::sh(&url, &format!("{psql} 'SELECT 1'; echo asked; read line"))
        .var("PGWEIR_FLEET_CENSUS_PERIOD", "500ms")
        .start();
    wrapped.await_said("asked");
    let ask = || -> serde_json::Value {
        let out = Wrapping::new(&["status", "--json"]).finish().well();
        pgweir_harness::secrets::assert_none_in("pgweir status", &out);
        let all: Vec<serde_json::Value> = serde_json::from_str(&out).unwrap();
        all.into_iter().find(|one| one["pid"] == wrapped.pid()).unwrap()
    };
    // Published once a second.
    wait_until(SOON, || ask()["pools"][0]["transactions"] == 1);
    let told = ask();
    assert_eq!(told["application"], wrapped.application());
    assert_eq!((&told["draining"], &told["restarts"]), (&false.into(), &0.into()));
    assert_eq!(told["urls"][0]["variable"], "DATABASE_URL");
    assert_eq!(told["urls"][0]["database"], place.name);
    assert_eq!((&told["pools"][0]["user"], &told["pools"][0]["servers_idle"]), (&place.name.clone().into(), &1.into()));
    // All that /limits would tell. The first census was the connection's own, when it was not certain yet that it may stay.
    wait_until(SOON, || {
        let role = &ask()["limits"]["servers"][0]["limits"][0];
        role["own"]["connections"] == 1 && role["probes"] == 0
    });
    let known = ask();
    assert_valid_as_shipped(&[&told["limits"], &known["limits"]]);
    let server = &known["limits"]["servers"][0];
    assert_eq!((&server["sharing"], &server["binds"]["scope"]), (&"shared".into(), &"role".into()), "{server:#}");
    let text = Wrapping::new(&["status"]).finish().well();
    let name = &place.name;
    for line in [
        format!("  server {}, shared: own connections 1; limits looked at ", place.cluster.addr()),
        format!(
            "    limit of the role {name}: 1 of 5 used: 1 here, 0 by peers, 0 by others; headroom 2, room 2 (it binds); \
             claims 0, probes 0 (0 waiting); share 3, pools 1\n"
        ),
        "    limit of the server: ".to_owned(),
    ] {
        assert!(text.contains(&line), "{line} is not in {text}");
    }
    assert!(text.contains(&format!("process {}, application {}", wrapped.pid(), wrapped.application())), "{text}");
    wrapped.tell("end");
    wrapped.finish().well();
}

#[test]
fn the_shim_of_the_buildpack_does_the_same() {
    let (_place, url, psql) = place();
    let folder = tempfile::tempdir().unwrap();
    let shim = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/buildpack/start-pgbouncer");
    let beside = folder.path().join("start-pgbouncer");
    std::fs::copy(shim, &beside).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pgweir"), folder.path().join("pgweir")).unwrap();
    let script = format!("{psql} 'SELECT 1'; echo \"$DATABASE_URL_DIRECT\"; exit 3");
    let wrapping = Wrapping::new(&[]).var("DATABASE_URL", &url).with(|command| {
        let mut shim = std::process::Command::new(&beside);
        shim.args(["sh", "-c", &script]);
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shim.env(name, value),
                None => shim.env_remove(name),
            };
        }
        shim.stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        *command = shim;
    });
    let ended = wrapping.finish();
    assert_eq!((ended.status.code(), ended.out), (Some(3), format!("1\n{url}\n")));
}

#[test]
fn the_readme_lists_every_default_of_exec_and_every_alias() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for preset in pgweir_config::EXEC {
        let serve = pgweir_config::settings::find(preset.key).unwrap().default;
        let quote = |value: &str| if value.is_empty() { "empty".to_owned() } else { format!("`{value}`") };
        let row = format!("| `{}` | {} | {} | {} |", preset.key, quote(preset.value), quote(serve), preset.reason);
        assert!(readme.contains(&row), "README.md has no {row}");
    }
    for (alias, key) in pgweir_config::ALIASES {
        match alias.strip_prefix("PGBOUNCER_") {
            Some(own) => assert_eq!(own.to_ascii_lowercase(), key),
            None => assert!(readme.contains(&format!("`{alias}`")) && readme.contains(&format!("`{key}`")), "{alias}"),
        }
    }
    for name in pgweir::sidecar::VARIABLES {
        assert!(name == "PGWEIR_POOLED" || readme.contains(name), "{name}");
    }
}

#[test]
fn a_file_may_tune_the_database_of_a_url_and_a_unix_socket_be_there_too() {
    let (place, url, psql) = place();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pgweir.toml");
    let name = &place.name;
    let sockets = folder.path().display();
    std::fs::write(&file, format!("[databases.{name}]\npool_size = 1\n[listen]\nunix_socket_dir = \"{sockets}\"\n"))
        .unwrap();
    let file = file.to_str().unwrap();
    let checked = Wrapping::new(&["urls"]).var("DATABASE_URL", &url).var("PGWEIR_CONFIG", file).finish();
    checked.well();
    let local = psql.replace("\"$DATABASE_URL\"", "\"$DATABASE_URL&host=$SOCKETS\"");
    let script = format!("({psql} 'SELECT pg_sleep(0.3)' & {local} 'SELECT pg_sleep(0.3)'; wait); {local} 'SELECT 1'");
    let watch = place.cap_watch(1);
    let wrapping = Wrapping::sh(&url, &script).var("PGWEIR_CONFIG", file).var("SOCKETS", &sockets.to_string());
    let out = wrapping.finish().well();
    assert_eq!(out.trim(), "1");
    assert_eq!(watch.finish(), 1);
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| !name.to_string_lossy().ends_with(".lock") && name != "pgweir.toml"), "{left:?}");
}
