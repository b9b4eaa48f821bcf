//! Certificates that clients show: ours to servers, theirs to us.

use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};

use super::clients::Front;
use super::pki::{Authority, Folder, named, self_signed};
use super::{TlsPrimary, psql, show};
use crate::support::{Place, start_pgweir};

#[test]
fn clients_certificates_are_judged_as_postgres_judges_them() {
    let tls = TlsPrimary::take();
    let root = Authority::root("the clients' root");
    let other = Authority::root("another root");
    tls.0.place_file("root.crt", &root.pem).unwrap();
    tls.0.psql("postgres", "ALTER SYSTEM SET ssl_ca_file = 'root.crt'").unwrap();
    tls.show(&root.issue(|_| {}));
    tls.hba("hostssl all all 127.0.0.1/32 trust clientcert=verify-ca");
    let folder = Folder::new();
    let ca = folder.write("clients.pem", &root.pem);
    let front = Front::start("verify-ca", &[("client_tls_ca_file", show(&ca))]);
    let client = |params: &mut rcgen::CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    };
    let shapes = [
        ("signed by the root", Some(root.issue(client)), true),
        ("none", None, false),
        ("another authority", Some(other.issue(client)), false),
        ("itself", Some(self_signed(client)), false),
        ("for servers only", Some(root.issue(|_| {})), false),
        ("without purposes", Some(root.issue(|params| params.extended_key_usages.clear())), true),
        ("expired", Some(root.issue(|params| params.not_after = date_time_ymd(2021, 1, 1))), false),
    ];
    let name = &front.place.name;
    tls.0.psql("postgres", &format!("CREATE ROLE {name} LOGIN")).unwrap();
    tls.0.psql("postgres", &format!("CREATE DATABASE {name}")).unwrap();
    for (what, identity, want) in shapes {
        let shown = identity.map_or_else(String::new, |identity| {
            let (cert, key) = folder.identity("client", &identity);
            format!("sslcert={} sslkey={}", show(&cert), show(&key))
        });
        let port = tls.0.port();
        let words = format!("host=127.0.0.1 port={port} user={name} dbname={name} sslmode=require {shown}");
        let direct = psql(&tls.0, &words, "SELECT 7");
        let through = front.psql(&format!("sslmode=require sslrootcert='' {shown}"), "SELECT 7");
        assert_eq!(direct.is_ok(), want, "{what}: {direct:?}");
        assert_eq!(through.is_ok(), want, "{what}: {through:?}");
        if what == "none" {
            let words = "connection requires a valid client certificate";
            assert!(direct.is_err_and(|told| told.contains(words)), "Postgres");
            assert!(through.is_err_and(|told| told.contains(words)), "pgweir");
        }
    }
    tls.0.psql("postgres", "ALTER SYSTEM RESET ssl_ca_file").unwrap();
}

#[test]
fn a_server_that_wants_a_certificate_gets_ours() {
    let tls = TlsPrimary::take();
    let root = Authority::root("the root");
    let place = Place::on(&tls.0);
    tls.0.place_file("root.crt", &root.pem).unwrap();
    tls.0.psql("postgres", "ALTER SYSTEM SET ssl_ca_file = 'root.crt'").unwrap();
    tls.show(&root.issue(|_| {}));
    tls.hba("hostssl all all 127.0.0.1/32 cert");
    let folder = Folder::new();
    let mut outcomes = Vec::new();
    for (user, cert_key, key_key) in [
        (place.name.as_str(), "databases.PLACE.sslcert", "databases.PLACE.sslkey"),
        ("somebody-else", "databases.PLACE.sslcert", "databases.PLACE.sslkey"),
        (place.name.as_str(), "server_tls_cert_file", "server_tls_key_file"),
    ] {
        let identity = root.issue(|params| {
            params.distinguished_name = named(user);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        });
        let (cert, key) = folder.identity("us", &identity);
        let pgweir = start_pgweir(place.toml(&[
            ("databases.PLACE.sslmode", "require"),
            (cert_key, show(&cert)),
            (key_key, show(&key)),
        ]));
        let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
        outcomes.push(psql(&tls.0, &words, "SELECT 7"));
    }
    tls.0.psql("postgres", "ALTER SYSTEM RESET ssl_ca_file").unwrap();
    assert_eq!([&outcomes[0], &outcomes[2]], [&Ok("7".to_owned()); 2]);
    assert!(outcomes[1].as_ref().is_err_and(|told| told.contains("certificate authentication failed")), "{outcomes:?}");
}
