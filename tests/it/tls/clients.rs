//! Towards clients: psql gets from pgweir what it gets from Postgres.

use pgweir_harness::Pgweir;

use super::pki::{Authority, Folder};
use super::{psql, show};
use crate::support::{Place, primary, start_pgweir};

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
    #[rustfmt::skip]
    let table = [
        // client_tls_sslmode; which of psql's modes get in.
        ("allow",   [("disable", true),  ("allow", true), ("prefer", true), ("require", true), ("verify-full", true)]),
        ("prefer",  [("disable", true),  ("allow", true), ("prefer", true), ("require", true), ("verify-full", true)]),
        ("require", [("disable", false), ("allow", true), ("prefer", true), ("require", true), ("verify-full", true)]),
    ];
    for (ours, theirs) in table {
        let front = Front::start(ours, &[]);
        for (mode, want) in theirs {
            let got = front.psql(&format!("sslmode={mode}"), "SELECT 1");
            assert_eq!(got.is_ok(), want, "{ours}, psql {mode}: {got:?}");
            if let Err(words) = got {
                assert!(words.contains("FATAL:  connection requires SSL encryption"), "{words}");
            }
        }
    }
}
