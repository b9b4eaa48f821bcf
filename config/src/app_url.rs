//! A Postgres URL as an application has it: what of it is for the server, what is the application's own, and the same URL
//! with a pooler in between.
//!
//! | of the URL | goes |
//! |---|---|
//! | user, password, database | to the server, and stays in the application's URL, as it was typed |
//! | host, port | to the server; the application's URL has the pooler's address |
//! | [`SERVER`]'s keys, `ssl` | to the server; the application's URL says `sslmode=disable` |
//! | every other key | stays in the application's URL |
//!
//! What a URL leaves out comes from where libpq would take it: its variables, the system's user, its own defaults. A URL
//! that asks for what a pooler cannot do ([`UNSUPPORTED`]) is refused, so that nothing is silently left out.
//!
//! Source: RFC 3986 (percent-decoding alone, `+` is a plus); the Postgres manual, "Connection URIs", "Parameter Key Words",
//! "Environment Variables".

use std::fmt::{self, Write as _};
use std::net::SocketAddr;

use crate::choices::SslMode;
use crate::entries::{Database, database_keys};
use crate::secret::Secret;
use crate::socket::is_socket_dir;
use crate::tls::SYSTEM;
use crate::typed::Raw;
use crate::url::{Target, UrlProblem, is_host, percent_decode, split};

/// Keys that say how the server is reached, each with its variable.
const SERVER: [(&str, &str); 7] = [
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("require_auth", "PGREQUIREAUTH"),
];

/// Keys that say where the server is, or as whom; they outrank the URL's own parts.
const PLACE: [&str; 5] = ["host", "port", "user", "password", "dbname"];

/// Keys that mean nothing to a pooler, and nothing without TLS.
const DROPPED: [&str; 3] = ["sslcompression", "sslsni", "gssencmode"];

/// Keys that change who is believed or where a connection goes, in ways that pgweir does not have.
const UNSUPPORTED: [&str; 18] = [
    "hostaddr",
    "service",
    "servicefile",
    "passfile",
    "requirepeer",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "sslcertmode",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "replication",
    "scram_client_key",
    "scram_server_key",
    "requiressl",
];

/// Variables for some of them.
const VARIABLES: [(&str, &str); 9] = [
    ("hostaddr", "PGHOSTADDR"),
    ("service", "PGSERVICE"),
    ("requirepeer", "PGREQUIREPEER"),
    ("sslcrl", "PGSSLCRL"),
    ("sslcrldir", "PGSSLCRLDIR"),
    ("sslcertmode", "PGSSLCERTMODE"),
    ("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    ("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    ("krbsrvname", "PGKRBSRVNAME"),
];

/// Keys whose values are shown; another's may be a secret.
const SHOWN: [&str; 14] = [
    "application_name",
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "connection_limit",
    "options",
    "pgbouncer",
    "pool",
    "pool_timeout",
    "prepared_statements",
    "schema",
    "sslmode",
    "statement_timeout",
    "target_session_attrs",
];

/// What a URL leaves to its surroundings.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// libpq's variables.
    pub variables: Vec<(String, String)>,
    /// The name of the system's user.
    pub user: Option<String>,
    /// The directory of a server's Unix-domain socket, if there is one at libpq's place.
    pub socket_dir: Option<String>,
    /// libpq's file of authorities, `~/.postgresql/root.crt`, if there is one.
    pub root_certificates: Option<String>,
    /// libpq's file of the client's certificate, `~/.postgresql/postgresql.crt`, if there is one.
    pub certificate: Option<String>,
    /// libpq's file of passwords, `~/.pgpass`, if there is one.
    pub passwords: Option<String>,
}

impl Surroundings {
    fn variable(&self, name: &str) -> Option<String> {
        let found = self.variables.iter().find(|(other, value)| other == name && !value.is_empty());
        found.map(|(_, value)| value.clone())
    }
}

/// A URL, read and completed. It shows neither its password nor what may be one.
#[derive(Clone, PartialEq, Eq)]
pub struct AppUrl {
    scheme: String,
    /// User and password as typed, up to the `@`.
    userinfo: Option<Secret>,
    /// The database as typed.
    path: String,
    user: String,
    password: Option<Secret>,
    dbname: String,
    /// How the server is reached: an entry without user and password, which are the client's.
    server: Database,
    /// The key that asked for TLS, as typed.
    tls_key: Option<&'static str>,
    /// The other pairs of the query as typed.
    kept: Vec<Secret>,
    /// Pairs that outrank variables which the application has, too.
    against_variables: Vec<&'static str>,
}

impl fmt::Debug for AppUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked())
    }
}

impl AppUrl {
    /// Reads `url`.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it, or cannot be honoured.
    pub fn parse(url: &str, around: &Surroundings) -> Result<Self, Vec<UrlProblem>> {
        let Some((scheme, rest)) = url.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
            return Err(vec![UrlProblem::Scheme]);
        };
        let mut target = Target::default();
        let (rest, fragment) = split(rest, '#');
        let (place, query) = split(rest, '?');
        let query = query.unwrap_or_default();
        // A bare @ that only the query has is what a password with a question mark looks like.
        if fragment.is_some() || query.contains('@') && !place.contains('@') {
            target.problems.push(UrlProblem::Reserved);
        }
        target.read_place(place);
        // The user may stand elsewhere.
        target.problems.retain(|problem| *problem != UrlProblem::NoUser);
        let pairs = read_query(query, &mut target.problems);
        target.problems.dedup();
        if !target.problems.is_empty() {
            return Err(target.problems);
        }
        let (authority, path) = split(place, '/');
        let typed = Typed { scheme, userinfo: authority.rsplit_once('@').map(|(info, _)| info), path, query };
        complete(&typed, target, &pairs, around).map_err(|problem| vec![problem])
    }

    /// The user, decoded.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The password, decoded.
    #[must_use]
    pub fn password(&self) -> Option<&Secret> {
        self.password.as_ref()
    }

    /// The database, decoded.
    #[must_use]
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// How the server is reached: an entry of `[databases]` for clients that are themselves known to the server.
    #[must_use]
    pub fn server(&self) -> &Database {
        &self.server
    }

    /// The same, and it names another database.
    #[must_use]
    pub fn of_database(&self, dbname: &str) -> Self {
        Self { path: encode(dbname), dbname: dbname.to_owned(), ..self.clone() }
    }

    /// The application's URL with a pooler at `address` in between. `made_up` is the password if it has none;
    /// `extra` are pairs that are added if the URL has no such key.
    #[must_use]
    pub fn through(&self, address: SocketAddr, made_up: Option<&Secret>, extra: &[&str]) -> Secret {
        let userinfo = match (&self.userinfo, &self.password, made_up) {
            (Some(typed), None, Some(made_up)) => {
                format!("{}:{}", typed.expose().trim_end_matches(':'), made_up.expose())
            }
            (Some(typed), _, _) if !typed.expose().starts_with(':') && !typed.expose().is_empty() => {
                typed.expose().to_owned()
            }
            (_, password, made_up) => {
                let password = password.as_ref().or(made_up);
                let password = password.map(|password| format!(":{}", encode(password.expose())));
                format!("{}{}", encode(&self.user), password.unwrap_or_default())
            }
        };
        Secret::new(self.assemble(&userinfo, &address.to_string(), &self.pairs(extra)))
    }

    /// As [`AppUrl::through`], to be shown.
    #[must_use]
    pub fn masked_through(&self, address: &str, extra: &[&str]) -> String {
        self.assemble(&self.masked_userinfo(true), address, &self.pairs(extra).iter().map(mask).collect::<Vec<_>>())
    }

    /// The URL as it was, to be shown.
    #[must_use]
    pub fn masked(&self) -> String {
        let Database { host, port, sslmode, .. } = &self.server;
        let host = match host {
            host if is_socket_dir(host) => encode(host),
            host if host.contains(':') => format!("[{host}]"),
            host => host.clone(),
        };
        let mode = sslmode.map(|mode| format!("sslmode={mode}"));
        let pairs: Vec<String> = self.kept.iter().map(|pair| mask(pair.expose())).chain(mode).collect();
        self.assemble(&self.masked_userinfo(self.password.is_some()), &format!("{host}:{port}"), &pairs)
    }

    fn masked_userinfo(&self, has_password: bool) -> String {
        let password = if has_password { format!(":{}", Secret::MASK) } else { String::new() };
        format!("{}{password}", encode(&self.user))
    }

    fn assemble(&self, userinfo: &str, address: &str, pairs: &[String]) -> String {
        let path = if self.path.is_empty() { encode(&self.dbname) } else { self.path.clone() };
        let mut text = format!("{}://{userinfo}@{address}/{path}", self.scheme);
        for (place, pair) in pairs.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{pair}", if place == 0 { '?' } else { '&' });
        }
        text
    }

    /// The query of the application's URL.
    fn pairs(&self, extra: &[&str]) -> Vec<String> {
        let mut pairs: Vec<String> = self.kept.iter().map(|pair| pair.expose().to_owned()).collect();
        let has = |key: &str| self.kept.iter().any(|pair| split(pair.expose(), '=').0 == key);
        pairs.extend(extra.iter().filter(|pair| !has(split(pair, '=').0)).map(|pair| (*pair).to_owned()));
        // A driver's own scheme (postgresql+asyncpg) is read by a library that may not know libpq's key.
        let is_libpqs = !self.scheme.contains('+');
        if is_libpqs || self.tls_key.is_some() {
            let key = if is_libpqs { "sslmode" } else { self.tls_key.unwrap_or("sslmode") };
            pairs.push(format!("{key}=disable"));
        }
        if is_libpqs {
            pairs.extend(self.against_variables.iter().map(|pair| (*pair).to_owned()));
        }
        pairs
    }
}

/// A URL's pieces as they were typed.
struct Typed<'a> {
    scheme: &'a str,
    userinfo: Option<&'a str>,
    path: Option<&'a str>,
    query: &'a str,
}

/// `postgres`, `postgresql` and `postgis`, which frameworks use, and each with a driver's name behind a plus.
fn is_scheme(scheme: &str) -> bool {
    let (base, driver) = split(scheme, '+');
    let is_word =
        |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    matches!(base, "postgres" | "postgresql" | "postgis") && driver.is_none_or(is_word)
}

/// The pairs that are not the application's own, decoded, by their keys.
fn read_query(query: &str, problems: &mut Vec<UrlProblem>) -> Vec<(&'static str, String)> {
    let mut pairs = Vec::new();
    let known = || SERVER.iter().map(|(key, _)| *key).chain(PLACE).chain(DROPPED).chain(UNSUPPORTED).chain(["ssl"]);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = split(pair, '=');
        let Some(key) = known().find(|known| *known == key) else { continue };
        match percent_decode(value.unwrap_or_default()) {
            _ if UNSUPPORTED.contains(&key) => problems.push(UrlProblem::Unsupported(key)),
            Ok(value) => pairs.push((key, value)),
            Err(problem) => problems.push(problem),
        }
    }
    pairs
}

/// Puts together what the URL says, what its query says, and what it leaves to its surroundings.
fn complete(
    typed: &Typed<'_>,
    target: Target,
    pairs: &[(&'static str, String)],
    around: &Surroundings,
) -> Result<AppUrl, UrlProblem> {
    // The last of a key counts, as in libpq.
    let pair = |key: &str| {
        let found = pairs.iter().rev().find(|(other, value)| *other == key && !value.is_empty());
        found.map(|(_, value)| value.clone())
    };
    if let Some((_, variable)) = VARIABLES.iter().find(|(_, variable)| around.variable(variable).is_some()) {
        return Err(UrlProblem::Unsupported(variable));
    }
    if around.certificate.is_some() && pair("sslcert").is_none() && around.variable("PGSSLCERT").is_none() {
        return Err(UrlProblem::Unsupported("~/.postgresql/postgresql.crt"));
    }
    let gss = pair("gssencmode").or_else(|| around.variable("PGGSSENCMODE"));
    if gss.is_some_and(|mode| mode == "require") {
        return Err(UrlProblem::Unsupported("gssencmode"));
    }
    let user = pair("user").or(target.user).or_else(|| around.variable("PGUSER")).or_else(|| around.user.clone());
    let user = user.ok_or(UrlProblem::Missing("as which user"))?;
    let password = pair("password").map(Secret::new).or(target.password);
    let password = password.or_else(|| around.variable("PGPASSWORD").map(Secret::new));
    if password.is_none() && (around.passwords.is_some() || around.variable("PGPASSFILE").is_some()) {
        return Err(UrlProblem::Unsupported("a file of passwords (~/.pgpass, PGPASSFILE)"));
    }
    let dbname = pair("dbname").or(target.dbname).or_else(|| around.variable("PGDATABASE"));
    let dbname = dbname.unwrap_or_else(|| user.clone());
    let (server, tls_key) = read_server(target.host, target.port, &pair, around)?;
    if typed.scheme.contains('+') {
        // Its driver may be libpq all the same, and then no pair of ours stands against the variable.
        let binds = around.variable("PGCHANNELBINDING").is_some_and(|value| value == "require");
        let verifies = around.variable("PGSSLMODE").is_some_and(|mode| mode.starts_with("verify"));
        if binds || verifies && tls_key.is_none() {
            return Err(UrlProblem::Unsupported("PGSSLMODE or PGCHANNELBINDING with a driver's own scheme"));
        }
    }
    let is_own = |pair: &&str| {
        let key = split(pair, '=').0;
        let ours = SERVER.iter().map(|(key, _)| *key).chain(PLACE).chain(DROPPED).chain(["ssl"]);
        !pair.is_empty() && !ours.into_iter().any(|our| our == key)
    };
    // What the query says outranks what was typed in front of it, and is no longer there to do so.
    let moved = pair("user").is_some() || pair("password").is_some();
    Ok(AppUrl {
        scheme: typed.scheme.to_owned(),
        userinfo: typed.userinfo.filter(|info| !moved && !info.is_empty()).map(Secret::new),
        path: typed.path.filter(|_| pair("dbname").is_none()).unwrap_or_default().to_owned(),
        user,
        password,
        dbname,
        server,
        tls_key,
        kept: typed.query.split('&').filter(is_own).map(Secret::new).collect(),
        against_variables: against_variables(around),
    })
}

/// Where the server is, and how it is reached; and the key that asked for TLS.
fn read_server(
    host: Option<String>,
    port: Option<u16>,
    pair: &impl Fn(&str) -> Option<String>,
    around: &Surroundings,
) -> Result<(Database, Option<&'static str>), UrlProblem> {
    let mut server = Database::default();
    let host = pair("host").or(host).or_else(|| around.variable("PGHOST")).or_else(|| around.socket_dir.clone());
    if let Some(host) = host {
        if !is_host(&host) && !is_socket_dir(&host) {
            return Err(UrlProblem::Host);
        }
        server.host = host;
    }
    let typed_port = pair("port").or_else(|| if port.is_none() { around.variable("PGPORT") } else { None });
    server.port = match (typed_port, port) {
        (Some(text), _) => text.parse().ok().filter(|port| *port > 0).ok_or(UrlProblem::Port)?,
        (None, Some(port)) => port,
        (None, None) => server.port,
    };
    let mut tls_key = None;
    for (key, variable) in SERVER {
        let mut value = pair(key);
        if key == "sslmode" {
            tls_key = value.is_some().then_some(key);
            if value.is_none()
                && let Some(ssl) = pair("ssl")
            {
                (tls_key, value) = (Some("ssl"), Some(mode_of(&ssl)));
            }
            value = value.or_else(|| around.variable(variable)).map(|mode| mode_of(&mode));
        }
        if let Some(value) = value.or_else(|| around.variable(variable)) {
            let setting = database_keys().iter().find(|setting| setting.name == key);
            let read = setting.map(|setting| (setting.read)(&mut server, &Raw::Word(&value)));
            if read.is_none_or(|read| read.is_err()) {
                return Err(UrlProblem::Value(key));
            }
        }
    }
    judge_authorities(&mut server, around)?;
    Ok((server, tls_key))
}

/// What other drivers say for libpq's words.
fn mode_of(word: &str) -> String {
    match word {
        "true" | "1" | "on" | "no-verify" => SslMode::Require.to_string(),
        "false" | "0" | "off" => SslMode::Disable.to_string(),
        word => word.to_owned(),
    }
}

/// Whoever verifies needs somebody who vouches: libpq's file, if the URL names none.
fn judge_authorities(server: &mut Database, around: &Surroundings) -> Result<(), UrlProblem> {
    let is_system = server.sslrootcert.as_deref() == Some(SYSTEM);
    let mode = server.sslmode.unwrap_or(if is_system { SslMode::VerifyFull } else { SslMode::Prefer });
    if mode != SslMode::Disable && server.sslrootcert.is_none() {
        // In the weaker modes, too, as in libpq.
        server.sslrootcert.clone_from(&around.root_certificates);
    }
    if mode >= SslMode::VerifyCa && server.sslrootcert.is_none() {
        return Err(UrlProblem::Missing("who vouches for the server (sslrootcert)"));
    }
    if is_system && mode != SslMode::VerifyFull {
        return Err(UrlProblem::Value("sslmode"));
    }
    if server.sslnegotiation == Some(crate::choices::SslNegotiation::Direct) && mode < SslMode::Require {
        return Err(UrlProblem::Value("sslnegotiation"));
    }
    if server.sslcert.is_some() != server.sslkey.is_some() {
        return Err(UrlProblem::Value("sslcert or sslkey, of which one is missing,"));
    }
    Ok(())
}

/// Variables of libpq's that would forbid the pooler without TLS; they are the application's, too.
fn against_variables(around: &Surroundings) -> Vec<&'static str> {
    let is = |name: &str, value: &str| around.variable(name).is_some_and(|found| found == value);
    let mut pairs = Vec::new();
    if is("PGCHANNELBINDING", "require") {
        pairs.push("channel_binding=prefer");
    }
    if is("PGSSLNEGOTIATION", "direct") {
        pairs.push("sslnegotiation=postgres");
    }
    if around.variable("PGSSLROOTCERT").is_some() {
        // Were it `system`, it would forbid sslmode=disable.
        pairs.push("sslrootcert=");
    }
    if around.variable("PGREQUIREAUTH").is_some() {
        pairs.push("require_auth=scram-sha-256");
    }
    pairs
}

/// Everything but what RFC 3986 calls unreserved (section 2.3) is encoded.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// A pair without its value, unless that is known to be harmless.
fn mask(pair: impl AsRef<str>) -> String {
    let pair = pair.as_ref();
    let (key, value) = split(pair, '=');
    if value.is_none() || SHOWN.contains(&key) { pair.to_owned() } else { format!("{key}={}", Secret::MASK) }
}

#[cfg(test)]
mod tests;
