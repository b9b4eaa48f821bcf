//! A small blocking client for the harness's own questions to Postgres: simple queries over the
//! Unix-domain socket, where `pg_hba.conf` asks for no password.

use std::fmt::Write as _;
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::wire::{Message, Outcome, build};

/// Longest wait for one read; far more than any statement of a test takes.
const PATIENCE: Duration = Duration::from_mins(2);
/// How the harness's own connections call themselves.
pub(crate) const APPLICATION_NAME: &str = "pgweir-harness";

/// A session of the superuser.
#[derive(Debug)]
pub(crate) struct Session {
    stream: BufReader<UnixStream>,
}

impl Session {
    /// Connects and logs in. The server's refusal is an [`io::Error`] with its text.
    pub(crate) fn open(sockets: &Path, port: u16, user: &str, database: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(sockets.join(format!(".s.PGSQL.{port}")))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut session = Self { stream: BufReader::new(stream) };
        let login = build::startup(&[
            ("user", user),
            ("database", database),
            ("application_name", APPLICATION_NAME),
            ("client_encoding", "UTF8"),
        ]);
        let outcome = session.exchange(&login)?;
        match outcome.error {
            Some(error) => Err(io::Error::other(error.to_string())),
            None => Ok(session),
        }
    }

    /// Runs a simple query.
    pub(crate) fn query(&mut self, sql: &str) -> io::Result<Outcome> {
        self.exchange(&build::query(sql))
    }

    /// Sends `bytes`; reads up to `ReadyForQuery`, or to the end after an error.
    fn exchange(&mut self, bytes: &[u8]) -> io::Result<Outcome> {
        self.stream.get_mut().write_all(bytes)?;
        let mut messages: Vec<Message> = Vec::new();
        loop {
            match self.message() {
                Ok(message) => messages.push(message),
                // A FATAL comes last; it says more than the end of the stream.
                Err(error) => {
                    let outcome = Outcome::of(&messages);
                    return match outcome.error {
                        Some(_) => Ok(outcome),
                        None => Err(error),
                    };
                }
            }
            if messages.last().is_some_and(|message| message.tag == b'Z') {
                return Ok(Outcome::of(&messages));
            }
        }
    }

    fn message(&mut self) -> io::Result<Message> {
        let mut header = [0; 5];
        self.stream.read_exact(&mut header)?;
        let [tag, length @ ..] = header;
        let length = u32::from_be_bytes(length).checked_sub(4);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let mut body = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
        self.stream.read_exact(&mut body)?;
        Ok(Message { tag, body })
    }
}

/// As `psql -At` prints: columns joined by `|`, a line per row, NULL as nothing.
pub(crate) fn unaligned(outcome: &Outcome) -> String {
    let mut text = String::new();
    for (number, row) in outcome.rows.iter().enumerate() {
        if number > 0 {
            text.push('\n');
        }
        for (place, column) in row.iter().enumerate() {
            let bar = if place > 0 { "|" } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(text, "{bar}{}", column.as_deref().unwrap_or_default());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::unaligned;
    use crate::wire::Outcome;

    #[test]
    fn rows_print_as_psql_prints_them_unaligned() {
        let one = || Some("1".to_owned());
        let outcome = Outcome { rows: vec![vec![one(), None, one()], vec![one()]], ..Outcome::default() };
        assert_eq!(unaligned(&outcome), "1||1\n1");
        assert_eq!(unaligned(&Outcome::default()), "");
    }
}
