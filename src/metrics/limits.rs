//! What is known of the servers' limits, as Prometheus text: written from the snapshot, so that it vanishes with the pool.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::{
    CENSUS_AGE, LAST_REFUSAL_AGE, LIMIT, LIMIT_CLAIMS, LIMIT_EXHAUSTION, LIMIT_HEADROOM, LIMIT_POOLS, LIMIT_PROBES,
    LIMIT_ROOM, LIMIT_SHARE, LIMIT_TREND, LIMIT_USED, Metric, text_labels,
};
use crate::stats::{PoolLimits, PoolSnapshot, ScopeStanding};

/// How the use of a limit develops.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outlook {
    /// Connections more in an hour; none if that is not known.
    pub per_hour: Option<f64>,
    /// When there will be no room; none if that is not foreseen.
    pub exhausted_in: Option<Duration>,
}

/// The lines of one family.
struct Family<'a> {
    text: &'a mut String,
    metric: Metric,
    /// Its head is written.
    begun: bool,
}

impl Family<'_> {
    fn sample(&mut self, labels: &str, value: f64) {
        let Metric { name, help, .. } = self.metric;
        // Writing to a String does not fail: the results say nothing.
        if !self.begun {
            let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} gauge");
            self.begun = true;
        }
        let _ = writeln!(self.text, "{name}{{{labels}}} {value}");
    }
}

impl Drop for Family<'_> {
    fn drop(&mut self) {
        if self.begun {
            self.text.push('\n');
        }
    }
}

/// A number of a limit.
type Number = fn(&ScopeStanding, &Outlook) -> Option<f64>;

/// The families of numbers, each with what its samples are labelled with besides.
const FAMILIES: [(Metric, &[(&str, Number)]); 10] = [
    (LIMIT, &[("", |scope, _| scope.limit.map(f64::from))]),
    (LIMIT_HEADROOM, &[("", |scope, _| Some(f64::from(scope.headroom)))]),
    (
        LIMIT_USED,
        &[
            (",by=\"own\"", |scope, _| Some(f64::from(scope.own.connections + scope.own.claims))),
            (",by=\"peers\"", |scope, _| Some(f64::from(scope.peers.used))),
            (",by=\"foreign\"", |scope, _| Some(f64::from(scope.foreigners.used))),
        ],
    ),
    (LIMIT_ROOM, &[("", |scope, _| scope.room().map(f64::from))]),
    (LIMIT_CLAIMS, &[("", |scope, _| Some(f64::from(scope.claims)))]),
    (LIMIT_PROBES, &[("", |scope, _| Some(f64::from(scope.probes)))]),
    (LIMIT_POOLS, &[("", |scope, _| scope.members.map(f64::from))]),
    (LIMIT_SHARE, &[("", |scope, _| scope.share.map(f64::from))]),
    (LIMIT_TREND, &[("", |_, outlook| outlook.per_hour)]),
    (LIMIT_EXHAUSTION, &[("", |_, outlook| outlook.exhausted_in.map(|time| time.as_secs_f64()))]),
];

/// Appends what is known of the limits of these pools.
pub(super) fn write(
    text: &mut String,
    pools: &[PoolSnapshot],
    now: Instant,
    outlook: impl Fn(&PoolLimits, &ScopeStanding) -> Outlook,
) {
    let ago = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
    let mut scopes: Vec<(String, &ScopeStanding, Outlook)> = Vec::new();
    for pool in pools {
        let Some(standing) = pool.limits.fresh(now) else { continue };
        for scope in standing.scopes.iter().filter(|scope| scope.limit.is_some()) {
            let labels = format!("{},scope=\"{}\"", text_labels(&pool.name, pool.url.as_deref()), scope.scope);
            scopes.push((labels, scope, outlook(&pool.limits, scope)));
        }
    }
    for (metric, numbers) in FAMILIES {
        let mut family = Family { text, metric, begun: false };
        for (labels, scope, outlook) in &scopes {
            for (more, number) in numbers {
                if let Some(value) = number(scope, outlook) {
                    family.sample(&format!("{labels}{more}"), value);
                }
            }
        }
    }
    let mut family = Family { text, metric: CENSUS_AGE, begun: false };
    for pool in pools {
        if let Some(standing) = &pool.limits.standing {
            family.sample(&text_labels(&pool.name, pool.url.as_deref()), ago(standing.taken));
        }
    }
    drop(family);
    let mut family = Family { text, metric: LAST_REFUSAL_AGE, begun: false };
    for pool in pools {
        if let Some(refusal) = pool.limits.refusal {
            let scope = refusal.scope.unwrap_or("unknown");
            family.sample(
                &format!("{},scope=\"{scope}\"", text_labels(&pool.name, pool.url.as_deref())),
                ago(refusal.at),
            );
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::stats::{LastRefusal, PoolGauges, PoolHealth, PoolName, PoolStats, Sharing, Standing};
    use std::sync::Arc;

    /// Limits of which everything is known.
    pub(in crate::metrics) fn known(taken: Instant) -> PoolLimits {
        PoolLimits {
            sharing: Sharing::Shared,
            standing: Some(Arc::new(Standing { taken, scopes: vec![ScopeStanding::sample()] })),
            refusal: Some(LastRefusal { at: taken, scope: None }),
            ..PoolLimits::default()
        }
    }

    #[test]
    fn what_is_not_known_has_no_line() {
        let pool = |limits| PoolSnapshot {
            name: PoolName::primary("app", "web"),
            url: None,
            health: PoolHealth::Usable,
            stats: PoolStats::default(),
            gauges: PoolGauges::default(),
            limits,
        };
        let now = Instant::now();
        let mut text = String::new();
        write(&mut text, &[pool(PoolLimits::default())], now, |_, _| Outlook::default());
        assert_eq!(text, "");
        write(&mut text, &[pool(known(now))], now, |_, _| Outlook::default());
        let labels = "database=\"app\",user=\"web\",role=\"primary\",scope=\"role\"";
        for line in [
            format!("pgweir_limit_connections{{{labels}}} 20"),
            format!("pgweir_limit_used{{{labels},by=\"own\"}} 4"),
            format!("pgweir_limit_used{{{labels},by=\"foreign\"}} 2"),
            format!("pgweir_limit_room{{{labels}}} 7"),
            format!("pgweir_limit_share{{{labels}}} 5"),
        ] {
            assert!(text.lines().any(|got| got == line), "{line} is not in {text}");
        }
        assert!(!text.contains("exhaustion") && !text.contains("per_hour"), "{text}");
    }
}
