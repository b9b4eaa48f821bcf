//! Who of a pool's clients listens to what, and what the hub's server connection has to. Pure.

use std::cell::Cell;
use std::rc::Rc;

use hashbrown::{HashMap, HashSet};

use super::inbox::{Inbox, Over};

/// Channels that are listened to, or no longer, by one query.
const AT_ONCE: usize = 200;

/// The most that the mail of all clients of a hub takes; bytes.
pub const TOTAL_MAX: usize = 32 << 20;

/// A client's number.
pub type Id = u64;

/// Whether the hub's server connection listens to a channel.
///
/// ```text
/// Wanted ──asked──▶ Asked ──confirmed──▶ Heard ──nobody listens any more: asked──▶ (gone)
///    ▲                └──────lost──────────┘
///    └──────────────────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// It does not.
    Wanted,
    /// It is told to.
    Asked,
    /// It does.
    Yes,
}

/// From when on a client has a channel's notifications from the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Since {
    /// Not yet: its own server connection brings them.
    Later,
    /// From the mark with this number on.
    Mark(u64),
    /// Now.
    Now,
}

#[derive(Debug)]
struct Channel {
    heard: Heard,
    /// In no order: each client is told in that of the server's queue.
    clients: HashMap<Id, Since>,
}

/// Which channels are to be listened to from now on, and which are not.
#[derive(Debug, Default)]
pub struct Work {
    /// `LISTEN`.
    pub listen: Vec<Rc<[u8]>>,
    /// `UNLISTEN`.
    pub unlisten: Vec<Rc<[u8]>>,
}

impl Work {
    /// Whether there is nothing to do.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.listen.is_empty() && self.unlisten.is_empty()
    }

    /// The statements.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        let mut text = listen_to(&self.listen);
        for name in &self.unlisten {
            text.extend_from_slice(b"UNLISTEN ");
            quote(name, &mut text);
            text.push(b';');
        }
        text
    }
}

/// The statements that listen to these.
#[must_use]
pub fn listen_to<N: AsRef<[u8]>>(names: &[N]) -> Vec<u8> {
    let mut text = Vec::new();
    for name in names {
        text.extend_from_slice(b"LISTEN ");
        quote(name.as_ref(), &mut text);
        text.push(b';');
    }
    text
}

/// Appends a channel's name as an identifier.
pub fn quote(name: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in name {
        if *byte == b'"' {
            out.push(b'"');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// The subscriptions of one pool.
#[derive(Debug, Default)]
pub struct Subscriptions {
    channels: HashMap<Rc<[u8]>, Channel>,
    clients: HashMap<Id, Rc<Inbox>>,
    /// Channels whose state may have to change.
    restless: HashSet<Rc<[u8]>>,
    /// Who waits for a mark.
    marks: HashMap<u64, (Id, Vec<Rc<[u8]>>)>,
    /// The hub's server connection listens to the marks.
    hears_marks: bool,
    /// What the mail of all clients takes; bytes.
    total: Rc<Cell<usize>>,
}

impl Subscriptions {
    /// A client comes.
    pub fn enter(&mut self, id: Id, inbox: Rc<Inbox>) {
        self.clients.insert(id, inbox);
    }

    /// It goes, with the subscriptions to `names`: nothing is brought to it any more.
    pub fn leave<'a>(&mut self, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        self.unsubscribe(id, names);
        self.clients.remove(&id);
        self.marks.retain(|_, (waits, _)| *waits != id);
    }

    /// A client is to listen to a channel some time; or, if its server connection becomes the hub's, `now`. Where others do,
    /// too, it is listened to anew: what they remember of the last connection is forgotten then.
    pub fn subscribe(&mut self, id: Id, name: &[u8], now: bool) {
        let name: Rc<[u8]> = self.channels.get_key_value(name).map_or_else(|| name.into(), |(known, _)| known.clone());
        let channel = self.channels.entry(name.clone());
        let channel = channel.or_insert_with(|| Channel { heard: Heard::Wanted, clients: HashMap::new() });
        channel.clients.insert(id, if now { Since::Now } else { Since::Later });
        if now && channel.clients.len() == 1 {
            channel.heard = Heard::Yes;
        } else if channel.heard == Heard::Wanted {
            self.restless.insert(name);
        }
    }

    /// A client does not listen to these any more.
    pub fn unsubscribe<'a>(&mut self, id: Id, names: impl Iterator<Item = &'a [u8]>) {
        for name in names {
            let Some((name, channel)) = self.channels.get_key_value_mut(name) else { continue };
            channel.clients.remove(&id);
            if channel.clients.is_empty() {
                self.restless.insert(name.clone());
            }
        }
    }

    /// The hub's server connection listens to the marks from now on, or there is none that does. Who waited for it is woken.
    pub fn hears_marks(&mut self, does: bool) {
        self.hears_marks = does;
        for inbox in self.clients.values().filter(|_| does) {
            inbox.wake();
        }
    }

    /// Whether the hub's server connection listens to all of these, and to the mark that is to come. One that was a client's has
    /// its channels before it has that of the marks: a mark sent in between would be nobody's.
    #[must_use]
    pub fn hears<'a>(&self, mut names: impl Iterator<Item = &'a [u8]>) -> bool {
        self.hears_marks && names.all(|name| self.channels.get(name).is_some_and(|channel| channel.heard == Heard::Yes))
    }

    /// A client has its channels' notifications from the hub from the mark `number` on.
    pub fn mark<'a>(&mut self, id: Id, number: u64, names: impl Iterator<Item = &'a [u8]>) {
        let mut marked = Vec::new();
        for name in names {
            let Some((name, channel)) = self.channels.get_key_value_mut(name) else { continue };
            if let Some(since) = channel.clients.get_mut(&id) {
                *since = Since::Mark(number);
                marked.push(name.clone());
            }
        }
        self.marks.insert(number, (id, marked));
    }

    /// The mark will not come.
    pub fn unmark(&mut self, number: u64) {
        self.marks.remove(&number);
    }

    /// The mark has come.
    pub fn marked(&mut self, number: u64) {
        let Some((id, names)) = self.marks.remove(&number) else { return };
        for name in names {
            let since = self.channels.get_mut(&name).and_then(|channel| channel.clients.get_mut(&id));
            if let Some(since) = since.filter(|since| **since == Since::Mark(number)) {
                *since = Since::Now;
            }
        }
    }

    /// What the hub's server connection is to be told next. It is on its way then.
    pub fn work(&mut self) -> Work {
        let mut work = Work::default();
        let names: Vec<_> = self.restless.iter().take(AT_ONCE).cloned().collect();
        for name in names {
            self.restless.remove(&name);
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            match (channel.heard, channel.clients.is_empty()) {
                (Heard::Wanted, false) => {
                    channel.heard = Heard::Asked;
                    work.listen.push(name);
                }
                (Heard::Wanted, true) => drop(self.channels.remove(&name)),
                (Heard::Yes, true) => {
                    self.channels.remove(&name);
                    work.unlisten.push(name);
                }
                // Looked at again when it is confirmed.
                (Heard::Asked, _) | (Heard::Yes, false) => {}
            }
        }
        work
    }

    /// It has done that. Who waited for it is woken.
    pub fn confirm(&mut self, work: &Work) {
        for name in &work.listen {
            let Some(channel) = self.channels.get_mut(name) else { continue };
            channel.heard = Heard::Yes;
            if channel.clients.is_empty() {
                self.restless.insert(name.clone());
            }
            for (id, since) in &channel.clients {
                let Some(inbox) = self.clients.get(id) else { continue };
                if *since != Since::Later {
                    // It was heard before, and lost: what was sent in between does not come.
                    inbox.hub_is_silent(Some(name));
                }
                inbox.wake();
            }
        }
    }

    /// The hub's server connection is lost: everything has to be listened to anew. Clients that waited for a mark wait no
    /// more: it will not come. Those whose own server connections bring their notifications are woken: they keep these.
    pub fn lost(&mut self) {
        self.marks.clear();
        self.restless.clear();
        self.channels.retain(|_, channel| !channel.clients.is_empty());
        for (name, channel) in &mut self.channels {
            channel.heard = Heard::Wanted;
            self.restless.insert(name.clone());
            for since in channel.clients.values_mut().filter(|since| matches!(since, Since::Mark(_))) {
                *since = Since::Now;
            }
        }
        for inbox in self.clients.values() {
            inbox.hub_is_silent(None);
            inbox.wake();
        }
    }

    /// A notification came: it goes to those that listen to it.
    pub fn dispatch(&self, channel: &[u8], message: &Rc<[u8]>) {
        let Some(channel) = self.channels.get(channel) else { return };
        for (id, _) in channel.clients.iter().filter(|(_, since)| **since == Since::Now) {
            if let Some(inbox) = self.clients.get(id) {
                inbox.bring(message);
            }
        }
        while self.total.get() > TOTAL_MAX {
            // Whoever takes the least of it.
            let Some(fullest) = self.clients.values().max_by_key(|inbox| inbox.bytes()) else { return };
            if fullest.bytes() == 0 {
                return;
            }
            fullest.end(Over::Untaken);
        }
    }

    /// No client is told anything any more.
    pub fn end(&self) {
        for inbox in self.clients.values() {
            inbox.end(Over::NoRoom);
        }
    }

    /// An inbox for a client.
    #[must_use]
    pub fn inbox(&self) -> Rc<Inbox> {
        Rc::new(Inbox::new(self.total.clone()))
    }

    /// The clients with smaller numbers than `below` are told something.
    pub fn tell(&self, message: &Rc<[u8]>, below: Id) {
        for (_, inbox) in self.clients.iter().filter(|(id, _)| **id < below) {
            inbox.bring(message);
        }
    }

    /// Whether there may be something to do, or nobody is left to do it for.
    #[must_use]
    pub fn is_restless(&self) -> bool {
        !self.restless.is_empty() || self.clients.is_empty()
    }

    /// Whether nobody is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// How many are.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.clients.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::Wake;

    use super::*;

    fn names(of: &[&'static str]) -> impl Iterator<Item = &'static [u8]> {
        of.iter().map(|name| name.as_bytes()).collect::<Vec<_>>().into_iter()
    }

    fn text(subscriptions: &mut Subscriptions) -> String {
        let work = subscriptions.work();
        subscriptions.confirm(&work);
        String::from_utf8(work.text()).unwrap()
    }

    fn message(text: &str) -> Rc<[u8]> {
        text.as_bytes().into()
    }

    fn mail(inbox: &Inbox) -> String {
        let mut out = Vec::new();
        inbox.take(false, usize::MAX, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn names_are_quoted_as_identifiers() {
        let mut out = Vec::new();
        quote(b"a\"; DROP", &mut out);
        assert_eq!(out, b"\"a\"\"; DROP\"");
    }

    #[test]
    fn a_channel_is_listened_to_once_and_as_long_as_anybody_does() {
        let mut all = Subscriptions::default();
        all.hears_marks(true);
        let (one, two) = (Rc::new(Inbox::default()), Rc::new(Inbox::default()));
        all.enter(1, one);
        all.enter(2, two);
        all.subscribe(1, b"c", false);
        assert!(!all.hears(names(&["c"])));
        assert_eq!(text(&mut all), "LISTEN \"c\";");
        assert!(all.hears(names(&["c"])));
        all.subscribe(2, b"c", false);
        assert_eq!(text(&mut all), "");
        all.unsubscribe(1, names(&["c", "never"]));
        assert_eq!(text(&mut all), "");
        all.leave(2, names(&["c"]));
        assert_eq!(text(&mut all), "UNLISTEN \"c\";");
        assert!(!all.hears(names(&["c"])) && all.channels.is_empty() && !all.is_empty());
        all.leave(1, names(&[]));
        assert!(all.is_empty());
    }

    #[test]
    fn nobody_sends_a_mark_that_the_one_that_listens_does_not_hear_yet() {
        let woken = Arc::new(Flag::default());
        let mut all = Subscriptions::default();
        // One client's server connection becomes the hub's, with the channel that another is about to hand over.
        all.enter(1, Rc::default());
        all.subscribe(1, b"c", true);
        let inbox = Rc::new(Inbox::default());
        inbox.set_waker(&woken.clone().into());
        all.enter(2, inbox);
        all.subscribe(2, b"c", false);
        assert!(!all.hears(names(&["c"])) && !woken.is_set());
        all.hears_marks(true);
        assert!(all.hears(names(&["c"])) && woken.is_set());
        all.hears_marks(false);
        assert!(!all.hears(names(&["c"])));
    }

    /// Whether somebody was woken.
    #[derive(Default)]
    struct Flag(AtomicBool);

    impl Flag {
        fn is_set(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_goes_before_its_channel_is_heard_leaves_nothing() {
        let mut all = Subscriptions::default();
        all.enter(1, Rc::default());
        all.subscribe(1, b"a", false);
        all.unsubscribe(1, names(&["a"]));
        assert_eq!(text(&mut all), "", "it was never asked for");
        all.subscribe(1, b"a", false);
        let work = all.work();
        all.leave(1, names(&["a"]));
        assert!(all.work().is_empty(), "it is on its way");
        all.confirm(&work);
        assert_eq!(text(&mut all), "UNLISTEN \"a\";");
    }

    #[test]
    fn a_client_is_told_from_its_mark_on() {
        let mut all = Subscriptions::default();
        let (inbox, other) = (Rc::new(Inbox::default()), Rc::new(Inbox::default()));
        all.enter(1, inbox.clone());
        all.enter(2, other.clone());
        all.subscribe(2, b"c", true);
        all.subscribe(1, b"c", false);
        assert_eq!(text(&mut all), "");
        all.dispatch(b"c", &message("before "));
        all.mark(1, 7, names(&["c", "never"]));
        all.dispatch(b"c", &message("too soon "));
        all.marked(8);
        all.dispatch(b"c", &message("another's "));
        all.marked(7);
        all.dispatch(b"c", &message("mine "));
        all.dispatch(b"d", &message("nobody's "));
        assert_eq!(mail(&inbox), "mine ");
        assert_eq!(mail(&other), "before too soon another's mine ");
        all.unsubscribe(1, names(&["c"]));
        all.dispatch(b"c", &message("never"));
        assert_eq!(mail(&inbox), "");
    }

    #[test]
    fn a_second_mark_of_a_client_leaves_the_first_to_come() {
        let mut all = Subscriptions::default();
        let inbox = Rc::new(Inbox::default());
        all.enter(1, inbox.clone());
        for name in [&b"a"[..], b"b", b"c"] {
            all.subscribe(1, name, false);
        }
        text(&mut all);
        all.mark(1, 1, names(&["a"]));
        all.mark(1, 2, names(&["b"]));
        all.mark(1, 3, names(&["c"]));
        all.unmark(3);
        for number in 1..=3 {
            all.marked(number);
        }
        for (name, said) in [(&b"a"[..], "a"), (b"b", "b"), (b"c", "c")] {
            all.dispatch(name, &message(said));
        }
        assert_eq!(mail(&inbox), "ab");
    }

    #[test]
    fn after_a_loss_everything_is_listened_to_anew() {
        let mut all = Subscriptions::default();
        let inbox = Rc::new(Inbox::default());
        all.enter(1, inbox.clone());
        all.subscribe(1, b"a", true);
        all.subscribe(1, b"b", false);
        assert_eq!(text(&mut all), "LISTEN \"b\";");
        all.mark(1, 1, names(&["b"]));
        all.enter(2, Rc::default());
        all.subscribe(2, b"gone", true);
        all.leave(2, names(&["gone"]));
        all.lost();
        let work = all.work();
        assert_eq!((work.listen.len(), work.unlisten.len()), (2, 0));
        all.confirm(&work);
        all.marked(1);
        all.dispatch(b"b", &message("b"));
        assert_eq!(mail(&inbox), "b", "the mark is not waited for");
    }

    #[test]
    fn work_is_done_in_parts() {
        let mut all = Subscriptions::default();
        all.enter(1, Rc::default());
        for number in 0..=AT_ONCE {
            all.subscribe(1, format!("c{number}").as_bytes(), false);
        }
        let first = all.work();
        assert_eq!(first.listen.len(), AT_ONCE);
        all.confirm(&first);
        assert_eq!(all.work().listen.len(), 1);
    }
    #[test]
    fn of_all_clients_that_take_nothing_the_one_that_left_most_is_ended_first() {
        let mut all = Subscriptions::default();
        let inboxes: Vec<_> = (0..40).map(|_| all.inbox()).collect();
        for (id, inbox) in (0..).zip(&inboxes) {
            all.enter(id, inbox.clone());
            all.subscribe(id, b"c", true);
        }
        all.subscribe(7, b"own", true);
        let long = message(&"x".repeat(8000));
        all.dispatch(b"own", &long);
        let each = inboxes[7].bytes();
        while all.total.get() + 40 * each <= TOTAL_MAX {
            all.dispatch(b"c", &long);
        }
        assert!(inboxes.iter().all(|inbox| inbox.over().is_none()));
        all.dispatch(b"c", &long);
        assert_eq!(inboxes[7].over(), Some(Over::Untaken));
        assert_eq!(inboxes.iter().filter(|inbox| inbox.over().is_some()).count(), 1);
        assert!(all.total.get() <= TOTAL_MAX);
        let kept: usize = inboxes.iter().map(|inbox| inbox.bytes()).sum();
        assert_eq!(kept, all.total.get());
    }

    #[test]
    fn a_mark_that_failed_leaves_nothing() {
        let mut all = Subscriptions::default();
        all.enter(1, Rc::default());
        all.subscribe(1, b"c", false);
        for number in 1..10 {
            all.mark(1, number, names(&["c"]));
            all.unmark(number);
        }
        assert!(all.marks.is_empty());
        all.mark(1, 10, names(&["c"]));
        all.leave(1, names(&["c"]));
        assert!(all.marks.is_empty());
    }
}
