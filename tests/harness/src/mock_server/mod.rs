//! A server that plays a script on every connection: what a real Postgres cannot be made to do.

pub mod say;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use pgweir_proto::scram::{ChannelBinding, Keys, MECHANISM, ServerExchange};

use crate::error::{Doing, HarnessError};
use crate::wire::Message;

/// What a cancel request begins with in place of a protocol version.
const CANCEL_REQUEST: [u8; 4] = 80_877_102_u32.to_be_bytes();

/// One step of a script.
#[derive(Clone, Debug)]
pub enum Step {
    /// Reads a start-up packet; requests for encryption in front of it are answered N, and a cancel request in its place
    /// ends the script.
    Startup,
    /// Reads one message.
    Receive,
    /// Writes these bytes.
    Send(Vec<u8>),
    /// Writes what it makes of the body of the message read last.
    Reply(fn(&[u8]) -> Vec<u8>),
    /// SCRAM-SHA-256 from the offer to the last word, which goes through the function.
    Scram {
        /// What the client has to know.
        password: &'static str,
        /// Gives the `AuthenticationSASLFinal` that is sent.
        last: fn(Vec<u8>) -> Vec<u8>,
    },
    /// Answers every simple query with one row, "mock", until the client leaves; those about settings with none.
    Serve,
    /// Writes these bytes again and again, until the client leaves.
    Flood(Vec<u8>),
    /// Reads and says nothing, until the client leaves or says that it does.
    Hang,
    /// Reads nothing and stays open for so long, whatever the client does.
    Outlive(Duration),
    /// Resets the connection.
    Reset,
}

/// Bytes of a flood that come as fast as they are taken.
const FLOOD: usize = 64 * 1024 * 1024;

/// Plays scripts on a port of 127.0.0.1, each connection in a thread of its own. At the end of its script a connection
/// is closed. Dropping it ends all of them.
#[derive(Debug)]
pub struct MockServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    accepted: AtomicUsize,
    logins: AtomicUsize,
    open: AtomicUsize,
    most: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
    heard: Mutex<Vec<(usize, Message)>>,
}

impl MockServer {
    /// Starts one that plays `script(n)` on its connection n, counted from 0.
    ///
    /// # Errors
    ///
    /// There is no free port.
    pub fn start(script: impl Fn(usize) -> Vec<Step> + Send + 'static) -> Result<Self, HarnessError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).doing("listening on", "127.0.0.1")?;
        let address = listener.local_addr().doing("listening on", "127.0.0.1")?;
        let shared = Arc::<Shared>::default();
        let own = Arc::clone(&shared);
        let accepting = thread::spawn(move || {
            let mut players = Vec::new();
            for stream in listener.incoming() {
                if own.stop.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let number = own.accepted.fetch_add(1, Ordering::SeqCst);
                let open = own.open.fetch_add(1, Ordering::SeqCst) + 1;
                own.most.fetch_max(open, Ordering::SeqCst);
                if let Ok(copy) = stream.try_clone() {
                    locked(&own.sockets).push(copy);
                }
                let (steps, own) = (script(number), Arc::clone(&own));
                players.push(thread::spawn(move || {
                    let player = Player { number, stream: &stream, last: Vec::new(), shared: &own };
                    // An error is the client's leaving.
                    if player.play(steps).is_ok_and(|reset| reset) {
                        drop(stream);
                    } else {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                    own.open.fetch_sub(1, Ordering::SeqCst);
                }));
            }
            for player in players {
                let _ = player.join();
            }
        });
        Ok(Self { address, shared, accepting: Some(accepting) })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Logins begun so far: connections with a start-up packet.
    #[must_use]
    pub fn logins(&self) -> usize {
        self.shared.logins.load(Ordering::SeqCst)
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// The most connections that were open at once.
    #[must_use]
    pub fn most(&self) -> usize {
        self.shared.most.load(Ordering::SeqCst)
    }

    /// Every message read so far, with the number of its connection. A start-up packet has the tag 0.
    #[must_use]
    pub fn heard(&self) -> Vec<(usize, Message)> {
        locked(&self.shared.heard).clone()
    }
}

impl Drop for MockServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(5));
        for socket in locked(&self.shared.sockets).drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Player<'a> {
    number: usize,
    stream: &'a TcpStream,
    /// The body of the message read last.
    last: Vec<u8>,
    shared: &'a Shared,
}

impl Player<'_> {
    /// True if the connection is to be reset by its close.
    fn play(mut self, steps: Vec<Step>) -> io::Result<bool> {
        let _ = self.stream.set_nodelay(true);
        for step in steps {
            match step {
                Step::Startup => self.startup()?,
                Step::Receive => drop(self.receive()?),
                Step::Send(bytes) => self.send(&bytes)?,
                Step::Reply(make) => self.send(&make(&self.last))?,
                Step::Scram { password, last } => self.scram(password, last)?,
                Step::Serve => self.serve()?,
                Step::Flood(bytes) => self.flood(&bytes)?,
                Step::Outlive(time) => thread::sleep(time),
                Step::Hang => while self.receive()? != b'X' {},
                Step::Reset => {
                    let socket = socket2::SockRef::from(self.stream);
                    let _ = socket.set_linger(Some(Duration::ZERO));
                    // The copy kept for the end would hold the connection open.
                    let mine = self.stream.peer_addr().ok();
                    locked(&self.shared.sockets).retain(|other| other.peer_addr().ok() != mine);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Whoever has not left after [`FLOOD`] bytes is shown that it goes on for ever, in drops: the tests beside need the
    /// processor, too.
    fn flood(&mut self, bytes: &[u8]) -> io::Result<()> {
        let chunk = bytes.repeat((64 * 1024_usize).div_ceil(bytes.len()));
        for _ in 0..FLOOD / chunk.len() {
            self.send(&chunk)?;
        }
        loop {
            self.send(bytes)?;
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn startup(&mut self) -> io::Result<()> {
        loop {
            let body = self.body()?;
            if body.len() == 4 {
                self.send(b"N")?;
                continue;
            }
            if body.starts_with(&CANCEL_REQUEST) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            self.shared.logins.fetch_add(1, Ordering::SeqCst);
            self.note(0, &body);
            self.last = body;
            return Ok(());
        }
    }

    fn receive(&mut self) -> io::Result<u8> {
        let mut tag = [0];
        self.stream.read_exact(&mut tag)?;
        let [tag] = tag;
        self.last = self.body()?;
        self.note(tag, &self.last.clone());
        Ok(tag)
    }

    fn note(&self, tag: u8, body: &[u8]) {
        locked(&self.shared.heard).push((self.number, Message { tag, body: body.to_vec() }));
    }

    fn body(&mut self) -> io::Result<Vec<u8>> {
        let mut word = [0; 4];
        self.stream.read_exact(&mut word)?;
        let length = u32::from_be_bytes(word).saturating_sub(4) as usize;
        let mut body = vec![0; length.min(1 << 24)];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    fn scram(&mut self, password: &str, last: fn(Vec<u8>) -> Vec<u8>) -> io::Result<()> {
        let salt = b"a salt of 16 byt";
        let verifier = Keys::derive(password.as_bytes(), salt, 4096).verifier(salt, 4096);
        let mut exchange = ServerExchange::new(verifier, [7; 18], ChannelBinding::Unavailable);
        self.send(&say::auth(10, format!("{MECHANISM}\0\0").as_bytes()))?;
        self.receive()?;
        let (_, first) = self.last.split_at((MECHANISM.len() + 5).min(self.last.len()));
        let challenge = exchange.client_first(first).map_err(io::Error::other)?;
        self.send(&say::auth(11, &challenge))?;
        self.receive()?;
        let proven = exchange.client_final(&self.last).map_err(io::Error::other);
        match proven {
            Ok(proven) => self.send(&last(say::auth(12, &proven.server_final))),
            Err(error) => {
                self.send(&say::error("FATAL", "28P01", "password authentication failed"))?;
                Err(error)
            }
        }
    }

    /// Whether this is in the message read last.
    fn asks(&self, part: &[u8]) -> bool {
        self.last.windows(part.len()).any(|window| window == part)
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            match self.receive()? {
                // pgweir asks the catalog what its client has set, and what hides in functions: nothing.
                b'Q' if self.asks(b"pg_settings") || self.asks(b"pg_get_functiondef") => {
                    self.send(&[say::columns(), say::done("SELECT 0"), say::ready()].concat())?;
                }
                b'Q' => self.send(&say::answer("mock"))?,
                b'X' => return Ok(()),
                _ => {}
            }
        }
    }
}
