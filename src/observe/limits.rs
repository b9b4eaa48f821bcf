//! `/limits`: how close this pgweir, its peers and everybody else are to the limits of each server.
//!
//! Its form is `config/limits.schema.json`. Of several pools of a server, each limit is told by the one that looked last.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::blame::seconds;
use super::history::{History, LimitKey, subject};
use super::{Overview, Stage};
use crate::stats::{
    FollowerGauges, Holder, Holders, LastRefusal, PoolLimits, PoolSnapshot, Reason as _, ScopeStanding, Sharing,
    Snapshot,
};

/// The form of the answer.
pub const SCHEMA: &str = include_str!("../../config/limits.schema.json");

/// One limit, as the pool that looked last saw it.
struct Seen<'a> {
    limits: &'a PoolLimits,
    scope: &'a ScopeStanding,
    taken: Instant,
    /// Pools of this process that it holds for.
    pools: Vec<&'a PoolSnapshot>,
}

/// The pools of one server.
#[derive(Default)]
struct Server<'a> {
    pools: Vec<&'a PoolSnapshot>,
    /// By their places in [`RANKS`] and whose they are.
    limits: BTreeMap<(usize, Arc<str>), Seen<'a>>,
}

/// Limits of one server that are told, at most.
const LIMITS_MAX: usize = 100;

/// Pools of one server that are told, at most.
const POOLS_MAX: usize = 500;

/// The kinds of limits in the order in which they are told.
const RANKS: [&str; 4] = ["role", "database", "server", "fleet"];

/// Longest wait of whoever asks for the limits first: until the worker has asked a server.
const CENSUS_WAIT: Duration = Duration::from_millis(1500);

/// How often it is looked for meanwhile.
const CENSUS_LOOK: Duration = Duration::from_millis(50);

/// Has the limits found out, and tells the whole of `/limits`. None if no worker has told anything yet.
pub async fn ask(overview: &Overview) -> Option<Value> {
    let begun = Instant::now();
    overview.ask_limits(begun);
    // Only who asks first has to wait: later there is something to tell, however old.
    while overview.is_census_coming() && begun.elapsed() < CENSUS_WAIT {
        tokio::time::sleep(CENSUS_LOOK).await;
    }
    let snapshot = overview.snapshot()?;
    let now = Instant::now();
    let draining = overview.stage() == Stage::Draining;
    let published = overview.since_tick(now);
    Some(report(&snapshot, &overview.history(), now, published, draining))
}

/// The whole of `/limits`. `published` is how long ago the worker last did.
#[must_use]
pub fn report(
    snapshot: &Snapshot,
    history: &History,
    now: Instant,
    published: Option<Duration>,
    draining: bool,
) -> Value {
    let servers = servers(snapshot);
    let sum = |gauge: fn(&PoolSnapshot) -> u32| snapshot.pools.iter().map(gauge).sum::<u32>();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "published_seconds_ago": published.map(|since| since.as_secs_f64()),
        "draining": draining,
        "clients_waiting": sum(|pool| pool.gauges.clients_waiting),
        "servers": servers.iter().map(|(name, server)| server.report(name, history, now)).collect::<Vec<_>>(),
    })
}

/// How many more processes like this one fit on each server, by the server's name.
#[must_use]
pub fn fits(snapshot: &Snapshot) -> BTreeMap<Arc<str>, Fit> {
    servers(snapshot).into_iter().filter_map(|(name, server)| Some((name, server.fit()?))).collect()
}

fn servers(snapshot: &Snapshot) -> BTreeMap<Arc<str>, Server<'_>> {
    let mut servers: BTreeMap<Arc<str>, Server<'_>> = BTreeMap::new();
    for pool in &snapshot.pools {
        servers.entry(pool.limits.server.clone()).or_default().add(pool);
    }
    servers
}

impl<'a> Server<'a> {
    fn add(&mut self, pool: &'a PoolSnapshot) {
        self.pools.push(pool);
        let limits = &pool.limits;
        let Some(standing) = &limits.standing else { return };
        for scope in &standing.scopes {
            let rank = RANKS.iter().position(|kind| *kind == scope.scope).unwrap_or(RANKS.len());
            let seen = Seen { limits, scope, taken: standing.taken, pools: Vec::new() };
            let kept = self.limits.entry((rank, subject(limits, scope.scope))).or_insert(seen);
            kept.pools.push(pool);
            if kept.taken < standing.taken {
                (kept.limits, kept.scope, kept.taken) = (limits, scope, standing.taken);
            }
        }
    }

    fn report(&self, name: &str, history: &History, now: Instant) -> Value {
        let ago = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
        let binding =
            self.limits.values().filter(|seen| seen.scope.limit.is_some()).min_by_key(|seen| seen.scope.room());
        let sum = |gauge: fn(&PoolSnapshot) -> u32| self.pools.iter().map(|pool| gauge(pool)).sum::<u32>();
        let oldest = self.pools.iter().map(|pool| pool.gauges.oldest_wait_us).max().unwrap_or(0);
        let refusal = self.pools.iter().filter_map(|pool| pool.limits.refusal).max_by_key(|refusal| refusal.at);
        let census = self.limits.values().map(|seen| seen.taken).max();
        let mut limits: Vec<&Seen<'_>> = self.limits.values().collect();
        if limits.len() > LIMITS_MAX {
            // Those with most room are left out.
            limits.sort_by_key(|seen| seen.scope.room().unwrap_or(u32::MAX));
            limits.truncate(LIMITS_MAX);
        }
        json!({
            "server": name,
            "sharing": self.sharing().as_str(),
            "census_seconds_ago": census.map(ago),
            "why_no_census": if census.is_none() { Some(self.why_no_census()) } else { None },
            "binds": binding.map(|seen| json!({
                "scope": seen.scope.scope, "of": &*subject(seen.limits, seen.scope.scope), "room": seen.scope.room(),
            })),
            "connections": sum(open),
            "clients_waiting": sum(|pool| pool.gauges.clients_waiting),
            "oldest_wait_seconds": seconds(oldest),
            "last_refusal": refusal.map(|LastRefusal { at, scope }| json!({
                "sqlstate": "53300", "seconds_ago": ago(at), "scope": scope,
            })),
            "sidecars": self.fit().as_ref().map(Fit::report),
            "limits": limits.iter().map(|seen| limit(seen, history, now)).collect::<Vec<_>>(),
            "unlisted_limits": self.limits.len() - limits.len(),
            "unlisted_pools": self.pools.len().saturating_sub(POOLS_MAX),
            "pools": self.pools.iter().take(POOLS_MAX).map(|pool| json!({
                "database": &*pool.name.database,
                "user": &*pool.name.user,
                "role": pool.name.role.as_str(),
                "url": pool.url.as_deref(),
                "health": pool.health.as_str(),
                "tag": if pool.limits.tag.is_empty() { None } else { Some(&*pool.limits.tag) },
                "connections": open(pool),
                "pool_size": pool.gauges.servers_limit,
                "clients_waiting": pool.gauges.clients_waiting,
                "oldest_wait_seconds": seconds(pool.gauges.oldest_wait_us),
                "census_seconds_ago": pool.limits.standing.as_ref().map(|standing| ago(standing.taken)),
                "transactions": pool.stats.transactions,
                "reruns": pool.stats.reruns,
                "routes": routes(pool),
                "read_waits": pool.stats.read_waits,
                "follower": pool.gauges.follower.map(follower),
            })).collect::<Vec<_>>(),
        })
    }

    /// Of the limit under which the fewest fit.
    fn fit(&self) -> Option<Fit> {
        let fits = self.limits.values().filter_map(fit);
        fits.min_by_key(|fit| (fit.more_at_present_use, fit.more))
    }

    fn sharing(&self) -> Sharing {
        let all = || self.pools.iter().map(|pool| pool.limits.sharing);
        if all().any(|sharing| sharing == Sharing::Blind) { Sharing::Blind } else { all().next().unwrap_or_default() }
    }

    /// Why the limits are not known.
    fn why_no_census(&self) -> &'static str {
        if self.sharing() == Sharing::Blind {
            "another pooler stands in front of the server: nobody can tell whose connections are whose"
        } else if self.pools.iter().all(|pool| open(pool) == 0) {
            "no server connection has been opened yet, and none is opened for this"
        } else if self.pools.iter().any(|pool| pool.limits.is_untold) {
            "the server would not tell when it was asked; it is asked again later"
        } else {
            "no server connection has been idle since somebody asked: none is taken from the clients for this"
        }
    }
}

/// What decided where its transactions went; none if nothing has to.
fn routes(pool: &PoolSnapshot) -> Option<Value> {
    let counts = pool.stats.routes.iter().filter(|(_, count)| *count > 0);
    let counts: serde_json::Map<_, _> =
        counts.map(|(reason, count)| (reason.as_str().to_owned(), json!(count))).collect();
    (!counts.is_empty()).then_some(Value::Object(counts))
}

/// How a follower stands.
fn follower(gauges: FollowerGauges) -> Value {
    json!({
        "state": gauges.state.as_str(),
        "lag_seconds": gauges.lag_us.map(seconds),
        "lag_bytes": gauges.lag_bytes,
        "sees_all_until_seconds_ago": gauges.covered_us.map(seconds),
    })
}

/// Server connections of a pool, whatever they do.
fn open(pool: &PoolSnapshot) -> u32 {
    let gauges = &pool.gauges;
    gauges.servers_idle + gauges.servers_active + gauges.servers_logging_in + gauges.servers_closing
}

fn limit(seen: &Seen<'_>, history: &History, now: Instant) -> Value {
    let Seen { limits, scope, taken, .. } = seen;
    let key = LimitKey::new(limits, scope.scope);
    let trend = history.trend(&key);
    let exhausted_in = history.exhausted_in(&key, scope, now.saturating_duration_since(*taken));
    json!({
        "scope": scope.scope,
        "of": &*subject(limits, scope.scope),
        "limit": scope.limit,
        "headroom": scope.headroom,
        "used": scope.used,
        "room": scope.room(),
        "own": { "connections": scope.own.connections, "claims": scope.own.claims, "probes": scope.own.probes },
        "peers": holders(&scope.peers, "tag"),
        "foreigners": holders(&scope.foreigners, "application_name"),
        "claims": scope.claims,
        "probes": scope.probes,
        "waiting_probes": scope.waiting,
        "pools": scope.members,
        "share": scope.share,
        "census_seconds_ago": now.saturating_duration_since(*taken).as_secs_f64(),
        "trend": trend.map(|trend| json!({
            "connections_per_hour": round(trend.per_hour),
            "looked_at_seconds": trend.span.as_secs(),
            "points": trend.points,
        })),
        "exhausted_in_seconds": exhausted_in.map(|time| time.as_secs()),
        "sidecars": fit(seen).as_ref().map(Fit::report),
    })
}

fn holders(holders: &Holders, name: &str) -> Value {
    let listed = holders.listed.iter().map(|holder: &Holder| {
        json!({ name: &*holder.name, "connections": holder.connections, "claims": holder.claims, "probes": holder.probes })
    });
    json!({ "connections": holders.used, "list": listed.collect::<Vec<_>>(), "unlisted": holders.unlisted })
}

/// Hundredths are enough.
fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// How many more processes like this one fit under a limit.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Processes that share the limit, as far as that is known: their pools, divided by the pools of this one.
    now: Option<u32>,
    /// More of them that could have a connection for each of their pools all the time.
    pub more: u32,
    /// More of them if each uses what one uses now.
    pub more_at_present_use: u32,
    steps: Vec<Step>,
}

/// What comes of more processes.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    sidecars_more: u32,
    /// What each pool is entitled to then.
    share: Option<u32>,
    /// Connections that would be used if each uses what one uses now.
    used: u32,
    room: u32,
    /// So many are there.
    fits: bool,
}

/// None without a limit.
fn fit(seen: &Seen<'_>) -> Option<Fit> {
    let scope = seen.scope;
    scope.limit?;
    // As the others see them: a pool without a connection is none.
    let pools = seen.pools.iter().filter(|pool| open(pool) > 0).count();
    let pools = u32::try_from(pools).unwrap_or(u32::MAX).max(1);
    let own = scope.own.connections + scope.own.claims;
    let free = scope.usable.saturating_sub(scope.foreigners.used);
    let (now, each) = match scope.members {
        Some(members) => {
            let now = members.div_ceil(pools).max(1);
            (Some(now), (own + scope.peers.used).div_ceil(now))
        }
        // Nobody else says whose it is: what others have is foreign, and so are this one's like.
        None => (None, own),
    };
    let each = each.max(pools);
    let used_by_us = own + scope.peers.used;
    let left = free.saturating_sub(used_by_us);
    let step = |more: u32| {
        let all = now.map(|now| (now + more).saturating_mul(pools));
        let used = scope.used.saturating_add(each.saturating_mul(more));
        Step {
            sidecars_more: more,
            share: all.map(|all| (free / all).max(1)),
            used: used.min(scope.usable.max(scope.used)),
            room: scope.usable.saturating_sub(used),
            fits: used <= scope.usable && all.is_none_or(|all| all <= free),
        }
    };
    // One step of an autoscaler, and a deploy that runs the new beside the old.
    let mut steps = vec![step(1)];
    steps.extend(now.filter(|now| *now > 1).map(step));
    Some(Fit {
        now,
        more: now.map_or(left / pools, |now| (free / pools).saturating_sub(now)),
        more_at_present_use: left / each,
        steps,
    })
}

impl Fit {
    fn report(&self) -> Value {
        let steps = self.steps.iter().map(|step| {
            json!({
                "sidecars_more": step.sidecars_more, "share": step.share, "used": step.used, "room": step.room,
                "fits": step.fits,
            })
        });
        json!({
            "now": self.now,
            "more": self.more,
            "more_at_present_use": self.more_at_present_use,
            "steps": steps.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{PoolGauges, PoolHealth, PoolName, PoolStats, Standing};

    fn scope(scope: &'static str, limit: u32, used: [u32; 3], members: Option<u32>) -> ScopeStanding {
        let [own, peers, foreign] = used;
        let of = |used| Holders { used, ..Holders::default() };
        ScopeStanding {
            scope,
            limit: Some(limit),
            headroom: 2,
            used: own + peers + foreign,
            own: Holder { connections: own, ..Holder::default() },
            peers: of(peers),
            foreigners: of(foreign),
            claims: 0,
            probes: 0,
            waiting: 0,
            members,
            share: members.map(|members| (limit - 2 - foreign) / members),
            usable: limit - 2,
        }
    }

    fn pool(user: &str, taken: Option<Instant>, scopes: Vec<ScopeStanding>) -> PoolSnapshot {
        let limits = PoolLimits {
            server: "db:5432".into(),
            login: user.into(),
            dbname: "app".into(),
            standing: taken.map(|taken| Arc::new(Standing { taken, scopes })),
            ..PoolLimits::default()
        };
        PoolSnapshot {
            name: PoolName::primary("app", user),
            url: None,
            health: PoolHealth::Usable,
            stats: PoolStats::default(),
            gauges: PoolGauges { servers_idle: 2, clients_waiting: 1, ..PoolGauges::default() },
            limits,
        }
    }

    #[test]
    fn a_limit_of_several_pools_is_told_once_by_the_one_that_looked_last() {
        let now = Instant::now();
        let early = now.checked_sub(Duration::from_secs(5)).unwrap();
        let pools = vec![
            pool("web", Some(now), vec![scope("role", 20, [3, 0, 0], None), scope("server", 100, [6, 0, 10], None)]),
            pool("job", Some(early), vec![scope("role", 8, [3, 0, 0], None), scope("server", 100, [1, 0, 1], None)]),
            pool("new", None, Vec::new()),
        ];
        let snapshot = Snapshot { pools, ..Snapshot::empty(now) };
        let report = report(&snapshot, &History::new(now), now, None, false);
        let server = &report["servers"][0];
        let limits = server["limits"].as_array().unwrap();
        let told: Vec<Value> = limits.iter().map(|limit| json!([limit["scope"], limit["of"], limit["used"]])).collect();
        assert_eq!(Value::Array(told), json!([["role", "job", 3], ["role", "web", 3], ["server", "", 16]]));
        assert_eq!(server["binds"], json!({ "scope": "role", "of": "job", "room": 3 }));
        assert_eq!((&server["clients_waiting"], &server["connections"]), (&json!(3), &json!(6)));
        assert_eq!(server["pools"].as_array().unwrap().len(), 3);
        assert_eq!(server["why_no_census"], Value::Null);
    }

    #[test]
    fn how_many_more_fit_follows_from_what_each_uses() {
        // Limit (2 of it headroom); own, peers' and foreign connections; pools that share it, and of this process; what fits:
        // processes now, more, more at present use, and whether one more and as many again fit.
        #[rustfmt::skip]
        let table: [(&str, u32, [u32; 3], Option<u32>, usize, (Option<u32>, u32, u32, &[bool])); 7] = [
            ("alone in the fleet",     20, [3, 0, 0],   Some(1),  1, (Some(1), 17, 5, &[true])),
            ("three of them",          20, [3, 6, 3],   Some(3),  1, (Some(3), 12, 2, &[true, false])),
            ("a deploy fits",          40, [3, 6, 3],   Some(3),  1, (Some(3), 32, 8, &[true, true])),
            ("they take turns",        8,  [1, 4, 1],   Some(10), 1, (Some(10), 0, 0, &[false, false])),
            ("two pools each",         20, [4, 4, 0],   Some(4),  2, (Some(2), 7, 2, &[true, true])),
            ("no fleet",               20, [3, 0, 9],   None,     1, (None, 6, 2, &[true])),
            ("nothing left",           10, [0, 0, 10],  None,     1, (None, 0, 0, &[false])),
        ];
        for (name, limit, used, members, pools, want) in table {
            let now = Instant::now();
            let scope = scope("server", limit, used, members);
            let mut pool = pool("web", None, Vec::new());
            pool.gauges.servers_idle = 1;
            let mut closed = pool.clone();
            closed.gauges.servers_idle = 0;
            let seen = Seen {
                limits: &pool.limits,
                scope: &scope,
                taken: now,
                pools: [vec![&pool; pools], vec![&closed]].concat(),
            };
            let fit = fit(&seen).unwrap();
            let fits: Vec<bool> = fit.steps.iter().map(|step| step.fits).collect();
            assert_eq!((fit.now, fit.more, fit.more_at_present_use, &*fits), want, "{name}: {fit:?}");
        }
    }
}
