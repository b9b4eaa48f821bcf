//! `pgweir check` before servers that are there: what does not fit, what is not there, and how to mend it.

use crate::support::{Place, primary, run_with};

/// Whether a check of this configuration finds nothing, its report, and the faults, one a line.
fn check(toml: &str) -> (bool, String, Vec<String>) {
    let output = run_with("check", toml);
    let [report, faults] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.success(), report, faults.lines().map(str::to_owned).collect())
}

#[test]
fn limits_of_the_server_that_the_pools_do_not_fit_under_are_told_and_the_remedy_mends_them() {
    let place = Place::on(primary());
    let (name, at) = (place.name.as_str(), place.cluster.addr());
    // One pool for each of the two users that are configured, both as the same role.
    let toml = |size: &str| place.toml(&[("default_pool_size", size)]);
    let fits = |size: &str| {
        let (well, report, faults) = check(&toml(size));
        assert_eq!((well, faults), (true, Vec::new()), "{report}");
        report
    };
    fits("4");
    for (kind, noun) in [("ROLE", "role"), ("DATABASE", "database")] {
        place.psql(&format!("ALTER {kind} {name} CONNECTION LIMIT 5"));
        let (well, report, faults) = check(&toml("4"));
        let want = format!(
            "{noun} {name} on {at}: 2 pools may open 8 server connections, its CONNECTION LIMIT is 5. Lower the pools' \
             sizes to 2 (default_pool_size, pool_size), or ALTER {kind} ... CONNECTION LIMIT 8"
        );
        assert_eq!((well, faults), (false, vec![want]), "{report}");
        assert!(
            report.contains(&format!("  {noun}: limit 5, 0 in use; 2 pools may want 8: does not fit\n")),
            "{report}"
        );
        assert!(report.ends_with("\n1 fault\n"), "{report}");
        // Either way.
        fits("2");
        place.psql(&format!("ALTER {kind} {name} CONNECTION LIMIT 8"));
        let report = fits("4");
        assert!(report.contains(&format!("  {noun}: limit 8, 0 in use; 2 pools may want 8: fits\n")), "{report}");
        place.psql(&format!("ALTER {kind} {name} CONNECTION LIMIT -1"));
    }
    let (well, report, faults) = check(&toml("200"));
    assert!(!well && faults.len() == 1, "{report}: {faults:?}");
    let told = format!("{at}: 4 pools may open 800 server connections, max_connections less what is reserved is 297. ");
    assert!(faults[0].starts_with(&told) && faults[0].ends_with("or raise max_connections to 803"), "{faults:?}");
}

#[test]
fn a_database_that_is_not_there_and_a_server_that_is_down_are_told_where_and_with_a_remedy() {
    let place = Place::on(primary());
    let (name, at, port) = (place.name.as_str(), place.cluster.addr(), place.cluster.port().to_string());
    let toml = place.toml(&[
        ("databases.gone.host", "127.0.0.1"),
        ("databases.gone.port", &port),
        ("databases.gone.user", name),
        ("databases.gone.password", crate::support::PASSWORD),
        ("databases.gone.dbname", "nowhere"),
        ("databases.down.host", "127.0.0.1"),
        ("databases.down.port", "1"),
        ("databases.down.user", name),
        ("databases.down.password", crate::support::PASSWORD),
    ]);
    let (well, report, faults) = check(&toml);
    assert!(!well, "{report}");
    let want = [
        format!(
            "databases.down (127.0.0.1:1, database down, role {name}): Connection refused (os error 111). Correct host, \
             port, user and password; see that the server runs and can be reached from here"
        ),
        format!(
            "databases.gone ({at}, database nowhere, role {name}): database \"nowhere\" does not exist (3D000). Correct \
             dbname of the entry, or create the database"
        ),
    ];
    assert_eq!(faults, want, "{report}");
    // What is well is told beside them.
    let (_, own) = report.split_once(&format!("\n{name} ({at}, database {name}, role {name})\n")).unwrap();
    assert!(own.contains("PostgreSQL") && own.contains(": fits\n") && report.ends_with("\n2 faults\n"), "{report}");
}
