//! One request over HTTP/1.1, plain or by TLS, within a time.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::settings::Target;

/// Of the answer the first line is read; bytes.
const STATUS_MAX: usize = 256;

/// The message did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum PostError {
    #[error("{doing}: {source}")]
    Io { doing: &'static str, source: io::Error },
    #[error("OTEL_EXPORTER_OTLP_CERTIFICATE: no certificates can be read there")]
    Authorities,
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("TLS: the host has no name that a certificate could bear")]
    Name(#[from] InvalidDnsNameError),
    #[error("the receiver answered {0}")]
    Status(String),
    #[error("the receiver took too long")]
    Late,
}

fn doing(doing: &'static str) -> impl Fn(io::Error) -> PostError {
    move |source| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => PostError::Late,
        _ => PostError::Io { doing, source },
    }
}

/// What sending needs.
pub(super) struct Post {
    tls: Option<Arc<ClientConfig>>,
}

impl Post {
    /// Reads the authorities, if there is TLS.
    pub(super) fn new(target: &Target) -> Result<Self, PostError> {
        if !target.tls {
            return Ok(Self { tls: None });
        }
        let mut roots = RootCertStore::empty();
        match &target.authorities {
            Some(file) => {
                let certificates = CertificateDer::pem_file_iter(file).map_err(|_| PostError::Authorities)?;
                roots.add_parsable_certificates(certificates.flatten());
            }
            None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
        }
        if roots.is_empty() {
            return Err(PostError::Authorities);
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Self { tls: Some(Arc::new(config.with_root_certificates(roots).with_no_client_auth())) })
    }

    /// Sends `body`, and hears whether it was taken.
    pub(super) fn send(&self, target: &Target, body: &[u8], limit: Duration) -> Result<(), PostError> {
        let deadline = Instant::now() + limit;
        let socket = Timed { socket: connect(target, deadline)?, deadline };
        let head = target.head(body.len());
        match &self.tls {
            None => exchange(socket, head.as_bytes(), body),
            Some(config) => {
                let name = ServerName::try_from(target.host.clone())?;
                let connection = ClientConnection::new(config.clone(), name)?;
                exchange(StreamOwned::new(connection, socket), head.as_bytes(), body)
            }
        }
    }
}

fn connect(target: &Target, deadline: Instant) -> Result<TcpStream, PostError> {
    let addresses = (target.host.as_str(), target.port).to_socket_addrs().map_err(doing("looking up the host"))?;
    let mut last = PostError::Late;
    for address in addresses {
        let left = left(deadline).map_err(doing("connecting"))?;
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = doing("connecting")(error),
        }
    }
    Err(last)
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// A socket whose every step ends in time.
struct Timed {
    socket: TcpStream,
    deadline: Instant,
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(left(self.deadline)?))?;
        self.socket.read(buf)
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(left(self.deadline)?))?;
        self.socket.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn exchange(mut stream: impl Read + Write, head: &[u8], body: &[u8]) -> Result<(), PostError> {
    let sent = stream.write_all(head).and_then(|()| stream.write_all(body)).and_then(|()| stream.flush());
    sent.map_err(doing("sending"))?;
    let mut status = Vec::new();
    let mut chunk = [0; STATUS_MAX];
    while !status.contains(&b'\n') && status.len() < STATUS_MAX {
        match stream.read(&mut chunk).map_err(doing("reading the answer"))? {
            0 => break,
            read => status.extend_from_slice(chunk.get(..read).unwrap_or_default()),
        }
    }
    let line = status.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let code = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1));
    match code {
        Some(code) if code.starts_with('2') => Ok(()),
        Some(code) => Err(PostError::Status(code.to_owned())),
        None => Err(PostError::Status("no HTTP".to_owned())),
    }
}
