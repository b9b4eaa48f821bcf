//! Answering a client without a server: after its server connection was lost, or when it got none.

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode::{self, Report};
use pgweir_proto::frontend::{self, Bind, Parse, Tag, Target};
use pgweir_proto::pipeline::{Expect, Origin, Owed};

use crate::sql;

/// A session that answers by itself.
///
/// ```text
///            ┌──────── Sync ────────┐
///            ▼                      │
/// Failing ──error told──▶ Told ──extended message refused──▶ Skipping
///    │                      │ ROLLBACK or COMMIT (in a transaction),
///    └──────────────────────┴─ or ReadyForQuery (outside one) ──▶ over
/// ```
///
/// Inside a transaction it goes on until the client ends it, as Postgres would after an error: so that nothing
/// that the client believed to be in the transaction ever runs outside one.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "facts about the client's names beside the state drawn above")]
pub struct Local {
    /// The error that the client has to be told first; none once it was told.
    error: Option<Failure>,
    /// The client believes to be in a transaction.
    in_transaction: bool,
    /// Messages are discarded up to the next `Sync`.
    skipping: bool,
    /// The unnamed statement is a ROLLBACK or COMMIT.
    unnamed_ends: bool,
    /// Named statements parsed here that are.
    named_ends: Vec<Box<[u8]>>,
    /// The last bound portal runs one.
    portal_ends: bool,
    /// One was executed: the next `Sync` finds no transaction.
    ended: bool,
    /// Nothing is left to do.
    over: bool,
}

/// What a client is told, as fields.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The SQLSTATE.
    pub code: &'static str,
    /// The primary message.
    pub message: String,
    /// What explains it; may be empty.
    pub detail: String,
    /// How to mend it; may be empty.
    pub hint: String,
}

impl Failure {
    /// Appends it as an `ErrorResponse`.
    pub fn write(&self, severity: &str, out: &mut Vec<u8>) {
        Report { severity, code: self.code, message: &self.message, detail: &self.detail, hint: &self.hint }.error(out);
    }
}

/// Statements parsed here that are remembered, at most.
const NAMES_MAX: usize = 16;

const ABORTED: Report<'_> = Report {
    severity: "ERROR",
    code: "25P02",
    message: "current transaction is aborted, commands ignored until end of transaction block",
    detail: "",
    hint: "",
};

impl Local {
    /// A session whose next statement gets `error`.
    #[must_use]
    pub fn new(error: Failure, in_transaction: bool) -> Self {
        Self {
            error: Some(error),
            in_transaction,
            skipping: false,
            unnamed_ends: false,
            named_ends: Vec::new(),
            portal_ends: false,
            ended: false,
            over: false,
        }
    }

    /// Whether the client can be served again.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// A server connection was lost while it owed all this: the client is told, reply by reply.
    pub fn owed(&mut self, owed: impl Iterator<Item = Owed>, batch_open: bool, skipping: bool, out: &mut Vec<u8>) {
        self.skipping = skipping;
        let mut open = batch_open;
        for owed in owed {
            if owed.origin == Origin::Pooler || owed.expect == Expect::CopyEnd {
                continue;
            }
            match owed.expect {
                Expect::Query | Expect::FunctionCall => {
                    self.refuse(out);
                    self.ready(out);
                }
                Expect::Sync => {
                    open = false;
                    self.tell(out);
                    self.skipping = false;
                    self.ready(out);
                }
                _ if self.skipping => {}
                _ => {
                    open = true;
                    self.refuse(out);
                    self.skipping = true;
                }
            }
        }
        // Part of a batch was answered before the loss: the rest of it must not run.
        if open && batch_open && !self.skipping {
            self.tell(out);
            self.skipping = true;
        }
        if open || self.skipping {
            self.over = false;
        }
    }

    /// One whole message of the client's. Its answer is appended to `out`. `ends` tells of a statement that the client
    /// prepared before whether it is a ROLLBACK or COMMIT.
    pub fn message(&mut self, tag: Tag, body: &[u8], ends: impl Fn(&[u8]) -> bool, out: &mut Vec<u8>) {
        match tag {
            Tag::Sync => {
                self.skipping = false;
                self.ready(out);
            }
            _ if self.skipping => {}
            Tag::Query => self.query(body, out),
            Tag::FunctionCall => {
                self.refuse(out);
                self.ready(out);
            }
            Tag::Parse | Tag::Bind | Tag::Describe | Tag::Execute | Tag::Close => self.extended(tag, body, ends, out),
            Tag::Flush | Tag::CopyData | Tag::CopyDone | Tag::CopyFail | Tag::Password | Tag::Terminate => {}
        }
    }

    fn query(&mut self, body: &[u8], out: &mut Vec<u8>) {
        let text = frontend::query_text(body).unwrap_or_default();
        if self.in_transaction && !self.ended && sql::is_transaction_end(text) {
            encode::command_complete(out, "ROLLBACK");
            self.ended = true;
        } else {
            self.refuse(out);
        }
        self.ready(out);
    }

    /// Lets through just what ends the transaction.
    fn extended(&mut self, tag: Tag, body: &[u8], ends: impl Fn(&[u8]) -> bool, out: &mut Vec<u8>) {
        let answered = self.in_transaction && !self.ended && self.answer(tag, body, ends, out);
        if !answered {
            self.refuse(out);
            self.skipping = true;
        }
    }

    fn answer(&mut self, tag: Tag, body: &[u8], ends: impl Fn(&[u8]) -> bool, out: &mut Vec<u8>) -> bool {
        match tag {
            Tag::Parse => {
                let Ok(parse) = Parse::parse(body) else { return false };
                if !sql::is_transaction_end(parse.query) || self.named_ends.len() >= NAMES_MAX {
                    return false;
                }
                if parse.statement.is_empty() {
                    self.unnamed_ends = true;
                } else {
                    self.named_ends.push(parse.statement.into());
                }
                out.extend_from_slice(&encode::PARSE_COMPLETE);
            }
            Tag::Bind => {
                let Ok(bind) = Bind::parse(body) else { return false };
                self.portal_ends = self.ends(bind.statement) || ends(bind.statement);
                if !self.portal_ends {
                    return false;
                }
                encode::message(out, b'2', |_| {});
            }
            Tag::Describe => match Target::parse(body) {
                Ok(Target::Statement(name)) if self.ends(name) || ends(name) => {
                    encode::message(out, b't', |out| out.extend_from_slice(&[0, 0]));
                    encode::message(out, b'n', |_| {});
                }
                Ok(Target::Portal(_)) if self.portal_ends => encode::message(out, b'n', |_| {}),
                _ => return false,
            },
            Tag::Execute if self.portal_ends => {
                encode::command_complete(out, "ROLLBACK");
                self.ended = true;
            }
            Tag::Close => out.extend_from_slice(&encode::CLOSE_COMPLETE),
            _ => return false,
        }
        true
    }

    fn ends(&self, statement: &[u8]) -> bool {
        if statement.is_empty() { self.unnamed_ends } else { self.named_ends.iter().any(|name| **name == *statement) }
    }

    /// Tells the first error, if it was not told yet.
    fn tell(&mut self, out: &mut Vec<u8>) {
        if !self.skipping
            && let Some(error) = self.error.take()
        {
            error.write("ERROR", out);
        }
    }

    fn refuse(&mut self, out: &mut Vec<u8>) {
        if self.skipping {
            return;
        }
        match &self.error {
            Some(error) => {
                error.write("ERROR", out);
                if self.in_transaction {
                    self.error = None;
                }
            }
            None => ABORTED.error(out),
        }
    }

    fn ready(&mut self, out: &mut Vec<u8>) {
        let failed = self.in_transaction && !self.ended;
        encode::ready_for_query(out, if failed { TxStatus::Failed } else { TxStatus::Idle });
        self.over = !failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(in_transaction: bool) -> Local {
        let error = Failure { code: "08006", message: "lost".into(), detail: String::new(), hint: String::new() };
        Local::new(error, in_transaction)
    }

    /// The answers as one letter each; errors as their SQLSTATE, `ReadyForQuery` with its status.
    fn letters(bytes: &[u8]) -> String {
        let mut scanner = pgweir_proto::scanner::Scanner::new(u32::MAX);
        let (mut at, mut words) = (0, Vec::new());
        while let Ok(pgweir_proto::scanner::Scanned::Whole { tag, body }) = scanner.next(&bytes[at..]) {
            at += 5 + body.len();
            words.push(match tag {
                b'E' => pgweir_proto::error::Fields::parse(body).unwrap().sqlstate().to_string(),
                b'Z' => format!("Z{}", char::from(body[0])),
                tag => char::from(tag).to_string(),
            });
        }
        words.join(" ")
    }

    fn message(kind: &str) -> (Tag, Vec<u8>) {
        match kind {
            "q" => (Tag::Query, b"INSERT INTO t VALUES (1)\0".to_vec()),
            "rollback" => (Tag::Query, b"ROLLBACK\0".to_vec()),
            "commit" => (Tag::Query, b"COMMIT\0".to_vec()),
            "P" => (Tag::Parse, b"\0SELECT 1\0\0\0".to_vec()),
            "Pr" => (Tag::Parse, b"\0ROLLBACK\0\0\0".to_vec()),
            "B" => (Tag::Bind, b"\0\0\0\0\0\0\0\0".to_vec()),
            "D" => (Tag::Describe, b"P\0".to_vec()),
            "X" => (Tag::Execute, b"\0\0\0\0\0".to_vec()),
            "S" => (Tag::Sync, Vec::new()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_lost_transaction_stays_failed_until_the_client_ends_it() {
        #[rustfmt::skip]
        let table: [(&str, bool, &str, &str, bool); 9] = [
            ("next query is told",        true,  "q",               "08006 ZE",                false),
            ("then aborted",              true,  "q q",             "08006 ZE 25P02 ZE",       false),
            ("rollback ends it",          true,  "q rollback",      "08006 ZE C ZI",           true),
            ("commit answers rollback",   true,  "commit",          "C ZI",                    true),
            ("a batch is skipped",        true,  "P B X S",         "08006 ZE",                false),
            ("extended rollback",         true,  "Pr B D X S",      "1 2 n C ZI",              true),
            ("extended after the end",    true,  "Pr B X P S",      "1 2 C 08006 ZI",          true),
            ("outside a transaction",     false, "q",               "08006 ZI",                true),
            ("a batch outside",           false, "P B X S",         "08006 ZI",                true),
        ];
        for (name, in_transaction, input, want, over) in table {
            let (mut local, mut out) = (lost(in_transaction), Vec::new());
            for kind in input.split(' ') {
                let (tag, body) = message(kind);
                local.message(tag, &body, |_| false, &mut out);
            }
            assert_eq!((letters(&out).as_str(), local.is_over()), (want, over), "{name}");
        }
    }

    #[test]
    fn what_was_owed_is_told_reply_by_reply() {
        use Expect::{Bind, Execute, Query, Sync};
        #[rustfmt::skip]
        let table: [(&str, bool, &[Expect], bool, &str, bool); 7] = [
            ("one query",          false, &[Query],                     false, "08006 ZI",          true),
            ("two queries",        false, &[Query, Query],              false, "08006 ZI 08006 ZI", true),
            ("in a transaction",   true,  &[Query, Query],              false, "08006 ZE 25P02 ZE", false),
            ("a batch",            false, &[Bind, Execute, Sync],       false, "08006 ZI",          true),
            ("two batches",        false, &[Execute, Sync, Bind, Sync], false, "08006 ZI 08006 ZI", true),
            ("an unsynced batch",  false, &[Bind, Execute],             true,  "08006",             false),
            ("a batch half done",  false, &[],                          true,  "08006",             false),
        ];
        for (name, in_transaction, owed, open, want, over) in table {
            let (mut local, mut out) = (lost(in_transaction), Vec::new());
            let owed = owed.iter().map(|expect| Owed { expect: *expect, origin: Origin::Client, note: 0 });
            local.owed(owed, open, false, &mut out);
            assert_eq!((letters(&out).as_str(), local.is_over()), (want, over), "{name}");
        }
    }
}
