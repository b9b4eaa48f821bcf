//! Authentication towards a server: what it may ask for, and what it gets.

use std::io;

use pgweir_config::{AuthMethod, BindingPolicy};
use pgweir_proto::backend::{Authentication, Tag};
use pgweir_proto::encode;
use pgweir_proto::md5;
use pgweir_proto::scram::{ChannelBinding, ClientExchange, MECHANISM, MECHANISM_PLUS, NONCE_BYTES};

use super::{DialError, Login};
use crate::backend::{Credential, LoginPolicy, Target};

impl Login {
    pub(super) async fn authenticate(&mut self, target: &Target, credential: &Credential) -> Result<(), DialError> {
        let policy = &target.policy;
        match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::Ok => {
                allow(policy, AuthMethod::None)?;
                unbound(policy, "the server asks for no authentication")
            }
            Authentication::Cleartext => {
                allow(policy, AuthMethod::Password)?;
                unbound(policy, "the server asks for the password in clear")?;
                if !self.stream.is_private() && !policy.allow_cleartext_password {
                    return Err(DialError::Cleartext);
                }
                let Credential::Password(password) = credential else {
                    return Err(unfit(target, credential, AuthMethod::Password));
                };
                self.send_password(password.expose()).await?;
                self.until_ok().await
            }
            Authentication::Md5 { salt } => {
                allow(policy, AuthMethod::Md5)?;
                unbound(policy, "the server asks for the authentication method md5")?;
                let answer = match credential {
                    Credential::Password(password) => {
                        md5::Hash::of(password.expose(), target.user.as_bytes()).answer(salt)
                    }
                    Credential::Hash(hash) => hash.answer(salt),
                    Credential::None | Credential::Keys(_) => {
                        return Err(unfit(target, credential, AuthMethod::Md5));
                    }
                };
                self.send_password(&answer).await?;
                self.until_ok().await
            }
            Authentication::Sasl { mechanisms } => {
                allow(policy, AuthMethod::ScramSha256)?;
                let channel = self.channel(policy, mechanisms)?;
                if matches!(credential, Credential::None | Credential::Hash(_)) {
                    return Err(unfit(target, credential, AuthMethod::ScramSha256));
                }
                self.scram(target, credential, &channel).await
            }
            other => Err(DialError::Method { method: method_name(&other) }),
        }
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<(), DialError> {
        let mut out = Vec::new();
        encode::message(&mut out, b'p', |out| encode::cstr(out, password));
        self.send(&out).await
    }

    /// How the exchange is tied to the TLS connection, for what the server offers. RFC 5802 §6.
    fn channel(&self, policy: &LoginPolicy, mechanisms: &[u8]) -> Result<ChannelBinding, DialError> {
        let offers = |mechanism: &str| mechanisms.split(|byte| *byte == 0).any(|name| name == mechanism.as_bytes());
        let (plain, plus) = (offers(MECHANISM), offers(MECHANISM_PLUS));
        let tls = self.stream.tls();
        let end_point = tls.and_then(|tls| tls.end_point.clone());
        if plus && tls.is_none() {
            // Someone between us and the server has the TLS connection.
            return Err(DialError::Method { method: format!("{MECHANISM_PLUS} on a connection without TLS") });
        }
        if let Some(data) = end_point.as_ref().filter(|_| plus && policy.channel_binding != BindingPolicy::Disable) {
            return Ok(ChannelBinding::EndPoint(data.to_vec()));
        }
        unbound(
            policy,
            match (tls, &end_point) {
                (None, _) => "the connection is without TLS",
                (Some(_), None) => "it is not defined for the server's certificate",
                (Some(_), Some(_)) => "the server does not offer it",
            },
        )?;
        if !plain {
            let offered = String::from_utf8_lossy(mechanisms).trim_end_matches('\0').replace('\0', ", ");
            let method = if offered.is_empty() { "SASL without any mechanism".to_owned() } else { offered };
            return Err(DialError::Method { method });
        }
        // 'y' tells the server that we would have, so that it notices if its offer was taken away.
        let able = end_point.is_some() && !plus && policy.channel_binding != BindingPolicy::Disable;
        Ok(if able { ChannelBinding::Unused } else { ChannelBinding::Unavailable })
    }

    async fn scram(
        &mut self,
        target: &Target,
        credential: &Credential,
        channel: &ChannelBinding,
    ) -> Result<(), DialError> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| io::Error::other("the system gives no random bytes"))?;
        let mut exchange = ClientExchange::new(nonce, channel);

        let mut out = Vec::new();
        encode::sasl_initial(&mut out, channel.mechanism(), &exchange.first());
        self.send(&out).await?;
        let challenge = match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::SaslContinue(data) => exchange.server_first(data, target.policy.scram_iterations_max)?,
            other => return Err(out_of_turn(&other)),
        };
        let keys = match credential {
            Credential::Password(password) => target.credentials.keys(password, challenge).await?,
            Credential::Keys(keys) => {
                let keys = keys.answer(&challenge).cloned();
                keys.ok_or_else(|| DialError::OtherVerifier { user: target.user.clone() })?
            }
            Credential::None | Credential::Hash(_) => return Err(unfit(target, credential, AuthMethod::ScramSha256)),
        };
        out.clear();
        encode::sasl_response(&mut out, &exchange.client_final(&keys)?);
        self.send(&out).await?;
        match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::SaslFinal(data) => exchange.server_final(data)?,
            other => return Err(out_of_turn(&other)),
        }
        self.until_ok().await
    }

    async fn until_ok(&mut self) -> Result<(), DialError> {
        match Authentication::parse(&self.recv_auth().await?)? {
            Authentication::Ok => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    async fn recv_auth(&mut self) -> Result<Vec<u8>, DialError> {
        match self.recv().await? {
            (Tag::Authentication, body) => Ok(body),
            (tag, _) => Err(DialError::OutOfPlace { tag: tag as u8 }),
        }
    }
}

/// What is known is not what the server asks for.
fn unfit(target: &Target, credential: &Credential, method: AuthMethod) -> DialError {
    let user = target.user.clone();
    match credential {
        Credential::None => DialError::NoPassword { user },
        credential => DialError::Unfit { user, method, known: credential.noun() },
    }
}

fn allow(policy: &LoginPolicy, method: AuthMethod) -> Result<(), DialError> {
    if policy.require_auth.allows(method) {
        return Ok(());
    }
    Err(DialError::NotAllowed { method, required: policy.require_auth.as_str().to_owned() })
}

/// A login without channel binding, and why.
fn unbound(policy: &LoginPolicy, reason: &'static str) -> Result<(), DialError> {
    if policy.channel_binding == BindingPolicy::Require { Err(DialError::Unbound { reason }) } else { Ok(()) }
}

/// An authentication message at the wrong moment.
fn out_of_turn(message: &Authentication<'_>) -> DialError {
    match message {
        Authentication::Ok => DialError::Unproven,
        other => DialError::Method { method: format!("{} in the middle of another", method_name(other)) },
    }
}

/// Source: the Postgres manual, "Message Formats", `Authentication…`.
fn method_name(method: &Authentication<'_>) -> String {
    let name = match method {
        Authentication::Ok => "none",
        Authentication::Cleartext => "password",
        Authentication::Md5 { .. } => "md5",
        Authentication::Sasl { .. } | Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => "SASL",
        Authentication::Other(2) => "Kerberos 5",
        Authentication::Other(7 | 8) => "GSSAPI",
        Authentication::Other(9) => "SSPI",
        Authentication::Other(number) => return format!("number {number}"),
    };
    name.to_owned()
}
