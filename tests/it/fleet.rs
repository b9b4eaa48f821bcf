//! The fleet's budget: several pgweirs under one limit of one server, with nothing between them but the server.
//!
//! | module | what |
//! |---|---|
//! | this one | shares, those that leave, tags; a limit that only the fleet knows |
//! | `sidecars` | a pgweir with its hungry clients: `pgweir exec` beside a command, or one that serves by a file |
//! | `cost` | what the budget costs a fleet that is at rest |

pub(crate) mod cost;
mod sidecars;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgweir_harness::wire::Wire;
use pgweir_harness::{Cluster, ClusterOptions, SUPERUSER, SUPERUSER_PASSWORD, wait_until};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;

use self::sidecars::{Ended, Served, Sidecar, hungry};
use crate::exec::wrapped::{Wrapped, Wrapping};
use crate::figures;
use crate::support::{PASSWORD, Place, SOON, Site, assert_value, start_pgweir};

/// How long a fleet is kept busy.
const BUSY: Duration = Duration::from_secs(15);

/// The same in the long tier.
const BUSY_LONG: Duration = Duration::from_mins(3);

/// The census of the fleets here: their slice is twice as long.
const PERIOD: &str = "1s";

/// No client of a fleet waits longer, however busy this machine is, and whatever was stopped or refused.
const LONGEST_WAIT: Duration = Duration::from_secs(40);

/// No client of so many pools for so many connections waits longer, where it is not stopped or refused, with `PERIOD`: what README says
/// of all kinds of cases but one, and what that one, this machine and a transaction may take.
fn stated_wait(pools: usize, connections: usize) -> Duration {
    Duration::from_secs(6) * u32::try_from(pools.saturating_sub(connections)).unwrap() + Duration::from_secs(5)
}

fn cluster() -> Cluster {
    Cluster::start(ClusterOptions::default().set("max_connections", "100").set("log_connections", "on")).unwrap()
}

/// The settings of all fleets, and further ones.
fn settings<'a>(further: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    // Nothing but the clients' queries and the census is counted.
    let all = [("fleet_census_period", PERIOD), ("query_wait_timeout", "60s"), ("catalog_check_interval", "1h")];
    all.into_iter().chain(further.iter().copied()).collect()
}

/// Looks now and then until the condition holds; the clients go on meanwhile.
async fn eventually(within: Duration, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < within, "the condition did not come true within {within:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Looks at the server again and again.
struct Watch {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Seen>,
}

/// The most that was seen at once.
#[derive(Debug, Default)]
struct Seen {
    samples: u32,
    /// Of the fleet, those that may stay: with a tag that says so, or none, and no younger than a second: the first thing
    /// that a probe does is to say that it is one.
    staying: i64,
    /// Connections of the fleet, whatever they are.
    all: i64,
    /// Probes that wait.
    waiting: i64,
    /// Probes that stayed beyond one look, while not all fitted.
    lasting: i64,
    /// These and those that may stay.
    most: i64,
}

/// What members and foreigners may have together under a limit of 20.
const CAP: i64 = 18;

/// Probes that may wait under it. One is too many for a moment when it has to leave for another.
const PLACES: i64 = 1;

impl Watch {
    async fn start(cluster: &Cluster, role: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = Wire::open(cluster.addr(), SUPERUSER, "postgres", SUPERUSER_PASSWORD).await.unwrap();
        let sql = format!(
            "SELECT count(*) FILTER (WHERE application_name !~ '[?]' AND backend_start < clock_timestamp() - interval '1s'), \
             count(*), count(*) FILTER (WHERE application_name ~ ' [?][^ ]*]$' AND application_name !~ '#'), \
             count(*) FILTER (WHERE application_name ~ ' [?][^ ]*]$' \
             AND (application_name !~ '#' OR state = 'idle' AND query ~ 'COMMIT$')) \
             FROM pg_stat_activity WHERE usename = '{role}' AND application_name <> 'foreign'"
        );
        let told = stop.clone();
        let task = tokio::spawn(async move {
            let mut seen = Seen::default();
            while !told.load(Ordering::Relaxed) {
                let outcome = client.query(&sql).await.unwrap();
                let count = |n: usize| outcome.rows[0][n].as_ref().unwrap().parse::<i64>().unwrap();
                seen.samples += 1;
                seen.staying = seen.staying.max(count(0));
                seen.all = seen.all.max(count(1));
                seen.waiting = seen.waiting.max(count(2));
                // A probe that leaves does so out of its transaction.
                let lasting = if count(1) > CAP { count(3) } else { 0 };
                seen.lasting = seen.lasting.max(lasting);
                seen.most = seen.most.max(count(0) + lasting);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen
        });
        Self { stop, task }
    }

    async fn finish(self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// Logins and refusals in the server's log.
fn logins(cluster: &Cluster, role: &str) -> (usize, usize) {
    let log = cluster.log_text();
    let logins =
        log.lines().filter(|line| line.contains("connection authorized") && line.contains(&format!("user={role} ")));
    let refusals =
        log.lines().filter(|line| line.contains("too many connections") || line.contains("too many clients"));
    (logins.count(), refusals.count())
}

/// Adds up what clients saw, and checks that none was refused or waited too long.
fn assert_served(all: &[Served]) -> (u32, Duration) {
    let refused: Vec<_> = all.iter().flat_map(|served| &served.refused).collect();
    assert!(refused.is_empty(), "{refused:?}");
    let longest = all.iter().map(|served| served.longest).max().unwrap();
    assert!(longest < LONGEST_WAIT, "a client waited {longest:?}");
    (all.iter().map(|served| served.queries).sum(), longest)
}

/// A role's limit of 20, and 20 `pgweir exec` that are killed, or asked to end, and replaced at random. What there is to tell.
async fn share_a_role_limit(busy: Duration) -> String {
    const SIDECARS: usize = 20;
    let cluster = cluster();
    let place = Place::on(&cluster);
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 20", place.name));
    let databases = [&*place.name];
    let stop = Arc::new(AtomicBool::new(false));
    let start = async || Sidecar::wrap(&place, &databases, &[], 2, &stop).await;
    let watch = Watch::start(&cluster, &place.name).await;
    let (mut sidecars, mut rng) = (Vec::new(), SmallRng::seed_from_u64(4));
    for _ in 0..SIDECARS {
        sidecars.push(start().await);
    }
    let (mut leaving, mut most_leaving, mut killed) = (Vec::new(), 0, 0);
    let begun = Instant::now();
    while begun.elapsed() < busy {
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..2000))).await;
        let one = sidecars.swap_remove(rng.random_range(0..sidecars.len()));
        let is_killed = leaving.len() % 2 == 0;
        one.signal(if is_killed { libc::SIGKILL } else { libc::SIGTERM });
        killed += usize::from(is_killed);
        // Another takes its place, while it may have clients yet.
        leaving.push(tokio::spawn(one.end()));
        most_leaving = most_leaving.max(leaving.iter().filter(|one| !one.is_finished()).count());
        sidecars.push(start().await);
    }
    // Whoever came last is served, too.
    eventually(LONGEST_WAIT, || sidecars.iter().all(Sidecar::has_served_everybody)).await;
    stop.store(true, Ordering::Relaxed);
    let (started, mut ended) = (leaving.len() + sidecars.len(), all_ended(leaving).await);
    for sidecar in sidecars {
        ended.push(sidecar.end_quietly().await);
    }
    let seen = watch.finish().await;
    let (authorized, refusals) = logins(&cluster, &place.name);
    // One per sidecar and minute, at most: of those that are there at once, however many come one after the other.
    let minutes = |time: Duration| usize::try_from(time.as_secs().div_ceil(60)).unwrap();
    let most = SIDECARS * minutes(begun.elapsed());
    assert!(refusals <= most, "{refusals} refusals of {SIDECARS} in {:?}", begun.elapsed());
    // One that was killed may not have said so any more.
    let told_of: usize = ended.iter().map(|one| one.refusals).sum();
    assert!(told_of <= refusals && refusals <= told_of + killed, "{told_of} of {refusals} refusals");
    // Who was refused once may have bad luck when it comes again, and is away for longer then.
    for one in &ended {
        assert!(one.refusals <= minutes(one.lived) + 1, "{} refusals of one pgweir in {:?}", one.refusals, one.lived);
    }
    // Who leaves may have clients as long as it is there. Whom the server has refused, told or not, may wait for longer.
    let bound = stated_wait(SIDECARS + most_leaving, CAP.try_into().unwrap());
    let waited = |one: &Ended| one.served.iter().map(|served| served.longest).max().unwrap_or_default();
    let late: Vec<Duration> =
        ended.iter().filter(|one| one.refusals == 0).map(waited).filter(|one| *one >= bound).collect();
    assert!(late.len() <= refusals - told_of, "clients waited {late:?}, {bound:?} at most");
    let worst = ended.iter().map(|one| one.refusals).max().unwrap();
    let all: Vec<Served> = ended.into_iter().flat_map(|one| one.served).collect();
    let (queries, longest) = assert_served(&all);
    assert!(killed >= 2 && started - SIDECARS >= 2 * killed - 1, "{killed} killed, {started} started");
    assert!(seen.staying <= 20 && seen.all <= 20 && seen.staying >= 15, "{seen:?}");
    assert!(seen.lasting <= PLACES + 1, "{seen:?}");
    assert!(seen.samples > 100, "{seen:?}");
    let figures = told(queries, longest, authorized, refusals, &seen);
    format!("{started} pgweirs, {killed} of them killed; {figures}; at most {worst} refusals of one pgweir")
}

/// Those whose ends were waited for beside other things.
async fn all_ended(leaving: Vec<JoinHandle<Ended>>) -> Vec<Ended> {
    let mut ended = Vec::new();
    for one in leaving {
        ended.push(one.await.unwrap());
    }
    ended
}

/// A fleet's figures.
fn told(queries: u32, longest: Duration, logins: usize, refusals: usize, seen: &Seen) -> String {
    let Seen { staying, all, waiting, lasting, .. } = seen;
    format!(
        "{queries} queries, longest wait {:.1} s, {logins} logins, {refusals} refusals; at most {staying} connections, \
         {all} with probes, {lasting} of them for longer than one look, {waiting} waiting",
        longest.as_secs_f64()
    )
}

#[tokio::test]
async fn twenty_hungry_pgweirs_share_a_role_limit_of_twenty_while_they_are_killed_and_replaced() {
    println!("{}", share_a_role_limit(BUSY).await);
}

#[tokio::test]
#[ignore = "long: three minutes"]
async fn twenty_hungry_pgweirs_share_a_role_limit_for_three_minutes() {
    let figures = share_a_role_limit(BUSY_LONG).await;
    figures::record("fleet", "twenty_hungry_pgweirs_share_a_role_limit_for_three_minutes", &figures);
}

/// A second database of the same owner, and a configuration with both.
fn with_another(cluster: &Cluster, place: &Place<'_>, own: &[(&str, &str)]) -> (String, String) {
    let other = format!("{}other", place.name);
    cluster.psql("postgres", &format!("CREATE DATABASE {other} OWNER {}", place.name)).unwrap();
    let key = |name: &str| format!("databases.{other}.{name}");
    let [host, port, user, password] = ["host", "port", "user", "password"].map(key);
    let number = cluster.port().to_string();
    let further = [(&*host, cluster.host()), (&*port, &*number), (&*user, &*place.name), (&*password, PASSWORD)];
    let toml = place.toml(&settings(&[own, &further].concat()));
    (other, toml)
}

/// A limit that only the fleet knows, over two databases: so many pgweirs, stopped, killed and replaced at random,
/// foreigners, and a deploy that doubles the fleet. What there is to tell.
async fn share_what_only_the_fleet_knows(count: usize, busy: Duration) -> String {
    let cluster = cluster();
    let place = Place::on(&cluster);
    let (other, _) = with_another(&cluster, &place, &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let databases = [&*place.name, &*other];
    let start = async || Sidecar::wrap(&place, &databases, &[("PGWEIR_DB_CONNECTIONS", "20")], 2, &stop).await;
    let watch = Watch::start(&cluster, &place.name).await;
    let (mut sidecars, mut rng) = (Vec::new(), SmallRng::seed_from_u64(5));
    for _ in 0..count {
        sidecars.push(start().await);
    }
    let mut leaving = Vec::new();
    let begun = Instant::now();
    let (mut foreigners, mut has_deployed) = (Vec::new(), false);
    while begun.elapsed() < busy {
        // Some of them have the lock, or claims.
        let one = rng.random_range(0..sidecars.len());
        sidecars[one].signal(libc::SIGSTOP);
        tokio::time::sleep(Duration::from_millis(rng.random_range(100..2500))).await;
        sidecars[one].signal(libc::SIGCONT);
        if rng.random() {
            let one = sidecars.swap_remove(one);
            one.signal(libc::SIGKILL);
            leaving.push(tokio::spawn(one.end()));
            sidecars.push(start().await);
        }
        if begun.elapsed() > busy / 3 && foreigners.is_empty() {
            for _ in 0..5 {
                let parameters = [("user", &*place.name), ("database", &*other), ("application_name", "foreign")];
                let mut foreigner = Wire::connect(cluster.addr()).await.unwrap();
                foreigner.login_with(&parameters, PASSWORD).await.unwrap();
                foreigners.push(foreigner);
            }
        }
        if begun.elapsed() > busy * 2 / 3 && !has_deployed {
            // New ones come before the old ones go.
            has_deployed = true;
            let old: Vec<Sidecar> = std::mem::take(&mut sidecars);
            for _ in 0..old.len() {
                sidecars.push(start().await);
            }
            for one in old {
                one.signal(libc::SIGTERM);
                leaving.push(tokio::spawn(one.end()));
            }
        }
    }
    // What foreigners took is missing to the fleet.
    let count = format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{}'", place.name);
    eventually(SOON, || cluster.psql("postgres", &count).unwrap().trim().parse::<u32>().unwrap() <= 20).await;
    eventually(LONGEST_WAIT, || sidecars.iter().all(Sidecar::has_served_everybody)).await;
    stop.store(true, Ordering::Relaxed);
    let (started, mut ended) = (leaving.len() + sidecars.len(), all_ended(leaving).await);
    for sidecar in sidecars {
        ended.push(sidecar.end_quietly().await);
    }
    let seen = watch.finish().await;
    let all: Vec<Served> = ended.into_iter().flat_map(|one| one.served).collect();
    let (queries, longest) = assert_served(&all);
    let (authorized, refusals) = logins(&cluster, &place.name);
    assert!(seen.staying <= 20 && seen.staying >= 12, "{seen:?}");
    // The pgweir that was stopped may have a probe in each database.
    assert!(seen.lasting <= PLACES + 1 + 2 && seen.most <= 20, "{seen:?}");
    assert_eq!(refusals, 0);
    format!("{started} pgweirs of two pools each, {}", told(queries, longest, authorized, refusals, &seen))
}

#[tokio::test]
async fn a_limit_that_only_the_fleet_knows_holds_over_two_databases_stops_foreigners_and_a_deploy() {
    println!("{}", share_what_only_the_fleet_knows(8, BUSY).await);
}

#[tokio::test]
#[ignore = "long: three minutes"]
async fn twenty_hungry_pgweirs_share_what_only_the_fleet_knows_for_three_minutes() {
    let figures = share_what_only_the_fleet_knows(20, BUSY_LONG).await;
    figures::record("fleet", "twenty_hungry_pgweirs_share_what_only_the_fleet_knows_for_three_minutes", &figures);
}

#[tokio::test]
async fn a_pool_takes_what_is_there_and_gives_back_what_is_beyond_its_share() {
    let cluster = cluster();
    let place = Place::on(&cluster);
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 12", place.name));
    let named = |name| settings(&[("fleet_budget", "true"), ("default_pool_size", "20"), ("fleet_name", name)]);
    let held = || {
        let sql = format!("SELECT application_name FROM pg_stat_activity WHERE usename = '{}'", place.name);
        let mut held = BTreeMap::new();
        for name in cluster.psql("postgres", &sql).unwrap().lines() {
            let who = name.split("[pgweir ").nth(1).and_then(|tag| tag.split('/').next()).unwrap_or(name);
            *held.entry(who.to_owned()).or_insert(0) += 1;
        }
        held
    };
    let stop = Arc::new(AtomicBool::new(false));
    let first = Sidecar::start(place.toml(&named("first")), &place.name, &[&place.name], 20, &stop).await;
    // All but the headroom of 2.
    eventually(SOON, || held().get("first") == Some(&10)).await;
    let second = Sidecar::start(place.toml(&named("second")), &place.name, &[&place.name], 20, &stop).await;
    eventually(SOON * 2, || held().get("first") == Some(&5) && held().get("second") == Some(&5)).await;
    // Nobody opens or closes any, now that each has its share.
    let (before, _) = logins(&cluster, &place.name);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(logins(&cluster, &place.name).0, before);
    // What one leaves the other may have.
    let mut all = second.end().await.served;
    eventually(SOON, || held().get("first") == Some(&10)).await;
    stop.store(true, Ordering::Relaxed);
    all.extend(first.end_quietly().await.served);
    assert_served(&all);
    assert_eq!(logins(&cluster, &place.name).1, 0);
}

/// How many connections of the role each pgweir has, by the name in their tags, and how many of these say that they leave.
fn held(cluster: &Cluster, role: &str) -> BTreeMap<String, (u32, u32)> {
    let sql = format!("SELECT application_name FROM pg_stat_activity WHERE usename = '{role}'");
    let mut held = BTreeMap::new();
    for name in cluster.psql("postgres", &sql).unwrap().lines() {
        let who = name.split("[pgweir ").nth(1).and_then(|tag| tag.split('/').next()).unwrap_or(name);
        let (all, leaving): &mut (u32, u32) = held.entry(who.to_owned()).or_default();
        *all += 1;
        *leaving += u32::from(name.ends_with(" !]"));
    }
    held
}

/// A `pgweir exec` of a fleet whose command waits for a line, and does not heed SIGTERM; and where its clients connect.
fn leaver(place: &Place<'_>) -> (Wrapped, SocketAddr) {
    let url = format!("postgres://{0}:{PASSWORD}@{1}/{0}", place.name, place.cluster.addr());
    let wrapped = Wrapping::sh(&url, "trap '' TERM; echo \"$DATABASE_URL\"; read line; exit 0")
        .var("PGWEIR_FLEET_BUDGET", "true")
        .var("PGWEIR_FLEET_NAME", "leaver")
        .var("PGWEIR_FLEET_CENSUS_PERIOD", PERIOD)
        .var("PGWEIR_CATALOG_CHECK_INTERVAL", "1h")
        .var("PGWEIR_SHUTDOWN_TIMEOUT", "2min")
        .start();
    wrapped.await_said("sslmode");
    let address = wrapped.said().split(['@', '/']).find_map(|part| part.parse().ok()).unwrap();
    (wrapped, address)
}

#[tokio::test]
async fn what_a_pgweir_that_leaves_does_not_need_it_closes_at_once_and_it_serves_on() {
    let cluster = cluster();
    let place = Place::on(&cluster);
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 20", place.name));
    let (mut wrapped, address) = leaver(&place);
    let stop = Arc::new(AtomicBool::new(false));
    let client =
        |_| tokio::spawn(hungry(address, place.name.clone(), place.name.clone(), stop.clone(), Arc::default()));
    let clients: Vec<_> = (0..8).map(client).collect();
    let has = |wanted: u32, leaving: u32| {
        held(&cluster, &place.name).get("leaver").copied().unwrap_or_default() == (wanted, leaving)
    };
    eventually(SOON, || has(8, 0)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        assert_served(&[client.await.unwrap()]);
    }
    let mut busy = Wire::open(address, &place.name, &place.name, PASSWORD).await.unwrap();
    assert_eq!(busy.query("BEGIN").await.unwrap().status, b'T');
    assert!(has(8, 0), "{:?}", held(&cluster, &place.name));
    wrapped.signal(libc::SIGTERM);
    // One is in a transaction, and says so when that is over, whoever resets its name.
    eventually(SOON, || has(1, 0)).await;
    for text in ["COMMIT", "RESET ALL; COMMIT", "SET application_name = 'mine'; COMMIT"] {
        assert_eq!(busy.query(text).await.unwrap().status, b'I', "{text}");
        // It says so when it is looked over, or is closed by then.
        eventually(SOON, || has(1, 1) || has(0, 0)).await;
        assert_eq!(busy.query("BEGIN").await.unwrap().status, b'T');
        assert!(has(1, 1), "{text}: {:?}", held(&cluster, &place.name));
    }
    assert_value(&busy.query("SHOW application_name").await.unwrap(), "mine");
    // Nobody has it again, and it is closed as well.
    assert_eq!(busy.query("COMMIT").await.unwrap().status, b'I');
    eventually(SOON, || has(0, 0)).await;
    // A client that comes now gets one, which says so from the first.
    let mut late = Wire::open(address, &place.name, &place.name, PASSWORD).await.unwrap();
    for text in ["SELECT 1", "DISCARD ALL"] {
        assert_eq!(late.query(text).await.unwrap().error, None, "{text}");
        eventually(SOON, || has(1, 1) || has(0, 0)).await;
        assert_eq!(late.query("BEGIN").await.unwrap().status, b'T');
        assert!(has(1, 1), "{text}: {:?}", held(&cluster, &place.name));
        assert_eq!(late.query("COMMIT").await.unwrap().status, b'I');
    }
    wrapped.tell("end");
    tokio::task::spawn_blocking(|| wrapped.finish().well()).await.unwrap();
}

#[tokio::test]
async fn a_pgweir_that_leaves_yields_to_the_others_and_serves_on_as_far_as_they_leave_room() {
    let cluster = cluster();
    let place = Place::on(&cluster);
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 12", place.name));
    let (mut wrapped, address) = leaver(&place);
    let stop = Arc::new(AtomicBool::new(false));
    let client =
        |_| tokio::spawn(hungry(address, place.name.clone(), place.name.clone(), stop.clone(), Arc::default()));
    let clients: Vec<_> = (0..12).map(client).collect();
    let has = |who: &str, wanted: u32| {
        held(&cluster, &place.name)
            .get(who)
            .is_some_and(|(all, leaving)| *all == wanted && (who == "other" || *leaving > 0))
    };
    let named = settings(&[("fleet_budget", "true"), ("default_pool_size", "20"), ("fleet_name", "other")]);
    let other = Sidecar::start(place.toml(&named), &place.name, &[&place.name], 20, &stop).await;
    let count = |who: &str| held(&cluster, &place.name).get(who).map(|(all, _)| *all);
    eventually(SOON * 2, || count("leaver") == Some(5) && count("other") == Some(5)).await;
    wrapped.signal(libc::SIGTERM);
    // All but the one that is left to whoever has clients.
    let begun = Instant::now();
    eventually(SOON, || has("leaver", 1) && has("other", 9)).await;
    println!("it had yielded after {:?}", begun.elapsed());
    let mut late = Wire::open(address, &place.name, &place.name, PASSWORD).await.unwrap();
    assert_value(&late.query("SELECT 1").await.unwrap(), "1");
    stop.store(true, Ordering::Relaxed);
    let mut all = Vec::new();
    for client in clients {
        all.push(client.await.unwrap());
    }
    all.extend(other.end_quietly().await.served);
    for served in &all {
        assert!(served.queries > 0, "{served:?}");
    }
    assert_served(&all);
    drop(late);
    wrapped.tell("end");
    tokio::task::spawn_blocking(|| wrapped.finish().well()).await.unwrap();
    assert_eq!(logins(&cluster, &place.name).1, 0);
}

#[tokio::test]
async fn who_waits_in_vain_is_told_how_the_fleet_stands() {
    let cluster = cluster();
    let place = Place::on(&cluster);
    place.psql(&format!("ALTER ROLE {} CONNECTION LIMIT 3", place.name));
    let toml = place.toml(&[("fleet_budget", "true"), ("query_wait_timeout", "7s"), ("fleet_census_period", PERIOD)]);
    let (first, second) = (start_pgweir(toml.clone()), start_pgweir(toml));
    let parameters = [("user", &*place.name), ("database", &*place.name)];
    let mut holder = Wire::connect(first.addr()).await.unwrap();
    holder.login_with(&parameters, PASSWORD).await.unwrap();
    assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
    // Two of the three are left alone: this one has to wait its turn, and the holder does not let go.
    let mut client = Wire::connect(second.addr()).await.unwrap();
    let error = client.login_with(&parameters, PASSWORD).await.unwrap_err().to_string();
    for part in ["query_wait_timeout", "The fleet has no room", "role's limit of 3", "2 are kept free"] {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    // Then it gets its turn.
    assert_eq!(holder.query("COMMIT").await.unwrap().status, b'I');
    let begun = Instant::now();
    loop {
        let mut client = Wire::connect(second.addr()).await.unwrap();
        if client.login_with(&parameters, PASSWORD).await.is_ok() {
            assert_value(&client.query("SELECT 1").await.unwrap(), "1");
            break;
        }
        assert!(begun.elapsed() < LONGEST_WAIT, "it never got its turn");
    }
    assert_eq!(logins(&cluster, &place.name).1, 0);
}

#[tokio::test]
async fn a_pool_that_another_limit_of_this_process_stops_serves_its_clients_with_what_it_has() {
    let cluster = cluster();
    let place = Place::on(&cluster);
    let (other, toml) = with_another(&cluster, &place, &[("fleet_budget", "true"), ("max_user_connections", "2")]);
    let pgweir = start_pgweir(toml);
    let client = async |database: &str| {
        let mut client = Wire::connect(pgweir.addr()).await.unwrap();
        client.login_with(&[("user", &*place.name), ("database", database)], PASSWORD).await.unwrap();
        client
    };
    let (mut holder, mut one, mut two) = (client(&place.name).await, client(&other).await, client(&other).await);
    assert_eq!(holder.query("BEGIN").await.unwrap().status, b'T');
    let work = async |client: &mut Wire| {
        for _ in 0..100 {
            assert_value(&client.query("SELECT 1 FROM pg_sleep(0.001)").await.unwrap(), "1");
        }
    };
    let both = async { tokio::join!(work(&mut one), work(&mut two)) };
    tokio::time::timeout(SOON, both).await.expect("two clients of one connection are not served");
    assert_eq!(holder.query("COMMIT").await.unwrap().status, b'I');
}

#[tokio::test]
async fn a_name_that_does_not_fit_beside_the_tag_is_not_lost() {
    let site = Site::start(&[("fleet_budget", "true"), ("fleet_name", "web.1"), ("default_pool_size", "1")]);
    for name in ["a name of forty-five bytes, which is too long ", "größer als es sein darf, größer als es sein darf"]
    {
        let mut client = site.client_with(&[("application_name", name)]).await;
        let other = site.client_with(&[("application_name", "other")]).await;
        let is = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()";
        let first = client.query(is).await.unwrap().value().unwrap().to_owned();
        assert!(first.starts_with(&name[..4].replace('ö', "?")) || first.starts_with("gr"), "{first:?}");
        for text in ["SET application_name = 'mine'", "RESET application_name", "SELECT 1"] {
            assert_eq!(client.query(text).await.unwrap().error, None, "{text}");
        }
        assert_eq!(client.query(is).await.unwrap().value(), Some(&*first));
        drop(other);
    }
}

#[tokio::test]
async fn a_statement_is_there_behind_a_new_tag() {
    // A SET in between has the tag put back, by a query that destroys the server's unnamed statement.
    let site = Site::start(&[("fleet_budget", "true"), ("default_pool_size", "1"), ("prepared_statements", "strip")]);
    let mut client = site.client().await;
    for round in 0..5 {
        assert_value(&client.extended("SELECT $1::text", &[Some("x")]).await.unwrap(), "x");
        let text = format!("SET application_name = 'n{round}'");
        assert_eq!(client.query(&text).await.unwrap().error, None);
        assert_value(&client.extended("SELECT $1::text", &[Some("x")]).await.unwrap(), "x");
    }
}

#[tokio::test]
async fn a_clients_name_stands_in_front_of_the_tag_and_is_told_without() {
    let site = Site::start(&[("fleet_budget", "true"), ("fleet_name", "web.1"), ("default_pool_size", "1")]);
    let name = "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let seen = || {
        let sql = format!("SELECT application_name FROM pg_stat_activity WHERE usename = '{}'", site.name());
        site.place.psql(&sql).trim().to_owned()
    };
    let is_tagged = |text: &str, client: &str| {
        let tag = text.strip_prefix(client).unwrap_or_else(|| panic!("{text:?} does not begin with {client:?}"));
        assert!(tag.starts_with("[pgweir web.1/") && tag.ends_with("#1]"), "{text:?}");
    };
    let mut anonymous = site.client().await;
    is_tagged(anonymous.query(name).await.unwrap().value().unwrap(), "");
    let mut named = site.client_with(&[("application_name", "app")]).await;
    is_tagged(named.query(name).await.unwrap().value().unwrap(), "app ");
    is_tagged(anonymous.query(name).await.unwrap().value().unwrap(), "");
    // To the client it is its own, whichever way it asks.
    for (client, own) in [(&mut named, "app"), (&mut anonymous, "")] {
        for text in ["SHOW application_name", "show \"Application_Name\";"] {
            assert_value(&client.query(text).await.unwrap(), own);
            assert_value(&client.extended(text, &[]).await.unwrap(), own);
        }
        let all = client.query("SHOW ALL").await.unwrap();
        let row = all.rows.iter().find(|row| row[0].as_deref() == Some("application_name")).unwrap();
        assert_eq!(row[1].as_deref(), Some(own));
        // What another has said before means nothing for the next.
        let seen = client.query("SELECT current_setting('application_name')").await.unwrap();
        is_tagged(seen.value().unwrap(), [own, " "].concat().trim_start());
    }
    let long = "a name that is too long to stand beside a tag, of sixty bytes";
    for text in ["BEGIN", &format!("SET application_name = '{long}'")] {
        assert_eq!(named.query(text).await.unwrap().error, None);
    }
    assert_value(&named.query("SHOW application_name").await.unwrap(), long);
    assert_eq!(named.query("COMMIT").await.unwrap().error, None);
    assert_value(&named.query("SHOW application_name").await.unwrap(), long);
    assert_eq!(named.query("RESET application_name").await.unwrap().error, None);
    assert_value(&named.query("SHOW application_name").await.unwrap(), "app");
    // A client that takes the tag away gets it back when it is done.
    assert_eq!(named.query("SET application_name = 'mine'").await.unwrap().error, None);
    wait_until(SOON, || seen().contains("[pgweir"));
    is_tagged(&seen(), "mine ");
    is_tagged(named.query(name).await.unwrap().value().unwrap(), "mine ");
    assert_eq!(named.query("RESET application_name").await.unwrap().error, None);
    is_tagged(named.query(name).await.unwrap().value().unwrap(), "app ");
    for text in ["BEGIN", "SET LOCAL application_name = 'other'", "ROLLBACK", "DISCARD ALL", "RESET ALL"] {
        assert_eq!(named.query(text).await.unwrap().error, None, "{text}");
    }
    is_tagged(named.query(name).await.unwrap().value().unwrap(), "app ");
    is_tagged(anonymous.query(name).await.unwrap().value().unwrap(), "");
    assert_value(&anonymous.query("SELECT 1").await.unwrap(), "1");
}

#[tokio::test]
async fn behind_another_pooler_a_pool_takes_no_part_and_says_so() {
    let site = Site::start(&[]);
    let port = site.pgweir.port().to_string();
    let outer = start_pgweir(site.place.toml(&[("databases.PLACE.port", &port), ("fleet_budget", "true")]));
    let mut client = Wire::connect(outer.addr()).await.unwrap();
    client.login_with(&[("user", site.name()), ("database", site.name())], PASSWORD).await.unwrap();
    assert_value(&client.query("SELECT 1").await.unwrap(), "1");
    outer.wait_log("another pooler stands in front", SOON).unwrap();
}
