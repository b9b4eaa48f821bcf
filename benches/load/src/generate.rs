//! The load generator: one process, one thread, one epoll loop over all clients. It sends bytes built beforehand
//! and counts answers, so that what it takes from the machine is little and the same for every contender.
//!
//! It reads one [`Order`] per line and answers each with one [`Outcome`]; the end of its input ends it. It reads the
//! pooler's CPU clock itself, at the transactions that begin and end the window.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{BufRead, Read, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::link::Link;
use crate::login::{Account, Session};
use crate::machine::{CpuTime, below};
use crate::mix::Mix;
use crate::replies::ReplyCounter;
use crate::workload::{Script, Workload};

/// With answers owed, silence for longer than this ends the run.
const STALL: Duration = Duration::from_secs(20);

/// Receive buffer shared by all clients, bytes.
const SCRATCH: usize = 256 * 1024;

/// The longest latency that is told from longer ones, nanoseconds: a minute.
const LONGEST_NS: u64 = 60_000_000_000;

/// What a generator process does for its whole life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Where its clients log in.
    pub account: Account,
    /// What they do.
    pub workload: Workload,
    /// How many there are.
    pub clients: usize,
    /// The process whose CPU clock is read at both ends of a window.
    pub watch: Option<u32>,
    /// Between the end of a client's transaction and its next. None: each follows at once.
    #[serde(default)]
    pub pause: Duration,
    /// Postmasters whose processes' CPU clocks are read, too: the primary's first, then those of followers.
    #[serde(default)]
    pub servers: Vec<u32>,
}

impl Spec {
    /// Clients that never rest, and nothing is watched.
    #[must_use]
    pub fn new(account: Account, workload: Workload, clients: usize) -> Self {
        Self { account, workload, clients, watch: None, pause: Duration::ZERO, servers: Vec::new() }
    }
}

/// One window to be run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Load before the window, not counted.
    pub warm_up: Duration,
    /// The window.
    pub window: Duration,
}

/// What the generator answers to an order, and once before the first: all clients are logged in.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All clients are logged in and set up.
    Ready,
    /// The window's figures.
    Done(Window),
    /// What went wrong; the process ends.
    Failed(String),
}

/// The figures of one window.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Window {
    /// Transactions that ended in the window.
    pub transactions: u64,
    /// Its length, seconds.
    pub seconds: f64,
    /// What the watched process used in it.
    pub cpu: Option<CpuTime>,
    /// What the processes of the first of the servers used in it, nanoseconds; 0 if none is watched.
    #[serde(default)]
    pub primary_ns: u64,
    /// What those of the others used.
    #[serde(default)]
    pub followers_ns: u64,
    /// Median time of a transaction, nanoseconds.
    pub p50_ns: u64,
    /// 99th percentile, nanoseconds.
    pub p99_ns: u64,
    /// Transactions of the whole run: warm-up, window and what was under way at its end.
    pub total_transactions: u64,
    /// Cores that other processes used on average from the warm-up to the last answer; the benchmark fills it in.
    #[serde(default)]
    pub others: f64,
}

/// Runs the generator on this process's standard input and output.
///
/// # Errors
///
/// [`Fault::Io`] if they break; other faults go out as [`Outcome::Failed`].
pub fn serve(spec: &Spec) -> Result<(), Fault> {
    let mut output = std::io::stdout().lock();
    let mut say = |outcome: &Outcome| {
        let line = serde_json::to_string(outcome).map_err(|error| Fault::Generator(error.to_string()))?;
        writeln!(output, "{line}").and_then(|()| output.flush()).map_err(Fault::io("answering an order"))
    };
    let mut load = match Load::prepare(spec) {
        Ok(load) => load,
        Err(fault) => return say(&Outcome::Failed(fault.to_string())),
    };
    say(&Outcome::Ready)?;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(Fault::io("reading an order"))?;
        let order = serde_json::from_str(&line).map_err(|error| Fault::Generator(error.to_string()))?;
        match load.run(order) {
            Ok(window) => say(&Outcome::Done(window))?,
            Err(fault) => return say(&Outcome::Failed(fault.to_string())),
        }
    }
    Ok(())
}

/// Clients ready to go.
enum Load {
    Steady(Box<Crowd>),
    Reconnect(Box<(Spec, Script)>),
}

impl Load {
    fn prepare(spec: &Spec) -> Result<Self, Fault> {
        let script = spec.workload.script()?;
        if spec.workload == Workload::Reconnect {
            return Ok(Self::Reconnect(Box::new((spec.clone(), script))));
        }
        Crowd::login(spec, script).map(|crowd| Self::Steady(Box::new(crowd)))
    }

    fn run(&mut self, order: Order) -> Result<Window, Fault> {
        match self {
            Self::Steady(crowd) => crowd.run(order),
            Self::Reconnect(how) => reconnect(&how.0, &how.1, order),
        }
    }
}

/// The clients of one epoll loop.
struct Crowd {
    poll: Poll,
    clients: Vec<Client>,
    requests: Requests,
    watch: Option<u32>,
    servers: Vec<u32>,
    pause: Duration,
    /// When a client that pauses goes on, the next one first.
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    scratch: Vec<u8>,
}

/// What clients send, and the rows that this has to bring.
struct Requests {
    script: Script,
    mix: Option<Mix>,
    rows: u64,
}

impl Requests {
    /// What is sent at this step of a transaction; none if that is over.
    fn step(&mut self, step: usize) -> Result<Option<&[u8]>, Fault> {
        let Some(bytes) = self.script.steps.get(step) else { return Ok(None) };
        if step == 0 {
            self.rows += self.script.rows;
        }
        let Some(mix) = &mut self.mix else { return Ok(Some(bytes)) };
        let (bytes, rows) = mix.request()?;
        self.rows += rows;
        Ok(Some(bytes))
    }
}

/// What a client does when it has received what there was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It waits for the rest, or for another answer.
    Waits,
    /// It may begin another transaction.
    Begins,
    /// It is done for this run.
    Rests,
}

/// One client; `step` counts the script's steps sent in this transaction, 0 when it is idle.
struct Client {
    link: Link<mio::net::TcpStream>,
    counter: ReplyCounter,
    step: usize,
    begun: Instant,
    /// Between two transactions.
    rests: bool,
}

impl Crowd {
    fn login(spec: &Spec, script: Script) -> Result<Self, Fault> {
        let poll = Poll::new().map_err(Fault::io("creating an epoll"))?;
        let mut clients = Vec::with_capacity(spec.clients);
        for number in 0..spec.clients {
            let mut session = Session::open(&spec.account)?;
            if !script.setup.is_empty() {
                session.exchange(&script.setup)?;
            }
            let mut link = session.into_link();
            link.socket().set_nonblocking(true).map_err(Fault::io("making a socket non-blocking"))?;
            let mut link = link.map(mio::net::TcpStream::from_std);
            let watched = poll.registry().register(link.socket(), Token(number), Interest::READABLE);
            watched.map_err(Fault::io("watching a socket"))?;
            clients.push(Client {
                link,
                counter: ReplyCounter::default(),
                step: 0,
                begun: Instant::now(),
                rests: !spec.pause.is_zero(),
            });
        }
        Ok(Self {
            poll,
            clients,
            requests: Requests { script, mix: spec.workload.mix(), rows: 0 },
            watch: spec.watch,
            servers: spec.servers.clone(),
            pause: spec.pause,
            due: BinaryHeap::new(),
            scratch: vec![0; SCRATCH],
        })
    }

    fn run(&mut self, order: Order) -> Result<Window, Fault> {
        let rows_before: u64 = self.clients.iter().map(|client| client.counter.rows()).sum();
        self.requests.rows = 0;
        let begun = Instant::now();
        let mut tally = Tally::begin(self.watch, self.servers.clone(), order, begun)?;
        // Those that pause come one after the other.
        let count = u32::try_from(self.clients.len()).unwrap_or(u32::MAX).max(1);
        self.due =
            (0..).zip(0..self.clients.len()).map(|(at, one)| Reverse((begun + self.pause * at / count, one))).collect();
        let mut owed = self.clients.len();
        let mut events = Events::with_capacity(1024);
        while owed > 0 {
            owed -= self.begin_due(&tally)?;
            if owed == 0 {
                break;
            }
            let until = self.due.peek().map(|Reverse((at, _))| at.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, Some(until.unwrap_or(STALL))) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.map_err(Fault::io("waiting for answers"))?,
            }
            if events.is_empty() && until.is_none() {
                return Err(Fault::Stalled { owed, for_: STALL });
            }
            for event in &events {
                let Some(client) = self.clients.get_mut(event.token().0) else { continue };
                match client.receive(&mut self.requests, &mut self.scratch, &mut tally)? {
                    Next::Waits => {}
                    Next::Begins => self.due.push(Reverse((Instant::now() + self.pause, event.token().0))),
                    Next::Rests => owed -= 1,
                }
            }
        }
        let rows: u64 = self.clients.iter().map(|client| client.counter.rows()).sum();
        check_rows(tally.total, rows - rows_before, self.requests.rows)?;
        Ok(tally.finish())
    }

    /// Lets those begin whose pause is over. Returns how many are done instead.
    fn begin_due(&mut self, tally: &Tally) -> Result<usize, Fault> {
        let mut done = 0;
        while let Some(Reverse((at, one))) = self.due.peek().copied() {
            let now = Instant::now();
            if matches!(tally.phase, Phase::Draining) {
                done += 1;
            } else if at > now {
                break;
            } else if let Some(client) = self.clients.get_mut(one) {
                client.begin(&mut self.requests, now)?;
            }
            self.due.pop();
        }
        Ok(done)
    }
}

fn check_rows(transactions: u64, rows: u64, want: u64) -> Result<(), Fault> {
    if rows == want { Ok(()) } else { Err(Fault::Rows { transactions, rows, want }) }
}

impl Client {
    /// Starts a transaction.
    fn begin(&mut self, requests: &mut Requests, now: Instant) -> Result<(), Fault> {
        self.begun = now;
        self.step = 0;
        self.send_step(requests)
    }

    fn send_step(&mut self, requests: &mut Requests) -> Result<(), Fault> {
        let Some(bytes) = requests.step(self.step)? else { return Ok(()) };
        self.step += 1;
        // Requests are a few hundred bytes and the socket's buffer is empty: one write takes all.
        self.link.write_all(bytes).map_err(Fault::io("sending a request"))
    }

    /// Reads all there is.
    fn receive(&mut self, requests: &mut Requests, scratch: &mut [u8], tally: &mut Tally) -> Result<Next, Fault> {
        loop {
            let count = match self.link.read(scratch) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(Next::Waits),
                result => result.map_err(Fault::io("receiving an answer"))?,
            };
            let Some(received) = scratch.get(..count).filter(|received| !received.is_empty()) else {
                return Err(Fault::Closed);
            };
            let ready = self.counter.feed(received)?;
            if self.counter.errors() > 0 {
                return Err(Fault::Answer(self.counter.first_error()));
            }
            if ready > 0 {
                let next = self.advance(requests, tally)?;
                if next != Next::Waits {
                    return Ok(next);
                }
            }
            // Edge-triggered: a short read has emptied the socket, and what comes later is a new event (epoll(7)).
            if count < scratch.len() && self.link.is_emptied_by_short_read() {
                return Ok(Next::Waits);
            }
        }
    }

    /// The answer to a step is complete.
    fn advance(&mut self, requests: &mut Requests, tally: &mut Tally) -> Result<Next, Fault> {
        if self.step < requests.script.steps.len() {
            self.send_step(requests)?;
            return Ok(Next::Waits);
        }
        let now = Instant::now();
        let goes_on = tally.completed(self.begun, now)?;
        if goes_on && self.rests {
            return Ok(Next::Begins);
        }
        if goes_on {
            self.begin(requests, now)?;
            return Ok(Next::Waits);
        }
        self.step = 0;
        Ok(Next::Rests)
    }
}

/// Counts transactions and watches the clock.
///
/// ```text
/// Warming ──first transaction past the warm-up──▶ Measuring ──past the window──▶ Draining
/// ```
struct Tally {
    watch: Option<u32>,
    servers: Vec<u32>,
    /// What their processes had used when the window began.
    used: Vec<u64>,
    phase: Phase,
    order: Order,
    window: Window,
    latencies: Histogram<u64>,
    total: u64,
}

#[derive(Clone, Copy)]
enum Phase {
    Warming { since: Instant },
    Measuring { since: Instant, cpu: Option<CpuTime> },
    Draining,
}

impl Tally {
    fn begin(watch: Option<u32>, servers: Vec<u32>, order: Order, now: Instant) -> Result<Self, Fault> {
        Ok(Self {
            watch,
            servers,
            used: Vec::new(),
            phase: Phase::Warming { since: now },
            order,
            window: Window::default(),
            latencies: histogram()?,
            total: 0,
        })
    }

    /// A transaction ended. True if the client may begin another.
    fn completed(&mut self, begun: Instant, now: Instant) -> Result<bool, Fault> {
        self.total += 1;
        match self.phase {
            Phase::Warming { since } if now.duration_since(since) >= self.order.warm_up => {
                self.used = self.used_by_servers()?;
                self.phase = Phase::Measuring { since: now, cpu: self.cpu()? };
            }
            Phase::Measuring { since, cpu } => {
                self.window.transactions += 1;
                let latency = u64::try_from(now.duration_since(begun).as_nanos()).unwrap_or(u64::MAX);
                self.latencies.saturating_record(latency);
                if now.duration_since(since) >= self.order.window {
                    self.window.cpu = self.cpu()?.zip(cpu).map(|(end, start)| end.since(start));
                    self.window.seconds = now.duration_since(since).as_secs_f64();
                    let now = self.used_by_servers()?;
                    let mut used = now.iter().zip(&self.used).map(|(now, before)| now.saturating_sub(*before));
                    self.window.primary_ns = used.next().unwrap_or(0);
                    self.window.followers_ns = used.sum();
                    self.phase = Phase::Draining;
                }
            }
            Phase::Warming { .. } | Phase::Draining => {}
        }
        Ok(!matches!(self.phase, Phase::Draining))
    }

    fn cpu(&self) -> Result<Option<CpuTime>, Fault> {
        self.watch.map(CpuTime::of).transpose()
    }

    fn used_by_servers(&self) -> Result<Vec<u64>, Fault> {
        self.servers.iter().map(|pid| below(*pid)).collect()
    }

    fn finish(self) -> Window {
        Window {
            p50_ns: self.latencies.value_at_quantile(0.5),
            p99_ns: self.latencies.value_at_quantile(0.99),
            total_transactions: self.total,
            ..self.window
        }
    }
}

fn histogram() -> Result<Histogram<u64>, Fault> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).map_err(|error| Fault::Generator(error.to_string()))
}

const WARMING: u8 = 0;
const MEASURING: u8 = 1;
const STOPPING: u8 = 2;

/// Blocking clients, a thread each, that log in for every transaction. The window is cut by time here: the main
/// thread sleeps and reads the clocks.
fn reconnect(spec: &Spec, script: &Script, order: Order) -> Result<Window, Fault> {
    let phase = AtomicU8::new(WARMING);
    let request = script.steps.first().map(Vec::as_slice).unwrap_or_default();
    let watched = || spec.watch.map(CpuTime::of).transpose();
    std::thread::scope(|scope| {
        let client = || visits(&spec.account, request, script.rows, &phase);
        let threads: Vec<_> = (0..spec.clients).map(|_| scope.spawn(client)).collect();
        std::thread::sleep(order.warm_up);
        // Stored whatever happens between, so that no thread is waited for in vain.
        let measured = watched().map(|before| {
            let since = Instant::now();
            phase.store(MEASURING, Ordering::Relaxed);
            std::thread::sleep(order.window);
            (before, watched(), since.elapsed())
        });
        phase.store(STOPPING, Ordering::Relaxed);
        let mut latencies = histogram()?;
        let mut total = 0;
        for thread in threads {
            let (seen, count) = thread.join().map_err(|_| Fault::Generator("a client panicked".to_owned()))??;
            latencies.add(seen).map_err(|error| Fault::Generator(error.to_string()))?;
            total += count;
        }
        let (before, after, length) = measured?;
        Ok(Window {
            transactions: latencies.len(),
            seconds: length.as_secs_f64(),
            cpu: after?.zip(before).map(|(end, start)| end.since(start)),
            p50_ns: latencies.value_at_quantile(0.5),
            p99_ns: latencies.value_at_quantile(0.99),
            total_transactions: total,
            ..Window::default()
        })
    })
}

/// One thread's visits: latencies of those that ended in the window, and the count of all.
fn visits(account: &Account, request: &[u8], rows: u64, phase: &AtomicU8) -> Result<(Histogram<u64>, u64), Fault> {
    let mut latencies = histogram()?;
    let mut count = 0;
    loop {
        let begun = Instant::now();
        let mut session = Session::open(account)?;
        let got = session.exchange(request)?;
        check_rows(1, got, rows)?;
        session.terminate()?;
        count += 1;
        match phase.load(Ordering::Relaxed) {
            MEASURING => {
                latencies.saturating_record(u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX));
            }
            STOPPING => return Ok((latencies, count)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_transactions_that_end_in_the_window_count() {
        let order = Order { warm_up: Duration::from_millis(10), window: Duration::from_millis(100) };
        let start = Instant::now();
        let mut tally = Tally::begin(Some(std::process::id()), Vec::new(), order, start).unwrap();
        let at = |millis: u64| start + Duration::from_millis(millis);
        #[rustfmt::skip]
        let table = [
            ("warming",              0,   1,   true,  0),
            ("opens the window",     0,   12,  true,  0),
            ("begun before it",      1,   20,  true,  1),
            ("in the window",        20,  60,  true,  2),
            ("closes the window",    60,  112, false, 3),
            ("was under way",        100, 130, false, 3),
        ];
        for (name, begun, now, goes_on, counted) in table {
            assert_eq!(tally.completed(at(begun), at(now)).unwrap(), goes_on, "{name}");
            assert_eq!(tally.window.transactions, counted, "{name}");
        }
        let window = tally.finish();
        assert_eq!(window.total_transactions, 6);
        assert!((window.seconds - 0.1).abs() < 1e-6, "{}", window.seconds);
        assert!(window.cpu.is_some());
        let about = |ns: u64, millis: u64| ns.abs_diff(millis * 1_000_000) < 100_000;
        assert!(about(window.p50_ns, 40) && about(window.p99_ns, 52), "{window:?}");
    }

    #[test]
    fn missing_and_surplus_rows_are_told() {
        assert!(check_rows(3, 3072, 3072).is_ok());
        assert!(matches!(check_rows(3, 3071, 3072), Err(Fault::Rows { want: 3072, .. })));
        assert!(matches!(check_rows(1, 2, 1), Err(Fault::Rows { want: 1, .. })));
    }
}
