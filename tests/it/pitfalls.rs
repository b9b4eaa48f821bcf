//! The published vulnerabilities and traps, and the tests that stand against them: the table in `tests/README.md` names only
//! tests that there are. And what a table cannot show: how secrets are compared.

use std::fs;
use std::path::Path;

/// Where the table stands.
const HEADING: &str = "## Published vulnerabilities and traps";

/// Its rows, at least: nobody makes it pass by taking them out.
const ROWS: usize = 43;

fn read(path: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).ok()
}

#[test]
fn every_row_of_the_table_names_tests_that_there_are() {
    let text = read("tests/README.md").unwrap();
    let rows = rows(&text);
    assert!(rows.len() >= ROWS, "{} rows, {ROWS} expected", rows.len());
    let faults: Vec<String> = rows.iter().flat_map(|(what, tests)| faults(what, tests, read)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// First and last cell of the table's rows.
fn rows(text: &str) -> Vec<(&str, &str)> {
    let table = text.split_once(HEADING).map_or("", |(_, rest)| rest);
    let table = table.split("\n## ").next().unwrap_or_default();
    let rows = table.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    // The heading, and the line below it.
    rows.skip(2).filter_map(|row| Some((row.split('|').next()?.trim(), row.rsplit('|').next()?.trim()))).collect()
}

/// What is wrong with a row: it names no test and does not say why none applies, or it names one that is not there.
fn faults(what: &str, tests: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let names: Vec<&str> = tests.split('`').skip(1).step_by(2).filter(|name| name.contains("::")).collect();
    if names.is_empty() {
        let excused = ["does not apply: ", "not yet: "].iter().any(|excuse| tests.starts_with(excuse));
        return if excused { Vec::new() } else { vec![format!("{what}: no test, and no reason")] };
    }
    names.into_iter().filter_map(|name| Some(format!("{what}: {name}: {}", missing(name, &read)?))).collect()
}

/// Why a test does not count; `None` if it does. Its name is that of a module of `tests/it` and of a function, or, with a file
/// in front of the function, one of that file's.
fn missing(name: &str, read: impl Fn(&str) -> Option<String>) -> Option<&'static str> {
    let (place, function) = name.rsplit_once("::")?;
    let is_file = Path::new(place).extension().is_some_and(|extension| extension == "rs");
    let path = if is_file { place.to_owned() } else { format!("tests/it/{}.rs", place.replace("::", "/")) };
    let Some(source) = read(&path) else { return Some("no such file") };
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let head = [format!("fn {function}("), format!("async fn {function}(")];
    let Some(at) = lines.iter().position(|line| head.iter().any(|head| line.starts_with(head))) else {
        return Some("no such function");
    };
    let above = lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    let attributes: Vec<&&str> = above.filter(|line| line.starts_with("#[")).collect();
    if attributes.iter().any(|line| line.starts_with("#[ignore")) {
        return Some("ignored");
    }
    let is_test = attributes.iter().any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
    (!is_test).then_some("no test")
}

#[test]
fn a_planted_gap_in_the_table_is_found() {
    let read = |path: &str| match path {
        "tests/it/login.rs" => Some(
            "#[tokio::test(start_paused = true)]\nasync fn there_is_one() {}\n// #[test]\n// fn commented_out() {}\n\
             #[test]\n#[ignore = \"long\"]\nfn ignored() {}\nfn a_helper() {}\n"
                .to_owned(),
        ),
        "tests/it/protocol/copy.rs" => Some("#[test]\n/// Why.\nfn below() {}".to_owned()),
        "proto/src/scram/tests.rs" => Some("    #[test]\n    fn elsewhere() {}".to_owned()),
        _ => None,
    };
    #[rustfmt::skip]
    let table: [(&str, &str, Option<&str>); 11] = [
        ("there",          "`login::there_is_one`, a row of it",                     None),
        ("in a folder",    "`protocol::copy::below`",                                None),
        ("of a file",      "`proto/src/scram/tests.rs::elsewhere`",                  None),
        ("not applicable", "does not apply: there is none of it",                    None),
        ("renamed",        "`login::there_is_one`, `login::there_is`",               Some("no such function")),
        ("moved",          "`logout::there_is_one`",                                 Some("no such file")),
        ("commented out",  "`login::commented_out`",                                 Some("no such function")),
        ("ignored",        "`login::ignored`",                                       Some("ignored")),
        ("no test",        "`login::a_helper`",                                      Some("no test")),
        ("nothing",        "",                                                       Some("no test, and no reason")),
        ("only words",     "see `login`",                                            Some("no test, and no reason")),
    ];
    for (name, tests, want) in table {
        let got = faults(name, tests, read);
        match want {
            Some(want) => assert!(got.len() == 1 && got[0].ends_with(want), "{name}: {got:?}"),
            None => assert!(got.is_empty(), "{name}: {got:?}"),
        }
    }
    let text = format!(
        "{HEADING}\n\nWords.\n\n| what | tests |\n|---|---|\n| a | `x::y` |\n| b | c | d |\n\n## More\n\n| e | f |\n"
    );
    assert_eq!(rows(&text), [("a", "`x::y`"), ("b", "d")]);
}

/// Where something that a peer sent is compared with a secret, and what is compared.
const COMPARISONS: [(&str, &str); 7] = [
    ("src/cancel.rs", "secret"),
    ("src/client/login/auth/password.rs", "plain"),
    ("src/observe/gate.rs", "token"),
    ("proto/src/md5.rs", "answer"),
    ("proto/src/scram/client.rs", "signature"),
    ("proto/src/scram/verifier.rs", "stored_key"),
    ("proto/src/scram/verifier.rs", "server_key"),
];

/// PG CVE-2026-6478. A measurement would be of the machine's noise; what is written is not.
#[test]
fn secrets_are_compared_in_constant_time() {
    for (path, secret) in COMPARISONS {
        let source = read(path).unwrap();
        assert!(source.lines().any(|line| line.contains("ct_eq(") && line.contains(secret)), "{path}: {secret}");
        let faults = hasty(&source, secret);
        assert!(faults.is_empty(), "{path}: {faults:?}");
    }
    for (line, want) in [
        ("if self.secret == given {", 1),
        ("assert!(given != entry.secret);", 1),
        ("Some(secret) => secret.ct_eq(given).into(),", 0),
        ("if secret.len() == 4 {", 0),
        ("// secret == given", 0),
    ] {
        assert_eq!(hasty(line, "secret").len(), want, "{line}");
    }
}

/// Lines, but for comments and tests, in which this secret stands right beside `==` or `!=`.
fn hasty<'a>(source: &'a str, secret: &str) -> Vec<&'a str> {
    let program = source.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = program.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let stands = |side: Option<&str>| {
        side.is_some_and(|word| {
            word.rsplit(['.', '(', '&', '*'])
                .next()
                .is_some_and(|word| word.trim_end_matches([')', ';', ',']) == secret)
        })
    };
    let compares = |line: &&str| {
        ["==", "!="].iter().any(|sign| {
            line.match_indices(sign).any(|(at, _)| {
                stands(line[..at].split_whitespace().next_back()) || stands(line[at + 2..].split_whitespace().next())
            })
        })
    };
    lines.filter(compares).collect()
}
