//! The command line: `--key=value` or `--key value`, dashes and underscores alike.

use crate::draft::Draft;
use crate::fault::Problem;
use crate::origin::Origin;
use crate::settings;
use crate::typed::Raw;

/// The flags that are no settings.
const SPECIALS: [&str; 3] = ["--config", "--database", "--user"];

/// One flag and its value; what is neither has a problem in place of the value.
pub(crate) struct Flag<'a> {
    /// As typed, without the value; for a word that is no flag, the word.
    pub(crate) name: &'a str,
    pub(crate) value: Result<&'a str, Problem>,
}

/// Splits the command line into flags.
pub(crate) fn flags(args: &[String]) -> Vec<Flag<'_>> {
    let mut flags = Vec::new();
    let mut words = args.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let is_flag = word.strip_prefix("--").is_some_and(|name| !name.is_empty());
        let (name, value) = match word.split_once('=') {
            _ if !is_flag => (word, Err(Problem::NotAFlag)),
            Some((name, value)) => (name, Ok(value)),
            // A value that begins with dashes needs the `=`, so that a forgotten value does not swallow a flag.
            None => (word, words.next_if(|next| !next.starts_with("--")).ok_or(Problem::NoValue)),
        };
        flags.push(Flag { name, value });
    }
    flags
}

/// Reads the command line into `draft`.
pub(crate) fn read(draft: &mut Draft, args: &[String]) {
    let mut config_seen = false;
    for (index, Flag { name, value }) in flags(args).into_iter().enumerate() {
        let key = name.trim_start_matches("--").replace('-', "_");
        let setting = settings::find(&key);
        let origin = Origin::Flag { name: name.into() };
        let value = match value {
            Ok(value) => value,
            // The word is not shown: it may be a password that lost its flag.
            Err(problem @ Problem::NotAFlag) => {
                let place = index.saturating_add(1);
                let origin = Origin::Flag { name: "the command line".into() };
                draft.fault(format!("argument {place}"), &origin, problem);
                continue;
            }
            Err(_) if setting.is_none() && !SPECIALS.contains(&name) => "",
            Err(problem) => {
                draft.fault(name, &origin, problem);
                continue;
            }
        };
        match (name, setting) {
            ("--config", _) if config_seen => draft.fault(name, &origin, Problem::Repeated),
            ("--config", _) => config_seen = true,
            ("--database", _) => set_pair(draft, value, &origin, Draft::set_database_url),
            ("--user", _) => set_pair(draft, value, &origin, Draft::set_user_password),
            (_, Some(setting)) => draft.set(setting, &Raw::Word(value), &origin),
            (_, None) => draft.unknown(name, &key, &origin, &["config", "database", "user"], spell),
        }
    }
}

fn spell(name: &str) -> String {
    format!("--{}", name.replace('_', "-"))
}

fn set_pair(draft: &mut Draft, pair: &str, origin: &Origin, set: fn(&mut Draft, &str, &str, &Origin)) {
    match pair.split_once('=') {
        Some((name, value)) => set(draft, name, value, origin),
        None => draft.fault(origin.to_string(), origin, Problem::NotAPair),
    }
}
