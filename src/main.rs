//! The `pgweir` program: what was typed, and which part of the library it means.
//!
//! Exit codes: 0 all well, 1 something failed while running, 2 a faulty configuration or command line.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use pgweir::sidecar;
use pgweir_config::{Bounds, Config, settings};

/// Exit code of a faulty configuration or command line; clap's own is the same.
const USAGE: u8 = 2;

/// Variables of our prefix that are no settings: those of the Makefile, the tests and `pgweir demo`.
const NOT_SETTINGS: [&str; 5] =
    ["PGWEIR_PG_BIN", "PGWEIR_BIN", "PGWEIR_CACHE", "PGWEIR_TEST_PANIC", "PGWEIR_TEST_MUTANT"];

/// A build that can be told to leave something out says so.
const VERSION: &str =
    if cfg!(feature = "mutant") { concat!(env!("CARGO_PKG_VERSION"), " (mutant)") } else { env!("CARGO_PKG_VERSION") };

/// A Postgres connection pooler that runs as a sidecar next to the application.
#[derive(Parser)]
#[command(name = "pgweir", version = VERSION, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the pooler.
    Serve(Settings),
    /// Run a command with a pooler beside it: pgweir exec [--KEY=VALUE].. -- CMD ARGS.
    ///
    /// `DATABASE_URL` (and `HEROKU_POSTGRESQL_*_URL`, or the variables that `PGWEIR_URLS` names) of the command lead to the
    /// pooler, which listens on a free port of this machine; `NAME_DIRECT` has the URL as it was. Signals go to the command,
    /// and its exit code is ours. If the pooler cannot start, the command runs with its URLs as they are
    /// (`PGWEIR_ON_FAILURE=direct|exit`). `PGWEIR_ENABLED=0` switches it off; `PGWEIR_FORWARD_TERM=auto|always|never`.
    Exec(Settings),
    /// Show what exec would make of the URLs in this environment, without secrets.
    Urls(Settings),
    /// Show what each `pgweir exec` on this machine does.
    Status {
        /// As a JSON array, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Show every setting and its origin, then try each database and report the limits that bind.
    ///
    /// Without --config and --database, and with a URL that exec would find, it checks what exec would run.
    Check(Settings),
    /// Show where a statement of a database's clients goes, and why: pgweir route [--KEY=VALUE].. DATABASE SQL.
    ///
    /// It logs in as the database's pool would, reads the catalog, and asks the followers how they stand. The statement is not
    /// run. Which configuration it means is as with check.
    Route(Settings),
    /// Start a private Postgres primary and follower, and drive a few hundred clients through the pooler.
    ///
    /// Runs for `DEMO_SECONDS` (default 30; 0 until Ctrl-C) and leaves nothing behind.
    #[cfg(feature = "demo")]
    Demo,
}

#[derive(Args)]
#[command(disable_help_flag = true)]
struct Settings {
    /// Settings as `--key=value` or `--key value`; `--help` lists them.
    #[arg(value_name = "SETTING", trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    // The command's words are its own, in whatever encoding.
    let typed: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let Some((_, rest)) = typed.split_first().filter(|(first, _)| *first == "exec") {
        return sidecar::exec(rest, &variables(), || help("exec"));
    }
    match Cli::parse().command {
        Command::Serve(settings) => with_config("serve", &settings.args, pgweir::supervisor::run),
        Command::Check(settings) => as_meant("check", &settings.args, |configs| {
            let codes: Vec<ExitCode> = configs.iter().map(pgweir::check::run).collect();
            codes.into_iter().find(|code| *code != ExitCode::SUCCESS).unwrap_or(ExitCode::SUCCESS)
        }),
        Command::Route(settings) => route(&settings.args),
        Command::Urls(settings) if wants_help(&settings.args) => print_help("urls"),
        Command::Urls(settings) => sidecar::urls(&settings.args, &variables()),
        Command::Status { json } => sidecar::status(json),
        // Taken above, whatever stands behind it.
        Command::Exec(_) => ExitCode::from(USAGE),
        #[cfg(feature = "demo")]
        Command::Demo => pgweir::demo::run(),
    }
}

/// Puts the configuration together and hands it on; prints its faults, one per line, if it has any.
fn with_config(name: &str, args: &[String], run: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    if wants_help(args) {
        return print_help(name);
    }
    let mut env = variables();
    env.retain(|(variable, _)| !sidecar::VARIABLES.contains(&variable.as_str()));
    match Config::load(args, &env) {
        Ok(config) => run(config),
        Err(faults) => {
            let _ = writeln!(io::stderr(), "{faults}");
            ExitCode::from(USAGE)
        }
    }
}

/// Shows where a statement goes; what stands in front of the last two words are settings.
fn route(args: &[String]) -> ExitCode {
    match args.split_last_chunk() {
        _ if wants_help(args) => print_help("route"),
        Some((settings, [database, text])) if !database.starts_with("--") => {
            as_meant("route", settings, |configs| pgweir::check::route(configs, database, text))
        }
        _ => {
            let _ = writeln!(io::stderr(), "pgweir route [--KEY=VALUE].. DATABASE SQL: the SQL is one word, in quotes");
            ExitCode::from(USAGE)
        }
    }
}

/// Hands on the configuration that is named, else what `exec` would run, else the defaults, whose faults say what is missing.
fn as_meant(name: &str, args: &[String], run: impl FnOnce(&[Config]) -> ExitCode) -> ExitCode {
    let names = |word: &String| ["--config", "--database"].iter().any(|flag| word.starts_with(flag));
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if wants_help(args) || args.iter().any(names) || set("PGWEIR_CONFIG") || set("PGWEIR_DATABASES") {
        return with_config(name, args, |config| run(&[config]));
    }
    match sidecar::configurations(args, &variables()) {
        Ok(configs) if configs.is_empty() => with_config(name, args, |config| run(&[config])),
        Ok(configs) => run(&configs),
        Err(fault) => {
            let _ = writeln!(io::stderr(), "{fault}");
            ExitCode::from(USAGE)
        }
    }
}

/// The environment without what is not for the program.
fn variables() -> Vec<(String, String)> {
    let mut variables = pgweir_config::environment();
    variables.retain(|(variable, _)| !NOT_SETTINGS.contains(&variable.as_str()));
    variables
}

fn wants_help(args: &[String]) -> bool {
    args.iter().any(|arg| arg == "--help" || arg == "-h")
}

fn print_help(name: &str) -> ExitCode {
    // A reader that has gone away, such as `| head`, is no reason to fail.
    let _ = io::stdout().write_all(help(name).as_bytes());
    ExitCode::SUCCESS
}

/// The help of a subcommand that takes settings: what it does, and the table of all settings.
fn help(name: &str) -> String {
    let mut cli = Cli::command();
    let about = cli
        .find_subcommand_mut(name)
        .and_then(|command| command.get_long_about().or_else(|| command.get_about()).map(ToString::to_string));
    let words = match name {
        "exec" => " -- CMD ARGS",
        "route" => " DATABASE SQL",
        _ => "",
    };
    let mut text = format!("{}\n\nUsage: pgweir {name} [--KEY=VALUE]...{words}\n\n", about.unwrap_or_default());
    text.push_str(
        "Defaults < file < environment (PGWEIR_<KEY>) < command line. Besides the settings:\n\
         \x20 --config FILE             the TOML file (or PGWEIR_CONFIG)\n\
         \x20 --database NAME=URL       a database and where it is; repeatable (or PGWEIR_DATABASES)\n\
         \x20 --user NAME=PASSWORD      a user that may log in; repeatable (or PGWEIR_USERS)\n",
    );
    for group in settings::GROUPS {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n[{}]  {}", group.name, group.doc);
        for setting in group.settings {
            let flag = setting.name.replace('_', "-");
            let default = if setting.default.is_empty() { "empty" } else { setting.default };
            let range = setting.bounds.map_or_else(String::new, |Bounds { low, high }| format!(", {low} to {high}"));
            let _ = writeln!(text, "  --{flag} (default {default}{range})");
            for line in setting.doc.lines() {
                let _ = writeln!(text, "      {}", line.trim());
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_after_serve_is_left_to_the_settings() {
        #[rustfmt::skip]
        let table: [(&str, &[&str]); 4] = [
            ("nothing",         &[]),
            ("a flag first",    &["--config", "x.toml", "--listen-port=0"]),
            ("an unknown flag", &["--no-such"]),
            ("help in between", &["--listen-port=0", "--help"]),
        ];
        for (name, args) in table {
            let typed = ["pgweir", "serve"].iter().chain(args);
            match Cli::try_parse_from(typed).map(|cli| cli.command) {
                Ok(Command::Serve(settings)) => assert_eq!(settings.args, args, "{name}"),
                Ok(_) => panic!("{name}: another subcommand"),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }

    #[test]
    fn the_help_lists_every_setting_with_its_default() {
        let help = help("serve");
        for setting in settings::all() {
            let flag = format!("  --{} (default ", setting.name.replace('_', "-"));
            let line = help.lines().find(|line| line.starts_with(&flag));
            assert!(line.is_some_and(|line| line.contains(setting.default)), "{}", setting.name);
        }
    }
}
