//! Whether the followers that are configured are followers, by the proof that the pooler asks of them.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::Config;
use tokio_postgres::{Client, SimpleQueryRow};

use super::{Failure, Fault, Login, Pool, connect, question, say, step};
use crate::backend::WHO_ARE_YOU;
use crate::clock::Moment;
use crate::net::tls::{Gear, Keyring};
use crate::net::{Sockets, TcpOptions};
use crate::replica::{FollowerSample, Group, Incarnation, Next, Policy, Position, PrimarySample};
use crate::route::{OF_FOLLOWER, OF_PRIMARY};
use crate::stats::FollowerState;

/// Asks the primary and the followers of every database that has any, and reports on them.
pub(super) async fn prove(config: &Config, keyring: &Arc<Keyring>, pools: &[Pool], start: Instant) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (name, database) in &config.databases {
        if database.followers.is_some() && database.followers_of.is_none() {
            faults.extend(prove_of(name, config, keyring, pools, start).await);
        }
    }
    faults
}

/// The same for one database.
pub(super) async fn prove_of(
    name: &str,
    config: &Config,
    keyring: &Arc<Keyring>,
    pools: &[Pool],
    start: Instant,
) -> Vec<Fault> {
    let (gear, tcp) = (Gear::new(Arc::clone(keyring)), TcpOptions::new(&config.listen, Sockets::default()));
    let mut faults = Vec::new();
    let followers = config.databases.get(name).and_then(|database| database.followers.as_ref());
    let pool = pools.iter().find(|pool| pool.database == *name);
    let Some((followers, pool)) = followers.zip(pool) else { return faults };
    let limit = || step(config, start);
    // That it cannot be reached was said before.
    let Ok(client) = connect(name, &pool.login, &tcp, &gear, limit()).await else { return faults };
    let mut proof = Proof::new(client, followers.all().len());
    if !proof.ask_primary(limit()).await {
        say(&format!("\n{name}: the primary does not tell its position, so that nothing can be said of followers\n"));
        return faults;
    }
    for (at, follower) in followers.all().iter().enumerate() {
        let login = Login { host: follower.host.clone(), port: follower.port, ..pool.login.clone() };
        say(&format!("\n{name}, follower {}\n", follower.address()));
        let told = match connect(name, &login, &tcp, &gear, limit()).await {
            Ok(client) => proof.ask_follower(at, &client, limit()).await,
            Err(failure) => Err(failure),
        };
        let fault = |what, remedy: &str| Fault {
            place: format!("databases.{name}.followers, {}", follower.address()),
            what,
            remedy: remedy.to_owned(),
        };
        match told {
            Err(failure) => {
                say(&format!("  {}\n", failure.what));
                faults.push(fault(failure.what, failure.remedy));
            }
            Ok(()) => faults.extend(proof.verdict(at).map(|(what, remedy)| fault(what, remedy))),
        }
    }
    faults
}

/// What is known so far.
struct Proof {
    primary: Client,
    settings: String,
    group: Group,
    /// Moments are steps here.
    now: Moment,
}

impl Proof {
    fn new(primary: Client, followers: usize) -> Self {
        let group = Group::new(vec![1; followers], Policy::default());
        Self { primary, settings: String::new(), group, now: Moment::default() }
    }

    fn step(&mut self) -> Moment {
        self.now = self.now.after(1);
        self.now
    }

    /// False if it does not tell.
    async fn ask_primary(&mut self, limit: Duration) -> bool {
        let sent = self.step();
        let (Ok(life), Ok(Some(row))) =
            (life(&self.primary, limit).await, question(&self.primary, OF_PRIMARY, limit).await)
        else {
            return false;
        };
        let timeline = text(&row, 2).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let (Some(position), Some(timeline)) = (position(&row), timeline) else { return false };
        text(&row, 3).unwrap_or_default().clone_into(&mut self.settings);
        self.group.primary(&PrimarySample { sent, life, timeline, position })
    }

    async fn ask_follower(&mut self, at: usize, client: &Client, limit: Duration) -> Result<(), Failure> {
        let life = life(client, limit).await?;
        let row = question(client, OF_FOLLOWER, limit).await?;
        let row =
            row.ok_or_else(|| Failure { what: "it does not tell its position".to_owned(), remedy: super::SEE_LOG })?;
        let sample = FollowerSample {
            heard: self.step(),
            life,
            in_recovery: text(&row, 0) == Some("t"),
            timeline: text(&row, 2).and_then(|digits| digits.parse().ok()),
            position: position(&row),
            agrees: text(&row, 3) == Some(&*self.settings),
        };
        if self.group.follower(at, &sample) == Next::AskPrimary && self.ask_primary(limit).await {
            self.group.follower(at, &sample);
        }
        Ok(())
    }

    /// What speaks against it, and how to mend it.
    fn verdict(&self, at: usize) -> Option<(String, &'static str)> {
        let gauges = self.group.gauges(at, self.now);
        let (what, remedy) = match gauges.state {
            FollowerState::Serving => {
                say(&format!("  follows the primary, {} bytes behind\n", gauges.lag_bytes.unwrap_or(0)));
                return None;
            }
            FollowerState::Unshown => {
                say(
                    "  follows, and is not known to be on the primary's timeline yet: until its next restartpoint it serves \
                     read_freshness = eventual alone\n",
                );
                return None;
            }
            FollowerState::Primary => ("it follows nobody", "Name a server in recovery, or take it off the list"),
            FollowerState::OtherSystem => (
                "it is no copy of the primary: its system identifier is another one",
                "Name a follower of this primary",
            ),
            FollowerState::OtherHistory => (
                "it comes from the same system and has another history, as a fork has, and what follows one",
                "Name a follower of this primary, or make it one anew",
            ),
            FollowerState::OtherSettings => (
                "search_path, TimeZone or their like differ from the primary's, so that it would understand texts otherwise",
                "Give both the same settings, or set them for the role or the database",
            ),
            FollowerState::Twin => ("it is the same server as another one of the list", "Keep one of the two"),
            FollowerState::Unknown | FollowerState::Lagging | FollowerState::Out => {
                ("it has replayed nothing yet", "Wait until it has caught up")
            }
        };
        say(&format!("  {what}\n"));
        Some((what.to_owned(), remedy))
    }
}

async fn life(client: &Client, limit: Duration) -> Result<Rc<Incarnation>, Failure> {
    let row = question(client, WHO_ARE_YOU, limit).await?;
    let column = |at| row.as_ref().and_then(|row| text(row, at)).unwrap_or_default();
    let address = format!("{}:{}", column(2), column(3)).into();
    Ok(Rc::new(Incarnation { system_identifier: column(0).into(), started: column(1).into(), address }))
}

fn text(row: &SimpleQueryRow, column: usize) -> Option<&str> {
    row.try_get(column).ok().flatten()
}

fn position(row: &SimpleQueryRow) -> Option<Position> {
    Position::parse(text(row, 1)?.as_bytes())
}
