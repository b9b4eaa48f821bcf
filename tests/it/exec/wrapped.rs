//! A `pgweir exec` with an application, and all that they say.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pgweir_harness::{audits, secrets, wait_until};

use crate::support::SOON;

/// How to start one.
pub(crate) struct Wrapping {
    command: Command,
}

impl Wrapping {
    /// The program under test with these words, without variables that would steer it, in a group of its own.
    pub(crate) fn new(words: &[&str]) -> Self {
        Self::of(Path::new(env!("CARGO_BIN_EXE_pgweir")), words)
    }

    /// The same of another program.
    pub(crate) fn of(program: &Path, words: &[&str]) -> Self {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["PG", "DYNO", "DATABASE_URL", "HEROKU_"].iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(&*name);
            }
        }
        command.env("LC_ALL", "C.UTF-8").args(words).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        heed_signals(&mut command);
        Self { command }
    }

    /// `pgweir exec -- sh -c SCRIPT` with this URL.
    pub(crate) fn sh(url: &str, script: &str) -> Self {
        Self::new(&["exec", "--", "sh", "-c", script]).var("DATABASE_URL", url)
    }

    pub(crate) fn var(mut self, name: &str, value: &str) -> Self {
        secrets::keep_url(value);
        self.command.env(name, value);
        self
    }

    /// Changes the command in another way.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Command)) -> Self {
        change(&mut self.command);
        self
    }

    pub(crate) fn start(mut self) -> Wrapped {
        let started = Instant::now();
        let mut child = self.command.spawn().unwrap();
        let stdin = child.stdin.take();
        let (said, logged) = (Said::default(), Said::default());
        let readers = vec![said.read(child.stdout.take().unwrap()), logged.read(child.stderr.take().unwrap())];
        Wrapped { child, stdin, said, logged, readers, started }
    }

    /// Runs it to its end.
    pub(crate) fn finish(self) -> Ended {
        self.start().finish()
    }
}

/// Whatever the tests run under (`nohup`, a background job of a shell) ignores: it ignores nothing.
#[allow(unsafe_code, reason = "the hook makes async-signal-safe calls")]
fn heed_signals(command: &mut Command) {
    // SAFETY: signal(2) is async-signal-safe and sets a disposition.
    unsafe {
        command.pre_exec(|| {
            for number in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                libc::signal(number, libc::SIG_DFL);
            }
            Ok(())
        });
    }
}

/// Lines that come.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<String>>);

impl Said {
    fn read(&self, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let text = self.0.clone();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        })
    }

    fn all(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

/// One that runs. Dropped, it is killed with its whole group.
pub(crate) struct Wrapped {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Said,
    logged: Said,
    readers: Vec<JoinHandle<()>>,
    started: Instant,
}

/// One that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// Standard output: the application's.
    pub(crate) out: String,
    /// Standard error: the application's and ours.
    pub(crate) err: String,
}

impl Ended {
    /// It must have ended with 0.
    #[track_caller]
    pub(crate) fn well(self) -> String {
        assert_eq!((self.status.code(), self.status.signal()), (Some(0), None), "{}\n{}", self.out, self.err);
        self.out
    }
}

impl Wrapped {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Its application's process id, which the log has.
    pub(crate) fn application(&self) -> i32 {
        let mut found = None;
        self.await_log(|log| {
            let line = log.lines().find(|line| line.contains("application started"));
            found = line.and_then(|line| line.split("child=").nth(1)?.split_whitespace().next()?.parse().ok());
            found.is_some()
        });
        found.unwrap()
    }

    #[track_caller]
    pub(crate) fn signal(&self, number: i32) {
        kill(self.pid(), number);
    }

    /// To every process of the group, as a terminal or a platform does.
    #[track_caller]
    pub(crate) fn signal_group(&self, number: i32) {
        kill(-self.pid(), number);
    }

    pub(crate) fn said(&self) -> String {
        self.said.all()
    }

    pub(crate) fn log(&self) -> String {
        self.logged.all()
    }

    /// Tells the application a line.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    #[track_caller]
    pub(crate) fn await_said(&self, part: &str) {
        let start = Instant::now();
        while !self.said().contains(part) {
            assert!(start.elapsed() < SOON, "{part:?} was not said:\n{}\n{}", self.said(), self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[track_caller]
    pub(crate) fn await_log(&self, mut look: impl FnMut(&str) -> bool) {
        wait_until(SOON, || look(&self.log()));
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end; what it logged holds no secret, and nothing that an audit found.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Ended {
        drop(self.stdin.take());
        let mut status = None;
        let start = Instant::now();
        while status.is_none() {
            assert!(start.elapsed() < 3 * SOON, "no end:\n{}\n{}", self.said(), self.log());
            status = self.child.try_wait().unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        // Whoever inherited the pipes has ended, too, or is not waited for.
        let readers = std::mem::take(&mut self.readers);
        let until = Instant::now() + Duration::from_secs(2);
        while readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        let (out, err) = (self.said(), self.log());
        secrets::assert_none_in("what pgweir exec logs", &err);
        audits::assert_none_in("what pgweir exec logs", &err);
        Ended { status: status.unwrap(), out, err }
    }
}

impl Drop for Wrapped {
    fn drop(&mut self) {
        if self.is_running() {
            // Not waited for yet, and so the number is still its own.
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(self.pid()), nix::sys::signal::Signal::SIGKILL);
            let _ = self.child.wait();
        }
        if thread::panicking() {
            eprintln!("--- after {:?} ---\n{}\n--- log ---\n{}", self.started.elapsed(), self.said(), self.log());
        }
    }
}

#[track_caller]
fn kill(pid: i32, number: i32) {
    let signal = nix::sys::signal::Signal::try_from(number).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}
