//! How a cluster is to be.

use std::net::SocketAddr;

/// The superuser's name.
pub const SUPERUSER: &str = "postgres";
/// The superuser's password.
pub const SUPERUSER_PASSWORD: &str = "postgres-secret";
/// The ordinary role that every cluster has.
pub const APP_USER: &str = "app";
/// Its password.
pub const APP_PASSWORD: &str = "app-secret";
/// The database that it owns.
pub const APP_DATABASE: &str = "app";

/// How Postgres asks clients on TCP who they are (`pg_hba.conf`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// Not at all.
    Trust,
    /// SCRAM-SHA-256.
    #[default]
    Scram,
    /// MD5; passwords are stored so, too.
    Md5,
    /// A password in clear.
    Cleartext,
}

impl Auth {
    /// The word in `pg_hba.conf`.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::Trust => "trust",
            Self::Scram => "scram-sha-256",
            Self::Md5 => "md5",
            Self::Cleartext => "password",
        }
    }
}

/// A role with LOGIN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// Its password.
    pub password: String,
    /// More of `CREATE ROLE`, as SQL: `SUPERUSER`, `CONNECTION LIMIT 3`. Default: nothing.
    pub attributes: String,
}

impl Role {
    /// A role without further attributes.
    pub fn new(name: impl Into<String>, password: impl Into<String>) -> Self {
        Self { name: name.into(), password: password.into(), attributes: String::new() }
    }

    /// With these attributes.
    #[must_use]
    pub fn with(mut self, attributes: impl Into<String>) -> Self {
        self.attributes = attributes.into();
        self
    }
}

/// How a [`Cluster`](super::Cluster) is to be. The default asks for SCRAM and changes nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterOptions {
    /// How clients on TCP log in. A follower has its own.
    pub auth: Auth,
    /// Lines of `postgresql.conf`, name and value; later ones win over earlier ones and over the
    /// harness's. A follower has its primary's first.
    pub settings: Vec<(String, String)>,
    /// Roles besides [`SUPERUSER`] and [`APP_USER`]. Not for a follower.
    pub roles: Vec<Role>,
    /// Databases besides [`APP_DATABASE`]: name and owner. Not for a follower.
    pub databases: Vec<(String, String)>,
    /// Only for a follower: streams from this address instead of the primary's, to put a
    /// [`FaultProxy`](crate::FaultProxy) in between.
    pub replicate_through: Option<SocketAddr>,
    /// Only for a primary: it is made by an `initdb` of its own, which takes some seconds, and so has a system identifier of
    /// its own. All others are copies of one.
    pub own_system: bool,
}

impl ClusterOptions {
    /// The default with this way of logging in.
    #[must_use]
    pub fn auth(auth: Auth) -> Self {
        Self { auth, ..Self::default() }
    }

    /// Made by an `initdb` of its own.
    #[must_use]
    pub fn own_system(mut self) -> Self {
        self.own_system = true;
        self
    }

    /// Adds a line of `postgresql.conf`.
    #[must_use]
    pub fn set(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// Adds a role.
    #[must_use]
    pub fn role(mut self, role: Role) -> Self {
        self.roles.push(role);
        self
    }

    /// Adds a database.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>, owner: impl Into<String>) -> Self {
        self.databases.push((name.into(), owner.into()));
        self
    }
}
