//! TLS on both sides: psql directly on Postgres is the judge of what pgweir accepts, shows and says.

mod certificates;
pub(crate) mod client;
mod clients;
mod hostile;
mod keys;
pub(crate) mod pki;
mod reload;
mod servers;
mod sessions;
mod system;

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use pgweir_harness::{Auth, Cluster, ClusterOptions, secrets};

use pki::Identity;

/// A Postgres whose certificate changes from test to test; whoever has it has it alone.
pub(crate) struct TlsPrimary(pub(crate) MutexGuard<'static, Cluster>);

impl TlsPrimary {
    /// It trusts whoever comes: passwords and their channel binding have tests of their own.
    pub(crate) fn take() -> Self {
        static PRIMARY: OnceLock<Mutex<Cluster>> = OnceLock::new();
        let primary = PRIMARY.get_or_init(|| {
            let options = ClusterOptions::auth(Auth::Trust)
                .set("max_connections", "100")
                .set("listen_addresses", "127.0.0.1,::1");
            Mutex::new(Cluster::start(options).unwrap())
        });
        let primary = Self(primary.lock().unwrap_or_else(PoisonError::into_inner));
        primary.hba("host all all 127.0.0.1/32 trust");
        primary
    }

    /// Shows this certificate from now on.
    pub(crate) fn show(&self, identity: &Identity) {
        self.0.place_file("server.crt", &identity.certificate).unwrap();
        self.0.place_file("server.key", &identity.key).unwrap();
        self.0.psql("postgres", "ALTER SYSTEM SET ssl = on").unwrap();
        self.0.reload().unwrap();
    }

    /// Speaks no TLS from now on.
    fn hide(&self) {
        self.0.psql("postgres", "ALTER SYSTEM SET ssl = off").unwrap();
        self.0.reload().unwrap();
    }

    /// Who may log in by TCP from now on, by either address of this machine: `localhost` is one or both.
    pub(crate) fn hba(&self, lines: &str) {
        let too = lines.replace("127.0.0.1/32", "::1/128");
        self.0.place_file("pg_hba.conf", &format!("local all all trust\n{lines}\n{too}\n")).unwrap();
        self.0.reload().unwrap();
    }
}

/// psql with these words of a connection string, and nothing of the caller's. What it printed, or what it complained
/// about.
pub(crate) fn psql(cluster: &Cluster, words: &str, sql: &str) -> Result<String, String> {
    let mut psql = Command::new(cluster.programs().program("psql"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        psql.env_remove(name);
    }
    // Without a home there are no files of libpq's that nobody named.
    psql.env("HOME", "/nonexistent").env("LC_ALL", "C.UTF-8").env("PGCONNECT_TIMEOUT", "20");
    psql.args(["-X", "-A", "-t", "-c", sql, &format!("{words} gssencmode=disable")]);
    let output = psql.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    secrets::assert_none_in("what psql is told", &output.stderr);
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

pub(crate) fn show(path: &Path) -> &str {
    path.to_str().unwrap()
}
