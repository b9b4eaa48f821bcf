//! The demo's clients: what each kind does, and how it knows that an answer is its own.

use std::cell::{Cell, RefCell, RefMut};
use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, Statement};

use super::tally::{Fault, Tally};

/// Rows of the table of accounts.
pub(super) const ACCOUNTS: i32 = 1000;
/// What each account holds at the beginning.
pub(super) const OPENING_BALANCE: i64 = 1000;
/// What all accounts hold at every moment.
pub(super) const TOTAL: i64 = OPENING_BALANCE * ACCOUNTS as i64;

/// Longest time for a login or a transaction, the wait for a server connection included. Far more than
/// any takes that is not lost.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time over which the clients arrive.
const ARRIVAL_MS: Range<u64> = 0..1500;
/// Between two transactions of a busy client.
const THINKING_MS: Range<u64> = 10..90;
/// Between two visits of a client that comes and goes.
const AWAY_MS: Range<u64> = 200..800;
/// One transfer of so many is rolled back.
const ROLLED_BACK: u32 = 10;

/// What a client does all day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Single statements, simple protocol.
    Select,
    /// Transactions of several statements that move money between accounts.
    Transfer,
    /// Single prepared statements.
    Prepared,
    /// Reads on the follower.
    Follower,
    /// Connects, asks once, leaves, comes again.
    Visitor,
    /// Connects and stays, without a word.
    Idle,
}

impl Kind {
    /// Every kind, in the order of its number.
    pub(super) const ALL: [Self; 6] =
        [Self::Select, Self::Transfer, Self::Prepared, Self::Follower, Self::Visitor, Self::Idle];

    /// How many there are of it.
    pub(super) const fn clients(self) -> u32 {
        match self {
            Self::Select => 100,
            Self::Transfer => 70,
            Self::Prepared => 60,
            Self::Follower => 30,
            Self::Visitor | Self::Idle => 20,
        }
    }

    /// All clients.
    pub(super) fn total() -> u32 {
        Self::ALL.into_iter().map(Self::clients).sum()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Padded to a column where one is asked for.
        f.pad(match self {
            Self::Select => "single selects",
            Self::Transfer => "transfers",
            Self::Prepared => "prepared statements",
            Self::Follower => "reads on the follower",
            Self::Visitor => "come and go",
            Self::Idle => "idle",
        })
    }
}

/// What a client can meet that it must not.
#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    /// An error, from the server or from pgweir.
    #[error("{}", in_full(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// The answer is not the one to its question.
    #[error("{what}: answered {got}, must be {want}")]
    Answer {
        /// What was asked.
        what: &'static str,
        /// What must be answered.
        want: String,
        /// What was.
        got: String,
    },
    /// No answer at all.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Late,
}

/// The driver's own text leaves out the server's.
fn in_full(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(refusal) => format!("{} ({})", refusal.message(), refusal.code().code()),
        None => std::error::Error::source(error).map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}")),
    }
}

/// What all clients share.
pub(super) struct World {
    primary: Config,
    follower: Config,
    /// True once they shall stop.
    stopped: watch::Receiver<bool>,
    tally: RefCell<Tally>,
}

impl World {
    /// Clients connect to `primary` and `follower`, through pgweir.
    pub(super) fn new(primary: Config, follower: Config, stopped: watch::Receiver<bool>, tally: Tally) -> Self {
        Self { primary, follower, stopped, tally: RefCell::new(tally) }
    }

    /// The counts. Not to be held across an await.
    pub(super) fn tally(&self) -> RefMut<'_, Tally> {
        self.tally.borrow_mut()
    }

    fn is_stopped(&self) -> bool {
        *self.stopped.borrow()
    }

    /// Waits for a random time in `range_ms`, or until all shall stop.
    async fn pause(&self, range_ms: Range<u64>) {
        let length = Duration::from_millis(rand::random_range(range_ms));
        // Either way the pause is over.
        let _ = timeout(length, self.until_stopped()).await;
    }

    async fn until_stopped(&self) {
        // An error is a sender that is gone, which stops as well.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }
}

/// Starts every client; each ends when the world is stopped, or at its first problem.
pub(super) fn start_all(world: &Rc<World>, clients: &mut JoinSet<()>) {
    let kinds = Kind::ALL.iter().flat_map(|kind| (0..kind.clients()).map(|_| *kind));
    for (id, kind) in (1..).zip(kinds) {
        let world = Rc::clone(world);
        clients.spawn_local(async move {
            world.pause(ARRIVAL_MS).await;
            let person = Person { world: &world, kind, id, asked: 0, arrived: Cell::new(false) };
            if let Err(problem) = person.live().await {
                world.tally().fault(Fault::Client { kind, id, problem });
            }
        });
    }
}

/// One client.
struct Person<'w> {
    world: &'w World,
    kind: Kind,
    id: u32,
    /// Questions asked so far.
    asked: u32,
    /// It has logged in at least once.
    arrived: Cell<bool>,
}

impl<'w> Person<'w> {
    async fn live(mut self) -> Result<(), Problem> {
        match self.kind {
            Kind::Select => self.select().await,
            Kind::Transfer => self.transfer().await,
            Kind::Prepared => self.prepared().await,
            Kind::Follower => self.follower().await,
            Kind::Visitor => self.visit().await,
            Kind::Idle => self.idle().await,
        }
    }

    /// A number that no other question of any client has.
    fn tag(&mut self) -> i64 {
        self.asked = self.asked.wrapping_add(1);
        (i64::from(self.id) << 32) | i64::from(self.asked)
    }

    /// Runs one transaction: in time, or it is a problem; its latency is recorded.
    async fn timed<T>(&self, transaction: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
        let start = Instant::now();
        let done = timeout(PATIENCE, transaction).await.map_err(|_| Problem::Late)??;
        let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.world.tally().record(self.kind, us);
        Ok(done)
    }

    async fn connect(&self, config: &Config) -> Result<Session<'w>, Problem> {
        let connected = timeout(PATIENCE, config.connect(NoTls)).await.map_err(|_| Problem::Late)?;
        let (client, connection) = connected?;
        let mut tally = self.world.tally();
        tally.connected();
        if !self.arrived.replace(true) {
            tally.arrived += 1;
        }
        Ok(Session { client, driver: tokio::spawn(connection), _presence: Presence(self.world) })
    }

    async fn select(&mut self) -> Result<(), Problem> {
        let session = self.connect(&self.world.primary).await?;
        while !self.world.is_stopped() {
            let tag = self.tag();
            self.timed(ask(&session.client, tag)).await?;
            self.world.pause(THINKING_MS).await;
        }
        session.leave().await
    }

    async fn transfer(&mut self) -> Result<(), Problem> {
        let mut session = self.connect(&self.world.primary).await?;
        let statements = Transfer::prepare(&session.client).await?;
        while !self.world.is_stopped() {
            let tag = self.tag();
            let keep = rand::random_range(0..ROLLED_BACK) > 0;
            self.timed(statements.run(&mut session.client, tag, keep)).await?;
            if keep {
                self.world.tally().transfers += 1;
            }
            self.world.pause(THINKING_MS).await;
        }
        session.leave().await
    }

    async fn prepared(&mut self) -> Result<(), Problem> {
        let session = self.connect(&self.world.primary).await?;
        // A few texts over many clients: several clients share each.
        let addend = i64::from(self.id % 5);
        let plus = session.client.prepare(&format!("SELECT $1::int8 + {addend}")).await?;
        let echo = session.client.prepare("SELECT $1::int8, balance FROM accounts WHERE id = $2").await?;
        while !self.world.is_stopped() {
            let tag = self.tag();
            self.timed(async {
                let got: i64 = session.client.query_one(&plus, &[&tag]).await?.try_get(0)?;
                same("a prepared sum", &(tag + addend), &got)
            })
            .await?;
            let account = rand::random_range(0..ACCOUNTS);
            self.timed(async {
                let got: i64 = session.client.query_one(&echo, &[&tag, &account]).await?.try_get(0)?;
                same("a prepared look", &tag, &got)
            })
            .await?;
            self.world.pause(THINKING_MS).await;
        }
        session.leave().await
    }

    async fn follower(&mut self) -> Result<(), Problem> {
        let session = self.connect(&self.world.follower).await?;
        let sum = "SELECT $1::int8, pg_is_in_recovery(), sum(balance)::int8 FROM accounts";
        let sum = session.client.prepare(sum).await?;
        while !self.world.is_stopped() {
            let tag = self.tag();
            self.timed(async {
                let row = session.client.query_one(&sum, &[&tag]).await?;
                same("a read on the follower", &tag, &row.try_get(0)?)?;
                same("whether it is a follower", &true, &row.try_get(1)?)?;
                // One snapshot: no transfer is half done in it.
                same("the sum of all accounts", &TOTAL, &row.try_get(2)?)
            })
            .await?;
            self.world.pause(THINKING_MS).await;
        }
        session.leave().await
    }

    async fn visit(&mut self) -> Result<(), Problem> {
        while !self.world.is_stopped() {
            let tag = self.tag();
            let session = self.connect(&self.world.primary).await?;
            self.timed(ask(&session.client, tag)).await?;
            session.leave().await?;
            self.world.pause(AWAY_MS).await;
        }
        Ok(())
    }

    async fn idle(&mut self) -> Result<(), Problem> {
        let (first, last) = (self.tag(), self.tag());
        let session = self.connect(&self.world.primary).await?;
        self.timed(ask(&session.client, first)).await?;
        self.world.until_stopped().await;
        // Still there, and still served.
        self.timed(ask(&session.client, last)).await?;
        session.leave().await
    }
}

/// A client's connection.
struct Session<'w> {
    client: Client,
    driver: JoinHandle<Result<(), tokio_postgres::Error>>,
    _presence: Presence<'w>,
}

impl Session<'_> {
    /// Says goodbye and waits until the connection is closed.
    async fn leave(self) -> Result<(), Problem> {
        let Self { client, driver, _presence } = self;
        drop(client);
        match timeout(PATIENCE, driver).await {
            Ok(Ok(result)) => Ok(result?),
            // The driver is aborted by nobody and does not panic; were it so, its end is late.
            Ok(Err(_)) | Err(_) => Err(Problem::Late),
        }
    }
}

/// Counted among the clients for as long as it lives.
struct Presence<'w>(&'w World);

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.0.tally().disconnected();
    }
}

/// Asks for a number by the simple protocol.
async fn ask(client: &Client, tag: i64) -> Result<(), Problem> {
    let messages = client.simple_query(&format!("SELECT {tag}")).await?;
    let got = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    same("a select", tag.to_string().as_str(), got.unwrap_or("nothing"))
}

fn same<T: PartialEq + ToString + ?Sized>(what: &'static str, want: &T, got: &T) -> Result<(), Problem> {
    if want == got { Ok(()) } else { Err(Problem::Answer { what, want: want.to_string(), got: got.to_string() }) }
}

/// The statements of a transfer.
struct Transfer {
    change: Statement,
    look: Statement,
    note: Statement,
}

impl Transfer {
    async fn prepare(client: &Client) -> Result<Self, Problem> {
        Ok(Self {
            change: client.prepare("UPDATE accounts SET balance = balance + $1 WHERE id = $2").await?,
            look: client.prepare("SELECT $1::int8, balance FROM accounts WHERE id = $2").await?,
            note: client.prepare("INSERT INTO transfers (tag, amount) VALUES ($1, $2)").await?,
        })
    }

    /// Moves money from one account to another, or only pretends to.
    async fn run(&self, client: &mut Client, tag: i64, keep: bool) -> Result<(), Problem> {
        // The lower number first, always: two transfers never wait for each other in a circle.
        let low = rand::random_range(0..ACCOUNTS - 1);
        let high = rand::random_range(low + 1..ACCOUNTS);
        let amount = rand::random_range(-100..=100_i64);
        let transaction = client.transaction().await?;
        let changed = transaction.execute(&self.change, &[&amount, &low]).await?;
        same("accounts changed", &1, &changed)?;
        let row = transaction.query_one(&self.look, &[&tag, &low]).await?;
        same("a look inside a transfer", &tag, &row.try_get(0)?)?;
        let changed = transaction.execute(&self.change, &[&-amount, &high]).await?;
        same("accounts changed", &1, &changed)?;
        transaction.execute(&self.note, &[&tag, &amount]).await?;
        if keep {
            transaction.commit().await?;
        } else {
            transaction.rollback().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn world() -> (watch::Sender<bool>, World) {
        let (stop, stopped) = watch::channel(false);
        (stop, World::new(Config::new(), Config::new(), stopped, Tally::new().unwrap()))
    }

    #[test]
    fn no_two_questions_have_the_same_tag() {
        let (_stop, world) = world();
        let mut tags = BTreeSet::new();
        for id in [1, 2, Kind::total()] {
            let mut person = Person { world: &world, kind: Kind::Select, id, asked: 0, arrived: Cell::new(false) };
            for _ in 0..1000 {
                assert!(tags.insert(person.tag()), "client {id}");
            }
        }
    }

    #[test]
    fn every_kind_counts_under_its_own_number() {
        for (number, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number, "{kind}");
        }
    }

    #[test]
    fn a_foreign_answer_is_a_problem_that_tells_both() {
        assert!(same("a select", &7, &7).is_ok());
        let problem = same("a select", &7, &8).unwrap_err();
        assert_eq!(problem.to_string(), "a select: answered 8, must be 7");
    }

    #[test]
    fn a_pause_ends_when_all_shall_stop() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (stop, world) = world();
        runtime.block_on(async {
            stop.send(true).unwrap();
            let start = Instant::now();
            world.pause(20_000..30_000).await;
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        });
    }
}
