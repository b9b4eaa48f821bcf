//! The wire protocol: what Postgres answers, pgweir answers.

mod answers;
mod bad_input;
mod bulk;
mod copy;
mod greeting;
mod largest;
mod modes;
mod random;
