//! Certificate authentication: the certificate that a client showed in TLS says who it is.

use super::{lookup, unanswered};
use crate::backend::Credential;
use crate::client::login::encryption::no_certificate;
use crate::client::login::{Door, Refused, Wish};
use crate::stats::RefusalReason;

impl Door {
    /// Lets in whom the certificate's common name may log in as, if that is one of the known users or one that is found
    /// by `auth_query`. Whether the user's password has expired does not matter, as in Postgres.
    ///
    /// Source: `PostgreSQL` 17 docs, §20.12 "Certificate Authentication".
    pub(super) async fn cert(&self, wish: &Wish) -> Result<Credential, Refused> {
        // On a Unix-domain socket there is no TLS, and so nothing that says who is there.
        let name = self.stream.tls().and_then(|tls| tls.peer_name.as_deref()).ok_or_else(no_certificate)?;
        let (context, user) = (&self.context, wish.user.as_str());
        // Nobody has a server asked for other users than those that the certificate is good for.
        if !name.is_empty() && context.secrets.is_same(name, user) {
            if context.secrets.knows(&context.config, user) {
                return Ok(context.secrets.credential(user));
            }
            if let Some(found) = lookup::find(context, &wish.database, user).await {
                let found = found.map_err(unanswered)?;
                if found.exists() {
                    return Ok(found.credential(Credential::None));
                }
            }
        }
        let message = format!("certificate authentication failed for user \"{user}\"");
        let mut refused = Refused::new(RefusalReason::AuthFailed, "28000", &message);
        refused.log = match name {
            "" => format!("{message}: client certificate contains no user name"),
            name => format!("{message}: the certificate's common name is {name:?}"),
        };
        Err(refused)
    }
}
