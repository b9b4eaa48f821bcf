//! Authentication of a client: what it is asked for, and what it proves itself by.

use std::collections::BTreeMap;
use std::io;

use pgweir_config::Config;
use pgweir_proto::encode;
use pgweir_proto::frontend;
use pgweir_proto::scanner::{HEADER, Scanned};
use pgweir_proto::scram::{ChannelBinding, MECHANISM, ScramError, ServerExchange, Verifier};

use super::{Door, LOGIN_MESSAGE_MAX, Refused};
use crate::route::is_verifier;
use crate::stats::RefusalReason;

/// What clients prove themselves by.
#[derive(Debug)]
pub struct Secrets {
    verifiers: BTreeMap<String, Verifier>,
    /// Makes the salt of users that do not exist.
    mock: [u8; 32],
    iterations: u32,
}

impl Secrets {
    /// Derives a verifier for every configured user. Takes half a millisecond for each with a plain password.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn derive(config: &Config) -> io::Result<Self> {
        let random = |_| io::Error::other("the system gives no random bytes");
        let mut mock = [0; 32];
        getrandom::fill(&mut mock).map_err(random)?;
        let iterations = config.auth.scram_iterations;
        let mut verifiers = BTreeMap::new();
        for (name, user) in &config.users {
            let Some(password) = &user.password else { continue };
            let password = password.expose();
            let verifier = if is_verifier(password) {
                Verifier::parse(password)
                    .map_err(|error| io::Error::other(format!("[users.{name}] password: {error}")))?
            } else {
                let mut salt = [0; 16];
                getrandom::fill(&mut salt).map_err(random)?;
                Verifier::derive(password.as_bytes(), &salt, iterations)
            };
            verifiers.insert(name.clone(), verifier);
        }
        Ok(Self { verifiers, mock, iterations })
    }

    /// The user's verifier, or one that nothing matches.
    fn verifier(&self, user: &str) -> Verifier {
        match self.verifiers.get(user) {
            Some(verifier) => verifier.clone(),
            None => Verifier::mock(&self.mock, user.as_bytes(), self.iterations),
        }
    }
}

impl Door {
    /// The body of the next `p` message.
    async fn password_message(&mut self) -> Result<Vec<u8>, Refused> {
        loop {
            if let Scanned::Whole { tag, body } = self.scanner.next(&self.input)? {
                if tag != frontend::Tag::Password as u8 {
                    let message = format!("expected password response, got message type {tag}");
                    return Err(Refused::new(RefusalReason::Protocol, "08P01", &message));
                }
                let body = body.to_vec();
                self.input.drain(..HEADER + body.len());
                return Ok(body);
            }
            self.read(LOGIN_MESSAGE_MAX as usize + HEADER).await?;
        }
    }

    /// SCRAM-SHA-256. `out` goes in front of the first request, and holds what goes in front of `AuthenticationOk`.
    pub(super) async fn scram(&mut self, user: &str, out: &mut Vec<u8>) -> Result<(), Refused> {
        let mut nonce = [0; pgweir_proto::scram::NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| io::Error::other("the system gives no random bytes"))?;
        let verifier = self.context.secrets.verifier(user);
        let mut exchange = ServerExchange::new(verifier, nonce, ChannelBinding::Unavailable);

        encode::authentication(out, 10, &[MECHANISM.as_bytes(), b"\0\0"].concat());
        self.write(out).await?;
        out.clear();
        let body = self.password_message().await?;
        let (mechanism, first) = frontend::sasl_initial(&body)?;
        if mechanism != MECHANISM.as_bytes() {
            let message = "client selected an invalid SASL authentication mechanism";
            return Err(Refused::new(RefusalReason::Protocol, "08P01", message));
        }
        let late;
        let first = if let Some(first) = first {
            first
        } else {
            encode::authentication(out, 11, &[]);
            self.write(out).await?;
            out.clear();
            late = self.password_message().await?;
            &late
        };
        let reply = exchange.client_first(first).map_err(|error| scram_refused(user, error))?;
        encode::authentication(out, 11, &reply);
        self.write(out).await?;
        out.clear();
        let proof = self.password_message().await?;
        let proven = exchange.client_final(&proof).map_err(|error| scram_refused(user, error))?;
        encode::authentication(out, 12, &proven.server_final);
        Ok(())
    }
}

fn scram_refused(user: &str, error: ScramError) -> Refused {
    match error {
        ScramError::WrongProof => {
            let message = format!("password authentication failed for user \"{user}\"");
            Refused::new(RefusalReason::AuthFailed, "28P01", &message)
        }
        ScramError::Unsupported { .. } => Refused::new(RefusalReason::Protocol, "0A000", &error.to_string()),
        ScramError::Downgrade | ScramError::BindingMismatch => {
            Refused::new(RefusalReason::AuthFailed, "28000", &error.to_string())
        }
        error => Refused::new(RefusalReason::Protocol, "08P01", &format!("malformed SCRAM message: {error}")),
    }
}
