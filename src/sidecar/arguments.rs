//! What was typed behind `pgweir exec`.

use std::ffi::OsString;

/// What it means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Words {
    /// `--help`.
    Help,
    /// Run the command with these settings.
    Run {
        /// As for `pgweir serve`.
        settings: Vec<String>,
        /// The program and its arguments; not empty.
        command: Vec<OsString>,
    },
}

/// It means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Problem {
    #[error("there is no command. Write: pgweir exec -- CMD ARGS")]
    NoCommand,
    #[error("settings without -- behind them. Write: pgweir exec --KEY=VALUE -- CMD ARGS")]
    NoEnd,
    #[error("a setting is not UTF-8. Write: pgweir exec --KEY=VALUE -- CMD ARGS")]
    NotUtf8,
}

/// `CMD ARGS`, `-- CMD ARGS`, or settings, `--` and the command. Without settings the first word is the command's, so
/// that a `--` of its own stays its own.
pub(super) fn split(typed: &[OsString]) -> Result<Words, Problem> {
    let is = |word: &OsString, text: &str| word == text;
    let starts_with_dashes = |word: &OsString| word.as_encoded_bytes().starts_with(b"--");
    let (settings, command) = match typed.first() {
        None => return Err(Problem::NoCommand),
        Some(word) if is(word, "--help") || is(word, "-h") => return Ok(Words::Help),
        Some(word) if !starts_with_dashes(word) => (Default::default(), typed),
        Some(_) => {
            let end = typed.iter().position(|word| is(word, "--")).ok_or(Problem::NoEnd)?;
            let (settings, rest) = typed.split_at(end);
            (settings, rest.get(1..).unwrap_or_default())
        }
    };
    if settings.iter().any(|word| is(word, "--help") || is(word, "-h")) {
        return Ok(Words::Help);
    }
    if command.is_empty() {
        return Err(Problem::NoCommand);
    }
    let settings: Option<Vec<String>> = settings.iter().map(|word| word.to_str().map(str::to_owned)).collect();
    Ok(Words::Run { settings: settings.ok_or(Problem::NotUtf8)?, command: command.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_told_from_the_settings() {
        type Want = Result<(&'static [&'static str], &'static [&'static str]), Problem>;
        #[rustfmt::skip]
        let table: [(&str, &[&str], Want); 10] = [
            ("nothing",            &[],                                   Err(Problem::NoCommand)),
            ("a mark alone",       &["--"],                               Err(Problem::NoCommand)),
            ("a command",          &["a", "b"],                           Ok((&[], &["a", "b"]))),
            ("behind a mark",      &["--", "a", "b"],                     Ok((&[], &["a", "b"]))),
            ("with its own mark",  &["a", "--", "b"],                     Ok((&[], &["a", "--", "b"]))),
            ("two marks",          &["--", "a", "--", "b"],               Ok((&[], &["a", "--", "b"]))),
            ("settings",           &["--x=1", "--y", "2", "--", "a"],     Ok((&["--x=1", "--y", "2"], &["a"]))),
            ("settings, no mark",  &["--x=1", "a"],                       Err(Problem::NoEnd)),
            ("settings alone",     &["--x=1", "--"],                      Err(Problem::NoCommand)),
            ("help for the command", &["--", "a", "--help"],              Ok((&[], &["a", "--help"]))),
        ];
        for (name, typed, want) in table {
            let typed: Vec<OsString> = typed.iter().map(Into::into).collect();
            let want = want.map(|(settings, command)| Words::Run {
                settings: settings.iter().map(ToString::to_string).collect(),
                command: command.iter().map(Into::into).collect(),
            });
            assert_eq!(split(&typed), want, "{name}");
        }
        for typed in [&["--help"][..], &["-h"], &["--x=1", "--help", "--", "a"]] {
            let typed: Vec<OsString> = typed.iter().map(Into::into).collect();
            assert_eq!(split(&typed), Ok(Words::Help));
        }
    }
}
