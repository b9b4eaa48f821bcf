//! The fleet's budget: many pgweirs share one server's limits, with no service beside the server itself.
//!
//! Every connection says whose it is, by the [`tag`] in its `application_name`; `pg_stat_activity` is the ledger. There is
//! nothing in it to leak or to clean up, and it is true after any crash. A [`Member`] (the connections of one role to one
//! database that one process has) reads it as a [`Census`], and grows, waits, and gives back by what an [`Account`] of
//! each limit says. All of this is pure: rows, time and entropy come as arguments, decisions go out. The pool carries them
//! out, and so does the simulation of whole fleets that tests them.
//!
//! # How a member grows
//!
//! ```text
//! no connection ──login──▶ probe ──lock, census, room──▶ connection ──▶ ... lent, idle ...
//!                            │ no room                      │ lock, census, room for n
//!                            ▼                              ▼
//!                      waits, or closes                 carries the claim +n: not lent
//!                                                           │ n logins, each
//!                                                           ▼
//!                                                       a connection more, the claim one less
//! ```
//!
//! *Lock* is a transaction-scoped advisory lock: who holds it is alone in its database with the census and with what it
//! makes of it, which others see at once, in its tag. A claim counts as a connection. It stands in the tag of a connection
//! that is kept from clients meanwhile (they could change its name); each login takes one off, *after* it can be seen
//! itself, and is lent only once that is known to have worked.
//!
//! Claims bear the time of their end, by the server's clock: taking one off fails from then on, in the server, and the others
//! count it for as long as a census may take beyond that. A clock of the server that is set forward by more than that
//! is the one thing that this does not survive.
//!
//! # What goes wrong, and what comes of it
//!
//! | what | what comes of it |
//! |---|---|
//! | a process ends at any moment | the server ends its connections, and with them their tags, claims and locks |
//! | its host is lost | its connections count until the server notices |
//! | it is stopped with the lock | the server ends that transaction after 2 s (`idle_in_transaction_session_timeout`), and the connection |
//! | it is stopped with claims | they bear their end, 5 s ahead by the server's clock; 2 s later nobody counts them, and whoever goes on after the end makes no connection of them |
//! | it is stopped while it waits, or is about to (`?`) | its tag tells when it last looked: a period and two seconds later nobody heeds it any more |
//! | many log in at once to find out whether there is room | where not all fit, each is there for one login and one look; those that last are few, see [Waiting](#waiting) |
//! | a client copies another connection's tag | if role and database are the same as well, and not those of who looks, the two count as one |
//! | the connection with the claims is lost, or its logins take more than 2 s | each login under way has to prove itself, as a probe does |
//! | a login is slow | its claim counts; others log in meanwhile; nobody has the lock |
//! | a client takes the tag away | the connection counts as a foreigner's until it is released, and then gets its tag back |
//! | foreigners come | there is less to share: what is beyond a share goes back |
//! | the server says 53300 | a pause, doubled up to a minute; what is beyond a share goes back |
//! | several databases share a limit | there is one lock for each: an opener leaves each other database the claims of one transaction |
//!
//! The last row has this proof. Of all claims take the one whose census is the latest. It sees all that was claimed before,
//! and leaves room for one transaction of each other database that has members. Whoever it does not see read the census
//! earlier, claims later, and has a connection with a tag: at most one in each of those databases, since there the lock is
//! its own. Its price: with `d` databases, `d - 1` times the claims of one transaction stay unused.
//!
//! # Sharing
//!
//! A member's share is one connection and, of what foreigners, headroom and one for each member leave, a part in proportion to
//! its weight (`fleet_weight`): the same for all by default. It may have more while less than
//! 85 % are used, and gives that back above it, those with most first. Where there are more members than connections they
//! take turns: who has had its connection for a slice (two periods) gives it back when somebody waits, the longest first.
//!
//! Who is on its way out (`!`) has no part in that but the one connection that everybody is entitled to: the others divide what
//! it has not. It may go on having more while its clients want them and nobody else does, below the 85 %; above, it is the first
//! to give back.
//!
//! # Waiting
//!
//! Who has no connection can tell the others nothing, and is seen by nobody. So there are places to wait for a few probes:
//! half the headroom, at least one. A probe tells since when its member has had no connection, by the server's clock, and:
//!
//! - who has been without for longer takes the place of who has not, who leaves at its next look (there are eight a period);
//!   until then there is one too many, and never more for longer than two looks: who would be one more comes back half a
//!   period later;
//! - what becomes free goes to those that wait before those that come, unless these have been without for longer;
//! - who keeps its place keeps it for one period, and leaves it to others: for a sixteenth of a period to an eighth, if none of
//!   those that are there has been without for longer.
//!
//! Beyond what members may have, all others are there for one login and one look, at moments that are drawn: a quarter of a
//! period to two after the last attempt. How many are there at one moment has no bound but their number; how many last has one.
//! The first attempt of a pool never waits: it does not know the server's clock before it has looked.
//!
//! Who has no room for more looks again within a period (others take a quarter more), and so sees everybody who waits for one.
//!
//! So nobody waits for ever. Take the member that has been without for longest. At most two periods after its last attempt it
//! comes again, and has a place at once, or half a period later, if there was one too many at that very moment. Within two more
//! the slice of some holder is over (or one with more than its share is there, who need not wait for that). Within another its
//! holder looks. It may do so in the eighth of a period for which the member is away, that is 2¼ periods after the member had its
//! place for the first time at the latest, and then finds it at its next look, within another one. It gives the connection back when
//! its client is done with it; an eighth of a period later it is taken, and by nobody else. That makes 5⅞ periods, some logins and
//! the rest of a transaction: 6, say. Members before which `n` others have been without for longer wait `n + 1` times as long at
//! most. When all connections are taken by one member each, `n` is less than the members without one. It is far less in most cases,
//! since more than one connection is given back for who has waited for more than a period.
//!
//! There is one exception: what is given back while that member is away, for who waits in its place, is theirs. It takes a holder that
//! looks in just that eighth, and somebody who came in it as well. Then `n` is one more.
//!
//! This takes for granted that nothing goes wrong meanwhile, that the lock is had within two seconds of trying (nobody has it for
//! longer than a look takes), that there is not one too many at the second attempt as well (another of half a period follows), and
//! that the server does not say 53300: after that there is a pause. The simulation asserts a bound of 5¾ periods for each member
//! without a connection, with five periods at the beginning for what had gone wrong before.

mod account;
mod census;
mod member;
mod queries;
mod roll;
#[cfg(test)]
mod simulation;
pub mod tag;

pub use account::{Account, headroom};
pub use census::{Census, Limits, Process, Row, Scope};
pub use member::{Binding, Demand, Errand, Member, Policy, Probe, Verdict};
pub use queries::{ANSWER_MAX, ASK, Answers, GLANCE, LOOK, in_time};
pub use roll::Roll;
pub use tag::Mark;
