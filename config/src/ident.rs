//! `auth_ident_file`: which user of the system, or which certificate, may be which user of the database.

use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

use crate::config::read_file;
use crate::fault::{Fault, Faults, Problem};
use crate::origin::Origin;

/// Faults of one file that are told; what follows is hardly another one's cause.
const TOLD: usize = 20;

/// What a name captured by a regular expression stands for in a line.
const CAPTURED: &str = "\\1";

/// One map of a file in the syntax of Postgres' `pg_ident.conf`.
///
/// ```text
/// # MAP  SYSTEM-NAME              DATABASE-USER
/// corp   "Anna Example"           anna
/// corp   /^(.*)@example\.com$     \1
/// corp   root                     all
/// ```
///
/// Source: the Postgres manual, "User Name Maps".
#[derive(Clone, Debug, Default)]
pub struct IdentMap(Vec<Line>);

#[derive(Clone, Debug)]
struct Line {
    system: Name,
    user: Name,
}

#[derive(Clone, Debug)]
enum Name {
    /// Every name.
    All,
    /// This one.
    Exact(String),
    /// Those that match.
    Matching(Regex),
}

impl Name {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Exact(exact) => exact == name,
            Self::Matching(regex) => regex.is_match(name),
        }
    }
}

impl Line {
    fn allows(&self, system: &str, user: &str) -> bool {
        match (&self.system, &self.user) {
            (Name::Matching(regex), Name::Exact(template)) if template.contains(CAPTURED) => {
                regex.captures(system).is_some_and(|found| {
                    let captured = found.get(1).map_or("", |group| group.as_str());
                    template.replacen(CAPTURED, captured, 1) == user
                })
            }
            (known, allowed) => known.matches(system) && allowed.matches(user),
        }
    }
}

impl IdentMap {
    /// Reads the lines of `map` from a file.
    ///
    /// # Errors
    ///
    /// Every fault with its line (the first twenty), also in other maps' lines; a file that is missing, unreadable, larger
    /// than 16 MiB or not UTF-8 is a fault.
    pub fn load(path: &str, map: &str) -> Result<Self, Faults> {
        let text = read_file(path).map_err(|(line, problem)| {
            let origin = line.map(|line| Origin::File { path: path.into(), line });
            let origin = origin.unwrap_or(Origin::Path { path: path.into() });
            Faults(vec![fault(origin, problem)])
        })?;
        Self::parse(path, &text, map)
    }

    /// Reads the text of a file; `path` is only named in faults.
    ///
    /// # Errors
    ///
    /// As [`IdentMap::load`].
    pub fn parse(path: &str, text: &str, map: &str) -> Result<Self, Faults> {
        let mut lines = Vec::new();
        let mut faults = Vec::new();
        let mut source = text.lines().enumerate();
        while let Some((index, line)) = source.next() {
            // A backslash at its end continues a line.
            let mut whole = line.to_owned();
            while let Some(front) = whole.strip_suffix('\\').map(str::to_owned) {
                whole = front + source.next().map_or("", |(_, next)| next);
            }
            match read_line(&whole) {
                Ok(Some((name, line))) if name == map => lines.push(line),
                Ok(_) => {}
                Err(problem) => faults.push(fault(Origin::File { path: path.into(), line: index + 1 }, problem)),
            }
            if faults.len() >= TOLD {
                break;
            }
        }
        if faults.is_empty() { Ok(Self(lines)) } else { Err(Faults(faults)) }
    }

    /// Whether whoever is called `system` there may log in as `user`.
    #[must_use]
    pub fn allows(&self, system: &str, user: &str) -> bool {
        self.0.iter().any(|line| line.allows(system, user))
    }
}

fn fault(origin: Origin, problem: Problem) -> Fault {
    Fault { key: "auth_ident_file".to_owned(), value: None, origin: Some(origin), problem }
}

fn read_line(line: &str) -> Result<Option<(String, Line)>, Problem> {
    let fields = fields(line)?;
    if let Some(Field { text, quoted: false }) = fields.first()
        && matches!(text.as_str(), "include" | "include_if_exists" | "include_dir")
    {
        return Err(Problem::IdentInclude);
    }
    let mut fields = fields.into_iter();
    let Some(map) = fields.next() else { return Ok(None) };
    let (Some(system), Some(user), None) = (fields.next(), fields.next(), fields.next()) else {
        return Err(Problem::IdentLine);
    };
    let system = match system.text.strip_prefix('/') {
        Some(regex) => Name::Matching(compile(regex)?),
        None => Name::Exact(system.text),
    };
    let captures = matches!(&system, Name::Matching(regex) if regex.captures_len() > 1);
    let user = match user {
        Field { text, quoted: false } if text == "all" => Name::All,
        Field { text, quoted: false } if text.starts_with('+') => return Err(Problem::IdentGroup),
        Field { text, .. } => match text.strip_prefix('/') {
            Some(regex) => Name::Matching(compile(regex)?),
            None => Name::Exact(text),
        },
    };
    if matches!((&system, &user), (Name::Matching(_), Name::Exact(text)) if text.contains(CAPTURED) && !captures) {
        return Err(Problem::IdentCapture);
    }
    Ok(Some((map.text, Line { system, user })))
}

fn compile(regex: &str) -> Result<Regex, Problem> {
    Regex::new(regex).map_err(|_| Problem::IdentRegex)
}

/// One field of a line.
#[derive(Debug, PartialEq, Eq)]
struct Field {
    text: String,
    /// Any of it stood in quotes, so that it is no word of the syntax.
    quoted: bool,
}

/// Fields are separated by blanks; quotes keep blanks, commas and `#`, and a quote inside them is written twice.
fn fields(line: &str) -> Result<Vec<Field>, Problem> {
    let mut fields = Vec::new();
    let mut rest = line.chars().peekable();
    loop {
        while rest.next_if(|c| c.is_whitespace()).is_some() {}
        match rest.peek() {
            None | Some('#') => return Ok(fields),
            Some(_) => fields.push(field(&mut rest)?),
        }
    }
}

fn field(rest: &mut Peekable<Chars<'_>>) -> Result<Field, Problem> {
    let mut field = Field { text: String::new(), quoted: false };
    let mut inside = false;
    while let Some(&c) = rest.peek() {
        if !inside && (c.is_whitespace() || c == '#') {
            break;
        }
        rest.next();
        match c {
            '"' if inside && rest.next_if_eq(&'"').is_some() => field.text.push('"'),
            '"' => {
                inside = !inside;
                field.quoted = true;
            }
            // Several values, which have no meaning here.
            ',' if !inside => return Err(Problem::IdentLine),
            other => field.text.push(other),
        }
    }
    if inside { Err(Problem::IdentLine) } else { Ok(field) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::*;

    #[test]
    fn a_map_allows_what_postgres_would() {
        let text = "# a comment\n\nm anna anna # behind it\nm \"Bert Example\" bert\nother eve anna\n\
                    m /^(.*)@example\\.com$ \\1\nm /^(.+)@two\\.org$ \"pre_\\1_post\"\nm root all\n\
                    m quoted \"all\"\nm carl /^app_\nm \"with \"\"quotes\"\"\" q\nm dora \\\n dora2\nm /boss boss\n";
        let map = IdentMap::parse("ident.conf", text, "m").unwrap();
        #[rustfmt::skip]
        let table = [
            ("anna",             "anna",          true),
            ("anna",             "bert",          false),
            ("Anna",             "anna",          false),
            ("Bert Example",     "bert",          true),
            ("eve",              "anna",          false),
            ("fred@example.com", "fred",          true),
            ("fred@example.com", "anna",          false),
            ("fred@exampleXcom", "fred",          false),
            ("all@example.com",  "anna",          false),
            ("all@example.com",  "all",           true),
            ("x@two.org",        "pre_x_post",    true),
            ("x@two.org",        "x",             false),
            ("root",             "anyone",        true),
            ("quoted",           "all",           true),
            ("quoted",           "anna",          false),
            ("carl",             "app_one",       true),
            ("carl",             "other",         false),
            ("with \"quotes\"",  "q",             true),
            ("dora",             "dora2",         true),
            ("my boss is here",  "boss",          true),
            ("",                 "",              false),
        ];
        for (system, user, want) in table {
            assert_eq!(map.allows(system, user), want, "{system} {user}");
        }
        assert!(!IdentMap::default().allows("anna", "anna"));
    }

    #[test]
    fn every_fault_names_its_line() {
        #[rustfmt::skip]
        let table = [
            ("m anna",                       "a map, a name and a user"),
            ("m anna anna anna",             "a map, a name and a user"),
            ("m anna,bert anna",             "a map, a name and a user"),
            ("m \"anna anna",                "a map, a name and a user"),
            ("m /( anna",                    "regular expression"),
            ("m anna /*",                    "regular expression"),
            ("m /^anna$ \\1",                "captures nothing"),
            ("m anna +staff",                "members of a role"),
            ("include other.conf",           "included"),
        ];
        for (line, words) in table {
            let text = format!("m fine fine\n{line}\n");
            let faults = IdentMap::parse("ident.conf", &text, "m").unwrap_err().to_string();
            assert!(faults.starts_with("auth_ident_file: ") && faults.contains("ident.conf:2"), "{line}: {faults}");
            assert!(faults.contains(words) && faults.lines().count() == 1, "{line}: {faults}");
        }
    }
}
