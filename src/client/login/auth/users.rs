//! Who there is, and what each proves himself by.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use pgweir_config::{AuthType, Config, Secret, UserList};
use pgweir_proto::md5;
use pgweir_proto::scram::Verifier;

use crate::route::is_verifier;

/// One user's secret, as it was given and as it is used.
#[derive(Debug)]
pub(super) struct User {
    /// None for a user that does not exist or has no password.
    secret: Option<Secret>,
    /// The verifier that the secret is, or that was derived of it.
    verifier: Option<Verifier>,
    /// The hash that the secret is, or that was derived of it.
    hash: Option<md5::Hash>,
}

impl User {
    /// Takes a secret as it is stored. Derives a verifier of one in plain text if `derive`, with fresh salt; that takes
    /// half a millisecond at 4096 iterations.
    fn new(name: &str, secret: &Secret, derive: bool, iterations: u32) -> io::Result<Self> {
        let text = secret.expose();
        if text.is_empty() {
            return Ok(Self { secret: None, verifier: None, hash: None });
        }
        let (verifier, hash) = if is_verifier(text) {
            let bad = |error| io::Error::other(format!("user {name}: {error}"));
            (Some(Verifier::parse(text).map_err(bad)?), None)
        } else if let Some(hash) = md5::Hash::parse(text) {
            (None, Some(hash))
        } else {
            let hash = md5::Hash::of(text.as_bytes(), name.as_bytes());
            let mut salt = [0; 16];
            getrandom::fill(&mut salt).map_err(no_random)?;
            (derive.then(|| Verifier::derive(text.as_bytes(), &salt, iterations)), Some(hash))
        };
        Ok(Self { secret: Some(secret.clone()), verifier, hash })
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
        let text = self.secret.as_ref()?.expose();
        (!is_verifier(text) && md5::Hash::parse(text).is_none()).then_some(text)
    }
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
        let derive = matches!(config.auth.auth_type, AuthType::Plain | AuthType::ScramSha256 | AuthType::Peer);
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
}

impl Secrets {
    /// Those of the users that are known.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn new(config: &Config, users: Arc<Users>) -> io::Result<Self> {
        let mut mock = [0; 32];
        getrandom::fill(&mut mock).map_err(no_random)?;
        Ok(Self { users: RefCell::new(users), mock, iterations: config.auth.scram_iterations })
    }

    /// From now on these are known.
    pub fn replace(&self, users: Arc<Users>) {
        *self.users.borrow_mut() = users;
    }

    /// Whether there is a user of this name, with a secret or without.
    pub(super) fn knows(&self, config: &Config, name: &str) -> bool {
        config.users.contains_key(name) || self.users.borrow().by_name.contains_key(name)
    }

    /// The user of this name, or one without a secret.
    pub(super) fn user(&self, name: &str) -> Arc<User> {
        let known = self.users.borrow().by_name.get(name).cloned();
        // Asked by SCRAM or by MD5 like the others: it must not show that there is no such user.
        known.unwrap_or_else(|| Arc::new(User { secret: None, verifier: None, hash: None }))
    }

    /// Whether `auth_type` `md5` asks this user by SCRAM: one without a secret as most of the others.
    pub(super) fn asks_by_scram(&self, user: &User) -> bool {
        user.is_scram() || user.secret.is_none() && self.users.borrow().mostly_scram
    }

    /// What a user without a verifier is asked by: nothing matches it.
    pub(super) fn mock(&self, name: &str) -> Verifier {
        Verifier::mock(&self.mock, name.as_bytes(), self.iterations)
    }
}

pub(super) fn no_random(_: getrandom::Error) -> io::Error {
    io::Error::other("the system gives no random bytes")
}
