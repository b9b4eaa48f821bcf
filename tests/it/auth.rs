//! How clients prove who they are, with the client library that nearly all of them have, and with hostile ones.

mod cert;
mod hostile;
mod methods;
mod passthrough;
mod query;
mod throttle;

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use pgweir_harness::secrets;
use pgweir_harness::wire::{ServerError, Wire, WireError};
use tempfile::TempDir;

use crate::drivers::{finish, python, scripts};
use crate::support::{PASSWORD, Place, Site};

/// What became of logins by libpq: `ok USER`, or its words.
pub(crate) fn libpq(conninfos: &[String]) -> Vec<String> {
    let mut command = Command::new(python());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command.arg(scripts().join("psycopg_login.py")).args(conninfos);
    let output = String::from_utf8(finish(command).stdout).unwrap();
    secrets::assert_none_in("what libpq is told", &output);
    let lines: Vec<String> = output.lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), conninfos.len(), "{output}");
    lines
}

/// A connection string for a site's own user and database; `more` wins.
fn conninfo(site: &Site<'_>, more: &str) -> String {
    let name = site.name();
    format!("host=127.0.0.1 port={} user={name} dbname={name} {more}", site.pgweir.port())
}

/// The error that a login is refused with; the peer must close after it.
async fn refusal(address: SocketAddr, user: &str, database: &str, password: &str) -> ServerError {
    let mut wire = Wire::connect(address).await.unwrap();
    match wire.login(user, database, password).await {
        Err(WireError::Refused(error)) => {
            assert!(wire.eof().await, "not closed after {error}");
            error
        }
        Err(other) => other.server_error().unwrap_or_else(|| panic!("{other}")),
        Ok(messages) => panic!("let in: {messages:?}"),
    }
}

/// An `auth_file` that lasts as long as this.
pub(crate) struct UserFile(TempDir);

impl UserFile {
    pub(crate) fn new(text: &str) -> Self {
        let file = Self(TempDir::new().unwrap());
        file.write(text);
        file
    }

    pub(crate) fn path(&self) -> String {
        self.0.path().join("users.txt").to_str().unwrap().to_owned()
    }

    /// As a careful operator does: whole or not at all.
    fn write(&self, text: &str) {
        let fresh = self.0.path().join("users.new");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.path()).unwrap();
    }
}

/// The password of the place's role as Postgres stores it, by either way.
pub(crate) fn stored(place: &Place<'_>, encryption: &str) -> String {
    let name = &place.name;
    place.psql(&format!("SET password_encryption = '{encryption}'; ALTER ROLE {name} PASSWORD '{PASSWORD}'"));
    place.psql(&format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{name}'"))
}
