//! Which pool a client belongs to.

mod replicas;

pub use replicas::{Choice, Freshness, OF_FOLLOWER, OF_PRIMARY, Replicas};

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use pgweir_config::{Config, Follower, PoolMode, ProtocolVersion, ReadRouting, Secret};
use pgweir_proto::md5;
use pgweir_proto::startup::{PROTOCOL_3_0, PROTOCOL_3_2};

use crate::backend::{
    Credential, Credentials, Derivations, LoginPolicy, Password, PasswordCommand, PasswordFile, Roster, Source, Target,
};
use crate::clock::Clock;
use crate::net::tls::Gear;
use crate::net::{Left, Sockets, TcpOptions};
use crate::pool::{Census, FleetPolicy, Limits, Pool, SharedLimit, TimeLimits};
use crate::prepared::Budget;
use crate::stats::PoolName;

/// The entry of `[databases]` that stands for every name not in it.
const FALLBACK: &str = "*";

/// Behind the user's name, in the name of a pool that looks users up.
const LOOKUP: &str = " (auth_query)";

/// No entry of `[databases]` matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDatabase;

/// The longest wait for a connection to a follower: then it is the primary's turn.
const FOLLOWER_WAIT: Duration = Duration::from_secs(1);

/// Why there is no pool for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPool {
    /// No entry of `[databases]` matches.
    UnknownDatabase,
    /// Nothing but followers may serve it, and none can.
    NoFollower,
}

impl From<UnknownDatabase> for NoPool {
    fn from(_: UnknownDatabase) -> Self {
        Self::UnknownDatabase
    }
}

/// Pools by database and user.
type Pools = HashMap<(Box<str>, Box<str>), Rc<Pool>>;

/// Limits by the name of a database or user.
type SharedLimits = HashMap<Box<str>, Rc<SharedLimit>>;

/// The pools of one worker.
#[derive(Debug)]
pub struct Router {
    config: Arc<Config>,
    clock: Rc<Clock>,
    tcp: TcpOptions,
    tls: Rc<Gear>,
    /// None if every pool is on its own.
    fleet: Option<FleetPolicy>,
    pools: RefCell<Pools>,
    /// Those that look users up, where the database forces another user on clients. Apart from the others: clients
    /// must not get there by any name.
    lookup_pools: RefCell<Pools>,
    /// The followers of the pools that have any.
    replicas: RefCell<HashMap<(Box<str>, Box<str>), Rc<Replicas>>>,
    databases: RefCell<SharedLimits>,
    users: RefCell<SharedLimits>,
    /// By database and login role: pools that differ in neither share a password, and the keys derived from it.
    credentials: RefCell<HashMap<(Box<str>, Box<str>), Rc<Credentials>>>,
    derivations: Derivations,
    /// The own connections to each server, by host and port.
    rosters: RefCell<HashMap<(String, u16), Rc<Roster>>>,
    next_id: Cell<u32>,
    /// Pools give way to the rest of their fleet, also those that are made from now on.
    gives_way: Cell<bool>,
}

impl Router {
    /// A router without pools: they are made when a client first asks. Their connections get on the list `sockets`.
    #[must_use]
    pub fn new(config: Arc<Config>, clock: Rc<Clock>, tls: Rc<Gear>, sockets: Sockets) -> Self {
        let tcp = TcpOptions::new(&config.listen, sockets);
        let fleet = FleetPolicy::new(&config.fleet);
        Self {
            config,
            clock,
            tcp,
            tls,
            fleet,
            pools: RefCell::default(),
            lookup_pools: RefCell::default(),
            replicas: RefCell::default(),
            databases: RefCell::default(),
            users: RefCell::default(),
            credentials: RefCell::default(),
            derivations: Derivations::default(),
            rosters: RefCell::default(),
            next_id: Cell::new(1),
            gives_way: Cell::new(false),
        }
    }

    /// The pool of a database and a user, as a client names them.
    ///
    /// # Errors
    ///
    /// [`UnknownDatabase`].
    pub fn pool(&self, database: &str, user: &str) -> Result<Rc<Pool>, UnknownDatabase> {
        let key = (Box::from(database), Box::from(user));
        if let Some(pool) = self.pools.borrow().get(&key) {
            return Ok(pool.clone());
        }
        let pool = self.make(database, user, self.entry(database)?, PoolName::primary(database, user));
        self.pools.borrow_mut().insert(key, pool.clone());
        Ok(pool)
    }

    /// The pool where `user` looks up other users, as whom it logs in even if the database forces another user on
    /// clients. Where it does not, that is the pool of `user`'s own clients.
    ///
    /// # Errors
    ///
    /// [`UnknownDatabase`].
    pub fn lookup_pool(&self, database: &str, user: &str) -> Result<Rc<Pool>, UnknownDatabase> {
        let entry = self.entry(database)?;
        if entry.user.as_deref().is_none_or(|forced| forced == user) {
            return self.pool(database, user);
        }
        let key = (Box::from(database), Box::from(user));
        if let Some(pool) = self.lookup_pools.borrow().get(&key) {
            return Ok(pool.clone());
        }
        // What the forced user proves itself by is not this user's.
        let entry = pgweir_config::Database {
            user: None,
            password: None,
            password_file: None,
            password_command: None,
            min_pool_size: Some(0),
            ..entry.clone()
        };
        let name = PoolName::primary(database, &format!("{user}{LOOKUP}"));
        let pool = self.make(database, user, &entry, name);
        self.lookup_pools.borrow_mut().insert(key, pool.clone());
        Ok(pool)
    }

    /// Has a connection that has outlived its worker counted by its pool, until the server has ended it.
    pub fn bury(&self, left: Left) {
        if let Some(pool) = self.named(&left.server.pool) {
            pool.bury(left);
        }
    }

    /// The pool of that name, made if it has to be; that of its clients' database, if it is of a follower that is none any
    /// more.
    fn named(&self, name: &PoolName) -> Option<Rc<Pool>> {
        let looks_up = name.user.strip_suffix(LOOKUP).and_then(|user| self.lookup_pool(&name.database, user).ok());
        let home = looks_up.filter(|pool| pool.name == *name).or_else(|| self.pool(&name.database, &name.user).ok())?;
        if home.name == *name {
            return Some(home);
        }
        let replicas = self.replicas(&home).or_else(|| self.sole_replicas(&home));
        let follower = replicas.and_then(|all| all.followers().find(|pool| pool.name == *name).cloned());
        Some(follower.unwrap_or(home))
    }

    /// The followers that a pool's clients are led to when they log in; none if they are served by the pool itself.
    fn sole_replicas(&self, pool: &Rc<Pool>) -> Option<Rc<Replicas>> {
        let entry = self.entry(&pool.name.database).ok()?;
        entry.followers_of.as_ref()?;
        self.replicas_of(pool, entry, ReadRouting::Off)
    }

    /// The pool of a client that logs in, and has proved by `credential` who it is. A database that has nothing but followers
    /// gives it one of them.
    ///
    /// # Errors
    ///
    /// [`NoPool`].
    pub async fn enter(&self, database: &str, user: &str, credential: Credential) -> Result<Rc<Pool>, NoPool> {
        let pool = self.pool(database, user)?;
        if user == pool.login_user() {
            // What proves one user opens nothing for another, whom the database may force on all clients.
            pool.give(credential);
        }
        let Some(replicas) = self.sole_replicas(&pool) else { return Ok(pool) };
        match replicas.admit().await {
            Some(follower) => Ok(follower),
            None if self.config.followers.primary_reads => Ok(pool),
            None => Err(NoPool::NoFollower),
        }
    }

    /// The followers of a pool's primary; none if the database has none, or nothing is routed to them.
    #[must_use]
    pub fn replicas(&self, pool: &Rc<Pool>) -> Option<Rc<Replicas>> {
        let entry = self.entry(&pool.name.database).ok()?;
        let routing = entry.read_routing.unwrap_or(self.config.followers.read_routing);
        let is_routed = routing != ReadRouting::Off && pool.limits.mode == PoolMode::Transaction;
        if !is_routed || entry.followers_of.is_some() || pool.follower.get().is_some() {
            return None;
        }
        self.replicas_of(pool, entry, routing)
    }

    fn replicas_of(
        &self,
        home: &Rc<Pool>,
        entry: &pgweir_config::Database,
        routing: ReadRouting,
    ) -> Option<Rc<Replicas>> {
        let followers = entry.followers.as_ref()?;
        let key = (Box::from(&*home.name.database), Box::from(&*home.name.user));
        if let Some(replicas) = self.replicas.borrow().get(&key) {
            return Some(replicas.clone());
        }
        let pools = followers.all().iter().map(|follower| (self.make_follower(home, entry, follower), follower.weight));
        let own = Freshness::new(&self.config.followers, entry);
        let replicas = Replicas::new(routing, own, home.clone(), pools.collect());
        self.replicas.borrow_mut().insert(key, replicas.clone());
        Some(replicas)
    }

    /// The process will end before long: every pool leaves to its fleet what its clients do not need.
    pub fn give_way(&self) {
        self.gives_way.set(true);
        for pool in self.pools() {
            pool.give_way();
        }
    }

    /// A pool that has just been made.
    fn made(&self, pool: Rc<Pool>) -> Rc<Pool> {
        if self.gives_way.get() {
            pool.give_way();
        }
        pool
    }

    /// A tenth of a second has passed.
    pub fn tick(&self) {
        let all: Vec<Rc<Replicas>> = self.replicas.borrow().values().cloned().collect();
        for replicas in all {
            replicas.tick();
        }
    }

    /// All pools.
    #[must_use]
    pub fn pools(&self) -> Vec<Rc<Pool>> {
        let mut pools: Vec<Rc<Pool>> = self.pools.borrow().values().cloned().collect();
        pools.extend(self.lookup_pools.borrow().values().cloned());
        for replicas in self.replicas.borrow().values() {
            pools.extend(replicas.followers().cloned());
        }
        pools
    }

    /// Forgets pools that nobody uses: with a `*` database their names are the clients' choice.
    pub fn sweep(&self) {
        let unused = |pool: &Rc<Pool>| Rc::strong_count(pool) == 1 && pool.open() == 0;
        if self.pools.borrow().len() > 1000 {
            let is_used = |replicas: &Rc<Replicas>| Rc::strong_count(replicas) > 1 || replicas.is_used();
            self.replicas.borrow_mut().retain(|_, replicas| is_used(replicas));
        }
        for pools in [&self.pools, &self.lookup_pools] {
            let mut pools = pools.borrow_mut();
            let many = pools.len() > 1000;
            pools.retain(|_, pool| !many || !unused(pool));
        }
        self.credentials.borrow_mut().retain(|_, credentials| Rc::strong_count(credentials) > 1);
        self.rosters.borrow_mut().retain(|_, roster| Rc::strong_count(roster) > 1);
        for limits in [&self.databases, &self.users] {
            limits.borrow_mut().retain(|_, limit| Rc::strong_count(limit) > 1 || limit.count.used() > 0);
        }
    }

    fn entry(&self, name: &str) -> Result<&pgweir_config::Database, UnknownDatabase> {
        let databases = &self.config.databases;
        databases.get(name).or_else(|| databases.get(FALLBACK)).ok_or(UnknownDatabase)
    }

    fn make(&self, name: &str, user: &str, database: &pgweir_config::Database, shown: PoolName) -> Rc<Pool> {
        let limits = self.limits(name, user, database);
        let target = self.target(shown.clone(), (name, user), database);
        let shared = self.shared(name, user, user, database);
        let census = self.census(&target);
        self.made(Pool::new(self.id(), shown, limits, target, self.clock.clone(), shared, census))
    }

    /// The number of a new pool.
    fn id(&self) -> u32 {
        self.next_id.replace(self.next_id.get() + 1)
    }

    /// The pool of a follower: as many server connections as on the primary, on another server.
    fn make_follower(&self, home: &Pool, database: &pgweir_config::Database, follower: &Follower) -> Rc<Pool> {
        let (name, user) = (&*home.name.database, &*home.name.user);
        let address = follower.address();
        let own = Limits { min_pool_size: 0, is_probed: false, ..home.limits.clone() };
        let limits = match own.query_wait_timeout {
            // Its clients have nowhere else to go.
            _ if database.followers_of.is_some() => own,
            Duration::ZERO => Limits { query_wait_timeout: FOLLOWER_WAIT, ..own },
            limit => Limits { query_wait_timeout: limit.min(FOLLOWER_WAIT), ..own },
        };
        let at = pgweir_config::Database { host: follower.host.clone(), port: follower.port, ..database.clone() };
        let pool = PoolName::follower(name, user, &address);
        // Whatever becomes of it: promoted, it takes no write that was meant for a follower.
        let mut target = Target { is_read_only: true, ..self.target(pool.clone(), (name, user), &at) };
        if database.password_command.is_some() {
            // What a command prints may be good for one host alone.
            target.credentials = self.credentials(&format!("{name} {address}"), user, &target.user, &at);
        }
        let shared = self.shared(&format!("{name} {address}"), &format!("{user} {address}"), user, database);
        let census = self.census(&target);
        if database.followers_of.is_some() {
            // Its clients are none of the primary's, where nobody may look into the catalog for as long as they are served here.
            return self.made(Pool::new(self.id(), pool, limits, target, self.clock.clone(), shared, census));
        }
        self.made(Pool::of_follower(home, pool, limits, target, shared, census))
    }

    /// The limits that a pool shares with others, of these names.
    fn shared(
        &self,
        of_database: &str,
        of_user: &str,
        user: &str,
        database: &pgweir_config::Database,
    ) -> [Rc<SharedLimit>; 2] {
        let pool = &self.config.pool;
        let own = self.config.users.get(user);
        let by_database = database.max_db_connections.unwrap_or(pool.max_db_connections);
        let by_user = own.and_then(|u| u.max_user_connections).unwrap_or(pool.max_user_connections);
        [shared(&self.databases, of_database, by_database), shared(&self.users, of_user, by_user)]
    }

    fn census(&self, target: &Target) -> Census<'_> {
        let server = (target.host.clone(), target.port);
        let roster = self.rosters.borrow_mut().entry(server).or_default().clone();
        Census { fleet: self.fleet.as_ref(), period: self.config.fleet.fleet_census_period, roster }
    }

    fn limits(&self, name: &str, user: &str, database: &pgweir_config::Database) -> Limits {
        let own = self.config.users.get(user);
        let pool = &self.config.pool;
        let pool_size = own.and_then(|u| u.pool_size).or(database.pool_size).unwrap_or(pool.default_pool_size);
        Limits {
            mode: own.and_then(|u| u.pool_mode).or(database.pool_mode).unwrap_or(pool.pool_mode),
            pool_size,
            min_pool_size: database.min_pool_size.unwrap_or(pool.min_pool_size).min(pool_size),
            reserve_pool_size: database.reserve_pool_size.unwrap_or(pool.reserve_pool_size),
            reserve_pool_timeout: pool.reserve_pool_timeout,
            query_wait_timeout: own
                .and_then(|u| u.query_wait_timeout)
                .or(database.query_wait_timeout)
                .unwrap_or(pool.query_wait_timeout),
            server_lifetime: database.server_lifetime.unwrap_or(pool.server_lifetime),
            server_idle_timeout: pool.server_idle_timeout,
            server_login_retry: pool.server_login_retry,
            max_server_logins: pool.max_server_logins,
            cancel_wait_timeout: pool.cancel_wait_timeout,
            times: Rc::new(self.times(own)),
            is_probed: self.config.databases.contains_key(name)
                && database.followers_of.is_none()
                && (own.is_some() || self.config.users.is_empty() && database.user.is_some()),
            statements: database.prepared_statements.unwrap_or(pool.prepared_statements),
            budget: Budget {
                count: database.max_prepared_statements.unwrap_or(pool.max_prepared_statements) as usize,
                bytes: pool.max_prepared_text,
            },
            shared_listener: pool.shared_listener,
            audit_every: pool.audit_every,
            catalog_check_interval: pool.catalog_check_interval,
            sequence_values: pool.sequence_values,
            max_pinned: if pool.max_pinned == 0 { pool_size } else { pool.max_pinned },
        }
    }

    /// The limits of a user's clients in time. 0 is no limit of the user's own, as with `PgBouncer`.
    fn times(&self, own: Option<&pgweir_config::User>) -> TimeLimits {
        let client = &self.config.client;
        let either = |own: Option<Duration>, global| own.filter(|limit| !limit.is_zero()).unwrap_or(global);
        TimeLimits {
            client_idle: client.client_idle_timeout,
            idle_transaction: either(own.and_then(|u| u.idle_transaction_timeout), client.idle_transaction_timeout),
            query: either(own.and_then(|u| u.query_timeout), client.query_timeout),
            transaction: client.transaction_timeout,
        }
    }

    fn target(&self, pool: PoolName, (name, user): (&str, &str), database: &pgweir_config::Database) -> Target {
        let login_user = database.user.as_deref().unwrap_or(user);
        let server = &self.config.server;
        Target {
            pool,
            host: host(database).to_owned(),
            port: database.port,
            dbname: database.dbname.clone().unwrap_or_else(|| name.to_owned()),
            user: login_user.to_owned(),
            credentials: self.credentials(name, user, login_user, database),
            policy: LoginPolicy {
                require_auth: database.require_auth.as_ref().unwrap_or(&server.server_require_auth).clone(),
                channel_binding: database.channel_binding.unwrap_or(server.server_channel_binding),
                allow_cleartext_password: database.allow_cleartext_password.unwrap_or(false),
                scram_iterations_max: server.server_scram_iterations_max,
            },
            connect_query: database.connect_query.clone().unwrap_or_default(),
            is_read_only: database.followers_of.is_some(),
            tcp: self.tcp.clone(),
            version: Cell::new(match self.config.pool.server_max_protocol_version {
                ProtocolVersion::V3_0 => PROTOCOL_3_0,
                ProtocolVersion::V3_2 => PROTOCOL_3_2,
            }),
            tls: self.tls.clone(),
            entry: if self.config.databases.contains_key(name) { name } else { FALLBACK }.to_owned(),
            connect_timeout: self.config.pool.server_connect_timeout,
        }
    }

    fn credentials(
        &self,
        name: &str,
        user: &str,
        login_user: &str,
        database: &pgweir_config::Database,
    ) -> Rc<Credentials> {
        let key = (Box::from(name), Box::from(login_user));
        let mut all = self.credentials.borrow_mut();
        let made = || Credentials::new(source(&self.config, name, user, database), self.derivations.clone());
        all.entry(key).or_insert_with(made).clone()
    }
}

/// The limit of that name, made at the first asking.
fn shared(limits: &RefCell<SharedLimits>, name: &str, limit: u32) -> Rc<SharedLimit> {
    limits.borrow_mut().entry(name.into()).or_insert_with(|| SharedLimit::new(limit)).clone()
}

/// The host of a database entry.
fn host(database: &pgweir_config::Database) -> &str {
    if database.host.is_empty() { "127.0.0.1" } else { &database.host }
}

/// Where the password for the server comes from, for a client's `user` of the database that it calls `name`.
#[must_use]
pub fn source(config: &Config, name: &str, user: &str, database: &pgweir_config::Database) -> Source {
    let password = |secret: &Secret| Source::Password(Password::new(secret.expose().as_bytes()));
    if let Some(secret) = &database.password {
        return password(secret);
    }
    if let Some(path) = &database.password_file {
        return Source::File(PasswordFile::new(path));
    }
    if let Some(line) = &database.password_command {
        let variables = vec![
            ("PGHOST", host(database).to_owned()),
            ("PGPORT", database.port.to_string()),
            ("PGUSER", database.user.as_deref().unwrap_or(user).to_owned()),
            ("PGDATABASE", database.dbname.as_deref().unwrap_or(name).to_owned()),
        ];
        let ttl = database.password_command_ttl.unwrap_or(config.server.password_command_ttl);
        let limit = config.server.password_command_timeout;
        return Source::Command(PasswordCommand::new(line.clone(), variables, limit, ttl));
    }
    // A client's own password opens the server too, if it is known in plain text.
    let own = config.users.get(user).and_then(|user| user.password.as_ref());
    let own = own.filter(|secret| database.user.is_none() && is_plain(secret.expose()));
    own.map_or(Source::None, password)
}

/// Whether a secret is a password, and not what is stored of one.
#[must_use]
pub fn is_plain(secret: &str) -> bool {
    !is_verifier(secret) && md5::Hash::parse(secret).is_none()
}

/// Whether a configured password is a stored SCRAM verifier.
#[must_use]
pub fn is_verifier(password: &str) -> bool {
    password.starts_with("SCRAM-SHA-256$")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use pgweir_config::{Database, FollowerList, User};

    use super::*;
    use crate::clock::Pauses;
    use crate::net::tls::Keyring;

    fn router(config: Config) -> Router {
        let config = Arc::new(config);
        let gear = Gear::new(Arc::new(Keyring::load(config.clone()).unwrap()));
        Router::new(config, Rc::new(Clock::new(Pauses::default())), gear, Sockets::default())
    }

    /// Makes so many pools that those nobody uses are forgotten.
    fn crowd(router: &Router) {
        for number in 0..1500 {
            router.pool(&format!("db{number}"), &format!("user{number}")).unwrap();
        }
    }

    #[test]
    fn the_pool_of_a_follower_that_alone_serves_is_found_by_its_name_and_is_one_for_as_long_as_somebody_has_it() {
        let mut config = Config::default();
        let follower = Follower { host: "10.0.0.2".to_owned(), port: 5432, weight: 1 };
        let followers = Some(FollowerList::new([follower]));
        let entry = Database { followers, followers_of: Some("app".to_owned()), ..Database::default() };
        config.databases.insert(FALLBACK.into(), entry);
        let router = router(config);
        let home = router.pool("reports", "user").unwrap();
        let name = PoolName::follower("reports", "user", "10.0.0.2:5432");
        // As after the end of the worker that had a connection of it: it is counted there.
        let pool = router.named(&name).unwrap();
        assert_eq!((&pool.name, &router.named(&home.name).unwrap().name), (&name, &home.name));
        // What it has surveyed is no other server's.
        assert!(pool.id != home.id && !Rc::ptr_eq(&pool.catalog, &home.catalog));
        drop(home);
        // Its clients have nothing but the pool.
        crowd(&router);
        router.sweep();
        assert!(Rc::ptr_eq(&pool, &router.named(&name).unwrap()), "a second one, with as many connections again");
        drop(pool);
        crowd(&router);
        router.sweep();
        assert!(router.replicas.borrow().is_empty());
    }

    #[test]
    fn a_users_limits_in_time_stand_in_the_place_of_the_global_ones() {
        let [none, own, global] = [0, 3, 5].map(Duration::from_secs);
        #[rustfmt::skip]
        let table: [(&str, Duration, Option<Duration>, Duration); 6] = [
            ("neither",       none,   None,       none),
            ("global",        global, None,       global),
            ("own",           none,   Some(own),  own),
            ("both",          global, Some(own),  own),
            ("0 is no own",   global, Some(none), global),
            ("0 and nothing", none,   Some(none), none),
        ];
        for (name, all, one, want) in table {
            let mut config = Config::default();
            config.client.client_idle_timeout = all;
            (config.client.query_timeout, config.client.idle_transaction_timeout) = (all, all);
            let user = User { query_timeout: one, idle_transaction_timeout: one, ..User::default() };
            config.users.insert("user".to_owned(), user);
            config.databases.insert(FALLBACK.into(), Database::default());
            let router = router(config);
            for (user, want) in [("user", want), ("another", all)] {
                let times = router.pool("app", user).unwrap().limits.times.clone();
                let want =
                    TimeLimits { client_idle: all, idle_transaction: want, query: want, ..TimeLimits::default() };
                assert_eq!((*times, times.is_none()), (want, want.query.is_zero() && all.is_zero()), "{name}, {user}");
            }
        }
    }

    #[test]
    fn what_is_kept_of_databases_that_no_one_names_any_more_is_forgotten_with_their_pools() {
        let mut config = Config::default();
        config.databases.insert(FALLBACK.into(), Database::default());
        let router = router(config);
        let used = router.pool("in use", "user").unwrap();
        crowd(&router);
        router.sweep();
        let left = |limits: &RefCell<SharedLimits>| limits.borrow().len();
        assert_eq!((left(&router.databases), left(&router.users)), (1, 1));
        assert_eq!((router.pools().len(), router.credentials.borrow().len()), (1, 1));
        assert!(Rc::ptr_eq(&used, &router.pool("in use", "user").unwrap()));
    }
}
