//! Texts in which settings go back to where their client began, and not to where the server connection did.
//!
//! Behind each reset of a start-up setting stands a SET of ours, which takes no snapshot, so that a SET TRANSACTION may follow.
//! The value in the place of the NULL of a `set_config` is that of the start. The answers to what is ours are not the client's, and the positions in errors are made those of its own text. Where a SET
//! might fail and a reset would not, or where anything else is in doubt, the text stays as it is.

mod puts;

use pgweir_proto::backend::TxStatus;

use puts::Puts;
pub use puts::filled;

use super::{APPLICATION_NAME, NAME_MAX, Profile, RISKY, is_role, literal, may_reset, tagged};
use crate::sql::{self, EffectSet, Reset, Resets, What};

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

/// What everybody may set, and nothing refuses that it has taken before: a RESET ALL asks nobody.
///
/// Source: `PostgreSQL` 17, `PGC_USERSET` in `guc_tables.c`.
const FREE: [&str; 28] = [
    "application_name",
    "array_nulls",
    "bytea_output",
    "client_min_messages",
    "constraint_exclusion",
    "cpu_tuple_cost",
    "datestyle",
    "default_statistics_target",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "effective_cache_size",
    "extra_float_digits",
    "geqo",
    "idle_in_transaction_session_timeout",
    "intervalstyle",
    "jit",
    "lock_timeout",
    "maintenance_work_mem",
    "plan_cache_mode",
    "quote_all_identifiers",
    "random_page_cost",
    "row_security",
    "search_path",
    "seq_page_cost",
    "synchronous_commit",
    "timezone",
    "work_mem",
];

/// What a snapshot must not stand in front of: the words of what has its own, or waits for others.
const BEFORE_SNAPSHOT: [&[u8]; 4] = [b"begin", b"start", b"transaction", b"lock"];

/// Resets in one text.
const RESETS_MAX: usize = 16;

/// Bytes that a text may grow by.
const GROWTH_MAX: usize = 64 * 1024;

/// The longest value; bytes. One row of ours tells it.
const VALUE_MAX: usize = 1024;

/// A text for the server, and what tells its answers from those that the client is owed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// The answers: how many have come.
    done: usize,
    /// Those that are ours, counted from 0.
    ours: Vec<usize>,
    cuts: Vec<Cut>,
}

/// Where the server's text has more, or something else.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cut {
    /// Characters of the server's text in front of what is ours.
    at: usize,
    /// Characters of it.
    put: usize,
    /// Characters of the client's text that it replaces.
    gone: usize,
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
    /// Bytes it takes.
    #[must_use]
    pub const fn size(&self) -> usize {
        size_of::<Self>() + self.ours.len() * size_of::<usize>() + self.cuts.len() * size_of::<Cut>()
    }

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
        let (mut put, mut gone) = (0, 0);
        for cut in self.cuts.iter().take_while(|cut| cut.at < position) {
            if position <= cut.at + cut.put {
                return (cut.at + 1 + gone).saturating_sub(put);
            }
            put += cut.put;
            gone += cut.gone;
        }
        (position + gone).saturating_sub(put)
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

/// What the server is to get in place of a simple query of a client that began with `startup`, in a transaction or not, as
/// `status` tells. None if it is to get the text itself: nothing in it goes back to a start-up value that the rest of it could
/// find, or something is not certain.
///
/// What the text ends with goes back behind it: the server commits before it says that its last statement is done, and that has
/// to be the client's own. Nothing is committed behind a reset that is alone in a transaction.
#[must_use]
pub fn splice(text: &[u8], startup: &Profile, tag: &str, status: TxStatus) -> Option<Spliced> {
    // A position counts characters.
    if !text.is_ascii() || !is_plain(startup) {
        return None;
    }
    let resets = sql::resets(text)?;
    if resets.all.len() > RESETS_MAX || resets.all.iter().any(|reset| !is_short(&reset.what)) {
        return None;
    }
    let is_alone = resets.statements == 1 && status == TxStatus::Open;
    let takes_snapshot = status == TxStatus::Idle && !spells(text, &BEFORE_SNAPSHOT);
    let (mut out, mut at) = (Vec::new(), 0);
    let (mut ours, mut cuts) = (Vec::new(), Vec::new());
    let mut puts = Puts::of(text, None, startup, tag);
    let mut more = has_more(&resets, text, &puts);
    for reset in &resets.all {
        if reset.nth == resets.statements && !is_alone || !is_startup(&reset.what, startup) {
            more = true;
            continue;
        }
        puts.write(text, reset.place, &mut at, &mut out, &mut cuts)?;
        out.extend_from_slice(text.get(at..reset.place)?);
        at = reset.place;
        let cut = out.len();
        for set in sets(&reset.what, startup, tag, takes_snapshot)? {
            ours.push(reset.nth + ours.len());
            put(reset, &set, &mut out);
        }
        cuts.push(Cut { at: cut, put: out.len() - cut, gone: 0 });
        if out.len() > at + GROWTH_MAX {
            return None;
        }
    }
    puts.write(text, text.len(), &mut at, &mut out, &mut cuts)?;
    out.extend_from_slice(text.get(at..)?);
    if out.len() > text.len() + GROWTH_MAX {
        return None;
    }
    let splice = Splice { done: 0, ours, cuts };
    (!splice.cuts.is_empty()).then_some(Spliced { text: out, splice, more })
}

/// A statement of ours behind that of a reset.
fn put(reset: &Reset, set: &[u8], out: &mut Vec<u8>) {
    let parts: [&[u8]; 3] = if reset.ended { [b"", set, b";"] } else { [b"\n;", set, b""] };
    out.extend(parts.iter().copied().flatten());
}

/// Whether what a client began with means the same in each encoding, and is not cut.
fn is_plain(startup: &Profile) -> bool {
    let is_plain = |name: &str, value: &[u8]| {
        name.len() <= NAME_MAX && name.is_ascii() && value.len() <= VALUE_MAX && value.is_ascii()
    };
    startup.entries().iter().all(|(name, value)| is_plain(name, value))
}

/// Whether its name is not cut.
fn is_short(what: &What) -> bool {
    if let What::One { name, .. } = what { name.len() <= NAME_MAX } else { true }
}

/// Whether it is certain which of the start-up settings are reset: not by another name, and as nothing but settings.
fn is_startup(what: &What, startup: &Profile) -> bool {
    match what {
        What::All => true,
        What::Discard => false,
        What::One { name, .. } => startup.get(name).is_some() && !is_role(name) && !STAY.contains(&&**name),
    }
}

fn spells(text: &[u8], words: &[&[u8]]) -> bool {
    words.iter().any(|word| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word)))
}

/// The statements that set what an Execute of a prepared `text` has reset, if that is all that the text does, and is certain.
#[must_use]
pub fn behind(text: &[u8], startup: &Profile, tag: &str) -> Option<Vec<Vec<u8>>> {
    if !text.is_ascii() || !is_plain(startup) {
        return None;
    }
    let Resets { all, statements: 1, .. } = sql::resets(text)? else { return None };
    let [reset] = &*all else { return None };
    if !is_short(&reset.what) || !is_startup(&reset.what, startup) {
        return None;
    }
    sets(&reset.what, startup, tag, false)
}

/// Whether something in a text may reset more than what was found of it.
fn has_more(resets: &Resets, text: &[u8], puts: &Puts) -> bool {
    let is_reset = |part: &[u8]| may_reset(part) && sql::scan(part).has(EffectSet::SETTINGS.union(EffectSet::OPAQUE));
    resets.rest.iter().any(|range| is_reset(&puts.filled(text, range.clone())))
}

/// The statements that set what was reset. None if one of them might fail where the reset does not, or takes a snapshot where
/// there must be none.
fn sets(what: &What, startup: &Profile, tag: &str, takes_snapshot: bool) -> Option<Vec<Vec<u8>>> {
    let names: Vec<&str> = match what {
        What::All => startup.names().filter(|name| !STAY.contains(name)).collect(),
        What::One { name, .. } => vec![&**name],
        What::Discard => return None,
    };
    let local = matches!(what, What::One { local: true, .. });
    let is_safe = |name: &str| if *what == What::All { FREE.contains(&name) } else { !RISKY.contains(&name) };
    let set = |name: &str| {
        (is_safe(name) && (takes_snapshot || !LISTS.contains(&name))).then_some(())?;
        set(name, local, startup, tag)
    };
    names.into_iter().map(set).collect()
}

/// A statement that gives a setting its start-up value.
fn set(name: &str, local: bool, startup: &Profile, tag: &str) -> Option<Vec<u8>> {
    let value = startup.get(name)?;
    let mut given = Vec::new();
    if name == APPLICATION_NAME {
        literal(&mut given, &tagged(value, tag));
    } else {
        literal(&mut given, value);
    }
    let mut out = Vec::new();
    if LISTS.contains(&name) {
        out.extend_from_slice(b"SELECT pg_catalog.set_config(");
        literal(&mut out, name.as_bytes());
        out.push(b',');
        out.extend_from_slice(&given);
        out.extend_from_slice(if local { b",true)" } else { b",false)" });
        return Some(out);
    }
    out.extend_from_slice(if local { b"SET LOCAL \"" } else { b"SET \"" });
    out.extend_from_slice(name.replace('"', "\"\"").as_bytes());
    out.extend_from_slice(b"\" TO ");
    out.extend_from_slice(&given);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::super::Profiles;
    use super::*;

    pub(super) fn startup(all: &[(&str, &str)]) -> std::rc::Rc<Profile> {
        Profiles::default().intern(all.iter().map(|(name, value)| ((*name).into(), value.as_bytes().into())))
    }

    const BEGAN: [(&str, &str); 2] = [("search_path", "a, b"), ("work_mem", "1MB")];

    const MEM: &str = "SET \"work_mem\" TO E'1MB'";

    /// With what it is and whether more is to follow, if it is another.
    fn spliced(text: &str, startup: &[(&str, &str)], status: TxStatus) -> Option<(String, bool)> {
        let spliced = splice(text.as_bytes(), &self::startup(startup), "", status)?;
        Some((String::from_utf8(spliced.text).unwrap(), spliced.more))
    }

    #[test]
    fn behind_each_reset_the_start_up_value_is_set() {
        const PATH: &str = "SELECT pg_catalog.set_config(E'search_path',E'a, b',false)";
        #[rustfmt::skip]
        let table: [(&str, Option<String>, &[usize], bool); 15] = [
            ("SELECT 1; RESET work_mem; SELECT 2", Some(format!("SELECT 1; RESET work_mem;{MEM}; SELECT 2")), &[2], false),
            ("RESET work_mem; RESET ALL; SELECT 1", Some(format!("RESET work_mem;{MEM}; RESET ALL;{PATH};{MEM}; SELECT 1")), &[1, 3, 4], false),
            ("RESET search_path; SELECT 1",       Some(format!("RESET search_path;{PATH}; SELECT 1")), &[1], false),
            ("SET LOCAL work_mem TO DEFAULT; SELECT 1", Some("SET LOCAL work_mem TO DEFAULT;SET LOCAL \"work_mem\" TO E'1MB'; SELECT 1".into()), &[1], false),
            ("RESET work_mem; DO 'BEGIN RESET ALL; END'", Some(format!("RESET work_mem;{MEM}; DO 'BEGIN RESET ALL; END'")), &[1], true),
            // By another name, or the last.
            ("RESET work_mem; RESET sort_mem; SELECT 1", Some(format!("RESET work_mem;{MEM}; RESET sort_mem; SELECT 1")), &[1], true),
            ("RESET work_mem; RESET work_mem",    Some(format!("RESET work_mem;{MEM}; RESET work_mem")), &[1], true),
            ("RESET work_mem; SELECT set_config('work_mem', $1, false) -- null", Some(format!("RESET work_mem;{MEM}; SELECT set_config('work_mem', $1, false) -- null")), &[1], true),
            ("SELECT 1; RESET work_mem",          None, &[], false),
            ("RESET work_mem;",                   None, &[], false),
            ("RESET timezone; SELECT 1",          None, &[], false),
            ("RESET ROLE; SELECT 1",              None, &[], false),
            ("DISCARD ALL",                       None, &[], false),
            ("SELECT set_config('timezone', NULL, false); SELECT 1", None, &[], false),
            ("RESET work_mem; SELECT 'open",      None, &[], false),
        ];
        let startup = startup(&BEGAN);
        for (text, want, ours, more) in table {
            let got = splice(text.as_bytes(), &startup, "", TxStatus::Idle);
            assert_eq!(got.as_ref().map(|spliced| String::from_utf8(spliced.text.clone()).unwrap()), want, "{text}");
            if let Some(spliced) = got {
                assert_eq!((&*spliced.splice.ours, spliced.more), (ours, more), "{text}");
            }
        }
    }

    #[test]
    fn in_the_place_of_null_stands_the_start_up_value() {
        let of = |text: &str| spliced(text, &BEGAN, TxStatus::Idle);
        let set = |value: &str| format!("SELECT set_config('work_mem', {value}, false)");
        let (null, value) = (set("NULL"), set("E'1MB'"));
        assert_eq!(of(&null), Some((value.clone(), false)));
        assert_eq!(of(&format!("{null}; RESET timezone")), Some((format!("{value}; RESET timezone"), true)));
        let want = format!("{value}; RESET work_mem;{MEM}; {value};;{value}");
        let got =
            splice(format!("{null}; RESET work_mem; {null};;{null}").as_bytes(), &startup(&BEGAN), "", TxStatus::Open)
                .unwrap();
        assert_eq!((String::from_utf8(got.text).unwrap(), &*got.splice.ours, got.more), (want, &[2][..], false));
        // What else may go back.
        let beside =
            |value: &str| format!("SELECT set_config('work_mem', {value}, false), set_config($1, NULL, false)");
        assert_eq!(of(&beside("NULL")), Some((beside("E'1MB'"), true)));
        assert_eq!(of(&format!("{null}; RESET ALL")), Some((format!("{value}; RESET ALL"), true)));
    }

    #[test]
    fn the_last_is_followed_only_where_it_is_alone_in_a_transaction() {
        let of = |text, status| spliced(text, &BEGAN, status);
        assert_eq!(of("RESET work_mem", TxStatus::Open), Some((format!("RESET work_mem\n;{MEM}"), false)));
        assert_eq!(of("RESET work_mem;", TxStatus::Open), Some((format!("RESET work_mem;{MEM};"), false)));
        for status in [TxStatus::Idle, TxStatus::Failed] {
            assert_eq!(of("RESET work_mem", status), None);
        }
        assert_eq!(of("SELECT 1; RESET work_mem", TxStatus::Open), None);
        assert!(of("ROLLBACK; RESET work_mem; SELECT 1", TxStatus::Failed).is_some());
    }

    #[test]
    fn what_might_fail_or_take_a_snapshot_is_left_alone() {
        let of = |text, startup: &[(&str, &str)]| spliced(text, startup, TxStatus::Idle).is_some();
        let (all, one) = ("RESET ALL; SELECT 1", "RESET work_mem; SELECT 1");
        assert!(of(all, &BEGAN) && of(one, &BEGAN));
        // Rights, objects, libraries.
        for name in ["log_statement", "default_tablespace", "app.x", "role", "client_encoding"] {
            assert!(!of(all, &[BEGAN[1], (name, "x")]), "{name}");
            assert!(of(one, &[BEGAN[1], (name, "x")]), "{name}");
        }
        assert!(!of("RESET statement_timeout; SELECT 1", &[("statement_timeout", "1")]));
        // A snapshot.
        for text in
            ["BEGIN; RESET search_path; COMMIT", "RESET search_path; set Transaction READ ONLY", "RESET ALL; LOCK t"]
        {
            assert!(!of(text, &BEGAN), "{text}");
        }
        assert_eq!(spliced("RESET search_path; SELECT 1", &BEGAN, TxStatus::Open), None);
        // Bytes, and names that are cut.
        let long = "a".repeat(64);
        assert!(!of("RESET work_mem; SELECT '\u{e9}'", &BEGAN));
        assert!(!of(one, &[BEGAN[1], ("app.x", "\u{e9}")]));
        assert!(!of(one, &[BEGAN[1], (&long, "x")]));
        assert!(!of(&format!("RESET {long}; {one}"), &BEGAN));
    }

    #[test]
    fn a_text_grows_by_a_bounded_number_of_values() {
        let many = |count| format!("{}SELECT 1", "RESET work_mem;".repeat(count));
        assert!(spliced(&many(RESETS_MAX), &BEGAN, TxStatus::Idle).is_some());
        assert!(spliced(&many(RESETS_MAX + 1), &BEGAN, TxStatus::Idle).is_none());
        let long = "x".repeat(VALUE_MAX);
        let startup: Vec<(&str, &str)> = FREE.map(|name| (name, &*long)).to_vec();
        let all = |count| format!("{}SELECT 1", "RESET ALL;".repeat(count));
        assert!(spliced(&all(1), &startup, TxStatus::Idle).is_some());
        assert!(spliced(&all(3), &startup, TxStatus::Idle).is_none());
        assert!(spliced("RESET jit; SELECT 1", &[("jit", &format!("{long}x"))], TxStatus::Idle).is_none());
    }

    #[test]
    fn a_position_is_that_in_the_clients_own_text() {
        // Each character that is the client's, told by where the server finds it.
        let text = "SELECT 'e'; RESET work_mem; SELECT 'u'; RESET ALL; SELECT x";
        let spliced = splice(text.as_bytes(), &startup(&BEGAN), "", TxStatus::Idle).unwrap();
        let sent = String::from_utf8(spliced.text).unwrap();
        let find = |text: &str, part: &str| text.find(part).unwrap() + 1;
        for part in ["SELECT 'e'", "RESET work", "SELECT 'u'", "RESET ALL", "SELECT x", "x"] {
            assert_eq!(spliced.splice.position(find(&sent, part)), find(text, part), "{part}");
        }
        assert_eq!(spliced.splice.position(find(&sent, "SET \"work_mem")), find(text, " SELECT 'u'"), "ours");
        let at = find(&sent, "SELECT x");
        let text = "SELECT set_config('work_mem', NULL, x); RESET work_mem; SELECT y, set_config('work_mem', NULL, z)";
        let both = splice(text.as_bytes(), &startup(&[("work_mem", "16384kB")]), "", TxStatus::Idle).unwrap();
        let both_sent = String::from_utf8(both.text).unwrap();
        for part in ["NULL, x", "x)", "RESET", "y,", "NULL, z", "z)"] {
            assert_eq!(
                both.splice.position(find(&both_sent, &part.replace("NULL", "E'16384kB'"))),
                find(text, part),
                "{part}"
            );
        }
        let text = "SELECT 'e'; RESET work_mem; SELECT 'u'; RESET ALL; SELECT x";
        let body = |at: usize| format!("SERROR\0C42601\0Mno P7\0P{at}\0Fscan.l\0\0").into_bytes();
        assert_eq!(spliced.splice.shift(&body(at)), Some(body(find(text, "SELECT x"))));
        for same in [body(1), b"SERROR\0\0".to_vec(), b"P".to_vec(), b"Px\0\0".to_vec(), b"".to_vec()] {
            assert_eq!(spliced.splice.shift(&same), None);
        }
    }

    #[test]
    fn behind_a_prepared_text_stands_what_it_reset_if_that_is_all() {
        let text = |text: &str, startup: &[(&str, &str)]| {
            let texts = behind(text.as_bytes(), &self::startup(startup), "")?;
            Some(texts.into_iter().map(|text| String::from_utf8(text).unwrap()).collect::<Vec<_>>())
        };
        let mem = &BEGAN[1..];
        assert_eq!(text("RESET work_mem", &BEGAN), Some(vec![MEM.to_owned()]));
        assert_eq!(text("RESET ALL", mem), Some(vec![MEM.to_owned()]));
        let local = "SET LOCAL \"work_mem\" TO E'1MB'".to_owned();
        assert_eq!(text("SET LOCAL work_mem TO DEFAULT;", &BEGAN), Some(vec![local]));
        for other in [
            "RESET ALL",
            "RESET search_path",
            "RESET timezone",
            "RESET sort_mem",
            "DISCARD ALL",
            "SELECT 1",
            "SELECT set_config('work_mem', NULL, false)",
            "COPY t FROM STDIN",
        ] {
            assert_eq!(text(other, &BEGAN), None, "{other}");
        }
        assert_eq!(text("RESET ALL", &[BEGAN[1], ("app.x", "y")]), None);
    }
}
