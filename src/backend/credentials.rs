//! What opens a server: where the password comes from, and the keys derived from it.

mod command;
mod file;
mod given;

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use pgweir_proto::scram::{Challenge, Keys};
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::task::{JoinError, spawn_blocking, spawn_local};

pub use command::PasswordCommand;
pub use file::PasswordFile;
pub use given::{Credential, ProvenKeys};

/// Derivations of SCRAM keys under way at once, over all pools: servers choose how long one takes.
const DERIVATIONS_MAX: usize = 2;

/// Keys kept of one password: a role has one salt, and a few while its password is being changed.
const KEYS_MAX: usize = 4;

/// The longest password that is read or printed; bytes. Tokens of the big clouds have up to 4 KiB.
const PASSWORD_MAX: usize = 64 * 1024;

/// A password: any bytes but NUL.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Rc<[u8]>);

impl Password {
    /// Takes the bytes out of sight.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// The password itself.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where the credential of a login comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere.
    None,
    /// The configuration.
    Password(Password),
    /// A file, read at every login.
    File(PasswordFile),
    /// A command, run when what it printed last is too old or was refused.
    Command(PasswordCommand),
}

impl Source {
    /// The password, once, for a login that is not a pool's; none if none is known.
    ///
    /// # Errors
    ///
    /// What is wrong with the file or the command, in words.
    pub async fn fetch(&self) -> Result<Option<Vec<u8>>, String> {
        let fetched = match self {
            Self::None => return Ok(None),
            Self::Password(password) => return Ok(Some(password.expose().to_vec())),
            Self::File(file) => {
                let file = file.clone();
                spawn_blocking(move || file.fetch()).await
            }
            Self::Command(command) => {
                let command = command.clone();
                spawn_blocking(move || command.fetch()).await
            }
        };
        fetched.map_err(|_| interrupted())?.map(Some)
    }
}

/// Why there is no credential.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file cannot be read.
    #[error("password_file {path}: {error}")]
    File {
        /// As configured.
        path: Rc<str>,
        /// The system's words.
        error: Rc<str>,
    },
    /// The command could not be run, or went wrong. Nothing of what it printed is in here.
    #[error("password_command {program}: {error}")]
    Command {
        /// Its first word.
        program: Rc<str>,
        /// What went wrong.
        error: Rc<str>,
    },
}

/// What a command printed.
#[derive(Debug)]
struct Token {
    password: Password,
    /// When it is too old. None: never.
    expires: Option<Instant>,
}

/// The last run of a command.
#[derive(Debug, Default)]
struct LastRun {
    token: Option<Token>,
    /// When it failed, and how; for those who waited for the same run.
    failure: Option<(Instant, CredentialError)>,
}

/// Keys and what they were derived from.
#[derive(Debug)]
struct Derived {
    password: Password,
    challenge: Challenge,
    keys: Keys,
}

/// What opens the servers of the pools that have the same database, login role and password.
#[derive(Debug)]
pub struct Credentials {
    source: Source,
    /// What the last client proved itself by, for want of a source.
    given: RefCell<Credential>,
    warned: Cell<bool>,
    /// Held by whoever runs the command. Apart from `self`, so that a login that gives up does not end the run.
    last_run: Arc<Mutex<LastRun>>,
    /// Says to a command that runs, by being dropped, that nobody waits for it any more: the program ends.
    waits: RefCell<Option<oneshot::Sender<Infallible>>>,
    keys: RefCell<Vec<Derived>>,
    /// Held by whoever derives keys.
    deriving: Arc<Mutex<()>>,
    derivations: Derivations,
}

/// The right to derive SCRAM keys, shared by all pools.
#[derive(Clone, Debug)]
pub struct Derivations(Arc<Semaphore>);

impl Default for Derivations {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(DERIVATIONS_MAX)))
    }
}

impl Credentials {
    /// Credentials from `source`.
    #[must_use]
    pub fn new(source: Source, derivations: Derivations) -> Rc<Self> {
        Rc::new(Self {
            source,
            given: RefCell::new(Credential::None),
            warned: Cell::new(false),
            last_run: Arc::default(),
            waits: RefCell::default(),
            keys: RefCell::default(),
            deriving: Arc::default(),
            derivations,
        })
    }

    /// A client proved by this to be the login role. It is used if no other source is configured. Whether that changes
    /// anything.
    pub fn give(&self, credential: Credential) -> bool {
        let known = *self.given.borrow() == credential;
        if self.source != Source::None || credential == Credential::None || known {
            return false;
        }
        *self.given.borrow_mut() = credential;
        true
    }

    /// The credential for a login that begins at `now`.
    ///
    /// # Errors
    ///
    /// [`CredentialError`].
    pub async fn current(self: &Rc<Self>, now: Instant) -> Result<Credential, CredentialError> {
        match &self.source {
            Source::None => Ok(self.given.borrow().clone()),
            Source::Password(password) => Ok(Credential::Password(password.clone())),
            Source::File(file) => self.read(file).await.map(Credential::Password),
            Source::Command(command) => self.run(command, now, None).await.map(Credential::Password),
        }
    }

    /// Another credential than the one that the server refused, if there is one by now.
    ///
    /// # Errors
    ///
    /// [`CredentialError`].
    pub async fn after_refusal(
        self: &Rc<Self>,
        refused: &Credential,
        now: Instant,
    ) -> Result<Option<Credential>, CredentialError> {
        if self.source == Source::None {
            // A client may have brought a newer one meanwhile.
            let given = self.given.borrow().clone();
            return Ok((given != *refused).then_some(given));
        }
        let Credential::Password(old) = refused else { return Ok(None) };
        let new = match &self.source {
            Source::None | Source::Password(_) => return Ok(None),
            Source::File(file) => self.read(file).await?,
            Source::Command(command) => self.run(command, now, Some(old)).await?,
        };
        Ok((new != *old).then_some(Credential::Password(new)))
    }

    async fn read(&self, file: &PasswordFile) -> Result<Password, CredentialError> {
        let (own, path) = (file.clone(), file.path());
        let read = spawn_blocking(move || own.read()).await.map_err(|_| interrupted()).and_then(|read| read);
        let contents = read.map_err(|error| CredentialError::File { path: path.into(), error: error.into() })?;
        if contents.exposed && !self.warned.replace(true) {
            tracing::warn!(path, "password_file can be read by others than its owner and group: chmod o= it");
        }
        Ok(Password::new(&contents.password))
    }

    /// The last output, or that of a new run if it is too old or the one that was `refused`. Who asks during a run
    /// waits for it.
    async fn run(
        self: &Rc<Self>,
        command: &PasswordCommand,
        now: Instant,
        refused: Option<&Password>,
    ) -> Result<Password, CredentialError> {
        let mut last = self.last_run.clone().lock_owned().await;
        if let Some(token) = &last.token
            && token.expires.is_none_or(|at| at > now)
            && refused != Some(&token.password)
        {
            return Ok(token.password.clone());
        }
        if let Some((_, error)) = last.failure.as_ref().filter(|(at, _)| *at > now) {
            return Err(error.clone());
        }
        let (own, ttl) = (command.clone(), command.ttl());
        let program: Rc<str> = command.program().into();
        let (waits, wanted) = oneshot::channel();
        self.waits.replace(Some(waits));
        // A task, so that a run whose login gives up is still of use to the next, and is not begun twice.
        let run = spawn_local(async move {
            let begun = Instant::now();
            let printed = spawn_blocking(move || own.run(wanted)).await.map_err(|_| interrupted()).and_then(|run| run);
            let password = printed.map(|bytes| Password::new(&bytes)).map_err(|error| {
                let error = CredentialError::Command { program, error: error.into() };
                last.failure = Some((Instant::now(), error.clone()));
                error
            });
            if let Ok(password) = &password {
                *last = LastRun {
                    token: Some(Token { password: password.clone(), expires: begun.checked_add(ttl) }),
                    failure: None,
                };
            }
            password
        });
        match run.await {
            Ok(password) => password,
            Err(_) => Err(CredentialError::Command { program: command.program().into(), error: interrupted().into() }),
        }
    }

    /// The keys of a password for a server's challenge: from memory, or derived off this thread. One derivation at a
    /// time for these credentials, two for all of a worker.
    ///
    /// # Errors
    ///
    /// The derivation was interrupted: the program ends.
    pub async fn keys(self: &Rc<Self>, password: &Password, challenge: Challenge) -> io::Result<Keys> {
        if let Some(keys) = self.known(password, &challenge) {
            return Ok(keys);
        }
        let turn = self.deriving.clone().lock_owned().await;
        if let Some(keys) = self.known(password, &challenge) {
            return Ok(keys);
        }
        let (this, password) = (self.clone(), password.clone());
        // A task, as above: the next login finds the keys.
        let derivation = spawn_local(async move {
            let permit = this.derivations.0.clone().acquire_owned().await.map_err(io::Error::other)?;
            let (bytes, asked) = (password.expose().to_vec(), challenge.clone());
            let derive = spawn_blocking(move || {
                let keys = Keys::derive(&bytes, &asked.salt, asked.iterations);
                drop(permit);
                keys
            });
            let keys = derive.await.map_err(stopped)?;
            this.remember(Derived { password, challenge, keys: keys.clone() });
            drop(turn);
            Ok(keys)
        });
        derivation.await.map_err(stopped)?
    }

    fn known(&self, password: &Password, challenge: &Challenge) -> Option<Keys> {
        let all = self.keys.borrow();
        let known = all.iter().find(|known| known.password == *password && known.challenge == *challenge)?;
        Some(known.keys.clone())
    }

    /// Keeps keys: of the newest password alone, and not many of it.
    fn remember(&self, new: Derived) {
        let mut all = self.keys.borrow_mut();
        all.retain(|known| known.password == new.password);
        if all.len() >= KEYS_MAX {
            all.remove(0);
        }
        all.push(new);
    }
}

fn stopped(_: JoinError) -> io::Error {
    io::Error::other("the key derivation was interrupted")
}

fn interrupted() -> String {
    "interrupted".to_owned()
}

/// What was read or printed, as a password: without the newline at its end.
///
/// # Errors
///
/// It is empty, too long, or holds a NUL, which would end it on the wire.
fn as_password(mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    if bytes.len() > PASSWORD_MAX {
        return Err(format!("more than {PASSWORD_MAX} bytes, which is no password"));
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
    }
    if bytes.is_empty() {
        return Err("there is no password in it".to_owned());
    }
    if bytes.contains(&0) {
        return Err("there is a NUL in the password".to_owned());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_what_stands_in_front_of_the_last_newline() {
        #[rustfmt::skip]
        let table: [(&[u8], Result<&[u8], &str>); 8] = [
            (b"secret",        Ok(b"secret")),
            (b"secret\n",      Ok(b"secret")),
            (b"secret\r\n",    Ok(b"secret")),
            (b"secret\n\n",    Ok(b"secret\n")),
            (b" s p \xff",     Ok(b" s p \xff")),
            (b"\n",            Err("there is no password in it")),
            (b"",              Err("there is no password in it")),
            (b"a\0b",          Err("there is a NUL in the password")),
        ];
        for (bytes, want) in table {
            let got = as_password(bytes.to_vec());
            assert_eq!(got.as_deref().map_err(String::as_str), want, "{bytes:?}");
        }
        assert!(as_password(vec![b'x'; PASSWORD_MAX + 1]).is_err());
    }

    #[test]
    fn keys_are_kept_for_one_password_and_a_few_salts() {
        let credentials = Credentials::new(Source::None, Derivations::default());
        let derived = |password: &[u8], salt: u8| Derived {
            password: Password::new(password),
            challenge: Challenge { salt: vec![salt], iterations: 1 },
            keys: Keys::derive(password, &[salt], 1),
        };
        let knows = |password: &[u8], salt: u8| {
            credentials.known(&Password::new(password), &Challenge { salt: vec![salt], iterations: 1 }).is_some()
        };
        for salt in 0..9 {
            credentials.remember(derived(b"old", salt));
        }
        assert!(!knows(b"old", 4) && knows(b"old", 5) && knows(b"old", 8) && !knows(b"new", 8));
        credentials.remember(derived(b"new", 8));
        assert!(knows(b"new", 8) && !knows(b"old", 8), "a changed password takes its keys with it");
        assert!(!format!("{credentials:?}").contains("old"));
    }
}
