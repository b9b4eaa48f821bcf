//! The end of a server connection: a `Terminate`, and the permit kept until the server is gone.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use pgweir_proto::encode;

use super::{CancelKey, Permit, Roster, ServerConn, Target, cancel};
use crate::clock::Clock;
use crate::net::{Left, Stream};

/// How long a server is waited for before its permit is given back all the same. A server that is reachable
/// ends in milliseconds: what still runs is cancelled.
const LIMIT: Duration = Duration::from_secs(15);

/// How often a server that still runs something is told to stop.
const CANCEL_EVERY: Duration = Duration::from_secs(1);

impl Drop for ServerConn {
    fn drop(&mut self) {
        if let Some(farewell) = self.farewell()
            && tokio::runtime::Handle::try_current().is_ok()
        {
            tokio::task::spawn_local(async move { drop(farewell.run().await) });
        }
    }
}

impl ServerConn {
    /// Ends the connection, and returns its permit when the server has let go, or is not waited for any longer. None if it had
    /// ended already.
    pub async fn hang_up(mut self: Box<Self>) -> Option<Permit> {
        let farewell = self.farewell()?;
        drop(self);
        Some(farewell.run().await)
    }

    fn farewell(&mut self) -> Option<Farewell> {
        let stream = std::mem::replace(&mut self.stream, Stream::Closed);
        let permit = self.permit.take().filter(|_| !matches!(stream, Stream::Closed))?;
        Some(Farewell {
            key: CancelKey::new(&stream, self.pid, std::mem::take(&mut self.secret)),
            stream,
            permit,
            // A message cut in the middle would make the Terminate part of its body.
            terminate: self.unsent.is_empty() && !self.cut,
            busy: !self.pipeline.is_settled(),
            target: self.target.clone(),
            clock: self.clock.clone(),
        })
    }
}

/// Sees a connection to its end whose worker is gone. What still runs on it has a second, and is cancelled then; until the
/// server has ended, the connection counts by `permit`.
pub fn bury(left: Left, target: Rc<Target>, clock: Rc<Clock>, mut permit: Permit, roster: &Rc<Roster>) {
    let (encrypted, pid, secret) = (left.server.encrypted, left.server.pid, left.server.secret.clone());
    permit.enroll(roster, pid);
    // Without it, the socket is closed: that is all that can be done.
    let Ok(stream) = left.into_stream(target.tcp.sockets()) else { return };
    // Nobody knows where its worker was in a message.
    let key = CancelKey { address: stream.peer_address(), encrypted, pid, secret };
    let farewell = Farewell { stream, permit, terminate: false, busy: false, key, target, clock };
    tokio::task::spawn_local(async move { drop(farewell.run().await) });
}

struct Farewell {
    stream: Stream,
    permit: Permit,
    terminate: bool,
    busy: bool,
    key: CancelKey,
    target: Rc<Target>,
    clock: Rc<Clock>,
}

impl Farewell {
    async fn run(mut self) -> Permit {
        let clock = self.clock.clone();
        if clock.limit(LIMIT, self.say()).await.is_err() {
            tracing::error!(
                server_pid = self.key.pid,
                limit_s = LIMIT.as_secs(),
                "a server connection would not end; from here on it does not count, and the server may have one too many"
            );
        }
        drop(self.stream);
        self.permit
    }

    async fn say(&mut self) {
        if self.terminate {
            let _ = std::future::poll_fn(|cx| self.stream.poll_write(cx, &encode::TERMINATE, &[])).await;
        }
        let clock = self.clock.clone();
        loop {
            if self.busy && self.key.pid != 0 {
                let _ = clock.limit(CANCEL_EVERY, cancel(&self.target, &self.key)).await;
            }
            // Without a Terminate the server notices only the end of the stream.
            if !self.terminate {
                let _ = self.stream.shutdown_write();
            }
            match clock.limit(CANCEL_EVERY, drain(&mut self.stream)).await {
                Ok(_) => return,
                Err(_) => self.busy = true,
            }
        }
    }
}

/// Reads and forgets until the end of the stream or an error.
async fn drain(stream: &mut Stream) -> io::Result<()> {
    let mut buf = vec![0; 16 * 1024];
    while std::future::poll_fn(|cx| stream.poll_read(cx, &mut buf)).await? > 0 {
        tokio::task::consume_budget().await;
    }
    Ok(())
}
