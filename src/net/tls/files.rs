//! PEM files: certificates and private keys, and everything that can be wrong with them.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use pgweir_config::SYSTEM;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::certificate::Certificate;
use super::chain::Roots;

/// The largest file that is read; bytes. The authorities of a whole operating system are a quarter of a megabyte.
const FILE_MAX: u64 = 4 << 20;

/// A file that cannot be used: which setting names it, what is wrong with it, how to mend it. One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFault {
    /// The setting: `client_tls_key_file`, `databases.app.sslkey`.
    pub key: String,
    /// The file.
    pub path: String,
    problem: FileProblem,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum FileProblem {
    #[error("the file cannot be read: {error}. Check the path and its permissions")]
    Unreadable { error: String },
    #[error("the file has more than {FILE_MAX} bytes. Name a PEM file")]
    TooLarge,
    #[error("not PEM: {error}. Write the file anew")]
    NotPem { error: String },
    #[error("the file holds no certificate. Name a PEM file with a BEGIN CERTIFICATE line")]
    NoCertificate,
    #[error("certificate {number} of the file is not X.509. Write the file anew")]
    NotACertificate { number: usize },
    #[error("the file holds no private key. Name a PEM file with a BEGIN PRIVATE KEY line")]
    NoKey,
    #[error("the private key is encrypted, and there is nobody to ask. Decrypt it: openssl pkey -in FILE -out NEW")]
    EncryptedKey,
    #[error(
        "the private key cannot be used: {error}. Use RSA of 2048 bits or more, ECDSA on P-256, P-384 or P-521, or Ed25519"
    )]
    UnusableKey { error: String },
    #[error("the private key does not match the certificate in {certificate}. Name the two that belong together")]
    Mismatch { certificate: String },
    #[error("not a regular file. Name a file")]
    NotRegular,
    #[error(
        "private key file has group or world access. File must have permissions u=rw (0600) or less if owned by the \
         current user, or permissions u=rw,g=r (0640) or less if owned by root"
    )]
    Access,
    #[error("the operating system has no trusted authorities ({error}). Name a PEM file, or install ca-certificates")]
    NoSystem { error: String },
}

impl fmt::Display for FileFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}: {}.", self.key, self.path.escape_debug(), self.problem)
    }
}

impl std::error::Error for FileFault {}

/// A setting and the file that it names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Named {
    pub(super) key: String,
    pub(super) path: String,
}

impl Named {
    fn fault(&self, problem: FileProblem) -> FileFault {
        FileFault { key: self.key.clone(), path: self.path.clone(), problem }
    }
}

/// Reads authorities.
pub(super) fn roots(file: &Named) -> Result<Arc<Roots>, FileFault> {
    if file.path == SYSTEM {
        let found = rustls_native_certs::load_native_certs();
        if found.certs.is_empty() {
            let error = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
            return Err(file.fault(FileProblem::NoSystem { error }));
        }
        return Ok(Arc::new(Roots(found.certs)));
    }
    certificates(file).map(|certificates| Arc::new(Roots(certificates)))
}

/// Reads a certificate, those behind it, and its private key; all their faults.
pub(super) fn identity(
    certificate: &Named,
    key: &Named,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, Vec<FileFault>> {
    let (chain, private) = (certificates(certificate), private_key(key));
    let (chain, private) = match (chain, private) {
        (Ok(chain), Ok(private)) => (chain, private),
        (chain, private) => return Err([chain.err(), private.err()].into_iter().flatten().collect()),
    };
    let signer = provider.key_provider.load_private_key(private).map_err(|error| vec![unusable(key, &error)])?;
    let matches = chain.first().and_then(|leaf| {
        let leaf = Certificate::parse(leaf).ok()?;
        let own = signer.public_key()?;
        Some(own.as_ref() == leaf.public_key())
    });
    if matches == Some(false) {
        return Err(vec![key.fault(FileProblem::Mismatch { certificate: certificate.path.clone() })]);
    }
    Ok(CertifiedKey::new(chain, signer))
}

/// rustls will not work with what it was given.
pub(super) fn unusable(file: &Named, error: &rustls::Error) -> FileFault {
    file.fault(FileProblem::UnusableKey { error: error.to_string() })
}

/// Reads every certificate of a file; there is at least one.
fn certificates(file: &Named) -> Result<Vec<CertificateDer<'static>>, FileFault> {
    let (bytes, _) = read(file)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| file.fault(FileProblem::NotPem { error: error.to_string() }))?;
    if found.is_empty() {
        return Err(file.fault(FileProblem::NoCertificate));
    }
    match found.iter().position(|der| Certificate::parse(der).is_err()) {
        Some(at) => Err(file.fault(FileProblem::NotACertificate { number: at + 1 })),
        None => Ok(found),
    }
}

fn private_key(file: &Named) -> Result<PrivateKeyDer<'static>, FileFault> {
    let (bytes, metadata) = read(file)?;
    if !metadata.is_file() {
        return Err(file.fault(FileProblem::NotRegular));
    }
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(file.fault(FileProblem::Access));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| {
        let encrypted = memchr::memmem::find(&bytes, b"ENCRYPTED").is_some();
        file.fault(match error {
            pem::Error::NoItemsFound if encrypted => FileProblem::EncryptedKey,
            pem::Error::NoItemsFound => FileProblem::NoKey,
            // The parser's words may quote the file, whose lines are secret.
            _ => {
                FileProblem::NotPem { error: "a broken BEGIN or END line, or what is between is not base64".to_owned() }
            }
        })
    })
}

fn read(file: &Named) -> Result<(Vec<u8>, Metadata), FileFault> {
    let unreadable = |error: io::Error| file.fault(FileProblem::Unreadable { error: error.to_string() });
    // Opening a pipe would wait for its other end.
    let metadata = fs::metadata(&file.path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(file.fault(FileProblem::NotRegular));
    }
    let opened = File::open(&file.path).map_err(unreadable)?;
    let metadata = opened.metadata().map_err(unreadable)?;
    let mut bytes = Vec::new();
    opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(file.fault(FileProblem::TooLarge));
    }
    Ok((bytes, metadata))
}
