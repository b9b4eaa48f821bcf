//! A query's way, read down this page:
//!
//! `read_client → inspect → acquire → write_server → read_server → inspect → write_client → release`
//!
//! Everything happens in one poll, from a buffer that the worker lends: bytes are copied only when a socket
//! will not take them, a message is incomplete, or a server connection has to be waited for.

mod active;
mod away;
mod ear;
mod fallback;
mod farewell;
mod holding;
mod lease;
mod listen;
mod loss;
mod overdue;
mod rerun;
mod routing;
mod slow;
mod write;

use std::io;
use std::rc::Rc;
use std::task::{Context as Task, Poll};

use pgweir_config::PoolMode;
use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::Tag;
use pgweir_proto::pipeline::Origin;
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

use super::answer::{Answer, Heard, Rules, Told};
use super::end::End;
use super::plan::Plan;
use super::request::{Request, Stop};
use super::statements::Statements;
use super::{Context, Scratch};
use crate::backend::{Defines, KEPT_CAPACITY, Lost, ServerConn};
use crate::cancel::{Activity, Entry, Order};
use crate::net::Stream;
use crate::pool::{Pool, Ticket};
use crate::settings::Profile;
use crate::state::Subscriber;
use crate::stats::PinReason;

pub use active::Active;
use active::Proof;
use ear::Ear;
use routing::{Ends, Routing, Way};

/// Rounds of reading in one poll before other sessions get a turn.
const ROUNDS: u32 = 16;

/// What a client may send ahead while it waits for a server connection; bytes. More stays in its socket.
const AHEAD_MAX: usize = 64 * 1024;

/// The server connection of a session.
#[derive(Debug)]
enum Lease {
    None,
    Waiting(Ticket),
    Held(Box<ServerConn>),
}

/// One logged-in client.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts beside the state, which is the lease")]
pub struct Relay {
    context: Rc<Context>,
    entry: Rc<Entry>,
    /// Of the database's primary: whose client it is, with its limits, settings and catalog.
    pool: Rc<Pool>,
    /// Whose server connection the lease is of, or waits for: that pool, or one of a follower. It means nothing without a
    /// lease.
    lender: Rc<Pool>,
    /// What leads to followers; none if there are none to be used.
    routing: Option<Box<Routing>>,
    link: Stream,
    scanner: Scanner,
    lease: Lease,
    profile: Rc<Profile>,
    /// What RESET goes back to.
    startup: Rc<Profile>,
    statements: Statements,
    active: Option<Box<Active>>,
    /// What it listens to by the hub.
    subscriber: Option<Box<Subscriber>>,
    /// It keeps its server connection from the start to the end: in session mode, and if that was opened for it alone.
    keeps: bool,
    /// The server connection is counted as pinned.
    pinned: bool,
    /// The server connection's waker was set when it was taken, just now.
    armed: bool,
    /// Whether the client is listened to.
    ear: Ear,
    /// Leases for which it is, whatever the server does: it was found to send ahead.
    eager: u8,
    /// It has asked what sequences gave it since a server connection was held for that.
    asked: bool,
    /// Its last lease's number, by which it finds what they gave; 0 for none.
    values: u64,
    /// In the middle of a poll: if it is dropped like this, it panicked.
    at_work: bool,
    /// The goodbye was said: nothing is left for `Drop` to do.
    ended: bool,
}

impl Relay {
    /// A session whose client was just told that it is ready. `conn` is its server connection, if it keeps one from
    /// the start; `input` are bytes that it sent ahead.
    pub fn new(
        context: Rc<Context>,
        entry: Rc<Entry>,
        pool: Rc<Pool>,
        link: Stream,
        profile: Rc<Profile>,
        conn: Option<Box<ServerConn>>,
        input: Vec<u8>,
    ) -> Self {
        pool.clients.set(pool.clients.get() + 1);
        let scanner = Scanner::new(u32::try_from(context.config.client.max_packet_size).unwrap_or(u32::MAX));
        let own = conn.as_ref().is_some_and(|conn| conn.own);
        let routing = Routing::of(&context.router, &pool);
        let is_session = pool.limits.mode == PoolMode::Session;
        let mut relay = Self {
            context,
            entry,
            lender: pool.clone(),
            pool,
            routing,
            link,
            scanner,
            lease: Lease::None,
            startup: profile.clone(),
            profile,
            statements: Statements::default(),
            active: None,
            subscriber: None,
            keeps: own || is_session,
            pinned: own && !is_session,
            armed: false,
            ear: Ear::Open,
            eager: 0,
            asked: false,
            values: 0,
            at_work: false,
            ended: false,
        };
        relay.entry.keeps.set(relay.keeps);
        if let Some(mut conn) = conn {
            let own = relay.owns_values(&mut conn);
            let active = relay.active();
            active.marks.placing.begin();
            active.aside.begin_reports();
            active.cancels = 0;
            let marks = &mut active.marks;
            marks.begin_values(own);
            marks.listening = true;
            if conn.own {
                marks.pins.add(PinReason::Startup);
                // Texts mean what its start-up parameters make of them, which its profile does not tell.
                marks.unsettled = true;
            }
            relay.lease = Lease::Held(conn);
        }
        if !input.is_empty() {
            let active = relay.active();
            active.backlog.input = input;
            active.resume = true;
        }
        relay
    }

    /// Moves what can be moved. Ready when the session is over; the goodbye is already on its way then.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in one place, twice in every transaction")]
    pub fn poll(&mut self, cx: &mut Task<'_>) -> Poll<()> {
        self.context.clock.turn();
        self.entry.set_waker(cx.waker());
        let mut scratch = self.context.scratch.lend();
        self.at_work = true;
        let mut outcome = self.turn(cx, &mut scratch);
        if self.subscriber.is_some() && outcome.is_ok() {
            outcome = self.tend(cx);
        }
        self.context.scratch.put_back(scratch);
        if let Err(end) = &outcome {
            // Who said goodbye does not wait to be answered.
            let quit = matches!(end, End::Gone(_)) && self.said_goodbye();
            self.finish(if quit { &End::Quit } else { end });
        }
        self.at_work = false;
        if outcome.is_ok() { Poll::Pending } else { Poll::Ready(()) }
    }

    fn turn(&mut self, cx: &mut Task<'_>, scratch: &mut Scratch) -> Result<(), End> {
        // What a socket has is known only from asking it, and asking it in vain arms its waker: each is asked once, and
        // again after it gave something or the other side made room for more.
        let (mut ask_server, mut ask_client) = (true, self.listens());
        for _ in 0..ROUNDS {
            self.heed(cx)?;
            if ask_server {
                ask_server = self.turn_server(cx, scratch)?;
                ask_client |= ask_server && self.reopen_ear() || self.resumes();
                ask_server &= !matches!(self.lease, Lease::None);
            }
            if ask_client {
                let moved = self.turn_client(cx, scratch)?;
                let armed = std::mem::take(&mut self.armed);
                ask_server |= moved && !armed;
                ask_client = moved && !self.shut_ear();
            }
            if !(ask_server || ask_client) {
                // What waited for the end of the transaction, or of a replay, may have its turn now.
                let waits = self.resumes();
                self.heed(cx)?;
                ask_client = !waits && self.resumes();
                if !ask_client {
                    return Ok(());
                }
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// Whether kept input is to be looked at.
    #[inline]
    fn resumes(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.resume)
    }

    /// Orders and cancel requests from outside.
    #[inline]
    fn heed(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        if self.entry.called.get() { self.heed_call(cx) } else { Ok(()) }
    }

    #[cold]
    fn heed_call(&mut self, cx: &mut Task<'_>) -> Result<(), End> {
        if self.context.registry.is_asked(&self.entry) {
            self.tell_holding();
        }
        if self.entry.is_cancelled() {
            self.cancel()?;
        }
        if !self.bars_cancel()
            && let Some(begun) = self.entry.take_again()
            && self.is_alone_at_work(begun)
        {
            self.cancel_server(Vec::new());
        }
        // What cannot be heeded yet is looked at again whenever something has moved.
        let again = self.entry.cancels_again();
        self.entry.called.set(again || self.entry.is_cancelled() || self.entry.order.get() != Order::None);
        match self.entry.order.get() {
            Order::None => Ok(()),
            Order::Drain if !self.is_at_rest() => Ok(()),
            Order::QueryLong => {
                self.entry.order.set(Order::None);
                self.end_query(cx)
            }
            Order::Stopped if !self.has_stopped() => {
                self.entry.order.set(Order::None);
                self.ask_for_answers(cx)
            }
            Order::TransactionLong if !self.is_transaction_long() => {
                self.entry.order.set(Order::None);
                Ok(())
            }
            order => Err(End::Told(order)),
        }
    }

    /// Between two transactions, as far as the client knows.
    fn is_at_rest(&self) -> bool {
        let free = match &self.lease {
            Lease::None => true,
            Lease::Waiting(_) => false,
            Lease::Held(conn) => conn.pipeline.is_free() && !self.scanner.is_inside(),
        };
        free && self.active.as_ref().is_none_or(|active| active.local.is_none())
            && !self.owes_begin()
            && !self.awaits_lease()
    }

    #[inline]
    fn active(&mut self) -> &mut Active {
        let context = &self.context;
        self.active.get_or_insert_with(|| context.actives.lend(context.clock.moment()))
    }

    // ---- server to client ----

    fn turn_server(&mut self, cx: &mut Task<'_>, scratch: &mut Scratch) -> Result<bool, End> {
        if self.has_output() && !self.flush_client(cx)? {
            return Ok(false);
        }
        let Lease::Held(conn) = &mut self.lease else {
            return Ok(false);
        };
        if !conn.unsent.is_empty() {
            if let Err(error) = conn.flush(cx) {
                return self.lose(Lost::Io(error.kind()), cx).map(|()| true);
            }
            if conn.unsent.is_empty() {
                // What stopped for want of room may go on.
                self.active().resume = true;
            }
        }
        let Lease::Held(conn) = &mut self.lease else {
            return Ok(false);
        };
        // What is kept of an incomplete message is put in front of what follows it; a long one grows where it is.
        let carried = conn.carry.len();
        let front = if carried <= scratch.input.len() / 2 { carried } else { 0 };
        if let (Some(room), Some(kept)) = (scratch.input.get_mut(..front), conn.carry.get(..front)) {
            room.copy_from_slice(kept);
        }
        let read = match conn.poll_read(cx, scratch.input.get_mut(front..).unwrap_or_default()) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(0)) => return self.lose(Lost::Io(io::ErrorKind::UnexpectedEof), cx).map(|()| true),
            Poll::Ready(Err(error)) => return self.lose(Lost::Io(error.kind()), cx).map(|()| true),
            Poll::Ready(Ok(read)) => read,
        };
        let mut carry = std::mem::take(&mut conn.carry);
        let Scratch { input, made } = scratch;
        let mut outcome = Ok(());
        if front == carried {
            carry.clear();
            let input = input.get(..front + read).unwrap_or_default();
            let used = self.take_answers(input, made, cx, &mut outcome);
            carry.extend_from_slice(input.get(used..).unwrap_or_default());
        } else {
            carry.extend_from_slice(input.get(..read).unwrap_or_default());
            let used = self.take_answers(&carry, made, cx, &mut outcome);
            carry.drain(..used);
            if carry.is_empty() {
                carry = Vec::new();
            }
        }
        // Whatever became of the client: what the server connection said must not be lost on the way, or its next
        // bytes would be read as something else. If the lease is gone, it is nobody's.
        if let Lease::Held(conn) = &mut self.lease {
            conn.carry = carry;
        }
        outcome?;
        self.rest(cx)?;
        Ok(true)
    }

    #[inline]
    fn rules(&self) -> Rules {
        let rerun = self.active.as_ref().map(|active| &active.rerun);
        Rules {
            now: self.context.clock.moment(),
            prefix: self.context.interner.prefix,
            statement_mode: self.pool.limits.mode == PoolMode::Statement,
            statements_max: self.context.config.client.max_client_statements as usize,
            heals: rerun.is_some_and(rerun::Rerun::is_kept),
            elsewhere: rerun.is_some_and(rerun::Rerun::is_routed),
            harmless: rerun.is_some_and(rerun::Rerun::is_harmless),
            follower: self.is_on_follower(),
            owes_begin: self.owes_begin(),
            pid: self.entry.pid,
        }
    }

    /// Reads the server's messages and writes the client's share of them. Returns the bytes dealt with.
    fn take_answers(
        &mut self,
        input: &[u8],
        made: &mut Vec<u8>,
        cx: &mut Task<'_>,
        outcome: &mut Result<(), End>,
    ) -> usize {
        let rules = self.rules();
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            *outcome = Err(End::Broken("an answer without a lease"));
            return 0;
        };
        let begun = active.aside.query_begun;
        let before = self.context.slow.as_ref().map(|_| slow::Before::of(&self.lender.stats.borrow(), begun));
        let before_routed = self.routing.as_ref().map(|_| Ends::of(&self.lender.stats.borrow(), &active.marks));
        let mut plan = Plan::new(input, made);
        let mut stats = self.lender.stats.borrow_mut();
        let mut answer = Answer {
            conn,
            statements: &mut self.statements,
            marks: &mut active.marks,
            aside: &mut active.aside,
            stats: &mut stats,
            subscriber: self.subscriber.as_deref(),
            startup: &self.startup,
            rules: &rules,
            told: Told::default(),
        };
        let heard = answer.inspect(&mut plan);
        let told = answer.told;
        drop(stats);
        if let (Some(before), Some(routing)) = (before_routed, &mut self.routing) {
            // Before the client is told.
            if before.may_have_committed(&self.lender.stats.borrow()) {
                routing.ended(rules.now, conn);
            }
            if std::mem::take(&mut active.aside.notified) {
                routing.told(rules.now);
            }
        }
        let used = plan.at();
        let (first, second) = plan.slices();
        match first.len() + second.len() {
            0 => {}
            // What we answered ourselves, or the server said of its own accord, is no word of its answer.
            all if all == told.bytes && !active.rerun.is_routed() => active.rerun.answered(told.answers),
            // Nor is what comes between an error that is not told and its ReadyForQuery.
            _ if active.aside.healing || matches!(heard, Heard::Again) => {}
            _ => active.rerun.settle(),
        }
        if let Some(before) = before {
            self.tell_slow(before, rules.now);
        }
        *outcome = self.write_client(cx, first, second);
        if outcome.is_ok() && !matches!(heard, Heard::Short) {
            *outcome = self.heard_otherwise(heard, cx);
        }
        used
    }

    #[cold]
    fn heard_otherwise(&mut self, heard: Heard, cx: &mut Task<'_>) -> Result<(), End> {
        match heard {
            Heard::Short => Ok(()),
            Heard::Lost(lost) => self.lose(lost, cx),
            Heard::ReplayFailed(body) => self.replay_failed(&body, cx),
            Heard::TransactionBlock => Err(End::StatementMode),
            Heard::Again if self.is_on_follower() => self.leave_follower(cx),
            Heard::Again => self.run_healed(),
        }
    }

    // ---- client to server ----

    fn turn_client(&mut self, cx: &mut Task<'_>, scratch: &mut Scratch) -> Result<bool, End> {
        if self.has_output() {
            return Ok(false);
        }
        let mut moved = self.granted(cx)?;
        let had = matches!(self.lease, Lease::Held(_));
        let waiting = match &self.lease {
            Lease::Waiting(_) => true,
            Lease::Held(conn) if !conn.unsent.is_empty() => return self.look_after_client().map(|()| moved),
            Lease::Held(_) | Lease::None => false,
        };
        if let Some(active) = &mut self.active {
            if active.yields && had {
                // What woke it may have been spent on this.
                self.leave_unheard();
                return self.look_after_client().map(|()| moved);
            }
            if active.hold || active.aside.healing {
                // What runs again comes before whatever follows it.
                return self.look_after_client().map(|()| moved);
            }
            if std::mem::take(&mut active.resume) && !waiting {
                active.stalled = false;
                moved |= self.take_backlog(cx, &mut scratch.made)?;
                // It may have come to nothing but another way, which is to be gone now.
                moved |= self.active.as_ref().is_some_and(|active| active.resume && !active.stalled);
                // A new lease has to be asked for answers, even if nothing of the client's was sent yet.
                moved |= !had && matches!(self.lease, Lease::Held(_));
            }
        }
        // What was kept may have had to queue up.
        let waiting = matches!(self.lease, Lease::Waiting(_));
        if self.active.as_ref().is_some_and(|active| active.stalled) {
            return self.look_after_client().map(|()| moved);
        }
        self.read_client(cx, scratch, waiting).map(|read| read || moved)
    }

    /// The end of a wait.
    fn granted(&mut self, cx: &mut Task<'_>) -> Result<bool, End> {
        let Lease::Waiting(ticket) = &self.lease else {
            return Ok(false);
        };
        let granted = match ticket.poll(cx) {
            Poll::Pending => return Ok(false),
            Poll::Ready(granted) => granted,
        };
        self.lease = Lease::None;
        self.active().resume = true;
        if self.is_on_follower() && !self.accepts(granted.as_deref().ok()) {
            // Not the server that was chosen, or none: what waits goes to the primary.
            if let Ok(conn) = granted {
                self.lender.release(conn);
            }
            return Ok(true);
        }
        match granted {
            Ok(conn) => {
                if self.context.slow.is_some() {
                    self.note_wait();
                }
                self.begin(conn, cx).map(|()| true)
            }
            Err(refusal) => self.refuse(refusal).map(|()| true),
        }
    }

    fn read_client(&mut self, cx: &mut Task<'_>, scratch: &mut Scratch, waiting: bool) -> Result<bool, End> {
        let have = self.active.as_ref().map_or(0, |active| active.backlog.input.len());
        if waiting && have >= AHEAD_MAX {
            return self.look_after_client().map(|()| false);
        }
        let read = match self.link.poll_read(cx, &mut scratch.input) {
            Poll::Pending => {
                self.heard(false);
                return Ok(false);
            }
            Poll::Ready(Ok(0)) if waiting && self.said_goodbye() => {
                // What it sent before still runs, as in Postgres; then its goodbye is heard.
                self.active().stalled = true;
                return Ok(false);
            }
            Poll::Ready(Ok(0)) => return Err(End::Gone(None)),
            Poll::Ready(Err(error)) => return Err(End::Gone(Some(error.kind()))),
            Poll::Ready(Ok(read)) => read,
        };
        self.heard(true);
        self.pool.stats.borrow_mut().bytes_from_clients += read as u64;
        let Scratch { input, made } = scratch;
        let input = input.get(..read).unwrap_or_default();
        let used = if have == 0 && !waiting { self.take_input(input, made, cx)? } else { 0 };
        if let Some(rest) = input.get(used..).filter(|rest| !rest.is_empty()) {
            self.active().backlog.input.extend_from_slice(rest);
        }
        if have > 0 && !waiting {
            self.take_backlog(cx, made)?;
        }
        Ok(true)
    }

    /// Looks at the input kept from before. True if some of it was dealt with.
    fn take_backlog(&mut self, cx: &mut Task<'_>, made: &mut Vec<u8>) -> Result<bool, End> {
        let Some(active) = &mut self.active else { return Ok(false) };
        let mut input = std::mem::take(&mut active.backlog.input);
        if input.is_empty() {
            return Ok(false);
        }
        let used = match self.take_input(&input, made, cx) {
            Ok(used) => used,
            Err(end) => {
                self.active().backlog.input = input;
                return Err(end);
            }
        };
        input.drain(..used);
        if input.is_empty() && input.capacity() > KEPT_CAPACITY {
            input = Vec::new();
        }
        // What is to run again comes first.
        let kept = &mut self.active().backlog.input;
        kept.append(&mut input);
        if kept.is_empty() {
            *kept = input;
        }
        Ok(used > 0)
    }

    /// Reads the client's messages and passes them on as far as possible. Returns the bytes dealt with.
    fn take_input(&mut self, input: &[u8], made: &mut Vec<u8>, cx: &mut Task<'_>) -> Result<usize, End> {
        debug_assert!(self.active.as_ref().is_none_or(|active| !active.aside.healing));
        let mut at = 0;
        loop {
            let rest = input.get(at..).unwrap_or_default();
            if self.active.as_ref().is_some_and(|active| active.local.is_some()) {
                match self.answer_alone(rest, cx)? {
                    0 => return Ok(at),
                    used => at += used,
                }
                continue;
            }
            match &self.lease {
                Lease::None => match self.first(rest)? {
                    First::Drop(len) => at += len,
                    First::Lease if self.acquire(rest, cx)? => {}
                    First::Lease | First::Wait => return Ok(at),
                },
                Lease::Waiting(_) => return Ok(at),
                Lease::Held(_) => {
                    let way = if self.routing.is_some() { self.weigh(rest, cx)? } else { Way::STRAIGHT };
                    let Some(batch) = way.batch(rest) else { return Ok(at) };
                    let (mut used, mut more) = self.pass(batch, made, cx)?;
                    if self.routing.is_some() {
                        (used, more) = self.weighed(way, rest, (used, more));
                    }
                    at += used;
                    if !more || self.runs_again() {
                        return Ok(at);
                    }
                }
            }
            if self.active.as_ref().is_some_and(|active| active.hold) {
                return Ok(at);
            }
        }
    }

    /// The first message of a transaction: is it one that needs a server?
    #[inline]
    fn first(&mut self, input: &[u8]) -> Result<First, End> {
        let (tag, whole, body_len) = match self.scanner.next(input).map_err(End::Malformed)? {
            Scanned::Short => return Ok(First::Wait),
            // The end of a message whose server is gone.
            Scanned::Inside { len } => return Ok(First::Drop(len)),
            Scanned::Whole { tag, body } => (tag, true, body.len()),
            Scanned::Part { tag, body_len, .. } => (tag, false, body_len as usize),
        };
        match Tag::from_byte(tag).map_err(|_| End::Tag(tag))? {
            Tag::Terminate => Err(End::Quit),
            Tag::Password => Err(End::Tag(tag)),
            // Postgres ignores what is left of a COPY that failed.
            Tag::CopyData | Tag::CopyDone | Tag::CopyFail if whole => Ok(First::Drop(HEADER + body_len)),
            Tag::Flush if whole && body_len == 0 => Ok(First::Drop(HEADER)),
            _ if whole => Ok(First::Lease),
            // It will be read as a whole: no server connection sits idle until it is there.
            Tag::Query | Tag::Parse if body_len <= self.context.config.client.inspect_max => Ok(First::Wait),
            _ if input.len() < AHEAD_MAX.min(HEADER + body_len) => Ok(First::Wait),
            _ => Ok(First::Lease),
        }
    }

    /// Passes messages to the server. Returns the bytes dealt with, and whether to go on.
    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in one place, in every transaction")]
    fn pass(&mut self, input: &[u8], made: &mut Vec<u8>, cx: &mut Task<'_>) -> Result<(usize, bool), End> {
        let context = &*self.context;
        // On a follower nothing listens, or notifies.
        let listens_here = self.subscriber.is_some() && !self.is_on_follower();
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Err(End::Broken("a lease without its session's working part"));
        };
        let client = &context.config.client;
        let was_settled = conn.pipeline.is_settled();
        let in_transaction = conn.pipeline.status() != TxStatus::Idle;
        let first = rerun::is_first(conn, was_settled);
        let listened = active.marks.listens_too;
        active.marks.harmless = first;
        active.marks.placing.named = false;
        let scanner = context.slow.as_ref().map(|_| self.scanner);
        let mut plan = Plan::new(input, made);
        let stop = Request {
            scanner: &mut self.scanner,
            conn,
            statements: &mut self.statements,
            marks: &mut active.marks,
            interner: &context.interner,
            scans: &mut context.scans.borrow_mut(),
            library: &context.library,
            catalog: &self.pool.catalog,
            catalog_key: self.pool.catalog.key(),
            stats: &mut self.lender.stats.borrow_mut(),
            pool: self.pool.id,
            parse_key: self.profile.parse_key(),
            profiles: &self.pool.profiles,
            startup: &self.startup,
            inspect_max: client.inspect_max,
            statements_max: client.max_client_statements as usize,
            mode: self.pool.limits.statements,
            budget: self.pool.limits.budget,
            may_pin: self.pinned || self.pool.pinned.get() < self.pool.limits.max_pinned,
            channels: if listens_here { self.subscriber.as_ref().and_then(|own| own.channels()) } else { None },
            replaying: &mut active.aside.replaying,
        }
        .inspect(&mut plan);
        if matches!(stop, Stop::Full) {
            // A server that has nothing to flush on its own would never make room.
            plan.insert(|out| out.extend_from_slice(&encode::FLUSH));
        }
        let used = plan.at();
        if let Some(scanner) = scanner {
            let lease = (self.entry.pid, active.leased);
            let sent = input.get(..used).unwrap_or_default();
            slow::note(&mut active.watched, lease, scanner, sent, &self.statements, &active.marks.changes);
        }
        if used > 0 || active.marks.listens_too && !listened {
            active.sent();
        }
        if active.marks.defines {
            // In a transaction nobody sees it before the COMMIT.
            let is_private = in_transaction && !active.marks.commit_sent;
            if is_private && conn.defines == Defines::No {
                conn.defines = Defines::Open;
            } else if !is_private {
                self.pool.catalog.begins(&mut conn.defines);
            }
        }
        let whole = matches!(stop, Stop::Short) && !self.scanner.is_inside();
        let batch = input.get(..used).filter(|_| whole && conn.pipeline.ready_owed() > 0).unwrap_or_default();
        if active.marks.harmless || first && active.marks.placing.named {
            active.rerun.keep(batch, active.marks.harmless);
        } else {
            active.rerun.pass_by();
        }
        let (front, back) = plan.slices();
        let sent = if front.is_empty() && back.is_empty() { Ok(()) } else { conn.write(cx, front, back) };
        if (was_settled || first) && used > 0 {
            active.aside.query_begun = Some(context.clock.moment());
        }
        if sent.is_err() && first && conn.unsent.is_empty() {
            // The socket took nothing of it: whatever it is, it never ran.
            active.rerun.keep(batch, true);
        }
        // A lease that began in this turn says so already. One whose replay was waited for does not: the query begins now.
        let noted =
            || self.entry.activity.get() == Activity::Running && self.entry.since.get() == context.clock.moment();
        if was_settled && used > 0 && !noted() {
            self.note(Activity::Running);
            if !in_transaction {
                self.active().begun = self.context.clock.moment();
            }
        }
        if let Err(error) = sent {
            self.lose(Lost::Io(error.kind()), cx)?;
            return Ok((used, true));
        }
        self.local_answers(made, cx)?;
        self.stopped(&stop, cx)?;
        Ok((used, false))
    }

    /// All that can be passed on now was.
    #[inline]
    fn stopped(&mut self, stop: &Stop, cx: &mut Task<'_>) -> Result<(), End> {
        match *stop {
            Stop::Short | Stop::Full | Stop::Unsettled | Stop::Held => {
                let short = matches!(stop, Stop::Short);
                if let Some(active) = &mut self.active {
                    active.stalled = !short;
                    active.hold |= matches!(stop, Stop::Held);
                }
                // A lease may end here: nothing was owed, and the message that kept it is complete.
                if short && self.is_owed_ready() { Ok(()) } else { self.rest(cx) }
            }
            Stop::Quit if self.hears_out() => {
                // Its goodbye stays where it is, and is read again when more has been answered.
                self.active().stalled = true;
                Ok(())
            }
            Stop::Quit => Err(End::Quit),
            Stop::Malformed(malformed) => Err(End::Malformed(malformed)),
            Stop::Tag(tag) => Err(End::Tag(tag)),
        }
    }

    /// Whether a batch waits to be run again.
    #[inline]
    fn runs_again(&self) -> bool {
        matches!(self.lease, Lease::None) && self.active.as_ref().is_some_and(|active| !active.backlog.input.is_empty())
    }

    /// Whether a `ReadyForQuery` is on its way.
    #[inline]
    fn is_owed_ready(&self) -> bool {
        matches!(&self.lease, Lease::Held(conn) if conn.pipeline.ready_owed() > 0)
    }

    /// Answers of ours that wait for nothing; and a lease that was of no use (a lone Flush) may end.
    #[inline]
    fn local_answers(&mut self, made: &mut Vec<u8>, cx: &mut Task<'_>) -> Result<(), End> {
        let waits = |conn: &ServerConn| {
            !conn.pipeline.has_locals() || conn.pipeline.front().is_some_and(|owed| owed.origin != Origin::Local)
        };
        // Nothing is told while the batch may have to run elsewhere: a name that is parsed twice is refused.
        let is_routed = || self.active.as_ref().is_some_and(|active| active.rerun.is_routed());
        if matches!(&self.lease, Lease::Held(conn) if waits(conn)) || is_routed() {
            return Ok(());
        }
        let rules = self.rules();
        let (Lease::Held(conn), Some(active)) = (&mut self.lease, &mut self.active) else {
            return Ok(());
        };
        let mut plan = Plan::new(&[], made);
        let mut stats = self.lender.stats.borrow_mut();
        let mut answer = Answer {
            conn,
            statements: &mut self.statements,
            marks: &mut active.marks,
            aside: &mut active.aside,
            stats: &mut stats,
            subscriber: None,
            startup: &self.startup,
            rules: &rules,
            told: Told::default(),
        };
        answer.answer_locally(&mut plan);
        let told = answer.told;
        drop(stats);
        let (first, second) = plan.slices();
        if !first.is_empty() {
            // Whoever has a part of the answer must not get it twice.
            active.rerun.answered(told.answers);
            self.write_client(cx, first, second)?;
        }
        Ok(())
    }
}

/// What the first message of a transaction wants.
enum First {
    /// More of it has to come.
    Wait,
    /// Nothing: it is left out.
    Drop(usize),
    /// A server connection.
    Lease,
}
