//! When a client is listened to.
//!
//! While the server works on something that it will end by itself, a client nearly always waits for the answer. Its
//! socket is not asked then: that would find nothing, and costs every transaction. What it does all the same is noticed
//! when the answer has come, or within a tick. A client that was found to send ahead is listened to all the time for a
//! while, so that its pipelines keep the server busy.

use super::{Lease, Relay};

/// Leases for which a client that sent ahead is listened to.
const EAGER_LEASES: u8 = 64;

/// ```text
/// Open ──sent what the server ends by itself, or gives way──▶ Shut ──answered, or a tick──▶ Opening ──asked──▶ Open
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ear {
    /// It was asked until it had nothing, and wakes the session when it has.
    Open,
    /// It is not asked; the session's place among those that do not listen.
    Shut(usize),
    /// It is about to be asked.
    Opening,
}

impl Relay {
    /// At the beginning of a poll: whether the client is to be asked.
    #[inline]
    pub(super) fn listens(&mut self) -> bool {
        if matches!(self.ear, Ear::Shut(_)) && self.entry.listen.get() {
            self.open_ear();
        }
        !matches!(self.ear, Ear::Shut(_))
    }

    /// The server said something. True if the client was not listened to, and is to be asked now.
    #[inline]
    pub(super) fn reopen_ear(&mut self) -> bool {
        let reopens = matches!(self.ear, Ear::Shut(_)) && !self.awaits_server();
        if reopens {
            self.open_ear();
        }
        reopens
    }

    /// The client gave something. True if it is not asked for more until the server has answered.
    #[inline]
    pub(super) fn shut_ear(&mut self) -> bool {
        if !self.awaits_server() {
            return false;
        }
        if self.eager > 0 {
            self.eager -= 1;
            return false;
        }
        self.leave_unheard();
        true
    }

    /// The client is asked again when the server has answered, or within a tick.
    #[inline]
    pub(super) fn leave_unheard(&mut self) {
        if !matches!(self.ear, Ear::Shut(_)) {
            self.ear = Ear::Shut(self.context.registry.is_deaf(&self.entry));
        }
    }

    /// The client was asked, and had something or not.
    #[inline]
    pub(super) fn heard(&mut self, something: bool) {
        if something && self.ear == Ear::Opening {
            self.eager = EAGER_LEASES;
        }
        self.open_ear();
        self.ear = Ear::Open;
    }

    pub(super) fn open_ear(&mut self) {
        if let Ear::Shut(place) = self.ear {
            self.context.registry.listens(place);
            self.ear = Ear::Opening;
        }
    }

    /// Whether the server has everything it needs to come to the end of what it was sent.
    fn awaits_server(&self) -> bool {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &self.active) else {
            return false;
        };
        let pipeline = &conn.pipeline;
        let works = pipeline.ready_owed() > 0 && !pipeline.is_batch_open() && !pipeline.is_copy_in();
        works && conn.unsent.is_empty() && !self.scanner.is_inside() && active.is_through()
    }
}
