//! How a statement of the client's comes to be on the server connection when the message that names it arrives: by name or
//! stripped, and in neither way other than the client was told.
//!
//! ```text
//! has it, and as the client was told ────────────────────────────────────────▶ passes (nearly always)
//! has it, not known how, or otherwise than the client was told ──▶ parsed anew, asked ──▶ as told: passes; else 0A000
//! has it not, the client was told nothing ──▶ parsed ──▶ passes
//! has it not, the client was told ──▶ parsed, asked ──▶ as told: passes; else 0A000
//! has it not, the client was told, and is of the rows anew ──▶ parsed with the parameters' types that it was told ──▶ passes
//! the same, and it writes ──▶ so parsed, asked for the rows ──▶ as told: passes; else 0A000
//! has it not, and would refuse to parse it ──▶ parses an empty text with the same parameters, which is answered as it would be
//! ```
//!
//! While the server is asked, the message waits: what is told otherwise than the rows will be is never bound. A client that
//! describes the portal next is told of the rows there, and nothing is asked for it, unless they are those of what writes; its parameters are in the message, as they
//! were told: these types the server is given, where it would make out others by now, and casts.

use std::rc::Rc;

use pgweir_config::StatementMode;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use super::super::plan::Plan;
use super::super::statements::Unnamed;
use super::{Renamed, Renaming, Request, Stop, is_of};
use crate::backend::Unnamed as Held;
use crate::prepared::{
    COLD_AFTER, DESCRIBES, Described, Fit, NAMED, PROMOTE_AT, Parsed, Room, STALE, STRIPPED, Statement, UNNAMED,
};
use crate::sql::FirstWord;

/// What is remembered from one message to the next of the statements that they name.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct Placing {
    /// The server was asked to describe a statement, by us.
    pub asked: bool,
    /// A statement that was parsed anew in this lease, because it was not as the client was told.
    pub renewed: Option<u64>,
    /// A statement that was to be parsed as it was prepared, under other settings than these.
    pub original: Option<u64>,
    /// The portal bound last.
    pub portal: Vec<u8>,
    /// Its statement's note, if its description is to be kept.
    pub bound: u64,
    /// A statement of ours was bound: if the server has lost it, the batch may be run again.
    pub named: bool,
    /// The portal bound last tells the client its `application_name`.
    pub shows: bool,
    /// Something of this lease did, or had statements of ours in it: what the server answers is looked at.
    pub tells: bool,
    /// The portal bound last may put settings back to where they were at the start.
    pub resets: bool,
    /// The texts that put the client's own start-up values back behind it.
    pub restores: Vec<Vec<u8>>,
    /// They are put back behind the batch as well.
    pub late: bool,
    /// It is a transaction of its own.
    pub alone: bool,
    /// What was bound last may drop statements of ours when it is executed.
    pub drops: bool,
    /// Portals that do something to names of the client's then. Where there are any, `portals_drop` says so.
    renames: Vec<(Box<[u8]>, Renaming)>,
    /// SQL may have prepared statements in this lease.
    pub prepares: bool,
    /// What the server has under the client's own names until the end of the batch: each with the number of the statement.
    pub lent: Vec<(Box<[u8]>, u64)>,
    /// Something of this lease may read the messages behind it as data.
    pub copies: bool,
    /// The unnamed portal may, or one with a name.
    portals_drop: [bool; 2],
}

impl Placing {
    /// A lease begins.
    pub fn begin(&mut self) {
        (self.asked, self.renewed, self.original, self.bound) = (false, None, None, 0);
        (self.shows, self.tells, self.resets) = (false, false, false);
        (self.prepares, self.copies) = (false, false);
        self.lent.clear();
        self.forget_portals();
    }

    /// It may be another client's next, without a lease that begins.
    #[inline]
    pub fn end(&mut self) {
        if self.drops || self.prepares || self.portals_drop != [false; 2] {
            self.begin();
        }
    }

    /// Something is about to be bound to a portal, and nothing else is from now on.
    #[inline]
    pub fn binds(&mut self, portal: &[u8]) {
        (self.shows, self.drops, self.resets) = (false, false, false);
        if self.portals_drop != [false; 2] {
            self.closes(portal);
        }
    }

    /// What was just looked at is bound to a portal: the unnamed one, which has nothing else from now on, or another.
    #[inline]
    pub fn bound_to(&mut self, unnamed: bool) {
        let [first, named] = &mut self.portals_drop;
        if unnamed { *first = self.drops } else { *named |= self.drops }
    }

    /// Whether executing a portal may drop statements of ours. When it was bound they were there, and what is parsed between
    /// the two is dropped as well.
    #[inline]
    pub const fn may_drop(&self, unnamed: bool) -> bool {
        let [first, named] = self.portals_drop;
        if unnamed { first } else { named }
    }

    /// What is being bound to a portal does something to names of the client's when it is executed.
    #[cold]
    pub fn renames(&mut self, portal: &[u8], what: Renaming) {
        if self.renames.len() == PORTALS_MAX {
            // Who has so many may find names that it has deallocated.
            self.renames.clear();
        }
        self.renames.push((portal.into(), what));
    }

    /// What the portal that `is_it` does. It does so once.
    #[cold]
    pub fn take_renaming(&mut self, is_it: impl Fn(&[u8]) -> bool) -> Option<Renaming> {
        let at = self.renames.iter().position(|(portal, _)| is_it(portal))?;
        Some(self.renames.swap_remove(at).1)
    }

    /// The note of an `Execute`.
    #[inline]
    pub(super) fn shown_by(&self, execute: &[u8]) -> u64 {
        if self.shows && is_of(&self.portal, execute) { NAMED } else { 0 }
    }

    /// A portal is closed.
    #[cold]
    pub fn closes(&mut self, portal: &[u8]) {
        self.renames.retain(|(other, _)| **other != *portal);
    }

    /// The transaction is over, and its portals are with it.
    #[inline]
    pub fn end_portals(&mut self) {
        if self.portals_drop != [false; 2] {
            self.forget_portals();
        }
    }

    /// Nothing is known of any portal: neither in another lease nor by another client is one what it was.
    fn forget_portals(&mut self) {
        (self.drops, self.portals_drop) = (false, [false; 2]);
        self.renames.clear();
    }
}

/// Portals that are remembered for what they do to names, at most.
const PORTALS_MAX: usize = 16;

/// What a statement is named for.
#[derive(Clone, Copy)]
pub struct Use<'a> {
    /// It is bound.
    pub runs: bool,
    /// The portal that it is bound to.
    pub portal: &'a [u8],
    /// Bytes of the message that names it.
    pub len: usize,
}

impl Use<'_> {
    /// It is described.
    pub const DESCRIBED: Self = Self { runs: false, portal: b"", len: 0 };
}

/// How a statement is to be where it is bound.
#[derive(Clone, Copy)]
struct Wanted {
    /// As the client was told, as far as that counts.
    described: Described,
    /// It is parsed with the types that the client was told.
    spelled: bool,
    /// The server has to be asked whether it is so.
    asks: bool,
}

impl Request<'_> {
    /// Makes sure that the server has the statement, and as the client was told, when the next message arrives.
    #[inline]
    pub(super) fn place(
        &mut self,
        statement: &Rc<Statement>,
        told: Described,
        purpose: Use<'_>,
        plan: &mut Plan<'_>,
    ) -> Result<Renamed, Stop> {
        self.marks.placing.named |= purpose.runs;
        if !purpose.runs && self.is_stripped(statement) {
            // Parsed just now, while what is kept under a name may be older than the table is.
            return Ok(Renamed::Stripped(statement.id));
        }
        if self.conn.pipeline.is_batch_open() && self.is_stripped_here(statement, told) {
            self.stats.stripped += u64::from(purpose.runs);
            self.marks.placing.bound = if told.is_known() { 0 } else { STRIPPED | statement.id };
            return Ok(Renamed::Stripped(statement.id));
        }
        if let Some(place) = self.conn.shelf.get(statement.id)
            && place.parsed.epoch == statement.epoch()
            && place.parsed.described.fits(told) == Fit::Same
        {
            self.marks.placing.bound = if told.is_known() { 0 } else { statement.id };
            return Ok(Renamed::To(statement.id));
        }
        self.place_anew(statement, told, purpose, plan)
    }

    /// Whether it is the server's unnamed statement.
    pub(super) fn is_stripped(&self, statement: &Rc<Statement>) -> bool {
        matches!(&self.conn.unnamed, Held::Holds(held, parsed)
            if Rc::ptr_eq(held, statement) && parsed.epoch == statement.epoch())
            && !self.marks.changes.is_unnamed_unsettled()
    }

    /// Whether it is kept under a name, and is the server's unnamed statement besides: it was parsed in this batch, to be
    /// described. What is kept may be gone, and nothing heals a batch of whose answer the client has a part.
    fn is_stripped_here(&self, statement: &Rc<Statement>, told: Described) -> bool {
        let fits = |parsed: &Parsed| parsed.described.fits(told) == Fit::Same;
        self.is_stripped(statement)
            && matches!(&self.conn.unnamed, Held::Holds(_, parsed) if fits(parsed))
            && self.conn.shelf.has(statement.id)
    }

    #[cold]
    fn place_anew(
        &mut self,
        statement: &Rc<Statement>,
        told: Described,
        purpose: Use<'_>,
        plan: &mut Plan<'_>,
    ) -> Result<Renamed, Stop> {
        let Wanted { described: wanted, spelled, asks } = self.wanted(statement, told, purpose, plan);
        if asks && self.marks.placing.asked {
            // One question at a time, so that its answer is not taken for another's: a statement is refused for what it says.
            return Err(Stop::Unsettled);
        }
        let renewed = self.marks.placing.renewed == Some(statement.id);
        let place = self.conn.shelf.get(statement.id).filter(|place| place.parsed.epoch == statement.epoch());
        if let Some(Parsed { described, renewed: is_new, .. }) = place.map(|place| place.parsed) {
            match described.fits(wanted) {
                Fit::Same => {
                    self.marks.placing.bound = statement.id;
                    return Ok(Renamed::To(statement.id));
                }
                Fit::Unknown | Fit::Other if is_new && renewed => {
                    self.refuse_stale(statement, plan);
                    return Ok(Renamed::Same);
                }
                Fit::Unknown | Fit::Other => self.conn.shelf.doubt(statement.id),
            }
        }
        if self.stand_in(statement, told, purpose, plan) {
            return Ok(Renamed::Stripped(statement.id));
        }
        // What waited for an answer is not run once more.
        let counts = purpose.runs && !renewed;
        if self.goes_by_name(statement, counts) && self.make_room(statement, self.cold(), plan) {
            self.send_parse(statement, Origin::Pooler, 0, spelled, plan);
            self.parsed_now(statement);
            let renamed = Renamed::To(statement.id);
            if asks {
                if let Some(place) = self.conn.shelf.get(statement.id) {
                    place.parsed.renewed = true;
                }
                return Err(self.ask(&renamed, statement, plan));
            }
            self.marks.placing.bound = statement.id;
            return Ok(renamed);
        }
        self.conn.shelf.pass();
        self.strip(statement, told, purpose, plan)?;
        self.stats.stripped += u64::from(purpose.runs);
        self.marks.placing.bound = if told.is_known() { 0 } else { STRIPPED | statement.id };
        Ok(Renamed::Stripped(statement.id))
    }

    /// Whether the pool's mode has this statement kept under a name.
    pub(super) fn goes_by_name(&self, statement: &Statement, runs: bool) -> bool {
        if matches!(self.statements.unnamed, Unnamed::Raw) {
            // Nobody has that but the server.
            return true;
        }
        match self.mode {
            StatementMode::Rewrite | StatementMode::Session => true,
            StatementMode::Strip => false,
            StatementMode::Adaptive => {
                let mut sketch = self.interner.sketch.borrow_mut();
                let count = if runs { sketch.add(statement.hash) } else { sketch.count(statement.hash) };
                count >= PROMOTE_AT
            }
        }
    }

    /// For how many executions a statement must not have been run, to make room.
    pub(super) fn cold(&self) -> Option<u64> {
        (self.mode == StatementMode::Adaptive).then_some(COLD_AFTER * self.budget.count as u64)
    }

    /// Closes what has to go before the server keeps the statement, which it does not have afterwards. False if it
    /// cannot be kept.
    pub(super) fn make_room(&mut self, statement: &Statement, cold: Option<u64>, plan: &mut Plan<'_>) -> bool {
        if self.conn.shelf.may_have(statement.id) {
            self.send_close(statement.id, plan);
        }
        loop {
            match self.conn.shelf.room(self.budget, statement.text.len() + statement.types.len(), cold) {
                Room::Enough => return true,
                Room::None => return false,
                Room::Without(id) => {
                    self.stats.statements_closed += 1;
                    self.send_close(id, plan);
                }
            }
        }
    }

    /// Makes it the server's unnamed statement, and sure that it is as the client was told.
    pub(super) fn strip(
        &mut self,
        statement: &Rc<Statement>,
        told: Described,
        purpose: Use<'_>,
        plan: &mut Plan<'_>,
    ) -> Result<(), Stop> {
        let Wanted { described: wanted, spelled, asks } = self.wanted(statement, told, purpose, plan);
        if asks && self.marks.placing.asked {
            return Err(Stop::Unsettled);
        }
        let renewed = self.marks.placing.renewed == Some(statement.id);
        if self.is_stripped(statement)
            && let Held::Holds(_, parsed) = &self.conn.unnamed
        {
            match parsed.described.fits(wanted) {
                Fit::Same => return Ok(()),
                Fit::Unknown | Fit::Other if parsed.renewed && renewed => {
                    self.refuse_stale(statement, plan);
                    return Ok(());
                }
                Fit::Unknown | Fit::Other => {}
            }
        }
        if self.stand_in(statement, told, purpose, plan) {
            return Ok(());
        }
        self.parse_stripped(statement, Origin::Pooler, 0, spelled, plan);
        self.parsed_now(statement);
        if asks {
            if let Held::Holds(_, parsed) = &mut self.conn.unnamed {
                parsed.renewed = true;
            }
            return Err(self.ask(&Renamed::Stripped(statement.id), statement, plan));
        }
        Ok(())
    }

    /// In a transaction that has failed the server parses nothing but what ends that; a statement that it has it describes, unless
    /// there are rows, and never binds. So that the client is told what it would be told of its own, an empty text with the same
    /// parameters is parsed in its place, which is never refused, and never bound there either. False if it would be answered
    /// otherwise, or that is not known.
    ///
    /// Source: `PostgreSQL` 17, `exec_parse_message`, `exec_bind_message` and `exec_describe_statement_message` in postgres.c.
    fn stand_in(&mut self, statement: &Statement, told: Described, purpose: Use<'_>, plan: &mut Plan<'_>) -> bool {
        use FirstWord::{Abort, Commit, End, Prepare, Rollback};
        let pipeline = &self.conn.pipeline;
        // To be described it serves wherever it gets; bound behind what has ended the transaction, it would be run.
        let is_refused = pipeline.status() == TxStatus::Failed && (pipeline.is_settled() || !purpose.runs);
        let is_owned = matches!(self.statements.unnamed, Unnamed::Raw);
        if !is_refused || is_owned || matches!(statement.effects.first, Commit | End | Rollback | Abort | Prepare) {
            return false;
        }
        let spelled = statement.resolved.makes(told.without_rows());
        let is_known = spelled || memchr::memchr(b'$', &statement.text).is_none();
        let is_described = purpose.runs || told.has_no_rows() || never_has_rows(statement.effects.first);
        if !(is_known && is_described) {
            return false;
        }
        self.marks.placing.bound = 0;
        self.conn.pipeline.sent(Expect::Parse, Origin::Pooler, UNNAMED);
        self.replace_held(Held::Unknown);
        self.stats.server_parses += 1;
        plan.insert(|out| statement.with_types(spelled, |types| encode::parse(out, b"", b"", types)));
        true
    }

    /// An unnamed `Parse` of the statement; `spelled` with the types that a client was told.
    pub(super) fn parse_stripped(
        &mut self,
        statement: &Rc<Statement>,
        origin: Origin,
        note: u64,
        spelled: bool,
        plan: &mut Plan<'_>,
    ) {
        self.conn.pipeline.sent(Expect::Parse, origin, note | UNNAMED | statement.id);
        self.replace_held(Held::parsed(statement.clone()));
        if let Held::Holds(_, parsed) = &mut self.conn.unnamed {
            (parsed.described, parsed.spelled) = statement.resolved.certain(spelled);
        }
        self.stats.server_parses += 1;
        plan.insert(|out| statement.with_types(spelled, |types| encode::parse(out, b"", &statement.text, types)));
    }

    /// What of that which the client was `told` has to be so when it is bound. A client that describes the portal with its very next
    /// message is told there of the rows, and of nothing else; but the rows of what writes are to be as it was told before, as on
    /// a server connection of its own. Where nothing is kept every execution would have to wait for that.
    fn wanted(&self, statement: &Statement, told: Described, purpose: Use<'_>, plan: &Plan<'_>) -> Wanted {
        if !purpose.runs {
            // What is described now is told now.
            return Wanted { described: Described::default(), spelled: false, asks: false };
        }
        let is_told = describes_next(b'P', purpose.portal, purpose.len, plan);
        let anew = is_told && (self.mode == StatementMode::Strip || !returns(statement));
        let described = if anew { told.without_rows() } else { told };
        let spells = is_told || described.is_of_parameters();
        let spelled = spells && statement.resolved.makes(described.without_rows());
        let asks = described.is_known() && !(spelled && described.is_of_parameters());
        Wanted { described, spelled, asks }
    }

    /// The server is asked how it describes what it was just given. What waits for the answer stops here.
    fn ask(&mut self, renamed: &Renamed, statement: &Statement, plan: &mut Plan<'_>) -> Stop {
        self.marks.placing.asked = true;
        self.marks.placing.renewed = Some(statement.id);
        self.conn.pipeline.sent(Expect::Describe, Origin::Pooler, DESCRIBES | renamed.note());
        self.renamed(b'D', renamed, plan);
        plan.insert(|out| out.extend_from_slice(&encode::FLUSH));
        Stop::Unsettled
    }

    /// The server describes the statement otherwise than the client was told: it would read the rows wrong.
    fn refuse_stale(&mut self, statement: &Statement, plan: &mut Plan<'_>) {
        // Whatever servers have of it, the client's next `Parse` of the text is to be a real one.
        statement.outdate();
        self.marks.placing.renewed = None;
        self.refuse(STALE, plan);
    }
}

/// Whether the client describes the statement `name` with the message behind the next `len` bytes.
pub(super) fn is_described_next(name: &[u8], len: usize, plan: &Plan<'_>) -> bool {
    describes_next(b'S', name, len, plan)
}

/// Whether a statement of this command tells no rows, whatever it is about.
const fn never_has_rows(first: FirstWord) -> bool {
    use FirstWord::{Begin, Close, Deallocate, Discard, Listen, Lock, Notify, Release, Reset, Savepoint};
    use FirstWord::{Set, Start, Unlisten};
    matches!(
        first,
        Begin
            | Close
            | Deallocate
            | Discard
            | Listen
            | Lock
            | Notify
            | Release
            | Reset
            | Savepoint
            | Set
            | Start
            | Unlisten
    )
}

/// Whether it changes tables and tells rows of that: what it has done cannot be taken back when these turn out to be other ones.
fn returns(statement: &Statement) -> bool {
    const CLAUSE: &[u8] = b"returning";
    use FirstWord::{Delete, Insert, Merge, Update, With};
    matches!(statement.effects.first, Insert | Update | Delete | Merge | With)
        && statement.text.windows(CLAUSE.len()).any(|word| word.eq_ignore_ascii_case(CLAUSE))
}

fn describes_next(kind: u8, name: &[u8], len: usize, plan: &Plan<'_>) -> bool {
    let next = plan.rest().get(len..).and_then(|next| next.split_first_chunk::<6>());
    let Some(([b'D', _, _, _, _, of], rest)) = next else { return false };
    *of == kind && rest.strip_prefix(name).is_some_and(|rest| rest.first() == Some(&0))
}
