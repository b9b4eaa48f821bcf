//! The PROXY protocol: on a listener that asks for it, a proxy says ahead of each connection whose it is.

use std::net::SocketAddr;

use pgweir_proto::proxy::{self, Origin, V2_REST_MAX};

use super::{Door, Refused};
use crate::net::Peer;
use crate::stats::RefusalReason;

impl Door {
    /// Learns from the proxy, if the listener asks for one, who the client is. A connection without a header, with a
    /// malformed one, or from a source that is none of `proxy_protocol_from` is closed without a word: there is no
    /// telling what the other end speaks.
    pub(super) async fn learn_origin(&mut self) -> Result<(), Refused> {
        let Peer::Proxy(address) = self.peer else { return Ok(()) };
        if !self.context.config.listen.proxy_protocol_from.contain(address.ip()) {
            return Err(no_proxy(format!("{address} is none of proxy_protocol_from")));
        }
        self.peer = self.origin(address).await?;
        Ok(())
    }

    async fn origin(&mut self, address: SocketAddr) -> Result<Peer, Refused> {
        loop {
            match proxy::parse(&self.input) {
                Ok(None) => self.read(V2_REST_MAX).await?,
                Ok(Some((len, origin))) => {
                    self.input.drain(..len);
                    return Ok(match origin {
                        Origin::Tcp(client) => Peer::Tcp(client),
                        // The proxy's own connection, or one from its machine.
                        Origin::Unix | Origin::Socket => Peer::Tcp(address),
                    });
                }
                Err(fault) => return Err(no_proxy(fault.to_string())),
            }
        }
    }
}

fn no_proxy(log: String) -> Refused {
    Refused { reason: Some(RefusalReason::ProxyProtocol), words: Vec::new(), log }
}
