//! The prepared statements of one client: its own names for interned statements.

use std::collections::VecDeque;
use std::rc::Rc;

use hashbrown::HashMap;

use crate::prepared::Statement;

/// What a name of the client's stands for.
#[derive(Clone, Debug)]
pub enum Named {
    /// A statement shared under a name of ours.
    Shared(Rc<Statement>),
    /// A text too long to be kept: it has the client's own name, on the server connection that the client
    /// keeps from then on.
    Raw,
}

/// A change of names that the server has not confirmed yet.
#[derive(Debug)]
enum Pending {
    /// A `Parse` gave the name.
    Parsed(Box<[u8]>),
    /// A `Close` took the name from what it stood for.
    Closed(Box<[u8]>, Option<Named>),
}

/// The unnamed statement, as the client sees it.
#[derive(Clone, Debug, Default)]
pub enum Unnamed {
    /// None: never parsed, or destroyed by a simple query.
    #[default]
    Empty,
    /// This one.
    Holds(Rc<Statement>),
    /// One too long to be kept, on the server connection that the client keeps.
    Raw,
}

/// One client's statements. An idle client that never named one costs a null pointer.
#[derive(Debug, Default)]
pub struct Statements {
    named: Option<Box<Names>>,
    /// Its unnamed statement.
    pub unnamed: Unnamed,
}

#[derive(Debug, Default)]
struct Names {
    names: HashMap<Box<[u8]>, Named, foldhash::fast::RandomState>,
    /// In the order in which the server will get to them.
    pending: VecDeque<Pending>,
}

impl Statements {
    /// What `name` stands for.
    #[must_use]
    #[inline]
    pub fn get(&self, name: &[u8]) -> Option<&Named> {
        self.named.as_ref()?.names.get(name)
    }

    /// How many names are in use.
    #[must_use]
    pub fn count(&self) -> usize {
        self.named.as_ref().map_or(0, |named| named.names.len())
    }

    /// A `Parse` for `name` is on its way, or will be answered here.
    pub fn parsed(&mut self, name: &[u8], statement: Named) {
        let named = self.named.get_or_insert_default();
        named.names.insert(name.into(), statement);
        named.pending.push_back(Pending::Parsed(name.into()));
    }

    /// A `Close` of `name` is on its way, or will be answered here.
    pub fn closed(&mut self, name: &[u8]) {
        let named = self.named.get_or_insert_default();
        let previous = named.names.remove(name);
        named.pending.push_back(Pending::Closed(name.into(), previous));
    }

    /// The oldest pending change took effect.
    pub fn confirm(&mut self) {
        if let Some(named) = &mut self.named {
            named.pending.pop_front();
        }
    }

    /// The oldest pending change never happened: the server skipped or refused it.
    pub fn undo(&mut self) {
        let Some(named) = &mut self.named else { return };
        match named.pending.pop_front() {
            Some(Pending::Parsed(name)) => drop(named.names.remove(&name)),
            Some(Pending::Closed(name, Some(statement))) => drop(named.names.insert(name, statement)),
            Some(Pending::Closed(_, None)) | None => {}
        }
    }

    /// Every pending change is moot: the server connection is gone.
    pub fn undo_all(&mut self) {
        while self.named.as_ref().is_some_and(|named| !named.pending.is_empty()) {
            self.undo();
        }
    }

    /// `DEALLOCATE ALL` or `DISCARD ALL`: no name stands for anything any more.
    pub fn clear(&mut self) {
        if let Some(named) = &mut self.named {
            named.names.clear();
        }
        self.unnamed = Unnamed::Empty;
    }

    /// The client's own name for the statement `id`; for the wording of errors.
    #[must_use]
    pub fn name_of(&self, id: u32) -> Option<&[u8]> {
        let names = &self.named.as_ref()?.names;
        names.iter().find(|(_, named)| matches!(named, Named::Shared(s) if s.id == id)).map(|(name, _)| &**name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepared::Interner;

    #[test]
    fn what_never_ran_is_undone_in_order() {
        let interner = Interner::new(1 << 20);
        let statement = |text: &[u8]| Named::Shared(interner.intern(1, 0, text, b"\0\0"));
        let mut statements = Statements::default();
        statements.parsed(b"a", statement(b"SELECT 1"));
        statements.confirm();
        statements.closed(b"a");
        statements.parsed(b"b", statement(b"SELECT 2"));
        assert!(statements.get(b"a").is_none() && statements.get(b"b").is_some());
        statements.undo();
        statements.undo();
        assert!(statements.get(b"a").is_some() && statements.get(b"b").is_none());
        statements.parsed(b"c", statement(b"SELECT 3"));
        statements.undo_all();
        assert_eq!(statements.count(), 1);
    }
}
