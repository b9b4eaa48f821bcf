//! A pool's part in the fleet's budget: it carries out what [`budget`] decides.
//!
//! [`budget`]: crate::budget
//!
//! The questions run on a connection that is on its way to the next client or to the idle stack, one at a time, or on a
//! probe. A connection that carries claims is kept until its logins are over.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use rand::RngExt;

use super::watch::LIMIT;
use super::{Course, Pool};
use crate::backend::{DialError, Permit, ServerConn, SettleError};
use crate::budget::{ASK, Answers, Demand, Errand, LOOK, Mark, Member, Policy, Probe, Verdict, in_time, tag};
use crate::clock::TICK;
use crate::stats::DiscardReason;

/// How long a connection is kept from clients for the claims that it carries. What logs in later proves itself, as a
/// probe does.
const CARRY_LIMIT: Duration = Duration::from_secs(2);

/// Why there is no more room, where that is not known.
const NO_CENSUS: &str = "The census of the fleet could not be taken";

/// Why a probe did not find out.
const NO_TURN: &str = "Others of the fleet were always at it";

/// What all pools of a process keep to.
#[derive(Clone, Debug)]
pub struct FleetPolicy {
    name: String,
    weight: u32,
    limit: Option<u32>,
    policy: Policy,
}

impl FleetPolicy {
    /// None if the settings leave every pool on its own.
    #[must_use]
    pub fn new(settings: &pgweir_config::Fleet) -> Option<Self> {
        let limit = (settings.db_connections > 0).then_some(settings.db_connections);
        let policy = Policy { period: settings.fleet_census_period, is_broken: false };
        let name = fleet_name(settings);
        let weight = settings.fleet_weight;
        (settings.fleet_budget || limit.is_some()).then_some(Self { name, weight, limit, policy })
    }
}

/// What this process is called: `fleet_name`, the Heroku dyno's name, or the host's.
#[must_use]
pub fn fleet_name(settings: &pgweir_config::Fleet) -> String {
    if settings.fleet_name.is_empty() { own_name() } else { settings.fleet_name.clone() }
}

/// The Heroku dyno's name, else the host's.
fn own_name() -> String {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    std::env::var("DYNO").ok().filter(|dyno| !dyno.is_empty()).unwrap_or_else(host)
}

/// A pool's part in it.
#[derive(Debug)]
pub(super) struct Fleet {
    member: RefCell<Member>,
    /// `db_connections`.
    limit: Option<u32>,
    since: Instant,
    /// An errand runs on one of the connections.
    is_asking: Cell<bool>,
    /// A probe is on its way.
    is_probing: Cell<bool>,
    /// Connections that are neither idle nor lent, for reasons of the budget.
    errands: Cell<u32>,
    /// Somebody between us and the server lends its connections to others: there is no saying whose they are.
    is_static: Cell<bool>,
    /// What went wrong last; empty for nothing.
    mishap: Cell<&'static str>,
}

/// A connection that is neither idle nor lent.
struct OnErrand(Rc<Pool>);

impl OnErrand {
    fn new(pool: &Rc<Pool>) -> Self {
        if let Some(fleet) = &pool.fleet {
            fleet.errands.set(fleet.errands.get() + 1);
        }
        Self(pool.clone())
    }
}

impl Drop for OnErrand {
    fn drop(&mut self) {
        if let Some(fleet) = &self.0.fleet {
            fleet.errands.set(fleet.errands.get().saturating_sub(1));
        }
    }
}

impl Fleet {
    pub(super) fn new(policy: &FleetPolicy, now: Instant) -> Self {
        let name = tag::member(&policy.name, policy.weight, rand::rng().random());
        Self {
            member: RefCell::new(Member::new(name, policy.policy)),
            limit: policy.limit,
            since: now,
            is_asking: Cell::new(false),
            is_probing: Cell::new(false),
            errands: Cell::new(0),
            is_static: Cell::new(false),
            mishap: Cell::new(""),
        }
    }

    pub(super) fn member_name(&self) -> String {
        self.member.borrow().name().to_owned()
    }

    pub(super) fn errands(&self) -> u32 {
        self.errands.get()
    }

    /// How many connections the pool can count on; none if that is not the fleet's to say.
    pub(super) fn share(&self) -> Option<u32> {
        (!self.is_static.get()).then(|| self.member.borrow().share())
    }

    /// Why there is no more room, for the error of who waited in vain.
    pub(super) fn trouble(&self) -> String {
        let member = self.member.borrow();
        let Some(binding) = member.binding().filter(|_| member.is_full() && self.mishap.get().is_empty()) else {
            return self.mishap.get().to_owned();
        };
        format!(
            "The fleet has no room: {} connections of the {}'s limit of {} are used, {} by this pool and {} by others than \
             pgweir, and {} are kept free; the share of each of {} pools is {}",
            binding.used,
            binding.scope.as_str(),
            binding.limit,
            binding.mine,
            binding.foreign,
            binding.headroom,
            binding.peers,
            binding.share
        )
    }

    fn now(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

fn entropy() -> u64 {
    rand::rng().random()
}

impl Pool {
    /// Whether logins are the fleet's to allow.
    #[must_use]
    pub fn is_budgeted(&self) -> bool {
        self.fleet.as_ref().is_some_and(|fleet| !fleet.is_static.get())
    }

    /// What the clients want of the fleet. An `offered` connection is neither idle nor lent.
    fn demand(&self, offered: u32) -> Demand {
        let (idle, lent) = {
            let inner = self.inner.borrow();
            (inner.idle.len(), inner.lent.len())
        };
        let oldest = self.waiters().1;
        let logins = self.limits.max_server_logins.saturating_sub(self.logging_in.get());
        let room = self.counts.iter().map(|count| count.room()).min().unwrap_or(0);
        let size = self.size(oldest).saturating_sub(self.open());
        let may = if self.may_dial(oldest) { size.min(logins).min(room) } else { 0 };
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Demand {
            wanted: self.wanted().saturating_sub(offered).min(may),
            oldest,
            open: count(idle + lent) + self.coming() + offered,
            idle: count(idle),
        }
    }

    /// What becomes of a free connection: none if the budget has a use for it, or it is given back.
    #[inline]
    pub(super) fn pass_fleet(self: &Rc<Self>, conn: Box<ServerConn>) -> Option<Box<ServerConn>> {
        if self.fleet.is_none() { Some(conn) } else { self.pass_budget(conn) }
    }

    #[cold]
    fn pass_budget(self: &Rc<Self>, mut conn: Box<ServerConn>) -> Option<Box<ServerConn>> {
        let fleet = self.fleet.as_ref().filter(|fleet| !fleet.is_static.get());
        let Some(fleet) = fleet else { return Some(conn) };
        let now = fleet.now(self.clock.now());
        if self.course.get() != Course::Serves && !tag::is_leaving(&conn.tag) {
            // The others need not reckon with it.
            conn.tag = conn.tag.replace(']', " !]").into();
            conn.untagged = true;
        }
        if conn.untagged {
            self.retag(conn);
            return None;
        }
        let demand = self.demand(1);
        if fleet.member.borrow_mut().gives(now, entropy(), demand.open) {
            self.discard(conn, DiscardReason::Shrink);
            self.dial_if_wanted();
            return None;
        }
        let errand = fleet.member.borrow().errand(now, &demand);
        match errand.filter(|_| !fleet.is_asking.get()) {
            Some(errand) => {
                self.send_on(errand, conn);
                None
            }
            None => Some(conn),
        }
    }

    /// Idle connections ask, too, and are given back when others want them.
    pub(super) fn keep_fleet_informed(self: &Rc<Self>) {
        let fleet = self.fleet.as_ref().filter(|fleet| !fleet.is_static.get());
        // Those of a pool that leaves are closed soon.
        let stays = self.course.get() == Course::Serves;
        let Some(fleet) = fleet.filter(|_| stays && !self.inner.borrow().idle.is_empty()) else { return };
        let now = fleet.now(self.clock.now());
        let demand = self.demand(0);
        if fleet.member.borrow_mut().gives_idle(now, entropy(), &demand) {
            let conn = self.inner.borrow_mut().idle.remove(0);
            return self.discard(conn, DiscardReason::Shrink);
        }
        let errand = fleet.member.borrow().errand(now, &demand);
        if let Some(errand) = errand.filter(|_| !fleet.is_asking.get())
            && let Some(conn) = self.inner.borrow_mut().idle.pop()
        {
            self.send_on(errand, conn);
        }
    }

    /// The process will end: its connections are to say so.
    pub(super) fn note_leaving(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.member.borrow_mut().drain();
        }
    }

    /// A login went well.
    pub(super) fn note_login(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.member.borrow_mut().logged_in();
        }
    }

    /// The server had no room for a login.
    pub(super) fn note_refusal(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.member.borrow_mut().refused(fleet.now(self.clock.now()), entropy());
        }
    }

    /// A question of the budget's got no answer.
    fn note_silence(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.member.borrow_mut().unanswered(fleet.now(self.clock.now()), entropy());
        }
    }

    fn retag(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        let errand = OnErrand::new(self);
        tokio::task::spawn_local(async move {
            let pool = errand.0.clone();
            let outcome = pool.clock.limit(LIMIT, conn.retag()).await;
            drop(errand);
            match outcome {
                Ok(Ok(())) => pool.offer(conn),
                Ok(Err(SettleError)) | Err(_) => pool.discard(conn, DiscardReason::Lost),
            }
            pool.dial_if_wanted();
        });
    }

    /// The census, by `LOOK` or `ASK`. None if the server would not tell; and if it is not the one that we logged in to,
    /// the pool is on its own from now on.
    async fn count(&self, conn: &mut ServerConn, text: &str) -> Result<Option<Answers>, SettleError> {
        let Some(fleet) = &self.fleet else { return Ok(None) };
        let mut answers = Answers::new(fleet.limit);
        let outcome = self.take_census(conn, text, &mut answers).await;
        if outcome.is_err() {
            fleet.mishap.set(NO_CENSUS);
        }
        let told = outcome?;
        self.clock.refresh();
        if !told || answers.pid.is_none() {
            tracing::warn!(
                pool = %self.name.database, user = %self.name.user, "the census of the fleet could not be taken"
            );
            fleet.mishap.set(NO_CENSUS);
            return if told { Err(SettleError) } else { Ok(None) };
        }
        fleet.mishap.set("");
        if answers.pid != Some(conn.pid) && conn.pid != 0 {
            conn.settle().await?;
            fleet.is_static.set(true);
            self.watch.blind();
            tracing::error!(
                pool = %self.name.database, user = %self.name.user, pool_size = self.limits.pool_size,
                "another pooler stands in front of the server, whose connections nobody can tell apart: this pool takes no \
                 part in the fleet's budget, and has pool_size for a share"
            );
            return Ok(None);
        }
        let member = fleet.member.borrow();
        self.watch.note(&answers, self.clock.now(), |scope| member.account(scope, &answers.census));
        drop(member);
        Ok(Some(answers))
    }

    /// Sends a connection on an errand.
    fn send_on(self: &Rc<Self>, errand: Errand, mut conn: Box<ServerConn>) {
        let Some(fleet) = &self.fleet else { return };
        fleet.is_asking.set(true);
        let on = OnErrand::new(self);
        tokio::task::spawn_local(async move {
            let pool = on.0.clone();
            let outcome = match errand {
                Errand::Look => pool.look(&mut conn).await,
                Errand::Grow(wanted) => pool.grow(&mut conn, wanted).await,
            };
            if let Some(fleet) = &pool.fleet {
                fleet.is_asking.set(false);
            }
            drop(on);
            if outcome.is_ok() {
                // What carried claims has the name again that it logged in with, and a client may have reset its own to that.
                conn.untagged |= pool.course.get() != Course::Serves;
                pool.offer(conn);
            } else {
                pool.note_silence();
                pool.discard(conn, DiscardReason::Lost);
            }
            pool.dial_if_wanted();
        });
    }

    async fn look(&self, conn: &mut ServerConn) -> Result<(), SettleError> {
        let answers = self.count(conn, LOOK).await?;
        match (answers, &self.fleet) {
            (Some(answers), Some(fleet)) => {
                fleet.member.borrow_mut().look(fleet.now(self.clock.now()), entropy(), &answers.census);
            }
            _ => self.note_silence(),
        }
        Ok(())
    }

    /// Claims what there is room for, and logs in so many times.
    async fn grow(self: &Rc<Self>, conn: &mut ServerConn, wanted: u32) -> Result<(), SettleError> {
        let (Some(answers), Some(fleet)) = (self.count(conn, ASK).await?, &self.fleet) else {
            self.note_silence();
            return Ok(());
        };
        let now = fleet.now(self.clock.now());
        let granted = fleet.member.borrow_mut().claim(now, entropy(), wanted, answers.locked, &answers.census);
        // Other pools of this process may have been faster.
        let permits: Vec<Permit> = (0..granted).map_while(|_| self.permit(true)).collect();
        let claims = u32::try_from(permits.len()).unwrap_or(u32::MAX);
        if permits.len() < granted as usize {
            fleet.member.borrow_mut().blocked(now, entropy());
        }
        if claims == 0 {
            return self.tell(conn, "", "COMMIT").await;
        }
        let until = answers.census.claims_until();
        self.tell(conn, &marked(conn, Mark::Claims(claims, until)), "COMMIT").await?;
        self.open_claimed(conn, permits, until).await
    }

    /// Logs in once for each permit, and takes a claim off for each login that can be seen. Who has logged in is lent only
    /// when that is known to have worked; else it proves itself, as a probe does. From `until` on, by the server's clock, it
    /// does not work.
    async fn open_claimed(
        self: &Rc<Self>,
        conn: &mut ServerConn,
        permits: Vec<Permit>,
        claims_until: u64,
    ) -> Result<(), SettleError> {
        let mut left = u32::try_from(permits.len()).unwrap_or(u32::MAX);
        self.logging_in.set(self.logging_in.get() + left);
        let log_in = |permit| {
            let pool = self.clone();
            async move { pool.log_in(permit, pool.new_tag()).await }
        };
        let mut logins: FuturesUnordered<_> = permits.into_iter().map(log_in).collect();
        let until = self.clock.now() + CARRY_LIMIT;
        let (mut is_unsure, mut outcome) = (false, Ok(()));
        loop {
            let rest = until.saturating_duration_since(self.clock.now());
            let next = if rest.is_zero() { None } else { self.clock.limit(rest, logins.next()).await.ok() };
            match next {
                Some(Some(Ok(fresh))) => {
                    if outcome.is_ok() {
                        left -= 1;
                        let mark = if left > 0 { Mark::Claims(left, claims_until) } else { Mark::Plain };
                        outcome = self.tell_in_time(conn, &marked(conn, mark), claims_until).await;
                    }
                    if outcome.is_ok() {
                        self.offer(fresh);
                    } else {
                        self.start_proving(fresh);
                    }
                }
                // The server may not have noticed yet that nobody waits for it.
                Some(Some(Err(DialError::Timeout | DialError::Io(_)))) => is_unsure = true,
                Some(Some(Err(_))) => {}
                Some(None) => break,
                None => {
                    self.await_late(logins);
                    break;
                }
            }
        }
        outcome?;
        while is_unsure && self.closing() > 0 && self.clock.now() < until {
            self.clock.sleep(TICK).await;
        }
        self.tell(conn, "", "RESET application_name").await
    }

    /// Logins whose claims are gone: each that succeeds has to prove itself.
    fn await_late<F>(self: &Rc<Self>, mut logins: FuturesUnordered<F>)
    where
        F: Future<Output = Result<Box<ServerConn>, DialError>> + 'static,
    {
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            while let Some(login) = logins.next().await {
                if let Ok(fresh) = login {
                    pool.start_proving(fresh);
                }
                pool.dial_if_wanted();
            }
        });
    }

    /// Connections that neither log in nor are there, and may still count.
    fn closing(&self) -> u32 {
        let there = {
            let inner = self.inner.borrow();
            inner.idle.len() + inner.lent.len()
        };
        self.open().saturating_sub(u32::try_from(there).unwrap_or(u32::MAX) + self.coming())
    }

    fn new_tag(&self) -> Box<str> {
        let Some(fleet) = &self.fleet else { return Box::default() };
        let mut member = fleet.member.borrow_mut();
        let number = member.number();
        member.tag(number, member.mark()).into()
    }

    /// Runs a change of the name, if there is one, and a command behind it.
    async fn tell(&self, conn: &mut ServerConn, name: &str, command: &str) -> Result<(), SettleError> {
        let mut text = if name.is_empty() { Vec::new() } else { crate::settings::name(name.as_bytes()) };
        text.extend_from_slice(command.as_bytes());
        self.clock.limit(LIMIT, conn.run(&text)).await.map_err(|_| SettleError)?
    }

    /// Changes the name, unless the server's clock shows `until`.
    async fn tell_in_time(&self, conn: &mut ServerConn, name: &str, until: u64) -> Result<(), SettleError> {
        let mut text = in_time(until).into_bytes();
        text.extend_from_slice(&crate::settings::name(name.as_bytes()));
        self.clock.limit(LIMIT, conn.run(&text)).await.map_err(|_| SettleError)?
    }

    // ---- probes ----

    /// Logs in without a claim, if that is the way now.
    pub(super) fn probe_if_allowed(self: &Rc<Self>) {
        let Some(fleet) = self.fleet.as_ref().filter(|fleet| !fleet.is_probing.get()) else { return };
        let demand = self.demand(0);
        let now = fleet.now(self.clock.now());
        if !fleet.member.borrow().may_probe(now, &demand) {
            return;
        }
        let Some(permit) = self.permit(self.waiters().0 > 0) else { return };
        fleet.is_probing.set(true);
        self.logging_in.set(self.logging_in.get() + 1);
        let pool = self.clone();
        tokio::task::spawn_local(async move {
            let tag = pool.new_tag();
            match pool.log_in(permit, tag).await {
                Ok(conn) => pool.start_proving(conn),
                Err(_) => pool.end_probe(),
            }
            pool.dial_if_wanted();
        });
    }

    fn end_probe(&self) {
        if let Some(fleet) = &self.fleet {
            fleet.is_probing.set(false);
        }
    }

    /// A connection that has no claim finds out whether it may stay.
    fn start_proving(self: &Rc<Self>, mut conn: Box<ServerConn>) {
        let Some(fleet) = &self.fleet else { return };
        fleet.is_probing.set(true);
        let probe = fleet.member.borrow_mut().probe(fleet.now(self.clock.now()), &self.demand(0));
        let on = OnErrand::new(self);
        tokio::task::spawn_local(async move {
            let pool = on.0.clone();
            let outcome = pool.prove(&mut conn, probe).await;
            pool.end_probe();
            drop(on);
            match outcome {
                Ok(true) => pool.offer(conn),
                Ok(false) => pool.discard(conn, DiscardReason::Shrink),
                Err(SettleError) => {
                    pool.note_silence();
                    pool.discard(conn, DiscardReason::Lost);
                }
            }
            pool.dial_if_wanted();
        });
    }

    /// Whether it may.
    async fn prove(&self, conn: &mut ServerConn, mut probe: Probe) -> Result<bool, SettleError> {
        let now = self.clock.now();
        let first = self.fleet.as_ref().map(|fleet| fleet.member.borrow_mut().first_mark(fleet.now(now), &probe));
        let mark = first.unwrap_or(Mark::Plain);
        self.tell(conn, &marked(conn, mark), "").await?;
        loop {
            let Some(fleet) = self.fleet.as_ref().filter(|fleet| !fleet.is_static.get()) else {
                self.tell(conn, "", "RESET application_name").await?;
                return Ok(true);
            };
            if self.waiters().0 == 0 && self.open() > self.least() {
                // Who wanted it is gone, or served.
                return Ok(false);
            }
            let Some(answers) = self.count(conn, ASK).await? else {
                if fleet.is_static.get() {
                    continue;
                }
                self.note_silence();
                return Ok(false);
            };
            let now = fleet.now(self.clock.now());
            let verdict = fleet.member.borrow_mut().prove(now, entropy(), &mut probe, answers.locked, &answers.census);
            match verdict {
                Verdict::Stays => {
                    self.tell(conn, "", "RESET application_name;COMMIT").await?;
                    return Ok(true);
                }
                Verdict::Again(mark, pause) => {
                    self.tell(conn, &marked(conn, mark), "COMMIT").await?;
                    self.clock.sleep(pause).await;
                }
                Verdict::Leaves => {
                    if !answers.locked {
                        fleet.mishap.set(NO_TURN);
                    }
                    tracing::info!(
                        pool = %self.name.database, user = %self.name.user, "{}", fleet.trouble()
                    );
                    return Ok(false);
                }
            }
        }
    }
}

/// The tag of a connection with another mark.
fn marked(conn: &ServerConn, mark: Mark) -> String {
    tag::marked(&conn.tag, mark)
}
