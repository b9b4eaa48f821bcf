//! RESET, and what else goes back to where a session began: on the server, where the server connection did. The client's start-up
//! values are put back where the text says so, if it can be read: so that what follows finds them.
//!
//! ```text
//! set_config(name, NULL, ..) ──▶ the start-up value in place of the NULL
//! a simple query ──▶ SETs of ours behind each of its resets; else a query of ours behind it
//! an Execute of what was bound last ──▶ the same, as Parse, Bind and Execute behind it
//! of anything else ──▶ a query of ours behind the Sync
//! ```

use std::rc::Rc;

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::{Parse, Tag};
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::HEADER;

use super::super::plan::Plan;
use super::super::statements::Unnamed;
use super::{Marks, Request, Stop, is_of, names};
use crate::prepared::{REPLAY, RESTORE, SPLICED, Statement};
use crate::settings::{self, Encoding};
use crate::sql::{self, EffectSet, Effects, RoleWord};

impl Marks {
    /// The next client knows nothing of what this one has reset.
    #[inline]
    pub fn forget_resets(&mut self) {
        if self.remembers {
            self.forget_all_resets();
        }
    }

    #[cold]
    fn forget_all_resets(&mut self) {
        (self.resets, self.resets_late, self.spliced, self.own) = (false, false, None, Vec::new());
        (self.resets_role, self.leaves_role, self.remembers, self.respells) = (false, false, false, false);
        let placing = &mut self.placing;
        (placing.resets, placing.late, placing.restores) = (false, false, Vec::new());
    }
}

impl Request<'_> {
    /// A simple query that is about names of statements, or changes settings. True if all is done that it asks for.
    #[cold]
    pub(super) fn query_apart(
        &mut self,
        effects: Effects,
        text: &[u8],
        body: &[u8],
        plan: &mut Plan<'_>,
    ) -> Result<bool, Stop> {
        if effects.set.intersects(names::BY_NAME) || self.may_make(effects, text) {
            self.query_by_name(effects, text, HEADER + body.len(), plan)?;
            return Ok(true);
        }
        if !effects.set.intersects(EffectSet::SETTINGS.union(EffectSet::LOCAL)) {
            return Ok(false);
        }
        if self.startup.entries().is_empty() || !self.splice(effects, text, plan) {
            return Ok(false);
        }
        plan.skip(HEADER + body.len());
        self.restore(Tag::Query, body, plan);
        Ok(true)
    }

    /// A query that puts settings back to where they were at the start, with the client's own values in it. Only where nothing is
    /// owed to the client: then it is certain how it finds the server, and that nothing skips it.
    fn splice(&mut self, effects: Effects, text: &[u8], plan: &mut Plan<'_>) -> bool {
        const UNREAD: EffectSet = EffectSet::SUSPECT.union(EffectSet::OPAQUE).union(EffectSet::UNJUDGED);
        if !settings::may_reset(text) || self.is_owed_to() {
            return false;
        }
        let status = self.conn.pipeline.status();
        let Some(spliced) = settings::splice(text, self.startup, &self.conn.tag, status, self.encoding()) else {
            return false;
        };
        self.forget_sequences(effects, plan);
        let before = (self.marks.resets, self.marks.resets_late);
        self.noted_query(SPLICED, effects, text);
        if !(spliced.more || self.marks.resets_role || effects.has(UNREAD)) {
            (self.marks.resets, self.marks.resets_late) = before;
            self.forget_own();
        }
        self.marks.respells |= spliced.respells;
        self.marks.resets |= spliced.respells;
        self.marks.placing.tells = true;
        self.marks.spliced = Some(spliced.splice);
        self.marks.remembers = true;
        plan.insert(|out| encode::query(out, &spliced.text));
        true
    }

    /// The statement in place of one that sets a start-up setting to NULL, or to a parameter, which may be. Its values never change
    /// while the client is there.
    #[cold]
    pub(super) fn filled(&self, key: u32, parse: &Parse<'_>) -> Option<Rc<Statement>> {
        if self.startup.entries().is_empty() {
            return None;
        }
        let (text, put) = settings::filled(parse.query, parse.types, self.startup, &self.conn.tag)?;
        Some(self.interner.intern_put(self.pool, key, &text, parse.types, Some(&put), sql::scan))
    }

    /// That of a query sent now, where nothing is owed to the client, if it is certain: what is ours and on its way may be another.
    fn encoding(&self) -> Encoding {
        let owes = |note: u64| self.conn.pipeline.iter().any(|owed| owed.note == note);
        let replays = owes(REPLAY);
        if owes(RESTORE) || replays && self.marks.unsettled {
            return Encoding::Other;
        }
        self.conn.encodings.of_text(replays.then_some(&*self.conn.profile))
    }

    fn is_owed_to(&self) -> bool {
        let pipeline = &self.conn.pipeline;
        let is_busy = pipeline.is_skipping() || pipeline.is_copy_in() || pipeline.is_batch_open();
        is_busy || pipeline.iter().any(|owed| owed.origin != Origin::Pooler)
    }

    /// Nothing is to be put back that they are to be left out of.
    fn forget_own(&mut self) {
        if !self.marks.resets_late {
            self.marks.own = Vec::new();
        }
    }

    /// A text that changes settings may put some back to where they were at the start: when it is executed, if it is only bound.
    pub(super) fn resets(&mut self, effects: Effects, text: &[u8], bound: bool) {
        let may_reset = settings::may_reset(text);
        self.marks.remembers = true;
        self.takes_role(text);
        if !may_reset && !self.marks.resets_late {
            return;
        }
        let own = &mut self.marks.own;
        for name in self.startup.names().filter(|name| name.contains('.')) {
            let is_known = own.iter().any(|known| **known == *name);
            if !settings::is_set_last(text, name) {
                own.retain(|known| !may_reset || **known != *name);
            } else if !is_known {
                own.push(name.into());
            }
        }
        if !may_reset {
            return;
        }
        let is_session = effects.has(EffectSet::SETTINGS);
        if bound
            && !self.marks.resets_role
            && let Some(behind) = settings::behind(text, self.startup, &self.conn.tag)
            && !(behind.is_alone && self.is_behind_another())
        {
            let late = self.marks.resets_late || behind.is_alone;
            let placing = &mut self.marks.placing;
            (placing.resets, placing.restores, placing.late) = (true, behind.texts, late);
            placing.alone = behind.is_alone;
            self.marks.respells |= behind.respells;
            self.marks.resets = true;
        }
        self.marks.resets |= is_session;
        self.marks.resets_late |= is_session;
        self.forget_own();
    }

    /// Whether something is executed in front of what is being bound, in its batch. What is a transaction of its own is refused
    /// then; servers of old take it, and it is not to be committed by us.
    fn is_behind_another(&self) -> bool {
        let owed = self.conn.pipeline.iter();
        owed.fold(false, |is_behind, owed| !owed.earns_ready() && (is_behind || owed.expect == Expect::Execute))
    }

    /// A client that began with a role may go back to it, or leave it.
    fn takes_role(&mut self, text: &[u8]) {
        if self.startup.get("role").is_some()
            && let Some(word) = sql::role_word(text)
        {
            self.marks.resets_role = word == RoleWord::Reset;
            self.marks.leaves_role = word == RoleWord::Set;
        }
    }

    /// Behind what may have reset something.
    #[cold]
    pub(super) fn put_back(&mut self, tag: Tag, body: &[u8], plan: &mut Plan<'_>) {
        match tag {
            Tag::Execute => self.put_back_in_batch(body, plan),
            // In front of the data of a COPY it would be taken for a part of that: it comes behind what is next.
            Tag::Query if reads_data(body) => self.leave_batch_loans(),
            Tag::Sync if self.awaits_data() => self.leave_batch_loans(),
            Tag::Query | Tag::Sync => {
                // What is bound may be executed in another batch.
                self.marks.resets = self.marks.placing.resets;
                if std::mem::take(&mut self.marks.resets_late) {
                    self.put_back_late(plan);
                }
                self.respell(plan);
                self.end_batch_loans(plan);
            }
            _ => {}
        }
    }

    /// Whether something in the batch that has just ended reads data of the client's.
    fn awaits_data(&self) -> bool {
        self.marks.copies.is_some_and(|copies| copies.wrapping_add(1) == self.marks.changes.batch())
    }

    /// Behind the portal bound last, if all of it is run; but not in place of an unnamed statement that nobody but the server has.
    fn put_back_in_batch(&mut self, body: &[u8], plan: &mut Plan<'_>) {
        let pipeline = &self.conn.pipeline;
        let placing = &mut self.marks.placing;
        if !placing.resets || !is_of(&placing.portal, body) || pipeline.is_skipping() || pipeline.is_copy_in() {
            return;
        }
        if !body.ends_with(&[0; 4]) || matches!(self.statements.unnamed, Unnamed::Raw) {
            return;
        }
        if placing.alone && plan.rest().first() == Some(&(Tag::Sync as u8)) {
            // What follows that is soon enough.
            placing.resets = false;
            return;
        }
        placing.resets = false;
        self.marks.resets_late = placing.late;
        self.marks.resets = placing.late || self.marks.respells || !placing.lent.is_empty();
        for text in std::mem::take(&mut placing.restores) {
            self.run_in_batch(&text, plan);
        }
        self.forget_own();
    }

    /// Behind the batch.
    fn put_back_late(&mut self, plan: &mut Plan<'_>) {
        let own = std::mem::take(&mut self.marks.own);
        let mut text = Vec::new();
        settings::restore(self.startup, &own, &self.conn.tag, &mut text);
        if std::mem::take(&mut self.marks.resets_role) {
            settings::restore_role(self.startup, &mut text);
        }
        self.send_back(&text, plan);
    }

    /// A list that a SET of ours has spelled anew: behind the transaction, which a query of ours would give its snapshot.
    fn respell(&mut self, plan: &mut Plan<'_>) {
        let marks = &mut *self.marks;
        let is_open = marks.begin_sent || self.conn.pipeline.status() == TxStatus::Open;
        if marks.respells && is_open && !marks.commit_sent {
            marks.resets = true;
        } else if std::mem::take(&mut marks.respells) {
            let mut text = Vec::new();
            settings::restore_spelling(self.startup, &mut text);
            self.send_back(&text, plan);
        }
    }

    fn send_back(&mut self, text: &[u8], plan: &mut Plan<'_>) {
        if !text.is_empty() && self.conn.pipeline.sent(Expect::Query, Origin::Pooler, RESTORE) {
            self.destroy_held();
            plan.insert(|out| encode::query(out, text));
        }
    }
}

/// Whether a query may read data of the client's.
fn reads_data(text: &[u8]) -> bool {
    sql::spells_words(text, &[b"copy"]) && sql::reads_copy(text.strip_suffix(b"\0").unwrap_or(text))
}
