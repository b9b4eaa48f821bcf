//! The shipped files: `pgweir.toml` is written from the table, parses, and changes nothing; the examples parse.
//!
//! After a change of the table: `BLESS=1 cargo test -p pgweir-config --test shipped`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fmt::Write as _;
use std::path::PathBuf;

use pgweir_config::entries::{database_keys, user_keys};
use pgweir_config::{Config, Kind, Setting, Sources, settings};

const HEAD: &str = "\
# pgweir.toml: every setting at its default. A file needs only what differs, and at least one database.
#
# A value comes from, the later wins: the default; this file (--config FILE or PGWEIR_CONFIG); the environment
# (PGWEIR_DEFAULT_POOL_SIZE=5); the command line (--default-pool-size 5). `pgweir check` shows where each came from.
#
# Times are seconds, or texts with ms, s, min, h or d. Sizes are bytes, or texts with B, KiB, MiB or GiB.
# \"Reload: live\" will take effect at a reload (there is none yet), \"Reload: restart\" at the next start.
#
# This file is written from the table in config/src/settings.rs by its test.
";

const DATABASES: &str = "
# [databases.NAME]: where the database that clients call NAME really is. The name \"*\" answers for every name without
# an entry. Short form: app = \"postgres://user:password@host:port/dbname\" under [databases]; %40 and its like are
# decoded, and keys of an entry may follow as ?pool_size=5. Also --database NAME=URL and
# PGWEIR_DATABASES=\"NAME=URL ...\": such a URL replaces host, port, dbname, user and the
# password with all that stands for it, not the other keys.
";

const USERS: &str = "
# [users.NAME]: a user that clients may log in as, and what differs for that user. Also --user NAME=PASSWORD and
# PGWEIR_USERS=\"NAME=PASSWORD ...\".
";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// `value` as TOML.
fn literal(kind: Kind, value: &str) -> String {
    match kind {
        Kind::Count | Kind::Flag => value.to_owned(),
        Kind::Bytes if value.parse::<u64>().is_ok() => value.to_owned(),
        _ => format!("\"{value}\""),
    }
}

/// A row's comment and its line; `mark` stands in front of the line.
fn row<T>(setting: &Setting<T>, mark: &str) -> String {
    let mut text = String::new();
    for line in setting.doc.lines() {
        let _ = writeln!(text, "# {}", line.trim());
    }
    let mut facts = String::new();
    if !setting.default.is_empty() || setting.example.is_empty() {
        let _ = write!(facts, "Default {}. ", literal(setting.kind, setting.default));
    }
    if let Some(bounds) = setting.bounds {
        let _ = write!(facts, "Range {}..={}. ", bounds.low, bounds.high);
    }
    let _ = writeln!(text, "# {facts}Reload: {}.", setting.reload.as_str());
    let value = if setting.example.is_empty() { setting.default } else { setting.example };
    let _ = writeln!(text, "{mark}{} = {}", setting.name, literal(setting.kind, value));
    text
}

fn shipped() -> String {
    let mut text = HEAD.to_owned();
    for group in settings::GROUPS {
        let _ = write!(text, "\n# {}\n[{}]\n", group.doc, group.name);
        for setting in group.settings {
            let _ = write!(text, "\n{}", row(setting, ""));
        }
    }
    let _ = writeln!(text, "{DATABASES}#[databases.app]");
    for setting in database_keys() {
        let _ = write!(text, "\n{}", row(setting, "#"));
    }
    let _ = writeln!(text, "{USERS}#[users.app]");
    for setting in user_keys() {
        let _ = write!(text, "\n{}", row(setting, "#"));
    }
    text
}

fn read(text: &str, args: &[&str]) -> Config {
    let args: Vec<_> = args.iter().map(|arg| (*arg).to_owned()).collect();
    Config::from_sources(Sources { file: Some(("pgweir.toml", text)), env: &[], args: &args }).unwrap()
}

#[test]
fn the_shipped_file_is_what_the_table_says() {
    let file = path("pgweir.toml");
    if std::env::var_os("BLESS").is_some() {
        // Renamed into place, so that the tests beside this one never read half a file.
        let fresh = path("pgweir.toml.new");
        std::fs::write(&fresh, shipped()).unwrap();
        std::fs::rename(fresh, &file).unwrap();
    }
    assert!(std::fs::read_to_string(file).unwrap() == shipped(), "run with BLESS=1 to write pgweir.toml anew");
}

#[test]
fn the_shipped_file_sets_every_key_to_its_default() {
    let text = std::fs::read_to_string(path("pgweir.toml")).unwrap();
    let entries = ["--database=app=postgres://h/d", "--user=app=x"];
    let mut shipped = read(&text, &entries);
    let mut bare = read("", &entries);
    for setting in settings::all() {
        assert!(shipped.origin(setting.name).to_string().starts_with("pgweir.toml:"), "{} is missing", setting.name);
    }
    shipped.origins.clear();
    bare.origins.clear();
    assert_eq!(shipped, bare);
    shipped.databases.clear();
    shipped.users.clear();
    assert_eq!(shipped, Config::default());
}

#[test]
fn the_commented_entries_are_whole_and_right() {
    const EITHER: [&str; 3] = ["password", "password_file", "password_command"];
    let text = std::fs::read_to_string(path("pgweir.toml")).unwrap();
    for kept in EITHER {
        let left_out: Vec<&str> = EITHER.into_iter().filter(|key| *key != kept).collect();
        let mut uncommented = String::new();
        for line in text.lines() {
            // A commented line of TOML has no space behind its mark, prose has.
            let line = line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' ')).unwrap_or(line);
            let is_user = uncommented.contains("[users.app]");
            // What names another entry's followers has next to nothing of its own.
            let left_out = left_out.iter().chain(&["followers_of"]).any(|key| line.starts_with(&format!("{key} =")));
            if is_user || !left_out {
                let _ = writeln!(uncommented, "{line}");
            }
        }
        let config = read(&uncommented, &[]);
        let set = |key: String| config.origins.contains_key(&key);
        let wanted = database_keys()
            .iter()
            .filter(|key| key.name == kept || !EITHER.contains(&key.name) && key.name != "followers_of");
        assert!(wanted.into_iter().all(|key| set(format!("databases.app.{}", key.name))), "{kept}");
        assert!(user_keys().iter().all(|key| set(format!("users.app.{}", key.name))));
    }
}

#[test]
fn every_default_shows_as_its_text_and_lies_in_its_range() {
    let config = Config::default();
    for setting in settings::all() {
        let text = literal(setting.kind, setting.default);
        assert_eq!(setting.show(&config), setting.default, "{}", setting.name);
        let file = format!("[{}]\n{} = {text}\n", setting.group, setting.name);
        read(&file, &["--database=app=postgres://h", "--user=app=x"]);
    }
}

#[test]
fn every_row_has_a_doc_a_range_if_it_counts_and_a_name_of_its_own() {
    let mut names = std::collections::BTreeSet::new();
    for setting in settings::all() {
        let counts = matches!(setting.kind, Kind::Count | Kind::Bytes | Kind::Time);
        assert_eq!(setting.bounds.is_some(), counts, "{}", setting.name);
        assert!(setting.doc.trim_end().ends_with('.'), "{}", setting.name);
        assert!(names.insert(setting.name), "{} stands twice", setting.name);
    }
}

#[test]
fn both_ends_of_every_range_are_allowed_and_the_next_is_not() {
    for setting in settings::all() {
        let Some(bounds) = setting.bounds else { continue };
        let outcome = |value: &str| {
            let flag = format!("--{}={value}", setting.name);
            let args = ["--database=app=postgres://h", "--user=app=x", &flag].map(str::to_owned);
            Config::from_sources(Sources { args: &args, ..Sources::default() })
        };
        let complains = |value: &str| outcome(value).is_err_and(|faults| faults.to_string().contains(": outside "));
        assert!(!complains(bounds.low) && !complains(bounds.high), "{}", setting.name);
        let digits: String = bounds.high.chars().take_while(char::is_ascii_digit).collect();
        let unit = bounds.high.trim_start_matches(|c: char| c.is_ascii_digit());
        let above = digits.parse::<u64>().unwrap() + 1;
        assert!(complains(&format!("{above}{unit}")), "{} takes {above}{unit}", setting.name);
        assert!(complains("-1"), "{} takes -1", setting.name);
    }
}

#[test]
fn the_examples_parse() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path("examples")).unwrap() {
        let file = entry.unwrap().path();
        let config = read(&std::fs::read_to_string(&file).unwrap(), &[]);
        assert!(!config.databases.is_empty(), "{}", file.display());
        names.push(file.file_name().unwrap().to_string_lossy().into_owned());
    }
    names.sort();
    assert_eq!(names, ["many-databases.toml", "sidecar.toml"]);
}
