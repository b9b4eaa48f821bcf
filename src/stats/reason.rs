//! Closed sets of reasons, and one count for each.

use std::fmt;
use std::marker::PhantomData;

/// A closed set of reasons that things are counted under; each is a metric label's value.
pub trait Reason: Copy + 'static {
    /// Every reason, in declaration order, so that `ALL[r.index()]` is `r`.
    const ALL: &'static [Self];

    /// The position in [`Self::ALL`].
    fn index(self) -> usize;

    /// The operator's word for it: metric label, log field, console column.
    fn as_str(self) -> &'static str;
}

/// Declares a reason enum, its words, and the [`Tally`] over it.
macro_rules! reasons {
    (
        $(#[$doc:meta])*
        $name:ident, $tally:ident {
            $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),+
        }

        impl Reason for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn index(self) -> usize {
                self as usize
            }

            fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        #[doc = concat!("One count per [`", stringify!($name), "`].")]
        pub type $tally = Tally<$name, { [$($word),+].len() }>;
    };
}

reasons! {
    /// Who is at fault for an error.
    Blame, BlameCounts {
        /// The client broke the protocol, sent wrong credentials or left.
        Client = "client",
        /// The server answered with the error, or was lost.
        Server = "server",
        /// pgweir: a limit of its own, its configuration, or a defect.
        Pooler = "pooler",
    }
}

reasons! {
    /// Why a session keeps its server connection past the end of a transaction.
    PinReason, PinCounts {
        /// More, or longer, session settings than are carried to another server connection.
        Settings = "settings",
        /// `LISTEN` that could not be virtualised.
        Listen = "listen",
        /// A temporary table, view or sequence.
        Temp = "temp",
        /// A session-level advisory lock.
        AdvisoryLock = "advisory_lock",
        /// A cursor declared `WITH HOLD`.
        HoldCursor = "hold_cursor",
        /// SQL-level `PREPARE`.
        Prepare = "prepare",
        /// `LOAD` of a shared library, `dblink_connect` or `setseed`: only the end of the session undoes it.
        Load = "load",
        /// A start-up parameter no pooled connection has.
        Startup = "startup",
        /// More prepared statements than can be interned.
        Statements = "statements",
        /// A statement whose effect on the session is not known.
        Unknown = "unknown",
    }
}

reasons! {
    /// Why a server connection was closed instead of kept.
    DiscardReason, DiscardCounts {
        /// It reached `server_lifetime`.
        Lifetime = "lifetime",
        /// It was idle for `server_idle_timeout`.
        Idle = "idle",
        /// The server closed it, or the network did.
        Lost = "lost",
        /// The server broke the protocol.
        Protocol = "protocol",
        /// Its state was not known to be clean at the end of a lease.
        Dirty = "dirty",
        /// What sessions of the pool begin with (`ALTER ROLE .. SET`, `ALTER DATABASE .. SET`) was changed after its own had begun.
        Defaults = "defaults",
        /// The pool's limit went down.
        Shrink = "shrink",
        /// pgweir is stopping.
        Shutdown = "shutdown",
    }
}

reasons! {
    /// What became of a cancel request whose key named a session of the pool.
    CancelOutcome, CancelCounts {
        /// Sent on to the server that runs the session's query.
        Forwarded = "forwarded",
        /// The session waited for a server connection; it was taken out of the queue.
        Queued = "queued",
    }
}

reasons! {
    /// Why a client was turned away before it had a session.
    RefusalReason, RefusalCounts {
        /// `max_client_conn` clients are connected.
        MaxClientConn = "max_client_conn",
        /// `max_login_clients` clients are logging in.
        MaxLoginClients = "max_login_clients",
        /// Wrong user, password or certificate.
        AuthFailed = "auth_failed",
        /// Too many failed logins from one address.
        LoginFailures = "login_failures",
        /// Users could not be looked up on the server.
        Lookup = "lookup",
        /// No such database is configured, or is on the server.
        UnknownDatabase = "unknown_database",
        /// The bytes are not a start-up of the Postgres protocol.
        Protocol = "protocol",
        /// Log-in took longer than `client_login_timeout`.
        Deadline = "deadline",
        /// pgweir drains and takes no new clients.
        Draining = "draining",
        /// The PROXY protocol was asked for, and not spoken, or not by one of `proxy_protocol_from`.
        ProxyProtocol = "proxy_protocol",
        /// Its database is served by followers alone, and none can.
        NoFollower = "no_follower",
    }
}

reasons! {
    /// Whom a TLS connection leads to.
    Side, SideCounts {
        /// A client: we are TLS' server.
        Client = "client",
        /// A server: we are TLS' client.
        Server = "server",
    }
}

reasons! {
    /// Which kind of server a pool's connections lead to.
    Role, RoleCounts {
        /// Takes writes.
        Primary = "primary",
        /// Takes reads; replays the primary's log.
        Follower = "follower",
    }
}

reasons! {
    /// Why a transaction went where it did.
    RouteReason, RouteReasonCounts {
        /// A read: to a follower.
        Read = "read",
        /// A read-only transaction: to a follower.
        ReadOnly = "read_only",
        /// A hint asked for a follower: to one.
        Hint = "hint",
        /// A hint asked for the primary.
        HintPrimary = "hint_primary",
        /// It is not known what it does.
        Unknown = "unknown",
        /// It writes.
        Write = "write",
        /// It locks rows, tables or advisory locks.
        Lock = "lock",
        /// It calls a function that is not known to be safe.
        Function = "function",
        /// It names a relation that followers do not have, or whose rows do not come from the data.
        Relation = "relation",
        /// It asks about the server or the session.
        Server = "server",
        /// It changes the session.
        Session = "session",
        /// It is, or may be, serializable.
        Serializable = "serializable",
        /// Its batch does not end, or is too long.
        Open = "open",
        /// Nothing in it says that it is a read.
        Transaction = "transaction",
        /// No follower is usable.
        NoFollower = "no_follower",
        /// No follower has replayed what the read must see.
        Stale = "stale",
        /// It failed on a follower.
        Rerun = "rerun",
    }
}

reasons! {
    /// What is known of a follower.
    FollowerState, FollowerStateCounts {
        /// Nothing: it was not asked, or what it said could not be compared with the primary.
        Unknown = "unknown",
        /// It follows the primary.
        Serving = "serving",
        /// It is not known to be on the primary's timeline yet: it serves what any state of the past will do for.
        Unshown = "unshown",
        /// It is too far behind.
        Lagging = "lagging",
        /// It failed lately.
        Out = "out",
        /// It follows nobody.
        Primary = "primary",
        /// It has another system identifier, or tells none.
        OtherSystem = "other_system",
        /// It comes from the same system, and has another history: a fork, or what follows one.
        OtherHistory = "other_history",
        /// It is the same server as another follower.
        Twin = "twin",
        /// It would understand a text in another way than the primary: `search_path`, `TimeZone` or their like differ.
        OtherSettings = "other_settings",
    }
}

/// One count per reason of a closed set; `N` is the number of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally<R, const N: usize> {
    counts: [u64; N],
    reasons: PhantomData<R>,
}

impl<R, const N: usize> Default for Tally<R, N> {
    fn default() -> Self {
        Self { counts: [0; N], reasons: PhantomData }
    }
}

impl<R: Reason, const N: usize> Tally<R, N> {
    /// Counts one event.
    pub fn add(&mut self, reason: R) {
        if let Some(count) = self.counts.get_mut(reason.index()) {
            *count += 1;
        }
    }

    /// How often `reason` was counted.
    #[must_use]
    pub fn get(&self, reason: R) -> u64 {
        self.counts.get(reason.index()).copied().unwrap_or(0)
    }

    /// Every reason with its count, zeros included, in declaration order.
    pub fn iter(&self) -> impl Iterator<Item = (R, u64)> + '_ {
        R::ALL.iter().copied().zip(self.counts.iter().copied())
    }

    /// The sum over all reasons.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that a reason enum, its index and its words fit together.
    fn check_reasons<R: Reason + PartialEq + fmt::Debug, const N: usize>() {
        assert_eq!(R::ALL.len(), N);
        for (index, &reason) in R::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index, "{reason:?}");
            let word = reason.as_str();
            assert!(!word.is_empty() && word.bytes().all(|b| b == b'_' || b.is_ascii_lowercase()));
            let same = |other: &&R| other.as_str() == word;
            assert_eq!(R::ALL.iter().filter(same).count(), 1, "{word} names two reasons");

            let mut tally = Tally::<R, N>::default();
            tally.add(reason);
            tally.add(reason);
            assert_eq!((tally.get(reason), tally.total()), (2, 2), "{reason:?}");
            assert!(tally.iter().all(|(r, count)| (count == 2) == (r == reason)));
        }
    }

    #[test]
    fn every_reason_has_its_own_count_and_its_own_word() {
        check_reasons::<Blame, 3>();
        check_reasons::<PinReason, 10>();
        check_reasons::<DiscardReason, 8>();
        check_reasons::<CancelOutcome, 2>();
        check_reasons::<RefusalReason, 11>();
        check_reasons::<Role, 2>();
        check_reasons::<Side, 2>();
        check_reasons::<RouteReason, 17>();
        check_reasons::<FollowerState, 10>();
    }
}
