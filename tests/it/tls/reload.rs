//! Files that change while pgweir runs, and files that are faulty.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use pgweir_harness::wait_until;
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose};
use rustls::version::TLS13;

use super::client::{self, TlsClient};
use super::clients::Front;
use super::pki::{Authority, Folder, Identity, named};
use super::{TlsPrimary, psql, show};
use crate::support::{Place, SOON, primary, run_with, start_pgweir};

#[test]
fn a_new_certificate_is_shown_without_a_restart_and_a_faulty_one_is_not() {
    let front = Front::start("require", &[]);
    let other = Authority::root("another root");
    let works = |ca: &str| {
        let ca = front.folder.write("now.pem", ca);
        front.psql(&format!("sslmode=verify-full sslrootcert={}", show(&ca)), "SELECT 7")
    };
    let old = front.folder.read("ca.pem");
    assert_eq!(works(&old), Ok("7".to_owned()));
    let fresh = other.issue(|_| {});

    // The certificate alone: it does not belong to the key.
    let mark = front.pgweir.log().len();
    front.folder.write("server.crt", &fresh.certificate);
    front.pgweir.wait_log_from(mark, "the private key does not match the certificate", SOON).unwrap();
    front.pgweir.wait_log_from(mark, "the old ones stay in use", SOON).unwrap();
    assert_eq!(works(&old), Ok("7".to_owned()));

    let mark = front.pgweir.log().len();
    front.folder.write("server.key", &fresh.key);
    front.pgweir.wait_log_from(mark, "certificates and keys of TLS read again", SOON).unwrap();
    assert!(works(&old).is_err());
    assert_eq!(works(&other.pem), Ok("7".to_owned()));

    // On SIGHUP at once, also when nothing has changed.
    let mark = front.pgweir.log().len();
    front.pgweir.signal(libc::SIGHUP).unwrap();
    front.pgweir.wait_log_from(mark, "certificates and keys of TLS read again", SOON).unwrap();
}

#[test]
fn a_new_authority_for_servers_is_believed_without_a_restart() {
    let tls = TlsPrimary::take();
    let (old, new) = (Authority::root("old"), Authority::root("new"));
    tls.show(&new.issue(|_| {}));
    let folder = Folder::new();
    let ca = folder.write("ca.pem", &old.pem);
    let place = Place::on(&tls.0);
    let pgweir = start_pgweir(place.toml(&[
        ("databases.PLACE.host", "localhost"),
        ("databases.PLACE.sslmode", "verify-full"),
        ("databases.PLACE.sslrootcert", show(&ca)),
        ("server_login_retry", "100ms"),
        ("query_wait_timeout", "5s"),
    ]));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    let told = psql(&tls.0, &words, "SELECT 7").unwrap_err();
    assert!(told.contains("UnknownIssuer"), "{told}");
    folder.write("ca.pem", &new.pem);
    pgweir.wait_log("certificates and keys of TLS read again", SOON).unwrap();
    // Until the next login, which comes after a pause, clients hear how the one before went.
    wait_until(SOON, || psql(&tls.0, &words, "SELECT 7") == Ok("7".to_owned()));
}

#[test]
fn a_new_authority_for_clients_is_believed_without_a_restart_and_the_old_one_no_more() {
    let (old, new) = (Authority::root("old"), Authority::root("new"));
    let folder = Folder::new();
    let ca = folder.write("clients.pem", &old.pem);
    let front = Front::start("verify-ca", &[("client_tls_ca_file", show(&ca))]);
    let as_client = |params: &mut CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    };
    let (of_old, of_new) = (old.issue(as_client), new.issue(as_client));
    let shown = |name: &str, identity: &Identity| {
        let (cert, key) = folder.identity(name, identity);
        format!("sslmode=require sslrootcert='' sslcert={} sslkey={}", show(&cert), show(&key))
    };
    let (with_old, with_new) = (shown("old", &of_old), shown("new", &of_new));
    // Whose session is older than the new authority.
    let config = client::config_as(Some(&of_old), &[], &[&TLS13]);
    let mut early = TlsClient::on(client::granted(front.pgweir.addr()), &config).unwrap();
    early.log_in(&front.place.name);
    assert_eq!(early.value("SELECT 7"), "7");
    assert_eq!(front.psql(&with_old, "SELECT 7"), Ok("7".to_owned()));
    assert!(front.psql(&with_new, "SELECT 7").is_err());

    // Half a file is no reason to let nobody in, nor everybody.
    let mark = front.pgweir.log().len();
    folder.write("clients.pem", &new.pem[..new.pem.len() / 2]);
    front.pgweir.wait_log_from(mark, "the old ones stay in use", SOON).unwrap();
    assert_eq!(front.psql(&with_old, "SELECT 7"), Ok("7".to_owned()));
    assert!(front.psql(&with_new, "SELECT 7").is_err());

    let mark = front.pgweir.log().len();
    folder.write("clients.pem", &new.pem);
    front.pgweir.wait_log_from(mark, "certificates and keys of TLS read again", SOON).unwrap();
    assert_eq!(front.psql(&with_new, "SELECT 7"), Ok("7".to_owned()));
    assert!(front.psql(&with_old, "SELECT 7").is_err());
    // A session that began under the old one opens nothing any more, and a connection stays.
    let mut late = TlsClient::on(client::granted(front.pgweir.addr()), &config).unwrap();
    assert!(!late.is_resumed());
    assert_eq!(late.message(), None);
    assert_eq!(early.value("SELECT 7"), "7");
}

#[test]
fn a_new_certificate_of_ours_is_shown_to_servers_without_a_restart() {
    let tls = TlsPrimary::take();
    let (root, other) = (Authority::root("the root"), Authority::root("another root"));
    let place = Place::on(&tls.0);
    tls.0.place_file("root.crt", &root.pem).unwrap();
    tls.0.psql("postgres", "ALTER SYSTEM SET ssl_ca_file = 'root.crt'").unwrap();
    tls.show(&root.issue(|_| {}));
    tls.hba("hostssl all all 127.0.0.1/32 cert");
    let folder = Folder::new();
    let ours = |authority: &Authority, serial: u64| {
        let identity = authority.issue(|params| {
            params.distinguished_name = named(&place.name);
            params.serial_number = Some(serial.into());
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        });
        folder.identity("us", &identity)
    };
    let (cert, key) = ours(&other, 41);
    let pgweir = start_pgweir(place.toml(&[
        ("databases.PLACE.sslmode", "require"),
        ("databases.PLACE.sslcert", show(&cert)),
        ("databases.PLACE.sslkey", show(&key)),
        ("server_lifetime", "0"),
        ("server_login_retry", "100ms"),
        ("query_wait_timeout", "5s"),
    ]));
    let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
    let seen = || psql(&tls.0, &words, "SELECT client_serial FROM pg_stat_ssl WHERE pid = pg_backend_pid()");
    let first = seen();
    let mut later = Vec::new();
    for serial in [42, 43] {
        let mark = pgweir.log().len();
        ours(&root, serial);
        let read = pgweir.wait_log_from(mark, "certificates and keys of TLS read again", SOON);
        // Until the next login, which comes after a pause, clients hear how the one before went.
        let want = Ok(serial.to_string());
        later.push(read.is_ok() && eventually(|| seen() == want));
    }
    tls.0.psql("postgres", "ALTER SYSTEM RESET ssl_ca_file").unwrap();
    assert!(first.is_err(), "{first:?}");
    assert_eq!(later, [true, true]);
}

/// Whether that is so soon.
fn eventually(mut so: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        if so() {
            return true;
        }
        thread::sleep(Duration::from_millis(50));
    }
    false
}

#[test]
fn every_fault_of_every_file_is_told_at_the_start() {
    let folder = Folder::new();
    let root = Authority::root("the root");
    let (cert, key) = folder.identity("good", &root.issue(|_| {}));
    let (_, other_key) = folder.identity("other", &root.issue(|_| {}));
    let empty = folder.write("empty.pem", "");
    let broken = folder.write("broken.pem", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n");
    let open_key = folder.write("open.key", &folder.read("good.key"));
    fs::set_permissions(&open_key, Permissions::from_mode(0o644)).unwrap();
    folder.openssl("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -pass pass:x -out locked.key");
    fs::set_permissions(folder.path("locked.key"), Permissions::from_mode(0o600)).unwrap();
    let (missing, locked) = (folder.path("missing.pem"), folder.path("locked.key"));
    let place = Place::on(primary());
    let base = place.toml(&[
        ("client_tls_sslmode", "verify-ca"),
        ("client_tls_cert_file", show(&cert)),
        ("client_tls_key_file", show(&other_key)),
        ("client_tls_ca_file", show(&empty)),
        ("databases.a.sslrootcert", show(&missing)),
        ("databases.a.sslcert", show(&broken)),
        ("databases.a.sslkey", show(&open_key)),
        ("databases.b.sslcert", show(&cert)),
        ("databases.b.sslkey", show(&locked)),
        ("databases.c.sslcert", show(&cert)),
        ("databases.c.sslkey", show(&key)),
    ]);
    for subcommand in ["serve", "check"] {
        let output = run_with(subcommand, &base);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{told}");
        for (key, words) in [
            ("client_tls_key_file", "does not match the certificate"),
            ("client_tls_ca_file", "the file holds no certificate"),
            ("databases.a.sslrootcert", "the file cannot be read: No such file or directory"),
            ("databases.a.sslcert", "not PEM"),
            ("databases.a.sslkey", "has group or world access"),
            ("databases.b.sslkey", "the private key is encrypted"),
        ] {
            let line = told.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap_or_default();
            assert!(line.contains(words), "{subcommand}, {key}: {told}");
        }
        assert_eq!(told.lines().count(), 6, "{told}");
    }
}

#[test]
fn settings_of_tls_that_contradict_each_other_are_faults() {
    let place = Place::on(primary());
    #[rustfmt::skip]
    let table: [(&[(&str, &str)], &str); 7] = [
        (&[("client_tls_sslmode", "require")],             "it needs client_tls_cert_file, which is empty"),
        (&[("client_tls_sslmode", "sometimes")],           "none of disable, allow, prefer"),
        (&[("client_tls_protocols", "tlsv1.1")],           "not TLS versions that are spoken"),
        (&[("server_tls_sslmode", "verify-full")],         "server_tls_ca_file is empty"),
        (&[("server_tls_ca_file", "system")],              "weak sslmode"),
        (&[("databases.PLACE.sslcert", "/x")],             "sslkey, which belongs to it, is empty"),
        (&[("databases.PLACE.sslnegotiation", "direct")],  "weak sslmode, which may not be used with sslnegotiation"),
    ];
    for (settings, words) in table {
        let output = run_with("serve", &place.toml(settings));
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(words), "{settings:?}: {told}");
    }
}

#[test]
fn a_check_tries_the_databases_with_tls_as_the_pools_would() {
    let tls = TlsPrimary::take();
    let root = Authority::root("the root");
    tls.show(&root.issue(|_| {}));
    tls.hba("hostssl all all 127.0.0.1/32 trust");
    let folder = Folder::new();
    let place = Place::on(&tls.0);
    for (ca, want) in [(&root, true), (&Authority::root("another"), false)] {
        let ca = folder.write("ca.pem", &ca.pem);
        let output = run_with(
            "check",
            &place.toml(&[
                ("databases.app.sslmode", "disable"),
                ("databases.PLACE.host", "localhost"),
                ("databases.PLACE.sslmode", "verify-full"),
                ("databases.PLACE.sslrootcert", show(&ca)),
                ("default_pool_size", "2"),
            ]),
        );
        let (out, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let mine = format!("databases.{} (", place.name);
        assert_eq!(!told.lines().any(|line| line.starts_with(&mine)), want, "{out}\n{told}");
        assert_eq!(told.contains("UnknownIssuer"), !want, "{told}");
        // The one without TLS is refused by a server that wants it.
        assert!(told.contains("no pg_hba.conf entry"), "{told}");
    }
}
