//! What the body of a function may do to the session of whoever calls it.

use super::effects::EffectSet;
use super::frozen::is_frozen;
use super::lexer::{Backslash, Doubt, Lexer, Token};
use super::{custom_names, statement};

/// Whether `text`, one command that begins with `CREATE`, `ALTER` or the like, may change what a name leads to. An index
/// does by an expression or a condition, and nobody else sees what is temporary.
#[must_use]
pub fn defines(text: &[u8]) -> bool {
    const NOTHING: [&[u8]; 13] = [
        b"temp",
        b"temporary",
        b"sequence",
        b"role",
        b"user",
        b"group",
        b"database",
        b"system",
        b"tablespace",
        b"statistics",
        b"publication",
        b"subscription",
        b"collation",
    ];
    let mut lexer = Lexer::new(text, Backslash::Plain);
    if lexer.token().is_none() {
        return false;
    }
    for word in [&b"or"[..], b"replace", b"global", b"local", b"unique"] {
        lexer.take_word(word);
    }
    match lexer.token() {
        Some(Token::Word(word)) if word.eq_ignore_ascii_case(b"index") => {
            let mut opened = 0;
            while let Some(token) = lexer.token() {
                match token {
                    Token::Mark(b'(') => opened += 1,
                    Token::Mark(b';') => break,
                    Token::Word(word) if word.eq_ignore_ascii_case(b"where") => return true,
                    _ => {}
                }
            }
            opened > 1
        }
        Some(Token::Word(word)) => {
            let _ = lexer.take_word(b"if") && lexer.take_word(b"not") && lexer.take_word(b"exists");
            let temporary = matches!(lexer.token(), Some(Token::Word(schema)) if is_temporary(schema));
            !temporary && !NOTHING.iter().any(|nothing| word.eq_ignore_ascii_case(nothing))
        }
        _ => true,
    }
}

/// Whether a schema is one of temporary objects.
fn is_temporary(schema: &[u8]) -> bool {
    schema.to_ascii_lowercase().starts_with(b"pg_temp")
}

/// Whether `text`, wherever in it, has a command that [`defines`] something.
#[must_use]
pub fn mentions_definition(text: &[u8]) -> bool {
    let joins = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    [&b"create"[..], b"alter", b"import"].iter().any(|word| {
        text.windows(word.len()).enumerate().any(|(at, part)| {
            part.eq_ignore_ascii_case(word)
                && !joins(at.checked_sub(1).and_then(|before| text.get(before)))
                && !joins(text.get(at + word.len()))
                && defines(text.get(at..).unwrap_or_default())
        })
    })
}

/// Whether `text`, wherever in it, may change what sessions begin with: by an `ALTER ROLE` (or `USER`, `DATABASE`) that sets or
/// resets something.
#[must_use]
pub fn changes_defaults(text: &[u8]) -> bool {
    const OF: [&[u8]; 3] = [b"role", b"user", b"database"];
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let (mut begins, mut is_of) = (false, false);
    while let Some(token) = lexer.token() {
        let Token::Word(word) = token else {
            // A name in quotes is somebody's, another mark ends the command.
            is_of &= !matches!(token, Token::Mark(b';'));
            begins = false;
            continue;
        };
        if is_of && [&b"set"[..], b"reset"].iter().any(|wanted| word.eq_ignore_ascii_case(wanted)) {
            return true;
        }
        is_of |= begins && OF.iter().any(|of| word.eq_ignore_ascii_case(of));
        begins = word.eq_ignore_ascii_case(b"alter");
    }
    false
}

/// Languages whose functions share variables for as long as a session lasts.
const LANGUAGES: [&[u8]; 4] = [b"plperl", b"plpython", b"pltcl", b"plv8"];

/// Whether `text`, wherever in it, names a function that does what only the end of the session undoes ([`lasts`]): it seeds
/// `random()`, above all. Or it names a language in which a `DO` may do it.
#[must_use]
pub fn mentions_seed(text: &[u8]) -> bool {
    let mentions = |name: &[u8]| text.windows(name.len()).any(|here| here.eq_ignore_ascii_case(name));
    mentions(b"setseed")
        || LASTS.iter().any(|name| mentions(name.as_bytes()))
        || LANGUAGES.iter().any(|name| mentions(name))
}

/// Built-in functions that leave behind what only the end of the session undoes, and no audit sees: an origin of replication,
/// temporary replication slots, a backup that was begun.
pub(crate) const LASTS: [&str; 7] = [
    "pg_backup_start",
    "pg_copy_logical_replication_slot",
    "pg_copy_physical_replication_slot",
    "pg_create_logical_replication_slot",
    "pg_create_physical_replication_slot",
    "pg_replication_origin_session_setup",
    "pg_start_backup",
];

/// Whether a function of this name is one of these.
#[must_use]
pub fn lasts(name: &[u8]) -> bool {
    LASTS.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()))
}

/// Whether a function of this name takes or gives back advisory locks.
fn is_advisory(name: &[u8]) -> bool {
    name.windows(8).any(|part| part.eq_ignore_ascii_case(b"advisory"))
}

/// What a body does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Body {
    /// Effects that outlive the call: [`EffectSet::SUSPECT`], with [`EffectSet::OPAQUE`] if it runs SQL that it makes, and
    /// [`EffectSet::CUSTOM`] too if it sets a setting whose name it makes, with [`EffectSet::DDL`] if it [`defines`]
    /// something; [`EffectSet::LOAD`]; [`EffectSet::XACT_LOCK`]; sequence functions that it calls; [`EffectSet::LOCAL`] if texts
    /// may mean something else for the rest of its caller's transaction.
    pub set: EffectSet,
    /// The custom settings that it sets, as far as it spells them out.
    pub names: Vec<Box<str>>,
}

/// What of a statement's effects leaves something behind.
const LEAVES: EffectSet = EffectSet::SETTINGS
    .union(EffectSet::ROLE)
    .union(EffectSet::LISTEN)
    .union(EffectSet::UNLISTEN)
    .union(EffectSet::TEMP)
    .union(EffectSet::ADVISORY_LOCK)
    .union(EffectSet::HOLD_CURSOR)
    .union(EffectSet::PREPARE)
    .union(EffectSet::DISCARD)
    .union(EffectSet::LOAD);

/// The commands that do.
const COMMANDS: &[&[u8]] = &[b"set", b"reset", b"listen", b"unlisten", b"load", b"discard", b"prepare", b"deallocate"];

/// Reads the body of a function in SQL or PL/pgSQL. It errs on one side, like [`scan`](super::scan): a body may do less.
#[must_use]
pub fn body(text: &[u8]) -> Body {
    const UNREAD: EffectSet = EffectSet::ROLE.union(EffectSet::CUSTOM).union(EffectSet::OPAQUE);
    let mut names = Vec::new();
    let reading = statement::read(text, Backslash::Plain, Some(&mut names));
    let mut body = Body::default();
    if reading.set.intersects(LEAVES) {
        body.set |= EffectSet::SUSPECT;
    }
    if reading.set.contains(UNREAD) || reading.lists {
        body.set |= EffectSet::OPAQUE | EffectSet::CUSTOM;
    }
    for one in [EffectSet::LOAD, EffectSet::SEQUENCE, EffectSet::CURRVAL] {
        if reading.set.contains(one) {
            body.set |= one;
        }
    }
    if reading.by_values || reading.is_made {
        // It may be the seed, or lead to the schema of temporary objects.
        body.set |= EffectSet::SUSPECT | EffectSet::OPAQUE;
    }
    if reading.means_else {
        body.set |= EffectSet::LOCAL;
    }
    if reading.doubt != Doubt::None || memchr::memchr(b'\\', text).is_some() {
        // Its quotes may be others than they seem.
        body.set |= commands(text, Backslash::Escape, &mut body.names);
    }
    body.set |= commands(text, Backslash::Plain, &mut body.names);
    body.names.extend(names.into_iter().map(Into::into));
    body.names.sort_unstable();
    body.names.dedup();
    body
}

/// The commands of a body, each behind a word or mark that a statement may begin after.
fn commands(text: &[u8], backslash: Backslash, names: &mut Vec<Box<str>>) -> EffectSet {
    let mut lexer = Lexer::new(text, backslash);
    let mut set = EffectSet::NONE;
    let (mut begins, mut spells) = (true, false);
    loop {
        let here = lexer;
        let Some(token) = lexer.token() else {
            // What it runs may be what it spells.
            let defines = spells && set.contains(EffectSet::OPAQUE);
            return if defines { set | EffectSet::DDL } else { set };
        };
        let began = std::mem::replace(&mut begins, matches!(token, Token::Mark(b';' | b'>')));
        match token {
            Token::Word(word) => {
                let is = |known: &[u8]| word.eq_ignore_ascii_case(known);
                let any = |known: &[&[u8]]| known.iter().any(|known| word.eq_ignore_ascii_case(known));
                begins = any(&[b"begin", b"then", b"else", b"loop", b"atomic"]);
                if is_advisory(word) {
                    set |= EffectSet::XACT_LOCK;
                } else if lasts(word) {
                    set |= EffectSet::SUSPECT | EffectSet::LOAD;
                }
                if is(b"execute") && !(lexer.take_word(b"function") || lexer.take_word(b"procedure")) {
                    set |= EffectSet::SUSPECT | EffectSet::OPAQUE;
                } else if any(&[b"temp", b"temporary", b"hold"]) || is_temporary(word) {
                    set |= EffectSet::SUSPECT;
                } else if began && any(&[b"create", b"alter", b"import"]) {
                    if defines(here.rest()) {
                        set |= EffectSet::SUSPECT | EffectSet::DDL;
                    }
                } else if began && is(b"do") {
                    set |= EffectSet::SUSPECT | EffectSet::OPAQUE;
                } else if began && any(COMMANDS) {
                    let command = statement::read(here.rest(), backslash, None).set;
                    let local = is(b"set") && !command.intersects(LEAVES);
                    if local {
                        if command.intersects(EffectSet::LOCAL) && means_else(here) {
                            set |= EffectSet::LOCAL;
                        }
                    } else {
                        set |= EffectSet::SUSPECT;
                        if command.intersects(EffectSet::LOAD) {
                            set |= EffectSet::LOAD;
                        }
                        names.extend(first_name(here.rest()));
                    }
                }
            }
            Token::Quoted(name) if name.starts_with(b"pg_temp") => set |= EffectSet::SUSPECT,
            Token::Quoted(name) if is_advisory(name) => set |= EffectSet::XACT_LOCK,
            Token::Quoted(name) if lasts(name) => set |= EffectSet::SUSPECT | EffectSet::LOAD,
            Token::Text { body, .. } => {
                spells |= mentions_definition(body);
                names.extend(custom_names(body).map(|name| Box::from(&*name)));
                if mentions_seed(body) {
                    set |= EffectSet::SUSPECT | EffectSet::LOAD;
                }
                if body.windows(7).any(|name| name.eq_ignore_ascii_case(b"pg_temp")) {
                    set |= EffectSet::SUSPECT;
                }
            }
            _ => {}
        }
    }
}

/// Whether the `SET LOCAL` at `lexer` makes a text mean something else, by any of the names that such a setting has there.
fn means_else(mut lexer: Lexer<'_>) -> bool {
    const NAMES: [&[u8]; 5] = [b"names", b"schema", b"session", b"time", b"xml"];
    lexer.token();
    lexer.take_word(b"local");
    let named = match lexer.token() {
        Some(Token::Word(name)) => is_frozen(name) || NAMES.iter().any(|known| name.eq_ignore_ascii_case(known)),
        Some(Token::Quoted(name)) => is_frozen(name),
        _ => true,
    };
    named && !lexer.take_mark(b'.')
}

/// The custom setting of the command that `rest` begins with.
fn first_name(rest: &[u8]) -> Option<Box<str>> {
    let end = memchr::memchr(b';', rest).unwrap_or(rest.len());
    custom_names(rest.get(..end)?).next().map(|name| Box::from(&*name))
}

/// The custom settings that the bodies in the strings of `text` set: of a `DO`, above all.
#[must_use]
pub fn hidden_names(text: &[u8]) -> Vec<Box<str>> {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let mut names = Vec::new();
    while let Some(token) = lexer.token() {
        if let Token::Text { body: inner, .. } = token {
            names.append(&mut body(inner).names);
            if memchr::memmem::find(inner, b"''").is_some() {
                names.append(&mut body(&halved(inner)).names);
            }
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// What is between quotes, each doubled quote in it made one.
fn halved(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter().peekable();
    while let Some(byte) = rest.next() {
        out.push(*byte);
        if *byte == b'\'' {
            rest.next_if_eq(&&b'\'');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_told_by_what_they_leave_behind() {
        const NONE: EffectSet = EffectSet::NONE;
        const SUSPECT: EffectSet = EffectSet::SUSPECT;
        const LOCAL: EffectSet = EffectSet::LOCAL;
        const RUNS: EffectSet = SUSPECT.union(EffectSet::OPAQUE);
        const NAMES: EffectSet = RUNS.union(EffectSet::CUSTOM);
        const CURRVAL: EffectSet = EffectSet::SEQUENCE.union(EffectSet::CURRVAL);
        const SEEDS: EffectSet = SUSPECT.union(EffectSet::LOAD);
        const LOCKS: EffectSet = SUSPECT.union(EffectSet::XACT_LOCK);
        const DEFINES: EffectSet = SUSPECT.union(EffectSet::DDL);
        #[rustfmt::skip]
        let table: [(&str, EffectSet, &str); 54] = [
            ("SELECT 1",                                                                NONE,     ""),
            ("BEGIN RETURN $1 + 1; END",                                                NONE,     ""),
            ("BEGIN UPDATE t SET a = 1; INSERT INTO t VALUES (1) ON CONFLICT DO UPDATE SET b = 2; END", NONE, ""),
            ("BEGIN NEW.changed := now(); RETURN NEW; END",                             NONE,     ""),
            ("BEGIN SET LOCAL app.x = 'a'; SET CONSTRAINTS ALL DEFERRED; END",          NONE,     ""),
            ("BEGIN PERFORM set_config('app.x', 'a', true); END",                       NONE,     ""),
            ("BEGIN SET LOCAL work_mem = '1MB'; SET LOCAL time.zone = 'x'; END",        NONE,     ""),
            ("BEGIN PERFORM set_config('work_mem', v, true); END",                      NONE,     ""),
            ("BEGIN PERFORM set_config('TimeZone', 'Asia/Tokyo', true); END",           LOCAL,    ""),
            ("BEGIN PERFORM set_config(n, v, true); END",                               LOCAL.union(RUNS), ""),
            ("SELECT set_config($1, $2, true)",                                         LOCAL.union(RUNS), ""),
            ("BEGIN PERFORM set_config('app.' || n, v, true); END",                     NONE,     ""),
            ("BEGIN PERFORM set_config('search_path', 'x', true); END",                 LOCAL,    ""),
            ("BEGIN PERFORM set_config('search_path', v, true); END",                   LOCAL.union(SUSPECT), ""),
            ("BEGIN IF a THEN SET LOCAL search_path = x; END IF; END",                  LOCAL,    ""),
            ("SET LOCAL TIME ZONE 'Asia/Tokyo'; SELECT 1",                              LOCAL,    ""),
            ("BEGIN SET LOCAL ROLE x; END",                                             LOCAL,    ""),
            ("BEGIN SET LOCAL \"role\" = x; END",                                       LOCAL,    ""),
            ("BEGIN SET LOCAL XML OPTION DOCUMENT; END",                                LOCAL,    ""),
            ("BEGIN PERFORM set_config('TimeZone', v, false); END",                     SUSPECT,  ""),
            ("BEGIN PERFORM set_config('app.x', $1, false); END",                       SUSPECT,  "app.x"),
            ("BEGIN PERFORM set_config('work_mem', '4MB', false); END",                 SUSPECT,  ""),
            ("BEGIN PERFORM set_config(name, v, false); END",                           NAMES,    ""),
            ("BEGIN SET app.Y = 'a'; END",                                              SUSPECT,  "app.y"),
            ("BEGIN IF a THEN SET work_mem = 1; END IF; END",                           SUSPECT,  ""),
            ("<<l>> BEGIN LOOP RESET ALL; END LOOP; END",                               SUSPECT,  ""),
            ("BEGIN LISTEN c; END",                                                     SUSPECT,  ""),
            ("BEGIN UNLISTEN c; END",                                                   SUSPECT,  ""),
            ("SET work_mem = 1; SELECT 1",                                              SUSPECT,  ""),
            ("BEGIN CREATE TEMP TABLE x (a int); END",                                  SUSPECT,  ""),
            ("BEGIN CREATE TABLE pg_temp.x (a int); END",                               SUSPECT,  ""),
            ("BEGIN PERFORM pg_advisory_lock(1); END",                                  LOCKS,    ""),
            ("BEGIN PERFORM pg_advisory_xact_lock(1); END",                             EffectSet::XACT_LOCK, ""),
            ("BEGIN PERFORM \"pg_try_advisory_xact_lock\"(1); END",                     EffectSet::XACT_LOCK, ""),
            ("BEGIN PERFORM pg_replication_origin_session_setup('x'); END",             SEEDS,    ""),
            ("SELECT \"pg_backup_start\"('x')",                                         SEEDS,    ""),
            ("DECLARE q text := 'SELECT pg_create_physical_replication_slot(1)'; BEGIN END", SEEDS, ""),
            ("BEGIN EXECUTE 'SET app.z = ''x'''; END",                                  RUNS,     "app.z"),
            ("BEGIN RETURN QUERY EXECUTE q; END",                                       RUNS,     ""),
            ("BEGIN CREATE TRIGGER x BEFORE INSERT ON t EXECUTE FUNCTION f(); END",     DEFINES,  ""),
            ("BEGIN -- SET work_mem = 1;\n RETURN 'SET ROLE x; LISTEN c'; END",         NONE,     ""),
            ("BEGIN PERFORM setseed(0.5); END",                                         SEEDS,    ""),
            ("SET LOCAL seed = 0.5; SELECT 1",                                          SEEDS,    ""),
            ("BEGIN LOAD 'x'; END",                                                     SEEDS,    ""),
            ("BEGIN EXECUTE 'SELECT setseed(0.5)'; END",                                RUNS.union(SEEDS), ""),
            ("BEGIN RETURN currval('s'); END",                                          CURRVAL,  ""),
            ("BEGIN RETURN nextval('s'); END",                                          EffectSet::SEQUENCE, ""),
            ("BEGIN CREATE TABLE x (a int DEFAULT f()); END",                           DEFINES,  ""),
            ("BEGIN CREATE INDEX ON t (a); CREATE SEQUENCE s; END",                     NONE,     ""),
            ("BEGIN CREATE UNIQUE INDEX ON t (f(a)); END",                              DEFINES,  ""),
            ("BEGIN EXECUTE format('CREATE TABLE %s (a int)', n); END",                 DEFINES.union(RUNS), ""),
            ("BEGIN EXECUTE 'create temp table x (a int)'; END",                        RUNS,     ""),
            ("BEGIN EXECUTE 'SELECT created_at, recreate FROM t'; END",                 RUNS,     ""),
            ("BEGIN DO $x$ BEGIN END $x$; END",                                         RUNS,     ""),
        ];
        for (text, set, names) in table {
            let got = body(text.as_bytes());
            assert_eq!((got.set, &*got.names.join(" ")), (set, names), "{text}");
        }
    }

    #[test]
    fn names_are_found_in_strings_whose_quotes_are_doubled() {
        #[rustfmt::skip]
        let table: [(&str, &str); 4] = [
            ("DO 'BEGIN PERFORM set_config(''app.x'', ''one'', false); END'", "app.x"),
            ("DO $$ BEGIN PERFORM set_config('app.x', '', false); END $$",    "app.x"),
            ("SELECT hush('SET app.x = ''one''')",                            "app.x"),
            ("SELECT 'it''s'",                                                ""),
        ];
        for (text, want) in table {
            assert_eq!(hidden_names(text.as_bytes()).join(" "), want, "{text}");
        }
    }

    #[test]
    fn commands_are_told_by_whether_a_name_may_lead_elsewhere_after_them() {
        #[rustfmt::skip]
        let table: [(&str, bool); 16] = [
            ("CREATE FUNCTION f() ...",                            true),
            ("CREATE OR REPLACE VIEW v AS SELECT 1",               true),
            ("CREATE TABLE t (a int)",                             true),
            ("CREATE TABLE IF NOT EXISTS t (a int)",               true),
            ("CREATE TABLE IF NOT EXISTS pg_temp.t (a int)",       false),
            ("/* x */ create temp table t (a int)",                false),
            ("CREATE OR REPLACE TEMPORARY VIEW v AS SELECT 1",     false),
            ("CREATE INDEX i ON t (a, b)",                         false),
            ("CREATE UNIQUE INDEX CONCURRENTLY i ON t (lower(a))", true),
            ("CREATE INDEX i ON t (a) WHERE f(b)",                 true),
            ("CREATE ROLE r",                                      false),
            ("ALTER TABLE t ENABLE TRIGGER x",                     true),
            ("ALTER SYSTEM SET work_mem = '1MB'",                  false),
            ("ALTER USER u SET app.x = 'y'",                       false),
            ("EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1",         true),
            ("CREATE \"x\"",                                       true),
        ];
        for (text, want) in table {
            assert_eq!(defines(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn what_may_change_what_sessions_begin_with_is_told_by_the_words() {
        #[rustfmt::skip]
        let table = [
            ("ALTER ROLE r SET work_mem = '1MB'",                    true),
            ("alter user \"set\" in database d reset all",           true),
            ("ALTER ROLE ALL RESET x",                               true),
            ("SELECT 1; ALTER /* it */ DATABASE d SET x TO DEFAULT", true),
            ("ALTER ROLE \"a;b\" SET x = 1",                         true),
            ("ALTER ROLE r CONNECTION LIMIT 5",                      false),
            ("ALTER ROLE \"set\" PASSWORD 'set'",                    false),
            ("ALTER ROLE r LOGIN; SET x = 1",                        false),
            ("ALTER TABLE role SET (fillfactor = 50)",               false),
            ("ALTER SYSTEM SET x = 1",                               false),
            ("CREATE ROLE r; RESET x",                               false),
        ];
        for (text, want) in table {
            assert_eq!(changes_defaults(text.as_bytes()), want, "{text}");
        }
    }
}
