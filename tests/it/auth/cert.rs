//! Certificate authentication: who gets in is whom Postgres lets in.

use pgweir_harness::wire::build;
use pgweir_harness::{Cluster, Pgweir, pgweir_toml};
use rcgen::{DnType, DnValue, ExtendedKeyUsagePurpose};
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};

use super::UserFile;
use crate::support::{PASSWORD, Place, options, primary, start_pgweir};
use crate::tls::client::{TlsClient, config_as, granted};
use crate::tls::pki::{Authority, Folder, Identity, named};
use crate::tls::{TlsPrimary, psql, show};

/// Whom clients and servers here trust, and the files that say so.
struct Pki {
    root: Authority,
    folder: Folder,
}

impl Pki {
    fn new() -> Self {
        let pki = Self { root: Authority::root("the root"), folder: Folder::new() };
        pki.folder.write("ca.pem", &pki.root.pem);
        pki.folder.identity("server", &pki.root.issue(|_| {}));
        pki
    }

    /// A client's certificate with this common name.
    fn client(&self, name: &str) -> Identity {
        self.root.issue(|params| {
            params.distinguished_name = named(name);
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        })
    }

    /// The words of a connection string that show it.
    fn shown(&self, identity: &Identity) -> String {
        let (cert, key) = self.folder.identity("client", identity);
        format!("sslcert={} sslkey={}", show(&cert), show(&key))
    }

    /// Settings of a pgweir whose clients log in by certificate.
    fn settings(&self) -> Vec<(&'static str, String)> {
        let path = |name: &str| show(&self.folder.path(name)).to_owned();
        vec![
            ("auth_type", "cert".to_owned()),
            ("client_tls_sslmode", "verify-full".to_owned()),
            ("client_tls_ca_file", path("ca.pem")),
            ("client_tls_cert_file", path("server.crt")),
            ("client_tls_key_file", path("server.key")),
        ]
    }

    fn toml(&self, place: &Place<'_>, more: &[(&str, &str)]) -> String {
        let own = self.settings();
        let all: Vec<(&str, &str)> =
            own.iter().map(|(key, value)| (*key, value.as_str())).chain(more.iter().copied()).collect();
        place.toml(&all)
    }
}

/// psql at a port, with a certificate or without.
fn enter(cluster: &Cluster, port: u16, user: &str, database: &str, words: &str) -> Result<String, String> {
    let words = format!("host=127.0.0.1 port={port} user={user} dbname={database} sslmode=require {words}");
    psql(cluster, &words, "SELECT 7")
}

/// What a server said, without what psql puts in front.
fn fatal(complaint: &str) -> Option<&str> {
    complaint.split_once("FATAL:").map(|(_, words)| words.trim())
}

/// A Postgres and a pgweir in front of it, both of which let clients in by their certificates.
struct Pair {
    tls: TlsPrimary,
    pki: Pki,
    /// The place's name.
    name: String,
}

impl Pair {
    fn new(hba: &str) -> Self {
        let (tls, pki) = (TlsPrimary::take(), Pki::new());
        tls.0.place_file("root.crt", &pki.root.pem).unwrap();
        tls.0.psql("postgres", "ALTER SYSTEM SET ssl_ca_file = 'root.crt'").unwrap();
        tls.show(&pki.root.issue(|_| {}));
        tls.hba(&format!("hostssl all all 127.0.0.1/32 {hba}"));
        let Place { name, .. } = Place::on(&tls.0);
        Self { tls, pki, name }
    }

    fn place(&self) -> Place<'_> {
        Place { cluster: &self.tls.0, name: self.name.clone() }
    }

    /// pgweir, which reaches Postgres by its socket: its own certificate is another test's.
    fn pgweir(&self, settings: &[(&str, &str)]) -> Pgweir {
        let socket = self.tls.0.socket_dir();
        let place = self.place();
        let more = [&[("databases.PLACE.host", show(&socket))], settings].concat();
        start_pgweir(self.pki.toml(&place, &more))
    }

    /// What Postgres and what pgweir say to a client; they have to agree on who gets in.
    #[track_caller]
    fn both(&self, pgweir: &Pgweir, user: &str, words: &str, want: bool, case: &str) -> String {
        let name = &self.name;
        let direct = enter(&self.tls.0, self.tls.0.port(), user, name, words);
        let through = enter(&self.tls.0, pgweir.port(), user, name, words);
        assert_eq!(direct.is_ok(), want, "{case}, Postgres: {direct:?}");
        assert_eq!(through.is_ok(), want, "{case}, pgweir: {through:?}");
        if let (Err(direct), Err(through)) = (&direct, &through) {
            assert_eq!(fatal(direct), fatal(through), "{case}: {direct}\n{through}");
        }
        through.unwrap_or_else(|complaint| complaint)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.tls.0.psql("postgres", "ALTER SYSTEM RESET ssl_ca_file");
        let _ = self.tls.0.place_file("pg_ident.conf", "");
    }
}

#[test]
fn a_certificate_opens_what_it_opens_at_postgres_and_is_refused_in_the_same_words() {
    let pair = Pair::new("cert");
    let pgweir = pair.pgweir(&[]);
    let name = pair.name.as_str();
    let pki = &pair.pki;
    let stranger = Authority::root("a stranger");
    let nul = pki.root.issue(|params| {
        params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(format!("{name}\0x")));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let nameless = pki.root.issue(|params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let host_only = pki.root.issue(|params| {
        params.distinguished_name = named("somebody-else");
        params.subject_alt_names = vec![crate::tls::pki::dns(name)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    let foreign = stranger.issue(|params| {
        params.distinguished_name = named(name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    });
    // Two common names, which only openssl makes: the first counts.
    let folder = &pki.folder;
    folder.openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout other.key -out other.crt -days 2 -subj /CN=other",
    );
    let two = |first: &str, second: &str| {
        folder.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout two.key -out two.csr -subj /CN={first}/CN={second}"
        ));
        folder.openssl("x509 -req -in two.csr -CA other.crt -CAkey other.key -CAcreateserial -days 2 -out two.crt");
        Identity { certificate: folder.read("two.crt"), key: folder.read("two.key") }
    };
    let (own_first, own_last) = (two(name, "other"), two("other", name));
    let both_roots = format!("{}{}", pki.root.pem, folder.read("other.crt"));
    folder.write("ca.pem", &both_roots);
    pair.tls.0.place_file("root.crt", &both_roots).unwrap();
    pair.tls.0.reload().unwrap();
    let mark = pgweir.log().len();
    pgweir.signal(libc::SIGHUP).unwrap();
    pgweir.wait_log_from(mark, "certificates and keys of TLS read again", crate::support::SOON).unwrap();
    #[rustfmt::skip]
    let table = [
        ("its own",              Some(pki.client(name)),                 true),
        ("another's",            Some(pki.client("somebody-else")),      false),
        ("another case",         Some(pki.client(&name.to_uppercase())), false),
        ("a longer name",        Some(pki.client(&format!("{name}x"))),  false),
        ("a NUL in the name",    Some(nul),                              false),
        ("no name",              Some(nameless),                         false),
        ("the name as a host's", Some(host_only),                        false),
        ("nobody vouches",       Some(foreign),                          false),
        ("its own name first",   Some(own_first),                        true),
        ("its own name last",    Some(own_last),                         false),
        ("none",                 None,                                   false),
    ];
    for (case, identity, want) in table {
        let words = identity.map_or_else(|| "sslcert=''".to_owned(), |identity| pki.shown(&identity));
        for version in ["TLSv1.2", "TLSv1.3"] {
            let words = format!("{words} ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
            let said = match case {
                // Postgres breaks the handshake off, where we tell what is wrong.
                "a NUL in the name" => {
                    assert!(enter(&pair.tls.0, pair.tls.0.port(), name, name, &words).is_err());
                    enter(&pair.tls.0, pgweir.port(), name, name, &words).unwrap_err()
                }
                _ => pair.both(&pgweir, name, &words, want, case),
            };
            match case {
                "another's" | "a NUL in the name" | "no name" => {
                    let words = format!("certificate authentication failed for user \"{name}\"");
                    assert_eq!(fatal(&said), Some(words.as_str()), "{case}");
                }
                "none" => assert_eq!(fatal(&said), Some("connection requires a valid client certificate"), "{case}"),
                _ => {}
            }
        }
    }
    for words in ["client certificate contains no user name", "common name is"] {
        pgweir.wait_log(words, crate::support::SOON).unwrap();
    }
    // Without TLS there is no certificate.
    let plain = format!("host=127.0.0.1 port={} user={name} dbname={name} sslmode=disable", pgweir.port());
    let said = psql(&pair.tls.0, &plain, "SELECT 7").unwrap_err();
    assert!(said.contains("connection requires SSL encryption"), "{said}");
}

#[test]
fn a_map_says_whom_a_certificate_may_log_in_as_as_at_postgres() {
    let pair = Pair::new("cert map=m");
    let name = pair.name.clone();
    let file = pair.pki.folder.path("ident.conf");
    #[rustfmt::skip]
    let table = [
        ("named",            "anna",                format!("m anna {name}"),                               true),
        ("with blanks",      "Anna Example",        format!("m \"Anna Example\" {name}"),                   true),
        ("by expression",    "anna@example.com",    format!("m /^anna@ex.*com$ {name}"),                   true),
        ("captured",         &format!("{name}@example.com"), r"m /^(.*)@example\.com$ \1".to_owned(), true),
        ("another's",        "bert",                format!("m anna {name}"),                               false),
        ("another map",      "anna",                format!("n anna {name}"),                               false),
        ("another user",     "anna",                "m anna bert".to_owned(),                               false),
        ("the user itself",  &name,                 "m anna bert".to_owned(),                               false),
        ("nothing",          "anna",                String::new(),                                          false),
    ];
    for (case, common, map, want) in table {
        pair.tls.0.place_file("pg_ident.conf", &map).unwrap();
        pair.tls.0.reload().unwrap();
        std::fs::write(&file, &map).unwrap();
        let pgweir = pair.pgweir(&[("auth_ident_file", show(&file)), ("auth_ident_map", "m")]);
        let words = pair.pki.shown(&pair.pki.client(common));
        pair.both(&pgweir, &name, &words, want, case);
    }
}

/// The first error in a client's answers: its SQLSTATE and its message.
fn error(client: &mut TlsClient, user: &str, database: &str) -> Option<(String, String)> {
    client.send(&build::startup(&[("user", user), ("database", database)]));
    loop {
        match client.message()? {
            (b'E', body) => {
                let fields: Vec<&[u8]> = body.split(|byte| *byte == 0).collect();
                let field = |tag: u8| {
                    let field = fields.iter().find(|field| field.first() == Some(&tag)).unwrap();
                    String::from_utf8(field[1..].to_vec()).unwrap()
                };
                return Some((field(b'C'), field(b'M')));
            }
            (b'Z', _) => return None,
            _ => {}
        }
    }
}

#[test]
fn a_resumed_session_is_the_same_clients_and_nobody_elses() {
    let (place, pki) = (Place::on(primary()), Pki::new());
    let pgweir = start_pgweir(pki.toml(&place, &[("users.other.password", "other-secret")]));
    let name = place.name.as_str();
    let versions: [&'static SupportedProtocolVersion; 2] = [&TLS12, &TLS13];
    for version in versions {
        let config = config_as(Some(&pki.client(name)), &[], &[version]);
        for (again, user, want) in [(false, name, None), (true, name, None), (true, "other", Some("28000"))] {
            let mut client = TlsClient::on(granted(pgweir.addr()), &config).unwrap();
            assert_eq!(client.is_resumed(), again, "{version:?} {user}");
            let told = error(&mut client, user, name);
            assert_eq!(told.as_ref().map(|(code, _)| code.as_str()), want, "{version:?} {user}: {told:?}");
        }
        let nobody = config_as(None, &[], &[version]);
        let mut client = TlsClient::on(granted(pgweir.addr()), &nobody).unwrap();
        let want = ("28000".to_owned(), "connection requires a valid client certificate".to_owned());
        assert_eq!(error(&mut client, name, name), Some(want));
    }
}

#[test]
fn users_are_those_of_the_configuration_the_file_or_the_server_and_nobody_else() {
    let (place, pki) = (Place::on(primary()), Pki::new());
    let name = place.name.as_str();
    let role = |suffix: &str, attributes: &str| {
        let role = format!("{name}_{suffix}");
        place.psql(&format!("CREATE ROLE {role} LOGIN {attributes}"));
        role
    };
    let auth = role("auth", "SUPERUSER PASSWORD 'auth-secret'");
    // A password's end says nothing of certificates, as at Postgres.
    let expired = role("expired", "PASSWORD 'expired-secret' VALID UNTIL '2020-01-01'");
    let bare = role("bare", "");
    place.psql(&format!("CREATE ROLE {name}_nologin"));
    let filed = format!("{name}_filed");
    let file = UserFile::new(&format!("\"{filed}\" \"filed-secret\"\n"));
    let key = format!("users.{auth}.password");
    let path = file.path();
    let settings = [("auth_user", auth.as_str()), (key.as_str(), "auth-secret"), ("auth_file", path.as_str())];
    let pgweir = start_pgweir(pki.toml(&place, &settings));
    let alone = start_pgweir(pki.toml(&place, &[]));
    #[rustfmt::skip]
    let table = [
        (name.to_owned(),            true,  true),
        (filed,                      true,  false),
        (expired,                    true,  false),
        (bare,                       true,  false),
        (format!("{name}_nologin"),  false, false),
        (format!("{name}_nobody"),   false, false),
    ];
    for (user, looked_up, configured) in table {
        let words = pki.shown(&pki.client(&user));
        for (pgweir, want) in [(&pgweir, looked_up), (&alone, configured)] {
            let said = enter(place.cluster, pgweir.port(), &user, name, &words);
            assert_eq!(said.is_ok(), want, "{user}: {said:?}");
            if let Err(said) = said {
                let words = format!("certificate authentication failed for user \"{user}\"");
                assert_eq!(fatal(&said), Some(words.as_str()), "{user}");
            }
        }
    }
    assert!(!pgweir.log().contains("auth-secret"));
}

#[test]
fn the_password_of_a_user_known_here_opens_the_server_for_whoever_shows_the_certificate() {
    let (place, pki) = (Place::on(primary()), Pki::new());
    let name = place.name.as_str();
    let file = UserFile::new(&format!("\"{name}\" \"{PASSWORD}\"\n"));
    let (port, path) = (place.cluster.port().to_string(), file.path());
    let fixed = [
        (format!("databases.{name}.host"), place.cluster.host()),
        (format!("databases.{name}.port"), port.as_str()),
        ("auth_file".to_owned(), path.as_str()),
    ];
    let own = pki.settings();
    let all: Vec<(&str, &str)> = own.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let all = [all, fixed.iter().map(|(key, value)| (key.as_str(), *value)).collect()].concat();
    let pgweir = Pgweir::start_with(options(pgweir_toml(place.cluster, &all))).unwrap();
    let said = enter(place.cluster, pgweir.port(), name, name, &pki.shown(&pki.client(name)));
    assert_eq!(said, Ok("7".to_owned()));
}

#[test]
fn certificate_authentication_without_what_it_needs_is_a_fault() {
    let (place, pki) = (Place::on(primary()), Pki::new());
    #[rustfmt::skip]
    let table: [(&[(&str, &str)], &str); 2] = [
        (&[("client_tls_sslmode", "require")],                    "client_tls_sslmode = require"),
        (&[("listen_addr", ""), ("listen_port", "6432"), ("unix_socket_dir", "/tmp")], "no TLS on Unix-domain sockets"),
    ];
    for (settings, words) in table {
        let told = Pgweir::start_with(options(pki.toml(&place, settings))).unwrap_err().to_string();
        assert!(told.contains("auth_type = cert") && told.contains(words), "{told}");
    }
}
