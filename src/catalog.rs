//! What the catalog of a database says of the names that a statement can mention.
//!
//! A text shows what it does itself, not what a function, a trigger, a view or an operator does that it sets in motion. So
//! a pool asks its server for those whose definition may leave something behind in a session, and for whatever leads to
//! them; the names of these are its [`Suspects`]. A text that mentions none does what its [`Effects`](crate::sql::Effects)
//! say; one that does is judged by what the grammar says it calls, reads and writes.
//!
//! The same rows tell which texts a follower may run, by the opposite rule: a text goes there only if everything that it
//! calls and names is known to read. That is [`Suspects::route`].
//!
//! Pure: the pool asks, and hands over the rows.

mod builtin;
mod cache;
mod graph;
mod judge;
mod queries;
mod refusals;
mod route;
mod survey;

pub use cache::RouteCache;
pub use judge::Suspects;
pub use queries::{FINGERPRINT, ROUTES, SURVEY};
pub use refusals::Refusals;
pub use route::{Hint, Judged, Route};
pub use survey::Survey;
