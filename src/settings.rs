//! A client's settings as a value: interned, compared by pointer, replayed as a difference.
//!
//! Every client has a [`Profile`], every server connection knows which one is applied to it. Lending
//! a connection whose profile is another one sends the difference first. A profile is plain data
//! ([`Profile::entries`]), so that a session can be written out and read back.

mod encoding;
mod list;
mod splice;

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use hashbrown::HashMap;

pub use encoding::{Encoding, Encodings};
pub use splice::{Behind, behind, filled, splice};

use crate::sql;

/// A setting's name (lower case) and value, as `set_config` takes them.
pub type Entry = (Box<str>, Box<[u8]>);

/// The names that a server may refuse though it took them before: they name an object, or a temporary table of another client's
/// has been on the connection; or that make it fail.
const RISKY: [&str; 7] = [
    "default_table_access_method",
    "default_tablespace",
    "default_text_search_config",
    "statement_timeout",
    "temp_buffers",
    "temp_tablespaces",
    "transaction_timeout",
];

/// The names that a server takes, or that do something, at the beginning of a session alone.
///
/// Source: `PostgreSQL`'s source, `guc_tables.c`: those of `PGC_BACKEND`, `PGC_SU_BACKEND` and `CLIENT_CONN_PRELOAD`.
const AT_START: [&str; 8] = [
    "ignore_system_indexes",
    "jit_debugging_support",
    "jit_profiling_support",
    "local_preload_libraries",
    "log_connections",
    "log_disconnections",
    "post_auth_delay",
    "session_preload_libraries",
];

/// Whether a server takes the setting, or does something for it, at the beginning of a session alone.
#[must_use]
pub fn is_of_the_start(name: &str) -> bool {
    AT_START.contains(&name)
}

/// Whether a session that has begun takes the setting, and does nothing for it: nothing is to be heard of it from the server.
#[must_use]
pub fn is_of_no_use_later((name, value): &Entry) -> bool {
    matches!(&**name, "local_preload_libraries" | "session_preload_libraries") && !value.is_empty()
}

/// Whether start-up parameters, or a switch in `options`, may have a session begin late: its login might be given up by then, and
/// the server's process sleep on, where nobody counts it. `settings` are all of them, if `options` can be read.
#[must_use]
pub fn may_delay(options: &[u8], parameters: &[(Box<[u8]>, Box<[u8]>)], settings: Option<&[Entry]>) -> bool {
    const NAME: &str = "post_auth_delay";
    let is_name = |name: &[u8]| setting_name(name).replace('-', "_") == NAME;
    // Without any digit it is no number, and refused.
    let delays = |value: &[u8]| value.iter().any(u8::is_ascii_digit) && value.iter().any(|byte| *byte != b'0');
    // `-W` among other letters is the same, and its name may be spelled with hyphens.
    let names = |word: &[u8]| setting_name(word).replace('-', "_").contains(NAME);
    let switches = |word: &[u8]| word.starts_with(b"-") && !word.starts_with(b"--") && word.contains(&b'W');
    match settings {
        Some(settings) => settings.iter().any(|(name, value)| is_name(name.as_bytes()) && delays(value)),
        None => {
            parameters.iter().any(|(name, value)| is_name(name) && delays(value))
                || split_words(options).iter().any(|word| names(word) || switches(word))
        }
    }
}

/// The seed of `random()`: a setting that is never shown, and that no reset puts back.
pub const SEED: &str = "seed";

/// A query after which nobody can tell what `random()` will say, whoever has seeded it before. None if the system gives no
/// random bytes.
#[must_use]
pub fn reseed() -> Option<Vec<u8>> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).ok()?;
    let number = u64::from_ne_bytes(bytes);
    let sign = if number.is_multiple_of(2) { "" } else { "-" };
    // More digits than the server keeps.
    Some(format!("SET {SEED} TO {sign}0.{:018}", (number >> 1) % 1_000_000_000_000_000_000).into())
}

/// A set of session settings that differ from what a fresh server connection of the pool has.
#[derive(Debug)]
pub struct Profile {
    entries: Vec<Entry>,
    /// Equal for profiles that agree in every frozen setting.
    parse_key: u32,
    /// With it a server connection ends when it is idle for some time.
    ends_idle: bool,
    /// What the server reported when this profile was applied for a login: names and values in its own
    /// spelling. None until then.
    reported: RefCell<Option<Rc<[Entry]>>>,
    /// Bodies of the notices that came with it.
    notices: RefCell<Box<[Box<[u8]>]>>,
    /// The lives of servers on which it was applied, as the login role; the latest last.
    proven: Cell<[u64; LIVES_MAX]>,
}

/// So many lives of servers a profile remembers: the primary's, and those of followers.
const LIVES_MAX: usize = 4;

/// A server's life of which nothing is proven: 0, or what it did not tell.
const NO_LIFE: u64 = 0;

impl Profile {
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

    /// Whether the server ends a session with these settings that is idle: no connection is to wait in the pool with them.
    ///
    /// Source: `PostgreSQL` 17 docs, §20.11.1 "Statement Behavior".
    #[must_use]
    #[inline]
    pub const fn ends_idle(&self) -> bool {
        self.ends_idle
    }

    /// What the server reported when the profile was applied to a plain connection. None: it never was, and
    /// may be refused.
    #[must_use]
    pub fn reported(&self) -> Option<Rc<[Entry]>> {
        self.reported.borrow().clone()
    }

    /// The profile was applied to a plain connection, and the server reported `values` meanwhile, with notices.
    pub fn prove(&self, values: Vec<Entry>, notices: Vec<Box<[u8]>>) {
        *self.reported.borrow_mut() = Some(values.into());
        *self.notices.borrow_mut() = notices.into();
    }

    /// Bodies of the notices that a client is sent who logs in with this profile.
    #[must_use]
    pub fn notices(&self) -> Vec<Box<[u8]>> {
        let level = self.get("client_min_messages").map(<[u8]>::to_ascii_lowercase);
        if matches!(level.as_deref(), Some(b"warning" | b"error")) {
            Vec::new()
        } else {
            self.notices.borrow().to_vec()
        }
    }

    /// Whether putting it on, or taking it off, may fail though it has worked before: then nothing may be sent behind a replay
    /// before that is known to have worked.
    ///
    /// It may with a role and with what names an object (somebody may have dropped it), with bytes that depend on
    /// `client_encoding`, and with a time limit that may hit the replay itself.
    #[must_use]
    pub fn is_risky(&self) -> bool {
        let risky = |name: &str, value: &[u8]| is_role(name) || RISKY.contains(&name) || !value.is_ascii();
        self.entries.iter().any(|(name, value)| risky(name, value))
    }

    /// Whether it was applied in this life of a server before, by the login role: the same will be taken again, unless it
    /// [is risky](Self::is_risky). Else nothing may be sent behind its replay before that is known to have worked.
    #[must_use]
    pub fn is_proven_in(&self, life: u64) -> bool {
        self.entries.is_empty() || life != NO_LIFE && self.proven.get().contains(&life)
    }

    /// It was applied in this life of a server, by the login role.
    pub fn prove_in(&self, life: u64) {
        if !self.is_proven_in(life) {
            let mut lives = self.proven.get();
            lives.rotate_left(1);
            if let Some(last) = lives.last_mut() {
                *last = life;
            }
            self.proven.set(lives);
        }
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
    plain: Rc<Profile>,
    known: RefCell<HashMap<Vec<Entry>, Weak<Profile>, foldhash::fast::RandomState>>,
    parse_keys: RefCell<HashMap<Vec<Entry>, u32, foldhash::fast::RandomState>>,
    /// Keys of what is run under other settings than it was prepared under, by the keys of both.
    pairs: RefCell<HashMap<(u32, u32), Option<u32>, foldhash::fast::RandomState>>,
    next_key: Cell<u32>,
    /// Custom settings that were in one.
    custom: RefCell<Vec<Box<str>>>,
}

/// Names of custom settings that are remembered of a pool's clients, at most.
const CUSTOM_MAX: usize = 100;

/// Above this many remembered profiles those that no one uses are forgotten.
const SWEEP_AT: usize = 1024;

impl Default for Profiles {
    fn default() -> Self {
        let reported = RefCell::new(Some(Rc::from([])));
        let notices = RefCell::default();
        let proven = Cell::default();
        let plain = Profile { entries: Vec::new(), parse_key: 0, ends_idle: false, reported, notices, proven };
        Self {
            plain: Rc::new(plain),
            known: RefCell::default(),
            parse_keys: RefCell::default(),
            pairs: RefCell::default(),
            next_key: Cell::new(1),
            custom: RefCell::default(),
        }
    }
}

impl Profiles {
    /// The profile of a client that set nothing.
    #[must_use]
    pub fn plain(&self) -> Rc<Profile> {
        self.plain.clone()
    }

    /// The one profile with these entries; of equal names the last wins.
    pub fn intern(&self, entries: impl IntoIterator<Item = Entry>) -> Rc<Profile> {
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
        if sorted.is_empty() {
            return self.plain();
        }
        if let Some(known) = self.known.borrow().get(&sorted).and_then(Weak::upgrade) {
            return known;
        }
        self.note_custom(&sorted);
        let parse_key = self.parse_key(&sorted);
        let (reported, notices, proven) = (RefCell::default(), RefCell::default(), Cell::default());
        let ends_idle = sorted.iter().any(|(name, value)| **name == *IDLE_LIMIT && value.trim_ascii() != b"0");
        let profile = Rc::new(Profile { entries: sorted.clone(), parse_key, ends_idle, reported, notices, proven });
        let mut known = self.known.borrow_mut();
        if known.len() >= SWEEP_AT {
            known.retain(|_, weak| weak.strong_count() > 0);
        }
        known.insert(sorted, Rc::downgrade(&profile));
        profile
    }

    /// Custom settings that clients of the pool have or had, the first `CUSTOM_MAX` of them.
    #[must_use]
    pub fn custom(&self) -> Vec<Box<str>> {
        self.custom.borrow().clone()
    }

    fn note_custom(&self, entries: &[Entry]) {
        let mut custom = self.custom.borrow_mut();
        for (name, _) in entries.iter().filter(|(name, _)| name.contains('.')) {
            if custom.len() < CUSTOM_MAX && !custom.contains(name) {
                custom.push(name.clone());
            }
        }
    }

    /// The settings `present`, but for those that a text took from them when it was prepared under the settings of `origin`, and keeps.
    /// None if that is not known, or they are the same. Nobody cancels what waits for a lock under them: it does not wait for long.
    ///
    /// Where the `search_path` is another one Postgres reads the text anew under the settings of the moment, but not its strings.
    ///
    /// Source: `PostgreSQL` 17, `RevalidateCachedQuery` in `plancache.c`.
    #[must_use]
    pub fn original(&self, origin: u32, present: &Rc<Profile>) -> Option<Rc<Profile>> {
        let frozen = match origin {
            0 => Vec::new(),
            key => self.parse_keys.borrow().iter().find(|(_, known)| **known == key)?.0.clone(),
        };
        let then = |name: &str| frozen.iter().find(|(known, _)| **known == *name).map(|(_, value)| &**value);
        let looks_anew = then(PATH) != present.get(PATH);
        let keeps = |name: &str| sql::stays_frozen(name.as_bytes(), looks_anew);
        let kept =
            |entries: &[Entry]| -> Vec<Entry> { entries.iter().filter(|(name, _)| keeps(name)).cloned().collect() };
        let (then, now) = (kept(&frozen), kept(present.entries()));
        let others = present.entries().iter().filter(|(name, _)| !keeps(name)).cloned();
        let patience = (Box::from(LOCK_LIMIT), Box::from(PATIENCE));
        (then != now).then(|| self.intern(others.chain(then).chain([patience])))
    }

    /// The key of what was prepared under the settings of `origin` and is run under those of `present`: Postgres may come to read it
    /// anew under these, so whoever runs it under others must have one of its own. None if it means the same under both.
    #[must_use]
    pub fn pair(&self, origin: u32, present: &Rc<Profile>) -> Option<u32> {
        let mut pairs = self.pairs.borrow_mut();
        if let Some(known) = pairs.get(&(origin, present.parse_key)) {
            return *known;
        }
        let key = self.original(origin, present).map(|_| self.new_key());
        if pairs.len() >= SWEEP_AT {
            pairs.clear();
        }
        pairs.insert((origin, present.parse_key), key);
        key
    }

    /// A parse key that no profile has: for statements parsed while a setting's value is not known.
    pub fn private_key(&self) -> u32 {
        PRIVATE | self.new_key()
    }

    fn new_key(&self) -> u32 {
        let key = self.next_key.get();
        self.next_key.set(((key + 1) % PRIVATE).max(1));
        key
    }

    fn parse_key(&self, entries: &[Entry]) -> u32 {
        let frozen: Vec<Entry> = entries.iter().filter(|(name, _)| sql::is_frozen(name.as_bytes())).cloned().collect();
        if frozen.is_empty() {
            return 0;
        }
        let mut keys = self.parse_keys.borrow_mut();
        if keys.len() >= SWEEP_AT {
            // Forgotten keys are never given again: equal settings merely stop sharing statements.
            keys.clear();
        }
        *keys.entry(frozen).or_insert_with(|| self.new_key())
    }
}

/// Set in each parse key that no profile has.
const PRIVATE: u32 = 1 << 31;

/// Whether no profile has this parse key.
#[must_use]
pub const fn is_private(parse_key: u32) -> bool {
    parse_key & PRIVATE != 0
}

/// The setting by which all others are read.
pub const ENCODING: &str = "client_encoding";

/// The setting that limits how long a lock is waited for, and how long whoever cannot be cancelled waits.
const LOCK_LIMIT: &str = "lock_timeout";
const PATIENCE: &[u8] = b"1s";

/// The list of schemas in which names are looked up.
const PATH: &str = "search_path";

/// The setting that ends idle sessions.
const IDLE_LIMIT: &str = "idle_session_timeout";

/// The setting that says whose a connection is.
pub const APPLICATION_NAME: &str = "application_name";

/// So many bytes of it, as of any name, Postgres keeps.
pub const NAME_MAX: usize = 63;

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
/// settings `to`: none if they agree. The `tag` of the connection stays in its name, and what `connect_query` set as it is.
///
/// Each text is one transaction: a failure undoes all of it, and nothing of the others. So what was `from` is taken back in one
/// of its own, which does not fail: whatever is refused behind it, nothing ever runs under another client's settings. Of a custom
/// setting nobody knows whether it is still there, and whose it is: a library that was loaded meanwhile may have taken it away, or
/// allow only superusers to reset it; nor what a setting was that `connect_query` may have set. RESET ALL asks nobody. Then, as the login role, `client_encoding`, by which the rest is
/// read; what is not refused but for good reasons; custom settings, which a connection refuses that has loaded a library
/// whose names they bear; session authorization, and role.
pub fn replay(from: &Profile, to: &Profile, tag: &str, connect_query: &str, mut send: impl FnMut(&[u8])) {
    if std::ptr::eq(from, to) {
        return;
    }
    let mut out = Vec::new();
    let mut send = |out: &mut Vec<u8>| {
        if !out.is_empty() {
            send(out);
            out.clear();
        }
    };
    let is_same = |name: &str| from.get(name) == to.get(name);
    let is_unknown = |name: &str| name.contains('.') || !connect_query.is_empty();
    let resets_all = from.names().any(|name| is_unknown(name) && !is_same(name));
    for (name, command) in [("role", "RESET ROLE;"), ("session_authorization", "RESET SESSION AUTHORIZATION;")] {
        if from.get(name).is_some() {
            out.extend_from_slice(command.as_bytes());
        }
    }
    if resets_all {
        out.extend_from_slice(b"RESET ALL;");
    } else {
        for name in from.names().filter(|name| !is_role(name) && !is_same(name)) {
            reset(&mut out, name);
        }
    }
    send(&mut out);
    let news = |name: &str| to.get(name).filter(|_| resets_all || !is_same(name));
    if resets_all {
        out.extend_from_slice(connect_query.as_bytes());
        send(&mut out);
        if to.get(APPLICATION_NAME).is_none() && !tag.is_empty() {
            set(&mut out, APPLICATION_NAME, &tagged(b"", tag));
        }
    }
    if let Some(encoding) = news(ENCODING) {
        set(&mut out, ENCODING, encoding);
        send(&mut out);
    }
    for is_custom in [false, true] {
        let names = to.names().filter(|name| name.contains('.') == is_custom && !is_role(name) && *name != ENCODING);
        for (name, value) in names.filter_map(|name| news(name).map(|value| (name, value))) {
            if name == APPLICATION_NAME { set(&mut out, name, &tagged(value, tag)) } else { set(&mut out, name, value) }
        }
        send(&mut out);
    }
    for (name, command) in [("session_authorization", "SET SESSION AUTHORIZATION "), ("role", "SET ROLE ")] {
        if let Some(value) = to.get(name) {
            out.extend_from_slice(command.as_bytes());
            literal(&mut out, value);
            out.push(b';');
        }
    }
    send(&mut out);
}

/// Whether a text that may change settings may put some back to where they were at the start: only such a text has to be
/// followed by [`restore`].
#[must_use]
pub fn may_reset(text: &[u8]) -> bool {
    // What NULLIF gives may be NULL.
    const WORDS: [&[u8]; 6] = [b"reset", b"discard", b"default", b"local", b"null", b"nullif"];
    sql::spells_words(text, &WORDS)
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

/// The same for the role, behind a text that has put it back: to none, where the session began with one.
pub fn restore_role(startup: &Profile, out: &mut Vec<u8>) {
    let Some(role) = startup.get("role") else { return };
    if !out.is_empty() {
        out.push(b';');
    }
    out.extend_from_slice(b"SELECT pg_catalog.set_config('role',");
    literal(out, role);
    out.extend_from_slice(b",false)WHERE pg_catalog.current_setting('role')OPERATOR(pg_catalog.=)'none'");
}

/// The same for `search_path`, behind SETs that have spelled it as Postgres does: if it is that still.
pub fn restore_spelling(startup: &Profile, out: &mut Vec<u8>) {
    let Some((value, names)) = startup.get(PATH).and_then(|value| Some((value, list::names(value)?))) else { return };
    if !out.is_empty() {
        out.push(b';');
    }
    out.extend_from_slice(b"SELECT pg_catalog.set_config('search_path',");
    literal(out, value);
    out.extend_from_slice(
        b",false)WHERE pg_catalog.current_setting('search_path')OPERATOR(pg_catalog.=)pg_catalog.concat_ws(', '",
    );
    for name in names {
        out.extend_from_slice(b",pg_catalog.quote_ident(");
        literal(out, name.as_bytes());
        out.push(b')');
    }
    out.push(b')');
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

/// Of one that the server knows.
pub fn reset(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b"RESET \"");
    for byte in name.bytes() {
        if byte == b'"' {
            out.push(b'"');
        }
        out.push(byte);
    }
    out.extend_from_slice(b"\";");
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

/// Appends a literal that reads the same whatever `standard_conforming_strings` and `client_encoding` say.
pub fn literal(out: &mut Vec<u8>, value: &[u8]) {
    if value.contains(&b'\\') && !value.is_ascii() {
        return dollar_quoted(out, value);
    }
    out.extend_from_slice(b"E'");
    for byte in value {
        if matches!(byte, b'\'' | b'\\') {
            out.push(*byte);
        }
        out.push(*byte);
    }
    out.push(b'\'');
}

/// Appends a literal without escapes: in some encodings (SJIS, BIG5, GBK, ...) a character's last byte may be that of a backslash,
/// which must not be doubled. None has a character with the byte of a dollar or a quote in it.
#[cold]
fn dollar_quoted(out: &mut Vec<u8>, value: &[u8]) {
    let mut quote = b"$v".to_vec();
    while memchr::memmem::find(value, &quote).is_some() {
        quote.push(b'v');
    }
    quote.push(b'$');
    for part in [&quote, value, &quote] {
        out.extend_from_slice(part);
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

    fn text(profiles: &Profiles, from: &[(&str, &str)], to: &[(&str, &str)], connect_query: &str) -> String {
        let mut texts = Vec::new();
        let send = |text: &[u8]| texts.push(String::from_utf8(text.to_vec()).unwrap());
        replay(&profiles.intern(entries(from)), &profiles.intern(entries(to)), "[tag]", connect_query, send);
        texts.join(" | ")
    }

    #[test]
    fn a_literal_reads_the_same_in_every_encoding() {
        #[rustfmt::skip]
        let table: [(&[u8], &[u8]); 7] = [
            (b"",                  b"E''"),
            (b"it's",              b"E'it''s'"),
            (b"a\\b",              b"E'a\\\\b'"),
            (b"\xc3\xa9'",         b"E'\xc3\xa9'''"),
            (b"\x95\\",            b"$v$\x95\\$v$"),
            (b"\x95\\'$v$x$vv",    b"$vvv$\x95\\'$v$x$vv$vvv$"),
            (b"\x95\\$",           b"$v$\x95\\$$v$"),
        ];
        for (value, want) in table {
            let mut out = Vec::new();
            literal(&mut out, value);
            assert_eq!(out.escape_ascii().to_string(), want.escape_ascii().to_string());
        }
    }

    #[test]
    fn a_text_keeps_some_of_the_settings_that_it_was_prepared_under() {
        type Settings = &'static [(&'static str, &'static str)];
        let profiles = Profiles::default();
        #[rustfmt::skip]
        let table: [(&str, Settings, Settings, Option<Settings>); 9] = [
            ("the same",        &[("timezone", "a")], &[("timezone", "a")], None),
            ("others alone",    &[],                  &[("work_mem", "1MB"), ("app.x", "1")], None),
            ("one set",         &[],                  &[("timezone", "a"), ("work_mem", "1MB")], Some(&[("work_mem", "1MB")])),
            ("one reset",       &[("datestyle", "b")], &[], Some(&[("datestyle", "b")])),
            ("another value",   &[("datestyle", "b")], &[("datestyle", "c")], Some(&[("datestyle", "b")])),
            ("another role",    &[("role", "a")],     &[("role", "b")], None),
            ("both",            &[("role", "a")],     &[("role", "b"), ("timezone", "a")], Some(&[("role", "b")])),
            ("another path",    &[("timezone", "a")], &[("search_path", "b")], None),
            ("and its strings", &[("standard_conforming_strings", "off"), ("timezone", "a")], &[("search_path", "b")],
                Some(&[("search_path", "b"), ("standard_conforming_strings", "off")])),
        ];
        for (name, then, now, want) in table {
            let (then, now) = (profiles.intern(entries(then)), profiles.intern(entries(now)));
            let got = profiles.original(then.parse_key(), &now);
            let want_all = want.map(|want| {
                let patient = profiles.intern(entries(want).into_iter().chain(entries(&[("lock_timeout", "1s")])));
                patient.entries().to_vec()
            });
            assert_eq!(got.map(|got| got.entries().to_vec()), want_all, "{name}");
            let pair = profiles.pair(then.parse_key(), &now);
            assert_eq!(pair.is_some(), want.is_some(), "{name}");
            assert_eq!(pair, profiles.pair(then.parse_key(), &now), "{name}");
            assert!(pair.is_none_or(|pair| pair != then.parse_key() && pair != now.parse_key()), "{name}");
        }
        let (now, unknown) = (profiles.intern(entries(&[("timezone", "a")])), profiles.private_key());
        assert!(profiles.original(unknown, &now).is_none());
    }

    #[test]
    fn only_the_difference_is_replayed_and_roles_come_last() {
        let profiles = Profiles::default();
        #[rustfmt::skip]
        let table: [(&str, &[(&str, &str)], &[(&str, &str)], &str); 12] = [
            ("same",     &[("a", "1")],    &[("a", "1")], ""),
            ("new",      &[],              &[("a", "1")], "SELECT pg_catalog.set_config(E'a',E'1',false);"),
            ("gone",     &[("a", "1")],    &[],           r#"RESET "a";"#),
            ("gone, custom", &[("a.b", "1")], &[],
                "RESET ALL; | SELECT pg_catalog.set_config(E'application_name',E'[tag]',false);"),
            ("changed, custom", &[("a.b", "1"), ("c", "1")], &[("a.b", "2"), ("application_name", "me"), ("c", "1")],
                "RESET ALL; | SELECT pg_catalog.set_config(E'application_name',E'me [tag]',false);\
                SELECT pg_catalog.set_config(E'c',E'1',false); | SELECT pg_catalog.set_config(E'a.b',E'2',false);"),
            ("kept, custom", &[("a.b", "1"), ("c", "1")], &[("a.b", "1")], r#"RESET "c";"#),
            ("changed",  &[("a", "1")],    &[("a", "2")], r#"RESET "a"; | SELECT pg_catalog.set_config(E'a',E'2',false);"#),
            ("custom ones last", &[("c", "1")], &[("a.b", "1"), ("d", "1")],
                r#"RESET "c"; | SELECT pg_catalog.set_config(E'd',E'1',false); | SELECT pg_catalog.set_config(E'a.b',E'1',false);"#),
            ("quoting",  &[],              &[("search_path", r#""$user", o'c\d"#)],
                r#"SELECT pg_catalog.set_config(E'search_path',E'"$user", o''c\\d',false);"#),
            ("encoding", &[("a", "1")],    &[("client_encoding", "LATIN1"), ("b", "1")],
                r#"RESET "a"; | SELECT pg_catalog.set_config(E'client_encoding',E'LATIN1',false); | SELECT pg_catalog.set_config(E'b',E'1',false);"#),
            ("encoding gone", &[("client_encoding", "LATIN1")], &[("b", "1")],
                r#"RESET "client_encoding"; | SELECT pg_catalog.set_config(E'b',E'1',false);"#),
            ("role",     &[("role", "x")], &[("a", "1"), ("role", "y"), ("session_authorization", "z")],
                "RESET ROLE; | SELECT pg_catalog.set_config(E'a',E'1',false); | SET SESSION AUTHORIZATION E'z';SET ROLE E'y';"),
        ];
        for (name, from, to, want) in table {
            assert_eq!(text(&profiles, from, to, ""), want, "{name}");
        }
        let connects = text(&profiles, &[("a", "1"), ("b", "1")], &[("b", "1")], "CONNECT");
        assert_eq!(
            connects,
            "RESET ALL; | CONNECT | SELECT pg_catalog.set_config(E'application_name',E'[tag]',false);\
             SELECT pg_catalog.set_config(E'b',E'1',false);"
        );
        assert_eq!(text(&profiles, &[], &[("b", "1")], "CONNECT"), "SELECT pg_catalog.set_config(E'b',E'1',false);");
    }

    #[test]
    fn a_session_that_would_begin_late_is_seen_however_it_is_spelled() {
        #[rustfmt::skip]
        let table: [(&str, &[(&str, &str)], bool); 21] = [
            ("",                                     &[],                             false),
            ("-c work_mem=3600",                     &[],                             false),
            ("-c post_auth_delay=0",                 &[],                             false),
            ("-c post_auth_delay=1",                 &[],                             true),
            ("--post-auth-delay=3600",               &[],                             true),
            ("-cPOST_AUTH_DELAY=1min",               &[],                             true),
            ("-c post_auth_delay=\\ 3600",           &[],                             true),
            ("-c post_auth_delay=0xA",               &[],                             true),
            ("-c post_auth_delay=4 -c post_auth_delay=0", &[],                        true),
            ("-c post_auth_delay=soon",              &[],                             false),
            ("-e",                                   &[],                             false),
            ("-W 0",                                 &[],                             true),
            ("-eW3600",                              &[],                             true),
            ("-e --Post-Auth-Delay=3600",            &[],                             true),
            ("-e -c post_auth_delay=1",              &[],                             true),
            ("",                                     &[("post_auth_delay", "1s")],    true),
            ("",                                     &[("Post_Auth_Delay", "00")],    false),
            ("-e",                                   &[("post_auth_delay", "2147")],  true),
            ("-e",                                   &[("POST_AUTH_DELAY", "1")],     true),
            ("-e",                                   &[("post_auth_delay", "0")],     false),
            ("-e",                                   &[("work_mem", "2147")],         false),
        ];
        for (options, parameters, want) in table {
            let parameters: Vec<(Box<[u8]>, Box<[u8]>)> =
                parameters.iter().map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into())).collect();
            let mut settings = parse_options(options.as_bytes()).ok();
            if let Some(settings) = &mut settings {
                settings.extend(parameters.iter().map(|(name, value)| (setting_name(name).into(), value.clone())));
            }
            let got = may_delay(options.as_bytes(), &parameters, settings.as_deref());
            assert_eq!(got, want, "{options} {parameters:?}");
        }
    }

    #[test]
    fn what_was_applied_is_proven_for_one_life_of_a_server() {
        let profiles = Profiles::default();
        let profile = profiles.intern(entries(&[("a", "1")]));
        assert!(!profile.is_proven_in(1));
        for life in [1, 2, 3, 4, 4, 1] {
            profile.prove_in(life);
        }
        assert_eq!([1, 2, 3, 4, 5].map(|life| profile.is_proven_in(life)), [true, true, true, true, false]);
        profile.prove_in(5);
        assert_eq!([1, 2, 5].map(|life| profile.is_proven_in(life)), [false, true, true], "the oldest is forgotten");
        profile.prove_in(NO_LIFE);
        assert!(!profile.is_proven_in(NO_LIFE) && profiles.plain().is_proven_in(NO_LIFE));
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
            ("SELECT set_config('a', NULLIF($1, ''), false)", true),
            ("SET default_tablespace TO x",      false),
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
    fn a_list_is_spelled_as_at_the_start_if_it_is_what_a_set_made_of_it() {
        let profiles = Profiles::default();
        let text = |all: &[(&str, &str)]| {
            let mut out = b"SELECT 1".to_vec();
            restore_spelling(&profiles.intern(entries(all)), &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(text(&[("work_mem", "1MB")]), "SELECT 1");
        assert_eq!(text(&[("search_path", "a b")]), "SELECT 1");
        assert_eq!(
            text(&[("search_path", "A,\"it's\"")]),
            "SELECT 1;SELECT pg_catalog.set_config('search_path',E'A,\"it''s\"',false)WHERE pg_catalog.current_setting('search_path')\
             OPERATOR(pg_catalog.=)pg_catalog.concat_ws(', ',pg_catalog.quote_ident(E'a'),pg_catalog.quote_ident(E'it''s'))"
        );
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
        for name in ["x.a", "x.b", "x.a"] {
            profiles.intern(entries(&[(name, "1"), ("a", name)]));
        }
        assert_eq!(profiles.custom(), ["x.a".into(), "x.b".into()]);
        (0..CUSTOM_MAX).for_each(|n| drop(profiles.intern(entries(&[(&format!("y.{n}"), "1")]))));
        assert_eq!(profiles.custom().len(), CUSTOM_MAX);
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
