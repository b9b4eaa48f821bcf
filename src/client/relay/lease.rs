//! The lease of a session: taking a server connection, and the decision, when it is at rest, to audit it, keep it or give
//! it back.

use std::rc::Rc;
use std::task::Context as Task;

use pgweir_config::SequenceValues;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use super::super::end::End;
use super::super::request::{FORGET, PIPELINE_MAX};
use super::{Active, Lease, Proof, Relay, listen};
use crate::backend::{Lost, ServerConn, Unnamed, Values};
use crate::budget::tag;
use crate::cancel::Activity;
use crate::mutant::{Guard, lacks};
use crate::pool::{Pool, Taken};
use crate::prepared::{AUDIT, REPLAY};
use crate::settings;
use crate::sql;
use crate::state::{self, Findings, Known};
use crate::stats::{PinReason, Reason as _};

impl Relay {
    /// Takes a server connection. False if it has to be waited for.
    ///
    /// `ahead` is what the client has sent for it.
    pub(super) fn acquire(&mut self, ahead: &[u8], cx: &mut Task<'_>) -> Result<bool, End> {
        if self.routing.is_some() && !self.route(ahead, cx)? {
            return Ok(matches!(self.lease, Lease::Held(_)));
        }
        let again = if self.values == 0 { None } else { self.pool.lend_again(self.values, cx) };
        if let Some(conn) = again.or_else(|| self.pool.try_lease(&self.profile, cx)) {
            self.armed = true;
            self.begin(conn, cx)?;
            return Ok(true);
        }
        self.note(Activity::Waiting);
        self.lease = Lease::Waiting(self.pool.wait(cx));
        Ok(false)
    }

    /// A lease begins: the client's settings first.
    pub(super) fn begin(&mut self, mut conn: Box<ServerConn>, cx: &mut Task<'_>) -> Result<(), End> {
        self.note(Activity::Running);
        let now = self.context.clock.moment();
        self.entry.begun.set(now);
        // Ordinary tables may be temporary ones under such a path.
        let temporary = self.profile.get("search_path").is_some_and(sql::names_temp_schema);
        let catalog = self.pool.catalog.key();
        if conn.strays {
            conn.end_strays();
        }
        let own = self.owns_values(&mut conn);
        let is_home = Rc::ptr_eq(&self.pool, &self.lender);
        let forgets = !own && is_home && self.pool.catalog.sequences.are_asked_for() && !lacks(Guard::Sequences);
        let active = self.active();
        (active.leased, active.begun) = (now, now);
        active.proof = Proof::Open;
        active.catalog = catalog;
        active.marks.begin_values(own || forgets);
        active.marks.placing.begin();
        active.aside.begin_reports();
        active.proving = false;
        debug_assert!(!active.marks.listens_too, "no server connection is known to");
        (active.cancels, active.overdue, active.yields) = (0, None, false);
        active.marks.tainted |= temporary;
        self.lease = Lease::Held(conn);
        self.replay(forgets, cx)?;
        if self.owes_begin() { self.replay_begin(cx) } else { Ok(()) }
    }

    /// Makes the settings on the server connection the client's, if they are not; before, if it `forgets`, nothing is to be
    /// left of what `nextval` gave anyone.
    #[inline]
    fn replay(&mut self, forgets: bool, cx: &mut Task<'_>) -> Result<(), End> {
        let Lease::Held(conn) = &self.lease else { return Ok(()) };
        let is_same = Rc::ptr_eq(&conn.profile, &self.profile);
        if is_same && !forgets || lacks(Guard::Journal) { Ok(()) } else { self.replay_all(is_same, forgets, cx) }
    }

    fn replay_all(&mut self, is_same: bool, forgets: bool, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        let is_proven = is_same || self.profile.is_proven_in(conn.incarnation.number());
        let hold = !is_proven || conn.profile.is_risky() || self.profile.is_risky();
        let mut message = Vec::new();
        if forgets {
            encode::query(&mut message, FORGET);
            conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        }
        let mut texts = 0;
        conn.replay(&self.profile, |text| {
            encode::query(&mut message, text);
            texts += 1;
        });
        for _ in 0..texts {
            conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        }
        conn.profile = self.profile.clone();
        if message.is_empty() {
            return Ok(());
        }
        conn.unnamed = Unnamed::Empty;
        active.aside.replaying = true;
        (active.hold, active.proving) = (hold, !is_proven);
        match conn.write(cx, &message, &[]) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(Lost::Io(error.kind()), cx),
        }
    }

    /// After answers: is the server connection at rest, and what then?
    pub(super) fn rest(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        if active.hold && !active.aside.replaying {
            if std::mem::take(&mut active.proving) {
                conn.profile.prove_in(conn.incarnation.number());
            }
            if let Some(subscriber) = &mut self.subscriber
                && listen::settle(subscriber, active)
            {
                return self.silence(cx);
            }
            active.aside.scrubbing = false;
            // What waited for it comes first: without it the connection would go on to the next, unused.
            active.hold = false;
            active.resume = true;
            let stays = self.routing.as_mut().is_none_or(|routing| routing.held_out(&self.pool, &self.lender));
            if !active.backlog.input.is_empty() && stays {
                return self.replay(false, cx);
            }
        }
        if active.aside.audited {
            self.audited(cx)?;
            return self.rest(cx);
        }
        let settled = if lacks(Guard::Release) { conn.pipeline.depth() == 0 } else { conn.pipeline.is_settled() };
        if !settled {
            let waits = active.stalled || !active.backlog.input.is_empty();
            active.resume |= waits && conn.pipeline.depth() <= PIPELINE_MAX / 2;
            return Ok(());
        }
        active.resume |= active.stalled || !active.backlog.input.is_empty();
        if conn.pipeline.status() != TxStatus::Idle && !lacks(Guard::Release) {
            self.note(Activity::InTransaction);
            return Ok(());
        }
        if self.is_free() {
            return self.end_lease(cx);
        }
        if self.holds_half_a_message() {
            // Whoever waits for this connection would wait for the other half, which may never come.
            return self.lose(Lost::Protocol, cx);
        }
        Ok(())
    }

    /// Whether all that keeps the lease is the front of a message that nobody asked for, and nothing is lost with it but
    /// the server connection.
    fn holds_half_a_message(&self) -> bool {
        let (Lease::Held(conn), Some(active)) = (&self.lease, &self.active) else { return false };
        // What has come for a follower meanwhile waits for the end of the lease.
        let goes_on = self.routing.as_ref().is_none_or(|routing| routing.goes_on(&self.pool, &self.lender));
        !conn.carry.is_empty()
            && conn.unsent.is_empty()
            && !conn.scanner.is_inside()
            && !self.scanner.is_inside()
            && !self.keeps
            && !self.pinned
            && !active.marks.tainted
            && active.marks.pins.is_empty()
            && (active.backlog.input.is_empty() || !goes_on)
    }

    /// The check that stands between two clients: nothing owed, nothing half sent, nothing half read.
    #[inline]
    pub(super) fn is_free(&self) -> bool {
        let Lease::Held(conn) = &self.lease else { return false };
        lacks(Guard::Release)
            || conn.pipeline.is_free()
                && conn.unsent.is_empty()
                && conn.carry.is_empty()
                && !conn.scanner.is_inside()
                && !self.scanner.is_inside()
    }

    /// The transaction is over: audit, keep, or release.
    pub(super) fn end_lease(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        if std::mem::take(&mut active.marks.defines) {
            self.pool.catalog.ends(&mut conn.defines);
        }
        if std::mem::take(&mut active.marks.redefaults) {
            self.pool.renew();
        }
        if self.keeps {
            self.note(Activity::Idle);
            return Ok(());
        }
        let catalog = self.pool.catalog.key();
        if std::mem::replace(&mut active.catalog, catalog) != catalog && active.proof == Proof::Open {
            // Something was judged by a catalog that has changed meanwhile. (Behind an audit nothing ran: what was found
            // may be reset already.)
            active.marks.runs_unjudged();
        }
        if self.pool.limits.audit_every > 0
            && !active.marks.tainted
            && !active.marks.listens_too
            && !active.marks.pins.has(PinReason::Unknown)
            && active.proof == Proof::Open
            && self.pool.is_sampled()
        {
            self.give_way();
            return self.sample(cx);
        }
        let unread = active.marks.tainted || active.marks.listens_too && active.proof == Proof::Open;
        if unread && !lacks(Guard::Taint) {
            self.give_way();
            return self.audit(cx);
        }
        active.yields = false;
        // SET LOCAL is over.
        active.marks.settle();
        if active.marks.listening && self.ends_listening(cx)? {
            return Ok(());
        }
        let Some(active) = &mut self.active else { return Ok(()) };
        if !active.marks.pins.is_empty() && !lacks(Guard::Pins) {
            let listens = active.marks.pins.has(PinReason::Listen) && !self.pinned;
            if self.is_on_follower() {
                self.give_up_follower();
                return Ok(());
            }
            self.note(Activity::Idle);
            self.pin()?;
            if listens {
                self.pool.stats.borrow_mut().pins.add(PinReason::Listen);
                tracing::debug!(client = self.entry.pid, reason = "listen", "server connection pinned");
            }
            return self.replay(false, cx);
        }
        if std::mem::take(&mut active.marks.scrub) {
            return self.scrub(cx);
        }
        self.unpin();
        self.release();
        Ok(())
    }

    /// Whether what sequences gave on a server connection is the client's own, or there is nothing. How the client leaves it is
    /// told at the end of the lease, if it is.
    #[inline]
    pub(super) fn owns_values(&self, conn: &mut ServerConn) -> bool {
        match conn.values {
            Values::None => {
                conn.values = Values::Anyones;
                true
            }
            Values::Anyones => false,
            Values::Own { lease, any, .. } => {
                let own = lease == self.values;
                conn.values = if own { Values::Own { lease, any, asks: false } } else { Values::Anyones };
                own
            }
        }
    }

    /// At the end of a lease: where the client finds what sequences gave it, if it is known to be its own.
    #[cold]
    fn leave_values(&mut self) {
        if self.is_on_follower() {
            return;
        }
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &self.active) else { return };
        let marks = &active.marks;
        if !marks.own_values || self.pool.limits.sequence_values == SequenceValues::Off {
            conn.values = Values::Anyones;
            self.values = 0;
            return;
        }
        let taken = match (marks.asks_values, marks.takes_values) {
            (true, _) => Taken::Told,
            (false, true) => Taken::Some,
            (false, false) => Taken::None,
        };
        (self.values, conn.values) = self.pool.catalog.sequences.leave(conn.values, taken, &mut self.asked);
    }

    pub(super) fn release(&mut self) {
        if self.pool.catalog.sequences.are_asked_for() {
            self.leave_values();
        }
        if let Some(conn) = self.let_go() {
            self.lender.release(conn);
        }
    }

    /// The lease ends. Whoever gets the server connection is to have it from here.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in two places, by one of them in every transaction")]
    pub(super) fn let_go(&mut self) -> Option<Box<ServerConn>> {
        let Lease::Held(conn) = std::mem::replace(&mut self.lease, Lease::None) else {
            return None;
        };
        self.note(Activity::Idle);
        if let Some(active) = &mut self.active {
            let taken = self.context.clock.moment().since(active.leased);
            self.lender.stats.borrow_mut().transaction.record(taken);
            if active.is_blank()
                && let Some(active) = self.active.take()
            {
                self.context.actives.put_back(active);
            }
        }
        Some(conn)
    }

    // ---- pins and audits ----

    /// The client's transaction is over, and only what it left has to be seen: others that wait for the server connection have it
    /// before what the client sends meanwhile.
    #[cold]
    fn give_way(&mut self) {
        let waited_for = !self.pinned && self.lender.is_waited_for();
        self.active().yields = waited_for;
    }

    /// Whether what the client sends is left where it is until others have had the server connection.
    pub(super) fn gives_way(&self) -> bool {
        matches!(self.lease, Lease::Held(_)) && self.active.as_ref().is_some_and(|active| active.yields)
    }

    /// Asks the server what the client left behind.
    pub(super) fn audit(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        active.aside.audits_client = std::mem::take(&mut active.marks.tainted);
        active.proof = Proof::Asked;
        let suspects = self.pool.catalog.surveyed();
        let hidden = if active.marks.hidden { suspects.names() } else { &[] };
        let others = self.profile.names().chain(active.marks.custom.iter().chain(hidden).map(|name| &**name));
        let (custom, all) = state::carried(self.startup.names(), others);
        let mut text = Vec::new();
        state::audit(self.pool.login_user(), &custom, &mut text);
        if !all {
            // The server connection knows them all.
            active.marks.pins.add(PinReason::Settings);
        }
        active.aside.samples = false;
        Self::ask(conn, active, &text, cx).or_else(|lost| self.lose(lost, cx))
    }

    /// Asks the server whether it has what is known to be there, and nothing else.
    #[cold]
    fn sample(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        active.proof = Proof::Sampled;
        // Of a client that has more than are carried not all are known.
        let is_known = !active.marks.pins.has(PinReason::Settings);
        let foreign = if is_known { self.pool.profiles.custom() } else { Vec::new() };
        let mut text = Vec::new();
        known(conn, &self.pool, &self.profile).prove(foreign.iter().map(|name| &**name), &mut text);
        active.aside.audits_client = false;
        active.aside.samples = true;
        Self::ask(conn, active, &text, cx).or_else(|lost| self.lose(lost, cx))
    }

    fn ask(conn: &mut ServerConn, active: &mut Active, text: &[u8], cx: &mut Task<'_>) -> Result<(), Lost> {
        active.aside.audit = Some(Findings::default());
        let mut message = Vec::new();
        encode::query(&mut message, text);
        conn.pipeline.sent(Expect::Query, Origin::Pooler, AUDIT);
        conn.unnamed = Unnamed::Empty;
        conn.write(cx, &message, &[]).map_err(|error| Lost::Io(error.kind()))
    }

    /// Resets what an audit cannot see. The client's profile, which is what an audit can, is replayed at its next lease.
    fn scrub(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        // An audit would find what is reset now, and take it for the client's wish.
        active.proof = Proof::Given;
        active.aside.scrubbing = true;
        // What the client sends meanwhile waits, and gets its settings first.
        active.aside.replaying = true;
        active.hold = true;
        let (mut message, mut texts) = (Vec::new(), 0);
        let scrubs = conn.scrub(|text| {
            encode::query(&mut message, text);
            texts += 1;
        });
        if scrubs.is_none() {
            return self.replay_failed(b"", cx);
        }
        for _ in 0..texts {
            conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        }
        conn.unnamed = Unnamed::Empty;
        conn.profile = self.pool.profiles.plain();
        match conn.write(cx, &message, &[]) {
            Ok(()) => Ok(()),
            Err(error) => self.lose(Lost::Io(error.kind()), cx),
        }
    }

    pub(super) fn audited(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        active.aside.audited = false;
        active.aside.cancelled = 0;
        let samples = std::mem::take(&mut active.aside.samples);
        if active.proof != Proof::Open {
            active.proof = Proof::Given;
        }
        let Some(mut findings) = active.aside.audit.take() else {
            return Err(End::Broken("an audit nobody asked for"));
        };
        if !conn.tag.is_empty() && !samples {
            untag(conn, [&self.profile, &self.startup], &mut findings);
        }
        let marks = &mut active.marks;
        let failed = marks.pins.has(PinReason::Unknown);
        if !failed {
            listen::found(&mut self.subscriber, marks, &mut findings);
        }
        // Who resets everything resets what the operator wanted for everybody.
        marks.scrub |= active.aside.audits_client && conn.has_connect_query();
        if samples {
            known(conn, &self.pool, &self.profile).forgive(&mut findings);
        }
        if samples && !failed && !findings.agree_with(marks.pins) {
            // Nothing suggested that this server connection was not clean: a defect of ours.
            self.lender.stats.borrow_mut().audit_failures += 1;
            tracing::error!(client = self.entry.pid, server_pid = conn.pid, found = %findings, "an audit found what was not known");
            // What pins may be this client's, which then keeps it. Of settings nobody knows whose they are.
            conn.littered |= !findings.differing.is_empty();
        }
        let mut back_at_startup = Vec::new();
        if !failed && !samples {
            conn.profile = self.pool.profiles.intern(findings.settings.iter().cloned());
            let mut settings = findings.settings;
            // What was set and is not any more was RESET, and so is as at the client's start-up; unless the client has
            // changed it again since.
            let is_left = |name: &str| marks.leaves_role && name == "role";
            for (name, value) in self.startup.entries().iter().filter(|(name, _)| !marks.tainted && !is_left(name)) {
                if conn.profile.get(name).is_none() && self.profile.get(name).is_some() {
                    settings.push((name.clone(), value.clone()));
                    // The client may have the front of a row of its next answer: nothing can be told in the middle of it.
                    if !conn.scanner.is_inside() {
                        back_at_startup.push(name.clone());
                    }
                }
            }
            self.profile = self.pool.profiles.intern(settings);
        }
        let mut pins = marks.pins.lasting();
        for reason in findings.pins.iter() {
            pins.add(reason);
        }
        // Whether who listens keeps its server connection is not known yet.
        let known = |reason: &PinReason| *reason != PinReason::Listen;
        // Nor are any counted again that nobody asked for.
        let is_new = |reason: &PinReason| !marks.pins.has(*reason) || !samples && !self.pinned;
        for reason in pins.iter().filter(known).filter(is_new) {
            self.lender.stats.borrow_mut().pins.add(reason);
            tracing::debug!(client = self.entry.pid, reason = reason.as_str(), "server connection pinned");
        }
        marks.pins = pins;
        marks.placing.prepares |= pins.has(PinReason::Prepare);
        if !marks.tainted {
            marks.custom.clear();
            marks.hidden = false;
            marks.leaves_role = false;
        }
        marks.settle();
        // What the client sent meanwhile may have changed things again.
        marks.unsettled |= marks.tainted;
        marks.reads_otherwise |= marks.tainted;
        if !marks.tainted && !failed {
            marks.listening = pins.has(PinReason::Listen) || marks.listens_too;
        }
        self.tell_startup_values(&back_at_startup, cx)
    }

    /// The server told the client its own defaults when these were reset; the client's are others.
    fn tell_startup_values(&mut self, names: &[Box<str>], cx: &mut Task<'_>) -> Result<(), End> {
        let Some(reported) = self.startup.reported().filter(|_| !names.is_empty()) else {
            return Ok(());
        };
        let mut out = Vec::new();
        if let Some(active) = &mut self.active {
            active.aside.told.retain(|(name, _)| !names.iter().any(|reset| reset.eq_ignore_ascii_case(name)));
        }
        for (name, value) in reported.iter() {
            if names.iter().any(|reset| reset.eq_ignore_ascii_case(name)) {
                encode::parameter_status(&mut out, name.as_bytes(), value);
            }
        }
        self.write_client(cx, &out, &[])
    }

    pub(super) fn pin(&mut self) -> Result<(), End> {
        if !self.pinned {
            let limit = self.pool.limits.max_pinned;
            if self.pool.pinned.get() >= limit {
                return Err(End::PinLimit { limit });
            }
            self.pinned = true;
            self.entry.keeps.set(true);
            self.pool.pinned.set(self.pool.pinned.get() + 1);
        }
        Ok(())
    }

    pub(super) fn unpin(&mut self) {
        if std::mem::take(&mut self.pinned) {
            self.entry.keeps.set(self.keeps);
            self.pool.pinned.set(self.pool.pinned.get().saturating_sub(1));
        }
    }

    pub(super) fn note(&self, activity: Activity) {
        self.entry.activity.set(activity);
        self.entry.since.set(self.context.clock.moment());
    }
}

/// What a server connection has, if all that we did to it was right. Its client's settings are these.
fn known<'a>(conn: &'a ServerConn, pool: &'a Pool, own: &'a settings::Profile) -> Known<'a> {
    Known {
        login: pool.login_user(),
        own,
        sent: &conn.profile,
        baseline: conn.baseline.as_deref(),
        tag: &conn.tag,
        is_untagged: conn.untagged,
    }
}

/// What an audit found of the name is the client's part of it. If that is all there is, the client took the tag away.
///
/// One that was cut to fit beside the tag is known by what the client had or has: its profiles, the present one first.
fn untag(conn: &mut ServerConn, profiles: [&settings::Profile; 2], findings: &mut Findings) {
    conn.untagged = false;
    let is_name = |(name, _): &settings::Entry| **name == *settings::APPLICATION_NAME;
    let Some(at) = findings.settings.iter().position(is_name) else {
        // It was reset: it is the one of the login, which may not say yet that the pool leaves.
        conn.untagged = tag::is_leaving(&conn.tag);
        return;
    };
    let Some((name, told)) = findings.settings.get_mut(at) else { return };
    conn.untagged = !told.ends_with(conn.tag.as_bytes());
    let mut owns = profiles.iter().filter_map(|profile| profile.get(name));
    let own = owns.find(|own| settings::tagged(own, &conn.tag) == **told);
    let shown: Box<[u8]> = conn.shown(told, own).into();
    if shown.is_empty() && !conn.untagged && profiles[0].get(name).is_none() {
        // The client has set none.
        findings.settings.remove(at);
    } else {
        *told = shown;
    }
}
