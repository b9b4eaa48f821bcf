//! What the server connection holds as its unnamed statement, behind errors: known wherever it can be, and never wrong. Another
//! client's would be run.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use pgweir_config::StatementMode;
use pgweir_harness::wire::build::{bind, close_statement, describe_statement, execute, message, parse, query, sync};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use proptest::prelude::*;

use super::super::super::desk::{Desk, reply};
use super::super::super::statements::Unnamed;
use super::super::Heard;
use super::show;
use crate::backend::Unnamed as Held;

/// Text that is not valid in the client's encoding: Postgres refuses it before it looks at the message.
const UNREADABLE: &str = "UNREADABLE";
/// What fails once it runs.
const FAILING: &str = "SELECT 1/0";
/// A portal whose execution fails.
const BAD: &str = "bad";

/// As much of Postgres as it takes to tell what its unnamed statement is.
///
/// Source: `PostgreSQL` 17, `exec_parse_message`, `exec_simple_query` and `PostgresMain` in postgres.c.
struct Postgres {
    unnamed: Option<String>,
    named: HashMap<String, String>,
    status: u8,
    skipping: bool,
}

impl Postgres {
    fn new() -> Self {
        Self { unnamed: None, named: HashMap::new(), status: b'I', skipping: false }
    }

    /// Does what these messages say, and answers.
    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let (mut scanner, mut at, mut out) = (Scanner::new(u32::MAX >> 1), 0, Vec::new());
        while let Ok(Scanned::Whole { tag, body }) = scanner.next(&bytes[at..]) {
            at += HEADER + body.len();
            out.extend(self.one(tag, body));
        }
        assert_eq!(at, bytes.len(), "whole messages: {}", show(bytes));
        out
    }

    fn one(&mut self, tag: u8, body: &[u8]) -> Vec<u8> {
        let text = |at: &[u8]| String::from_utf8(at.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap();
        let second = |body: &[u8]| text(&body[text(body).len() + 1..]);
        match tag {
            b'S' => {
                self.skipping = false;
                reply::ready(self.status)
            }
            _ if self.skipping => Vec::new(),
            b'Q' => {
                let answer = match self.query(&text(body)) {
                    Ok(()) => reply::done("SELECT 1"),
                    Err(code) => self.error(code),
                };
                self.skipping = false;
                [answer, reply::ready(self.status)].concat()
            }
            _ => {
                let answer = match tag {
                    b'P' => self.parse(text(body), second(body)).map(|()| reply::bare(b'1')),
                    b'B' => self.look(&second(body)).map(|()| reply::bare(b'2')),
                    b'D' => self.look(&text(&body[1..])).map(|()| [message(b't', b"\0\0"), reply::bare(b'n')].concat()),
                    b'E' if text(body) == BAD => Err("34000"),
                    b'E' => self.runs().map(|()| reply::done("SELECT 1")),
                    b'C' if body[0] == b'S' => {
                        self.close(&text(&body[1..]));
                        Ok(reply::bare(b'3'))
                    }
                    b'C' => Ok(reply::bare(b'3')),
                    b'H' => Ok(Vec::new()),
                    tag => panic!("{}", char::from(tag)),
                };
                answer.unwrap_or_else(|code| self.error(code))
            }
        }
    }

    fn error(&mut self, code: &str) -> Vec<u8> {
        self.skipping = true;
        if self.status == b'T' {
            self.status = b'E';
        }
        reply::error("ERROR", code, "it failed")
    }

    fn runs(&self) -> Result<(), &'static str> {
        if self.status == b'E' { Err("25P02") } else { Ok(()) }
    }

    fn query(&mut self, text: &str) -> Result<(), &'static str> {
        if text == UNREADABLE {
            return Err("22021");
        }
        self.unnamed = None;
        match text {
            "ROLLBACK" => self.status = b'I',
            FAILING => return Err("22012"),
            _ => self.runs()?,
        }
        if text == "BEGIN" {
            self.status = b'T';
        }
        Ok(())
    }

    fn parse(&mut self, name: String, text: String) -> Result<(), &'static str> {
        if text == UNREADABLE {
            return Err("22021");
        }
        if name.is_empty() {
            self.unnamed = None;
        }
        self.runs()?;
        if text == "SELEC" {
            return Err("42601");
        }
        if name.is_empty() {
            self.unnamed = Some(text);
            return Ok(());
        }
        match self.named.entry(name) {
            Entry::Occupied(_) => return Err("42P05"),
            Entry::Vacant(free) => free.insert(text),
        };
        Ok(())
    }

    fn look(&self, name: &str) -> Result<(), &'static str> {
        let is_there = if name.is_empty() { self.unnamed.is_some() } else { self.named.contains_key(name) };
        if is_there { self.runs() } else { Err("26000") }
    }

    fn close(&mut self, name: &str) {
        if name.is_empty() {
            self.unnamed = None;
        } else {
            self.named.remove(name);
        }
    }
}

/// A client, the server that it is on, and one that it would have had for itself.
struct Stage {
    desk: Desk,
    server: Postgres,
    own: Postgres,
    /// What the server has not read yet.
    wire: Vec<u8>,
}

impl Stage {
    fn new(mode: StatementMode) -> Self {
        let mut desk = Desk::new();
        desk.mode = mode;
        Self { desk, server: Postgres::new(), own: Postgres::new(), wire: Vec::new() }
    }

    /// What a client sends, and the server reads later. What the server is to get for it.
    fn send(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.own.take(bytes);
        let (sent, _) = self.desk.client(bytes);
        self.wire.extend_from_slice(&sent);
        sent
    }

    /// The server reads so many messages and answers.
    fn serve(&mut self, count: usize) {
        let (mut scanner, mut end) = (Scanner::new(u32::MAX >> 1), 0);
        for _ in 0..count {
            let Ok(Scanned::Whole { body, .. }) = scanner.next(&self.wire[end..]) else { break };
            end += HEADER + body.len();
        }
        let read: Vec<u8> = self.wire.drain(..end).collect();
        let answer = self.server.take(&read);
        let (_, heard) = self.desk.server(&answer);
        assert!(matches!(heard, Heard::Short), "{heard:?} at {}", show(&answer));
        // What waited for this goes on.
        let (sent, _) = self.desk.client(b"");
        self.wire.extend(sent);
    }

    /// Until there is nothing more to read. Then what is known must be so.
    fn settle(&mut self) {
        while !self.wire.is_empty() {
            self.serve(usize::MAX);
        }
        match &self.desk.conn.unnamed {
            Held::Unknown => {}
            Held::Empty => assert_eq!(self.server.unnamed, None, "none is held"),
            Held::Holds(statement, _) => {
                assert_eq!(
                    self.server.unnamed.as_deref().map(str::as_bytes),
                    Some(&*statement.text),
                    "another is held"
                );
            }
        }
    }

    /// The client's own is what it would be.
    fn compare_own(&self) {
        let ours = match &self.desk.statements.unnamed {
            Unnamed::Holds(statement, _) => Some(&*statement.text),
            Unnamed::Empty | Unnamed::Raw => None,
        };
        assert_eq!(ours, self.own.unnamed.as_deref().map(str::as_bytes));
    }

    /// Sends this, and has it answered.
    fn play(&mut self, batches: &[Vec<u8>]) -> Vec<u8> {
        let sent = self.send(&batches.concat());
        self.settle();
        sent
    }
}

const X: &str = "SELECT 'x'";
const Y: &str = "SELECT 'y'";
const NAMED: &str = "SELECT 'named'";

/// A client whose statements `s` and `t` run unnamed, and whose unnamed one the server holds.
fn stage() -> Stage {
    let mut stage = Stage::new(StatementMode::Strip);
    stage.play(&[parse("s", NAMED, &[]), parse("t", "SELECT 't'", &[]), sync(), parse("", X, &[]), sync()]);
    stage
}

#[test]
fn what_the_server_held_before_messages_that_it_skipped_is_bound_and_not_parsed_again() {
    let (fails, named, end) = (execute(BAD, 0), bind("", "s", &[]), sync());
    let own = |text| parse("", text, &[]);
    let passes = |text: &'static str| (None, text);
    let anew = |text: &'static str| (Some(parse("", text, &[])), text);
    #[rustfmt::skip]
    let table: [(&str, Vec<Vec<u8>>, (Option<Vec<u8>>, &str)); 12] = [
        ("a replacement skipped",           vec![fails.clone(), named.clone(), end.clone()],                                passes(X)),
        ("two",                             vec![fails.clone(), named.clone(), bind("", "t", &[]), end.clone()],            passes(X)),
        ("behind the client's own",         vec![own(Y), fails.clone(), named.clone(), end.clone()],                        passes(Y)),
        ("in front of it",                  vec![fails.clone(), named.clone(), own(Y), end.clone()],                        passes(X)),
        ("around it",                       vec![fails.clone(), named.clone(), own(Y), bind("", "t", &[]), end.clone()],    passes(X)),
        ("a new name's",                    vec![fails.clone(), parse("u", "SELECT 'u'", &[]), end.clone()],                passes(X)),
        ("in two batches",                  vec![fails.clone(), named.clone(), end.clone(), fails.clone(), named.clone(), end.clone()], passes(X)),
        ("in the first of two",             vec![fails.clone(), named.clone(), end.clone(), named.clone(), end.clone()],    anew(X)),
        ("in the second of two",            vec![named.clone(), end.clone(), fails.clone(), named.clone(), end.clone()],    anew(X)),
        ("one that ran, and one skipped",   vec![named.clone(), fails.clone(), bind("", "t", &[]), end.clone()],            anew(X)),
        ("skipped, and then its own",       vec![fails.clone(), named.clone(), end.clone(), own(Y), end.clone()],           passes(Y)),
        ("behind its own that fails",       vec![own("SELEC"), named.clone(), end.clone(), own(Y), fails.clone(), named.clone(), end.clone()], passes(Y)),
    ];
    for (name, batches, (first, text)) in table {
        let mut stage = stage();
        stage.play(&batches);
        stage.compare_own();
        let last = [bind("", "", &[]), execute("", 0), sync()];
        let sent = stage.play(&last);
        assert_eq!(show(&sent), show(&[first.unwrap_or_default(), last.concat()].concat()), "{name}");
        assert_eq!(stage.server.unnamed.as_deref(), Some(text), "{name}");
    }
}

#[test]
fn what_another_left_is_not_bound_behind_a_message_that_the_server_could_not_read() {
    for failing in [[parse("", UNREADABLE, &[]), sync()].concat(), query(UNREADABLE)] {
        for behind in [Vec::new(), [execute(BAD, 0), parse("", Y, &[]), sync()].concat()] {
            let mut stage = stage();
            stage.desk.next_client();
            stage.own = Postgres::new();
            stage.send(&[failing.clone(), behind].concat());
            stage.settle();
            assert_eq!(stage.server.unnamed.as_deref(), Some(X), "it is still there");
            let sent = stage.play(&[bind("", "", &[]), sync()]);
            assert_eq!(show(&sent), show(&[close_statement(""), bind("", "", &[]), sync()].concat()));
        }
    }
}

#[test]
fn what_the_server_says_of_a_statement_is_not_known_of_the_same_text_parsed_again_behind_it() {
    let mut desk = Desk::new();
    desk.client(&[parse("", X, &[]), describe_statement(""), sync(), parse("", X, &[]), sync()].concat());
    // Meanwhile the table may become another.
    let rows = message(b'T', b"\0\x01x\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0");
    let first = [reply::bare(b'1'), message(b't', b"\0\0"), rows, reply::ready(b'I')].concat();
    for answer in [first, [reply::bare(b'1'), reply::ready(b'I')].concat()] {
        desk.server(&answer);
        let Held::Holds(_, parsed) = &desk.conn.unnamed else { panic!("none is held") };
        assert!(!parsed.described.is_known());
    }
}

#[test]
fn one_of_ours_that_fails_leaves_none() {
    let mut stage = stage();
    stage.play(&[query("BEGIN"), parse("", Y, &[]), sync(), query(FAILING)]);
    // A failed transaction takes no Parse.
    stage.play(&[bind("", "s", &[]), sync(), query("ROLLBACK")]);
    stage.play(&[parse("", X, &[]), sync(), query("BEGIN"), execute(BAD, 0), sync(), bind("", "s", &[]), sync()]);
    assert_eq!(stage.server.unnamed, None);
    stage.compare_own();
}

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    /// The client sends this.
    Send(Vec<u8>),
    /// The server reads so many messages.
    Serve(usize),
    /// It reads all.
    Settle,
}

fn some_step(readable: bool) -> impl Strategy<Value = Step> {
    let name = || prop::sample::select(vec!["", "", "s", "t"]);
    let last = if readable { FAILING } else { UNREADABLE };
    let text = prop::sample::select(vec![X, Y, NAMED, "SELECT lastval()", "SELEC", last]);
    let queries = prop::sample::select(vec!["BEGIN", "BEGIN", "ROLLBACK", X, FAILING, last]);
    prop_oneof![
        // A query in the middle of a batch that fails is taken for one that ran: the client is told that it has none.
        2 => queries.prop_map(move |text| Step::Send(if readable { [sync(), query(text)].concat() } else { query(text) })),
        6 => (name(), text).prop_map(|(name, text)| Step::Send(parse(name, text, &[]))),
        6 => name().prop_map(|name| Step::Send(bind("", name, &[]))),
        2 => name().prop_map(|name| Step::Send(describe_statement(name))),
        2 => name().prop_map(|name| Step::Send(close_statement(name))),
        1 => Just(Step::Send(execute("", 0))),
        3 => Just(Step::Send(execute(BAD, 0))),
        6 => Just(Step::Send(sync())),
        3 => (1..6_usize).prop_map(Step::Serve),
        3 => Just(Step::Settle),
    ]
}

fn some_mode() -> impl Strategy<Value = StatementMode> {
    prop::sample::select(vec![StatementMode::Strip, StatementMode::Adaptive, StatementMode::Rewrite])
}

/// What follows from these, and whether the client's own is what it would be.
fn follow(mode: StatementMode, steps: &[Step], compares: bool) {
    let mut stage = Stage::new(mode);
    for step in steps.iter().chain([&Step::Send(sync()), &Step::Settle]) {
        match step {
            Step::Send(bytes) => drop(stage.send(bytes)),
            Step::Serve(count) => stage.serve(*count),
            Step::Settle => stage.settle(),
        }
    }
    assert!(stage.desk.conn.pipeline.is_settled() && stage.desk.marks.changes.is_empty(), "{:?}", stage.desk.marks);
    if compares {
        stage.compare_own();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn what_the_server_is_known_to_hold_it_does_whatever_fails(
        mode in some_mode(),
        steps in prop::collection::vec(some_step(false), 1..60),
    ) {
        follow(mode, &steps, false);
    }

    #[test]
    fn the_clients_own_is_what_it_would_be_whatever_fails(
        mode in some_mode(),
        steps in prop::collection::vec(some_step(true), 1..60),
    ) {
        follow(mode, &steps, true);
    }
}
