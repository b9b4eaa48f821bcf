use super::*;

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn around() -> Surroundings {
    Surroundings { user: Some("me".to_owned()), ..Surroundings::default() }
}

fn plan(pairs: &[(&str, &str)]) -> Plan {
    let variables = variables(pairs);
    let (wishes, faults) = Wishes::read(&variables);
    assert_eq!(faults, Vec::<String>::new());
    Plan::make(&wishes, &variables, &around(), || Secret::new("made-up-secret"))
}

fn shown(plan: &Plan) -> (Vec<String>, Vec<&str>) {
    let pooled = plan.pooled.iter().map(|pooled| format!("{} {}", pooled.name, pooled.group)).collect();
    (pooled, plan.left.iter().map(|left| left.name.as_str()).collect())
}

const A: &str = "postgres://u:p@one/d";
const B: &str = "postgres://u:p@two/d";

#[test]
fn urls_are_found_and_grouped_by_what_their_names_mean() {
    type Want = (&'static [&'static str], &'static [&'static str]);
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], Want); 17] = [
        ("one",                  &[("DATABASE_URL", A)],                                                     (&["DATABASE_URL 0"], &[])),
        ("none",                 &[],                                                                        (&[], &[])),
        ("an empty one",         &[("DATABASE_URL", "")],                                                    (&[], &[])),
        ("others' variables",    &[("OTHER_URL", A), ("X_DATABASE_URL", A)],                                 (&[], &[])),
        ("aliases share",        &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", A)],                  (&["DATABASE_URL 0", "HEROKU_POSTGRESQL_PINK_URL 0"], &[])),
        ("a follower",           &[("HEROKU_POSTGRESQL_PINK_URL", B), ("DATABASE_URL", A)],                  (&["DATABASE_URL 0", "HEROKU_POSTGRESQL_PINK_URL 1"], &[])),
        ("another database",     &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", "postgres://v:q@two/e")], (&["DATABASE_URL 0", "HEROKU_POSTGRESQL_PINK_URL 0"], &[])),
        ("another password",     &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", "postgres://u:q@two/e")], (&["DATABASE_URL 0", "HEROKU_POSTGRESQL_PINK_URL 1"], &[])),
        ("a password and none",  &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", "postgres://u@two/e")], (&["DATABASE_URL 0", "HEROKU_POSTGRESQL_PINK_URL 1"], &[])),
        ("Redis by that name",   &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", "redis://h")],        (&["DATABASE_URL 0"], &[])),
        ("a broken colour",      &[("DATABASE_URL", A), ("HEROKU_POSTGRESQL_PINK_URL", "postgres://a,b/d")], (&["DATABASE_URL 0"], &["HEROKU_POSTGRESQL_PINK_URL"])),
        ("another database system", &[("DATABASE_URL", "mysql://u:p@h/d")],                                  (&[], &["DATABASE_URL"])),
        ("listed",               &[("PGWEIR_URLS", "X_URL, Y_URL X_URL"), ("X_URL", A), ("Y_URL", A), ("DATABASE_URL", A)], (&["X_URL 0", "Y_URL 0"], &[])),
        ("listed and not there", &[("PGWEIR_URLS", "X_URL DATABASE_URL"), ("DATABASE_URL", A)],              (&["DATABASE_URL 0"], &["X_URL"])),
        ("the buildpack's list", &[("PGBOUNCER_URLS", "X_URL"), ("X_URL", A), ("DATABASE_URL", A)],          (&["X_URL 0"], &[])),
        ("ours outranks it",     &[("PGBOUNCER_URLS", "X_URL"), ("PGWEIR_URLS", "auto"), ("X_URL", A), ("DATABASE_URL", A)], (&["DATABASE_URL 0"], &[])),
        ("inside another",       &[("PGWEIR_POOLED", "127.0.0.1:4000,127.0.0.1:4001"), ("DATABASE_URL", "postgres://u:p@127.0.0.1:4001/d?sslmode=disable")], (&[], &[])),
    ];
    for (name, pairs, (pooled, left)) in table {
        let plan = plan(pairs);
        let (got_pooled, got_left) = shown(&plan);
        assert_eq!((got_pooled, got_left), (pooled.iter().map(ToString::to_string).collect(), left.to_vec()), "{name}");
        assert_eq!(plan.already, name == "inside another", "{name}");
    }
}

#[test]
fn a_group_is_told_by_the_variable_that_came_first() {
    let plan = plan(&[("HEROKU_POSTGRESQL_PINK_URL", B), ("HEROKU_POSTGRESQL_RED_URL", B), ("DATABASE_URL", A)]);
    assert_eq!(plan.urls(), ["DATABASE_URL".into(), Arc::<str>::from("HEROKU_POSTGRESQL_PINK_URL")]);
}

#[test]
fn the_application_gets_rewritten_urls_and_the_originals_beside_them() {
    let pairs = [
        ("DATABASE_URL", "postgres://u:p%40ss@one/d?sslmode=require&pool=5"),
        ("HEROKU_POSTGRESQL_PINK_URL", "postgres://u@two/d"),
        ("PGBOUNCER_PREPARED_STATEMENTS", "false"),
    ];
    let (wishes, _) = Wishes::read(&variables(&pairs));
    let plan = plan(&pairs);
    let addresses = [SocketAddr::from(([127, 0, 0, 1], 4000)), SocketAddr::from(([127, 0, 0, 1], 4001))];
    let changes = |own: &str| {
        let changes = plan.changes(&addresses, &[], &wishes, |name| name == own);
        changes.into_iter().map(|(name, value)| format!("{name}={}", value.to_string_lossy())).collect::<Vec<_>>()
    };
    let want = [
        "DATABASE_URL=postgres://u:p%40ss@127.0.0.1:4000/d?pool=5&prepared_statements=false&sslmode=disable",
        "DATABASE_URL_DIRECT=postgres://u:p%40ss@one/d?sslmode=require&pool=5",
        "HEROKU_POSTGRESQL_PINK_URL=postgres://u:made-up-secret@127.0.0.1:4001/d?prepared_statements=false&sslmode=disable",
        "HEROKU_POSTGRESQL_PINK_URL_DIRECT=postgres://u@two/d",
        "PGWEIR_POOLED=127.0.0.1:4000,127.0.0.1:4001",
    ];
    assert_eq!(changes(""), want);
    let own = changes("DATABASE_URL_DIRECT");
    assert!(!own.iter().any(|change| change.starts_with("DATABASE_URL_DIRECT")), "{own:?}");
    let shown = plan.describe(&wishes);
    assert!(
        !shown.contains("p%40ss") && !shown.contains("made-up") && shown.contains("u:***@127.0.0.1:PORT2/d"),
        "{shown}"
    );
    assert!(!format!("{plan:?}").contains("p%40ss"), "{plan:?}");
}

#[test]
fn a_groups_configuration_has_its_urls_execs_defaults_and_the_settings_on_top() {
    let pairs = [
        ("DATABASE_URL", A),
        ("HEROKU_POSTGRESQL_PINK_URL", B),
        ("DYNO", "web.1"),
        ("PGWEIR_LISTEN_PORT", "6000"),
        ("PGWEIR_ON_FAILURE", "exit"),
        ("PGBOUNCER_DEFAULT_POOL_SIZE", "7"),
        ("PGBOUNCER_POOL_MODE", "session"),
        ("PGBOUNCER_CONFIG_DIR", "/nowhere"),
        ("PGBOUNCER_MIN_POOL_SIZE", ""),
        ("PGWEIR_POOL_MODE", "transaction"),
    ];
    let plan = plan(&pairs);
    let config = |index| plan.configure(index, &["--query-wait-timeout=7s".to_owned()], &variables(&pairs)).unwrap();
    let (first, second) = (config(0), config(1));
    assert_eq!((first.databases["d"].host.as_str(), second.databases["d"].host.as_str()), ("one", "two"));
    assert_eq!((first.listen.listen_port, second.listen.listen_port), (6000, 6001));
    let origin = |key: &str| first.origin(key).to_string();
    #[rustfmt::skip]
    let table = [
        ("databases.d",        "DATABASE_URL"),
        ("users.u",            "DATABASE_URL"),
        ("server_tls_sslmode", "default of exec"),
        ("query_wait_timeout", "--query-wait-timeout"),
        ("default_pool_size",  "PGBOUNCER_DEFAULT_POOL_SIZE"),
        ("pool_mode",          "PGWEIR_POOL_MODE"),
        ("max_client_conn",    "default"),
    ];
    for (key, want) in table {
        assert_eq!(origin(key), want, "{key}");
    }
    assert_eq!(first.pool.default_pool_size, 7);
    let broken = [("DATABASE_URL", A), ("PGBOUNCER_POOL_MODE", "transactional")];
    let faults = self::plan(&broken).configure(0, &[], &variables(&broken)).unwrap_err().to_string();
    assert!(faults.contains("PGBOUNCER_POOL_MODE"), "{faults}");
}

#[test]
fn a_dynos_servers_must_have_tls_but_not_those_on_the_dyno_itself() {
    #[rustfmt::skip]
    let table = [
        ("elsewhere",       "postgres://u:p@h/d",                          "web.1", None,                   SslMode::Require),
        ("loopback",        "postgres://u:p@127.0.0.1/d",                  "web.1", None,                   SslMode::Prefer),
        ("by name",         "postgres://u:p@localhost/d",                  "web.1", None,                   SslMode::Prefer),
        ("a socket",        "postgres://u:p@%2Frun/d",                     "web.1", None,                   SslMode::Prefer),
        ("the URL says",    "postgres://u:p@localhost/d?sslmode=require",  "web.1", None,                   SslMode::Require),
        ("a setting says",  "postgres://u:p@localhost/d",                  "web.1", Some("require"),        SslMode::Require),
        ("no dyno",         "postgres://u:p@h/d",                          "",      None,                   SslMode::Prefer),
    ];
    for (name, url, dyno, mode, want) in table {
        let pairs = [("DATABASE_URL", url), ("DYNO", dyno), ("PGWEIR_SERVER_TLS_SSLMODE", mode.unwrap_or("prefer"))];
        let pairs = &pairs[..if mode.is_some() { 3 } else { 2 }];
        let config = plan(pairs).configure(0, &[], &variables(pairs)).unwrap();
        assert_eq!(config.server_tls(&config.databases["d"]).sslmode, want, "{name}");
    }
}

#[test]
fn wishes_are_read_in_either_spelling_and_what_is_wrong_is_named() {
    type Want = (bool, OnFailure, &'static [&'static str]);
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], Want); 9] = [
        ("nothing",            &[],                                                        (true, OnFailure::Direct, &[])),
        ("off",                &[("PGWEIR_ENABLED", "0")],                                 (false, OnFailure::Direct, &[])),
        ("the buildpack's",    &[("PGBOUNCER_ENABLED", "FALSE")],                          (false, OnFailure::Direct, &[])),
        ("ours outranks it",   &[("PGBOUNCER_ENABLED", "0"), ("PGWEIR_ENABLED", "Yes")],   (true, OnFailure::Direct, &[])),
        ("an empty one",       &[("PGWEIR_ENABLED", "")],                                  (true, OnFailure::Direct, &[])),
        ("exit",               &[("PGWEIR_ON_FAILURE", "exit")],                           (true, OnFailure::Exit, &[])),
        ("a wrong one",        &[("PGWEIR_ON_FAILURE", "never")],                          (true, OnFailure::Direct, &["PGWEIR_ON_FAILURE"])),
        ("a wrong alias",      &[("PGBOUNCER_ENABLED", "maybe")],                          (true, OnFailure::Direct, &["PGBOUNCER_ENABLED"])),
        ("a wrong forwarding", &[("PGWEIR_FORWARD_TERM", "x")],                            (true, OnFailure::Direct, &["PGWEIR_FORWARD_TERM"])),
    ];
    for (name, pairs, (enabled, on_failure, faults)) in table {
        let (wishes, found) = Wishes::read(&variables(pairs));
        assert_eq!((wishes.enabled, wishes.on_failure), (enabled, on_failure), "{name}");
        assert_eq!(found.len(), faults.len(), "{name}: {found:?}");
        assert!(found.iter().zip(faults).all(|(found, fault)| found.starts_with(fault)), "{name}: {found:?}");
    }
}

#[test]
fn sigterm_is_passed_on_unless_the_platform_sends_it_to_everyone() {
    #[rustfmt::skip]
    let table: [(&str, &[(&str, &str)], bool, bool); 6] = [
        ("anywhere",       &[],                                                   false, true),
        ("process 1",      &[],                                                   true,  true),
        ("a dyno",         &[("DYNO", "web.1")],                                  false, false),
        ("process 1 of a dyno", &[("DYNO", "web.1")],                             true,  true),
        ("always",         &[("DYNO", "web.1"), ("PGWEIR_FORWARD_TERM", "always")], false, true),
        ("never",          &[("PGWEIR_FORWARD_TERM", "never")],                   true,  false),
    ];
    for (name, pairs, is_init, want) in table {
        let (wishes, _) = Wishes::read(&variables(pairs));
        assert_eq!(wishes.passes_term(is_init), want, "{name}");
    }
}

#[test]
fn other_urls_of_the_same_database_are_candidates_for_followers_where_reads_are_routed() {
    let pairs = |routing: &'static str| {
        [
            ("DATABASE_URL", A),
            ("HEROKU_POSTGRESQL_PINK_URL", A),
            ("HEROKU_POSTGRESQL_RED_URL", B),
            ("HEROKU_POSTGRESQL_TEAL_URL", "postgres://u:p@three/d"),
            ("HEROKU_POSTGRESQL_GRAY_URL", "postgres://u:q@four/d"),
            ("HEROKU_POSTGRESQL_CYAN_URL", "postgres://u:p@five/e"),
            ("PGWEIR_READ_ROUTING", routing),
        ]
    };
    let addresses: Vec<SocketAddr> = (0..4).map(|port| SocketAddr::from(([127, 0, 0, 1], 7000 + port))).collect();
    let of = |pairs: &[(&str, &str)]| {
        let (plan, variables) = (plan(pairs), variables(pairs));
        let configure = |index| Arc::new(plan.configure(index, &[], &variables).unwrap());
        let configs: Vec<Arc<Config>> = (0..plan.groups.len()).map(configure).collect();
        let (wishes, _) = Wishes::read(&variables);
        let changes = plan.changes(&addresses, &configs, &wishes, |_| false);
        let url = changes.into_iter().find(|(name, _)| name == FOLLOWER_URL).map(|(_, url)| url.into_string().unwrap());
        (configs, url)
    };
    let (configs, url) = of(&pairs("auto"));
    let followers = configs[0].databases["d"].followers.clone().unwrap();
    let hosts: Vec<&str> = followers.all().iter().map(|follower| follower.host.as_str()).collect();
    assert_eq!(hosts, ["two", "three"]);
    assert_eq!(configs[0].databases["d_followers"].followers_of.as_deref(), Some("d"));
    assert_eq!(configs[0].databases["d_followers"].dbname.as_deref(), Some("d"));
    assert!(configs[1..].iter().all(|config| config.databases.values().all(|entry| entry.followers.is_none())));
    assert_eq!(url.as_deref(), Some("postgres://u:p@127.0.0.1:7000/d_followers?sslmode=disable"));

    // Without any, it is the primary.
    let (_, url) = of(&[("DATABASE_URL", A), ("PGWEIR_READ_ROUTING", "hinted")]);
    assert_eq!(url.as_deref(), Some("postgres://u:p@127.0.0.1:7000/d?sslmode=disable"));
    // Who does not ask for it has nothing of it.
    let (configs, url) = of(&pairs("off"));
    assert_eq!((configs[0].databases["d"].followers.as_ref(), configs[0].databases.len(), url), (None, 2, None));
}
