//! A private directory for one cluster, removed with it; and the sweep of what killed ones left.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use crate::error::{Doing, HarnessError};
use crate::os;

/// How such directories' names begin.
const PREFIX: &str = "pgweir-pg-";
/// The file whose lock says that the directory's owner lives.
const OWNER: &str = "owner";
/// Longest base: a socket's path in it (`/pgweir-pg-XXXXXX/s/.s.PGSQL.NNNNN`) must fit the 107
/// bytes of `sun_path` (unix(7)).
const BASE_LIMIT: usize = 60;

/// A private directory, owned by the account that Postgres runs as. Dropping removes it.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    /// Locked for as long as we live; the kernel lets go of it when we are killed.
    _owner: File,
}

impl Home {
    /// Makes one, after sweeping those whose owner is gone.
    pub(crate) fn create() -> Result<Self, HarnessError> {
        let base = base();
        sweep(&base);
        let directory =
            tempfile::Builder::new().prefix(PREFIX).tempdir_in(&base).doing("making a directory in", &base)?;
        let path = directory.path().to_path_buf();
        // Locked under another name first: a sweep must never see it unlocked.
        let unlocked = path.join("owner.new");
        let owner = File::create(&unlocked).doing("making", &unlocked)?;
        owner.lock().doing("locking", &unlocked)?;
        fs::rename(&unlocked, path.join(OWNER)).doing("renaming", &unlocked)?;
        hand_over(&path)?;
        let path = directory.keep();
        let home = Self { path, _owner: owner };
        home.directory("s")?;
        Ok(home)
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory `name` in it, mode 0700, owned by the account Postgres runs as.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf, HarnessError> {
        let path = self.path.join(name);
        DirBuilder::new().mode(0o700).create(&path).doing("making", &path)?;
        hand_over(&path)?;
        Ok(path)
    }

    /// Where its Unix-domain socket is.
    pub(crate) fn sockets(&self) -> PathBuf {
        self.path.join("s")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A process of a cluster that was just killed may still be writing its last file.
        for _ in 0..50 {
            match fs::remove_dir_all(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}

/// Gives `path` to the account that Postgres runs as.
pub(crate) fn hand_over(path: &Path) -> Result<(), HarnessError> {
    match os::account() {
        Some(account) => chown(path, Some(account.uid), Some(account.gid)).doing("handing over", path),
        None => Ok(()),
    }
}

/// The temporary directory, or /tmp when that one's name is too long or other users may not pass.
fn base() -> PathBuf {
    let base = std::env::temp_dir();
    let short = base.as_os_str().len() <= BASE_LIMIT;
    if short && os::may_pass(&base) { base } else { PathBuf::from("/tmp") }
}

/// Removes directories whose owner was killed: nobody holds the lock. A failure is no harm; it is
/// tried again next time.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(owner) = File::open(entry.path().join(OWNER)) else {
            continue;
        };
        if owner.try_lock().is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's failure is a panic")]

    use super::{Home, OWNER, sweep};
    use std::fs::{self, File};

    #[test]
    fn a_sweep_spares_the_living_and_removes_the_dead() {
        let alive = Home::create().unwrap();
        let base = alive.path().parent().unwrap();
        let dead = base.join("pgweir-pg-test-dead");
        let unlocked = base.join("pgweir-pg-test-unlocked");
        fs::create_dir_all(&dead).unwrap();
        fs::create_dir_all(&unlocked).unwrap();
        File::create(dead.join(OWNER)).unwrap();
        sweep(base);
        assert!(alive.path().exists());
        assert!(!dead.exists());
        assert!(unlocked.exists(), "its owner may be about to lock it");
        fs::remove_dir(&unlocked).unwrap();
    }

    #[test]
    fn dropping_a_home_removes_it() {
        let home = Home::create().unwrap();
        let path = home.path().to_path_buf();
        fs::write(home.sockets().join("x"), "x").unwrap();
        drop(home);
        assert!(!path.exists());
    }
}
