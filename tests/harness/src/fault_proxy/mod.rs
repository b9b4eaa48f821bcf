//! A TCP proxy on loopback that breaks connections on demand.
//!
//! | module | what |
//! |---|---|
//! | this one | the handle, its thread and the listener |
//! | `relay` | one connection, both directions |

mod relay;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as std_mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::error::{Doing, HarnessError};
use crate::os;
use relay::Relay;

/// Which way bytes flow. The client is whoever connects to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the target.
    ToServer,
    /// From the target to the client.
    ToClient,
}

/// Faults of one direction.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    black_hole: bool,
    delay: Duration,
    one_byte: bool,
}

/// Faults in force, for every connection.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    to_server: Way,
    to_client: Way,
}

impl Faults {
    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    fn way_mut(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::ToServer => &mut self.to_server,
            Direction::ToClient => &mut self.to_client,
        }
    }
}

/// Counters, and what runs out while bytes flow.
#[derive(Debug, Default)]
struct Counts {
    /// Bytes written on, per direction.
    to_server: AtomicU64,
    to_client: AtomicU64,
    /// Connections ever accepted.
    accepted: AtomicU64,
    /// Bytes that may still pass before the cut; `None` when no cut is set.
    cut_to_server: Mutex<Option<u64>>,
    cut_to_client: Mutex<Option<u64>>,
}

impl Counts {
    fn bytes(&self, direction: Direction) -> &AtomicU64 {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }

    fn cut(&self, direction: Direction) -> &Mutex<Option<u64>> {
        match direction {
            Direction::ToServer => &self.cut_to_server,
            Direction::ToClient => &self.cut_to_client,
        }
    }
}

/// Orders to the proxy's thread that need its sockets; each is answered when done.
enum Order {
    CutAll,
    HalfClose(Direction),
    Vanish,
    RefuseNew(bool),
    LeadTo(SocketAddr),
    Open,
}

type Answer = std_mpsc::Sender<usize>;

/// A TCP proxy between any two parties, with its own thread and runtime, so that it works from any
/// test. Faults apply to existing and new connections alike, and a call returns when its fault is
/// in force. Dropping it resets all connections.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    faults: watch::Sender<Faults>,
    counts: Arc<Counts>,
    /// `None` only while being dropped: its end is the thread's sign to stop.
    orders: Option<mpsc::UnboundedSender<(Order, Answer)>>,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// Starts a proxy to `target` on a free port of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] without a port or a thread.
    pub fn start(target: SocketAddr) -> Result<Self, HarnessError> {
        Self::launch(target, first_listener)
    }

    /// Starts a proxy to `target` on this address of this machine: on Linux all of 127.0.0.0/8 are.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] without a thread, or if the port is taken.
    pub fn start_at(address: SocketAddr, target: SocketAddr) -> Result<Self, HarnessError> {
        Self::launch(target, || Ok((listen(address).doing("listening on", address.to_string())?, address)))
    }

    fn launch(
        target: SocketAddr,
        listener: impl FnOnce() -> Result<(TcpListener, SocketAddr), HarnessError>,
    ) -> Result<Self, HarnessError> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().doing("starting", "a runtime")?;
        let (listener, address) = {
            let _entered = runtime.enter();
            listener()?
        };
        let (faults, seen) = watch::channel(Faults::default());
        let (orders, received) = mpsc::unbounded_channel();
        let counts = Arc::new(Counts::default());
        let mut proxy = Proxy {
            address,
            target,
            listener: Some(listener),
            faults: seen,
            counts: Arc::clone(&counts),
            relays: HashMap::new(),
            tasks: JoinSet::new(),
            next: 0,
        };
        let thread = thread::Builder::new()
            .name("fault-proxy".to_owned())
            .spawn(move || runtime.block_on(proxy.run(received)))
            .doing("starting", "a thread")?;
        Ok(Self { address, faults, counts, orders: Some(orders), thread: Some(thread) })
    }

    /// Where to connect instead of the target.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Where to connect instead of the target: the port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Resets (RST) every connection on both sides.
    pub fn cut_all(&self) {
        self.order(Order::CutAll);
    }

    /// Ends one direction of every connection: its receiver sees the end of the stream, while the
    /// other direction goes on. What the sender sends from now on is not read.
    pub fn half_close(&self, direction: Direction) {
        self.order(Order::HalfClose(direction));
    }

    /// Lets nothing through in this direction, neither bytes nor the end of the stream, as a network
    /// that loses every packet: the sender's buffers fill. [`FaultProxy::heal`] delivers what was
    /// sent meanwhile, as TCP does.
    pub fn black_hole(&self, direction: Direction) {
        self.change(|faults| faults.way_mut(direction).black_hole = true);
    }

    /// Loses every packet of the connections that there are from now on, in both directions, acknowledgements and ends of
    /// streams among them: as if the other host were gone. (Of a black hole's bytes the first ones are acknowledged.) Returns
    /// when nothing is under way any more, for which whoever is connected has to read. It lasts; new connections are whole.
    pub fn vanish(&self) {
        self.order(Order::Vanish);
    }

    /// Delivers every byte this much later, in order; the rate stays.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.change(|faults| faults.way_mut(direction).delay = delay);
    }

    /// Writes every byte on its own, in both directions. A receiver that is kept from running may
    /// still find several in its buffer.
    pub fn one_byte_per_write(&self, on: bool) {
        self.change(|faults| {
            faults.to_server.one_byte = on;
            faults.to_client.one_byte = on;
        });
    }

    /// Once `bytes` more bytes have passed in this direction, over all connections, resets the
    /// connection that carried the last of them; exactly so many arrive. Then the fault is spent.
    /// With 0 the next byte's connection is reset before it.
    pub fn cut_after_bytes(&self, direction: Direction, bytes: u64) {
        let mut cut = self.counts.cut(direction).lock().unwrap_or_else(PoisonError::into_inner);
        *cut = Some(bytes);
    }

    /// Refuses new connections (the port is closed) until called with false.
    pub fn refuse_new(&self, on: bool) {
        self.order(Order::RefuseNew(on));
    }

    /// Leads new connections to another target, as a name or a balancer does after a failover; the others stay where they are.
    pub fn lead_to(&self, target: SocketAddr) {
        self.order(Order::LeadTo(target));
    }

    /// Ends all faults that last: black holes, delays, single bytes, refusal, a cut not yet spent.
    pub fn heal(&self) {
        for direction in [Direction::ToServer, Direction::ToClient] {
            let cut = self.counts.cut(direction).lock();
            *cut.unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.change(|faults| *faults = Faults::default());
        self.refuse_new(false);
    }

    /// Bytes that have been passed on in this direction.
    #[must_use]
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.counts.bytes(direction).load(Ordering::Relaxed)
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::Relaxed)
    }

    /// Connections open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.order(Order::Open)
    }

    fn change(&self, change: impl FnOnce(&mut Faults)) {
        self.faults.send_modify(change);
    }

    /// Returns when the thread has done it: a matter of microseconds.
    fn order(&self, order: Order) -> usize {
        let (answer, done) = std_mpsc::channel();
        let sent = self.orders.as_ref().map(|orders| orders.send((order, answer)));
        match sent {
            Some(Ok(())) => done.recv().unwrap_or(0),
            _ => 0,
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.cut_all();
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the proxy's thread owns.
struct Proxy {
    address: SocketAddr,
    target: SocketAddr,
    /// `None` while refusing.
    listener: Option<TcpListener>,
    faults: watch::Receiver<Faults>,
    counts: Arc<Counts>,
    relays: HashMap<u64, Arc<Relay>>,
    /// One per relay; ends with its number.
    tasks: JoinSet<u64>,
    next: u64,
}

impl Proxy {
    async fn run(&mut self, mut orders: mpsc::UnboundedReceiver<(Order, Answer)>) {
        loop {
            tokio::select! {
                order = orders.recv() => {
                    let Some((order, answer)) = order else { return };
                    let done = self.obey(order).await;
                    // The asker always waits; if it panicked, nobody needs the answer.
                    let _ = answer.send(done);
                }
                accepted = accept(self.listener.as_ref()) => {
                    if let Ok(client) = accepted {
                        self.relay(client);
                    }
                }
                Some(ended) = self.tasks.join_next() => {
                    if let Ok(number) = ended {
                        self.relays.remove(&number);
                    }
                }
            }
        }
    }

    async fn obey(&mut self, order: Order) -> usize {
        let open = self.relays.len();
        match order {
            Order::Open => {}
            Order::LeadTo(target) => self.target = target,
            Order::HalfClose(direction) => {
                for relay in self.relays.values() {
                    relay.half_close(direction);
                }
            }
            Order::Vanish => {
                for relay in self.relays.values() {
                    relay.vanish().await;
                }
            }
            Order::CutAll => {
                for relay in self.relays.values() {
                    relay.reset_on_close();
                }
                self.relays.clear();
                // Returns when every task is dropped, and with it the last handle of each socket.
                self.tasks.shutdown().await;
            }
            Order::RefuseNew(true) => self.listener = None,
            Order::RefuseNew(false) => {
                if self.listener.is_none() {
                    self.listener = listen(self.address).ok();
                }
            }
        }
        open
    }

    fn relay(&mut self, client: TcpStream) {
        self.counts.accepted.fetch_add(1, Ordering::Relaxed);
        let number = self.next;
        self.next += 1;
        let relay = Arc::new(Relay::new(client));
        self.relays.insert(number, Arc::clone(&relay));
        let (target, faults) = (self.target, self.faults.clone());
        let counts = Arc::clone(&self.counts);
        self.tasks.spawn(async move {
            relay.run(target, faults, &counts).await;
            number
        });
    }
}

/// The next client; never one while there is no listener.
async fn accept(listener: Option<&TcpListener>) -> io::Result<TcpStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

/// Listens on a port that is still free after a pause in listening (see `os::free_port`).
fn first_listener() -> Result<(TcpListener, SocketAddr), HarnessError> {
    let mut tries = 5;
    loop {
        tries -= 1;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, os::free_port()?));
        match listen(address) {
            Err(_) if tries > 0 => {}
            listener => return Ok((listener.doing("listening on", address.to_string())?, address)),
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}
