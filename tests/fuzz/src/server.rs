//! A naive server: what a session gets from Postgres, for a small language.
//!
//! It answers at once what it is fed, keeps everything for its one client, and knows nothing of pools. So the same thing
//! serves as the server behind pgweir and as the judge of what comes out in front.

use std::collections::HashMap;

use pgweir_proto::frontend::{self, Bind, Parse, Tag, Target};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use pgweir_proto::startup::{CANCEL_REQUEST, first_len};
use pgweir_proto::{encode, encode::Report};
use pgweir_proto_fuzz::trace;

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Before the start-up message.
    Greeting,
    /// Between two messages.
    Ready,
    /// An extended message failed: everything up to a `Sync` is ignored.
    Skipping,
    /// COPY FROM STDIN; true if a `Query` began it.
    Copying(bool),
    /// The connection is over.
    Over,
}

/// What `ReadyForQuery` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transaction {
    /// None is open.
    Idle = b'I' as isize,
    /// One is.
    Open = b'T' as isize,
    /// One has failed.
    Failed = b'E' as isize,
}

#[derive(Clone, Debug)]
struct Portal {
    text: Vec<u8>,
    /// Rows given so far.
    given: usize,
    done: bool,
}

/// An error's SQLSTATE and message.
struct Failure(&'static str, String);

/// One session.
#[derive(Debug)]
pub struct Server {
    /// For traces.
    name: &'static str,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Where it stands.
    pub mode: Mode,
    /// Its transaction.
    pub transaction: Transaction,
    /// Extended messages ran since the last `Sync`.
    pub batch: bool,
    copied: usize,
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portals: HashMap<Vec<u8>, Portal>,
}

/// Rows that a text gives.
fn rows(text: &[u8]) -> usize {
    text.last().map_or(0, |last| usize::from(last % 4))
}

fn ends_transaction(text: &[u8]) -> bool {
    matches!(text, b"COMMIT" | b"ROLLBACK")
}

impl Server {
    /// A connection just accepted.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            input: Vec::new(),
            output: Vec::new(),
            mode: Mode::Greeting,
            transaction: Transaction::Idle,
            batch: false,
            copied: 0,
            statements: HashMap::new(),
            portals: HashMap::new(),
        }
    }

    /// Whether the next client may come, as far as this server is concerned.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let at_rest = self.mode == Mode::Ready && self.transaction == Transaction::Idle && !self.batch;
        at_rest && self.input.is_empty() && self.portals.is_empty()
    }

    /// Reads what a client sent; gives what it gets.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<u8> {
        trace(|| format!("{}{:p} gets {}", self.name, self, bytes.escape_ascii()));
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut rest = &input[..];
        let mut scanner = Scanner::new(1 << 30);
        loop {
            if self.mode == Mode::Over {
                rest = &[];
                break;
            }
            if self.mode == Mode::Greeting {
                match first_len(rest) {
                    Ok(Some(len)) if rest.len() >= len => {
                        self.greet(&rest[4..len]);
                        rest = &rest[len..];
                        continue;
                    }
                    _ => break,
                }
            }
            let Scanned::Whole { tag, body } = scanner.next(rest).expect("a length that pgweir let through") else {
                break;
            };
            let tag = Tag::from_byte(tag).expect("a tag that pgweir let through");
            self.message(tag, body);
            rest = &rest[HEADER + body.len()..];
        }
        self.input = rest.to_vec();
        std::mem::take(&mut self.output)
    }

    fn greet(&mut self, packet: &[u8]) {
        if packet.starts_with(&CANCEL_REQUEST.to_be_bytes()) {
            self.mode = Mode::Over;
            return;
        }
        encode::authentication(&mut self.output, 0, &[]);
        for (name, value) in
            [("server_version", "17.0"), ("client_encoding", "UTF8"), ("standard_conforming_strings", "on")]
        {
            encode::parameter_status(&mut self.output, name.as_bytes(), value.as_bytes());
        }
        encode::backend_key_data(&mut self.output, 7, &[1, 2, 3, 4]);
        self.ready();
    }

    fn say(&mut self, tag: u8, body: &[u8]) {
        encode::message(&mut self.output, tag, |out| out.extend_from_slice(body));
    }

    fn row(&mut self, values: &[&[u8]]) {
        encode::message(&mut self.output, b'D', |out| {
            out.extend_from_slice(&u16::try_from(values.len()).unwrap().to_be_bytes());
            for value in values {
                out.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
                out.extend_from_slice(value);
            }
        });
    }

    fn row_description(&mut self) {
        self.say(b'T', b"\0\x01c\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0");
    }

    fn complete(&mut self, tag: &str) {
        encode::command_complete(&mut self.output, tag);
    }

    fn ready(&mut self) {
        self.mode = Mode::Ready;
        self.batch = false;
        if self.transaction == Transaction::Idle {
            self.portals.clear();
        }
        self.say(b'Z', &[self.transaction as u8]);
    }

    fn fail(&mut self, Failure(code, message): &Failure, query: bool) {
        Report { severity: "ERROR", code, message, detail: "", hint: "" }.error(&mut self.output);
        if self.transaction == Transaction::Open {
            self.transaction = Transaction::Failed;
        }
        if query {
            self.ready();
        } else {
            self.mode = Mode::Skipping;
        }
    }

    fn message(&mut self, tag: Tag, body: &[u8]) {
        match (self.mode, tag) {
            (_, Tag::Terminate) => self.mode = Mode::Over,
            (Mode::Copying(query), tag) => self.copy(query, tag, body),
            (_, Tag::Sync) => {
                assert!(body.is_empty(), "a Sync with a body");
                self.ready();
            }
            (Mode::Skipping, _) | (_, Tag::Flush | Tag::CopyData | Tag::CopyDone | Tag::CopyFail) => {}
            (_, Tag::Query) => {
                let text = frontend::query_text(body).expect("a text that pgweir let through").to_vec();
                self.query(&text);
            }
            (_, Tag::FunctionCall) => {
                if self.transaction == Transaction::Failed {
                    return self.fail(&aborted(), true);
                }
                self.say(b'V', b"\xff\xff\xff\xff");
                self.ready();
            }
            (_, Tag::Password) => panic!("a password message was let through"),
            (_, Tag::Parse | Tag::Bind | Tag::Describe | Tag::Execute | Tag::Close) => {
                self.batch = true;
                if let Err(failure) = self.extended(tag, body) {
                    self.fail(&failure, false);
                }
            }
        }
    }

    fn copy(&mut self, query: bool, tag: Tag, body: &[u8]) {
        match tag {
            Tag::CopyData if body == b"bad" => self.fail(&Failure("22P04", "bad data".into()), query),
            Tag::CopyData => self.copied += 1,
            Tag::Flush | Tag::Sync => {}
            Tag::CopyFail => self.fail(&Failure("57014", "COPY from stdin failed".into()), query),
            Tag::CopyDone => {
                self.complete(&format!("COPY {}", self.copied));
                self.mode = Mode::Ready;
                if query {
                    self.ready();
                }
            }
            _ => {
                let message = "terminating connection because protocol synchronization was lost";
                Report { severity: "FATAL", code: "08P01", message, detail: "", hint: "" }.error(&mut self.output);
                self.mode = Mode::Over;
            }
        }
    }

    // ---- simple queries ----

    fn query(&mut self, text: &[u8]) {
        self.statements.remove(&b""[..]);
        self.portals.remove(&b""[..]);
        if memchr(text, b"pg_control_system") {
            self.row_description();
            self.row(&[b"1", b"2024-01-01", b"127.0.0.1", b"5432"]);
            self.complete("SELECT 1");
            return self.ready();
        }
        if memchr(text, b"pg_rewrite") {
            // The catalog is empty.
            self.row_description();
            if !memchr(text, b"pg_get_functiondef") {
                self.row(&[b"1"]);
            }
            self.complete("SELECT 1");
            return self.ready();
        }
        if memchr(text, b"pg_catalog.") {
            // An audit finds nothing: none of our texts leaves anything behind.
            self.row_description();
            self.complete("SELECT 0");
            return self.ready();
        }
        if text.is_empty() {
            self.say(b'I', b"");
            return self.ready();
        }
        for part in text.split(|byte| *byte == b';') {
            if self.transaction == Transaction::Failed && !ends_transaction(part) {
                return self.fail(&aborted(), true);
            }
            if let Err(failure) = check(part) {
                return self.fail(&failure, true);
            }
            if part.starts_with(b"SELECT") {
                self.row_description();
            }
            match self.run(part, &mut 0, usize::MAX) {
                Ok(true) => {}
                Ok(false) => {
                    self.mode = Mode::Copying(true);
                    return;
                }
                Err(failure) => return self.fail(&failure, true),
            }
        }
        self.ready();
    }

    /// Runs one statement; false if it now reads COPY data.
    fn run(&mut self, text: &[u8], given: &mut usize, most: usize) -> Result<bool, Failure> {
        match text {
            b"SELECT 1/0" => return Err(Failure("22012", "division by zero".into())),
            b"BEGIN" => {
                if self.transaction == Transaction::Idle {
                    self.transaction = Transaction::Open;
                }
                self.complete("BEGIN");
            }
            b"COMMIT" | b"ROLLBACK" => {
                let commits = text == b"COMMIT" && self.transaction != Transaction::Failed;
                self.transaction = Transaction::Idle;
                self.portals.clear();
                self.complete(if commits { "COMMIT" } else { "ROLLBACK" });
            }
            b"DEALLOCATE ALL" => {
                self.statements.clear();
                self.complete("DEALLOCATE ALL");
            }
            b"DISCARD SEQUENCES" => self.complete("DISCARD SEQUENCES"),
            b"RESET SESSION AUTHORIZATION" | b"RESET ROLE" | b"RESET ALL" => self.complete("RESET"),
            text if text.starts_with(b"SET seed TO ") => self.complete("SET"),
            b"DISCARD ALL" => {
                self.statements.clear();
                self.portals.clear();
                self.complete("DISCARD ALL");
            }
            b"COPY t FROM STDIN" => {
                self.copied = 0;
                self.say(b'G', b"\0\0\x01\0\0");
                return Ok(false);
            }
            b"COPY t TO STDOUT" => {
                self.say(b'H', b"\0\0\x01\0\0");
                self.say(b'd', b"1\n");
                self.say(b'c', b"");
                self.complete("COPY 1");
            }
            text => {
                let begun = *given;
                while *given < rows(text) {
                    if *given - begun == most {
                        self.say(b's', b"");
                        return Ok(true);
                    }
                    *given += 1;
                    self.row(&[text]);
                }
                self.complete(&format!("SELECT {}", *given - begun));
            }
        }
        Ok(true)
    }

    // ---- extended queries ----

    fn extended(&mut self, tag: Tag, body: &[u8]) -> Result<(), Failure> {
        match tag {
            Tag::Parse => {
                let parse = Parse::parse(body).expect("a Parse that pgweir let through");
                self.parse(parse.statement, parse.query)
            }
            Tag::Bind => {
                let bind = Bind::parse(body).expect("a Bind that pgweir let through");
                self.bind(bind.portal, bind.statement)
            }
            Tag::Describe => match Target::parse(body).expect("a Describe that pgweir let through") {
                Target::Statement(name) => {
                    let text = self.statement(name)?;
                    self.fits(&text)?;
                    self.say(b't', b"\0\0");
                    self.describe(&text);
                    Ok(())
                }
                Target::Portal(name) => {
                    let text = self.portal(name)?.text.clone();
                    self.fits(&text)?;
                    self.describe(&text);
                    Ok(())
                }
            },
            Tag::Close => {
                match Target::parse(body).expect("a Close that pgweir let through") {
                    Target::Statement(name) => drop(self.statements.remove(name)),
                    Target::Portal(name) => drop(self.portals.remove(name)),
                }
                self.say(b'3', b"");
                Ok(())
            }
            _ => self.execute(body),
        }
    }

    /// In a failed transaction only its end runs.
    fn fits(&self, text: &[u8]) -> Result<(), Failure> {
        if self.transaction == Transaction::Failed && !ends_transaction(text) { Err(aborted()) } else { Ok(()) }
    }

    fn statement(&self, name: &[u8]) -> Result<Vec<u8>, Failure> {
        let found = self.statements.get(name).cloned();
        found.ok_or_else(|| Failure("26000", format!("prepared statement \"{}\" does not exist", name.escape_ascii())))
    }

    fn portal(&self, name: &[u8]) -> Result<&Portal, Failure> {
        let found = self.portals.get(name);
        found.ok_or_else(|| Failure("34000", format!("portal \"{}\" does not exist", name.escape_ascii())))
    }

    fn describe(&mut self, text: &[u8]) {
        if text.starts_with(b"SELECT") { self.row_description() } else { self.say(b'n', b"") }
    }

    fn parse(&mut self, name: &[u8], text: &[u8]) -> Result<(), Failure> {
        if name.is_empty() {
            self.statements.remove(name);
        }
        self.fits(text)?;
        if text.contains(&b';') {
            return Err(Failure("42601", "cannot insert multiple commands into a prepared statement".into()));
        }
        check(text)?;
        if !name.is_empty() && self.statements.contains_key(name) {
            return Err(Failure("42P05", format!("prepared statement \"{}\" already exists", name.escape_ascii())));
        }
        self.statements.insert(name.to_vec(), text.to_vec());
        self.say(b'1', b"");
        Ok(())
    }

    fn bind(&mut self, portal: &[u8], statement: &[u8]) -> Result<(), Failure> {
        let text = self.statement(statement)?;
        self.fits(&text)?;
        if !portal.is_empty() && self.portals.contains_key(portal) {
            return Err(Failure("42P03", format!("cursor \"{}\" already exists", portal.escape_ascii())));
        }
        self.portals.insert(portal.to_vec(), Portal { text, given: 0, done: false });
        self.say(b'2', b"");
        Ok(())
    }

    fn execute(&mut self, body: &[u8]) -> Result<(), Failure> {
        let malformed = || Failure("08P01", "invalid Execute message".into());
        let end = body.iter().position(|byte| *byte == 0).ok_or_else(malformed)?;
        let (name, most) = (&body[..end], &body[end + 1..]);
        let most = u32::from_be_bytes(most.try_into().map_err(|_| malformed())?) as usize;
        let mut portal = self.portal(name)?.clone();
        self.fits(&portal.text)?;
        let selects = portal.text.starts_with(b"SELECT");
        if portal.done && !selects {
            return Err(Failure("55000", "portal cannot be run".into()));
        }
        if portal.text.is_empty() {
            self.say(b'I', b"");
            return Ok(());
        }
        portal.done = true;
        let most = if most == 0 { usize::MAX } else { most };
        let going = self.run(&portal.text.clone(), &mut portal.given, most)?;
        if let Some(slot) = self.portals.get_mut(name) {
            *slot = portal;
        }
        if !going {
            self.mode = Mode::Copying(false);
        }
        Ok(())
    }
}

fn memchr(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn aborted() -> Failure {
    Failure("25P02", "current transaction is aborted, commands ignored until end of transaction block".into())
}

/// Whether it is a text of the language.
fn check(text: &[u8]) -> Result<(), Failure> {
    const WORDS: [&[u8]; 11] = [
        b"",
        b"BEGIN",
        b"COMMIT",
        b"ROLLBACK",
        b"DEALLOCATE ALL",
        b"DISCARD SEQUENCES",
        b"COPY t FROM STDIN",
        b"COPY t TO STDOUT",
        b"RESET SESSION AUTHORIZATION",
        b"RESET ROLE",
        b"RESET ALL",
    ];
    if text.starts_with(b"SELECT")
        || text.starts_with(b"SET seed TO ")
        || text == b"DISCARD ALL"
        || WORDS.contains(&text)
    {
        return Ok(());
    }
    Err(Failure("42601", format!("syntax error at or near \"{}\"", text.escape_ascii())))
}
