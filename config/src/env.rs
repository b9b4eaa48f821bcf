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

/// The environment of this process as [`crate::Config::load`] wants it. Values that are not UTF-8 have U+FFFD in place
/// of what cannot be read, which is a fault in a variable of ours; names that are not UTF-8 are none of ours.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let vars = std::env::vars_os();
    vars.filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))).collect()
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
