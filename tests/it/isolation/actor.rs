//! One client of a play: its connection, how it asks, and what it may be told.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use pgweir_harness::wire::{Message, Outcome, ServerError, Wire, WireError};

use super::Play;
use super::belongings::Owned;
use super::model::{Model, Setting};
use crate::stage::Dice;

/// Longest wait for an answer; more than the pooler's own limit on a client's wait for its turn.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a client that listens is told when the server connection that listens for it is lost, and when there is another.
const WARNINGS: [&str; 2] = [
    "the server connection that listens for this client was lost: notifications may be missed",
    "there is a server connection again that listens for this client",
];

/// Why an act ended early.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The server connection was lost, as it may be while backends are killed.
    Lost,
    /// What must not be.
    Wrong(String),
}

/// What an act comes to.
pub(crate) type Done<T = ()> = Result<T, Trouble>;

/// The end of an act with what must not be.
pub(crate) fn wrong<T>(what: impl Into<String>) -> Done<T> {
    Err(Trouble::Wrong(what.into()))
}

/// What a client did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account {
    /// Its number.
    pub(crate) client: usize,
    /// Ledger rows that it knows to be committed, and the sum of their `n`.
    pub(crate) committed: u64,
    pub(crate) committed_sum: u64,
    /// Ledger rows whose COMMIT was not answered.
    pub(crate) unknown: u64,
    /// Logins.
    pub(crate) logins: u64,
    /// Server connections lost under it.
    pub(crate) losses: u64,
    /// Cancels sent, and queries that they hit.
    pub(crate) cancels: u64,
    pub(crate) cancelled: u64,
    /// Times that it left, in whatever way.
    pub(crate) disconnects: u64,
}

impl Account {
    /// Adds another client's.
    pub(crate) fn add(&mut self, other: &Self) {
        self.committed += other.committed;
        self.unknown += other.unknown;
        self.logins += other.logins;
        self.losses += other.losses;
        self.cancels += other.cancels;
        self.cancelled += other.cancelled;
        self.disconnects += other.disconnects;
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { committed, unknown, logins, losses, cancels, cancelled, disconnects, .. } = self;
        write!(
            f,
            "{losses} clients told so, {cancels} cancels of which {cancelled} hit, {logins} logins, {disconnects} \
             disconnects, {committed} rows committed, {unknown} whose COMMIT was lost on the way"
        )
    }
}

/// One client.
pub(crate) struct Actor {
    /// What it shares with the others.
    pub(crate) play: Arc<Play>,
    /// Its number, in every tag.
    pub(crate) number: usize,
    /// Its choices.
    pub(crate) dice: Dice,
    /// It sets nothing, and so must never see anything but the server's own values: every other one of a pool.
    pub(crate) is_plain: bool,
    /// Its accounts.
    pub(crate) account: Account,
    /// What its settings must be.
    pub(crate) model: Model,
    /// Its prepared statements: name, and which text (see `acts`).
    pub(crate) statements: BTreeMap<&'static str, u64>,
    /// The last value that it took from its sequence on this connection.
    pub(crate) last_value: Option<i64>,
    /// What of its own is in its server connection.
    pub(crate) owned: Owned,
    /// It was told since it began to listen that the server connection that listens for it was lost, or that there is another.
    pub(crate) warned: bool,
    wire: Option<Wire>,
    /// How many tags it has given out.
    counter: u64,
    /// What it last sent.
    trace: VecDeque<String>,
}

impl Actor {
    /// A client that has not logged in yet.
    pub(crate) fn new(play: Arc<Play>, number: usize, dice: Dice) -> Self {
        Self {
            is_plain: number / play.databases.len() % 2 == 1,
            play,
            number,
            dice,
            account: Account { client: number, ..Account::default() },
            model: Model::default(),
            statements: BTreeMap::new(),
            last_value: None,
            owned: Owned::Nothing,
            warned: false,
            wire: None,
            counter: 0,
            trace: VecDeque::new(),
        }
    }

    /// Acts until the play is over.
    pub(crate) async fn play(mut self) -> Account {
        while self.play.goes_on() {
            let act = *self.dice.pick(&self.play.acts);
            let done = match self.enter().await {
                Ok(()) => self.act(act).await,
                Err(trouble) => Err(trouble),
            };
            match done.and_then(|()| self.check_reported()) {
                Ok(()) => {}
                Err(Trouble::Lost) => {
                    self.account.losses += 1;
                    self.leave_abruptly();
                }
                Err(Trouble::Wrong(what)) => {
                    let (number, trace) = (self.number, &self.trace);
                    self.play.violated(format!("client {number} in {act:?}: {what}\nlast sent: {trace:#?}"));
                }
            }
        }
        self.account
    }

    /// Logs in if it is not, with settings of its own.
    async fn enter(&mut self) -> Done {
        if self.wire.is_some() {
            return Ok(());
        }
        let database = self.play.databases[self.number % self.play.databases.len()].clone();
        let mut startup = vec![("user".to_owned(), self.play.name.clone()), ("database".to_owned(), database)];
        let mut values = self.play.defaults.clone();
        for setting in self.play.settings.clone() {
            if self.is_plain || !setting.is_for_startup() || self.dice.once_in(2) {
                continue;
            }
            let value = setting.value(&self.play.name, self.number, &mut self.dice);
            if setting == Setting::WorkMem {
                startup.push(("options".to_owned(), format!("-c work_mem={value}")));
            } else {
                startup.push((setting.name().to_owned(), value.clone()));
            }
            values.insert(setting, value);
        }
        self.note(format!("login {startup:?}"));
        let startup: Vec<(&str, &str)> = startup.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let mut wire = Wire::connect(self.play.addr).await.map_err(|error| self.judge(&error))?;
        wire.set_patience(PATIENCE);
        wire.login_with(&startup, self.play.password).await.map_err(|error| self.judge(&error))?;
        self.account.logins += 1;
        self.wire = Some(wire);
        self.model = Model::at_login(values);
        self.statements.clear();
        self.last_value = None;
        self.owned = Owned::Nothing;
        Ok(())
    }

    /// A tag that no query of anybody had before.
    pub(crate) fn tag(&mut self) -> String {
        self.counter += 1;
        format!("c{}.{}", self.number, self.counter)
    }

    /// A number that no row of this client's in the ledger has.
    pub(crate) fn ledger_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// The connection.
    pub(crate) fn wire(&mut self) -> Done<&mut Wire> {
        self.wire.as_mut().ok_or(Trouble::Lost)
    }

    /// Takes the connection away, to be left in some way.
    pub(crate) fn take_wire(&mut self) -> Done<Wire> {
        self.wire.take().ok_or(Trouble::Lost)
    }

    /// Vanishes with a reset.
    pub(crate) fn leave_abruptly(&mut self) {
        if let Some(wire) = self.wire.take() {
            // The connection may be gone already.
            let _ = wire.abort();
        }
    }

    /// Remembers what is sent, for the report of a violation.
    pub(crate) fn note(&mut self, what: impl Into<String>) {
        if self.trace.len() == 30 {
            self.trace.pop_front();
        }
        self.trace.push_back(what.into());
    }

    /// Sends bytes.
    pub(crate) async fn send(&mut self, what: impl Into<String>, bytes: &[u8]) -> Done {
        self.note(what);
        match self.wire()?.send(bytes).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.judge(&error)),
        }
    }

    /// Takes messages up to one with this tag.
    pub(crate) async fn receive_until(&mut self, tag: u8) -> Done<Vec<Message>> {
        match self.wire()?.recv_until(tag).await {
            Ok(messages) => {
                self.check_unasked(&messages)?;
                Ok(messages)
            }
            Err(error) => Err(self.judge(&error)),
        }
    }

    /// Takes an answer up to `ReadyForQuery`.
    pub(crate) async fn outcome(&mut self) -> Done<Outcome> {
        self.outcome_of(1).await
    }

    /// The same, to so many statements.
    pub(crate) async fn outcome_of(&mut self, statements: usize) -> Done<Outcome> {
        let messages = self.receive_until(b'Z').await?;
        self.outcome_in(&messages, statements)
    }

    /// What these messages come to, the last of which is `ReadyForQuery`.
    pub(crate) fn outcome_in(&mut self, messages: &[Message], statements: usize) -> Done<Outcome> {
        let outcome = Outcome::of(messages);
        self.play.count(outcome.status == b'I', statements);
        if outcome.sqlstate() == "08006" && self.play.kills {
            return Err(Trouble::Lost);
        }
        Ok(outcome)
    }

    /// Asks one statement in either protocol.
    pub(crate) async fn ask(&mut self, sql: &str) -> Done<Outcome> {
        self.note(sql);
        let extended = self.dice.once_in(2);
        let sent = if extended { self.wire()?.send_extended(sql).await } else { self.wire()?.send_simple(sql).await };
        if let Err(error) = sent {
            return Err(self.judge(&error));
        }
        self.outcome().await
    }

    /// Asks one statement that must succeed.
    pub(crate) async fn succeed(&mut self, sql: &str) -> Done<Outcome> {
        let outcome = self.ask(sql).await?;
        if outcome.error.is_some() { wrong(format!("{sql}: {outcome:?}")) } else { Ok(outcome) }
    }

    /// Asks one statement that must answer with this single value.
    pub(crate) async fn expect(&mut self, sql: &str, want: &str) -> Done {
        let outcome = self.ask(sql).await?;
        expect_rows(sql, &outcome, &[want])
    }

    /// Asks one statement that must fail in this way.
    pub(crate) async fn expect_error(&mut self, sql: &str, sqlstate: &str) -> Done<Outcome> {
        let outcome = self.ask(sql).await?;
        if outcome.sqlstate() == sqlstate { Ok(outcome) } else { wrong(format!("{sql}, not {sqlstate}: {outcome:?}")) }
    }

    /// What an error of the connection means.
    pub(crate) fn judge(&self, error: &WireError) -> Trouble {
        // The last word counts: errors of the client's own doing may come before it.
        let told = match error {
            WireError::Io { before, .. } | WireError::Closed { before } => {
                before.iter().filter_map(Message::server_error).next_back()
            }
            other => other.server_error(),
        };
        let sqlstate = told.as_ref().map_or("", |told| told.sqlstate());
        let lost = match error {
            // The FATAL may be lost in a reset when bytes of ours cross it.
            WireError::Io { .. } => ["", "57P01", "08006"].contains(&sqlstate),
            WireError::Closed { .. } | WireError::Refused(_) => ["57P01", "08006"].contains(&sqlstate),
            _ => false,
        };
        if lost && self.play.kills { Trouble::Lost } else { Trouble::Wrong(error.to_string()) }
    }

    /// Messages that nobody asked for: notifications must be ours.
    fn check_unasked(&mut self, messages: &[Message]) -> Done {
        let is_warning = |notice: &ServerError| notice.sqlstate() == "01000" && WARNINGS.contains(&notice.message());
        let mut notices = messages.iter().filter(|message| message.tag == b'N').filter_map(Message::server_error);
        self.warned |= notices.any(|notice| is_warning(&notice));
        for (_, channel, payload) in messages.iter().filter_map(Message::notification) {
            if channel != format!("channel{}", self.number) {
                return wrong(format!("a notification of {channel}: {payload}"));
            }
        }
        Ok(())
    }

    /// What the server reported last must be what is set.
    fn check_reported(&mut self) -> Done {
        let Some(wire) = &self.wire else {
            return Ok(());
        };
        for setting in self.play.settings.iter().filter(|setting| setting.is_reported()) {
            let (want, got) = (self.model.value(*setting), wire.parameters.get(setting.name()));
            if got.map(String::as_str) != Some(want) {
                return wrong(format!("the last ParameterStatus of {setting:?} is {got:?}, not {want:?}"));
            }
        }
        Ok(())
    }
}

/// The first columns of all rows must be these, and there must be no error.
pub(crate) fn expect_rows(sql: &str, outcome: &Outcome, want: &[&str]) -> Done {
    let got: Vec<&str> =
        outcome.rows.iter().map(|row| row.first().and_then(Option::as_deref).unwrap_or("NULL")).collect();
    if outcome.error.is_none() && got == want { Ok(()) } else { wrong(format!("{sql}, not {want:?}: {outcome:?}")) }
}

/// Sends without awaiting the answer.
trait Sends {
    async fn send_simple(&mut self, sql: &str) -> Result<(), WireError>;
    async fn send_extended(&mut self, sql: &str) -> Result<(), WireError>;
}

impl Sends for Wire {
    async fn send_simple(&mut self, sql: &str) -> Result<(), WireError> {
        self.send(&pgweir_harness::wire::build::query(sql)).await
    }

    async fn send_extended(&mut self, sql: &str) -> Result<(), WireError> {
        self.send(&super::acts::unnamed(sql, &[])).await
    }
}
