//! `auth_file`, read again when it changes.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgweir_config::{Config, Faults};
use tokio::sync::{Notify, mpsc};
use tokio::time::{MissedTickBehavior, interval};

use crate::client::Users;
use crate::worker::Command;

/// Time between two looks at the file.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The file and the users that are known.
pub(super) struct AuthFile {
    config: Arc<Config>,
    users: Arc<Users>,
    stamp: Option<Stamp>,
}

/// What differs when a file was written, or another one put in its place.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    length: u64,
    inode: u64,
}

/// The users cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The file has faults.
    #[error("{0}")]
    Faults(#[from] Faults),
    /// The system gives no random bytes.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl AuthFile {
    /// Reads the users of the configuration and, if there is one, of the file.
    pub(super) fn read(config: Arc<Config>) -> Result<Self, UsersError> {
        // In this order: what is written meanwhile is noticed by the next look.
        let stamp = stamp(&config.auth.auth_file);
        let users = Arc::new(Users::derive(&config, &config.read_auth_file()?, None)?);
        Ok(Self { config, users, stamp })
    }

    pub(super) fn users(&self) -> Arc<Users> {
        self.users.clone()
    }

    /// Tells the worker of new users, for as long as there is a worker. `again` asks for a look at once.
    pub(super) async fn watch(mut self, commands: mpsc::UnboundedSender<Command>, again: Arc<Notify>) {
        let mut looks = interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                _ = looks.tick() => false,
                () = again.notified() => true,
                () = commands.closed() => return,
            };
            // The disk may be slow, and passwords are stretched.
            let look = tokio::task::spawn_blocking(move || {
                let changed = self.look(asked);
                (self, changed)
            });
            let Ok((file, changed)) = look.await else { return };
            self = file;
            if changed && commands.send(Command::Users(self.users())).is_err() {
                return;
            }
        }
    }

    /// Reads the file if it changed, or if it is `asked` for. Whether the users are others now; after a fault they are
    /// not.
    fn look(&mut self, asked: bool) -> bool {
        let path = &self.config.auth.auth_file;
        let stamp = stamp(path);
        if path.is_empty() || stamp == self.stamp && !asked {
            return false;
        }
        self.stamp = stamp;
        let list = self.config.read_auth_file().map_err(UsersError::from);
        let users = list.and_then(|list| {
            let count = list.iter().count();
            Ok((Users::derive(&self.config, &list, Some(&self.users))?, count))
        });
        match users {
            Ok((users, count)) => {
                tracing::info!(%path, users = count, "auth_file read");
                self.users = Arc::new(users);
                true
            }
            Err(error) => {
                for fault in error.to_string().lines() {
                    tracing::error!(%fault, "auth_file not read; the users stay as they were");
                }
                false
            }
        }
    }
}

fn stamp(path: &str) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Stamp { modified: metadata.modified().ok(), length: metadata.len(), inode: metadata.ino() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test's failure is a panic")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_watch_ends_with_its_worker() {
        let file = AuthFile::read(Arc::new(Config::default())).unwrap();
        let (commands, orders) = mpsc::unbounded_channel();
        let watch = tokio::spawn(file.watch(commands, Arc::default()));
        drop(orders);
        tokio::time::timeout(Duration::from_secs(20), watch).await.unwrap().unwrap();
    }
}
