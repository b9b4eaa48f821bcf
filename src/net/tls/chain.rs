//! Whether a certificate is trusted, as OpenSSL judges it, which is what libpq and Postgres use.
//!
//! webpki does the cryptography and name constraints. Its own notion of a chain is another: it refuses a leaf that is
//! marked as a CA, every certificate of version 1 but a root, and a self-signed certificate that is its own root; it
//! does not ask whether a root has expired, and takes an intermediate certificate for one.
//!
//! Source: OpenSSL's manual, openssl-verification-options(1), without `-partial_chain`.

use rustls::CertificateError;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, SubjectPublicKeyInfoDer, UnixTime};
use webpki::RawPublicKeyEntity;

use super::certificate::Certificate;

/// Certificates between a leaf and its root, at most.
const INTERMEDIATES_MAX: usize = 8;

/// Certificates that a peer may send, at most.
const SENT_MAX: usize = 16;

/// Signatures that are checked for one chain, at most: a peer chooses what it sends.
const CHECKS_MAX: u32 = 64;

/// What a certificate is to prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// That it is a server.
    Server,
    /// That it is a client.
    Client,
}

/// Certificates that are trusted, DER.
#[derive(Clone, Debug, Default)]
pub(super) struct Roots(pub(super) Vec<CertificateDer<'static>>);

/// Checks the chain from `leaf` to one of `roots`.
pub(super) fn verify(
    leaf: &CertificateDer<'_>,
    sent: &[CertificateDer<'_>],
    roots: &Roots,
    purpose: Purpose,
    now: UnixTime,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(), CertificateError> {
    let parse = |der| Certificate::parse(der).map_err(|_| CertificateError::BadEncoding);
    let parsed = parse(leaf)?;
    if sent.len() > SENT_MAX {
        return Err(CertificateError::UnknownIssuer);
    }
    // One that cannot be read is no issuer of ours.
    let read = |ders: &'_ [CertificateDer<'_>]| -> Vec<_> { ders.iter().map(|der| der.to_vec()).collect() };
    let (trusted, sent_der) = (read(&roots.0), read(sent));
    let trusted: Vec<Certificate<'_>> = trusted.iter().filter_map(|der| Certificate::parse(der).ok()).collect();
    let others: Vec<Certificate<'_>> = sent_der.iter().filter_map(|der| Certificate::parse(der).ok()).collect();
    let mut search = Search {
        trusted: &trusted,
        others: &others,
        purpose,
        now: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        algorithms,
        checks: CHECKS_MAX,
    };
    let trust = trusted.iter().any(|root| root.der() == leaf.as_ref());
    let mut chain = vec![&parsed];
    search.climb(&mut chain, trust)?;
    if chain.iter().skip(1).any(|ca| ca.has_name_constraints()) {
        return within_constraints(leaf, sent, roots, purpose, now, algorithms);
    }
    Ok(())
}

/// Name constraints are webpki's business.
fn within_constraints(
    leaf: &CertificateDer<'_>,
    sent: &[CertificateDer<'_>],
    roots: &Roots,
    purpose: Purpose,
    now: UnixTime,
    algorithms: &WebPkiSupportedAlgorithms,
) -> Result<(), CertificateError> {
    let usage = match purpose {
        Purpose::Server => webpki::KeyUsage::server_auth(),
        Purpose::Client => webpki::KeyUsage::client_auth(),
    };
    let anchors: Vec<_> = roots.0.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
    let leaf = webpki::EndEntityCert::try_from(leaf).map_err(|_| CertificateError::BadEncoding)?;
    let path = leaf.verify_for_usage(algorithms.all, &anchors, sent, now, usage, None, None);
    path.map(drop).map_err(|_| CertificateError::NotValidForName)
}

/// Checks what was signed with the private key of `key`, a `SubjectPublicKeyInfo`.
pub(super) fn verify_signature<'a>(
    key: &[u8],
    message: &[u8],
    signature: &[u8],
    candidates: impl Iterator<Item = &'a dyn rustls::pki_types::SignatureVerificationAlgorithm>,
) -> Result<(), CertificateError> {
    let key = SubjectPublicKeyInfoDer::from(key);
    let key = RawPublicKeyEntity::try_from(&key).map_err(|_| CertificateError::BadEncoding)?;
    for algorithm in candidates {
        match key.verify_signature(algorithm, message, signature) {
            Ok(()) => return Ok(()),
            Err(webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_)) => {}
            Err(_) => return Err(CertificateError::BadSignature),
        }
    }
    Err(CertificateError::BadSignature)
}

struct Search<'a, 'b> {
    trusted: &'a [Certificate<'b>],
    others: &'a [Certificate<'b>],
    purpose: Purpose,
    now: i64,
    algorithms: &'a WebPkiSupportedAlgorithms,
    checks: u32,
}

impl<'a> Search<'a, '_> {
    /// Goes on from the last certificate of `chain`, which is trusted itself if `trust`, up to a trusted self-signed
    /// one. Whichever issuer leads there is good; the first error is the one that is told.
    fn climb<'c>(&mut self, chain: &mut Vec<&'c Certificate<'c>>, trust: bool) -> Result<(), CertificateError>
    where
        'a: 'c,
    {
        let Some(&last) = chain.last() else { return Err(CertificateError::UnknownIssuer) };
        self.fits(chain, last)?;
        if last.is_self_issued() {
            return if trust { Ok(()) } else { Err(CertificateError::UnknownIssuer) };
        }
        if chain.len() > INTERMEDIATES_MAX + 1 {
            return Err(CertificateError::UnknownIssuer);
        }
        let mut failure = None;
        let (trusted, others) = (self.trusted, if trust { &[] } else { self.others });
        let candidates = trusted.iter().map(|ca| (ca, true)).chain(others.iter().map(|ca| (ca, false)));
        for (issuer, trust) in candidates {
            if !last.may_be_issued_by(issuer) || chain.iter().any(|known| known.der() == issuer.der()) {
                continue;
            }
            self.checks = self.checks.checked_sub(1).ok_or(CertificateError::UnknownIssuer)?;
            let outcome = self.is_signed(last, issuer).and_then(|()| {
                chain.push(issuer);
                self.climb(chain, trust)
            });
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) => {
                    failure.get_or_insert(error);
                    let depth = chain.iter().position(|known| std::ptr::eq(*known, last)).map_or(0, |at| at + 1);
                    chain.truncate(depth);
                }
            }
        }
        Err(failure.unwrap_or(CertificateError::UnknownIssuer))
    }

    fn is_signed(&self, subject: &Certificate<'_>, issuer: &Certificate<'_>) -> Result<(), CertificateError> {
        let (message, algorithm, signature) = subject.signed();
        let fitting = self.algorithms.all.iter().filter(|known| known.signature_alg_id().as_ref() == algorithm);
        verify_signature(issuer.public_key(), message, signature, fitting.copied())
    }

    /// What `certificate`, the last of `chain`, has to be at its place.
    fn fits(&self, chain: &[&Certificate<'_>], certificate: &Certificate<'_>) -> Result<(), CertificateError> {
        let (not_before, not_after) = certificate.validity();
        if self.now < not_before {
            return Err(CertificateError::NotValidYet);
        }
        if self.now > not_after {
            return Err(CertificateError::Expired);
        }
        if certificate.has_unknown_demand() {
            return Err(CertificateError::UnhandledCriticalExtension);
        }
        let good = self.serves(certificate)
            && match chain.len() {
                0 | 1 => self.is_leaf(certificate),
                _ => is_ca(certificate) && self.is_short_enough(chain, certificate),
            };
        if good { Ok(()) } else { Err(CertificateError::InvalidPurpose) }
    }

    /// Extended key usage, which binds authorities as well.
    fn serves(&self, certificate: &Certificate<'_>) -> bool {
        certificate.extended_key_usage().is_none_or(|usage| match self.purpose {
            Purpose::Server => usage.server_auth,
            Purpose::Client => usage.client_auth,
        })
    }

    fn is_leaf(&self, certificate: &Certificate<'_>) -> bool {
        let usage = certificate.key_usage().is_none_or(|usage| match self.purpose {
            Purpose::Server => usage.digital_signature() || usage.key_encipherment() || usage.key_agreement(),
            Purpose::Client => usage.digital_signature() || usage.key_agreement(),
        });
        let kind = certificate.netscape_type().is_none_or(|kind| match self.purpose {
            Purpose::Server => kind.ssl_server(),
            Purpose::Client => kind.ssl_client(),
        });
        usage && kind
    }

    /// Its limit on the authorities below it; self-issued ones do not count.
    #[expect(clippy::unused_self, reason = "it stands with the other checks of a place in the chain")]
    fn is_short_enough(&self, chain: &[&Certificate<'_>], certificate: &Certificate<'_>) -> bool {
        let Some(limit) = certificate.basic_constraints().and_then(|constraints| constraints.path_len_constraint)
        else {
            return true;
        };
        let between = chain.iter().skip(1).take(chain.len().saturating_sub(2));
        let below = between.filter(|ca| !ca.is_self_issued()).count();
        u32::try_from(below).is_ok_and(|below| below <= limit)
    }
}

/// An authority says so; one of version 1, which cannot, is one if it is a root; and whoever may sign certificates.
fn is_ca(certificate: &Certificate<'_>) -> bool {
    if certificate.key_usage().is_some_and(|usage| !usage.key_cert_sign()) {
        return false;
    }
    match certificate.basic_constraints() {
        Some(constraints) => constraints.ca,
        None => certificate.is_v1() && certificate.is_self_issued() || certificate.key_usage().is_some(),
    }
}
