//! A primary and followers that do what they like, and clients that remember what was acknowledged to them: no choice may
//! ever lead to a server that lacks it. Every run follows from its seed.
#![allow(clippy::indexing_slicing, reason = "a test's failure is a panic")]

use std::rc::Rc;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::{FollowerSample, Group, Incarnation, Need, Next, Policy, Position, PrimarySample};
use crate::clock::Moment;
use crate::mutant::{Guard, lacks};

/// Runs of each test.
const RUNS: u64 = 3000;

/// Steps of one run.
const STEPS: usize = 120;

/// How old what a bounded read sees may be; microseconds.
const BOUND: u64 = 200;

/// What the reads of a run have to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// What was acknowledged before some moment.
    After,
    /// What was acknowledged longer ago than [`BOUND`].
    Bounded,
    /// Nothing.
    Eventual,
}

/// A server: what it has, byte by byte, so that histories are compared and not positions.
#[derive(Clone, Debug)]
struct Server {
    log: Vec<u32>,
    life: Rc<Incarnation>,
    timeline: u32,
    /// The primary does not follow.
    follows: Option<usize>,
    /// Replay does not go on.
    paused: bool,
}

struct World {
    rng: SmallRng,
    now: u64,
    /// Lives begun, records made.
    made: u32,
    servers: Vec<Server>,
    /// The one that clients write to.
    primary: usize,
    /// The one that they wrote to before: a connection to it may be left, and nobody has told it.
    old: usize,
    /// What was acknowledged to clients, the last first; and when.
    acknowledged: Vec<(Moment, u32)>,
    group: Group,
    /// The follower of the group by number is this server.
    members: Vec<usize>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = rng.random_range(2..=4);
        let mut world = Self {
            rng,
            now: 0,
            made: 0,
            servers: Vec::new(),
            primary: 0,
            old: 0,
            acknowledged: Vec::new(),
            group: Group::new(vec![1; count - 1], Policy::default()),
            members: (1..count).collect(),
        };
        for at in 0..count {
            let life = world.new_life();
            let follows = (at > 0).then_some(0);
            world.servers.push(Server { log: vec![0], life, timeline: 1, follows, paused: false });
        }
        world
    }

    fn new_life(&mut self) -> Rc<Incarnation> {
        self.made += 1;
        let started = self.made.to_string().into();
        Rc::new(Incarnation { system_identifier: "s".into(), started, address: "".into() })
    }

    fn pass(&mut self, most: u64) -> Moment {
        self.now += self.rng.random_range(1..=most);
        Moment::at(self.now)
    }

    fn position(&self, server: usize) -> Position {
        Position::new(self.servers[server].log.len() as u64)
    }

    fn commit(&mut self) {
        self.made += 1;
        let record = self.made;
        self.servers[self.primary].log.push(record);
        let (at, life) = (self.pass(20), self.servers[self.primary].life.clone());
        self.acknowledged.push((at, record));
        self.group.wrote_on(&life);
    }

    /// Followers take over what they follow, as far as they like.
    fn replay(&mut self) {
        for at in 0..self.servers.len() {
            let Some(source) = self.servers[at].follows.filter(|_| !self.servers[at].paused) else { continue };
            let (theirs, own) = (self.servers[source].log.clone(), self.servers[at].log.len());
            // One that has another history cannot go on.
            if theirs.len() > own && theirs[..own] == self.servers[at].log {
                let to = self.rng.random_range(own..=theirs.len());
                self.servers[at].log = theirs[..to].to_vec();
                self.servers[at].timeline = self.servers[source].timeline;
            }
        }
    }

    /// A restart: a follower comes back behind where it was, a primary with all it had.
    fn restart(&mut self) {
        let at = self.rng.random_range(0..self.servers.len());
        self.servers[at].life = self.new_life();
        if self.servers[at].follows.is_some() {
            let keep = self.rng.random_range(1..=self.servers[at].log.len());
            self.servers[at].log.truncate(keep);
        }
    }

    /// A follower becomes a primary of its own: the one that clients write to from now on, or a fork that nobody meant.
    fn promote(&mut self) {
        let at = self.rng.random_range(0..self.servers.len());
        if self.servers[at].follows.is_none() {
            return;
        }
        let timeline = self.servers.iter().map(|server| server.timeline).max().unwrap_or(0) + 1;
        self.made += 1;
        let (record, server) = (self.made, &mut self.servers[at]);
        (server.follows, server.timeline) = (None, timeline);
        server.log.push(record);
        if self.rng.random_ratio(1, 2) {
            // What only the old one had is lost, and nobody can promise it.
            self.old = std::mem::replace(&mut self.primary, at);
            let log = self.servers[at].log.clone();
            self.acknowledged.retain(|(_, record)| log.contains(record));
        }
    }

    /// A server follows another one from now on; it has to restart for it, and is made a copy if it has another history.
    fn follow(&mut self) {
        let (at, source) = (self.rng.random_range(0..self.servers.len()), self.rng.random_range(0..self.servers.len()));
        if at == source || at == self.primary || self.servers[source].follows.is_some() {
            return;
        }
        let life = self.new_life();
        let theirs = self.servers[source].clone();
        let own = self.servers[at].log.len();
        let is_prefix = theirs.log.len() >= own && theirs.log[..own] == self.servers[at].log;
        let server = &mut self.servers[at];
        (server.life, server.follows) = (life, Some(source));
        if !is_prefix && self.rng.random_ratio(1, 2) {
            (server.log, server.timeline) = (theirs.log[..=theirs.log.len() / 2].to_vec(), theirs.timeline);
        }
    }

    fn ask_primary(&mut self) {
        let sent = self.pass(20);
        // Something may happen between the question and the answer.
        if self.rng.random_ratio(1, 3) {
            self.commit();
        }
        let is_old = self.servers[self.old].follows.is_none() && self.rng.random_ratio(1, 3);
        let asked = if is_old { self.old } else { self.primary };
        let server = &self.servers[asked];
        let sample = PrimarySample {
            sent,
            life: server.life.clone(),
            timeline: server.timeline,
            position: self.position(asked),
        };
        self.pass(20);
        self.group.primary(&sample);
    }

    fn ask_follower(&mut self, at: usize) {
        let server = self.servers[self.members[at]].clone();
        let position = Position::new(server.log.len() as u64);
        if self.rng.random_ratio(1, 3) {
            self.commit();
            self.replay();
        }
        let sample = FollowerSample {
            heard: self.pass(20),
            life: server.life,
            in_recovery: server.follows.is_some(),
            timeline: Some(server.timeline),
            position: Some(position),
            agrees: true,
        };
        if self.group.follower(at, &sample) == Next::AskPrimary {
            self.ask_primary();
            self.group.follower(at, &sample);
        }
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..30 => self.commit(),
            30..50 => self.replay(),
            50..65 => self.ask_primary(),
            65..90 => {
                let at = self.rng.random_range(0..self.members.len());
                self.ask_follower(at);
            }
            90..92 => self.restart(),
            92..93 => self.promote(),
            93..95 => self.follow(),
            95..98 => {
                let at = self.rng.random_range(0..self.servers.len());
                self.servers[at].paused = !self.servers[at].paused;
            }
            _ => {
                let at = self.rng.random_range(0..self.members.len());
                let now = self.pass(20);
                self.group.failed(at, now, 0);
            }
        }
    }

    /// A read that has to see what was acknowledged before a moment, some time after it was decided: whether it was led to a
    /// follower, and whether that one lacks any of it.
    fn read(&mut self, level: Level) -> (bool, bool) {
        let stamp = self.acknowledged.len().checked_sub(1).map(|last| self.rng.random_range(0..=last));
        let (moment, mut seen) = match stamp {
            Some(at) => (Some(self.acknowledged[at].0), at + 1),
            None => (None, 0),
        };
        let now = self.pass(20);
        let need = match level {
            Level::After => Need::After(moment),
            Level::Bounded => Need::Within(BOUND),
            Level::Eventual => Need::Nothing,
        };
        if level == Level::Bounded {
            let is_old = |(at, _): &&(Moment, u32)| now.since(*at) > BOUND;
            seen = self.acknowledged.iter().take_while(is_old).count();
        }
        let Ok((at, seat)) = self.group.choose(now, need, None, |_| 0) else { return (false, false) };
        for _ in 0..self.rng.random_range(0..3) {
            match self.rng.random_range(0..4) {
                0 => self.restart(),
                1 => self.replay(),
                _ => self.ask_follower(at),
            }
        }
        let server = &self.servers[self.members[at]];
        if !self.group.vouches(seat, &server.life) {
            return (false, false);
        }
        let lacks_any = self.acknowledged.iter().take(seen).any(|(_, record)| !server.log.contains(record));
        (true, lacks_any)
    }
}

/// Reads that were led to followers, and those of them that were stale.
fn play(level: Level) -> (u32, u32) {
    let (mut served, mut stale) = (0, 0);
    for seed in 0..RUNS {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
            if world.rng.random_ratio(1, 3) {
                let (is_served, is_stale) = world.read(level);
                served += u32::from(is_served);
                stale += u32::from(is_stale);
                assert!(level == Level::Eventual || lacks(Guard::Freshness) || !is_stale, "seed {seed}");
            }
        }
    }
    (served, stale)
}

#[test]
fn no_choice_leads_to_a_follower_that_lacks_what_was_acknowledged() {
    let (served, stale) = play(Level::After);
    assert!(served > 5_000, "{served} reads were served by followers");
    if lacks(Guard::Freshness) {
        assert!(stale > 0, "nobody noticed that the check is missing");
    } else {
        assert_eq!(stale, 0);
    }
}

#[test]
fn no_bounded_read_lacks_what_was_acknowledged_longer_ago_whichever_of_two_primaries_is_asked() {
    let (served, _) = play(Level::Bounded);
    assert!(served > 5_000, "{served} reads were served by followers");
}

#[test]
fn the_same_reads_are_stale_where_any_state_of_the_past_will_do() {
    let (served, stale) = play(Level::Eventual);
    assert!(served > 5_000 && stale > 100, "{stale} of {served}");
}
