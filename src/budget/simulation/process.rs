//! A process of a simulated fleet: what its pool does with the product's decisions.

use std::time::Duration;

use rand::RngExt;

use super::{Event, MS, SECOND, Time, World, duration};
use crate::budget::census::Census;
use crate::budget::member::{Demand, Errand, Member, Probe, Verdict};
use crate::budget::tag::Mark;

/// So long a connection is kept for its claims.
const CARRY_LIMIT: Time = 2 * SECOND;

/// Idle connections are closed after this.
const IDLE_LIMIT: Time = 3 * SECOND;

/// The same where its process gives way.
const LINGER: Time = SECOND;

/// A connection, as its process has it.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) id: u32,
    pub(super) number: u32,
    pub(super) session: Option<usize>,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
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
        until: u64,
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
pub(super) struct Proc {
    pub(super) member: Member,
    pub(super) database: u32,
    pub(super) role: u32,
    pub(super) is_alive: bool,
    pub(super) is_draining: bool,
    /// It is asked to end, and has clients all the same.
    pub(super) gives_way: bool,
    pub(super) stopped_until: Time,
    pub(super) conns: Vec<Conn>,
    pub(super) next: u32,
    /// Clients that want a connection.
    pub(super) hunger: u32,
    /// Since when there is none for any of them.
    pub(super) starving: Option<Time>,
}

/// What the process answers to a census.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Nothing,
    Claim(u32, u64),
    Stay,
    Mark(Mark),
}

impl World {
    pub(super) fn demand(&self, process: usize) -> Demand {
        let proc = &self.processes[process];
        let open = u32::try_from(proc.conns.len()).unwrap();
        let idle = proc.conns.iter().filter(|conn| matches!(conn.state, State::Idle { .. })).count();
        let oldest = if proc.hunger > open { Duration::from_secs(1) } else { Duration::ZERO };
        let oldest = oldest.max(duration(proc.starving.map_or(0, |since| self.now - since)));
        Demand { wanted: proc.hunger.saturating_sub(open), oldest, open, idle: u32::try_from(idle).unwrap() }
    }

    pub(super) fn conn(&mut self, process: usize, conn: u32) -> Option<&mut Conn> {
        self.processes[process].conns.iter_mut().find(|c| c.id == conn)
    }

    pub(super) fn dial(&mut self, process: usize, probe: Option<Probe>, carrier: Option<u32>) {
        let is_calm = self.is_calm;
        let proc = &mut self.processes[process];
        let id = proc.next;
        proc.next += 1;
        let number = proc.member.number();
        let name = proc.member.tag(number, proc.member.mark());
        proc.conns.push(Conn { id, number, session: None, state: State::LoggingIn { probe, carrier } });
        let slow = !is_calm && self.plan.faults > 0 && self.rng.random_ratio(1, 20);
        let takes = if slow { self.rng.random_range(MS..4 * SECOND) } else { self.rng.random_range(MS..40 * MS) };
        self.after(takes, Event::Login { process, conn: id, name });
    }

    pub(super) fn shut(&mut self, process: usize, conn: u32) {
        let proc = &mut self.processes[process];
        let Some(at) = proc.conns.iter().position(|c| c.id == conn) else { return };
        let gone = proc.conns.swap_remove(at);
        if let Some(session) = gone.session {
            let way = self.way();
            self.after(way, Event::Close { session });
        }
    }

    /// What the pool does at a tick and whenever something has changed.
    pub(super) fn turn(&mut self, process: usize) {
        let now = duration(self.now);
        let entropy = self.rng.random();
        self.note_hunger(process);
        let idle = |proc: &Proc| {
            let state = |c: &&Conn| matches!(c.state, State::Idle { .. });
            proc.conns.iter().find(state).map(|c| c.id)
        };
        let late = |proc: &Proc, now: Time| {
            let limit = if proc.gives_way { LINGER } else { IDLE_LIMIT };
            let late = |c: &&Conn| matches!(c.state, State::Idle { since } if now > since + limit);
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
            } else if self.processes[process].gives_way {
                // It is closed soon.
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
            let probe = self.processes[process].member.probe(now, &demand);
            self.dial(process, Some(probe), None);
        }
    }

    pub(super) fn lent(&self, process: usize) -> u32 {
        let lent = self.processes[process].conns.iter().filter(|c| matches!(c.state, State::Lent)).count();
        u32::try_from(lent).unwrap()
    }

    pub(super) fn is_asking(&self, process: usize) -> bool {
        let asks = |c: &Conn| matches!(c.state, State::Asking(_) | State::Carrying { .. });
        self.processes[process].conns.iter().any(asks)
    }

    pub(super) fn note_hunger(&mut self, process: usize) {
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
    pub(super) fn lose(&mut self, process: usize, conn: u32) {
        self.shut(process, conn);
        let (now, entropy) = (duration(self.now), self.rng.random());
        self.processes[process].member.unanswered(now, entropy);
    }

    pub(super) fn send(&mut self, process: usize, conn: u32, errand: Errand) {
        let Some(c) = self.conn(process, conn) else { return };
        c.state = State::Asking(errand);
        let session = c.session.unwrap();
        let way = self.way();
        let lock = matches!(errand, Errand::Grow(_));
        self.after(way, Event::Ask { session, process, conn, name: None, lock });
    }

    pub(super) fn send_probe(&mut self, process: usize, conn: u32, mark: Mark, delay: Time) {
        let Some(c) = self.conn(process, conn) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        let name = Some(self.processes[process].member.tag(number, mark));
        let way = self.way();
        self.after(way + delay, Event::Ask { session, process, conn, name, lock: true });
    }

    /// A connection that nobody has.
    pub(super) fn offer(&mut self, process: usize, conn: u32) {
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
        let marked = self.sessions.get(session).is_none_or(|s| s.name.ends_with("!]"));
        if self.processes[process].gives_way && !marked {
            return self.retag(process, conn);
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

    pub(super) fn released(&mut self, process: usize, conn: u32) {
        let Some(session) = self.conn(process, conn).and_then(|c| c.session) else { return };
        if self.sessions.get(session).is_some_and(|s| !s.name.starts_with('[')) {
            return self.retag(process, conn);
        }
        self.offer(process, conn);
    }

    /// Has a connection say whose it is.
    fn retag(&mut self, process: usize, conn: u32) {
        let Some(c) = self.conn(process, conn) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        c.state = State::Retagging;
        let member = &self.processes[process].member;
        let name = member.tag(number, member.mark());
        let way = self.way();
        self.after(way, Event::Tag { session, process, conn, claims: 0, name, landed: None });
    }

    pub(super) fn logged_in(&mut self, process: usize, conn: u32, session: Option<usize>) {
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
                let probe = self.processes[process].member.probe(now, &Demand::default());
                self.test(process, conn, probe);
            }
        }
    }

    pub(super) fn test(&mut self, process: usize, conn: u32, probe: Probe) {
        if let Some(c) = self.conn(process, conn) {
            c.state = State::Proving(probe);
        }
        let now = duration(self.now);
        let mark = self.processes[process].member.first_mark(now, &probe);
        self.send_probe(process, conn, mark, 0);
    }

    /// A login with a claim is over, well (the connection) or not.
    pub(super) fn land(&mut self, process: usize, carrier: u32, conn: Option<u32>) {
        let Some(c) = self.conn(process, carrier) else { return };
        let State::Carrying { out, landed, .. } = &mut c.state else { return };
        *out -= 1;
        landed.extend(conn);
        self.carry_on(process, carrier);
    }

    /// What has not logged in by now has no claim any more.
    pub(super) fn carried(&mut self, process: usize, conn: u32) {
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
    pub(super) fn carry_on(&mut self, process: usize, carrier: u32) {
        let Some(c) = self.conn(process, carrier) else { return };
        let (session, number) = (c.session.unwrap(), c.number);
        let State::Carrying { claims, until, out, landed, telling } = &mut c.state else { return };
        let until = *until;
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
        let member = &self.processes[process].member;
        let mark = if left > 0 { Mark::Claims(left, until) } else { member.mark() };
        let name = member.tag(number, mark);
        let landed = next.and_then(|n| self.conn(process, n)).and_then(|c| c.session);
        let way = self.way();
        self.after(way, Event::Tag { session, process, conn: carrier, claims: left, name, landed });
    }

    pub(super) fn tagged(&mut self, process: usize, conn: u32, is_well: bool) {
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
                        let probe = self.processes[process].member.probe(now, &Demand::default());
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

    pub(super) fn counted(&mut self, process: usize, conn: u32, outcome: Option<Box<(bool, Census)>>) {
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
                claims => Answer::Claim(claims, census.claims_until()),
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
            Answer::Claim(claims, until) => Mark::Claims(claims, until),
            Answer::Mark(mark) => mark,
            Answer::Nothing | Answer::Stay => proc.member.mark(),
        };
        let name = proc.member.tag(number, mark);
        let way = self.way();
        self.after(way, Event::Answer { session, process, conn, answer, name });
    }

    pub(super) fn answered(&mut self, process: usize, conn: u32, answer: &Answer, is_well: bool) {
        if !is_well {
            self.lose(process, conn);
            return self.turn(process);
        }
        let Some(c) = self.conn(process, conn) else { return };
        match answer {
            Answer::Nothing | Answer::Stay => self.offer(process, conn),
            Answer::Claim(claims, until) => {
                c.state =
                    State::Carrying { claims: *claims, until: *until, out: *claims, landed: Vec::new(), telling: None };
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
