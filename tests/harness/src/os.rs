//! Child processes that die with their parent and never run as root.
#![allow(unsafe_code, reason = "fork hooks and signals have no safe form in std; each use carries its proof")]

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Doing, HarnessError};

/// A user that server programs run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
}

/// Whom Postgres runs as when we are root, which it refuses: `postgres` if that user exists, else
/// `nobody`, else 65534. `None` when we are not root: then as ourselves.
pub(crate) fn account() -> Option<Account> {
    if effective_uid() != 0 {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = ["postgres", "nobody"].iter().find_map(|name| find_user(&passwd, name));
    Some(found.unwrap_or(Account { uid: 65534, gid: 65534 }))
}

/// The effective user id.
pub(crate) fn effective_uid() -> u32 {
    // SAFETY: geteuid has no preconditions, touches no memory and cannot fail (POSIX).
    unsafe { libc::geteuid() }
}

fn find_user(passwd: &str, name: &str) -> Option<Account> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(Account { uid, gid })
}

/// Whether the account that servers run as may pass through a directory and all above it. We may, unless we are root.
pub(crate) fn may_pass(directory: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    effective_uid() != 0
        || directory.ancestors().all(|part| fs::metadata(part).is_ok_and(|part| part.mode() & 0o001 != 0))
}

/// A command without the variables that would steer it unseen (`PG*` for libpq, `PGWEIR_*` for
/// pgweir), with messages in English, in a process group of its own: a Ctrl-C at the terminal
/// reaches only us, and we stop our children in order.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C").process_group(0);
    command
}

/// Like [`command`], and as [`account`] says.
pub(crate) fn server_command(program: impl AsRef<OsStr>, directory: &Path) -> Command {
    let mut command = command(program);
    command.current_dir(directory);
    if let Some(account) = account() {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// Starts `command`; when this process ends, however it ends, the child gets `signal`.
///
/// The kernel ties the child to the *thread* that forked it (`PR_SET_PDEATHSIG`, prctl(2)), and a
/// test's thread ends before its process does; so one thread that never ends does all the forking.
pub(crate) fn spawn(mut command: Command, signal: i32) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    die_with_us(&mut command, signal);
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, todo) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for mut job in todo {
                // The asker waits for this answer; if it is gone, so is the need for the child.
                if let Err(mpsc::SendError(Ok(mut child))) = job.reply.send(job.command.spawn()) {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        });
        jobs
    });
    let (reply, answer) = mpsc::channel();
    let gone = || io::Error::other("the spawning thread is gone");
    spawner.send(Job { command, reply }).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

struct Job {
    command: Command,
    reply: mpsc::Sender<io::Result<Child>>,
}

#[cfg(target_os = "linux")]
fn die_with_us(command: &mut Command, signal: i32) {
    let parent = std::process::id();
    // SAFETY: the hook runs between fork and exec in a process that may have had other threads, so
    // it may only use async-signal-safe calls: prctl and getppid are plain system calls, and
    // building an io::Error from an errno or a kind does not allocate. It captures only integers.
    // It runs after std has changed the uid, which would clear the setting (prctl(2)).
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have ended before the call above.
            if libc::getppid().cast_unsigned() != parent {
                return Err(io::ErrorKind::Interrupted.into());
            }
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_us(_: &mut Command, _: i32) {}

/// Runs a program to its end; a failure carries all it printed.
pub(crate) fn run(mut command: Command, stdin: Stdio) -> Result<Output, HarnessError> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(command, libc::SIGKILL).doing("starting", &program)?;
    let output = child.wait_with_output().doing("awaiting", &program)?;
    if output.status.success() {
        return Ok(output);
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(HarnessError::Program { program, status: output.status, output: text })
}

/// Sends `signal` to process `pid`.
pub(crate) fn signal(pid: u32, signal: i32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: kill takes two integers and touches no memory. Callers pass the pid of a child that
    // they have not reaped yet (or a grandchild just read from /proc), so it names the right one.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many bytes of what was written to a socket the other end has not acknowledged.
///
/// Source: tcp(7), `SIOCOUTQ`, which is `TIOCOUTQ`.
pub(crate) fn unacknowledged(socket: &impl AsRawFd) -> u32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is the caller's; this request writes one int to the address, which is that of a live local.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { u32::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Waits for a child's end; `None` when it still runs after `within`.
pub(crate) fn wait_exit(child: &mut Child, within: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= within {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The children of a process, from /proc; empty where there is none.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .collect()
}

/// A port on 127.0.0.1 that is free now. Below the range that the kernel hands out for outgoing
/// connections (32768 and up on Linux), so that it stays free across a restart.
pub(crate) fn free_port() -> Result<u16, HarnessError> {
    const TRIES: u32 = 200;
    for _ in 0..TRIES {
        let port = rand::random_range(15_000..32_000_u16);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(HarnessError::NoPort { tries: TRIES })
}

#[cfg(test)]
mod tests {
    use super::{Account, find_user};

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let passwd = "root:x:0:0::/root:/bin/sh\npostgresql:x:7:7::/:/bin/sh\npostgres:x:101:104:,,,:/:/bin/bash\n";
        #[rustfmt::skip]
        let table = [
            ("whole name",      "postgres", Some(Account { uid: 101, gid: 104 })),
            ("absent",          "nobody",   None),
            ("a prefix of one", "postg",    None),
        ];
        for (name, user, want) in table {
            assert_eq!(find_user(passwd, user), want, "{name}");
        }
    }
}
