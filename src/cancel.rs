//! Cancel keys: a made-up process id and a secret for every session, and how the rest of the worker
//! reaches a session by them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

use hashbrown::HashMap;
use rand::RngExt;
use tokio::sync::oneshot;

/// The smallest made-up process id: above Linux' largest real one, so that it never names a backend.
pub const FIRST_PID: u32 = 4_194_305;

/// What a session is doing, for the limits on doing it too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Between transactions.
    Idle,
    /// In the queue for a server connection.
    Waiting,
    /// A server connection is at work.
    Running,
    /// In a transaction, and the client has the turn.
    InTransaction,
}

/// Something a session is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// No order.
    None,
    /// End when the transaction at hand is over.
    Drain,
    /// End now.
    Stop,
    /// End: the client was idle too long.
    ClientIdle,
    /// End: the client was idle in a transaction too long.
    TransactionIdle,
    /// End: the transaction took too long.
    TransactionLong,
    /// Cancel the query: it took too long.
    QueryLong,
}

/// A session, as seen from outside.
#[derive(Debug)]
pub struct Entry {
    /// The process id its client was told.
    pub pid: u32,
    secret: u32,
    /// What it is doing.
    pub activity: Cell<Activity>,
    /// Since when.
    pub since: Cell<Instant>,
    /// When its transaction, or its lease, began.
    pub begun: Cell<Instant>,
    /// What it was told.
    pub order: Cell<Order>,
    waker: RefCell<Option<Waker>>,
    /// Cancel requests that wait for it; each is told by being dropped that it has been dealt with.
    cancels: RefCell<Vec<oneshot::Sender<()>>>,
}

impl Entry {
    /// The secret its client was told.
    #[must_use]
    pub fn secret(&self) -> [u8; 4] {
        self.secret.to_be_bytes()
    }

    /// Notes who is to be woken.
    #[inline]
    pub fn set_waker(&self, waker: &Waker) {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    /// Gives an order. A stronger one given before stays.
    pub fn tell(&self, order: Order) {
        if self.order.get() != Order::Stop {
            self.order.set(order);
        }
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Whether a cancel request waits.
    #[must_use]
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        !self.cancels.borrow().is_empty()
    }

    /// Takes the cancel requests that wait.
    #[must_use]
    pub fn take_cancels(&self) -> Vec<oneshot::Sender<()>> {
        std::mem::take(&mut self.cancels.borrow_mut())
    }
}

/// Cancel requests that may wait for one session; further ones are dealt with by these.
const CANCELS_MAX: usize = 16;

/// All sessions of a worker by process id.
#[derive(Debug, Default)]
pub struct Registry {
    entries: RefCell<HashMap<u32, Rc<Entry>, foldhash::fast::RandomState>>,
}

impl Registry {
    /// A new session, with a process id and a secret that no one can guess. In session mode the process id is the
    /// server's `real` one, unless a session on another server has it.
    #[must_use]
    pub fn enter(&self, real: Option<u32>, now: Instant) -> Rc<Entry> {
        let mut entries = self.entries.borrow_mut();
        let mut rng = rand::rng();
        let free = |pid: &u32| !entries.contains_key(pid);
        let pid = real.filter(free).unwrap_or_else(|| {
            loop {
                // Positive as a signed number: drivers print and compare it as one.
                let pid = rng.random_range(FIRST_PID..=i32::MAX as u32);
                if free(&pid) {
                    break pid;
                }
            }
        });
        let entry = Rc::new(Entry {
            pid,
            secret: rng.random(),
            activity: Cell::new(Activity::Idle),
            since: Cell::new(now),
            begun: Cell::new(now),
            order: Cell::new(Order::None),
            waker: RefCell::default(),
            cancels: RefCell::default(),
        });
        entries.insert(pid, entry.clone());
        entry
    }

    /// A session ended: its key is void.
    pub fn leave(&self, entry: &Entry) {
        self.entries.borrow_mut().remove(&entry.pid);
    }

    /// A `CancelRequest`. None if no session has this key; else what resolves when it was dealt with.
    #[must_use]
    pub fn cancel(&self, pid: u32, secret: &[u8]) -> Option<oneshot::Receiver<()>> {
        let entries = self.entries.borrow();
        let entry = entries.get(&pid)?;
        let given = u32::from_be_bytes(secret.try_into().ok()?);
        // One comparison of machine words: its time tells nothing.
        if given ^ entry.secret != 0 {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        let mut cancels = entry.cancels.borrow_mut();
        if cancels.len() < CANCELS_MAX {
            cancels.push(sender);
        }
        drop(cancels);
        entry.wake();
        Some(receiver)
    }

    /// Every session.
    #[must_use]
    pub fn sessions(&self) -> Vec<Rc<Entry>> {
        self.entries.borrow().values().cloned().collect()
    }

    /// How many sessions there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_key_cancels() {
        let registry = Registry::default();
        let (one, two) = (registry.enter(None, Instant::now()), registry.enter(None, Instant::now()));
        assert!(one.pid >= FIRST_PID && i32::try_from(one.pid).is_ok());
        let wrong = (u32::from_be_bytes(one.secret()) ^ 1).to_be_bytes();
        assert!(registry.cancel(one.pid, &wrong).is_none());
        assert!(registry.cancel(one.pid, b"abc").is_none());
        assert!(registry.cancel(FIRST_PID - 1, &one.secret()).is_none());
        assert!(!one.is_cancelled() && !two.is_cancelled());
        assert!(registry.cancel(one.pid, &one.secret()).is_some());
        assert!(one.is_cancelled() && !two.is_cancelled());
        registry.leave(&one);
        assert!(registry.cancel(one.pid, &one.secret()).is_none());
    }
}
