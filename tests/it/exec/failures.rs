//! What happens when something is wrong before the application runs: it runs with its URLs as they are.

use std::net::TcpListener;

use super::place;
use super::wrapped::Wrapping;

/// The line that says so.
const LOUD: &str = "pgweir exec: NOT POOLED";

/// A name, variables, and what the line says.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);

fn loud(err: &str) -> Vec<&str> {
    err.lines().filter(|line| line.contains("NOT ")).collect()
}

#[test]
fn whatever_is_wrong_the_command_runs_with_its_urls_as_they_are_and_one_line_says_why() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let good = "postgres://u:not-so-secret@127.0.0.1/d";
    #[rustfmt::skip]
    let table: [Case<'_>; 14] = [
        ("no URL",              &[],                                                              "DATABASE_URL is not set"),
        ("an empty one",        &[("DATABASE_URL", "")],                                          "DATABASE_URL is not set"),
        ("another system",      &[("DATABASE_URL", "mysql://u:not-so-secret@h/d")],               "not a Postgres URL"),
        ("two hosts",           &[("DATABASE_URL", "postgres://u:not-so-secret@a,b/d")],          "the host of the URL is not one name"),
        ("a bare slash",        &[("DATABASE_URL", "postgres://u:not-so/secret@h/d")],            "bare @, / or #"),
        ("a service",           &[("DATABASE_URL", "postgres://u:not-so-secret@h/d?service=x")],  "service cannot be honoured"),
        ("nobody vouches",      &[("DATABASE_URL", "postgres://u:not-so-secret@h/d?sslmode=verify-full"), ("HOME", "/nonexistent")], "who vouches"),
        ("no such file",        &[("DATABASE_URL", "postgres://u:not-so-secret@h/d?sslmode=verify-full&sslrootcert=/no/such.pem")], "/no/such.pem"),
        ("an unknown setting",  &[("DATABASE_URL", good), ("PGWEIR_POOL_SIZE", "1")],             "PGWEIR_POOL_SIZE"),
        ("a wrong value",       &[("DATABASE_URL", good), ("PGBOUNCER_POOL_MODE", "x")],          "PGBOUNCER_POOL_MODE"),
        ("two wrong values",    &[("DATABASE_URL", good), ("PGWEIR_POOL_MODE", "x"), ("PGWEIR_LOG_LEVEL", "y")], "PGWEIR_LOG_LEVEL"),
        ("a port that is taken", &[("DATABASE_URL", good), ("PGWEIR_LISTEN_PORT", &port)],        "Address already in use"),
        ("TLS that is demanded", &[("DATABASE_URL", good), ("PGWEIR_AUTH_TYPE", "cert")],         "certificates"),
        ("listed, not there",   &[("DATABASE_URL", good), ("PGWEIR_URLS", "NO_SUCH_URL")],        "NO_SUCH_URL"),
    ];
    for (name, variables, why) in table {
        let script = "printf '%s %s' \"$DATABASE_URL\" \"${DATABASE_URL_DIRECT-none}\"; exit 4";
        let mut run = Wrapping::new(&["exec", "--", "sh", "-c", script]);
        let mut exit = Wrapping::new(&["exec", "sh", "-c", "echo ran"]).var("PGWEIR_ON_FAILURE", "exit");
        for (variable, value) in variables {
            run = run.var(variable, value);
            exit = exit.var(variable, value);
        }
        let original = variables.iter().find(|(variable, _)| *variable == "DATABASE_URL").map_or("", |(_, url)| url);
        let ended = run.finish();
        assert_eq!((ended.status.code(), ended.out), (Some(4), format!("{original} none")), "{name}: {}", ended.err);
        let lines = loud(&ended.err);
        assert!(lines.len() == 1 && ended.err.lines().count() == 1, "{name}: {}", ended.err);
        assert!(lines[0].starts_with(LOUD) && lines[0].contains(why), "{name}: {lines:?}");
        let ended = exit.finish();
        assert!(matches!(ended.status.code(), Some(1 | 2)) && ended.out.is_empty(), "{name}: {ended:?}");
        assert!(loud(&ended.err).len() == 1 && ended.err.contains(why), "{name}: {}", ended.err);
    }
}

#[test]
fn one_bad_url_of_several_stays_as_it_is_and_the_others_are_pooled() {
    let (_place, url, psql) = place();
    let bad = "postgres://u:not-so-secret@a,b/d";
    let script = format!("{psql} 'SELECT 1'; echo \"$HEROKU_POSTGRESQL_PINK_URL\"");
    let ended = Wrapping::sh(&url, &script).var("HEROKU_POSTGRESQL_PINK_URL", bad).finish();
    let lines = loud(&ended.err).len();
    assert!(ended.err.contains("NOT POOLED, HEROKU_POSTGRESQL_PINK_URL stays as it is"), "{}", ended.err);
    assert_eq!(ended.well(), format!("1\n{bad}\n"));
    assert_eq!(lines, 1);
}

#[test]
fn switched_off_it_is_as_if_it_were_not_there() {
    let url = "postgres://u:not-so-secret@a,b/d";
    for variable in ["PGWEIR_ENABLED", "PGBOUNCER_ENABLED"] {
        let ended = Wrapping::sh(url, "printf %s \"$DATABASE_URL\"; exit 5").var(variable, "0").finish();
        assert_eq!((ended.status.code(), ended.out.as_str(), ended.err.as_str()), (Some(5), url, ""), "{variable}");
    }
}

#[test]
fn a_command_that_cannot_run_has_the_exit_code_that_a_shell_would_give() {
    let (_place, url, _) = place();
    let run = |words: &[&str], url: &str| {
        let all: Vec<&str> = ["exec", "--"].iter().chain(words).copied().collect();
        let ended = Wrapping::new(&all).var("DATABASE_URL", url).finish();
        (ended.status.code(), ended.err)
    };
    for url in [url.as_str(), "mysql://h"] {
        let (code, err) = run(&["/no/such/program"], url);
        assert!(code == Some(127) && err.contains("pgweir exec: /no/such/program: "), "{err}");
        let (code, err) = run(&["/etc/passwd"], url);
        assert!(code == Some(126) && err.contains("pgweir exec: /etc/passwd: "), "{err}");
    }
    let ended = Wrapping::new(&["exec"]).finish();
    assert_eq!(ended.status.code(), Some(2), "{}", ended.err);
    let help = Wrapping::new(&["exec", "--help"]).finish().well();
    assert!(help.contains("PGWEIR_ON_FAILURE") && help.contains("--query-wait-timeout"), "{help}");
}

#[test]
fn a_port_for_http_that_is_taken_is_a_warning() {
    let (_place, url, psql) = place();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ended = Wrapping::sh(&url, &format!("{psql} 'SELECT 1'")).var("PGWEIR_HTTP_LISTEN", &address).finish();
    assert!(ended.err.contains("no HTTP endpoints"), "{}", ended.err);
    assert_eq!(ended.well(), "1\n");
}
