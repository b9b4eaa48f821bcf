//! What one client sends for one transaction, built once and sent as it is.

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::mix::{Mix, Spelling};

/// The name every client gives its prepared statement, as drivers that count from zero do.
const STATEMENT: &str = "s0";

/// Rows of a megabyte's result, and the text in each: with a header of 11 bytes a `DataRow` is 1 KiB.
pub const MEGABYTE_ROWS: u64 = 1024;
const MEGABYTE_SQL: &str = "SELECT repeat('x', 1013) FROM generate_series(1, 1024)";

/// What a client does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// `SELECT 1` by the simple protocol.
    Simple,
    /// `SELECT 1` by Parse (unnamed), Bind, Describe, Execute, Sync.
    Extended,
    /// `SELECT 1` by Bind, Execute, Sync of a statement prepared at login.
    Prepared,
    /// `BEGIN`, `SELECT 1`, `END`: three round trips.
    Begin,
    /// One simple query that returns 1 MiB in 1024 rows.
    Megabyte,
    /// Connect, login, `SELECT 1`, Terminate.
    Reconnect,
    /// One `SELECT 1` after login, before the next client logs in; then nothing.
    Idle,
    /// Nine reads and a write of ten, each with other literals.
    Literals,
    /// The same by two statements prepared at login, each time with other parameters.
    Parameters,
    /// Reads alone, each with other literals.
    ReadLiterals,
    /// Reads alone, by a statement prepared at login.
    ReadParameters,
    /// Reads alone, each with a text that is like hardly any other's.
    Anew,
}

/// A workload's bytes.
#[derive(Clone, Debug)]
pub struct Script {
    /// Sent once after login, answered by one `ReadyForQuery`; empty for none.
    pub setup: Vec<u8>,
    /// Sent one after the other, each after the `ReadyForQuery` of the one before; never empty. What takes turns is not
    /// in it: see [`Workload::mix`].
    pub steps: Vec<Vec<u8>>,
    /// `DataRow` messages one transaction returns.
    pub rows: u64,
}

impl Workload {
    /// What makes each transaction, where they differ.
    #[must_use]
    pub fn mix(self) -> Option<Mix> {
        let (spelling, reads_of_ten) = match self {
            Self::Literals => (Spelling::Literals, 9),
            Self::Parameters => (Spelling::Prepared, 9),
            Self::ReadLiterals => (Spelling::Literals, 10),
            Self::ReadParameters => (Spelling::Prepared, 10),
            Self::Anew => (Spelling::Anew, 10),
            _ => return None,
        };
        Some(Mix::new(spelling, reads_of_ten))
    }

    /// Builds the bytes.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if a message cannot be written, which a NUL in a query would cause.
    pub fn script(self) -> Result<Script, Fault> {
        let build = |messages: &dyn Fn(&mut BytesMut) -> std::io::Result<()>| {
            let mut bytes = BytesMut::new();
            messages(&mut bytes).map_err(Fault::io("building a request"))?;
            Ok::<_, Fault>(bytes.to_vec())
        };
        let simple = |sql: &str| build(&|out| frontend::query(sql, out));
        let nothing = Vec::new();
        Ok(match self {
            Self::Simple | Self::Reconnect => Script { setup: nothing, steps: vec![simple("SELECT 1")?], rows: 1 },
            Self::Idle => Script { setup: simple("SELECT 1")?, steps: vec![simple("SELECT 1")?], rows: 1 },
            Self::Extended => Script { setup: nothing, steps: vec![build(&extended)?], rows: 1 },
            Self::Prepared => Script { setup: build(&prepare)?, steps: vec![build(&prepared)?], rows: 1 },
            Self::Begin => {
                let steps = vec![simple("BEGIN")?, simple("SELECT 1")?, simple("END")?];
                Script { setup: nothing, steps, rows: 1 }
            }
            Self::Literals | Self::Parameters | Self::ReadLiterals | Self::ReadParameters | Self::Anew => {
                let setup = self.mix().map_or(Ok(nothing), |mix| mix.setup())?;
                Script { setup, steps: vec![Vec::new()], rows: 0 }
            }
            Self::Megabyte => Script { setup: nothing, steps: vec![simple(MEGABYTE_SQL)?], rows: MEGABYTE_ROWS },
        })
    }
}

fn extended(out: &mut BytesMut) -> std::io::Result<()> {
    frontend::parse("", "SELECT 1", [], out)?;
    bind("", out)?;
    frontend::describe(b'P', "", out)?;
    frontend::execute("", 0, out)?;
    frontend::sync(out);
    Ok(())
}

fn prepare(out: &mut BytesMut) -> std::io::Result<()> {
    frontend::parse(STATEMENT, "SELECT 1", [], out)?;
    frontend::sync(out);
    Ok(())
}

fn prepared(out: &mut BytesMut) -> std::io::Result<()> {
    bind(STATEMENT, out)?;
    frontend::execute("", 0, out)?;
    frontend::sync(out);
    Ok(())
}

/// A `Bind` of the unnamed portal without parameters, results as text.
pub(crate) fn bind(statement: &str, out: &mut BytesMut) -> std::io::Result<()> {
    let no_values: [(); 0] = [];
    frontend::bind("", statement, [], no_values, |(), _| Ok(IsNull::Yes), [], out).map_err(|error| match error {
        frontend::BindError::Conversion(error) => std::io::Error::other(error),
        frontend::BindError::Serialization(error) => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(bytes: &[u8]) -> String {
        let mut found = String::new();
        let mut rest = bytes;
        while let Some((header, _)) = rest.split_first_chunk::<5>() {
            let [tag, a, b, c, d] = *header;
            found.push(char::from(tag));
            rest = rest.split_at(1 + u32::from_be_bytes([a, b, c, d]) as usize).1;
        }
        assert!(rest.is_empty());
        found
    }

    #[test]
    fn each_step_ends_in_exactly_one_message_that_is_answered_by_ready() {
        #[rustfmt::skip]
        let table = [
            (Workload::Simple,    "",   "Q"),
            (Workload::Extended,  "",   "PBDES"),
            (Workload::Prepared,  "PS", "BES"),
            (Workload::Begin,     "",   "Q Q Q"),
            (Workload::Megabyte,  "",   "Q"),
            (Workload::Reconnect, "",   "Q"),
            (Workload::Idle,      "Q",  "Q"),
        ];
        for (workload, setup, steps) in table {
            let script = workload.script().unwrap();
            assert_eq!(tags(&script.setup), setup, "{workload:?}");
            let got: Vec<_> = script.steps.iter().map(|step| tags(step)).collect();
            assert_eq!(got.join(" "), steps, "{workload:?}");
        }
    }
}
