use super::*;

fn around(variables: &[(&str, &str)]) -> Surroundings {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Surroundings { variables, user: Some("me".to_owned()), ..Surroundings::default() }
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 6432))
}

/// Where a URL leads, and what the application gets in its place.
fn both(url: &str, variables: &[(&str, &str)]) -> Result<(String, String), Vec<UrlProblem>> {
    let url = AppUrl::parse(url, &around(variables))?;
    let Database { host, port, sslmode, .. } = url.server();
    let password = url.password().map_or("-", |password| password.expose());
    let mode = sslmode.map(|mode| format!(" {mode}")).unwrap_or_default();
    let leads = format!("{} {password} {host}:{port}/{}{mode}", url.user(), url.dbname());
    Ok((leads, url.through(address(), None, &[]).expose().to_owned()))
}

#[test]
fn a_url_leads_where_libpq_would_go_and_the_application_keeps_what_is_its_own() {
    type Want = (&'static str, &'static str);
    #[rustfmt::skip]
    let table: [(&str, &str, Want); 24] = [
        ("Heroku's",          "postgres://u:p@h.example:5432/d1b2",     ("u p h.example:5432/d1b2", "postgres://u:p@127.0.0.1:6432/d1b2?sslmode=disable")),
        ("no port",           "postgres://u:p@h/d",                     ("u p h:5432/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("query stays off the database", "postgres://u:p@h:1/d?sslmode=require", ("u p h:1/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("other keys stay",   "postgres://u:p@h/d?pool=5&sslmode=prefer&prepared_statements=false", ("u p h:5432/d prefer", "postgres://u:p@127.0.0.1:6432/d?pool=5&prepared_statements=false&sslmode=disable")),
        ("plus is a plus",    "postgres://u:a+b@h/d",                   ("u a+b h:5432/d", "postgres://u:a+b@127.0.0.1:6432/d?sslmode=disable")),
        ("typed encodings",   "postgres://u%40x:%2f%3F%23@h/d%20b",     ("u@x /?# h:5432/d b", "postgres://u%40x:%2f%3F%23@127.0.0.1:6432/d%20b?sslmode=disable")),
        ("other scheme",      "postgresql://u:p@h/d",                   ("u p h:5432/d", "postgresql://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("PostGIS",           "postgis://u:p@h/d",                      ("u p h:5432/d", "postgis://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("a driver's",        "postgresql+asyncpg://u:p@h/d",           ("u p h:5432/d", "postgresql+asyncpg://u:p@127.0.0.1:6432/d")),
        ("a driver's, TLS",   "postgresql+asyncpg://u:p@h/d?ssl=require", ("u p h:5432/d require", "postgresql+asyncpg://u:p@127.0.0.1:6432/d?ssl=disable")),
        ("ssl=true",          "postgres://u:p@h/d?ssl=true",            ("u p h:5432/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("no-verify",         "postgres://u:p@h/d?sslmode=no-verify",   ("u p h:5432/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("IPv6",              "postgres://u:p@[::1]:5433/d",            ("u p ::1:5433/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("socket",            "postgres://u:p@%2Frun%2Fpg/d",           ("u p /run/pg:5432/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("host in the query", "postgres://u:p@/d?host=/tmp&port=5433",  ("u p /tmp:5433/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("all in the query",  "postgres://?host=h&user=u&password=p%2B&dbname=d&a=b", ("u p+ h:5432/d", "postgres://u:p%2B@127.0.0.1:6432/d?a=b&sslmode=disable")),
        ("no password",       "postgres://u@h/d",                       ("u - h:5432/d", "postgres://u@127.0.0.1:6432/d?sslmode=disable")),
        ("no user",           "postgres://h/d",                         ("me - h:5432/d", "postgres://me@127.0.0.1:6432/d?sslmode=disable")),
        ("no user but a password", "postgres://:p@h/d",                 ("me p h:5432/d", "postgres://me:p@127.0.0.1:6432/d?sslmode=disable")),
        ("no database",       "postgres://u:p@h",                       ("u p h:5432/u", "postgres://u:p@127.0.0.1:6432/u?sslmode=disable")),
        ("a slash, no database", "postgres://u:p@h/",                   ("u p h:5432/u", "postgres://u:p@127.0.0.1:6432/u?sslmode=disable")),
        ("no host",           "postgres:///d",                          ("me - 127.0.0.1:5432/d", "postgres://me@127.0.0.1:6432/d?sslmode=disable")),
        ("an @ in a value",   "postgres://u:p@h/d?application_name=a@b", ("u p h:5432/d", "postgres://u:p@127.0.0.1:6432/d?application_name=a@b&sslmode=disable")),
        ("the last counts",   "postgres://u:p@h/d?sslmode=disable&sslmode=require", ("u p h:5432/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
    ];
    for (name, url, (leads, through)) in table {
        assert_eq!(both(url, &[]), Ok((leads.to_owned(), through.to_owned())), "{name}");
    }
}

#[test]
fn what_a_url_leaves_out_comes_from_libpqs_variables() {
    type Want = (&'static str, &'static str);
    #[rustfmt::skip]
    let table: [(&str, &str, &[(&str, &str)], Want); 10] = [
        ("password",     "postgres://u@h/d",   &[("PGPASSWORD", "s")],          ("u s h:5432/d", "postgres://u@127.0.0.1:6432/d?sslmode=disable")),
        ("everything",   "postgres://",        &[("PGHOST", "h"), ("PGPORT", "7"), ("PGUSER", "u"), ("PGPASSWORD", "s"), ("PGDATABASE", "d")],
                                                                               ("u s h:7/d", "postgres://u:s@127.0.0.1:6432/d?sslmode=disable")),
        ("nothing empty", "postgres://u:p@h/d", &[("PGPORT", ""), ("PGSSLMODE", "")], ("u p h:5432/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("the URL wins", "postgres://u:p@h:1/d?sslmode=require", &[("PGPORT", "2"), ("PGSSLMODE", "disable")],
                                                                               ("u p h:1/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("sslmode",      "postgres://u:p@h/d", &[("PGSSLMODE", "require")],     ("u p h:5432/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("binding",      "postgres://u:p@h/d", &[("PGCHANNELBINDING", "require")], ("u p h:5432/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable&channel_binding=prefer")),
        ("no binding",   "postgres://u:p@h/d", &[("PGCHANNELBINDING", "disable")], ("u p h:5432/d", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable")),
        ("direct TLS",   "postgres://u:p@h/d?sslmode=require", &[("PGSSLNEGOTIATION", "direct")],
                                                                               ("u p h:5432/d require", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable&sslnegotiation=postgres")),
        ("a driver's",   "postgresql+x://u:p@h/d", &[("PGCHANNELBINDING", "prefer")], ("u p h:5432/d", "postgresql+x://u:p@127.0.0.1:6432/d")),
        ("authorities",  "postgres://u:p@h/d?sslmode=verify-full", &[("PGSSLROOTCERT", "system")], ("u p h:5432/d verify-full", "postgres://u:p@127.0.0.1:6432/d?sslmode=disable&sslrootcert=")),
    ];
    for (name, url, variables, (leads, through)) in table {
        assert_eq!(both(url, variables), Ok((leads.to_owned(), through.to_owned())), "{name}");
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_and_never_left_out() {
    #[rustfmt::skip]
    let table: [(&str, &str, &[(&str, &str)], UrlProblem); 26] = [
        ("another scheme",     "mysql://u:p@h/d",                    &[], UrlProblem::Scheme),
        ("no scheme",          "h:5432",                             &[], UrlProblem::Scheme),
        ("a prefix of one",    "postgresx://h",                      &[], UrlProblem::Scheme),
        ("JDBC's",             "jdbc:postgresql://h/d",              &[], UrlProblem::Scheme),
        ("two hosts",          "postgres://u:p@h1,h2/d",             &[], UrlProblem::Host),
        ("two in the query",   "postgres://u:p@/d?host=h1,h2",       &[], UrlProblem::Host),
        ("a bare @",           "postgres://u:p@ss@h/d",              &[], UrlProblem::Reserved),
        ("a bare ?",           "postgres://u:12?ss@h/d",             &[], UrlProblem::Reserved),
        ("a bare #",           "postgres://u:p#q@h/d",               &[], UrlProblem::Reserved),
        ("a broken %",         "postgres://u:%zz@h/d",               &[], UrlProblem::Percent),
        ("the same in a key",  "postgres://u:p@h/d?sslmode=%zz",     &[], UrlProblem::Percent),
        ("port in the query",  "postgres://u:p@h/d?port=x",          &[], UrlProblem::Port),
        ("a service",          "postgres://u:p@h/d?service=x",       &[], UrlProblem::Unsupported("service")),
        ("an address",         "postgres://u:p@h/d?hostaddr=10.0.0.1", &[], UrlProblem::Unsupported("hostaddr")),
        ("an address, by variable", "postgres://u:p@h/d",            &[("PGHOSTADDR", "10.0.0.1")], UrlProblem::Unsupported("PGHOSTADDR")),
        ("a service, by variable", "postgres://u:p@h/d",             &[("PGSERVICE", "x")], UrlProblem::Unsupported("PGSERVICE")),
        ("a file of passwords", "postgres://u@h/d",                  &[("PGPASSFILE", "x")], UrlProblem::Unsupported("a file of passwords (~/.pgpass, PGPASSFILE)")),
        ("a driver that verifies", "postgresql+x://u:p@h/d",         &[("PGSSLMODE", "verify-full"), ("PGSSLROOTCERT", "c")], UrlProblem::Unsupported("PGSSLMODE or PGCHANNELBINDING with a driver's own scheme")),
        ("a driver that binds", "postgresql+x://u:p@h/d",            &[("PGCHANNELBINDING", "require")], UrlProblem::Unsupported("PGSSLMODE or PGCHANNELBINDING with a driver's own scheme")),
        ("a revocation list",  "postgres://u:p@h/d?sslcrl=x",        &[], UrlProblem::Unsupported("sslcrl")),
        ("GSS alone",          "postgres://u:p@h/d?gssencmode=require", &[], UrlProblem::Unsupported("gssencmode")),
        ("an unknown sslmode", "postgres://u:p@h/d?sslmode=yes",     &[], UrlProblem::Value("sslmode")),
        ("half a certificate", "postgres://u:p@h/d?sslcert=c.pem",   &[], UrlProblem::Value("sslcert or sslkey, of which one is missing,")),
        ("nobody vouches",     "postgres://u:p@h/d?sslmode=verify-full", &[], UrlProblem::Missing("who vouches for the server (sslrootcert)")),
        ("weak for the system's", "postgres://u:p@h/d?sslmode=require&sslrootcert=system", &[], UrlProblem::Value("sslmode")),
        ("weak for direct",    "postgres://u:p@h/d?sslnegotiation=direct", &[], UrlProblem::Value("sslnegotiation")),
    ];
    for (name, url, variables, want) in table {
        let problems = AppUrl::parse(url, &around(variables)).map(|_| ()).unwrap_err();
        assert!(problems.contains(&want), "{name}: {problems:?}");
    }
}

#[test]
fn tls_towards_the_server_is_as_the_url_says() {
    let url = "postgres://u:p@h/d?sslmode=verify-full&sslrootcert=/ca.pem&sslcert=c&sslkey=k&channel_binding=require";
    let url = AppUrl::parse(url, &around(&[])).unwrap();
    let server = url.server();
    assert_eq!(server.sslmode, Some(SslMode::VerifyFull));
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    assert_eq!([&server.sslrootcert, &server.sslcert, &server.sslkey].map(text), ["/ca.pem", "c", "k"]);
    assert_eq!(server.channel_binding, Some(crate::BindingPolicy::Require));
    assert_eq!((&server.user, &server.password, &server.dbname), (&None, &None, &None), "they are the client's");
    let home = Surroundings { root_certificates: Some("/home/root.crt".to_owned()), ..around(&[]) };
    let url = AppUrl::parse("postgres://u:p@h/d?sslmode=verify-ca", &home).unwrap();
    assert_eq!(url.server().sslrootcert.as_deref(), Some("/home/root.crt"));
    let url = AppUrl::parse("postgres://u:p@h/d?sslmode=require", &home).unwrap();
    assert_eq!(url.server().sslrootcert.as_deref(), Some("/home/root.crt"), "in the weaker modes, too");
    let shown = Surroundings { certificate: Some("/home/postgresql.crt".to_owned()), ..around(&[]) };
    assert!(AppUrl::parse("postgres://u:p@h/d", &shown).is_err(), "a certificate that libpq would show");
    let passwords = Surroundings { passwords: Some("/home/.pgpass".to_owned()), ..around(&[]) };
    assert!(
        AppUrl::parse("postgres://u@h/d", &passwords).is_err()
            && AppUrl::parse("postgres://u:p@h/d", &passwords).is_ok()
    );
}

#[test]
fn a_password_is_made_up_where_there_is_none_and_pairs_are_added_where_the_key_is_absent() {
    let made = Secret::new("made");
    #[rustfmt::skip]
    let table: [(&str, &str); 4] = [
        ("postgres://u@h/d",   "postgres://u:made@127.0.0.1:6432/d?prepared_statements=false&sslmode=disable"),
        ("postgres://u:@h/d",  "postgres://u:made@127.0.0.1:6432/d?prepared_statements=false&sslmode=disable"),
        ("postgres://h/d",     "postgres://me:made@127.0.0.1:6432/d?prepared_statements=false&sslmode=disable"),
        ("postgres://u:p@h/d?prepared_statements=true", "postgres://u:p@127.0.0.1:6432/d?prepared_statements=true&sslmode=disable"),
    ];
    for (url, want) in table {
        let parsed = AppUrl::parse(url, &around(&[])).unwrap();
        assert_eq!(parsed.through(address(), Some(&made), &["prepared_statements=false"]).expose(), want, "{url}");
    }
}

#[test]
fn no_secret_is_shown() {
    let url = "postgres://u:hunter2hunter2@h/d?token=hunter2hunter2&options=-c%20a=b&password=hunter2hunter2";
    let url = AppUrl::parse(url, &around(&[])).unwrap();
    let shown = [url.masked(), format!("{url:?}"), url.masked_through("127.0.0.1:PORT", &[])];
    for text in shown {
        assert!(!text.contains("hunter2") && text.contains("***") && text.contains("options=-c%20a=b"), "{text}");
    }
    assert_eq!(
        url.masked_through("127.0.0.1:PORT", &[]),
        "postgres://u:***@127.0.0.1:PORT/d?token=***&options=-c%20a=b&sslmode=disable"
    );
}
