//! RESET, and what else goes back to where a session began: on the server, where the server connection did. The client's start-up
//! values are put back where the text says so, if it can be read: so that what follows finds them.
//!
//! ```text
//! a simple query ──▶ SETs of ours behind each of its resets; else a query of ours behind it
//! an Execute of what was bound last ──▶ the same, as Parse, Bind and Execute behind it
//! of anything else ──▶ a query of ours behind the Sync
//! ```

use pgweir_proto::backend::TxStatus;
use pgweir_proto::encode;
use pgweir_proto::frontend::Tag;
use pgweir_proto::pipeline::{Expect, Origin};
use pgweir_proto::scanner::HEADER;

use super::super::plan::Plan;
use super::{Request, Stop, is_of, names};
use crate::prepared::{RESTORE, SPLICED};
use crate::settings;
use crate::sql::{EffectSet, Effects, FirstWord};

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
        if effects.set.intersects(names::BY_NAME) {
            self.query_by_name(effects, text, HEADER + body.len(), plan)?;
            return Ok(true);
        }
        if self.startup.entries().is_empty() || !self.splice(effects, text, plan) {
            return Ok(false);
        }
        plan.skip(HEADER + body.len());
        self.restore(Tag::Query, body, plan);
        Ok(true)
    }

    /// A query that puts settings back to where they were at the start, with the client's own values in it.
    fn splice(&mut self, effects: Effects, text: &[u8], plan: &mut Plan<'_>) -> bool {
        const UNREAD: EffectSet = EffectSet::SUSPECT.union(EffectSet::OPAQUE).union(EffectSet::UNJUDGED);
        let pipeline = &self.conn.pipeline;
        if pipeline.is_skipping() || pipeline.is_copy_in() || !settings::may_reset(text) {
            return false;
        }
        let is_inside = pipeline.certain_status() == Some(TxStatus::Open);
        let encoding = self.conn.profile.get(settings::ENCODING);
        let is_unicode = |name: &[u8]| name.eq_ignore_ascii_case(b"utf8") || name.eq_ignore_ascii_case(b"utf-8");
        let bytes = encoding.is_some_and(|name| !is_unicode(name));
        let Some(spliced) = settings::splice(text, self.startup, &self.conn.tag, is_inside, bytes) else {
            return false;
        };
        self.forget_sequences(effects, plan);
        let before = (self.marks.resets, self.marks.resets_late);
        self.noted_query(SPLICED, effects, text);
        if !(spliced.more || effects.has(UNREAD)) {
            (self.marks.resets, self.marks.resets_late) = before;
        }
        self.marks.placing.tells = true;
        self.marks.spliced.push_back(spliced.splice);
        plan.insert(|out| encode::query(out, &spliced.text));
        true
    }

    /// A prepared text in which NULL, as the value of a start-up setting, is what it stands for.
    #[cold]
    pub(super) fn filled(&self, text: &[u8]) -> Option<Vec<u8>> {
        if self.startup.entries().is_empty() || !settings::may_reset(text) {
            return None;
        }
        settings::filled(text, self.startup, &self.conn.tag)
    }

    /// A text that changes settings may put some back to where they were at the start: when it is executed, if it is only bound.
    pub(super) fn resets(&mut self, effects: Effects, text: &[u8], bound: bool) {
        let may_reset = settings::may_reset(text);
        if !may_reset && !self.marks.resets_late {
            return;
        }
        let own = &mut self.marks.own;
        for name in self.startup.names().filter(|name| name.contains('.')) {
            if settings::is_set_last(text, name) {
                own.push(name.into());
            } else if may_reset {
                own.retain(|known| **known != *name);
            }
        }
        if !may_reset {
            return;
        }
        let is_session = effects.has(EffectSet::SETTINGS);
        let restores = settings::behind(text, self.startup, own, &self.conn.tag, is_session);
        if restores.is_empty() {
            return;
        }
        if bound {
            let placing = &mut self.marks.placing;
            // Behind a COPY, the server may read on.
            placing.resets = effects.first != FirstWord::Copy;
            placing.restores = restores;
            placing.late = self.marks.resets_late;
        }
        self.marks.resets = true;
        self.marks.resets_late |= is_session;
    }

    /// Behind what may have reset something.
    #[cold]
    pub(super) fn put_back(&mut self, tag: Tag, body: &[u8], plan: &mut Plan<'_>) {
        match tag {
            Tag::Execute => self.put_back_in_batch(body, plan),
            Tag::Query | Tag::Sync => {
                // What is bound may be executed in another batch.
                self.marks.resets = self.marks.placing.resets;
                if std::mem::take(&mut self.marks.resets_late) {
                    self.put_back_late(plan);
                }
            }
            _ => {}
        }
    }

    /// Behind the portal bound last.
    fn put_back_in_batch(&mut self, body: &[u8], plan: &mut Plan<'_>) {
        let pipeline = &self.conn.pipeline;
        let placing = &mut self.marks.placing;
        if !placing.resets || !is_of(&placing.portal, body) || pipeline.is_skipping() || pipeline.is_copy_in() {
            return;
        }
        placing.resets = false;
        self.marks.resets_late = placing.late;
        self.marks.resets = placing.late;
        for text in std::mem::take(&mut placing.restores) {
            self.run_in_batch(&text, plan);
        }
    }

    /// Behind the batch.
    fn put_back_late(&mut self, plan: &mut Plan<'_>) {
        let own = std::mem::take(&mut self.marks.own);
        let mut text = Vec::new();
        settings::restore(self.startup, &own, &self.conn.tag, &mut text);
        if !text.is_empty() && self.conn.pipeline.sent(Expect::Query, Origin::Pooler, RESTORE) {
            self.destroy_held();
            plan.insert(|out| encode::query(out, &text));
        }
    }
}
