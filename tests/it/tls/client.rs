//! A client of Postgres' protocol over TLS, byte by byte, whose TLS is rustls'.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use pgweir_harness::wire::build;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, HandshakeKind, SignatureScheme, StreamOwned,
    SupportedProtocolVersion,
};

use super::pki::Identity;

/// Longest wait for one read.
const PATIENCE: Duration = Duration::from_secs(20);

/// Takes any certificate: whom to trust is psql's test.
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

/// A client's settings, and the sessions that it can resume.
pub(crate) fn config(alpn: &[&str], versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
    config_as(None, alpn, versions)
}

/// The same of a client that shows a certificate.
pub(crate) fn config_as(
    identity: Option<&Identity>,
    alpn: &[&str],
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions).unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider)));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(Identity { certificate, key }) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<_, _>>().unwrap();
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// A TCP connection whose request for TLS was granted.
pub(crate) fn granted(addr: SocketAddr) -> TcpStream {
    let mut socket = open(addr);
    socket.write_all(&build::ssl_request()).unwrap();
    let mut answer = [0];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"S");
    socket
}

pub(crate) fn open(addr: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(addr).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// A connection with TLS.
pub(crate) struct TlsClient(StreamOwned<ClientConnection, TcpStream>);

impl TlsClient {
    /// Does the handshake on `socket`.
    pub(crate) fn on(mut socket: TcpStream, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let mut machine = ClientConnection::new(config.clone(), "localhost".try_into().unwrap()).unwrap();
        while machine.is_handshaking() {
            machine.complete_io(&mut socket)?;
        }
        Ok(Self(StreamOwned::new(machine, socket)))
    }

    /// Does the handshake on `socket`, and sends all that `speech` writes in one piece with its last message.
    pub(crate) fn eager(
        socket: TcpStream,
        config: &Arc<ClientConfig>,
        speech: impl FnOnce(&mut ClientConnection),
    ) -> Self {
        Self::eager_with(socket, config, speech, |_| {})
    }

    /// The same, and something is done to that piece on its way.
    pub(crate) fn eager_with(
        mut socket: TcpStream,
        config: &Arc<ClientConfig>,
        speech: impl FnOnce(&mut ClientConnection),
        change: impl FnOnce(&mut Vec<u8>),
    ) -> Self {
        let mut machine = ClientConnection::new(config.clone(), "localhost".try_into().unwrap()).unwrap();
        while machine.is_handshaking() {
            while machine.wants_write() {
                machine.write_tls(&mut socket).unwrap();
            }
            assert!(machine.read_tls(&mut socket).unwrap() > 0, "closed in the handshake");
            machine.process_new_packets().unwrap();
        }
        speech(&mut machine);
        let mut piece = Vec::new();
        while machine.wants_write() {
            machine.write_tls(&mut piece).unwrap();
        }
        change(&mut piece);
        socket.write_all(&piece).unwrap();
        Self(StreamOwned::new(machine, socket))
    }

    /// Takes a new key, and asks the other side to do so.
    pub(crate) fn renew_keys(&mut self) {
        self.0.conn.refresh_traffic_keys().unwrap();
    }

    /// Takes a new key, and sends `update` in place of the record that says so.
    pub(crate) fn renew_keys_by(&mut self, update: &[u8]) {
        self.renew_keys();
        let mut own = Vec::new();
        while self.0.conn.wants_write() {
            self.0.conn.write_tls(&mut own).unwrap();
        }
        // A header, a message of five bytes, its type, what authenticates it.
        assert_eq!(own.len(), 5 + 5 + 1 + 16);
        self.send_raw(update);
    }

    /// Sends bytes past TLS.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) {
        self.0.sock.write_all(bytes).unwrap();
    }

    /// Whether the session was resumed.
    pub(crate) fn is_resumed(&self) -> bool {
        self.0.conn.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// The next message; none at the end.
    pub(crate) fn message(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut header = [0; 5];
        self.0.read_exact(&mut header).ok()?;
        let length = u32::from_be_bytes(header[1..].try_into().unwrap());
        let mut body = vec![0; length as usize - 4];
        self.0.read_exact(&mut body).ok()?;
        Some((header[0], body))
    }

    /// The messages up to the one with this tag.
    pub(crate) fn until(&mut self, last: u8) -> Vec<(u8, Vec<u8>)> {
        let mut messages = Vec::new();
        loop {
            let message = self.message().unwrap_or_else(|| panic!("closed after {messages:?}"));
            messages.push(message);
            if messages.last().is_some_and(|(tag, _)| *tag == last) {
                return messages;
            }
        }
    }

    /// Logs in where clients are trusted. Process id and secret.
    pub(crate) fn log_in(&mut self, name: &str) -> (i32, Vec<u8>) {
        self.send(&build::startup(&[("user", name), ("database", name)]));
        let messages = self.until(b'Z');
        let (_, key) = messages.into_iter().find(|(tag, _)| *tag == b'K').unwrap();
        (i32::from_be_bytes(key[..4].try_into().unwrap()), key[4..].to_vec())
    }

    /// The first column of the first row.
    pub(crate) fn value(&mut self, sql: &str) -> String {
        self.send(&build::query(sql));
        let messages = self.until(b'Z');
        let row = messages.iter().find(|(tag, _)| *tag == b'D').unwrap_or_else(|| panic!("{messages:?}"));
        String::from_utf8(row.1[6..].to_vec()).unwrap()
    }
}

impl TlsClient {
    /// Ends the connection as a cut cable does: without a word of TLS'.
    pub(crate) fn cut(self) {
        drop(self.0.sock);
    }
}
