//! `/blame`: who holds each server connection, since when, and why. No SQL.

use std::time::Instant;

use serde_json::{Value, json};

use super::shared::Told;
use crate::cancel::{Activity, Holding};
use crate::stats::{PoolName, Reason as _, Snapshot};

/// Holders that are asked, at most: those that have had their server connections for longest.
pub const HOLDERS_MAX: usize = 1000;

/// The whole of `/blame`.
#[must_use]
pub fn report(told: &Told, snapshot: Option<&Snapshot>, now: Instant) -> Value {
    let mut holdings: Vec<&Holding> = told.blame.holdings.iter().collect();
    holdings.sort_by_key(|holding| std::cmp::Reverse(holding.held_us));
    let pools = snapshot.into_iter().flat_map(|snapshot| &snapshot.pools).map(|pool| {
        let gauges = &pool.gauges;
        json!({
            "database": &*pool.name.database,
            "user": &*pool.name.user,
            "role": pool.name.role.as_str(),
            "url": pool.url.as_deref(),
            "server": if pool.name.server.is_empty() { None } else { Some(&*pool.name.server) },
            "servers_active": gauges.servers_active,
            "servers_idle": gauges.servers_idle,
            "servers_pinned": gauges.servers_pinned,
            "servers_logging_in": gauges.servers_logging_in,
            "servers_closing": gauges.servers_closing,
            "servers_limit": gauges.servers_limit,
            "clients_waiting": gauges.clients_waiting,
            "oldest_wait_seconds": seconds(gauges.oldest_wait_us),
        })
    });
    json!({
        "seconds_ago": now.saturating_duration_since(told.at).as_secs_f64(),
        "holders": holdings.into_iter().map(holder).collect::<Vec<_>>(),
        "unlisted": told.blame.unasked,
        "silent": told.silent.iter().map(|url| &**url).collect::<Vec<_>>(),
        "pools": pools.collect::<Vec<_>>(),
    })
}

fn holder(holding: &Holding) -> Value {
    let PoolName { database, user, role, server } = &holding.pool;
    json!({
        "database": &**database,
        "user": &**user,
        "role": role.as_str(),
        "url": holding.url.as_deref(),
        "server": if server.is_empty() { None } else { Some(&**server) },
        "server_pid": holding.server_pid,
        "client_pid": if holding.listens_for.is_some() { None } else { Some(holding.client_pid) },
        "client": client(holding),
        "application_name": &*holding.application_name,
        "doing": doing(holding),
        "doing_seconds": seconds(holding.activity_us),
        "held_seconds": seconds(holding.held_us),
        "why": why(holding),
    })
}

/// Whose it is.
fn client(holding: &Holding) -> String {
    match (holding.listens_for, holding.client) {
        (Some(clients), _) => format!("{clients} listening clients"),
        (None, Some(address)) => address.to_string(),
        (None, None) => "unix".to_owned(),
    }
}

/// What it does at this moment.
fn doing(holding: &Holding) -> &'static str {
    match holding.activity {
        _ if holding.listens_for.is_some() => "listening",
        Activity::Running if holding.own_work => "settling",
        Activity::Running => "waiting_for_answer",
        Activity::InTransaction => "idle_in_transaction",
        Activity::Idle | Activity::Waiting => "idle",
    }
}

/// Everything for which it keeps the server connection.
fn why(holding: &Holding) -> Vec<&'static str> {
    let facts = [
        (holding.listens_for.is_some(), "shared_listener"),
        (holding.session_mode, "session_mode"),
        (holding.in_transaction, "transaction"),
        (holding.activity == Activity::Running && !holding.in_transaction, "query"),
    ];
    let facts = facts.into_iter().filter(|(holds, _)| *holds).map(|(_, why)| why);
    facts.chain(holding.pins.iter().map(|pin| pin.as_str())).collect()
}

/// Microseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "285 years of microseconds are exact")]
pub(super) fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Blame;
    use crate::stats::PinReason;

    #[test]
    fn who_has_held_longest_comes_first_with_every_reason() {
        let holding = |held_us, activity, in_transaction, pins: &[PinReason]| Holding {
            pool: PoolName::primary("app", "web"),
            url: None,
            server_pid: 7,
            client_pid: 4_194_305,
            client: None,
            application_name: "puma".into(),
            activity,
            activity_us: 500_000,
            held_us,
            in_transaction,
            session_mode: false,
            pins: pins.to_vec(),
            own_work: false,
            listens_for: None,
        };
        let now = Instant::now();
        let holdings = vec![
            holding(1_000_000, Activity::Running, false, &[]),
            holding(3_000_000, Activity::Idle, false, &[PinReason::Listen, PinReason::Temp]),
            holding(2_000_000, Activity::InTransaction, true, &[]),
            Holding { listens_for: Some(3), ..holding(500_000, Activity::Idle, false, &[]) },
        ];
        let told = Told { silent: vec!["PINK_URL".into()], ..Told::new(now, Blame { holdings, unasked: 4 }) };
        let report = report(&told, None, now);
        let got: Vec<Value> = report["holders"]
            .as_array()
            .unwrap()
            .iter()
            .map(|holder| json!([holder["held_seconds"], holder["doing"], holder["why"]]))
            .collect();
        let want = json!([
            [3.0, "idle", ["listen", "temp"]],
            [2.0, "idle_in_transaction", ["transaction"]],
            [1.0, "waiting_for_answer", ["query"]],
            [0.5, "listening", ["shared_listener"]],
        ]);
        assert_eq!(Value::Array(got), want);
        assert_eq!((&report["unlisted"], &report["holders"][0]["client"]), (&json!(4), &json!("unix")));
        assert_eq!(report["silent"], json!(["PINK_URL"]));
        let listener = &report["holders"][3];
        assert_eq!((&listener["client"], &listener["client_pid"]), (&json!("3 listening clients"), &Value::Null));
    }
}
