//! Which layer wins, and that every value knows where it came from.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use pgweir_config::{Config, Database, Origin, PoolMode, Reload, Secret, Sources, settings};

const FILE: &str = r#"
[pool]
default_pool_size = 5
query_wait_timeout = "250ms"
min_pool_size = 1

[client]
max_statement_memory = "64KiB"

[databases.app]
host = "db.internal"
dbname = "app_production"
user = "file_user"
password = "file_secret"
pool_size = 7
pool_mode = "session"

[databases]
short = "postgres://u:s%40x@[::1]:5433/d?pool_size=3"

[users.app]
password = "hush"
query_timeout = 1.5
"#;

fn build(env: &[(&str, &str)], args: &[&str]) -> Config {
    let env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
    Config::from_sources(Sources { file: Some(("f.toml", FILE)), env: &env, args: &args }).unwrap()
}

fn file(line: usize) -> Origin {
    Origin::File { path: "f.toml".into(), line }
}

fn env(name: &str) -> Origin {
    Origin::Env { name: name.into() }
}

fn flag(name: &str) -> Origin {
    Origin::Flag { name: name.into() }
}

#[test]
fn the_later_layer_wins_and_the_origin_tells_which() {
    let variable = ("PGWEIR_DEFAULT_POOL_SIZE", "6");
    #[rustfmt::skip]
    let table: [(&str, Config, u32, Origin); 3] = [
        ("file",        build(&[], &[]),                                 5, file(3)),
        ("environment", build(&[variable], &[]),                         6, env("PGWEIR_DEFAULT_POOL_SIZE")),
        ("flag",        build(&[variable], &["--default-pool-size=7"]),  7, flag("--default-pool-size")),
    ];
    for (name, config, size, origin) in table {
        assert_eq!(config.pool.default_pool_size, size, "{name}");
        assert_eq!(config.origin("default_pool_size"), origin, "{name}");
        assert_eq!(config.origin("reserve_pool_size"), Origin::Default, "{name}");
    }
}

#[test]
fn values_of_every_type_arrive_from_every_layer() {
    let config = build(
        &[("PGWEIR_LOG_CONNECTIONS", "off"), ("PGWEIR_SERVER_LIFETIME", "1h")],
        &["--pool_mode", "statement", "--inspect-max", "1MiB", "--listen-addr", "*"],
    );
    assert_eq!(config.pool.query_wait_timeout, Duration::from_millis(250));
    assert_eq!(config.client.max_statement_memory, 65_536);
    assert!(!config.log.log_connections);
    assert_eq!(config.pool.server_lifetime, Duration::from_hours(1));
    assert_eq!(config.pool.pool_mode, PoolMode::Statement);
    assert_eq!(config.client.inspect_max, 1 << 20);
    assert_eq!(config.listen.listen_addr, "*");
    assert_eq!(config.users["app"].query_timeout, Some(Duration::from_millis(1500)));
}

#[test]
fn a_database_is_a_table_or_a_url() {
    let config = build(&[], &[]);
    let short = Database {
        host: "::1".to_owned(),
        port: 5433,
        dbname: Some("d".to_owned()),
        user: Some("u".to_owned()),
        password: Some(Secret::new("s@x")),
        pool_size: Some(3),
        ..Database::default()
    };
    assert_eq!(config.databases["short"], short);
    assert_eq!(config.databases["app"].port, 5432);
    assert_eq!(config.origin("databases.app.dbname"), file(12));
    assert_eq!(config.origin("databases.app.port"), Origin::Default);
    assert_eq!(config.origin("databases.short.port"), file(19));
}

#[test]
fn a_url_of_a_later_layer_moves_the_database_and_leaves_its_limits() {
    let layers = [
        build(&[("PGWEIR_DATABASES", "app=postgres://new/other  more=postgres://h2")], &[]),
        build(&[], &["--database", "app=postgres://new/other", "--database=more=postgres://h2"]),
    ];
    for config in layers {
        let app = &config.databases["app"];
        assert_eq!((app.host.as_str(), app.dbname.as_deref()), ("new", Some("other")));
        assert_eq!((&app.user, &app.password), (&None, &None), "credentials never go to another host");
        assert_eq!((app.pool_size, app.pool_mode), (Some(7), Some(PoolMode::Session)));
        assert_eq!(config.databases["more"].host, "h2");
        assert_eq!(config.origin("databases.app.pool_size"), file(15));
    }
}

#[test]
fn a_password_of_a_later_layer_leaves_the_users_limits() {
    for config in [build(&[("PGWEIR_USERS", "app=a=b two=c")], &[]), build(&[], &["--user=app=a=b", "--user", "two=c"])]
    {
        let app = &config.users["app"];
        assert_eq!(app.password, Some(Secret::new("a=b")));
        assert_eq!(app.query_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(config.users["two"].password, Some(Secret::new("c")));
    }
}

#[test]
fn an_empty_host_is_the_local_one() {
    let args = ["--auth-type=trust", "--database=a=postgres:///d"].map(str::to_owned);
    let text = "[databases.b]\nhost = \"\"\n[databases.\"*\"]\n";
    let config = Config::from_sources(Sources { file: Some(("f", text)), env: &[], args: &args }).unwrap();
    for name in ["a", "b", "*"] {
        assert_eq!(config.databases[name].host, "127.0.0.1", "{name}");
    }
}

#[test]
fn a_stored_verifier_is_a_password() {
    let key = "A".repeat(43) + "=";
    let args = ["--database=a=postgres://h".to_owned(), format!("--user=a=SCRAM-SHA-256$4096:c2FsdA==${key}:{key}")];
    Config::from_sources(Sources { args: &args, ..Sources::default() }).unwrap();
}

#[test]
fn the_description_has_every_setting_once_and_no_secret() {
    let config = build(&[], &["--listen-port=7000"]);
    let rows: Vec<_> = config.describe().collect();
    let globals: Vec<_> = rows.iter().map(|row| row.key.as_str()).filter(|key| !key.contains('.')).collect();
    assert_eq!(globals, settings::all().map(|setting| setting.name).collect::<Vec<_>>());
    let row = |key: &str| rows.iter().find(|row| row.key == key).unwrap();
    let port = row("listen_port");
    assert_eq!((port.value.as_str(), port.default, port.reload), ("7000", "6432", Reload::Restart));
    assert_eq!(port.origin, flag("--listen-port"));
    assert_eq!(row("databases.app.password").value, "***");
    assert_eq!(row("users.app.query_timeout").value, "1500ms");
    assert!(rows.iter().all(|row| row.key != "databases.app.connect_query"), "absent keys have no row");
    for shown in [format!("{rows:?}"), format!("{config:?}")] {
        assert!(!["hush", "file_secret", "s@x"].iter().any(|secret| shown.contains(secret)), "{shown}");
    }
}

#[test]
fn changes_are_the_settings_whose_values_differ() {
    let (old, new) =
        (build(&[], &[]), build(&[("PGWEIR_MIN_POOL_SIZE", "2")], &["--listen-port=1", "--default-pool-size=5"]));
    let changes: Vec<_> = old.changes(&new).map(|setting| (setting.name, setting.reload)).collect();
    assert_eq!(changes, [("listen_port", Reload::Restart), ("min_pool_size", Reload::Live)]);
}

#[test]
fn the_flag_names_the_file_before_the_variable_does() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, size: u32| {
        let path = folder.path().join(name).to_string_lossy().into_owned();
        let text = format!("[pool]\ndefault_pool_size = {size}\n[databases.a]\n[auth]\nauth_type = \"trust\"\n");
        std::fs::write(&path, text).unwrap();
        path
    };
    let (one, two) = (write("one", 1), write("two", 2));
    let variable = [("PGWEIR_CONFIG".to_owned(), one.clone())];
    let by_variable = Config::load(&[], &variable).unwrap();
    assert_eq!(by_variable.pool.default_pool_size, 1);
    let origin = Origin::File { path: one.as_str().into(), line: 2 };
    assert_eq!(by_variable.origin("default_pool_size"), origin);
    let by_flag = Config::load(&["--config".to_owned(), two], &variable).unwrap();
    assert_eq!(by_flag.pool.default_pool_size, 2);
}
