//! Transactions that differ from each other: nine reads and a write of ten, as an application makes them that finds its rows by
//! their primary key.

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fault::Fault;

/// Rows of the table.
pub const TABLE_ROWS: u32 = 100_000;

/// Of ten transactions, those that read.
const READS: u32 = 9;

const READ: &str = "SELECT aid, abalance, filler FROM accounts WHERE aid = $1";
const WRITE: &str = "UPDATE accounts SET abalance = abalance + $2 WHERE aid = $1";

/// What makes the table, and lets `user` use it.
#[must_use]
pub fn table(user: &str) -> String {
    format!(
        "CREATE TABLE accounts (aid int PRIMARY KEY, bid int NOT NULL, abalance int NOT NULL, filler char(84) NOT NULL) \
         WITH (fillfactor = 80);\
         INSERT INTO accounts SELECT aid, aid % 10, 0, 'account ' || aid FROM generate_series(1, {TABLE_ROWS}) aid;\
         GRANT SELECT, UPDATE ON accounts TO {user}"
    )
}

/// The next transaction's bytes, one after the other.
#[derive(Debug)]
pub struct Mix {
    prepared: bool,
    random: StdRng,
    bytes: BytesMut,
}

impl Mix {
    /// Literals in every text, or parameters of statements that were prepared once.
    #[must_use]
    pub fn new(prepared: bool) -> Self {
        Self { prepared, random: StdRng::seed_from_u64(rand::random()), bytes: BytesMut::new() }
    }

    /// What a client sends once, answered by one `ReadyForQuery`; empty for none.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if a message cannot be written.
    pub fn setup(prepared: bool) -> Result<Vec<u8>, Fault> {
        let mut out = BytesMut::new();
        if prepared {
            let built = frontend::parse("read", READ, [], &mut out)
                .and_then(|()| frontend::parse("write", WRITE, [], &mut out));
            built.map_err(Fault::io("building a request"))?;
            frontend::sync(&mut out);
        }
        Ok(out.to_vec())
    }

    /// The next transaction, and the rows that it returns.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if a message cannot be written.
    pub fn request(&mut self) -> Result<(&[u8], u64), Fault> {
        let reads = self.random.random_range(0..10) < READS;
        let aid = self.random.random_range(1..=TABLE_ROWS);
        let delta = self.random.random_range(-5000..=5000);
        self.bytes.clear();
        let built = match (self.prepared, reads) {
            (true, true) => execute("read", &[aid.to_string()], &mut self.bytes),
            (true, false) => execute("write", &[aid.to_string(), delta.to_string()], &mut self.bytes),
            (false, true) => frontend::query(&READ.replace("$1", &aid.to_string()), &mut self.bytes),
            (false, false) => {
                let sql = WRITE.replace("$1", &aid.to_string()).replace("$2", &delta.to_string());
                frontend::query(&sql, &mut self.bytes)
            }
        };
        built.map_err(Fault::io("building a request"))?;
        Ok((&self.bytes, u64::from(reads)))
    }
}

/// Bind with parameters as text, Execute, Sync.
fn execute(statement: &str, values: &[String], out: &mut BytesMut) -> std::io::Result<()> {
    let put = |value: &String, buffer: &mut BytesMut| {
        buffer.extend_from_slice(value.as_bytes());
        Ok(IsNull::No)
    };
    frontend::bind("", statement, [], values, put, [], out).map_err(|error| match error {
        frontend::BindError::Conversion(error) => std::io::Error::other(error),
        frontend::BindError::Serialization(error) => error,
    })?;
    frontend::execute("", 0, out)?;
    frontend::sync(out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn nine_of_ten_read_and_hardly_two_texts_are_the_same() {
        let mut mix = Mix::new(false);
        let mut texts = BTreeSet::new();
        let mut reads = 0;
        for _ in 0..10_000 {
            let (bytes, rows) = mix.request().unwrap();
            let text = std::str::from_utf8(&bytes[5..]).unwrap();
            assert_eq!(text.starts_with("SELECT"), rows == 1, "{text}");
            assert!(!text.contains('$'), "{text}");
            texts.insert(text.to_owned());
            reads += rows;
        }
        // Six standard deviations.
        assert!((8800..=9200).contains(&reads), "{reads}");
        assert!(texts.len() > 9000, "{}", texts.len());
    }

    #[test]
    fn prepared_ones_bind_what_was_prepared() {
        let setup = Mix::setup(true).unwrap();
        assert_eq!((setup.first(), setup.last_chunk()), (Some(&b'P'), Some(b"S\0\0\0\x04")));
        assert_eq!(Mix::setup(false).unwrap(), b"");
        let mut mix = Mix::new(true);
        for _ in 0..100 {
            let (bytes, rows) = mix.request().unwrap();
            let statement = if rows == 1 { &b"\0read\0"[..] } else { b"\0write\0" };
            assert!(bytes.starts_with(b"B") && bytes[5..].starts_with(statement), "{}", bytes.escape_ascii());
        }
    }
}
