//! Cancel keys: a made-up process id and a secret for every session, and how the rest of the worker
//! reaches a session by them, asks it what it holds, or tells it what to do. A client that speaks protocol 3.2 has a long secret, any other four bytes.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;

use aws_lc_rs::hmac;
use hashbrown::HashMap;
use rand::RngExt;
use slab::Slab;
use subtle::ConstantTimeEq;
use tokio::sync::oneshot;

use crate::clock::Moment;
use crate::pool::TimeLimits;
use crate::stats::{PinReason, PoolName};

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
    /// End, if the client has stopped in the middle of what it sends: a server at work takes no time of the client's.
    Stopped,
    /// End: the transaction took too long.
    TransactionLong,
    /// End the query: it took too long.
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
    /// How long it may do one thing.
    pub times: Rc<TimeLimits>,
    /// What it is doing.
    pub activity: Cell<Activity>,
    /// Since when.
    pub since: Cell<Moment>,
    /// When its lease began.
    pub begun: Cell<Moment>,
    /// What it was told.
    pub order: Cell<Order>,
    /// An order or a cancel request may wait to be heeded.
    pub called: Cell<bool>,
    /// Its client is to be listened to.
    pub listen: Cell<bool>,
    /// It keeps its server connection between transactions.
    pub keeps: Cell<bool>,
    /// It is to tell of the server connection that it holds.
    asked: Cell<bool>,
    attention: Cell<Attention>,
    waker: RefCell<Option<Waker>>,
    /// Nearly always none.
    requests: RefCell<Option<Box<Requests>>>,
}

// With the counts of its `Rc` and malloc's own word it fits between two of tokio's allocations, which begin at multiples of 128 bytes.
const _: () = assert!(size_of::<Entry>() <= 88);

/// What a session is to cancel.
#[derive(Debug, Default)]
struct Requests {
    /// Cancel requests that wait for it; each is told by being dropped that it has been dealt with.
    cancels: Vec<oneshot::Sender<()>>,
    /// The beginning of the query that is to be cancelled once more, if it still runs.
    again: Option<Moment>,
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
        self.requests.borrow_mut().get_or_insert_default().again = Some(begun);
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
        self.requests.borrow().as_ref().is_some_and(|requests| !requests.cancels.is_empty())
    }

    /// Takes the cancel requests that wait.
    #[must_use]
    pub fn take_cancels(&self) -> Vec<oneshot::Sender<()>> {
        self.take(|requests| std::mem::take(&mut requests.cancels))
    }

    /// Whether a query is to be cancelled once more.
    #[must_use]
    pub fn cancels_again(&self) -> bool {
        self.requests.borrow().as_ref().is_some_and(|requests| requests.again.is_some())
    }

    /// Takes the beginning of the query that is.
    #[must_use]
    pub fn take_again(&self) -> Option<Moment> {
        self.take(|requests| requests.again.take())
    }

    fn take<T: Default>(&self, what: impl FnOnce(&mut Requests) -> T) -> T {
        let mut slot = self.requests.borrow_mut();
        let taken = slot.as_deref_mut().map(what).unwrap_or_default();
        if slot.as_ref().is_some_and(|requests| requests.cancels.is_empty() && requests.again.is_none()) {
            *slot = None;
        }
        taken
    }
}

/// A session and the server connection that it holds.
#[derive(Clone, Debug)]
pub struct Holding {
    /// The pool.
    pub pool: PoolName,
    /// The variable of its URL, where those of several are served side by side: whoever asks all of them fills it in.
    pub url: Option<Arc<str>>,
    /// The server's process id.
    pub server_pid: u32,
    /// The process id that the client was told.
    pub client_pid: u32,
    /// Where the client is; none over a Unix-domain socket.
    pub client: Option<SocketAddr>,
    /// What the client calls itself.
    pub application_name: Box<str>,
    /// What it does.
    pub activity: Activity,
    /// Since when; microseconds.
    pub activity_us: u64,
    /// How long it has held the server connection, or been in its transaction; microseconds.
    pub held_us: u64,
    /// A transaction is open.
    pub in_transaction: bool,
    /// It keeps the server connection until it leaves: session mode.
    pub session_mode: bool,
    /// Why it keeps it beyond the transaction, otherwise.
    pub pins: Vec<PinReason>,
    /// Something of the pooler's own runs for it: settings, an audit.
    pub own_work: bool,
    /// It listens for this many clients, and is nobody's own.
    pub listens_for: Option<usize>,
}

/// Who holds the server connections.
#[derive(Clone, Debug, Default)]
pub struct Blame {
    /// Those that told, in no order.
    pub holdings: Vec<Holding>,
    /// Holders beyond the limit, which were not asked.
    pub unasked: usize,
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
    inquiry: RefCell<Blame>,
    /// Whom a proxy told of: the addresses of its clients, by process id.
    origins: RefCell<HashMap<u32, SocketAddr, foldhash::fast::RandomState>>,
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
            inquiry: RefCell::default(),
            origins: RefCell::default(),
        }
    }
}

impl Registry {
    /// A new session, with a process id and a secret that no one can guess, a `long` one for a client that can take it.
    /// In session mode the process id is the server's `real` one, unless a session on another server has it.
    #[must_use]
    pub fn enter(&self, real: Option<u32>, long: bool, times: Rc<TimeLimits>, now: Moment) -> Rc<Entry> {
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
            times,
            secret: if long { Secret::Long(self.next_long()) } else { Secret::Short(rng.random()) },
            activity: Cell::new(Activity::Idle),
            since: Cell::new(now),
            begun: Cell::new(now),
            order: Cell::new(Order::None),
            called: Cell::new(false),
            listen: Cell::new(false),
            keeps: Cell::new(false),
            asked: Cell::new(false),
            attention: Cell::default(),
            waker: RefCell::default(),
            requests: RefCell::default(),
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
        let mut origins = self.origins.borrow_mut();
        if !origins.is_empty() {
            origins.remove(&entry.pid);
        }
    }

    // ---- who holds what ----

    /// A proxy says that the session's client is at this address.
    pub fn note_origin(&self, entry: &Entry, address: SocketAddr) {
        self.origins.borrow_mut().insert(entry.pid, address);
    }

    /// What a proxy said of the session's client.
    #[must_use]
    pub fn origin(&self, entry: &Entry) -> Option<SocketAddr> {
        self.origins.borrow().get(&entry.pid).copied()
    }

    /// Has every session that holds a server connection tell of it, of more than `most` those that have had theirs for
    /// longest. They have told when each has been polled once.
    pub fn inquire(&self, most: usize) {
        let holds = |entry: &&Rc<Entry>| {
            entry.keeps.get() || matches!(entry.activity.get(), Activity::Running | Activity::InTransaction)
        };
        let mut holders: Vec<Rc<Entry>> = self.entries.borrow().values().filter(holds).cloned().collect();
        holders.sort_by_key(|entry| entry.begun.get());
        let unasked = holders.len().saturating_sub(most);
        holders.truncate(most);
        *self.inquiry.borrow_mut() = Blame { holdings: Vec::with_capacity(holders.len()), unasked };
        for entry in holders {
            entry.asked.set(true);
            entry.called.set(true);
            entry.wake();
        }
    }

    /// Whether the session was asked and has not told yet.
    #[must_use]
    pub fn is_asked(&self, entry: &Entry) -> bool {
        entry.asked.take()
    }

    /// A session tells.
    pub fn tell(&self, holding: Holding) {
        self.inquiry.borrow_mut().holdings.push(holding);
    }

    /// What was told since [`Self::inquire`].
    #[must_use]
    pub fn told(&self) -> Blame {
        std::mem::take(&mut self.inquiry.borrow_mut())
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
        let mut requests = entry.requests.borrow_mut();
        let cancels = &mut requests.get_or_insert_default().cancels;
        if cancels.len() < CANCELS_MAX {
            cancels.push(sender);
        }
        drop(requests);
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
        let entry = registry.enter(None, false, Rc::default(), Moment::default());
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
            let [one, two] = [long, !long].map(|long| registry.enter(None, long, Rc::default(), Moment::default()));
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
    fn who_holds_a_server_connection_is_asked_and_the_longest_first() {
        let registry = Registry::default();
        let begun = Moment::default();
        let enter = |activity, keeps, age: u64| {
            let entry = registry.enter(None, false, Rc::default(), begun);
            entry.activity.set(activity);
            entry.keeps.set(keeps);
            entry.begun.set(begun.after(10 - age));
            entry
        };
        let idle = enter(Activity::Idle, false, 9);
        let waiting = enter(Activity::Waiting, false, 9);
        let (pinned, open, running) = (
            enter(Activity::Idle, true, 3),
            enter(Activity::InTransaction, false, 2),
            enter(Activity::Running, false, 1),
        );
        registry.inquire(2);
        let asked = [&idle, &waiting, &pinned, &open, &running].map(|entry| registry.is_asked(entry));
        assert_eq!(asked, [false, false, true, true, false]);
        assert!(pinned.called.get() && !running.called.get() && !registry.is_asked(&pinned), "once");
        assert_eq!(registry.told().unasked, 1);
    }

    #[test]
    fn a_process_id_that_comes_again_has_another_secret() {
        let registry = Registry::default();
        for long in [false, true] {
            // In session mode it is the server's, whoever has the server connection.
            let [one, two] = [(); 2].map(|()| {
                let entry = registry.enter(Some(4711), long, Rc::default(), Moment::default());
                assert_eq!(entry.pid, 4711);
                registry.leave(&entry);
                registry.secret(&entry)
            });
            assert_ne!(one, two);
            // Nor do two workers make the same.
            let elsewhere = Registry::default().enter(Some(4711), long, Rc::default(), Moment::default());
            assert_ne!(one, Registry::default().secret(&elsewhere));
        }
    }
}
