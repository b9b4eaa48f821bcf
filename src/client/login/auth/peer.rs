//! Peer authentication: over a Unix-domain socket the operating system tells whose process the client is.

use nix::unistd::{Uid, User};

use crate::client::login::{Door, Refused};
use crate::stats::RefusalReason;

impl Door {
    /// Lets the operating system's user `uid` in as `role`, if that is its name and one of the known users'.
    ///
    /// Source: `PostgreSQL` 17 docs, §20.9 "Peer Authentication".
    pub(in crate::client::login) async fn peer(&self, uid: u32, role: &str) -> Result<(), Refused> {
        // The names may come from a directory service, and take their time.
        let found = tokio::task::spawn_blocking(move || User::from_uid(Uid::from_raw(uid)).ok().flatten()).await;
        let name = found.ok().flatten().map(|user| user.name);
        if name.as_deref().is_some_and(|name| self.context.secrets.is_same(name, role))
            && self.context.secrets.knows(&self.context.config, role)
        {
            return Ok(());
        }
        let message = format!("Peer authentication failed for user \"{role}\"");
        let mut refused = Refused::new(RefusalReason::AuthFailed, "28000", &message);
        // What the client is to the system is no news to it, but nobody else's business.
        refused.log = match name {
            Some(name) => format!("{message}: the system's user is \"{name}\" (uid {uid})"),
            None => format!("{message}: the system has no name for uid {uid}"),
        };
        Err(refused)
    }
}
