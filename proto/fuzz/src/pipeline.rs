//! The pipeline, against a naive server that answers what it is sent, one message after the other.
//!
//! Source of what the server does: the `PostgreSQL` 17 docs, §54.2.3 "Extended Query" to §54.2.6 "COPY Operations". Where
//! in its input an error strikes is the server's affair; here the experiment says it.

use std::collections::VecDeque;

use pgweir_proto::backend::{Tag, TxStatus};
use pgweir_proto::pipeline::{Expect, Origin, Owed, Pipeline};

use crate::{Source, trace};

/// How a message will fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Works,
    Fails,
    Suspends,
    Empty,
    CopiesOut,
    /// COPY FROM STDIN, so many times in a row.
    CopiesIn(u8),
}

/// What a client can send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    Asks(Expect, Fate),
    /// Data; true if the server finds a fault in it.
    Data(bool),
    /// `CopyDone`, or, if true, `CopyFail`.
    DataEnd(bool),
    Flush,
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Says(Tag),
    Error,
    Ready(TxStatus),
    /// The connection is over.
    Fatal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Normal,
    Skipping,
    /// Reads the data of a COPY of a `Query`, or else an `Execute`; so many more follow.
    Copying {
        query: bool,
        more: u8,
    },
    Dead,
}

#[derive(Clone, Debug)]
struct Server {
    unread: VecDeque<Message>,
    mode: Mode,
    /// Extended-protocol messages ran since the last `Sync` or query.
    batch: bool,
    status: TxStatus,
    answers: VecDeque<Answer>,
}

impl Server {
    fn say(&mut self, tags: &[Tag]) {
        self.answers.extend(tags.iter().map(|tag| Answer::Says(*tag)));
    }

    fn ready(&mut self) {
        self.batch = false;
        self.mode = Mode::Normal;
        self.answers.push_back(Answer::Ready(self.status));
    }

    fn fail(&mut self, query: bool) {
        self.answers.push_back(Answer::Error);
        if query {
            self.ready();
        } else {
            self.mode = Mode::Skipping;
        }
    }

    /// Reads one message.
    fn step(&mut self) {
        let Some(message) = self.unread.pop_front() else { return };
        match (self.mode, message) {
            (Mode::Dead, _) => {}
            (Mode::Copying { query, more }, message) => self.copy(query, more, message),
            (_, Message::Asks(Expect::Sync, fate)) => {
                // The commit of what ran.
                if fate == Fate::Fails && self.mode == Mode::Normal && self.batch {
                    self.answers.push_back(Answer::Error);
                }
                self.ready();
            }
            (Mode::Skipping, _) | (Mode::Normal, Message::Data(_) | Message::DataEnd(_) | Message::Flush) => {}
            (Mode::Normal, Message::Asks(expect, fate)) => self.run(expect, fate),
        }
    }

    fn run(&mut self, expect: Expect, fate: Fate) {
        let query = matches!(expect, Expect::Query | Expect::FunctionCall);
        self.batch |= !query;
        match (expect, fate) {
            (_, Fate::Fails) => return self.fail(query),
            (Expect::Parse, _) => self.say(&[Tag::ParseComplete]),
            (Expect::Bind, _) => self.say(&[Tag::BindComplete]),
            (Expect::Close, _) => self.say(&[Tag::CloseComplete]),
            (Expect::Describe, Fate::Empty) => self.say(&[Tag::NoData]),
            (Expect::Describe, _) => self.say(&[Tag::ParameterDescription, Tag::RowDescription]),
            (Expect::FunctionCall, _) => self.say(&[Tag::FunctionCallResponse]),
            (_, Fate::CopiesIn(more)) => {
                self.say(&[Tag::CopyInResponse]);
                self.mode = Mode::Copying { query, more };
                return;
            }
            (_, Fate::CopiesOut) => {
                self.say(&[Tag::CopyOutResponse, Tag::CopyData, Tag::CopyDone, Tag::CommandComplete]);
            }
            (_, Fate::Empty) => self.say(&[Tag::EmptyQueryResponse]),
            (Expect::Execute, Fate::Suspends) => self.say(&[Tag::DataRow, Tag::PortalSuspended]),
            (Expect::Execute, _) => self.say(&[Tag::DataRow, Tag::CommandComplete]),
            _ => self.say(&[Tag::RowDescription, Tag::DataRow, Tag::CommandComplete]),
        }
        if query {
            self.ready();
        }
    }

    /// A message during COPY FROM STDIN.
    fn copy(&mut self, query: bool, more: u8, message: Message) {
        match message {
            Message::Data(false) | Message::Flush | Message::Asks(Expect::Sync, _) => {}
            Message::Data(true) | Message::DataEnd(true) => self.fail(query),
            Message::DataEnd(false) if query && more > 0 => {
                self.say(&[Tag::CommandComplete, Tag::CopyInResponse]);
                self.mode = Mode::Copying { query, more: more - 1 };
            }
            Message::DataEnd(false) => {
                self.say(&[Tag::CommandComplete]);
                self.mode = Mode::Normal;
                if query {
                    self.ready();
                }
            }
            // "unexpected message type during COPY from stdin", and the stream is lost.
            Message::Asks(..) => {
                self.answers.extend([Answer::Error, Answer::Fatal]);
                self.mode = Mode::Dead;
            }
        }
    }

    /// Whether it will never say anything any more, unless it is asked.
    fn is_at_rest(&self) -> bool {
        let mut future = self.clone();
        while !future.unread.is_empty() {
            future.step();
        }
        future.answers.is_empty() && future.mode == Mode::Normal && !future.batch
    }
}

/// Steps of the client, the server and the wire between them, in any order.
pub fn pipeline(input: &[u8]) {
    let mut source = Source::new(input);
    let server = Server {
        unread: VecDeque::new(),
        mode: Mode::Normal,
        batch: false,
        status: TxStatus::Idle,
        answers: VecDeque::new(),
    };
    let polite = source.below(4) > 0;
    let mut run = Run { pipeline: Pipeline::default(), server, polite, copies: 0, sync_due: false, next: 1, last: 0 };
    while !source.is_empty() {
        let going = match source.below(8) {
            0..4 => {
                run.client(&mut source);
                true
            }
            4 => {
                run.server.status = source.pick(&[TxStatus::Idle, TxStatus::Open, TxStatus::Failed]);
                // A cancel request, or a trigger: an error that no message brought on.
                if let (Mode::Copying { query, .. }, 0) = (run.server.mode, source.below(4)) {
                    run.server.fail(query);
                }
                true
            }
            5 => {
                run.server.step();
                true
            }
            _ => run.hear(),
        };
        if !going {
            return;
        }
        trace(|| format!("{:?} {:?} {:?}", run.pipeline, run.server, run.copies));
        run.check();
    }
    run.finish();
}

struct Run {
    pipeline: Pipeline,
    server: Server,
    /// The client sends nothing but data, its end, `Flush` and `Sync` behind a COPY FROM STDIN; and a `Sync` behind the
    /// end, if it was one of an `Execute`.
    polite: bool,
    /// Ends of data that a polite client owes.
    copies: u8,
    /// The polite client's next message is a `Sync`: behind a COPY that an `Execute` began.
    sync_due: bool,
    next: u64,
    last: u64,
}

impl Run {
    fn client(&mut self, source: &mut Source<'_>) {
        use Expect::{Bind, Close, Describe, Execute, FunctionCall, Parse, Query, Sync};
        let kind = source.byte();
        let fate = match source.byte() % 16 {
            0 | 1 => Fate::Fails,
            2 => Fate::Suspends,
            3 => Fate::Empty,
            4 => Fate::CopiesOut,
            5 | 6 => Fate::CopiesIn(0),
            7 => Fate::CopiesIn(1),
            _ => Fate::Works,
        };
        let origin = if kind & 0x80 == 0 { Origin::Client } else { Origin::Pooler };
        if self.copies > 0 {
            return match kind % 8 {
                0..4 => self.send(Message::Data(kind.is_multiple_of(8)), origin),
                4 => self.send(Message::Asks(Sync, Fate::Works), Origin::Client),
                5 => self.send(Message::Flush, origin),
                _ => {
                    self.copies -= 1;
                    self.send(Message::DataEnd(kind % 8 == 7), Origin::Client);
                }
            };
        }
        if std::mem::take(&mut self.sync_due) {
            return self.send(Message::Asks(Sync, Fate::Works), Origin::Client);
        }
        let expect = match kind % 16 {
            0..3 => Query,
            3 => FunctionCall,
            4 => Parse,
            5 => Bind,
            6 => Describe,
            7..9 => Execute,
            9 => Close,
            10..12 => Sync,
            12 => return self.send(Message::Data(fate == Fate::Fails), Origin::Client),
            13 => return self.send(Message::DataEnd(fate == Fate::Fails), Origin::Client),
            14 => return self.send(Message::Flush, Origin::Client),
            _ => {
                // Answered here, in its turn: nothing is sent.
                let note = self.note();
                let expect = if kind & 0x10 == 0 { Parse } else { Close };
                self.pipeline.sent(expect, Origin::Local, note);
                return self.locals();
            }
        };
        let copies = match fate {
            Fate::CopiesIn(more) if expect == Query => more + 1,
            Fate::CopiesIn(_) if expect == Execute => 1,
            _ => 0,
        };
        if self.polite {
            self.copies = copies;
            self.sync_due = copies > 0 && expect == Execute;
        }
        self.send(Message::Asks(expect, fate), origin);
    }

    fn note(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn send(&mut self, message: Message, origin: Origin) {
        let expect = match message {
            Message::Asks(expect, _) => Some(expect),
            Message::DataEnd(_) => Some(Expect::CopyEnd),
            Message::Data(_) | Message::Flush => None,
        };
        if let Some(expect) = expect {
            let (note, before) = (self.note(), self.pipeline.depth());
            let entered = self.pipeline.sent(expect, origin, note);
            assert!(self.pipeline.depth() <= before + usize::from(entered));
        }
        self.server.unread.push_back(message);
    }

    /// The next answer arrives. False at the end of the experiment.
    fn hear(&mut self) -> bool {
        let Some(answer) = self.server.answers.pop_front() else { return true };
        let (mut undone, mut reply) = (Vec::new(), None);
        let expected = match answer {
            Answer::Says(tag) => self.pipeline.reply(tag).map(|told| reply = Some(told)).is_ok(),
            Answer::Ready(status) => self.pipeline.ready(status).map(|told| reply = Some(told)).is_ok(),
            Answer::Error => self.pipeline.error(|owed| undone.push(owed)).map(|told| reply = Some(told)).is_ok(),
            Answer::Fatal => {
                let left = self.pipeline.iter().count();
                assert_eq!(self.pipeline.abandon().count(), left);
                assert_eq!((self.pipeline.depth(), self.pipeline.ready_owed()), (0, 0));
                return false;
            }
        };
        if !expected {
            // The connection is closed: safe always, but wrong for a client that did nothing wrong.
            assert!(!self.polite, "{answer:?} is out of turn; the server is {:?}", self.server);
            return false;
        }
        for owed in undone.iter().chain(reply.and_then(|reply| reply.done).iter()) {
            self.done(owed.note);
        }
        self.locals();
        true
    }

    fn locals(&mut self) {
        while let Some(owed) = self.pipeline.next_local() {
            assert_eq!(owed.origin, Origin::Local);
            self.done(owed.note);
        }
    }

    /// Everything is given back once, in the order in which it was entered.
    fn done(&mut self, note: u64) {
        assert!(note > self.last, "{note} comes behind {}", self.last);
        self.last = note;
    }

    fn check(&self) {
        let earners = self.pipeline.iter().filter(Owed::earns_ready).count();
        assert_eq!(earners, self.pipeline.ready_owed() as usize);
        if self.pipeline.is_settled() && self.pipeline.is_certain() {
            assert!(self.server.is_at_rest(), "lent on with answers to come: {:?}", self.server);
        }
    }

    /// The client asks for nothing more, the server comes to its end: nothing is owed for ever.
    fn finish(mut self) {
        if !self.polite {
            return;
        }
        while self.copies > 0 {
            self.copies -= 1;
            self.send(Message::DataEnd(false), Origin::Client);
        }
        self.send(Message::Asks(Expect::Sync, Fate::Works), Origin::Client);
        while !self.server.unread.is_empty() || !self.server.answers.is_empty() {
            self.server.step();
            self.hear();
            self.check();
        }
        assert!(self.pipeline.is_settled(), "{:?} waits for ever", self.pipeline);
        if !self.pipeline.is_certain() {
            // A query of the pooler's own makes it so.
            self.send(Message::Asks(Expect::Query, Fate::Empty), Origin::Pooler);
            while !self.server.unread.is_empty() || !self.server.answers.is_empty() {
                self.server.step();
                self.hear();
            }
            assert!(self.pipeline.is_settled() && self.pipeline.is_certain());
        }
    }
}
