//! Postgres URLs: `postgres://user:password@host:port/dbname?key=value`.

use crate::entries::database_keys;
use crate::secret::Secret;
use crate::socket::is_socket_dir;

/// What can be wrong with a Postgres URL. No variant quotes the URL, because any misplaced part may be a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlProblem {
    /// Neither `postgres://` nor `postgresql://`.
    #[error("not a Postgres URL")]
    Scheme,
    /// The port is not 1..=65535.
    #[error("the port of the URL is not 1..=65535")]
    Port,
    /// The host is neither a name nor an IP address; an IPv6 address lacks its brackets.
    #[error("the host of the URL is not one name, IP address or encoded directory")]
    Host,
    /// A character that RFC 3986 reserves stands for itself: `@`, `/` or `#`.
    #[error("the URL has a bare @, / or # where none may stand")]
    Reserved,
    /// A `%` without two hexadecimal digits, or bytes that are not UTF-8.
    #[error("the URL has a broken percent-encoding")]
    Percent,
    /// An encoded NUL, which would end the text on the wire.
    #[error("the URL encodes a NUL")]
    Nul,
    /// A password without a user.
    #[error("the URL has a password and no user")]
    NoUser,
    /// A query key that is no key of a database entry.
    #[error("the URL has a query key that is no key of [databases.NAME]")]
    QueryKey,
    /// A key of libpq's, in the query or as a variable, that cannot be honoured.
    #[error("{0} cannot be honoured")]
    Unsupported(&'static str),
    /// A key of libpq's with a value that it does not have.
    #[error("{0} has a value that libpq does not know")]
    Value(&'static str),
    /// Neither the URL nor anything else says which database, or as whom.
    #[error("nothing says {0}")]
    Missing(&'static str),
}

impl UrlProblem {
    /// How to mend it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Scheme | Self::Missing(_) => "Write postgres://user:password@host:port/dbname.",
            Self::Port => {
                "Write the port in digits; if the password holds @, /, ? or #, percent-encode them (%40, %2F, %3F, %23)."
            }
            Self::Host => {
                "Write one host; an IPv6 address stands in brackets, such as [::1], and the slashes of a socket's directory as %2F."
            }
            Self::Reserved => "Percent-encode them: %40, %2F, %23.",
            Self::Percent => "Write % itself as %25.",
            Self::Nul => "Remove the %00.",
            Self::NoUser => "Write user:password@ in front of the host.",
            Self::QueryKey => "Remove it, or use pool_size, pool_mode or another key of [databases.NAME].",
            Self::Unsupported(_) => "Remove it, or write the URL without it.",
            Self::Value(_) => "Write one of libpq's values.",
        }
    }
}

/// The parts of a URL, decoded. Absent and empty parts are `None`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) host: Option<String>,
    pub(crate) port: Option<u16>,
    pub(crate) dbname: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Secret>,
    /// Keys of `[databases.NAME]` from the query, with their values.
    pub(crate) options: Vec<(&'static str, String)>,
    /// Everything that is wrong with the URL.
    pub(crate) problems: Vec<UrlProblem>,
}

/// The keys that stand in the URL proper and so not in its query.
const IN_URL: [&str; 5] = ["host", "port", "dbname", "user", "password"];

impl Target {
    /// Reads a URL.
    ///
    /// Source: RFC 3986 §2.1 and §3 (percent-decoding only, `+` is a plus); the Postgres manual,
    /// "Connection URIs".
    pub(crate) fn parse(url: &str) -> Self {
        let mut target = Self::default();
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let Some(rest) = rest else {
            target.problems.push(UrlProblem::Scheme);
            return target;
        };
        let (rest, fragment) = split(rest, '#');
        if fragment.is_some() {
            target.problems.push(UrlProblem::Reserved);
        }
        let (rest, query) = split(rest, '?');
        target.read_place(rest);
        target.read_query(query.unwrap_or_default());
        target.problems.dedup();
        target
    }

    /// Reads what stands between the scheme and the query: who, where and which database.
    pub(crate) fn read_place(&mut self, place: &str) {
        let (authority, path) = split(place, '/');
        self.read_authority(authority);
        self.read_path(path.unwrap_or_default());
    }

    fn read_authority(&mut self, authority: &str) {
        let (userinfo, address) = match authority.rsplit_once('@') {
            Some((userinfo, address)) => (userinfo, address),
            None => ("", authority),
        };
        if userinfo.contains('@') {
            self.problems.push(UrlProblem::Reserved);
        }
        let (user, password) = split(userinfo, ':');
        self.user = self.decode(user);
        self.password = self.decode(password.unwrap_or_default()).map(Secret::new);
        if self.password.is_some() && self.user.is_none() {
            self.problems.push(UrlProblem::NoUser);
        }
        self.read_address(address);
    }

    fn read_address(&mut self, address: &str) {
        let (host, port) = match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, ""),
            Some((host, port)) if port.starts_with(':') => (host, port.trim_start_matches(':')),
            Some(_) => return self.problems.push(UrlProblem::Host),
            None => address.rsplit_once(':').unwrap_or((address, "")),
        };
        let bracketed = address.starts_with('[');
        self.host = self.decode(host);
        let valid = self.host.as_deref().is_none_or(|host| {
            if bracketed { is_ipv6(host) } else { (is_host(host) && !host.contains(':')) || is_socket_dir(host) }
        });
        if !valid {
            self.host = None;
            self.problems.push(UrlProblem::Host);
        }
        if !port.is_empty() {
            let digits = port.bytes().all(|byte| byte.is_ascii_digit());
            self.port = port.parse().ok().filter(|port| digits && *port > 0);
            if self.port.is_none() {
                self.problems.push(UrlProblem::Port);
            }
        }
    }

    fn read_path(&mut self, path: &str) {
        // A bare @ or / here is what an unencoded password looks like once it has been cut at its own slash.
        if path.contains(['@', '/']) {
            self.problems.push(UrlProblem::Reserved);
            return;
        }
        self.dbname = self.decode(path);
    }

    fn read_query(&mut self, query: &str) {
        // A bare @ is what a password with a question mark looks like; a slash is the path of a file.
        if query.contains('@') {
            self.problems.push(UrlProblem::Reserved);
            return;
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = split(pair, '=');
            let value = self.decode(value.unwrap_or_default()).unwrap_or_default();
            let known = database_keys().iter().map(|setting| setting.name);
            let mut known = known.filter(|name| !IN_URL.contains(name));
            match known.find(|name| *name == key) {
                Some(name) => self.options.push((name, value)),
                None => self.problems.push(UrlProblem::QueryKey),
            }
        }
    }

    fn decode(&mut self, text: &str) -> Option<String> {
        match percent_decode(text) {
            Ok(text) if text.is_empty() => None,
            Ok(text) => Some(text),
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }
}

pub(crate) fn split(text: &str, at: char) -> (&str, Option<&str>) {
    match text.split_once(at) {
        Some((head, tail)) => (head, Some(tail)),
        None => (text, None),
    }
}

pub(crate) fn percent_decode(text: &str) -> Result<String, UrlProblem> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let high = bytes.next().and_then(nibble).ok_or(UrlProblem::Percent)?;
        let low = bytes.next().and_then(nibble).ok_or(UrlProblem::Percent)?;
        decoded.push(high << 4 | low);
    }
    if decoded.contains(&0) {
        return Err(UrlProblem::Nul);
    }
    String::from_utf8(decoded).map_err(|_| UrlProblem::Percent)
}

fn nibble(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte.wrapping_sub(b'0')),
        b'a'..=b'f' => Some(byte.wrapping_sub(b'a').wrapping_add(10)),
        b'A'..=b'F' => Some(byte.wrapping_sub(b'A').wrapping_add(10)),
        _ => None,
    }
}

/// Whether `text` is one host name or one IP address. Underscores pass: container networks use them.
pub(crate) fn is_host(text: &str) -> bool {
    let name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let labels = !text.starts_with(['.', '-']) && !text.contains("..") && text.len() <= 253;
    is_ipv6(text) || (!text.is_empty() && labels && text.bytes().all(name))
}

/// Whether `text` is an IPv6 address; a zone (`%eth0`) may follow.
pub(crate) fn is_ipv6(text: &str) -> bool {
    let (address, _zone) = split(text, '%');
    address.parse::<std::net::Ipv6Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(url: &str) -> Result<[String; 5], Vec<UrlProblem>> {
        let target = Target::parse(url);
        if !target.problems.is_empty() {
            return Err(target.problems);
        }
        let password = target.password.as_ref().map(Secret::expose);
        Ok([
            target.host.unwrap_or_default(),
            target.port.map(|port| port.to_string()).unwrap_or_default(),
            target.dbname.unwrap_or_default(),
            target.user.unwrap_or_default(),
            password.unwrap_or_default().to_owned(),
        ])
    }

    #[test]
    fn urls_are_decoded_part_by_part() {
        type Want = Result<[&'static str; 5], UrlProblem>;
        #[rustfmt::skip]
        let table: [(&str, &str, Want); 36] = [
            ("whole",            "postgres://u:p@h:5433/db",        Ok(["h", "5433", "db", "u", "p"])),
            ("other scheme",     "postgresql://u:p@h:5433/db",      Ok(["h", "5433", "db", "u", "p"])),
            ("no port",          "postgres://u:p@h/db",             Ok(["h", "", "db", "u", "p"])),
            ("empty port",       "postgres://u:p@h:/db",            Ok(["h", "", "db", "u", "p"])),
            ("no password",      "postgres://u@h/db",               Ok(["h", "", "db", "u", ""])),
            ("no user",          "postgres://h/db",                 Ok(["h", "", "db", "", ""])),
            ("no database",      "postgres://h",                    Ok(["h", "", "", "", ""])),
            ("no host",          "postgres:///db",                  Ok(["", "", "db", "", ""])),
            ("nothing",          "postgres://",                     Ok(["", "", "", "", ""])),
            ("plus is a plus",   "postgres://u:a+b@h/db",           Ok(["h", "", "db", "u", "a+b"])),
            ("encoded",          "postgres://u%40x:%2f%3F%23%25@h/d%20b", Ok(["h", "", "d b", "u@x", "/?#%"])),
            ("colon in password", "postgres://u:a:b@h/db",          Ok(["h", "", "db", "u", "a:b"])),
            ("not ASCII",        "postgres://u:p%C3%A4@h/db",       Ok(["h", "", "db", "u", "pä"])),
            ("IPv4",             "postgres://10.0.0.1:1/db",        Ok(["10.0.0.1", "1", "db", "", ""])),
            ("IPv6",             "postgres://[::1]:5433/db",        Ok(["::1", "5433", "db", "", ""])),
            ("IPv6, no port",    "postgres://[::1]/db",             Ok(["::1", "", "db", "", ""])),
            ("harmless sslmode", "postgres://h/db?sslmode=disable", Ok(["h", "", "db", "", ""])),
            ("IPv6, bare",       "postgres://::1/db",               Err(UrlProblem::Host)),
            ("IPv6, broken",     "postgres://[::x]/db",             Err(UrlProblem::Host)),
            ("IPv6, trailing",   "postgres://[::1]x/db",            Err(UrlProblem::Host)),
            ("two hosts",        "postgres://h1,h2/db",             Err(UrlProblem::Host)),
            ("socket directory", "postgres://u@%2Frun%2Fpg:5433/d", Ok(["/run/pg", "5433", "d", "u", ""])),
            ("abstract socket",  "postgres://%40pg/db",             Ok(["@pg", "", "db", "", ""])),
            ("port zero",        "postgres://h:0/db",               Err(UrlProblem::Port)),
            ("port too large",   "postgres://h:65536/db",           Err(UrlProblem::Port)),
            ("port with a sign", "postgres://h:+1/db",              Err(UrlProblem::Port)),
            ("no scheme",        "h:5432/db",                       Err(UrlProblem::Scheme)),
            ("another scheme",   "mysql://h/db",                    Err(UrlProblem::Scheme)),
            ("bare @",           "postgres://u:p@ss@h/db",          Err(UrlProblem::Reserved)),
            ("bare / in digits", "postgres://u:12/ss@h",            Err(UrlProblem::Reserved)),
            ("bare ? in digits", "postgres://u:12?ss@h/db",         Err(UrlProblem::Reserved)),
            ("bare #",           "postgres://h/db#x",               Err(UrlProblem::Reserved)),
            ("broken %",         "postgres://u:%zz@h/db",           Err(UrlProblem::Percent)),
            ("not UTF-8",        "postgres://u:%ff@h/db",           Err(UrlProblem::Percent)),
            ("encoded NUL",      "postgres://u@h/db%00x",           Err(UrlProblem::Nul)),
            ("password alone",   "postgres://:p@h/db",              Err(UrlProblem::NoUser)),
        ];
        for (name, url, want) in table {
            let want = want.map(|parts| parts.map(str::to_owned)).map_err(|problem| vec![problem]);
            assert_eq!(parts(url), want, "{name}");
        }
    }

    #[test]
    fn the_query_takes_the_keys_of_an_entry_and_no_others() {
        let target = Target::parse("postgres://h/db?pool_size=5&sslmode=require&sslrootcert=/etc/ca.pem");
        let want = [("pool_size", "5"), ("sslmode", "require"), ("sslrootcert", "/etc/ca.pem")];
        assert_eq!(target.options, want.map(|(key, value)| (key, value.to_owned())));
        assert_eq!(target.problems, []);
        #[rustfmt::skip]
        let table = [
            ("postgres://h/db?poolsize=5",       UrlProblem::QueryKey),
            ("postgres://h/db?password=x",       UrlProblem::QueryKey),
            ("postgres://h/db?sslmodus=require", UrlProblem::QueryKey),
        ];
        for (url, want) in table {
            assert_eq!(Target::parse(url).problems, [want], "{url}");
        }
    }

    #[test]
    fn every_fault_of_a_url_is_found_at_once() {
        let target = Target::parse("postgres://u:%zz@a,b:0/x/y?z=1#f");
        let want = [
            UrlProblem::Reserved,
            UrlProblem::Percent,
            UrlProblem::Host,
            UrlProblem::Port,
            UrlProblem::Reserved,
            UrlProblem::QueryKey,
        ];
        assert_eq!(target.problems, want);
    }
}
