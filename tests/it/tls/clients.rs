//! Towards clients: psql gets from pgweir what it gets from Postgres.

use pgweir_harness::Pgweir;
use rcgen::ExtendedKeyUsagePurpose;

use super::pki::{Authority, Folder, named};
use super::{psql, show};
use crate::auth::libpq;
use crate::support::{PASSWORD, Place, primary, start_pgweir};

/// pgweir that speaks TLS with clients, and whom its clients are to trust.
pub(super) struct Front {
    pub(super) place: Place<'static>,
    pub(super) pgweir: Pgweir,
    /// Holds `ca.pem`, `server.crt` and `server.key`.
    pub(super) folder: Folder,
}

impl Front {
    pub(super) fn start(mode: &str, settings: &[(&str, &str)]) -> Self {
        let place = Place::on(primary());
        let folder = Folder::new();
        let root = Authority::root("the root");
        folder.write("ca.pem", &root.pem);
        let (cert, key) = folder.identity("server", &root.issue(|_| {}));
        let own =
            [("client_tls_sslmode", mode), ("client_tls_cert_file", show(&cert)), ("client_tls_key_file", show(&key))];
        let pgweir = start_pgweir(place.toml(&[&own[..], settings].concat()));
        Self { place, pgweir, folder }
    }

    pub(super) fn psql(&self, words: &str, sql: &str) -> Result<String, String> {
        let (name, port) = (&self.place.name, self.pgweir.port());
        let ca = self.folder.path("ca.pem");
        let words = format!("host=localhost port={port} user={name} dbname={name} sslrootcert={} {words}", show(&ca));
        psql(self.place.cluster, &words, sql)
    }
}

#[test]
fn every_sslmode_of_psql_gets_what_client_tls_sslmode_allows() {
    const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    const ANY: [bool; 6] = [true; 6];
    const WITH_TLS: [bool; 6] = [false, true, true, true, true, true];
    const WITHOUT: [bool; 6] = [true, true, true, false, false, false];
    let folder = Folder::new();
    let root = Authority::root("the clients' root");
    let ca = folder.write("clients.pem", &root.pem);
    let (cert, key) = folder.identity(
        "client",
        &root.issue(|params| {
            params.distinguished_name = named("a client");
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }),
    );
    let shown = format!("sslcert={} sslkey={}", show(&cert), show(&key));
    #[rustfmt::skip]
    let table = [
        // client_tls_sslmode; whether psql shows a certificate; which of its modes get in.
        ("disable",     false, WITHOUT),
        ("allow",       false, ANY),
        ("prefer",      false, ANY),
        ("require",     false, WITH_TLS),
        ("verify-ca",   true,  WITH_TLS),
        ("verify-ca",   false, [false; 6]),
        ("verify-full", true,  WITH_TLS),
        ("verify-full", false, [false; 6]),
    ];
    for (ours, shows, theirs) in table {
        let trusted: &[(&str, &str)] =
            if ours.starts_with("verify") { &[("client_tls_ca_file", show(&ca))] } else { &[] };
        let front = Front::start(ours, trusted);
        for (mode, want) in MODES.into_iter().zip(theirs) {
            let got = front.psql(&format!("sslmode={mode} {}", if shows { &shown } else { "" }), "SELECT 1");
            assert_eq!(got.is_ok(), want, "{ours}, {shows}, psql {mode}: {got:?}");
            if let Err(words) = got {
                let why = match (ours, mode) {
                    ("disable", _) => "server does not support SSL, but SSL was required",
                    (_, "disable") => "FATAL:  connection requires SSL encryption",
                    _ => "FATAL:  connection requires a valid client certificate",
                };
                assert!(words.contains(why), "{ours}, {shows}, psql {mode}: {words}");
            }
        }
    }
}

/// Over TLS nobody else can read it: no leave is needed.
#[test]
fn a_password_in_clear_is_asked_for_over_tls_without_leave_and_not_beside_it() {
    let front = Front::start("prefer", &[("auth_type", "plain")]);
    let (name, port) = (&front.place.name, front.pgweir.port());
    let words = |more: &str| format!("host=127.0.0.1 port={port} user={name} dbname={name} {more}");
    let told = libpq(&[
        words(&format!("sslmode=require password={PASSWORD} require_auth=password")),
        words(&format!("sslmode=require password={PASSWORD} require_auth=!password")),
        words("sslmode=require password=wrong"),
        words(&format!("sslmode=disable password={PASSWORD}")),
    ]);
    assert_eq!(told[0], format!("ok {name}"));
    assert!(told[1].contains("authentication method requirement"), "{}", told[1]);
    let failed = format!("FATAL: password authentication failed for user \"{name}\"");
    assert!(told[2].ends_with(&failed), "{}", told[2]);
    assert!(told[3].contains("auth_plain_without_tls"), "{}", told[3]);
}
