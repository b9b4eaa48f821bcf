//! Which pool a client belongs to.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use hashbrown::HashMap;
use pgweir_config::{Config, ProtocolVersion};
use pgweir_proto::startup::{PROTOCOL_3_0, PROTOCOL_3_2};

use crate::backend::{Count, Target};
use crate::clock::Clock;
use crate::net::TcpOptions;
use crate::pool::{Database, Limits, Pool};
use crate::stats::PoolName;

/// The entry of `[databases]` that stands for every name not in it.
const FALLBACK: &str = "*";

/// No entry of `[databases]` matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDatabase;

/// Pools by database and user.
type Pools = HashMap<(Box<str>, Box<str>), Rc<Pool>>;

/// The pools of one worker.
#[derive(Debug)]
pub struct Router {
    config: Arc<Config>,
    clock: Rc<Clock>,
    tcp: TcpOptions,
    pools: RefCell<Pools>,
    databases: RefCell<HashMap<Box<str>, Rc<Database>>>,
    users: RefCell<HashMap<Box<str>, Rc<Count>>>,
    next_id: Cell<u32>,
}

impl Router {
    /// A router without pools: they are made when a client first asks.
    #[must_use]
    pub fn new(config: Arc<Config>, clock: Rc<Clock>) -> Self {
        let tcp = TcpOptions::new(&config.listen);
        Self {
            config,
            clock,
            tcp,
            pools: RefCell::default(),
            databases: RefCell::default(),
            users: RefCell::default(),
            next_id: Cell::new(1),
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
        let pool = self.make(database, user)?;
        self.pools.borrow_mut().insert(key, pool.clone());
        Ok(pool)
    }

    /// All pools.
    #[must_use]
    pub fn pools(&self) -> Vec<Rc<Pool>> {
        self.pools.borrow().values().cloned().collect()
    }

    /// Forgets pools that nobody uses: with a `*` database their names are the clients' choice.
    pub fn sweep(&self) {
        let unused = |pool: &Rc<Pool>| Rc::strong_count(pool) == 1 && pool.open() == 0;
        let many = self.pools.borrow().len() > 1000;
        self.pools.borrow_mut().retain(|_, pool| !many || !unused(pool));
    }

    fn make(&self, name: &str, user: &str) -> Result<Rc<Pool>, UnknownDatabase> {
        let databases = &self.config.databases;
        let database = databases.get(name).or_else(|| databases.get(FALLBACK)).ok_or(UnknownDatabase)?;
        let own = self.config.users.get(user);
        let pool = &self.config.pool;
        let pool_size = own.and_then(|u| u.pool_size).or(database.pool_size).unwrap_or(pool.default_pool_size);
        let limits = Limits {
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
            max_pinned: if pool.max_pinned == 0 { pool_size } else { pool.max_pinned },
        };
        let target = self.target(name, user, database);
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let shared = self.database(name, database.max_db_connections.unwrap_or(pool.max_db_connections));
        let count = self.user(user, own.and_then(|u| u.max_user_connections).unwrap_or(pool.max_user_connections));
        Ok(Pool::new(id, PoolName::primary(name, user), limits, target, self.clock.clone(), &shared, count))
    }

    fn target(&self, name: &str, user: &str, database: &pgweir_config::Database) -> Target {
        // A client's own password opens the server too, if it is known in plain text.
        let own = self.config.users.get(user).and_then(|u| u.password.as_ref()).map(pgweir_config::Secret::expose);
        let own = own.filter(|password| database.user.is_none() && !is_verifier(password));
        let password = database.password.as_ref().map(pgweir_config::Secret::expose).or(own);
        Target {
            host: if database.host.is_empty() { "127.0.0.1".to_owned() } else { database.host.clone() },
            port: database.port,
            dbname: database.dbname.clone().unwrap_or_else(|| name.to_owned()),
            user: database.user.clone().unwrap_or_else(|| user.to_owned()),
            password: password.map(str::to_owned),
            connect_query: database.connect_query.clone().unwrap_or_default(),
            tcp: self.tcp.clone(),
            version: Cell::new(match self.config.pool.server_max_protocol_version {
                ProtocolVersion::V3_0 => PROTOCOL_3_0,
                ProtocolVersion::V3_2 => PROTOCOL_3_2,
            }),
            connect_timeout: self.config.pool.server_connect_timeout,
            keys: RefCell::default(),
        }
    }

    fn database(&self, name: &str, limit: u32) -> Rc<Database> {
        self.databases.borrow_mut().entry(name.into()).or_insert_with(|| Database::new(limit)).clone()
    }

    fn user(&self, name: &str, limit: u32) -> Rc<Count> {
        self.users.borrow_mut().entry(name.into()).or_insert_with(|| Count::new(limit)).clone()
    }
}

/// Whether a configured password is a stored SCRAM verifier.
#[must_use]
pub fn is_verifier(password: &str) -> bool {
    password.starts_with("SCRAM-SHA-256$")
}
