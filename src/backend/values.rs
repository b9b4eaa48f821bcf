//! What sequences gave on a server connection, which `currval` and `lastval` tell.

/// Whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// There is none: the server connection is new, or was reset.
    None,
    /// Anybody's.
    Anyones,
    /// That of the client whose last lease this was, if there is any.
    Own {
        /// The lease's number, which no other has.
        lease: u64,
        /// There may be some: it is worth coming back for.
        any: bool,
        /// The client is likely to.
        asks: bool,
    },
}

impl Values {
    /// Whether it is what the lease of this number has left.
    #[must_use]
    pub const fn are_of(&self, number: u64) -> bool {
        matches!(self, Self::Own { lease, .. } if *lease == number)
    }
}
