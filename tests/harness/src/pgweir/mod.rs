//! The pgweir program as a process.

mod http;
mod log;
mod text;

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;

pub use text::pgweir_toml;

use crate::audits;
use crate::cluster::{self, APP_PASSWORD, APP_USER};
use crate::error::{Doing, HarnessError, tail};
use crate::os;
use crate::secrets;
use log::Log;

/// Longest wait for `msg=ready`.
const PATIENCE: Duration = Duration::from_secs(20);

/// Longest wait for each step of a request over HTTP.
const HTTP_PATIENCE: Duration = Duration::from_secs(10);

/// Longest wait for the last words of one that is to be killed: it may hang, by intention.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How to start pgweir.
#[derive(Clone, Debug, Default)]
pub struct PgweirOptions {
    /// The configuration file's text; see [`pgweir_toml`].
    pub toml: String,
    /// Arguments after `serve --config FILE`.
    pub args: Vec<String>,
    /// Environment variables, name and value. `PG*` of this process are not passed on.
    pub env: Vec<(String, String)>,
    /// The program: `env!("CARGO_BIN_EXE_pgweir")` in an integration test. Without it, `PGWEIR_BIN`;
    /// without that, the `pgweir` beside the running program or one folder above.
    pub bin: Option<PathBuf>,
}

/// A running `pgweir serve`. Dropping kills it; so does the end of this process. What it said is then searched for the
/// [`secrets`] of the tests, and for what its [`audits`] found: either fails the test.
#[derive(Debug)]
pub struct Pgweir {
    pid: u32,
    child: Mutex<Child>,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
    postgres: Vec<SocketAddr>,
    http: Option<SocketAddr>,
    /// The test knows why an audit may find something.
    may_find: AtomicBool,
    /// Holds the configuration file.
    directory: TempDir,
}

impl Pgweir {
    /// Starts it with this configuration; waits until it has logged `msg=ready`.
    ///
    /// # Errors
    ///
    /// [`HarnessError::NoPgweir`] when it is not built; [`HarnessError::Ended`] when it refuses the
    /// configuration; [`HarnessError::Late`] when it is not ready in 20 s.
    pub fn start(toml: &str) -> Result<Self, HarnessError> {
        Self::start_with(PgweirOptions { toml: toml.to_owned(), ..PgweirOptions::default() })
    }

    /// [`Pgweir::start`] with arguments, environment and program.
    ///
    /// # Errors
    ///
    /// As [`Pgweir::start`].
    pub fn start_with(options: PgweirOptions) -> Result<Self, HarnessError> {
        let bin = options.bin.unwrap_or_else(default_bin);
        if !bin.is_file() {
            return Err(HarnessError::NoPgweir { path: bin });
        }
        let directory = TempDir::with_prefix("pgweir-").doing("making", "a directory")?;
        let config = directory.path().join("pgweir.toml");
        fs::write(&config, &options.toml).doing("writing", &config)?;
        secrets::keep_config(&options.toml);
        for text in options.args.iter().chain(options.env.iter().map(|(_, value)| value)) {
            secrets::keep_url(text);
        }
        let mut command = os::command(&bin);
        command
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .args(&options.args)
            .envs(options.env)
            .stdin(Stdio::null())
            .stdout(Stdio::inherit())
            .stderr(Stdio::piped());
        let mut child = os::spawn(command, libc::SIGKILL).doing("starting", &bin)?;
        let log = Arc::new(Log::default());
        let reader = child.stderr.take().map(|stderr| {
            let log = Arc::clone(&log);
            thread::spawn(move || log.read(stderr))
        });
        let mut pgweir = Self {
            pid: child.id(),
            child: Mutex::new(child),
            log,
            reader,
            postgres: Vec::new(),
            http: None,
            may_find: AtomicBool::new(false),
            directory,
        };
        pgweir.await_ready()?;
        Ok(pgweir)
    }

    /// The port that clients connect to: the first listener's; 0 if it reported none.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.postgres.first().map_or(0, SocketAddr::port)
    }

    /// The address that clients connect to: the first listener's.
    ///
    /// # Panics
    ///
    /// When it reported none.
    #[must_use]
    #[allow(clippy::expect_used, reason = "test support: a pooler without a listener has failed its test")]
    pub fn addr(&self) -> SocketAddr {
        let first = self.postgres.first();
        *first.expect("pgweir reported a listener with role=postgres")
    }

    /// The addresses that clients connect to.
    #[must_use]
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.postgres
    }

    /// The HTTP port; `None` when HTTP is off.
    #[must_use]
    pub fn http_port(&self) -> Option<u16> {
        self.http.map(|address| address.port())
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// This test knows why an audit may find what was not known: that does not fail it.
    pub fn audits_may_find(&self) {
        self.may_find.store(true, Ordering::Relaxed);
    }

    /// The configuration file, to rewrite before a reload.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.directory.path().join("pgweir.toml")
    }

    /// Where to connect as `user` to `database` through pgweir; the password is [`APP_USER`]'s for
    /// that user and none for any other.
    #[must_use]
    pub fn url(&self, user: &str, database: &str) -> String {
        let password = if user == APP_USER { APP_PASSWORD } else { "" };
        cluster::url(self.addr(), user, password, database)
    }

    /// All it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.all()
    }

    /// Waits until a line of the log contains `part`, and returns that line. A line logged
    /// before the call counts; see [`Pgweir::wait_log_from`].
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] with the log when none does `within` that time.
    pub fn wait_log(&self, part: &str, within: Duration) -> Result<String, HarnessError> {
        self.wait_log_from(0, part, within)
    }

    /// [`Pgweir::wait_log`] that skips the log's first `from` bytes: the length of an earlier
    /// [`Pgweir::log`].
    ///
    /// # Errors
    ///
    /// As [`Pgweir::wait_log`].
    pub fn wait_log_from(&self, from: usize, part: &str, within: Duration) -> Result<String, HarnessError> {
        let look = |text: &str| {
            let mut lines = text.get(from..)?.lines();
            lines.find(|line| line.contains(part)).map(ToOwned::to_owned)
        };
        let late = || self.late(format!("a log line with {part:?}"), within);
        self.log.wait(within, look).ok_or_else(late)
    }

    /// Sends a signal, such as `libc::SIGTERM`. None to a process that has ended and was waited for.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`].
    pub fn signal(&self, signal: i32) -> Result<(), HarnessError> {
        let mut child = self.child();
        match child.try_wait().doing("awaiting", "pgweir")? {
            Some(_) => Ok(()),
            None => os::signal(self.pid, signal).doing("signalling", "pgweir"),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] with the log when it still runs `within` that time.
    pub fn wait_exit(&self, within: Duration) -> Result<ExitStatus, HarnessError> {
        let ended = os::wait_exit(&mut self.child(), within).doing("awaiting", "pgweir")?;
        ended.ok_or_else(|| self.late("pgweir's end".to_owned(), within))
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// Gets `path` by HTTP: status code and body.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] when HTTP is off, [`HarnessError::Io`], [`HarnessError::NotHttp`].
    pub fn http_get(&self, path: &str) -> Result<(u16, String), HarnessError> {
        let off = || self.late("an HTTP listener".to_owned(), Duration::ZERO);
        Ok(searched(path, http::get(self.http.ok_or_else(off)?, path, HTTP_PATIENCE)?))
    }

    /// [`Pgweir::http_get`] with these header lines, and no `Host` but theirs.
    ///
    /// # Errors
    ///
    /// As [`Pgweir::http_get`].
    pub fn http_get_with(&self, path: &str, lines: &[&str]) -> Result<(u16, String), HarnessError> {
        let off = || self.late("an HTTP listener".to_owned(), Duration::ZERO);
        Ok(searched(path, http::get_with(self.http.ok_or_else(off)?, path, lines, HTTP_PATIENCE)?))
    }

    /// Anonymous resident memory in KiB (`RssAnon` of `proc_pid_status(5)`).
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] when it has ended.
    pub fn rss_anon_kib(&self) -> Result<u64, HarnessError> {
        let path = format!("/proc/{}/status", self.pid);
        let status = fs::read_to_string(&path).doing("reading", &path)?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.ok_or_else(|| std::io::ErrorKind::InvalidData.into()).doing("reading", &path)
    }

    /// CPU time so far, in user and in system mode, of all its threads. Counted in ticks of 10 ms.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Io`] when it has ended.
    pub fn cpu_time(&self) -> Result<(Duration, Duration), HarnessError> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = fs::read_to_string(&path).doing("reading", &path)?;
        cpu_time(&stat).ok_or_else(|| std::io::ErrorKind::InvalidData.into()).doing("reading", &path)
    }

    fn await_ready(&mut self) -> Result<(), HarnessError> {
        let is_ready = |line: &&str| message(line).as_deref() == Some("ready");
        let ready = self.log.wait(PATIENCE, |text| text.lines().find(is_ready).map(|_| listeners(text)));
        if let Some(listeners) = ready {
            for (role, address) in listeners {
                match role.as_str() {
                    "http" => self.http = Some(address),
                    "postgres" => self.postgres.push(address),
                    _ => {}
                }
            }
            return Ok(());
        }
        // Either the time is up or its standard error was closed, most likely by its end.
        let ended = os::wait_exit(&mut self.child(), Duration::from_secs(1));
        match ended.doing("awaiting", "pgweir")? {
            Some(status) => Err(HarnessError::Ended { what: "pgweir", status, log: tail(&self.log(), 8000) }),
            None => Err(self.late("pgweir's msg=ready".to_owned(), PATIENCE)),
        }
    }

    fn late(&self, what: String, within: Duration) -> HarnessError {
        let log = tail(&self.log(), 8000);
        HarnessError::Late { what, within, log }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pgweir {
    /// Searches all that it said for the secrets of the tests; what its files hold by now is known first.
    fn search_for_secrets(&self, last_answers: &[(&str, String)]) {
        secrets::keep_config(&fs::read_to_string(self.config_path()).unwrap_or_default());
        secrets::assert_none_in("pgweir's log", self.log());
        for (path, answer) in last_answers {
            secrets::assert_none_in(path, answer);
        }
    }

    /// Searches all that it said for what its audits found.
    fn search_for_findings(&self, last_answers: &[(&str, String)]) {
        if self.may_find.load(Ordering::Relaxed) {
            return;
        }
        audits::assert_none_in("pgweir's log", &self.log());
        for (path, answer) in last_answers {
            audits::assert_none_in(path, answer);
        }
    }

    /// What it tells over HTTP, if it still does.
    fn last_answers(&self) -> Vec<(&'static str, String)> {
        let Some(address) = self.http.filter(|_| self.is_running()) else { return Vec::new() };
        let get = |path| http::get(address, path, LAST_WORDS).map(|(_, body)| (path, body));
        ["/metrics", "/readyz"].into_iter().map_while(|path| get(path).ok()).collect()
    }
}

/// No answer holds a secret, whatever it was asked for.
fn searched(path: &str, answer: (u16, String)) -> (u16, String) {
    secrets::assert_none_in(path, &answer.1);
    answer
}

impl Drop for Pgweir {
    fn drop(&mut self) {
        let last_answers = if thread::panicking() { Vec::new() } else { self.last_answers() };
        {
            let mut child = self.child();
            let _ = child.kill();
            let _ = child.wait();
        }
        // Ends with the pipe's last writer. `pgweir exec` could leave one; do not wait for that for long.
        let _: Option<()> = self.log.wait(LAST_WORDS, |_| None);
        if let Some(reader) = self.reader.take()
            && reader.is_finished()
        {
            let _ = reader.join();
        }
        if thread::panicking() {
            eprintln!("--- pgweir's log ---\n{}", tail(&self.log(), 16_000));
        } else {
            self.search_for_secrets(&last_answers);
            self.search_for_findings(&last_answers);
        }
    }
}

fn message(line: &str) -> Option<String> {
    log::field(line, "msg").or_else(|| log::field(line, "message"))
}

/// Role and address of each `msg=listening` line.
fn listeners(text: &str) -> Vec<(String, SocketAddr)> {
    text.lines()
        .filter(|line| message(line).as_deref() == Some("listening"))
        .filter_map(|line| {
            let address = log::field(line, "addr")?.parse().ok()?;
            Some((log::field(line, "role")?, address))
        })
        .collect()
}

fn default_bin() -> PathBuf {
    if let Some(bin) = env::var_os("PGWEIR_BIN") {
        return PathBuf::from(bin);
    }
    let own = env::current_exe().unwrap_or_default();
    let mut folders = own.ancestors().skip(1);
    // A test runs in target/<profile>/deps, any other program one folder above.
    let beside = folders.next().map(|folder| folder.join("pgweir"));
    let above = folders.next().map(|folder| folder.join("pgweir"));
    match (beside, above) {
        (Some(beside), _) if beside.is_file() => beside,
        (_, Some(above)) => above,
        (beside, None) => beside.unwrap_or_default(),
    }
}

/// User and system time of a line of /proc/PID/stat (`proc_pid_stat(5)`, fields 14 and 15).
fn cpu_time(stat: &str) -> Option<(Duration, Duration)> {
    // The second field is the program's name in brackets and may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11);
    let mut time = || {
        let ticks: u64 = times.next()?.parse().ok()?;
        // The kernel reports in USER_HZ, which is 100 on every architecture that we build for.
        Some(Duration::from_millis(ticks * 10))
    };
    Some((time()?, time()?))
}

#[cfg(test)]
mod tests {
    use super::{cpu_time, listeners};
    use std::time::Duration;

    #[test]
    fn cpu_time_survives_brackets_in_the_name() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194304 100 0 0 0 12 34 0 0 20 0 1 0 5 0 0";
        let want = (Duration::from_millis(120), Duration::from_millis(340));
        assert_eq!(cpu_time(stat), Some(want));
        assert_eq!(cpu_time("7 (a) S 1"), None);
    }

    #[test]
    fn listeners_are_read_from_the_log() {
        let log = "ts=1 msg=starting\n\
                   ts=2 msg=listening role=postgres addr=127.0.0.1:6432\n\
                   addr=\"[::1]:9127\" role=http level=info message=listening\n\
                   msg=ready\n";
        let want = [("postgres", "127.0.0.1:6432"), ("http", "[::1]:9127")];
        let want = want.map(|(role, addr)| (role.to_owned(), addr.parse().ok()));
        let got: Vec<_> = listeners(log).into_iter().map(|(role, addr)| (role, Some(addr))).collect();
        assert_eq!(got, want);
    }
}
