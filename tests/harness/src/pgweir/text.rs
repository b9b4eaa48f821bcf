//! pgweir's configuration as text.
#![allow(clippy::panic, reason = "test support: a test's failure is a panic")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::cluster::{APP_DATABASE, APP_PASSWORD, APP_USER, Cluster};

/// Which table of the configuration a key stands in.
#[rustfmt::skip]
const TABLES: [(&str, &[&str]); 7] = [
    ("listen", &["listen_addr", "listen_port", "listen_backlog", "tcp_keepalive", "tcp_keepidle", "tcp_keepintvl", "tcp_keepcnt", "tcp_user_timeout"]),
    ("auth", &["auth_type", "scram_iterations"]),
    ("pool", &[
        "pool_mode", "default_pool_size", "min_pool_size", "reserve_pool_size", "reserve_pool_timeout", "max_db_connections", "max_user_connections",
        "query_wait_timeout", "server_lifetime", "server_idle_timeout", "server_connect_timeout", "server_login_retry", "max_server_logins",
        "cancel_wait_timeout", "server_reset_query", "max_pinned",
    ]),
    ("client", &[
        "max_client_conn", "max_login_clients", "client_login_timeout", "client_idle_timeout", "idle_transaction_timeout", "query_timeout",
        "transaction_timeout", "max_packet_size", "max_client_statements", "max_statement_memory", "cancel_on_disconnect", "login_notify_message", "inspect_max",
    ]),
    ("http", &["http_listen"]),
    ("log", &["log_format", "log_level", "log_connections", "log_disconnections", "log_pooler_errors"]),
    ("process", &["shutdown_timeout", "stats_period"]),
];

/// A configuration for tests: any free ports, SCRAM, the user [`APP_USER`], and the database
/// [`APP_DATABASE`] on `cluster`; then `settings`, which win. A value that reads as a number or
/// a boolean is written bare, any other as a string. A key that this function does not know is
/// given as `table.key`, for example `databases.app.pool_size`.
///
/// # Panics
///
/// On an unknown key without a table.
#[must_use]
pub fn pgweir_toml(cluster: &Cluster, settings: &[(&str, &str)]) -> String {
    let (host, port) = (cluster.host(), cluster.port().to_string());
    let database = format!("databases.{APP_DATABASE}");
    let user = format!("users.{APP_USER}");
    let fixed = [
        ("listen", "listen_addr", "127.0.0.1"),
        ("listen", "listen_port", "0"),
        ("http", "http_listen", "127.0.0.1:0"),
        ("auth", "auth_type", "scram-sha-256"),
        (database.as_str(), "host", host),
        (&database, "port", &port),
        (&database, "dbname", APP_DATABASE),
        (&database, "user", APP_USER),
        (&database, "password", APP_PASSWORD),
        (&user, "password", APP_PASSWORD),
    ];
    let given = settings.iter().map(|(key, value)| {
        let (table, key) = key.rsplit_once('.').unwrap_or_else(|| (table_of(key), key));
        (table, key, *value)
    });
    let mut tables: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
    for (table, key, value) in fixed.into_iter().chain(given) {
        tables.entry(table).or_default().insert(key, value);
    }
    let mut text = String::new();
    for (table, keys) in tables {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "[{table}]");
        for (key, value) in keys {
            let _ = writeln!(text, "{key} = {}", toml_value(value));
        }
        text.push('\n');
    }
    text
}

fn table_of(key: &str) -> &'static str {
    let found = TABLES.iter().find(|(_, keys)| keys.contains(&key));
    match found {
        Some((table, _)) => table,
        None => panic!("{key}: in no table known to the harness; write it as table.key"),
    }
}

fn toml_value(value: &str) -> String {
    let bare = value == "true" || value == "false" || value.parse::<i64>().is_ok();
    if bare {
        return value.to_owned();
    }
    let mut quoted = String::from('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::{table_of, toml_value};

    #[test]
    fn values_are_typed_by_their_look() {
        #[rustfmt::skip]
        let table = [
            ("number",    "3",            "3"),
            ("boolean",   "true",         "true"),
            ("duration",  "250ms",        r#""250ms""#),
            ("empty",     "",             r#""""#),
            ("odd",       "a\"b\\c\n",    r#""a\"b\\c\u000A""#),
        ];
        for (name, value, want) in table {
            assert_eq!(toml_value(value), want, "{name}");
        }
    }

    #[test]
    fn a_key_finds_its_table() {
        assert_eq!(table_of("default_pool_size"), "pool");
        assert_eq!(table_of("stats_period"), "process");
    }

    #[test]
    #[should_panic(expected = "no_such_key")]
    fn an_unknown_key_is_named() {
        table_of("no_such_key");
    }
}
