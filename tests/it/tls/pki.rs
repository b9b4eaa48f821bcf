//! Certificates of every shape, made as they are needed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use pgweir_harness::secrets;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, RsaKeySize, SanType, SignatureAlgorithm,
    date_time_ymd,
};
use tempfile::TempDir;

/// A certificate, those behind it, and its private key; PEM.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// Somebody who signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Authority {
    /// A root.
    pub(crate) fn root(name: &str) -> Self {
        Self::root_with(name, |_| {})
    }

    /// Somebody with this name and key who has no right to it.
    pub(crate) fn with(key: &KeyPair, name: &str) -> Self {
        let key = KeyPair::from_pem(&key.serialize_pem()).unwrap();
        Self { issuer: Issuer::new(authority_params(name), key), pem: String::new() }
    }

    /// A root that `change` makes another.
    pub(crate) fn root_with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = ecdsa();
        let mut params = authority_params(name);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), pem: certificate.pem() }
    }

    /// An authority below this one.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        self.intermediate_with(name, |_| {})
    }

    /// One that `change` makes another.
    pub(crate) fn intermediate_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = ecdsa();
        let mut params = authority_params(name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Self { issuer: Issuer::new(params, key), pem: certificate.pem() }
    }

    /// A certificate for `localhost`, which `change` makes another.
    pub(crate) fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        self.issue_for(&ecdsa(), change)
    }

    /// The same for this key.
    pub(crate) fn issue_for(&self, key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let params = leaf_params(change);
        identity(&params.signed_by(key, &self.issuer).unwrap(), key)
    }
}

/// A certificate for `localhost` that nobody else signed.
pub(crate) fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> Identity {
    let key = ecdsa();
    identity(&leaf_params(change).self_signed(&key).unwrap(), &key)
}

pub(crate) fn ecdsa() -> KeyPair {
    key_of(&PKCS_ECDSA_P256_SHA256)
}

pub(crate) fn key_of(algorithm: &'static SignatureAlgorithm) -> KeyPair {
    KeyPair::generate_for(algorithm).unwrap()
}

pub(crate) fn rsa() -> KeyPair {
    KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap()
}

pub(crate) fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

pub(crate) fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

pub(crate) fn address(text: &str) -> SanType {
    SanType::IpAddress(text.parse().unwrap())
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2090, 1, 1);
    params
}

fn leaf_params(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named("localhost");
    params.subject_alt_names = vec![dns("localhost")];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2090, 1, 1);
    params.use_authority_key_identifier_extension = true;
    change(&mut params);
    params
}

fn identity(certificate: &Certificate, key: &KeyPair) -> Identity {
    let key = key.serialize_pem();
    secrets::keep(&key);
    Identity { certificate: certificate.pem(), key }
}

/// A folder of PEM files.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::with_prefix("pgweir-tls-").unwrap())
    }

    /// The path of a file, which need not be there.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file that only we may read.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        // Renamed into place, as careful operators do.
        let fresh = self.path(&format!("{name}.new"));
        fs::write(&fresh, text).unwrap();
        fs::set_permissions(&fresh, Permissions::from_mode(0o600)).unwrap();
        fs::rename(&fresh, &path).unwrap();
        path
    }

    /// Writes `NAME.crt` and `NAME.key`.
    pub(crate) fn identity(&self, name: &str, identity: &Identity) -> (PathBuf, PathBuf) {
        (self.write(&format!("{name}.crt"), &identity.certificate), self.write(&format!("{name}.key"), &identity.key))
    }

    /// Runs `openssl` here, for what rcgen does not make.
    pub(crate) fn openssl(&self, arguments: &str) {
        let mut openssl = Command::new("openssl");
        openssl.args(arguments.split_ascii_whitespace()).current_dir(self.0.path());
        let output = openssl.output().expect("openssl");
        assert!(output.status.success(), "{openssl:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}
