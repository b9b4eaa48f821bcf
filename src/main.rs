//! The `pgweir` program: what was typed, and which part of the library it means.
//!
//! Exit codes: 0 all well, 1 something failed while running, 2 a faulty configuration or command line.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use pgweir_config::{Bounds, Config, settings};

/// Exit code of a faulty configuration or command line; clap's own is the same.
const USAGE: u8 = 2;

/// Variables of our prefix that are no settings: those of the Makefile, the tests and `pgweir demo`.
const NOT_SETTINGS: [&str; 5] =
    ["PGWEIR_PG_BIN", "PGWEIR_BIN", "PGWEIR_CACHE", "PGWEIR_TEST_PANIC", "PGWEIR_TEST_MUTANT"];

/// A Postgres connection pooler that runs as a sidecar next to the application.
#[derive(Parser)]
#[command(name = "pgweir", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the pooler.
    Serve(Settings),
    /// Show every setting and its origin, then try each database and report the limits that bind.
    Check(Settings),
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
    match Cli::parse().command {
        Command::Serve(settings) => with_config("serve", &settings.args, pgweir::supervisor::run),
        Command::Check(settings) => with_config("check", &settings.args, |config| pgweir::check::run(&config)),
        #[cfg(feature = "demo")]
        Command::Demo => pgweir::demo::run(),
    }
}

/// Puts the configuration together and hands it on; prints its faults, one per line, if it has any.
fn with_config(name: &str, args: &[String], run: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        // A reader that has gone away, such as `| head`, is no reason to fail.
        let _ = io::stdout().write_all(help(name).as_bytes());
        return ExitCode::SUCCESS;
    }
    let mut env = pgweir_config::environment();
    env.retain(|(variable, _)| !NOT_SETTINGS.contains(&variable.as_str()));
    match Config::load(args, &env) {
        Ok(config) => run(config),
        Err(faults) => {
            let _ = writeln!(io::stderr(), "{faults}");
            ExitCode::from(USAGE)
        }
    }
}

/// The help of a subcommand that takes settings: what it does, and the table of all settings.
fn help(name: &str) -> String {
    let mut cli = Cli::command();
    let about = cli.find_subcommand_mut(name).and_then(|command| command.get_about().map(ToString::to_string));
    let mut text = format!("{}\n\nUsage: pgweir {name} [--KEY=VALUE]...\n\n", about.unwrap_or_default());
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
