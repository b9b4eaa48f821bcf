//! A client's connection, with TLS or without; the same certificate and version for every contender.

use std::io::{self, Read, Write};
use std::sync::{Arc, LazyLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, ClientConnection, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{DigitallySignedStruct, Error, SignatureScheme, StreamOwned};

use crate::fault::Fault;

/// A connection over the socket `S`.
#[derive(Debug)]
pub enum Link<S: Read + Write> {
    /// Without TLS.
    Plain(S),
    /// With it.
    Tls(Box<StreamOwned<ClientConnection, S>>),
}

impl<S: Read + Write> Link<S> {
    /// The connection over another form of the same socket.
    pub fn map<T: Read + Write>(self, change: impl FnOnce(S) -> T) -> Link<T> {
        match self {
            Self::Plain(socket) => Link::Plain(change(socket)),
            Self::Tls(stream) => {
                let StreamOwned { conn, sock } = *stream;
                Link::Tls(Box::new(StreamOwned { conn, sock: change(sock) }))
            }
        }
    }

    /// The socket.
    pub const fn socket(&mut self) -> &mut S {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &mut stream.sock,
        }
    }

    /// Whether a read that brought less than was asked for has emptied the socket; with TLS, a record may be left.
    #[must_use]
    pub const fn is_emptied_by_short_read(&self) -> bool {
        matches!(self, Self::Plain(_))
    }
}

impl<S: Read + Write> Read for Link<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buf),
            Self::Tls(stream) => stream.read(buf),
        }
    }
}

impl<S: Read + Write> Write for Link<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(buf),
            Self::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// An `SSLRequest`.
///
/// Source: the Postgres manual, "Message Formats".
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Asks for TLS on `socket` and does a full handshake: TLS 1.3, and no session is resumed, as with libpq.
///
/// # Errors
///
/// [`Fault::Io`] if the peer has no TLS or the handshake fails.
pub fn encrypt<S: Read + Write>(mut socket: S) -> Result<Link<S>, Fault> {
    static CONFIG: LazyLock<Result<Arc<ClientConfig>, Error>> = LazyLock::new(config);
    let failed = Fault::io("beginning TLS");
    let mut answer = [0];
    socket.write_all(&SSL_REQUEST).and_then(|()| socket.read_exact(&mut answer)).map_err(&failed)?;
    if answer != *b"S" {
        return Err(failed(io::Error::other("the peer has no TLS")));
    }
    let config = CONFIG.clone().map_err(|error| failed(io::Error::other(error)))?;
    let name = ServerName::try_from("localhost").map_err(|error| failed(io::Error::other(error)))?;
    let mut machine = ClientConnection::new(config, name).map_err(|error| failed(io::Error::other(error)))?;
    while machine.is_handshaking() {
        machine.complete_io(&mut socket).map_err(&failed)?;
    }
    Ok(Link::Tls(Box::new(StreamOwned::new(machine, socket))))
}

fn config() -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&TLS13])?;
    let mut config =
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider))).with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Takes any certificate: the poolers are our own children on this machine.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
