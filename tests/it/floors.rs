//! The house rules that a machine can check: which module of `src` may use which, and what lies at the
//! top level of the repository.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use pgweir_config::{entries, settings};

/// `DESIGN.md` section 2, bottom floor first. A module uses only floors below its own.
const FLOORS: [&[&str]; 11] = [
    &["stats", "clock", "sql", "mutant"],
    &["net", "settings", "prepared", "catalog", "budget", "replica", "metrics"],
    &["audit"],
    &["backend"],
    &["pool"],
    &["route", "cancel", "state"],
    &["client"],
    &["admin", "observe"],
    &["worker"],
    &["supervisor", "demo", "check"],
    // It keeps what the supervisor starts.
    &["sidecar"],
];

/// What may lie at the top level, besides files whose names begin with a dot, licences, and what
/// `.gitignore` names.
const TOP_LEVEL: [&str; 9] =
    ["Cargo.toml", "Cargo.lock", "src", "proto", "config", "benches", "tests", "README.md", "Makefile"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_module_of_src_uses_only_floors_below_its_own() {
    let sources = read_sources(&root().join("src"));
    assert!(sources.contains_key("lib.rs"), "{:?}", sources.keys());
    let faults = faults(&sources);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn the_top_level_holds_nothing_but_what_the_design_lists() {
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap();
    let ignored: BTreeSet<&str> = ignored.lines().map(|line| line.trim_matches('/')).collect();
    let entries = fs::read_dir(root()).unwrap();
    let strangers: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with('.') && !name.starts_with("LICENSE"))
        .filter(|name| !TOP_LEVEL.contains(&name.as_str()) && !ignored.contains(name.as_str()))
        .collect();
    assert!(strangers.is_empty(), "{strangers:?} at the top level; DESIGN.md section 2 lists what belongs there");
}

#[test]
fn a_planted_violation_is_found_whatever_its_form() {
    #[rustfmt::skip]
    let table: [(&str, &str, &str, Option<&str>); 18] = [
        ("down",                  "pool.rs",          "use crate::backend::ServerConn;",                           None),
        ("up",                    "backend.rs",       "use crate::pool::Pool;",                                    Some("backend uses pool")),
        ("up in a folder",        "backend/login.rs", "fn f() { crate::client::go() }",                            Some("backend uses client")),
        ("same floor",            "state.rs",         "use crate::route;",                                         Some("state uses route")),
        ("itself",                "pool.rs",          "use crate::pool::Ticket;",                                  None),
        ("in a group",            "net.rs",           "use crate::{clock::Clock, settings::{self, Entry}};",       Some("net uses settings")),
        ("in a nested group",     "net.rs",           "use {std::io, crate::{stats, worker}};",                    Some("net uses worker")),
        ("through super",         "net.rs",           "use super::worker::Worker;",                                Some("net uses worker")),
        ("super of a submodule",  "net/tls.rs",       "use super::worker::Worker;",                                None),
        ("two supers",            "net/tls.rs",       "use super::super::worker::Worker;",                         Some("net uses worker")),
        ("inline module",         "net.rs",           "mod tests { use super::worker; }",                          None),
        ("inline, two supers",    "net.rs",           "mod tests { use super::super::worker; }",                   Some("net uses worker")),
        ("spaces",                "net.rs",           "use crate :: worker ;",                                     Some("net uses worker")),
        ("visibility",            "net.rs",           "pub(crate) fn f() {} pub(in crate::net) fn g() {}",         None),
        ("in a comment",          "net.rs",           "//! [`crate::worker`]\n/* crate::pool /* crate::pool */ */", None),
        ("in strings",            "net.rs",           r##"const A: &str = "\"crate::pool"; const B: &str = r#"crate::pool"#; const C: char = '"';"##, None),
        ("after a lifetime",      "net.rs",           "fn f<'a>(x: &'a crate::worker::W) {}",                      Some("net uses worker")),
        ("not in the table",      "utils.rs",         "fn f() {}",                                                 Some("utils is on no floor")),
    ];
    for (name, file, text, want) in table {
        let sources = BTreeMap::from([(file.to_owned(), text.to_owned())]);
        let got = faults(&sources);
        match want {
            Some(want) => assert!(got.len() == 1 && got[0].contains(want), "{name}: {got:?}"),
            None => assert!(got.is_empty(), "{name}: {got:?}"),
        }
    }
}

#[test]
fn the_program_may_use_the_whole_library() {
    let text = "fn main() { pgweir::worker::run(pgweir::clock::now()) } mod x { use crate::y; }".to_owned();
    let sources = BTreeMap::from([("main.rs".to_owned(), text)]);
    assert_eq!(faults(&sources), Vec::<String>::new());
}

/// The word in front of a setting where it is read, if it is not its table's name.
const HOLDERS: [(&str, &[&str]); 4] = [
    ("fleet", &["settings"]),
    ("followers", &["settings"]),
    ("databases", &["database", "entry"]),
    ("users", &["user", "u"]),
];

/// Settings that the program has from functions of `config`, in these files.
const READ_IN_CONFIG: [(&str, &str, &str); 9] = [
    // The map, not the name of its file.
    ("auth", "auth_ident_file", "config.rs"),
    ("auth", "auth_ident_map", "config.rs"),
    // What the settings of TLS mean together, those of a database and the global ones.
    ("tls", "client_tls_protocols", "tls.rs"),
    ("tls", "server_tls_sslmode", "tls.rs"),
    ("tls", "server_tls_ca_file", "tls.rs"),
    ("tls", "server_tls_cert_file", "tls.rs"),
    ("tls", "server_tls_key_file", "tls.rs"),
    ("tls", "server_tls_protocols", "tls.rs"),
    ("databases", "sslnegotiation", "tls.rs"),
];

#[test]
fn every_setting_is_read() {
    let globals = settings::all().map(|setting| (setting.group, setting.name));
    let databases = entries::database_keys().iter().map(|key| (key.group, key.name));
    let users = entries::user_keys().iter().map(|key| (key.group, key.name));
    let unread = unread(globals.chain(databases).chain(users), &read_sources(&root().join("src")));
    let excused: BTreeSet<String> = READ_IN_CONFIG.iter().map(|(group, name, _)| format!("{group}.{name}")).collect();
    assert_eq!(unread, excused, "on the left: what nothing in src reads");
    for (_, name, file) in READ_IN_CONFIG {
        let text = fs::read_to_string(root().join("config/src").join(file)).unwrap();
        assert!(tokens(&text).contains(&name.to_owned()), "{name} in config/src/{file}");
    }
}

#[test]
fn a_setting_is_read_where_its_table_is_and_by_no_test() {
    #[rustfmt::skip]
    let table: [(&str, &str, &str, bool); 9] = [
        ("by its table",         "a.rs",       "let x = config.client.query_timeout;",                          true),
        ("the user's",           "a.rs",       "own.and_then(|u| u.query_timeout)",                             false),
        ("another's field",      "a.rs",       "limits.query_timeout",                                          false),
        ("longer",               "a.rs",       "client.query_timeout_ms",                                       false),
        ("in a comment",         "a.rs",       "// client.query_timeout",                                       false),
        ("in a string",          "a.rs",       "\"client.query_timeout\"",                                      false),
        ("in a test behind it",  "a.rs",       "fn f() {}\n#[cfg(test)]\nmod tests { client.query_timeout }",   false),
        ("in a file of tests",   "a/tests.rs", "client.query_timeout",                                          false),
        ("over two lines",       "a.rs",       "client\n    .query_timeout",                                    true),
    ];
    for (name, file, text, want) in table {
        let sources = BTreeMap::from([(file.to_owned(), text.to_owned())]);
        assert_eq!(unread([("client", "query_timeout")], &sources).is_empty(), want, "{name}");
    }
    let sources = BTreeMap::from([("a.rs".to_owned(), "own.and_then(|u| u.query_timeout)".to_owned())]);
    assert_eq!(unread([("users", "query_timeout")], &sources), BTreeSet::new());
}

/// The settings, each with its table, that no source reads.
fn unread<'a>(
    settings: impl IntoIterator<Item = (&'a str, &'a str)>,
    sources: &BTreeMap<String, String>,
) -> BTreeSet<String> {
    let mut read: BTreeSet<(String, String)> = BTreeSet::new();
    for (_, text) in sources.iter().filter(|(file, _)| !file.ends_with("tests.rs")) {
        let tokens = tokens(text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default());
        for three in tokens.windows(3).filter(|three| three[1] == ".") {
            read.insert((three[0].clone(), three[2].clone()));
        }
    }
    let is_read = |group: &str, name: &str| {
        let others = HOLDERS.iter().find(|(table, _)| *table == group).map_or(&[][..], |(_, others)| others);
        let mut holders = others.iter().copied().chain([group]);
        holders.any(|holder| read.contains(&(holder.to_owned(), name.to_owned())))
    };
    let unread = settings.into_iter().filter(|(group, name)| !is_read(group, name));
    unread.map(|(group, name)| format!("{group}.{name}")).collect()
}

/// What the fuzz engine is built of besides libFuzzer: our crates, by their folders.
const FUZZED: [(&str, &str); 6] = [
    ("", "pgweir"),
    ("proto", "pgweir-proto"),
    ("proto/fuzz", "pgweir-proto-fuzz"),
    ("config", "pgweir-config"),
    ("config/fuzz", "pgweir-config-fuzz"),
    ("tests/fuzz", "pgweir-fuzz"),
];

/// It is no part of the workspace and has a lock file of its own, which nothing else would notice to be out of date.
#[test]
fn the_lock_file_of_the_fuzz_engine_knows_what_our_crates_need() {
    let lock = fs::read_to_string(root().join("tests/fuzz/engine/Cargo.lock")).unwrap();
    for (folder, package) in FUZZED {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let missing = unlocked(&manifest, package, &lock);
        assert!(
            missing.is_empty(),
            "tests/fuzz/engine/Cargo.lock does not have {missing:?} of {package}: run cargo metadata --manifest-path \
             tests/fuzz/engine/Cargo.toml >/dev/null"
        );
    }
    let manifest = "[dependencies]\nbytes.workspace = true\nwebpki.workspace = true\nsome = { workspace = true, optional = true }\n\n\
                    [dev-dependencies]\nrand = \"1\"\n";
    let lock = "[[package]]\nname = \"a\"\ndependencies = [\n \"bytes 1.2\",\n]\n\n[[package]]\nname = \"b\"\n";
    assert_eq!(unlocked(manifest, "a", lock), ["rustls-webpki"]);
    assert_eq!(unlocked(manifest, "b", lock), ["bytes", "rustls-webpki"]);
}

/// What a manifest asks for and the package's entry in a lock file does not have.
fn unlocked(manifest: &str, package: &str, lock: &str) -> Vec<String> {
    let mut entries = lock.split("[[package]]");
    let entry = entries.find(|entry| entry.contains(&format!("\nname = \"{package}\"\n"))).unwrap_or_default();
    let asked = manifest.split("\n[dependencies]\n").nth(1).or(manifest.strip_prefix("[dependencies]\n"));
    let asked = asked.unwrap_or_default().split("\n[").next().unwrap_or_default();
    let lines = asked.lines().filter(|line| line.contains('=') && !line.starts_with('#') && !line.contains("optional"));
    let names = lines.map(|line| match line.split(['.', ' ', '=']).next().unwrap_or_default() {
        "webpki" => "rustls-webpki".to_owned(),
        name => name.to_owned(),
    });
    names
        .filter(|name| !entry.contains(&format!("\n \"{name}\"")) && !entry.contains(&format!("\n \"{name} ")))
        .collect()
}

/// Path below `src`, with `/`, and text of every source file.
fn read_sources(directory: &Path) -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
                sources.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    sources
}

/// Everything in `sources` that breaks the table.
fn faults(sources: &BTreeMap<String, String>) -> Vec<String> {
    let mut faults = Vec::new();
    for (file, text) in sources {
        // The program's own file stands on the roof, and lib.rs only declares modules.
        if file == "main.rs" || file == "lib.rs" {
            continue;
        }
        let parts: Vec<&str> = file.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").collect();
        let module = parts[0];
        let Some(own) = floor(module) else {
            faults.push(format!("src/{file}: {module} is on no floor"));
            continue;
        };
        let used: BTreeSet<String> = used_modules(text, parts.len()).into_iter().collect();
        for used in used.iter().filter(|used| *used != module) {
            if let Some(floor) = floor(used).filter(|floor| *floor >= own) {
                faults.push(format!("src/{file}: {module} uses {used}, floor {own} uses floor {floor}"));
            }
        }
    }
    faults
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// Top-level modules that a file names through `crate` or `super`; `depth` is how many modules deep
/// the file is, 1 for `src/pool.rs`.
fn used_modules(text: &str, depth: usize) -> Vec<String> {
    let tokens = tokens(text);
    let mut used = Vec::new();
    // Braces that opened an inline module are true.
    let mut braces: Vec<bool> = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let before = |back: usize| at.checked_sub(back).map_or("", |at| tokens[at].as_str());
        match token.as_str() {
            "{" => braces.push(before(2) == "mod"),
            "}" => drop(braces.pop()),
            "crate" if before(1) != "::" => first_names(&tokens, at + 1, &mut used),
            "super" if before(1) != "::" => {
                let supers = 1 + tokens[at + 1..].chunks(2).take_while(|two| *two == ["::", "super"]).count();
                let here = depth + braces.iter().filter(|inline| **inline).count();
                if supers >= here {
                    first_names(&tokens, at + 2 * supers - 1, &mut used);
                }
            }
            _ => {}
        }
    }
    used
}

/// The names that follow a `::` at `at`: one, or the first of each item of a group.
fn first_names(tokens: &[String], at: usize, names: &mut Vec<String>) {
    let token = |at: usize| tokens.get(at).map_or("", String::as_str);
    if token(at) != "::" {
        return;
    }
    if token(at + 1) != "{" {
        names.push(token(at + 1).to_owned());
        return;
    }
    let (mut nesting, mut at, mut first) = (1, at + 2, true);
    while nesting > 0 && at < tokens.len() {
        match token(at) {
            "{" => nesting += 1,
            "}" => nesting -= 1,
            "," if nesting == 1 => first = true,
            name if first => {
                names.push(name.to_owned());
                first = false;
            }
            _ => {}
        }
        at += 1;
    }
}

/// Words, `::`, and single other characters; without comments, strings, characters and lifetimes.
fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens: Vec<String> = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        match (at(i), at(i + 1)) {
            ('/', '/') => i += chars[i..].iter().position(|c| *c == '\n').unwrap_or(chars.len() - i),
            ('/', '*') => i = after_comment(&chars, i),
            ('"', _) => i = after_string(&chars, i),
            ('\'', next) => {
                // A lifetime has no closing quote right after its first character.
                i += if next != '\\' && at(i + 2) != '\'' {
                    1 + chars[i + 1..].iter().take_while(|c| is_word(**c)).count()
                } else {
                    let body = if next == '\\' { 2 } else { 1 };
                    1 + body + chars[i + 1 + body..].iter().position(|c| *c == '\'').unwrap_or(0) + 1
                };
            }
            (':', ':') => {
                tokens.push("::".to_owned());
                i += 2;
            }
            (c, _) if is_word(c) => {
                let word: String = chars[i..].iter().take_while(|c| is_word(**c)).collect();
                i += word.chars().count();
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                if matches!(word.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    i = after_raw_string(&chars, i + hashes + 1, hashes);
                } else {
                    tokens.push(word);
                }
            }
            (c, _) => {
                if !c.is_whitespace() {
                    tokens.push(c.to_string());
                }
                i += 1;
            }
        }
    }
    tokens
}

/// Block comments nest.
fn after_comment(chars: &[char], start: usize) -> usize {
    let (mut nesting, mut i) = (0, start);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (nesting, i) = (nesting + 1, i + 2),
            ('*', Some('/')) => (nesting, i) = (nesting - 1, i + 2),
            _ => i += 1,
        }
        if nesting == 0 {
            break;
        }
    }
    i
}

fn after_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// `start` is behind the opening quote.
fn after_raw_string(chars: &[char], start: usize, hashes: usize) -> usize {
    let ends =
        |at: usize| chars[at] == '"' && chars[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
    let end = (start..chars.len()).find(|at| ends(*at));
    end.map_or(chars.len(), |end| end + 1 + hashes)
}
