//! Encryption of a client's connection: asked for, begun without asking, refused, demanded.

use std::sync::Arc;

use pgweir_proto::startup::MAX_STARTUP;

use super::{Door, Refused};
use crate::net::Stream;
use crate::net::tls::{Acceptor, HANDSHAKE_BYTE, HandshakeError};
use crate::stats::RefusalReason;

impl Door {
    /// A connection may begin with TLS itself. True if this one did, and is encrypted now.
    ///
    /// Source: the Postgres manual, "`SSL` Session Encryption" (since 17).
    pub(super) async fn direct_tls(&mut self) -> Result<bool, Refused> {
        if self.input.is_empty() {
            self.read(MAX_STARTUP as usize).await?;
        }
        if self.input.first() != Some(&HANDSHAKE_BYTE) {
            return Ok(false);
        }
        match self.acceptor() {
            Some(acceptor) => self.encrypt(&acceptor, true).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// An `SSLRequest`. True if the connection is encrypted now.
    pub(super) async fn requested_tls(&mut self) -> Result<bool, Refused> {
        let Some(acceptor) = self.acceptor() else {
            return self.decline().await.map(|()| false);
        };
        self.check_nothing_ahead("SSL")?;
        self.write(b"S").await?;
        self.encrypt(&acceptor, false).await.map(|()| true)
    }

    /// No encryption of this kind here.
    pub(super) async fn decline(&mut self) -> Result<(), Refused> {
        self.check_nothing_ahead("encryption")?;
        Ok(self.write(b"N").await?)
    }

    /// Whether what is demanded of the connection is there, before anything is answered.
    pub(super) fn check_tls(&self) -> Result<(), Refused> {
        let keys = self.context.tls.keys();
        let is_local = matches!(self.stream, Stream::Unix(_));
        let Some(acceptor) = keys.demands().filter(|_| !is_local) else { return Ok(()) };
        match self.stream.tls() {
            None if acceptor.is_required() => {
                let hint = "Set sslmode to require or stronger in the client, or change client_tls_sslmode.";
                let message = "connection requires SSL encryption (client_tls_sslmode)";
                Err(Refused::with_hint(RefusalReason::AuthFailed, "28000", message, hint))
            }
            Some(info) if acceptor.wants_certificate() && info.peer_name.is_none() => Err(no_certificate()),
            _ => Ok(()),
        }
    }

    /// What clients on a network are offered.
    fn acceptor(&self) -> Option<Arc<Acceptor>> {
        match self.stream {
            Stream::Unix(_) => None,
            _ => self.context.tls.keys().acceptor(),
        }
    }

    /// Bytes that were sent behind a request, before its answer, are an attack or a defect: they would pass for
    /// encrypted ones.
    fn check_nothing_ahead(&self, request: &str) -> Result<(), Refused> {
        if self.input.is_empty() {
            return Ok(());
        }
        let message = format!("received unencrypted data after {request} request");
        Err(Refused::new(RefusalReason::Protocol, "08P01", &message))
    }

    async fn encrypt(&mut self, acceptor: &Acceptor, direct: bool) -> Result<(), Refused> {
        let input = std::mem::take(&mut self.input);
        let tls = self.context.tls.clone();
        acceptor.accept(&mut self.stream, input, direct, &tls).await.map_err(|error| match error {
            // Whoever only looks whether the port is open.
            HandshakeError::Io(_) | HandshakeError::Closed => Refused::silent(),
            // TLS has told the client; in Postgres' protocol there is no way to.
            error => Refused {
                reason: Some(RefusalReason::Protocol),
                words: Vec::new(),
                log: format!("could not accept SSL connection: {error}"),
            },
        })?;
        self.progress.named();
        Ok(())
    }
}

/// What a client is told that has to show a certificate and did not.
pub(super) fn no_certificate() -> Refused {
    Refused::new(RefusalReason::AuthFailed, "28000", "connection requires a valid client certificate")
}
