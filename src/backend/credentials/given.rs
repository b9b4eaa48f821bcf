//! What clients prove themselves by, where it opens the server, too.

use std::fmt;
use std::rc::Rc;

use pgweir_proto::md5;
use pgweir_proto::scram::{Challenge, Keys, Verifier};

/// The keys behind a SCRAM verifier: taken from the proof of a client that matched it. They open a server that stores
/// the same verifier, and are kept in memory alone.
#[derive(Clone)]
pub struct ProvenKeys(Rc<Proven>);

struct Proven {
    challenge: Challenge,
    keys: Keys,
}

impl ProvenKeys {
    /// The keys of a client that proved to know `client_key`, which `verifier` accepts.
    ///
    /// Source: RFC 5802 §3: `ClientKey := ClientProof XOR ClientSignature`.
    #[must_use]
    pub fn new(verifier: &Verifier, client_key: [u8; 32]) -> Self {
        let challenge = Challenge { salt: verifier.salt().to_vec(), iterations: verifier.iterations() };
        Self(Rc::new(Proven { challenge, keys: Keys::new(client_key, *verifier.server_key()) }))
    }

    /// The keys, if the server asks for those of the same verifier, as far as it shows.
    #[must_use]
    pub fn answer(&self, challenge: &Challenge) -> Option<&Keys> {
        (self.0.challenge == *challenge).then_some(&self.0.keys)
    }
}

/// Those of one verifier are the same.
impl PartialEq for ProvenKeys {
    fn eq(&self, other: &Self) -> bool {
        let verifier = |Proven { challenge, keys }: &Proven| keys.verifier(&challenge.salt, challenge.iterations);
        Rc::ptr_eq(&self.0, &other.0) || verifier(&self.0) == verifier(&other.0)
    }
}

impl Eq for ProvenKeys {}

impl fmt::Debug for ProvenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What one login proves itself by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Nothing is known.
    None,
    /// A password.
    Password(super::Password),
    /// No password, but what a SCRAM login needs of it.
    Keys(ProvenKeys),
    /// No password, but what an MD5 login needs of it.
    Hash(md5::Hash),
}

impl Credential {
    /// What is known, for an error.
    #[must_use]
    pub(in crate::backend) const fn noun(&self) -> &'static str {
        match self {
            Self::None => "nothing",
            Self::Password(_) => "its password",
            Self::Keys(_) => "the keys of its SCRAM verifier",
            Self::Hash(_) => "its MD5 hash",
        }
    }
}
