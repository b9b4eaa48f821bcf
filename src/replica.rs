//! What is known of a primary and its followers, and so which of them may serve a read.
//!
//! Nothing here asks anybody, and time is an argument: the pools ask, and hand in what they were told.
//!
//! A follower's freshness is one number, the moment that it covers: the latest moment at which the primary was asked for a
//! position that the follower has replayed by now. Every commit that was acknowledged before that moment is on the follower.
//! It holds for one life of the follower's server and one of the primary's ([`Incarnation`]), and is forgotten with either.
//!
//! A follower is proven by its system identifier, its timeline, and by being behind the primary whenever the two are compared.
//! That tells forks, what follows a fork, and what was left behind by a promotion. It cannot tell two histories that share
//! a system identifier *and* the number of their timeline, for as long as the stranger's position is the lower one: a clone of
//! the disk that was started as it is, without a promotion, and has a follower of its own.

mod follower;
mod history;
#[cfg(test)]
mod simulation;
pub mod watermark;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::rc::Rc;

use crate::clock::Moment;
use crate::stats::FollowerGauges;

use follower::Follower;
use history::History;
use watermark::Watermark;

/// Microseconds.
const SECOND: u64 = 1_000_000;

/// Bytes of the largest pages of a write-ahead log (`wal_block_size`): where such a one begins, a smaller one does, too. Every
/// file begins with one.
const PAGE_MAX: u64 = 64 * 1024;

/// Bytes of the longest header of a page, which is that of a file's first one.
const HEADER_MAX: u64 = 40;

/// One server's life: changes with every restart or change of address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Incarnation {
    /// `pg_control_system().system_identifier`; empty if the server would not tell.
    pub system_identifier: Box<str>,
    /// `pg_postmaster_start_time()`, in microseconds; empty if the server would not tell.
    pub started: Box<str>,
    /// `inet_server_addr()` and port; empty on a Unix socket.
    pub address: Box<str>,
}

impl Incarnation {
    /// Whether both are one process of one server, by whatever address it was reached.
    #[must_use]
    pub fn is_life_of(&self, other: &Self) -> bool {
        self.system_identifier == other.system_identifier && self.started == other.started
    }

    /// A number for this life; 0 if the server did not tell enough for it to be known again.
    #[must_use]
    pub fn number(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.system_identifier, &self.started).hash(&mut hasher);
        if self.is_told() { hasher.finish().max(1) } else { 0 }
    }

    /// Whether the server told enough for it to be known again.
    #[must_use]
    pub fn is_told(&self) -> bool {
        !self.system_identifier.is_empty() && !self.started.is_empty()
    }
}

/// A position in the write-ahead log, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(u64);

impl Position {
    /// So many bytes from the beginning.
    #[must_use]
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Reads `16/B374D848`: two hexadecimal numbers, of which the first counts 4 GiB.
    ///
    /// Source: the Postgres manual, "`pg_lsn` Type".
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (high, low) = std::str::from_utf8(text).ok()?.split_once('/')?;
        let half = |digits: &str| u32::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
        Some(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }

    /// As far as one has come who has replayed all up to here: where a page begins, up to the end of its header. That is where
    /// a primary is that has just begun a file (`archive_timeout`), and behind it a follower would seem to be for as long as
    /// nobody writes.
    ///
    /// Source: the Postgres sources, `GetXLogInsertRecPtr`. A record takes more than [`HEADER_MAX`] bytes with the header in
    /// front of it, so that none ends in between.
    const fn reach(self) -> Self {
        let begins_page = self.0 > 0 && self.0.is_multiple_of(PAGE_MAX);
        if begins_page { Self(self.0 + HEADER_MAX) } else { self }
    }

    /// Bytes from `earlier` to here; 0 if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What a primary told.
#[derive(Clone, Debug)]
pub struct PrimarySample {
    /// When the question was sent.
    pub sent: Moment,
    /// Whose answer it is.
    pub life: Rc<Incarnation>,
    /// Its timeline.
    pub timeline: u32,
    /// Where the next record will be.
    pub position: Position,
}

/// What a follower told.
#[derive(Clone, Debug)]
pub struct FollowerSample {
    /// When the answer was there.
    pub heard: Moment,
    /// Whose answer it is.
    pub life: Rc<Incarnation>,
    /// Whether it follows anybody at all.
    pub in_recovery: bool,
    /// The timeline that it is known to be on; it may be on a later one.
    pub timeline: Option<u32>,
    /// What it has replayed.
    pub position: Option<Position>,
    /// Whether it understands a text as the primary does.
    pub agrees: bool,
}

/// What is to be done with a follower's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing more.
    Done,
    /// It is past what is known of the primary, which is to be asked; then the same answer is to be handed in again.
    AskPrimary,
}

/// How a follower is kept from serving though it is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Lag in microseconds that is too much; none without a limit.
    pub max_lag_us: Option<u64>,
    /// Lag in bytes that is too much; none without a limit.
    pub max_lag_bytes: Option<u64>,
}

/// What a read has to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// All that was acknowledged before, or at, this moment; if there is none, anything that was ever compared with the primary.
    After(Option<Moment>),
    /// All that was acknowledged longer ago than this; microseconds.
    Within(u64),
    /// Any state of the past.
    Nothing,
}

/// Which follower was chosen, and in which of its lives. It is good for that life only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    follower: u32,
    turn: u32,
}

/// Why no follower was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// There is none that could.
    Usable,
    /// Those that could are not known to have what the read needs.
    Fresh,
}

#[derive(Debug)]
struct Primary {
    life: Rc<Incarnation>,
    timeline: u32,
    history: History,
}

/// A primary and its followers.
#[derive(Debug)]
pub struct Group {
    primary: Option<Primary>,
    /// Where the last transaction that may have written ran.
    written: Option<Rc<Incarnation>>,
    followers: Vec<Follower>,
    policy: Policy,
}

impl Group {
    /// Followers of these weights, of which nothing is known.
    #[must_use]
    pub fn new(weights: impl IntoIterator<Item = u32>, policy: Policy) -> Self {
        let followers = weights.into_iter().map(Follower::new).collect();
        Self { primary: None, written: None, followers, policy }
    }

    /// The primary was asked. False if whoever answered is on an older timeline than the primary that is known: what was
    /// behind the same name before.
    pub fn primary(&mut self, sample: &PrimarySample) -> bool {
        let is_same = |known: &Primary| known.life == sample.life && known.timeline == sample.timeline;
        if let Some(known) = self.primary.as_mut().filter(|known| is_same(known))
            && known.history.note(sample.sent, sample.position)
        {
            return true;
        }
        if self.primary.as_ref().is_some_and(|known| sample.timeline < known.timeline) {
            return false;
        }
        self.forget();
        // So that the older ones reach back for twice the limit.
        let distance = self.policy.max_lag_us.map_or(SECOND, |limit| limit / 32).max(SECOND / 10);
        let mut history = History::new(distance);
        history.note(sample.sent, sample.position);
        self.primary = Some(Primary { life: sample.life.clone(), timeline: sample.timeline, history });
        true
    }

    /// A transaction that may have written ran on this server. If it is another one than was asked for positions, those say
    /// nothing of it.
    pub fn wrote_on(&mut self, life: &Rc<Incarnation>) {
        let is = |known: &Rc<Incarnation>| Rc::ptr_eq(known, life) || known == life;
        if self.written.as_ref().is_some_and(is) {
            return;
        }
        self.written = Some(life.clone());
        if !self.primary.as_ref().is_some_and(|known| is(&known.life)) {
            self.forget();
        }
    }

    /// What was the primary is in recovery, or is none.
    pub fn forget(&mut self) {
        if self.primary.take().is_some() {
            for follower in &mut self.followers {
                follower.forget();
            }
        }
    }

    /// A follower was asked.
    pub fn follower(&mut self, at: usize, sample: &FollowerSample) -> Next {
        let is_twin = |(other, follower): (usize, &Follower)| other < at && follower.is_life_of(&sample.life);
        let is_twin = self.followers.iter().enumerate().any(is_twin);
        let most = self.followers.iter().map(Follower::served).max().unwrap_or(0);
        let policy = self.policy;
        let Some(follower) = self.followers.get_mut(at) else { return Next::Done };
        let was_in = follower.is_in();
        let primary = self.primary.as_ref().map(|known| (&*known.life, known.timeline, &known.history));
        let next = follower.take(sample, primary, is_twin, policy);
        if follower.is_in() && !was_in {
            // It does not make up for what it missed.
            follower.catch_up(most);
        }
        next
    }

    /// The primary could not be asked, as [`Next::AskPrimary`] wants it: the follower lives, and no more is known of it.
    pub fn unconfirmed(&mut self, at: usize, sample: &FollowerSample) {
        if let Some(follower) = self.followers.get_mut(at) {
            follower.unconfirmed(sample);
        }
    }

    /// A follower did not answer, or a read on it failed for a reason of its own. `entropy` is any number.
    pub fn failed(&mut self, at: usize, now: Moment, entropy: u64) {
        if let Some(follower) = self.followers.get_mut(at) {
            follower.failed(now, entropy);
        }
    }

    /// Whether it is of use to ask the follower.
    #[must_use]
    pub fn is_due(&self, at: usize, now: Moment) -> bool {
        self.followers.get(at).is_some_and(|follower| follower.is_due(now))
    }

    /// Whether it is out, and asked only to find out whether it is back.
    #[must_use]
    pub fn is_out(&self, at: usize) -> bool {
        self.followers.get(at).is_some_and(Follower::is_out)
    }

    /// The follower for a read: of those that have what it needs, and all before the `watermark`, the one with the least to do
    /// for its weight. `load` tells how much each has.
    ///
    /// # Errors
    ///
    /// [`Missing`].
    pub fn choose(
        &mut self,
        now: Moment,
        need: Need,
        watermark: Option<Watermark>,
        load: impl Fn(usize) -> u32,
    ) -> Result<(usize, Seat), Missing> {
        // Two servers are written to, or the one that was written to is gone; or the watermark is of another history.
        let is_split = matches!(need, Need::After(Some(_)) | Need::Within(_)) && !self.is_written_primary()
            || watermark.is_some_and(|watermark| !self.is_of_primary(watermark));
        let least = watermark.map(|watermark| watermark.position);
        let mut missing = Missing::Usable;
        let mut best: Option<(usize, (u64, u64))> = None;
        for (at, follower) in self.followers.iter().enumerate() {
            match follower.serves(now, need, least) {
                Ok(()) if !is_split => {
                    let busy = follower.busy(now, load(at));
                    if best.is_none_or(|(_, least)| busy < least) {
                        best = Some((at, busy));
                    }
                }
                Ok(()) | Err(Missing::Fresh) => missing = Missing::Fresh,
                Err(Missing::Usable) => {}
            }
        }
        let (at, _) = best.ok_or(missing)?;
        let follower = self.followers.get_mut(at).ok_or(Missing::Usable)?;
        Ok((at, Seat { follower: u32::try_from(at).unwrap_or(u32::MAX), turn: follower.serve(now) }))
    }

    /// A position counts on one timeline of one system.
    fn is_of_primary(&self, watermark: Watermark) -> bool {
        self.primary.as_ref().is_some_and(|known| {
            known.timeline == watermark.timeline
                && known.life.system_identifier.parse() == Ok(watermark.system_identifier)
        })
    }

    fn is_written_primary(&self) -> bool {
        let life = self.primary.as_ref().map(|known| &known.life);
        self.written.is_none() || self.written.as_ref() == life
    }

    /// Whether a connection leads to the server that was chosen, in the life in which it was.
    #[must_use]
    pub fn vouches(&self, seat: Seat, life: &Rc<Incarnation>) -> bool {
        self.followers.get(seat.follower as usize).is_some_and(|follower| follower.vouches(seat.turn, life))
    }

    /// How a follower stands.
    #[must_use]
    pub fn gauges(&self, at: usize, now: Moment) -> FollowerGauges {
        self.followers.get(at).map(|follower| follower.gauges(now)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
