//! Who there is, and what each proves himself by.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use pgweir_config::{AuthType, Config, IdentMap, Secret, UserList};
use pgweir_proto::md5;
use pgweir_proto::scram::Verifier;

use crate::backend::{Credential, Password};
use crate::pool::Pool;
use crate::route::{is_plain, is_verifier};

/// One user's secret, as it was given and as it is used.
#[derive(Debug, Default)]
pub(super) struct User {
    /// None for a user that does not exist or has no password.
    secret: Option<Secret>,
    /// The verifier that the secret is, or that was derived of it.
    verifier: Option<Verifier>,
    /// The hash that the secret is, or that was derived of it.
    hash: Option<md5::Hash>,
    /// There is such a user, whether it has a password or not.
    exists: bool,
}

impl User {
    /// Takes a secret as it is stored. Derives a verifier of one in plain text if `derive`, with fresh salt; that takes
    /// half a millisecond at 4096 iterations.
    fn new(name: &str, secret: &Secret, derive: bool, iterations: u32) -> io::Result<Self> {
        let text = secret.expose();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let (verifier, hash) = if is_verifier(text) {
            (Some(Verifier::parse(text).map_err(io::Error::other)?), None)
        } else if let Some(hash) = md5::Hash::parse(text) {
            (None, Some(hash))
        } else {
            let hash = md5::Hash::of(text.as_bytes(), name.as_bytes());
            let mut salt = [0; 16];
            getrandom::fill(&mut salt).map_err(no_random)?;
            (derive.then(|| Verifier::derive(text.as_bytes(), &salt, iterations)), Some(hash))
        };
        Ok(Self { secret: Some(secret.clone()), verifier, hash, exists: true })
    }

    /// As [`User::new`]; a secret that cannot be used is none.
    fn take(name: &str, secret: &Secret, derive: bool, iterations: u32) -> Self {
        Self::new(name, secret, derive, iterations).unwrap_or_else(|error| {
            tracing::error!(user = name, %error, "the user's secret cannot be used");
            Self::default()
        })
    }

    /// Whether there is such a user.
    pub(super) fn exists(&self) -> bool {
        self.exists
    }

    pub(super) fn has_secret(&self) -> bool {
        self.secret.is_some()
    }

    /// Whether nothing but SCRAM can check this user.
    pub(super) fn is_scram(&self) -> bool {
        self.verifier.is_some() && self.hash.is_none()
    }

    pub(super) fn verifier(&self) -> Option<&Verifier> {
        self.verifier.as_ref()
    }

    pub(super) fn hash(&self) -> Option<&md5::Hash> {
        self.hash.as_ref()
    }

    /// The password, if it is known in plain text.
    pub(super) fn plain(&self) -> Option<&str> {
        self.secret.as_ref().map(Secret::expose).filter(|text| is_plain(text))
    }

    /// What opens the server as this user: the password if it is known, else what a login has shown.
    pub(super) fn credential(&self, shown: Credential) -> Credential {
        self.plain().map_or(shown, |plain| Credential::Password(Password::new(plain.as_bytes())))
    }
}

/// What a server says of a user.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// There is one.
    pub(super) exists: bool,
    /// None if it has none, or none that is still good.
    pub(super) secret: Option<Secret>,
}

/// The users that are known without asking a server.
#[derive(Debug, Default)]
pub struct Users {
    by_name: BTreeMap<String, Arc<User>>,
    /// Most of them can only be checked by SCRAM.
    mostly_scram: bool,
}

impl Users {
    /// The users of `[users.NAME]` and of `auth_file`; the former win. Where `auth_type` needs verifiers they are
    /// derived, so that no login is slower than that of a user who does not exist; those of `before` are kept where
    /// the secret is the same. Half a millisecond for each new secret in plain text.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn derive(config: &Config, list: &UserList, before: Option<&Self>) -> io::Result<Self> {
        let derive = needs_verifiers(config);
        let mut users = BTreeMap::new();
        let own = config.users.iter().filter_map(|(name, user)| Some((name.as_str(), user.password.as_ref()?)));
        for (name, secret) in list.iter().chain(own) {
            let known = before.and_then(|before| before.by_name.get(name));
            let user = match known.filter(|known| known.secret.as_ref() == Some(secret)) {
                Some(known) => known.clone(),
                None => Arc::new(User::new(name, secret, derive, config.auth.scram_iterations)?),
            };
            users.insert(name.to_owned(), user);
        }
        let scram = users.values().filter(|user| user.is_scram()).count();
        Ok(Self { mostly_scram: scram > 0 && scram * 2 >= users.len(), by_name: users })
    }
}

/// What clients prove themselves by.
#[derive(Debug)]
pub struct Secrets {
    users: RefCell<Arc<Users>>,
    /// Makes the salt of users that do not exist.
    mock: [u8; 32],
    iterations: u32,
    /// Whom the system's users and certificates may log in as, if not only as their namesakes.
    ident: Option<IdentMap>,
    /// A server told a secret in plain text.
    stretches: Cell<bool>,
}

impl Secrets {
    /// Those of the users that are known.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes, or `auth_ident_file` has become faulty.
    pub fn new(config: &Config, users: Arc<Users>) -> io::Result<Self> {
        let mut mock = [0; 32];
        getrandom::fill(&mut mock).map_err(no_random)?;
        let ident = config.read_ident_map().map_err(io::Error::other)?;
        Ok(Self {
            ident,
            users: RefCell::new(users),
            mock,
            iterations: config.auth.scram_iterations,
            stretches: Cell::new(false),
        })
    }

    /// From now on these are known.
    pub fn replace(&self, users: Arc<Users>) {
        *self.users.borrow_mut() = users;
    }

    /// Whether there is a user of this name, with a secret or without.
    pub(super) fn knows(&self, config: &Config, name: &str) -> bool {
        config.users.contains_key(name) || self.users.borrow().by_name.contains_key(name)
    }

    /// The user of this name, if it is known without asking a server.
    pub(super) fn user(&self, name: &str) -> Option<Arc<User>> {
        self.users.borrow().by_name.get(name).cloned()
    }

    /// Gives the pool of a user who looks others up its password, if that is known.
    pub(super) fn introduce(&self, name: &str, pool: &Pool) {
        if let Some(user) = self.user(name) {
            pool.give(user.credential(Credential::None));
        }
    }

    /// What opens the server as this user, who proved itself by no secret: its password, if that is known.
    pub(super) fn credential(&self, name: &str) -> Credential {
        self.user(name).map_or(Credential::None, |user| user.credential(Credential::None))
    }

    /// Whether whom the system, or a certificate, calls `name` may log in as `user`.
    pub(super) fn is_same(&self, name: &str, user: &str) -> bool {
        self.ident.as_ref().map_or(name == user, |map| map.allows(name, user))
    }

    /// Whether most users can only be checked by SCRAM.
    pub(super) fn are_scram(&self) -> bool {
        self.users.borrow().mostly_scram
    }

    /// A user that a server told of. A secret in plain text is stretched on another thread, where that is needed; once
    /// there was one, users without a secret cost the same.
    pub(super) async fn adopt(&self, config: &Config, name: &str, told: Told) -> Arc<User> {
        let Told { exists, secret } = told;
        let user = self.make(config, name, secret).await;
        Arc::new(User { exists, ..user })
    }

    async fn make(&self, config: &Config, name: &str, secret: Option<Secret>) -> User {
        let plain = secret.as_ref().is_some_and(|secret| is_plain(secret.expose()));
        if plain && needs_verifiers(config) {
            self.stretches.set(true);
        }
        let (name, iterations, derive) = (name.to_owned(), self.iterations, self.stretches.get());
        if !derive || secret.is_some() && !plain {
            return secret.map_or_else(User::default, |secret| User::take(&name, &secret, false, iterations));
        }
        let user = tokio::task::spawn_blocking(move || {
            let Some(secret) = secret else {
                drop(Verifier::derive(name.as_bytes(), b"nobody", iterations));
                return User::default();
            };
            User::take(&name, &secret, true, iterations)
        });
        user.await.unwrap_or_default()
    }

    /// What a user without a verifier is asked by: nothing matches it.
    pub(super) fn mock(&self, name: &str) -> Verifier {
        Verifier::mock(&self.mock, name.as_bytes(), self.iterations)
    }
}

/// Whether `auth_type` compares passwords with verifiers, so that one in plain text has to be stretched.
fn needs_verifiers(config: &Config) -> bool {
    matches!(config.auth.auth_type, AuthType::Plain | AuthType::ScramSha256 | AuthType::Peer)
}

pub(super) fn no_random(_: getrandom::Error) -> io::Error {
    io::Error::other("the system gives no random bytes")
}
