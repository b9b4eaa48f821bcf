//! A follower that became a primary: what one of its connections has told is so for all of them.
//!
//! Postgres reports `in_hot_standby` as off once on each connection, in its next answer. So those that were not used since say on
//! for as long, though the server is a primary; and no client is to hear that who has heard of the promotion.

use std::cell::RefCell;
use std::rc::Rc;

use super::Pool;
use crate::backend::{Incarnation, ServerConn};
use crate::settings::IN_HOT_STANDBY;

/// The server of whose connections one has told last that it is a primary.
#[derive(Debug, Default)]
pub(super) struct Promotion(RefCell<Option<Rc<Incarnation>>>);

impl Pool {
    /// What a connection has reported since the last time, if anything, is its base from now on.
    pub fn heed_news(&self, conn: &mut ServerConn) {
        if !conn.news.is_empty() {
            conn.heed_news(&self.profiles);
            self.note_primary(conn);
        }
    }

    /// Whether the server of this connection is a primary, as far as it has told.
    pub(super) fn note_primary(&self, conn: &ServerConn) {
        let is_known = *conn.incarnation != Incarnation::default();
        if is_known && conn.profile.base().says(IN_HOT_STANDBY.as_bytes(), b"off") {
            *self.promotion.0.borrow_mut() = Some(conn.incarnation.clone());
        }
    }

    /// If another connection to the same server has told that it is a primary, this one's base has it, too.
    pub fn catch_up(&self, conn: &mut ServerConn) {
        let is_primary = self.promotion.0.borrow().as_ref().is_some_and(|primary| *primary == conn.incarnation);
        if is_primary && conn.profile.base().says(IN_HOT_STANDBY.as_bytes(), b"on") {
            conn.news.note(IN_HOT_STANDBY.as_bytes(), b"off");
            conn.heed_news(&self.profiles);
        }
    }
}
