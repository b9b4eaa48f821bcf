//! What a session tells of the server connection that it holds, when somebody asks who holds them all.

use pgweir_config::PoolMode;
use pgweir_proto::backend::TxStatus;

use super::{Lease, Relay};
use crate::cancel::Holding;
use crate::settings::APPLICATION_NAME;

/// Of a client's name, so many bytes are told: as many as Postgres keeps.
const NAME_MAX: usize = 63;

impl Relay {
    /// Tells, if it holds one.
    #[cold]
    pub(super) fn tell_holding(&self) {
        let Lease::Held(conn) = &self.lease else { return };
        let now = self.context.clock.moment();
        let name = self.profile.get(APPLICATION_NAME).unwrap_or_default();
        let name = name.get(..NAME_MAX).unwrap_or(name);
        let active = self.active.as_ref();
        let own_work = active
            .is_some_and(|active| active.aside.replaying || active.aside.scrubbing || active.aside.audit.is_some());
        let pins = active.filter(|_| self.pinned).map(|active| active.marks.pins.iter().collect());
        self.context.registry.tell(Holding {
            pool: self.lender.name.clone(),
            url: None,
            server_pid: conn.pid,
            client_pid: self.entry.pid,
            client: self.context.registry.origin(&self.entry).or_else(|| self.link.peer_address()),
            application_name: String::from_utf8_lossy(name).into(),
            activity: self.entry.activity.get(),
            activity_us: now.since(self.entry.since.get()),
            held_us: now.since(self.entry.begun.get()),
            in_transaction: conn.pipeline.status() != TxStatus::Idle,
            session_mode: self.pool.limits.mode == PoolMode::Session,
            pins: pins.unwrap_or_default(),
            own_work,
            listens_for: None,
        });
    }
}
