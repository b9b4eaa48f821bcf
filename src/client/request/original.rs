//! A statement that the server connection has to parse anew keeps the settings that it was prepared under: on Postgres, too,
//! `timestamptz '2024-01-01 00:00'` stays the moment that it was under the `TimeZone` of its `Parse`.
//!
//! ```text
//! outside of a transaction          SETs of then │ Parse s, Describe s, Sync │ the client's own SETs, as in front of any lease
//! in one         SAVEPOINT, SETs of then │ Parse s, Describe s, Sync │ ROLLBACK TO and RELEASE SAVEPOINT
//! ```
//!
//! Postgres reads a text anew when something of it was altered, under the settings of that moment. So who runs it under other
//! settings than it was prepared under shares it with nobody who does not do the same.
//!
//! The client's message waits for all of it. If something of it is refused, nobody is told, and the statement is parsed under the
//! settings of the moment: what is wrong with it is told then.

use std::rc::Rc;

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin};

use pgweir_config::StatementMode;

use super::super::plan::Plan;
use super::listen::is_between;
use super::{Renamed, Request, Stop};
use crate::prepared::{AUDIT, DESCRIBES, ORIGINAL, Place, Room, Statement};
use crate::settings::{self, Profile};
use crate::sql::EffectSet;

impl Request<'_> {
    /// The statement, or the one that is to be run in its place where the settings are others than those that it was prepared under.
    #[inline]
    pub(super) fn under_its_settings(
        &mut self,
        name: &[u8],
        statement: Rc<Statement>,
        plan: &mut Plan<'_>,
    ) -> Result<Rc<Statement>, Stop> {
        let same = statement.parse_key == self.parse_key && !self.marks.unsettled;
        if same { Ok(statement) } else { self.under_others(name, statement, plan) }
    }

    #[cold]
    fn under_others(
        &mut self,
        name: &[u8],
        statement: Rc<Statement>,
        plan: &mut Plan<'_>,
    ) -> Result<Rc<Statement>, Stop> {
        if statement.is_read() && self.marks.unsettled && self.is_audited() {
            return Err(Stop::Unsettled);
        }
        let is_here = self.conn.shelf.has(statement.id) || self.is_stripped(&statement);
        if is_here && (!statement.is_read() || self.marks.unsettled) {
            if statement.is_read() && self.marks.reads_otherwise {
                self.strays(&statement);
            }
            return Ok(statement);
        }
        let pair = if statement.is_read() { self.pair(&statement) } else { None };
        let key = pair.unwrap_or_else(|| self.present_key());
        let keeps = pair.is_some() || settings::is_private(key);
        let statement = self.instead(name, &statement, (key, if keeps { statement.origin } else { key }));
        // Who asks again is to find the same.
        self.statements.rename(name, &statement);
        if pair.is_some() {
            self.comes_here(&statement, plan)?;
        }
        Ok(statement)
    }

    /// Whether it is known in a moment what the settings are.
    pub(super) fn is_audited(&self) -> bool {
        let pipeline = &self.conn.pipeline;
        is_between(pipeline) && pipeline.iter().any(|owed| owed.note == AUDIT)
    }

    /// The statement is run under settings by which the server may read it anew; for whoever comes next it is parsed again.
    pub(super) fn strays(&mut self, statement: &Statement) {
        self.conn.shelf.stray(statement.id);
        self.conn.strays = true;
    }

    /// How the statement is shared among those who run it under these settings, if it was prepared under others.
    fn pair(&self, statement: &Statement) -> Option<u32> {
        let present = &self.conn.profile;
        let is_own = present.parse_key() == self.parse_key && !self.marks.unsettled;
        let is_other = statement.origin != self.parse_key && !settings::is_private(statement.origin);
        if is_own && is_other { self.profiles.pair(statement.origin, present) } else { None }
    }

    /// The same text, shared otherwise: what is run under these settings must not be shared as what is run under those.
    fn instead(&self, name: &[u8], statement: &Rc<Statement>, keys: (u32, u32)) -> Rc<Statement> {
        if statement.parse_key == keys.0 {
            return statement.clone();
        }
        let shared = self.interner.intern_again(statement, keys);
        let is_own = statement.twin != 0 && statement.effects.set.intersects(EffectSet::EXECUTE);
        let other =
            is_own || self.statements.name_of(shared.id, &self.marks.changes).is_some_and(|known| known != name);
        let shared = if other { self.interner.twin(&shared) } else { shared };
        shared.resolved.learn_from(&statement.resolved);
        shared
    }

    /// If the server connection can come to have the statement as it was prepared, that is on its way, and whoever asks is to ask
    /// again.
    fn comes_here(&mut self, statement: &Rc<Statement>, plan: &mut Plan<'_>) -> Result<(), Stop> {
        let was_tried = self.marks.placing.original == Some(statement.id);
        let is_here = |place: &mut Place| place.parsed.epoch == statement.epoch();
        if self.conn.shelf.get(statement.id).is_some_and(is_here) {
            if was_tried {
                self.marks.placing.original = None;
            }
            return Ok(());
        }
        let size = statement.text.len() + statement.types.len();
        let has_room = || self.conn.shelf.room(self.budget, size, None) != Room::None;
        if was_tried || self.mode == StatementMode::Strip || !has_room() {
            return Ok(());
        }
        let Some(original) = self.profiles.original(statement.origin, &self.conn.profile) else { return Ok(()) };
        let pipeline = &self.conn.pipeline;
        if pipeline.is_batch_open() || pipeline.is_skipping() || pipeline.is_copy_in() {
            // It would have to be done in the middle of that.
            return Ok(());
        }
        let in_transaction = match pipeline.status() {
            TxStatus::Failed => return Ok(()),
            TxStatus::Open => true,
            TxStatus::Idle => false,
        };
        if !pipeline.is_settled() && !self.is_first_of_lease() {
            // What else is ours alone is no reason to wait: a lease in which nothing was passed on yet would end meanwhile.
            let waits = self.is_audited() || pipeline.iter().any(|owed| owed.origin == Origin::Client);
            return if waits { Err(Stop::Unsettled) } else { Ok(()) };
        }
        if self.marks.tainted && !in_transaction {
            return Ok(());
        }
        self.parse_as_then(statement, original, in_transaction, plan);
        Err(Stop::Held)
    }

    fn parse_as_then(
        &mut self,
        statement: &Rc<Statement>,
        original: Rc<Profile>,
        in_transaction: bool,
        plan: &mut Plan<'_>,
    ) {
        self.marks.placing.original = Some(statement.id);
        let point = format!("{}original", String::from_utf8_lossy(self.interner.prefix.as_bytes()));
        let mut texts = Vec::new();
        if in_transaction {
            texts.push(format!("SAVEPOINT {point}").into_bytes());
        }
        self.conn.replay(&original, |text| texts.push(text.to_vec()));
        for text in &texts {
            self.query_of_ours(text, plan);
        }
        if self.make_room(statement, None, plan) {
            self.send_parse(statement, Origin::Pooler, 0, false, plan);
            let renamed = Renamed::To(statement.id);
            self.conn.pipeline.sent(Expect::Describe, Origin::Pooler, DESCRIBES | renamed.note());
            self.renamed(b'D', &renamed, plan);
        }
        self.conn.pipeline.sent(Expect::Sync, Origin::Pooler, ORIGINAL);
        self.conn.shelf.end_batch();
        self.marks.changes.next_batch();
        plan.insert(|out| out.extend_from_slice(&encode::SYNC));
        if in_transaction {
            self.query_of_ours(format!("ROLLBACK TO {point};RELEASE {point}").as_bytes(), plan);
        } else {
            // However much of it was taken: from there the client's own come back.
            self.conn.profile = original;
        }
        *self.replaying = true;
    }

    /// What has to be parsed under the settings of the moment is for whoever needs it so now.
    pub(super) fn parsed_now(&mut self, statement: &Statement) {
        if statement.origin != statement.parse_key {
            self.strays(statement);
        }
    }

    fn query_of_ours(&mut self, text: &[u8], plan: &mut Plan<'_>) {
        self.conn.pipeline.sent(Expect::Query, Origin::Pooler, ORIGINAL);
        self.destroy_held();
        plan.insert(|out| encode::query(out, text));
    }
}
