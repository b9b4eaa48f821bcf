//! Statements that take long, for the log: what is left of their texts without literals, and where the time went.
//!
//! A session keeps the texts of what it has sent and the server has not answered; nobody else sees them. They are read when
//! one took too long, and never shown but as [`outline`] leaves them.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use pgweir_proto::frontend::{Bind, Parse, Tag};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

use super::statements::{Changes, Look, Named, Statements, Unnamed};
use crate::clock::Moment;
use crate::pool::micros;
use crate::prepared::Statement;
use crate::sql::{OUTLINE_TEXT_MAX, outline};

/// Lines in a second, at most.
const LINES_PER_SECOND: u32 = 10;

/// Batches of one session whose answer is awaited that are told apart; further ones have no text.
const AWAITED_MAX: usize = 256;

/// Bytes of texts that a session keeps, at most; further ones have none.
const TEXTS_MAX: usize = 2 * OUTLINE_TEXT_MAX;

/// What is shown of a text, about; bytes.
const SHOWN_MAX: usize = 384;

/// What is shown of a name, about; bytes.
const NAME_MAX: usize = 63;

const SECOND_US: u64 = 1_000_000;

/// Which lease: the session's process id, and when it began. Two of one session at once are the same client's.
pub type Lease = (u32, Moment);

/// What is under way in one lease.
#[derive(Debug, Default)]
pub struct Watched {
    lease: Lease,
    /// How long the lease was waited for, microseconds; the first answer's.
    waited: u64,
    /// The batch that has no end yet.
    open: Batch,
    /// Batches whose answer is awaited.
    awaited: VecDeque<Batch>,
    /// Further ones, behind those.
    untold: u64,
    /// Bytes of texts that are kept.
    bytes: usize,
    /// The server refused something of what is awaited.
    refused: bool,
}

/// What one `ReadyForQuery` is for.
#[derive(Debug, Default)]
struct Batch {
    text: Text,
    /// Statements in it.
    statements: u32,
}

/// The text of the first statement of a batch.
#[derive(Debug, Default)]
enum Text {
    /// There was none yet.
    #[default]
    None,
    /// It came with the batch.
    Own(Box<[u8]>),
    /// It was prepared before.
    Prepared(Rc<Statement>),
    /// Too long, or too many, or nobody knows.
    Unknown,
}

impl Text {
    /// Whether it does no more than begin: drivers put a `BEGIN` in front of a transaction's first statement.
    fn only_begins(&self) -> bool {
        let begins = |text: &[u8]| {
            let text = text.trim_ascii();
            let is = |word: &[u8]| text.get(..word.len()).is_some_and(|front| front.eq_ignore_ascii_case(word));
            (is(b"begin") || is(b"start transaction")) && !text.contains(&b';')
        };
        self.bytes().is_some_and(begins)
    }

    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Own(text) => Some(text),
            Self::Prepared(statement) => Some(&statement.text),
            Self::None | Self::Unknown => None,
        }
    }
}

/// An answered batch.
#[derive(Debug, Default)]
pub struct Done {
    batch: Batch,
    /// How long it waited for a server connection, microseconds.
    waited: u64,
}

impl Watched {
    /// This one, for `lease`: of another nothing is kept.
    pub fn of(&mut self, lease: Lease) -> &mut Self {
        if self.lease != lease {
            *self = Self { lease, ..Self::default() };
        }
        self
    }

    /// It began with a wait of so many microseconds.
    pub fn waited(&mut self, us: u64) {
        self.waited = us;
    }

    /// These messages went to the server. `scanner` is where it stood in front of them.
    pub fn sent(&mut self, mut scanner: Scanner, mut sent: &[u8], statements: &Statements, changes: &Changes) {
        while let Ok(scanned) = scanner.next(sent) {
            let len = match scanned {
                Scanned::Short => return,
                Scanned::Inside { len } => len,
                Scanned::Whole { tag, body } => {
                    self.message(tag, Some(body), statements, changes);
                    HEADER + body.len()
                }
                Scanned::Part { tag, body_len, seen } => {
                    // A large one, of which the front was passed on.
                    self.message(tag, None, statements, changes);
                    scanner.stream(body_len, seen.len());
                    HEADER + seen.len()
                }
            };
            sent = sent.get(len..).unwrap_or_default();
        }
    }

    fn message(&mut self, tag: u8, body: Option<&[u8]>, statements: &Statements, changes: &Changes) {
        match Tag::from_byte(tag) {
            Ok(Tag::Query) => {
                let text = body.and_then(|body| body.split_last()).map(|(_, text)| text);
                self.text(text);
                self.open.statements += 1;
                self.end();
            }
            Ok(Tag::Parse) => self.text(body.and_then(|body| Parse::parse(body).ok()).map(|parse| parse.query)),
            Ok(Tag::Bind) => {
                self.open.statements += 1;
                // Behind its own Parse, a BEGIN's Bind is no other statement.
                if matches!(self.open.text, Text::None) || self.open.statements > 1 && self.open.text.only_begins() {
                    let bind = body.and_then(|body| Bind::parse(body).ok());
                    self.open.text = bind.map_or(Text::Unknown, |bind| known(bind.statement, statements, changes));
                }
            }
            Ok(Tag::FunctionCall) => {
                self.open.text = Text::Unknown;
                self.open.statements += 1;
                self.end();
            }
            Ok(Tag::Sync) => self.end(),
            _ => {}
        }
    }

    /// A text came with the batch; the first is kept.
    fn text(&mut self, text: Option<&[u8]>) {
        if !(matches!(self.open.text, Text::None) || self.open.text.only_begins()) {
            return;
        }
        self.bytes = self.bytes.saturating_sub(self.open.own());
        let fits = |text: &&[u8]| text.len() <= OUTLINE_TEXT_MAX && self.bytes + text.len() <= TEXTS_MAX;
        self.open.text = text.filter(fits).map_or(Text::Unknown, |text| Text::Own(text.into()));
        self.bytes += self.open.own();
    }

    /// The open batch has its end.
    fn end(&mut self) {
        let batch = std::mem::take(&mut self.open);
        if self.untold > 0 || self.awaited.len() >= AWAITED_MAX {
            self.bytes = self.bytes.saturating_sub(batch.own());
            self.untold += 1;
        } else {
            self.awaited.push_back(batch);
        }
    }

    /// The server refused something: what it would not read may have literals that only look like something else. No text
    /// is told before all of it is answered.
    pub fn refused(&mut self) {
        self.refused = true;
    }

    /// The oldest batch was answered.
    pub fn answered(&mut self) -> Done {
        let mut batch = self.awaited.pop_front().unwrap_or_else(|| {
            self.untold = self.untold.saturating_sub(1);
            Batch { text: Text::Unknown, statements: 0 }
        });
        self.bytes = self.bytes.saturating_sub(batch.own());
        if self.refused {
            batch.text = Text::Unknown;
        }
        Done { batch, waited: std::mem::take(&mut self.waited) }
    }

    /// Nothing is owed: whatever is still awaited was sent in vain.
    pub fn settle(&mut self) {
        self.awaited.clear();
        self.untold = 0;
        self.refused = false;
        self.bytes = self.open.own();
        if self.awaited.capacity() > AWAITED_MAX / 8 {
            self.awaited = VecDeque::new();
        }
    }
}

impl Batch {
    /// Bytes of a text that nobody else keeps.
    fn own(&self) -> usize {
        if let Text::Own(text) = &self.text { text.len() } else { 0 }
    }
}

/// The text of a statement that was prepared before.
fn known(name: &[u8], statements: &Statements, changes: &Changes) -> Text {
    if name.is_empty() {
        return match &statements.unnamed {
            Unnamed::Holds(statement, _) => Text::Prepared(statement.clone()),
            Unnamed::Empty | Unnamed::Raw => Text::Unknown,
        };
    }
    match statements.look(name, changes) {
        Look::Named(Named::Shared(statement, _)) => Text::Prepared(statement),
        Look::Named(Named::Raw) | Look::Unknown | Look::Unsettled => Text::Unknown,
    }
}

/// Whose statement it was.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// The session's process id.
    pub client: u32,
    /// The database as clients name it.
    pub database: &'a str,
    /// The user as clients name it.
    pub user: &'a str,
    /// Its `application_name`.
    pub application: &'a [u8],
}

/// What of the statements is told.
#[derive(Debug)]
pub struct Slow {
    /// Microseconds; at least one.
    least: u64,
    rate: Rate,
}

impl Slow {
    /// None if no statement is told.
    #[must_use]
    pub fn new(least: Duration) -> Option<Self> {
        (!least.is_zero()).then(|| Self { least: micros(least), rate: Rate::default() })
    }

    /// Logs what ran for so many microseconds, if that and its wait are long, and there is room for a line.
    pub fn judge(&self, done: &Done, run: u64, now: Moment, told: &Told<'_>) {
        if done.waited.saturating_add(run) < self.least {
            return;
        }
        let Some(left_out) = self.rate.take(now) else { return };
        let text = done.batch.text.bytes().and_then(outline);
        tracing::info!(
            target: "pgweir::slow",
            pgweir = "slow",
            client = told.client,
            pool = %Shown(told.database.as_bytes(), NAME_MAX),
            user = %Shown(told.user.as_bytes(), NAME_MAX),
            application_name = %Shown(told.application, NAME_MAX),
            "measure#statement.wait" = %Ms(done.waited),
            "measure#statement.run" = %Ms(run),
            statements = done.batch.statements,
            left_out,
            statement = %Shown(text.as_deref().unwrap_or("?").as_bytes(), SHOWN_MAX),
        );
    }
}

/// At most [`LINES_PER_SECOND`].
#[derive(Debug, Default)]
struct Rate {
    second: Cell<u64>,
    lines: Cell<u32>,
    left_out: Cell<u64>,
}

impl Rate {
    /// Room for a line, and how many had none since the last; or none.
    fn take(&self, now: Moment) -> Option<u64> {
        let second = now.since(Moment::default()) / SECOND_US;
        if self.second.replace(second) != second {
            self.lines.set(0);
        }
        if self.lines.get() >= LINES_PER_SECOND {
            self.left_out.set(self.left_out.get() + 1);
            return None;
        }
        self.lines.set(self.lines.get() + 1);
        Some(self.left_out.take())
    }
}

/// Text that a client chose, cut behind so many bytes, with whatever is neither a letter nor a visible sign as a question
/// mark.
struct Shown<'a>(&'a [u8], usize);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0);
        let plain = |c: char| c.is_alphanumeric() || c.is_ascii_graphic() || c == ' ' || c == '…';
        for (at, c) in text.char_indices() {
            if at >= self.1 {
                return f.write_str("…");
            }
            write!(f, "{}", if plain(c) { c } else { '?' })?;
        }
        Ok(())
    }
}

/// Microseconds, written as milliseconds with their unit, as l2met reads them.
struct Ms(u64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}ms", self.0 / 1000, self.0 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Lease = (7, Moment::at(5));

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[tag], &len[..], body].concat()
    }

    fn query(text: &str) -> Vec<u8> {
        message(b'Q', &[text.as_bytes(), b"\0"].concat())
    }

    fn sent(watched: &mut Watched, bytes: &[u8]) {
        watched.of(LEASE).sent(Scanner::new(1 << 30), bytes, &Statements::default(), &Changes::default());
    }

    fn text(done: &Done) -> &str {
        done.batch.text.bytes().map_or("?", |text| std::str::from_utf8(text).unwrap())
    }

    #[test]
    fn each_answer_is_of_the_text_that_it_answers() {
        let mut watched = Watched::default();
        let parse = message(b'P', b"\0SELECT $1\0\0\0");
        let bind = message(b'B', b"\0\0\0\0\0\0\0\0");
        let unknown = message(b'B', b"\0nobody\0\0\0\0\0\0\0");
        let sync = message(b'S', b"");
        watched.of(LEASE).waited(30);
        sent(&mut watched, &[query("one"), query("two"), parse, bind.clone(), bind, sync.clone(), unknown].concat());
        sent(&mut watched, &sync);
        let all: Vec<Done> = (0..5).map(|_| watched.answered()).collect();
        let texts: Vec<&str> = all.iter().map(text).collect();
        assert_eq!(texts, ["one", "two", "SELECT $1", "?", "?"]);
        let counts: Vec<u32> = all.iter().map(|done| done.batch.statements).collect();
        assert_eq!(counts, [1, 1, 2, 1, 0]);
        let waits: Vec<u64> = all.iter().map(|done| done.waited).collect();
        assert_eq!(waits, [30, 0, 0, 0, 0], "the first has waited");
        assert_eq!(watched.bytes, 0);
    }

    #[test]
    fn a_begin_gives_way_to_what_it_begins_and_nothing_is_told_of_what_the_server_refused() {
        let mut watched = Watched::default();
        let (begin, slow) = (message(b'P', b"\0BEGIN\0\0\0"), message(b'P', b"\0SELECT slow\0\0\0"));
        let (bind, sync) = (message(b'B', b"\0\0\0\0\0\0\0\0"), message(b'S', b""));
        sent(&mut watched, &[begin.clone(), bind.clone(), slow, bind.clone(), sync.clone()].concat());
        sent(&mut watched, &[begin, bind, sync].concat());
        let (both, alone) = (watched.answered(), watched.answered());
        assert_eq!((text(&both), both.batch.statements, text(&alone)), ("SELECT slow", 2, "BEGIN"));
        assert_eq!(watched.bytes, 0);
        sent(&mut watched, &[query("one"), query("two")].concat());
        watched.refused();
        assert_eq!((text(&watched.answered()), text(&watched.answered())), ("?", "?"));
        watched.settle();
        sent(&mut watched, &query("three"));
        assert_eq!(text(&watched.answered()), "three");
    }

    #[test]
    fn nothing_of_one_lease_is_told_in_another() {
        let mut watched = Watched::default();
        watched.of(LEASE).waited(9);
        sent(&mut watched, &query("of the first"));
        for other in [(8, LEASE.1), (7, Moment::at(6))] {
            let done = watched.of(other).answered();
            assert_eq!((text(&done), done.waited), ("?", 0));
        }
        sent(&mut watched, &query("in vain"));
        watched.settle();
        sent(&mut watched, &query("next"));
        assert_eq!(text(&watched.answered()), "next");
    }

    #[test]
    fn what_is_kept_is_bounded_and_order_is_kept() {
        let mut watched = Watched::default();
        for n in 0..AWAITED_MAX + 5 {
            sent(&mut watched, &query(&format!("{n}")));
        }
        assert_eq!(text(&watched.answered()), "0");
        sent(&mut watched, &query("behind those without a text"));
        let rest: Vec<String> = (0..AWAITED_MAX + 5).map(|_| text(&watched.answered()).to_owned()).collect();
        assert_eq!(rest[AWAITED_MAX - 2], format!("{}", AWAITED_MAX - 1));
        assert!(rest[AWAITED_MAX - 1..].iter().all(|text| text == "?"), "{rest:?}");
        sent(&mut watched, &query(&"x".repeat(OUTLINE_TEXT_MAX + 1)));
        assert_eq!(text(&watched.answered()), "?");
        for _ in 0..3 {
            sent(&mut watched, &query(&"x".repeat(OUTLINE_TEXT_MAX)));
        }
        assert!(watched.bytes <= TEXTS_MAX);
        let texts: Vec<usize> = (0..3).map(|_| text(&watched.answered()).len()).collect();
        assert_eq!(texts, [OUTLINE_TEXT_MAX, OUTLINE_TEXT_MAX, 1]);
        assert_eq!(watched.bytes, 0);
    }

    #[test]
    fn a_message_that_streams_through_is_counted_once() {
        let mut watched = Watched::default();
        let long = query(&"x".repeat(100));
        let (front, back) = long.split_at(50);
        sent(&mut watched, front);
        let mut inside = Scanner::new(1 << 30);
        inside.stream(101, 45);
        watched.of(LEASE).sent(inside, &[back, &query("next")].concat(), &Statements::default(), &Changes::default());
        assert_eq!((text(&watched.answered()), text(&watched.answered())), ("?", "next"));
        assert!(watched.awaited.is_empty());
    }

    #[test]
    fn there_are_ten_lines_a_second_and_the_next_says_how_many_there_were_not() {
        let rate = Rate::default();
        let lines = |at: u64| (0..25).filter_map(|_| rate.take(Moment::at(at))).collect::<Vec<u64>>();
        let (first, second) = (lines(100), lines(SECOND_US));
        assert_eq!((first.len(), first[0]), (10, 0));
        assert_eq!((second.len(), second[0], second[1]), (10, 15, 0));
    }

    #[test]
    fn a_name_forges_no_line_and_is_cut() {
        let shown = |text: &str| Shown(text.as_bytes(), 7).to_string();
        assert_eq!(shown("a\nb\u{202e}é"), "a?b?é");
        assert_eq!(shown("1234567"), "1234567");
        assert_eq!(shown("12345678"), "1234567…");
        assert_eq!(Ms(1_234).to_string(), "1.234ms");
    }
}
