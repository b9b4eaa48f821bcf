//! Builds of pgweir that lack one of its guards, and which test has to notice.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgweir::mutant::Guard;
use pgweir_harness::PgweirOptions;

use crate::figures;

/// How a build with the feature `mutant` is told what to leave out.
const LACKS: &str = "PGWEIR_TEST_MUTANT";

/// The test that plays without the guard and has to notice: its file, and its name. A new guard does not compile without one.
const fn player(guard: Guard) -> [&'static str; 2] {
    match guard {
        Guard::Release | Guard::Journal | Guard::Pins | Guard::Taint | Guard::Sequences | Guard::Inspection => {
            ["isolation.rs", "the_oracle_catches_a_pooler_that_lacks_any_of_its_guards"]
        }
        Guard::Claims => ["guards.rs", "the_simulations_catch_a_pooler_that_lacks_what_they_are_about"],
        Guard::Freshness => ["routing/registers.rs", "the_checker_catches_a_pooler_without_the_check_of_positions"],
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs cargo with the feature `mutant`, in a directory of its own, so that it takes no lock that our own cargo holds.
fn cargo(command: &str, what: &[&str]) -> (Command, PathBuf) {
    let target = root().join("target/mutant");
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(root())
        .args([command, "--locked", "--features", "mutant", "--target-dir"])
        .arg(&target)
        .args(what);
    (cargo, target)
}

/// Builds pgweir so that it can leave out what it is told to.
pub(crate) fn mutant() -> PathBuf {
    let (mut cargo, target) = cargo("build", &["--bin", "pgweir"]);
    let status = cargo.status().unwrap();
    assert!(status.success(), "{cargo:?}: {status}");
    target.join("debug/pgweir")
}

/// The same options of that build, which lacks the guard.
pub(crate) fn without(guard: Guard, mutant: &Path, options: PgweirOptions) -> PgweirOptions {
    let env = vec![(LACKS.to_owned(), format!("{guard:?}"))];
    PgweirOptions { bin: Some(mutant.to_owned()), env, ..options }
}

#[test]
fn every_guard_has_a_test_that_plays_without_it() {
    for guard in Guard::ALL {
        let [file, test] = player(guard);
        let source = fs::read_to_string(root().join("tests/it").join(file)).unwrap();
        let (before, rest) = source.split_once(&format!("fn {test}() {{\n")).expect(test);
        let attributes: Vec<&str> = before.lines().rev().take_while(|line| line.starts_with("#[")).collect();
        assert!(attributes.contains(&"#[test]"), "{test}: {attributes:?}");
        let body = rest.split("\n}\n").next().unwrap();
        assert!(body.contains(&format!("Guard::{guard:?}")), "{test} does not play without {guard:?}");
    }
}

#[test]
fn every_guard_guards_something_and_every_one_that_does_is_known() {
    let mut used = BTreeSet::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension() == Some(OsStr::new("rs")) {
                let text = fs::read_to_string(&path).unwrap();
                let names = text.split("lacks(Guard::").skip(1).filter_map(|rest| rest.split(')').next());
                used.extend(names.map(str::to_owned));
            }
        }
    }
    let known: BTreeSet<String> = Guard::ALL.iter().map(|guard| format!("{guard:?}")).collect();
    assert_eq!(used, known);
}

#[test]
#[ignore = "long: builds the unit tests once more"]
fn the_simulations_catch_a_pooler_that_lacks_what_they_are_about() {
    const NAME: &str = "the_simulations_catch_a_pooler_that_lacks_what_they_are_about";
    let table = [
        (Guard::Claims, "budget::simulation::the_cap_holds_in_ten_thousand_fleets_where_everything_goes_wrong"),
        (Guard::Freshness, "replica::simulation::no_choice_leads_to_a_follower_that_lacks_what_was_acknowledged"),
    ];
    for (guard, test) in table {
        // Each knows by the same variable that it has to fail, and passes if it does.
        let (mut cargo, _) = cargo("test", &["--lib", "--", "--exact", test]);
        let output = cargo.env(LACKS, format!("{guard:?}")).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let wrong = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.contains(" 1 passed;"), "without {guard:?}: {told}\n{wrong}");
    }
    figures::record("guards", NAME, "builds without the check of claims, or of positions: both were noticed");
}
