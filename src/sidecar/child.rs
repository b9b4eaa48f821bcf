//! The application: starting it, its end, becoming it.
#![allow(unsafe_code, reason = "fork hooks and limits have no safe form in std; each use carries its proof")]

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::Fate;

/// Process 1 of its namespace: it inherits orphans, and no signal of its own kills it.
const INIT: u32 = 1;

/// What the application is to find as we did.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Open files.
    files: Option<libc::rlimit>,
}

impl Limits {
    /// As they are now.
    pub(super) fn now() -> Self {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: getrlimit writes one rlimit to the address it gets, which is that of a live local.
        let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0;
        Self { files: got.then_some(limit) }
    }
}

/// The application cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("{program}: {source}")]
pub(super) struct NotStarted {
    program: String,
    source: io::Error,
}

impl NotStarted {
    /// What a shell exits with: 127 for what is not there, else 126.
    pub(super) fn code(&self) -> u8 {
        if self.source.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
    }
}

/// A command line with its variables changed.
fn command(words: &[OsString], changes: &[(String, OsString)]) -> Command {
    let mut command = Command::new(words.first().map_or("".as_ref(), OsString::as_os_str));
    command.args(words.get(1..).unwrap_or_default());
    command.envs(changes.iter().map(|(name, value)| (name, value)));
    command
}

fn not_started(words: &[OsString], source: io::Error) -> NotStarted {
    let program = words.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
    NotStarted { program, source }
}

/// Starts the application: in our group and session, with our standard streams. When this process ends, however it ends, it
/// gets SIGTERM. The calling thread must be the main one, to whose life the kernel ties that.
pub(super) fn start(words: &[OsString], changes: &[(String, OsString)], limits: &Limits) -> Result<Pid, NotStarted> {
    let mut command = command(words, changes);
    let (parent, files) = (std::process::id(), limits.files);
    // SAFETY: the hook runs between fork and exec in a process that had other threads, so it may only use async-signal-safe
    // calls: setrlimit, prctl and getppid are plain system calls, and an io::Error of an errno or a kind does not allocate.
    // It captures only numbers.
    unsafe {
        command.pre_exec(move || {
            restore(files);
            die_with_us(parent)
        });
    }
    let child = command.spawn().map_err(|source| not_started(words, source))?;
    // Reaped by number, with everything else that is ours to reap.
    i32::try_from(child.id()).map(Pid::from_raw).map_err(|error| not_started(words, io::Error::other(error)))
}

/// Becomes the application. Returns only if that cannot be done; the exit code, after a line that says why.
pub(super) fn replace(words: &[OsString], limits: &Limits) -> ExitCode {
    restore(limits.files);
    let error = not_started(words, command(words, &[]).exec());
    super::complain(&format!("pgweir exec: {error}"));
    ExitCode::from(error.code())
}

fn restore(files: Option<libc::rlimit>) {
    if let Some(limit) = files {
        // SAFETY: setrlimit only reads one rlimit from the address it gets, which is that of a live local. It lowers a soft
        // limit; were it refused, the limit would merely stay higher.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

#[cfg(target_os = "linux")]
fn die_with_us(parent: u32) -> io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes a number and touches no memory; getppid has no preconditions.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have ended before the call above.
        if libc::getppid().cast_unsigned() != parent {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn die_with_us(_: u32) -> io::Result<()> {
    Ok(())
}

/// Sends the application a signal. It has not been waited for yet, and so its number is still its own.
pub(super) fn signal(child: Pid, number: i32) {
    let Ok(signal) = Signal::try_from(number) else { return };
    if let Err(error) = kill(child, signal) {
        tracing::warn!(%error, signal = signal.as_str(), "signal not passed on");
    }
}

/// Stops us until somebody continues us, as a shell does with its jobs.
pub(super) fn suspend() {
    let _ = nix::sys::signal::raise(Signal::SIGSTOP);
}

/// Reaps what has ended: the application, whose fate is returned, and orphans that process 1 inherits. Only children of the
/// calling thread, which has to be the main one: those of others are theirs to wait for, and orphans are given to it.
///
/// Source: waitpid(2), `__WNOTHREAD`.
pub(super) fn reap(child: Pid) -> Option<Fate> {
    #[cfg(target_os = "linux")]
    let (whom, flags) = (-1, libc::WNOHANG | libc::__WNOTHREAD);
    #[cfg(not(target_os = "linux"))]
    let (whom, flags) = (child.as_raw(), libc::WNOHANG);
    let mut fate = None;
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int to the address it gets, which is that of a live local.
        let pid = unsafe { libc::waitpid(whom, &raw mut status, flags) };
        if pid <= 0 {
            return fate;
        }
        // Anything else is an orphan.
        if pid == child.as_raw() {
            fate = Some(if libc::WIFSIGNALED(status) {
                Fate::Killed(libc::WTERMSIG(status))
            } else {
                Fate::Exited(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
            });
        }
    }
}

/// Ends as the application did.
pub(super) fn mirror(fate: Fate) -> ExitCode {
    match fate {
        Fate::Exited(code) => ExitCode::from(code),
        Fate::Killed(number) => {
            if std::process::id() != INIT {
                die_by(number);
            }
            ExitCode::from(u8::try_from(128 + (number & 0x7f)).unwrap_or(u8::MAX))
        }
    }
}

/// Dies by this signal, without a core: what there is to see of it is in the application's.
fn die_by(number: i32) {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: setrlimit only reads one rlimit from the address it gets, which is that of a live local.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    // SAFETY: the default action runs no code of ours. SIGKILL has no other, and says so.
    unsafe { libc::signal(number, libc::SIG_DFL) };
    // SAFETY: raise takes a number; that it may end the process is what it is for.
    unsafe { libc::raise(number) };
}
