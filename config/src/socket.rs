//! Unix-domain sockets: where they are, and who may connect to them.

use std::fmt;

use crate::fault::Problem;
use crate::setting::Bounds;
use crate::typed::{Kind, Raw, Typed, mistyped};

/// The longest path of a Unix-domain socket, in bytes, without its NUL; an abstract name's `@` counts.
///
/// Source: unix(7), `sun_path`.
pub const SOCKET_PATH_MAX: usize = 107;

/// The path of the socket in a directory, or in an abstract name, as libpq builds it.
///
/// Source: the Postgres manual, "Parameter Key Words", `host`.
#[must_use]
pub fn socket_path(directory: &str, port: u16) -> String {
    format!("{}/.s.PGSQL.{port}", directory.trim_end_matches('/'))
}

/// Whether a host is the directory of a Unix-domain socket: absolute, or with an `@` an abstract name.
#[must_use]
pub fn is_socket_dir(host: &str) -> bool {
    host.starts_with('/') || host.starts_with('@') && host.len() > 1
}

/// `unix_socket_dir`: nothing, or absolute directories and `@name`s separated by commas, each once.
pub(crate) fn socket_dirs(text: &str) -> Result<(), Problem> {
    let mut seen = Vec::new();
    for directory in listed(text) {
        if !is_socket_dir(directory) {
            let wanted = "a list of absolute directories or @names separated by commas, nor empty";
            return Err(Problem::NotAnAddress { wanted });
        }
        if seen.contains(&directory) {
            return Err(Problem::Repeated);
        }
        seen.push(directory);
    }
    Ok(())
}

/// The items of a list that may be empty.
pub(crate) fn listed(text: &str) -> impl Iterator<Item = &str> {
    let whole = (!text.trim().is_empty()).then_some(text);
    whole.into_iter().flat_map(|text| text.split(',')).map(str::trim)
}

/// Permissions of a file, as chmod(1) writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileMode(u32);

impl FileMode {
    /// The permission bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl Typed for FileMode {
    const KIND: Kind = Kind::Text;

    fn read(raw: &Raw<'_>, _: Option<Bounds>) -> Result<Self, Problem> {
        let (Raw::Word(text) | Raw::Text(text)) = raw else {
            return Err(mistyped(Self::KIND, raw));
        };
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
        mode.map(Self).ok_or(Problem::NotAMode)
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_and_nothing_else() {
        #[rustfmt::skip]
        let table: [(&str, Option<&str>); 8] = [
            ("0777", Some("0777")), ("700", Some("0700")), ("0000", Some("0000")), ("0778", None),
            ("1777", None),         ("77", None),          ("+777", None),         ("", None),
        ];
        for (text, want) in table {
            assert_eq!(FileMode::read(&Raw::Word(text), None).ok().map(|mode| mode.show()).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn sockets_are_named_as_libpq_looks_for_them() {
        assert_eq!(socket_path("/tmp", 6432), "/tmp/.s.PGSQL.6432");
        assert_eq!(socket_path("/tmp/", 6432), "/tmp/.s.PGSQL.6432");
        assert_eq!(socket_path("@weir", 6432), "@weir/.s.PGSQL.6432");
        #[rustfmt::skip]
        let table: [(&str, Result<(), &str>); 7] = [
            ("",               Ok(())),
            ("/tmp",           Ok(())),
            ("/tmp, @weir",    Ok(())),
            ("/tmp,/tmp",      Err("given twice")),
            ("tmp",            Err("not a list")),
            ("@",              Err("not a list")),
            ("/tmp,",          Err("not a list")),
        ];
        for (text, want) in table {
            match (socket_dirs(text), want) {
                (Ok(()), Ok(())) => {}
                (Err(problem), Err(want)) => assert!(problem.to_string().contains(want), "{text}: {problem}"),
                (got, _) => panic!("{text}: {got:?}"),
            }
        }
    }
}
