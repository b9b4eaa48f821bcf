use std::fmt;

use crate::choices::{AuthType, SslMode};
use crate::follower::FollowerFault;
use crate::origin::Origin;
use crate::setting::Bounds;
use crate::typed::Kind;
use crate::url::UrlProblem;

/// Characters of a key or a value that a fault shows; the rest is cut.
const SHOWN: usize = 60;

/// One fault of the configuration; whoever wrote it is to blame.
///
/// `Display` gives one line: what, where, how to mend it. Control characters are escaped, secrets are never shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong: a key (`databases.app.port` for an entry's), a file's path, or a flag as typed.
    pub key: String,
    /// The value as it was written; `None` if there is none or it must not be shown.
    pub value: Option<String>,
    /// Where it was written; `None` for what is missing everywhere.
    pub origin: Option<Origin>,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Line(&self.key))?;
        if let Some(value) = &self.value {
            write!(f, " = {}", Line(value))?;
        }
        write!(f, ": {}", self.problem)?;
        match &self.origin {
            Some(Origin::Default) => f.write_str(" (the default)")?,
            Some(Origin::Exec) => f.write_str(" (the default of exec)")?,
            Some(origin) => write!(f, " (from {})", Path(origin))?,
            None => {}
        }
        write!(f, ". {}", Remedy(&self.problem))
    }
}

impl std::error::Error for Fault {}

/// Every fault that was found, in the order of the sources; never empty when it is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults(pub Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// What can be wrong. `Display` says what; [`Fault`] adds where, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// No setting, group or entry key has this name.
    #[error("there is no such {what}")]
    Unknown {
        /// What it would have been: `setting`, `group`, `key of a database`.
        what: &'static str,
        /// The existing name that is spelled most alike.
        nearest: String,
    },
    /// The setting exists under another table of the file.
    #[error("it stands under the wrong table")]
    WrongGroup {
        /// The table it belongs to.
        group: &'static str,
    },
    /// The value is of another type.
    #[error("{found}, where {} is wanted", kind.noun())]
    NotA {
        /// What the setting is.
        kind: Kind,
        /// What was found, with its article.
        found: &'static str,
    },
    /// A TOML table was wanted.
    #[error("{found}, where a table is wanted")]
    NotATable {
        /// What was found, with its article.
        found: &'static str,
    },
    /// A number, a time or a size outside its range.
    #[error("outside {}", Span(*bounds))]
    Outside {
        /// The range; `None` if the type itself is exceeded.
        bounds: Option<Bounds>,
    },
    /// A word that is none of the possible ones.
    #[error("none of {}", words.join(", "))]
    NotAChoice {
        /// The possible words.
        words: &'static [&'static str],
    },
    /// A time that the kernel counts in seconds has a fraction.
    #[error("not in whole seconds, which is all the kernel counts")]
    Fraction,
    /// A NUL, which ends a text on the wire.
    #[error("the text contains a NUL")]
    Nul,
    /// Not a host, an IP address, or host:port where that is wanted.
    #[error("not {wanted}")]
    NotAnAddress {
        /// What would be right, with its article.
        wanted: &'static str,
    },
    /// `http_token` is too short, or does not fit into a header.
    #[error("not a token of {least} or more printable ASCII characters without blanks")]
    Token {
        /// Characters, at least.
        least: usize,
    },
    /// `http_listen` is open to other machines, and nobody has to prove anything.
    #[error("not a loopback address, and http_token is empty, so that everybody who reaches it could look")]
    OpenHttp,
    /// Permissions that are not three or four octal digits.
    #[error("no permissions in octal")]
    NotAMode,
    /// The path of a Unix-domain socket would not fit into its address.
    #[error("the path of the socket, with /.s.PGSQL.PORT, has {length} bytes, and the system takes at most {limit}")]
    SocketPath {
        /// Its bytes.
        length: usize,
        /// The most bytes.
        limit: usize,
    },
    /// Neither an address nor a Unix-domain socket to listen on.
    #[error("nothing to listen on, since unix_socket_dir is empty, too")]
    NoListener,
    /// Unix-domain sockets only, and no number for their names.
    #[error("no port that could name the sockets of unix_socket_dir, since listen_addr is empty")]
    NoSocketPort,
    /// The PROXY protocol without a proxy that may speak it.
    #[error("no network is named by proxy_protocol_from, so that no client could connect by TCP")]
    NoProxy,
    /// Peer authentication without Unix-domain sockets.
    #[error("there is no Unix-domain socket whose other end the system could name, since unix_socket_dir is empty")]
    NoSocket,
    /// Certificate authentication without clients that show certificates.
    #[error("clients show certificates in verify-ca and verify-full alone, and client_tls_sslmode = {mode}")]
    NoCertificates {
        /// What is set.
        mode: SslMode,
    },
    /// Certificate authentication without TCP.
    #[error("there is no TLS on Unix-domain sockets, and listen_addr is empty")]
    NoTcp,
    /// Certificate authentication without anyone who could be let in.
    #[error("no user is configured, so that no client could log in")]
    Nobody,
    /// The same setting twice in one layer.
    #[error("given twice")]
    Repeated,
    /// A flag at the end, or in front of another flag.
    #[error("the flag has no value")]
    NoValue,
    /// A word that is neither a flag nor a flag's value.
    #[error("not a flag")]
    NotAFlag,
    /// A word of a NAME=VALUE list without its `=`.
    #[error("no = between a name and its value")]
    NotAPair,
    /// An entry whose name is empty.
    #[error("the name is empty")]
    NoName,
    /// An entry with the name of the admin console.
    #[error("the name belongs to the admin console")]
    Reserved,
    /// The file is not TOML.
    #[error("not TOML: {message}")]
    Syntax {
        /// The parser's words; they quote nothing of the file.
        message: String,
    },
    /// The file cannot be read.
    #[error("the file cannot be read: {error}")]
    Unreadable {
        /// The system's words.
        error: String,
    },
    /// The file is larger than any configuration.
    #[error("the file has more than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is not UTF-8.
    #[error("the line is not UTF-8")]
    NotUtf8,
    /// The variable is not UTF-8.
    #[error("the value is not UTF-8")]
    Mangled,
    /// A Postgres URL with a fault; the URL itself is not shown, as it may hold a password.
    #[error("{0}")]
    Url(UrlProblem),
    /// `min_pool_size` exceeds the pool size that applies.
    #[error("above {size_key} = {size}, so that it can never be met")]
    MinAboveSize {
        /// The setting that gives the size.
        size_key: String,
        /// The size, in server connections.
        size: u32,
    },
    /// A stored verifier that no server would accept.
    #[error("a SCRAM-SHA-256 verifier that is not <iterations>:<salt>$<StoredKey>:<ServerKey>")]
    Verifier,
    /// An MD5 hash in place of a password.
    #[error("an MD5 hash, which SCRAM cannot check")]
    Md5,
    /// A line of `auth_file` that is none.
    #[error("the line is not a name and a secret, each in double quotes")]
    UserLine,
    /// No method of `require_auth`.
    #[error("none of none, password, md5, scram-sha-256, nor these with ! in front")]
    NotAMethod,
    /// Methods that are required beside methods that are excluded.
    #[error("some methods with ! in front and some without")]
    MixedMethods,
    /// A command with a quote that is never closed.
    #[error("a quote or a backslash at its end is left open")]
    Quote,
    /// A command without a program.
    #[error("there is no program in it")]
    NoCommand,
    /// More than one of `password`, `password_file` and `password_command`.
    #[error("{other} is given, too")]
    TwoPasswords {
        /// The key that stands for the same.
        other: String,
    },
    /// A line of `auth_ident_file` that is none.
    #[error("the line is not a map, a name and a user")]
    IdentLine,
    /// A name in `auth_ident_file` that should be a regular expression.
    #[error("the name after the / is not a regular expression")]
    IdentRegex,
    /// A user in `auth_ident_file` stands for a group that the regular expression does not have.
    #[error("the regular expression captures nothing that \\1 could stand for")]
    IdentCapture,
    /// A user in `auth_ident_file` stands for the members of a role.
    #[error("the members of a role are known to the server alone")]
    IdentGroup,
    /// `auth_ident_file` includes another file.
    #[error("other files cannot be included here")]
    IdentInclude,
    /// One of `auth_ident_file` and `auth_ident_map` without the other.
    #[error("{other} is empty")]
    Half {
        /// The other one.
        other: &'static str,
    },
    /// A TLS version that does not exist or is not spoken.
    #[error("not TLS versions that are spoken")]
    TlsVersions,
    /// TLS for clients without what it needs.
    #[error("it needs {key}, which is empty")]
    TlsNeeds {
        /// The setting that is empty.
        key: &'static str,
    },
    /// A certificate without its private key, or the other way round.
    #[error("{key}, which belongs to it, is empty")]
    TlsHalf {
        /// The setting that is empty.
        key: String,
    },
    /// A verifying mode without anyone to trust.
    #[error("it needs a file of authorities, and {key} is empty")]
    TlsNoAuthority {
        /// The setting that is empty.
        key: String,
    },
    /// The authorities of the operating system with a mode that does not check for whom they vouch.
    #[error("weak sslmode, because any certificate of the system's authorities would pass for this server's")]
    TlsWeakForSystem,
    /// Direct TLS with a mode that allows to do without TLS.
    #[error("weak sslmode, which may not be used with sslnegotiation = direct")]
    TlsWeakForDirect,
    /// Passwords are asked for, and there is no user who could log in.
    #[error("no user has a password, so that no client could log in")]
    NoUser,
    /// Passwords are asked for, and a user has none.
    #[error("the user has no password, so that auth_type {auth_type} refuses every login")]
    NoPassword {
        /// The way that clients are asked.
        auth_type: AuthType,
    },
    /// `auth_type` `any` with a database that does not say whom to log in as.
    #[error("absent, and auth_type any takes no one's word for who he is")]
    NoForcedUser,
    /// The name of a database that is not configured.
    #[error("no such database is configured")]
    NotADatabase,
    /// A follower that is none.
    #[error("the follower {item}: {fault}")]
    Follower {
        /// Its number in the list, from 1: the text may hold a password.
        item: usize,
        /// What is wrong.
        fault: FollowerFault,
    },
    /// More followers than a database may have.
    #[error("more than {limit} followers")]
    TooManyFollowers {
        /// The limit.
        limit: usize,
    },
    /// `followers_of` names an entry that has none.
    #[error("the entry of that name has no followers")]
    NoFollowers,
    /// A followers-only entry with a key that is the other entry's.
    #[error("the entry has followers_of, so that this is the other entry's")]
    NotOfFollowers,
    /// No database at all.
    #[error("there is no database")]
    NoDatabase,
}

/// How to mend a problem: one sentence, without its full stop where a key follows.
struct Remedy<'a>(&'a Problem);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Problem::Unknown { nearest, .. } => write!(f, "The nearest name is {nearest}."),
            Problem::WrongGroup { group } => write!(f, "Move it under [{group}]."),
            Problem::NotA { kind, .. } => write!(f, "{}.", kind.spelling()),
            Problem::Outside { bounds } => write!(f, "Write a value of {}.", Span(*bounds)),
            Problem::NotAChoice { .. } => f.write_str("Write one of these."),
            Problem::Syntax { .. } => f.write_str("Mend that line; https://toml.io explains the format."),
            Problem::Unreadable { .. } => f.write_str("Check the path and its permissions, or leave the file away."),
            Problem::Url(problem) => f.write_str(problem.remedy()),
            Problem::TlsNeeds { key } => {
                write!(f, "Name the PEM file in {key}, or set client_tls_sslmode = \"disable\".")
            }
            Problem::TlsHalf { key } => write!(f, "Name the PEM file in {key}, or leave both empty."),
            Problem::TlsNoAuthority { key } => write!(f, "Name the PEM file of the authorities in {key}."),
            Problem::MinAboveSize { size_key, .. } => {
                write!(f, "Lower it, or raise {size_key}.")
            }
            problem => f.write_str(plain_remedy(problem)),
        }
    }
}

fn plain_remedy(problem: &Problem) -> &'static str {
    match problem {
        Problem::NotATable { .. } => "Write a [table] header and the keys below it.",
        Problem::Fraction => r#"Round it, such as "30s"."#,
        Problem::Nul => "Remove the NUL.",
        Problem::NotAnAddress { .. } => "Mend the address.",
        Problem::Token { .. } => "Take a random one, such as the output of openssl rand -hex 24.",
        Problem::OpenHttp => "Set http_token, or listen on 127.0.0.1.",
        Problem::NotAMode => r#"Write three or four octal digits such as "0770"."#,
        Problem::SocketPath { .. } => "Use a directory with a shorter name.",
        Problem::NoListener => "Set listen_addr, unix_socket_dir or both.",
        Problem::NoSocketPort => "Set listen_port.",
        Problem::NoProxy => r#"Set proxy_protocol_from to the proxy's address or network, such as "10.0.0.0/8"."#,
        Problem::NoSocket => "Set unix_socket_dir, or choose another auth_type.",
        Problem::NoCertificates { .. } => r#"Set client_tls_sslmode = "verify-full", or choose another auth_type."#,
        Problem::NoTcp => "Set listen_addr, or choose another auth_type.",
        Problem::Nobody => "Add [users.NAME], or name an auth_file, or set auth_user.",
        Problem::Repeated => "Keep one of the two.",
        Problem::NoValue => "Write --key=value or --key value.",
        Problem::NotAFlag => "Write --key=value or --key value, or remove the word.",
        Problem::NotAPair => "Write NAME=VALUE.",
        Problem::NoName => "Give the entry a name.",
        Problem::Reserved => "Choose another name and give the server's in dbname.",
        Problem::TooLarge { .. } => "Name a configuration file.",
        Problem::NotUtf8 => "Save the file as UTF-8.",
        Problem::Mangled => "Set it in UTF-8; in a URL, percent-encode what is not ASCII.",
        Problem::Verifier => "Copy it whole from pg_authid.rolpassword, or write the plain password.",
        Problem::Md5 => "Write the plain password or a SCRAM-SHA-256 verifier.",
        Problem::NotAMethod => "Write methods separated by commas, such as \"scram-sha-256\" or \"!password,!md5\".",
        Problem::MixedMethods => "Name either those that are allowed, or, with !, those that are not.",
        Problem::Quote => "Close it, or put a backslash in front of it.",
        Problem::NoCommand => "Write a program and its arguments.",
        Problem::TwoPasswords { .. } => "Keep one of password, password_file and password_command.",
        Problem::TlsVersions => r#"Write "secure", "tlsv1.2", "tlsv1.3" or "tlsv1.2,tlsv1.3"."#,
        Problem::TlsWeakForSystem => r#"Use "verify-full"."#,
        Problem::TlsWeakForDirect => r#"Use "require", "verify-ca" or "verify-full"."#,
        Problem::NoUser => {
            r#"Add [users.NAME] with password = "...", or name an auth_file, or set auth_type = "trust" if everyone who reaches the port may log in."#
        }
        Problem::NoPassword { .. } => r#"Add password = "..."."#,
        Problem::IdentLine => "Separate the three by blanks; double quotes keep blanks, commas and #.",
        Problem::IdentRegex => "Mend it; https://docs.rs/regex explains the syntax.",
        Problem::IdentCapture => "Put what it stands for into parentheses.",
        Problem::IdentGroup => "Name the users, or write a /regular expression or all.",
        Problem::IdentInclude => "Put the lines into this file.",
        Problem::Half { .. } => "Set both, or neither.",
        Problem::UserLine => r#"Write "name" "secret"; a double quote inside is written twice."#,
        Problem::NoForcedUser => "Name the user of its server connections.",
        Problem::NotADatabase => "Name one of [databases.NAME].",
        Problem::Follower { fault, .. } => fault.remedy(),
        Problem::TooManyFollowers { .. } => "Name fewer.",
        Problem::NoFollowers => "Give it followers, or name another one.",
        Problem::NotOfFollowers => "Set it there, or remove followers_of.",
        Problem::NoDatabase => {
            r#"Add [databases.app] with host = "..." to the file, or pass --database app=postgres://user:password@host/dbname."#
        }
        _ => "Mend the value.",
    }
}

/// A text on one line: control characters escaped, and cut where nobody reads on.
struct Line<'a>(&'a str);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_escaped(self.0.chars().take(SHOWN), f)?;
        if self.0.chars().nth(SHOWN).is_some() {
            f.write_str("...")?;
        }
        Ok(())
    }
}

/// An origin on one line, uncut: a path is only useful whole.
struct Path<'a>(&'a Origin);

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_escaped(self.0.to_string().chars(), f)
    }
}

fn write_escaped(chars: impl Iterator<Item = char>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for char in chars {
        // Beside control characters: the separators and direction marks that also break or reorder a line.
        if char.is_control() || matches!(char, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            write!(f, "{}", char.escape_default())?;
        } else {
            write!(f, "{char}")?;
        }
    }
    Ok(())
}

struct Span(Option<Bounds>);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(Bounds { low, high }) => write!(f, "{low}..={high}"),
            None => f.write_str("what a computer can count"),
        }
    }
}
