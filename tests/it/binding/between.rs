//! Somebody between a client and a server, who speaks TLS with both.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use pgweir_harness::wire::build;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinSet, LocalSet};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::tls::client::config;
use crate::tls::pki::Identity;

/// What it does besides reading along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meddling {
    /// Nothing.
    Relays,
    /// Takes the offer of `SCRAM-SHA-256-PLUS` away.
    HidesTheOffer,
    /// Renews its traffic keys before everything that it passes on from the server, and asks for new ones.
    RenewsKeys,
}

/// It listens until it is dropped.
pub(crate) struct Between {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Between {
    /// In front of `server`, with a certificate of its own.
    pub(crate) fn start(server: SocketAddr, identity: &Identity, meddling: Meddling) -> Self {
        let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes()).collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let shown = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(shown));
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, mut stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, async move {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                let mut connections = JoinSet::new();
                loop {
                    tokio::select! {
                        accepted = listener.accept() => {
                            let (client, _) = accepted.unwrap();
                            connections.spawn_local(sit(client, server, acceptor.clone(), meddling));
                        }
                        _ = &mut stopped => return,
                    }
                }
            });
        });
        Self { address: told.recv().unwrap(), stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn sit(mut client: TcpStream, server: SocketAddr, acceptor: TlsAcceptor, meddling: Meddling) -> io::Result<()> {
    let mut request = [0; 8];
    client.read_exact(&mut request).await?;
    assert_eq!(request[..], build::ssl_request()[..]);
    client.write_all(b"S").await?;
    let mut client = acceptor.accept(client).await?;
    let mut server = TcpStream::connect(server).await?;
    server.write_all(&build::ssl_request()).await?;
    let mut answer = [0];
    server.read_exact(&mut answer).await?;
    assert_eq!(answer, *b"S");
    let connector = TlsConnector::from(config(&["postgresql"], &[&TLS13]));
    let mut server = connector.connect("localhost".try_into().unwrap(), server).await?;
    if meddling == Meddling::HidesTheOffer {
        let startup = packet(&mut client, 0).await?;
        server.write_all(&startup).await?;
        // A server of old declines the newest version of the protocol first.
        loop {
            let message = packet(&mut server, 1).await?;
            client.write_all(&without_plus(&message)).await?;
            if message[0] == b'R' {
                break;
            }
        }
    }
    if meddling == Meddling::RenewsKeys {
        return renew(client, server).await;
    }
    copy_bidirectional(&mut client, &mut server).await.map(drop)
}

async fn renew(
    mut client: tokio_rustls::server::TlsStream<TcpStream>,
    mut server: tokio_rustls::client::TlsStream<TcpStream>,
) -> io::Result<()> {
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => match up.get(..read?) {
                None | Some([]) => return server.shutdown().await,
                Some(bytes) => server.write_all(bytes).await?,
            },
            read = server.read(&mut down) => match down.get(..read?) {
                None | Some([]) => return client.shutdown().await,
                Some(bytes) => {
                    client.get_mut().1.refresh_traffic_keys().unwrap();
                    client.write_all(bytes).await?;
                    client.flush().await?;
                }
            },
        }
    }
}

/// A packet whose length stands behind `skip` bytes.
async fn packet(from: &mut (impl AsyncRead + Unpin), skip: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; skip + 4];
    from.read_exact(&mut bytes).await?;
    let length = u32::from_be_bytes(bytes[skip..].try_into().unwrap()) as usize;
    bytes.resize(skip + length, 0);
    from.read_exact(&mut bytes[skip + 4..]).await?;
    Ok(bytes)
}

/// `AuthenticationSASL` with one mechanism less; any other message as it is.
fn without_plus(offer: &[u8]) -> Vec<u8> {
    const PLUS: &[u8] = b"SCRAM-SHA-256-PLUS\0";
    let Some(at) = offer.windows(PLUS.len()).position(|window| window == PLUS) else { return offer.to_vec() };
    build::message(b'R', &[&offer[5..at], &offer[at + PLUS.len()..]].concat())
}
