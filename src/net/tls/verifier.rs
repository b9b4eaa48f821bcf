//! What rustls asks of us: is the peer's certificate good, and did its owner sign the handshake.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved, SignatureScheme,
};

use super::certificate::Certificate;
use super::chain::{Purpose, Roots, verify, verify_signature};
use super::host::{self, Strangers};

/// Judges servers.
#[derive(Debug)]
pub(super) struct OfServers {
    /// Whom to trust; none: whoever comes.
    pub(super) roots: Option<Arc<Roots>>,
    /// The name that the certificate must be for; none: any.
    pub(super) host: Option<String>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// Judges clients that show a certificate. Whether they must is decided after the handshake, where they can be told.
#[derive(Debug)]
pub(super) struct OfClients {
    pub(super) roots: Arc<Roots>,
    pub(super) subjects: Vec<DistinguishedName>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

/// A good certificate of another host.
#[derive(Debug)]
pub(super) struct WrongHost {
    strangers: Strangers,
    host: String,
}

impl fmt::Display for WrongHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { strangers: Strangers { first, count }, host } = self;
        match count {
            0 => f.write_str("could not get server's host name from server certificate"),
            1 => write!(f, "server certificate for \"{first}\" does not match host name \"{host}\""),
            2 => write!(f, "server certificate for \"{first}\" (and 1 other name) does not match host name \"{host}\""),
            more => write!(
                f,
                "server certificate for \"{first}\" (and {} other names) does not match host name \"{host}\"",
                more - 1
            ),
        }
    }
}

impl std::error::Error for WrongHost {}

impl ServerCertVerifier for OfServers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        sent: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(roots) = &self.roots {
            verify(leaf, sent, roots, Purpose::Server, now, &self.algorithms)?;
        }
        if let Some(host) = &self.host {
            let certificate = Certificate::parse(leaf).map_err(|_| CertificateError::BadEncoding)?;
            host::matches(&certificate, host).map_err(|strangers| {
                let wrong = WrongHost { strangers, host: host.clone() };
                CertificateError::Other(OtherError(Arc::new(wrong)))
            })?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        is_signed(message, leaf, signed, &self.algorithms, usize::MAX)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        is_signed(message, leaf, signed, &self.algorithms, 1)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for OfClients {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        sent: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify(leaf, sent, &self.roots, Purpose::Client, now, &self.algorithms)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        is_signed(message, leaf, signed, &self.algorithms, usize::MAX)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        is_signed(message, leaf, signed, &self.algorithms, 1)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether the owner of `leaf` signed `message`. In TLS 1.3 a scheme is one algorithm (`most` is 1), in TLS 1.2 one for
/// each curve. Certificates of version 1 are as good as others here, which rustls' own functions would refuse.
fn is_signed(
    message: &[u8],
    leaf: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
    algorithms: &WebPkiSupportedAlgorithms,
    most: usize,
) -> Result<HandshakeSignatureValid, Error> {
    let known = algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
    // What is left of PKCS #1 v1.5 and SHA-1 in TLS 1.3 is for certificates.
    let banned = most == 1
        && matches!(
            signed.scheme,
            SignatureScheme::RSA_PKCS1_SHA256
                | SignatureScheme::RSA_PKCS1_SHA384
                | SignatureScheme::RSA_PKCS1_SHA512
                | SignatureScheme::RSA_PKCS1_SHA1
                | SignatureScheme::ECDSA_SHA1_Legacy
        );
    let Some((_, candidates)) = known.filter(|_| !banned) else {
        return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
    };
    let certificate = Certificate::parse(leaf).map_err(|_| CertificateError::BadEncoding)?;
    verify_signature(certificate.public_key(), message, signed.signature(), candidates.iter().copied().take(most))?;
    Ok(HandshakeSignatureValid::assertion())
}
