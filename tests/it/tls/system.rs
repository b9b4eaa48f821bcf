//! `sslrootcert = system`: the authorities of the operating system, and `verify-full` with them.

use pgweir_harness::{HarnessError, Pgweir};

use super::pki::{Authority, Folder};
use super::{TlsPrimary, psql, show};
use crate::support::{Place, options};

/// pgweir on a system whose authorities are in this file.
///
/// Source: OpenSSL's `SSL_CERT_FILE`, which rustls-native-certs honours.
fn start(file: &str, toml: String) -> Result<Pgweir, HarnessError> {
    let mut options = options(toml);
    options.env.push(("SSL_CERT_FILE".to_owned(), file.to_owned()));
    options.env.push(("SSL_CERT_DIR".to_owned(), String::new()));
    Pgweir::start_with(options)
}

#[test]
fn the_systems_authorities_vouch_for_a_server_and_for_its_host_name() {
    let tls = TlsPrimary::take();
    let (root, other) = (Authority::root("the system's root"), Authority::root("another root"));
    tls.show(&root.issue(|_| {}));
    tls.hba("hostssl all all 127.0.0.1/32 trust");
    let folder = Folder::new();
    let (known, unknown) = (folder.write("known.pem", &root.pem), folder.write("unknown.pem", &other.pem));
    // Among many, as in a real system.
    let many = folder.write("many.pem", &format!("{}{}{}", other.pem, root.pem, Authority::root("a third").pem));
    let place = Place::on(&tls.0);
    let own = [("databases.PLACE.sslrootcert", "system")];
    let global =
        [("server_tls_ca_file", "system"), ("server_tls_sslmode", "verify-full"), ("databases.app.host", "localhost")];
    #[rustfmt::skip]
    let table: [(&str, &std::path::PathBuf, &[(&str, &str)], &str, Result<&str, &str>); 5] = [
        ("one that is known",   &known,   &own,    "localhost", Ok("t")),
        ("among many",          &many,    &own,    "localhost", Ok("t")),
        ("by global settings",  &known,   &global, "localhost", Ok("t")),
        ("unknown",             &unknown, &own,    "localhost", Err("UnknownIssuer")),
        // Without sslmode it is verify-full.
        ("another host's",      &known,   &own,    "127.0.0.1", Err("does not match host name \"127.0.0.1\"")),
    ];
    for (case, file, settings, host, want) in table {
        let settings = [settings, &[("databases.PLACE.host", host), ("query_wait_timeout", "5s")]].concat();
        let pgweir = start(show(file), place.toml(&settings)).unwrap();
        let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
        let got = psql(&tls.0, &words, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()");
        match (&got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{case}"),
            (Err(got), Err(want)) => assert!(got.contains(want), "{case}: {got}"),
            _ => panic!("{case}: {got:?}"),
        }
    }
}

#[test]
fn a_system_without_authorities_is_told_at_the_start() {
    let tls = TlsPrimary::take();
    let place = Place::on(&tls.0);
    let folder = Folder::new();
    let (missing, empty) = (folder.path("missing.pem"), folder.write("empty.pem", ""));
    for file in [missing, empty] {
        let told =
            start(show(&file), place.toml(&[("databases.PLACE.sslrootcert", "system")])).unwrap_err().to_string();
        let want =
            format!("databases.{}.sslrootcert = system: the operating system has no trusted authorities", place.name);
        assert!(told.contains(&want), "{told}");
    }
}
