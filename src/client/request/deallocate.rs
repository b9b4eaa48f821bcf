//! SQL's `DEALLOCATE` of a statement that the client has prepared by the protocol: to Postgres it is the same name.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use super::super::plan::Plan;
use super::super::statements::{Look, Named};
use super::{Held, Request, Stop, Unnamed};
use crate::prepared::STAND_IN;
use crate::sql::{EffectSet, Effects};

/// The longest name that SQL can have; bytes. What is longer is cut by the server, and so is another name.
///
/// Source: `PostgreSQL` 17 docs, §4.1.1 "Identifiers and Key Words".
const IDENTIFIER_MAX: usize = 63;

impl Request<'_> {
    /// A simple query with a `DEALLOCATE` in it. True if it is done: then the query itself is not to be sent.
    ///
    /// The server keeps the statement, for others, under a name of ours or not at all. It is given another one, which is
    /// there for this alone, so that the answer is the server's own.
    #[cold]
    pub(super) fn deallocate(&mut self, effects: Effects, text: &[u8], plan: &mut Plan<'_>) -> Result<bool, Stop> {
        if effects.set.intersects(EffectSet::DEALLOCATE_ALL.union(EffectSet::MULTI)) || self.conn.pipeline.is_skipping()
        {
            return Ok(false);
        }
        let Some(name) = named(text) else { return Ok(false) };
        match self.statements.look(&name, &self.marks.changes) {
            Look::Unsettled => return Err(Stop::Unsettled),
            Look::Named(Named::Shared(..)) => {}
            Look::Named(Named::Raw) | Look::Unknown => return Ok(false),
        }
        // What is ours in front of it is no reason to wait: a lease in which nothing was passed on yet would end meanwhile.
        if !self.conn.pipeline.is_settled() && !self.is_first_of_lease() {
            return if self.conn.pipeline.ready_owed() > 0 { Err(Stop::Unsettled) } else { Ok(false) };
        }
        if self.conn.pipeline.status() == TxStatus::Failed {
            return Ok(false);
        }
        let mut stand_in = Vec::new();
        self.interner.prefix.write_name(self.interner.number(), &mut stand_in);
        plan.insert(|out| {
            encode::query(out, &[b"PREPARE ", &*stand_in, b" AS SELECT"].concat());
            encode::query(out, &[b"DEALLOCATE ", &*stand_in].concat());
        });
        self.conn.pipeline.sent(Expect::Query, Origin::Pooler, 0);
        self.conn.pipeline.sent(Expect::Query, Origin::Client, STAND_IN);
        self.marks.changes.next_batch();
        self.marks.changes.unnamed_destroyed();
        self.conn.shelf.end_batch();
        self.marks.harmless = false;
        (self.statements.unnamed, self.conn.unnamed) = (Unnamed::Empty, Held::Empty);
        self.statements.forget(&name);
        Ok(true)
    }
}

/// The name in `DEALLOCATE [PREPARE] name`. None for everything else, a name with an escape in it included.
fn named(text: &[u8]) -> Option<Vec<u8>> {
    let is_end = |byte: &u8| *byte == b';' || byte.is_ascii_whitespace();
    let end = text.iter().rposition(|byte| !is_end(byte))?;
    let (word, rest) = next_word(text.get(..=end)?.trim_ascii_start());
    if !word.eq_ignore_ascii_case(b"deallocate") {
        return None;
    }
    let rest = match next_word(rest) {
        (word, behind) if word.eq_ignore_ascii_case(b"prepare") && !behind.is_empty() => behind,
        _ => rest,
    };
    let name = match rest {
        [b'"', name @ .., b'"'] if !name.contains(&b'"') => name.to_vec(),
        name if name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$')) => {
            if name.first().is_none_or(|first| !first.is_ascii_alphabetic() && *first != b'_') {
                return None;
            }
            name.to_ascii_lowercase()
        }
        _ => return None,
    };
    (!name.is_empty() && name.len() <= IDENTIFIER_MAX).then_some(name)
}

/// The letters in front, and what follows them and some blanks.
fn next_word(text: &[u8]) -> (&[u8], &[u8]) {
    let len = text.iter().take_while(|byte| byte.is_ascii_alphabetic()).count();
    let (word, rest) = text.split_at(len);
    let blank = rest.first().is_none_or(|byte| byte.is_ascii_whitespace() || *byte == b'"');
    if blank { (word, rest.trim_ascii_start()) } else { (b"", text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_read_as_the_server_reads_it() {
        #[rustfmt::skip]
        let table = [
            ("DEALLOCATE s1",                 Some("s1")),
            (" deallocate  prepare S1 ; ",    Some("s1")),
            ("DEALLOCATE \"S 1\"",            Some("S 1")),
            ("DEALLOCATE PREPARE \"_pg3_0\"", Some("_pg3_0")),
            ("DEALLOCATE _pg3_0",             Some("_pg3_0")),
            ("DEALLOCATE\"s\";",              Some("s")),
            ("DEALLOCATE prepare",            Some("prepare")),
            ("DEALLOCATE",                    None),
            ("DEALLOCATE \"\"",               None),
            ("DEALLOCATE \"a\"\"b\"",         None),
            ("DEALLOCATE a b",                None),
            ("DEALLOCATE 1a",                 None),
            ("DEALLOCATE a /* b */",          None),
            ("PREPARE a AS SELECT 1",         None),
            ("DEALLOCATED a",                 None),
        ];
        for (text, want) in table {
            assert_eq!(named(text.as_bytes()).as_deref(), want.map(str::as_bytes), "{text}");
        }
        assert_eq!(named(format!("DEALLOCATE {}", "x".repeat(64)).as_bytes()), None);
    }
}
