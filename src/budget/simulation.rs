//! Whole fleets around a model of a server, with the product's own decisions; every run follows from its seed.
//!
//! A run has two parts. In the first everything goes wrong: processes end, stop and start at any moment, also between any
//! two messages of one exchange; connections are lost, logins take seconds, foreigners come, the fleet doubles. In the
//! second nothing does, and the fleet has to come to rest. What has to hold is checked where it could break: at the server,
//! when a claim or a probe's stay is committed, against what is true and not against what anyone saw.
//!
//! `FLEET_SEED=n cargo test -p pgweir --lib simulation` plays one run and tells what happens in it. With `--features mutant` and
//! `PGWEIR_TEST_MUTANT=Claims` the first test demands that the missing check is noticed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::{Index, IndexMut};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::census::{Census, Limits, Process, Row, Scope};
use super::headroom;
use super::member::{Demand, Errand, Member, Policy, Probe, Verdict};
use super::tag::{self, Mark};
use crate::mutant::{Guard, lacks};

/// Microseconds.
type Time = u64;
const MS: Time = 1000;
const SECOND: Time = 1_000_000;

/// After this the server ends a transaction that waits for its client.
const TRANSACTION_LIMIT: Time = 2 * SECOND;

/// So long a connection is kept for its claims.
const CARRY_LIMIT: Time = 2 * SECOND;

/// Between two ticks of a process.
const TICK: Time = 200 * MS;

/// Idle connections are closed after this.
const IDLE_LIMIT: Time = 3 * SECOND;

/// What a run is like; drawn from its seed.
#[derive(Clone, Debug)]
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

/// A connection, as the server has it.
#[derive(Debug)]
struct Session {
    /// None is a foreigner's.
    process: Option<usize>,
    database: u32,
    role: u32,
    name: String,
    born: Time,
    transaction: Option<Transaction>,
    /// Its member has made sure that it may stay.
    stays: bool,
    /// Logins that its tag stands for.
    claims: u32,
    waits: bool,
}

#[derive(Debug)]
struct Transaction {
    number: u64,
    has_lock: bool,
    /// Foreigners in each scope, when the census was taken.
    foreign: [u32; 4],
}

/// The server's connections, by numbers that are never used again.
#[derive(Debug, Default)]
struct Sessions {
    all: BTreeMap<usize, Session>,
    next: usize,
}

impl Sessions {
    fn insert(&mut self, session: Session) -> usize {
        self.next += 1;
        self.all.insert(self.next, session);
        self.next
    }

    fn contains(&self, number: usize) -> bool {
        self.all.contains_key(&number)
    }

    fn get(&self, number: usize) -> Option<&Session> {
        self.all.get(&number)
    }

    fn get_mut(&mut self, number: usize) -> Option<&mut Session> {
        self.all.get_mut(&number)
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &Session)> {
        self.all.iter().map(|(number, session)| (*number, session))
    }
}

impl Index<usize> for Sessions {
    type Output = Session;

    fn index(&self, number: usize) -> &Session {
        &self.all[&number]
    }
}

impl IndexMut<usize> for Sessions {
    fn index_mut(&mut self, number: usize) -> &mut Session {
        self.all.get_mut(&number).unwrap()
    }
}

/// A connection, as its process has it.
#[derive(Debug)]
struct Conn {
    id: u32,
    number: u32,
    session: Option<usize>,
    state: State,
}

#[derive(Debug)]
enum State {
    LoggingIn {
        probe: Option<Probe>,
        carrier: Option<u32>,
    },
    Proving(Probe),
    Idle {
        since: Time,
    },
    Lent,
    Asking(Errand),
    /// The claims left, those that have logged in and wait for theirs to be taken off, and the one for which that is under
    /// way.
    Carrying {
        claims: u32,
        out: u32,
        landed: Vec<u32>,
        telling: Option<u32>,
    },
    /// Logged in, and not to be lent before its claim is known to have been taken off.
    Landed,
    /// Its name was taken by a client.
    Retagging,
}

#[derive(Debug)]
struct Proc {
    member: Member,
    database: u32,
    role: u32,
    is_alive: bool,
    is_draining: bool,
    stopped_until: Time,
    conns: Vec<Conn>,
    next: u32,
    /// Clients that want a connection.
    hunger: u32,
    /// Since when there is none for any of them.
    starving: Option<Time>,
}

/// What the process answers to a census.
#[derive(Clone, Debug)]
enum Answer {
    Nothing,
    Claim(u32),
    Stay,
    Mark(Mark),
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
    /// Logins in the last part of the calm one.
    late_logins: u64,
    most: u32,
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
                "seed {seed}, {:.3} s: {fault}\n{:?}\nreplay: FLEET_SEED={seed} cargo test -p pgweir --lib simulation",
                duration(world.now).as_secs_f64(),
                world.plan
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
                self.processes[process].is_draining = true;
                self.processes[process].hunger = 0;
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
                let pause = self.rng.random_range(10 * MS..5 * SECOND);
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
            _ => self.processes[process].hunger = self.rng.random_range(0..=self.plan.hunger),
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
                self.sessions.insert(Session {
                    process: None,
                    database,
                    role,
                    name: "psql".to_owned(),
                    born: self.now,
                    transaction: None,
                    stays: false,
                    claims: 0,
                    waits: false,
                });
            }
        } else if let Some(session) = there.first() {
            self.end_session(*session);
        }
        let delay = self.rng.random_range(50 * MS..SECOND);
        self.after(delay, Event::Foreigner);
    }

    fn join(&mut self, hunger: u32) {
        let process = self.processes.len();
        let name = tag::member(&format!("web.{process}"), self.rng.random());
        let policy = Policy { period: duration(self.plan.period), is_broken: self.plan.is_broken };
        self.processes.push(Proc {
            member: Member::new(name, policy),
            database: self.rng.random_range(0..self.plan.databases),
            role: self.rng.random_range(0..self.plan.roles),
            is_alive: true,
            is_draining: false,
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
                proc.hunger = self.plan.hunger;
            }
        }
        let gone: Vec<usize> = self.sessions.iter().filter(|(_, s)| s.process.is_none()).map(|(n, _)| n).collect();
        for session in gone {
            self.end_session(session);
        }
    }

    /// The end of a run: has the fleet come to rest?
    fn close(&mut self) {
        let now = self.now;
        let mut waited = self.outcome.longest_wait;
        let there: Vec<&Proc> = self.processes.iter().filter(|proc| proc.is_alive && !proc.is_draining).collect();
        for since in there.iter().filter_map(|proc| proc.starving) {
            waited = waited.max(now - since.max(self.calm_since));
        }
        self.outcome.longest_wait = waited;
        let [tightest] = [Scope::ALL.into_iter().filter_map(|scope| self.plan.limit(scope)).min().unwrap_or(0)];
        let cap = (tightest - headroom(tightest)) as usize;
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
            // A connection is kept for two periods, and a third may pass before its holder looks.
            let bound = self.plan.period * (3 * (slices as Time + 1) + 2);
            // Whom the server has refused waits longer: up to a minute.
            let waited = if self.outcome.refusals == 0 { waited } else { 0 };
            self.outcome.patience = waited * 100 / bound;
            (waited > bound).then(|| format!("{} ms without a connection, {} ms at most", waited / MS, bound / MS))
        } else {
            let least = (cap / there.len()).min(self.plan.hunger as usize);
            let has = |proc: &&&Proc| proc.conns.iter().filter(|c| c.session.is_some()).count();
            self.outcome.rests = 1;
            let poor = there.iter().find(|proc| has(proc) < least);
            poor.map(|proc| format!("less than its share of {least} has {:?} of {:?}", proc.conns, proc.member))
        };
        self.fault = self.fault.take().or(fault);
    }

    // ---- the server ----

    fn in_scope(scope: Scope, of: (u32, u32), session: &Session) -> bool {
        match scope {
            Scope::Role => session.role == of.1,
            Scope::Database => session.database == of.0,
            Scope::Server | Scope::Fleet => true,
        }
    }

    fn has_room(&self, database: u32, role: u32) -> bool {
        [Scope::Role, Scope::Database, Scope::Server].into_iter().all(|scope| {
            let count = self.sessions.iter().filter(|(_, s)| Self::in_scope(scope, (database, role), s)).count();
            self.plan.limit(scope).is_none_or(|limit| count < limit as usize)
        })
    }

    fn end_session(&mut self, session: usize) {
        self.sessions.all.remove(&session);
    }

    fn login(&mut self, process: usize, conn: u32, name: String) {
        let (database, role) = (self.processes[process].database, self.processes[process].role);
        if !self.has_room(database, role) {
            self.outcome.refusals += 1;
            let way = self.way();
            return self.after(way, Event::LoggedIn { process, conn, session: None });
        }
        self.outcome.logins += 1;
        self.outcome.late_logins += u64::from(self.is_calm && self.now > self.calm_since + self.plan.calm * 3 / 4);
        let session = self.sessions.insert(Session {
            process: Some(process),
            database,
            role,
            name,
            born: self.now,
            transaction: None,
            stays: false,
            claims: 0,
            waits: false,
        });
        self.outcome.most = self.outcome.most.max(u32::try_from(self.sessions.all.len()).unwrap());
        if !self.processes[process].is_alive {
            return self.after(MS, Event::Close { session });
        }
        let way = self.way();
        self.after(way, Event::LoggedIn { process, conn, session: Some(session) });
    }

    fn ask(&mut self, session: usize, process: usize, conn: u32, name: Option<String>, lock: bool) {
        self.outcome.censuses += 1;
        let way = self.way();
        if !self.sessions.contains(session) {
            return self.after(way, Event::Counted { process, conn, outcome: None });
        }
        if let Some(name) = name {
            let mark = tag::split(name.as_bytes()).map(|(_, tag)| tag.mark);
            self.sessions[session].waits = matches!(mark, Some(Mark::Waiting(_)));
            self.sessions[session].name = name;
        }
        let (database, role) = (self.sessions[session].database, self.sessions[session].role);
        let is_taken =
            |(_, s): (usize, &Session)| s.database == database && s.transaction.as_ref().is_some_and(|t| t.has_lock);
        let locked = lock && !self.sessions.iter().any(is_taken);
        let limits = self.plan.limits;
        let mut census = Census::new(limits, self.plan.fleet);
        for (_, s) in self.sessions.iter() {
            let same_role = s.role == role;
            census.row(&Row {
                name: s.name.as_bytes(),
                database: s.database,
                here: s.database == database,
                role: s.role,
                same_role,
                process: if same_role { Process::Client } else { Process::Hidden },
                age: same_role.then(|| duration(self.now - s.born)),
            });
        }
        if lock {
            self.transactions += 1;
            let number = self.transactions;
            let foreign = Scope::ALL.map(|scope| {
                let counts = |s: &Session| s.process.is_none() && Self::in_scope(scope, (database, role), s);
                u32::try_from(self.sessions.iter().filter(|(_, s)| counts(s)).count()).unwrap()
            });
            self.sessions[session].transaction = Some(Transaction { number, has_lock: locked, foreign });
            self.after(TRANSACTION_LIMIT, Event::Expire { session, number });
        }
        self.after(way, Event::Counted { process, conn, outcome: Some(Box::new((locked, census))) });
    }

    fn answer(&mut self, session: usize, process: usize, conn: u32, answer: &Answer, name: String) {
        let way = self.way();
        let Some(transaction) = self.sessions.get_mut(session).and_then(|s| s.transaction.take()) else {
            return self.after(way, Event::Answered { process, conn, answer: answer.clone(), is_well: false });
        };
        let s = &mut self.sessions[session];
        match answer {
            Answer::Nothing => {}
            Answer::Claim(claims) => {
                s.claims = *claims;
                s.name = name;
            }
            Answer::Stay => {
                s.stays = true;
                s.waits = false;
                s.name = name;
            }
            Answer::Mark(mark) => {
                s.waits = matches!(mark, Mark::Waiting(_));
                s.name = name;
            }
        }
        let of = (s.database, s.role);
        if matches!(answer, Answer::Claim(1..) | Answer::Stay) {
            self.check_cap(of, &transaction.foreign);
        }
        if matches!(answer, Answer::Mark(Mark::Waiting(_))) {
            self.check_places(of);
        }
        self.after(way, Event::Answered { process, conn, answer: answer.clone(), is_well: true });
    }

    /// However many there are already, one more was taken: all that may stay and all that is claimed has to fit.
    fn check_cap(&mut self, of: (u32, u32), foreign: &[u32; 4]) {
        for (scope, foreign) in Scope::ALL.into_iter().zip(foreign) {
            let Some(limit) = self.plan.limit(scope) else { continue };
            let cap = limit - headroom(limit);
            let counts = |s: &&Session| s.process.is_some() && Self::in_scope(scope, of, s);
            let all = self.sessions.iter().map(|(_, s)| s).filter(counts);
            let taken: u32 = all.map(|s| u32::from(s.stays) + s.claims).sum();
            if taken + foreign > cap {
                self.fault = Some(format!(
                    "{taken} connections and claims and {foreign} of foreigners, {cap} are for them: {scope:?}"
                ));
            }
        }
    }

    fn check_places(&mut self, of: (u32, u32)) {
        for scope in Scope::ALL {
            let Some(limit) = self.plan.limit(scope) else { continue };
            let is_up = |s: &Session| {
                s.process.is_some_and(|n| self.processes[n].is_alive && self.processes[n].stopped_until <= self.now)
            };
            let counts = |s: &&Session| s.waits && is_up(s) && s.database == of.0 && Self::in_scope(scope, of, s);
            let waiting = self.sessions.iter().map(|(_, s)| s).filter(counts).count();
            let places = (headroom(limit) as usize / 2).max(1);
            // The one of a process that went on a moment ago is stale to the others.
            if waiting > places + usize::from(self.plan.faults > 0) * 2 {
                self.fault = Some(format!("{waiting} probes wait in {places} places: {scope:?}"));
            }
        }
    }

    fn tag(&mut self, session: usize, process: usize, conn: u32, claims: u32, name: String, landed: Option<usize>) {
        let is_well = self.sessions.contains(session);
        if let Some(s) = self.sessions.get_mut(session) {
            s.claims = claims;
            s.name = name;
        }
        if let Some(landed) = landed.filter(|_| is_well).and_then(|n| self.sessions.get_mut(n)) {
            landed.stays = true;
        }
        let way = self.way();
        self.after(way, Event::Tagged { process, conn, is_well });
    }

    // ---- a process ----

    fn demand(&self, process: usize) -> Demand {
        let proc = &self.processes[process];
        let open = u32::try_from(proc.conns.len()).unwrap();
        let idle = proc.conns.iter().filter(|conn| matches!(conn.state, State::Idle { .. })).count();
        let oldest = if proc.hunger > open { Duration::from_secs(1) } else { Duration::ZERO };
        Demand { wanted: proc.hunger.saturating_sub(open), oldest, open, idle: u32::try_from(idle).unwrap() }
    }

    fn conn(&mut self, process: usize, conn: u32) -> Option<&mut Conn> {
        self.processes[process].conns.iter_mut().find(|c| c.id == conn)
    }

    fn dial(&mut self, process: usize, probe: Option<Probe>, carrier: Option<u32>) {
        let is_calm = self.is_calm;
        let proc = &mut self.processes[process];
        let id = proc.next;
        proc.next += 1;
        let number = proc.member.number();
        let name = proc.member.tag(number, Mark::Plain);
        proc.conns.push(Conn { id, number, session: None, state: State::LoggingIn { probe, carrier } });
        let slow = !is_calm && self.plan.faults > 0 && self.rng.random_ratio(1, 20);
        let takes = if slow { self.rng.random_range(MS..4 * SECOND) } else { self.rng.random_range(MS..40 * MS) };
        self.after(takes, Event::Login { process, conn: id, name });
    }

    fn shut(&mut self, process: usize, conn: u32) {
        let proc = &mut self.processes[process];
        let Some(at) = proc.conns.iter().position(|c| c.id == conn) else { return };
        let gone = proc.conns.swap_remove(at);
        if let Some(session) = gone.session {
            let way = self.way();
            self.after(way, Event::Close { session });
        }
    }

    /// What the pool does at a tick and whenever something has changed.
    fn turn(&mut self, process: usize) {
        let now = duration(self.now);
        let entropy = self.rng.random();
        self.note_hunger(process);
        let idle = |proc: &Proc| {
            let state = |c: &&Conn| matches!(c.state, State::Idle { .. });
            proc.conns.iter().find(state).map(|c| c.id)
        };
        let late = |proc: &Proc, now: Time| {
            let late = |c: &&Conn| matches!(c.state, State::Idle { since } if now > since + IDLE_LIMIT);
            proc.conns.iter().find(late).map(|c| c.id)
        };
        if let Some(conn) = late(&self.processes[process], self.now) {
            self.shut(process, conn);
        }
        let demand = self.demand(process);
        if let Some(conn) = idle(&self.processes[process]) {
            let is_needed = self.processes[process].hunger > self.lent(process);
            if self.processes[process].is_draining {
                self.shut(process, conn);
                return self.turn(process);
            } else if is_needed {
                return self.offer(process, conn);
            } else if self.processes[process].member.gives_idle(now, entropy, &demand) {
                self.shut(process, conn);
            } else if !self.is_asking(process)
                && let Some(errand) = self.processes[process].member.errand(now, &demand)
            {
                self.send(process, conn, errand);
            }
        }
        let demand = self.demand(process);
        let is_probing = self.processes[process]
            .conns
            .iter()
            .any(|c| matches!(c.state, State::Proving(_) | State::LoggingIn { probe: Some(_), .. }));
        if !is_probing && self.processes[process].member.may_probe(now, &demand) {
            let probe = self.processes[process].member.probe(now, demand.open);
            self.dial(process, Some(probe), None);
        }
    }

    fn lent(&self, process: usize) -> u32 {
        let lent = self.processes[process].conns.iter().filter(|c| matches!(c.state, State::Lent)).count();
        u32::try_from(lent).unwrap()
    }

    fn is_asking(&self, process: usize) -> bool {
        let asks = |c: &Conn| matches!(c.state, State::Asking(_) | State::Carrying { .. });
        self.processes[process].conns.iter().any(asks)
    }

    fn note_hunger(&mut self, process: usize) {
        let now = self.now;
        let proc = &mut self.processes[process];
        let is_served = |c: &Conn| {
            matches!(
                c.state,
                State::Lent | State::Idle { .. } | State::Asking(_) | State::Carrying { .. } | State::Retagging
            )
        };
        let is_starving = proc.hunger > 0 && !proc.conns.iter().any(is_served);
        match (is_starving, proc.starving) {
            (true, None) => proc.starving = Some(now),
            (false, Some(since)) => {
                proc.starving = None;
                if self.is_calm {
                    self.outcome.longest_wait = self.outcome.longest_wait.max(now - since.max(self.calm_since));
                }
            }
            _ => {}
        }
    }

    /// The process loses sight of a connection that is gone.
    fn lose(&mut self, process: usize, conn: u32) {
        self.shut(process, conn);
        let (now, entropy) = (duration(self.now), self.rng.random());
        self.processes[process].member.unanswered(now, entropy);
    }

    fn send(&mut self, process: usize, conn: u32, errand: Errand) {
        let Some(c) = self.conn(process, conn) else { return };
        c.state = State::Asking(errand);
        let session = c.session.unwrap();
        let way = self.way();
        let lock = matches!(errand, Errand::Grow(_));
        self.after(way, Event::Ask { session, process, conn, name: None, lock });
    }

    fn send_probe(&mut self, process: usize, conn: u32, mark: Mark, delay: Time) {
        let Some(c) = self.conn(process, conn) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        let name = Some(self.processes[process].member.tag(number, mark));
        let way = self.way();
        self.after(way + delay, Event::Ask { session, process, conn, name, lock: true });
    }

    /// A connection that nobody has.
    fn offer(&mut self, process: usize, conn: u32) {
        let now = duration(self.now);
        let entropy = self.rng.random();
        let demand = self.demand(process);
        let session = self.conn(process, conn).and_then(|c| c.session).unwrap();
        if let Some(session) = self.sessions.get(session)
            && !session.stays
        {
            self.fault = Some(format!("a connection of {process} is lent that has not proven itself"));
            return;
        }
        if self.processes[process].is_draining || !self.sessions.contains(session) {
            self.shut(process, conn);
            return self.turn(process);
        }
        if self.processes[process].member.gives(now, entropy, demand.open) {
            self.tell(|| format!("-- {process} gives back {conn}"));
            self.shut(process, conn);
            return self.turn(process);
        }
        if !self.is_asking(process)
            && let Some(errand) = self.processes[process].member.errand(now, &demand)
        {
            return self.send(process, conn, errand);
        }
        let is_needed = self.processes[process].hunger > self.lent(process);
        let takes = self.rng.random_range(50 * MS..400 * MS);
        let takes_name = !self.is_calm && self.rng.random_ratio(1, 20);
        let time = self.now;
        let Some(c) = self.conn(process, conn) else { return };
        if !is_needed {
            c.state = State::Idle { since: time };
            return;
        }
        c.state = State::Lent;
        if takes_name && let Some(session) = self.sessions.get_mut(session) {
            session.name = "a client's own".to_owned();
        }
        self.after(takes, Event::Released { process, conn });
        self.note_hunger(process);
    }

    fn released(&mut self, process: usize, conn: u32) {
        let Some(c) = self.conn(process, conn) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        if self.sessions.get(session).is_some_and(|s| !s.name.starts_with('[')) {
            if let Some(c) = self.conn(process, conn) {
                c.state = State::Retagging;
            }
            let name = self.processes[process].member.tag(number, Mark::Plain);
            let way = self.way();
            return self.after(way, Event::Tag { session, process, conn, claims: 0, name, landed: None });
        }
        self.offer(process, conn);
    }

    fn logged_in(&mut self, process: usize, conn: u32, session: Option<usize>) {
        let (now, entropy) = (duration(self.now), self.rng.random());
        let Some(c) = self.conn(process, conn) else { return };
        c.session = session;
        let State::LoggingIn { probe, carrier } = &c.state else { return };
        let (probe, carrier) = (*probe, *carrier);
        if session.is_none() {
            self.processes[process].member.refused(now, entropy);
            self.shut(process, conn);
            if let Some(carrier) = carrier {
                self.land(process, carrier, None);
            }
            return self.turn(process);
        }
        self.processes[process].member.logged_in();
        match (probe, carrier) {
            (Some(probe), _) => self.test(process, conn, probe),
            (None, Some(carrier)) if self.conn(process, carrier).is_some() => {
                if let Some(c) = self.conn(process, conn) {
                    c.state = State::Landed;
                }
                self.land(process, carrier, Some(conn));
            }
            // What carried its claim is gone.
            (None, _) => {
                let probe = self.processes[process].member.probe(now, 0);
                self.test(process, conn, probe);
            }
        }
    }

    fn test(&mut self, process: usize, conn: u32, probe: Probe) {
        if let Some(c) = self.conn(process, conn) {
            c.state = State::Proving(probe);
        }
        self.send_probe(process, conn, Mark::Proving, 0);
    }

    /// A login with a claim is over, well (the connection) or not.
    fn land(&mut self, process: usize, carrier: u32, conn: Option<u32>) {
        let Some(c) = self.conn(process, carrier) else { return };
        let State::Carrying { out, landed, .. } = &mut c.state else { return };
        *out -= 1;
        landed.extend(conn);
        self.carry_on(process, carrier);
    }

    /// What has not logged in by now has no claim any more.
    fn carried(&mut self, process: usize, conn: u32) {
        for late in &mut self.processes[process].conns {
            match &mut late.state {
                State::LoggingIn { carrier, .. } if *carrier == Some(conn) => *carrier = None,
                State::Carrying { out, .. } if late.id == conn => *out = 0,
                _ => {}
            }
        }
        if self.conn(process, conn).is_some_and(|c| matches!(c.state, State::Carrying { .. })) {
            self.carry_on(process, conn);
        }
    }

    /// Takes the next claim off, or ends the errand.
    fn carry_on(&mut self, process: usize, carrier: u32) {
        let Some(c) = self.conn(process, carrier) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        let State::Carrying { claims, out, landed, telling } = &mut c.state else { return };
        if telling.is_some() {
            return;
        }
        let next = landed.pop();
        if next.is_none() && *out > 0 {
            return;
        }
        if next.is_none() && *claims == 0 {
            return self.offer(process, carrier);
        }
        // Those that failed are taken off with the last.
        *claims = if next.is_some() { *claims - 1 } else { 0 };
        if *out == 0 && landed.is_empty() {
            *claims = 0;
        }
        *telling = next;
        let left = *claims;
        if next.is_none() {
            *telling = Some(u32::MAX);
        }
        let mark = if left > 0 { Mark::Claims(left) } else { Mark::Plain };
        let name = self.processes[process].member.tag(number, mark);
        let landed = next.and_then(|n| self.conn(process, n)).and_then(|c| c.session);
        let way = self.way();
        self.after(way, Event::Tag { session, process, conn: carrier, claims: left, name, landed });
    }

    fn tagged(&mut self, process: usize, conn: u32, is_well: bool) {
        let Some(c) = self.conn(process, conn) else { return };
        let told = match &mut c.state {
            State::Retagging if is_well => return self.offer(process, conn),
            State::Carrying { telling, .. } if is_well => telling.take(),
            State::Carrying { telling, landed, .. } => {
                // Each has to prove itself.
                let unsure: Vec<u32> = landed.drain(..).chain(telling.take()).collect();
                self.lose(process, conn);
                let now = duration(self.now);
                for conn in unsure {
                    if self.conn(process, conn).is_some() {
                        let probe = self.processes[process].member.probe(now, 0);
                        self.test(process, conn, probe);
                    }
                }
                return self.turn(process);
            }
            _ => {
                self.lose(process, conn);
                return self.turn(process);
            }
        };
        if let Some(told) = told.filter(|n| self.processes[process].conns.iter().any(|c| c.id == *n)) {
            self.offer(process, told);
        }
        self.carry_on(process, conn);
    }

    fn counted(&mut self, process: usize, conn: u32, outcome: Option<Box<(bool, Census)>>) {
        let (now, entropy) = (duration(self.now), self.rng.random());
        let Some((locked, census)) = outcome.map(|outcome| *outcome) else {
            self.lose(process, conn);
            return self.turn(process);
        };
        let Some(at) = self.processes[process].conns.iter().position(|c| c.id == conn) else { return };
        let proc = &mut self.processes[process];
        let (session, number) = (proc.conns[at].session.unwrap(), proc.conns[at].number);
        let answer = match &mut proc.conns[at].state {
            State::Asking(Errand::Look) => {
                proc.member.look(now, entropy, &census);
                return self.offer(process, conn);
            }
            State::Asking(Errand::Grow(wanted)) => match proc.member.claim(now, entropy, *wanted, locked, &census) {
                0 => Answer::Nothing,
                claims => Answer::Claim(claims),
            },
            State::Proving(probe) => match proc.member.prove(now, entropy, probe, locked, &census) {
                Verdict::Stays => Answer::Stay,
                Verdict::Again(mark, _) => Answer::Mark(mark),
                Verdict::Leaves => {
                    self.shut(process, conn);
                    return self.turn(process);
                }
            },
            _ => return,
        };
        let mark = match answer {
            Answer::Claim(claims) => Mark::Claims(claims),
            Answer::Mark(mark) => mark,
            Answer::Nothing | Answer::Stay => Mark::Plain,
        };
        let name = proc.member.tag(number, mark);
        let way = self.way();
        self.after(way, Event::Answer { session, process, conn, answer, name });
    }

    fn answered(&mut self, process: usize, conn: u32, answer: &Answer, is_well: bool) {
        if !is_well {
            self.lose(process, conn);
            return self.turn(process);
        }
        let Some(c) = self.conn(process, conn) else { return };
        match answer {
            Answer::Nothing | Answer::Stay => self.offer(process, conn),
            Answer::Claim(claims) => {
                c.state = State::Carrying { claims: *claims, out: *claims, landed: Vec::new(), telling: None };
                for _ in 0..*claims {
                    self.dial(process, None, Some(conn));
                }
                self.after(CARRY_LIMIT, Event::Carried { process, conn });
            }
            Answer::Mark(mark) => {
                let delay = match mark {
                    Mark::Waiting(_) => self.plan.period / 8,
                    _ => self.rng.random_range(5 * MS..50 * MS),
                };
                self.send_probe(process, conn, *mark, delay);
            }
        }
        self.turn(process);
    }
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
        sum.longest_wait = sum.longest_wait.max(outcome.longest_wait);
        sum.patience = sum.patience.max(outcome.patience);
        sum.rests += outcome.rests;
        sum.late_logins += outcome.late_logins * outcome.rests;
        sum.most = sum.most.max(outcome.most);
    }
    Ok(sum)
}

#[test]
fn the_cap_holds_in_ten_thousand_fleets_where_everything_goes_wrong() {
    if let Ok(seed) = std::env::var("FLEET_SEED") {
        println!("{:?}", World::play(seed.parse().unwrap(), None, true).unwrap());
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
    assert!(outcome.patience > 50, "nobody had to wait for a turn: {outcome:?}");
    // One in a thousand has its last step still to go.
    assert!(outcome.late_logins * 1000 <= outcome.rests, "fleets at rest open connections: {outcome:?}");
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
            is_broken: false,
        };
        let outcome = World::play(seed, Some(plan), false);
        println!("{outcome:?}");
        outcome.unwrap_or_else(|fault| panic!("{fault}"));
    }
}
