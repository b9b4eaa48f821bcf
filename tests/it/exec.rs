//! `pgweir exec`: an application that knows nothing but its `DATABASE_URL`, with a pooler beside it.

mod failures;
mod lives;
mod signals;
mod urls;
pub(crate) mod wrapped;

use std::net::SocketAddr;

use crate::support::{PASSWORD, Place, primary};

/// The URL of a place's database.
fn url(place: &Place<'_>) -> String {
    url_at(place, place.cluster.addr())
}

/// The same by way of another address.
fn url_at(place: &Place<'_>, address: SocketAddr) -> String {
    format!("postgres://{0}:{PASSWORD}@{address}/{0}", place.name)
}

/// A place, its URL, and psql as a shell's words, with `$DATABASE_URL` behind them.
fn place() -> (Place<'static>, String, String) {
    let place = Place::on(primary());
    let url = url(&place);
    let psql = psql(&place);
    (place, url, psql)
}

/// psql as a shell's words: a SQL text has to follow.
fn psql(place: &Place<'_>) -> String {
    format!("{} -XAtq \"$DATABASE_URL\" -c", place.cluster.programs().program("psql").display())
}
