//! Users that are looked up on a server, by `auth_query`.
//!
//! The question runs on a connection of a pool like any other's, within the same limits, and nothing is held while it is
//! waited for. Nothing of the client but the name it gave gets there, and that as a parameter.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgweir_config::{Config, Secret};
use tokio::sync::{Semaphore, watch};

use super::recent::Recent;
use super::users::{Told, User};
use crate::backend::{Answer, SettleError, describe_error};
use crate::client::Context;
use crate::client::login::admission::lease;
use crate::pool::{Pool, Refusal};
use crate::settings::Entry;
use crate::stats::DiscardReason;

/// Users that are remembered at least, while their answer is of use.
const REMEMBERED: usize = 4096;

/// Questions on one database at once: each takes one of its server connections.
const QUESTIONS_MAX: usize = 2;

/// Users that are looked up at once, those whose turn has not come included. Whoever asks for more is told that there is
/// no answer.
const UNDER_WAY_MAX: usize = 4096;

/// Databases whose questions are counted: with a `*` database their names are the clients' choice.
const DATABASES_MAX: usize = 1024;

/// The age at which an answer is not used again after a failed login: who guesses asks the server once in that time.
const DOUBTFUL_AFTER: Duration = Duration::from_secs(1);

/// The settings of the connection while it is asked, whatever the role's are.
const PINNED: [(&str, &str); 2] = [("client_encoding", "UTF8"), ("search_path", "pg_catalog, pg_temp")];

/// The server gave no answer, or none that could be read: that is told to whoever logs in, whoever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// There is no server connection.
    NoServer,
    /// The server has no such database, whose name was the client's choice.
    NoDatabase,
    /// The query fails, or gives something else than names and secrets.
    BadQuery,
}

type Found = Result<Arc<User>, Unanswered>;

/// Where all that ask for one user are told what was found.
type Tell = watch::Sender<Option<Found>>;

/// Database and user, as clients name them.
type Key = (Box<str>, Box<str>);

/// What was found of one user.
#[derive(Debug)]
struct Known {
    user: Arc<User>,
    since: Instant,
}

/// The users that were found lately, and those that are being looked up.
#[derive(Debug)]
pub struct Lookups {
    known: RefCell<Recent<Key, Known>>,
    under_way: RefCell<HashMap<Key, watch::Receiver<Option<Found>>>>,
    turns: RefCell<Recent<Box<str>, Rc<Semaphore>>>,
    /// The last secret that was found is a SCRAM verifier.
    scram: Cell<bool>,
}

impl Default for Lookups {
    fn default() -> Self {
        Self {
            known: RefCell::new(Recent::new(REMEMBERED)),
            under_way: RefCell::default(),
            turns: RefCell::new(Recent::new(DATABASES_MAX)),
            scram: Cell::new(true),
        }
    }
}

/// Where and how the users of a database are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Inquiry {
    database: String,
    auth_user: String,
    query: String,
}

impl Inquiry {
    /// None if nobody is looked up.
    ///
    /// Users of a database that does not exist are looked up where others are: the answer must not come sooner.
    fn of(config: &Config, name: &str) -> Option<Self> {
        let some = |text: &String| (!text.is_empty()).then(|| text.clone());
        let auth = &config.auth;
        let (name, database) = match config.databases.get_key_value(name) {
            Some((name, database)) => (name.as_str(), database),
            None => match config.databases.get("*") {
                Some(database) => (name, database),
                None => config
                    .databases
                    .iter()
                    .find(|(_, database)| database.auth_user.is_some() || !auth.auth_user.is_empty())
                    .map(|(name, database)| (name.as_str(), database))?,
            },
        };
        let place = database.auth_dbname.as_ref().and_then(some).or_else(|| some(&auth.auth_dbname));
        Some(Self {
            database: place.unwrap_or_else(|| name.to_owned()),
            auth_user: database.auth_user.as_ref().and_then(some).or_else(|| some(&auth.auth_user))?,
            query: database.auth_query.clone().unwrap_or_else(|| auth.auth_query.clone()),
        })
    }
}

impl Lookups {
    /// Whether a user who is not there is asked by SCRAM, where the secret decides that.
    pub(super) fn are_scram(&self) -> bool {
        self.scram.get()
    }

    /// A login of this user failed: the secret may be a new one.
    pub(super) fn doubt(&self, database: &str, name: &str, now: Instant) {
        let key = (Box::from(database), Box::from(name));
        let mut known = self.known.borrow_mut();
        if known.get(&key).is_some_and(|known| now.saturating_duration_since(known.since) >= DOUBTFUL_AFTER) {
            known.remove(&key);
        }
    }

    fn fresh(&self, key: &Key, ttl: Duration, now: Instant) -> Option<Arc<User>> {
        let known = self.known.borrow();
        let known = known.get(key).filter(|known| now.saturating_duration_since(known.since) < ttl)?;
        Some(known.user.clone())
    }

    fn turns(&self, database: &str) -> Rc<Semaphore> {
        let mut turns = self.turns.borrow_mut();
        let key = Box::from(database);
        let own = turns.get(&key).cloned().unwrap_or_else(|| Rc::new(Semaphore::new(QUESTIONS_MAX)));
        turns.put(key, own.clone());
        own
    }
}

/// What the server of `database` knows of the user `name`. None if it is not asked.
///
/// The question is a task of its own: a client that goes away does not break it off, which would cost the server
/// connection, and all that ask for one user get one answer.
pub(super) async fn find(context: &Rc<Context>, database: &str, name: &str) -> Option<Found> {
    let inquiry = Inquiry::of(&context.config, database)?;
    let lookups = &context.lookups;
    let key: Key = (database.into(), name.into());
    if let Some(user) = lookups.fresh(&key, context.config.auth.auth_query_ttl, context.clock.now()) {
        return Some(Ok(user));
    }
    let under_way = lookups.under_way.borrow().get(&key).cloned();
    if under_way.is_none() && lookups.under_way.borrow().len() >= UNDER_WAY_MAX {
        return Some(Err(Unanswered::NoServer));
    }
    let mut answer = under_way.unwrap_or_else(|| {
        let (tell, answer) = watch::channel(None);
        lookups.under_way.borrow_mut().insert(key.clone(), answer.clone());
        let context = context.clone();
        tokio::task::spawn_local(async move {
            let found = look_up(&context, &inquiry, &key, &tell).await;
            let lookups = &context.lookups;
            if let Ok(user) = &found {
                let since = context.clock.refresh();
                lookups.known.borrow_mut().put(key.clone(), Known { user: user.clone(), since });
            }
            lookups.under_way.borrow_mut().remove(&key);
            let _ = tell.send(Some(found));
        });
        answer
    });
    let found = answer.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
    Some(found.unwrap_or(Err(Unanswered::NoServer)))
}

async fn look_up(context: &Rc<Context>, inquiry: &Inquiry, (_, name): &Key, tell: &Tell) -> Found {
    let limit = context.config.client.client_login_timeout;
    let answer = context.clock.limit(limit, ask(context, inquiry, name, tell)).await;
    let told =
        match answer.unwrap_or(Err(Unread::Unanswered(Unanswered::NoServer))).and_then(|answer| read(answer, name)) {
            Ok(told) => told,
            Err(Unread::Unanswered(unanswered)) => return Err(unanswered),
            Err(Unread::Bad(problem)) => {
                // Told to nobody: it would show that there is such a user.
                tracing::error!(
                    database = %inquiry.database, user = %name, problem, "auth_query: the user cannot log in"
                );
                Told::default()
            }
        };
    let user = context.secrets.adopt(&context.config, name, told).await;
    if user.has_secret() {
        context.lookups.scram.set(user.is_scram());
    }
    Ok(user)
}

async fn ask(context: &Rc<Context>, inquiry: &Inquiry, name: &str, tell: &Tell) -> Result<Answer, Unread> {
    let turns = context.lookups.turns(&inquiry.database);
    let _turn = turns.acquire().await;
    // One receiver is ours: all others went away before it was their turn.
    if tell.receiver_count() <= 1 {
        return Err(Unread::Unanswered(Unanswered::NoServer));
    }
    let fail = |problem: &str| {
        tracing::error!(
            database = %inquiry.database, auth_user = %inquiry.auth_user, problem, "auth_query failed"
        );
    };
    let Ok(pool) = context.router.lookup_pool(&inquiry.database, &inquiry.auth_user) else {
        fail("no such database");
        return Err(Unread::Unanswered(Unanswered::NoServer));
    };
    context.secrets.introduce(&inquiry.auth_user, &pool);
    // An idle server connection may have died unnoticed: then another one is asked, once.
    for _ in 0..2 {
        match ask_on(context, &pool, &inquiry.query, name).await {
            Asked::Answered(Answer { error: Some((code, message)), .. }) => {
                fail(&format!("{code}: {message}"));
                return Err(Unread::Unanswered(Unanswered::BadQuery));
            }
            Asked::Answered(answer) if answer.columns != 2 => {
                fail(&format!("{} columns, where name and secret are wanted", answer.columns));
                return Err(Unread::Unanswered(Unanswered::BadQuery));
            }
            Asked::Answered(answer) => return Ok(answer),
            Asked::NoDatabase if !context.config.databases.contains_key(&inquiry.database) => {
                fail("no such database on the server");
                return Err(Unread::Unanswered(Unanswered::NoDatabase));
            }
            Asked::NoDatabase | Asked::Refused => break,
            Asked::Lost => {}
        }
    }
    fail("no server connection");
    Err(Unread::Unanswered(Unanswered::NoServer))
}

/// How a question went.
enum Asked {
    Answered(Answer),
    /// There is no server connection, because the server has no such database.
    NoDatabase,
    /// There is none for another reason.
    Refused,
    /// There was one.
    Lost,
}

async fn ask_on(context: &Rc<Context>, pool: &Rc<Pool>, query: &str, name: &str) -> Asked {
    let mut loan = match lease(pool).await {
        Ok(loan) => loan,
        Err(Refusal::Hopeless { body: Some(body), .. }) if describe_error(&body).0 == "3D000" => {
            return Asked::NoDatabase;
        }
        Err(_) => return Asked::Refused,
    };
    let pinned = PINNED.map(|(name, value)| -> Entry { (name.into(), value.as_bytes().into()) });
    let pinned = pool.profiles.intern(pinned);
    let limit = context.config.pool.server_connect_timeout;
    let asked = context.clock.limit(limit, async {
        let conn = loan.conn()?;
        conn.apply(&pinned).await?.map_err(|_| SettleError)?;
        conn.ask(query, name.as_bytes(), 2).await
    });
    let Ok(Ok(answer)) = asked.await else {
        loan.discard(DiscardReason::Lost);
        return Asked::Lost;
    };
    loan.release();
    Asked::Answered(answer)
}

/// Why there is no secret.
#[derive(Debug, PartialEq, Eq)]
enum Unread {
    Unanswered(Unanswered),
    /// What is wrong with the answer for this user.
    Bad(&'static str),
}

/// What an answer of two columns says: no row is no user, and NULL no secret.
fn read(answer: Answer, name: &str) -> Result<Told, Unread> {
    let mut rows = answer.rows.into_iter();
    let Some(row) = rows.next() else { return Ok(Told::default()) };
    if rows.next().is_some() {
        return Err(Unread::Bad("more than one row"));
    }
    let Ok([found, secret]) = <[_; 2]>::try_from(row) else {
        return Err(Unread::Bad("a row without two columns"));
    };
    // Whoever it may be: it is not the one that was asked for.
    if found.as_deref() != Some(name.as_bytes()) {
        return Err(Unread::Bad("another name than the one asked for"));
    }
    let secret = secret.map(String::from_utf8).transpose().map_err(|_| Unread::Bad("a secret that is not UTF-8"))?;
    Ok(Told { exists: true, secret: secret.map(Secret::new) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_with_the_name_that_was_asked_for_gives_a_secret() {
        type Row = &'static [Option<&'static str>];
        #[rustfmt::skip]
        let table: [(&str, &[Row], Result<(bool, Option<&str>), &str>); 9] = [
            ("found",           &[&[Some("a"), Some("s")]],                      Ok((true, Some("s")))),
            ("no secret",       &[&[Some("a"), None]],                           Ok((true, None))),
            ("nobody",          &[],                                             Ok((false, None))),
            ("two",             &[&[Some("a"), Some("s")], &[Some("a"), None]],  Err("more than one row")),
            ("another",         &[&[Some("b"), Some("s")]],                      Err("another name than the one asked for")),
            ("another case",    &[&[Some("A"), Some("s")]],                      Err("another name than the one asked for")),
            ("no name",         &[&[None, Some("s")]],                           Err("another name than the one asked for")),
            ("one column",      &[&[Some("a")]],                                 Err("a row without two columns")),
            ("three columns",   &[&[Some("a"), Some("s"), None]],                Err("a row without two columns")),
        ];
        for (case, rows, want) in table {
            let row = |row: &Row| row.iter().map(|value| value.map(|value| value.as_bytes().to_vec())).collect();
            let rows = rows.iter().map(row).collect();
            let got = read(Answer { columns: 2, rows, error: None }, "a");
            let want = want.map(|(exists, secret)| Told { exists, secret: secret.map(Secret::new) });
            let want = want.map_err(Unread::Bad);
            assert_eq!(got, want, "{case}");
        }
    }

    #[test]
    fn each_databases_users_are_looked_up_where_it_says() {
        let text = "[auth]\nauth_query = \"q\"\n[databases.plain]\nhost = \"h\"\n\
                    [databases.own]\nhost = \"h\"\nauth_user = \"u\"\nauth_query = \"own\"\nauth_dbname = \"plain\"\n\
                    [users.x]\npassword = \"x\"\n";
        let inquiry = |args: &[&str], name: &str| {
            let args: Vec<String> = args.iter().map(ToString::to_string).collect();
            let sources = pgweir_config::Sources { file: Some(("f", text)), args: &args, env: &[] };
            let found = Inquiry::of(&Config::from_sources(sources).unwrap(), name)?;
            Some(format!("{} {} {}", found.database, found.auth_user, found.query))
        };
        #[rustfmt::skip]
        let table: [(&[&str], &str, Option<&str>); 6] = [
            (&[],                                      "plain",   None),
            (&[],                                      "own",     Some("plain u own")),
            (&[],                                      "unknown", Some("plain u own")),
            (&["--auth-user=g"],                       "plain",   Some("plain g q")),
            (&["--auth-user=g"],                       "own",     Some("plain u own")),
            (&["--auth-user=g", "--auth-dbname=own"],  "plain",   Some("own g q")),
        ];
        for (args, name, want) in table {
            assert_eq!(inquiry(args, name).as_deref(), want, "{args:?} {name}");
        }
    }
}
