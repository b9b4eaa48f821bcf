//! The answer to a query of the client's with statements of ours in it: what is theirs is left out, and positions are those in the
//! client's own text. Those are, too, in what is said of a statement with start-up values in it.

use pgweir_proto::backend::Tag;
use pgweir_proto::encode;

use super::{Answer, Plan};
use crate::prepared::{SPLICED, statement_id};
use crate::sql::Splice;

impl Answer<'_> {
    /// How the answer under way is read, if it is one of these: never two of them are owed.
    pub(super) fn spliced(&mut self) -> Option<&mut Splice> {
        self.conn.pipeline.front().filter(|owed| owed.note == SPLICED)?;
        self.marks.spliced.as_mut()
    }

    /// The body of an error or a notice with the position in it that the client is to be told. None if it is the same.
    pub(super) fn shifted(&mut self, body: &[u8]) -> Option<Vec<u8>> {
        if let Some(splice) = self.spliced() {
            return splice.shift(body);
        }
        let id = statement_id(self.conn.pipeline.front()?.note)?;
        self.statements.find(id, &self.marks.changes)?.put.as_ref()?.shift(body)
    }

    /// Whether a message is part of the answer to a statement of ours.
    pub(super) fn is_spliced_in(&mut self, tag: Tag) -> bool {
        let Some(splice) = self.spliced() else { return false };
        let is_ours = splice.is_ours();
        if tag == Tag::CommandComplete {
            splice.complete();
        }
        is_ours
    }

    /// A notice in such an answer. True if that is all that the client is to be told of it.
    pub(super) fn tells_spliced_notice(&mut self, body: &[u8], plan: &mut Plan<'_>) -> bool {
        if self.spliced().is_some_and(|splice| splice.is_ours()) {
            return true;
        }
        let shifted = self.shifted(body);
        let is_shifted = shifted.is_some();
        if let Some(shifted) = shifted {
            plan.insert(|out| encode::message(out, b'N', |out| out.extend_from_slice(&shifted)));
        }
        is_shifted
    }
}
