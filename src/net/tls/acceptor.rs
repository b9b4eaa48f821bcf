//! TLS towards clients, where we are the server.

use std::rc::Rc;
use std::sync::Arc;

use pgweir_config::SslMode;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::UnixTime;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{DistinguishedName, ProtocolVersion, ServerConfig, SupportedProtocolVersion};

use super::certificate::{Certificate, name_in};
use super::chain::Roots;
use super::handshake::shake;
use super::records::Records;
use super::verifier::OfClients;
use super::{ALPN, Gear, HandshakeError, Role, Tls, TlsInfo, cipher_name, is_resumed, version_name};
use crate::net::Stream;
use crate::stats::Side;

/// What clients are offered.
#[derive(Debug)]
pub struct Acceptor {
    mode: SslMode,
    config: Arc<ServerConfig>,
    end_point: Option<Arc<[u8]>>,
    /// Judges clients' certificates, in the modes that ask for one.
    clients: Option<Arc<OfClients>>,
}

impl Acceptor {
    /// An acceptor with its own tickets: sessions of an earlier one cannot be resumed, so that none outlives the
    /// authorities that it was let in by.
    pub(super) fn new(
        mode: SslMode,
        identity: CertifiedKey,
        authorities: Option<Arc<Roots>>,
        versions: &[&'static SupportedProtocolVersion],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, rustls::Error> {
        let end_point = identity.cert.first().and_then(|leaf| Certificate::parse(leaf).ok()?.end_point());
        let clients = authorities.map(|roots| {
            let subject = |root| Certificate::parse(root).ok().map(|root| root.subject().to_vec());
            let subjects = roots.0.iter().filter_map(|root| subject(root)).map(DistinguishedName::from).collect();
            Arc::new(OfClients { roots, subjects, algorithms: provider.signature_verification_algorithms })
        });
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
        let builder = match &clients {
            Some(clients) => builder.with_client_cert_verifier(clients.clone()),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // What a session is resumed by is with the client, encrypted: nothing of it is kept here.
        config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 1;
        // For our own records: nobody else gets at them.
        config.enable_secret_extraction = true;
        Ok(Self { mode, config: Arc::new(config), end_point, clients })
    }

    /// Whether a client may not do without TLS.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.mode >= SslMode::Require
    }

    /// Whether a client has to show a certificate.
    #[must_use]
    pub fn wants_certificate(&self) -> bool {
        self.mode >= SslMode::VerifyCa
    }

    /// Does the handshake on `stream`, a TCP connection; `input` is what was read of it already. `direct`: the client
    /// began with TLS itself, and must name the protocol.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`]; the client has been told in TLS' own words, and `stream` is of no use but to be closed.
    pub async fn accept(
        &self,
        stream: &mut Stream,
        input: Vec<u8>,
        direct: bool,
        gear: &Gear,
    ) -> Result<(), HandshakeError> {
        let outcome = self.shake_hands(stream, input, direct, gear).await;
        gear.stats.borrow_mut().add(Side::Client, &outcome);
        outcome.map(drop)
    }

    /// Whether a session was resumed.
    async fn shake_hands(
        &self,
        stream: &mut Stream,
        input: Vec<u8>,
        direct: bool,
        gear: &Gear,
    ) -> Result<bool, HandshakeError> {
        let Stream::Tcp(socket) = stream else { return Err(HandshakeError::Closed) };
        let mut machine = Box::new(UnbufferedServerConnection::new(self.config.clone())?);
        let ahead = shake(socket.socket(), &mut *machine, input).await?;
        if direct && machine.alpn_protocol() != Some(ALPN) {
            return Err(HandshakeError::NoAlpn);
        }
        let resumed = is_resumed(machine.handshake_kind());
        let certificates = machine.peer_certificates().filter(|_| self.clients.is_some()).unwrap_or_default();
        if let (true, Some(clients), Some((leaf, sent))) = (resumed, &self.clients, certificates.split_first()) {
            // It was good when the session began.
            clients.verify_client_cert(leaf, sent, UnixTime::now())?;
        }
        let info = TlsInfo {
            end_point: self.end_point.clone(),
            peer_name: certificates.first().map(|leaf| name_in(leaf)),
            version: version_name(machine.protocol_version()),
            cipher: cipher_name(machine.negotiated_cipher_suite()),
        };
        let role = match machine.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => Role::Records(Box::new(Records::take_over(*machine)?)),
            _ => Role::Server(machine),
        };
        let Stream::Tcp(socket) = std::mem::replace(stream, Stream::Closed) else {
            return Err(HandshakeError::Closed);
        };
        let tls = Tls::begin(socket, role, info, Rc::clone(&gear.pad), &ahead)?;
        *stream = Stream::Tls(Box::new(tls));
        Ok(resumed)
    }
}
