//! `pgweir demo`: a private Postgres primary and streaming follower, pgweir with a small pool before them,
//! a few hundred clients of mixed work, and a verdict.
//!
//! - `stage`: what runs: the two servers and pgweir, and how they are stopped and inspected.
//! - `clients`: what each kind of client does, and how it checks its answers.
//! - `tally`: what was counted, and every fault.
//! - `screen`: the text that is shown.
//!
//! Everything listens on loopback only, and nothing is left behind.

mod clients;
mod screen;
mod stage;
mod tally;

use std::env::{self, VarError};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_harness::HarnessError;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet, spawn_blocking};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};

use clients::{Kind, World};
use screen::{Screen, Status};
use stage::{Reading, Stage};
use tally::{Fault, Tally};

/// Names the variable that sets how long the demo runs.
const SECONDS: &str = "DEMO_SECONDS";
/// Without it, seconds.
const DEFAULT_SECONDS: u64 = 30;
/// Longest time for all clients to log in.
const ARRIVAL_LIMIT: Duration = Duration::from_mins(2);
/// Longest time for all clients to finish what they do.
const CLIENTS_LIMIT: Duration = Duration::from_secs(15);
/// Exit code of a value of `DEMO_SECONDS` that is no number.
const USAGE: u8 = 2;

/// Runs the demo for `DEMO_SECONDS` (30 without it; 0 until Ctrl-C), in the foreground.
///
/// Exit code 0 if all went well; 1 if anything was wrong: a client got an error or another's answer, the
/// pool's cap was exceeded, money appeared or vanished, or something would not stop; 2 if `DEMO_SECONDS` is
/// no number.
#[must_use]
pub fn run() -> ExitCode {
    let length = match length(env::var(SECONDS)) {
        Ok(length) => length,
        Err(value) => {
            complain(&format!("{SECONDS} = {value}: not a whole number. Give seconds, or 0 to run until Ctrl-C."));
            return ExitCode::from(USAGE);
        }
    };
    match perform(length) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain(&format!("demo failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The demo could not be performed.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    /// A server or pgweir did not start.
    #[error(transparent)]
    Harness(#[from] HarnessError),
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was under way: a verb in its -ing form.
        doing: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A histogram could not be made; its bounds are ours.
    #[error(transparent)]
    Histogram(#[from] hdrhistogram::CreationError),
    /// A thread of ours panicked.
    #[error(transparent)]
    Thread(#[from] tokio::task::JoinError),
}

/// How long to run; `None` until Ctrl-C.
fn length(variable: Result<String, VarError>) -> Result<Option<Duration>, String> {
    let seconds = match variable {
        Err(VarError::NotPresent) => DEFAULT_SECONDS,
        Err(VarError::NotUnicode(value)) => return Err(value.to_string_lossy().into_owned()),
        Ok(value) if value.is_empty() => DEFAULT_SECONDS,
        Ok(value) => value.trim().parse::<u32>().map(u64::from).map_err(|_| value)?,
    };
    Ok((seconds > 0).then_some(Duration::from_secs(seconds)))
}

fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Whether all went well.
fn perform(length: Option<Duration>) -> Result<bool, DemoError> {
    let doing = |doing| move |source| DemoError::Io { doing, source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(doing("making the demo's runtime"))?;
    LocalSet::new().block_on(&runtime, async {
        // Before anything is started, so that a Ctrl-C never leaves something behind.
        let mut interrupts = Interrupts::new().map_err(doing("listening to signals"))?;
        let mut screen = Screen::new(io::stdout().is_terminal());
        screen.say("starting a private Postgres primary and follower, and pgweir ...\n");
        let stage = Arc::new(spawn_blocking(Stage::set_up).await??);
        let (stop, stopped) = watch::channel(false);
        let (primary, follower) = stage.client_configs();
        let world = Rc::new(World::new(primary, follower, stopped, Tally::new()?));
        screen.say(&screen::banner(&stage, length));

        let mut clients = JoinSet::new();
        clients::start_all(&world, &mut clients);
        let show = Show { stage: &stage, world: &world, begin: Instant::now() };
        let in_time = show.run(&mut screen, length, &mut interrupts).await;
        let lasted = show.begin.elapsed();
        if in_time {
            world.tally().demand_work_of_all();
        }

        // Nobody listens if every client has ended by itself.
        let _ = stop.send(true);
        screen.say("stopping the clients ...\n");
        join(&world, clients).await;
        let acknowledged = world.tally().transfers;
        screen.say("checking, and stopping pgweir and the servers ...\n");
        let closing = spawn_blocking(move || stage::take_down(stage, acknowledged)).await?;
        let mut tally = world.tally();
        for fault in closing.faults {
            tally.fault(fault);
        }
        screen.say(&screen::summary(&tally, &closing.seen, lasted));
        Ok(tally.faults_total == 0)
    })
}

/// Waits for the clients, at most [`CLIENTS_LIMIT`]; then ends those that are left.
async fn join(world: &World, mut clients: JoinSet<()>) {
    let all = async {
        while let Some(joined) = clients.join_next().await {
            if let Err(error) = joined {
                world.tally().fault(Fault::Unwatched { what: format!("a client: {error}") });
            }
        }
    };
    if timeout(CLIENTS_LIMIT, all).await.is_err() {
        world.tally().fault(Fault::ClientsLate { count: clients.len() });
        clients.shutdown().await;
    }
}

/// The time between the first client and the last: a status every second.
struct Show<'a> {
    stage: &'a Arc<Stage>,
    world: &'a World,
    begin: Instant,
}

impl Show<'_> {
    /// Until `length` has passed since the last client's arrival, or somebody wants it to end; whether it
    /// was the former.
    async fn run(&self, screen: &mut Screen, length: Option<Duration>, interrupts: &mut Interrupts) -> bool {
        let mut seconds = every_second();
        seconds.tick().await;
        let mut before = (self.begin, Reading::default());
        let mut everybody = false;
        let mut until: Option<Instant> = None;
        loop {
            let left = until.map_or(ARRIVAL_LIMIT, |until| until.saturating_duration_since(Instant::now()));
            tokio::select! {
                () = interrupts.next() => return false,
                () = sleep(left), if until.is_some() => return true,
                _ = seconds.tick() => self.second(screen, &mut before).await,
            }
            if !everybody && self.has_everybody() {
                everybody = true;
                until = length.and_then(|length| Instant::now().checked_add(length));
            }
        }
    }

    /// Whether every client has logged in. One that never does is a fault, once its time is up.
    fn has_everybody(&self) -> bool {
        let missing = Kind::total().saturating_sub(self.world.tally().arrived);
        let late = self.begin.elapsed() >= ARRIVAL_LIMIT;
        if missing > 0 && late {
            self.world.tally().fault(Fault::NotArrived { count: missing });
        }
        missing == 0 || late
    }

    /// Looks around and shows what there is.
    async fn second(&self, screen: &mut Screen, before: &mut (Instant, Reading)) {
        let stage = Arc::clone(self.stage);
        let reading = spawn_blocking(move || stage.read()).await;
        let now = Instant::now();
        match reading.map_err(|error| error.to_string()) {
            Ok(Ok(reading)) => {
                screen.status(&self.status(before, now, &reading));
                *before = (now, reading);
            }
            Ok(Err(fault)) => self.world.tally().fault(fault),
            Err(what) => self.world.tally().fault(Fault::Unwatched { what }),
        }
    }

    fn status(&self, before: &(Instant, Reading), now: Instant, reading: &Reading) -> Status {
        let (then, old) = before;
        let length = now.saturating_duration_since(*then);
        let mut tally = self.world.tally();
        let period = tally.end_period();
        Status {
            elapsed: now.saturating_duration_since(self.begin),
            clients: tally.live,
            primary: reading.primary,
            follower: reading.follower,
            waiting: reading.waiting,
            waits_per_s: per_second(reading.waits.saturating_sub(old.waits), length),
            tps: per_second(period.count, length),
            p50_us: period.p50_us,
            p99_us: period.p99_us,
            faults: tally.faults_total,
        }
    }
}

/// Rounded to a whole number; 0 for a time of no length.
fn per_second(count: u64, length: Duration) -> u64 {
    let per_ms = u128::from(count) * 1000 / length.as_millis().max(1);
    u64::try_from(per_ms).unwrap_or(u64::MAX)
}

fn every_second() -> Interval {
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    seconds
}

/// What ends the demo before its time: Ctrl-C, SIGTERM, a closed terminal.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Interrupts {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_is_a_whole_number_of_seconds_and_zero_is_without_end() {
        let given = |text: &str| Ok(text.to_owned());
        let seconds = |seconds| Ok(Some(Duration::from_secs(seconds)));
        #[rustfmt::skip]
        let table = [
            ("absent",   Err(VarError::NotPresent), seconds(30)),
            ("empty",    given(""),                 seconds(30)),
            ("ten",      given("10"),               seconds(10)),
            ("zero",     given("0"),                Ok(None)),
            ("a word",   given("long"),             Err("long".to_owned())),
            ("negative", given("-1"),               Err("-1".to_owned())),
            ("a unit",   given("10s"),              Err("10s".to_owned())),
        ];
        for (name, variable, want) in table {
            assert_eq!(length(variable), want, "{name}");
        }
    }

    #[test]
    fn a_rate_is_the_count_over_the_length() {
        #[rustfmt::skip]
        let table = [(10, 2000, 5), (10, 500, 20), (7, 0, 7000), (0, 1000, 0)];
        for (count, length_ms, want) in table {
            assert_eq!(per_second(count, Duration::from_millis(length_ms)), want, "{count} in {length_ms} ms");
        }
    }
}
