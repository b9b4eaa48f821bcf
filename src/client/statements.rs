//! The prepared statements of one client: its own names for interned statements.
//!
//! A name changes when its message is passed on, not when the server answers: what follows is judged by it. So
//! every change is kept until the server confirms it, and taken back if the server never got to it. Behind a
//! `Sync` it matters whether it did: while a change of an earlier batch is unconfirmed, names are
//! [unsettled](Look::Unsettled), and whoever asks has to wait. So is the unnamed statement for a batch that does not begin
//! with its own `Parse` of it: those of pipelines do. Were it not, a batch could run what the server holds of a stranger's.
//!
//! The unnamed statement is two: the client's, and what the server connection holds, which messages of ours replace, too.
//! Each change of either remembers what was there before it. Of what the server skipped together the oldest tells what is there
//! now; if a later batch has replaced that, it is what that batch found.

use std::collections::VecDeque;
use std::rc::Rc;

use hashbrown::HashMap;

use crate::backend::Unnamed as Held;
use crate::prepared::{Described, Statement};
use crate::sql;

/// What a name of the client's stands for.
#[derive(Clone, Debug)]
pub enum Named {
    /// A statement that is run under a name of ours or none, and how it was described to the client.
    Shared(Rc<Statement>, Described),
    /// A text too long to be kept: it has the client's own name, on the server connection that the client
    /// keeps from then on.
    Raw,
}

/// What is known of a name.
#[derive(Clone, Debug)]
pub enum Look {
    /// It stands for nothing.
    Unknown,
    /// It stands for this.
    Named(Named),
    /// That depends on answers which are still to come.
    Unsettled,
}

/// The unnamed statement, as the client sees it.
#[derive(Clone, Debug, Default)]
pub enum Unnamed {
    /// None: never parsed, or destroyed by a simple query.
    #[default]
    Empty,
    /// This one, and how it was described to the client.
    Holds(Rc<Statement>, Described),
    /// One too long to be kept, on the server connection that the client keeps.
    Raw,
}

/// A change that the server has not confirmed yet.
#[derive(Debug)]
enum Change {
    /// A `Parse` gave the name.
    Parsed(Box<[u8]>),
    /// A `Close` took the name from what it stood for, or a `DEALLOCATE` by the extended protocol.
    Closed(Box<[u8]>, Option<Named>),
    /// A `DEALLOCATE ALL` or `DISCARD ALL` by the extended protocol took all names: these.
    Cleared(Box<Names>),
    /// A `Parse` or `Close` replaced the unnamed statement: the client's, of which this made that version, and the server
    /// connection's.
    Unnamed(Unnamed, u32, Replaced),
    /// Something of ours replaced the server connection's alone.
    Held(Replaced),
    /// A `Parse` for a name in use: nothing changes, but the error has to bear the client's name.
    Refused(Box<[u8]>),
}

/// What the server connection held as its unnamed statement, and the version that the replacement made.
#[derive(Debug)]
struct Replaced {
    before: Held,
    version: u32,
}

impl Change {
    fn replaced(&mut self) -> Option<&mut Replaced> {
        match self {
            Self::Unnamed(_, _, replaced) | Self::Held(replaced) => Some(replaced),
            _ => None,
        }
    }
}

/// The changes of one lease, in the order in which the server gets to them.
#[derive(Debug, Default)]
pub struct Changes {
    queue: VecDeque<Change>,
    /// Messages so far that end a batch.
    batch: u32,
    /// Unconfirmed changes of names, and of what the server connection has, that are not in the queue.
    named: u32,
    /// The batch of the last of them.
    named_batch: u32,
    /// How often the client's unnamed statement was replaced.
    version: u32,
    /// How often the server connection's was.
    held_version: u32,
    /// Unconfirmed changes of the server connection's unnamed statement.
    unnamed: u32,
    /// The batch of the last of them.
    unnamed_batch: u32,
    /// Unconfirmed changes of the client's own unnamed statement.
    own: u32,
    /// The batch of the last of them.
    own_batch: u32,
    /// A query on its way may deallocate statements, or execute some.
    awaited: Option<Box<Awaited>>,
}

/// What is awaited of a query that is about statements of the client's by their names.
#[derive(Debug, Default)]
struct Awaited {
    /// The names that it deallocates, in its order.
    deallocates: VecDeque<Box<[u8]>>,
    /// Those that the server was lent for it, in that order; with the body of the error by which one was refused.
    executes: Vec<(Box<[u8]>, Option<Box<[u8]>>)>,
    /// How many of them the server has dealt with.
    lent: usize,
}

impl Awaited {
    /// The refusal that an error says no more of than that something is not there: in a transaction, that it has failed.
    fn take_refusal(&mut self, code: &[u8], body: &[u8]) -> Option<Box<[u8]>> {
        let tells = |name: &[u8]| QUOTES.iter().any(|[open, close]| is_quoted(body, name, open, close));
        let is_it = |(name, refusal): &(Box<[u8]>, Option<Box<[u8]>>)| {
            refusal.is_some() && (code == b"25P02" || code == b"26000" && tells(name))
        };
        let at = self.executes.iter().position(is_it)?;
        self.executes.get_mut(at)?.1.take()
    }
}

/// What stands around names in the errors of servers, whatever their language.
const QUOTES: [[&str; 2]; 5] = [["\"", "\""], ["»", "«"], ["«", "»"], ["„", "“"], ["“", "”"]];

fn is_quoted(body: &[u8], name: &[u8], open: &str, close: &str) -> bool {
    memchr::memmem::find(body, &[open.as_bytes(), name, close.as_bytes()].concat()).is_some()
}

impl Changes {
    /// The batch that is being passed on.
    #[must_use]
    pub const fn batch(&self) -> u32 {
        self.batch
    }

    /// A `Sync`, `Query` or `FunctionCall` was passed on.
    #[inline]
    pub fn next_batch(&mut self) {
        self.batch = self.batch.wrapping_add(1);
    }

    /// The unnamed statement was destroyed for good: what is taken back later does not bring it back.
    #[inline]
    pub fn unnamed_destroyed(&mut self) {
        self.version = self.version.wrapping_add(1);
        self.held_destroyed();
    }

    /// The same of the server connection's alone: what it is now has nothing to do with what is taken back later.
    #[inline]
    pub fn held_destroyed(&mut self) {
        self.held_version = self.held_version.wrapping_add(1);
    }

    /// Something of ours that replaces the server connection's unnamed statement is on its way; it had `before`.
    pub fn replaced_held(&mut self, before: Held) {
        let replaced = self.replace_held(before);
        self.queue.push_back(Change::Held(replaced));
    }

    #[inline]
    fn replace_held(&mut self, before: Held) -> Replaced {
        self.held_destroyed();
        self.unnamed += 1;
        self.unnamed_batch = self.batch;
        Replaced { before, version: self.held_version }
    }

    /// The oldest change, which is one of these, took effect.
    pub fn confirm_held(&mut self) {
        let confirmed = self.queue.pop_front();
        debug_assert!(matches!(confirmed, Some(Change::Held(_))), "{confirmed:?} was confirmed as a change of ours");
    }

    /// A `Parse` for a name in use was passed on.
    pub fn refused(&mut self, name: &[u8]) {
        self.begin_named();
        self.queue.push_back(Change::Refused(name.into()));
    }

    /// The client's unnamed statement is `before`, as the replacements up to `version` never happened. If something of a later
    /// batch replaced it, this is what that found.
    fn take_back_own(&mut self, before: Unnamed, version: u32, own: &mut Unnamed) {
        if self.version == version {
            *own = before;
            return;
        }
        let next = version.wrapping_add(1);
        let found = self.queue.iter_mut().find_map(|change| match change {
            Change::Unnamed(found, made, _) if *made == next => Some(found),
            _ => None,
        });
        if let Some(found) = found {
            *found = before;
        }
    }

    /// The same of the server connection's.
    fn take_back_held(&mut self, Replaced { before, version }: Replaced, held: &mut Held) {
        if self.held_version == version {
            *held = before;
            return;
        }
        let next = version.wrapping_add(1);
        if let Some(found) = self.queue.iter_mut().filter_map(Change::replaced).find(|found| found.version == next) {
            found.before = before;
        }
    }

    /// A query failed, and may have done so before it destroyed what the server connection held: whether that is still there is
    /// not known to whatever comes next.
    pub fn doubt_destroyed(&mut self, held: &mut Held) {
        match self.queue.iter_mut().find_map(Change::replaced) {
            Some(next) => next.before = Held::Unknown,
            None => *held = Held::Unknown,
        }
    }

    /// What the server connection held before any unconfirmed change is of no more use.
    pub fn doubt_held(&mut self) {
        for replaced in self.queue.iter_mut().filter_map(Change::replaced) {
            replaced.before = Held::Unknown;
        }
    }

    /// The server has told how it describes the statement `id`, which it holds. False if nothing on its way is to replace it.
    #[must_use]
    pub fn describe_replaced(&mut self, id: u64, described: Described) -> bool {
        let next = self.queue.iter_mut().find_map(Change::replaced);
        next.map(|next| next.before.describe(id, described)).is_some()
    }

    /// A change of the server connection's unnamed statement came to its end, whichever.
    #[inline]
    pub fn end_unnamed(&mut self) {
        self.unnamed = self.unnamed.saturating_sub(1);
    }

    /// Whether it is not certain what the client's own unnamed statement is when a message of this batch gets there.
    #[must_use]
    #[inline]
    pub fn is_own_unsettled(&self) -> bool {
        self.own > 0 && self.own_batch != self.batch
    }

    /// Whether it is not certain what the server's unnamed statement is when a message of this batch gets there: a change
    /// of an earlier batch may have been skipped.
    #[must_use]
    #[inline]
    pub fn is_unnamed_unsettled(&self) -> bool {
        self.unnamed > 0 && self.unnamed_batch != self.batch
    }

    /// A change of a name, or of the named statements that the server connection has, is on its way.
    pub fn begin_named(&mut self) {
        self.named += 1;
        self.named_batch = self.batch;
    }

    /// It came to its end, whichever.
    pub fn end_named(&mut self) {
        self.named = self.named.saturating_sub(1);
    }

    /// Whether it is not certain what names stand for when a message of this batch gets there.
    #[must_use]
    #[inline]
    pub fn are_names_unsettled(&self) -> bool {
        self.named > 0 && self.named_batch != self.batch
    }

    /// A query is about to be passed on that may deallocate statements: all, or those with these names. Each is forgotten when the
    /// server says that it is gone, whatever becomes of the rest of the query. It may also execute some, which were lent for it.
    /// Only one such is on its way at a time.
    pub fn begin_query(&mut self, deallocates: VecDeque<Box<[u8]>>, executes: Vec<Box<[u8]>>) {
        debug_assert!(self.awaited.is_none(), "two queries that deallocate are on their way");
        self.begin_named();
        self.awaited = Some(Box::new(Awaited {
            deallocates,
            executes: executes.into_iter().map(|name| (name, None)).collect(),
            lent: 0,
        }));
    }

    /// The server refused to take what that query executes: the error's body.
    pub fn refused_lent(&mut self, body: &[u8]) {
        if let Some(awaited) = &mut self.awaited
            && let Some((_, refusal)) = awaited.executes.get_mut(awaited.lent)
        {
            *refusal = Some(body.into());
        }
        self.end_lent();
    }

    /// The server has dealt with one of those that it was lent.
    pub fn end_lent(&mut self) {
        if let Some(awaited) = &mut self.awaited {
            awaited.lent += 1;
        }
    }

    /// What is to be told in the place of an error of that query, if that says no more than that something was not taken.
    pub fn take_refusal(&mut self, code: &[u8], body: &[u8]) -> Option<Box<[u8]>> {
        self.awaited.as_mut()?.take_refusal(code, body)
    }

    /// Whether such a query is on its way.
    #[must_use]
    #[inline]
    pub const fn awaits_query(&self) -> bool {
        self.awaited.is_some()
    }

    /// It came to its end, or never ran.
    pub fn end_query(&mut self) {
        if self.awaited.take().is_some() {
            self.end_named();
        }
    }

    /// The name that the oldest change is about, if that is a refused `Parse`.
    #[must_use]
    pub fn refused_name(&self) -> Option<&[u8]> {
        match self.queue.front() {
            Some(Change::Refused(name)) => Some(name),
            _ => None,
        }
    }

    /// How the statement `id` was described to the client, if its name is about to be taken away.
    fn told(&mut self, id: u64, described: Described) {
        for change in &mut self.queue {
            let taken = match change {
                Change::Closed(_, taken) => taken.as_mut(),
                Change::Cleared(names) => names.of(id),
                _ => None,
            };
            if let Some(Named::Shared(statement, told)) = taken
                && statement.id == id
            {
                *told = told.with(described);
            }
        }
    }

    /// Whether nothing is unconfirmed.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.named == 0 && self.unnamed == 0
    }
}

#[derive(Debug, Default)]
struct Name {
    named: Option<Named>,
    /// Unconfirmed changes.
    pending: u32,
}

/// A client's names. However many there are, each question takes one look: clients have thousands.
#[derive(Debug, Default)]
struct Names {
    by_name: HashMap<Rc<[u8]>, Name, foldhash::fast::RandomState>,
    /// The name of a statement of ours, by its number: no client has one under two names.
    by_id: HashMap<u64, Rc<[u8]>, foldhash::fast::RandomState>,
    /// The numbers that were replaced last by others of the same texts, the latest at the end: an error of an execution under way
    /// may still be about one. It is told without a name if there were more in one batch.
    former: Vec<(u64, Rc<[u8]>)>,
}

/// Numbers that were replaced, of one client, at most.
const FORMER_MAX: usize = 8;

impl Names {
    /// What the name of the statement `id` stands for.
    fn of(&mut self, id: u64) -> Option<&mut Named> {
        let name = self.by_id.get(&id)?;
        self.by_name.get_mut(name)?.named.as_mut()
    }

    fn get(&self, id: u64) -> Option<&Named> {
        self.by_name.get(self.by_id.get(&id)?)?.named.as_ref()
    }

    /// What a known name stands for from now on. Returns what it stood for.
    fn set(&mut self, name: &[u8], named: Option<Named>) -> Option<Named> {
        let (name, known) = self.by_name.get_key_value_mut(name)?;
        let before = std::mem::replace(&mut known.named, named);
        if let Some(Named::Shared(statement, _)) = &before {
            self.by_id.remove(&statement.id);
        }
        if let Some(Named::Shared(statement, _)) = &known.named {
            let other = self.by_id.insert(statement.id, name.clone());
            debug_assert!(other.is_none(), "one statement under two names of one client");
        }
        before
    }

    /// A change of the name has come to its end.
    fn settle(&mut self, name: &[u8]) {
        let Some(known) = self.by_name.get_mut(name) else { return };
        known.pending = known.pending.saturating_sub(1);
        if known.pending == 0 && known.named.is_none() {
            self.by_name.remove(name);
        }
    }

    /// A change of the name never happened.
    fn take_back(&mut self, name: &[u8], before: Option<Named>) {
        self.set(name, before);
        self.settle(name);
    }

    /// No name stands for anything any more.
    fn clear(&mut self) {
        self.by_id.clear();
        self.former.clear();
        self.by_name.retain(|_, known| {
            known.named = None;
            known.pending > 0
        });
    }

    /// Takes what the names stand for; of these, those with unconfirmed changes stay. What stands for nothing is left where it is:
    /// however often all are taken, and however many changes are under way, each meaning is moved once.
    fn take_all(&mut self) -> Self {
        let mut taken = Self {
            by_id: std::mem::take(&mut self.by_id),
            former: std::mem::take(&mut self.former),
            ..Self::default()
        };
        self.by_name.retain(|name, known| {
            let (named, is_pending) = (known.named.take(), known.pending > 0);
            if named.is_some() {
                taken.by_name.insert(name.clone(), Name { named, pending: 0 });
            }
            is_pending
        });
        taken
    }

    /// What `before` says of what names stand for holds again.
    fn restore(&mut self, before: Self) {
        for (name, known) in before.by_name {
            if known.named.is_some() {
                self.by_name.entry(name.clone()).or_default();
                self.set(&name, known.named);
            }
        }
        self.former = before.former;
    }
}

/// One client's statements. One that never named any costs a null pointer.
#[derive(Debug, Default)]
pub struct Statements {
    named: Option<Box<Names>>,
    /// Its unnamed statement.
    pub unnamed: Unnamed,
}

impl Statements {
    /// What `name` stands for.
    #[inline]
    pub fn look(&self, name: &[u8], changes: &Changes) -> Look {
        if changes.are_names_unsettled() {
            return Look::Unsettled;
        }
        let known = self.named.as_ref().and_then(|names| names.by_name.get(name));
        known.and_then(|known| known.named.clone()).map_or(Look::Unknown, Look::Named)
    }

    /// Whether any name may stand for something.
    #[must_use]
    pub fn has_names(&self) -> bool {
        self.named.as_ref().is_some_and(|names| !names.by_name.is_empty())
    }

    /// Whether `most` names are in use.
    #[must_use]
    pub fn is_full(&self, most: usize) -> bool {
        let Some(names) = &self.named else { return most == 0 };
        // Names whose Close is not confirmed are still there, and count for nothing.
        names.by_name.len() >= most && names.by_name.values().filter(|known| known.named.is_some()).count() >= most
    }

    /// A `Parse` for `name` is on its way, or will be answered here.
    pub fn parsed(&mut self, name: &[u8], named: Named, changes: &mut Changes) {
        self.change(name, Some(named));
        changes.begin_named();
        changes.queue.push_back(Change::Parsed(name.into()));
    }

    /// A `DEALLOCATE ALL` or `DISCARD ALL` is on its way, behind nothing of an earlier batch that is about names.
    pub fn cleared(&mut self, changes: &mut Changes) {
        let before = self.named.get_or_insert_default().take_all();
        changes.begin_named();
        changes.queue.push_back(Change::Cleared(Box::new(before)));
    }

    /// A `Close` of `name` is on its way, or will be answered here.
    pub fn closed(&mut self, name: &[u8], changes: &mut Changes) {
        let previous = self.change(name, None);
        changes.begin_named();
        changes.queue.push_back(Change::Closed(name.into(), previous));
    }

    /// A `Parse` of the unnamed statement is on its way; `held` is what the server connection had.
    pub fn parsed_unnamed(&mut self, unnamed: Unnamed, held: Held, changes: &mut Changes) {
        let previous = std::mem::replace(&mut self.unnamed, unnamed);
        changes.version = changes.version.wrapping_add(1);
        changes.own += 1;
        changes.own_batch = changes.batch;
        let replaced = changes.replace_held(held);
        changes.queue.push_back(Change::Unnamed(previous, changes.version, replaced));
    }

    fn change(&mut self, name: &[u8], named: Option<Named>) -> Option<Named> {
        let all = self.named.get_or_insert_default();
        all.by_name.entry(name.into()).or_default().pending += 1;
        all.set(name, named)
    }

    /// The oldest change took effect.
    pub fn confirm(&mut self, changes: &mut Changes) {
        match changes.queue.pop_front() {
            Some(Change::Parsed(name) | Change::Closed(name, _)) => {
                changes.end_named();
                if let Some(names) = &mut self.named {
                    names.settle(&name);
                }
            }
            Some(Change::Refused(_) | Change::Cleared(_)) => changes.end_named(),
            Some(Change::Unnamed(..)) => changes.own = changes.own.saturating_sub(1),
            Some(Change::Held(_)) | None => {}
        }
    }

    /// The `count` oldest changes never happened: the server skipped or refused them. `held` is the server
    /// connection's unnamed statement. `failed`: the oldest of those that replace it is a `Parse` that failed itself. Postgres
    /// destroys what was there before it looks at the text; but it may not have got that far.
    pub fn undo(&mut self, count: usize, failed: bool, changes: &mut Changes, held: &mut Held) {
        let count = count.min(changes.queue.len());
        let mut undone: Vec<Change> = changes.queue.drain(..count).collect();
        if failed {
            for change in &mut undone {
                if let Change::Unnamed(previous, ..) = change {
                    *previous = Unnamed::Empty;
                }
                if let Some(replaced) = change.replaced() {
                    replaced.before = Held::Unknown;
                    break;
                }
            }
        }
        let mut own: Option<(Unnamed, u32)> = None;
        let mut server: Option<Replaced> = None;
        // The last first: each knows what was there before it. Of the unnamed statement the first tells what was before them all,
        // and the last what they had made of it.
        while let Some(change) = undone.pop() {
            let replaced = match change {
                Change::Parsed(name) => {
                    self.take_back(&name, None);
                    changes.end_named();
                    continue;
                }
                Change::Closed(name, previous) => {
                    self.take_back(&name, previous);
                    changes.end_named();
                    continue;
                }
                Change::Cleared(before) => {
                    self.named.get_or_insert_default().restore(*before);
                    changes.end_named();
                    continue;
                }
                Change::Refused(_) => {
                    changes.end_named();
                    continue;
                }
                Change::Unnamed(previous, version, replaced) => {
                    changes.own = changes.own.saturating_sub(1);
                    own = Some((previous, own.map_or(version, |(_, last)| last)));
                    replaced
                }
                Change::Held(replaced) => replaced,
            };
            let version = server.map_or(replaced.version, |last| last.version);
            server = Some(Replaced { version, ..replaced });
        }
        if let Some((before, version)) = own {
            changes.take_back_own(before, version, &mut self.unnamed);
        }
        if let Some(replaced) = server {
            changes.take_back_held(replaced, held);
        }
    }

    /// Every change is moot: the server connection is gone.
    pub fn undo_all(&mut self, changes: &mut Changes) {
        self.undo(changes.queue.len(), false, changes, &mut Held::Empty);
        (changes.named, changes.unnamed, changes.own) = (0, 0, 0);
        changes.awaited = None;
    }

    fn take_back(&mut self, name: &[u8], before: Option<Named>) {
        if let Some(names) = &mut self.named {
            names.take_back(name, before);
        }
    }

    /// A query that may deallocate statements has done something: `tag` is that of a `CommandComplete`. The unnamed statement is
    /// none of them.
    pub fn deallocated(&mut self, tag: &[u8], changes: &mut Changes) {
        match tag {
            b"DEALLOCATE" => {
                let name = changes.awaited.as_mut().and_then(|awaited| awaited.deallocates.pop_front());
                if let Some(name) = name {
                    self.forget(&name);
                }
            }
            b"DEALLOCATE ALL" | b"DISCARD ALL" => {
                if let Some(names) = &mut self.named {
                    names.clear();
                }
            }
            _ => {}
        }
    }

    /// Whether what `name` stands for is a ROLLBACK or COMMIT; the empty name is the unnamed statement's.
    #[must_use]
    pub fn ends_transaction(&self, name: &[u8]) -> bool {
        let statement = match (&self.unnamed, self.named.as_ref().and_then(|names| names.by_name.get(name))) {
            (Unnamed::Holds(statement, _), _) if name.is_empty() => statement,
            (_, Some(Name { named: Some(Named::Shared(statement, _)), .. })) => statement,
            _ => return false,
        };
        sql::is_transaction_end(&statement.text)
    }

    /// `name` stands for another statement of ours, with the same text.
    pub fn rename(&mut self, name: &[u8], statement: &Rc<Statement>) {
        let Some(names) = &mut self.named else { return };
        if let Some(Name { named: Some(Named::Shared(old, told)), .. }) = names.by_name.get(name)
            && !Rc::ptr_eq(old, statement)
        {
            let (former, renamed) = (old.id, Named::Shared(statement.clone(), *told));
            names.set(name, Some(renamed));
            if names.former.len() == FORMER_MAX {
                names.former.remove(0);
            }
            names.former.push((former, name.into()));
        }
    }

    /// The client was told how the statement `id` is described.
    pub fn told(&mut self, id: u64, described: Described, changes: &mut Changes) {
        let mut is_known = false;
        if let Some(Named::Shared(_, told)) = self.named.as_mut().and_then(|names| names.of(id)) {
            *told = told.with(described);
            is_known = true;
        }
        if let Unnamed::Holds(statement, told) = &mut self.unnamed
            && statement.id == id
        {
            *told = told.with(described);
            is_known = true;
        }
        if !is_known {
            changes.told(id, described);
        }
    }

    /// A server has told the types of the parameters of the statement `id` of the client's; see [`Statement::resolve`].
    pub fn resolve(&self, id: u64, described: Described, body: &[u8]) {
        if let Some(Named::Shared(statement, _)) = self.named.as_ref().and_then(|names| names.get(id)) {
            statement.resolve(described, body);
        } else if let Unnamed::Holds(statement, _) = &self.unnamed
            && statement.id == id
        {
            statement.resolve(described, body);
        }
    }

    /// What servers have parsed of the statement `id` of the client's is of no more use.
    pub fn outdate(&mut self, id: u64) {
        match (self.named.as_mut().and_then(|names| names.of(id)), &self.unnamed) {
            (Some(Named::Shared(statement, _)), _) => statement.outdate(),
            (_, Unnamed::Holds(statement, _)) if statement.id == id => statement.outdate(),
            _ => {}
        }
    }

    /// The statement `id` of the client's, if it is known, or was until what is on its way: for the positions in errors.
    #[cold]
    #[must_use]
    pub fn find<'a>(&'a self, id: u64, changes: &'a Changes) -> Option<&'a Rc<Statement>> {
        let named = |named: &'a Named| if let Named::Shared(statement, _) = named { Some(statement) } else { None };
        let unnamed =
            |unnamed: &'a Unnamed| if let Unnamed::Holds(statement, _) = unnamed { Some(statement) } else { None };
        let taken = changes.queue.iter().filter_map(|change| match change {
            Change::Closed(_, taken) => taken.as_ref().and_then(named),
            Change::Cleared(all) => all.get(id).and_then(named),
            Change::Unnamed(before, ..) => unnamed(before),
            Change::Parsed(_) | Change::Held(_) | Change::Refused(_) => None,
        });
        let known = self.named.as_ref().and_then(|names| names.get(id)).and_then(named);
        known.into_iter().chain(unnamed(&self.unnamed)).chain(taken).find(|statement| statement.id == id)
    }

    /// `DEALLOCATE` of one name: it stands for nothing any more. None of its changes may be unconfirmed.
    pub fn forget(&mut self, name: &[u8]) {
        if let Some(names) = &mut self.named {
            names.set(name, None);
            names.by_name.remove(name);
            names.former.clear();
        }
    }

    /// The client's own name for the statement `id`, for the wording of errors.
    #[must_use]
    pub fn name_of<'a>(&'a self, id: u64, changes: &'a Changes) -> Option<&'a [u8]> {
        let names = self.named.as_ref()?;
        let closed = || {
            changes.queue.iter().find_map(|change| match change {
                Change::Closed(name, Some(Named::Shared(statement, _))) if statement.id == id => Some(&**name),
                Change::Cleared(names) => names.by_id.get(&id).map(|name| &**name),
                _ => None,
            })
        };
        let former = || names.former.iter().rfind(|(former, _)| *former == id).map(|(_, name)| &**name);
        names.by_id.get(&id).map(|name| &**name).or_else(closed).or_else(former)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::prepared::Interner;
    use crate::sql::Effects;

    fn shared(interner: &Interner, text: &[u8]) -> Named {
        Named::Shared(interner.intern(1, 0, text, b"\0\0", |_| Effects::default()), Described::default())
    }

    fn knows(statements: &Statements, name: &[u8], changes: &Changes) -> bool {
        matches!(statements.look(name, changes), Look::Named(_))
    }

    #[test]
    fn what_never_ran_is_taken_back_the_last_first() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes, mut held) = (Statements::default(), Changes::default(), Held::Empty);
        statements.parsed(b"a", shared(&interner, b"SELECT 1"), &mut changes);
        statements.confirm(&mut changes);
        statements.closed(b"a", &mut changes);
        statements.parsed(b"a", shared(&interner, b"SELECT 2"), &mut changes);
        statements.parsed(b"b", shared(&interner, b"SELECT 3"), &mut changes);
        statements.closed(b"b", &mut changes);
        assert!(knows(&statements, b"a", &changes) && !knows(&statements, b"b", &changes));
        statements.undo(4, false, &mut changes, &mut held);
        let Look::Named(Named::Shared(a, _)) = statements.look(b"a", &changes) else { panic!("a is gone") };
        assert_eq!((&*a.text, changes.is_empty()), (&b"SELECT 1"[..], true));
        assert!(statements.is_full(1) && !statements.is_full(2));
    }

    #[test]
    fn a_name_is_unsettled_only_behind_its_batch_and_until_it_is_confirmed() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes) = (Statements::default(), Changes::default());
        statements.parsed(b"a", shared(&interner, b"SELECT 1"), &mut changes);
        assert!(knows(&statements, b"a", &changes));
        changes.next_batch();
        assert!(matches!(statements.look(b"a", &changes), Look::Unsettled));
        statements.confirm(&mut changes);
        assert!(knows(&statements, b"a", &changes));
    }

    #[test]
    fn the_unnamed_statement_of_a_parse_that_never_ran_is_the_one_before() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes) = (Statements::default(), Changes::default());
        let statement = |text: &[u8]| interner.intern(1, 0, text, b"\0\0", |_| Effects::default());
        let (one, two) = (statement(b"SELECT 1"), statement(b"SELECT 2"));
        let mut held = Held::parsed(one.clone());
        statements.unnamed = Unnamed::Holds(one.clone(), Described::default());
        let before = std::mem::replace(&mut held, Held::parsed(two.clone()));
        statements.parsed_unnamed(Unnamed::Holds(two, Described::default()), before, &mut changes);
        statements.undo(1, false, &mut changes, &mut held);
        assert!(matches!(&statements.unnamed, Unnamed::Holds(s, _) if Rc::ptr_eq(s, &one)));
        assert!(matches!(&held, Held::Holds(s, _) if Rc::ptr_eq(s, &one)));
    }

    /// Two batches on their way: the first, in which the statement was parsed twice, never ran, and then the second did not.
    #[test]
    fn the_unnamed_statement_of_batches_that_never_ran_is_the_one_before_them_all() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes) = (Statements::default(), Changes::default());
        let mut held = Held::Empty;
        for text in [&b"SELECT 1"[..], b"SELECT 2", b"SELECT 3", b"SELECT 4"] {
            let statement = interner.intern(1, 0, text, b"\0\0", |_| Effects::default());
            let before = std::mem::replace(&mut held, Held::parsed(statement.clone()));
            statements.parsed_unnamed(Unnamed::Holds(statement, Described::default()), before, &mut changes);
        }
        statements.undo(2, false, &mut changes, &mut held);
        assert!(matches!(&statements.unnamed, Unnamed::Holds(s, _) if &*s.text == b"SELECT 4"));
        statements.undo(2, false, &mut changes, &mut held);
        assert!(matches!((&statements.unnamed, &held), (Unnamed::Empty, Held::Empty)), "{statements:?}");
    }

    #[test]
    fn what_a_name_stands_for_is_found_from_either_side_whatever_becomes_of_it() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes, mut held) = (Statements::default(), Changes::default(), Held::Empty);
        let statement = |text: &[u8]| interner.intern(1, 0, text, b"\0\0", |_| Effects::default());
        let (one, two) = (statement(b"SELECT 1"), statement(b"SELECT 2"));
        let shared = |statement: &Rc<Statement>| Named::Shared(statement.clone(), Described::default());
        let name = |statements: &Statements, changes: &Changes, of: &Rc<Statement>| {
            statements.name_of(of.id, changes).map(<[u8]>::to_vec)
        };
        let told = |statements: &Statements, changes: &Changes, name: &[u8]| match statements.look(name, changes) {
            Look::Named(Named::Shared(_, told)) => told.is_known(),
            other => panic!("{other:?}"),
        };
        statements.parsed(b"a", shared(&one), &mut changes);
        statements.confirm(&mut changes);
        statements.told(one.id, Described::rows(None), &mut changes);
        assert!(told(&statements, &changes, b"a"));
        // Another statement of ours, with the same text: what the client was told still holds.
        statements.rename(b"a", &two);
        // An execution of the first one may still be under way.
        let both = (Some(b"a".to_vec()), Some(b"a".to_vec()));
        assert_eq!((name(&statements, &changes, &one), name(&statements, &changes, &two)), both);
        assert!(told(&statements, &changes, b"a"));
        // While its Close is not confirmed, errors of before bear its name.
        statements.closed(b"a", &mut changes);
        assert_eq!(name(&statements, &changes, &two), Some(b"a".to_vec()));
        statements.parsed(b"a", shared(&one), &mut changes);
        assert_eq!(name(&statements, &changes, &one), Some(b"a".to_vec()));
        statements.undo(2, false, &mut changes, &mut held);
        assert_eq!((name(&statements, &changes, &one), name(&statements, &changes, &two)), both);
        statements.forget(b"a");
        assert_eq!((name(&statements, &changes, &one), name(&statements, &changes, &two)), (None, None));
        statements.parsed(b"b", shared(&two), &mut changes);
        statements.deallocated(b"DEALLOCATE ALL", &mut changes);
        statements.confirm(&mut changes);
        assert_eq!(name(&statements, &changes, &two), None);
        assert!(statements.named.is_some_and(|names| names.by_name.is_empty() && names.by_id.is_empty()));
    }

    #[test]
    fn what_never_deallocated_all_is_taken_back_and_what_a_query_deallocated_is_not() {
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes, mut held) = (Statements::default(), Changes::default(), Held::Empty);
        let statement = |text: &[u8]| interner.intern(1, 0, text, b"\0\0", |_| Effects::default());
        let (one, two) = (statement(b"SELECT 1"), statement(b"SELECT 2"));
        let shared = |statement: &Rc<Statement>| Named::Shared(statement.clone(), Described::default());
        statements.parsed(b"a", shared(&one), &mut changes);
        statements.confirm(&mut changes);
        // Of one batch: another is given, all are taken, and the first is given again, with the text of the other.
        statements.parsed(b"b", shared(&two), &mut changes);
        statements.cleared(&mut changes);
        assert!(!knows(&statements, b"a", &changes) && !knows(&statements, b"b", &changes) && statements.is_full(0));
        assert_eq!(statements.name_of(one.id, &changes), Some(&b"a"[..]), "an answer may still be about it");
        statements.told(one.id, Described::rows(None), &mut changes);
        statements.parsed(b"a", shared(&two), &mut changes);
        assert!(matches!(statements.look(b"a", &changes), Look::Named(Named::Shared(s, _)) if Rc::ptr_eq(&s, &two)));
        statements.undo(3, false, &mut changes, &mut held);
        assert!(!knows(&statements, b"b", &changes));
        let Look::Named(Named::Shared(a, told)) = statements.look(b"a", &changes) else { panic!("a is gone") };
        assert_eq!((a.id, told.is_known(), changes.is_empty()), (one.id, true, true));
        // The same, and the server got to it: of what was given before it nothing is left.
        statements.parsed(b"b", shared(&two), &mut changes);
        statements.cleared(&mut changes);
        statements.parsed(b"a", shared(&two), &mut changes);
        for _ in 0..3 {
            statements.confirm(&mut changes);
        }
        assert!(knows(&statements, b"a", &changes) && !knows(&statements, b"b", &changes) && changes.is_empty());
        // Two names in one query, which fails behind the first.
        statements.parsed(b"b", shared(&one), &mut changes);
        statements.confirm(&mut changes);
        changes.begin_query([b"a"[..].into(), b"b"[..].into()].into(), Vec::new());
        changes.next_batch();
        assert!(matches!(statements.look(b"b", &changes), Look::Unsettled));
        statements.deallocated(b"SELECT 1", &mut changes);
        statements.deallocated(b"DEALLOCATE", &mut changes);
        changes.end_query();
        assert!(!knows(&statements, b"a", &changes) && knows(&statements, b"b", &changes) && changes.is_empty());
        statements.deallocated(b"DISCARD ALL", &mut changes);
        assert!(statements.named.is_some_and(|names| names.by_name.is_empty() && names.by_id.is_empty()));
    }

    /// In one batch, behind something slow: names are given, and all are taken, again and again.
    #[test]
    fn what_is_kept_of_deallocating_all_grows_with_what_was_sent() {
        const NAMES: usize = 20;
        let interner = Interner::new(1 << 20);
        let (mut statements, mut changes, mut held) = (Statements::default(), Changes::default(), Held::Empty);
        statements.parsed(b"first", shared(&interner, b"SELECT 0"), &mut changes);
        statements.confirm(&mut changes);
        for number in 0..NAMES {
            let name = format!("n{number}");
            let text = format!("SELECT {name}");
            statements.parsed(name.as_bytes(), shared(&interner, text.as_bytes()), &mut changes);
        }
        for _ in 0..NAMES {
            statements.cleared(&mut changes);
        }
        let kept = |changes: &Changes| -> usize {
            let of = |change: &Change| if let Change::Cleared(names) = change { names.by_name.len() } else { 0 };
            changes.queue.iter().map(of).sum()
        };
        assert_eq!(kept(&changes), NAMES + 1);
        assert!(!knows(&statements, b"first", &changes) && !knows(&statements, b"n1", &changes));
        // Whatever of it never happened.
        statements.parsed(b"n1", shared(&interner, b"SELECT 1"), &mut changes);
        for _ in 0..NAMES {
            statements.confirm(&mut changes);
        }
        statements.undo(NAMES + 1, false, &mut changes, &mut held);
        assert!(changes.is_empty());
        for name in [&b"first"[..], b"n0", b"n1", b"n19"] {
            assert!(knows(&statements, name, &changes), "{}", name.escape_ascii());
        }
        // A batch of which all happened leaves nothing.
        statements.cleared(&mut changes);
        statements.confirm(&mut changes);
        assert!(statements.named.is_some_and(|names| names.by_name.is_empty() && names.by_id.is_empty()));
    }

    #[test]
    fn what_one_statement_is_told_costs_the_same_however_many_there_are() {
        const TIMES: u32 = 20_000;
        let interner = Interner::new(64 << 20);
        let cost = |names: u32| {
            let (mut statements, mut changes) = (Statements::default(), Changes::default());
            let mut id = 0;
            for number in 0..names {
                let text = format!("SELECT {number}");
                let statement = interner.intern(1, 0, text.as_bytes(), b"\0\0", |_| Effects::default());
                id = statement.id;
                statements.parsed(text.as_bytes(), Named::Shared(statement, Described::default()), &mut changes);
                statements.confirm(&mut changes);
            }
            let begun = cpu_time();
            for _ in 0..TIMES {
                statements.told(id, Described::rows(None), &mut changes);
                statements.outdate(id);
                assert!(statements.name_of(id, &changes).is_some());
            }
            cpu_time().saturating_sub(begun)
        };
        let (few, many) = (cost(10), cost(10_000));
        // A walk takes a thousand times as long.
        assert!(many < few * 20 + Duration::from_millis(20), "of 10: {few:?}, of 10000: {many:?}");
    }

    /// The time that this thread has worked: that of a busy machine is not the test's.
    fn cpu_time() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap()
    }
}
