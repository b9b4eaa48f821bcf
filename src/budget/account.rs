//! The arithmetic: how one member stands under one limit.

use std::time::Duration;

use super::census::{Census, Scope, Seat};
use super::tag::{Mark, NEVER};

/// Per cent of the connections that members with more than their share leave alone when others want them.
const WATERMARK: u32 = 85;

/// Claims at once, at most, where the limit is large. Nobody is believed to have more.
pub(super) const CLAIMS_MAX: u32 = 8;

/// Connections of a limit for each claim of a transaction.
const CONNECTIONS_PER_CLAIM: u32 = 16;

/// After so many periods in vain nobody asks for more to be given back.
const PERIODS_MAX: u32 = 5;

/// How many of a `limit`'s connections no member takes: they are for probes and for people.
#[must_use]
pub fn headroom(limit: u32) -> u32 {
    (limit / 10).max(2).min(limit.saturating_sub(1))
}

/// What one member has.
#[derive(Clone, Copy, Debug, Default)]
struct Holding {
    /// Connections that may stay.
    held: u32,
    /// How long it has had the first of them, where this may be known.
    age: Option<Duration>,
    draining: bool,
    waiting: bool,
    /// 0 of one that drains.
    weight: u32,
}

/// How a member stands under a limit.
#[derive(Debug)]
pub struct Account {
    /// Which limit.
    pub scope: Scope,
    /// Its value.
    pub limit: u32,
    /// What nobody takes of it.
    pub headroom: u32,
    /// Connections that may stay, foreigners' among them.
    pub seats: u32,
    /// Logins under way.
    pub claims: u32,
    /// Probes that are finding out whether they may stay.
    pub proving: u32,
    /// Probes that wait.
    pub waiting: u32,
    /// Of all of these, those of no member.
    pub foreign: u32,
    /// The member's own ones that may stay.
    pub mine: u32,
    /// Members that have or wait for connections and will stay, the member itself among them if it does.
    pub peers: u32,
    /// Connections of members that will not stay.
    leaving: u32,
    /// Other databases with members: who opens there does not take turns with this one.
    databases: u32,
    /// How many connections the waiting ask to be given back, together: the longer in vain, the more.
    urgency: u32,
    /// Since when those that wait have had no connection, those that try again, and those that are about to look for the first
    /// time; none of the member's own is among them, and none that was stopped.
    queue: Vec<u64>,
    trying: Vec<u64>,
    coming: Vec<u64>,
    /// The same of the member's own probe, as everybody sees it; or [`NEVER`].
    own: u64,
    me: Option<u32>,
    /// Nothing of the member is there, and it will stay.
    is_coming: bool,
    /// The member's own weight, and that of all peers.
    weight: u32,
    weights: u32,
    holdings: Vec<Holding>,
}

impl Account {
    /// Of the member with this place in the census, and this weight.
    pub(super) fn new(
        census: &Census,
        scope: Scope,
        limit: u32,
        (me, weight): (Option<u32>, u32),
        stale: Duration,
    ) -> Self {
        let mut account = Self {
            scope,
            limit,
            headroom: headroom(limit),
            seats: 0,
            claims: 0,
            proving: 0,
            waiting: 0,
            foreign: 0,
            mine: 0,
            peers: 0,
            leaving: 0,
            databases: 0,
            urgency: 0,
            queue: Vec::new(),
            trying: Vec::new(),
            coming: Vec::new(),
            own: NEVER,
            me,
            is_coming: me.is_none(),
            weight,
            weights: 0,
            holdings: census.weights.iter().map(|weight| Holding { weight: *weight, ..Holding::default() }).collect(),
        };
        let mut databases: Vec<u32> = Vec::new();
        let counts = |seat: &&Seat| match scope {
            Scope::Role => seat.same_role,
            Scope::Database => seat.here,
            Scope::Server | Scope::Fleet => true,
        };
        for seat in census.seats.iter().filter(counts) {
            account.take(seat, census, stale);
            if seat.member.is_some() && !seat.here && !databases.contains(&seat.database) {
                databases.push(seat.database);
            }
        }
        account.databases = u32::try_from(databases.len()).unwrap_or(u32::MAX);
        account.count_peers();
        account
    }

    /// The same of a member that is on its way out, if it is, whatever its connections say by now.
    pub(super) fn draining(mut self, is_draining: bool) -> Self {
        if is_draining {
            if let Some(own) = self.me.and_then(|n| self.holdings.get_mut(n as usize)) {
                own.draining = true;
            } else {
                (self.is_coming, self.weight) = (false, 0);
            }
            self.count_peers();
        }
        self
    }

    /// Who drains has no part in what is shared, but the one connection that everybody is entitled to; and as long as it has
    /// more, the others have the less.
    fn count_peers(&mut self) {
        self.leaving = 0;
        for holding in self.holdings.iter_mut().filter(|holding| holding.draining) {
            holding.weight = 0;
            self.leaving += holding.held;
        }
        if let Some(own) = self.me.and_then(|n| self.holdings.get(n as usize)) {
            self.weight = own.weight;
        }
        let is_peer = |(n, holding): &(u32, &Holding)| {
            !holding.draining && (self.me == Some(*n) || holding.held > 0 || holding.waiting)
        };
        let peers = (0..).zip(&self.holdings).filter(is_peer).map(|(_, peer)| peer.weight);
        let weights: Vec<u32> = peers.chain(self.is_coming.then_some(self.weight)).collect();
        self.peers = count(weights.len()).max(1);
        self.weights = weights.into_iter().fold(0, u32::saturating_add).max(1);
    }

    fn take(&mut self, seat: &Seat, census: &Census, stale: Duration) {
        let Some(holding) = seat.member.and_then(|n| self.holdings.get_mut(n as usize)) else {
            self.seats += 1;
            self.foreign += 1;
            return;
        };
        let own = seat.member == self.me;
        match seat.mark {
            Mark::Coming(since, seen) | Mark::Proving(since, seen) => {
                self.proving += 1;
                let all = if matches!(seat.mark, Mark::Coming(..)) { &mut self.coming } else { &mut self.trying };
                if own {
                    self.own = self.own.min(since);
                } else if since != NEVER && !census.is_stale(seen, seat.age, stale) {
                    // As below.
                    all.push(since);
                }
            }
            // Its process was stopped, or it would have looked, or be gone.
            Mark::Waiting(wait) if census.is_stale(wait.seen, seat.age, stale) => self.proving += 1,
            Mark::Waiting(wait) => {
                self.waiting += 1;
                holding.waiting = true;
                if !own {
                    self.urgency = self.urgency.saturating_add(1 << wait.periods.min(PERIODS_MAX));
                    self.queue.push(wait.since);
                }
            }
            Mark::Plain | Mark::Claims(..) | Mark::Draining => {
                self.seats += 1;
                holding.held += 1;
                holding.age = holding.age.max(seat.age);
                holding.draining |= seat.mark == Mark::Draining;
                self.mine += u32::from(own);
            }
        }
        if let Mark::Claims(claims, until) = seat.mark
            && !census.are_over(until)
        {
            // Nobody claims more at once: a client that makes tags up takes no more than this.
            self.claims += claims.min(CLAIMS_MAX);
        }
    }

    /// Everything that is there or on its way.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.seats + self.claims + self.proving + self.waiting
    }

    /// Claims of one transaction, at most. All that are under the limit agree on it.
    #[must_use]
    pub fn worth(&self) -> u32 {
        (self.cap() / CONNECTIONS_PER_CLAIM).clamp(1, CLAIMS_MAX)
    }

    /// What members and foreigners may have together.
    #[must_use]
    pub const fn cap(&self) -> u32 {
        self.limit - self.headroom
    }

    /// The same, without what is left to openers in other databases: each of them may be about to claim what it found.
    #[must_use]
    pub fn purse(&self) -> u32 {
        self.cap().saturating_sub(self.worth().saturating_mul(self.databases))
    }

    /// Connections that the member is entitled to; at least one, for which it may have to wait its turn.
    #[must_use]
    pub fn share(&self) -> u32 {
        self.share_of(self.weight)
    }

    /// What a peer of this weight is entitled to: one, and its part of what is left then. So the shares of all never are more
    /// than there is, unless they have to take turns.
    fn share_of(&self, weight: u32) -> u32 {
        let beyond = self.shared().saturating_sub(self.peers);
        let part = u64::from(beyond) * u64::from(weight) / u64::from(self.weights);
        u32::try_from(part).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// More members than connections: they have to take turns.
    #[must_use]
    pub fn takes_turns(&self) -> bool {
        self.shared() < self.peers
    }

    /// What peers divide.
    fn shared(&self) -> u32 {
        self.purse().saturating_sub(self.foreign).saturating_sub(self.leaving)
    }

    /// Up to here members may have more than their share.
    #[must_use]
    pub fn watermark(&self) -> u32 {
        self.purse().saturating_mul(WATERMARK) / 100
    }

    /// How many more connections the member may have; [`Self::worth`] of them may be claimed at once. Its own `probes`, which
    /// are to be among them, are there already.
    #[must_use]
    pub fn room(&self, probes: u32) -> u32 {
        let used = self.used().saturating_sub(probes);
        let room = self.purse().saturating_sub(used);
        let owed = self.share().saturating_sub(self.mine);
        let borrowed = self.watermark().saturating_sub(used);
        room.min(owed.max(borrowed))
    }

    /// Whether a probe may stay, as the connection of a member that has had none `since` then, or [`NEVER`] if that is not its
    /// first. Those that wait, and have done so for longer, go before it.
    #[must_use]
    pub fn admits(&self, since: u64) -> bool {
        self.seats + self.claims + before(&self.queue, since) < self.purse()
    }

    /// Whether all that are there fit, probes among them: then none is in anybody's way.
    #[must_use]
    pub const fn holds_all(&self) -> bool {
        self.used() <= self.cap()
    }

    /// How many probes may wait.
    #[must_use]
    pub fn places(&self) -> u32 {
        (self.headroom / 2).max(1)
    }

    /// Whether the probe of a member that has had no connection `since` then may wait: where nobody does, or in the place of
    /// one that has not been without for so long, who leaves at its next look. Of those that last for more than a look there is
    /// one too many at most.
    #[must_use]
    pub fn has_place(&self, since: u64) -> bool {
        count(self.queue.len() + self.trying.len()) <= self.places() && before(&self.queue, since) < self.places()
    }

    /// Whether the same may go on waiting: not if others have been without for longer that wait or try to.
    #[must_use]
    pub fn keeps_place(&self, since: u64) -> bool {
        before(&self.queue, since) + before(&self.trying, since) < self.places()
    }

    /// Whether everybody sees since when the member has had no connection.
    #[must_use]
    pub const fn is_told(&self) -> bool {
        self.own != NEVER
    }

    /// Whether the same is among those that are next to wait, and may try for longer than one look to get its turn. All that
    /// may tell so before they look: the last of them to look sees the others.
    #[must_use]
    pub fn leads(&self, since: u64) -> bool {
        let all = count(self.queue.len() + self.trying.len() + self.coming.len());
        let before = before(&self.queue, since) + before(&self.trying, since) + before(&self.coming, since);
        self.is_told() && since != NEVER && all <= self.places() && before < self.places()
    }

    /// How many connections the member is to give back when clients are done with them. It has had the first of them for so
    /// long, the time for which it waited with it aside.
    #[must_use]
    pub fn owed(&self, slice: Duration, had: Duration) -> u32 {
        let over = self.mine.saturating_sub(self.share());
        let mut owed = 0;
        if self.is_wanted()
            && (over > 0 || self.mine > 0 && self.takes_turns() && had >= slice && self.is_its_turn(slice))
        {
            owed = 1;
        }
        if over > 0 && self.used() > self.watermark() {
            owed = owed.max(self.part_of_surplus());
        }
        owed
    }

    /// Whether somebody else waits, so that what is idle is to be given back: for room under this limit, and there is none
    /// yet.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.urgency > 0 && self.seats + self.claims >= self.purse()
    }

    /// Above the watermark those with most beyond their share give back first. Everybody who looks comes to the same
    /// result.
    fn part_of_surplus(&self) -> u32 {
        let excess = |holding: &Holding| holding.held.saturating_sub(self.share_of(holding.weight));
        let mut excess: Vec<u32> = self.holdings.iter().map(excess).collect();
        let mut part = 0;
        for _ in 0..self.used().saturating_sub(self.watermark()) {
            let most = excess.iter().copied().max().unwrap_or(0);
            let first = (0..).zip(&mut excess).find(|(_, left)| **left == most && most > 0);
            let Some((n, left)) = first else { break };
            *left -= 1;
            part += u32::from(self.me == Some(n));
        }
        part
    }

    /// Where members take turns: whether the member has had its connection for a slice of time, and is among the first of
    /// those that have, as many as the waiting ask for. Who has had it for many slices was stopped, or its clients do not
    /// let go: others do not wait for it, nor does it wait for others.
    fn is_its_turn(&self, slice: Duration) -> bool {
        let many = slice * 4;
        let mine = self.me.and_then(|n| self.holdings.get(n as usize)).and_then(|holding| holding.age);
        let Some(age) = mine.filter(|age| *age >= slice) else { return false };
        let is_before = |(n, holding): &(u32, &Holding)| {
            holding.held > 0 && holding.age.is_some_and(|other| other < many && (other, self.me) > (age, Some(*n)))
        };
        let before = (0..).zip(&self.holdings).filter(is_before).count();
        age >= many || u32::try_from(before).unwrap_or(u32::MAX) < self.urgency
    }
}

/// How many of these are earlier.
fn before(all: &[u64], since: u64) -> u32 {
    count(all.iter().filter(|other| **other < since).count())
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::census::{Limits, Process, Row};
    use super::super::tag::{self, Wait};
    use super::*;

    const STALE: Duration = Duration::from_secs(10);
    const SLICE: Duration = Duration::from_secs(2);

    /// A census of a server with `limit` connections and these names, each as old as its place from the end, in seconds.
    fn census(limit: u32, names: &[&str]) -> Census {
        let mut census = Census::new(Limits { server: Some(limit), ..Limits::default() }, None);
        census.now = 100_000;
        for (name, age) in names.iter().zip((1..=names.len() as u64).rev()) {
            let (name, here) = name.strip_prefix("elsewhere ").map_or((*name, true), |name| (name, false));
            let name = if let Some((member, rest)) = name.split_once(' ') {
                let number = u32::try_from(age).unwrap();
                let mark = match rest {
                    "+1" => Mark::Claims(1, tag::NEVER),
                    "+2 over" => Mark::Claims(2, 98_000),
                    "?" => Mark::Proving(NEVER, NEVER),
                    "comes" => Mark::Coming(70_000, 99_000),
                    "? long" => Mark::Proving(70_000, 99_000),
                    "? unseen" => Mark::Proving(70_000, 85_000),
                    "? ahead" => Mark::Proving(70_000, 115_000),
                    "waits" => Mark::Waiting(Wait { periods: 0, since: 90_000, seen: 99_000 }),
                    "waits long" => Mark::Waiting(Wait { periods: 3, since: 80_000, seen: 99_000 }),
                    "waits unseen" => Mark::Waiting(Wait { periods: 3, since: 80_000, seen: 85_000 }),
                    "!" => Mark::Draining,
                    _ => Mark::Plain,
                };
                tag::write(member, number, mark)
            } else {
                name.to_owned()
            };
            let age = Some(Duration::from_secs(age));
            census.row(&Row {
                name: name.as_bytes(),
                database: u32::from(here),
                here,
                role: 1,
                same_role: true,
                process: Process::Client,
                age,
            });
        }
        census
    }

    #[test]
    fn room_share_and_turns_follow_from_who_is_there() {
        // Limit, who is there, and of `a`: room for more, share, to be given back.
        #[rustfmt::skip]
        let table: [(&str, u32, &[&str], (u32, u32, u32)); 22] = [
            ("alone",                      12, &["a x"],                                           (9, 10, 0)),
            ("claims count",               12, &["a x", "b +1"],                                   (5, 5, 0)),
            ("claims that are over do not", 12, &["a x", "b +2 over"],                              (6, 5, 0)),
            ("weights of two kinds",       12, &["a x", "b*3/1 x"],                                (6, 3, 0)),
            ("each has one, whatever",     6,  &["a x", "b*100/1 x", "c x"],                       (0, 1, 0)),
            ("a heavy one has its share",  12, &["a x", "a x", "b*7/1 x", "b*7/1 x", "b*7/1 x", "b*7/1 x", "b*7/1 x", "b*7/1 x", "b*7/1 x"], (0, 2, 0)),
            ("probes count",               12, &["a x", "b ?"],                                    (8, 10, 0)),
            ("who waits is a peer",        12, &["a x", "b waits"],                                (6, 5, 0)),
            ("foreigners are not shared",  12, &["a x", "psql", "psql", "b x"],                    (4, 4, 0)),
            ("who drains is no peer",      12, &["a x", "b !", "c x"],                             (5, 4, 0)),
            ("it drains itself",           12, &["a !", "b x"],                                    (6, 1, 0)),
            ("one that says so is enough", 12, &["a !", "a x", "b x"],                             (5, 1, 0)),
            ("and gives back the rest",    8,  &["a !", "a !", "a !", "a !", "b x", "b x"],        (0, 1, 1)),
            ("not who stays in its place", 8,  &["a x", "a x", "a x", "b !", "b !", "b !"],        (0, 3, 0)),
            ("another database is left 1", 12, &["a x", "elsewhere b x"],                          (5, 4, 0)),
            ("full",                       4,  &["a x", "b x"],                                    (0, 1, 0)),
            ("beyond the share, wanted",   6,  &["a x", "a x", "a x", "b waits"],                  (0, 2, 1)),
            ("above the watermark",        8,  &["a x", "a x", "a x", "a x", "b x", "b x"],        (0, 3, 1)),
            ("a peer has more",            8,  &["a x", "a x", "b x", "b x", "b x", "b x"],        (0, 3, 0)),
            ("who waits has room here",    12, &["a x", "b waits", "b waits"],                    (5, 5, 0)),
            ("its turn is over",           4,  &["a x", "b x", "c waits"],                         (0, 1, 1)),
            ("another's turn is over",     4,  &["b x", "a x", "c waits"],                         (0, 1, 0)),
        ];
        for (name, limit, names, (room, share, owed)) in table {
            let account = census(limit, names).account(Scope::Server, "a", STALE).unwrap();
            let got = (account.room(0), account.share(), account.owed(SLICE, SLICE));
            assert_eq!(got, (room, share, owed), "{name}: {account:?}");
        }
    }

    #[test]
    fn who_drains_is_left_one_before_its_connections_say_so() {
        let of_a = |names: &[&str]| {
            let account = census(12, names).account(Scope::Server, "a", STALE).unwrap().draining(true);
            (account.peers, account.share(), account.room(0), account.mine)
        };
        assert_eq!(of_a(&["a x", "a x", "b x"]), of_a(&["a !", "a !", "b x"]));
        assert_eq!(of_a(&["a x", "a x", "b x"]), (1, 1, 5, 2));
        // It has none, and a client that wants one; nobody else is there.
        assert_eq!(of_a(&["b x"]), (1, 1, 7, 0));
        assert_eq!(of_a(&[]), (1, 1, 8, 0));
        let others = census(12, &["a x", "b x"]).account(Scope::Server, "a", STALE).unwrap();
        assert_eq!(others.draining(false).share(), 5);
    }

    #[test]
    fn a_probe_is_admitted_behind_those_that_wait_and_waits_where_there_is_a_place() {
        // Limit, who is there, and of `a`, without a connection for less or for longer than `b` and `c`: admitted, a place
        // to wait, and the place that it has is kept.
        #[rustfmt::skip]
        let table: [(&str, u32, &[&str], [(bool, bool, bool); 2]); 13] = [
            ("others prove themselves", 4, &["a ?", "b ?", "c ?"],              [(true, true, true), (true, true, true)]),
            ("one place, one waits",    4, &["a ?", "b x", "c waits"],          [(false, false, false), (true, true, true)]),
            ("one too many waits",      3, &["a ?", "b waits", "c waits long"], [(false, false, false), (true, false, true)]),
            ("one is on its way there", 3, &["a ?", "b waits", "c ? long"],     [(false, false, false), (true, false, false)]),
            ("one will look first",     3, &["a ?", "b waits", "c comes"],      [(false, false, false), (true, true, true)]),
            ("so will many",            3, &["a ?", "b comes", "c comes", "d comes"], [(true, true, true), (true, true, true)]),
            ("one of these was stopped", 3, &["a ?", "b waits", "c ? unseen"],  [(false, false, false), (true, true, true)]),
            ("or its clock is wrong",   3, &["a ?", "b waits", "c ? ahead"],    [(false, false, false), (true, true, true)]),
            ("one is about to wait",    3, &["a ?", "b x", "c ? long"],         [(false, true, false), (false, true, false)]),
            ("full",                    4, &["a ?", "b x", "c x"],              [(false, true, true), (false, true, true)]),
            ("full with a claim",       4, &["a ?", "b +1"],                    [(false, true, true), (false, true, true)]),
            ("more places",             60, &["a ?", "b waits", "c waits"],     [(true, true, true), (true, true, true)]),
            ("one was stopped",         4, &["a ?", "b x", "c waits unseen"],   [(true, true, true), (true, true, true)]),
        ];
        for (name, limit, names, want) in table {
            let account = census(limit, names).account(Scope::Server, "a", STALE).unwrap();
            let got = [95_000, 75_000].map(|s| (account.admits(s), account.has_place(s), account.keeps_place(s)));
            assert_eq!(got, want, "{name}");
        }
    }

    #[test]
    fn of_probes_without_their_turn_the_one_that_is_longest_without_goes_on_trying() {
        let leads = |names: &[&str]| census(4, names).account(Scope::Server, "a", STALE).unwrap().leads(70_000);
        // Nobody sees since when.
        assert!(!leads(&["a ?", "b x", "c x"]));
        assert!(leads(&["a ? long", "b x", "c x"]));
        assert!(leads(&["a ? long", "a ?", "b x"]), "another one of its own");
        assert!(leads(&["a ? long", "b ?", "c waits long"]));
        assert!(leads(&["a comes", "b comes", "c x"]), "of equal ones each");
        assert!(!leads(&["a comes", "b comes", "c comes", "d x"]), "too many");
        assert!(!leads(&["a ? long", "b waits", "c waits long"]), "one too many is there");
        assert!(leads(&["a ? long", "b waits", "c waits unseen"]), "one of these was stopped");
    }

    #[test]
    fn who_was_stopped_while_it_waited_is_not_heeded_for_ever() {
        let census = census(4, &["c waits", "b x", "a x"]);
        assert_eq!(census.account(Scope::Server, "a", STALE).unwrap().waiting, 1);
        let account = census.account(Scope::Server, "a", Duration::from_millis(900)).unwrap();
        assert_eq!((account.waiting, account.peers, account.used()), (0, 2, 3));
    }

    #[test]
    fn the_longer_somebody_waits_in_vain_the_more_go() {
        let names = ["b x", "c x", "a x", "d x", "e waits"];
        assert_eq!(census(6, &names).account(Scope::Server, "a", STALE).unwrap().owed(SLICE, SLICE), 0);
        let names = ["b x", "c x", "a x", "d x", "e waits long"];
        assert_eq!(census(6, &names).account(Scope::Server, "a", STALE).unwrap().owed(SLICE, SLICE), 1);
    }

    #[test]
    fn a_tenth_is_left_alone_and_something_is_always_there() {
        for (limit, want) in [(0, 0), (1, 0), (2, 1), (3, 2), (20, 2), (100, 10), (500, 50)] {
            assert_eq!(headroom(limit), want, "{limit}");
        }
    }
}
