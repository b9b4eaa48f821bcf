//! The file of a Unix-domain socket: taken over from the dead, never from the living, and removed at the end.
//!
//! A lock file `PATH.lock` beside the socket is locked (flock(2)) for as long as we live; the kernel lets go of the lock
//! when we die, however we die. It begins with our process id on a line, as Postgres' own lock files do, so that a
//! Postgres that is told to use the same socket refuses to. Whoever listens without such a lock (`PgBouncer`) is found
//! by connecting to the socket.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// The second line of our lock files: Postgres has a data directory there.
const OWN_MARK: &str = "pgweir";

/// Bytes of a lock file that are looked at.
const LOCK_READ_MAX: u64 = 4096;

/// Lock files that may vanish under our hands, one after the other, before we give up.
const TRIES: u32 = 10;

/// Why a Unix-domain socket cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketFault {
    /// Someone listens on it, or is about to.
    #[error("it is in use{}. Stop that process, or choose another directory or port", by(*pid))]
    InUse {
        /// The process that its lock file names.
        pid: Option<u32>,
    },
    /// Something else has its name.
    #[error("a file that is not a socket has its name. Remove it, or choose another directory")]
    NotASocket,
    /// `unix_socket_group` does not exist.
    #[error("there is no group {name:?} (unix_socket_group)")]
    NoGroup {
        /// The group.
        name: String,
    },
    /// The system refused.
    #[error("{doing}: {error}")]
    Io {
        /// What was under way: a verb in its -ing form.
        doing: &'static str,
        /// Its answer.
        error: io::Error,
    },
}

impl SocketFault {
    /// Attaches what was under way.
    pub(super) fn doing(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { doing, error }
    }
}

fn by(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" by process {pid}")).unwrap_or_default()
}

/// The right to a socket's name: its lock, held.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    lock_path: PathBuf,
    lock: File,
    /// The lock file still says what somebody else wrote, who may be alive where we cannot see it.
    foreign: bool,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Unlocked by being closed, after it is gone: who opened it before finds another file in its place, or none.
        if !self.foreign && self.lock.metadata().is_ok_and(|own| is_at(&self.lock_path, identity(&own))) {
            let _ = fs::remove_file(&self.lock_path);
        }
    }
}

/// A socket's file, and the right to it. Dropping it removes both.
#[derive(Debug)]
pub struct SocketFile {
    claim: Claim,
    socket: Identity,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if is_at(&self.claim.path, self.socket) {
            let _ = fs::remove_file(&self.claim.path);
        }
    }
}

impl SocketFile {
    /// Claims the name `path`, and removes the socket of someone who is gone.
    ///
    /// # Errors
    ///
    /// [`SocketFault`].
    pub(super) fn claim(path: &Path) -> Result<Claim, SocketFault> {
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let (lock, foreign) = lock(&lock_path)?;
        let mut claim = Claim { path: path.to_owned(), lock_path, lock, foreign };
        remove_stale(path)?;
        write_own(&claim.lock).map_err(SocketFault::doing("writing its lock file"))?;
        claim.foreign = false;
        Ok(claim)
    }

    /// The socket was bound.
    ///
    /// # Errors
    ///
    /// [`SocketFault::Io`].
    pub(super) fn bound(claim: Claim) -> Result<Self, SocketFault> {
        let socket = fs::symlink_metadata(&claim.path).map_err(SocketFault::doing("looking at it"))?;
        Ok(Self { socket: identity(&socket), claim })
    }
}

/// Opens and locks the lock file. Whether somebody who is no pgweir wrote it.
fn lock(path: &Path) -> Result<(File, bool), SocketFault> {
    for _ in 0..TRIES {
        let mut options = OpenOptions::new();
        // In a directory that others may write to, a symbolic link could lead anywhere.
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(path).map_err(SocketFault::doing("opening its lock file"))?;
        let locked = file.try_lock();
        let owner = read_owner(&mut file).map_err(SocketFault::doing("reading its lock file"))?;
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SocketFault::InUse { pid: owner.map(|owner| owner.pid) }),
            Err(TryLockError::Error(error)) => return Err(SocketFault::Io { doing: "locking its lock file", error }),
        }
        // Its owner may have removed it after we had opened it.
        let own = file.metadata().map_err(SocketFault::doing("looking at its lock file"))?;
        if !is_at(path, identity(&own)) {
            continue;
        }
        return match owner {
            // Postgres does not lock its lock files: they hold for as long as the process lives.
            Some(owner) if !owner.is_pgweir && is_running(owner.pid) => {
                Err(SocketFault::InUse { pid: Some(owner.pid) })
            }
            owner => Ok((file, owner.is_some_and(|owner| !owner.is_pgweir))),
        };
    }
    Err(SocketFault::InUse { pid: None })
}

/// Who wrote a lock file.
struct Owner {
    pid: u32,
    is_pgweir: bool,
}

fn read_owner(file: &mut File) -> io::Result<Option<Owner>> {
    let mut bytes = Vec::new();
    file.take(LOCK_READ_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines = text.lines();
    // Postgres writes the process id of a single-user server with a minus.
    let pid = lines.next().and_then(|line| line.trim().trim_start_matches('-').parse().ok());
    Ok(pid.map(|pid| Owner { pid, is_pgweir: lines.next() == Some(OWN_MARK) }))
}

fn write_own(mut file: &File) -> io::Result<()> {
    use std::io::Seek;
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(format!("{}\n{OWN_MARK}\n", std::process::id()).as_bytes())
}

fn is_running(pid: u32) -> bool {
    let Ok(pid) = i32::try_from(pid) else { return false };
    // EPERM: it runs as somebody else.
    !matches!(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH))
}

/// Removes the socket if nobody listens on it.
fn remove_stale(path: &Path) -> Result<(), SocketFault> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(SocketFault::Io { doing: "looking at it", error }),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketFault::NotASocket),
        Ok(_) => {}
    }
    match probe(path) {
        // Alive: it took the connection, or its backlog is full.
        Ok(()) => return Err(SocketFault::InUse { pid: None }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(SocketFault::InUse { pid: None }),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
        Err(error) => return Err(SocketFault::Io { doing: "trying whether anyone listens on it", error }),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SocketFault::Io { doing: "removing what is left of it", error })
        }
        _ => Ok(()),
    }
}

fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// Device and number of a file.
type Identity = (u64, u64);

fn identity(file: &Metadata) -> Identity {
    (file.dev(), file.ino())
}

/// Whether the file of this name is this file.
fn is_at(path: &Path, file: Identity) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| identity(&found) == file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Claims and binds, as [`super::super::listen`] does.
    fn take(path: &Path) -> Result<(SocketFile, UnixListener), SocketFault> {
        let claim = SocketFile::claim(path)?;
        let socket = UnixListener::bind(path).map_err(SocketFault::doing("binding"))?;
        Ok((SocketFile::bound(claim)?, socket))
    }

    fn is_in_use(path: &Path) -> bool {
        matches!(take(path), Err(SocketFault::InUse { .. }))
    }

    #[test]
    fn a_socket_is_taken_from_the_dead_and_never_from_the_living() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".s.PGSQL.6432");
        let lock = directory.path().join(".s.PGSQL.6432.lock");
        let (file, socket) = take(&path).unwrap();
        match take(&path) {
            Err(SocketFault::InUse { pid }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        assert!(path.exists() && lock.exists(), "the attempt left them alone");
        drop((file, socket));
        assert!(!path.exists() && !lock.exists(), "both are gone at the end");
        // A crash leaves both behind.
        let (file, socket) = take(&path).unwrap();
        let left = fs::read(&lock).unwrap();
        drop((file, socket));
        drop(UnixListener::bind(&path).unwrap());
        fs::write(&lock, left).unwrap();
        assert!(path.exists() && lock.exists());
        drop(take(&path).unwrap());
    }

    #[test]
    fn who_listens_without_a_lock_is_alive_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".s.PGSQL.6432");
        let other = UnixListener::bind(&path).unwrap();
        assert!(is_in_use(&path));
        assert!(!directory.path().join(".s.PGSQL.6432.lock").exists(), "the lock is given back");
        drop(other);
        take(&path).unwrap();
    }

    #[test]
    fn a_running_postgres_keeps_its_socket_and_a_dead_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".s.PGSQL.6432");
        let lock = directory.path().join(".s.PGSQL.6432.lock");
        let text = |pid: u32| format!("{pid}\n/var/lib/postgresql\n1\n6432\n{}\n", directory.path().display());
        fs::write(&lock, text(std::process::id())).unwrap();
        assert!(is_in_use(&path));
        assert_eq!(fs::read_to_string(&lock).unwrap(), text(std::process::id()), "left alone");
        // Nor does it lose its lock file if only its socket shows that it is alive.
        fs::write(&lock, text(4_194_305)).unwrap();
        let socket = UnixListener::bind(&path).unwrap();
        assert!(is_in_use(&path));
        assert_eq!(fs::read_to_string(&lock).unwrap(), text(4_194_305), "left alone");
        drop(socket);
        // A process id above Linux' largest.
        take(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".s.PGSQL.6432");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(take(&path), Err(SocketFault::NotASocket)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        // Nor is a link followed where the lock file would be.
        let other = directory.path().join(".s.PGSQL.6433");
        let target = directory.path().join("target");
        std::os::unix::fs::symlink(&target, directory.path().join(".s.PGSQL.6433.lock")).unwrap();
        assert!(matches!(take(&other), Err(SocketFault::Io { .. })));
        assert!(!target.exists());
    }
}
