//! Prepared statements, interned once per worker: the same text under the same parse-time settings is one
//! [`Statement`], whatever its clients call it.
//!
//! A statement is run in one of two ways. *By name*: the server connection keeps it under a name of ours, on its [`Shelf`],
//! within a [`Budget`]; whatever has to make room is closed in front of the `Parse` that needs it, without a round trip.
//! *Stripped*: an unnamed `Parse` goes in front of its `Bind`, and the server keeps nothing. Which, is told by
//! `prepared_statements`; what is adaptive is stripped until a [`Sketch`] has counted it often enough.
//!
//! What may go wrong, and what then happens:
//!
//! | what | then |
//! |---|---|
//! | the `Parse` fails, or is skipped behind an error | it is struck off the shelf, or in doubt |
//! | the `Close` in front of it is skipped | its statement is in doubt: closed again before it is parsed again |
//! | `DEALLOCATE`, `DISCARD`, or text that cannot be read | all of the shelf is in doubt |
//! | all that could make room is in use in the batch | stripped |
//! | a table or type is altered | [`Described`] tells whether the client would still read it right |

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::rc::Rc;

use hashbrown::HashTable;

use rand::RngExt;

mod described;
mod resolved;
mod shelf;
mod sketch;

pub use described::{Described, Fit, Parsed};
pub use resolved::Resolved;
pub use shelf::{Budget, Place, Room, Shelf};
pub use sketch::Sketch;

use pgweir_proto::pipeline::{Expect, Owed};

use crate::sql::{self, EffectSet, Effects, Splice};

/// Bytes of the part that all server-side names of ours begin with.
const PREFIX_LEN: usize = 14;

/// The note, in a pipeline, of a `Parse` or `Close` of the client's that changes what a name stands for. A
/// statement's number may stand beside it, and beside all others up to [`DESCRIBES`].
pub const CHANGES: u64 = 1 << 63;
/// The note of what replaces the server's unnamed statement. If a number stands beside it, that is the number of what replaces it.
pub const UNNAMED: u64 = 1 << 62;
/// The note of what the client does to a statement by its name, and the server knows as the unnamed one.
pub const STRIPPED: u64 = 1 << 61;
/// The note of a `Describe` whose answer is kept.
pub const DESCRIBES: u64 = 1 << 60;
/// The note of a replay of settings.
pub const REPLAY: u64 = u64::MAX;
/// The note of an audit.
pub const AUDIT: u64 = u64::MAX - 1;
/// The note of a `Parse` that the server is to fail, in place of one that is one too many for its client.
pub const REFUSED: u64 = u64::MAX - 2;
/// The note of a query that puts start-up values back; the client's `ReadyForQuery` waits for its.
pub const RESTORE: u64 = u64::MAX - 3;
/// The note of a `Parse` that the server is to fail, in place of one for which there is no memory.
pub const NO_MEMORY: u64 = u64::MAX - 4;
/// The note of a `Parse` that the server is to fail, in place of a statement that is described otherwise than the client
/// was told.
pub const STALE: u64 = u64::MAX - 5;
/// The note of a `Parse` under the client's own name, for the query behind it, and of the `Sync` behind that.
pub const LENT: u64 = u64::MAX - 6;
/// The note of a mark: what comes before it is heard by the client's own server connection.
pub const MARK: u64 = u64::MAX - 7;
/// The note of what tells the client its `application_name`, which is told without the tag.
pub const NAMED: u64 = u64::MAX - 8;
/// The note of a query that may deallocate what the client has prepared, or needs it under its name.
pub const NAMES: u64 = u64::MAX - 9;
/// The note of a `Parse` under the client's own name for what stands behind it in the same batch, and of the `Close` that takes
/// what was lent back.
pub const TAKEN: u64 = u64::MAX - 10;
/// The note of a query of the client's with statements of ours in it.
pub const SPLICED: u64 = u64::MAX - 11;
/// The note of what has a statement parsed anew under the settings that it was prepared under; nobody is told if it fails.
pub const ORIGINAL: u64 = u64::MAX - 12;

/// The notes that stand for themselves begin here.
const WHOLE: u64 = ORIGINAL;

/// What an error leaves behind of that which was lent under a client's own names.
#[derive(Debug, Default)]
pub struct Leavings {
    /// Undone, and so not to be taken back.
    parses: u32,
    /// Something was lent, and is not taken back.
    pub any: bool,
}

impl Leavings {
    /// An entry will not be answered. In their order.
    #[inline]
    pub fn undone(&mut self, owed: Owed) {
        match (owed.note, owed.expect) {
            (TAKEN, Expect::Parse) => self.parses += 1,
            (TAKEN, _) if self.parses == 0 => self.any = true,
            (TAKEN, _) => self.parses -= 1,
            _ => {}
        }
    }
}

/// Whether a note has all of `bits`, and is none of those that stand for themselves.
#[must_use]
#[inline]
pub const fn notes(note: u64, bits: u64) -> bool {
    note & bits == bits && note < WHOLE
}

/// The statement's number in a note, if there is one.
#[must_use]
#[inline]
pub const fn statement_id(note: u64) -> Option<u64> {
    match note & (DESCRIBES - 1) {
        0 => None,
        _ if note >= WHOLE => None,
        id => Some(id),
    }
}

/// The same, unless the note is of the server's unnamed statement.
#[must_use]
#[inline]
pub const fn named_id(note: u64) -> Option<u64> {
    if notes(note, UNNAMED) { None } else { statement_id(note) }
}

/// Executions lately after which an adaptive statement is run by name.
pub const PROMOTE_AT: u8 = 3;

/// How often an adaptive statement may give way to another: once it has not been run for so many executions, for each
/// statement that there may be.
pub const COLD_AFTER: u64 = 10;

/// A statement's text and all that gives it its meaning.
#[derive(Debug)]
pub struct Statement {
    /// Never given twice.
    pub id: u64,
    /// The same for the same text, types, parse-time settings and pool.
    pub hash: u64,
    /// The text.
    pub text: Box<[u8]>,
    /// Where it is not the client's own text, but has start-up values in it. Clients that sent it so share another.
    pub put: Option<Box<Splice>>,
    /// Parameter types: a count and as many object ids, as in the `Parse` message.
    pub types: Box<[u8]>,
    /// The parse-time settings that it is shared under; see [`crate::settings::Profile::parse_key`].
    pub parse_key: u32,
    /// Those of its client's own `Parse`, if it is run under others; else the same.
    pub origin: u32,
    /// Not 0: the statement is not shared, but belongs to one name of one client that has another name for the text.
    pub twin: u64,
    /// The pool whose clients may share it.
    pub pool: u32,
    /// What running it may do to session state by itself.
    pub effects: Effects,
    /// Whether settings may have it say something else, once somebody has asked.
    is_read: OnceCell<bool>,
    /// What it sets in motion, in the catalog that the number names.
    through: Cell<(u64, EffectSet)>,
    /// Whether it was asked for since the hand last passed it.
    used: Cell<bool>,
    /// How often what servers had parsed of it turned out to be of no more use.
    epoch: Cell<u32>,
    /// What servers make of its parameters.
    pub resolved: Resolved,
}

impl Statement {
    /// Bytes it takes, and those that it may come to take: always the same.
    #[must_use]
    pub fn size(&self) -> usize {
        let put = self.put.as_ref().map_or(0, |put| put.size());
        self.text.len() + self.types.len() + self.resolved.room() + size_of::<Self>() + put
    }

    /// Whether settings may have it say something else.
    pub fn is_read(&self) -> bool {
        *self.is_read.get_or_init(|| sql::is_read_by_settings(&self.text))
    }

    /// What servers have parsed of it is of no more use: it is to be parsed anew.
    pub fn outdate(&self) {
        self.epoch.set(self.epoch.get().wrapping_add(1));
        // One of the types may be gone.
        self.resolved.forget();
    }

    /// A server has told the types of its parameters: the body of a `ParameterDescription`, and what that is as a description.
    pub fn resolve(&self, described: Described, body: &[u8]) {
        self.resolved.learn(described, body, &self.types);
    }

    /// Calls `with` with the types to parse it with: those that a client was `told`, if it has to be parsed with them, else those
    /// that clients give.
    pub fn with_types<T>(&self, spelled: bool, with: impl FnOnce(&[u8]) -> T) -> T {
        if spelled { self.resolved.with_types(&self.types, with) } else { with(&self.types) }
    }

    /// How often it was [outdated](Self::outdate).
    #[must_use]
    #[inline]
    pub fn epoch(&self) -> u32 {
        self.epoch.get()
    }

    /// What running it may do, with what it sets in motion: `through` says that, given the text and what it does by
    /// itself. `catalog` names what `through` knows: it is asked again when that is another.
    #[inline]
    pub fn judge(&self, catalog: u64, through: impl FnOnce(&[u8], EffectSet) -> EffectSet) -> Effects {
        if self.through.get().0 != catalog {
            self.through.set((catalog, through(&self.text, self.effects.set)));
        }
        Effects { set: self.effects.set | self.through.get().1, ..self.effects }
    }

    /// What it sets in motion, as it was last judged.
    #[must_use]
    pub fn through(&self) -> EffectSet {
        self.through.get().1
    }
}

/// The beginning of every server-side name of this process: not to be guessed, so that no client's own name is one
/// of them by accident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix([u8; PREFIX_LEN]);

impl Prefix {
    /// `pgweir_`, six letters made of `random`, and an underscore.
    #[must_use]
    pub fn new(random: u32) -> Self {
        let mut name = *b"pgweir_......_";
        let mut rest = random;
        for slot in name.iter_mut().filter(|byte| **byte == b'.') {
            *slot = b'a' + u8::try_from(rest % 26).unwrap_or(0);
            rest /= 26;
        }
        Self(name)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The length of the name of statement `id`.
    #[must_use]
    pub fn name_len(&self, id: u64) -> usize {
        PREFIX_LEN + id.checked_ilog10().unwrap_or(0) as usize + 1
    }

    /// Appends the name of statement `id`.
    pub fn write_name(&self, id: u64, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
        write_number(id, out);
    }
}

fn write_number(id: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = id;
    loop {
        at -= 1;
        if let Some(digit) = digits.get_mut(at) {
            *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        }
        rest /= 10;
        if rest == 0 || at == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(at..).unwrap_or_default());
}

/// What makes a statement that statement.
#[derive(Clone, Copy)]
#[expect(clippy::struct_field_names, reason = "the statement's own field names")]
struct Key<'a> {
    pool: u32,
    parse_key: u32,
    origin: u32,
    twin: u64,
    text: &'a [u8],
    types: &'a [u8],
    put: Option<&'a Splice>,
}

impl<'a> Key<'a> {
    fn of(statement: &'a Statement) -> Self {
        let Statement { pool, parse_key, origin, twin, ref text, ref types, ref put, .. } = *statement;
        Self { pool, parse_key, origin, twin, text, types, put: put.as_deref() }
    }
}

/// Bytes of texts that no client names, at most: they are kept only because they may come again.
const UNNAMED_MAX: usize = 4 << 20;

/// Statements that the hand passes for each new one. With more than one, those that no one names grow fewer faster than
/// new ones come.
const PASSED: usize = 4;

/// Those that it passes in a tick, whatever comes: what clients that left had named is given back within seconds.
const PASSED_PER_TICK: usize = 1000;

/// All statements that clients of this worker named, and those lately unnamed.
///
/// A hand goes round all of them, a few steps for each new one, and takes out what no one names and no one asked for
/// since it last came by: no insertion costs more than any other, however many there are.
#[derive(Debug)]
pub struct Interner {
    /// With their hashes, so that growing reads no statement.
    table: RefCell<HashTable<(u64, Rc<Statement>)>>,
    /// The same statements in the order in which the hand comes to them.
    round: RefCell<VecDeque<(u64, Rc<Statement>)>>,
    hasher: foldhash::fast::RandomState,
    /// Bytes of the statements in the table.
    bytes: Cell<usize>,
    /// The most bytes wanted; what no client names goes first.
    limit: usize,
    /// What the server-side names begin with.
    pub prefix: Prefix,
    /// Far from ever being used up.
    next_id: Cell<u64>,
    /// How often texts were executed lately.
    pub sketch: RefCell<Sketch>,
}

/// References to a statement that no one but the interner has.
const OWN_REFERENCES: usize = 2;

impl Interner {
    /// An interner that keeps at most `limit` bytes, if the clients' own statements leave that much.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            table: RefCell::default(),
            round: RefCell::default(),
            hasher: foldhash::fast::RandomState::default(),
            bytes: Cell::new(0),
            limit,
            prefix: Prefix::new(rand::rng().random()),
            next_id: Cell::new(1),
            sketch: RefCell::default(),
        }
    }

    /// Bytes of all statements kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// Whether a new text may be kept: the process is below its limit, without what no client names.
    #[must_use]
    #[inline]
    pub fn has_room(&self) -> bool {
        self.bytes.get() < self.limit || {
            self.pass(PASSED);
            self.bytes.get() < self.limit
        }
    }

    /// The one statement with this text, types and meaning. Allocates only when it is new; then `effects` is asked
    /// what running it may do.
    #[must_use]
    pub fn intern(
        &self,
        pool: u32,
        parse_key: u32,
        text: &[u8],
        types: &[u8],
        effects: impl FnOnce(&[u8]) -> Effects,
    ) -> Rc<Statement> {
        self.intern_put(pool, parse_key, text, types, None, effects)
    }

    /// The same of a text with start-up values in it.
    #[must_use]
    pub fn intern_put(
        &self,
        pool: u32,
        parse_key: u32,
        text: &[u8],
        types: &[u8],
        put: Option<&Splice>,
        effects: impl FnOnce(&[u8]) -> Effects,
    ) -> Rc<Statement> {
        self.intern_key(Key { pool, parse_key, origin: parse_key, twin: 0, text, types, put }, effects)
    }

    /// A statement like `of` for those who run it under other settings: how it is shared among them, and the key of the settings
    /// that it keeps.
    #[must_use]
    pub fn intern_again(&self, of: &Statement, (parse_key, origin): (u32, u32)) -> Rc<Statement> {
        self.intern_key(Key { parse_key, origin, twin: 0, ..Key::of(of) }, |_| of.effects)
    }

    fn intern_key(&self, key: Key<'_>, effects: impl FnOnce(&[u8]) -> Effects) -> Rc<Statement> {
        let Key { pool, parse_key, text, types, put, .. } = key;
        let hash = self.hasher.hash_one((text, types, parse_key, pool));
        let same = |(_, s): &(u64, Rc<Statement>)| {
            s.twin == 0
                && s.parse_key == parse_key
                && s.pool == pool
                && *s.text == *text
                && *s.types == *types
                && s.put.as_deref() == put
        };
        if let Some((_, found)) = self.table.borrow().find(hash, same) {
            found.used.set(true);
            return found.clone();
        }
        self.insert(hash, key, effects(text))
    }

    /// A number that no statement has or will have.
    #[must_use]
    pub fn number(&self) -> u64 {
        let number = self.next_id.get();
        self.next_id.set(number + 1);
        number
    }

    /// A statement like `of` that no one shares.
    #[must_use]
    pub fn twin(&self, of: &Statement) -> Rc<Statement> {
        let hash = self.hasher.hash_one((&*of.text, &*of.types, of.parse_key, of.pool));
        self.insert(hash, Key { twin: self.next_id.get(), ..Key::of(of) }, of.effects)
    }

    #[cold]
    fn insert(&self, hash: u64, key: Key<'_>, effects: Effects) -> Rc<Statement> {
        let Key { pool, parse_key, origin, twin, text, types, put } = key;
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let statement = Rc::new(Statement {
            id,
            hash,
            text: text.into(),
            put: put.map(|put| Box::new(put.clone())),
            types: types.into(),
            parse_key,
            origin,
            twin,
            pool,
            effects,
            is_read: OnceCell::new(),
            through: Cell::new((0, EffectSet::NONE)),
            used: Cell::new(false),
            epoch: Cell::new(0),
            resolved: Resolved::of(text, types),
        });
        self.bytes.set(self.bytes.get() + statement.size());
        // Nobody looks for a twin: it is to be in nobody's way.
        let slot = if twin == 0 { hash } else { self.hasher.hash_one(id) };
        self.table.borrow_mut().insert_unique(slot, (slot, statement.clone()), |(slot, _)| *slot);
        self.round.borrow_mut().push_back((slot, statement.clone()));
        self.pass(PASSED);
        statement
    }

    /// A tenth of a second has passed: gives back what is only kept because it came lately, above the little that may be.
    pub fn tick(&self) {
        self.pass(PASSED_PER_TICK);
    }

    /// Moves the hand on.
    fn pass(&self, steps: usize) {
        let mut round = self.round.borrow_mut();
        for _ in 0..steps {
            if self.bytes.get() <= UNNAMED_MAX.min(self.limit) {
                return;
            }
            let Some((hash, statement)) = round.pop_front() else { return };
            if Rc::strong_count(&statement) > OWN_REFERENCES || statement.used.take() {
                round.push_back((hash, statement));
                continue;
            }
            let is = |(_, known): &(u64, Rc<Statement>)| Rc::ptr_eq(known, &statement);
            if let Ok(entry) = self.table.borrow_mut().find_entry(hash, is) {
                entry.remove();
            }
            self.bytes.set(self.bytes.get().saturating_sub(statement.size()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_one_statement_only_under_the_same_settings_types_and_pool() {
        let interner = Interner::new(1 << 20);
        let one = interner.intern(1, 0, b"SELECT 1", b"\0\0", |_| Effects::default());
        #[rustfmt::skip]
        let table: [(&str, u32, u32, &[u8], &[u8], bool); 5] = [
            ("same",          1, 0, b"SELECT 1", b"\0\0",              true),
            ("other pool",    2, 0, b"SELECT 1", b"\0\0",              false),
            ("other profile", 1, 7, b"SELECT 1", b"\0\0",              false),
            ("other text",    1, 0, b"SELECT 2", b"\0\0",              false),
            ("other types",   1, 0, b"SELECT 1", b"\0\x01\0\0\0\x17",  false),
        ];
        for (name, pool, key, text, types, same) in table {
            assert_eq!(
                Rc::ptr_eq(&one, &interner.intern(pool, key, text, types, |_| Effects::default())),
                same,
                "{name}"
            );
        }
    }

    #[test]
    fn texts_in_use_survive_and_the_others_stay_below_the_limit() {
        let interner = Interner::new(20_000);
        let kept = interner.intern(1, 0, b"SELECT kept", b"\0\0", |_| Effects::default());
        for n in 0..10_000 {
            let _ = interner.intern(1, 0, format!("SELECT {n}").as_bytes(), b"\0\0", |_| Effects::default());
            assert!(interner.bytes() <= 20_000 + 200);
            let again = interner.intern(1, 0, b"SELECT again", b"\0\0", |_| Effects::default());
            assert!(n == 0 || again.used.get(), "what is asked for between two rounds stays");
        }
        assert!(Rc::ptr_eq(&kept, &interner.intern(1, 0, b"SELECT kept", b"\0\0", |_| Effects::default())));
    }

    #[test]
    fn what_is_no_longer_named_makes_room_whatever_the_limit() {
        let interner = Interner::new(1 << 30);
        let text = |n: u32| format!("SELECT {n} FROM a_table_with_a_name_that_is_not_short");
        let intern = |n: u32| interner.intern(1, 0, text(n).as_bytes(), b"\0\0", |_| Effects::default());
        let named: Vec<_> = (0..100_000).map(intern).collect();
        assert!(interner.bytes() > 2 * UNNAMED_MAX);
        drop(named);
        for n in 100_000..200_000 {
            let _ = intern(n);
        }
        assert!(interner.bytes() <= UNNAMED_MAX + 200, "{}", interner.bytes());
        let (table, round) = (interner.table.borrow(), interner.round.borrow());
        assert_eq!(table.len(), round.len());
        assert_eq!(round.iter().map(|(_, statement)| statement.size()).sum::<usize>(), interner.bytes());
    }

    #[test]
    fn what_is_no_longer_named_is_given_back_in_time_though_nothing_new_comes() {
        let interner = Interner::new(1 << 30);
        let text = |n: u32| format!("SELECT {n} FROM a_table_with_a_name_that_is_not_short");
        let intern = |n: u32| interner.intern(1, 0, text(n).as_bytes(), b"\0\0", |_| Effects::default());
        let named: Vec<_> = (0..100_000).map(intern).collect();
        let all = interner.bytes();
        (0..200).for_each(|_| interner.tick());
        assert_eq!(interner.bytes(), all, "all are named");
        drop(named);
        // Twice round: what was asked for since the hand last came by stays once.
        (0..200).for_each(|_| interner.tick());
        assert!(interner.bytes() <= UNNAMED_MAX, "{}", interner.bytes());
    }

    #[test]
    fn what_servers_make_of_parameters_is_counted_from_the_start() {
        let interner = Interner::new(1 << 20);
        let count: u16 = 1000;
        let text = format!("SELECT f({})", (1..=count).map(|n| format!("${n}")).collect::<Vec<_>>().join(","));
        let statement = interner.intern(1, 0, text.as_bytes(), b"\0\0", |_| Effects::default());
        let before = interner.bytes();
        let body = [&count.to_be_bytes()[..], &b"\0\0\0\x17".repeat(count.into())].concat();
        let described = Described::parameters(&body);
        statement.resolve(described, &body);
        assert!(statement.resolved.makes(described));
        statement.with_types(true, |types| {
            assert_eq!(types, body);
            assert!(before >= text.len() + types.len() + size_of::<Statement>(), "{before}");
        });
        assert_eq!(interner.bytes(), before, "what is added is taken away");
        // More than its text can have is not kept.
        let short = interner.intern(1, 0, b"SELECT $1", b"\0\0", |_| Effects::default());
        short.resolve(described, &body);
        assert!(!short.resolved.makes(described));
    }

    #[test]
    fn names_are_the_prefix_and_the_number() {
        let prefix = Prefix::new(123_456_789);
        assert!(prefix.as_bytes().starts_with(b"pgweir_") && prefix != Prefix::new(1));
        for id in [0, 7, 10, 1234, u64::MAX] {
            let mut name = Vec::new();
            prefix.write_name(id, &mut name);
            assert_eq!(name, [prefix.as_bytes(), id.to_string().as_bytes()].concat());
            assert_eq!(name.len(), prefix.name_len(id));
        }
    }
}
