//! pgweir's settings: what they are called, what they mean, where each value came from.
//!
//! Four layers, the later wins: the defaults, a TOML file, environment variables `PGWEIR_<KEY>`, the command line
//! `--key=value`. [`Config::load`] reads them; [`Config::from_sources`] is the same without touching the disk.
//! Either gives a whole [`Config`] or every [`Fault`] at once, each with its place and its remedy.
//!
//! The map of the house:
//!
//! | module | its noun |
//! |---|---|
//! | [`settings`] | the table: every setting named once, with type, default, range, reload class and doc |
//! | [`entries`] | the same for the keys of `[databases.NAME]` and `[users.NAME]` |
//! | `setting` | one row of either table, and the macro that turns rows into structs |
//! | `typed` | how a raw value becomes a number, a time, a size, a word; and back to text |
//! | `choices` | the settings that are one word of a few |
//! | `follower` | [`FollowerList`]: the followers of a database |
//! | `login` | the settings of a server login that are more than a word |
//! | `config` | [`Config`] and the four layers |
//! | `draft` | a [`Config`] under construction, and the faults found so far |
//! | `file`, `env`, `args`, `url` | one source syntax each |
//! | `app_url` | [`AppUrl`]: a URL as an application has it, for `pgweir exec` |
//! | `preset` | the defaults that differ under `pgweir exec` |
//! | `check`, `tls` | what no single value can tell |
//! | `ident` | [`IdentMap`]: whom a user of the system or a certificate may log in as |
//! | `userlist` | [`UserList`]: the users of `auth_file` |
//! | `fault`, `origin`, `secret` | [`Fault`], [`Origin`], [`Secret`] |
//!
//! The crate knows nothing of the program that uses it.

mod app_url;
mod args;
mod check;
mod choices;
mod config;
mod draft;
pub mod entries;
mod env;
mod fault;
mod file;
mod follower;
mod ident;
mod login;
mod network;
mod origin;
mod preset;
mod secret;
mod setting;
pub mod settings;
mod socket;
mod tls;
mod typed;
mod url;
mod userlist;

pub use app_url::{AppUrl, Surroundings};
pub use choices::{
    AuthType, BindingPolicy, CancelOnDisconnect, LogFormat, LogLevel, PoolMode, ProtocolVersion, ReadFreshness,
    ReadRouting, SequenceValues, SslMode, SslNegotiation, StatementMode,
};
pub use config::{Config, Described, Sources};
pub use entries::{Database, User};
pub use env::{ALIASES, environment};
pub use fault::{Fault, Faults, Problem};
pub use follower::{FOLLOWERS_MAX, Follower, FollowerFault, FollowerList};
pub use ident::IdentMap;
pub use login::{AuthMethod, CommandLine, RequireAuth};
pub use network::Networks;
pub use origin::Origin;
pub use preset::{EXEC, Preset, exec_base};
pub use secret::Secret;
pub use setting::{Bounds, Reload, Setting};
pub use settings::{Auth, Client, Fleet, Followers, Http, Listen, Log, Pool, Process, Server, Tls};
pub use socket::{FileMode, SOCKET_PATH_MAX, is_socket_dir, socket_path};
pub use tls::{SYSTEM, ServerTls};
pub use typed::Kind;
pub use url::UrlProblem;
pub use userlist::UserList;
