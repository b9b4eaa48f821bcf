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
/// Holds users: NAME=PASSWORD, separated by white space.
const USERS: &str = "PGWEIR_USERS";

/// The variables of Heroku's buildpack for `PgBouncer`, and the setting that each stands for under `pgweir exec`; a variable
/// of ours outranks its alias. Those of `exec` itself stand beside it; what the buildpack has and is not here means nothing.
///
/// Source: heroku-buildpack-pgbouncer, `bin/gen-pgbouncer-conf.sh` and its README.
pub const BUILDPACK: [(&str, &str); 19] = [
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

/// The environment of this process as [`crate::Config::load`] wants it. Values that are not UTF-8 have U+FFFD in place
/// of what cannot be read, which is a fault in a variable of ours; names that are not UTF-8 are none of ours.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let vars = std::env::vars_os();
    vars.filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))).collect()
}

/// Reads the buildpack's variables into `draft`, those whose setting has no variable of ours.
pub(crate) fn read_buildpack(draft: &mut Draft, env: &[(String, String)]) {
    for (name, value) in env {
        let Some((_, key)) = BUILDPACK.iter().find(|(alias, _)| alias == name) else { continue };
        let own = spell(key);
        // An empty one means the default there.
        let is_unset = value.is_empty() && *key != "server_reset_query";
        if is_unset || env.iter().any(|(other, _)| *other == own) {
            continue;
        }
        let origin = Origin::Env { name: name.as_str().into() };
        match settings::find(key) {
            _ if value.contains(char::REPLACEMENT_CHARACTER) => draft.fault(name, &origin, Problem::Mangled),
            Some(setting) => draft.set(setting, &Raw::Word(value), &origin),
            None => {}
        }
    }
}

/// Reads the variables into `draft`.
pub(crate) fn read(draft: &mut Draft, env: &[(String, String)]) {
    for (name, value) in env {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        let origin = Origin::Env { name: name.as_str().into() };
        match name.as_str() {
            CONFIG => {}
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
