//! The one server connection of a pool that listens for all its clients: whether there is room for it, and when it has to
//! give way.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::Pool;
use super::fleet::Fleet;
use crate::backend::ServerConn;
use crate::replica::Incarnation;

/// How long clients wait for a server connection before they get the one that listens, if it is the only one.
const GRACE: Duration = Duration::from_secs(5);

/// The server connection that listens for all clients.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Its place among the lent ones.
    place: usize,
    /// The server's process id.
    pub server_pid: u32,
    /// Since when it listens.
    pub since: Instant,
    /// The server.
    life: Rc<Incarnation>,
    /// When it was opened.
    born: Instant,
}

/// How the server of a connection stands to that of the one that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It is the same, as far as anybody knows.
    Same,
    /// It is another, which the connection was led to later: the one that listens hears nothing of it.
    Newer,
    /// It is another, from before.
    Older,
}

/// By the system's identifier and the time of its start: one server may be reached at several addresses.
fn compare(listener: (&Incarnation, Instant), other: (&Incarnation, Instant)) -> Life {
    let ((life, born), (other, other_born)) = (listener, other);
    let known = |life: &Incarnation| !(life.started.is_empty() || life.system_identifier.is_empty());
    let differ = life.started != other.started || life.system_identifier != other.system_identifier;
    match (known(life) && known(other) && differ, other_born > born) {
        (false, _) => Life::Same,
        (true, true) => Life::Newer,
        (true, false) => Life::Older,
    }
}

impl Pool {
    /// This server connection, which is lent, listens for all clients from now on; or none does any more.
    pub fn listens(&self, conn: Option<&ServerConn>) {
        *self.listener.borrow_mut() = conn.map(|conn| Listener {
            place: conn.lent,
            server_pid: conn.pid,
            since: self.clock.now(),
            life: conn.incarnation.clone(),
            born: conn.born,
        });
        self.listener_leaves.set(false);
    }

    /// The one that does.
    #[must_use]
    pub fn listener(&self) -> Option<Listener> {
        self.listener.borrow().clone()
    }

    /// Its place among the lent ones.
    pub(super) fn listener_place(&self) -> Option<usize> {
        self.listener.borrow().as_ref().map(|listener| listener.place)
    }

    /// How this server connection's server stands to that of the one that listens.
    #[must_use]
    pub fn life_of(&self, conn: &ServerConn) -> Life {
        let listener = self.listener.borrow();
        let Some(listener) = &*listener else { return Life::Same };
        compare((&listener.life, listener.born), (&conn.incarnation, conn.born))
    }

    /// If the one that listens leads to such a server, it is to be given up.
    pub(super) fn evict_listener(&self, is_leaving: impl Fn(&Incarnation) -> bool) {
        let leaves = self.listener.borrow().as_ref().is_some_and(|listener| is_leaving(&listener.life));
        self.listener_leaves.set(self.listener_leaves.get() || leaves);
    }

    /// Server connections that listen for all clients: one, or none.
    pub(super) fn listeners(&self) -> u32 {
        u32::from(self.listener.borrow().is_some())
    }

    /// Lent connections that serve clients.
    pub(super) fn serving(&self) -> usize {
        self.inner.borrow().lent.len().saturating_sub(usize::from(self.listener.borrow().is_some()))
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
        let may = limits.shared_listener && !self.is_draining() && self.listener.borrow().is_none();
        may && leaves_one(self.open(), room, limits.pool_size, pinned)
    }

    /// Whether clients wait in vain because all connections but the one that listens are pinned, or there are no others.
    #[must_use]
    pub fn needs_listener(&self) -> bool {
        self.listener.borrow().is_some()
            && is_last_to_serve(self.open(), self.pinned.get())
            && self.waiters().1 >= GRACE
    }
}

/// Whether none of the connections that are `open` serves clients that are not pinned, if one of them listens.
const fn is_last_to_serve(open: u32, pinned: u32) -> bool {
    open.saturating_sub(pinned) <= 1
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
    fn a_server_is_known_by_its_identifier_and_its_start_and_the_later_connection_is_right() {
        let life = |system: &str, started: &str, address: &str| Incarnation {
            system_identifier: system.into(),
            started: started.into(),
            address: address.into(),
        };
        let listener = life("7", "noon", "10.0.0.1:5432");
        let before = Instant::now();
        let (born, after) = (before + Duration::from_secs(1), before + Duration::from_secs(2));
        #[rustfmt::skip]
        let table = [
            ("the same",         life("7", "noon", "10.0.0.1:5432"),  after,  Life::Same),
            ("another address",  life("7", "noon", "[::1]:5432"),     after,  Life::Same),
            ("started later",    life("7", "night", "10.0.0.2:5432"), after,  Life::Newer),
            ("another system",   life("8", "noon", "10.0.0.1:5432"),  after,  Life::Newer),
            ("opened before",    life("7", "night", "10.0.0.2:5432"), before, Life::Older),
            ("it does not tell", life("", "", ""),                    after,  Life::Same),
        ];
        for (name, other, other_born, want) in table {
            assert_eq!(compare((&listener, born), (&other, other_born)), want, "{name}");
        }
    }

    #[test]
    fn one_that_is_opened_or_not_pinned_serves_the_others() {
        let table = [((1, 0), true), ((2, 0), false), ((3, 1), false), ((3, 2), true), ((2, 3), true)];
        for ((open, pinned), want) in table {
            assert_eq!(is_last_to_serve(open, pinned), want, "{pinned} of {open}");
        }
    }

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
