//! What is read of an X.509 certificate.
//!
//! Source: RFC 5280.

use std::sync::Arc;

use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_parser::asn1_rs::{Any, FromDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, GeneralName, KeyUsage, NSCertType, ParsedExtension,
    X509Extension,
};
use x509_parser::oid_registry::{OID_PKCS1_MD5WITHRSAENC, OID_PKCS1_RSASSAPSS, OID_PKCS1_SHA1WITHRSA, Oid};
use x509_parser::signature_algorithm::SignatureAlgorithm;
use x509_parser::x509::X509Version;

/// Bytes that are no certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an X.509 certificate")]
pub(super) struct NotACertificate;

/// A certificate, borrowed from its DER.
pub(super) struct Certificate<'a> {
    der: &'a [u8],
    parsed: X509Certificate<'a>,
    /// The content of its `signatureAlgorithm`, as webpki compares it.
    algorithm: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// Reads `der`, which must hold one certificate and nothing else.
    pub(super) fn parse(der: &'a [u8]) -> Result<Self, NotACertificate> {
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|_| NotACertificate)?;
        if !rest.is_empty() {
            return Err(NotACertificate);
        }
        let (_, outer) = Any::from_der(der).map_err(|_| NotACertificate)?;
        let (rest, _tbs) = Any::from_der(outer.data).map_err(|_| NotACertificate)?;
        let (_, algorithm) = Any::from_der(rest).map_err(|_| NotACertificate)?;
        Ok(Self { der, parsed, algorithm: algorithm.data })
    }

    pub(super) const fn der(&self) -> &'a [u8] {
        self.der
    }

    pub(super) fn subject(&self) -> &[u8] {
        self.parsed.subject().as_raw()
    }

    pub(super) fn issuer(&self) -> &[u8] {
        self.parsed.issuer().as_raw()
    }

    /// Whether it names itself as its issuer; the signature is not looked at.
    pub(super) fn is_self_issued(&self) -> bool {
        self.subject() == self.issuer() && self.may_be_issued_by(self)
    }

    /// Whether names and key identifiers allow `other` to have issued it.
    pub(super) fn may_be_issued_by(&self, other: &Self) -> bool {
        if self.issuer() != other.subject() {
            return false;
        }
        match (self.authority_key().and_then(|key| key.key_identifier.as_ref()), other.subject_key()) {
            (Some(wanted), Some(found)) => wanted.0 == found,
            _ => true,
        }
    }

    /// Seconds since the epoch: not before, not after; both still belong to its life.
    pub(super) fn validity(&self) -> (i64, i64) {
        let validity = self.parsed.validity();
        (validity.not_before.timestamp(), validity.not_after.timestamp())
    }

    /// What is signed, the algorithm's content, the signature.
    pub(super) fn signed(&self) -> (&[u8], &[u8], &[u8]) {
        (self.parsed.tbs_certificate.as_ref(), self.algorithm, &self.parsed.signature_value.data)
    }

    /// The public key: a `SubjectPublicKeyInfo`.
    pub(super) fn public_key(&self) -> &[u8] {
        self.parsed.public_key().raw
    }

    pub(super) fn is_v1(&self) -> bool {
        self.parsed.version() == X509Version::V1
    }

    /// The first common name of its subject.
    pub(super) fn common_name(&self) -> Option<&[u8]> {
        self.parsed.subject().iter_common_name().next().map(|name| name.attr_value().data)
    }

    pub(super) fn alternative_names(&self) -> impl Iterator<Item = &GeneralName<'a>> {
        let names = self.extensions().filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        });
        names.flatten()
    }

    pub(super) fn basic_constraints(&self) -> Option<&BasicConstraints> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::BasicConstraints(constraints) => Some(constraints),
            _ => None,
        })
    }

    pub(super) fn key_usage(&self) -> Option<&KeyUsage> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::KeyUsage(usage) => Some(usage),
            _ => None,
        })
    }

    pub(super) fn extended_key_usage(&self) -> Option<&ExtendedKeyUsage<'a>> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::ExtendedKeyUsage(usage) => Some(usage),
            _ => None,
        })
    }

    pub(super) fn netscape_type(&self) -> Option<&NSCertType> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::NSCertType(kind) => Some(kind),
            _ => None,
        })
    }

    pub(super) fn has_name_constraints(&self) -> bool {
        self.extensions().any(|extension| matches!(extension, ParsedExtension::NameConstraints(_)))
    }

    /// Whether it must be understood in a way that is not, or cannot be read.
    pub(super) fn has_unknown_demand(&self) -> bool {
        self.parsed.extensions().iter().any(|extension| match extension.parsed_extension() {
            ParsedExtension::ParseError { .. } => true,
            ParsedExtension::BasicConstraints(_)
            | ParsedExtension::KeyUsage(_)
            | ParsedExtension::ExtendedKeyUsage(_)
            | ParsedExtension::SubjectAlternativeName(_)
            | ParsedExtension::NameConstraints(_)
            | ParsedExtension::NSCertType(_)
            | ParsedExtension::CertificatePolicies(_)
            | ParsedExtension::PolicyConstraints(_)
            | ParsedExtension::PolicyMappings(_)
            | ParsedExtension::InhibitAnyPolicy(_) => false,
            _ => extension.critical,
        })
    }

    /// Channel binding data `tls-server-end-point`: the certificate hashed with the hash of its signature, SHA-256 in
    /// place of MD5 and SHA-1. None where the signature has no single hash.
    ///
    /// Source: RFC 5929, section 4.1.
    pub(super) fn end_point(&self) -> Option<Arc<[u8]>> {
        let hash = match hash_of(&self.parsed)? {
            Hash::Sha256 => Sha256::digest(self.der).to_vec(),
            Hash::Sha384 => Sha384::digest(self.der).to_vec(),
            Hash::Sha512 => Sha512::digest(self.der).to_vec(),
        };
        Some(hash.into())
    }

    fn extensions(&self) -> impl Iterator<Item = &ParsedExtension<'a>> {
        self.parsed.extensions().iter().map(X509Extension::parsed_extension)
    }

    fn authority_key(&self) -> Option<&AuthorityKeyIdentifier<'a>> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::AuthorityKeyIdentifier(key) => Some(key),
            _ => None,
        })
    }

    fn subject_key(&self) -> Option<&[u8]> {
        self.extensions().find_map(|extension| match extension {
            ParsedExtension::SubjectKeyIdentifier(key) => Some(key.0),
            _ => None,
        })
    }
}

/// The common name in a certificate, DER; empty if there is none. A NUL inside would make it another name to whoever
/// reads it as C does.
pub(super) fn name_in(der: &[u8]) -> Box<str> {
    let name = Certificate::parse(der).ok().and_then(|certificate| {
        let name = std::str::from_utf8(certificate.common_name()?).ok()?;
        (!name.contains('\0')).then(|| Box::from(name))
    });
    name.unwrap_or_default()
}

enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// The hash of a certificate's signature.
fn hash_of(certificate: &X509Certificate<'_>) -> Option<Hash> {
    use x509_parser::oid_registry as oid;
    let algorithm = &certificate.signature_algorithm;
    let by_oid = |found: &Oid<'_>| {
        let sha1 = [OID_PKCS1_MD5WITHRSAENC, OID_PKCS1_SHA1WITHRSA, oid::OID_HASH_SHA1, ecdsa_with_sha1()];
        let sha256 = [oid::OID_PKCS1_SHA256WITHRSA, oid::OID_SIG_ECDSA_WITH_SHA256, oid::OID_NIST_HASH_SHA256];
        let sha384 = [oid::OID_PKCS1_SHA384WITHRSA, oid::OID_SIG_ECDSA_WITH_SHA384, oid::OID_NIST_HASH_SHA384];
        let sha512 = [oid::OID_PKCS1_SHA512WITHRSA, oid::OID_SIG_ECDSA_WITH_SHA512, oid::OID_NIST_HASH_SHA512];
        if sha1.contains(found) || sha256.contains(found) {
            Some(Hash::Sha256)
        } else if sha384.contains(found) {
            Some(Hash::Sha384)
        } else {
            sha512.contains(found).then_some(Hash::Sha512)
        }
    };
    if algorithm.algorithm == OID_PKCS1_RSASSAPSS {
        let Ok(SignatureAlgorithm::RSASSA_PSS(params)) = SignatureAlgorithm::try_from(algorithm) else {
            return None;
        };
        return by_oid(params.hash_algorithm_oid());
    }
    by_oid(&algorithm.algorithm)
}

/// Source: RFC 3279, section 2.2.3.
fn ecdsa_with_sha1() -> Oid<'static> {
    x509_parser::der_parser::oid!(1.2.840.10045.4.1)
}
