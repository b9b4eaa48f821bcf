//! Environment variables: `PGWEIR_<KEY>`.

use crate::draft::Draft;
use crate::fault::Problem;
use crate::origin::Origin;
use crate::settings;
use crate::typed::Raw;

/// In front of every variable that is ours.
const PREFIX: &str = "PGWEIR_";
/// Names the file.
pub(crate) const CONFIG: &str = "PGWEIR_CONFIG";
/// Holds database entries: NAME=URL, separated by white space.
const DATABASES: &str = "PGWEIR_DATABASES";
/// The limit that is to be taken for the server's; the server may be asked instead.
const DB_CONNECTIONS: &str = "PGWEIR_DB_CONNECTIONS";
/// The server is asked.
const AUTO: &str = "auto";
/// Holds users: NAME=PASSWORD, separated by white space.
const USERS: &str = "PGWEIR_USERS";

/// Other names of settings; each outranks those below it, and the setting's own name outranks all. Those of ours hold
/// everywhere, those of Heroku's buildpack for `PgBouncer` under `pgweir exec`. What the buildpack has and is not here means
/// nothing. Those of `exec` itself stand beside it.
///
/// Source: heroku-buildpack-pgbouncer, `bin/gen-pgbouncer-conf.sh` and its README.
pub const ALIASES: [(&str, &str); 33] = [
    ("PGWEIR_DRAIN", "shutdown_timeout"),
    ("PGWEIR_IDLE", "server_idle_timeout"),
    // HOST:PORT, either of them.
    ("PGWEIR_LISTEN", "listen_addr"),
    ("PGWEIR_LISTEN", "listen_port"),
    ("PGWEIR_LOG", "log_format"),
    ("PGWEIR_MAX_LAG", "follower_max_lag"),
    ("PGWEIR_MAX_LIFETIME", "server_lifetime"),
    ("PGWEIR_POOL_MAX", "default_pool_size"),
    ("PGWEIR_POOL_MIN", "min_pool_size"),
    ("PGWEIR_READS", "read_routing"),
    ("PGWEIR_STATEMENTS", "max_prepared_statements"),
    ("PGWEIR_STATS", "stats_period"),
    ("PGWEIR_TLS", "server_tls_sslmode"),
    ("PGWEIR_WAIT", "query_wait_timeout"),
    ("PGBOUNCER_AUTH_TYPE", "auth_type"),
    ("PGBOUNCER_DEFAULT_POOL_SIZE", "default_pool_size"),
    ("PGBOUNCER_LOG_CONNECTIONS", "log_connections"),
    ("PGBOUNCER_LOG_DISCONNECTIONS", "log_disconnections"),
    ("PGBOUNCER_LOG_POOLER_ERRORS", "log_pooler_errors"),
    ("PGBOUNCER_MAX_CLIENT_CONN", "max_client_conn"),
    ("PGBOUNCER_MAX_DB_CONNECTIONS", "max_db_connections"),
    ("PGBOUNCER_MAX_PREPARED_STATEMENTS", "max_prepared_statements"),
    ("PGBOUNCER_MIN_POOL_SIZE", "min_pool_size"),
    ("PGBOUNCER_POOL_MODE", "pool_mode"),
    ("PGBOUNCER_QUERY_WAIT_TIMEOUT", "query_wait_timeout"),
    ("PGBOUNCER_RESERVE_POOL_SIZE", "reserve_pool_size"),
    ("PGBOUNCER_RESERVE_POOL_TIMEOUT", "reserve_pool_timeout"),
    ("PGBOUNCER_SERVER_CONNECT_TIMEOUT", "server_connect_timeout"),
    ("PGBOUNCER_SERVER_IDLE_TIMEOUT", "server_idle_timeout"),
    ("PGBOUNCER_SERVER_LIFETIME", "server_lifetime"),
    ("PGBOUNCER_SERVER_RESET_QUERY", "server_reset_query"),
    ("PGBOUNCER_SERVER_TLS_SSLMODE", "server_tls_sslmode"),
    ("PGBOUNCER_STATS_PERIOD", "stats_period"),
];

/// Words of an alias that its setting has not, and the setting's; empty for the default.
const WORDS: [(&str, &str, &str); 4] = [
    ("PGWEIR_POOL_MAX", "auto", ""),
    ("PGWEIR_READS", "follower", "auto"),
    ("PGWEIR_TLS", "auto", ""),
    ("PGWEIR_TLS", "verify", "verify-full"),
];

/// The environment of this process as [`crate::Config::load`] wants it. Values that are not UTF-8 have U+FFFD in place
/// of what cannot be read, which is a fault in a variable of ours; names that are not UTF-8 are none of ours.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let vars = std::env::vars_os();
    vars.filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))).collect()
}

/// Reads the buildpack's variables into `draft`, those whose setting no variable of ours sets.
pub(crate) fn read_buildpack(draft: &mut Draft, env: &[(String, String)]) {
    read_aliases(draft, env, |alias| !alias.starts_with(PREFIX));
}

fn read_aliases(draft: &mut Draft, env: &[(String, String)], which: fn(&str) -> bool) {
    for (place, (alias, key)) in ALIASES.iter().enumerate().filter(|(_, (alias, _))| which(alias)) {
        let Some(value) = meant(env, alias, key) else { continue };
        let own = spell(key);
        let mut above = ALIASES.iter().take(place).filter(|(_, other)| other == key);
        if env.iter().any(|(name, _)| *name == own) || above.any(|(name, _)| meant(env, name, key).is_some()) {
            continue;
        }
        let origin = Origin::Env { name: (*alias).into() };
        match settings::find(key) {
            _ if value.contains(char::REPLACEMENT_CHARACTER) => draft.fault(*alias, &origin, Problem::Mangled),
            Some(setting) => draft.set(setting, &Raw::Word(value), &origin),
            None => {}
        }
    }
}

/// What `alias` says about the setting `key`.
fn meant<'a>(env: &'a [(String, String)], alias: &str, key: &str) -> Option<&'a str> {
    let (_, value) = env.iter().find(|(name, _)| name == alias)?;
    let value = match (alias, value.rsplit_once(':')) {
        ("PGWEIR_LISTEN", Some((host, port))) => {
            if key == "listen_port" {
                port
            } else {
                host.trim_start_matches('[').trim_end_matches(']')
            }
        }
        ("PGWEIR_LISTEN", None) if key == "listen_port" => "",
        _ => value,
    };
    let word = WORDS.iter().find(|(name, word, _)| *name == alias && *word == value);
    let value = word.map_or(value, |(.., means)| *means);
    // An empty one means the default there.
    (!value.is_empty() || key == "server_reset_query").then_some(value)
}

/// Reads the variables into `draft`.
pub(crate) fn read(draft: &mut Draft, env: &[(String, String)]) {
    read_aliases(draft, env, |alias| alias.starts_with(PREFIX));
    for (name, value) in env {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let origin = Origin::Env { name: name.as_str().into() };
        match name.as_str() {
            CONFIG => {}
            // As it is without it.
            DB_CONNECTIONS if value == AUTO => {}
            alias if ALIASES.iter().any(|(name, _)| *name == alias) => {}
            _ if value.contains(char::REPLACEMENT_CHARACTER) => draft.fault(name, &origin, Problem::Mangled),
            DATABASES => for_pairs(draft, value, "databases", &origin, Draft::set_database_url),
            USERS => for_pairs(draft, value, "users", &origin, Draft::set_user_password),
            _ if set_by_an_orchestrator(key, value) => {}
            _ => match settings::all().find(|setting| spell(setting.name) == *name) {
                Some(setting) => draft.set(setting, &Raw::Word(value), &origin),
                None => {
                    draft.unknown(name, &key.to_ascii_lowercase(), &origin, &["config", "databases", "users"], spell);
                }
            },
        }
    }
}

fn spell(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase())
}

fn for_pairs(draft: &mut Draft, list: &str, entries: &str, origin: &Origin, set: fn(&mut Draft, &str, &str, &Origin)) {
    for (place, pair) in (1..).zip(list.split_whitespace()) {
        // A word without its name is not shown: it may be the tail of a password with a space in it.
        let Some((name, value)) = pair.split_once('=') else {
            draft.fault(format!("{entries}, word {place}"), origin, Problem::NotAPair);
            continue;
        };
        set(draft, name, value, origin);
    }
}

/// Kubernetes and Docker links describe a service called `pgweir` to its neighbours by variables of our prefix:
/// `PGWEIR_SERVICE_HOST`, `PGWEIR_SERVICE_PORT_SQL`, `PGWEIR_PORT=tcp://...`, `PGWEIR_PORT_6432_TCP_ADDR`.
///
/// Source: the Kubernetes manual, "Service", "Environment variables".
fn set_by_an_orchestrator(key: &str, value: &str) -> bool {
    let numbered = key.strip_prefix("PORT_").is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()));
    key == "SERVICE_HOST"
        || key == "SERVICE_PORT"
        || key.starts_with("SERVICE_PORT_")
        || numbered
        || (key == "PORT" && value.contains("://"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::preset::exec_base;

    fn pairs(typed: &[(&str, &str)]) -> Vec<(String, String)> {
        typed.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn with_a_database(typed: &[(&str, &str)]) -> Vec<(String, String)> {
        [pairs(&[("PGWEIR_DATABASES", "d=postgres://u:p@h/d"), ("PGWEIR_USERS", "u=p")]), pairs(typed)].concat()
    }

    #[test]
    fn an_alias_means_its_setting() {
        #[rustfmt::skip]
        let table: [(&str, &[(&str, &str)], &str, &str); 24] = [
            ("drain",              &[("PGWEIR_DRAIN", "20s")],                                  "shutdown_timeout", "20s"),
            ("idle",               &[("PGWEIR_IDLE", "61s")],                                   "server_idle_timeout", "61s"),
            ("listen, the host",   &[("PGWEIR_LISTEN", "127.0.0.2:6000")],                      "listen_addr", "127.0.0.2"),
            ("listen, the port",   &[("PGWEIR_LISTEN", "127.0.0.2:6000")],                      "listen_port", "6000"),
            ("listen, IPv6",       &[("PGWEIR_LISTEN", "[::1]:6000")],                          "listen_addr", "::1"),
            ("a host alone",       &[("PGWEIR_LISTEN", "127.0.0.2")],                           "listen_port", "0"),
            ("a port alone",       &[("PGWEIR_LISTEN", ":6000")],                               "listen_addr", "127.0.0.1"),
            ("log",                &[("PGWEIR_LOG", "json")],                                   "log_format", "json"),
            ("lag",                &[("PGWEIR_MAX_LAG", "9s")],                                 "follower_max_lag", "9s"),
            ("lifetime",           &[("PGWEIR_MAX_LIFETIME", "1800s")],                         "server_lifetime", "1800s"),
            ("pool",               &[("PGWEIR_POOL_MAX", "7")],                                 "default_pool_size", "7"),
            ("pool, auto",         &[("PGWEIR_POOL_MAX", "auto")],                              "default_pool_size", "20"),
            ("pool, empty",        &[("PGWEIR_POOL_MAX", "")],                                  "default_pool_size", "20"),
            ("least",              &[("PGWEIR_POOL_MIN", "2")],                                 "min_pool_size", "2"),
            ("reads",              &[("PGWEIR_READS", "follower")],                             "read_routing", "auto"),
            ("reads, off",         &[("PGWEIR_READS", "off")],                                  "read_routing", "off"),
            ("statements",         &[("PGWEIR_STATEMENTS", "50")],                              "max_prepared_statements", "50"),
            ("stats",              &[("PGWEIR_STATS", "30s")],                                  "stats_period", "30s"),
            ("TLS, auto",          &[("PGWEIR_TLS", "auto")],                                   "server_tls_sslmode", "prefer"),
            ("wait",               &[("PGWEIR_WAIT", "3s")],                                    "query_wait_timeout", "3s"),
            ("the limit, auto",    &[("PGWEIR_DB_CONNECTIONS", "auto")],                        "db_connections", "0"),
            ("its own name wins",  &[("PGWEIR_POOL_MAX", "7"), ("PGWEIR_DEFAULT_POOL_SIZE", "8")], "default_pool_size", "8"),
            ("ours wins",          &[("PGBOUNCER_DEFAULT_POOL_SIZE", "9"), ("PGWEIR_POOL_MAX", "7")], "default_pool_size", "7"),
            ("auto says nothing",  &[("PGBOUNCER_DEFAULT_POOL_SIZE", "9"), ("PGWEIR_POOL_MAX", "auto")], "default_pool_size", "9"),
        ];
        for (name, typed, key, want) in table {
            let config = Config::load_exec(exec_base(false), &[], &with_a_database(typed));
            let config = config.unwrap_or_else(|faults| panic!("{name}: {faults}"));
            let got = settings::find(key).map(|setting| setting.show(&config));
            assert_eq!(got.as_deref(), Some(want), "{name}");
        }
    }

    #[test]
    fn a_wrong_value_of_an_alias_is_told_by_the_name_that_was_typed() {
        #[rustfmt::skip]
        let table = [
            ("PGWEIR_POOL_MAX", "many"), ("PGWEIR_LISTEN", "127.0.0.1:no"), ("PGWEIR_TLS", "maybe"), ("PGWEIR_LOG", "off"),
            ("PGWEIR_WAIT", "soon"), ("PGWEIR_WAIT", "\u{fffd}"), ("PGWEIR_RESERVE", "2"),
        ];
        for (name, value) in table {
            let faults = Config::load_exec(exec_base(false), &[], &with_a_database(&[(name, value)])).err();
            let told = faults.map(|faults| faults.to_string()).unwrap_or_default();
            assert!(told.contains(name), "{name}={value}: {told}");
        }
    }

    #[test]
    fn every_alias_stands_for_a_setting_and_none_has_its_name() {
        for (alias, key) in ALIASES {
            assert!(settings::find(key).is_some(), "{alias}: {key}");
            assert!(settings::all().all(|setting| spell(setting.name) != alias), "{alias}");
        }
    }
}
