//! Which connections to a server are this process's own: by the server's process ids, and by tags.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use hashbrown::HashSet;

/// The own connections to one server, of all pools.
#[derive(Debug, Default)]
pub struct Roster {
    pids: RefCell<HashSet<u32, foldhash::fast::RandomState>>,
    tags: RefCell<HashSet<Box<[u8]>, foldhash::fast::RandomState>>,
    /// One of the pools looks at the server's limits.
    is_looking: Cell<bool>,
}

impl Roster {
    /// A pool's tag.
    pub fn enter_tag(&self, tag: &str) {
        self.tags.borrow_mut().insert(tag.as_bytes().into());
    }

    /// The pool of this tag is gone.
    pub fn leave_tag(&self, tag: &str) {
        self.tags.borrow_mut().remove(tag.as_bytes());
    }

    /// A pool is about to look at the server's limits. False if another one does.
    #[must_use]
    pub fn begin(&self) -> bool {
        !self.is_looking.replace(true)
    }

    /// It has looked.
    pub fn end(&self) {
        self.is_looking.set(false);
    }

    /// Whether a connection of this process id, or with this tag, is an own one.
    #[must_use]
    pub fn has(&self, pid: Option<u32>, tag: Option<&[u8]>) -> bool {
        pid.is_some_and(|pid| self.pids.borrow().contains(&pid))
            || tag.is_some_and(|tag| self.tags.borrow().contains(tag))
    }
}

/// A connection's place on a roster, until the server has ended it.
#[derive(Debug)]
pub(super) struct Enrolled {
    roster: Rc<Roster>,
    pid: u32,
}

impl Enrolled {
    pub(super) fn new(roster: Rc<Roster>, pid: u32) -> Self {
        roster.pids.borrow_mut().insert(pid);
        Self { roster, pid }
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        self.roster.pids.borrow_mut().remove(&self.pid);
    }
}
