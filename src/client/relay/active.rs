//! What only a session at work needs.

use super::super::answer::Aside;
use super::super::local::Local;
use super::super::request::Marks;
use super::super::slow::Watched;
use super::overdue::Overdue;
use super::rerun::Rerun;
use crate::clock::Moment;
use crate::stats::PinReason;

/// Bytes of a session that could not be passed on at once.
#[derive(Debug, Default)]
pub struct Backlog {
    /// From the client: not yet looked at, or the front of an incomplete message.
    pub input: Vec<u8>,
    /// For the client: its socket would not take them.
    pub output: Vec<u8>,
}

/// Whether the server connection was audited since the client sent something.
///
/// ```text
/// Given ──sent──▶ Open ──audit──▶ Asked | Sampled ──answered──▶ Given
///                  ▲                      │
///                  └─────────sent─────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// It was not.
    Open,
    /// It is being audited.
    Asked,
    /// It is asked whether it is as it is known to be, although nothing suggests that it is not.
    Sampled,
    /// It was.
    Given,
}

/// What only a session at work needs; an idle one has none of it.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts that hold beside each other, and end one by one")]
pub struct Active {
    pub(super) backlog: Backlog,
    pub(super) marks: Marks,
    pub(super) aside: Aside,
    /// The replay on its way may fail: nothing may follow it before it is known to be applied.
    pub(super) hold: bool,
    /// It is the first of these settings on that server, as far as is remembered.
    pub(super) proving: bool,
    /// The input is to be looked at before more is read.
    pub(super) resume: bool,
    /// The input cannot be passed on before more answers have come: no more is read.
    pub(super) stalled: bool,
    /// Whoever waits for the server connection comes first: what the client sends is left where it is until it is audited.
    pub(super) yields: bool,
    /// What is answered without a server.
    pub(super) local: Option<Local>,
    pub(super) rerun: Rerun,
    /// Cancel requests sent to the server in this lease that may have to be repeated.
    pub(super) cancels: u8,
    /// The catalog that what ran was judged by.
    pub(super) catalog: u64,
    pub(super) proof: Proof,
    /// When the lease began.
    pub(super) leased: Moment,
    /// When the transaction began.
    pub(super) begun: Moment,
    /// What took too long.
    pub(super) overdue: Option<Overdue>,
    /// Since when the client has been found to have stopped in the middle of what it sends.
    pub(super) stopped: Option<Moment>,
    /// The server was asked for what it may keep to itself, since the client sent something.
    pub(super) flushed: bool,
    /// What is under way, if slow statements are logged.
    pub(super) watched: Option<Box<Watched>>,
}

impl Active {
    /// A blank one, for a lease that begins now.
    pub fn new(now: Moment) -> Self {
        Self {
            backlog: Backlog::default(),
            marks: Marks::default(),
            aside: Aside::default(),
            hold: false,
            proving: false,
            resume: false,
            stalled: false,
            yields: false,
            local: None,
            rerun: Rerun::default(),
            cancels: 0,
            catalog: 0,
            proof: Proof::Open,
            leased: now,
            begun: now,
            overdue: None,
            stopped: None,
            flushed: false,
            watched: None,
        }
    }

    /// Something of the client's was passed on.
    #[inline]
    pub(super) fn sent(&mut self) {
        // What pins a connection may be gone after any statement.
        self.marks.tainted |= self.marks.pins.may_end();
        if self.marks.pins.has(PinReason::Temp) {
            // What its own temporary tables and functions set in motion is in nobody's catalog.
            self.marks.runs_unjudged();
        }
        self.proof = Proof::Open;
        (self.stopped, self.flushed) = (None, false);
    }

    /// Whether all that the client sent was passed on, and is not held up.
    pub(super) fn is_through(&self) -> bool {
        !self.stalled && !self.hold && !self.resume && self.backlog.input.is_empty() && self.local.is_none()
    }

    /// It is blank, and may be another client's next.
    #[inline]
    pub fn end(&mut self) {
        self.marks.placing.end();
        self.marks.forget_resets();
        self.aside.begin_reports();
    }

    /// Whether forgetting it loses nothing.
    #[inline]
    pub(super) fn is_blank(&self) -> bool {
        self.backlog.input.is_empty()
            && self.backlog.output.is_empty()
            && self.local.is_none()
            && self.marks.is_blank()
            && self.rerun.is_blank()
            && !self.aside.replaying
            && !self.aside.healing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_client_gets_knows_of_no_portal() {
        let mut active = Active::new(Moment::default());
        let (prepares, drops) = (&mut active.marks.placing.prepares, &mut active.marks.placing.drops);
        (*prepares, *drops) = (true, true);
        active.marks.placing.bound_to(true);
        assert!(active.is_blank());
        active.end();
        let placing = &active.marks.placing;
        assert!(!placing.prepares && !placing.drops && !placing.may_drop(true));
    }
}
