//! `pgweir check`: shows every setting and its origin, logs in to each database as the pools would, and
//! says which limits bind there and whether the pools fit under them.
//!
//! Followers have to prove that they are: see `proof`.
//!
//! It opens one connection at a time, and each for moments: the servers it asks are in use.

mod proof;
mod route;

use std::error::Error;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use pgweir_config::{Config, Origin};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tokio_postgres::{NoTls, SimpleQueryMessage, SimpleQueryRow};

use crate::backend::Source;
use crate::net::tls::{Gear, Keyring};
use crate::net::{Sockets, Stream, TcpOptions};
use crate::observe::Excerpt;
use crate::route::source;

pub use route::route;

/// Longest time for everything together.
const WHOLE_LIMIT: Duration = Duration::from_mins(1);
/// Longest time for one login or one query; a shorter `server_connect_timeout` wins.
const STEP_LIMIT: Duration = Duration::from_secs(5);
/// How the connections of a check call themselves, and so how they leave themselves out of the counts.
const APPLICATION_NAME: &str = "pgweir check";
/// The database entry for names that only clients know.
const FALLBACK: &str = "*";

/// Checks `config` against the servers that it names. The report goes to standard output, the faults, one
/// per line, to standard error.
///
/// Exit code 0 without faults, else 1. Takes at most a minute.
#[must_use]
pub fn run(config: &Config) -> ExitCode {
    say(&settings_text(config));
    let pools = pools(config);
    for note in unchecked(config) {
        say(&format!("note: {note}\n"));
    }
    let keyring = match Keyring::load(Arc::new(config.clone())) {
        Ok(keyring) => Arc::new(keyring),
        Err(faults) => {
            for fault in faults {
                complain(&fault.to_string());
            }
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot make a runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let tries = async {
        let start = Instant::now();
        let mut faults = try_logins(config, &keyring, &pools, start).await;
        faults.extend(proof::prove(config, &keyring, &pools, start).await);
        faults
    };
    let faults = tokio::task::LocalSet::new().block_on(&runtime, tries);
    say(&match faults.len() {
        0 => "\nno faults\n".to_owned(),
        1 => "\n1 fault\n".to_owned(),
        many => format!("\n{many} faults\n"),
    });
    for fault in &faults {
        complain(&fault.to_string());
    }
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes to standard output; a reader that has gone away is no reason to fail.
fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// One line per setting: key, value, origin. Secrets are masked.
fn settings_text(config: &Config) -> String {
    let lines: Vec<(String, Origin)> =
        config.describe().map(|setting| (format!("{} = {}", setting.key, setting.value), setting.origin)).collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0).min(60);
    let mut text = String::new();
    for (line, origin) in lines {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line:width$}  ({origin})");
    }
    text
}

/// One pool that the configuration can lead to: a database and a user as clients name them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pool {
    database: String,
    user: String,
    login: Login,
    /// Server connections that it may open, the reserve included.
    size: u64,
    /// `max_db_connections` of the database over all its pools; `None` without.
    database_limit: Option<u64>,
    /// `max_user_connections` of the user over all its pools; `None` without.
    user_limit: Option<u64>,
}

/// Where and as whom a pool logs in.
#[derive(Clone, PartialEq, Eq)]
struct Login {
    host: String,
    port: u16,
    dbname: String,
    role: String,
    source: Source,
}

impl fmt::Display for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, dbname, role, source: _ } = self;
        write!(f, "{host}:{port}, database {}, role {}", Excerpt::of(dbname), Excerpt::of(role))
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Login {
    fn same_server(&self, other: &Self) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }

    fn same_role(&self, other: &Self) -> bool {
        self.same_server(other) && self.role == other.role
    }

    fn same_database(&self, other: &Self) -> bool {
        self.same_server(other) && self.dbname == other.dbname
    }
}

/// Every pool of a named database and a configured user that can log in to the server: the role is forced,
/// or the user's password is known. Without configured users, a forced role stands for whoever comes.
fn pools(config: &Config) -> Vec<Pool> {
    let limit = |limit: u32| (limit > 0).then_some(u64::from(limit));
    let mut pools = Vec::new();
    for (name, database) in config.databases.iter().filter(|(name, _)| *name != FALLBACK) {
        let stranger = config.users.is_empty().then_some(database.user.as_deref()).flatten();
        for user in config.users.keys().map(String::as_str).chain(stranger) {
            let own = config.users.get(user);
            let source = source(config, name, user, database);
            if database.user.is_none() && source == Source::None {
                continue;
            }
            let size = own.and_then(|own| own.pool_size).or(database.pool_size);
            let reserve = database.reserve_pool_size.unwrap_or(config.pool.reserve_pool_size);
            let max_user = own.and_then(|own| own.max_user_connections);
            pools.push(Pool {
                database: name.clone(),
                user: user.to_owned(),
                login: Login {
                    host: database.host.clone(),
                    port: database.port,
                    dbname: database.dbname.clone().unwrap_or_else(|| name.clone()),
                    role: database.user.clone().unwrap_or_else(|| user.to_owned()),
                    source,
                },
                size: u64::from(size.unwrap_or(config.pool.default_pool_size)) + u64::from(reserve),
                database_limit: limit(database.max_db_connections.unwrap_or(config.pool.max_db_connections)),
                user_limit: limit(max_user.unwrap_or(config.pool.max_user_connections)),
            });
        }
    }
    pools
}

/// What this check leaves out, and why.
fn unchecked(config: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, database) in &config.databases {
        if name == FALLBACK {
            notes.push("databases.* answers for names that only clients know; it is not tried".to_owned());
        } else if database.user.is_none() {
            let unknown = |user: &&String| source(config, name, user, database) == Source::None;
            let users: Vec<_> = config.users.keys().filter(unknown).collect();
            if config.users.is_empty() {
                notes.push(format!("databases.{name}: no role to log in as is configured; it is not tried"));
            }
            for user in users {
                notes.push(format!("databases.{name}, users.{user}: no plain password for the server; not tried"));
            }
        }
    }
    notes
}

/// Server connections that the pools may have open together, at most.
fn at_most<'a>(pools: &(impl Iterator<Item = &'a Pool> + Clone)) -> u64 {
    let capped = |key: fn(&Pool) -> &str, limit: fn(&Pool) -> Option<u64>| {
        let mut sums = std::collections::BTreeMap::<&str, (u64, Option<u64>)>::new();
        for pool in pools.clone() {
            let (sum, _) = sums.entry(key(pool)).or_insert((0, limit(pool)));
            *sum = sum.saturating_add(pool.size);
        }
        let sums = sums.values().map(|(sum, limit)| limit.map_or(*sum, |limit| limit.min(*sum)));
        sums.fold(0, u64::saturating_add)
    };
    let by_database = capped(|pool| &pool.database, |pool| pool.database_limit);
    let by_user = capped(|pool| &pool.user, |pool| pool.user_limit);
    by_database.min(by_user)
}

/// Something that will not work: what, where, how to mend it; one line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    place: String,
    what: String,
    remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}. {}", self.place, self.what, self.remedy)
    }
}

/// Tries every distinct login, one after the other, and reports on it.
async fn try_logins(config: &Config, keyring: &Arc<Keyring>, pools: &[Pool], start: Instant) -> Vec<Fault> {
    let gear = Gear::new(Arc::clone(keyring));
    let tcp = TcpOptions::new(&config.listen, Sockets::default());
    let mut faults = Vec::new();
    // Limits of a server, a database and a role are each reported once.
    let mut told: Vec<(Scope, &Login)> = Vec::new();
    let mut tried: Vec<&Login> = Vec::new();
    for Pool { database, login, .. } in pools {
        if tried.contains(&login) {
            continue;
        }
        tried.push(login);
        say(&format!("\n{database} ({login})\n"));
        match ask(database, login, &tcp, &gear, step(config, start)).await {
            Err(failure) => {
                say(&format!("  {}\n", failure.what));
                let place = format!("databases.{database} ({login})");
                faults.push(Fault { place, what: failure.what, remedy: failure.remedy.to_owned() });
            }
            Ok(facts) => {
                say(&facts_text(&facts, login, pools));
                for (scope, fault) in misfits(&facts, login, pools) {
                    if !told.iter().any(|(said, of)| *said == scope && scope.same(of, login)) {
                        told.push((scope, login));
                        faults.push(fault);
                    }
                }
            }
        }
    }
    faults
}

/// How long the next step may take.
fn step(config: &Config, start: Instant) -> Duration {
    let left = WHOLE_LIMIT.saturating_sub(start.elapsed());
    STEP_LIMIT.min(config.pool.server_connect_timeout).min(left)
}

/// Why a login or its question got no answer.
struct Failure {
    what: String,
    remedy: &'static str,
}

/// What a server says of itself to one role in one database.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    version: String,
    in_recovery: bool,
    superuser: bool,
    /// `pg_roles.rolconnlimit`; `None` for no limit, as for a superuser.
    role_limit: Option<u64>,
    /// `pg_database.datconnlimit`, likewise.
    database_limit: Option<u64>,
    max_connections: u64,
    /// What of `max_connections` this role cannot have.
    reserved: u64,
    /// Client connections now, without those of this check.
    server_use: u64,
    database_use: u64,
    role_use: u64,
}

/// Sources: the Postgres manual, "Connections and Authentication" (`max_connections`,
/// `superuser_reserved_connections`, since 16 `reserved_connections`), "`pg_roles`", "`pg_database`" (-1 is no
/// limit), "`pg_stat_activity`" (much of it is hidden from other roles, `datid` and `usesysid` are not).
const QUESTION: &str = "\
    WITH a AS (SELECT datid, usesysid FROM pg_catalog.pg_stat_activity \
               WHERE datid IS NOT NULL AND usesysid IS NOT NULL \
               AND coalesce(backend_type, 'client backend') = 'client backend' \
               AND coalesce(application_name, '') <> 'pgweir check') \
    SELECT current_setting('server_version'), pg_catalog.pg_is_in_recovery(), r.rolsuper, \
           r.rolconnlimit, d.datconnlimit, current_setting('max_connections'), \
           current_setting('superuser_reserved_connections'), \
           coalesce(current_setting('reserved_connections', true), '0'), \
           (SELECT count(*) FROM a), (SELECT count(*) FROM a WHERE datid = d.oid), \
           (SELECT count(*) FROM a WHERE usesysid = r.oid) \
    FROM pg_catalog.pg_roles r, pg_catalog.pg_database d \
    WHERE r.rolname = session_user AND d.datname = current_database()";

/// Logs in, asks, and leaves. Each of the steps takes at most `step`.
async fn ask(entry: &str, login: &Login, tcp: &TcpOptions, gear: &Gear, step: Duration) -> Result<Facts, Failure> {
    let client = connect(entry, login, tcp, gear, step).await?;
    let row = question(&client, QUESTION, step).await?;
    let garbled = Failure { what: "the server's catalog gave no answer".to_owned(), remedy: SEE_LOG };
    row.as_ref().and_then(read_facts).ok_or(garbled)
}

async fn connect(
    entry: &str,
    login: &Login,
    tcp: &TcpOptions,
    gear: &Gear,
    step: Duration,
) -> Result<tokio_postgres::Client, Failure> {
    let mut config = tokio_postgres::Config::new();
    config.host(&login.host).port(login.port).dbname(&login.dbname).user(&login.role);
    // TLS, if any, is under the driver's feet.
    config.ssl_mode(tokio_postgres::config::SslMode::Disable);
    config.application_name(APPLICATION_NAME);
    let fetched = login.source.fetch().await;
    let fetched =
        fetched.map_err(|what| Failure { what, remedy: "Mend the file or the command, and its permissions" })?;
    if let Some(password) = fetched {
        config.password(password);
    }
    let connector = gear.keys().connector(entry);
    let connector = connector.ok_or(Failure { what: "no such entry".to_owned(), remedy: SEE_LOG })?;
    let mut last = None;
    for way in connector.tries(&login.host) {
        let connected = timeout(step, connector.connect(*way, (&login.host, login.port, None), tcp, gear)).await;
        let stream = match connected.map_err(|_| late("no connection", step))? {
            Ok(stream) => stream,
            Err(error) if error.is_of_tls() => {
                let remedy = "Correct sslmode and the files of the entry, or TLS on the server";
                last = Some(Failure { what: error.to_string(), remedy });
                continue;
            }
            Err(error) => return Err(Failure { what: error.to_string(), remedy: remedy(None) }),
        };
        let logged_in = timeout(step, config.connect_raw(Link(stream), NoTls)).await;
        match logged_in.map_err(|_| late("no login", step))? {
            Ok((client, connection)) => {
                // Ends when the client is dropped.
                tokio::task::spawn_local(connection);
                return Ok(client);
            }
            Err(error) => last = Some(failure(&error)),
        }
    }
    Err(last.unwrap_or_else(|| Failure { what: "no way to connect".to_owned(), remedy: SEE_LOG }))
}

/// A connection as the driver takes it.
struct Link(Stream);

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = ready!(self.0.poll_read(cx, buf.initialize_unfilled()))?;
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_write(cx, buf, &[])
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.shutdown_write())
    }
}

/// The first row of the answer, if there is one.
async fn question(
    client: &tokio_postgres::Client,
    text: &str,
    step: Duration,
) -> Result<Option<SimpleQueryRow>, Failure> {
    let answered = timeout(step, client.simple_query(text)).await.map_err(|_| late("no answer", step))?;
    let messages = answered.map_err(|error| failure(&error))?;
    Ok(messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    }))
}

fn read_facts(row: &SimpleQueryRow) -> Option<Facts> {
    let text = |column| row.try_get(column).ok().flatten();
    let number = |column| text(column)?.parse::<i64>().ok();
    let count = |column| number(column).and_then(|number| u64::try_from(number).ok());
    let truth = |column| text(column).map(|text| text == "t");
    let superuser = truth(2)?;
    // A superuser may pass the limits of roles and databases, and use what is reserved.
    let limit = |column| Some(if superuser { None } else { u64::try_from(number(column)?).ok() });
    Some(Facts {
        version: text(0)?.to_owned(),
        in_recovery: truth(1)?,
        superuser,
        role_limit: limit(3)?,
        database_limit: limit(4)?,
        max_connections: count(5)?,
        reserved: if superuser { 0 } else { count(6)?.saturating_add(count(7)?) },
        server_use: count(8)?,
        database_use: count(9)?,
        role_use: count(10)?,
    })
}

fn late(what: &str, step: Duration) -> Failure {
    Failure { what: format!("{what} within {} s", step.as_secs_f32()), remedy: remedy(None) }
}

fn failure(error: &tokio_postgres::Error) -> Failure {
    let code = error.code().map(tokio_postgres::error::SqlState::code);
    // The driver's own text leaves out the cause.
    let what = match (error.as_db_error(), error.source()) {
        (Some(refusal), _) => format!("{} ({})", Excerpt::of(refusal.message()), refusal.code().code()),
        (None, Some(cause)) => format!("{error}: {}", Excerpt::of(&cause.to_string())),
        (None, None) => error.to_string(),
    };
    Failure { what, remedy: remedy(code) }
}

const SEE_LOG: &str = "See the server's log";

/// What to do about a login that failed with this SQLSTATE; `None` when there was no answer at all.
fn remedy(sqlstate: Option<&str>) -> &'static str {
    match sqlstate {
        None => "Correct host, port, user and password; see that the server runs and can be reached from here",
        Some("28P01") => "Correct user and password of the entry, or the role's password on the server",
        Some("28000") => "Correct user of the entry, or let the role in: LOGIN, pg_hba.conf",
        Some("3D000") => "Correct dbname of the entry, or create the database",
        Some("42501") => "GRANT CONNECT ON DATABASE to the role, or name another user in the entry",
        Some("53300") => "Free connections on the server, or raise the limit that its message names",
        Some("57P03") => "Wait until the server has started",
        Some(_) => SEE_LOG,
    }
}

/// What a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Server,
    Database,
    Role,
}

impl Scope {
    const ALL: [Self; 3] = [Self::Server, Self::Database, Self::Role];

    /// Whether both logins are under the same limit.
    fn same(self, one: &Login, other: &Login) -> bool {
        match self {
            Self::Server => one.same_server(other),
            Self::Database => one.same_database(other),
            Self::Role => one.same_role(other),
        }
    }
}

/// One limit, what is used of it and what the pools may want of it.
struct Budget {
    scope: Scope,
    /// `None`: the server sets no limit.
    limit: Option<u64>,
    in_use: u64,
    pools: u64,
    wanted: u64,
}

impl Budget {
    fn of(scope: Scope, facts: &Facts, login: &Login, pools: &[Pool]) -> Self {
        let (limit, in_use) = match scope {
            Scope::Server => (Some(facts.max_connections.saturating_sub(facts.reserved)), facts.server_use),
            Scope::Database => (facts.database_limit, facts.database_use),
            Scope::Role => (facts.role_limit, facts.role_use),
        };
        let under = pools.iter().filter(|pool| scope.same(&pool.login, login));
        let wanted = at_most(&under);
        Self { scope, limit, in_use, pools: u64::try_from(under.count()).unwrap_or(u64::MAX), wanted }
    }
}

fn facts_text(facts: &Facts, login: &Login, pools: &[Pool]) -> String {
    let place = if facts.in_recovery { "follower (in recovery)" } else { "primary" };
    let privilege = if facts.superuser { "; the role is a superuser" } else { "" };
    let mut text = format!("  PostgreSQL {}, {place}{privilege}\n", facts.version);
    for scope in Scope::ALL {
        let Budget { limit, in_use, pools, wanted, .. } = Budget::of(scope, facts, login, pools);
        let name = match scope {
            Scope::Server => "server",
            Scope::Database => "database",
            Scope::Role => "role",
        };
        let limit_text = limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
        let reserve = match (scope, facts.reserved) {
            (Scope::Server, 1..) => {
                format!(" (max_connections {}, reserved {})", facts.max_connections, facts.reserved)
            }
            _ => String::new(),
        };
        let plural = if pools == 1 { "pool" } else { "pools" };
        let verdict = match limit {
            Some(limit) if wanted > limit => "does not fit",
            Some(limit) if wanted > limit.saturating_sub(in_use) => "fits only when what is in use is our own",
            _ => "fits",
        };
        let _ = writeln!(
            text,
            "  {name}: {limit_text}{reserve}, {in_use} in use; {pools} {plural} may want {wanted}: {verdict}"
        );
    }
    text
}

/// The limits that cannot hold what the pools may want.
fn misfits(facts: &Facts, login: &Login, pools: &[Pool]) -> Vec<(Scope, Fault)> {
    let budgets = Scope::ALL.map(|scope| Budget::of(scope, facts, login, pools));
    let misfit = |Budget { scope, limit, pools, wanted, .. }: Budget| {
        let limit = limit.filter(|limit| wanted > *limit)?;
        let Login { host, port, dbname, role, .. } = login;
        let (place, name, other) = match scope {
            Scope::Server => (
                format!("{host}:{port}"),
                "max_connections less what is reserved".to_owned(),
                format!("raise max_connections to {}", wanted.saturating_add(facts.reserved)),
            ),
            Scope::Database => (
                format!("database {} on {host}:{port}", Excerpt::of(dbname)),
                "its CONNECTION LIMIT".to_owned(),
                format!("ALTER DATABASE ... CONNECTION LIMIT {wanted}"),
            ),
            Scope::Role => (
                format!("role {} on {host}:{port}", Excerpt::of(role)),
                "its CONNECTION LIMIT".to_owned(),
                format!("ALTER ROLE ... CONNECTION LIMIT {wanted}"),
            ),
        };
        let plural = if pools == 1 { "pool" } else { "pools" };
        let what = format!("{pools} {plural} may open {wanted} server connections, {name} is {limit}");
        let each = limit / pools.max(1);
        let remedy = match each {
            0 => format!("Set max_db_connections so that all together stay within {limit}, or {other}"),
            each => format!("Lower the pools' sizes to {each} (default_pool_size, pool_size), or {other}"),
        };
        Some((scope, Fault { place, what, remedy }))
    };
    budgets.into_iter().filter_map(misfit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgweir_config::Sources;

    const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                            wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    fn config(args: &[&str]) -> Config {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        Config::from_sources(Sources { args: &args, ..Sources::default() }).unwrap_or_else(|faults| panic!("{faults}"))
    }

    fn facts() -> Facts {
        Facts {
            version: "15.4".to_owned(),
            in_recovery: false,
            superuser: false,
            role_limit: None,
            database_limit: None,
            max_connections: 100,
            reserved: 3,
            server_use: 10,
            database_use: 5,
            role_use: 5,
        }
    }

    #[test]
    fn pools_are_the_pairs_that_can_log_in() {
        let verifier = format!("--user=b={VERIFIER}");
        let (a, b) = ("--user=a=1", verifier.as_str());
        #[rustfmt::skip]
        let table: [(&str, &[&str], &[&str]); 6] = [
            ("own password",      &["--database=x=postgres://h:1/d", a],           &["x a h:1, database d, role a"]),
            ("stored verifier",   &["--database=x=postgres://h:1/d", a, b],        &["x a h:1, database d, role a"]),
            ("forced role",       &["--database=x=postgres://u:p@h:1/d", a, b],
                &["x a h:1, database d, role u", "x b h:1, database d, role u"]),
            ("only the fallback", &["--database=*=postgres://h:1", a],             &[]),
            ("trust and strangers", &["--database=x=postgres://u@h:1/d", "--auth-type=trust"],
                &["x u h:1, database d, role u"]),
            ("nobody known",      &["--database=x=postgres://h:1/d", "--auth-type=trust"], &[]),
        ];
        for (name, args, want) in table {
            let got: Vec<String> = pools(&config(args))
                .iter()
                .map(|pool| format!("{} {} {}", pool.database, pool.user, pool.login))
                .collect();
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn whatever_is_not_tried_is_said() {
        let verifier = format!("--user=b={VERIFIER}");
        #[rustfmt::skip]
        let table: [(&str, &[&str], usize); 4] = [
            ("all tried",    &["--database=x=postgres://h/d", "--user=a=1"],              0),
            ("verifier",     &["--database=x=postgres://h/d", "--user=a=1", &verifier],   1),
            ("fallback",     &["--database=*=postgres://h", "--user=a=1"],                1),
            ("nobody known", &["--database=x=postgres://h/d", "--auth-type=trust"],       1),
        ];
        for (name, args, want) in table {
            let notes = unchecked(&config(args));
            assert_eq!(notes.len(), want, "{name}: {notes:?}");
        }
    }

    #[test]
    fn what_pools_may_want_is_capped_by_database_and_by_user() {
        let (x, y) = ("--database=x=postgres://h/x", "--database=y=postgres://h/y");
        let (a, b) = ("--user=a=1", "--user=b=1");
        #[rustfmt::skip]
        let table: [(&str, &[&str], u64); 5] = [
            ("one pool",           &[x, a],                                                   20),
            ("four pools",         &[x, y, a, b],                                             80),
            ("with reserve",       &[x, a, "--reserve-pool-size=5"],                          25),
            ("per database",       &[x, y, a, b, "--max-db-connections=15"],                  30),
            ("per user, tighter",  &[x, y, a, b, "--max-db-connections=15", "--max-user-connections=7"], 14),
        ];
        for (name, args, want) in table {
            assert_eq!(at_most(&pools(&config(args)).iter()), want, "{name}");
        }
    }

    #[test]
    fn a_limit_below_what_the_pools_may_want_is_a_fault() {
        let pools = pools(&config(&["--database=x=postgres://h/x", "--user=a=1", "--user=b=1"]));
        let login = &pools[0].login;
        #[rustfmt::skip]
        let table = [
            ("all fits",       facts(),                                                  vec![]),
            ("role of one",    Facts { role_limit: Some(19), ..facts() },                vec![Scope::Role]),
            ("just the role",  Facts { role_limit: Some(20), ..facts() },                vec![]),
            ("database",       Facts { database_limit: Some(39), ..facts() },            vec![Scope::Database]),
            ("server",         Facts { max_connections: 42, ..facts() },                 vec![Scope::Server]),
            ("just the server", Facts { max_connections: 43, ..facts() },                vec![]),
            ("none allowed",   Facts { database_limit: Some(0), ..facts() },             vec![Scope::Database]),
        ];
        for (name, facts, want) in table {
            let found = misfits(&facts, login, &pools);
            let scopes: Vec<Scope> = found.iter().map(|(scope, _)| *scope).collect();
            assert_eq!(scopes, want, "{name}");
            for (_, fault) in found {
                assert_eq!(fault.to_string().lines().count(), 1, "{name}");
            }
        }
    }

    #[test]
    fn a_misfit_says_what_where_and_how_to_mend_it() {
        let pools = pools(&config(&["--database=x=postgres://h/x", "--user=a=1"]));
        let facts = Facts { role_limit: Some(12), ..facts() };
        let (_, fault) = misfits(&facts, &pools[0].login, &pools).remove(0);
        assert_eq!(
            fault.to_string(),
            "role a on h:5432: 1 pool may open 20 server connections, its CONNECTION LIMIT is 12. \
             Lower the pools' sizes to 12 (default_pool_size, pool_size), or ALTER ROLE ... CONNECTION LIMIT 20"
        );
    }

    #[test]
    fn the_report_tells_full_from_too_small() {
        let pools = pools(&config(&["--database=x=postgres://h/x", "--user=a=1"]));
        #[rustfmt::skip]
        let table = [
            ("room",  facts(),                                                     ": fits\n"),
            ("full",  Facts { server_use: 90, ..facts() },                         ": fits only when"),
            ("small", Facts { max_connections: 10, ..facts() },                    ": does not fit\n"),
        ];
        for (name, facts, want) in table {
            let text = facts_text(&facts, &pools[0].login, &pools);
            let line = text.split_inclusive('\n').find(|line| line.starts_with("  server:")).unwrap();
            assert!(line.contains(want), "{name}: {line}");
        }
    }

    #[test]
    fn no_password_is_shown_in_the_report() {
        let config = config(&["--database=x=postgres://u:hunter2@h/x", "--user=a=swordfish"]);
        let shown = format!("{}{:?}{:?}", settings_text(&config), pools(&config), unchecked(&config));
        assert!(!shown.contains("hunter2") && !shown.contains("swordfish"), "{shown}");
        assert!(shown.contains("databases.x.password = ***"), "{shown}");
    }
}
