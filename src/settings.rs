//! A client's settings as a value: interned, compared by pointer, replayed as a difference.
//!
//! Every client has a [`Profile`], every server connection knows which one is applied to it. Lending
//! a connection whose profile is another one sends the difference first. A profile is plain data
//! ([`Profile::entries`]), so that a session can be written out and read back.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use hashbrown::HashMap;
/// A setting's name (lower case) and value, as `set_config` takes them.
pub type Entry = (Box<str>, Box<[u8]>);

/// The names that the parser freezes into a prepared statement: a statement parsed under other values
/// is another statement. Source: measured, and `PostgreSQL` 17 docs, PREPARE, "Notes".
const FROZEN: [&str; 13] = [
    "array_nulls",
    "backslash_quote",
    "client_encoding",
    "datestyle",
    "intervalstyle",
    "lc_monetary",
    "role",
    "search_path",
    "session_authorization",
    "standard_conforming_strings",
    "timezone",
    "transform_null_equals",
    "xmloption",
];

/// What a server reports and no session can set: it is so for whoever has a connection to it. The follower that is promoted
/// tells `in_hot_standby`; the others change with the server.
///
/// Source: `PostgreSQL` 18 docs, §54.2.7 "Asynchronous Operations".
const FIXED: [&str; 4] = [IN_HOT_STANDBY, "integer_datetimes", "server_encoding", "server_version"];

/// The longest value of these that is heeded; bytes. Postgres' are shorter.
const FIXED_VALUE_MAX: usize = 256;

/// The one that tells a follower (`on`) from a primary. A server reports once that it became a primary, in the next answer of each
/// connection.
pub const IN_HOT_STANDBY: &str = "in_hot_standby";

/// Whether no session can set this.
#[must_use]
pub fn is_fixed(name: &str) -> bool {
    FIXED.contains(&name)
}

/// What a server connection has reported of what no session can set, at its login and since.
///
/// Connections of one pool may differ in it for a while: Postgres tells of a promotion in its next answer, each of them in its
/// own. A client is told what is different before it gets an answer of another one.
#[derive(Debug)]
pub struct Base {
    id: u32,
    /// At most one for each name there is.
    values: Vec<Entry>,
}

impl Base {
    /// The value of one of them.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.values.iter().find(|(known, _)| **known == *name).map(|(_, value)| &**value)
    }

    /// Whether it has this already.
    #[must_use]
    pub fn says(&self, name: &[u8], value: &[u8]) -> bool {
        self.values.iter().any(|(known, told)| known.as_bytes() == name && **told == *value)
    }

    /// What a client has to be told that was told of `other`.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a Entry> {
        self.values.iter().filter(|(name, value)| other.get(name) != Some(value))
    }
}

/// What a server connection has reported, and is not in its base yet.
#[derive(Debug, Default)]
pub struct News(Vec<Entry>);

impl News {
    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A setting was reported. True if that concerns all clients, whatever it was the answer to.
    pub fn note(&mut self, name: &[u8], value: &[u8]) -> bool {
        let Some(name) = FIXED.into_iter().find(|fixed| fixed.as_bytes() == name) else { return false };
        if value.len() > FIXED_VALUE_MAX {
            return false;
        }
        self.0.retain(|(known, _)| **known != *name);
        self.0.push((name.into(), value.into()));
        true
    }
}

/// A set of session settings that differ from what a fresh server connection of the pool has.
#[derive(Debug)]
pub struct Profile {
    /// What it is set on top of.
    base: Rc<Base>,
    entries: Vec<Entry>,
    /// Equal for profiles that agree in every frozen setting.
    parse_key: u32,
    /// What the server reported when this profile was applied for a login: names and values in its own
    /// spelling. None until then.
    reported: RefCell<Option<Rc<[Entry]>>>,
}

impl Profile {
    /// What holds where it sets nothing.
    #[must_use]
    #[inline]
    pub const fn base(&self) -> &Rc<Base> {
        &self.base
    }

    fn plain(base: Rc<Base>) -> Self {
        Self { base, entries: Vec::new(), parse_key: 0, reported: RefCell::new(Some(Rc::from([]))) }
    }

    /// The settings, sorted by name.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The settings' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(name, _)| &**name)
    }

    /// Equal for profiles under which a statement's text means the same.
    #[must_use]
    pub const fn parse_key(&self) -> u32 {
        self.parse_key
    }

    /// What the server reported when the profile was applied to a plain connection. None: it never was, and
    /// may be refused.
    #[must_use]
    pub fn reported(&self) -> Option<Rc<[Entry]>> {
        self.reported.borrow().clone()
    }

    /// The profile was applied to a plain connection, and the server reported `values` meanwhile.
    pub fn prove(&self, values: Vec<Entry>) {
        *self.reported.borrow_mut() = Some(values.into());
    }

    /// Whether putting it on, or taking it off, may fail, or change what follows if it does: then nothing may be sent
    /// behind a replay before that is known to have worked.
    ///
    /// It does so with a role (as the login role a statement would do something else), with bytes that depend on
    /// `client_encoding`, and with a `statement_timeout` that may hit the replay itself.
    #[must_use]
    pub fn is_risky(&self) -> bool {
        let risky = |name: &str, value: &[u8]| is_role(name) || name == "statement_timeout" || !value.is_ascii();
        self.entries.iter().any(|(name, value)| risky(name, value))
    }

    /// The value of a setting (name in lower case), if it is in the profile.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        let at = self.entries.binary_search_by(|(entry, _)| (**entry).cmp(name)).ok()?;
        self.entries.get(at).map(|(_, value)| &**value)
    }
}

/// The profiles of one pool.
#[derive(Debug)]
pub struct Profiles {
    /// The plain one on the base that was learnt last.
    plain: RefCell<Rc<Profile>>,
    bases: RefCell<Vec<Weak<Base>>>,
    next_base: Cell<u32>,
    /// By the base and the settings.
    known: RefCell<HashMap<(u32, Vec<Entry>), Weak<Profile>, foldhash::fast::RandomState>>,
    parse_keys: RefCell<HashMap<Vec<Entry>, u32, foldhash::fast::RandomState>>,
    next_key: Cell<u32>,
}

/// Above this many remembered profiles those that no one uses are forgotten.
const SWEEP_AT: usize = 1024;

impl Default for Profiles {
    fn default() -> Self {
        // Nothing is known of any server yet.
        let base = Rc::new(Base { id: 0, values: Vec::new() });
        let plain = Rc::new(Profile::plain(base));
        Self {
            known: RefCell::new(std::iter::once(((0, Vec::new()), Rc::downgrade(&plain))).collect()),
            plain: RefCell::new(plain),
            bases: RefCell::default(),
            next_base: Cell::new(1),
            parse_keys: RefCell::default(),
            next_key: Cell::new(1),
        }
    }
}

impl Profiles {
    /// The profile of a client that set nothing, on the newest base.
    #[must_use]
    pub fn plain(&self) -> Rc<Profile> {
        self.plain.borrow().clone()
    }

    /// The one profile with these entries on the newest base; of equal names the last wins.
    pub fn intern(&self, entries: impl IntoIterator<Item = Entry>) -> Rc<Profile> {
        let base = self.plain.borrow().base.clone();
        self.intern_on(&base, entries)
    }

    /// What a fresh server connection has reported, as its base, which is the newest from now on.
    pub fn learn(&self, parameters: &[Entry]) -> Rc<Base> {
        let is_kept = |(name, value): &&Entry| is_fixed(name) && value.len() <= FIXED_VALUE_MAX;
        self.intern_base(parameters.iter().filter(is_kept).cloned().collect())
    }

    /// What `base` has become by what its connection has reported; it is the newest from now on.
    pub fn relearn(&self, base: &Base, News(news): News) -> Rc<Base> {
        let mut values = base.values.clone();
        for (name, value) in news {
            values.retain(|(known, _)| *known != name);
            values.push((name, value));
        }
        self.intern_base(values)
    }

    fn intern_base(&self, mut values: Vec<Entry>) -> Rc<Base> {
        values.sort_unstable();
        let newest = self.plain.borrow().base.clone();
        if newest.values == values {
            return newest;
        }
        let mut bases = self.bases.borrow_mut();
        bases.retain(|base| base.strong_count() > 0);
        let known = bases.iter().filter_map(Weak::upgrade).find(|base| base.values == values);
        let base = known.unwrap_or_else(|| {
            let id = self.next_base.replace(self.next_base.get().wrapping_add(1));
            let base = Rc::new(Base { id, values });
            bases.push(Rc::downgrade(&base));
            base
        });
        drop(bases);
        *self.plain.borrow_mut() = self.intern_on(&base, []);
        base
    }

    /// The same settings on another base.
    pub fn rebased(&self, profile: &Profile, base: &Rc<Base>) -> Rc<Profile> {
        let rebased = self.intern_on(base, profile.entries.iter().cloned());
        if let (None, Some(reported)) = (rebased.reported(), profile.reported()) {
            // How the server spells them has nothing to do with the base.
            *rebased.reported.borrow_mut() = Some(reported);
        }
        rebased
    }

    /// The one profile with these entries on this base; of equal names the last wins.
    pub fn intern_on(&self, base: &Rc<Base>, entries: impl IntoIterator<Item = Entry>) -> Rc<Profile> {
        let mut sorted: Vec<Entry> = Vec::new();
        for entry in entries {
            match sorted.binary_search_by(|(name, _)| name.cmp(&entry.0)) {
                Ok(at) => {
                    if let Some(slot) = sorted.get_mut(at) {
                        *slot = entry;
                    }
                }
                Err(at) => sorted.insert(at, entry),
            }
        }
        let key = (base.id, sorted);
        if let Some(known) = self.known.borrow().get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let entries = key.1.clone();
        let profile = if entries.is_empty() {
            Rc::new(Profile::plain(base.clone()))
        } else {
            let parse_key = self.parse_key(&entries);
            Rc::new(Profile { base: base.clone(), entries, parse_key, reported: RefCell::default() })
        };
        let mut known = self.known.borrow_mut();
        if known.len() >= SWEEP_AT {
            known.retain(|_, weak| weak.strong_count() > 0);
        }
        known.insert(key, Rc::downgrade(&profile));
        profile
    }

    /// A parse key that no profile has: for statements parsed while a setting's value is not known.
    pub fn private_key(&self) -> u32 {
        let key = self.next_key.get();
        self.next_key.set(key.wrapping_add(1).max(1));
        key
    }

    fn parse_key(&self, entries: &[Entry]) -> u32 {
        let frozen: Vec<Entry> = entries.iter().filter(|(name, _)| FROZEN.contains(&&**name)).cloned().collect();
        if frozen.is_empty() {
            return 0;
        }
        let mut keys = self.parse_keys.borrow_mut();
        if keys.len() >= SWEEP_AT {
            // Forgotten keys are never given again: equal settings merely stop sharing statements.
            keys.clear();
        }
        *keys.entry(frozen).or_insert_with(|| self.private_key())
    }
}

/// The setting that says whose a connection is.
pub const APPLICATION_NAME: &str = "application_name";

/// So many bytes of it Postgres keeps.
const NAME_MAX: usize = 63;

/// A client's `application_name` with the `tag` of the server connection behind it, cut so that both fit. Without a tag it
/// is the client's.
///
/// Postgres keeps printable ASCII alone: since 16 it spells what is not in four bytes each, which would cut the tag off.
#[must_use]
pub fn tagged(name: &[u8], tag: &str) -> Vec<u8> {
    if tag.is_empty() {
        return name.to_vec();
    }
    let mut out: Vec<u8> = Vec::with_capacity(NAME_MAX);
    let room = NAME_MAX.saturating_sub(tag.len() + 1).min(name.len());
    // Not in the middle of a character.
    let is_start = |at: &usize| name.get(*at).is_none_or(|byte| byte & 0xc0 != 0x80);
    let end = (0..=room).rev().find(is_start).unwrap_or(0);
    let printable = |byte: &u8| if matches!(byte, b' '..=b'~') { *byte } else { b'?' };
    out.extend(name.get(..end).unwrap_or_default().iter().map(printable));
    if !out.is_empty() {
        out.push(b' ');
    }
    out.extend_from_slice(tag.as_bytes());
    out
}

/// Hands to `send` the texts of the simple queries that turn a connection with the settings `from` into one with the
/// settings `to`: none if they agree; two if `client_encoding` changes, which is how the rest is read. The `tag` of the
/// connection stays in its name.
///
/// The order is: leave role and session authorization, settings as the login role, then session
/// authorization, then role; a failure undoes all of it, because one simple query is one transaction.
pub fn replay(from: &Profile, to: &Profile, tag: &str, mut send: impl FnMut(&[u8])) {
    const ENCODING: &str = "client_encoding";
    if std::ptr::eq(from, to) {
        return;
    }
    let mut out = Vec::new();
    for (name, command) in [("role", "RESET ROLE;"), ("session_authorization", "RESET SESSION AUTHORIZATION;")] {
        if from.get(name).is_some() {
            out.extend_from_slice(command.as_bytes());
        }
    }
    let change = |out: &mut Vec<u8>, name: &str| match (from.get(name), to.get(name)) {
        (Some(_), None) => reset(out, name),
        (old, Some(new)) if old != Some(new) && name == APPLICATION_NAME => set(out, name, &tagged(new, tag)),
        (old, Some(new)) if old != Some(new) => set(out, name, new),
        _ => {}
    };
    if from.get(ENCODING) != to.get(ENCODING) {
        change(&mut out, ENCODING);
        send(&out);
        out.clear();
    }
    let names = from.entries.iter().filter(|(name, _)| to.get(name).is_none()).chain(&to.entries);
    for (name, _) in names.filter(|(name, _)| !is_role(name) && **name != *ENCODING) {
        change(&mut out, name);
    }
    for (name, command) in [("session_authorization", "SET SESSION AUTHORIZATION "), ("role", "SET ROLE ")] {
        if let Some(value) = to.get(name) {
            out.extend_from_slice(command.as_bytes());
            literal(&mut out, value);
            out.push(b';');
        }
    }
    if !out.is_empty() {
        send(&out);
    }
}

/// Whether a text that may change settings may put some back to where they were at the start: only such a text has to be
/// followed by [`restore`].
#[must_use]
pub fn may_reset(text: &[u8]) -> bool {
    const WORDS: [&[u8]; 5] = [b"reset", b"discard", b"default", b"local", b"null"];
    WORDS.iter().any(|word| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word)))
}

/// Whether a text gives the custom setting `name` a value, or takes it, where no word follows that may reset it: an empty
/// value is the client's own then, and not what a reset has left.
///
/// The server does not tell the two apart. Nor can the text for certain (a comment, a quoted name): then the value is taken
/// for reset, as most empty ones are.
#[must_use]
pub fn is_set_last(text: &[u8], name: &str) -> bool {
    let name = name.as_bytes();
    let at = text.windows(name.len()).rposition(|part| part.eq_ignore_ascii_case(name));
    let Some((front, rest)) = at.and_then(|at| text.split_at_checked(at)) else { return false };
    let begin = front.iter().rposition(|byte| *byte == b';').map_or(0, |at| at + 1);
    !may_reset(front.get(begin..).unwrap_or_default()) && !may_reset(rest)
}

/// Appends a query that gives those settings of `startup` their values that the session has not: what a `RESET`, a
/// `DISCARD ALL`, a `SET .. TO DEFAULT` has put back to the server's own defaults. Whatever else the text did that stands before
/// it, and wherever it failed: what the session still has is left alone, and so are the settings `own`. Nothing if there are
/// none. The `tag` of the connection stays in its name.
pub fn restore(startup: &Profile, own: &[Box<str>], tag: &str, out: &mut Vec<u8>) {
    let mut any = false;
    let entries = startup.entries().iter().filter(|(name, _)| !is_role(name) && !own.contains(name));
    for (name, value) in entries {
        let front: &[u8] = if any { b",(" } else { b"SELECT pg_catalog.set_config(name,value,false)FROM(VALUES(" };
        any = true;
        out.extend_from_slice(front);
        literal(out, name.as_bytes());
        out.push(b',');
        if **name == *APPLICATION_NAME {
            literal(out, &tagged(value, tag));
        } else {
            literal(out, value);
        }
        out.push(b')');
    }
    if any {
        out.extend_from_slice(ABSENT);
    }
}

/// The settings that the session has not: the catalog tells, but for custom ones.
const ABSENT: &[u8] = b")AS startup(name,value)WHERE CASE WHEN pg_catalog.strpos(name,'.')OPERATOR(pg_catalog.>)0 \
    THEN pg_catalog.current_setting(name,true)IS NULL OR pg_catalog.current_setting(name,true)OPERATOR(pg_catalog.=)'' \
    ELSE NOT EXISTS(SELECT FROM pg_catalog.pg_settings AS now WHERE pg_catalog.lower(now.name)OPERATOR(pg_catalog.=)startup.name \
    AND now.source OPERATOR(pg_catalog.=)'session')END";

/// A query that makes `value` the `application_name`.
#[must_use]
pub fn name(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    set(&mut out, APPLICATION_NAME, value);
    out
}

fn reset(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"RESET ");
    identifier(out, name);
    out.push(b';');
}

fn set(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(b"SELECT pg_catalog.set_config(");
    literal(out, name.as_bytes());
    out.push(b',');
    literal(out, value);
    out.extend_from_slice(b",false);");
}

fn is_role(name: &str) -> bool {
    matches!(name, "role" | "session_authorization")
}

/// Appends a literal that reads the same whatever `standard_conforming_strings` says.
fn literal(out: &mut Vec<u8>, value: &[u8]) {
    out.extend_from_slice(b"E'");
    for byte in value {
        if matches!(byte, b'\'' | b'\\') {
            out.push(*byte);
        }
        out.push(*byte);
    }
    out.push(b'\'');
}

/// Appends a possibly dotted setting's name, each part quoted.
fn identifier(out: &mut Vec<u8>, name: &str) {
    for (n, part) in name.split('.').enumerate() {
        if n > 0 {
            out.push(b'.');
        }
        out.push(b'"');
        for byte in part.bytes() {
            if byte == b'"' {
                out.push(b'"');
            }
            out.push(byte);
        }
        out.push(b'"');
    }
}

/// Reads the startup parameter `options`: `-c name=value`, `-cname=value` and `--name=value`, a backslash
/// keeping the next character.
///
/// # Errors
///
/// The argument that is none of these.
///
/// Source: `PostgreSQL` 17 docs, §34.1.2 "options" and §20.1.4 "Parameter Interaction via the Shell".
pub fn parse_options(text: &[u8]) -> Result<Vec<Entry>, String> {
    let mut entries = Vec::new();
    let mut words = split_words(text).into_iter();
    while let Some(word) = words.next() {
        let setting = if word == b"-c" {
            words.next().unwrap_or_default()
        } else if let Some(rest) = word.strip_prefix(b"--").or_else(|| word.strip_prefix(b"-c")) {
            rest.to_vec()
        } else {
            return Err(String::from_utf8_lossy(&word).into_owned());
        };
        let Some(at) = memchr::memchr(b'=', &setting) else {
            return Err(String::from_utf8_lossy(&setting).into_owned());
        };
        let (name, value) = setting.split_at(at);
        entries.push((setting_name(name).replace('-', "_").into(), value.get(1..).unwrap_or_default().into()));
    }
    Ok(entries)
}

/// A setting's name as a key: Postgres folds its ASCII letters.
#[must_use]
pub fn setting_name(name: &[u8]) -> String {
    String::from_utf8_lossy(name).to_ascii_lowercase()
}

fn split_words(text: &[u8]) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => words.extend(word.take()),
            b'\\' => word.get_or_insert_default().extend(bytes.next()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(all: &[(&str, &str)]) -> Vec<Entry> {
        all.iter().map(|(n, v)| ((*n).into(), v.as_bytes().into())).collect()
    }

    fn text(profiles: &Profiles, from: &[(&str, &str)], to: &[(&str, &str)]) -> String {
        let mut texts = Vec::new();
        let send = |text: &[u8]| texts.push(String::from_utf8(text.to_vec()).unwrap());
        replay(&profiles.intern(entries(from)), &profiles.intern(entries(to)), "", send);
        texts.join(" | ")
    }

    #[test]
    fn only_the_difference_is_replayed_and_roles_come_last() {
        let profiles = Profiles::default();
        #[rustfmt::skip]
        let table: [(&str, &[(&str, &str)], &[(&str, &str)], &str); 7] = [
            ("same",     &[("a", "1")],    &[("a", "1")], ""),
            ("new",      &[],              &[("a", "1")], "SELECT pg_catalog.set_config(E'a',E'1',false);"),
            ("gone",     &[("a.b", "1")],  &[],           r#"RESET "a"."b";"#),
            ("changed",  &[("a", "1")],    &[("a", "2")], "SELECT pg_catalog.set_config(E'a',E'2',false);"),
            ("quoting",  &[],              &[("search_path", r#""$user", o'c\d"#)],
                r#"SELECT pg_catalog.set_config(E'search_path',E'"$user", o''c\\d',false);"#),
            ("encoding", &[("a", "1")],    &[("client_encoding", "LATIN1"), ("b", "1")],
                r#"SELECT pg_catalog.set_config(E'client_encoding',E'LATIN1',false); | RESET "a";SELECT pg_catalog.set_config(E'b',E'1',false);"#),
            ("role",     &[("role", "x")], &[("a", "1"), ("role", "y"), ("session_authorization", "z")],
                "RESET ROLE;SELECT pg_catalog.set_config(E'a',E'1',false);SET SESSION AUTHORIZATION E'z';SET ROLE E'y';"),
        ];
        for (name, from, to, want) in table {
            assert_eq!(text(&profiles, from, to), want, "{name}");
        }
    }

    #[test]
    fn a_tag_stays_behind_every_name_and_both_fit() {
        let tag = "[pgweir web.1/ab12cd#7]";
        let long = "x".repeat(70);
        let cut = format!("{} {tag}", "x".repeat(NAME_MAX - 1 - tag.len()));
        let accents = "é".repeat(20);
        let cut_accents = format!("{} {tag}", "?".repeat((NAME_MAX - 1 - tag.len()) / 2 * 2));
        #[rustfmt::skip]
        let table: [(&str, &str, &str); 6] = [
            ("",       tag, tag),
            ("app",    tag, "app [pgweir web.1/ab12cd#7]"),
            (&long,    tag, &cut),
            (&accents, tag, &cut_accents),
            ("a\nb",   tag, "a?b [pgweir web.1/ab12cd#7]"),
            ("größe",  "",  "größe"),
        ];
        for (name, tag, want) in table {
            assert_eq!(String::from_utf8(tagged(name.as_bytes(), tag)).unwrap(), want, "{name}");
        }
        let mut out = Vec::new();
        let profile = Profiles::default().intern(entries(&[("application_name", "app"), ("timezone", "UTC")]));
        restore(&profile, &[], tag, &mut out);
        assert!(String::from_utf8(out).unwrap().contains("(E'application_name',E'app [pgweir web.1/ab12cd#7]')"));
    }

    #[test]
    fn what_may_reset_is_told_by_a_word() {
        #[rustfmt::skip]
        let table = [
            ("RESET ALL",                        true),
            ("SELECT 1; discard all ;\n",        true),
            ("SET /* x */ app.x TO DEFAULT",     true),
            ("SET TIME ZONE LOCAL",              true),
            ("SELECT set_config('a', NULL, $1)", true),
            ("SET timezone TO 'UTC'",            false),
            ("SELECT set_config('a', 'b', $1)",  false),
            ("",                                 false),
        ];
        for (text, want) in table {
            assert_eq!(may_reset(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn an_empty_custom_setting_is_the_clients_own_if_nothing_behind_it_may_reset_it() {
        #[rustfmt::skip]
        let table = [
            ("SET app.mine = ''",                           true),
            ("RESET ALL; SET App.Mine TO ''",               true),
            ("SELECT set_config('app.mine', '', false)",    true),
            ("SET app.mine = ''; RESET ALL",                false),
            ("RESET app.mine",                              false),
            ("SET app.mine TO DEFAULT; SELECT 1",           false),
            ("SELECT set_config('app.mine', NULL, false)",  false),
            ("RESET \"app\".\"mine\"",                      false),
            ("DISCARD ALL",                                 false),
            ("",                                            false),
        ];
        for (text, want) in table {
            assert_eq!(is_set_last(text.as_bytes(), "app.mine"), want, "{text}");
        }
    }

    #[test]
    fn start_up_values_are_restored_all_but_roles() {
        let profiles = Profiles::default();
        let text = |all: &[(&str, &str)]| {
            let mut out = Vec::new();
            restore(&profiles.intern(entries(all)), &["own.a".into()], "", &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(text(&[]), "");
        assert_eq!(text(&[("role", "x")]), "");
        assert_eq!(text(&[("own.a", "x")]), "");
        let got = text(&[("a", "1"), ("b.c", "it's"), ("own.a", "1"), ("role", "x")]);
        assert!(got.contains("(VALUES(E'a',E'1'),(E'b.c',E'it''s'))AS startup"), "{got}");
    }

    #[test]
    fn equal_settings_are_one_profile() {
        let profiles = Profiles::default();
        let one = profiles.intern(entries(&[("b", "1"), ("a", "2"), ("b", "3")]));
        let two = profiles.intern(entries(&[("a", "2"), ("b", "3")]));
        assert!(Rc::ptr_eq(&one, &two));
        assert!(Rc::ptr_eq(&profiles.intern([]), &profiles.plain()));
        assert_eq!(one.parse_key(), 0);
        assert_ne!(profiles.intern(entries(&[("timezone", "UTC")])).parse_key(), 0);
    }

    #[test]
    fn what_no_session_can_set_makes_profiles_differ_and_nothing_else_does() {
        let profiles = Profiles::default();
        let told = |standby: &str, zone: &str| entries(&[("TimeZone", zone), ("in_hot_standby", standby)]);
        let on = profiles.learn(&told("on", "UTC"));
        assert!(Rc::ptr_eq(&on, &profiles.learn(&told("on", "CET"))));
        let old = (profiles.plain(), profiles.intern(entries(&[("a", "1")])));
        old.1.prove(entries(&[("a", "one")]));
        // Reports of what clients can set are nobody's news, nor is what no server would say.
        let mut news = News::default();
        assert!(!news.note(b"TimeZone", b"CET") && !news.note(b"in_hot_standby", &[b'x'; FIXED_VALUE_MAX + 1]));
        assert!(news.is_empty());
        for value in ["off", "on", "off"] {
            assert!(news.note(b"in_hot_standby", value.as_bytes()));
        }
        let off = profiles.relearn(&on, news);
        assert!(!Rc::ptr_eq(&on, &off) && Rc::ptr_eq(&off, profiles.plain().base()));
        assert!(
            !Rc::ptr_eq(&profiles.plain(), &old.0) && !Rc::ptr_eq(&profiles.intern(entries(&[("a", "1")])), &old.1)
        );
        assert_eq!(off.differing(&on).cloned().collect::<Vec<_>>(), entries(&[("in_hot_standby", "off")]));
        assert_eq!(off.differing(&off).count(), 0);
        // What is known of a profile goes along.
        let moved = profiles.rebased(&old.1, &off);
        assert!(Rc::ptr_eq(&moved, &profiles.intern(entries(&[("a", "1")]))));
        assert_eq!(moved.reported().unwrap().to_vec(), entries(&[("a", "one")]));
        assert_eq!(moved.parse_key(), old.1.parse_key());
        assert!(Rc::ptr_eq(&profiles.rebased(&old.0, &off), &profiles.plain()));
        // A connection that has not heard of it yet, say.
        assert!(Rc::ptr_eq(&profiles.learn(&told("on", "UTC")), &on) && Rc::ptr_eq(&profiles.plain(), &old.0));
    }

    #[test]
    fn options_are_read_as_the_server_reads_them() {
        type Want<'a> = Result<&'a [(&'a str, &'a str)], &'a str>;
        #[rustfmt::skip]
        let table: [(&str, &str, Want<'_>); 6] = [
            ("spaced",    "-c statement_timeout=5s",             Ok(&[("statement_timeout", "5s")])),
            ("joined",    "-cgeqo=off --Work-Mem=4MB",           Ok(&[("geqo", "off"), ("work_mem", "4MB")])),
            ("backslash", r"-c search_path=a,\ b",               Ok(&[("search_path", "a, b")])),
            ("empty",     "  ",                                  Ok(&[])),
            ("unknown",   "-x",                                  Err("-x")),
            ("no value",  "-c geqo",                             Err("geqo")),
        ];
        for (name, input, want) in table {
            let want = want.map(entries).map_err(str::to_owned);
            assert_eq!(parse_options(input.as_bytes()), want, "{name}");
        }
    }
}
