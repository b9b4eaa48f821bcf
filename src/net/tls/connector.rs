//! TLS towards servers, where we are the client.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use pgweir_config::{SslMode, SslNegotiation, is_socket_dir};
use pgweir_proto::startup;
use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, SupportedProtocolVersion};

use super::certificate::{Certificate, name_in};
use super::chain::Roots;
use super::handshake::shake;
use super::verifier::OfServers;
use super::{ALPN, Gear, HandshakeError, Role, Tls, TlsInfo, cipher_name, is_resumed, version_name};
use crate::net::{self, Stream, TcpOptions};
use crate::stats::Side;

/// Servers whose sessions are remembered by one connector: it has one.
const SESSIONS: usize = 8;

/// One way to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Try {
    /// Without TLS.
    Plain,
    /// With TLS if the server can, else without.
    Offered,
    /// With TLS.
    Tls,
}

/// How connections to one server begin.
#[derive(Debug)]
pub struct Connector {
    mode: SslMode,
    negotiation: SslNegotiation,
    config: Arc<ClientConfig>,
    /// What the server is told that we think it is.
    name: ServerName<'static>,
    verifies: bool,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The network refused or broke it.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server has no TLS.
    #[error("server does not support SSL, but SSL was required")]
    NotOffered,
    /// The answer to the request for TLS is neither yes nor no.
    #[error("received invalid response to SSL negotiation: {answer:#04x}")]
    Answer {
        /// Its first byte.
        answer: u8,
    },
    /// An `ErrorResponse` in place of an answer: anyone on the way could have sent it, so it is not read.
    #[error("server sent an error response during SSL exchange")]
    ErrorResponse,
    /// Bytes behind the answer, which anyone on the way could have sent.
    #[error("received unencrypted data after SSL response")]
    Plaintext,
    /// There is no TLS after all.
    #[error("SSL error: {0}")]
    Handshake(#[from] HandshakeError),
}

impl ConnectError {
    /// Whether trying again is of no use until a file or a setting is another.
    #[must_use]
    pub const fn is_hopeless(&self) -> bool {
        matches!(self, Self::NotOffered | Self::Handshake(HandshakeError::Refused(_) | HandshakeError::NoAlpn))
    }

    /// Whether TLS is at fault, so that it may be better without.
    #[must_use]
    pub const fn is_of_tls(&self) -> bool {
        match self {
            Self::Io(_) => false,
            Self::NotOffered | Self::Answer { .. } | Self::ErrorResponse | Self::Plaintext | Self::Handshake(_) => true,
        }
    }
}

impl Connector {
    /// A connector to `host`, with sessions of its own to resume.
    pub(super) fn new(
        wanted: &Wanted<'_>,
        identity: Option<Arc<CertifiedKey>>,
        roots: Option<Arc<Roots>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, rustls::Error> {
        let Wanted { mode, negotiation, host, versions } = *wanted;
        let verifies = roots.is_some();
        let judge = OfServers {
            roots,
            host: (mode == SslMode::VerifyFull).then(|| host.to_owned()),
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(judge));
        let mut config = match identity {
            Some(identity) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity))),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::in_memory_sessions(SESSIONS);
        // Addresses are not told in SNI; nor is what is no name by the rules of DNS.
        let nameless = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0; 4])));
        let name = ServerName::try_from(host.to_owned()).unwrap_or(nameless);
        Ok(Self { mode, negotiation, config: Arc::new(config), name, verifies })
    }

    /// The ways to try, one after the other. Nobody listens in on a Unix socket, and no server speaks TLS there.
    #[must_use]
    pub fn tries(&self, host: &str) -> &'static [Try] {
        match self.mode {
            _ if is_socket_dir(host) => &[Try::Plain],
            SslMode::Disable => &[Try::Plain],
            SslMode::Allow => &[Try::Plain, Try::Tls],
            SslMode::Prefer => &[Try::Offered, Try::Plain],
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Try::Tls],
        }
    }

    /// Connects in one way, as [`net::connect`] finds the server.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub async fn connect(
        &self,
        way: Try,
        (host, port, at): (&str, u16, Option<SocketAddr>),
        options: &TcpOptions,
        gear: &Gear,
    ) -> Result<Stream, ConnectError> {
        let mut stream = net::connect(host, port, at, options).await?;
        if way == Try::Plain {
            return Ok(stream);
        }
        let direct = self.negotiation == SslNegotiation::Direct;
        if !direct && !ask(&mut stream).await? {
            return if way == Try::Offered { Ok(stream) } else { Err(ConnectError::NotOffered) };
        }
        let outcome = self.shake_hands(&mut stream, direct, gear).await;
        gear.stats.borrow_mut().add(Side::Server, &outcome);
        outcome?;
        Ok(stream)
    }

    async fn shake_hands(&self, stream: &mut Stream, direct: bool, gear: &Gear) -> Result<bool, HandshakeError> {
        let Stream::Tcp(socket) = stream else { return Err(HandshakeError::Closed) };
        let mut machine = Box::new(UnbufferedClientConnection::new(self.config.clone(), self.name.clone())?);
        let ahead = shake(socket.socket(), &mut *machine, Vec::new()).await?;
        if direct && machine.alpn_protocol() != Some(ALPN) {
            return Err(HandshakeError::NoAlpn);
        }
        let leaf = machine.peer_certificates().and_then(|certificates| certificates.first());
        let info = TlsInfo {
            end_point: leaf.and_then(|leaf| Certificate::parse(leaf).ok()?.end_point()),
            peer_name: leaf.filter(|_| self.verifies).map(|leaf| name_in(leaf)),
            version: version_name(machine.protocol_version()),
            cipher: cipher_name(machine.negotiated_cipher_suite()),
        };
        let resumed = is_resumed(machine.handshake_kind());
        let Stream::Tcp(socket) = std::mem::replace(stream, Stream::Closed) else {
            return Err(HandshakeError::Closed);
        };
        let tls = Tls::begin(socket, Role::Client(machine), info, Rc::clone(&gear.pad), &ahead)?;
        *stream = Stream::Tls(Box::new(tls));
        Ok(resumed)
    }
}

/// What a connector is made for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) mode: SslMode,
    pub(super) negotiation: SslNegotiation,
    pub(super) host: &'a str,
    pub(super) versions: &'a [&'static SupportedProtocolVersion],
}

/// Asks the server for TLS. True if it says yes.
///
/// Source: the Postgres manual, "`SSL` Session Encryption".
async fn ask(stream: &mut Stream) -> Result<bool, ConnectError> {
    let mut request = &startup::SSL_REQUEST_PACKET[..];
    while !request.is_empty() {
        let sent = poll_fn(|cx| stream.poll_write(cx, request, &[])).await?;
        request = request.get(sent..).unwrap_or_default();
    }
    let mut answer = [0; 64];
    let read = poll_fn(|cx| stream.poll_read(cx, &mut answer)).await?;
    match answer.get(..read) {
        None | Some([]) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Some([b'S']) => Ok(true),
        Some([b'N']) => Ok(false),
        Some([b'S' | b'N', ..]) => Err(ConnectError::Plaintext),
        Some([b'E', ..]) => Err(ConnectError::ErrorResponse),
        Some([answer, ..]) => Err(ConnectError::Answer { answer: *answer }),
    }
}
