//! How a pool's limits stand on its server, as a census told: for people and programs, not for decisions.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is older is not told as if it were so now: without a fleet nobody may have asked for long.
const FRESH: Duration = Duration::from_mins(1);

/// Who takes part in the sharing of a server's limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// The pool is on its own.
    #[default]
    Alone,
    /// It shares them with the other pgweirs (`fleet_budget`).
    Shared,
    /// It would, but another pooler stands in front of the server: nobody can tell whose connections are whose.
    Blind,
}

impl Sharing {
    /// The operator's word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Shared => "shared",
            Self::Blind => "behind_a_pooler",
        }
    }
}

/// The connections of one holder under one limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// A pgweir's tag (`web.1/ab12cd`), or what another program calls itself in `application_name`.
    pub name: Box<str>,
    /// Connections.
    pub connections: u32,
    /// Logins under way.
    pub claims: u32,
    /// Connections that are to find out whether they may stay, among the others.
    pub probes: u32,
}

/// Some holders of a limit together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// Those with most connections, most first.
    pub listed: Vec<Holder>,
    /// How many more holders there are.
    pub unlisted: u32,
    /// Connections of all of them, claims included.
    pub used: u32,
}

/// How one limit stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScopeStanding {
    /// Whose connections it counts: `role`, `database`, `server`, `fleet`.
    pub scope: &'static str,
    /// Connections, at most; none if there is no limit.
    pub limit: Option<u32>,
    /// What pgweirs leave alone.
    pub headroom: u32,
    /// Connections and claims.
    pub used: u32,
    /// Of these: this process's own.
    pub own: Holder,
    /// Of these: other pgweirs'.
    pub peers: Holders,
    /// Of these: other programs'.
    pub foreigners: Holders,
    /// Logins under way, of all.
    pub claims: u32,
    /// Connections that are to find out whether they may stay, of all.
    pub probes: u32,
    /// Those of them that wait for room.
    pub waiting: u32,
    /// Pools that share the limit, this one among them; none if they do not share it.
    pub members: Option<u32>,
    /// What each of them is entitled to.
    pub share: Option<u32>,
    /// What pgweirs and other programs may have together.
    pub usable: u32,
}

impl ScopeStanding {
    /// How many more there may be; none without a limit.
    #[must_use]
    pub fn room(&self) -> Option<u32> {
        self.limit.map(|_| self.usable.saturating_sub(self.used))
    }

    /// A role's limit of 20, of which everything is known.
    #[cfg(test)]
    #[must_use]
    pub fn sample() -> Self {
        Self {
            scope: "role",
            limit: Some(20),
            headroom: 2,
            used: 11,
            own: Holder { connections: 3, claims: 1, ..Holder::default() },
            peers: Holders { used: 5, ..Holders::default() },
            foreigners: Holders { used: 2, ..Holders::default() },
            claims: 1,
            probes: 1,
            waiting: 0,
            members: Some(3),
            share: Some(5),
            usable: 18,
        }
    }
}

/// How a pool's limits stood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// When that was.
    pub taken: Instant,
    /// Each kind of limit, once.
    pub scopes: Vec<ScopeStanding>,
}

impl Standing {
    /// The limit that leaves least room, the first of several.
    #[must_use]
    pub fn binding(&self) -> Option<&ScopeStanding> {
        self.scopes.iter().filter(|scope| scope.limit.is_some()).min_by_key(|scope| scope.room())
    }
}

/// The last time that the server had no room for a login (53300).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRefusal {
    /// When that was.
    pub at: Instant,
    /// Which limit it was; none if the server did not tell.
    pub scope: Option<&'static str>,
}

/// Where a pool's server connections lead, and what is known of their limits.
#[derive(Clone, Debug, Default)]
pub struct PoolLimits {
    /// `host:port`.
    pub server: Arc<str>,
    /// The role that logs in there.
    pub login: Arc<str>,
    /// The database there.
    pub dbname: Arc<str>,
    /// The pool's tag; empty without one.
    pub tag: Arc<str>,
    /// Whether others take part.
    pub sharing: Sharing,
    /// The last census; none yet.
    pub standing: Option<Arc<Standing>>,
    /// The last refusal; none yet.
    pub refusal: Option<LastRefusal>,
    /// The server would not tell when it was asked last.
    pub is_untold: bool,
}

impl PoolLimits {
    /// The last census, while it still says how things are.
    #[must_use]
    pub fn fresh(&self, now: Instant) -> Option<&Standing> {
        self.standing.as_deref().filter(|known| now.saturating_duration_since(known.taken) < FRESH)
    }
}
