//! Writing to the client, and keeping what its socket will not take.

use std::io;
use std::task::{Context as Task, Poll};

use super::super::end::End;
use super::{Lease, Relay};

impl Relay {
    pub(super) fn write_client(&mut self, cx: &mut Task<'_>, first: &[u8], second: &[u8]) -> Result<(), End> {
        let len = first.len() + second.len();
        if len == 0 {
            return Ok(());
        }
        self.pool.stats.borrow_mut().bytes_to_clients += len as u64;
        let taken = if self.has_output() {
            0
        } else {
            match self.link.poll_write(cx, first, second) {
                Poll::Ready(Ok(taken)) => taken,
                Poll::Ready(Err(error)) => return Err(End::Gone(Some(error.kind()))),
                Poll::Pending => 0,
            }
        };
        if taken < len {
            let output = &mut self.active().backlog.output;
            output.extend_from_slice(first.get(taken..).unwrap_or_default());
            output.extend_from_slice(second.get(taken.saturating_sub(first.len())..).unwrap_or_default());
            // Registers for the moment when there is room again.
            self.flush_client(cx)?;
        }
        Ok(())
    }

    /// Whether something is kept for the client.
    #[inline]
    pub(super) fn has_output(&self) -> bool {
        self.active.as_ref().is_some_and(|active| !active.backlog.output.is_empty())
    }

    /// Writes what is kept for the client. False if some is left.
    pub(super) fn flush_client(&mut self, cx: &mut Task<'_>) -> Result<bool, End> {
        let Some(active) = &mut self.active else { return Ok(true) };
        let output = &mut active.backlog.output;
        if output.is_empty() {
            return Ok(true);
        }
        let mut done = 0;
        while let Some(rest) = output.get(done..).filter(|rest| !rest.is_empty()) {
            match self.link.poll_write(cx, rest, &[]) {
                Poll::Ready(Ok(0)) => return Err(End::Gone(Some(io::ErrorKind::WriteZero))),
                Poll::Ready(Ok(taken)) => done += taken,
                Poll::Ready(Err(error)) => return Err(End::Gone(Some(error.kind()))),
                Poll::Pending => break,
            }
        }
        output.drain(..done);
        if !output.is_empty() {
            return Ok(false);
        }
        active.resume = true;
        if matches!(self.lease, Lease::None)
            && active.is_blank()
            && let Some(active) = self.active.take()
        {
            self.context.actives.put_back(active);
        }
        Ok(true)
    }
}
