//! The table: every setting named once, with type, default, range, reload class and doc.
//!
//! It drives parsing, range checks, this documentation, `pgweir.toml`, `SHOW CONFIG` and reload. The names are
//! `PgBouncer`'s where `PgBouncer` has the setting (its `doc/config.md` gives their meaning).

use std::time::Duration;

use crate::check::{http_address, http_token, listen_addresses, tls_protocols, whole_seconds};
use crate::choices::{
    AuthType, BindingPolicy, CancelOnDisconnect, LogFormat, LogLevel, PoolMode, ProtocolVersion, ReadFreshness,
    ReadRouting, SequenceValues, SslMode, StatementMode,
};
use crate::config::Config;
use crate::login::RequireAuth;
use crate::network::Networks;
use crate::secret::Secret;
use crate::setting::{Setting, group};
use crate::socket::{FileMode, socket_dirs};

/// A group of settings: a table of the file.
pub struct Group {
    /// The table's name, without brackets.
    pub name: &'static str,
    /// What its settings have in common.
    pub doc: &'static str,
    /// Its settings, in the order of the documentation.
    pub settings: &'static [Setting<Config>],
}

/// Every group of global settings, in the order of the documentation.
pub static GROUPS: &[Group] = &[
    Group { name: "listen", doc: "Where clients connect.", settings: LISTEN },
    Group { name: "auth", doc: "How clients prove who they are.", settings: AUTH },
    Group { name: "server", doc: "How pgweir logs in to servers.", settings: SERVER },
    Group { name: "tls", doc: "Encryption between clients and pgweir, and between pgweir and servers.", settings: TLS },
    Group { name: "pool", doc: "How many server connections there are, and how long they live.", settings: POOL },
    Group { name: "fleet", doc: "How several pgweirs share one server's limits.", settings: FLEET },
    Group {
        name: "followers",
        doc: "Which reads go to followers, and how fresh they have to be.",
        settings: FOLLOWERS,
    },
    Group { name: "client", doc: "What one client may hold, send and wait for.", settings: CLIENT },
    Group { name: "http", doc: "Metrics, limits, health and the dashboard.", settings: HTTP },
    Group { name: "log", doc: "What is logged, and how.", settings: LOG },
    Group { name: "process", doc: "The process as a whole.", settings: PROCESS },
];

/// Every global setting, in the order of the documentation.
pub fn all() -> impl Iterator<Item = &'static Setting<Config>> {
    GROUPS.iter().flat_map(|group| group.settings)
}

/// The setting of this name, whatever its group.
#[must_use]
pub fn find(name: &str) -> Option<&'static Setting<Config>> {
    all().find(|setting| setting.name == name)
}

group! {
    /// `[listen]`: where clients connect.
    Listen, "listen", |config: Config| config.listen, LISTEN {
        /// Addresses to listen on: IPs or names, separated by commas; `*` is all of them; empty is none, if there are
        /// Unix-domain sockets.
        listen_addr: String = "127.0.0.1", check listen_addresses => restart;
        /// Port to listen on, and the number in the names of the Unix-domain sockets; 0 takes any free one.
        listen_port: u16 = 6432, in 0..=65535 => restart;
        /// Connections that the kernel holds until they are accepted.
        listen_backlog: u32 = 1024, in 1..=65535 => restart;
        /// Directories of Unix-domain sockets, separated by commas; in each a socket `.s.PGSQL.PORT`, where libpq looks
        /// for it (`host=DIRECTORY`). `@name` is a name in Linux' abstract namespace, where there are no permissions.
        /// Empty: none; `PgBouncer`'s default is `/tmp`.
        unix_socket_dir: String = "", check socket_dirs => restart;
        /// Permissions of the sockets in a directory, in octal digits.
        unix_socket_mode: FileMode = "0777" => restart;
        /// Group of the sockets in a directory, by name or number; empty leaves it to the system.
        unix_socket_group: String = "" => restart;
        /// Whether every TCP connection has to begin with a header of the PROXY protocol (version 1 or 2), which says whose
        /// connection it is; one without is closed. Unix-domain sockets never have it.
        proxy_protocol: bool = false => restart;
        /// Proxies that are believed: networks such as `10.0.0.0/8`, separated by commas. With `proxy_protocol`, others are
        /// not let in.
        proxy_protocol_from: Networks = "" => restart;
        /// Whether the kernel probes connections that are silent.
        tcp_keepalive: bool = true => live;
        /// Silence before the first probe, in whole seconds; 0 leaves it to the kernel.
        tcp_keepidle: Duration = "0s", in 0..="32767s", check whole_seconds => live;
        /// Pause between probes, in whole seconds; 0 leaves it to the kernel.
        tcp_keepintvl: Duration = "0s", in 0..="32767s", check whole_seconds => live;
        /// Unanswered probes after which a connection is dead; 0 leaves it to the kernel.
        tcp_keepcnt: u32 = 0, in 0..=127 => live;
        /// Longest that sent bytes may stay unacknowledged before a connection is dead; 0 leaves it to the kernel.
        /// A bare number is seconds, as everywhere here; `PgBouncer` counts this one in milliseconds. The kernel ends by it,
        /// too, who acknowledges and does not read for so long; `server_ack_timeout` leaves those alone.
        tcp_user_timeout: Duration = "0s", in 0..="1d" => live;
    }
}

group! {
    /// `[auth]`: how clients prove who they are.
    Auth, "auth", |config: Config| config.auth, AUTH {
        /// `scram-sha-256` asks for a proof of the password and never for the password. `md5` asks for a hash of it, or
        /// for that proof if the user's secret is a SCRAM verifier. `plain` asks for the password itself. `trust`
        /// believes everyone who reaches the port; `any` does, too, and takes each for the database's `user`.
        /// `peer` lets in, over a Unix-domain socket, the user whose name the operating system's user bears, and is
        /// `scram-sha-256` over TCP. `cert` lets in the user whose name is the common name of the client's certificate,
        /// and needs `client_tls_sslmode` to be `verify-ca` or `verify-full`.
        auth_type: AuthType = "scram-sha-256" => live;
        /// Whether `plain` may ask for a password over TCP without TLS, where everyone on the way can read it.
        auth_plain_without_tls: bool = false => live;
        /// File of users besides `[users.NAME]`, in `PgBouncer`'s format: `"name" "secret"` on each line. A secret is a
        /// password in plain text, `md5` and 32 digits, or a SCRAM verifier. Read again when it changes, and at
        /// SIGHUP; a faulty one is reported and the users stay as they were. Empty: none.
        auth_file: String = "" => restart;
        /// File that says which user of the operating system, or which certificate, may log in as which user, in the
        /// syntax of Postgres' `pg_ident.conf`: a map, a name or /regular expression, a user (`\1` is what the
        /// expression's first group matched; `all` is everyone). Empty: they have to bear the user's name.
        auth_ident_file: String = "" => restart;
        /// The map of that file.
        auth_ident_map: String = "" => restart;
        /// User of the server that looks up in `auth_query` who is not in `[users.NAME]` nor in `auth_file`; its own
        /// password has to be there. Empty: nobody is looked up.
        auth_user: String = "" => live;
        /// Query that gives name and secret of the user `$1`, or no row. It runs on a server connection of a pool of
        /// `auth_user`, with the `search_path` `pg_catalog, pg_temp`: name the schema of everything else. A secret that
        /// is NULL lets nobody in; the default gives none once VALID UNTIL has passed.
        auth_query: String = "SELECT rolname, CASE WHEN rolvaliduntil IS NULL OR rolvaliduntil > now() THEN rolpassword END FROM pg_catalog.pg_authid WHERE rolcanlogin AND rolname = $1::text" => live;
        /// Database, as clients name it, where `auth_query` runs; empty: the one that the client asks for.
        auth_dbname: String = "" => live;
        /// How long an answer of `auth_query` is used again. After a failed login it is not, once it is a second old.
        auth_query_ttl: Duration = "1s", in 0..="1h" => live;
        /// Rounds of PBKDF2 for verifiers made from plain passwords; more is slower for guessers and for us.
        scram_iterations: u32 = 4096, in 4096..=1000000 => live;
    }
}

group! {
    /// `[server]`: how pgweir logs in to servers.
    Server, "server", |config: Config| config.server, SERVER {
        /// Methods that a server may ask for, as libpq's `require_auth`: any of `none`, `password`, `md5` and
        /// `scram-sha-256` separated by commas, or what is excluded, each with `!` in front; empty allows all. `none`
        /// is a server that asks for nothing. Any other request is refused before anything secret is sent.
        server_require_auth: RequireAuth = "" => live;
        /// Whether SCRAM is bound to the TLS connection under it: `disable`, `prefer` or `require`, as libpq's
        /// `channel_binding`. `require` refuses servers that cannot, that are reached without TLS, and that ask for
        /// anything else.
        server_channel_binding: BindingPolicy = "prefer" => live;
        /// Most rounds of PBKDF2 that a server may ask for. Derived keys are kept, so that only the first login pays.
        server_scram_iterations_max: u32 = 1000000, in 4096..=2147483647 => live;
        /// Longest time for a `password_command`; then it is killed, with all that it started.
        password_command_timeout: Duration = "10s", in "100ms"..="10min" => live;
        /// How long the output of a `password_command` is used; then, or when a server refuses it, it is run again. 0
        /// runs it for every login.
        password_command_ttl: Duration = "600s", in 0..="365d" => live;
    }
}

group! {
    /// `[tls]`: encryption between clients and pgweir (`client_tls_*`), and between pgweir and servers (`server_tls_*`).
    ///
    /// The files are PEM. They are read again when they change and on SIGHUP; one that is faulty is logged, and the old
    /// one stays in use. A private key must not be readable by others, as in Postgres.
    Tls, "tls", |config: Config| config.tls, TLS {
        /// What clients may or must do. `disable`: no TLS. `allow` and `prefer`: TLS for those that ask for it.
        /// `require`: TLS only. `verify-ca` and `verify-full`: TLS only, and with a certificate that `client_tls_ca_file`
        /// vouches for; in the other modes none is asked for. Cancel requests need no TLS, as in Postgres.
        client_tls_sslmode: SslMode = "disable" => live;
        /// File of the certificate shown to clients, with the intermediate ones behind it.
        client_tls_cert_file: String = "" => live;
        /// File of its private key.
        client_tls_key_file: String = "" => live;
        /// File of the authorities that vouch for clients' certificates.
        client_tls_ca_file: String = "" => live;
        /// TLS versions for clients: `tlsv1.2` and `tlsv1.3`, separated by commas, or `secure` for both.
        client_tls_protocols: String = "secure", check tls_protocols => live;
        /// Whether server connections use TLS, with libpq's meaning. `disable`: never. `allow`: if the server refuses the
        /// login without. `prefer`: if the server can. `require`: always. `verify-ca`: always, and `server_tls_ca_file`
        /// vouches for the server's certificate. `verify-full`: it is also for the host that is connected to. With
        /// `server_tls_ca_file`, it has to vouch in the weaker modes, too, wherever TLS is used.
        server_tls_sslmode: SslMode = "prefer" => live;
        /// File of the authorities that vouch for servers' certificates; `system` takes those of the operating system,
        /// and needs `verify-full`.
        server_tls_ca_file: String = "" => live;
        /// File of the certificate shown to servers that ask for one, with the intermediate ones behind it.
        server_tls_cert_file: String = "" => live;
        /// File of its private key.
        server_tls_key_file: String = "" => live;
        /// TLS versions for servers: `tlsv1.2` and `tlsv1.3`, separated by commas, or `secure` for both.
        server_tls_protocols: String = "secure", check tls_protocols => live;
    }
}

group! {
    /// `[pool]`: how many server connections there are, and how long they live.
    ///
    /// A pool belongs to one (database, user) pair.
    Pool, "pool", |config: Config| config.pool, POOL {
        /// When a server connection goes back to its pool: after a `session`, a `transaction` or a `statement`.
        pool_mode: PoolMode = "transaction" => live;
        /// Server connections of one pool, at most. Most servers do best between 2 and 4 per core.
        default_pool_size: u32 = 20, in 1..=10000 => live;
        /// Server connections of one pool that are kept open when idle; at most `default_pool_size`.
        min_pool_size: u32 = 0, in 0..=10000 => live;
        /// Further server connections of one pool for clients that waited `reserve_pool_timeout`; 0 is none.
        reserve_pool_size: u32 = 0, in 0..=10000 => live;
        /// Wait after which a client may use the reserve; 0 never opens the reserve.
        reserve_pool_timeout: Duration = "5s", in 0..="1h" => live;
        /// Server connections to one database over all its pools, at most; 0 sets no limit.
        max_db_connections: u32 = 0, in 0..=100000 => live;
        /// Server connections of one user over all pools, at most; 0 sets no limit.
        max_user_connections: u32 = 0, in 0..=100000 => live;
        /// Longest wait of a client for a server connection; 0 waits forever.
        query_wait_timeout: Duration = "120s", in 0..="365d" => live;
        /// Age at which a server connection is closed once it is idle; 0 closes it after its first use.
        server_lifetime: Duration = "3600s", in 0..="365d" => live;
        /// Idle time after which a server connection is closed; 0 keeps it.
        server_idle_timeout: Duration = "600s", in 0..="365d" => live;
        /// Longest time for a server connection to connect and log in.
        server_connect_timeout: Duration = "15s", in "10ms"..="1h" => live;
        /// Longest that what was sent to a server by TCP may stay unacknowledged, however often the kernel repeats it, before
        /// the server connection is lost; 0 leaves it to the kernel, which tries for some 15 minutes and meanwhile sends no
        /// probes. A server that does not read acknowledges all the same.
        server_ack_timeout: Duration = "0s", in 0..="1d" => live;
        /// Newest version of the Postgres protocol that servers are asked for. A server that has only older ones says
        /// so, at no cost; one that refuses is asked for `3.0` from then on.
        server_max_protocol_version: ProtocolVersion = "3.2" => live;
        /// Longest pause between failed server logins; the pause doubles from 100 ms, with jitter. Behind a failure a
        /// pool tries one login at a time.
        server_login_retry: Duration = "15s", in "100ms"..="1h" => live;
        /// Server logins under way at once, per pool.
        max_server_logins: u32 = 4, in 1..=1000 => live;
        /// Longest wait of a cancel request for its turn.
        cancel_wait_timeout: Duration = "10s", in "10ms"..="1h" => live;
        /// Query that cleans a server connection between sessions, in session mode; empty sends none.
        server_reset_query: String = "DISCARD ALL" => live;
        /// Pinned server connections of one pool, at most; 0 allows the whole pool. A client whose session state (a lock, a
        /// temporary table, ...) would pin one more is ended: 53300. A prepared statement that would is refused.
        max_pinned: u32 = 0, in 0..=10000 => live;
        /// Whether one server connection of a pool listens for all its clients that `LISTEN`, so that these give theirs
        /// back. A pool that may have but one server connection has no such.
        shared_listener: bool = true => live;
        /// How a client's prepared statements are run. `adaptive`: parsed for each execution, so that the server keeps
        /// nothing, until they have come often enough lately (the third time); then under a name, as long as there is
        /// room. `rewrite`: always under a name, shared by all clients. `strip`: always parsed, never kept. `session`:
        /// under the client's own name, on a server connection that it keeps.
        prepared_statements: StatementMode = "adaptive" => live;
        /// Prepared statements that one server connection keeps; the ones used longest ago make room for others. 0 keeps
        /// none.
        max_prepared_statements: u32 = 200, in 0..=100000 => live;
        /// Bytes of their texts that one server connection keeps. The server needs some times as much for them.
        max_prepared_text: usize = "1MiB", in 0..="1GiB" => live;
        /// One in so many server connections that go back to the pool, with nothing to suggest that session state was left
        /// on them, is audited all the same: a query that proves it. 0 audits none. What it finds is logged and counted as
        /// `pgweir_audit_failures_total`.
        audit_every: u32 = 0, in 0..=1000000 => live;
        /// How often each pool looks whether functions, triggers, views and their like have changed, besides whenever it
        /// sees a statement that changes them.
        catalog_check_interval: Duration = "30s", in "100ms"..="1h" => live;
        /// What `currval` and `lastval` tell in a later transaction than their `nextval`: never another client's value. `always`:
        /// the server connection of a transaction that may have called `nextval` is its client's for 250 ms more, if no other
        /// client needs it, and for 25 ms whoever needs it, if the client is one that asks. `learn`: the same, from the first
        /// question of one of the pool's clients on. `off`: 55000.
        sequence_values: SequenceValues = "learn" => live;
    }
}

group! {
    /// `[fleet]`: how several pgweirs share one server's limits, with no service beside the server itself.
    ///
    /// Each server connection says in its `application_name` whose it is (`app [pgweir web.1/ab12cd#7]`), which
    /// `pg_stat_activity` shows to every role. A new one is opened where all limits leave room, and what is beyond a pool's
    /// share goes back when others want it.
    Fleet, "fleet", |config: Config| config.fleet, FLEET {
        /// Whether the limits of the server are shared: the role's CONNECTION LIMIT, the database's, and `max_connections`. A
        /// tenth of each, at least 2, is left alone. It is also on with `db_connections`.
        fleet_budget: bool = false => restart;
        /// Connections to the server, at most, whoever has them: a limit like the server's own ones, which all pgweirs
        /// keep that have it. A pgweir that has no connection may log in above it to find out whether there is room. 0 is none.
        db_connections: u32 = 0, in 0..=100000 => restart;
        /// Name of this process in `application_name`: letters, digits, `.`, `_` and `-`, at most 16 of them; empty: that of
        /// the Heroku dyno (`DYNO`), else of the host.
        fleet_name: String = "" => restart;
        /// Weight of this process: of what is left when every pool has one connection, a pool of weight 3 may have three times
        /// as much as one of weight 1. Give a busy kind of process more than the others.
        fleet_weight: u32 = 1, in 1..=100 => restart;
        /// How often each pool looks who has connections, at most, unless it opens some or there is no room for more (then up to
        /// a third more often).
        fleet_census_period: Duration = "5s", in "500ms"..="1min" => restart;
    }
}

group! {
    /// `[followers]`: which reads go to followers, and how fresh they have to be.
    ///
    /// The followers of a database are named by its `followers`. One serves once it is proven to follow the primary: by the
    /// system's identifier, the timeline and the position in the write-ahead log. Whatever no follower may serve at the moment
    /// goes to the primary.
    Followers, "followers", |config: Config| config.followers, FOLLOWERS {
        /// Which transactions go to followers, where there are any. `off`: none. `hinted`: those whose client asks for it.
        /// `auto`: those, and all that are known to read and to do nothing else. In transaction mode alone.
        read_routing: ReadRouting = "off" => restart;
        /// How fresh a read on a follower has to be. `session`: it sees what its own session has written. `pool`: what any
        /// client of its pool has written. `bounded`: it is no older than `read_max_staleness`. `fleet`: it sees every
        /// commit that anybody was told of before it came, and waits for a look at the primary. `eventual`: any state of the
        /// past.
        read_freshness: ReadFreshness = "pool" => restart;
        /// How old a read may be at most with `read_freshness = bounded`.
        read_max_staleness: Duration = "1s", in "1ms"..="1d" => restart;
        /// The time between two looks at the positions of primary and followers, at least. While nothing is read there are
        /// none.
        read_sample_interval: Duration = "50ms", in "1ms"..="10s" => restart;
        /// A follower that is so far behind serves nothing, at any level of freshness, until it has caught up by half; 0 sets
        /// no limit.
        follower_max_lag: Duration = "30s", in 0..="1d" => restart;
        /// The same, in bytes of the write-ahead log; 0 sets no limit.
        follower_max_lag_bytes: usize = 0, in 0..="1024GiB" => restart;
        /// Whether clients of a database with `followers_of` are led to the primary while there is no follower to lead them
        /// to. Their transactions are read-only there, too, unless they say otherwise.
        primary_reads: bool = true => restart;
    }
}

group! {
    /// `[client]`: what one client may hold, send and wait for.
    Client, "client", |config: Config| config.client, CLIENT {
        /// Client connections, at most. An idle one costs little; `PgBouncer`'s default is 100.
        max_client_conn: u32 = 10000, in 1..=1000000 => live;
        /// Client connections that have not logged in yet, at most. Above it, whoever takes longest to log in gives way.
        max_login_clients: u32 = 1000, in 1..=1000000 => live;
        /// Longest time for a client to log in.
        client_login_timeout: Duration = "60s", in "10ms"..="1h" => live;
        /// Idle time outside a transaction after which a client is disconnected; 0 sets no limit.
        client_idle_timeout: Duration = "0s", in 0..="365d" => live;
        /// Idle time inside a transaction, or in the middle of a message, a COPY or a batch, after which a client is disconnected; 0
        /// sets no limit.
        idle_transaction_timeout: Duration = "0s", in 0..="365d" => live;
        /// Longest time for one query; then it is cancelled. A server that goes on with it is given up `cancel_wait_timeout`
        /// and 5 s later, and its client told that it is lost. 0 sets no limit.
        query_timeout: Duration = "0s", in 0..="365d" => live;
        /// Longest time for one transaction; 0 sets no limit.
        transaction_timeout: Duration = "0s", in 0..="365d" => live;
        /// Largest message that is accepted, its length word included.
        max_packet_size: usize = 2147483647, in 8192..=2147483647 => live;
        /// Prepared statements that one client may hold.
        max_client_statements: u32 = 10000, in 1..=1000000 => live;
        /// Texts of prepared statements that the process may hold.
        max_statement_memory: usize = "256MiB", in "64KiB"..="64GiB" => live;
        /// What becomes of a running query whose client is gone: cancelled if the client was `lost` (no goodbye),
        /// `always` or `never`. A COMMIT is never cancelled.
        cancel_on_disconnect: CancelOnDisconnect = "lost" => live;
        /// Text of a notice sent to each client after its login; empty sends none.
        login_notify_message: String = "" => live;
        /// Longest query text that is inspected; what is longer is treated as unknown.
        inspect_max: usize = "256KiB", in 0..="1GiB" => live;
        /// Failed logins per second that one address (of IPv6, one /64) may make as one user, and ten times as many
        /// over all users; beyond them its logins are refused at once. Cancel requests with a wrong key for a session are limited
        /// likewise, apart from logins; beyond the limit those for that session are ignored, right ones too. Over a Unix socket
        /// there is no such limit. 0 sets no limit.
        login_failure_rate: u32 = 10, in 0..=100000 => live;
        /// Failed logins that it may make at once before `login_failure_rate` counts.
        login_failure_burst: u32 = 50, in 1..=100000 => live;
    }
}

group! {
    /// `[http]`: metrics, limits, health and the dashboard.
    Http, "http", |config: Config| config.http, HTTP {
        /// Address and port of the HTTP endpoint, such as `127.0.0.1:9127` or `[::1]:9127`; port 0 takes any free
        /// one; empty switches it off.
        http_listen: String = "127.0.0.1:9127", check http_address => restart;
        /// What whoever asks has to send as `Authorization: Bearer TOKEN`: at least 16 printable ASCII characters. Without it
        /// `http_listen` has to be a loopback address. `/healthz` and `/readyz` answer yes or no to everybody. Empty: none.
        http_token: Option<Secret>, check http_token => restart;
    }
}

group! {
    /// `[log]`: what is logged, and how.
    Log, "log", |config: Config| config.log, LOG {
        /// Shape of a log line: `logfmt` or `json`.
        log_format: LogFormat = "logfmt" => restart;
        /// Least important line that is written: `error`, `warn`, `info`, `debug` or `trace`.
        log_level: LogLevel = "info" => live;
        /// Whether logins are logged.
        log_connections: bool = true => live;
        /// Whether disconnects are logged, with their reason.
        log_disconnections: bool = true => live;
        /// Whether errors that we sent to clients are logged.
        log_pooler_errors: bool = true => live;
        /// Statements that take this long, the wait for a server connection included, are logged: the text without its
        /// literals and comments (none of one that failed), the time waited and the time run, client, user and database; at
        /// most 10 a second. 0 logs none, and then nothing is kept of any text for it.
        log_slow_statements: Duration = "0s", in 0..="1h" => live;
    }
}

group! {
    /// `[process]`: the process as a whole.
    Process, "process", |config: Config| config.process, PROCESS {
        /// Longest time after SIGTERM for transactions to finish; 0 closes at once.
        shutdown_timeout: Duration = "25s", in 0..="1d" => live;
        /// Period of the statistics lines and of averages.
        stats_period: Duration = "60s", in "100ms"..="1d" => live;
    }
}
