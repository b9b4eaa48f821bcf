//! The certificates and keys in use, read from their files, and read again when these change.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pgweir_config::{Config, SYSTEM, ServerTls, SslMode};
use rustls::SupportedProtocolVersion;
use rustls::crypto::CryptoProvider;
use rustls::version::{TLS12, TLS13};

use super::acceptor::Acceptor;
use super::connector::{Connector, Wanted};
use super::files::{self, FileFault, Named};
use super::made::made_identity;

/// Everything in use at one time.
#[derive(Debug, Default)]
pub struct Keys {
    /// Towards clients; none if they cannot have TLS.
    offer: Option<Offer>,
    /// Towards servers, by the names of `[databases]`.
    connectors: BTreeMap<String, Arc<Connector>>,
}

/// TLS for clients.
#[derive(Debug)]
enum Offer {
    /// By the files that are named.
    Read(Arc<Acceptor>),
    /// By a certificate that is made when the first client asks: most never do, and the first random number of the library
    /// that makes it costs 40 ms.
    Made { cell: OnceLock<Option<Arc<Acceptor>>>, versions: Vec<&'static SupportedProtocolVersion> },
}

impl Keys {
    /// Towards a client that asks for TLS; none if there is none to be had.
    #[must_use]
    pub fn acceptor(&self) -> Option<Arc<Acceptor>> {
        match self.offer.as_ref()? {
            Offer::Read(acceptor) => Some(acceptor.clone()),
            Offer::Made { cell, versions } => cell.get_or_init(|| make(versions)).clone(),
        }
    }

    /// The same, where clients may have to do something about TLS; none if they never have.
    #[must_use]
    pub fn demands(&self) -> Option<&Acceptor> {
        match self.offer.as_ref()? {
            Offer::Read(acceptor) => Some(acceptor),
            Offer::Made { .. } => None,
        }
    }

    /// How connections to the server of a database entry begin; none for an entry that does not exist.
    #[must_use]
    pub fn connector(&self, entry: &str) -> Option<Arc<Connector>> {
        self.connectors.get(entry).cloned()
    }
}

/// The keys of a process: all are replaced at once, and a connection that begins takes what is there.
#[derive(Debug)]
pub struct Keyring {
    config: Arc<Config>,
    provider: Arc<CryptoProvider>,
    /// Clients are shown a certificate that is made where no file is named.
    makes: bool,
    current: Mutex<Arc<Keys>>,
}

impl Keyring {
    /// Reads every file that `config` names.
    ///
    /// # Errors
    ///
    /// Every fault of every file.
    pub fn load(config: Arc<Config>) -> Result<Self, Vec<FileFault>> {
        Self::load_or_make(config, false)
    }

    /// As [`Keyring::load`], and if it `makes` certificates, clients that may have TLS are shown one where no file is named;
    /// none is then demanded of them.
    ///
    /// # Errors
    ///
    /// As [`Keyring::load`].
    pub fn load_or_make(config: Arc<Config>, makes: bool) -> Result<Self, Vec<FileFault>> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let keys = read(&config, makes, &provider)?;
        Ok(Self { config, provider, makes, current: Mutex::new(Arc::new(keys)) })
    }

    /// What is in use.
    #[must_use]
    pub fn current(&self) -> Arc<Keys> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads every file again; connections that exist keep what they have.
    ///
    /// # Errors
    ///
    /// Every fault of every file; then the old keys stay in use.
    pub fn reload(&self) -> Result<(), Vec<FileFault>> {
        let keys = Arc::new(read(&self.config, self.makes, &self.provider)?);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    /// A watch on the files, which are as they were read just now.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let paths: Vec<String> = paths(&self.config);
        let seen = paths.iter().map(|path| print(path)).collect();
        Watch { paths, seen, moved: false }
    }
}

/// A look at the files now and then.
#[derive(Debug)]
pub struct Watch {
    paths: Vec<String>,
    seen: Vec<Option<Print>>,
    /// They had changed at the last look.
    moved: bool,
}

/// What tells one state of a file from another: device, inode, size, time of its last change.
type Print = (u64, u64, u64, i64, i64);

impl Watch {
    /// Whether files changed and have come to rest since: whoever writes a certificate and a key writes two files. Costs
    /// one `stat` for each file.
    pub fn look(&mut self) -> bool {
        let now: Vec<Option<Print>> = self.paths.iter().map(|path| print(path)).collect();
        if now != self.seen {
            self.seen = now;
            self.moved = true;
            return false;
        }
        std::mem::take(&mut self.moved)
    }

    /// Whether there is anything to look at.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }
}

fn print(path: &str) -> Option<Print> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}

/// Every file that is named, once.
fn paths(config: &Config) -> Vec<String> {
    let tls = &config.tls;
    let mut paths = Vec::new();
    if tls.client_tls_sslmode != SslMode::Disable {
        paths.extend([&tls.client_tls_cert_file, &tls.client_tls_key_file, &tls.client_tls_ca_file].map(Clone::clone));
    }
    for database in config.databases.values() {
        let tls = config.server_tls(database);
        if tls.sslmode != SslMode::Disable {
            paths.extend([tls.ca_file, tls.cert_file, tls.key_file]);
        }
    }
    paths.retain(|path| !path.is_empty() && path != SYSTEM);
    paths.sort();
    paths.dedup();
    paths
}

fn read(config: &Config, makes: bool, provider: &Arc<CryptoProvider>) -> Result<Keys, Vec<FileFault>> {
    let mut faults = Vec::new();
    let tls = &config.tls;
    let named = !tls.client_tls_cert_file.is_empty() || !tls.client_tls_key_file.is_empty();
    let offer = if makes && !named && tls.client_tls_sslmode != SslMode::Disable {
        Some(Offer::Made { cell: OnceLock::new(), versions: versions(config.client_tls_versions()) })
    } else {
        read_acceptor(config, provider, &mut faults).map(Offer::Read)
    };
    let mut connectors = BTreeMap::new();
    // Entries that lead to the same server in the same way have one connector, and so its sessions.
    let mut known: BTreeMap<(String, u16, ServerTls), Arc<Connector>> = BTreeMap::new();
    for (name, database) in &config.databases {
        let key = (database.host.clone(), database.port, config.server_tls(database));
        if let Some(connector) = known.get(&key) {
            connectors.insert(name.clone(), connector.clone());
        } else if let Some(connector) = read_connector(config, name, &key.2, provider, &mut faults) {
            connectors.insert(name.clone(), connector.clone());
            known.insert(key, connector);
        }
    }
    if faults.is_empty() { Ok(Keys { offer, connectors }) } else { Err(faults) }
}

fn read_acceptor(
    config: &Config,
    provider: &Arc<CryptoProvider>,
    faults: &mut Vec<FileFault>,
) -> Option<Arc<Acceptor>> {
    let tls = &config.tls;
    let mode = tls.client_tls_sslmode;
    if mode == SslMode::Disable {
        return None;
    }
    let named = |key: &str, path: &String| Named { key: key.to_owned(), path: path.clone() };
    let cert = named("client_tls_cert_file", &tls.client_tls_cert_file);
    let key = named("client_tls_key_file", &tls.client_tls_key_file);
    let identity = files::identity(&cert, &key, provider).map_err(|found| faults.extend(found)).ok();
    let mut authorities = None;
    if mode >= SslMode::VerifyCa {
        let found = files::roots(&named("client_tls_ca_file", &tls.client_tls_ca_file));
        authorities = Some(found.map_err(|fault| faults.push(fault)).ok()?);
    }
    let versions = versions(config.client_tls_versions());
    let acceptor = Acceptor::new(mode, identity?, authorities, &versions, provider);
    match acceptor {
        Ok(acceptor) => Some(Arc::new(acceptor)),
        Err(error) => {
            faults.push(files::unusable(&key, &error));
            None
        }
    }
}

/// An acceptor for whoever asks, by a certificate that nobody vouches for.
fn make(versions: &[&'static SupportedProtocolVersion]) -> Option<Arc<Acceptor>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let made = made_identity();
    let made = made.and_then(|made| Ok(Acceptor::new(SslMode::Allow, made, None, versions, &provider)?));
    made.map(Arc::new).map_err(|error| tracing::error!(%error, "no TLS for clients")).ok()
}

fn read_connector(
    config: &Config,
    name: &str,
    tls: &ServerTls,
    provider: &Arc<CryptoProvider>,
    faults: &mut Vec<FileFault>,
) -> Option<Arc<Connector>> {
    let database = config.databases.get(name)?;
    let named = |is_own: bool, own: &str, global: &str, path: &String| Named {
        key: if is_own { format!("databases.{name}.{own}") } else { global.to_owned() },
        path: path.clone(),
    };
    let own_certificate = database.sslcert.is_some() || database.sslkey.is_some();
    let ca = named(database.sslrootcert.is_some(), "sslrootcert", "server_tls_ca_file", &tls.ca_file);
    let cert = named(own_certificate, "sslcert", "server_tls_cert_file", &tls.cert_file);
    let key = named(own_certificate, "sslkey", "server_tls_key_file", &tls.key_file);
    let mut note = |fault: FileFault| {
        // One file that many entries share is one fault.
        if !faults.contains(&fault) {
            faults.push(fault);
        }
    };
    let (mut roots, mut identity) = (None, None);
    // Without TLS nothing is read, so that nothing needs to be there.
    if tls.sslmode != SslMode::Disable {
        let found = (!tls.ca_file.is_empty()).then(|| files::roots(&ca));
        let pair = (!tls.cert_file.is_empty()).then(|| files::identity(&cert, &key, provider));
        let found = found.transpose().map_err(&mut note);
        let pair = pair.transpose().map_err(|found| found.into_iter().for_each(&mut note));
        roots = found.ok()?;
        identity = pair.ok()?.map(Arc::new);
    }
    let versions = versions(tls.versions);
    let wanted = Wanted { mode: tls.sslmode, negotiation: tls.negotiation, host: &database.host, versions: &versions };
    match Connector::new(&wanted, identity, roots, provider) {
        Ok(connector) => Some(Arc::new(connector)),
        Err(error) => {
            note(files::unusable(&key, &error));
            None
        }
    }
}

fn versions([v12, v13]: [bool; 2]) -> Vec<&'static SupportedProtocolVersion> {
    let both = [v13.then_some(&TLS13), v12.then_some(&TLS12)];
    both.into_iter().flatten().collect()
}
