//! `auth_file`: users and their secrets in `PgBouncer`'s format.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::str::Chars;

use crate::check::secret_problem;
use crate::config::read_file;
use crate::fault::{Fault, Faults, Problem};
use crate::origin::Origin;
use crate::secret::Secret;

/// Faults of one file that are told; what follows is hardly another one's cause.
const TOLD: usize = 20;

/// The users of an `auth_file`.
///
/// ```text
/// ; a comment
/// "name" "secret"
/// "o""brien" "a quote inside is written twice"
/// ```
///
/// What stands behind the secret is ignored, as in `PgBouncer`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserList(BTreeMap<String, Secret>);

impl UserList {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// Every fault with its line (the first twenty); a file that is missing, unreadable, larger than 16 MiB or not UTF-8 is
    /// a fault.
    pub fn load(path: &str) -> Result<Self, Faults> {
        let text = read_file(path).map_err(|(line, problem)| {
            let origin = line.map(|line| Origin::File { path: path.into(), line });
            let origin = origin.unwrap_or(Origin::Path { path: path.into() });
            Faults(vec![fault(origin, problem)])
        })?;
        Self::parse(path, &text)
    }

    /// Reads the text of a file; `path` is only named in faults.
    ///
    /// # Errors
    ///
    /// As [`UserList::load`].
    pub fn parse(path: &str, text: &str) -> Result<Self, Faults> {
        let mut users = BTreeMap::new();
        let mut faults = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let mut note = |problem| faults.push(fault(Origin::File { path: path.into(), line: index + 1 }, problem));
            match read_line(line) {
                Ok(None) => {}
                Ok(Some((name, secret))) => match users.entry(name) {
                    Entry::Vacant(place) => drop(place.insert(secret)),
                    Entry::Occupied(_) => note(Problem::Repeated),
                },
                Err(problem) => note(problem),
            }
            if faults.len() >= TOLD {
                break;
            }
        }
        if faults.is_empty() { Ok(Self(users)) } else { Err(Faults(faults)) }
    }

    /// Name and secret of each user, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Secret)> {
        self.0.iter().map(|(name, secret)| (name.as_str(), secret))
    }
}

fn fault(origin: Origin, problem: Problem) -> Fault {
    Fault { key: "auth_file".to_owned(), value: None, origin: Some(origin), problem }
}

fn read_line(line: &str) -> Result<Option<(String, Secret)>, Problem> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(';') {
        return Ok(None);
    }
    let mut rest = line.chars();
    let name = quoted(&mut rest)?;
    let after = rest.as_str();
    let mut rest = after.trim_start().chars();
    if rest.as_str().len() == after.len() {
        return Err(Problem::UserLine);
    }
    let secret = Secret::new(quoted(&mut rest)?);
    if !(rest.as_str().is_empty() || rest.as_str().starts_with(char::is_whitespace)) {
        return Err(Problem::UserLine);
    }
    if name.is_empty() {
        return Err(Problem::NoName);
    }
    if name.contains('\0') || secret.expose().contains('\0') {
        return Err(Problem::Nul);
    }
    match secret_problem(&secret) {
        // MD5 is as good as the auth_type.
        None | Some(Problem::Md5) => Ok(Some((name, secret))),
        Some(problem) => Err(problem),
    }
}

/// A text in double quotes, a quote inside written twice.
fn quoted(rest: &mut Chars<'_>) -> Result<String, Problem> {
    let mut text = String::new();
    if rest.next() != Some('"') {
        return Err(Problem::UserLine);
    }
    loop {
        match rest.next() {
            None => return Err(Problem::UserLine),
            Some('"') if rest.as_str().starts_with('"') => {
                rest.next();
                text.push('"');
            }
            Some('"') => return Ok(text),
            Some(other) => text.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::*;

    #[test]
    fn a_line_is_a_user_a_comment_or_a_fault() {
        const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
            wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        let verifier = format!("\"a\" \"{VERIFIER}\"");
        let half = verifier.replace('=', "");
        #[rustfmt::skip]
        let table: [(&str, &str, Result<Option<(&str, &str)>, Problem>); 16] = [
            ("plain",             r#""a" "s""#,                     Ok(Some(("a", "s")))),
            ("spaces",            "\t \"a\" \t \"s p\"  ",          Ok(Some(("a", "s p")))),
            ("quotes",            r#""o""brien" "x""""y""#,         Ok(Some(("o\"brien", "x\"\"y")))),
            ("more fields",       r#""a" "s" "whatever" "#,         Ok(Some(("a", "s")))),
            ("no secret",         r#""a" """#,                      Ok(Some(("a", "")))),
            ("md5",               r#""a" "md55d41402abc4b2a76b9719d911017c592""#, Ok(Some(("a", "md55d41402abc4b2a76b9719d911017c592")))),
            ("verifier",          &verifier,                        Ok(Some(("a", VERIFIER)))),
            ("comment",           "; \"a\" \"s\"",                  Ok(None)),
            ("empty",             "  ",                             Ok(None)),
            ("half a verifier",   &half,                            Err(Problem::Verifier)),
            ("no name",           r#""" "s""#,                      Err(Problem::NoName)),
            ("bare",              "a s",                            Err(Problem::UserLine)),
            ("name alone",        r#""a""#,                         Err(Problem::UserLine)),
            ("not ended",         r#""a" "s"#,                      Err(Problem::UserLine)),
            ("glued",             r#""a""s""#,                      Err(Problem::UserLine)),
            ("a NUL",             "\"a\" \"s\0\"",                  Err(Problem::Nul)),
        ];
        for (name, line, want) in table {
            let got = read_line(line);
            let got = got.as_ref().map(|user| user.as_ref().map(|(name, secret)| (name.as_str(), secret.expose())));
            assert_eq!(got, want.as_ref().map(|user| *user), "{name}");
        }
    }

    #[test]
    fn every_fault_names_its_line_and_nothing_of_it() {
        let text = "\"a\" \"hush\"\nhush\n\n; fine\n\"a\" \"hush\"\n\"b\" \"hush\n";
        let faults = UserList::parse("users.txt", text).unwrap_err().to_string();
        let lines: Vec<_> = faults.lines().collect();
        assert_eq!(lines.len(), 3, "{faults}");
        for (line, place) in lines.iter().zip(["users.txt:2", "users.txt:5", "users.txt:6"]) {
            assert!(line.starts_with("auth_file: ") && line.contains(place) && !line.contains("hush"), "{line}");
        }
        let missing = UserList::load("/nowhere/users.txt").unwrap_err().to_string();
        assert!(missing.contains("/nowhere/users.txt") && missing.contains("cannot be read"), "{missing}");
        let many = "x\n".repeat(1000);
        assert_eq!(UserList::parse("users.txt", &many).unwrap_err().0.len(), TOLD);
    }
}
