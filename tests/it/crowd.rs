//! A steady load for the tests of budgets: clients on one thread, each with one request under way. Requests are built
//! beforehand and every answer is checked.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pgweir_harness::wire::build;
use rustls::version::TLS13;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::support::SOON;
use crate::tls::client;

/// The name of the statement that [`Script::prepared`] prepares.
const STATEMENT: &str = "s0";

/// What is sent at once, and the tags of the messages that must answer it.
type Step = (Vec<u8>, &'static [u8]);

/// What each client does over and over.
#[derive(Debug)]
pub(crate) struct Script {
    /// Once per client, before its first transaction.
    setup: Option<Step>,
    /// One transaction.
    steps: Vec<Step>,
    /// The next transaction instead, the first again behind the last; empty if all are alike.
    turns: Vec<Step>,
}

impl Script {
    /// `SELECT 1` as a simple query.
    pub(crate) fn simple() -> Self {
        Self { steps: vec![(build::query("SELECT 1"), b"TDCZ")], ..Self::empty() }
    }

    /// `BEGIN`, `SELECT 1`, `COMMIT`, a round trip each.
    pub(crate) fn transaction() -> Self {
        let step = |sql: &str, answer: &'static [u8]| (build::query(sql), answer);
        let steps = vec![step("BEGIN", b"CZ"), step("SELECT 1", b"TDCZ"), step("COMMIT", b"CZ")];
        Self { steps, ..Self::empty() }
    }

    /// `SELECT 1` as Parse (unnamed), Bind, Describe, Execute, Sync.
    pub(crate) fn extended() -> Self {
        let parts = [
            build::parse("", "SELECT 1", &[]),
            build::bind("", "", &[]),
            build::describe_portal(""),
            build::execute("", 0),
            build::sync(),
        ];
        Self { steps: vec![(parts.concat(), b"12TDCZ")], ..Self::empty() }
    }

    /// `SELECT 1` as Bind, Execute, Sync of a statement prepared once per client; all give it the same name.
    pub(crate) fn prepared() -> Self {
        let prepare = [build::parse(STATEMENT, "SELECT 1", &[]), build::sync()].concat();
        let run = [build::bind("", STATEMENT, &[]), build::execute("", 0), build::sync()].concat();
        Self { setup: Some((prepare, b"1Z")), steps: vec![(run, b"2DCZ")], ..Self::empty() }
    }

    /// Nine reads and a write of ten of [`ACCOUNTS`] by the key, each with another literal than the thousands before.
    pub(crate) fn literals() -> Self {
        let step = |aid: u32| -> Step {
            match aid % 10 {
                0 => (build::query(&format!("UPDATE accounts SET balance = balance + 17 WHERE aid = {aid}")), b"CZ"),
                _ => read(aid),
            }
        };
        Self { turns: (1..=ROWS).map(step).collect(), ..Self::empty() }
    }

    /// Reads alone.
    #[cfg(feature = "grammar")]
    pub(crate) fn reads() -> Self {
        Self { turns: (1..=ROWS).map(read).collect(), ..Self::empty() }
    }

    /// Reads and writes by statements that were prepared once per client.
    pub(crate) fn parameters() -> Self {
        let prepare = [
            build::parse("read", "SELECT aid, balance FROM accounts WHERE aid = $1", &[]),
            build::parse("write", "UPDATE accounts SET balance = balance + 17 WHERE aid = $1", &[]),
            build::sync(),
        ];
        let step = |aid: u32| -> Step {
            let (name, want) = if aid.is_multiple_of(10) { ("write", &b"2CZ"[..]) } else { ("read", &b"2DCZ"[..]) };
            let bind = build::bind("", name, &[Some(aid.to_string().as_bytes())]);
            ([bind, build::execute("", 0), build::sync()].concat(), want)
        };
        let setup = Some((prepare.concat(), &b"11Z"[..]));
        Self { setup, turns: (1..=ROWS).map(step).collect(), ..Self::empty() }
    }

    const fn empty() -> Self {
        Self { setup: None, steps: Vec::new(), turns: Vec::new() }
    }

    /// The steps of a transaction.
    fn steps_of(&self, number: usize) -> impl Iterator<Item = &Step> {
        let turn = number.checked_rem(self.turns.len()).and_then(|at| self.turns.get(at));
        self.steps.iter().chain(turn)
    }
}

fn read(aid: u32) -> Step {
    (build::query(&format!("SELECT aid, balance FROM accounts WHERE aid = {aid}")), b"TDCZ")
}

/// Makes the table that they are about.
pub(crate) const ACCOUNTS: &str = "CREATE TABLE accounts (aid int PRIMARY KEY, balance int NOT NULL) WITH (fillfactor = 50); \
    INSERT INTO accounts SELECT aid, 0 FROM generate_series(1, 5000) aid";

/// Its rows: more than there are texts in any cache of texts.
const ROWS: u32 = 5000;

/// Logged-in clients.
#[derive(Debug)]
pub(crate) struct Crowd(Vec<Client>);

impl Crowd {
    /// Logs in `clients` trusted clients, one after the other, and has each run the script's setup and one transaction.
    pub(crate) async fn gather(addr: SocketAddr, name: &str, clients: usize, script: &Script) -> Self {
        Self::gather_with(Way::Plain, addr, name, clients, script).await
    }

    /// The same by another way.
    pub(crate) async fn gather_with(way: Way, addr: SocketAddr, name: &str, clients: usize, script: &Script) -> Self {
        let mut all = Vec::with_capacity(clients);
        for _ in 0..clients {
            let mut client = Client::log_in(way, addr, name).await;
            for step in script.setup.iter().chain(script.steps_of(0)) {
                client.exchange(step).await;
            }
            all.push(client);
        }
        Self(all)
    }

    /// Runs that many transactions in all; each client begins the next when its last has ended. Gives the script back.
    pub(crate) async fn run(&mut self, script: Script, transactions: usize) -> Script {
        let left = Arc::new(AtomicUsize::new(transactions));
        let script = Arc::new(script);
        let mut working = JoinSet::new();
        for mut client in self.0.drain(..) {
            let (left, script) = (Arc::clone(&left), Arc::clone(&script));
            working.spawn(async move {
                let take = |left: usize| left.checked_sub(1);
                while let Ok(number) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
                    for step in script.steps_of(number) {
                        client.exchange(step).await;
                    }
                }
                client
            });
        }
        // The time limit stands around the whole: one per request would cost more than the request.
        let all = timeout(SOON * 3, working.join_all()).await;
        self.0 = all.unwrap_or_else(|_| panic!("{} of {transactions} not begun", left.load(Ordering::Relaxed)));
        Arc::into_inner(script).expect("the clients gave it back")
    }
}

/// How a client comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Plain,
    /// With TLS 1.3.
    Tls,
    /// With version 3.2 of the protocol, and so with a long key.
    Newest,
}

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + std::fmt::Debug {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + std::fmt::Debug> Duplex for S {}

#[derive(Debug)]
struct Client {
    stream: Box<dyn Duplex>,
    buffer: Vec<u8>,
}

impl Client {
    async fn log_in(way: Way, addr: SocketAddr, name: &str) -> Self {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let stream: Box<dyn Duplex> = if way == Way::Tls { Box::new(encrypt(stream).await) } else { Box::new(stream) };
        let mut client = Self { stream, buffer: Vec::new() };
        let minor = if way == Way::Newest { 2 } else { 0 };
        let startup = build::startup_version(3, minor, &[("user", name), ("database", name)]);
        client.stream.write_all(&startup).await.unwrap();
        let tags = timeout(SOON, client.answer()).await.expect("a login");
        assert!(tags.starts_with(b"R") && tags.ends_with(b"KZ"), "{}", tags.escape_ascii());
        // Thousands of clients may be idle here; what they are measured for is not this memory, but it is memory.
        client.buffer.shrink_to(256);
        client
    }

    async fn exchange(&mut self, (request, want): &Step) {
        self.stream.write_all(request).await.unwrap();
        let tags = self.answer().await;
        assert!(tags == *want, "{}: {}", tags.escape_ascii(), self.buffer.escape_ascii());
    }

    /// The tags of all messages up to the next `ReadyForQuery`.
    async fn answer(&mut self) -> Vec<u8> {
        let (mut tags, mut at) = (Vec::with_capacity(8), 0);
        self.buffer.clear();
        loop {
            assert!(
                self.stream.read_buf(&mut self.buffer).await.unwrap() > 0,
                "closed: {}",
                self.buffer.escape_ascii()
            );
            while let Some((&[tag, a, b, c, d], _)) = self.buffer.get(at..).and_then(<[u8]>::split_first_chunk) {
                let end = at + 1 + u32::from_be_bytes([a, b, c, d]) as usize;
                if end > self.buffer.len() {
                    break;
                }
                tags.push(tag);
                at = end;
            }
            if tags.last() == Some(&b'Z') && at == self.buffer.len() {
                return tags;
            }
        }
    }
}

async fn encrypt(mut stream: TcpStream) -> impl Duplex {
    stream.write_all(&build::ssl_request()).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'S');
    let connector = TlsConnector::from(client::config(&["postgresql"], &[&TLS13]));
    let connecting = connector.connect("localhost".try_into().unwrap(), stream);
    timeout(SOON * 3, connecting).await.expect("a handshake").unwrap()
}
