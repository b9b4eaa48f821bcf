//! Authentication of a client: what it is asked for, and what it proves itself by.

mod password;
mod peer;
mod scram;
mod throttle;
mod users;

use std::net::IpAddr;

use pgweir_config::AuthType;
use pgweir_proto::frontend;
use pgweir_proto::scanner::{HEADER, Scanned};

use super::{Door, LOGIN_MESSAGE_MAX, Refused, Wish};
use crate::client::Context;
use crate::stats::RefusalReason;

pub use throttle::Throttle;
pub use users::{Secrets, Users};

impl Door {
    /// Finds out whether the client is who it says. `out` goes in front of the first request, and holds what goes in
    /// front of `AuthenticationOk`.
    pub(super) async fn authenticate(&mut self, wish: &mut Wish, out: &mut Vec<u8>) -> Result<(), Refused> {
        let context = self.context.clone();
        match context.config.auth.auth_type {
            AuthType::Trust => return Ok(()),
            AuthType::Any => {
                wish.user = forced_user(&context, &wish.database).unwrap_or_else(|| std::mem::take(&mut wish.user));
                return Ok(());
            }
            AuthType::Peer => {
                if let Some(uid) = self.stream.peer_uid() {
                    return self.peer(uid, &wish.user).await;
                }
            }
            AuthType::Plain | AuthType::Md5 | AuthType::ScramSha256 => {}
        }
        let source = self.peer.ip();
        if let Some(source) = source
            && context.throttle.borrow_mut().is_over(source, &wish.user, context.clock.now())
        {
            return Err(throttled(source));
        }
        let outcome = self.identify(&wish.user, out).await;
        if let (Err(refused), Some(source)) = (&outcome, source)
            && refused.reason == Some(RefusalReason::AuthFailed)
        {
            context.throttle.borrow_mut().failed(source, &wish.user, context.clock.now());
        }
        outcome
    }

    /// Asks for what the user's secret and `auth_type` allow.
    async fn identify(&mut self, name: &str, out: &mut Vec<u8>) -> Result<(), Refused> {
        let context = self.context.clone();
        let user = context.secrets.user(name);
        match context.config.auth.auth_type {
            AuthType::Plain => self.plain(name, &user, out).await,
            AuthType::Md5 if !context.secrets.asks_by_scram(&user) => self.md5(name, &user, out).await,
            _ => self.scram(name, &user, out).await,
        }
    }

    /// Sends `out`, which asks for a password or a part of its proof, and reads the answer.
    async fn ask(&mut self, out: &mut Vec<u8>) -> Result<Vec<u8>, Refused> {
        self.write(out).await?;
        out.clear();
        self.password_message().await
    }

    /// The body of the next `p` message.
    async fn password_message(&mut self) -> Result<Vec<u8>, Refused> {
        loop {
            if let Scanned::Whole { tag, body } = self.scanner.next(&self.input)? {
                if tag != frontend::Tag::Password as u8 {
                    let message = format!("expected password response, got message type {tag}");
                    return Err(Refused::new(RefusalReason::Protocol, "08P01", &message));
                }
                let body = body.to_vec();
                self.input.drain(..HEADER + body.len());
                return Ok(body);
            }
            self.read(LOGIN_MESSAGE_MAX as usize + HEADER).await?;
        }
    }
}

/// Whom `auth_type` `any` takes everyone for.
fn forced_user(context: &Context, database: &str) -> Option<String> {
    let databases = &context.config.databases;
    databases.get(database).or_else(|| databases.get("*"))?.user.clone()
}

fn throttled(source: IpAddr) -> Refused {
    let message = format!("too many failed logins from {source}");
    let hint = "Try again later; login_failure_rate and login_failure_burst set the limit.";
    Refused::with_hint(RefusalReason::LoginFailures, "53400", &message, hint)
}

/// The one answer to a wrong password, an unknown user, and a user without a password.
fn wrong_password(user: &str) -> Refused {
    let message = format!("password authentication failed for user \"{user}\"");
    Refused::new(RefusalReason::AuthFailed, "28P01", &message)
}
