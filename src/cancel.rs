//! Cancel keys: a made-up process id and a secret for every session, and how the rest of the worker
//! reaches a session by them. A client that speaks protocol 3.2 has a long secret, any other four bytes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::Waker;
use std::time::Instant;

use aws_lc_rs::hmac;
use hashbrown::HashMap;
use rand::RngExt;
use slab::Slab;
use subtle::ConstantTimeEq;
use tokio::sync::oneshot;

use crate::clock::Moment;

/// The smallest made-up process id: above Linux' largest real one, so that it never names a backend.
pub const FIRST_PID: u32 = 4_194_305;

/// Bytes of a secret in protocol 3.0.
const SHORT_SECRET: usize = 4;

/// What a session's client was told besides the process id.
#[derive(Clone, Copy, Debug)]
enum Secret {
    /// Four bytes drawn at random.
    Short([u8; SHORT_SECRET]),
    /// In protocol 3.2: what the worker's key makes of the process id and this number, which no other session of the worker
    /// with the same process id has. It is not kept. HMAC-SHA-256 gives as many bytes as Postgres 18 has, 32.
    Long([u8; 4]),
}

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

/// Whether a session notices by itself that its client is gone. It does when it reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attention {
    /// It reads.
    #[default]
    Reading,
    /// It cannot take more from its client for now, and so does not read.
    Away,
    /// It did not, and is to look whether the client is still there.
    Look,
}

/// A session, as seen from outside.
#[derive(Debug)]
pub struct Entry {
    /// The process id its client was told.
    pub pid: u32,
    secret: Secret,
    /// What it is doing.
    pub activity: Cell<Activity>,
    /// Since when.
    pub since: Cell<Instant>,
    /// When its transaction, or its lease, began.
    pub begun: Cell<Instant>,
    /// What it was told.
    pub order: Cell<Order>,
    /// An order or a cancel request may wait to be heeded.
    pub called: Cell<bool>,
    /// Its client is to be listened to.
    pub listen: Cell<bool>,
    /// The beginning of the query that is to be cancelled once more, if it still runs.
    pub again: Cell<Option<Moment>>,
    attention: Cell<Attention>,
    waker: RefCell<Option<Waker>>,
    /// Cancel requests that wait for it; each is told by being dropped that it has been dealt with.
    cancels: RefCell<Vec<oneshot::Sender<()>>>,
}

impl Entry {
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
        self.called.set(true);
        self.wake();
    }

    /// Has the query that began at `begun` cancelled once more, if it still runs.
    pub fn cancel_again(&self, begun: Moment) {
        self.again.set(Some(begun));
        self.called.set(true);
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
#[derive(Debug)]
pub struct Registry {
    entries: RefCell<HashMap<u32, Rc<Entry>, foldhash::fast::RandomState>>,
    /// Makes long secrets.
    key: hmac::Key,
    /// Sessions with a long secret so far.
    long: Cell<u32>,
    /// Those that do not listen to their clients while their servers are at work.
    deaf: RefCell<Slab<Rc<Entry>>>,
    /// Sessions that do not read; each is in it once.
    away: RefCell<Vec<Rc<Entry>>>,
}

impl Default for Registry {
    fn default() -> Self {
        let key: [u8; 32] = rand::rng().random();
        Self {
            entries: RefCell::default(),
            key: hmac::Key::new(hmac::HMAC_SHA256, &key),
            long: Cell::new(0),
            deaf: RefCell::default(),
            away: RefCell::default(),
        }
    }
}

impl Registry {
    /// A new session, with a process id and a secret that no one can guess, a `long` one for a client that can take it.
    /// In session mode the process id is the server's `real` one, unless a session on another server has it.
    #[must_use]
    pub fn enter(&self, real: Option<u32>, long: bool, now: Instant) -> Rc<Entry> {
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
            secret: if long { Secret::Long(self.next_long()) } else { Secret::Short(rng.random()) },
            activity: Cell::new(Activity::Idle),
            since: Cell::new(now),
            begun: Cell::new(now),
            order: Cell::new(Order::None),
            called: Cell::new(false),
            listen: Cell::new(false),
            again: Cell::new(None),
            attention: Cell::default(),
            waker: RefCell::default(),
            cancels: RefCell::default(),
        });
        entries.insert(pid, entry.clone());
        entry
    }

    fn next_long(&self) -> [u8; 4] {
        let number = self.long.get();
        self.long.set(number.wrapping_add(1));
        number.to_be_bytes()
    }

    fn long_secret(&self, pid: u32, number: [u8; 4]) -> hmac::Tag {
        let of = u64::from(pid) << 32 | u64::from(u32::from_be_bytes(number));
        hmac::sign(&self.key, &of.to_be_bytes())
    }

    /// A session ended: its key is void.
    pub fn leave(&self, entry: &Entry) {
        debug_assert!(!self.deaf.borrow().iter().any(|(_, deaf)| deaf.pid == entry.pid));
        self.entries.borrow_mut().remove(&entry.pid);
    }

    /// The secret that the session's client is told.
    #[must_use]
    pub fn secret(&self, entry: &Entry) -> Vec<u8> {
        match entry.secret {
            Secret::Short(secret) => secret.to_vec(),
            Secret::Long(number) => self.long_secret(entry.pid, number).as_ref().to_vec(),
        }
    }

    /// Whether this is the session's secret. How long it takes tells nothing but the lengths.
    fn is_secret(&self, entry: &Entry, given: &[u8]) -> bool {
        match entry.secret {
            Secret::Short(secret) => secret.ct_eq(given).into(),
            Secret::Long(number) => self.long_secret(entry.pid, number).as_ref().ct_eq(given).into(),
        }
    }

    /// A session does not read from its client for now. True if it is to look after it.
    #[must_use]
    pub fn is_to_look(&self, entry: &Rc<Entry>) -> bool {
        let before = entry.attention.replace(Attention::Away);
        if before != Attention::Away {
            self.away.borrow_mut().push(entry.clone());
        }
        before == Attention::Look
    }

    /// Wakes the sessions that did not read, so that they look after their clients.
    pub fn wake_away(&self) {
        for entry in self.away.borrow_mut().drain(..) {
            entry.attention.set(Attention::Look);
            entry.wake();
        }
    }

    /// Whether there is a session with this process id.
    #[must_use]
    pub fn has(&self, pid: u32) -> bool {
        self.entries.borrow().contains_key(&pid)
    }

    /// A `CancelRequest`. None if no session has this key; else what resolves when it was dealt with.
    #[must_use]
    pub fn cancel(&self, pid: u32, secret: &[u8]) -> Option<oneshot::Receiver<()>> {
        let entries = self.entries.borrow();
        let entry = entries.get(&pid)?;
        if !self.is_secret(entry, secret) {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        let mut cancels = entry.cancels.borrow_mut();
        if cancels.len() < CANCELS_MAX {
            cancels.push(sender);
        }
        drop(cancels);
        entry.called.set(true);
        entry.wake();
        Some(receiver)
    }

    /// A session does not listen to its client from now on. Returns its place, for [`Self::listens`].
    #[must_use]
    #[inline]
    pub fn is_deaf(&self, entry: &Rc<Entry>) -> usize {
        entry.listen.set(false);
        self.deaf.borrow_mut().insert(entry.clone())
    }

    /// It listens again.
    #[inline]
    pub fn listens(&self, place: usize) {
        self.deaf.borrow_mut().try_remove(place);
    }

    /// Has every session listen that does not: what a client does while its query runs is noticed within a tick.
    pub fn tick(&self) {
        for (_, entry) in self.deaf.borrow().iter() {
            entry.listen.set(true);
            entry.wake();
        }
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

    const LONG_SECRET: usize = 32;

    #[test]
    fn who_does_not_read_looks_once_after_each_waking() {
        let registry = Registry::default();
        let entry = registry.enter(None, false, Instant::now());
        assert!(!registry.is_to_look(&entry), "it has only just stopped reading");
        assert!(!registry.is_to_look(&entry));
        registry.wake_away();
        registry.wake_away();
        assert!(registry.is_to_look(&entry));
        assert!(!registry.is_to_look(&entry));
        assert_eq!(registry.away.borrow().len(), 1);
    }

    #[test]
    fn only_the_exact_key_cancels() {
        let registry = Registry::default();
        for (long, length) in [(false, SHORT_SECRET), (true, LONG_SECRET)] {
            let [one, two] = [long, !long].map(|long| registry.enter(None, long, Instant::now()));
            assert!(one.pid >= FIRST_PID && i32::try_from(one.pid).is_ok());
            let secret = registry.secret(&one);
            assert_eq!(secret.len(), length);
            for at in [0, length - 1] {
                let mut wrong = secret.clone();
                wrong[at] ^= 1;
                assert!(registry.cancel(one.pid, &wrong).is_none());
            }
            // Neither a part of it, nor more than it, nor what a long one is made of.
            let longer = [&secret[..], b"x"].concat();
            for wrong in [&secret[..length - 1], b"", b"abc", &longer, &registry.secret(&two)] {
                assert!(registry.cancel(one.pid, wrong).is_none());
            }
            if let Secret::Long(number) = one.secret {
                assert!(registry.cancel(one.pid, &number).is_none());
            }
            assert!(registry.cancel(FIRST_PID - 1, &secret).is_none());
            assert!(!one.is_cancelled() && !two.is_cancelled());
            assert!(registry.cancel(one.pid, &secret).is_some());
            assert!(one.is_cancelled() && !two.is_cancelled());
            registry.leave(&one);
            assert!(registry.cancel(one.pid, &secret).is_none());
            registry.leave(&two);
            assert!(registry.is_empty());
        }
    }

    #[test]
    fn a_process_id_that_comes_again_has_another_secret() {
        let registry = Registry::default();
        for long in [false, true] {
            // In session mode it is the server's, whoever has the server connection.
            let [one, two] = [(); 2].map(|()| {
                let entry = registry.enter(Some(4711), long, Instant::now());
                assert_eq!(entry.pid, 4711);
                registry.leave(&entry);
                registry.secret(&entry)
            });
            assert_ne!(one, two);
            // Nor do two workers make the same.
            assert_ne!(one, Registry::default().secret(&Registry::default().enter(Some(4711), long, Instant::now())));
        }
    }
}
