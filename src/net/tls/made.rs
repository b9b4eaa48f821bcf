//! A certificate that is made and kept nowhere, for clients that insist on TLS and verify nobody.

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

/// A certificate could not be made; the libraries or the system's random numbers are at fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotMade {
    /// The certificate.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// What it is for.
    #[error("cannot use the certificate that was made: {0}")]
    Use(#[from] rustls::Error),
}

/// A self-signed certificate for this machine by any of its names, with a P-256 key.
///
/// # Errors
///
/// [`NotMade`].
pub(super) fn made_identity() -> Result<CertifiedKey, NotMade> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "localhost");
    let certificate = params.self_signed(&key)?;
    let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&private)?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], signer))
}
