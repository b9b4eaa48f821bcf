//! What is fuzzed of [`pgweir_config`]: functions that take any bytes and panic when a promise is broken.
//!
//! Whatever stands in a source, the outcome is a whole configuration or a list of faults, one line each; and no fault and
//! no description repeats a password. See `proto/fuzz` for how they are run.

#![allow(clippy::panic, clippy::missing_panics_doc, reason = "a panic is how a broken promise is told")]

use pgweir_config::{Config, Faults, Sources};

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, fn(&[u8])); 4] =
    [("file", file), ("environment", environment), ("command_line", command_line), ("url", url)];

/// In a password of a URL, and nowhere else.
const PASSWORD: &str = "S3cr3t";

/// The text of the file.
pub fn file(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    judge(Config::from_sources(Sources { file: Some(("pgweir.toml", text)), ..Sources::default() }));
}

/// One variable a line, `NAME=value`; each name gets our prefix.
pub fn environment(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let env: Vec<_> = pairs.map(|(name, value)| (format!("PGWEIR_{name}"), value.to_owned())).collect();
    judge(Config::from_sources(Sources { env: &env, ..Sources::default() }));
}

/// One word a line.
pub fn command_line(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let args: Vec<String> = text.lines().map(str::to_owned).collect();
    judge(Config::from_sources(Sources { args: &args, ..Sources::default() }));
}

/// What stands in a URL behind its scheme and user; the password is put in front of it.
pub fn url(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // Only a password may hold it.
    let (before, after) = text.split_once('\n').unwrap_or(("", text));
    let text = format!("postgres://{before}:{PASSWORD}{after}");
    let args = [format!("--database=app={text}"), "--auth-type=trust".to_owned()];
    let told = judge(Config::from_sources(Sources { args: &args, ..Sources::default() }));
    if told.contains(PASSWORD) {
        // What came behind it may make it a part of something else, which may be shown: a database's name, say.
        let authority = text.trim_start_matches("postgres://").split(['/', '?', '#']).next().unwrap_or_default();
        let is_password =
            authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(PASSWORD) && !before.contains('@'));
        assert!(!is_password, "a password is shown: {told}");
    }
}

/// Gives all that is told of it.
fn judge(result: Result<Config, Faults>) -> String {
    match result {
        Ok(config) => {
            assert!(!config.databases.is_empty());
            assert!(config.pool.min_pool_size <= config.pool.default_pool_size);
            let told = config.describe().map(|line| format!("{}={}\n", line.key, line.value));
            let told: String = told.collect();
            told + &format!("{config:?}")
        }
        Err(faults) => {
            assert!(!faults.0.is_empty());
            let told = faults.to_string();
            assert_eq!(told.lines().count(), faults.0.len(), "a fault is one line: {told}");
            told
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_input_of_the_corpora_breaks_a_promise() {
        assert!(pgweir_proto_fuzz::replay(env!("CARGO_MANIFEST_DIR"), &TARGETS) > 50);
    }
}
