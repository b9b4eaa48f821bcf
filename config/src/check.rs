//! What no single raw value can tell: the shape of addresses and secrets, and values that contradict each other.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use crate::choices::{AuthType, SslMode};
use crate::config::Config;
use crate::entries::{Database, FALLBACK, LOCAL_HOST, database_keys};
use crate::fault::{Fault, Problem};
use crate::origin::Origin;
use crate::secret::Secret;
use crate::socket::{SOCKET_PATH_MAX, is_socket_dir, listed, socket_path};
use crate::tls;
use crate::url::{is_host, is_ipv6};

/// Characters of `http_token`, at least.
const TOKEN_MIN: usize = 16;

/// `listen_addr`: nothing, `*` alone, or hosts separated by commas, each once.
pub(crate) fn listen_addresses(text: &str) -> Result<(), Problem> {
    if matches!(text.trim(), "" | "*") {
        return Ok(());
    }
    let mut seen = BTreeSet::new();
    for address in text.split(',').map(str::trim) {
        if !is_host(address) {
            return Err(Problem::NotAnAddress { wanted: "a list of IPs and names separated by commas, nor * alone" });
        }
        if !seen.insert(address) {
            return Err(Problem::Repeated);
        }
    }
    Ok(())
}

/// `http_listen`: empty, or host:port.
pub(crate) fn http_address(text: &str) -> Result<(), Problem> {
    let host_and_port = text.rsplit_once(':').is_some_and(|(host, port)| {
        let host = match host.strip_prefix('[') {
            Some(host) => host.strip_suffix(']').is_some_and(is_ipv6),
            None => is_host(host) && !host.contains(':'),
        };
        host && port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    if text.is_empty() || host_and_port {
        Ok(())
    } else {
        Err(Problem::NotAnAddress { wanted: "host:port such as 127.0.0.1:9127, nor empty" })
    }
}

/// `http_token`: what fits into a header and is not guessed.
#[expect(clippy::ref_option, reason = "a setting's value, as of every other check")]
pub(crate) fn http_token(token: &Option<Secret>) -> Result<(), Problem> {
    let fits =
        |token: &Secret| token.expose().len() >= TOKEN_MIN && token.expose().bytes().all(|b| b.is_ascii_graphic());
    if token.as_ref().is_none_or(fits) { Ok(()) } else { Err(Problem::Token { least: TOKEN_MIN }) }
}

/// Whether only this machine can reach `http_listen`, by what it says: a loopback address, or `localhost`.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// `host` of a database entry: empty, one host, or the directory of a socket.
pub(crate) fn server_host(text: &str) -> Result<(), Problem> {
    if text.is_empty() || is_host(text) || is_socket_dir(text) {
        Ok(())
    } else {
        Err(Problem::NotAnAddress { wanted: "one host name, IP address or absolute directory of a socket" })
    }
}

/// The kernel counts these in seconds; a fraction would be cut, and what is below one second would become 0.
pub(crate) fn whole_seconds(time: &Duration) -> Result<(), Problem> {
    if time.subsec_nanos() == 0 { Ok(()) } else { Err(Problem::Fraction) }
}

/// `client_tls_protocols`, `server_tls_protocols`: `secure`, or versions separated by commas.
pub(crate) fn tls_protocols(text: &str) -> Result<(), Problem> {
    let known = |word: &str| tls::VERSIONS.iter().any(|(name, _)| *name == word);
    if text.split(',').map(str::trim).all(known) { Ok(()) } else { Err(Problem::TlsVersions) }
}

/// The faults that only show when all layers are in place. `suspects` are keys with a fault of their own, which
/// would only repeat themselves here.
pub(crate) fn whole(config: &Config, suspects: &BTreeSet<String>) -> Vec<Fault> {
    let mut faults = Vec::new();
    if config.databases.is_empty() && !touched(suspects, "databases") {
        faults.push(missing("databases", None, Problem::NoDatabase));
    }
    check_listen(config, &mut faults);
    check_http(config, suspects, &mut faults);
    check_sizes(config, &mut faults);
    check_passwords(config, &mut faults);
    check_auth_databases(config, &mut faults);
    check_followers(config, &mut faults);
    check_ident(config, &mut faults);
    check_users(config, suspects, &mut faults);
    tls::check(config, &mut faults);
    faults.retain(|fault| !suspects.contains(&fault.key) && !names_a_suspect(fault, suspects));
    faults
}

/// Whether any fault is about entries of this kind, so that there may be more of them than were understood.
fn touched(suspects: &BTreeSet<String>, entries: &str) -> bool {
    let flag = format!("--{}", entries.trim_end_matches('s'));
    suspects.iter().any(|key| key.starts_with(entries) || *key == flag)
}

fn names_a_suspect(fault: &Fault, suspects: &BTreeSet<String>) -> bool {
    matches!(&fault.problem, Problem::MinAboveSize { size_key, .. } if suspects.contains(size_key))
}

fn check_listen(config: &Config, faults: &mut Vec<Fault>) {
    let listen = &config.listen;
    let fault = |key: &str, value: &str, problem| Fault {
        key: key.to_owned(),
        value: Some(value.to_owned()),
        origin: Some(config.origin(key)),
        problem,
    };
    let tcp = !listen.listen_addr.trim().is_empty();
    let unix = listed(&listen.unix_socket_dir).next().is_some();
    if !tcp && !unix {
        faults.push(fault("listen_addr", &listen.listen_addr, Problem::NoListener));
    }
    if !tcp && unix && listen.listen_port == 0 {
        faults.push(fault("listen_port", "0", Problem::NoSocketPort));
    }
    // Any free port may have five digits.
    let port = if listen.listen_port == 0 { u16::MAX } else { listen.listen_port };
    for directory in listed(&listen.unix_socket_dir) {
        if let Some(problem) = too_long(directory, port) {
            faults.push(fault("unix_socket_dir", directory, problem));
        }
    }
    if listen.proxy_protocol && listen.proxy_protocol_from.is_empty() {
        faults.push(fault("proxy_protocol", "true", Problem::NoProxy));
    }
    let mode = config.tls.client_tls_sslmode;
    let problem = match config.auth.auth_type {
        AuthType::Peer => (!unix).then_some(Problem::NoSocket),
        AuthType::Cert if mode < SslMode::VerifyCa => Some(Problem::NoCertificates { mode }),
        AuthType::Cert => (!tcp && unix).then_some(Problem::NoTcp),
        _ => None,
    };
    if let Some(problem) = problem {
        faults.push(fault("auth_type", config.auth.auth_type.as_str(), problem));
    }
    for (name, database) in &config.databases {
        let problem = is_socket_dir(&database.host).then(|| too_long(&database.host, database.port)).flatten();
        if let Some(problem) = problem {
            faults.push(fault(&format!("databases.{name}.host"), &database.host, problem));
        }
    }
}

/// What is told there is not for everybody who can reach it.
fn check_http(config: &Config, suspects: &BTreeSet<String>, faults: &mut Vec<Fault>) {
    let address = &config.http.http_listen;
    let is_open = config.http.http_token.is_none() && !suspects.contains("http_token");
    if !address.is_empty() && is_open && !is_loopback(address) {
        faults.push(Fault {
            key: "http_listen".to_owned(),
            value: Some(address.clone()),
            origin: Some(config.origin("http_listen")),
            problem: Problem::OpenHttp,
        });
    }
}

fn too_long(directory: &str, port: u16) -> Option<Problem> {
    let length = socket_path(directory, port).len();
    (length > SOCKET_PATH_MAX).then_some(Problem::SocketPath { length, limit: SOCKET_PATH_MAX })
}

fn check_sizes(config: &Config, faults: &mut Vec<Fault>) {
    let min = ("min_pool_size".to_owned(), config.pool.min_pool_size);
    let size = ("default_pool_size".to_owned(), config.pool.default_pool_size);
    let mut pairs = vec![(min.clone(), size.clone())];
    for (name, database) in &config.databases {
        let own = |key: &str| format!("databases.{name}.{key}");
        let own_min = database.min_pool_size.map(|min| (own("min_pool_size"), min));
        let own_size = database.pool_size.map(|size| (own("pool_size"), size));
        if own_min.is_some() || own_size.is_some() {
            pairs.push((own_min.unwrap_or_else(|| min.clone()), own_size.unwrap_or_else(|| size.clone())));
        }
    }
    for (name, user) in &config.users {
        if let Some(own_size) = user.pool_size {
            pairs.push((min.clone(), (format!("users.{name}.pool_size"), own_size)));
        }
    }
    for ((key, min), (size_key, size)) in pairs {
        if min > size {
            faults.push(Fault {
                value: Some(min.to_string()),
                origin: Some(config.origin(&key)),
                key,
                problem: Problem::MinAboveSize { size_key, size },
            });
        }
    }
}

/// One of the three ways to give a server's password is enough.
fn check_passwords(config: &Config, faults: &mut Vec<Fault>) {
    for (name, database) in &config.databases {
        let given = [
            ("password", database.password.is_some()),
            ("password_file", database.password_file.is_some()),
            ("password_command", database.password_command.is_some()),
        ];
        let mut given = given.into_iter().filter(|(_, given)| *given).map(|(key, _)| format!("databases.{name}.{key}"));
        let Some(other) = given.next() else { continue };
        for key in given {
            let origin = config.origins.get(&key).cloned();
            faults.push(missing(&key, origin, Problem::TwoPasswords { other: other.clone() }));
        }
    }
}

/// A file without its map, and a map without its file, mean nothing.
fn check_ident(config: &Config, faults: &mut Vec<Fault>) {
    let (file, map) = (&config.auth.auth_ident_file, &config.auth.auth_ident_map);
    let pairs = [("auth_ident_file", file, "auth_ident_map", map), ("auth_ident_map", map, "auth_ident_file", file)];
    for (key, value, other, others) in pairs {
        if !value.is_empty() && others.is_empty() {
            let (value, origin) = (Some(value.clone()), Some(config.origin(key)));
            faults.push(Fault { key: key.to_owned(), value, origin, problem: Problem::Half { other } });
        }
    }
}

/// Where users are looked up has to be a database.
fn check_auth_databases(config: &Config, faults: &mut Vec<Fault>) {
    let own = config.databases.iter().filter_map(|(name, database)| {
        Some((format!("databases.{name}.auth_dbname"), database.auth_dbname.as_deref()?))
    });
    let global = ("auth_dbname".to_owned(), config.auth.auth_dbname.as_str());
    for (key, name) in std::iter::once(global).chain(own) {
        let known = config.databases.contains_key(name) || config.databases.contains_key(FALLBACK);
        if !name.is_empty() && !known {
            let (value, origin) = (Some(name.to_owned()), Some(config.origin(&key)));
            faults.push(Fault { key, value, origin, problem: Problem::NotADatabase });
        }
    }
}

/// A followers-only entry says which entry's followers it means, and nothing that is that entry's.
fn check_followers(config: &Config, faults: &mut Vec<Fault>) {
    for (name, database) in &config.databases {
        let Some(of) = &database.followers_of else { continue };
        let key = format!("databases.{name}.followers_of");
        let other = config.databases.get(of);
        let problem = match other {
            None => Some(Problem::NotADatabase),
            Some(other) => (other.followers.is_none() || other.followers_of.is_some()).then_some(Problem::NoFollowers),
        };
        if let Some(problem) = problem {
            faults.push(Fault { value: Some(of.clone()), origin: Some(config.origin(&key)), key, problem });
        }
        for setting in database_keys().iter().filter(|setting| OF_THE_SERVER.contains(&setting.name)) {
            let key = format!("databases.{name}.{}", setting.name);
            if let Some(origin) = config.origins.get(&key) {
                faults.push(missing(&key, Some(origin.clone()), Problem::NotOfFollowers));
            }
        }
    }
}

/// The keys of a database entry that say where its server is, as whom to log in, and what goes to its followers.
const OF_THE_SERVER: [&str; 21] = [
    "host",
    "port",
    "dbname",
    "user",
    "password",
    "password_file",
    "password_command",
    "password_command_ttl",
    "require_auth",
    "channel_binding",
    "allow_cleartext_password",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslnegotiation",
    "min_pool_size",
    "followers",
    "read_routing",
    "read_freshness",
    "read_max_staleness",
];

fn check_users(config: &Config, suspects: &BTreeSet<String>, faults: &mut Vec<Fault>) {
    let auth_type = config.auth.auth_type;
    let known = !suspects.contains("auth_type");
    let asks = known && auth_type.asks_for_passwords();
    // Who is not named here, or has no password here, may have one there.
    let elsewhere = !config.auth.auth_file.is_empty()
        || !config.auth.auth_user.is_empty()
        || config.databases.values().any(|database| database.auth_user.is_some())
        || suspects.contains("auth_file");
    for (name, user) in &config.users {
        let key = format!("users.{name}.password");
        let problem = match &user.password {
            Some(secret) => secret_problem(secret).filter(|problem| match problem {
                Problem::Md5 => known && auth_type == AuthType::ScramSha256,
                _ => true,
            }),
            None => (asks && !elsewhere).then_some(Problem::NoPassword { auth_type }),
        };
        if let Some(problem) = problem {
            let at = if user.password.is_some() { key.as_str() } else { "" };
            let origin = config.origins.get(at).or_else(|| config.origins.get(&format!("users.{name}")));
            faults.push(missing(&key, origin.cloned(), problem));
        }
    }
    if known && auth_type == AuthType::Any {
        for (name, _) in config.databases.iter().filter(|(_, database)| database.user.is_none()) {
            let origin = config.origins.get(&format!("databases.{name}"));
            faults.push(missing(&format!("databases.{name}.user"), origin.cloned(), Problem::NoForcedUser));
        }
    }
    let needs = asks || known && auth_type == AuthType::Cert;
    if needs && !elsewhere && config.users.is_empty() && !touched(suspects, "users") {
        let origin = config.origin("auth_type");
        faults.push(Fault {
            key: "auth_type".to_owned(),
            value: Some(config.auth.auth_type.to_string()),
            origin: Some(origin),
            problem: if asks { Problem::NoUser } else { Problem::Nobody },
        });
    }
}

fn missing(key: &str, origin: Option<Origin>, problem: Problem) -> Fault {
    Fault { key: key.to_owned(), value: None, origin, problem }
}

/// What is wrong with a stored secret, judged as Postgres judges `pg_authid.rolpassword`.
///
/// Source: the Postgres manual, "`pg_authid`"; Postgres takes `md5` and 32 hexadecimal digits for a hash.
pub(crate) fn secret_problem(secret: &Secret) -> Option<Problem> {
    let text = secret.expose();
    if let Some(rest) = text.strip_prefix("SCRAM-SHA-256$") {
        return (!is_verifier(rest)).then_some(Problem::Verifier);
    }
    let digits = text.strip_prefix("md5")?;
    let hash = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hash.then_some(Problem::Md5)
}

/// `<iterations>:<salt>$<StoredKey>:<ServerKey>`, where both keys are 32 bytes, so 43 digits of base64 and one `=`.
fn is_verifier(text: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    let key = |text: &str| text.strip_suffix('=').is_some_and(|digits| digits.len() == 43 && digits.bytes().all(digit));
    let salt =
        |text: &str| !text.is_empty() && text.len().is_multiple_of(4) && text.trim_end_matches('=').bytes().all(digit);
    let parts = || {
        let (left, right) = text.split_once('$')?;
        let (iterations, salt_text) = left.split_once(':')?;
        let (stored, server) = right.split_once(':')?;
        let count = iterations.parse::<u32>().ok()?;
        Some(count > 0 && salt(salt_text) && key(stored) && key(server))
    };
    parts().unwrap_or(false)
}

/// What an absent or empty host means, put in its place.
pub(crate) fn fill_hosts(config: &mut Config) {
    for database in config.databases.values_mut().filter(|database| database.host.is_empty()) {
        LOCAL_HOST.clone_into(&mut database.host);
    }
}

impl Config {
    /// Adds an entry that is served by the followers of the entry `of` alone, unless there is one of that name.
    pub fn add_followers_only(&mut self, name: &str, of: &str) {
        let Some(server) = self.databases.get(of).filter(|_| !self.databases.contains_key(name)) else { return };
        let own = Database {
            followers_of: Some(of.to_owned()),
            pool_size: server.pool_size,
            pool_mode: server.pool_mode,
            ..Database::default()
        };
        self.databases.insert(name.to_owned(), own);
        fill_followers_only(self);
    }
}

/// What a followers-only entry has from the entry whose followers it means, put in its place.
pub(crate) fn fill_followers_only(config: &mut Config) {
    let names: Vec<(String, String)> =
        config.databases.iter().filter_map(|(name, own)| Some((name.clone(), own.followers_of.clone()?))).collect();
    for (name, of) in names {
        let Some(mut server) = config.databases.get(&of).cloned() else { continue };
        let Some(own) = config.databases.remove(&name) else { continue };
        server.dbname.get_or_insert_with(|| of.clone());
        let whole = Database {
            pool_size: own.pool_size,
            min_pool_size: Some(0),
            reserve_pool_size: own.reserve_pool_size,
            pool_mode: own.pool_mode,
            prepared_statements: own.prepared_statements,
            max_prepared_statements: own.max_prepared_statements,
            max_db_connections: own.max_db_connections,
            server_lifetime: own.server_lifetime,
            query_wait_timeout: own.query_wait_timeout,
            connect_query: own.connect_query.or(server.connect_query),
            auth_user: own.auth_user.or(server.auth_user),
            auth_query: own.auth_query.or(server.auth_query),
            auth_dbname: own.auth_dbname.or(server.auth_dbname),
            followers_of: own.followers_of,
            ..server
        };
        config.databases.insert(name.clone(), whole);
        for setting in database_keys() {
            let (own, theirs) =
                (format!("databases.{name}.{}", setting.name), format!("databases.{of}.{}", setting.name));
            if let Some(origin) = config.origins.get(&theirs).filter(|_| OF_THE_SERVER.contains(&setting.name)).cloned()
            {
                config.origins.entry(own).or_insert(origin);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use crate::config::{Config, Sources};

    fn read(toml: &str) -> Result<Config, Vec<String>> {
        let users = "\n[users.u]\npassword = \"x\"\n";
        let text = format!("{toml}{users}");
        let sources = Sources { file: Some(("f", &text)), ..Sources::default() };
        Config::from_sources(sources).map_err(|faults| faults.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn an_entry_for_followers_alone_has_the_servers_keys_from_the_other_and_sizes_of_its_own() {
        let app =
            "[databases.app]\nhost = \"a\"\nuser = \"u\"\npassword = \"p\"\npool_size = 7\nfollowers = \"b, c:1\"\n";
        let config = read(&format!("{app}[databases.ro]\nfollowers_of = \"app\"\npool_size = 3\n")).unwrap();
        let (app, ro) = (&config.databases["app"], &config.databases["ro"]);
        assert_eq!(
            (&ro.host, &ro.user, &ro.password, &ro.followers),
            (&app.host, &app.user, &app.password, &app.followers)
        );
        assert_eq!((ro.dbname.as_deref(), app.dbname.as_deref()), (Some("app"), None));
        assert_eq!((ro.pool_size, ro.min_pool_size, app.pool_size), (Some(3), Some(0), Some(7)));
        assert_eq!(config.origin("databases.ro.user"), config.origin("databases.app.user"));
    }

    #[test]
    fn an_entry_for_followers_alone_says_where_they_are_and_nothing_that_is_the_others() {
        let app = "[databases.app]\nhost = \"a\"\nfollowers = \"b\"\n[databases.other]\nhost = \"a\"\n";
        #[rustfmt::skip]
        let table = [
            ("nobody's",  "followers_of = \"nobody\"",                    "databases.ro.followers_of = nobody: no such database is configured"),
            ("none",      "followers_of = \"other\"",                     "databases.ro.followers_of = other: the entry of that name has no followers"),
            ("itself",    "followers_of = \"ro\"\nfollowers = \"b\"",    "databases.ro.followers_of = ro: the entry of that name has no followers"),
            ("a host",    "followers_of = \"app\"\nhost = \"h\"",        "databases.ro.host: the entry has followers_of, so that this is the other entry's"),
            ("a secret",  "followers = \"postgres://u:hunter2@b\"",       "databases.ro.followers: the follower 1: the URL has more than host and port"),
        ];
        for (name, entry, want) in table {
            let faults = read(&format!("{app}[databases.ro]\n{entry}\n")).unwrap_err();
            assert!(faults.iter().any(|fault| fault.starts_with(want)), "{name}: {faults:?}");
            assert!(!faults.concat().contains("hunter2"), "{name}");
        }
    }
}
