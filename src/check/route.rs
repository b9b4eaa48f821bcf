//! `pgweir route`: where a statement of a database's clients goes, and why. What the admin console will answer to
//! `SHOW ROUTE`, from a catalog that is read for this alone.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::{Config, Database, PoolMode, ReadRouting};
use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::{Failure, Pool, complain, connect, failure, late, pools, proof, say, step};
use crate::catalog::{ROUTES, SURVEY, Survey, Suspects};
use crate::client;
use crate::net::tls::{Gear, Keyring};
use crate::net::{Sockets, TcpOptions};
use crate::settings::Profiles;
use crate::sql::Library;
use crate::stats::{Reason as _, RouteReason};

/// Says where `text` goes if a client of `database` sends it by itself, to standard output; what is amiss to standard error.
///
/// Exit code 0 if that could be told, else 1. Takes at most a minute.
#[must_use]
pub fn route(configs: &[Config], database: &str, text: &str) -> ExitCode {
    let Some(config) = configs.iter().find(|config| config.databases.contains_key(database)) else {
        let names: Vec<&str> = configs.iter().flat_map(|config| config.databases.keys()).map(String::as_str).collect();
        complain(&format!("{database}: no such database is configured. There are: {}", names.join(", ")));
        return ExitCode::FAILURE;
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot make a runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match tokio::task::LocalSet::new().block_on(&runtime, tell(config, database, text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            complain(&format!("databases.{database}: {fault}"));
            ExitCode::FAILURE
        }
    }
}

async fn tell(config: &Config, name: &str, text: &str) -> Result<(), String> {
    let start = Instant::now();
    let Some(database) = config.databases.get(name) else { return Ok(()) };
    if let Some(of) = &database.followers_of {
        say(&format!(
            "to the follower of {of} that the client was led to when it logged in, whatever the statement is\n"
        ));
        return Ok(());
    }
    let pools = pools(config);
    let pool = pools.iter().find(|pool| pool.database == name);
    let pool = pool.ok_or("no role to log in as, and no password for it, is configured")?;
    let keyring = Keyring::load(Arc::new(config.clone()))
        .map_err(|faults| faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    let keyring = Arc::new(keyring);
    let suspects = read_catalog(config, pool, &keyring, start)
        .await
        .map_err(|Failure { what, remedy }| format!("{what}. {remedy}"))?;
    let routing = database.read_routing.unwrap_or(config.followers.read_routing);
    let judge = |routing| {
        suspects.as_ref().map_or(Err(RouteReason::Unknown), |suspects| {
            let plain = Profiles::default().plain();
            client::route(text.as_bytes(), routing, &plain, suspects, &mut Library::default())
        })
    };
    let obstacle = obstacle(config, database, pool, routing);
    match obstacle {
        None => say(&sentence(judge(routing))),
        Some(obstacle) => {
            let but = sentence(judge(ReadRouting::Auto));
            say(&format!(
                "to the primary: {obstacle}\nwith followers, read_routing = auto and transaction mode: {but}"
            ));
        }
    }
    if suspects.is_none() {
        say("  the database has more functions and relations than are kept\n");
    }
    if database.followers.is_some() {
        let faults = proof::prove_of(name, config, &keyring, &pools, start).await;
        if faults.is_empty() && obstacle.is_none() && judge(routing).is_ok() {
            say("\nWhile none of them is fresh enough, as read_freshness says, it goes to the primary.\n");
        }
    }
    Ok(())
}

/// Why nothing of the database's clients goes to followers.
fn obstacle(config: &Config, database: &Database, pool: &Pool, routing: ReadRouting) -> Option<&'static str> {
    let user = config.users.get(&pool.user);
    let mode = user.and_then(|user| user.pool_mode).or(database.pool_mode).unwrap_or(config.pool.pool_mode);
    if database.followers.is_none() {
        Some("the database has no followers")
    } else if routing == ReadRouting::Off {
        Some("read_routing is off")
    } else if mode != PoolMode::Transaction {
        Some("only in transaction mode is anything led to followers")
    } else {
        None
    }
}

/// What the catalog says; none if there is too much of it.
async fn read_catalog(
    config: &Config,
    pool: &Pool,
    keyring: &Arc<Keyring>,
    start: Instant,
) -> Result<Option<Suspects>, Failure> {
    let (gear, tcp) = (Gear::new(Arc::clone(keyring)), TcpOptions::new(&config.listen, Sockets::default()));
    let client = connect(&pool.database, &pool.login, &tcp, &gear, step(config, start)).await?;
    let mut survey = Survey::with_routes();
    for question in [SURVEY, ROUTES] {
        read_rows(&client, question, step(config, start), &mut survey).await?;
    }
    Ok(survey.close())
}

async fn read_rows(client: &Client, question: &str, step: Duration, survey: &mut Survey) -> Result<(), Failure> {
    let answered = timeout(step, client.simple_query(question)).await.map_err(|_| late("no answer", step))?;
    for message in answered.map_err(|error| failure(&error))? {
        if let SimpleQueryMessage::Row(row) = message {
            survey.row((0..row.len()).map(|column| row.try_get(column).ok().flatten().map(str::as_bytes)));
        }
    }
    Ok(())
}

/// The decision as a line.
fn sentence(decided: Result<RouteReason, RouteReason>) -> String {
    let (whereto, reason) = match decided {
        Ok(reason) => ("a follower", reason),
        Err(reason) => ("the primary", reason),
    };
    format!("to {whereto} ({}): {}\n", reason.as_str(), because(reason))
}

/// Why, for people.
const fn because(reason: RouteReason) -> &'static str {
    match reason {
        RouteReason::Read => "it is known to read and to do nothing else",
        RouteReason::ReadOnly => "it begins a read-only transaction, which is there from its begin to its end",
        RouteReason::Hint => "its comment, or pgweir.route, asks for it; what a follower refuses is run on the primary",
        RouteReason::HintPrimary => "its comment, or pgweir.route, asks for it",
        RouteReason::Unknown => "it is not known what it does",
        RouteReason::Write => "it writes",
        RouteReason::Lock => "it locks rows, tables or advisory locks",
        RouteReason::Function => "it calls a function that is not known to do nothing but read",
        RouteReason::Relation => {
            "it names a relation that followers do not have or cannot read (unlogged, foreign, or not there)"
        }
        RouteReason::Server => "it asks about the server or the session, not about the data",
        RouteReason::Session => "it changes the session, or hangs on it",
        RouteReason::Serializable => "its transaction is serializable, and followers have none",
        RouteReason::Open => "its batch does not end, or is too long",
        RouteReason::Transaction => "nothing in it says that it reads and does nothing else",
        RouteReason::NoFollower => "no follower is usable",
        RouteReason::Stale => "no follower is fresh enough",
        RouteReason::Rerun => "it failed on a follower",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_told_with_its_reason() {
        assert_eq!(
            sentence(Ok(RouteReason::Read)),
            "to a follower (read): it is known to read and to do nothing else\n"
        );
        assert_eq!(sentence(Err(RouteReason::Write)), "to the primary (write): it writes\n");
    }
}
