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

/// What arrived behind the handshake.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The front of a record still incomplete.
    pub(super) cipher: Vec<u8>,
    /// Plaintext.
    pub(super) plain: Vec<u8>,
}

/// Drives `machine` through its handshake. `input` is what was read already.
pub(super) async fn shake<M: Machine>(
    socket: &TcpStream,
    machine: &mut M,
    mut input: Vec<u8>,
) -> Result<Ahead, HandshakeError> {
    let mut out = Vec::new();
    let mut plain = Vec::new();
    loop {
        let (used, next) = step(machine, &mut input, &mut out, &mut plain);
        input.drain(..used.min(input.len()));
        match next {
            Ok(Next::Again) => {}
            Ok(Next::Write) => send(socket, &mut out).await?,
            Ok(Next::Done) => {
                send(socket, &mut out).await?;
                input.shrink_to_fit();
                return Ok(Ahead { cipher: input, plain });
            }
            Ok(Next::Read) => {
                send(socket, &mut out).await?;
                if input.len() >= INPUT_MAX {
                    return Err(HandshakeError::TooLong);
                }
                receive(socket, &mut input).await?;
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

enum Next {
    Again,
    Write,
    Read,
    Done,
}

fn step<M: Machine>(
    machine: &mut M,
    input: &mut [u8],
    out: &mut Vec<u8>,
    plain: &mut Vec<u8>,
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
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                None => break Ok(Next::Again),
                Some(Ok(record)) => plain.extend_from_slice(record.payload),
                Some(Err(error)) => break Err(error.into()),
            }
        },
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
