//! Towards servers: what psql accepts of a Postgres, pgweir accepts, and nothing else.

use std::net::{Ipv6Addr, TcpListener};
use std::time::Duration;

use pgweir_harness::wire::{Wire, build};
use pgweir_harness::{Direction, FaultProxy, Pgweir, wait_until_async};
use rcgen::{
    BasicConstraints, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, KeyUsagePurpose, NameConstraints,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, date_time_ymd,
};
use tokio::time::sleep;

use super::pki::{Authority, Folder, Identity, address, dns, ecdsa, key_of, named, rsa, self_signed};
use super::{TlsPrimary, psql, show};
use crate::stage::{SOON, run, succeed};
use crate::support::{PASSWORD, Place, start_pgweir};

/// A certificate and whom to trust.
struct Shape {
    name: &'static str,
    host: &'static str,
    identity: Identity,
    /// PEM; the file of authorities.
    authorities: String,
    /// How many of the ways to connect psql takes: so that a matrix in which all agree for the wrong reason is seen.
    accepted: usize,
}

/// Modes, each without a file of authorities or with one. Without anyone to trust `verify-*` is a fault of the
/// configuration.
const WAYS: [(&str, bool); 6] = [
    ("allow", true),
    ("prefer", true),
    ("require", false),
    ("require", true),
    ("verify-ca", true),
    ("verify-full", true),
];

/// Tries every shape in every way, by psql and by pgweir.
fn compare(shapes: Vec<Shape>) {
    let primary = TlsPrimary::take();
    let folder = Folder::new();
    let place = Place::on(&primary.0);
    let mut faults = Vec::new();
    for Shape { name, host, identity, authorities, accepted } in shapes {
        primary.show(&identity);
        let ca = folder.write("ca.pem", &authorities);
        let mut settings = vec![("query_wait_timeout".to_owned(), "5s".to_owned())];
        for (mode, trust) in WAYS {
            let key = |key: &str| format!("databases.{mode}-{trust}.{key}");
            settings.push((key("host"), host.to_owned()));
            settings.push((key("port"), primary.0.port().to_string()));
            settings.push((key("dbname"), place.name.clone()));
            settings.push((key("sslmode"), mode.to_owned()));
            if trust {
                settings.push((key("sslrootcert"), show(&ca).to_owned()));
            }
        }
        let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let pgweir = start_pgweir(place.toml(&settings));
        let mut yes = 0;
        for (mode, trust) in WAYS {
            let (user, port) = (&place.name, primary.0.port());
            let root = if trust { show(&ca) } else { "" };
            let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            let words = format!(
                "host={host} port={port} user={user} dbname={user} sslmode={mode} sslrootcert='{root}' application_name=x"
            );
            let want = psql(&primary.0, &words, sql);
            let words = format!("host=127.0.0.1 port={} user={user} dbname={mode}-{trust}", pgweir.port());
            let got = psql(&primary.0, &words, sql);
            yes += usize::from(want.is_ok());
            if want.clone().ok() != got.clone().ok() {
                faults.push(format!("{name}, {mode}, {trust}: psql {want:?}, pgweir {got:?}"));
            }
        }
        if yes != accepted {
            faults.push(format!("{name}: psql took {yes} ways, {accepted} were expected"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn certificates_of_every_shape_are_judged_as_psql_judges_them() {
    let root = Authority::root("the root");
    let other = Authority::root("another root");
    let middle = root.intermediate("the middle");
    let behind = |leaf: Identity, middle: &Authority| {
        let certificate = format!("{}{}", leaf.certificate, middle.pem);
        Identity { certificate, ..leaf }
    };
    let chained = |leaf: Identity| behind(leaf, &middle);
    let gone = root.intermediate_with("the middle, once", |params| params.not_after = date_time_ymd(2021, 1, 1));
    let itself = self_signed(|_| {});
    let authority_itself = self_signed(|params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages.push(KeyUsagePurpose::KeyCertSign);
    });
    let shape =
        |name, identity, accepted| Shape { name, host: "localhost", identity, authorities: root.pem.clone(), accepted };
    let mut shapes = vec![
        shape("signed by the root", root.issue(|_| {}), 6),
        shape("RSA", root.issue_for(&rsa(), |_| {}), 6),
        shape("ECDSA P-384", root.issue_for(&key_of(&PKCS_ECDSA_P384_SHA384), |_| {}), 6),
        shape("Ed25519", root.issue_for(&key_of(&PKCS_ED25519), |_| {}), 6),
        shape("another authority", other.issue(|_| {}), 3),
        shape("itself, unknown", itself.clone(), 3),
        Shape { authorities: itself.certificate.clone(), ..shape("itself, trusted", itself.clone(), 6) },
        Shape {
            authorities: authority_itself.certificate.clone(),
            ..shape("itself, an authority, trusted", authority_itself.clone(), 6)
        },
        shape("expired", root.issue(|params| params.not_after = date_time_ymd(2021, 1, 1)), 3),
        shape("not yet valid", root.issue(|params| params.not_before = date_time_ymd(2089, 1, 1)), 3),
        shape("for clients only", root.issue(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]), 3),
        shape("for anything", root.issue(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]), 3),
        shape("without purposes", root.issue(|p| p.extended_key_usages.clear()), 6),
        shape("key only for signing certificates", root.issue(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]), 3),
        shape("a leaf that is an authority", root.issue(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), 6),
        shape("a leaf that says it is none", root.issue(|p| p.is_ca = IsCa::ExplicitNoCa), 6),
        shape("an intermediate, sent", chained(middle.issue(|_| {})), 6),
        shape("an intermediate, missing", middle.issue(|_| {}), 3),
        shape("an intermediate, expired", behind(gone.issue(|_| {}), &gone), 3),
        Shape {
            authorities: format!("{}{}", root.pem, middle.pem),
            ..shape("an intermediate, trusted beside the root", middle.issue(|_| {}), 6)
        },
        Shape {
            authorities: middle.pem.clone(),
            ..shape("an intermediate, trusted without a root", chained(middle.issue(|_| {})), 3)
        },
    ];
    let leaf = ecdsa();
    let below_a_leaf = {
        // Somebody with a certificate of his own plays authority.
        let false_ca = root.issue_for(&leaf, |params| params.distinguished_name = named("a leaf"));
        let signer = Authority::with(&leaf, "a leaf");
        let identity = signer.issue(|_| {});
        Identity { certificate: format!("{}{}", identity.certificate, false_ca.certificate), ..identity }
    };
    shapes.push(shape("signed by a leaf", below_a_leaf, 3));
    compare(shapes);
}

#[test]
fn what_a_server_can_and_demands_decides_as_for_psql() {
    let primary = TlsPrimary::take();
    let place = Place::on(&primary.0);
    let (name, port) = (&place.name, primary.0.port());
    let modes = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    let port_text = port.to_string();
    let folder = Folder::new();
    let root = Authority::root("the root");
    let ca = folder.write("ca.pem", &root.pem);
    let trusted = |mode: &str| if mode.starts_with("verify") { show(&ca) } else { "" };
    let mut settings = vec![("query_wait_timeout".to_owned(), "5s")];
    for mode in modes {
        for (key, value) in [("host", "127.0.0.1"), ("port", &port_text), ("dbname", name), ("sslmode", mode)] {
            settings.push((format!("databases.{mode}.{key}"), value));
        }
        if !trusted(mode).is_empty() {
            settings.push((format!("databases.{mode}.sslrootcert"), trusted(mode)));
        }
    }
    let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let (yes, no) = (Some("t"), Some("f"));
    #[rustfmt::skip]
    let table = [
        ("no TLS",           false, "host all all 127.0.0.1/32 trust",      [no,   no,  no,  None, None, None]),
        ("TLS",              true,  "host all all 127.0.0.1/32 trust",      [no,   no,  yes, yes,  yes,  yes]),
        ("only with TLS",    true,  "hostssl all all 127.0.0.1/32 trust",   [None, yes, yes, yes,  yes,  yes]),
        ("only without TLS", true,  "hostnossl all all 127.0.0.1/32 trust", [no,   no,  no,  None, None, None]),
    ];
    for (what, tls, hba, wanted) in table {
        if tls {
            primary.show(&root.issue(|params| params.subject_alt_names = vec![address("127.0.0.1")]));
        } else {
            primary.hide();
        }
        primary.hba(hba);
        let pgweir = start_pgweir(place.toml(&settings));
        for (mode, want) in modes.into_iter().zip(wanted) {
            let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            let words = format!(
                "host=127.0.0.1 port={port} user={name} dbname={name} sslmode={mode} sslrootcert='{}'",
                trusted(mode)
            );
            let direct = psql(&primary.0, &words, sql);
            let words = format!("host=127.0.0.1 port={} user={name} dbname={mode}", pgweir.port());
            let through = psql(&primary.0, &words, sql);
            assert_eq!(direct.as_deref().ok(), want, "{what}, {mode}: psql {direct:?}");
            assert_eq!(through.as_deref().ok(), want, "{what}, {mode}: pgweir {through:?}");
            if what == "no TLS" && want.is_none() {
                let words = "server does not support SSL, but SSL was required";
                assert!(direct.is_err_and(|error| error.contains(words)), "psql");
                assert!(through.is_err_and(|error| error.contains(words)), "pgweir");
            }
        }
    }
}

/// What goes through TLS only the server reads, which needs no leave.
#[test]
fn a_server_that_asks_for_the_password_in_clear_gets_it_over_tls_alone() {
    let primary = TlsPrimary::take();
    let place = Place::on(&primary.0);
    let (folder, root) = (Folder::new(), Authority::root("the root"));
    let ca = folder.write("ca.pem", &root.pem);
    primary.show(&root.issue(|_| {}));
    primary.hba("host all all 127.0.0.1/32 password");
    let ask = |mode: &str, password: &str| {
        let pgweir = start_pgweir(place.toml(&[
            ("databases.PLACE.host", "localhost"),
            ("databases.PLACE.sslmode", mode),
            ("databases.PLACE.sslrootcert", show(&ca)),
            ("databases.PLACE.password", password),
            ("databases.PLACE.require_auth", "password"),
            ("query_wait_timeout", "5s"),
        ]));
        let words = format!("host=127.0.0.1 port={} user={name} dbname={name}", pgweir.port(), name = place.name);
        psql(&primary.0, &words, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    };
    let unheard = "asks for the password in clear on a connection without TLS";
    for (mode, told) in [
        // Refused with TLS, it tries without, as psql does: and keeps the password to itself there.
        ("prefer", unheard),
        ("require", "password authentication failed"),
        ("verify-full", "password authentication failed"),
    ] {
        // That it was asked for, and checked, is seen by what is refused.
        assert_eq!(ask(mode, PASSWORD), Ok("t".to_owned()), "{mode}");
        let wrong = ask(mode, "wrong-secret");
        assert!(wrong.as_ref().is_err_and(|words| words.contains(told)), "{mode}: {wrong:?}");
    }
    let refused = ask("disable", PASSWORD);
    assert!(refused.as_ref().is_err_and(|words| words.contains(unheard)), "{refused:?}");
}

/// Through TLS 48 KiB are read at once, and what is behind them in the same breath.
#[test]
fn a_client_that_gives_way_is_heard_when_the_end_of_the_audit_is_read_in_the_same_breath_as_its_front() {
    let primary = TlsPrimary::take();
    primary.show(&Authority::root("the root").issue(|_| {}));
    let place = Place::on(&primary.0);
    place.psql(&format!("SET ROLE {}; CREATE SEQUENCE turn", place.name));
    let proxy = FaultProxy::start(primary.0.addr()).unwrap();
    let pgweir = start_pgweir(place.toml(&[
        ("databases.PLACE.port", &proxy.port().to_string()),
        ("databases.PLACE.sslmode", "require"),
        ("default_pool_size", "1"),
        ("query_wait_timeout", "30s"),
    ]));
    let client = async || Wire::open(pgweir.addr(), &place.name, &place.name, "").await.unwrap();
    let turn = || build::query("SELECT nextval('turn')");
    // What it sets is told by the audit.
    let values = ["a", "b", "c", "d"].map(|name| format!("set_config('its.{name}', repeat('x', 15000), false)"));
    run(Duration::from_mins(3), async {
        let (mut eager, mut waiter, mut late) = (client().await, client().await, client().await);
        let (mut shown, mut delay) = (0, Duration::from_millis(300));
        while shown < 5 {
            send_ahead(&pgweir, &mut eager).await;
            succeed(&mut eager, &format!("BEGIN; SELECT {}", values.join(", "))).await;
            waiter.send(&build::query("BEGIN")).await.unwrap();
            barrier(&pgweir).await;
            proxy.delay(Direction::ToClient, delay);
            let [asked, before] = [Direction::ToServer, Direction::ToClient].map(|way| proxy.bytes(way));
            succeed(&mut eager, "COMMIT").await;
            // It is told of its end before the audit is asked for, which is a longer text than COMMIT.
            wait_until_async(SOON, async || proxy.bytes(Direction::ToServer) - asked > 500).await;
            pgweir.signal(libc::SIGSTOP).unwrap();
            let told = || proxy.bytes(Direction::ToClient) - before;
            let in_time = told() < 10_000;
            // Both are there when it looks: the turn, and all of the audit's answer, or as much of it as there is room for.
            eager.send(&turn()).await.unwrap();
            let (mut last, mut looks) = (0, 0);
            while last < 10_000 || looks < 4 {
                sleep(Duration::from_millis(50)).await;
                looks = if last == told() { looks + 1 } else { 0 };
                last = told();
            }
            pgweir.signal(libc::SIGCONT).unwrap();
            proxy.delay(Direction::ToClient, Duration::ZERO);
            assert_eq!(waiter.outcome().await.unwrap().status, b'T');
            late.send(&turn()).await.unwrap();
            barrier(&pgweir).await;
            succeed(&mut waiter, "COMMIT").await;
            let (first, second) = (eager.outcome().await.unwrap(), late.outcome().await.unwrap());
            let [first, second] = [first, second].map(|outcome| outcome.value().unwrap().parse::<u64>().unwrap());
            assert!(first < second, "round {shown}: {first} {second}");
            if in_time {
                shown += 1;
            } else {
                // It was read before pgweir was stopped: this machine is slower.
                delay *= 2;
                assert!(delay < SOON, "pgweir was never stopped in time");
            }
        }
    });
}

/// Has a client found to send ahead: it is listened to from then on, whatever the server does.
async fn send_ahead(pgweir: &Pgweir, client: &mut Wire) {
    let mut is_late = true;
    while is_late {
        client.send(&build::query("SELECT pg_sleep(0.2)")).await.unwrap();
        barrier(pgweir).await;
        client.send(&build::query("SELECT 'ahead'")).await.unwrap();
        is_late = client.recv_within(Duration::from_millis(1)).await.unwrap().is_some();
        assert_eq!(client.outcome().await.unwrap().error, None);
        assert_eq!(client.outcome().await.unwrap().value(), Some("ahead"));
    }
}

/// Returns when pgweir has handled what was sent before: its one worker answers this later than it reads that.
async fn barrier(pgweir: &Pgweir) {
    for _ in 0..3 {
        let mut wire = Wire::connect(pgweir.addr()).await.unwrap();
        wire.send(&build::ssl_request()).await.unwrap();
        assert_eq!(wire.recv_raw(1).await.unwrap(), b"N");
    }
}

#[test]
fn names_are_judged_as_psql_judges_them() {
    let root = Authority::root("the root");
    let shape =
        |name, host, identity, accepted| Shape { name, host, identity, authorities: root.pem.clone(), accepted };
    let issue = |common: &str, names: Vec<_>| {
        root.issue(|params| {
            params.distinguished_name = named(common);
            params.subject_alt_names = names;
        })
    };
    let mut shapes = vec![
        shape("another name", "localhost", issue("x", vec![dns("elsewhere")]), 5),
        shape("only a common name", "localhost", issue("localhost", vec![]), 6),
        shape("a common name in another case", "localhost", issue("LocalHost", vec![]), 6),
        shape("a common name beside another name", "localhost", issue("localhost", vec![dns("elsewhere")]), 5),
        shape("a common name beside an address", "localhost", issue("localhost", vec![address("127.0.0.2")]), 6),
        shape("the second name", "localhost", issue("x", vec![dns("elsewhere"), dns("localhost")]), 6),
        shape("an address", "127.0.0.1", issue("x", vec![address("127.0.0.1")]), 6),
        shape("another address", "127.0.0.1", issue("127.0.0.1", vec![address("127.0.0.2")]), 5),
        shape("an address as a name", "127.0.0.1", issue("x", vec![dns("127.0.0.1")]), 6),
        shape("an address as the common name", "127.0.0.1", issue("127.0.0.1", vec![dns("elsewhere")]), 6),
        shape("a name for an address", "127.0.0.1", issue("localhost", vec![dns("localhost")]), 5),
        shape("a wildcard", "127.0.0.1", issue("x", vec![dns("*.0.0.1")]), 6),
        shape("a wildcard for two labels", "127.0.0.1", issue("x", vec![dns("*.0.1")]), 5),
        shape("a wildcard for all", "localhost", issue("x", vec![dns("*")]), 5),
        shape("no name at all", "localhost", issue("", vec![]), 5),
    ];
    // There are machines without.
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        shapes.extend([
            shape("an address of IPv6", "::1", issue("x", vec![address("::1")]), 6),
            shape("the second address of IPv6", "::1", issue("x", vec![address("127.0.0.1"), address("::1")]), 6),
            shape("another address of IPv6", "::1", issue("x", vec![address("::2")]), 5),
            shape("an address of IPv4 for one of IPv6", "::1", issue("x", vec![address("127.0.0.1")]), 5),
            shape("an address of IPv6 as the common name", "::1", issue("::1", vec![]), 6),
            shape("a name for an address of IPv6", "::1", issue("localhost", vec![dns("localhost")]), 5),
        ]);
    }
    compare(shapes);
}

#[test]
fn roots_of_every_shape_are_judged_as_psql_judges_them() {
    let folder = Folder::new();
    // Version 1 has no extensions: it cannot say that it is an authority.
    folder.openssl("req -new -newkey rsa:2048 -nodes -keyout root.key -subj /CN=old-root -out root.csr");
    folder.openssl("x509 -req -in root.csr -signkey root.key -days 3650 -out root.crt");
    folder.openssl("req -new -newkey rsa:2048 -nodes -keyout leaf.key -subj /CN=localhost -out leaf.csr");
    folder.openssl("x509 -req -in leaf.csr -CA root.crt -CAkey root.key -set_serial 2 -days 3650 -out leaf.crt");
    folder.openssl("req -new -newkey rsa:2048 -nodes -keyout middle.key -subj /CN=middle -out middle.csr");
    folder.openssl("x509 -req -in middle.csr -CA root.crt -CAkey root.key -set_serial 3 -days 3650 -out middle.crt");
    folder.openssl("x509 -req -in leaf.csr -CA middle.crt -CAkey middle.key -set_serial 4 -days 3650 -out below.crt");
    folder.openssl("req -x509 -newkey rsa:1024 -nodes -keyout short.key -subj /CN=localhost -days 3650 -out short.crt");
    let own = |certificate: String, key: &str| Identity { certificate, key: folder.read(key) };
    let old = folder.read("root.crt");
    let expired = Authority::root_with("expired", |params| params.not_after = date_time_ymd(2021, 1, 1));
    let narrow = |names: &str| {
        Authority::root_with("narrow", |params| {
            let permitted_subtrees = vec![GeneralSubtree::DnsName(names.to_owned())];
            params.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
        })
    };
    let (fitting, unfitting) = (narrow("localhost"), narrow("example.com"));
    let flat = Authority::root_with("flat", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let below_flat = flat.intermediate("below");
    let too_deep = {
        let leaf = below_flat.issue(|_| {});
        Identity { certificate: format!("{}{}", leaf.certificate, below_flat.pem), ..leaf }
    };
    let shape = |name, identity, authorities: &str, accepted| Shape {
        name,
        host: "localhost",
        identity,
        authorities: authorities.to_owned(),
        accepted,
    };
    compare(vec![
        shape("a root and a leaf of version 1", own(folder.read("leaf.crt"), "leaf.key"), &old, 6),
        shape(
            "an intermediate of version 1",
            own(folder.read("below.crt") + &folder.read("middle.crt"), "leaf.key"),
            &old,
            3,
        ),
        shape("a root of version 1 as the leaf", own(old.clone(), "root.key"), &old, 5),
        shape("an expired root", expired.issue(|_| {}), &expired.pem, 3),
        shape("a root for such names", fitting.issue(|_| {}), &fitting.pem, 6),
        shape("a root for other names", unfitting.issue(|_| {}), &unfitting.pem, 3),
        shape("a root with nothing below its leaves", flat.issue(|_| {}), &flat.pem, 6),
        shape("a chain longer than the root allows", too_deep, &flat.pem, 3),
    ]);
}
