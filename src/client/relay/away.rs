//! A client that nothing is read from for now, because what it sent cannot be passed on (is it still there?), or because it
//! said goodbye.

use pgweir_config::CancelOnDisconnect;
use pgweir_proto::frontend::Tag;
use pgweir_proto::scanner::{HEADER, Scanned};

use super::super::end::End;
use super::{Lease, Relay};
use crate::backend::ServerConn;

impl Relay {
    /// Nothing is read from the client for now, so that its end is not seen in passing: it is looked for once a second.
    /// An end behind bytes that were not read yet is none: a `Terminate` may be among them.
    pub(super) fn look_after_client(&mut self) -> Result<(), End> {
        if !self.context.registry.is_to_look(&self.entry) || self.said_goodbye() {
            return Ok(());
        }
        match self.link.is_at_end() {
            Ok(false) => Ok(()),
            Ok(true) => Err(End::Gone(None)),
            Err(error) => Err(End::Gone(Some(error.kind()))),
        }
    }

    /// Whether the input kept ends with a `Terminate`.
    pub(super) fn said_goodbye(&self) -> bool {
        let Some(active) = &self.active else { return false };
        let mut scanner = self.scanner;
        let (mut rest, mut last) = (&active.backlog.input[..], 0);
        while let Ok(Scanned::Whole { tag, body }) = scanner.next(rest) {
            last = tag;
            rest = rest.get(HEADER + body.len()..).unwrap_or_default();
        }
        last == Tag::Terminate as u8
    }

    /// Whether a client that says goodbye now still gets answers to what it sent before, as from Postgres: to all that
    /// earns a `ReadyForQuery`. What comes behind the last one is not flushed there, either.
    pub(super) fn hears_out(&self) -> bool {
        let ends_at_once = self.context.config.client.cancel_on_disconnect == CancelOnDisconnect::Always;
        // A COPY waits for data that will not come any more.
        let comes = |conn: &ServerConn| conn.pipeline.ready_owed() > 0 && !conn.pipeline.is_copy_in();
        matches!(&self.lease, Lease::Held(conn) if comes(conn)) && !ends_at_once
    }
}
