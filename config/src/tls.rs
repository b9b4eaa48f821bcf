//! What the settings of TLS mean together.

use crate::choices::{SslMode, SslNegotiation};
use crate::config::Config;
use crate::entries::Database;
use crate::fault::{Fault, Problem};

/// In place of a file: the authorities that the operating system trusts.
pub const SYSTEM: &str = "system";

/// The words for TLS versions, each with the versions it stands for: 1.2, 1.3.
pub(crate) const VERSIONS: [(&str, [bool; 2]); 3] =
    [("secure", [true, true]), ("tlsv1.2", [true, false]), ("tlsv1.3", [false, true])];

/// How one database's server connections use TLS: its own keys, else the global settings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerTls {
    /// Whether TLS is used, and what is checked.
    pub sslmode: SslMode,
    /// File of the authorities, or [`SYSTEM`]; empty: none.
    pub ca_file: String,
    /// File of the certificate to show; empty: none.
    pub cert_file: String,
    /// File of its private key; empty: none.
    pub key_file: String,
    /// Whether TLS begins at once.
    pub negotiation: SslNegotiation,
    /// Whether TLS 1.2 and TLS 1.3 may be spoken.
    pub versions: [bool; 2],
}

impl Config {
    /// How server connections of `database` use TLS.
    #[must_use]
    pub fn server_tls(&self, database: &Database) -> ServerTls {
        let tls = &self.tls;
        let own_file = |own: &Option<String>, global: &String| own.as_ref().unwrap_or(global).clone();
        // A certificate and its key come from the same place.
        let own_certificate = database.sslcert.is_some() || database.sslkey.is_some();
        let half = |own: &Option<String>, global: &String| {
            if own_certificate { own.clone().unwrap_or_default() } else { global.clone() }
        };
        let default =
            if database.sslrootcert.as_deref() == Some(SYSTEM) { SslMode::VerifyFull } else { tls.server_tls_sslmode };
        ServerTls {
            sslmode: database.sslmode.unwrap_or(default),
            ca_file: own_file(&database.sslrootcert, &tls.server_tls_ca_file),
            cert_file: half(&database.sslcert, &tls.server_tls_cert_file),
            key_file: half(&database.sslkey, &tls.server_tls_key_file),
            negotiation: database.sslnegotiation.unwrap_or_default(),
            versions: tls_versions(&tls.server_tls_protocols),
        }
    }

    /// Whether TLS 1.2 and TLS 1.3 may be spoken with clients.
    #[must_use]
    pub fn client_tls_versions(&self) -> [bool; 2] {
        tls_versions(&self.tls.client_tls_protocols)
    }
}

/// Whether TLS 1.2 and TLS 1.3 are among `text`'s versions.
fn tls_versions(text: &str) -> [bool; 2] {
    let words = text.split(',').map(str::trim);
    let named = words.filter_map(|word| VERSIONS.iter().find(|(name, _)| *name == word));
    named.fold([false; 2], |[a, b], (_, [c, d])| [a || *c, b || *d])
}

/// The faults that only show when all settings of TLS are in place.
pub(crate) fn check(config: &Config, faults: &mut Vec<Fault>) {
    let mut fault = |key: &str, value: &str, problem: Problem| {
        let fault =
            Fault { key: key.to_owned(), value: Some(value.to_owned()), origin: Some(config.origin(key)), problem };
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    };
    let tls = &config.tls;
    let mode = tls.client_tls_sslmode;
    if mode != SslMode::Disable {
        let mut needs = vec![("client_tls_cert_file", &tls.client_tls_cert_file)];
        needs.push(("client_tls_key_file", &tls.client_tls_key_file));
        if mode >= SslMode::VerifyCa {
            needs.push(("client_tls_ca_file", &tls.client_tls_ca_file));
        }
        for (key, _) in needs.into_iter().filter(|(_, file)| file.is_empty()) {
            fault("client_tls_sslmode", mode.as_str(), Problem::TlsNeeds { key });
        }
    }
    for (name, database) in &config.databases {
        let own = |key: &str| format!("databases.{name}.{key}");
        // Whose doing a value is: the entry's, else the global setting's.
        let named = |is_own: bool, key: &str, global: &str| if is_own { own(key) } else { global.to_owned() };
        let mode_key = named(database.sslmode.is_some(), "sslmode", "server_tls_sslmode");
        let effective = config.server_tls(database);
        let mode = effective.sslmode;
        if mode >= SslMode::VerifyCa && effective.ca_file.is_empty() {
            let key = named(database.sslmode.is_some(), "sslrootcert", "server_tls_ca_file");
            fault(&mode_key, mode.as_str(), Problem::TlsNoAuthority { key });
        }
        if effective.ca_file == SYSTEM && mode != SslMode::VerifyFull {
            fault(&mode_key, mode.as_str(), Problem::TlsWeakForSystem);
        }
        if effective.negotiation == SslNegotiation::Direct && mode < SslMode::Require {
            fault(&mode_key, mode.as_str(), Problem::TlsWeakForDirect);
        }
        let pair = database.sslcert.is_some() || database.sslkey.is_some();
        let cert_key = named(pair, "sslcert", "server_tls_cert_file");
        let key_key = named(pair, "sslkey", "server_tls_key_file");
        match (effective.cert_file.as_str(), effective.key_file.as_str()) {
            ("", "") => {}
            ("", file) => fault(&key_key, file, Problem::TlsHalf { key: cert_key }),
            (file, "") => fault(&cert_key, file, Problem::TlsHalf { key: key_key }),
            _ => {}
        }
    }
}
