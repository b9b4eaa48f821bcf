//! A client that listens by the hub: what may change that, or notify, runs on a server connection that listens, too.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::Tag;
use pgweir_proto::pipeline::{Expect, Origin, Pipeline};

use super::{Plan, Request, Stop};
use crate::prepared::REPLAY;
use crate::sql::{Effects, FirstWord};
use crate::state::listen_to;

impl Request<'_> {
    /// In front of the first message of a lease that may do more than read: the client's channels. They cannot be inserted
    /// later, into a transaction: it might be rolled back. Behind what is on its way they wait: a cancel request is to reach
    /// the client's query, and an audit to tell what the server connection listens to.
    #[cold]
    pub(super) fn listen_if_needed(&mut self, tag: Tag, body: &[u8], plan: &mut Plan<'_>) -> Result<(), Stop> {
        let pipeline = &self.conn.pipeline;
        if self.marks.listens_too || !is_between(pipeline) {
            return Ok(());
        }
        let needed = match tag {
            Tag::Query => !self.only_reads(body),
            // What else its batch will have in it is not known yet.
            Tag::Parse | Tag::Bind | Tag::Describe | Tag::Execute | Tag::Close | Tag::FunctionCall => true,
            _ => false,
        };
        if !needed {
            return Ok(());
        }
        if !self.is_first_of_lease() {
            return Err(Stop::Unsettled);
        }
        let text = listen_to(self.channels.unwrap_or_default());
        self.conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        self.destroy_held();
        self.marks.listens_too = true;
        self.marks.listening = true;
        *self.replaying = true;
        plan.insert(|out| encode::query(out, &text));
        Ok(())
    }

    /// Whether nothing is on its way but what puts the client's settings and channels there.
    pub(super) fn is_first_of_lease(&self) -> bool {
        is_between(&self.conn.pipeline) && self.conn.pipeline.iter().all(|owed| owed.note == REPLAY)
    }

    /// Whether a simple query reads, and calls nothing that might do more.
    fn only_reads(&mut self, body: &[u8]) -> bool {
        let (catalog, library) = (self.catalog, self.library);
        let through = |text: &[u8], own| catalog.suspects().judge(text, own, &mut library.borrow_mut());
        let judged = self.scans.judge(body, self.catalog_key, through);
        judged.is_ok_and(|(text, effects)| is_plain(effects, text))
    }
}

/// Whether no transaction and no batch is open.
pub(super) fn is_between(pipeline: &Pipeline) -> bool {
    pipeline.status() == TxStatus::Idle
        && !pipeline.is_batch_open()
        && !pipeline.is_copy_in()
        && !pipeline.is_skipping()
}

/// One `SELECT` or `SHOW` without anything in brackets, such as a function's arguments.
fn is_plain(effects: Effects, text: &[u8]) -> bool {
    effects.set.is_empty()
        && matches!(effects.first, FirstWord::Select | FirstWord::Show)
        && memchr::memchr(b'(', text).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql;

    #[test]
    fn only_what_cannot_notify_or_ask_is_plain() {
        #[rustfmt::skip]
        let table = [
            ("select",        "SELECT a, b FROM t WHERE c = 'x (y'",       false),
            ("no brackets",   "SELECT a FROM t WHERE c = 'x' LIMIT 1",     true),
            ("show",          "SHOW timezone",                             true),
            ("a function",    "SELECT pg_notify('a', 'b')",                false),
            ("channels",      "SELECT * FROM pg_listening_channels ()",    false),
            ("insert",        "INSERT INTO t VALUES (1)",                  false),
            ("delete",        "DELETE FROM t",                             false),
            ("notify",        "NOTIFY c",                                  false),
            ("unlisten",      "UNLISTEN *",                                false),
            ("begin",         "BEGIN",                                     false),
            ("more than one", "SELECT 1; UNLISTEN *",                      false),
            ("discard",       "DISCARD ALL",                               false),
        ];
        for (name, text, want) in table {
            assert_eq!(is_plain(sql::scan(text.as_bytes()), text.as_bytes()), want, "{name}");
        }
    }
}
