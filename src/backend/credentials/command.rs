//! `password_command`: a program that prints a password, such as a token that is good for minutes.

use std::convert::Infallible;
use std::process::Stdio;
use std::time::Duration;

use pgweir_config::CommandLine;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{PASSWORD_MAX, as_password};

/// A command and how it is run: without a shell, with nothing to read, in a process group of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PasswordCommand {
    line: CommandLine,
    variables: Vec<(&'static str, String)>,
    limit: Duration,
    ttl: Duration,
}

impl PasswordCommand {
    /// A command that gets `variables`, may run for `limit`, and whose output is good for `ttl`.
    #[must_use]
    pub fn new(line: CommandLine, variables: Vec<(&'static str, String)>, limit: Duration, ttl: Duration) -> Self {
        Self { line, variables, limit, ttl }
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    /// The program's name.
    #[must_use]
    pub fn program(&self) -> &str {
        self.line.words().first().map_or("", String::as_str)
    }

    /// Runs it, until it is done or nobody waits for it any more: the other end of `wanted` is gone. Blocks, at most for
    /// the limit.
    pub(super) fn run(&self, wanted: oneshot::Receiver<Infallible>) -> Result<Vec<u8>, String> {
        // An event loop of its own: the worker's has no timer, and starting a process takes its time.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let printed = runtime.block_on(self.print(wanted))?;
        as_password(printed)
    }

    /// What it prints. Blocks, at most for the limit.
    ///
    /// # Errors
    ///
    /// What went wrong, in words.
    pub fn fetch(&self) -> Result<Vec<u8>, String> {
        let (_waits, wanted) = oneshot::channel();
        self.run(wanted).map_err(|error| format!("password_command {}: {error}", self.program()))
    }

    async fn print(&self, wanted: oneshot::Receiver<Infallible>) -> Result<Vec<u8>, String> {
        let mut command = Command::new(self.program());
        command.args(self.line.words().get(1..).unwrap_or_default());
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)));
        // What it complains of may quote its secrets, and our log is no place for them.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.process_group(0).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("it cannot be run: {error}"))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let outcome = tokio::select! {
            outcome = timeout(self.limit, finish(&mut child)) => outcome
                .unwrap_or_else(|_| Err(format!("not done within password_command_timeout, {:?}", self.limit))),
            _ = wanted => Err("nobody waits for it any more".to_owned()),
        };
        if outcome.is_err()
            && let Some(group) = group
            // Not waited for yet, and so its number is still its own.
            && child.id().is_some()
        {
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait().await;
        }
        outcome
    }
}

async fn finish(child: &mut Child) -> Result<Vec<u8>, String> {
    let mut printed = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = stdout.take(PASSWORD_MAX as u64 + 1);
        stdout.read_to_end(&mut printed).await.map_err(|error| error.to_string())?;
    }
    if printed.len() > PASSWORD_MAX {
        return Err(format!("it prints more than {PASSWORD_MAX} bytes"));
    }
    let status = child.wait().await.map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(printed);
    }
    Err(format!("{status}; its standard error is not shown, as it may hold secrets: run it by hand"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn run(text: &str, limit: Duration) -> Result<String, String> {
        let config = format!("[databases.a]\npassword_command = {text:?}\n[auth]\nauth_type = \"trust\"\n");
        let sources = pgweir_config::Sources { file: Some(("f.toml", &config)), ..Default::default() };
        let config = pgweir_config::Config::from_sources(sources).unwrap();
        let line = config.databases["a"].password_command.clone().unwrap();
        let variables = vec![("PGUSER", "me".to_owned())];
        let command = PasswordCommand::new(line, variables, limit, Duration::ZERO);
        let (_waits, wanted) = oneshot::channel();
        command.run(wanted).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn a_command_prints_the_password_or_what_went_wrong_is_told_without_its_words() {
        let second = Duration::from_secs(10);
        #[rustfmt::skip]
        let table: [(&str, Result<&str, &str>); 8] = [
            ("printf secret",                               Ok("secret")),
            ("echo 'two words'",                            Ok("two words")),
            ("echo $HOME *",                                Ok("$HOME *")),
            ("sh -c 'echo $PGUSER; echo hush >&2'",         Ok("me")),
            ("/no/such/program",                            Err("it cannot be run: No such file or directory (os error 2)")),
            ("sh -c 'echo secret; echo hush >&2; exit 3'",  Err("exit status: 3; its standard error is not shown, as it may hold secrets: run it by hand")),
            ("true",                                        Err("there is no password in it")),
            ("head -c 100000 /dev/zero",                    Err("it prints more than 65536 bytes")),
        ];
        for (text, want) in table {
            assert_eq!(run(text, second).as_deref().map_err(String::as_str), want, "{text}");
        }
    }

    #[test]
    fn a_command_that_takes_too_long_is_killed_with_all_that_it_started() {
        let mark = format!("77{}", std::process::id());
        let begun = Instant::now();
        // The grandchild holds the pipe open.
        let error = run(&format!("sh -c 'sleep {mark} & sleep {mark}'"), Duration::from_millis(200)).unwrap_err();
        assert!(error.contains("password_command_timeout") && begun.elapsed() < Duration::from_secs(5), "{error}");
        let alive = || {
            std::fs::read_dir("/proc").unwrap().flatten().any(|process| {
                let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line) == format!("sleep\0{mark}\0")
            })
        };
        while alive() {
            assert!(begun.elapsed() < Duration::from_secs(10), "still running");
        }
    }
}
