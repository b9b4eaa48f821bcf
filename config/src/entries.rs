//! The keys of `[databases.NAME]` and `[users.NAME]`, each named once.

use std::time::Duration;

use crate::check::server_host;
use crate::choices::{BindingPolicy, PoolMode, ReadFreshness, ReadRouting, SslMode, SslNegotiation, StatementMode};
use crate::follower::FollowerList;
use crate::login::{CommandLine, RequireAuth};
use crate::secret::Secret;
use crate::setting::{Setting, group};

/// The name of the database entry that answers for any name without its own.
pub const FALLBACK: &str = "*";

/// The name of the admin console, which no database entry may take.
pub const CONSOLE: &str = "pgbouncer";

/// The host that an absent or empty `host` means.
pub const LOCAL_HOST: &str = "127.0.0.1";

/// The keys of `[databases.NAME]`, in the order of the documentation.
#[must_use]
pub fn database_keys() -> &'static [Setting<Database>] {
    DATABASE
}

/// The keys of `[users.NAME]`, in the order of the documentation.
#[must_use]
pub fn user_keys() -> &'static [Setting<User>] {
    USER
}

group! {
    /// `[databases.NAME]`: where the database that clients call NAME really is.
    ///
    /// The name `*` answers for every name without an entry. `NAME = "postgres://user:password@host:port/dbname"` under
    /// `[databases]` is the short form. An absent key means the global setting of the same purpose.
    Database, "databases", |database: Database| database, DATABASE {
        /// Host of the server: a name or an IP, or the directory of its Unix-domain socket, which begins with a slash (or
        /// with `@` for an abstract one); empty is `127.0.0.1`.
        host: String = "127.0.0.1", check server_host => live;
        /// Port of the server, and the number in the name of its Unix-domain socket.
        port: u16 = 5432, in 1..=65535 => live;
        /// Name of the database on the server; absent: the name that the client gave.
        dbname: Option<String> as "app_production" => live;
        /// User of the server connections, whoever the client is; absent: the client's user.
        user: Option<String> as "app" => live;
        /// Password of `user` on the server. Absent, and none of the next two either: that of `[users.NAME]`, if `user`
        /// is absent and it is in plain text.
        password: Option<Secret> as "secret" => live;
        /// File with that password in its place; read at every login. A newline at its end does not count.
        password_file: Option<String> as "/run/secrets/db-password" => live;
        /// Command that prints that password in its place, such as a token that is good for minutes: a program and its
        /// arguments. It is split at blanks; quotes and backslashes keep them, and nothing is expanded (for that, name
        /// a shell: `sh -c '...'`). It gets `PGHOST`, `PGPORT`, `PGUSER` and `PGDATABASE`, and must print the password
        /// alone. Put no secret into it: it is shown.
        password_command: Option<CommandLine> as "/usr/local/bin/db-token" => live;
        /// How long what it prints is used; absent: the global `password_command_ttl`.
        password_command_ttl: Option<Duration> as "600s", in 0..="365d" => live;
        /// Methods that the server may ask for; absent: the global `server_require_auth`.
        require_auth: Option<RequireAuth> as "scram-sha-256" => live;
        /// Whether SCRAM is bound to the TLS connection; absent: the global `server_channel_binding`.
        channel_binding: Option<BindingPolicy> as "prefer" => live;
        /// Whether the password may be sent in clear, if the server asks for it so, over TCP without TLS. Over TLS and
        /// Unix sockets it may always.
        allow_cleartext_password: Option<bool> as "false" => live;
        /// Whether TLS is used towards the server; absent: `server_tls_sslmode`, and `verify-full` if `sslrootcert` is
        /// `system`.
        sslmode: Option<SslMode> as "verify-full" => live;
        /// File of the authorities that vouch for the server, or `system`; absent: `server_tls_ca_file`.
        sslrootcert: Option<String> as "/etc/pgweir/server-ca.pem" => live;
        /// File of the certificate shown to the server; absent: `server_tls_cert_file`.
        sslcert: Option<String> as "/etc/pgweir/client.pem" => live;
        /// File of its private key; absent: `server_tls_key_file`.
        sslkey: Option<String> as "/etc/pgweir/client.key" => live;
        /// How TLS begins: with the question of `postgres`, or `direct` without it (Postgres 17 and later, with `sslmode`
        /// `require` or stronger).
        sslnegotiation: Option<SslNegotiation> as "postgres" => live;
        /// Server connections of one pool, at most; absent: `default_pool_size`.
        pool_size: Option<u32> as 20, in 1..=10000 => live;
        /// Server connections of one pool kept open when idle; absent: the global `min_pool_size`.
        min_pool_size: Option<u32> as 0, in 0..=10000 => live;
        /// Further server connections for clients that waited; absent: the global `reserve_pool_size`.
        reserve_pool_size: Option<u32> as 0, in 0..=10000 => live;
        /// When a server connection goes back to its pool; absent: the global `pool_mode`.
        pool_mode: Option<PoolMode> as "transaction" => live;
        /// How prepared statements are run; absent: the global `prepared_statements`.
        prepared_statements: Option<StatementMode> as "adaptive" => live;
        /// Prepared statements that one server connection keeps; absent: the global `max_prepared_statements`.
        max_prepared_statements: Option<u32> as 200, in 0..=100000 => live;
        /// Server connections over all pools of this database, at most; absent: the global `max_db_connections`.
        max_db_connections: Option<u32> as 0, in 0..=100000 => live;
        /// Age at which a server connection is closed; absent: the global `server_lifetime`.
        server_lifetime: Option<Duration> as "3600s", in 0..="365d" => live;
        /// Longest wait for a server connection; absent: the global `query_wait_timeout`.
        query_wait_timeout: Option<Duration> as "120s", in 0..="365d" => live;
        /// Query sent once on every new server connection, before its first use.
        connect_query: Option<String> as "SET statement_timeout = '60s'" => live;
        /// User of the server that looks up unknown users; absent: the global `auth_user`.
        auth_user: Option<String> as "pgweir_auth" => live;
        /// Query that gives name and secret of a user; absent: the global `auth_query`.
        auth_query: Option<String> as "SELECT name, secret FROM app.logins($1)" => live;
        /// Database, as clients name it, where that query runs; absent: the global `auth_dbname`.
        auth_dbname: Option<String> as "app" => live;
        /// Followers of this server, separated by commas: `host`, `host:port`, `[::1]:port`, the directory of a socket, or
        /// `postgres://host:port`; `weight=2` behind one, after a blank, gives it twice the share of one without. User,
        /// password, database and TLS are those of this entry, of which they are copies.
        followers: Option<FollowerList> as "10.0.0.2:5432, 10.0.0.3:5432 weight=2" => restart;
        /// Which transactions go to them; absent: the global `read_routing`.
        read_routing: Option<ReadRouting> as "auto" => restart;
        /// How fresh a read on them has to be; absent: the global `read_freshness`.
        read_freshness: Option<ReadFreshness> as "pool" => restart;
        /// How old it may be at most if that is `bounded`; absent: the global `read_max_staleness`.
        read_max_staleness: Option<Duration> as "1s", in "1ms"..="1d" => restart;
        /// Another database entry, whose `followers` serve the clients of this one, and nothing else does (but see
        /// `primary_reads`): for reports and dashboards. Each client gets one of them when it logs in. Transactions are
        /// read-only, unless they say otherwise where the server lets them. Host, user, password and TLS are that entry's;
        /// sizes, limits and `pool_mode` are this one's.
        followers_of: Option<String> as "app" => restart;
    }
}

group! {
    /// `[users.NAME]`: a user that clients may log in as, and what differs for that user.
    ///
    /// An absent key means the database's or the global setting.
    User, "users", |user: User| user, USER {
        /// The password in plain text, or a stored verifier as in `pg_authid`:
        /// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
        password: Option<Secret> as "secret" => live;
        /// When a server connection of this user goes back to its pool.
        pool_mode: Option<PoolMode> as "transaction" => live;
        /// Server connections of one pool of this user, at most.
        pool_size: Option<u32> as 20, in 1..=10000 => live;
        /// Server connections of this user over all pools, at most; 0 sets no limit.
        max_user_connections: Option<u32> as 0, in 0..=100000 => live;
        /// Longest time for one query of this user; absent or 0: the global `query_timeout`.
        query_timeout: Option<Duration> as "0s", in 0..="365d" => live;
        /// Idle time inside a transaction after which this user's client is disconnected; absent or 0: the global
        /// `idle_transaction_timeout`.
        idle_transaction_timeout: Option<Duration> as "0s", in 0..="365d" => live;
        /// Longest wait of this user for a server connection; 0 waits forever.
        query_wait_timeout: Option<Duration> as "120s", in 0..="365d" => live;
    }
}
