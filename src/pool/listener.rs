//! The one server connection of a pool that listens for all its clients: whether there is room for it, and when it has to
//! give way.

use std::time::Duration;

use super::Pool;
use super::fleet::Fleet;

/// How long clients wait for a server connection before they get the one that listens, if it is the only one.
const GRACE: Duration = Duration::from_secs(5);

impl Pool {
    /// Server connections that listen for all clients: one, or none.
    pub(super) fn listeners(&self) -> u32 {
        u32::from(self.listener.get().is_some())
    }

    /// Lent connections that serve clients.
    pub(super) fn serving(&self) -> usize {
        self.inner.borrow().lent.len().saturating_sub(usize::from(self.listener.get().is_some()))
    }

    /// Whether a lent connection can be set aside for that. `is_pinned`: its client keeps it now.
    #[must_use]
    pub fn spares_listener(&self, is_pinned: bool) -> bool {
        let free = self.counts.iter().map(|count| count.room()).min().unwrap_or(0);
        let share = self.fleet.as_ref().and_then(Fleet::share);
        let free = share.map_or(free, |share| free.min(share.saturating_sub(self.open())));
        // A server that has just refused a login may refuse the next.
        let room = if self.backoff.borrow().failures == 0 { free } else { 0 };
        let pinned = self.pinned.get().saturating_sub(u32::from(is_pinned));
        let limits = &self.limits;
        let may = limits.shared_listener && !self.draining.get() && self.listener.get().is_none();
        may && leaves_one(self.open(), room, limits.pool_size, pinned)
    }

    /// Whether clients wait in vain because the connection that listens is the only one.
    #[must_use]
    pub fn needs_listener(&self) -> bool {
        self.listener.get().is_some() && self.open() == 1 && self.waiters().1 >= GRACE
    }
}

/// Whether at least one of the connections that are `open`, or for which there is `room`, is left for clients that are not
/// pinned when one of them listens.
fn leaves_one(open: u32, room: u32, pool_size: u32, pinned: u32) -> bool {
    open.saturating_add(room).min(pool_size).saturating_sub(pinned) >= 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_left_for_clients_that_are_not_pinned() {
        #[rustfmt::skip]
        let table = [
            ("a pool of one",               (1, 0, 1, 0), false),
            ("a pool of two",               (1, 1, 2, 0), true),
            ("two, and a limit is reached", (1, 0, 2, 0), false),
            ("two, one of them pinned",     (2, 0, 2, 1), false),
            ("three, one of them pinned",   (2, 1, 3, 1), true),
            ("three, two of them pinned",   (3, 0, 3, 2), false),
            ("a reserve does not count",    (1, 9, 1, 0), false),
            ("more pinned than are open",   (1, 0, 5, 3), false),
        ];
        for (name, (open, room, pool_size, pinned), want) in table {
            assert_eq!(leaves_one(open, room, pool_size, pinned), want, "{name}");
        }
    }
}
