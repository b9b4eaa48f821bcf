//! What a client that began with settings of its own is told of them.
//!
//! When it resets one, the server goes to a default that is the server's, and says so; what puts the start-up value back has
//! that said once more. The client is to hear of the second alone, and only if it has not heard that last. So what is reported
//! from the answer to the reset on waits for the `ReadyForQuery` of what follows it.

use pgweir_proto::backend;
use pgweir_proto::encode;

use super::{Answer, Plan};
use crate::prepared::RESTORE;
use crate::settings::{self, Entry};

impl Answer<'_> {
    /// A setting is reported. True if the client is to be told later, or not at all.
    pub(super) fn holds_report(&mut self, body: &[u8]) -> bool {
        if self.startup.entries().is_empty() {
            return false;
        }
        let Ok((name, value)) = backend::parameter_status(body) else { return false };
        let (Ok(key), true) = (std::str::from_utf8(name), name.len() <= settings::NAME_MAX) else { return false };
        let value = if key == settings::APPLICATION_NAME {
            self.conn.shown(value, self.conn.profile.get(settings::APPLICATION_NAME))
        } else {
            value
        };
        let holds = self.conn.pipeline.iter().take(2).any(|owed| owed.note == RESTORE);
        note(if holds { &mut self.aside.held } else { &mut self.aside.told }, key, value);
        holds
    }

    /// Start-up values are back: the client is told what it does not know.
    #[cold]
    pub(super) fn tell_reports(&mut self, plan: &mut Plan<'_>) {
        for (name, value) in std::mem::take(&mut self.aside.held) {
            if self.knows(&name, &value) {
                continue;
            }
            plan.insert(|out| encode::parameter_status(out, name.as_bytes(), &value));
            note(&mut self.aside.told, &name, &value);
        }
    }

    /// Whether the client was told this value last: in this lease, or before. Then the server connection was given it, in the
    /// spelling of the client or in that of the server.
    fn knows(&self, name: &str, value: &[u8]) -> bool {
        if let Some((_, told)) = self.aside.told.iter().find(|(known, _)| **known == *name) {
            return **told == *value;
        }
        let key = name.to_ascii_lowercase();
        let applied = self.conn.profile.get(&key);
        if applied.is_some() && applied == self.startup.get(&key) {
            let reported = self.startup.reported();
            return reported.is_some_and(|all| all.iter().any(|(known, told)| **known == *name && **told == *value));
        }
        applied == Some(value)
    }
}

/// Settings of one client that are kept, at most: a server reports fewer.
const REPORTS_MAX: usize = 100;

/// Keeps the last value of each.
fn note(list: &mut Vec<Entry>, name: &str, value: &[u8]) {
    list.retain(|(known, _)| **known != *name);
    if list.len() < REPORTS_MAX {
        list.push((name.into(), value.into()));
    }
}
