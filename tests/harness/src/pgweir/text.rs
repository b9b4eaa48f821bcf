//! pgweir's configuration as text.
#![allow(clippy::panic, reason = "test support: a test's failure is a panic")]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use pgweir_config::settings;

use crate::cluster::{APP_DATABASE, APP_PASSWORD, APP_USER, Cluster};

/// A configuration for tests: any free ports, SCRAM, the user [`APP_USER`], and the database
/// [`APP_DATABASE`] on `cluster`; then what is `given`, which wins. A value that reads as a number or
/// a boolean is written bare, any other as a string. A key of a database or a user is given with its
/// table: `databases.app.pool_size`.
///
/// # Panics
///
/// On a key that `pgweir-config` does not know, unless it is given with its table.
#[must_use]
pub fn pgweir_toml(cluster: &Cluster, given: &[(&str, &str)]) -> String {
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
    let given = given.iter().map(|(key, value)| {
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
    match settings::find(key) {
        Some(setting) => setting.group,
        None => panic!("{key}: no setting of pgweir; one of a database or a user is table.key"),
    }
}

fn toml_value(value: &str) -> String {
    // Digits with a zero in front are a mode or a name, never a number of TOML.
    let number = value.parse::<i64>().is_ok_and(|number| number.to_string() == value);
    let bare = value == "true" || value == "false" || number;
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
            ("a mode",    "0770",         r#""0770""#),
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
