//! The server of a simulated fleet: its sessions, what they see, and what has to hold there.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};

use super::process::Answer;
use super::{Event, MS, SECOND, Time, World, duration};
use crate::budget::census::{Census, Process, Row, Scope};
use crate::budget::headroom;
use crate::budget::tag::{self, Mark};

/// After this the server ends a transaction that waits for its client.
const TRANSACTION_LIMIT: Time = 2 * SECOND;

/// A connection, as the server has it.
#[derive(Debug)]
pub(super) struct Session {
    /// None is a foreigner's.
    pub(super) process: Option<usize>,
    pub(super) database: u32,
    pub(super) role: u32,
    pub(super) name: String,
    pub(super) born: Time,
    pub(super) transaction: Option<Transaction>,
    /// Its member has made sure that it may stay.
    pub(super) stays: bool,
    /// Logins that its tag stands for, until this.
    pub(super) claims: u32,
    pub(super) claims_until: u64,
    pub(super) waits: bool,
    /// When it was first known to.
    pub(super) waits_since: Option<Time>,
    /// It is a probe that neither stays nor goes after so many looks.
    pub(super) looks: u32,
}

impl Session {
    /// One that has just begun; of a foreigner's if of no process.
    pub(super) fn new(process: Option<usize>, database: u32, role: u32, name: String, born: Time) -> Self {
        Self {
            process,
            database,
            role,
            name,
            born,
            transaction: None,
            stays: false,
            claims: 0,
            claims_until: 0,
            waits: false,
            waits_since: None,
            looks: 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) number: u64,
    pub(super) has_lock: bool,
    /// Foreigners in each scope when the census was taken, without those that have gone since: others may have taken their
    /// place.
    pub(super) foreign: [u32; 4],
}

/// The server's connections, by numbers that are never used again.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    pub(super) all: BTreeMap<usize, Session>,
    pub(super) next: usize,
}

impl Sessions {
    pub(super) fn insert(&mut self, session: Session) -> usize {
        self.next += 1;
        self.all.insert(self.next, session);
        self.next
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        self.all.contains_key(&number)
    }

    pub(super) fn get(&self, number: usize) -> Option<&Session> {
        self.all.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Session> {
        self.all.get_mut(&number)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &Session)> {
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

impl World {
    pub(super) fn in_scope(scope: Scope, of: (u32, u32), session: &Session) -> bool {
        Self::counts(scope, of, (session.database, session.role))
    }

    /// Whether the limits of one database and role count a session of another.
    fn counts(scope: Scope, of: (u32, u32), (database, role): (u32, u32)) -> bool {
        match scope {
            Scope::Role => role == of.1,
            Scope::Database => database == of.0,
            Scope::Server | Scope::Fleet => true,
        }
    }

    pub(super) fn has_room(&self, database: u32, role: u32) -> bool {
        [Scope::Role, Scope::Database, Scope::Server].into_iter().all(|scope| {
            let count = self.sessions.iter().filter(|(_, s)| Self::in_scope(scope, (database, role), s)).count();
            self.plan.limit(scope).is_none_or(|limit| count < limit as usize)
        })
    }

    pub(super) fn end_session(&mut self, session: usize) {
        let gone = self.sessions.all.remove(&session);
        if gone.is_some_and(|gone| gone.process.is_none()) {
            let foreign: Vec<(u32, u32)> =
                self.sessions.iter().filter(|(_, s)| s.process.is_none()).map(|(_, s)| (s.database, s.role)).collect();
            for s in self.sessions.all.values_mut() {
                let of = (s.database, s.role);
                let Some(transaction) = &mut s.transaction else { continue };
                for (scope, known) in Scope::ALL.into_iter().zip(&mut transaction.foreign) {
                    let left = foreign.iter().filter(|other| Self::counts(scope, of, **other)).count();
                    *known = (*known).min(u32::try_from(left).unwrap());
                }
            }
        }
    }

    pub(super) fn login(&mut self, process: usize, conn: u32, name: String) {
        let (database, role) = (self.processes[process].database, self.processes[process].role);
        if !self.has_room(database, role) {
            self.outcome.refusals += 1;
            let way = self.way();
            return self.after(way, Event::LoggedIn { process, conn, session: None });
        }
        self.outcome.logins += 1;
        self.outcome.late_logins += u64::from(self.is_calm && self.now > self.calm_since + self.plan.calm * 3 / 4);
        let session = self.sessions.insert(Session::new(Some(process), database, role, name, self.now));
        let there = u32::try_from(self.sessions.all.len()).unwrap();
        self.outcome.most = self.outcome.most.max(there);
        self.outcome.beyond = self.outcome.beyond.max(there.saturating_sub(self.plan.fleet.unwrap_or(there)));
        if !self.processes[process].is_alive {
            return self.after(MS, Event::Close { session });
        }
        let way = self.way();
        self.after(way, Event::LoggedIn { process, conn, session: Some(session) });
    }

    pub(super) fn ask(&mut self, session: usize, process: usize, conn: u32, name: Option<String>, lock: bool) {
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
        census.now = self.clock();
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

    pub(super) fn answer(&mut self, session: usize, process: usize, conn: u32, answer: &Answer, name: String) {
        let way = self.way();
        let Some(transaction) = self.sessions.get_mut(session).and_then(|s| s.transaction.take()) else {
            return self.after(way, Event::Answered { process, conn, answer: answer.clone(), is_well: false });
        };
        let s = &mut self.sessions[session];
        match answer {
            Answer::Nothing => {}
            Answer::Claim(claims, until) => {
                (s.claims, s.claims_until) = (*claims, *until);
                s.name = name;
            }
            Answer::Stay => {
                s.stays = true;
                (s.waits, s.looks) = (false, 0);
                s.name = name;
            }
            Answer::Mark(mark) => {
                s.waits = matches!(mark, Mark::Waiting(_));
                s.looks += 1;
                s.name = name;
            }
        }
        let of = (s.database, s.role);
        if matches!(answer, Answer::Claim(1.., _) | Answer::Stay) {
            self.check_cap(of, &transaction.foreign);
        }
        if matches!(answer, Answer::Mark(Mark::Waiting(_))) {
            self.check_wait(session);
            self.check_places(of);
        }
        if matches!(answer, Answer::Mark(_)) {
            self.check_probes(of, &transaction.foreign);
        }
        self.after(way, Event::Answered { process, conn, answer: answer.clone(), is_well: true });
    }

    /// However many there are already, one more was taken: all that may stay and all that is claimed has to fit.
    pub(super) fn check_cap(&mut self, of: (u32, u32), foreign: &[u32; 4]) {
        let clock = self.clock();
        for (scope, foreign) in Scope::ALL.into_iter().zip(foreign) {
            let Some(limit) = self.plan.limit(scope) else { continue };
            let cap = limit - headroom(limit);
            let counts = |s: &&Session| s.process.is_some() && Self::in_scope(scope, of, s);
            let all = self.sessions.iter().map(|(_, s)| s).filter(counts);
            let claims = |s: &Session| if s.claims_until > clock { s.claims } else { 0 };
            let taken: u32 = all.map(|s| u32::from(s.stays) + claims(s)).sum();
            if taken + foreign > cap {
                self.fault = Some(format!(
                    "{taken} connections and claims and {foreign} of foreigners, {cap} are for them: {scope:?}"
                ));
            }
        }
    }

    /// A probe waits for a period at most, if nothing goes wrong.
    fn check_wait(&mut self, session: usize) {
        let (now, period) = (self.now, self.plan.period);
        let since = *self.sessions[session].waits_since.get_or_insert(now);
        // Its last look was on its way to the server, and back.
        if since > self.calm_since && self.is_calm && now > since + period + 10 * MS {
            self.fault = Some(format!("session {session} waits for longer than a period, since {since}"));
        }
    }

    pub(super) fn check_places(&mut self, of: (u32, u32)) {
        for scope in Scope::ALL {
            let Some(limit) = self.plan.limit(scope) else { continue };
            let is_up = |s: &Session| {
                s.process.is_some_and(|n| self.processes[n].is_alive && self.processes[n].stopped_until <= self.now)
            };
            let counts = |s: &&Session| s.waits && is_up(s) && s.database == of.0 && Self::in_scope(scope, of, s);
            let waiting = self.sessions.iter().map(|(_, s)| s).filter(counts).count();
            // One may have come for longest, while the one that is to leave for it has not looked yet.
            let places = (headroom(limit) as usize / 2).max(1) + 1;
            // The one of a process that went on a moment ago is stale to the others.
            if waiting > places + usize::from(self.plan.faults > 0) * 2 {
                self.fault = Some(format!("{waiting} probes wait in {places} places: {scope:?}"));
            }
        }
    }

    /// What waits or lasts for longer than two looks stays within the limit, whatever looks and goes: where not all fit, no more
    /// probes last than there are places to wait, and one.
    fn check_probes(&mut self, of: (u32, u32), foreign: &[u32; 4]) {
        let clock = self.clock();
        for (scope, foreign) in Scope::ALL.into_iter().zip(foreign) {
            let Some(limit) = self.plan.limit(scope) else { continue };
            let is_up = |s: &Session| {
                s.process.is_some_and(|n| self.processes[n].is_alive && self.processes[n].stopped_until <= self.now)
            };
            let own = self.sessions.iter().map(|(_, s)| s);
            let own: Vec<&Session> = own.filter(|s| s.process.is_some() && Self::in_scope(scope, of, s)).collect();
            let claims = |s: &Session| if s.claims_until > clock { s.claims } else { 0 };
            let taken: u32 = own.iter().map(|s| u32::from(s.stays) + claims(s)).sum();
            let probes = u32::try_from(own.iter().filter(|s| (s.waits || s.looks > 1) && is_up(s)).count()).unwrap();
            self.outcome.probes = self.outcome.probes.max(probes);
            // See `check_places`.
            let places = (headroom(limit) / 2).max(1) + 1;
            // The one of a process that went on a moment ago is stale to the others.
            let slack = u32::from(self.plan.faults > 0) * 2;
            if taken + foreign + probes > limit && probes > places + slack {
                self.fault =
                    Some(format!("{probes} probes last beside {taken} and {foreign}, for {places} places: {scope:?}"));
            }
        }
    }

    pub(super) fn tag(
        &mut self,
        session: usize,
        process: usize,
        conn: u32,
        claims: u32,
        name: String,
        landed: Option<usize>,
    ) {
        let clock = self.clock();
        // Taking a claim off for somebody who has logged in fails when its time is over.
        let in_time = |s: &Session| landed.is_none() || s.claims_until > clock;
        let is_well = self.sessions.get(session).is_some_and(in_time);
        if let Some(s) = self.sessions.get_mut(session).filter(|_| is_well) {
            s.claims = claims;
            s.name = name;
        }
        self.outcome.late += u64::from(!is_well && self.sessions.contains(session));
        if let Some(landed) = landed.filter(|_| is_well).and_then(|n| self.sessions.get_mut(n)) {
            landed.stays = true;
        }
        let way = self.way();
        self.after(way, Event::Tagged { process, conn, is_well });
    }
}
