//! Texts in which settings go back to where their client began, and not to where the server connection did.
//!
//! Behind each reset of a start-up setting stands a SET of ours, which takes no snapshot, so that a SET TRANSACTION may follow; a
//! `set_config(.., NULL, ..)` is given the value itself. The answers to what is ours are not the client's, and the positions
//! in errors are made those of its own text.

use std::ops::Range;

use super::{APPLICATION_NAME, Profile, is_role, literal, may_reset, restore, tagged};
use crate::sql::{self, EffectSet, Resets, What};

/// What a RESET ALL leaves alone.
///
/// Source: `PostgreSQL` 17, `GUC_NO_RESET_ALL` in `guc_tables.c`.
const STAY: [&str; 4] = ["seed", "transaction_deferrable", "transaction_isolation", "transaction_read_only"];

/// Lists of names: a SET takes one literal for one name.
///
/// Source: `PostgreSQL` 17, `GUC_LIST_QUOTE` in `guc_tables.c`.
const LISTS: [&str; 5] = [
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
];

/// Bytes that a text may grow by.
const GROWTH_MAX: usize = 64 * 1024;

/// The longest value; bytes. One row of ours tells it.
const VALUE_MAX: usize = 1024;

/// A text for the server, and what tells its answers from those that the client is owed.
#[derive(Debug, Default)]
pub struct Splice {
    /// The answers: how many have come.
    done: usize,
    /// Those that are ours, counted from 0.
    ours: Vec<usize>,
    cuts: Vec<Cut>,
}

/// Where the server's text is another.
#[derive(Debug)]
struct Cut {
    /// Characters of the server's text in front of it.
    at: usize,
    /// Characters of the client's that are not there.
    taken: usize,
    /// Characters in their place.
    put: usize,
}

/// What becomes of a text.
#[derive(Debug)]
pub struct Spliced {
    /// What the server gets.
    pub text: Vec<u8>,
    /// How its answers are read.
    pub splice: Splice,
    /// More of it may reset something.
    pub more: bool,
}

impl Splice {
    /// Whether the answer under way is that to something of ours.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.ours.binary_search(&self.done).is_ok()
    }

    /// A statement is done.
    pub const fn complete(&mut self) {
        self.done += 1;
    }

    /// The place in the client's text of a character of the server's, both counted from 1. What is ours is where it was put.
    #[must_use]
    pub fn position(&self, position: usize) -> usize {
        let (mut taken, mut put) = (0, 0);
        for cut in self.cuts.iter().take_while(|cut| cut.at < position) {
            if position <= cut.at + cut.put {
                return (cut.at + 1 + taken).saturating_sub(put);
            }
            taken += cut.taken;
            put += cut.put;
        }
        (position + taken).saturating_sub(put)
    }

    /// The body of an error or a notice with the position in it that the client is to be told. None if it is the same.
    #[must_use]
    pub fn shift(&self, body: &[u8]) -> Option<Vec<u8>> {
        let mut rest = body;
        while let Some((&kind, value)) = rest.split_first() {
            let end = memchr::memchr(0, value)?;
            if kind == b'P' {
                let front = body.len() - value.len();
                let (digits, back) = value.split_at_checked(end)?;
                let told = std::str::from_utf8(digits).ok()?.parse().ok()?;
                let position = self.position(told);
                let made = || [body.get(..front).unwrap_or_default(), position.to_string().as_bytes(), back].concat();
                return (position != told).then(made);
            }
            rest = value.get(end + 1..)?;
        }
        None
    }
}

/// A text and what was put into it.
struct Writer<'a> {
    from: &'a [u8],
    /// So much of it was copied.
    at: usize,
    out: Vec<u8>,
    /// Characters in `out`.
    chars: usize,
    /// What a character is.
    bytes: bool,
    cuts: Vec<Cut>,
}

impl Writer<'_> {
    /// Puts `put` where `place` is.
    fn put(&mut self, place: &Range<usize>, put: &[u8]) {
        let front = self.from.get(self.at..place.start).unwrap_or_default();
        let taken = count(self.from.get(place.clone()).unwrap_or_default(), self.bytes);
        self.chars += count(front, self.bytes);
        self.out.extend_from_slice(front);
        let len = count(put, self.bytes);
        self.cuts.push(Cut { at: self.chars, taken, put: len });
        self.out.extend_from_slice(put);
        self.chars += len;
        self.at = place.end;
    }

    fn finish(&mut self) {
        self.out.extend_from_slice(self.from.get(self.at..).unwrap_or_default());
    }
}

fn count(text: &[u8], bytes: bool) -> usize {
    if bytes { text.len() } else { text.iter().filter(|byte| **byte & 0xc0 != 0x80).count() }
}

/// What the server is to get in place of a simple query of a client that began with `startup`. In a transaction it `is_inside`,
/// if that is certain; its characters may be `bytes`. None if it is to get the text itself: nothing in it goes back to a start-up
/// value, or nobody knows for certain where its statements end.
#[must_use]
pub fn splice(text: &[u8], startup: &Profile, tag: &str, is_inside: bool, bytes: bool) -> Option<Spliced> {
    let resets = sql::resets(text)?;
    let mut writer = Writer { from: text, at: 0, out: Vec::new(), chars: 0, bytes, cuts: Vec::new() };
    let mut ours = Vec::new();
    for reset in &resets.all {
        if let What::Null { name } = &reset.what {
            if let Some(value) = value(startup, name, tag) {
                writer.put(&reset.place, &value);
            }
            continue;
        }
        // Alone, and in no transaction, a SET LOCAL does nothing but warn; and a DISCARD ALL is alone.
        let warns = matches!(reset.what, What::One { local: true, .. }) && resets.statements == 1 && !is_inside;
        if warns || reset.what == What::Discard {
            continue;
        }
        let mut put = Vec::new();
        for set in sets(&reset.what, startup, tag)? {
            ours.push(reset.nth + ours.len());
            let parts: [&[u8]; 3] = if reset.ended { [b"", &set, b";"] } else { [b"\n;", &set, b""] };
            put.extend(parts.concat());
        }
        if !put.is_empty() {
            writer.put(&reset.place, &put);
        }
    }
    writer.finish();
    if writer.cuts.is_empty() || writer.out.len() > text.len() + GROWTH_MAX {
        return None;
    }
    let splice = Splice { done: 0, ours, cuts: writer.cuts };
    Some(Spliced { text: writer.out, splice, more: has_more(&resets, text) })
}

/// A prepared text of such a client, in which a `set_config(.., NULL, ..)` is given the start-up value. None if there is none.
#[must_use]
pub fn filled(text: &[u8], startup: &Profile, tag: &str) -> Option<Vec<u8>> {
    let resets = sql::resets(text)?;
    let mut writer = Writer { from: text, at: 0, out: Vec::new(), chars: 0, bytes: true, cuts: Vec::new() };
    for reset in &resets.all {
        if let What::Null { name } = &reset.what
            && let Some(value) = value(startup, name, tag)
        {
            writer.put(&reset.place, &value);
        }
    }
    writer.finish();
    (!writer.cuts.is_empty()).then_some(writer.out)
}

/// The texts that put start-up values back behind a prepared `text` that may have reset some: of the settings that it names,
/// or of all that are not there but the client's `own`. Without `session`, its settings end with the transaction.
#[must_use]
pub fn behind(text: &[u8], startup: &Profile, own: &[Box<str>], tag: &str, session: bool) -> Vec<Vec<u8>> {
    let resets = sql::resets(text);
    if let Some(Resets { all, statements: 1, .. }) = &resets
        && let [reset] = &**all
        && let Some(sets) = sets(&reset.what, startup, tag)
    {
        return sets;
    }
    let mut absent = Vec::new();
    if session {
        restore(startup, own, tag, &mut absent);
    }
    if absent.is_empty() { Vec::new() } else { vec![absent] }
}

/// Whether something in a text may reset more than what was found of it.
fn has_more(resets: &Resets, text: &[u8]) -> bool {
    let is_reset = |part: &[u8]| may_reset(part) && sql::scan(part).has(EffectSet::SETTINGS.union(EffectSet::OPAQUE));
    resets.rest.iter().any(|range| is_reset(text.get(range.clone()).unwrap_or_default()))
        || resets.all.iter().any(|reset| reset.what == What::Discard)
}

/// The statements that set what was reset. None if it cannot be done like this.
fn sets(what: &What, startup: &Profile, tag: &str) -> Option<Vec<Vec<u8>>> {
    let restored = |name: &str| !is_role(name) && !STAY.contains(&name);
    match what {
        What::All | What::Discard => startup
            .entries()
            .iter()
            .filter(|(name, _)| restored(name))
            .map(|(name, _)| set(name, false, startup, tag))
            .collect(),
        What::One { name, .. } if !restored(name) || startup.get(name).is_none() => Some(Vec::new()),
        What::One { name, local } => Some(vec![set(name, *local, startup, tag)?]),
        What::Null { .. } => None,
    }
}

/// A statement that gives a setting its start-up value.
fn set(name: &str, local: bool, startup: &Profile, tag: &str) -> Option<Vec<u8>> {
    let value = value(startup, name, tag)?;
    let mut out = Vec::new();
    if LISTS.contains(&name) {
        out.extend_from_slice(b"SELECT pg_catalog.set_config(");
        literal(&mut out, name.as_bytes());
        out.push(b',');
        out.extend_from_slice(&value);
        out.extend_from_slice(if local { b",true)" } else { b",false)" });
        return Some(out);
    }
    out.extend_from_slice(if local { b"SET LOCAL \"" } else { b"SET \"" });
    out.extend_from_slice(name.replace('"', "\"\"").as_bytes());
    out.extend_from_slice(b"\" TO ");
    out.extend_from_slice(&value);
    Some(out)
}

/// A start-up value as a literal. None if there is none, or if it is too long.
fn value(startup: &Profile, name: &str, tag: &str) -> Option<Vec<u8>> {
    let value = startup.get(name).filter(|value| value.len() <= VALUE_MAX && !is_role(name))?;
    let mut out = Vec::new();
    if name == APPLICATION_NAME {
        literal(&mut out, &tagged(value, tag));
    } else {
        literal(&mut out, value);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::super::Profiles;
    use super::*;

    fn startup(all: &[(&str, &str)]) -> std::rc::Rc<Profile> {
        Profiles::default().intern(all.iter().map(|(name, value)| ((*name).into(), value.as_bytes().into())))
    }

    const BEGAN: [(&str, &str); 4] =
        [("work_mem", "1MB"), ("search_path", "a, b"), ("app.x", "it's"), ("role", "somebody")];

    #[test]
    fn behind_each_reset_the_start_up_value_is_set() {
        const PATH: &str = "SELECT pg_catalog.set_config(E'search_path',E'a, b',false)";
        let all = |front: &str, back: &str| {
            format!("{front}SET \"app.x\" TO E'it''s'{back}{front}{PATH}{back}{front}SET \"work_mem\" TO E'1MB'{back}")
        };
        #[rustfmt::skip]
        let table: [(&str, Option<String>, &[usize], bool); 16] = [
            ("RESET work_mem",                    Some("RESET work_mem\n;SET \"work_mem\" TO E'1MB'".into()), &[1], false),
            ("RESET work_mem -- back",            Some("RESET work_mem -- back\n;SET \"work_mem\" TO E'1MB'".into()), &[1], false),
            ("SELECT 1; RESET work_mem; SELECT 2", Some("SELECT 1; RESET work_mem;SET \"work_mem\" TO E'1MB'; SELECT 2".into()), &[2], false),
            ("RESET ALL; RESET Work_Mem",         Some(format!("RESET ALL;{} RESET Work_Mem\n;SET \"work_mem\" TO E'1MB'", all("", ";"))), &[1, 2, 3, 5], false),
            ("RESET ALL",                         Some(format!("RESET ALL{}", all("\n;", ""))), &[1, 2, 3], false),
            ("RESET search_path;",                Some(format!("RESET search_path;{PATH};")), &[1], false),
            ("SET app.x = DEFAULT",               Some("SET app.x = DEFAULT\n;SET \"app.x\" TO E'it''s'".into()), &[1], false),
            ("SELECT 1; SET LOCAL work_mem TO DEFAULT", Some("SELECT 1; SET LOCAL work_mem TO DEFAULT\n;SET LOCAL \"work_mem\" TO E'1MB'".into()), &[2], false),
            ("SELECT set_config('app.x', NULL, false)", Some("SELECT set_config('app.x', E'it''s', false)".into()), &[], false),
            ("SELECT set_config('search_path', NULL, true), 1", Some("SELECT set_config('search_path', E'a, b', true), 1".into()), &[], false),
            ("RESET work_mem; DO 'BEGIN RESET ALL; END'", Some("RESET work_mem;SET \"work_mem\" TO E'1MB'; DO 'BEGIN RESET ALL; END'".into()), &[1], true),
            ("SET LOCAL work_mem TO DEFAULT",     None, &[], false),
            ("RESET timezone",                    None, &[], false),
            ("RESET ROLE",                        None, &[], false),
            ("DISCARD ALL",                       None, &[], false),
            ("RESET work_mem; SELECT 'open",      None, &[], false),
        ];
        let startup = startup(&BEGAN);
        for (text, want, ours, more) in table {
            let got = splice(text.as_bytes(), &startup, "", false, false);
            assert_eq!(got.as_ref().map(|spliced| String::from_utf8(spliced.text.clone()).unwrap()), want, "{text}");
            if let Some(spliced) = got {
                assert_eq!((&*spliced.splice.ours, spliced.more), (ours, more), "{text}");
            }
        }
        let inside = splice(b"SET LOCAL work_mem TO DEFAULT", &startup, "", true, false);
        assert!(inside.unwrap().text.ends_with(b"\n;SET LOCAL \"work_mem\" TO E'1MB'"));
        let many = "RESET ALL;".repeat(1000);
        assert!(splice(many.as_bytes(), &startup, "", false, false).is_none(), "too many");
    }

    #[test]
    fn a_position_is_that_in_the_clients_own_text() {
        // Each character that is the client's, told by where the server finds it.
        let text = "SELECT 'é'; RESET work_mem; SELECT set_config('app.x', NULL, false), 'ü'; RESET ALL; SELECT x";
        let spliced =
            splice(text.as_bytes(), &startup(&[("app.x", "größe"), ("work_mem", "1MB")]), "", false, false).unwrap();
        let sent = String::from_utf8(spliced.text).unwrap();
        let find = |text: &str, part: &str| text.chars().count() - text[text.find(part).unwrap()..].chars().count() + 1;
        for part in ["SELECT 'é'", "RESET work", "SELECT set", "false), 'ü'", "RESET ALL", "SELECT x", "x"] {
            assert_eq!(spliced.splice.position(find(&sent, part)), find(text, part), "{part}");
        }
        assert_eq!(spliced.splice.position(find(&sent, "SET \"work_mem")), find(text, " SELECT set"), "ours");
        assert_eq!(spliced.splice.position(find(&sent, "größe")), find(text, "NULL"), "ours, in its place");
        let at = find(&sent, "SELECT x");
        let body = |at: usize| format!("SERROR\0C42601\0Mno P7\0P{at}\0Fscan.l\0\0").into_bytes();
        assert_eq!(spliced.splice.shift(&body(at)), Some(body(find(text, "SELECT x"))));
        for same in [body(1), b"SERROR\0\0".to_vec(), b"P".to_vec(), b"Px\0\0".to_vec(), b"".to_vec()] {
            assert_eq!(spliced.splice.shift(&same), None);
        }
    }

    #[test]
    fn behind_a_prepared_text_stands_what_it_reset() {
        let startup = startup(&BEGAN);
        let text = |text: &str, session| {
            let texts = behind(text.as_bytes(), &startup, &[], "", session).into_iter();
            texts.map(|text| String::from_utf8(text).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(text("RESET work_mem", true), ["SET \"work_mem\" TO E'1MB'"]);
        assert_eq!(text("SET LOCAL work_mem TO DEFAULT;", false), ["SET LOCAL \"work_mem\" TO E'1MB'"]);
        assert_eq!(text("DISCARD ALL", true).len(), 3);
        assert!(text("RESET timezone", true).is_empty());
        assert!(text("SELECT set_config($1, NULL, false)", true)[0].contains("AS startup"));
        assert!(text("SELECT set_config($1, NULL, true)", false).is_empty());
        let filled = |text: &str| filled(text.as_bytes(), &startup, "").map(|text| String::from_utf8(text).unwrap());
        assert_eq!(
            filled("SELECT set_config('work_mem', NULL, $1)").as_deref(),
            Some("SELECT set_config('work_mem', E'1MB', $1)")
        );
        assert_eq!(filled("SELECT set_config('timezone', NULL, $1)"), None);
    }
}
