//! A member of the fleet: when it may log in, under which tag, when it looks, and what it gives back.

use std::time::Duration;

use super::account::Account;
use super::census::{Census, Scope};
use super::tag::{self, Mark, NEVER, Wait};
use crate::mutant::{Guard, lacks};

/// How long clients wait in vain for a connection to come by that could ask for more, before a probe is sent in its place.
const PATIENCE: Duration = Duration::from_millis(500);

/// The longest time that a probe tries to get its turn.
const PROOF_LIMIT: Duration = Duration::from_secs(2);

/// The first pause when somebody else has the turn; it doubles.
const TURN_PAUSE: Duration = Duration::from_millis(10);

/// The longest of them.
const TURN_PAUSE_MAX: Duration = Duration::from_secs(1);

/// The first pause after the server had no room; it doubles.
const REFUSED_PAUSE: Duration = Duration::from_secs(4);

/// The longest of them.
const REFUSED_PAUSE_MAX: Duration = Duration::from_mins(1);

/// A probe that waits looks so many times in a period.
const LOOKS_PER_WAIT: u32 = 8;

/// The pause of a probe that found no room begins with half a period, and doubles so many times.
const PAUSES_MAX: u32 = 2;

/// A slice of time, where members take turns; periods.
const SLICE: u32 = 2;

/// What the fleet has agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Time between two looks at the census: at least while there is room, and at most where there is none, since a probe waits no
    /// longer than this to be seen.
    pub period: Duration,
    /// The arithmetic is not done, as in a build that forgot to: for the test that proves that this would be noticed.
    pub is_broken: bool,
}

impl Policy {
    /// The least time that a member keeps a connection for, where members take turns.
    #[must_use]
    pub fn slice(&self) -> Duration {
        self.period * SLICE
    }

    /// A probe that waits and was not seen for so long was stopped: it would have looked [`LOOKS_PER_WAIT`] times.
    fn stale(&self) -> Duration {
        self.period + PROOF_LIMIT
    }
}

/// What the member's clients want, and what it has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Demand {
    /// Connections that are wanted and not on their way.
    pub wanted: u32,
    /// How long the first client has waited.
    pub oldest: Duration,
    /// Connections that are there, whatever they do, or log in.
    pub open: u32,
    /// Those that nobody uses.
    pub idle: u32,
}

/// What is to be asked on a connection that nobody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// The census, to know how things stand.
    Look,
    /// The lock, the census, and claims for so many connections.
    Grow(u32),
}

/// A probe's way.
///
/// ```text
/// logged in ──▶ Proving ──room, in its turn──▶ (stays)
///                  │ ├───no turn──▶ (tries again, PROOF_LIMIT)
///                  │ └───no turn, and more are there than fit, others for longer──▶ (leaves)
///                  ├──no room, and a place to wait──▶ Waiting ──room──▶ (stays)
///                  └──no room────▶ (leaves) ◀──others have waited for longer; a period──┘
///
/// Who leaves because too many are there, and has been without a connection for longer than they, comes back sooner, and who
/// leaves because its period is over does so at once.
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// It is the member's only connection.
    first: bool,
    stage: Stage,
    /// Times that somebody else had the turn.
    missed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Proving { since: Duration },
    Waiting { since: Duration },
}

/// What becomes of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays. The tag is set in the transaction that asked.
    Stays,
    /// It asks again after this time, under the tag of this mark.
    Again(Mark, Duration),
    /// It closes.
    Leaves,
}

/// A member's clients want a connection, and there is none.
#[derive(Clone, Copy, Debug)]
struct Hunger {
    /// Since its first attempt to get one.
    from: Duration,
    /// When that was by the server's clock, as soon as that is known: it stays the same until there is a connection.
    since: Option<u64>,
}

/// What the server's clock has shown at some moment: milliseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct ServerClock {
    shown: u64,
    at: Duration,
}

impl ServerClock {
    fn now(self, now: Duration) -> u64 {
        self.shown.saturating_add(millis(now.saturating_sub(self.at)))
    }
}

/// How things stood at the last look.
#[derive(Clone, Copy, Debug)]
struct Look {
    /// How many more the member might have.
    room: u32,
    /// How many it might claim at once.
    worth: u32,
    /// It has more than its share.
    is_over: bool,
    /// Somebody waits.
    is_wanted: bool,
    at: Duration,
}

/// A member of the fleet: the connections of one role to one database that one process has.
#[derive(Debug)]
pub struct Member {
    name: String,
    policy: Policy,
    /// It is on its way out.
    is_draining: bool,
    numbers: u32,
    look: Option<Look>,
    look_at: Duration,
    /// No probe before that.
    probe_at: Duration,
    /// No claim before that.
    grow_at: Duration,
    /// Probes in a row that left.
    tries: u32,
    /// When the last one left.
    left_at: Duration,
    hunger: Option<Hunger>,
    /// As the last census told it.
    server_clock: Option<ServerClock>,
    /// When the first connection was found to stay.
    first_at: Duration,
    /// Refusals of the server in a row.
    refusals: u32,
    /// Turns in a row that somebody else had.
    missed: u32,
    /// To give back.
    owed: u32,
    binding: Option<Binding>,
}

/// Which limit leaves least room, and how it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Which.
    pub scope: Scope,
    /// Its value.
    pub limit: u32,
    /// What nobody takes of it.
    pub headroom: u32,
    /// What is there or on its way.
    pub used: u32,
    /// Of it, what the member has.
    pub mine: u32,
    /// What the member is entitled to.
    pub share: u32,
    /// Members.
    pub peers: u32,
    /// Connections of no member.
    pub foreign: u32,
}

impl Member {
    /// A member of this name, see [`tag::member`], without connections.
    #[must_use]
    pub fn new(name: String, policy: Policy) -> Self {
        Self {
            name,
            policy,
            is_draining: false,
            numbers: 0,
            look: None,
            look_at: Duration::ZERO,
            probe_at: Duration::ZERO,
            grow_at: Duration::ZERO,
            tries: 0,
            left_at: Duration::ZERO,
            hunger: None,
            server_clock: None,
            first_at: Duration::ZERO,
            refusals: 0,
            missed: 0,
            owed: 0,
            binding: None,
        }
    }

    /// Its name in tags.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limit that binds, as it stood at the last look.
    #[must_use]
    pub const fn binding(&self) -> Option<Binding> {
        self.binding
    }

    /// How many connections it can count on: what others take of them is given back. 0 before the first look.
    #[must_use]
    pub fn share(&self) -> u32 {
        if self.look.is_none() { 0 } else { self.binding.map_or(u32::MAX, |binding| binding.share) }
    }

    /// How the member stands in a scope; none where there is no limit.
    #[must_use]
    pub fn account(&self, scope: Scope, census: &Census) -> Option<Account> {
        Some(census.account(scope, &self.name, self.policy.stale())?.draining(self.is_draining))
    }

    /// From now on it is on its way out: it is entitled to one connection, for as long as its clients want any, and all that
    /// it has are to say so. The next question is due at once.
    pub fn drain(&mut self) {
        self.is_draining = true;
        self.look_at = Duration::ZERO;
    }

    /// What its connections say that have nothing else to say.
    #[must_use]
    pub const fn mark(&self) -> Mark {
        if self.is_draining { Mark::Draining } else { Mark::Plain }
    }

    /// Whether there was no more room for the member at the last look.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.look.is_some_and(|look| look.room == 0)
    }

    /// A number for a new connection.
    #[must_use]
    pub fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// The tag of the connection of this number.
    #[must_use]
    pub fn tag(&self, number: u32, mark: Mark) -> String {
        tag::write(&self.name, number, mark)
    }

    // ---- before a login ----

    /// Whether a login may be tried without a claim: one at a time, and only while there is no connection that could
    /// claim, or none has come by for long.
    #[must_use]
    pub fn may_probe(&self, now: Duration, demand: &Demand) -> bool {
        let stuck = || {
            let has_room = self.look.is_none_or(|look| look.room > 0);
            demand.oldest >= PATIENCE && has_room && now >= self.grow_at
        };
        demand.wanted > 0 && now >= self.probe_at && (demand.open == 0 || stuck())
    }

    /// A login was tried as a probe.
    #[must_use]
    pub fn probe(&mut self, now: Duration, demand: &Demand) -> Probe {
        let first = demand.open == 0;
        // Nobody was hungry all the time if no client has waited since the last attempt, or came soon after it.
        let goes_on = now <= self.left_at + demand.oldest + self.policy.slice();
        if first && !(self.hunger.is_some() && goes_on) {
            self.hunger = Some(Hunger { from: now, since: None });
        }
        Probe { first, stage: Stage::Proving { since: now }, missed: 0 }
    }

    /// What a probe says of itself before its first look.
    #[must_use]
    pub fn first_mark(&mut self, now: Duration, probe: &Probe) -> Mark {
        match self.hungry_since(now, probe) {
            NEVER => Mark::Proving(NEVER, NEVER),
            since => Mark::Coming(since, self.seen(now, since)),
        }
    }

    /// Since when a probe's member has had no connection, by the server's clock; [`NEVER`] if that is not known.
    fn hungry_since(&mut self, now: Duration, probe: &Probe) -> u64 {
        let (Some(hunger), Some(clock)) = (self.hunger.as_mut().filter(|_| probe.first), self.server_clock) else {
            return NEVER;
        };
        let passed = millis(now.saturating_sub(hunger.from));
        *hunger.since.get_or_insert(clock.now(now).saturating_sub(passed))
    }

    /// What a probe tells of this moment.
    fn seen(&self, now: Duration, since: u64) -> u64 {
        let clock = self.server_clock.filter(|_| since != NEVER);
        clock.map_or(NEVER, |clock| clock.now(now).max(since))
    }

    /// What a probe that waits says of itself.
    fn wait(&self, now: Duration, since: u64) -> Mark {
        let passed = self.hunger.map_or(Duration::ZERO, |hunger| now.saturating_sub(hunger.from));
        let periods = passed.as_millis().checked_div(self.policy.period.as_millis()).unwrap_or_default();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        Mark::Waiting(Wait { periods, since, seen: self.seen(now, since) })
    }

    /// What is to be asked on a connection that nobody has now, if anything.
    #[must_use]
    pub fn errand(&self, now: Duration, demand: &Demand) -> Option<Errand> {
        let has_room = self.look.is_some_and(|look| look.room > 0);
        if demand.wanted > 0 && has_room && now >= self.grow_at {
            return Some(Errand::Grow(demand.wanted));
        }
        (now >= self.look_at).then_some(Errand::Look)
    }

    // ---- with a census ----

    /// A look: notes how things stand.
    pub fn look(&mut self, now: Duration, entropy: u64, census: &Census) {
        self.note(now, entropy, census, 0);
    }

    /// How many connections to claim of those that are wanted, in the transaction that has the lock; without it none.
    #[must_use]
    pub fn claim(&mut self, now: Duration, entropy: u64, wanted: u32, locked: bool, census: &Census) -> u32 {
        let look = self.note(now, entropy, census, 0);
        if !locked {
            self.grow_at = now + self.miss(entropy);
            return 0;
        }
        self.missed = 0;
        let claims = if self.is_broken() { wanted } else { wanted.min(look.room).min(look.worth) };
        self.take(claims);
        claims
    }

    /// What is taken now is not there any more.
    fn take(&mut self, taken: u32) {
        if let Some(look) = &mut self.look {
            look.room = look.room.saturating_sub(taken);
        }
    }

    /// What becomes of a probe that asked.
    #[must_use]
    pub fn prove(&mut self, now: Duration, entropy: u64, probe: &mut Probe, locked: bool, census: &Census) -> Verdict {
        let room = self.note(now, entropy, census, 1).room;
        let since = self.hungry_since(now, probe);
        let accounts = census.accounts(&self.name, self.policy.stale());
        let accounts: Vec<Account> = accounts.map(|account| account.draining(self.is_draining)).collect();
        let all = |is: &dyn Fn(&Account) -> bool| accounts.iter().all(is);
        // Who is next comes back soon.
        let is_next = since != NEVER && all(&|account| account.keeps_place(since));
        let backoff = self.backoff(is_next);
        // Where not all fit that are there, one login and one look is all that a probe may take: if it is not the next to wait.
        let (mark, may_go_on, backoff) = match probe.stage {
            Stage::Proving { since: begun } => {
                let fits = all(&|account| account.holds_all() || account.leads(since));
                (Mark::Proving(since, self.seen(now, since)), fits && now < begun + PROOF_LIMIT, backoff)
            }
            Stage::Waiting { since: begun } => {
                let keeps = all(&|account| account.keeps_place(since));
                let is_over = now >= begun + self.policy.period;
                let backoff = if keeps { self.policy.period / LOOKS_PER_WAIT } else { backoff };
                (self.wait(now, since), keeps && !is_over, backoff)
            }
        };
        if !locked {
            if !may_go_on {
                return self.leave(now, entropy, backoff);
            }
            probe.missed += 1;
            return Verdict::Again(mark, turn_pause(probe.missed, entropy));
        }
        probe.missed = 0;
        if all(&|account| account.admits(since)) && (probe.first || room > 0) || self.is_broken() {
            (self.tries, self.refusals, self.hunger) = (0, 0, None);
            if probe.first {
                self.first_at = now;
            }
            self.take(1);
            return Verdict::Stays;
        }
        let pause = self.policy.period / LOOKS_PER_WAIT;
        match probe.stage {
            Stage::Waiting { .. } if may_go_on => Verdict::Again(mark, pause),
            // Others have to see who comes before it does.
            Stage::Proving { .. }
                if probe.first && all(&|account| account.has_place(since) && (account.is_told() || since == NEVER)) =>
            {
                probe.stage = Stage::Waiting { since: now };
                Verdict::Again(self.wait(now, since), pause)
            }
            _ => self.leave(now, entropy, backoff),
        }
    }

    /// Notes how things stand, with so many probes of the member's own being there.
    fn note(&mut self, now: Duration, entropy: u64, census: &Census, probes: u32) -> Look {
        let slice = self.policy.slice();
        let mut look = Look { room: u32::MAX, worth: u32::MAX, is_over: false, is_wanted: false, at: now };
        self.owed = 0;
        self.binding = None;
        if census.now > 0 {
            self.server_clock = Some(ServerClock { shown: census.now, at: now });
        }
        let is_draining = self.is_draining;
        for account in census.accounts(&self.name, self.policy.stale()).map(|account| account.draining(is_draining)) {
            let room = account.room(probes);
            if room < look.room {
                look.room = room;
                self.binding = Some(binding(&account));
            }
            look.worth = look.worth.min(account.worth());
            look.is_over |= account.mine > account.share();
            look.is_wanted |= account.is_wanted();
            self.owed = self.owed.max(account.owed(slice, now.saturating_sub(self.first_at)));
        }
        self.look = Some(look);
        // Who waits for a period is to be seen, also by who has looked just before; nobody waits while there is room.
        let pause = part(self.policy.period, entropy);
        self.look_at = now + if look.room == 0 { pause } else { pause + self.policy.period / 4 };
        look
    }

    // ---- after a failure ----

    /// For how long a probe leaves, at most: for a moment, if its member `is_next`, and who is in its way will have gone.
    fn backoff(&self, is_next: bool) -> Duration {
        let doublings = if is_next { 0 } else { self.tries.min(PAUSES_MAX) };
        self.policy.period / 2 * (1 << doublings)
    }

    /// A probe leaves, for half of this pause or more.
    fn leave(&mut self, now: Duration, entropy: u64, pause: Duration) -> Verdict {
        self.tries += 1;
        self.left_at = now;
        self.probe_at = self.probe_at.max(now + half(pause, entropy));
        Verdict::Leaves
    }

    /// The server had no room (53300): somebody has taken what nobody takes. Less is asked of it for a while, and what is
    /// beyond the member's share goes back.
    pub fn refused(&mut self, now: Duration, entropy: u64) {
        let pause = REFUSED_PAUSE.saturating_mul(1 << self.refusals.min(8)).min(REFUSED_PAUSE_MAX);
        self.refusals += 1;
        let until = now + half(pause, entropy);
        self.probe_at = self.probe_at.max(until);
        self.grow_at = self.grow_at.max(until);
        if self.look.is_some_and(|look| look.is_over) {
            self.owed = self.owed.max(1);
        }
    }

    /// A login went well.
    pub fn logged_in(&mut self) {
        self.refusals = 0;
    }

    /// A question got no answer: another is asked later.
    pub fn unanswered(&mut self, now: Duration, entropy: u64) {
        self.look_at = now + part(self.policy.period, entropy);
        self.grow_at = self.grow_at.max(now + self.miss(entropy));
        self.probe_at = self.probe_at.max(now + half(self.policy.period, entropy));
    }

    /// A limit of this process is in the way of what the fleet would allow.
    pub fn blocked(&mut self, now: Duration, entropy: u64) {
        self.grow_at = self.grow_at.max(now + half(self.policy.period, entropy));
    }

    fn miss(&mut self, entropy: u64) -> Duration {
        self.missed += 1;
        turn_pause(self.missed, entropy)
    }

    // ---- giving back ----

    /// Whether a connection that a client is done with is to be closed. `open` is how many there are, this one among
    /// them.
    #[must_use]
    pub fn gives(&mut self, now: Duration, entropy: u64, open: u32) -> bool {
        if self.owed == 0 {
            return false;
        }
        self.owed -= 1;
        self.gave(now, entropy, open);
        true
    }

    /// The same of one that is idle: somebody waits for it, and nobody here does.
    #[must_use]
    pub fn gives_idle(&mut self, now: Duration, entropy: u64, demand: &Demand) -> bool {
        let fresh = |look: &Look| look.is_wanted && now < look.at + self.policy.period;
        if demand.idle == 0 || demand.wanted > 0 || !(self.owed > 0 || self.look.as_ref().is_some_and(fresh)) {
            return false;
        }
        self.owed = self.owed.saturating_sub(1);
        // One for each look.
        if let Some(look) = &mut self.look {
            look.is_wanted = false;
        }
        self.gave(now, entropy, demand.open);
        true
    }

    /// Who gave its last connection away does not take it back before somebody else had the time to.
    fn gave(&mut self, now: Duration, entropy: u64, open: u32) {
        if open <= 1 {
            self.probe_at = self.probe_at.max(now + half(self.policy.slice(), entropy));
        }
        self.grow_at = self.grow_at.max(now + half(self.policy.period, entropy));
    }

    fn is_broken(&self) -> bool {
        self.policy.is_broken || lacks(Guard::Claims)
    }
}

fn binding(account: &Account) -> Binding {
    Binding {
        scope: account.scope,
        limit: account.limit,
        headroom: account.headroom,
        used: account.used(),
        mine: account.mine,
        share: account.share(),
        peers: account.peers,
        foreign: account.foreign,
    }
}

/// Three quarters of `whole`, up to all of it: what is done together drifts apart.
fn part(whole: Duration, entropy: u64) -> Duration {
    jitter(whole, entropy, 75)
}

/// Half of `whole`, up to all of it.
fn half(whole: Duration, entropy: u64) -> Duration {
    jitter(whole, entropy, 50)
}

fn jitter(whole: Duration, entropy: u64, least: u32) -> Duration {
    let per_mille = u32::try_from(entropy % 1000).unwrap_or_default();
    whole * least / 100 + whole * (100 - least) / 100 * per_mille / 1000
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn turn_pause(missed: u32, entropy: u64) -> Duration {
    half(TURN_PAUSE.saturating_mul(1 << missed.min(7)).min(TURN_PAUSE_MAX), entropy)
}
