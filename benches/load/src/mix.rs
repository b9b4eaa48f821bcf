//! Transactions that differ from each other: reads alone, or nine and a write of ten, as an application makes them that finds its
//! rows by their primary key.

use std::collections::BTreeSet;

use bytes::BytesMut;
use postgres_protocol::IsNull;
use postgres_protocol::message::frontend;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fault::Fault;

/// Rows of the table.
pub const TABLE_ROWS: u32 = 100_000;

/// The longest list of keys in a text that is like no other.
const LIST_MAX: usize = 50;

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

/// How a transaction is put into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// A text with literals.
    Literals,
    /// A statement that was prepared once, with other parameters each time.
    Prepared,
    /// As programs do that write their SQL anew each time: keys in a list of any length, literals of any class, comments in
    /// front and behind. Reads only.
    Anew,
}

/// The next transaction's bytes, one after the other.
#[derive(Debug)]
pub struct Mix {
    spelling: Spelling,
    reads_of_ten: u32,
    random: StdRng,
    bytes: BytesMut,
}

impl Mix {
    /// Of ten transactions so many read, on average; the others write.
    #[must_use]
    pub fn new(spelling: Spelling, reads_of_ten: u32) -> Self {
        Self { spelling, reads_of_ten, random: StdRng::seed_from_u64(rand::random()), bytes: BytesMut::new() }
    }

    /// What a client sends once, answered by one `ReadyForQuery`; empty for none.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if a message cannot be written.
    pub fn setup(&self) -> Result<Vec<u8>, Fault> {
        let mut out = BytesMut::new();
        if self.spelling == Spelling::Prepared {
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
        let reads = self.random.random_range(0..10) < self.reads_of_ten;
        let aid = self.random.random_range(1..=TABLE_ROWS);
        let delta = self.random.random_range(-5000..=5000);
        self.bytes.clear();
        let mut rows = u64::from(reads);
        let built = match (self.spelling, reads) {
            (Spelling::Prepared, true) => execute("read", &[aid.to_string()], &mut self.bytes),
            (Spelling::Prepared, false) => execute("write", &[aid.to_string(), delta.to_string()], &mut self.bytes),
            (Spelling::Literals, true) => frontend::query(&READ.replace("$1", &aid.to_string()), &mut self.bytes),
            (Spelling::Literals | Spelling::Anew, false) => {
                let sql = WRITE.replace("$1", &aid.to_string()).replace("$2", &delta.to_string());
                frontend::query(&sql, &mut self.bytes)
            }
            (Spelling::Anew, true) => {
                let sql;
                (sql, rows) = anew(&mut self.random);
                frontend::query(&sql, &mut self.bytes)
            }
        };
        built.map_err(Fault::io("building a request"))?;
        Ok((&self.bytes, rows))
    }
}

/// A read that hardly any other is like, and the rows that it returns. Its conditions beside the keys hold for every row.
fn anew(random: &mut StdRng) -> (String, u64) {
    let length = random.random_range(1..=LIST_MAX);
    let mut keys = BTreeSet::new();
    while keys.len() < length {
        keys.insert(random.random_range(1..=TABLE_ROWS));
    }
    let list: Vec<String> = keys.iter().map(u32::to_string).collect();
    let [request, page, above] = [(); 3].map(|()| random.random_range(10..1_000_000_000_u32));
    let above = match random.random_range(0..3) {
        0 => above.to_string(),
        1 => format!("{above}.5"),
        // One that fits no four bytes.
        _ => format!("9{above:010}"),
    };
    let sql = format!(
        "/* request {request:08x} */ SELECT aid, abalance, filler FROM accounts WHERE aid IN ({}) AND bid < {above} \
         AND filler <> 'none {page}' -- page {page}",
        list.join(", ")
    );
    (sql, u64::try_from(length).unwrap_or(u64::MAX))
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
    use super::*;

    #[test]
    fn nine_of_ten_read_and_hardly_two_texts_are_the_same() {
        let mut mix = Mix::new(Spelling::Literals, 9);
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
        assert_eq!(Mix::new(Spelling::Literals, 9).setup().unwrap(), b"");
        let mut mix = Mix::new(Spelling::Prepared, 9);
        let setup = mix.setup().unwrap();
        assert_eq!((setup.first(), setup.last_chunk()), (Some(&b'P'), Some(b"S\0\0\0\x04")));
        for _ in 0..100 {
            let (bytes, rows) = mix.request().unwrap();
            let statement = if rows == 1 { &b"\0read\0"[..] } else { b"\0write\0" };
            assert!(bytes.starts_with(b"B") && bytes[5..].starts_with(statement), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn reads_alone_have_no_write_among_them() {
        for spelling in [Spelling::Literals, Spelling::Prepared, Spelling::Anew] {
            let mut mix = Mix::new(spelling, 10);
            for _ in 0..1000 {
                let (bytes, rows) = mix.request().unwrap();
                assert!(rows > 0, "{spelling:?}: {}", bytes.escape_ascii());
            }
        }
    }

    #[test]
    fn no_two_texts_made_anew_are_the_same_and_their_keys_are_counted() {
        let mut mix = Mix::new(Spelling::Anew, 10);
        let (mut texts, mut lengths) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..2000 {
            let (bytes, rows) = mix.request().unwrap();
            let text = std::str::from_utf8(&bytes[5..]).unwrap().trim_end_matches('\0');
            let (_, list) = text.split_once("IN (").unwrap();
            let (list, _) = list.split_once(')').unwrap();
            let keys: BTreeSet<&str> = list.split(", ").collect();
            assert_eq!(keys.len() as u64, rows, "{text}");
            lengths.insert(rows);
            assert!(texts.insert(text.to_owned()), "{text}");
        }
        // One of fifty lengths is left out by 2000 texts in less than one of 10^15 runs.
        assert_eq!(lengths.len(), LIST_MAX);
    }
}
