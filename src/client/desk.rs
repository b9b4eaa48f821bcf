//! A client and its server connection without sockets: bytes in, bytes out, for the tests of the two inspectors.

use std::cell::RefCell;
use std::rc::Rc;

use pgweir_config::StatementMode;
use pgweir_proto::pipeline::Origin;
use pgweir_proto::scanner::Scanner;

use super::answer::{Answer, Aside, Heard, Rules, Told};
use super::plan::Plan;
use super::request::{Marks, Request, Stop};
use super::statements::Statements;
use crate::backend::ServerConn;
use crate::clock::Moment;
use crate::pool::{Knowledge, Sequences, SharedLimit};
use crate::prepared::{Budget, Interner};
use crate::settings::{Profile, Profiles};
use crate::sql;
use crate::stats::PoolStats;

/// Named statements that the client may have.
pub const STATEMENTS_MAX: usize = 5;

/// The longest text that is read; bytes.
pub const INSPECT_MAX: usize = 64 * 1024;

/// One client on one server connection.
#[expect(clippy::struct_excessive_bools, reason = "independent facts that a test sets")]
pub struct Desk {
    pub conn: Box<ServerConn>,
    pub marks: Marks,
    pub aside: Aside,
    pub interner: Interner,
    pub mode: StatementMode,
    pub budget: Budget,
    /// What the client listens to by the hub.
    pub channels: Vec<Box<[u8]>>,
    /// The server is a follower, and nothing of the answer to the batch under way was told.
    pub elsewhere: bool,
    /// That batch is proven to read.
    pub harmless: bool,
    /// Its batch can be sent again.
    pub heals: bool,
    /// It has had a word of the answer to its batch.
    pub has_word: bool,
    /// What the client has been sent.
    pub to_client: Vec<u8>,
    pub statements: Statements,
    scans: sql::Cache,
    library: RefCell<sql::Library>,
    catalog: Knowledge,
    stats: PoolStats,
    profiles: Profiles,
    startup: Rc<Profile>,
    scanner: Scanner,
    from_client: Vec<u8>,
    from_server: Vec<u8>,
}

impl Desk {
    /// A client that has just been lent a server connection on which nothing was ever done.
    pub fn new() -> Self {
        Self::logged_in_with(&[])
    }

    /// A client with settings of its own from the start.
    pub fn logged_in_with(settings: &[(&str, &str)]) -> Self {
        let profiles = Profiles::default();
        let startup = profiles.intern(settings.iter().map(|(n, v)| ((*n).into(), v.as_bytes().into())));
        Self {
            conn: ServerConn::without_socket(startup.clone()),
            marks: Marks::default(),
            aside: Aside::default(),
            interner: Interner::new(1 << 20),
            mode: StatementMode::Rewrite,
            budget: Budget { count: 200, bytes: 1 << 20 },
            channels: Vec::new(),
            elsewhere: false,
            harmless: true,
            heals: false,
            has_word: false,
            to_client: Vec::new(),
            statements: Statements::default(),
            scans: sql::Cache::default(),
            library: RefCell::default(),
            catalog: Knowledge::new(1, SharedLimit::new(0), false, Sequences::new(false)),
            stats: PoolStats::default(),
            profiles,
            startup,
            scanner: Scanner::new(u32::MAX >> 1),
            from_client: Vec::new(),
            from_server: Vec::new(),
        }
    }

    /// The client's settings are these by now.
    pub fn set(&mut self, settings: &[(&str, &str)]) {
        self.startup = self.profiles.intern(settings.iter().map(|(n, v)| ((*n).into(), v.as_bytes().into())));
        self.replayed();
    }

    /// And on the server connection.
    pub fn replayed(&mut self) {
        self.conn.profile = self.startup.clone();
    }

    /// Another client takes the place of this one, on the same server connection.
    pub fn next_client(&mut self) {
        assert!(self.conn.pipeline.is_free() && self.from_client.is_empty());
        (self.statements, self.marks, self.aside) = Default::default();
        self.to_client.clear();
    }

    /// The server's name for the statement with this number.
    pub fn name(&self, id: u64) -> String {
        let mut name = Vec::new();
        self.interner.prefix.write_name(id, &mut name);
        String::from_utf8(name).unwrap()
    }

    /// Bytes come from the client. What the server gets, and why reading stopped.
    pub fn client(&mut self, bytes: &[u8]) -> (Vec<u8>, Stop) {
        self.from_client.extend_from_slice(bytes);
        let mut made = Vec::new();
        let mut plan = Plan::new(&self.from_client, &mut made);
        let stop = Request {
            scanner: &mut self.scanner,
            conn: &mut self.conn,
            statements: &mut self.statements,
            marks: &mut self.marks,
            interner: &self.interner,
            scans: &mut self.scans,
            library: &self.library,
            catalog: &self.catalog,
            catalog_key: self.catalog.key(),
            stats: &mut self.stats,
            pool: 1,
            parse_key: self.startup.parse_key(),
            profiles: &self.profiles,
            startup: &self.startup,
            inspect_max: INSPECT_MAX,
            statements_max: STATEMENTS_MAX,
            mode: self.mode,
            budget: self.budget,
            may_pin: true,
            channels: Some(&*self.channels).filter(|channels| !channels.is_empty()),
            replaying: &mut self.aside.replaying,
        }
        .inspect(&mut plan);
        let (used, sent) = (plan.at(), both(&plan));
        self.from_client.drain(..used);
        if self.conn.pipeline.front().is_none_or(|owed| owed.origin == Origin::Local) {
            self.answer(None);
        }
        (sent, stop)
    }

    /// Bytes come from the server. What the client gets, and why reading stopped.
    pub fn server(&mut self, bytes: &[u8]) -> (Vec<u8>, Heard) {
        self.from_server.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.from_server);
        let before = self.to_client.len();
        let (used, heard) = self.answer(Some(&input));
        self.from_server = input[used..].to_vec();
        (self.to_client[before..].to_vec(), heard)
    }

    /// Whether the client stands in the middle of a message of the server's.
    pub fn is_inside_answer(&self) -> bool {
        self.conn.scanner.is_inside()
    }

    /// Whether the server stands in the middle of a message of the client's.
    pub fn is_inside_request(&self) -> bool {
        self.scanner.is_inside()
    }

    /// Looks at the server's bytes, or without any at what is due from us.
    fn answer(&mut self, input: Option<&[u8]>) -> (usize, Heard) {
        let mut made = Vec::new();
        let mut plan = Plan::new(input.unwrap_or_default(), &mut made);
        let mut answer = Answer {
            conn: &mut self.conn,
            statements: &mut self.statements,
            marks: &mut self.marks,
            aside: &mut self.aside,
            stats: &mut self.stats,
            subscriber: None,
            startup: &self.startup,
            rules: &Rules {
                now: Moment::default(),
                prefix: self.interner.prefix,
                statement_mode: false,
                statements_max: STATEMENTS_MAX,
                heals: self.heals && !self.has_word,
                owes_begin: false,
                pid: 1,
                elsewhere: self.elsewhere,
                harmless: self.harmless,
                follower: self.elsewhere,
            },
            told: Told::default(),
        };
        let heard = if input.is_some() {
            answer.inspect(&mut plan)
        } else {
            answer.answer_locally(&mut plan);
            Heard::Short
        };
        self.has_word |= plan.planned() != answer.told.bytes;
        self.to_client.extend(both(&plan));
        (plan.at(), heard)
    }
}

fn both(plan: &Plan<'_>) -> Vec<u8> {
    let (first, second) = plan.slices();
    [first, second].concat()
}

/// Messages of the server's, as short as they can be.
pub mod reply {
    use pgweir_harness::wire::build::message;

    /// `ParseComplete`, `BindComplete`, `CloseComplete`, `NoData` and the like: a tag and nothing else.
    pub fn bare(tag: u8) -> Vec<u8> {
        message(tag, b"")
    }

    /// `CommandComplete`.
    pub fn done(tag: &str) -> Vec<u8> {
        message(b'C', &[tag.as_bytes(), b"\0"].concat())
    }

    /// `ReadyForQuery`.
    pub fn ready(status: u8) -> Vec<u8> {
        message(b'Z', &[status])
    }

    /// A `DataRow` of one column.
    pub fn row(value: &[u8]) -> Vec<u8> {
        let length = u32::try_from(value.len()).unwrap().to_be_bytes();
        message(b'D', &[&b"\0\x01"[..], &length, value].concat())
    }

    /// An `ErrorResponse`.
    pub fn error(severity: &str, code: &str, text: &str) -> Vec<u8> {
        message(b'E', format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0").as_bytes())
    }

    /// A `ParameterStatus`.
    pub fn parameter(name: &str, value: &str) -> Vec<u8> {
        message(b'S', format!("{name}\0{value}\0").as_bytes())
    }
}
