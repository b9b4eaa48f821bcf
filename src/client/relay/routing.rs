//! Reads on followers: where the next transaction runs, what happens on a follower, and how the session gets away from one.
//!
//! ```text
//!            reads, none fresh                        all else
//!  HomeReads ◀───────────────── (no lease: decides) ─────────▶ Home (what ends here is stamped)
//!  HomeReadOnly                     │            │
//!                             reads │            │ BEGIN READ ONLY
//!                                   ▼            ▼
//!                                 Lone        Opening ──answered──▶ Begun ──batch──▶ First ──told──▶ Within
//!                                   │            │                    │                │               │
//!                    failed or lost before a word of the answer       │ lost, unfit    │ failed, lost  │ lost: 08006
//!                                   ▼            ▼                    ▼                ▼               │ unfit: 0A000
//!                             Forced{begun: no}                     Forced{begun: yes}                 ▼
//!                                   │                                 │                        a failed transaction
//!                                   ▼                                 ▼
//!                             (decides: at home)      BEGIN, swallowed, in front: HomeReadOnly
//! ```
//!
//! The decision is taken for the whole first batch, before a byte of it is sent. With a lease of a follower one batch is
//! under way at a time: what comes behind it waits, and is decided anew when the lease has ended; in a read-only transaction it
//! is looked at again before it is passed on. The batch is kept until the client has a word of its answer. Whatever happens
//! to it on a follower before, it runs once more at home, unseen: nothing on a follower can have changed anything. Of a server
//! that is lost, or says that it was promoted, nobody knows until when it was one: then it runs once more only if it is proven
//! to read, and else the client is told that the outcome is unknown.
//!
//! What runs at home and is not proven to read is stamped when its transaction has ended, before its client is told: later
//! reads wait for a follower that has replayed it.

use std::borrow::Cow;
use std::rc::Rc;
use std::task::{Context as Task, Poll};

use pgweir_config::{PoolMode, ReadRouting, StatementMode};
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::Scanned;

use super::super::ahead::{Ahead, BATCH_MAX, Edge, Piece};
use super::super::end::End;
use super::super::request::Marks;
use super::super::statements::{Changes, Look, Named, Unnamed};
use super::super::verdict::{self, Circumstances, Errand, Verdict};
use super::fallback::lost_on_follower;
use super::{Lease, Relay};
use crate::backend::{Lost, ServerConn, Unnamed as Held};
use crate::cancel::Activity;
use crate::catalog::{Judged, Route, Suspects};
use crate::clock::Moment;
use crate::pool::Pool;
use crate::prepared::REPLAY;
use crate::replica::Seat;
use crate::route::{Choice, Replicas, Router};
use crate::sql::{self, EffectSet, Effects};
use crate::stats::{PoolStats, RouteReason};

/// How often a transaction that a follower began is begun on the primary before its client is told.
const BEGINS_MAX: u8 = 3;

/// Where a transaction is, and what of it is certain; see the diagram above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// On the primary, and it may write.
    Home,
    /// On the primary: the `left` bytes to come are known to read, and nothing has come yet that is not.
    HomeReads,
    /// On the primary, in a transaction that is read-only until something says otherwise.
    HomeReadOnly,
    /// On a follower: a batch that is a transaction of its own.
    Lone,
    /// On a follower: a batch that begins a read-only transaction.
    Opening,
    /// On a follower, in a read-only transaction in which nothing was done yet.
    Begun,
    /// On a follower: the first batch in such a transaction.
    First,
    /// On a follower, in a read-only transaction of which the client has heard something.
    Within,
    /// It failed on a follower, and has to run on the primary.
    Forced {
        /// The client was told of the BEGIN.
        begun: bool,
    },
}

/// How much of the input is passed on at once, and on which course.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    course: Course,
    /// Bytes at most; none may be.
    len: Option<usize>,
}

impl Way {
    /// All of it, to the primary.
    pub(super) const STRAIGHT: Self = Self { course: Course::Home, len: Some(usize::MAX) };

    #[inline]
    pub(super) fn batch(self, input: &[u8]) -> Option<&[u8]> {
        self.len.map(|len| input.get(..len).unwrap_or(input))
    }
}

/// What of a session has to do with followers.
#[derive(Debug)]
pub struct Routing {
    pub(super) replicas: Rc<Replicas>,
    pub(super) course: Course,
    /// Bytes of the batch under way that were not passed on yet.
    pub(super) left: usize,
    /// None of it was.
    untouched: bool,
    /// That it reads is proven, and not merely hoped for because its client asked for a follower.
    proven: bool,
    /// When the last transaction of this session that may have written was acknowledged.
    stamp: Option<Moment>,
    /// Whose positions the choice relied on.
    seat: Option<Seat>,
    /// When the batch that waits for a follower was decided first.
    arrived: Option<Moment>,
    /// Why the lease is where it is.
    pub(super) reason: RouteReason,
    /// The text of the transaction's `BEGIN`, on a follower.
    begin: Vec<u8>,
    /// The batch that begins the transaction does nothing else.
    pub(super) only_begins: bool,
    /// How often it was sent to the primary.
    begins: u8,
}

impl Routing {
    /// None if nothing of the pool's clients goes to followers.
    pub fn of(router: &Router, pool: &Rc<Pool>) -> Option<Box<Self>> {
        let replicas = router.replicas(pool)?;
        let is_used = pool.limits.mode == PoolMode::Transaction && replicas.routing() != ReadRouting::Off;
        is_used.then(|| {
            pool.catalog.want_routes();
            Box::new(Self {
                replicas,
                course: Course::Home,
                left: 0,
                untouched: true,
                proven: false,
                stamp: None,
                seat: None,
                arrived: None,
                reason: RouteReason::Unknown,
                begin: Vec::new(),
                only_begins: false,
                begins: 0,
            })
        })
    }

    /// A transaction on `conn` has ended, or may have: whatever it wrote is to be seen from now on.
    #[cold]
    pub(super) fn ended(&mut self, now: Moment, conn: &ServerConn) {
        // One that only reads ends by a COMMIT, which is seen on its way: otherwise it was not even begun.
        if matches!(self.course, Course::Home | Course::HomeReadOnly) {
            self.may_have_written(now, conn);
        }
    }

    /// The client is told of something that has happened before `now`.
    pub(super) fn told(&mut self, now: Moment) {
        self.stamp = Some(now);
    }

    /// Whether a batch waits to be placed.
    pub const fn is_placing(&self) -> bool {
        self.arrived.is_some()
    }

    /// Who is to know when what is under way has ended, if it may write.
    pub(super) fn stamps(&self) -> Option<Rc<Replicas>> {
        matches!(self.course, Course::Home | Course::HomeReadOnly).then(|| self.replicas.clone())
    }

    /// What was lost on a follower may be there to stay, if that was none any more. Where it would be is not known: nothing is
    /// said of the server that is written to.
    #[cold]
    pub(super) fn may_have_written_somewhere(&mut self, now: Moment) {
        self.stamp = Some(now);
        self.replicas.stamp_moment(now);
    }

    /// What ran on `conn` may be there to stay.
    #[cold]
    pub(super) fn may_have_written(&mut self, now: Moment, conn: &ServerConn) {
        self.stamp = Some(now);
        self.replicas.stamp(now, conn);
    }

    /// What was held up by a query of ours may go on. True if it does so by this lease: on the primary, or on a follower that
    /// has a part of its batch already. What else waits on a follower, or is to leave it, waits for the end of the lease.
    pub fn held_out(&mut self, home: &Rc<Pool>, lender: &Rc<Pool>) -> bool {
        if let (Course::Forced { begun: true }, true) = (self.course, Rc::ptr_eq(home, lender)) {
            self.course = Course::HomeReadOnly;
        }
        self.goes_on(home, lender)
    }

    /// Whether what the client has sent is passed on by this lease.
    pub fn goes_on(&self, home: &Rc<Pool>, lender: &Rc<Pool>) -> bool {
        Rc::ptr_eq(home, lender) || self.left > 0 && !matches!(self.course, Course::Forced { .. })
    }

    /// The client is about to be told that there is no server connection. True if it believes to be in a transaction.
    pub fn gives_up(&mut self) -> bool {
        self.arrived = None;
        let begun = self.course == Course::Forced { begun: true };
        self.course = Course::Home;
        begun
    }

    const fn is_elsewhere(&self) -> bool {
        use Course::{Begun, First, Lone, Opening, Within};
        matches!(self.course, Lone | Opening | Begun | First | Within)
    }
}

/// What the client was told of its transactions before some answers came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    queries: u64,
    transactions: u64,
    /// A COMMIT is on its way, or something that nobody could read.
    commits: bool,
}

impl Ends {
    pub(super) fn of(stats: &PoolStats, marks: &Marks) -> Self {
        let commits = marks.commit_sent || marks.scrub;
        Self { queries: stats.queries, transactions: stats.transactions, commits }
    }

    /// Whether the client is about to be told of the end of a transaction: of one behind which there is none, or, by
    /// `COMMIT AND CHAIN` and a BEGIN in the same text, already the next.
    pub(super) fn may_have_committed(self, stats: &PoolStats) -> bool {
        stats.transactions != self.transactions || self.commits && stats.queries != self.queries
    }
}

/// What to do with a batch that was looked at.
enum Decision {
    /// Wait until all of it is there.
    Wait,
    /// To the primary.
    Home(RouteReason),
    /// To a follower.
    Follower(Errand, RouteReason),
}

/// Why a batch must not run in the transaction that is open on a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// The follower would accept it, and it would have no effect.
    Itself,
    /// It prepares a statement that nobody but that server would have.
    Unkept,
    /// Some of it comes behind the end of the transaction: it is another one, which may write.
    Behind,
}

/// What is known of a piece of a batch.
pub(super) enum Text<'a> {
    Known(&'a [u8]),
    /// A name that stands for nothing yet, or for a text of the same batch.
    Missing,
    /// Nobody can tell.
    Opaque,
}

impl Relay {
    /// Whether the lease is of a follower, or waits for one.
    #[inline]
    pub(super) fn is_on_follower(&self) -> bool {
        self.routing.is_some() && !matches!(self.lease, Lease::None) && !Rc::ptr_eq(&self.pool, &self.lender)
            || self.routing.as_ref().is_some_and(|routing| routing.is_elsewhere())
    }

    /// Whether the client was told of a BEGIN that the primary has not run yet.
    #[inline]
    pub(super) fn owes_begin(&self) -> bool {
        self.routing.as_ref().is_some_and(|routing| routing.course == Course::Forced { begun: true })
    }

    /// Whether a batch has no lease yet, and is on its way to one: a follower is being chosen for it, or it is about to run at
    /// home.
    pub(super) fn awaits_lease(&self) -> bool {
        self.routing.as_ref().is_some_and(|routing| match routing.course {
            Course::Forced { .. } => self.active.as_ref().is_some_and(|active| !active.backlog.input.is_empty()),
            _ => routing.arrived.is_some(),
        })
    }

    // ---- the decision ----

    /// Decides where the first batch in `ahead` goes. True if a server connection of the primary's is to be taken; else
    /// one of a follower was taken or is waited for, or more of the batch has to come.
    #[cold]
    pub(super) fn route(&mut self, ahead: &[u8], cx: &mut Task<'_>) -> Result<bool, End> {
        let Some(routing) = &mut self.routing else { return Ok(true) };
        let forced = match routing.course {
            Course::Forced { begun: true } if routing.begins < BEGINS_MAX => {
                routing.begins += 1;
                self.pool.stats.borrow_mut().routes.add(routing.reason);
                self.lender = self.pool.clone();
                return Ok(true);
            }
            Course::Forced { begun: true } => {
                routing.course = Course::Home;
                self.tell_locally(lost_on_follower("08006"), true);
                return Ok(false);
            }
            Course::Forced { begun: false } => Some(routing.reason),
            _ => None,
        };
        let mut verdict = Verdict::default();
        let circumstances = Circumstances::of(routing.replicas.routing(), &self.profile);
        let (decision, found) = self.decide(ahead, circumstances, &mut verdict);
        let proven = verdict.proven(circumstances).filter(|_| found.edge == Edge::Whole);
        let reason = match (decision, forced) {
            (Decision::Wait, _) => return Ok(false),
            (Decision::Home(reason), None) | (_, Some(reason)) => reason,
            (Decision::Follower(errand, reason), None) => match self.choose(circumstances, cx) {
                Poll::Pending => return Ok(false),
                Poll::Ready(Choice::Primary(instead)) => instead,
                Poll::Ready(Choice::Follower(pool, seat)) => {
                    let course = if errand == Errand::Lone { Course::Lone } else { Course::Opening };
                    self.set_course(course, found.len, reason);
                    self.set_proven(proven.is_some());
                    return self.acquire_follower(pool, seat, cx);
                }
            },
        };
        let course = match proven {
            None => Course::Home,
            Some(Errand::Lone) => Course::HomeReads,
            Some(Errand::Opening) => Course::HomeReadOnly,
        };
        self.go_home(course, found.len, reason);
        Ok(true)
    }

    pub(super) fn set_course(&mut self, course: Course, left: usize, reason: RouteReason) {
        if let Some(routing) = &mut self.routing {
            (routing.course, routing.left, routing.reason, routing.begins) = (course, left, reason, 0);
            routing.untouched = true;
        }
    }

    fn set_proven(&mut self, proven: bool) {
        if let Some(routing) = &mut self.routing {
            routing.proven = proven;
        }
    }

    fn go_home(&mut self, course: Course, left: usize, reason: RouteReason) {
        self.lender = self.pool.clone();
        self.pool.stats.borrow_mut().routes.add(reason);
        self.set_course(course, left, reason);
        if let Some(routing) = &mut self.routing {
            (routing.arrived, routing.seat) = (None, None);
        }
    }

    /// Goes through the first batch in `ahead`.
    fn decide(&mut self, ahead: &[u8], at: Circumstances, verdict: &mut Verdict) -> (Decision, Ahead) {
        let suspects = self.pool.catalog.suspects();
        let mut begin = self.routing.as_mut().map(|routing| std::mem::take(&mut routing.begin)).unwrap_or_default();
        begin.clear();
        let found = self.texts(ahead, |relay, text| {
            let Text::Known(text) = text else {
                if matches!(text, Text::Opaque) {
                    verdict.oppose(RouteReason::Session);
                }
                return;
            };
            // Where the primary is nobody else knows.
            verdict.hear(relay.judge(text, &suspects), || relay.must_not_leave(text));
            if begin.is_empty() && verdict.begins() {
                begin.extend_from_slice(text);
            }
        });
        if let Some(routing) = &mut self.routing {
            routing.begin = begin;
            routing.only_begins = verdict.is_alone();
        }
        let decision = match (verdict.errand(at), found.edge) {
            (Err(reason), _) => Decision::Home(reason),
            (Ok(_), Edge::Short) => Decision::Wait,
            (Ok(_), Edge::Open | Edge::Inside) => Decision::Home(RouteReason::Open),
            // More than is kept.
            (Ok(_), Edge::Whole) if found.len > BATCH_MAX => Decision::Home(RouteReason::Open),
            // Drivers prepare in the middle of a transaction, where it could not move any more.
            (Ok((Errand::Opening, _)), Edge::Whole) if !self.keeps_names() => Decision::Home(RouteReason::Session),
            (Ok(_), Edge::Whole) if found.changes && (self.spoils(ahead) || self.gives_unkept(ahead)) => {
                Decision::Home(RouteReason::Session)
            }
            (Ok((errand, reason)), Edge::Whole) => Decision::Follower(errand, reason),
        };
        (decision, found)
    }

    /// Whether the first batch in `ahead` could not run again after it failed on a follower: what it did to its client's
    /// statements before that is done.
    fn spoils(&self, ahead: &[u8]) -> bool {
        let none = Changes::default();
        let changes = self.active.as_ref().map_or(&none, |active| &active.marks.changes);
        let is_known = |name: &[u8]| !matches!(self.statements.look(name, changes), Look::Unknown);
        Ahead::spoils(self.scanner, ahead, self.context.config.client.inspect_max, is_known)
    }

    /// Whether the texts of named statements are kept here, so that they can be run on any server connection.
    fn keeps_names(&self) -> bool {
        self.pool.limits.statements != StatementMode::Session && self.context.interner.has_room()
    }

    /// Whether the first batch in `ahead` gives a name that the server alone would keep, and a follower's connection is not
    /// kept for its client.
    fn gives_unkept(&self, ahead: &[u8]) -> bool {
        if self.keeps_names() {
            return false;
        }
        let mut gives = false;
        let _ = Ahead::look(self.scanner, ahead, self.context.config.client.inspect_max, |piece| {
            gives |= matches!(piece, Piece::Parse(name, _) if !name.is_empty());
        });
        gives
    }

    /// Where a text may run.
    fn judge(&self, text: &[u8], suspects: &Suspects) -> Judged {
        let context = &*self.context;
        let route = || suspects.route(text, &mut context.library.borrow_mut());
        let mut routes = context.routes.borrow_mut();
        let judged = routes.get_or_insert_default().judge(text, self.pool.catalog.key(), route);
        let refused = !matches!(judged.route, Route::Begin { .. })
            && context.refusals.borrow_mut().holds(
                &self.pool.name.database,
                &self.search_path(),
                text,
                context.clock.moment(),
            );
        if refused { Judged { route: Route::Primary(RouteReason::Rerun), ..judged } } else { judged }
    }

    pub(super) fn search_path(&self) -> Cow<'_, str> {
        self.profile.get("search_path").map_or(Cow::Borrowed(""), String::from_utf8_lossy)
    }

    /// Whether a text is to run at home, whatever a hint says: what has deallocated statements cannot run again elsewhere.
    fn must_not_leave(&self, text: &[u8]) -> bool {
        let effects = self.effects(text);
        self.is_unfit_by(effects, text) || effects.set.intersects(FORGETS) || sql::shows_watermark(text)
    }

    /// Whether a text with these `effects` must not run in a transaction on a follower.
    fn is_unfit_by(&self, effects: Effects, text: &[u8]) -> bool {
        let set = effects.set;
        verdict::is_unfit(set, text) || self.subscriber.is_some() && verdict::concerns_channels(set, text)
    }

    /// What a text may do, with what it sets in motion as far as that was ever known: the catalog may be about to be read
    /// again.
    fn effects(&self, text: &[u8]) -> Effects {
        let mut effects = sql::scan(text);
        let suspects = self.pool.catalog.surveyed();
        effects.set |= suspects.judge(text, effects.set, &mut self.context.library.borrow_mut());
        effects
    }

    /// Hands the texts that the first batch in `ahead` runs to `each`.
    pub(super) fn texts(&self, ahead: &[u8], mut each: impl FnMut(&Self, Text<'_>)) -> Ahead {
        let none = Changes::default();
        let changes = self.active.as_ref().map_or(&none, |active| &active.marks.changes);
        // Names that the batch itself gives.
        let mut parsed: Vec<&[u8]> = Vec::new();
        Ahead::look(self.scanner, ahead, self.context.config.client.inspect_max, |piece| match piece {
            Piece::Query(text) => each(self, Text::Known(text)),
            Piece::Parse(name, text) => {
                parsed.push(name);
                each(self, Text::Known(text));
            }
            Piece::Untold => each(self, Text::Opaque),
            Piece::Closes(_) => {}
            Piece::Names(name) if parsed.contains(&name) => {}
            Piece::Names(b"") => match &self.statements.unnamed {
                Unnamed::Holds(statement, _) => each(self, Text::Known(&statement.text)),
                Unnamed::Empty => each(self, Text::Missing),
                Unnamed::Raw => each(self, Text::Opaque),
            },
            Piece::Names(name) => match self.statements.look(name, changes) {
                Look::Named(Named::Shared(statement, _)) => each(self, Text::Known(&statement.text)),
                Look::Named(Named::Raw) | Look::Unsettled => each(self, Text::Opaque),
                Look::Unknown => each(self, Text::Missing),
            },
        })
    }

    // ---- the lease ----

    /// A follower that may serve the batch.
    fn choose(&mut self, at: Circumstances, cx: &mut Task<'_>) -> Poll<Choice> {
        // A bound on the age of what is read is measured from when it came.
        self.context.clock.refresh();
        let now = self.context.clock.moment();
        let Some(routing) = &mut self.routing else { return Poll::Ready(Choice::Primary(RouteReason::NoFollower)) };
        let has_waited = routing.arrived.is_some();
        let arrived = *routing.arrived.get_or_insert(now);
        let choice = routing.replicas.poll_choose(routing.stamp, at.watermark(), arrived, cx);
        if choice.is_pending() {
            // What came stays where it is until the session is woken, and nothing more is read meanwhile.
            let active = self.active();
            (active.resume, active.stalled) = (true, true);
        } else {
            routing.arrived = None;
            self.pool.stats.borrow_mut().read_waits += u64::from(has_waited);
        }
        choice
    }

    fn acquire_follower(&mut self, pool: Rc<Pool>, seat: Seat, cx: &mut Task<'_>) -> Result<bool, End> {
        self.lender = pool;
        if let Some(routing) = &mut self.routing {
            routing.seat = Some(seat);
        }
        if let Some(conn) = self.lender.try_lease(&self.profile, cx) {
            if !self.accepts(Some(&conn)) {
                self.lender.release(conn);
                self.active().resume = true;
                return Ok(false);
            }
            self.armed = true;
            self.begin(conn, cx)?;
            return Ok(false);
        }
        self.note(Activity::Waiting);
        self.lease = Lease::Waiting(self.lender.wait(cx));
        Ok(false)
    }

    /// A wait for a follower is over. False if that gave nothing to be used: the batch goes to the primary.
    pub(super) fn accepts(&mut self, conn: Option<&ServerConn>) -> bool {
        let Some(routing) = &mut self.routing else { return false };
        let fits = conn.zip(routing.seat).is_some_and(|(conn, seat)| routing.replicas.vouches(conn, seat));
        if fits {
            self.pool.stats.borrow_mut().routes.add(routing.reason);
        } else {
            // A pool that has none in time may be busy; whether its follower is well, its logins tell.
            routing.course = Course::Forced { begun: false };
            routing.reason = RouteReason::NoFollower;
            self.note(Activity::Idle);
        }
        fits
    }

    /// Behind the client's settings, on the primary: the BEGIN that it believes to have been run. What it sent waits for the
    /// answer.
    pub(super) fn replay_begin(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        // It may be about to change that.
        self.listen_in_front(cx)?;
        let Some(routing) = &self.routing else { return Ok(()) };
        let mut message = Vec::new();
        encode::query(&mut message, &routing.begin);
        self.send_held(&message, cx)
    }

    /// Sends a query of ours, behind which the client's batches wait.
    pub(super) fn send_held(&mut self, message: &[u8], cx: &mut Task<'_>) -> Result<(), End> {
        // It may have been lost with the settings.
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else { return Ok(()) };
        conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        conn.unnamed = Held::Empty;
        (active.aside.replaying, active.hold) = (true, true);
        match conn.write(cx, message, &[]) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(Lost::Io(error.kind()), cx),
        }
    }

    // ---- passing on ----

    /// How much of the input may be passed on now, and on which course.
    #[cold]
    pub(super) fn weigh(&mut self, input: &[u8], cx: &mut Task<'_>) -> Result<Way, End> {
        let (course, left) = self.routing.as_ref().map_or((Course::Home, 0), |routing| (routing.course, routing.left));
        match course {
            Course::Home => return Ok(Way::STRAIGHT),
            // It ends before anything is passed on.
            Course::Forced { .. } => return Ok(Way { course, len: None }),
            Course::HomeReads => {
                self.prove_reads(input, left);
                return Ok(Way { course, ..Way::STRAIGHT });
            }
            Course::HomeReadOnly => {
                self.prove_read_only(input, left);
                return Ok(Way { course, ..Way::STRAIGHT });
            }
            Course::Lone | Course::Opening | Course::Begun | Course::First | Course::Within => {}
        }
        if left == 0 && !self.admit(input, cx)? {
            return Ok(Way { course, len: None });
        }
        let Some(routing) = &mut self.routing else { return Ok(Way::STRAIGHT) };
        let (course, left, proven) = (routing.course, routing.left, routing.proven);
        let batch = input.get(..left).unwrap_or(input);
        let is_whole = std::mem::take(&mut routing.untouched) && batch.len() == left;
        let keeps = is_whole && matches!(course, Course::Lone | Course::Opening | Course::First);
        if let Some(active) = self.active.as_mut().filter(|_| keeps) {
            active.rerun.keep_routed(batch, proven);
        }
        Ok(Way { course, len: Some(batch.len()) })
    }

    /// Of what was on that way, so much was passed on, and there may be more to do: the same of the input.
    #[cold]
    pub(super) fn weighed(&mut self, way: Way, input: &[u8], (used, more): (usize, bool)) -> (usize, bool) {
        match way.course {
            Course::Home | Course::Forced { .. } => return (used, more),
            Course::HomeReads | Course::HomeReadOnly => {
                self.passed(used);
                return (used, more);
            }
            Course::Lone | Course::Opening | Course::Begun | Course::First | Course::Within => {}
        }
        let batch = way.batch(input).map_or(0, <[u8]>::len);
        match self.routing.as_ref().map(|routing| routing.course) {
            // What is to run again is kept elsewhere, whole.
            Some(Course::Forced { .. }) => return (batch, true),
            Some(Course::Home) | None => return (used, more),
            Some(_) => {}
        }
        self.passed(used);
        let stalled = self.active.as_ref().is_some_and(|active| active.stalled);
        if used < batch && !stalled && matches!(way.course, Course::Within) {
            // It was the front of a message that has to be whole: looked at again when there is more.
            self.passed(usize::MAX);
        }
        // What is behind it is looked at by itself.
        (used, more || used == batch && used < input.len())
    }

    /// Whether the client stands in the middle of a message of the server's.
    fn is_inside_answer(&self) -> bool {
        matches!(&self.lease, Lease::Held(conn) if conn.scanner.is_inside())
    }

    fn passed(&mut self, used: usize) {
        if let Some(routing) = &mut self.routing {
            routing.left = routing.left.saturating_sub(used);
        }
    }

    /// On the primary: is what comes behind the first `left` bytes known to read, too?
    fn prove_reads(&mut self, input: &[u8], left: usize) {
        let mut known = left;
        let suspects = self.pool.catalog.suspects();
        while let Some(rest) = input.get(known..).filter(|rest| !rest.is_empty()) {
            let mut reads = true;
            let found = self.texts(rest, |relay, text| {
                reads &= match text {
                    Text::Known(text) => match relay.judge(text, &suspects).route {
                        Route::Read | Route::Begin { .. } => true,
                        Route::Primary(RouteReason::Transaction) => verdict::only_ends(text),
                        Route::Primary(_) => false,
                    },
                    Text::Missing => true,
                    Text::Opaque => false,
                };
            });
            if !(reads && found.edge == Edge::Whole) {
                self.set_course(Course::Home, 0, RouteReason::Unknown);
                return;
            }
            known += found.len;
        }
        if let Some(routing) = &mut self.routing {
            routing.left = known;
        }
    }

    /// On the primary, in a read-only transaction: does it remain one behind the first `left` bytes?
    fn prove_read_only(&mut self, input: &[u8], left: usize) {
        let (mut at, mut ended) = (left, false);
        while let Some(rest) = input.get(at..).filter(|rest| !rest.is_empty()) {
            let mut remains = !ended;
            let found = self.texts(rest, |relay, text| match text {
                Text::Known(text) => {
                    let effects = relay.effects(text);
                    // Behind its end comes another transaction, perhaps in the same batch.
                    remains &= !(ended || verdict::escapes(effects));
                    ended |= verdict::ends(effects.set);
                }
                Text::Missing => {}
                Text::Opaque => remains = false,
            });
            // Of a long message only the front is there, or the end, with who knows what behind it.
            remains &= found.edge != Edge::Inside;
            if !remains {
                return self.set_course(Course::Home, 0, RouteReason::Unknown);
            }
            if found.edge != Edge::Whole {
                break;
            }
            at += found.len;
        }
        // What is sent ahead of the answer to its BEGIN may find no transaction.
        let is_open =
            matches!(&self.lease, Lease::Held(conn) if conn.pipeline.certain_status() == Some(TxStatus::Open));
        let course = match (ended, is_open) {
            (false, _) => Course::HomeReadOnly,
            (true, true) => Course::HomeReads,
            (true, false) => Course::Home,
        };
        self.set_course(course, at, RouteReason::ReadOnly);
    }

    /// On a follower, with nothing left of the batch before: what comes next, and may it be passed on? False if it waits,
    /// or the lease is over.
    fn admit(&mut self, input: &[u8], cx: &mut Task<'_>) -> Result<bool, End> {
        let mut scanner = self.scanner;
        if scanner.is_inside() {
            // The end of a message whose front was passed on; what is behind it is looked at by itself.
            let Ok(Scanned::Inside { len }) = scanner.next(input) else { return Ok(false) };
            if let Some(routing) = &mut self.routing {
                routing.left = len;
            }
            return Ok(true);
        }
        let (Lease::Held(conn), Some(routing), Some(active)) = (&self.lease, &mut self.routing, &mut self.active)
        else {
            return Ok(false);
        };
        let pipeline = &conn.pipeline;
        let in_transaction = pipeline.status() != TxStatus::Idle && pipeline.ready_owed() == 0;
        if !in_transaction {
            // One batch at a time; what comes behind it is decided when the lease has ended.
            active.stalled = true;
            return Ok(false);
        }
        let is_settled = pipeline.is_settled() && !self.scanner.is_inside();
        // What the server skips does nothing, whatever it is.
        let is_skipped = pipeline.is_skipping();
        match routing.course {
            // What it has read already is of that server's snapshot.
            Course::Opening => routing.course = if routing.only_begins { Course::Begun } else { Course::Within },
            Course::First => routing.course = Course::Within,
            _ => {}
        }
        let course = routing.course;
        let (mut unfit, mut proven, mut ended, mut forgets) = (None, true, false, false);
        if !is_skipped && self.gives_unkept(input) {
            unfit = Some(Unfit::Unkept);
        }
        let found = self.texts(input, |relay, text| match text {
            _ if is_skipped => {}
            Text::Known(text) => {
                let effects = relay.effects(text);
                if relay.is_unfit_by(effects, text) {
                    unfit = unfit.or(Some(Unfit::Itself));
                } else if ended {
                    unfit = unfit.or(Some(Unfit::Behind));
                }
                ended |= verdict::ends(effects.set);
                // Run again it would not find them.
                forgets |= effects.set.intersects(FORGETS);
                // On a server that was promoted it may be read-only no more.
                proven &= !verdict::escapes(effects);
            }
            Text::Missing => {}
            Text::Opaque => unfit = unfit.or(Some(Unfit::Itself)),
        });
        if unfit.is_some() && self.is_inside_answer() {
            // Nothing can be told in the middle of a row.
            self.active().stalled = true;
            return Ok(false);
        }
        if let Some(why) = unfit {
            return self.turn_away(why, cx).map(|()| false);
        }
        let (next, left) = match found.edge {
            Edge::Short => return Ok(false),
            Edge::Whole
                if course == Course::Begun
                    && is_settled
                    && found.len <= BATCH_MAX
                    && !forgets
                    && !(found.changes && self.spoils(input)) =>
            {
                (Course::First, found.len)
            }
            Edge::Whole | Edge::Open => (Course::Within, found.len),
            Edge::Inside => (Course::Within, input.len()),
        };
        if let Some(routing) = &mut self.routing {
            // A goodbye, or what no client may send, is no part of a batch: the pass says so.
            (routing.course, routing.left) = (next, if left == 0 { input.len() } else { left });
            (routing.untouched, routing.proven) = (true, proven);
        }
        Ok(true)
    }
}

/// Effects of texts that may deallocate statements of their client's.
const FORGETS: EffectSet = EffectSet::DEALLOCATE.union(EffectSet::DISCARD_ALL);

const _: () = assert!(BATCH_MAX <= super::rerun::RERUN_BUFFER);
