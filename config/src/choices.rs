//! The settings that are one word of a few.

use crate::fault::Problem;
use crate::setting::Bounds;
use crate::typed::{Kind, Raw, Typed, choose};

/// Defines an enum together with its words, so that a variant without a word cannot exist.
macro_rules! choice {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)+ }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
            /// Every word, in the same order.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word that stands for this value in a file, a variable, a flag and `SHOW CONFIG`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Typed for $name {
            const KIND: Kind = Kind::Choice(Self::WORDS);
            fn read(raw: &Raw<'_>, _: Option<Bounds>) -> Result<Self, Problem> {
                choose(raw, Self::WORDS, Self::ALL)
            }
            fn show(&self) -> String {
                self.as_str().to_owned()
            }
        }
    };
}

choice! {
    /// When a server connection goes back to its pool.
    PoolMode {
        /// When the client leaves.
        Session = "session",
        /// At the end of each transaction.
        #[default]
        Transaction = "transaction",
        /// After each statement; transactions of several statements are refused.
        Statement = "statement",
    }
}

choice! {
    /// How a client's prepared statements are run on server connections that it shares.
    StatementMode {
        /// Under a name that all clients share, on each server connection that runs them.
        Rewrite = "rewrite",
        /// Unnamed, parsed for each execution: servers keep none.
        Strip = "strip",
        /// Unnamed until they come often enough, then under a name.
        #[default]
        Adaptive = "adaptive",
        /// Under their own name, on a server connection that the client keeps.
        Session = "session",
    }
}

choice! {
    /// What `currval` and `lastval` tell in a later transaction than their `nextval`.
    SequenceValues {
        /// Nothing: 55000.
        Off = "off",
        /// The client's own value if it comes back soon enough, once a client of the pool has asked.
        #[default]
        Learn = "learn",
        /// That from the start.
        Always = "always",
    }
}

choice! {
    /// Which transactions go to followers.
    ReadRouting {
        /// None.
        #[default]
        Off = "off",
        /// Those whose client asks for it.
        Hinted = "hinted",
        /// Those, and all that are known to read.
        Auto = "auto",
    }
}

choice! {
    /// How fresh a read on a follower has to be.
    ReadFreshness {
        /// It sees what its own session has written.
        Session = "session",
        /// It sees what any client of its pool has written.
        #[default]
        Pool = "pool",
        /// It is no older than `read_max_staleness`.
        Bounded = "bounded",
        /// It sees every commit that anybody was told of before it came.
        Fleet = "fleet",
        /// Any state of the past will do.
        Eventual = "eventual",
    }
}

choice! {
    /// How clients prove who they are.
    AuthType {
        /// They do not: anyone who reaches the port is believed.
        Trust = "trust",
        /// They do not, and who they say they are does not matter either: the database's `user` counts.
        Any = "any",
        /// By the password in clear.
        Plain = "plain",
        /// By an MD5 hash of the password; by SCRAM if the user's secret is a SCRAM verifier.
        Md5 = "md5",
        /// SCRAM-SHA-256, RFC 5802 and RFC 7677, against the users' secrets.
        #[default]
        ScramSha256 = "scram-sha-256",
        /// On a Unix-domain socket the operating system tells who is at the other end; by TCP it is SCRAM-SHA-256.
        Peer = "peer",
        /// By the certificate that they show in TLS: its common name is the user's name.
        Cert = "cert",
    }
}

impl AuthType {
    /// Whether clients prove themselves by a password.
    #[must_use]
    pub const fn asks_for_passwords(self) -> bool {
        match self {
            Self::Plain | Self::Md5 | Self::ScramSha256 => true,
            // By TCP, peer does; but there need not be anyone who logs in by TCP.
            Self::Trust | Self::Any | Self::Peer | Self::Cert => false,
        }
    }
}

choice! {
    /// A version of the Postgres protocol.
    ProtocolVersion {
        /// 3.0, which every server speaks.
        V3_0 = "3.0",
        /// 3.2, with longer cancel keys.
        #[default]
        V3_2 = "3.2",
    }
}

choice! {
    /// Whether a server login is bound to its TLS connection, so that nobody between the two ends can pass it on.
    BindingPolicy {
        /// Never.
        Disable = "disable",
        /// If both sides can.
        #[default]
        Prefer = "prefer",
        /// A login without is refused.
        Require = "require",
    }
}

choice! {
    /// Whether TLS is used, and what is checked before it is relied on; `sslmode` in libpq.
    SslMode {
        /// Never.
        Disable = "disable",
        /// If the other side insists.
        Allow = "allow",
        /// If the other side can.
        #[default]
        Prefer = "prefer",
        /// Always.
        Require = "require",
        /// Always, with a certificate that a trusted authority signed.
        VerifyCa = "verify-ca",
        /// As before, and the certificate is the host's.
        VerifyFull = "verify-full",
    }
}

choice! {
    /// How TLS begins; `sslnegotiation` in libpq.
    SslNegotiation {
        /// With Postgres' own question whether it may.
        #[default]
        Postgres = "postgres",
        /// At once: one round trip less. Postgres 17 and later understand it.
        Direct = "direct",
    }
}

choice! {
    /// What becomes of a running query whose client is gone.
    CancelOnDisconnect {
        /// Cancelled if the client was lost (no `Terminate`); run to its end if it said goodbye.
        #[default]
        Lost = "lost",
        /// Cancelled in either case.
        Always = "always",
        /// Run to its end in either case.
        Never = "never",
    }
}

choice! {
    /// The shape of a log line.
    LogFormat {
        /// `key=value` pairs.
        #[default]
        Logfmt = "logfmt",
        /// One JSON object.
        Json = "json",
    }
}

choice! {
    /// The least important line that is still written.
    LogLevel {
        /// What needs a human.
        Error = "error",
        /// What may soon need one.
        Warn = "warn",
        /// Logins, periods, reloads.
        #[default]
        Info = "info",
        /// Decisions.
        Debug = "debug",
        /// Messages.
        Trace = "trace",
    }
}
