//! Authentication towards a server.

use std::io;

use pgweir_proto::backend::{Authentication, Tag};
use pgweir_proto::encode;
use pgweir_proto::scram::{ChannelBinding, ClientExchange, Keys, MECHANISM};

use super::{DialError, Login};
use crate::backend::{DerivedKeys, Target};

/// The most SCRAM iterations done for a server: it must not choose how much work we do.
const SCRAM_ITERATIONS_MAX: u32 = 1_000_000;

impl Login {
    pub(super) async fn authenticate(&mut self, target: &Target) -> Result<(), DialError> {
        let (tag, body) = self.recv().await?;
        if tag != Tag::Authentication {
            return Err(DialError::OutOfPlace { tag: tag as u8 });
        }
        match Authentication::parse(&body)? {
            Authentication::Ok => Ok(()),
            Authentication::Sasl { mechanisms } => self.scram(target, mechanisms).await,
            other => Err(DialError::Method { method: method_name(&other) }),
        }
    }

    async fn scram(&mut self, target: &Target, mechanisms: &[u8]) -> Result<(), DialError> {
        if !mechanisms.split(|byte| *byte == 0).any(|name| name == MECHANISM.as_bytes()) {
            return Err(DialError::Method { method: String::from_utf8_lossy(mechanisms).replace('\0', " ") });
        }
        let password = target.password.as_ref().ok_or_else(|| DialError::NoPassword { user: target.user.clone() })?;
        let mut nonce = [0; pgweir_proto::scram::NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| io::Error::other("the system gives no random bytes"))?;
        let mut exchange = ClientExchange::new(nonce, &ChannelBinding::Unavailable);

        let mut out = Vec::new();
        encode::sasl_initial(&mut out, MECHANISM, &exchange.first());
        self.send(&out).await?;
        let challenge = match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::SaslContinue(data) => exchange.server_first(data, SCRAM_ITERATIONS_MAX)?,
            other => return Err(DialError::Method { method: method_name(&other) }),
        };
        let keys = derive_keys(target, password, challenge.salt, challenge.iterations).await?;
        out.clear();
        encode::sasl_response(&mut out, &exchange.client_final(&keys)?);
        self.send(&out).await?;
        match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::SaslFinal(data) => exchange.server_final(data)?,
            other => return Err(DialError::Method { method: method_name(&other) }),
        }
        match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::Ok => Ok(()),
            other => Err(DialError::Method { method: method_name(&other) }),
        }
    }

    async fn recv_auth(&mut self) -> Result<Vec<u8>, DialError> {
        match self.recv().await? {
            (Tag::Authentication, body) => Ok(body),
            (tag, _) => Err(DialError::OutOfPlace { tag: tag as u8 }),
        }
    }
}

/// Keys for a salt and an iteration count: the cached ones, or new ones, derived off this thread.
async fn derive_keys(target: &Target, password: &str, salt: Vec<u8>, iterations: u32) -> Result<Keys, DialError> {
    if let Some(known) = &*target.keys.borrow()
        && known.salt == salt
        && known.iterations == iterations
    {
        return Ok(known.keys.clone());
    }
    let password = password.to_owned();
    let asked = salt.clone();
    let derive = tokio::task::spawn_blocking(move || Keys::derive(password.as_bytes(), &asked, iterations));
    let keys = derive.await.map_err(|_| io::Error::other("the key derivation was interrupted"))?;
    *target.keys.borrow_mut() = Some(DerivedKeys { salt, iterations, keys: keys.clone() });
    Ok(keys)
}

fn method_name(method: &Authentication<'_>) -> String {
    match method {
        Authentication::Ok => "none".to_owned(),
        Authentication::Cleartext => "password".to_owned(),
        Authentication::Md5 { .. } => "md5".to_owned(),
        Authentication::Sasl { .. } | Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => {
            "SASL".to_owned()
        }
        Authentication::Other(number) => format!("number {number}"),
    }
}
