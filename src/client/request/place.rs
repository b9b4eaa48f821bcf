//! How a statement of the client's comes to be on the server connection when the message that names it arrives: by name or
//! stripped, and in neither way other than the client was told.
//!
//! ```text
//! has it, and as the client was told ────────────────────────────────────────▶ passes (nearly always)
//! has it, not known how, or otherwise than the client was told ──▶ parsed anew, asked ──▶ as told: passes; else 0A000
//! has it not, the client was told nothing ──▶ parsed ──▶ passes
//! has it not, the client was told ──▶ parsed, asked ──▶ as told: passes; else 0A000
//! has it not, the client was told, and is of the rows anew ──▶ parsed with the parameters' types that it was told ──▶ passes
//! ```
//!
//! While the server is asked, the message waits: what is told otherwise than the rows will be is never bound. A client that
//! describes the portal next is told of the rows there, and nothing is asked for it; its parameters are in the message, as they
//! were told: these types the server is given, where it would make out others by now, and casts.

use std::rc::Rc;

use pgweir_config::StatementMode;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use super::super::plan::Plan;
use super::{Renamed, Request, Stop};
use crate::backend::Unnamed as Held;
use crate::prepared::{
    COLD_AFTER, DESCRIBES, Described, Fit, PROMOTE_AT, Parsed, Room, STALE, STRIPPED, Statement, UNNAMED,
};

/// What is remembered from one message to the next of the statements that they name.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub struct Placing {
    /// The server was asked to describe a statement, by us.
    pub asked: bool,
    /// A statement that was parsed anew in this lease, because it was not as the client was told.
    pub renewed: Option<u64>,
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
    /// Something in front of it is still to be followed by them.
    pub late: bool,
    /// What was bound last may drop statements of ours when it is executed.
    pub drops: bool,
    /// The unnamed portal may, or one with a name.
    portals_drop: [bool; 2],
}

impl Placing {
    /// A lease begins.
    pub fn begin(&mut self) {
        (self.asked, self.renewed, self.bound) = (false, None, 0);
        (self.shows, self.tells, self.resets) = (false, false, false);
        self.end_portals();
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

    /// The transaction is over, and its portals are with it.
    #[inline]
    pub const fn end_portals(&mut self) {
        self.portals_drop = [false; 2];
    }
}

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
        let wanted = wanted(told, purpose, plan);
        let spelled = statement.resolved.makes(wanted);
        let asks = wanted.is_known() && !spelled;
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
        // What waited for an answer is not run once more.
        let counts = purpose.runs && !renewed;
        if self.goes_by_name(statement, counts) && self.make_room(statement, self.cold(), plan) {
            self.send_parse(statement, Origin::Pooler, 0, spelled, plan);
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
        let wanted = wanted(told, purpose, plan);
        let spelled = statement.resolved.makes(wanted);
        let asks = wanted.is_known() && !spelled;
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
        self.parse_stripped(statement, Origin::Pooler, 0, spelled, plan);
        if asks {
            if let Held::Holds(_, parsed) = &mut self.conn.unnamed {
                parsed.renewed = true;
            }
            return Err(self.ask(&Renamed::Stripped(statement.id), statement, plan));
        }
        Ok(())
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

/// What of that which the client was `told` has to be so when it is bound. A client that describes the portal with its very next
/// message is told there of the rows, and of nothing else.
fn wanted(told: Described, purpose: Use<'_>, plan: &Plan<'_>) -> Described {
    if !purpose.runs {
        // What is described now is told now.
        return Described::default();
    }
    if describes_next(b'P', purpose.portal, purpose.len, plan) { told.without_rows() } else { told }
}

fn describes_next(kind: u8, name: &[u8], len: usize, plan: &Plan<'_>) -> bool {
    let next = plan.rest().get(len..).and_then(|next| next.split_first_chunk::<6>());
    let Some(([b'D', _, _, _, _, of], rest)) = next else { return false };
    *of == kind && rest.strip_prefix(name).is_some_and(|rest| rest.first() == Some(&0))
}
