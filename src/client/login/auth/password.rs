//! The two older ways: an MD5 hash of the password, and the password itself.

use pgweir_proto::encode;
use pgweir_proto::md5;
use subtle::ConstantTimeEq as _;

use super::users::{User, no_random};
use super::{Door, Refused, wrong_password};
use crate::backend::{Credential, Password};
use crate::stats::RefusalReason;

impl Door {
    pub(super) async fn md5(&mut self, name: &str, user: &User, out: &mut Vec<u8>) -> Result<Credential, Refused> {
        let mut salt = [0; 4];
        getrandom::fill(&mut salt).map_err(no_random)?;
        encode::authentication(out, 5, &salt);
        let body = self.ask(out).await?;
        let answer = password(&body)?;
        let nobody = md5::Hash::of(&[], name.as_bytes());
        let right = user.hash().unwrap_or(&nobody).accepts(salt, answer);
        match user.hash().filter(|_| right) {
            Some(hash) => Ok(user.credential(Credential::Hash(hash.clone()))),
            None => Err(wrong_password(name)),
        }
    }

    pub(super) async fn plain(&mut self, name: &str, user: &User, out: &mut Vec<u8>) -> Result<Credential, Refused> {
        if !self.stream.is_private() && !self.context.config.auth.auth_plain_without_tls {
            let message = "auth_type plain asks for the password in clear, and this connection is not encrypted";
            let hint = "Connect with TLS (sslmode=require); auth_plain_without_tls = true allows it without.";
            return Err(Refused::with_hint(RefusalReason::Protocol, "28000", message, hint));
        }
        encode::authentication(out, 3, &[]);
        let body = self.ask(out).await?;
        let given = password(&body)?;
        if given.is_empty() {
            return Err(Refused::new(RefusalReason::AuthFailed, "28P01", "empty password returned by client"));
        }
        let right = match user.plain() {
            Some(plain) => bool::from(plain.as_bytes().ct_eq(given)),
            None => user.hash().is_some_and(|hash| md5::Hash::of(given, name.as_bytes()) == *hash),
        };
        let shown = Credential::Password(Password::new(given));
        if right {
            return Ok(shown);
        }
        // Whatever the secret is, and if there is none, a wrong password costs the same.
        let verifier = user.verifier().cloned().unwrap_or_else(|| self.context.secrets.mock(name));
        let given = given.to_vec();
        let _turn = self.context.stretching.acquire().await;
        let matches = tokio::task::spawn_blocking(move || verifier.matches_password(&given));
        match matches.await {
            Ok(true) => Ok(shown),
            _ => Err(wrong_password(name)),
        }
    }
}

/// The text of a `PasswordMessage`.
fn password(body: &[u8]) -> Result<&[u8], Refused> {
    match body.split_last() {
        Some((0, text)) if !text.contains(&0) => Ok(text),
        _ => Err(Refused::new(RefusalReason::Protocol, "08P01", "invalid password packet size")),
    }
}
