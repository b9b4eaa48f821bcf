//! What the catalog of a database says of the names that a statement can mention.
//!
//! A text shows what it does itself, not what a function, a trigger, a view or an operator does that it sets in motion. So
//! a pool asks its server for those whose definition may leave something behind in a session, and for whatever leads to
//! them; the names of these are its [`Suspects`]. A text that mentions none does what its [`Effects`](crate::sql::Effects)
//! say; one that does is judged by what the grammar says it calls, reads and writes.
//!
//! Pure: the pool asks, and hands over the rows.

mod judge;
mod queries;
mod route;
mod survey;

pub use judge::Suspects;
pub use queries::{FINGERPRINT, SURVEY};
pub use route::{Hint, Judged, Route};
pub use survey::Survey;
