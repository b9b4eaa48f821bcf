//! Whole sessions: clients, pgweir between, and naive servers behind it.
//!
//! The input says what the clients send, in what pieces and in which order. Each client's bytes go to pgweir and, as the
//! judge, to a [`Server`] of its own: what comes out of pgweir has to be what the judge says, message for message, except
//!
//! - in a failed transaction: 25P02 may stand for another error (as in the list of differences in the README);
//! - behind bytes that break the protocol: there the session ends.
//!
//! The servers behind pgweir take nothing that is malformed, and are clean whenever no client has them.

use std::cell::{Cell, RefCell};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;

use pgweir::client::{Context, Secrets, Session, Users};
use pgweir::clock::Clock;
use pgweir::net::tls::Keyring;
use pgweir::net::{Peer, Sockets, Stream};
use pgweir_config::{Config, Sources};
use pgweir_proto::encode;
use pgweir_proto::error::Fields;
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};
use pgweir_proto_fuzz::{Source, trace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, LocalOptions};

use crate::server::{Mode, Server, Transaction};

/// Clients of one experiment, at most.
const CLIENTS: usize = 3;

const DEALLOCATE: &[u8] = b"DEALLOCATE ALL";
const TEXTS: [&[u8]; 15] = [
    b"SELECT 1",
    b"SELECT 2",
    b"SELECT 1/0",
    b"SELECT 'three rows'",
    b"BEGIN",
    b"BEGIN",
    b"COMMIT",
    b"ROLLBACK",
    b"",
    b"SELEC",
    b"COPY t FROM STDIN",
    b"COPY t TO STDOUT",
    b"SELECT 5",
    b"BEGIN;SELECT 6",
    b"SELECT 7;COMMIT",
];
const NAMES: [&[u8]; 4] = [b"", b"s1", b"s2", b"a somewhat longer name of a statement"];
const PORTALS: [&[u8]; 4] = [b"", b"", b"p", b"q"];

thread_local! {
    static PLACE: (tempfile::TempDir, UnixListener) = place();
    /// Bytes that went anywhere: while it changes, things are going on.
    static MOVED: Cell<u64> = const { Cell::new(0) };
}

/// A directory with the servers' socket in it.
fn place() -> (tempfile::TempDir, UnixListener) {
    let folder = tempfile::tempdir().expect("a directory");
    let listener = UnixListener::bind(folder.path().join(".s.PGSQL.5432")).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    (folder, listener)
}

/// The experiment.
pub fn session(input: &[u8]) {
    let mut source = Source::new(input);
    let pool_size = 1 + source.below(2);
    play(pool_size, async |context, listener| {
        let servers = Servers::default();
        tokio::task::spawn_local(accept(listener, servers.clone()));
        run(&mut source, &context, &servers).await;
    });
}

/// An experiment on one thread: with a pgweir whose one pool has so many server connections, which come to the listener.
pub(crate) fn play(pool_size: usize, experiment: impl AsyncFnOnce(Rc<Context>, tokio::net::UnixListener)) {
    let runtime = Builder::new_current_thread().enable_io().event_interval(1).build_local(LocalOptions::default());
    let runtime = runtime.expect("a runtime");
    let listener = PLACE.with(|(_, listener)| listener.try_clone().expect("a socket"));
    let config = PLACE.with(|(folder, _)| config(folder.path().to_str().expect("a path"), pool_size));
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).expect("a socket");
        let secrets = Secrets::new(&config, Arc::new(Users::default())).expect("entropy");
        let config = Arc::new(config);
        let keyring = Arc::new(Keyring::load(config.clone()).expect("no files"));
        let context = Context::new(config, secrets, keyring, Clock::default(), Sockets::default());
        experiment(context.clone(), listener).await;
        assert_eq!(context.process.borrow().broken_invariants, 0);
    });
}

fn config(host: &str, pool_size: usize) -> Config {
    let text = format!(
        "[auth]\nauth_type = \"trust\"\n[pool]\ndefault_pool_size = {pool_size}\n[client]\nmax_packet_size = 100000\n\
         [log]\nlog_pooler_errors = false\nlog_connections = false\nlog_disconnections = false\n\
         [databases.app]\nhost = \"localhost\"\nport = 5432\n"
    );
    let mut config =
        Config::from_sources(Sources { file: Some(("fuzz", &text)), ..Sources::default() }).expect("a configuration");
    host.clone_into(&mut config.databases.get_mut("app").expect("its entry").host);
    config
}

// ---- the servers behind ----

/// All that have been connected to.
pub(crate) type Servers = Rc<RefCell<Vec<Rc<RefCell<Server>>>>>;

async fn accept(listener: tokio::net::UnixListener, servers: Servers) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let server = Rc::new(RefCell::new(Server::new("server")));
        servers.borrow_mut().push(server.clone());
        tokio::task::spawn_local(async move {
            let mut buf = vec![0; 16 * 1024];
            while let Ok(read @ 1..) = stream.read(&mut buf).await {
                let answer = server.borrow_mut().feed(&buf[..read]);
                moved(read + answer.len());
                if stream.write_all(&answer).await.is_err() || server.borrow().mode == Mode::Over {
                    break;
                }
            }
            trace(|| format!("server {:p} ends", &*server.borrow()));
            server.borrow_mut().mode = Mode::Over;
        });
    }
}

/// Bytes went somewhere.
pub(crate) fn moved(bytes: usize) {
    MOVED.set(MOVED.get() + bytes as u64);
}

/// Lets everybody work until nothing happens any more.
pub(crate) async fn quiet() {
    let (mut still, mut before) = (0, MOVED.get());
    while still < 12 {
        tokio::task::yield_now().await;
        still = if MOVED.get() == before { still + 1 } else { 0 };
        before = MOVED.get();
    }
}

/// What a worker does ten times a second.
pub(crate) fn tick(context: &Context) {
    context.clock.tick();
    context.registry.tick();
    for pool in context.router.pools() {
        pool.tick();
    }
}

/// Waits for something that has to happen, in real time if need be.
pub(crate) async fn until(context: &Context, mut happened: impl FnMut() -> bool) -> bool {
    for round in 0..3000 {
        if happened() {
            return true;
        }
        quiet().await;
        tick(context);
        if round > 3 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    happened()
}

// ---- the clients ----

pub(crate) struct Client {
    pub(crate) stream: Option<UnixStream>,
    /// What it has not written yet.
    pub(crate) unsent: Vec<u8>,
    /// What it heard.
    pub(crate) heard: Vec<u8>,
    pub(crate) closed: bool,
    judge: Server,
    /// What the judge says that it has to hear.
    due: Vec<u8>,
    /// It broke the protocol: what it hears from there on is not compared.
    wild: bool,
    /// The judge's COPY has come to its end: a `Sync` is next.
    sync_due: bool,
}

impl Client {
    /// Connects and logs in.
    pub(crate) async fn new(context: &Rc<Context>) -> Self {
        let (mine, theirs) = UnixStream::pair().expect("a socket pair");
        mine.set_nonblocking(true).expect("a socket");
        theirs.set_nonblocking(true).expect("a socket");
        let theirs = tokio::net::UnixStream::from_std(theirs).expect("a socket");
        tokio::task::spawn_local(Session::new(
            context.clone(),
            Stream::Unix(Sockets::default().enter(theirs).expect("a list")),
            Peer::Unix,
        ));
        let mut client = Self {
            stream: Some(mine),
            unsent: Vec::new(),
            heard: Vec::new(),
            closed: false,
            judge: Server::new("judge"),
            due: Vec::new(),
            wild: false,
            sync_due: false,
        };
        let params = [(&b"user"[..], &b"app"[..]), (b"database", b"app")];
        encode::startup(&mut client.unsent, 3 << 16, params.into_iter());
        client.judge.feed(&client.unsent);
        client.write(usize::MAX);
        let ready = until(context, || {
            client.read();
            client.heard.ends_with(b"Z\0\0\0\x05I")
        });
        let ready = ready.await;
        assert!(ready, "no login: {:?}", transcript(&client.heard));
        client.heard.clear();
        client
    }

    fn send(&mut self, message: &[u8]) {
        self.unsent.extend_from_slice(message);
        if !self.wild {
            let before = self.judge.mode;
            let answer = self.judge.feed(message);
            self.due.extend_from_slice(&answer);
            self.sync_due |= matches!(before, Mode::Copying(_)) && self.judge.mode != before;
        }
    }

    pub(crate) fn write(&mut self, most: usize) {
        let Some(stream) = &mut self.stream else { return };
        let len = self.unsent.len().min(most);
        match stream.write(&self.unsent[..len]) {
            Ok(written) => {
                moved(written);
                self.unsent.drain(..written);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.closed = true,
        }
    }

    pub(crate) fn read(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let mut buf = [0; 16 * 1024];
        loop {
            match stream.read(&mut buf) {
                Ok(0) => self.closed = true,
                Ok(read) => {
                    moved(read);
                    self.heard.extend_from_slice(&buf[..read]);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.closed = true,
            }
            return;
        }
    }

    /// One message, as a client would send it where the judge stands.
    fn act(&mut self, source: &mut Source<'_>) {
        let mut out = Vec::new();
        let kind = source.byte();
        if matches!(self.judge.mode, Mode::Copying(_)) {
            match kind % 8 {
                0 => encode::message(&mut out, b'd', |out| out.extend_from_slice(b"bad")),
                1..4 => {
                    let len = source.below(8) * source.below(200);
                    encode::message(&mut out, b'd', |out| out.resize(out.len() + len, b'x'));
                }
                4 => out.extend_from_slice(&encode::SYNC),
                5 => out.extend_from_slice(&encode::FLUSH),
                6 => encode::message(&mut out, b'c', |_| {}),
                _ => encode::message(&mut out, b'f', |out| encode::cstr(out, b"no")),
            }
            return self.send(&out);
        }
        if std::mem::take(&mut self.sync_due) {
            // The end comes even if the judge has refused the data already: the client has not heard of it. And a query, so
            // that no answer of pgweir's own gets in front of one to a Sync that the COPY may have eaten.
            encode::message(&mut out, b'c', |_| {});
            out.extend_from_slice(&encode::SYNC);
            encode::query(&mut out, b"SELECT 1");
            return self.send(&out);
        }
        if self.judge.mode == Mode::Skipping && kind % 20 < 3 {
            // Nobody sends a simple query into a batch that may have failed; pgweir takes it for one that runs.
            return self.send(&encode::SYNC);
        }
        let (name, portal, text) = (source.pick(&NAMES), source.pick(&PORTALS), source.pick(&TEXTS));
        match kind % 20 {
            0 if kind > 220 => encode::query(&mut out, DEALLOCATE),
            0..3 => encode::query(&mut out, text),
            3..6 => encode::parse(&mut out, name, text, &[0, 0]),
            6..9 => encode::message(&mut out, b'B', |out| {
                encode::cstr(out, portal);
                encode::cstr(out, name);
                out.extend_from_slice(&[0; 6]);
            }),
            9..12 => encode::message(&mut out, b'E', |out| {
                encode::cstr(out, portal);
                out.extend_from_slice(&[0, 0, 0, kind >> 7]);
            }),
            12 => target(&mut out, b'D', b'S', name),
            13 => target(&mut out, b'D', b'P', portal),
            14 => target(&mut out, b'C', b'S', name),
            15 => target(&mut out, b'C', b'P', portal),
            16 => out.extend_from_slice(&encode::FLUSH),
            17 => encode::message(&mut out, b'F', |out| out.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0])),
            18 if kind > 200 => {
                self.wild = true;
                out.extend_from_slice(source.take(usize::from(kind - 200)));
            }
            _ => out.extend_from_slice(&encode::SYNC),
        }
        self.send(&out);
    }

    /// Whether all that is due was heard, or, of a wild one, the end.
    fn is_done(&mut self) -> bool {
        self.read();
        if !self.unsent.is_empty() {
            self.write(usize::MAX);
        }
        self.closed || (!self.wild && transcript(&self.heard).len() >= transcript(&self.due).len())
    }

    /// What it heard is what was due.
    fn check(&self) {
        let (heard, due) = (transcript(&self.heard), transcript(&self.due));
        let mut open = b'I';
        for (nth, message) in heard.iter().enumerate() {
            let Some(want) = due.get(nth) else {
                let last = is_fatal(message) && nth + 1 == heard.len();
                assert!(
                    self.wild && (last || nth >= due.len()),
                    "{message:?} behind all that is due: {:?}",
                    Told(&heard)
                );
                return;
            };
            if message.0 == b'Z' {
                open = message.1[0];
            }
            let aborted = open != b'I' && code(message).as_deref() == Some("25P02") && want.0 == b'E';
            if message != want && !aborted {
                assert!(
                    self.wild && is_fatal(message),
                    "message {nth} differs\nheard {:?}\ndue   {:?}",
                    Told(&heard),
                    Told(&due)
                );
                return;
            }
        }
        if !self.wild {
            assert!(heard.len() == due.len(), "too little\nheard {:?}\ndue   {:?}", Told(&heard), Told(&due));
        }
    }
}

pub(crate) fn target(out: &mut Vec<u8>, tag: u8, kind: u8, name: &[u8]) {
    encode::message(out, tag, |out| {
        out.push(kind);
        encode::cstr(out, name);
    });
}

async fn run(source: &mut Source<'_>, context: &Rc<Context>, servers: &Servers) {
    let mut clients = Vec::new();
    for _ in 0..=source.below(CLIENTS) {
        clients.push(Client::new(context).await);
    }
    while !source.is_empty() {
        let step = source.byte();
        let count = clients.len();
        let client = &mut clients[usize::from(step >> 4) % count];
        match step % 16 {
            0..9 => client.act(source),
            9 | 10 => client.write(usize::MAX),
            11 => client.write(usize::from(source.byte())),
            12 => quiet().await,
            13 => tick(context),
            14 => client.read(),
            _ if source.below(4) == 0 => {
                // It vanishes, whatever it was doing; another one comes.
                client.read();
                client.check_so_far();
                trace(|| format!("judge {:p} vanishes", &raw const client.judge));
                client.stream = None;
                *client = Client::new(context).await;
            }
            _ => {}
        }
    }
    finish(clients, context, servers).await;
}

impl Client {
    /// As [`Client::check`], for one that does not wait for the rest.
    fn check_so_far(&mut self) {
        let (heard, due) = (transcript(&self.heard).len(), transcript(&self.due));
        if heard < due.len() {
            let len = due.iter().take(heard).map(|(_, body)| HEADER + body.len()).sum();
            self.due.truncate(len);
        }
        self.check();
    }
}

/// Every client comes to an end of its own; then everything is at rest.
async fn finish(mut clients: Vec<Client>, context: &Rc<Context>, servers: &Servers) {
    for client in &mut clients {
        // The end of the data of a COPY comes, even if the judge has refused the data already.
        if std::mem::take(&mut client.sync_due) || matches!(client.judge.mode, Mode::Copying(_)) {
            client.send(b"c\0\0\0\x04");
        }
        client.send(&encode::SYNC);
        if client.judge.transaction != Transaction::Idle {
            let mut out = Vec::new();
            encode::query(&mut out, b"ROLLBACK");
            client.send(&out);
        }
        if client.wild {
            // It may be in the middle of a message for ever, and another may wait for its server connection.
            client.write(usize::MAX);
            quiet().await;
            client.read();
            client.stream = None;
            client.closed = true;
        }
    }
    // Each has to read, so that none is in another's way.
    let done =
        until(context, || clients.iter_mut().filter_map(|client| (!client.is_done()).then_some(())).count() == 0).await;
    for client in &clients {
        client.check();
    }
    assert!(done, "some client waits for ever");
    drop(clients);
    rest(context, servers).await;
}

/// No client is left, and every server that is can serve the next one.
pub(crate) async fn rest(context: &Context, servers: &Servers) {
    let at_rest = until(context, || {
        let pools = context.router.pools();
        let idle = pools.iter().all(|pool| pool.gauges().servers_active == 0);
        let clean = servers.borrow().iter().all(|server| {
            let server = server.borrow();
            server.mode == Mode::Over || server.is_clean()
        });
        context.clients.get() == 0 && idle && clean
    });
    assert!(at_rest.await, "left behind: {} clients, servers {:?}", context.clients.get(), servers.borrow());
}

type Message = (u8, Vec<u8>);

/// The messages of a stream; what is incomplete at its end is left out. Where an error stands in the server's sources
/// is nobody's business.
pub(crate) fn transcript(bytes: &[u8]) -> Vec<Message> {
    let mut scanner = Scanner::new(u32::MAX);
    let (mut messages, mut rest) = (Vec::new(), bytes);
    while let Ok(Scanned::Whole { tag, body }) = scanner.next(rest) {
        messages.push((tag, body.to_vec()));
        rest = &rest[HEADER + body.len()..];
    }
    messages
}

fn code(message: &Message) -> Option<String> {
    let fields = Fields::parse(&message.1).ok().filter(|_| message.0 == b'E')?;
    Some(fields.sqlstate().to_string())
}

fn is_fatal(message: &Message) -> bool {
    message.0 == b'E' && Fields::parse(&message.1).is_ok_and(|fields| fields.is_fatal())
}

/// For people.
struct Told<'a>(&'a [Message]);

impl std::fmt::Debug for Told<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = self.0.iter().map(|(tag, body)| format!("{}\"{}\"", char::from(*tag), body.escape_ascii()));
        f.write_str(&words.collect::<Vec<_>>().join(" "))
    }
}
