//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, this side of the wire.

use pgweir_proto::encode;
use pgweir_proto::frontend;
use pgweir_proto::scram::{ChannelBinding, MECHANISM, MECHANISM_PLUS, NONCE_BYTES, ScramError, ServerExchange};

use super::users::{User, no_random};
use super::{Door, Refused, wrong_password};
use crate::backend::{Credential, ProvenKeys};
use crate::stats::RefusalReason;

impl Door {
    pub(super) async fn scram(&mut self, name: &str, user: &User, out: &mut Vec<u8>) -> Result<Credential, Refused> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(no_random)?;
        let verifier = user.verifier().cloned().unwrap_or_else(|| self.context.secrets.mock(name));
        let end_point = self.stream.tls().and_then(|tls| tls.end_point.clone());

        let offer = if end_point.is_some() { &[MECHANISM_PLUS, MECHANISM][..] } else { &[MECHANISM] };
        let names: Vec<u8> = offer.iter().flat_map(|name| name.bytes().chain([0])).chain([0]).collect();
        encode::authentication(out, 10, &names);
        let body = self.ask(out).await?;
        let (mechanism, first) = frontend::sasl_initial(&body)?;
        let channel = match (std::str::from_utf8(mechanism), end_point) {
            (Ok(MECHANISM_PLUS), Some(end_point)) => ChannelBinding::EndPoint(end_point.to_vec()),
            // It could have been bound: a client that believes otherwise was lied to.
            (Ok(MECHANISM), Some(_)) => ChannelBinding::Unused,
            (Ok(MECHANISM), None) => ChannelBinding::Unavailable,
            _ => {
                let message = "client selected an invalid SASL authentication mechanism";
                return Err(Refused::new(RefusalReason::Protocol, "08P01", message));
            }
        };
        let mut exchange = ServerExchange::new(verifier.clone(), nonce, channel);
        let late;
        let first = if let Some(first) = first {
            first
        } else {
            encode::authentication(out, 11, &[]);
            late = self.ask(out).await?;
            &late
        };
        let reply = exchange.client_first(first).map_err(|error| refused(name, error))?;
        encode::authentication(out, 11, &reply);
        let proof = self.ask(out).await?;
        let proven = exchange.client_final(&proof).map_err(|error| refused(name, error))?;
        encode::authentication(out, 12, &proven.server_final);
        Ok(user.credential(Credential::Keys(ProvenKeys::new(&verifier, proven.client_key))))
    }
}

/// In Postgres' words.
fn refused(user: &str, error: ScramError) -> Refused {
    let (reason, code, message) = match error {
        ScramError::WrongProof => return wrong_password(user),
        ScramError::Downgrade => {
            (RefusalReason::AuthFailed, "28000", "SCRAM channel binding negotiation error".to_owned())
        }
        ScramError::BindingMismatch => {
            (RefusalReason::AuthFailed, "28000", "SCRAM channel binding check failed".to_owned())
        }
        ScramError::Unsupported { .. } => (RefusalReason::Protocol, "0A000", error.to_string()),
        ScramError::BindingType => (RefusalReason::Protocol, "08P01", error.to_string()),
        ScramError::NonceMismatch => (RefusalReason::Protocol, "08P01", "invalid SCRAM response".to_owned()),
        error => (RefusalReason::Protocol, "08P01", format!("malformed SCRAM message: {error}")),
    };
    Refused::new(reason, code, &message)
}
