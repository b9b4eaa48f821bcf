//! Whole sessions before servers that break the protocol.
//!
//! The input says what the clients send, and what the servers do to their answers: messages left out, said twice, put in,
//! changed, cut, kept back. Logins are honest: those that are not have tests of their own. Whatever the servers do,
//!
//! - nothing panics, and no invariant breaks;
//! - what a client hears is messages, and nothing of another's: each client's rows and errors bear its mark;
//! - when the servers are gone that did so, every client is served again, or has been closed; and whoever comes then is told
//!   what an honest server says.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Once;

use pgweir::client::Context;
use pgweir_proto::backend;
use pgweir_proto::encode;
use pgweir_proto::scanner::HEADER;
use pgweir_proto_fuzz::{Source, trace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use crate::server::{Mode, Server};
use crate::session::{Client, Servers, moved, play, quiet, rest, target, tick, transcript, until};

/// One for each client there ever is. No change of a byte makes one of them another.
const MARKS: [&str; 8] = ["anchor", "bridge", "candle", "desert", "engine", "forest", "guitar", "harbor"];

/// Clients at once, at most.
const CLIENTS: usize = 3;

const NAMES: [&[u8]; 3] = [b"", b"s1", b"s2"];

/// What servers call those that they make up.
const MALICE: &[u8] = b"malice";

thread_local! {
    /// Panics on this thread, of tasks, too, which the event loop would keep to itself.
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// The experiment.
pub fn hostile(input: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            told(info);
        }));
    });
    let mut source = Source::new(input);
    let pool_size = 1 + source.below(2);
    let len = source.below(64);
    let malice = Rc::new(Malice::new(source.take(len)));
    let before = PANICS.get();
    play(pool_size, async |context, listener| {
        let servers = Servers::default();
        tokio::task::spawn_local(accept(listener, malice.clone(), servers.clone()));
        run(&mut source, &context, &malice, &servers).await;
    });
    assert_eq!(PANICS.get(), before, "something panicked");
}

// ---- the servers ----

/// What servers do that they should not: bytes of the input, used up one after the other by whichever answers next.
struct Malice {
    bytes: RefCell<Vec<u8>>,
    /// Servers that have done so are to go; and those of an earlier number.
    number: Cell<u32>,
    gone: Notify,
}

impl Malice {
    fn new(bytes: &[u8]) -> Self {
        let bytes = RefCell::new(bytes.iter().rev().copied().collect());
        Self { bytes, number: Cell::new(0), gone: Notify::new() }
    }

    /// From now on servers are honest; those that there are go.
    fn end(&self) {
        self.bytes.borrow_mut().clear();
        self.number.set(1);
        self.gone.notify_waiters();
    }

    fn next(&self) -> u8 {
        self.bytes.borrow_mut().pop().unwrap_or(0)
    }

    fn pick<T: Copy>(&self, choices: &[T]) -> T {
        choices[usize::from(self.next()) % choices.len()]
    }

    /// What becomes of an answer; true if the connection ends with it. `kept` is what was kept back of earlier ones.
    fn spoil(&self, answer: &[u8], kept: &mut Vec<u8>) -> (Vec<u8>, bool) {
        let mut out = std::mem::take(kept);
        let kind = self.next();
        if kind < 100 {
            out.extend_from_slice(answer);
            return (out, false);
        }
        let mut messages: Vec<Vec<u8>> =
            transcript(answer).into_iter().map(|(tag, body)| message(tag, &body)).collect();
        let at = usize::from(self.next()) % (messages.len() + 1);
        let (mut closes, is_there) = (false, at < messages.len());
        match kind % 13 {
            0 if is_there => drop(messages.remove(at)),
            1 if is_there => messages.insert(at, messages[at].clone()),
            2 if at + 1 < messages.len() => messages.swap(at, at + 1),
            3 => {
                let len = messages.concat().len();
                out.extend_from_slice(&messages.concat()[..usize::from(self.next()) % (len + 1)]);
                return (out, true);
            }
            4 if is_there => {
                let place = usize::from(self.next()) % messages[at].len();
                messages[at][place] ^= self.next();
            }
            5 => {
                *kept = out;
                kept.extend_from_slice(answer);
                return (Vec::new(), false);
            }
            6 => messages.extend_from_within(..),
            7 => {
                messages.insert(at, error("FATAL", "57P01"));
                messages.truncate(at + 1);
                closes = true;
            }
            _ => messages.insert(at, self.made_up()),
        }
        trace(|| format!("malice {kind} at {at}: {}", messages.concat().escape_ascii()));
        out.extend(messages.concat());
        (out, closes)
    }

    /// A message that nobody asked for.
    fn made_up(&self) -> Vec<u8> {
        match self.next() % 12 {
            0 => message(b'N', b"SNOTICE\0VNOTICE\0C00000\0Mmalice\0\0"),
            1 => {
                let (name, value) = self.pick(&[
                    ("TimeZone", "Mars"),
                    ("in_hot_standby", "off"),
                    ("in_hot_standby", "on"),
                    ("application_name", "x"),
                ]);
                message(b'S', format!("{name}\0{value}\0").as_bytes())
            }
            2 => message(b'A', b"\0\0\0\x07malice\0\0"),
            3 | 4 => message(b'Z', &[self.pick(b"ITE")]),
            5 => message(b'D', &[&[0, 1, 0, 0, 0, 6], MALICE].concat()),
            6 => message(b'C', self.pick(&[&b"SELECT 1\0"[..], b"COMMIT\0", b"COPY 1\0", b"DISCARD ALL\0"])),
            7 | 8 => error("ERROR", self.pick(&["26000", "0A000", "57014", "25P02", "42P05", "XX000"])),
            9 => message(self.pick(b"KRGHWvV"), &[0; 8]),
            10 => message(self.pick(b"123IntsTc"), b""),
            _ => message(self.next(), b"malice\0"),
        }
    }
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + body.len());
    encode::message(&mut out, tag, |out| out.extend_from_slice(body));
    out
}

fn error(severity: &str, code: &str) -> Vec<u8> {
    // Part of what is known by it, too: a statement of the pooler's that is not there.
    let text = format!("S{severity}\0V{severity}\0C{code}\0Mmalice\0RRevalidateCachedQuery\0\0");
    message(b'E', text.as_bytes())
}

async fn accept(listener: UnixListener, malice: Rc<Malice>, servers: Servers) {
    while let Ok((stream, _)) = listener.accept().await {
        let server = Rc::new(RefCell::new(Server::new("server")));
        servers.borrow_mut().push(server.clone());
        tokio::task::spawn_local(serve(stream, malice.clone(), server));
    }
}

async fn serve(mut stream: UnixStream, malice: Rc<Malice>, server: Rc<RefCell<Server>>) {
    let (mut buf, mut kept) = (vec![0; 16 * 1024], Vec::new());
    let (mut is_known, mut number) = (false, 0);
    while malice.number.get() == number || !is_known {
        let read = tokio::select! {
            read = stream.read(&mut buf) => read.unwrap_or(0),
            () = malice.gone.notified() => continue,
        };
        if read == 0 {
            break;
        }
        let answer = server.borrow_mut().feed(&buf[..read]);
        let (answer, closes) = if is_known { malice.spoil(&answer, &mut kept) } else { (answer, false) };
        if !is_known {
            // Behind the question who it is the login is over.
            is_known = memmem(&buf[..read], b"pg_control_system");
            number = malice.number.get();
        }
        moved(read + answer.len());
        if stream.write_all(&answer).await.is_err() || closes || server.borrow().mode == Mode::Over {
            break;
        }
    }
    trace(|| format!("server {:p} ends", &*server.borrow()));
    server.borrow_mut().mode = Mode::Over;
}

fn memmem(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

// ---- the clients ----

/// A client and its mark.
struct Marked {
    client: Client,
    mark: &'static str,
}

impl Marked {
    /// One message, or a few.
    fn act(&mut self, source: &mut Source<'_>) {
        let select = format!("SELECT '{}'", self.mark);
        let (select, name) = (select.as_bytes(), source.pick(&NAMES));
        let out = &mut self.client.unsent;
        let bind = |out: &mut Vec<u8>| {
            encode::message(out, b'B', |out| {
                encode::cstr(out, b"");
                encode::cstr(out, name);
                out.extend_from_slice(&[0; 6]);
            });
        };
        let execute = |out: &mut Vec<u8>| encode::message(out, b'E', |out| out.extend_from_slice(&[0; 5]));
        match source.below(20) {
            0..3 => encode::query(out, select),
            3 => encode::query(out, b"BEGIN"),
            4 => encode::query(out, b"COMMIT"),
            // An error that bears the mark.
            5 => encode::query(out, self.mark.as_bytes()),
            6 => encode::query(out, b"COPY t FROM STDIN"),
            7 => encode::message(out, b'd', |out| out.extend_from_slice(b"1\n")),
            8 => encode::message(out, b'c', |_| {}),
            9..12 => {
                encode::parse(out, name, select, &[0, 0]);
                bind(out);
                target(out, b'D', b'P', b"");
                execute(out);
                out.extend_from_slice(&encode::SYNC);
            }
            12 => encode::parse(out, name, select, &[0, 0]),
            13 | 14 => {
                bind(out);
                execute(out);
            }
            15 => target(out, b'C', b'S', name),
            16 => target(out, b'D', b'S', name),
            17 => out.extend_from_slice(&encode::FLUSH),
            _ => out.extend_from_slice(&encode::SYNC),
        }
    }

    /// Nothing but messages, and nothing of anybody else's.
    fn check(&self) {
        for (tag, body) in transcript(&self.client.heard) {
            assert!(backend::Tag::from_byte(tag).is_ok(), "a message of type {tag:#x}");
            for other in MARKS.iter().filter(|other| **other != self.mark) {
                assert!(
                    !memmem(&body, other.as_bytes()),
                    "{} hears of {other}: {}\"{}\"",
                    self.mark,
                    char::from(tag),
                    body.escape_ascii()
                );
            }
        }
    }
}

async fn run(source: &mut Source<'_>, context: &Rc<Context>, malice: &Malice, servers: &Servers) {
    let mut marks = MARKS.into_iter();
    let mut clients = Vec::new();
    for mark in marks.by_ref().take(1 + source.below(CLIENTS)) {
        clients.push(Marked { client: Client::new(context).await, mark });
    }
    while !source.is_empty() {
        let step = source.byte();
        let count = clients.len();
        let marked = &mut clients[usize::from(step >> 4) % count];
        match step % 16 {
            0..8 => marked.act(source),
            8..11 => marked.client.write(usize::MAX),
            11 => marked.client.write(usize::from(source.byte())),
            12 => quiet().await,
            13 => tick(context),
            14 => marked.client.read(),
            _ => {
                // It goes, whatever it was doing, or was closed; another one comes, while there are marks.
                let Some(mark) = marks.next() else { continue };
                marked.client.read();
                marked.check();
                marked.client.stream = None;
                *marked = Marked { client: Client::new(context).await, mark };
            }
        }
    }
    // Whoever waits for an answer that was kept back may wait for ever: so those servers go.
    for marked in &mut clients {
        marked.client.write(usize::MAX);
    }
    quiet().await;
    malice.end();
    quiet().await;
    let (last, want) = last_question();
    for marked in &mut clients {
        marked.client.unsent.extend_from_slice(&last);
    }
    let waits = |marked: &mut Marked| (!is_done(&mut marked.client, &want)).then_some(());
    let done = until(context, || clients.iter_mut().filter_map(waits).count() == 0).await;
    for marked in &clients {
        marked.check();
    }
    let told = clients.iter().map(|marked| format!("{}: {}", marked.mark, marked.client.heard.escape_ascii()));
    assert!(done, "some client waits for ever: {:?}", told.collect::<Vec<_>>());
    drop(clients);
    let mut fresh = Client::new(context).await;
    encode::query(&mut fresh.unsent, LAST);
    let served = until(context, || is_done(&mut fresh, &want)).await;
    assert!(served && fresh.heard == want, "whoever comes then hears {}", fresh.heard.escape_ascii());
    drop(fresh);
    rest(context, servers).await;
}

/// What everybody asks at the end.
const LAST: &[u8] = b"SELECT 5";

/// That, behind whatever ends what a client was in the middle of; and how it is answered.
fn last_question() -> (Vec<u8>, Vec<u8>) {
    let mut honest = Server::new("honest");
    let (mut login, mut question) = (Vec::new(), Vec::new());
    encode::startup(&mut login, 3 << 16, [(&b"user"[..], &b"app"[..])].into_iter());
    honest.feed(&login);
    encode::query(&mut question, LAST);
    let want = honest.feed(&question);
    let mut all = message(b'f', b"no\0");
    all.extend_from_slice(&encode::SYNC);
    encode::query(&mut all, b"ROLLBACK");
    all.extend_from_slice(&question);
    (all, want)
}

/// Whether it has heard that at last, or was closed.
fn is_done(client: &mut Client, want: &[u8]) -> bool {
    client.read();
    client.write(usize::MAX);
    client.closed || client.unsent.is_empty() && client.heard.ends_with(want)
}
