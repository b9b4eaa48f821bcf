//! A client that listens by the hub.

use std::rc::Rc;

use super::hub::Hub;
use super::inbox::{Inbox, channel};
use super::subscriptions::{Id, quote};
use crate::backend::ServerConn;

/// How far a client's channels are on their way to the hub; see [`Hub`] for the diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// None is on its way.
    Rest,
    /// The hub is to listen to them.
    Asked,
    /// It does, and the mark with this number was sent.
    Marking(u64),
}

/// What a client listens to by the hub. Dropped, it listens to nothing.
#[derive(Debug)]
pub struct Subscriber {
    hub: Rc<Hub>,
    inbox: Rc<Inbox>,
    id: Id,
    /// The channels that the hub brings, sorted.
    names: Vec<Box<[u8]>>,
    /// Those on their way to it.
    coming: Vec<Box<[u8]>>,
    step: Step,
}

/// Whether a name is among the sorted ones.
fn has(names: &[Box<[u8]>], name: &[u8]) -> bool {
    names.binary_search_by(|known| (**known).cmp(name)).is_ok()
}

fn slices(names: &[Box<[u8]>]) -> impl Iterator<Item = &[u8]> {
    names.iter().map(|name| &**name)
}

impl Subscriber {
    /// A client that listens to nothing yet.
    #[must_use]
    pub fn new(hub: Rc<Hub>) -> Self {
        let (id, inbox) = hub.enter();
        Self { hub, inbox, id, names: Vec::new(), coming: Vec::new(), step: Step::Rest }
    }

    /// The hub.
    #[must_use]
    pub const fn hub(&self) -> &Rc<Hub> {
        &self.hub
    }

    /// What it is still to be told.
    #[must_use]
    pub const fn inbox(&self) -> &Rc<Inbox> {
        &self.inbox
    }

    /// The channels that the hub brings, if any.
    #[must_use]
    pub fn channels(&self) -> Option<&[Box<[u8]>]> {
        (!self.names.is_empty()).then_some(&self.names)
    }

    /// How far those are that come.
    #[must_use]
    pub const fn step(&self) -> Step {
        self.step
    }

    /// Whether the hub brings the notifications of this channel; once the mark has come, those on their way, too.
    #[must_use]
    pub fn is_brought(&self, name: &[u8], marked: bool) -> bool {
        has(&self.names, name) || marked && has(&self.coming, name)
    }

    /// A notification came by the client's own server connection. None if it is no mark; else whether it is the one that
    /// is waited for.
    #[must_use]
    pub fn is_mark(&self, body: &[u8]) -> Option<bool> {
        self.hub.mark_of(body).map(|number| self.step == Step::Marking(number))
    }

    /// The client's own server connection brings a notification: false if the client has it; see [`Inbox::comes`].
    pub fn comes(&self, body: &[u8], marked: bool, unread: bool, out: &mut Vec<u8>) -> bool {
        !self.is_brought(channel(body), marked) || self.inbox.comes(body, unread, self.hub.is_up(), out)
    }

    /// The client's own server connection brings a notification that is not to be told now: it comes with the hub's.
    pub fn files(&self, body: &[u8]) {
        self.inbox.file(body, self.hub.is_up());
    }

    /// The hub's connection leads to a server that clients are not led to any more.
    pub fn hub_is_stale(&self) {
        self.hub.leaves();
    }

    /// What is left of the channels: those that were `found`, which are sorted.
    pub fn keep(&mut self, found: &[Box<[u8]>]) {
        let before = self.names.len();
        let (kept, gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.names).into_iter().partition(|name| has(found, name));
        self.names = kept;
        if self.names.len() < before {
            self.hub.unsubscribe(self.id, slices(&gone));
            self.inbox.keep(|channel| has(&self.names, channel));
        }
    }

    /// Those of the `found` ones that the hub does not bring.
    #[must_use]
    pub fn fresh(&self, found: &[Box<[u8]>]) -> Vec<Box<[u8]>> {
        found.iter().filter(|name| !has(&self.names, name)).cloned().collect()
    }

    /// Whether exactly these are on their way.
    #[must_use]
    pub fn is_coming(&self, names: &[Box<[u8]>]) -> bool {
        self.coming == names
    }

    /// The hub is to listen to these, too.
    pub fn ask(&mut self, names: Vec<Box<[u8]>>) {
        self.hub.ask(self.id, slices(&names));
        self.coming = names;
        self.step = Step::Asked;
    }

    /// Whether it does. None if it will not.
    #[must_use]
    pub fn answer(&self) -> Option<bool> {
        self.hub.hears(slices(&self.coming))
    }

    /// The text that sends a mark.
    pub fn mark(&mut self) -> Vec<u8> {
        let number = self.hub.mark(self.id, slices(&self.coming));
        self.step = Step::Marking(number);
        let mut text = b"LISTEN ".to_vec();
        quote(self.hub.marker(), &mut text);
        text.extend_from_slice(b";NOTIFY ");
        quote(self.hub.marker(), &mut text);
        text.extend_from_slice(format!(",'{number}'").as_bytes());
        text
    }

    /// The mark came: the hub brings those that were on their way.
    pub fn marked(&mut self) {
        self.names.append(&mut self.coming);
        self.names.sort_unstable();
        self.step = Step::Rest;
    }

    /// Whether the hub has nothing to do for it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.names.is_empty() && self.step == Step::Rest
    }

    /// Those on their way do not come.
    pub fn retract(&mut self) {
        if let Step::Marking(number) = self.step {
            self.hub.unmark(number);
        }
        if self.step != Step::Rest {
            self.hub.unsubscribe(self.id, slices(&self.coming));
            self.coming.clear();
            self.step = Step::Rest;
        }
    }

    /// The client's own server connection, which listens to the `found` ones, becomes the hub's.
    pub fn give(&mut self, conn: Box<ServerConn>, found: &[Box<[u8]>]) {
        self.retract();
        self.inbox.hub_is_own();
        self.hub.adopt(conn, self.id, slices(found));
        let fresh = self.fresh(found);
        self.names.extend(fresh);
        self.names.sort_unstable();
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.hub.leave(self.id, slices(&self.names).chain(slices(&self.coming)));
    }
}
