//! Whether a certificate is for a host, as libpq judges it.
//!
//! Source: the Postgres manual, "SSL Certificate Verification" (libpq) and "Client Verification of Server
//! Certificates"; libpq's tests of names.

use std::net::{Ipv4Addr, Ipv6Addr};

use x509_parser::extensions::GeneralName;

use super::certificate::Certificate;

/// The names that a certificate has, and none is the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Strangers {
    /// The first name; empty if there is none.
    pub(super) first: String,
    /// How many there are.
    pub(super) count: usize,
}

/// Checks that `certificate` is for `host`, a name or an IP address.
///
/// An alternative name of the host's own kind (dNSName for a name, iPAddress for an address) makes the Common Name count
/// no more.
pub(super) fn matches(certificate: &Certificate<'_>, host: &str) -> Result<(), Strangers> {
    let is_address = host.parse::<Ipv4Addr>().is_ok() || host.parse::<Ipv6Addr>().is_ok();
    let mut strangers = Strangers { first: String::new(), count: 0 };
    let mut common_name_counts = true;
    for name in certificate.alternative_names() {
        let (matches, shown) = match name {
            GeneralName::DNSName(name) => {
                common_name_counts &= is_address;
                (is_name(name.as_bytes(), host), (*name).to_owned())
            }
            GeneralName::IPAddress(octets) => {
                common_name_counts &= !is_address;
                (is_same_address(octets, host), show_address(octets))
            }
            _ => continue,
        };
        if matches {
            return Ok(());
        }
        strangers.add(shown);
    }
    if common_name_counts && let Some(name) = certificate.common_name() {
        if is_name(name, host) {
            return Ok(());
        }
        strangers.add(String::from_utf8_lossy(name).into_owned());
    }
    Err(strangers)
}

impl Strangers {
    fn add(&mut self, name: String) {
        if self.count == 0 {
            self.first = name;
        }
        self.count += 1;
    }
}

/// A name with a NUL inside is nobody's: it would be read as another, shorter one.
fn is_name(pattern: &[u8], host: &str) -> bool {
    let host = host.as_bytes();
    !pattern.contains(&0) && !pattern.is_empty() && (pattern.eq_ignore_ascii_case(host) || is_wildcard(pattern, host))
}

/// `*.example.com` stands for one label in front of `.example.com`.
fn is_wildcard(pattern: &[u8], host: &[u8]) -> bool {
    let Some(tail) = pattern.strip_prefix(b"*").filter(|tail| tail.len() > 1 && tail.starts_with(b".")) else {
        return false;
    };
    let Some((label, rest)) = host.len().checked_sub(tail.len()).and_then(|at| host.split_at_checked(at)) else {
        return false;
    };
    !label.is_empty() && !label.contains(&b'.') && rest.eq_ignore_ascii_case(tail)
}

fn is_same_address(octets: &[u8], host: &str) -> bool {
    match octets.len() {
        4 => host.parse::<Ipv4Addr>().is_ok_and(|address| address.octets() == octets),
        16 => host.parse::<Ipv6Addr>().is_ok_and(|address| address.octets() == octets),
        _ => false,
    }
}

fn show_address(octets: &[u8]) -> String {
    if let Ok(octets) = <[u8; 4]>::try_from(octets) {
        return Ipv4Addr::from(octets).to_string();
    }
    <[u8; 16]>::try_from(octets).map_or_else(|_| "?".to_owned(), |octets| Ipv6Addr::from(octets).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_or_by_one_label() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], &str, bool); 13] = [
            ("the same",               b"db.example.com", "db.example.com",   true),
            ("another case",           b"DB.Example.com", "db.example.COM",   true),
            ("another name",           b"db.example.com", "da.example.com",   false),
            ("a longer host",          b"example.com",    "db.example.com",   false),
            ("one label",              b"*.example.com",  "db.example.com",   true),
            ("two labels",             b"*.example.com",  "a.db.example.com", false),
            ("no label",               b"*.example.com",  ".example.com",     false),
            ("the bare domain",        b"*.example.com",  "example.com",      false),
            ("a star inside a label",  b"d*.example.com", "db.example.com",   false),
            ("a star further on",      b"db.*.com",       "db.example.com",   false),
            ("a star alone",           b"*",              "db",               false),
            ("a star and a dot",       b"*.",             "db.",              false),
            ("a NUL inside",           b"db.example.com\0.evil.org", "db.example.com", false),
        ];
        for (name, pattern, host, want) in table {
            assert_eq!(is_name(pattern, host), want, "{name}");
        }
    }

    #[test]
    fn addresses_are_compared_as_numbers() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], &str, bool); 5] = [
            ("IPv4",          &[127, 0, 0, 1],                                       "127.0.0.1", true),
            ("another",       &[127, 0, 0, 2],                                       "127.0.0.1", false),
            ("IPv6",          &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],     "0::1",      true),
            ("a name",        &[127, 0, 0, 1],                                       "localhost", false),
            ("a wrong length", &[127, 0, 0],                                         "127.0.0",   false),
        ];
        for (name, octets, host, want) in table {
            assert_eq!(is_same_address(octets, host), want, "{name}");
        }
    }
}
