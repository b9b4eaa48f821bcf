//! A client that listens: handing its channels over to the hub, so that it can give its server connection back, and telling
//! it what comes. The hub's own documentation has the whole story.

use std::task::Context as Task;

use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use super::super::end::End;
use super::super::request::Marks;
use super::{Active, Lease, Relay};
use crate::backend::{Lost, Unnamed};
use crate::cancel::Activity;
use crate::pool::Life;
use crate::prepared::{MARK, REPLAY};
use crate::state::{Findings, Step, Subscriber, listen_to};
use crate::stats::PinReason;

/// What a client is told at once; bytes, and the rest of a message.
const PART: usize = 16 * 1024;

/// An audit told what the server connection listens to.
pub fn found(subscriber: &mut Option<Box<Subscriber>>, marks: &mut Marks, findings: &mut Findings) {
    marks.channels = std::mem::take(&mut findings.channels);
    marks.channels.sort_unstable();
    marks.keeps_channels = findings.more_channels;
    let Some(known) = subscriber else { return };
    // It is ours.
    marks.channels.retain(|name| **name != *known.hub().marker());
    if marks.channels.is_empty() {
        findings.pins.remove(PinReason::Listen);
    }
    if marks.listens_too {
        // If there are more, these are those that it has listened to for longest, and so all that the hub may bring.
        known.keep(&marks.channels);
    }
}

/// What was on its way by itself is complete: a mark, or an `UNLISTEN *`. True if that was a mark and it came, so that
/// the server connection is to listen to nothing any more.
pub fn settle(subscriber: &mut Subscriber, active: &mut Active) -> bool {
    if active.aside.scrubbing {
        active.marks.listening = false;
        subscriber.inbox().server_is_silent();
    }
    if !matches!(subscriber.step(), Step::Marking(_)) {
        return false;
    }
    let came = std::mem::take(&mut active.aside.marked);
    if came {
        subscriber.marked();
    } else {
        // The server would not take it.
        subscriber.retract();
        active.marks.keeps_channels = true;
    }
    came
}

/// A value of `client_encoding`, as far as it makes a difference.
fn encoding(name: &[u8]) -> Vec<u8> {
    let letters = name.iter().filter(|byte| byte.is_ascii_alphanumeric());
    let name: Vec<u8> = letters.map(u8::to_ascii_uppercase).collect();
    if name == b"UNICODE" { b"UTF8".to_vec() } else { name }
}

impl Relay {
    /// The lease of a client that may have listened ends. True if its server connection does not go back to the pool yet, or
    /// is the hub's now.
    #[cold]
    pub(super) fn ends_listening(&mut self, cx: &mut Task<'_>) -> Result<bool, End> {
        if self.is_on_follower() {
            // The hub is on the primary. What listens to a follower that was promoted is pinned, and so given up.
            if let Some(active) = &mut self.active {
                active.marks.hears_nothing();
            }
            return Ok(false);
        }
        self.hands_over(cx)
    }

    /// Behind the client's settings, where a transaction of which it was told goes on: what it listens to, which is there from
    /// before its BEGIN.
    pub(super) fn listen_in_front(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let Some(channels) = self.subscriber.as_ref().and_then(|subscriber| subscriber.channels()) else {
            return Ok(());
        };
        // It may have been lost with the settings.
        let (Lease::Held(_), Some(active)) = (&self.lease, &mut self.active) else { return Ok(()) };
        (active.marks.listens_too, active.marks.listening) = (true, true);
        let mut message = Vec::new();
        encode::query(&mut message, &listen_to(channels));
        self.send_held(&message, cx)
    }

    /// The server connection is at rest, and what it listens to is known. True if it does not go back to the pool yet, or is
    /// the hub's now.
    fn hands_over(&mut self, cx: &mut Task<'_>) -> Result<bool, End> {
        let goes_on = self.hand_over(cx)?;
        if let Some(subscriber) = self.subscriber.as_mut().filter(|_| !goes_on) {
            // Nothing is on its way to the hub from here.
            subscriber.retract();
            self.subscriber.take_if(|subscriber| subscriber.is_idle());
        }
        Ok(goes_on)
    }

    fn hand_over(&mut self, cx: &mut Task<'_>) -> Result<bool, End> {
        let is_same = self.has_plain_encoding();
        let Some(active) = &mut self.active else { return Ok(false) };
        let marks = &mut active.marks;
        if marks.pins.has(PinReason::Unknown) {
            // Nobody knows.
            return Ok(false);
        }
        if marks.channels.is_empty() {
            if marks.listens_too {
                self.subscriber = None;
                return self.silence(cx).map(|()| true);
            }
            marks.listening = false;
            return Ok(false);
        }
        if marks.keeps_channels || !is_same || !self.pool.limits.shared_listener {
            if std::mem::take(&mut marks.listens_too) {
                // It listens to everything itself.
                self.leave_hub(is_same, cx)?;
            }
            return Ok(false);
        }
        if !marks.pins.is_at_most(PinReason::Listen) {
            return Ok(false);
        }
        let (hubs, pool) = (&self.context.hubs, &self.pool);
        let subscriber = self.subscriber.get_or_insert_with(|| Box::new(Subscriber::new(hubs.of(pool))));
        if !subscriber.hub().is_up() {
            // Where no server connection can be spared, the client keeps this one, which has all its channels.
            return Ok(self.gives());
        }
        let fresh = subscriber.fresh(&marks.channels);
        let life = match &self.lease {
            Lease::Held(conn) => pool.life_of(conn),
            Lease::None | Lease::Waiting(_) => Life::Same,
        };
        match life {
            Life::Newer => subscriber.hub_is_stale(),
            Life::Same | Life::Older if fresh.is_empty() => {
                // The client may have left what was on its way.
                subscriber.retract();
                return self.silence(cx).map(|()| true);
            }
            Life::Same => {}
            // Nobody else is led there any more.
            Life::Older => return Ok(false),
        }
        if subscriber.step() != Step::Asked || !subscriber.is_coming(&fresh) {
            subscriber.retract();
            subscriber.ask(fresh);
        }
        if subscriber.answer() == Some(true) {
            return self.mark(cx).map(|()| true);
        }
        self.note(Activity::Idle);
        Ok(true)
    }

    /// Whether the client has the encoding that a plain server connection has, and so the hub's.
    fn has_plain_encoding(&self) -> bool {
        let Some(own) = self.profile.get("client_encoding") else { return true };
        let learned = self.pool.learned();
        let plain = learned.iter().flat_map(|learned| &learned.parameters);
        let mut plain = plain.filter(|(name, _)| name.eq_ignore_ascii_case("client_encoding"));
        plain.next().is_some_and(|(_, plain)| encoding(plain) == encoding(own))
    }

    /// The hub has nothing more for the client: what it has brought so far is told, if that `is_readable`.
    fn leave_hub(&mut self, is_readable: bool, cx: &mut Task<'_>) -> Result<(), End> {
        let Some(subscriber) = self.subscriber.take().filter(|_| is_readable) else { return Ok(()) };
        let mut out = Vec::new();
        subscriber.inbox().take(false, usize::MAX, &mut out);
        self.write_client(cx, &out, &[])
    }

    /// The server connection becomes the hub's. False if it cannot be spared.
    fn gives(&mut self) -> bool {
        let spares = self.pool.spares_listener(self.pinned);
        let (Lease::Held(conn), Some(active), true) = (&self.lease, &mut self.active, spares) else {
            return false;
        };
        if conn.own
            || conn.gate.in_flight.get() > 0
            || conn.gate.poisoned.get()
            || conn.mixed
            || conn.littered
            || conn.untagged
        {
            return false;
        }
        let marks = &mut active.marks;
        let channels = std::mem::take(&mut marks.channels);
        (marks.listens_too, marks.listening, marks.scrub) = (false, false, false);
        marks.pins.remove(PinReason::Listen);
        self.unpin();
        let conn = self.let_go();
        if let (Some(subscriber), Some(conn)) = (&mut self.subscriber, conn) {
            subscriber.give(conn, &channels);
        }
        true
    }

    /// The hub listens to what the client does: from the mark on it is what the client hears.
    fn mark(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Some(active), Some(subscriber)) = (&mut self.active, &mut self.subscriber) else { return Ok(()) };
        active.aside.marked = false;
        let text = subscriber.mark();
        self.ask_alone(&text, MARK, cx)
    }

    /// The server connection is to listen to nothing any more: the hub does.
    pub(super) fn silence(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let Some(active) = &mut self.active else { return Ok(()) };
        active.marks.channels.clear();
        active.marks.listens_too = false;
        active.marks.pins.remove(PinReason::Listen);
        // If it fails, the connection is not lent any more.
        active.aside.scrubbing = true;
        self.ask_alone(b"UNLISTEN *", REPLAY, cx)
    }

    /// Sends a query of ours that what the client sends meanwhile waits for.
    fn ask_alone(&mut self, text: &[u8], note: u64, cx: &mut Task<'_>) -> Result<(), End> {
        self.note(Activity::Idle);
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else { return Ok(()) };
        active.aside.replaying = true;
        active.hold = true;
        let mut message = Vec::new();
        encode::query(&mut message, text);
        conn.pipeline.sent(Expect::Query, Origin::Pooler, note);
        conn.unnamed = Unnamed::Empty;
        match conn.write(cx, &message, &[]) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(Lost::Io(error.kind()), cx),
        }
    }

    /// At the end of a poll: goes on with what waited for the hub, and tells the client what has come.
    #[cold]
    pub(super) fn tend(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let Some(subscriber) = &self.subscriber else { return Ok(()) };
        subscriber.inbox().set_waker(cx.waker());
        if let Some(over) = subscriber.inbox().over() {
            return Err(End::Deaf(over));
        }
        let is_asked = subscriber.step() == Step::Asked;
        if (is_asked && subscriber.answer() != Some(false) || self.waits_for_hub(subscriber)) && self.is_quiet() {
            self.rest(cx)?;
            // What waited may have its turn now.
            if is_asked && self.subscriber.as_ref().is_none_or(|subscriber| subscriber.step() != Step::Asked) {
                cx.waker().wake_by_ref();
            }
        }
        self.deliver(cx)
    }

    /// Whether the client keeps its server connection only because the hub had none, and has one now.
    fn waits_for_hub(&self, subscriber: &Subscriber) -> bool {
        let only_listens = |active: &Active| {
            let marks = &active.marks;
            marks.listens_too && !marks.keeps_channels && marks.pins.is_at_most(PinReason::Listen)
        };
        self.pinned && subscriber.hub().is_up() && self.active.as_ref().is_some_and(|active| only_listens(active))
    }

    /// Whether a server connection is held and nothing is on its way on it.
    fn is_quiet(&self) -> bool {
        let idle = |active: &Active| !active.hold && active.aside.audit.is_none() && active.local.is_none();
        self.is_free() && self.active.as_ref().is_none_or(|active| idle(active))
    }

    /// Tells the client what the hub brought, if it is between two transactions.
    fn deliver(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let Some(subscriber) = &self.subscriber else { return Ok(()) };
        let is_failing = self.active.as_ref().is_some_and(|active| active.local.is_some());
        // A read that is to be on a follower was placed by what its client knew; a transaction that a follower has begun goes on
        // elsewhere.
        let is_placed = matches!(self.lease, Lease::Waiting(_)) && self.is_on_follower()
            || self.routing.as_ref().is_some_and(|routing| routing.is_placing());
        let is_within = is_failing || is_placed || self.owes_begin();
        if subscriber.inbox().is_empty() || self.has_output() || is_within {
            return Ok(());
        }
        let mut twice = false;
        if matches!(self.lease, Lease::Held(_)) {
            twice = self.active.as_ref().is_some_and(|active| active.marks.listens_too);
            // In a lease that soon ends, what the server connection brings by itself comes first.
            if !self.is_quiet() || twice && !self.pinned {
                return Ok(());
            }
        }
        let mut out = Vec::new();
        subscriber.inbox().take(twice, PART, &mut out);
        let more = !subscriber.inbox().is_empty();
        if let Some(routing) = &mut self.routing {
            // What it is told of has happened before now: it is to see that, wherever it reads.
            self.context.clock.refresh();
            routing.told(self.context.clock.moment());
        }
        self.write_client(cx, &out, &[])?;
        if more && !self.has_output() {
            cx.waker().wake_by_ref();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::encoding;

    #[test]
    fn encodings_are_compared_as_the_server_spells_none_of_them() {
        for (own, plain, same) in [
            ("utf-8", "UTF8", true),
            ("unicode", "UTF8", true),
            ("latin1", "UTF8", false),
            ("Win_1252", "WIN1252", true),
        ] {
            assert_eq!(encoding(own.as_bytes()) == encoding(plain.as_bytes()), same, "{own}");
        }
    }
}
