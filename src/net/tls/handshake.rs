//! The handshake, either role: bytes to and fro until both sides may talk.

use std::future::poll_fn;
use std::io;

use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{CertificateError, OtherError};
use tokio::net::TcpStream;

use super::super::socket::{poll_recv, poll_send};
use super::{Machine, alert, encode};

/// The most bytes of a peer that may wait to be understood in a handshake: rustls' own limit on one message, and a
/// record.
const INPUT_MAX: usize = 96 * 1024;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The connection broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ended before the handshake did.
    #[error("the connection was closed during the TLS handshake")]
    Closed,
    /// What came right behind it is not what it has to be.
    #[error("behind the TLS handshake: {0}")]
    Behind(io::Error),
    /// The two sides did not agree, or one does not trust the other.
    #[error("{}", words(.0))]
    Refused(#[from] rustls::Error),
    /// TLS without a request for it, and without the name of the protocol that is spoken in it.
    #[error("direct TLS without the ALPN protocol postgresql")]
    NoAlpn,
    /// The peer sent more than any handshake has.
    #[error("the handshake is longer than {INPUT_MAX} bytes")]
    TooLong,
}

/// What is told of a refusal: where the judgement is ours, our words.
fn words(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(own))) => own.to_string(),
        error => error.to_string(),
    }
}

/// Drives `machine` through its handshake. `input` is what was read already. Returns what arrived behind the handshake,
/// which the machine has not seen.
pub(super) async fn shake<M: Machine>(
    socket: &TcpStream,
    machine: &mut M,
    mut input: Vec<u8>,
) -> Result<Vec<u8>, HandshakeError> {
    let mut out = Vec::new();
    let mut shown = Shown::default();
    loop {
        let (used, next) = step(machine, shown.of(&mut input), &mut out);
        shown.discard(used, &mut input);
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Write) => send(socket, &mut out).await?,
            Ok(Next::Read) if shown.more(&input) => {}
            Ok(Next::Done) => {
                send(socket, &mut out).await?;
                return Ok(input);
            }
            Ok(Next::Read) => {
                send(socket, &mut out).await?;
                if input.len() >= INPUT_MAX {
                    return Err(HandshakeError::TooLong);
                }
                receive(socket, &mut input).await?;
                shown.more(&input);
            }
            Err(error) => {
                // The peer learns why; whether it hears it does not matter any more.
                alert(machine, &mut out);
                let _ = send(socket, &mut out).await;
                return Err(error);
            }
        }
    }
}

/// What the machine has been shown of the input: record by record, so that it can be left right behind the handshake. It
/// would answer some records that it finds there, a request for new keys for one, only when it writes itself.
#[derive(Default)]
pub(super) struct Shown {
    /// Where the first record begins that was not shown as a whole.
    start: usize,
    /// The end of what was shown.
    end: usize,
}

impl Shown {
    pub(super) fn of<'i>(&self, input: &'i mut [u8]) -> &'i mut [u8] {
        input.get_mut(..self.end).unwrap_or_default()
    }

    pub(super) fn discard(&mut self, used: usize, input: &mut Vec<u8>) {
        let used = used.min(self.end).min(input.len());
        input.drain(..used);
        self.start = self.start.saturating_sub(used);
        self.end -= used;
    }

    /// Shows the next record, or as much of it as there is. Whether that is more than before.
    pub(super) fn more(&mut self, input: &[u8]) -> bool {
        let header = input.get(self.start..).and_then(|record| record.first_chunk::<5>());
        let end = header.map(|&[_, _, _, high, low]| self.start + 5 + usize::from(u16::from_be_bytes([high, low])));
        let whole = end.filter(|end| *end <= input.len());
        let before = self.end;
        self.end = whole.unwrap_or(input.len());
        self.start = whole.unwrap_or(self.start);
        self.end > before
    }
}

pub(super) enum Next {
    Again,
    Write,
    Read,
    Done,
}

pub(super) fn step<M: Machine>(
    machine: &mut M,
    input: &mut [u8],
    out: &mut Vec<u8>,
) -> (usize, Result<Next, HandshakeError>) {
    let UnbufferedStatus { discard, state } = machine.process(input);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(&mut data, out).map(|()| Next::Again).map_err(Into::into)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Next::Write)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
        // It is left right behind the handshake, so that there is no data.
        Ok(_) => Err(HandshakeError::Closed),
        Err(error) => Err(error.into()),
    };
    (discard, next)
}

async fn send(socket: &TcpStream, out: &mut Vec<u8>) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = out.get(done..).filter(|rest| !rest.is_empty()) {
        match poll_fn(|cx| poll_send(socket, cx, rest, &[])).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            sent => done += sent,
        }
    }
    out.clear();
    Ok(())
}

async fn receive(socket: &TcpStream, input: &mut Vec<u8>) -> Result<(), HandshakeError> {
    let before = input.len();
    poll_fn(|cx| {
        let mut chunk = [0; 4096];
        poll_recv(socket, cx, &mut chunk).map_ok(|read| input.extend_from_slice(chunk.get(..read).unwrap_or_default()))
    })
    .await?;
    if input.len() > before { Ok(()) } else { Err(HandshakeError::Closed) }
}
