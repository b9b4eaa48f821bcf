//! One follower: what it told, what that proves, and whether it is in or out.

use std::rc::Rc;

use super::history::History;
use super::{FollowerSample, Incarnation, Missing, Need, Next, Policy, Position};
use crate::clock::Moment;
use crate::mutant::{Guard, lacks};
use crate::stats::{FollowerGauges, FollowerState};

/// What was told is not relied on for longer, whatever a read needs; microseconds.
const HEARD_MAX: u64 = 5_000_000;

/// A follower that failed stays out for so long; each further failure doubles it. Microseconds.
const FIRST_PAUSE: u64 = 100_000;

/// And for so long at most.
const LONGEST_PAUSE: u64 = 30_000_000;

/// So long it takes until one that is back has its whole share again, and until its failures are forgotten; microseconds.
const RETURN: u64 = 10_000_000;

/// What is no follower may have become one after so long; microseconds.
const LOOK_AGAIN: u64 = 1_000_000;

/// A whole share of a follower of weight 1.
const SHARE: u64 = 1024;

/// The share of one that is just back.
const FIRST_SHARE: u64 = SHARE / 16;

/// What is proven of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// Nothing.
    #[default]
    Unknown,
    /// It follows the primary, and has replayed all up to the moment.
    Proven(Option<Moment>),
    /// It has the primary's system identifier and is not past it, and may yet be on an older timeline.
    Unshown,
    /// It is none; in this life it will not be.
    Not(FollowerState),
}

#[derive(Debug)]
pub(super) struct Follower {
    weight: u32,
    standing: Standing,
    life: Option<Rc<Incarnation>>,
    /// Grows whenever what was known is forgotten.
    turn: u32,
    heard: Option<Moment>,
    /// What it has replayed; told while it was proven to follow the primary.
    position: Option<Position>,
    lag_us: Option<u64>,
    lag_bytes: Option<u64>,
    is_lagging: bool,
    /// Failures in a row, with less than [`RETURN`] in between.
    failures: u32,
    /// Out until then, and until it has answered after that.
    out: Option<Moment>,
    back: Option<Moment>,
    /// Reads that it was chosen for, scaled by its share; equal for all in the long run.
    served: u64,
}

impl Follower {
    pub(super) fn new(weight: u32) -> Self {
        Self {
            weight: weight.max(1),
            standing: Standing::default(),
            life: None,
            turn: 0,
            heard: None,
            position: None,
            lag_us: None,
            lag_bytes: None,
            is_lagging: false,
            failures: 0,
            out: None,
            back: None,
            served: 0,
        }
    }

    /// Forgets what was known of positions.
    pub(super) fn forget(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        self.standing = Standing::Unknown;
        self.position = None;
        (self.lag_us, self.lag_bytes) = (None, None);
    }

    pub(super) fn is_life_of(&self, life: &Incarnation) -> bool {
        self.life.as_ref().is_some_and(|own| own.is_told() && own.is_life_of(life))
    }

    pub(super) fn vouches(&self, turn: u32, life: &Rc<Incarnation>) -> bool {
        self.turn == turn && self.life.as_ref().is_some_and(|own| Rc::ptr_eq(own, life) || own == life)
    }

    /// Takes in what it told, beside what is known of the primary.
    pub(super) fn take(
        &mut self,
        sample: &FollowerSample,
        primary: Option<(&Incarnation, u32, &History)>,
        is_twin: bool,
        policy: Policy,
    ) -> Next {
        if self.life.as_ref() != Some(&sample.life) {
            self.forget();
            self.life = Some(sample.life.clone());
        }
        let judged = match (primary, sample.position) {
            _ if !sample.in_recovery => Standing::Not(FollowerState::Primary),
            (Some((life, _, _)), _)
                if !sample.life.is_told() || sample.life.system_identifier != life.system_identifier =>
            {
                Standing::Not(FollowerState::OtherSystem)
            }
            _ if is_twin => Standing::Not(FollowerState::Twin),
            _ if !sample.agrees => Standing::Not(FollowerState::OtherSettings),
            (Some((_, timeline, history)), Some(position)) => match self.judge(sample, position, timeline, history) {
                Some(judged) => judged,
                None => return Next::AskPrimary,
            },
            _ => Standing::Unknown,
        };
        let is_kept = matches!((self.standing, judged), (Standing::Proven(_), Standing::Proven(_)));
        if !is_kept && judged != self.standing {
            self.forget();
        }
        self.standing = judged;
        if matches!(judged, Standing::Proven(_)) {
            // What a page's header has follows no record: an idle primary that begins a page writes nothing that is missing here.
            self.position = self.position.max(sample.position.map(Position::reach));
        }
        if let (Some((_, _, history)), Some(position)) = (primary, sample.position) {
            self.note_lag(history, position, policy);
        }
        self.answered(sample.heard);
        Next::Done
    }

    /// None if the primary has to be asked first.
    fn judge(&self, sample: &FollowerSample, position: Position, timeline: u32, history: &History) -> Option<Standing> {
        let other = Standing::Not(FollowerState::OtherHistory);
        // Once on another history, always: the primary's position may grow past it.
        if self.standing == other || sample.timeline.is_some_and(|own| own > timeline) {
            return Some(other);
        }
        let (sent, latest) = history.latest()?;
        if position > latest {
            return (sent >= sample.heard).then_some(other);
        }
        if sample.timeline != Some(timeline) {
            return Some(Standing::Unshown);
        }
        let covered = history.covered_by(position.reach());
        Some(match self.standing {
            Standing::Proven(before) => Standing::Proven(covered.max(before)),
            _ => Standing::Proven(covered),
        })
    }

    /// It has answered, and what it said could not be compared with the primary.
    pub(super) fn unconfirmed(&mut self, sample: &FollowerSample) {
        if self.life.as_ref() == Some(&sample.life) && sample.in_recovery {
            self.answered(sample.heard);
        }
    }

    fn note_lag(&mut self, history: &History, position: Position, policy: Policy) {
        let position = position.reach();
        let (time, bytes) = (history.lag(position), history.latest().map_or(0, |(_, latest)| latest.since(position)));
        (self.lag_us, self.lag_bytes) = (Some(time), Some(bytes));
        // One that was too far behind has to be well within the limit again.
        let part = if self.is_lagging { 2 } else { 1 };
        let exceeds = |lag: u64, limit: Option<u64>| limit.is_some_and(|limit| lag > limit / part);
        self.is_lagging = exceeds(time, policy.max_lag_us) || exceeds(bytes, policy.max_lag_bytes);
    }

    fn answered(&mut self, heard: Moment) {
        self.heard = Some(heard);
        if self.out.is_some_and(|until| until <= heard) {
            self.out = None;
            self.back = Some(heard);
        } else if self.back.is_some_and(|back| heard.since(back) >= RETURN) {
            (self.back, self.failures) = (None, 0);
        }
    }

    pub(super) fn failed(&mut self, now: Moment, entropy: u64) {
        if self.out.is_some_and(|until| until > now) {
            // It is known already: many reads fail at once.
            return;
        }
        let longest = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.out = Some(now.after(longest / 2 + entropy % (longest / 2)));
        self.heard = None;
    }

    pub(super) fn is_due(&self, now: Moment) -> bool {
        // What is none now is looked at more seldom.
        let is_known =
            matches!(self.standing, Standing::Not(_)) && self.heard.is_some_and(|heard| now.since(heard) < LOOK_AGAIN);
        !is_known && self.out.is_none_or(|until| until <= now)
    }

    pub(super) fn is_out(&self) -> bool {
        self.out.is_some()
    }

    /// Whether it has what a read needs, and all before the position `least`.
    pub(super) fn serves(&self, now: Moment, need: Need, least: Option<Position>) -> Result<(), Missing> {
        let is_heard = self.heard.is_some_and(|heard| now.since(heard) <= HEARD_MAX);
        let could = matches!(self.standing, Standing::Proven(_) | Standing::Unshown | Standing::Unknown);
        if self.out.is_some() || self.is_lagging || !could {
            return Err(Missing::Usable);
        }
        let fresh = match (self.standing, need) {
            (Standing::Unknown | Standing::Not(_), _) => false,
            (_, Need::Nothing) => true,
            (Standing::Unshown, _) => false,
            (Standing::Proven(covered), Need::After(stamp)) => {
                lacks(Guard::Freshness) || covered.is_some_and(|covered| stamp.is_none_or(|stamp| covered > stamp))
            }
            (Standing::Proven(covered), Need::Within(age)) => covered.is_some_and(|covered| now.since(covered) <= age),
        };
        let has = least.is_none_or(|least| self.position.is_some_and(|position| position >= least));
        if fresh && has && is_heard { Ok(()) } else { Err(Missing::Fresh) }
    }

    fn share(&self, now: Moment) -> u64 {
        let whole = self.back.map_or(SHARE, |back| {
            (FIRST_SHARE + (SHARE - FIRST_SHARE) * now.since(back).min(RETURN) / RETURN).min(SHARE)
        });
        whole * u64::from(self.weight)
    }

    /// What it has to do, for its share; of equals, what it was chosen for.
    pub(super) fn busy(&self, now: Moment, load: u32) -> (u64, u64) {
        (u64::from(load) * SHARE * 64 / self.share(now), self.served)
    }

    /// It is chosen.
    pub(super) fn serve(&mut self, now: Moment) -> u32 {
        self.served = self.served.saturating_add(SHARE * SHARE / self.share(now));
        self.turn
    }

    pub(super) fn served(&self) -> u64 {
        self.served
    }

    pub(super) fn catch_up(&mut self, most: u64) {
        self.served = self.served.max(most);
    }

    /// Whether it serves what any state of the past will do for.
    pub(super) fn is_in(&self) -> bool {
        self.out.is_none() && !self.is_lagging && matches!(self.standing, Standing::Proven(_) | Standing::Unshown)
    }

    pub(super) fn gauges(&self, now: Moment) -> FollowerGauges {
        let state = match self.standing {
            _ if self.out.is_some() => FollowerState::Out,
            Standing::Unknown => FollowerState::Unknown,
            Standing::Not(state) => state,
            _ if self.is_lagging => FollowerState::Lagging,
            Standing::Unshown => FollowerState::Unshown,
            Standing::Proven(_) => FollowerState::Serving,
        };
        let covered = match self.standing {
            Standing::Proven(covered) => covered,
            _ => None,
        };
        FollowerGauges {
            state,
            lag_us: self.lag_us,
            lag_bytes: self.lag_bytes,
            covered_us: covered.map(|covered| now.since(covered)),
        }
    }
}
