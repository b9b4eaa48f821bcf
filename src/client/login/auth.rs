//! Authentication of a client: what it is asked for, and what it proves itself by.

mod cert;
mod lookup;
mod password;
mod peer;
mod recent;
mod scram;
mod throttle;
mod users;

use std::net::IpAddr;
use std::sync::Arc;

use pgweir_config::AuthType;
use pgweir_proto::frontend;
use pgweir_proto::scanner::{HEADER, Scanned};

use super::{Door, LOGIN_MESSAGE_MAX, Refused, Wish};
use crate::backend::Credential;
use crate::client::Context;
use crate::stats::RefusalReason;

pub use lookup::Lookups;
pub use throttle::{Guess, Throttle};
pub use users::{Secrets, Users};

use lookup::Unanswered;

impl Door {
    /// Finds out whether the client is who it says; returns what opens the server as that user, if it showed. `out` goes in front of the first request, and holds what goes in
    /// front of `AuthenticationOk`.
    pub(super) async fn authenticate(&mut self, wish: &mut Wish, out: &mut Vec<u8>) -> Result<Credential, Refused> {
        let context = self.context.clone();
        match context.config.auth.auth_type {
            AuthType::Trust => return Ok(Credential::None),
            AuthType::Any => {
                wish.user = forced_user(&context, &wish.database).unwrap_or_else(|| std::mem::take(&mut wish.user));
                return Ok(Credential::None);
            }
            AuthType::Peer => {
                if let Some(uid) = self.stream.peer_uid() {
                    return self.peer(uid, &wish.user).await.map(|()| context.secrets.credential(&wish.user));
                }
            }
            AuthType::Cert => return self.cert(wish).await,
            AuthType::Plain | AuthType::Md5 | AuthType::ScramSha256 => {}
        }
        let source = self.peer.ip();
        self.check_throttle(source, Guess::User(&wish.user))?;
        let known = context.secrets.user(&wish.user).is_some();
        let outcome = self.identify(wish, out).await;
        // Others from there may have failed meanwhile. Right or wrong, nothing has been told of the proof yet: so many
        // that guess side by side learn no more than one that guesses alone.
        self.check_throttle(source, Guess::User(&wish.user))?;
        // Whoever has a server asked and then goes away, or for a database that it does not have, may have come for that
        // alone.
        let failed = |refused: &Refused| match refused.reason {
            Some(RefusalReason::AuthFailed | RefusalReason::UnknownDatabase) => true,
            None => !known,
            Some(_) => false,
        };
        if outcome.as_ref().is_err_and(failed) {
            let now = context.clock.now();
            context.lookups.doubt(&wish.database, &wish.user, now);
            if let Some(source) = source {
                context.throttle.borrow_mut().failed(source, Guess::User(&wish.user), now);
            }
        }
        outcome
    }

    /// Whether `source` has failed too often by now.
    fn check_throttle(&self, source: Option<IpAddr>, guess: Guess<'_>) -> Result<(), Refused> {
        let now = self.context.clock.now();
        match source {
            Some(source) if self.context.throttle.borrow().is_over(source, guess, now) => Err(throttled(source)),
            _ => Ok(()),
        }
    }

    /// Asks for what the user's secret and `auth_type` allow. A user who is not there, or has no secret, is asked as
    /// most others are.
    async fn identify(&mut self, wish: &Wish, out: &mut Vec<u8>) -> Result<Credential, Refused> {
        let context = self.context.clone();
        let name = wish.user.as_str();
        let (user, strangers_are_scram) = match context.secrets.user(name) {
            Some(user) => (user, context.secrets.are_scram()),
            None => match lookup::find(&context, &wish.database, name).await {
                Some(found) => (found.map_err(unanswered)?, context.lookups.are_scram()),
                None => (Arc::default(), context.secrets.are_scram()),
            },
        };
        let scram = user.is_scram() || !user.has_secret() && strangers_are_scram;
        match context.config.auth.auth_type {
            AuthType::Plain => self.plain(name, &user, out).await,
            AuthType::Md5 if !scram => self.md5(name, &user, out).await,
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

/// The same for every user: it does not show whether there is such a one.
fn unanswered(unanswered: Unanswered) -> Refused {
    let no_server = "users cannot be looked up now: there is no server connection for auth_query";
    let (reason, code, message) = match unanswered {
        Unanswered::NoServer => (RefusalReason::Lookup, "57P03", no_server),
        // Told as any other reason: which databases there are is nothing for strangers.
        Unanswered::NoDatabase => (RefusalReason::UnknownDatabase, "57P03", no_server),
        Unanswered::BadQuery => (RefusalReason::Lookup, "F0000", "users cannot be looked up: auth_query fails"),
    };
    Refused::with_hint(reason, code, message, "The pooler's log says why.")
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
