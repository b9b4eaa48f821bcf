//! What a listening client is still to be told. Pure: messages in, messages out.
//!
//! A notification comes to a client in two ways while its own server connection listens, too: by that, and by the hub. Both
//! bring the same ones in the same order (that of the server's queue), one of them sooner. Whichever is first is told, the
//! other's copy is dropped: it has the same sender, channel and payload.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::Waker;

use pgweir_proto::encode;
use pgweir_proto::scanner::HEADER;

/// The most that is kept for one client that does not take its notifications; bytes, with what it takes to keep each.
pub const UNTAKEN_MAX: usize = 1 << 20;

/// What was told by one way and is still to come by the other is remembered up to this; bytes. What is forgotten may be told
/// twice.
pub const TOLD_MAX: usize = 256 * 1024;

/// What it takes to keep one.
const EACH: usize = 32;

/// The mail of one listening client.
#[derive(Debug, Default)]
pub struct Inbox {
    inner: RefCell<Inner>,
    waker: RefCell<Option<Waker>>,
    /// What the mail of all clients of the hub takes; bytes.
    total: Rc<Cell<usize>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The first that is to be told first.
    mail: VecDeque<Letter>,
    /// What they take; bytes.
    bytes: usize,
    /// Bodies that the client has from its own server connection, and the hub is still to bring.
    ahead: Told,
    /// Bodies that the client has from the hub, and its own server connection may still bring.
    behind: Told,
    /// Why there will be no more.
    over: Option<Over>,
}

/// A whole message.
#[derive(Debug)]
struct Letter {
    message: Rc<[u8]>,
    /// The client's own server connection has brought it, and will not again.
    filed: bool,
}

/// Why a client is not told anything any more: something is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// It took too little of it, or all clients together did and it the least.
    Untaken,
    /// No server connection listens for it, and there will be none.
    NoRoom,
}

/// What was told.
#[derive(Debug, Default)]
struct Told {
    bodies: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Told {
    fn add(&mut self, body: &[u8]) {
        self.bytes += body.len() + EACH;
        self.bodies.push_back(body.into());
        while self.bytes > TOLD_MAX {
            let Some(oldest) = self.bodies.pop_front() else { return };
            self.bytes = self.bytes.saturating_sub(oldest.len() + EACH);
        }
    }

    /// True if it is there; it is not any more.
    fn take(&mut self, body: &[u8]) -> bool {
        let Some(at) = self.bodies.iter().position(|known| **known == *body) else { return false };
        self.bodies.remove(at);
        self.bytes = self.bytes.saturating_sub(body.len() + EACH);
        true
    }

    fn keep(&mut self, listens: &impl Fn(&[u8]) -> bool) {
        self.bodies.retain(|body| listens(channel(body)));
        self.bytes = self.bodies.iter().map(|body| body.len() + EACH).sum();
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Inbox {
    /// An empty one; what it takes is counted in `total`, too.
    #[must_use]
    pub fn new(total: Rc<Cell<usize>>) -> Self {
        Self { inner: RefCell::default(), waker: RefCell::default(), total }
    }

    /// Notes who is to be woken when something comes.
    pub fn set_waker(&self, waker: &Waker) {
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }

    /// Has the client look.
    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    fn takes(&self, inner: &mut Inner, len: usize) {
        inner.bytes += len + EACH;
        self.total.set(self.total.get() + len + EACH);
    }

    fn gives_back(&self, inner: &mut Inner, len: usize) {
        inner.bytes = inner.bytes.saturating_sub(len + EACH);
        self.total.set(self.total.get().saturating_sub(len + EACH));
    }

    fn next(&self, inner: &mut Inner) -> Option<Letter> {
        let letter = inner.mail.pop_front()?;
        self.gives_back(inner, letter.message.len());
        Some(letter)
    }

    fn put(&self, mut inner: RefMut<'_, Inner>, message: Rc<[u8]>, filed: bool) {
        self.takes(&mut inner, message.len());
        inner.mail.push_back(Letter { message, filed });
        let is_full = inner.bytes > UNTAKEN_MAX;
        drop(inner);
        if is_full {
            self.end(Over::Untaken);
        }
    }

    /// The hub brings a whole message.
    pub fn bring(&self, message: &Rc<[u8]>) {
        let mut inner = self.inner.borrow_mut();
        let told = notification(message).is_some_and(|body| inner.ahead.take(body));
        if told || inner.over.is_some() {
            return;
        }
        self.put(inner, message.clone(), false);
        self.wake();
    }

    /// The client's own server connection brings a notification while the client must not be told: it waits with the hub's.
    /// `again`: the hub will bring it, too.
    pub fn file(&self, body: &[u8], again: bool) {
        let mut inner = self.inner.borrow_mut();
        if inner.behind.take(body) || inner.over.is_some() {
            return;
        }
        let is_copy = |letter: &&mut Letter| !letter.filed && notification(&letter.message) == Some(body);
        if let Some(letter) = inner.mail.iter_mut().find(is_copy) {
            letter.filed = true;
            return;
        }
        if again {
            inner.ahead.add(body);
        }
        let mut message = Vec::new();
        encode::message(&mut message, b'A', |out| out.extend_from_slice(body));
        self.put(inner, message.into(), true);
    }

    /// Nothing is told any more.
    pub fn end(&self, why: Over) {
        let mut inner = self.inner.borrow_mut();
        while self.next(&mut inner).is_some() {}
        inner.over.get_or_insert(why);
        drop(inner);
        self.wake();
    }

    /// The client's own server connection brings a notification. False if the client has it. Else what comes before it is
    /// appended to `out`, and it is to be told behind that.
    ///
    /// `unread`: it is not known what the client still listens to, nor in which encoding: of what comes before it only that
    /// of the same channel is told, where it is the same in all encodings. `again`: the hub will bring it, too.
    pub fn comes(&self, body: &[u8], unread: bool, again: bool, out: &mut Vec<u8>) -> bool {
        let mut inner = self.inner.borrow_mut();
        if inner.behind.take(body) {
            return false;
        }
        // If the hub has not brought it, it has brought nothing that comes after it: of these channels it brings all.
        let unfiled = |letter: &Letter| !letter.filed && notification(&letter.message) == Some(body);
        let same = inner.mail.iter().position(unfiled);
        let is_safe =
            |earlier: &[u8]| channel(earlier) == channel(body) && earlier.get(4..).is_some_and(<[u8]>::is_ascii);
        let mut waits = VecDeque::new();
        for _ in 0..same.unwrap_or(inner.mail.len()) {
            let Some(letter) = self.next(&mut inner) else { break };
            if !unread || notification(&letter.message).is_some_and(is_safe) {
                out.extend_from_slice(&letter.message);
            } else {
                waits.push_back(letter);
            }
        }
        if same.is_some() {
            self.next(&mut inner);
        }
        for letter in waits.into_iter().rev() {
            self.takes(&mut inner, letter.message.len());
            inner.mail.push_front(letter);
        }
        if same.is_none() && again {
            inner.ahead.add(body);
        }
        true
    }

    /// Appends what is to be told, until `out` has `most` bytes. `too`: the client's own server connection may bring it,
    /// too.
    pub fn take(&self, too: bool, most: usize, out: &mut Vec<u8>) {
        let mut inner = self.inner.borrow_mut();
        while out.len() < most
            && let Some(Letter { message, filed }) = self.next(&mut inner)
        {
            out.extend_from_slice(&message);
            if let Some(body) = notification(&message).filter(|_| too && !filed) {
                inner.behind.add(body);
            }
        }
    }

    /// Drops the notifications of channels that the client does not listen to any more.
    pub fn keep(&self, listens: impl Fn(&[u8]) -> bool) {
        let mut inner = self.inner.borrow_mut();
        for letter in std::mem::take(&mut inner.mail) {
            if notification(&letter.message).is_none_or(|body| listens(channel(body))) {
                inner.mail.push_back(letter);
            } else {
                self.gives_back(&mut inner, letter.message.len());
            }
        }
        inner.ahead.keep(&listens);
        inner.behind.keep(&listens);
    }

    /// The client's own server connection does not listen any more.
    pub fn server_is_silent(&self) {
        self.inner.borrow_mut().behind.clear();
    }

    /// The hub's server connection is another from now on, or will be, or begins to listen to this channel anew: it brings
    /// nothing of what was sent before.
    pub fn hub_is_silent(&self, on: Option<&[u8]>) {
        self.inner.borrow_mut().ahead.keep(&|name: &[u8]| on.is_some_and(|lost| lost != name));
    }

    /// The client's own server connection is the hub's from now on: what one might have brought, the other will.
    pub fn hub_is_own(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.ahead = std::mem::take(&mut inner.behind);
    }

    /// Whether nothing is to be told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.borrow().mail.is_empty()
    }

    /// What is kept for the client; bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.inner.borrow().bytes
    }

    /// Why there will be no more.
    #[must_use]
    pub fn over(&self) -> Option<Over> {
        self.inner.borrow().over
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let bytes = self.inner.get_mut().bytes;
        self.total.set(self.total.get().saturating_sub(bytes));
    }
}

/// The body of a message, if it is a notification.
fn notification(message: &[u8]) -> Option<&[u8]> {
    message.get(HEADER..).filter(|_| message.first() == Some(&b'A'))
}

/// The channel of a notification, by its body. Empty if there is none.
#[must_use]
pub fn channel(body: &[u8]) -> &[u8] {
    let rest = body.get(4..).unwrap_or_default();
    let end = memchr::memchr(0, rest).unwrap_or(rest.len());
    rest.get(..end).unwrap_or_default()
}

/// The payload of a notification, by its body. Empty if there is none.
#[must_use]
pub fn payload(body: &[u8]) -> &[u8] {
    let rest = body.get(4 + channel(body).len() + 1..).unwrap_or_default();
    rest.strip_suffix(b"\0").unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pid: u8, channel: &str, payload: &str) -> Vec<u8> {
        [&[0, 0, 0, pid][..], channel.as_bytes(), b"\0", payload.as_bytes(), b"\0"].concat()
    }

    fn message(body: &[u8]) -> Rc<[u8]> {
        let mut out = Vec::new();
        pgweir_proto::encode::message(&mut out, b'A', |out| out.extend_from_slice(body));
        out.into()
    }

    fn taken(inbox: &Inbox, too: bool) -> Vec<u8> {
        let mut out = Vec::new();
        inbox.take(too, usize::MAX, &mut out);
        out
    }

    fn comes(inbox: &Inbox, body: &[u8], out: &mut Vec<u8>) -> bool {
        inbox.comes(body, false, true, out)
    }

    #[test]
    fn a_body_is_read() {
        let body = body(7, "here", "it's");
        assert_eq!((channel(&body), payload(&body)), (&b"here"[..], &b"it's"[..]));
        assert_eq!((channel(b""), payload(b"\0\0\0\x01c")), (&b""[..], &b""[..]));
    }

    #[test]
    fn whichever_way_a_notification_comes_first_it_is_told_once_and_in_order() {
        let (a, b, c) = (body(1, "c", "a"), body(1, "c", "b"), body(1, "c", "c"));
        let (inbox, mut out) = (Inbox::default(), Vec::new());
        // The hub is first.
        inbox.bring(&message(&a));
        inbox.bring(&message(&b));
        assert!(comes(&inbox, &b, &mut out), "its turn has come");
        assert_eq!(out, *message(&a), "what comes before it");
        assert!(inbox.is_empty());
        // The server connection is.
        out.clear();
        assert!(comes(&inbox, &c, &mut out) && out.is_empty());
        inbox.bring(&message(&c));
        assert!(inbox.is_empty(), "the copy is dropped");
        inbox.bring(&message(&c));
        assert_eq!(taken(&inbox, true), *message(&c), "but not one more of the same");
        assert!(!comes(&inbox, &c, &mut out) && out.is_empty(), "which the server connection brings, too");
        assert!(comes(&inbox, &c, &mut out), "and then one more");
        // It goes, and with it what it might have brought.
        inbox.bring(&message(&c));
        inbox.bring(&message(&a));
        assert_eq!(taken(&inbox, true), *message(&a));
        inbox.server_is_silent();
        assert!(comes(&inbox, &a, &mut out));
        inbox.hub_is_silent(None);
        inbox.bring(&message(&a));
        assert_eq!(taken(&inbox, false), *message(&a));
        assert_eq!((inbox.bytes(), inbox.total.get()), (0, 0), "all that was taken is given back");
    }

    /// The server's queue, how far the hub and the client's own server connection have read it, and what the client was told.
    struct Model {
        queue: Vec<Vec<u8>>,
        hub: usize,
        /// From where on the client's own reads, while it listens.
        own: Option<usize>,
        told: Vec<u8>,
        inbox: Inbox,
    }

    impl Model {
        fn hub_brings(&mut self) {
            if let Some(body) = self.queue.get(self.hub) {
                self.inbox.bring(&message(body));
                self.hub += 1;
            }
        }

        fn own_brings(&mut self) {
            let Some(body) = self.own.and_then(|at| self.queue.get(at)) else { return };
            self.own = self.own.map(|at| at + 1);
            if self.inbox.comes(body, false, true, &mut self.told) {
                self.told.extend_from_slice(&message(body));
            }
        }

        fn is_told(&mut self, too: bool) {
            self.inbox.take(too, usize::MAX, &mut self.told);
        }
    }

    /// Whatever is first, and however equal the notifications are, each is told once; and in order, if the hub has read what
    /// was sent before the client's own server connection began to listen.
    #[test]
    fn in_any_interleaving_each_is_told_once_and_in_order() {
        for seed in 1..2000_u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut below = |end: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % end
            };
            let (distinct, keeps, punctual) = (below(2) == 0, below(2) == 0, below(2) == 0);
            let mut model = Model { queue: Vec::new(), hub: 0, own: None, told: Vec::new(), inbox: Inbox::default() };
            for _ in 0..100 {
                match below(6) {
                    0 => {
                        let payload = if distinct { model.queue.len() as u64 } else { below(3) };
                        model.queue.push(body(1, "c", &format!("{payload:03}")));
                    }
                    1 => model.hub_brings(),
                    2 => model.own_brings(),
                    3 if model.own.is_none() => model.is_told(false),
                    3 if keeps => model.is_told(true),
                    4 if model.own.is_none() => {
                        while punctual && model.hub < model.queue.len() {
                            model.hub_brings();
                        }
                        model.own = Some(model.queue.len());
                    }
                    5 if model.own.take().is_some() => model.inbox.server_is_silent(),
                    _ => {}
                }
            }
            model.own = None;
            model.inbox.server_is_silent();
            while model.hub < model.queue.len() {
                model.hub_brings();
            }
            model.is_told(false);
            let in_order: Vec<u8> = model.queue.iter().flat_map(|body| message(body).to_vec()).collect();
            if punctual && distinct {
                assert_eq!(model.told, in_order, "seed {seed}");
            }
            let sorted = |all: &[u8], len: usize| {
                let mut each: Vec<_> = all.chunks(len).map(<[u8]>::to_vec).collect();
                each.sort_unstable();
                each
            };
            // All are of one length.
            let len = message(&body(1, "c", "000")).len();
            assert_eq!(sorted(&model.told, len), sorted(&in_order, len), "seed {seed}");
        }
    }

    #[test]
    fn what_comes_before_waits_where_the_client_may_not_listen_to_it_any_more() {
        let (inbox, mut out) = (Inbox::default(), Vec::new());
        let (gone, here) = (body(1, "gone", ""), body(1, "here", ""));
        let (earlier, foreign) = (body(200, "here", "earlier"), body(1, "here", "\u{e9}"));
        for body in [&gone, &earlier, &gone, &foreign, &here] {
            inbox.bring(&message(body));
        }
        assert!(inbox.comes(&here, true, true, &mut out));
        assert_eq!(out, *message(&earlier), "of the same channel, in any encoding");
        assert_eq!(inbox.bytes(), 3 * EACH + 2 * message(&gone).len() + message(&foreign).len());
        out.clear();
        inbox.keep(|channel| channel == b"here");
        inbox.take(false, usize::MAX, &mut out);
        assert_eq!(out, *message(&foreign));
        inbox.keep(|channel| channel == b"here");
        assert!(inbox.is_empty(), "one was told, the other is not to be");
        assert_eq!(inbox.bytes(), 0);
    }

    #[test]
    fn what_comes_when_nothing_may_be_told_is_told_later_once_and_in_order() {
        let (inbox, mut out) = (Inbox::default(), Vec::new());
        let (a, b, c) = (body(1, "c", "a"), body(1, "c", "b"), body(1, "c", "c"));
        let all = [&a, &b, &c].map(|body| message(body).to_vec()).concat();
        // The hub is first, then the server connection, then the hub again.
        inbox.bring(&message(&a));
        for body in [&a, &b, &c] {
            inbox.file(body, true);
        }
        inbox.bring(&message(&b));
        inbox.bring(&message(&c));
        assert_eq!(taken(&inbox, true), all);
        // Nothing of it comes by the server connection any more: what does is another just like it.
        assert!(comes(&inbox, &a, &mut out) && out.is_empty());
        inbox.hub_is_silent(None);
        // What the client has, it has.
        inbox.bring(&message(&a));
        assert_eq!(taken(&inbox, true), *message(&a));
        inbox.file(&a, true);
        assert!(inbox.is_empty());
        // And two that are alike are two.
        inbox.file(&a, true);
        inbox.file(&a, true);
        inbox.bring(&message(&a));
        inbox.bring(&message(&a));
        assert_eq!(taken(&inbox, false), [&*message(&a), &*message(&a)].concat());
        assert_eq!((inbox.bytes(), inbox.total.get()), (0, 0));
    }

    #[test]
    fn what_no_hub_will_bring_is_not_waited_for() {
        let (inbox, mut out) = (Inbox::default(), Vec::new());
        let own = body(1, "jobs", "");
        assert!(inbox.comes(&own, false, false, &mut out));
        inbox.bring(&message(&own));
        assert_eq!(taken(&inbox, false), *message(&own), "another's, just like it");
        // Nor what comes of a channel that was left meanwhile.
        assert!(comes(&inbox, &own, &mut out));
        inbox.keep(|_| false);
        inbox.bring(&message(&own));
        assert_eq!(taken(&inbox, false), *message(&own));
    }

    #[test]
    fn what_is_not_taken_is_limited_and_what_was_told_ends_nobody() {
        let inbox = Inbox::default();
        let (mut out, long) = (Vec::new(), body(1, "c", &"x".repeat(8000)));
        for _ in 0..1000 {
            assert!(comes(&inbox, &long, &mut out));
        }
        assert!(inbox.over().is_none());
        assert!(inbox.inner.borrow().ahead.bytes <= TOLD_MAX);
        inbox.hub_is_silent(None);
        let long = message(&long);
        for _ in 0..UNTAKEN_MAX / (long.len() + EACH) {
            inbox.bring(&long);
        }
        assert!(inbox.over().is_none());
        inbox.bring(&long);
        assert_eq!(inbox.over(), Some(Over::Untaken));
        inbox.bring(&long);
        assert!(inbox.is_empty() && inbox.total.get() == 0, "nothing is kept for nothing");
    }

    #[test]
    fn mail_is_taken_in_parts() {
        let inbox = Inbox::default();
        let one = message(&body(1, "c", "x"));
        for _ in 0..3 {
            inbox.bring(&one);
        }
        let mut out = Vec::new();
        inbox.take(false, one.len() + 1, &mut out);
        assert_eq!(out.len(), 2 * one.len());
        assert!(!inbox.is_empty());
    }
}
