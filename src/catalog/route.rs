//! Where a text may run: on the primary alone, or on a follower too.

use crate::sql::Library;
use crate::stats::RouteReason;

use super::Suspects;

/// Where a text may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// On the primary alone.
    Primary(RouteReason),
    /// Anywhere: it is proven to read and to do nothing else.
    Read,
    /// It opens a transaction, and does nothing else: one that is read-only, if `read_only`; one that is as
    /// `default_transaction_read_only` says, if that is none.
    Begin {
        /// What the text says of it.
        read_only: Option<bool>,
    },
}

/// What a comment in the text wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// `/* pgweir.route=primary */`
    Primary,
    /// `/* pgweir.route=follower */`
    Follower,
}

/// What is known of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judged {
    /// Where it may run.
    pub route: Route,
    /// What it wishes.
    pub hint: Option<Hint>,
}

impl Suspects {
    /// Where `text` may run, a whole text of one `Query` or `Parse`.
    #[must_use]
    pub fn route(&self, _text: &[u8], _library: &mut Library) -> Judged {
        Judged { route: Route::Primary(RouteReason::Unknown), hint: None }
    }
}
