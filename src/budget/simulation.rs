//! Whole fleets around a model of a server, with the product's own decisions; every run follows from its seed.
//!
//! A run has two parts. In the first everything goes wrong: processes end, stop and start at any moment, also between any
//! two messages of one exchange; connections are lost, logins take seconds, foreigners come, the fleet doubles. In the
//! second nothing does, and the fleet has to come to rest. What has to hold is checked where it could break: at the server,
//! when a claim or a probe's stay is committed, against what is true and not against what anyone saw.
//!
//! A run that fails tells how it is played again: with `FLEET_SEED=n` a test plays that run alone and tells what happens in it. With
//! `--features mutant` and `PGWEIR_TEST_MUTANT=Claims` the first test demands that the missing check is noticed.

mod process;
mod server;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::census::{Census, Limits, Scope};
use super::headroom;
use super::member::{Member, Policy};
use super::tag::{self, Mark, Wait};
use crate::mutant::{Guard, lacks};

use process::{Answer, Proc};
use server::{Session, Sessions};

/// Microseconds.
type Time = u64;
const MS: Time = 1000;
const SECOND: Time = 1_000_000;

/// Between two ticks of a process.
const TICK: Time = 200 * MS;

/// A client of a process that gives way waits no longer, where there is a connection for each.
const LEFT_OUT: Time = 12 * SECOND;

/// What a run is like; drawn from its seed.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is drawn by itself")]
struct Plan {
    /// Processes at the beginning, and after the fleet has grown.
    processes: [usize; 2],
    databases: u32,
    roles: u32,
    /// Of each role, of each database, of the server; and the one that only the fleet knows.
    limits: Limits,
    fleet: Option<u32>,
    /// Connections that the clients of one process use at once, at most.
    hunger: u32,
    foreigners: u32,
    /// One in so many steps is followed by a fault; 0 for none.
    faults: u32,
    period: Time,
    chaos: Time,
    calm: Time,
    /// All but so many go before the calm; 0 for none.
    left: usize,
    /// These do not go at once: each has a client as long as it is there.
    lingers: bool,
    /// A process is stopped for so long, at most.
    stop: Time,
    /// Processes have different weights.
    is_weighted: bool,
    /// When all else goes well, a process stays stopped that is a probe, and has been without a connection for longer than all
    /// others.
    has_ghost: bool,
    is_broken: bool,
}

impl Plan {
    fn draw(rng: &mut SmallRng) -> Self {
        let limit = rng.random_range(3..=9_u32);
        let databases = if rng.random_ratio(1, 4) { 2 } else { 1 };
        let kind = rng.random_range(0..4);
        let none = Limits { server: Some(100), ..Limits::default() };
        let limits = match kind {
            0 => Limits { role: Some(limit), ..none },
            1 => Limits { database: Some(limit), ..none },
            2 => Limits { server: Some(limit), ..none },
            _ => none,
        };
        let first = rng.random_range(1..=3);
        let grown = first + rng.random_range(0..=3);
        let takes_turns = grown > (limit - headroom(limit)) as usize;
        Self {
            processes: [first, grown],
            databases,
            roles: if rng.random_ratio(1, 4) { 2 } else { 1 },
            limits,
            fleet: (kind == 3).then_some(limit),
            hunger: rng.random_range(1..=4),
            foreigners: if rng.random_ratio(1, 3) { rng.random_range(1..=3) } else { 0 },
            faults: if rng.random_ratio(1, 4) { 0 } else { rng.random_range(10..=60) },
            period: 2 * SECOND,
            chaos: 8 * SECOND,
            calm: if takes_turns { 24 * SECOND } else { 10 * SECOND },
            left: 0,
            lingers: false,
            stop: 5 * SECOND,
            // Where they take turns weights mean nothing.
            is_weighted: !takes_turns && rng.clone().random_ratio(1, 4),
            has_ghost: false,
            is_broken: false,
        }
    }

    fn limit(&self, scope: Scope) -> Option<u32> {
        match scope {
            Scope::Role => self.limits.role,
            Scope::Database => self.limits.database,
            Scope::Server => self.limits.server,
            Scope::Fleet => self.fleet,
        }
    }
}

#[derive(Debug)]
enum Event {
    // At the server.
    Login {
        process: usize,
        conn: u32,
        name: String,
    },
    Ask {
        session: usize,
        process: usize,
        conn: u32,
        name: Option<String>,
        lock: bool,
    },
    Answer {
        session: usize,
        process: usize,
        conn: u32,
        answer: Answer,
        name: String,
    },
    Tag {
        session: usize,
        process: usize,
        conn: u32,
        claims: u32,
        name: String,
        landed: Option<usize>,
    },
    Close {
        session: usize,
    },
    Expire {
        session: usize,
        number: u64,
    },
    // At a process.
    LoggedIn {
        process: usize,
        conn: u32,
        session: Option<usize>,
    },
    Counted {
        process: usize,
        conn: u32,
        outcome: Option<Box<(bool, Census)>>,
    },
    Answered {
        process: usize,
        conn: u32,
        answer: Answer,
        is_well: bool,
    },
    Tagged {
        process: usize,
        conn: u32,
        is_well: bool,
    },
    Released {
        process: usize,
        conn: u32,
    },
    Tick {
        process: usize,
    },
    /// The connection has carried its claims for long enough.
    Carried {
        process: usize,
        conn: u32,
    },
    // In the world.
    Foreigner,
    Join {
        hunger: u32,
    },
    Drain {
        process: usize,
    },
    Calm,
    End,
}

impl Event {
    /// The process that has to be awake for it.
    const fn at(&self) -> Option<usize> {
        match self {
            Self::LoggedIn { process, .. }
            | Self::Counted { process, .. }
            | Self::Answered { process, .. }
            | Self::Tagged { process, .. }
            | Self::Released { process, .. }
            | Self::Carried { process, .. }
            | Self::Tick { process } => Some(*process),
            _ => None,
        }
    }
}

struct Due {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
struct Outcome {
    steps: u64,
    censuses: u64,
    logins: u64,
    refusals: u64,
    /// The longest that a hungry process was without any connection in the calm part.
    longest_wait: Time,
    /// The same in per cent of what is allowed, where there are more of them than connections.
    patience: u64,
    /// Claims that were over when somebody wanted to make a connection of them.
    late: u64,
    /// Logins in the last part of the calm one.
    late_logins: u64,
    most: u32,
    /// Probes that stayed beyond one look, at once.
    probes: u32,
    /// Connections beyond a limit that only the fleet knows, at once.
    beyond: u32,
    /// Runs at whose end all processes can have what they are entitled to: nothing is to be opened or closed any more.
    rests: u64,
}

struct World {
    plan: Plan,
    rng: SmallRng,
    now: Time,
    order: u64,
    due: BinaryHeap<Reverse<Due>>,
    sessions: Sessions,
    transactions: u64,
    processes: Vec<Proc>,
    is_calm: bool,
    calm_since: Time,
    is_told: bool,
    outcome: Outcome,
    fault: Option<String>,
}

fn duration(time: Time) -> Duration {
    Duration::from_micros(time)
}

impl World {
    fn play(seed: u64, plan: Option<Plan>, is_told: bool) -> Result<Outcome, String> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let plan = plan.unwrap_or_else(|| Plan::draw(&mut rng));
        let mut world = Self {
            rng,
            now: 0,
            order: 0,
            due: BinaryHeap::new(),
            sessions: Sessions::default(),
            transactions: 0,
            processes: Vec::new(),
            is_calm: false,
            calm_since: 0,
            is_told,
            outcome: Outcome::default(),
            fault: None,
            plan,
        };
        world.begin();
        while let Some(Reverse(Due { at, event, .. })) = world.due.pop() {
            world.now = at;
            if matches!(event, Event::End) {
                world.close();
                break;
            }
            world.outcome.steps += 1;
            world.step(event);
            if world.fault.is_some() {
                break;
            }
        }
        match world.fault {
            None => Ok(world.outcome),
            Some(fault) => Err(format!(
                "seed {seed}, {:.3} s: {fault}\n{:?}\nreplay: FLEET_SEED={seed} cargo test -p pgweir --lib {}",
                duration(world.now).as_secs_f64(),
                world.plan,
                std::thread::current().name().unwrap_or("simulation")
            )),
        }
    }

    fn begin(&mut self) {
        let [first, grown] = self.plan.processes;
        for _ in 0..first {
            let hunger = self.rng.random_range(0..=self.plan.hunger);
            self.join(hunger);
        }
        for _ in first..grown {
            let at = self.rng.random_range(self.plan.chaos / 4..self.plan.chaos / 2 + 1);
            let hunger = self.rng.random_range(1..=self.plan.hunger);
            self.at(at, Event::Join { hunger });
        }
        if self.plan.left > 0 {
            for process in self.plan.left..grown {
                let at = self.rng.random_range(self.plan.chaos * 3 / 4..self.plan.chaos);
                self.at(at, Event::Drain { process });
            }
        }
        if self.plan.foreigners > 0 {
            self.at(SECOND, Event::Foreigner);
        }
        self.at(self.plan.chaos, Event::Calm);
        self.at(self.plan.chaos + self.plan.calm, Event::End);
    }

    fn at(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.due.push(Reverse(Due { at: at.max(self.now), order: self.order, event }));
    }

    fn after(&mut self, delay: Time, event: Event) {
        self.at(self.now + delay, event);
    }

    /// How long a message takes.
    fn way(&mut self) -> Time {
        if !self.is_calm && self.plan.faults > 0 && self.rng.random_ratio(1, 100) {
            return self.rng.random_range(MS..3 * SECOND);
        }
        self.rng.random_range(100..2 * MS)
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.is_told {
            println!("{:9.4} {}", duration(self.now).as_secs_f64(), what());
        }
    }

    /// The server's clock.
    fn clock(&self) -> u64 {
        1_764_342_000_000 + self.now / MS
    }

    fn step(&mut self, event: Event) {
        if let Some(process) = event.at() {
            let proc = &self.processes[process];
            if !proc.is_alive {
                return;
            }
            if proc.stopped_until > self.now {
                let until = proc.stopped_until;
                return self.at(until, event);
            }
        }
        self.tell(|| {
            let text = format!("{event:?}");
            text.chars().take(160).collect()
        });
        match event {
            Event::Login { process, conn, name } => self.login(process, conn, name),
            Event::Ask { session, process, conn, name, lock } => self.ask(session, process, conn, name, lock),
            Event::Answer { session, process, conn, answer, name } => {
                self.answer(session, process, conn, &answer, name);
            }
            Event::Tag { session, process, conn, claims, name, landed } => {
                self.tag(session, process, conn, claims, name, landed);
            }
            Event::Close { session } => self.end_session(session),
            Event::Expire { session, number } => {
                let is_open = |s: &Session| s.transaction.as_ref().is_some_and(|t| t.number == number);
                if self.sessions.get(session).is_some_and(is_open) {
                    self.end_session(session);
                }
            }
            Event::LoggedIn { process, conn, session } => self.logged_in(process, conn, session),
            Event::Counted { process, conn, outcome } => self.counted(process, conn, outcome),
            Event::Answered { process, conn, answer, is_well } => self.answered(process, conn, &answer, is_well),
            Event::Tagged { process, conn, is_well } => self.tagged(process, conn, is_well),
            Event::Released { process, conn } => self.released(process, conn),
            Event::Tick { process } => {
                self.turn(process);
                self.after(TICK, Event::Tick { process });
            }
            Event::Carried { process, conn } => self.carried(process, conn),
            Event::Foreigner => self.foreigner(),
            Event::Join { hunger } => self.join(hunger),
            Event::Drain { process } => {
                let lingers = self.plan.lingers;
                let proc = &mut self.processes[process];
                (proc.is_draining, proc.gives_way) = (!lingers, lingers);
                proc.hunger = u32::from(lingers);
                proc.member.drain();
                if self.processes[process].is_alive {
                    self.turn(process);
                }
            }
            Event::Calm => self.calm(),
            Event::End => {}
        }
        self.go_wrong();
    }

    // ---- what goes wrong ----

    fn go_wrong(&mut self) {
        if self.is_calm || self.plan.faults == 0 || !self.rng.random_ratio(1, self.plan.faults) {
            return;
        }
        let process = self.rng.random_range(0..self.processes.len());
        match self.rng.random_range(0..6) {
            0 => self.crash(process),
            1 | 2 => {
                let pause = self.rng.random_range(10 * MS..self.plan.stop);
                self.tell(|| format!("-- {process} is stopped"));
                self.processes[process].stopped_until = self.now + pause;
            }
            3 | 4 => {
                // pg_terminate_backend, or the network.
                let all: Vec<usize> = self.sessions.iter().map(|(n, _)| n).collect();
                if !all.is_empty() {
                    let session = all[self.rng.random_range(0..all.len())];
                    self.tell(|| format!("-- session {session} is lost"));
                    self.end_session(session);
                }
            }
            _ => {
                let most = if self.processes[process].gives_way { 1 } else { self.plan.hunger };
                self.processes[process].hunger = self.rng.random_range(0..=most);
            }
        }
    }

    fn crash(&mut self, process: usize) {
        if !self.processes[process].is_alive {
            return;
        }
        self.tell(|| format!("-- {process} ends"));
        self.processes[process].is_alive = false;
        let hunger = self.processes[process].hunger;
        let own = |(n, s): (usize, &Session)| (s.process == Some(process)).then_some(n);
        let sessions: Vec<usize> = self.sessions.iter().filter_map(own).collect();
        for session in sessions {
            let delay = self.rng.random_range(0..100 * MS);
            self.after(delay, Event::Close { session });
        }
        // Another takes its place.
        let delay = self.rng.random_range(0..SECOND);
        self.after(delay, Event::Join { hunger });
    }

    fn foreigner(&mut self) {
        if self.is_calm {
            return;
        }
        let is_one = |(n, s): (usize, &Session)| s.process.is_none().then_some(n);
        let there: Vec<usize> = self.sessions.iter().filter_map(is_one).collect();
        if there.len() < self.plan.foreigners as usize && self.rng.random() {
            let (database, role) =
                (self.rng.random_range(0..self.plan.databases), self.rng.random_range(0..self.plan.roles));
            if self.has_room(database, role) {
                self.sessions.insert(Session::new(None, database, role, "psql".to_owned(), self.now));
            }
        } else if let Some(session) = there.first() {
            self.end_session(*session);
        }
        let delay = self.rng.random_range(50 * MS..SECOND);
        self.after(delay, Event::Foreigner);
    }

    fn join(&mut self, hunger: u32) {
        let process = self.processes.len();
        let weight = if self.plan.is_weighted { u32::try_from(process).unwrap() % 3 + 1 } else { 1 };
        let name = tag::member(&format!("web.{process}"), weight, self.rng.random());
        let policy = Policy { period: duration(self.plan.period), is_broken: self.plan.is_broken };
        self.processes.push(Proc {
            member: Member::new(name, policy),
            database: self.rng.random_range(0..self.plan.databases),
            role: self.rng.random_range(0..self.plan.roles),
            is_alive: true,
            is_draining: false,
            gives_way: false,
            stopped_until: 0,
            conns: Vec::new(),
            next: 0,
            hunger: if self.is_calm { self.plan.hunger } else { hunger },
            starving: None,
        });
        let delay = self.rng.random_range(0..TICK);
        self.after(delay, Event::Tick { process });
    }

    /// From here on nothing goes wrong, and nobody who was stopped stays so.
    fn calm(&mut self) {
        self.is_calm = true;
        self.calm_since = self.now;
        for proc in &mut self.processes {
            proc.stopped_until = 0;
            if proc.is_alive && !proc.is_draining {
                proc.hunger = if proc.gives_way { 1 } else { self.plan.hunger };
            }
        }
        let gone: Vec<usize> = self.sessions.iter().filter(|(_, s)| s.process.is_none()).map(|(n, _)| n).collect();
        for session in gone {
            self.end_session(session);
        }
        if self.plan.has_ghost {
            self.haunt();
        }
    }

    /// A probe of a process that does nothing any more, of the same role or another.
    fn haunt(&mut self) {
        self.join(0);
        let process = self.processes.len() - 1;
        self.processes[process].is_alive = false;
        let (since, seen) = (self.clock() - 100_000, self.clock());
        let waits = Mark::Waiting(Wait { periods: 50, since, seen });
        let mark = [waits, Mark::Proving(since, seen), Mark::Coming(since, seen)][self.rng.random_range(0..3)];
        let name = self.processes[process].member.tag(1, mark);
        let role = self.rng.random_range(0..2);
        self.sessions.insert(Session::new(Some(process), 0, role, name, self.now));
    }

    /// The end of a run: has the fleet come to rest?
    fn close(&mut self) {
        let now = self.now;
        let mut waited = self.outcome.longest_wait;
        let alive = || self.processes.iter().filter(|proc| proc.is_alive && !proc.is_draining);
        let there: Vec<&Proc> = alive().filter(|proc| !proc.gives_way).collect();
        for since in there.iter().filter_map(|proc| proc.starving) {
            waited = waited.max(now - since.max(self.calm_since));
        }
        self.outcome.longest_wait = waited;
        let [tightest] = [Scope::ALL.into_iter().filter_map(|scope| self.plan.limit(scope)).min().unwrap_or(0)];
        // Each of those that give way may have one.
        let leaving = alive().filter(|proc| proc.gives_way).count();
        let cap = ((tightest - headroom(tightest)) as usize).saturating_sub(leaving);
        if there.is_empty()
            || self.plan.databases > 1
            || self.plan.roles > 1
            || lacks(Guard::Claims)
            || self.plan.is_broken
        {
            return;
        }
        let slices = there.len().div_ceil(cap);
        let fault = if slices > 1 {
            let bound = longest_wait(there.len(), cap, self.plan.period);
            // Whom the server has refused waits longer: up to a minute.
            let waited = if self.outcome.refusals == 0 { waited } else { 0 };
            self.outcome.patience = waited * 100 / bound;
            (waited > bound).then(|| format!("{} ms without a connection, {} ms at most", waited / MS, bound / MS))
        } else {
            let weight = |proc: &Proc| tag::weight(proc.member.name().as_bytes()) as usize;
            let weights: usize = there.iter().map(|proc| weight(proc)).sum();
            let share = |proc: &Proc| 1 + (cap - there.len()) * weight(proc) / weights;
            let least = |proc: &Proc| share(proc).min(self.plan.hunger as usize);
            let has = |proc: &Proc| proc.conns.iter().filter(|c| c.session.is_some()).count();
            self.outcome.rests = 1;
            let poor = there.iter().find(|proc| has(proc) < least(proc));
            let poor = poor.map(|proc| {
                format!("less than its share of {} has {:?} of {:?}", least(proc), proc.conns, proc.member)
            });
            let left_out =
                alive().find(|proc| proc.gives_way && proc.starving.is_some_and(|since| now - since > LEFT_OUT));
            poor.or(left_out.map(|proc| format!("it serves nobody any more: {proc:?}")))
        };
        self.fault = self.fault.take().or(fault);
    }
}

/// How long a member is without a connection, at most, of so many that take turns with so many connections; see the module's
/// documentation. The fleet has to recover first from what went wrong: claims, waits and pauses that began before.
const fn longest_wait(members: usize, connections: usize, period: Time) -> Time {
    period * 23 / 4 * (members - connections) as Time + period * 5
}

/// Plays the one run that is asked for, if one is.
fn is_replayed(plan: impl Fn(u64) -> Option<Plan>) -> bool {
    let Ok(seed) = std::env::var("FLEET_SEED") else { return false };
    let seed = seed.parse().unwrap();
    println!("{:?}", World::play(seed, plan(seed), true).unwrap_or_else(|fault| panic!("{fault}")));
    true
}

/// Plays `seeds` until one fails.
fn first_failure(seeds: impl IntoIterator<Item = u64>, plan: impl Fn(u64) -> Option<Plan>) -> Result<Outcome, String> {
    let mut sum = Outcome::default();
    for seed in seeds {
        let outcome = World::play(seed, plan(seed), false)?;
        sum.steps += outcome.steps;
        sum.censuses += outcome.censuses;
        sum.logins += outcome.logins;
        sum.refusals += outcome.refusals;
        sum.late += outcome.late;
        sum.longest_wait = sum.longest_wait.max(outcome.longest_wait);
        sum.patience = sum.patience.max(outcome.patience);
        sum.rests += outcome.rests;
        sum.late_logins += outcome.late_logins * outcome.rests;
        sum.most = sum.most.max(outcome.most);
        sum.probes = sum.probes.max(outcome.probes);
        sum.beyond = sum.beyond.max(outcome.beyond);
    }
    Ok(sum)
}

#[test]
fn the_cap_holds_in_ten_thousand_fleets_where_everything_goes_wrong() {
    if is_replayed(|_| None) {
        return;
    }
    let outcome = first_failure(0..10_000, |_| None);
    println!("{outcome:?}");
    if lacks(Guard::Claims) {
        assert!(outcome.is_err(), "nobody noticed that claims are not checked: {outcome:?}");
        return;
    }
    let outcome = outcome.unwrap_or_else(|fault| panic!("{fault}"));
    assert!(outcome.logins > 50_000 && outcome.refusals > 0 && outcome.rests > 1000, "{outcome:?}");
    assert!(outcome.patience > 25, "nobody had to wait for a turn: {outcome:?}");
    // One in a thousand has its last step still to go.
    assert!(outcome.late_logins * 1000 <= outcome.rests, "fleets at rest open connections: {outcome:?}");
}

#[test]
fn where_they_take_turns_nobody_waits_longer_than_all_who_have_waited_longer_need() {
    let plan = |seed| {
        let mut rng = SmallRng::seed_from_u64(seed);
        let connections = rng.random_range(1..=4);
        let members = connections as usize + rng.random_range(1..=4);
        Some(Plan {
            processes: [rng.random_range(1..=members), members],
            databases: 1,
            roles: 1,
            limits: Limits { server: Some(100), ..Limits::default() },
            fleet: Some(connections + 2),
            foreigners: 0,
            calm: 60 * SECOND,
            is_weighted: false,
            has_ghost: seed % 4 == 3,
            ..Plan::draw(&mut rng)
        })
    };
    if is_replayed(plan) {
        return;
    }
    let seeds = std::env::var("FLEET_SEEDS").map_or(300, |seeds| seeds.parse().unwrap());
    let outcome = first_failure(0..seeds, plan).unwrap_or_else(|fault| panic!("{fault}"));
    println!("{outcome:?}");
    assert!(outcome.patience > 25, "nobody had to wait for a turn: {outcome:?}");
}

#[test]
fn those_that_give_way_leave_the_others_their_share_and_are_served_all_the_same() {
    let plan = |seed| {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (stay, go) = (rng.random_range(1..=2), rng.random_range(1..=2));
        Some(Plan {
            processes: [stay + go, stay + go],
            databases: 1,
            roles: 1,
            limits: Limits { server: Some(100), ..Limits::default() },
            fleet: Some(rng.random_range(8..=12)),
            foreigners: 0,
            hunger: 8,
            calm: 24 * SECOND,
            left: stay,
            lingers: true,
            is_weighted: false,
            ..Plan::draw(&mut rng)
        })
    };
    if is_replayed(plan) {
        return;
    }
    let outcome = first_failure(0..500, plan).unwrap_or_else(|fault| panic!("{fault}"));
    println!("{outcome:?}");
    assert_eq!(outcome.rests, 500, "{outcome:?}");
}

#[test]
fn a_fleet_that_does_not_check_its_claims_is_caught() {
    let broken = |seed| {
        let mut rng = SmallRng::seed_from_u64(seed);
        Some(Plan { is_broken: true, ..Plan::draw(&mut rng) })
    };
    let fault = first_failure(0..100, broken).unwrap_err();
    assert!(fault.contains("are for them"), "{fault}");
}

#[test]
fn claims_of_who_was_stopped_are_over_in_time_and_nobody_makes_connections_of_them_later() {
    let plan = |seed| {
        let mut plan = Plan::draw(&mut SmallRng::seed_from_u64(seed));
        (plan.processes, plan.limits.server, plan.fleet) = ([2, 3], Some(100), Some(9));
        (plan.faults, plan.stop, plan.chaos, plan.calm) = (15, 12 * SECOND, 20 * SECOND, 20 * SECOND);
        Some(plan)
    };
    if is_replayed(plan) {
        return;
    }
    let outcome = first_failure(0..500, plan).unwrap_or_else(|fault| panic!("{fault}"));
    println!("{outcome:?}");
    assert!(outcome.late > 0, "none was over: {outcome:?}");
}

#[test]
fn a_fleet_grows_to_five_hundred_and_shrinks_again() {
    for (seed, faults) in [(1, 0), (2, 400)] {
        let plan = Plan {
            processes: [1, 500],
            databases: 1,
            roles: 1,
            limits: Limits { role: Some(100), server: Some(400), ..Limits::default() },
            fleet: None,
            hunger: 2,
            foreigners: 0,
            faults,
            period: 5 * SECOND,
            chaos: 40 * SECOND,
            calm: 30 * SECOND,
            left: 20,
            lingers: false,
            stop: 5 * SECOND,
            is_weighted: false,
            has_ghost: false,
            is_broken: false,
        };
        let outcome = World::play(seed, Some(plan), false);
        println!("{outcome:?}");
        outcome.unwrap_or_else(|fault| panic!("{fault}"));
    }
}
