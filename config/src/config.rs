use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use crate::args;
use crate::draft::Draft;
use crate::entries::{Database, User, database_keys, user_keys};
use crate::env;
use crate::fault::{Faults, Problem};
use crate::file;
use crate::ident::IdentMap;
use crate::origin::Origin;
use crate::setting::{Reload, Setting};
use crate::settings::{self, Auth, Client, Fleet, Followers, Http, Listen, Log, Pool, Process, Server, Tls};
use crate::userlist::UserList;

/// Largest configuration file that is read; bytes.
const MAX_FILE: u64 = 16 << 20;

/// Every setting, whoever gave it. `Config::default()` is the shipped defaults: no databases and no users.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `[listen]`.
    pub listen: Listen,
    /// `[auth]`.
    pub auth: Auth,
    /// `[server]`.
    pub server: Server,
    /// `[tls]`.
    pub tls: Tls,
    /// `[pool]`.
    pub pool: Pool,
    /// `[fleet]`.
    pub fleet: Fleet,
    /// `[followers]`.
    pub followers: Followers,
    /// `[client]`.
    pub client: Client,
    /// `[http]`.
    pub http: Http,
    /// `[log]`.
    pub log: Log,
    /// `[process]`.
    pub process: Process,
    /// `[databases.NAME]` by NAME; [`crate::entries::FALLBACK`] answers for any other name.
    pub databases: BTreeMap<String, Database>,
    /// `[users.NAME]` by NAME.
    pub users: BTreeMap<String, User>,
    /// Where each value that is not a default came from; keys are `default_pool_size`, `databases.app`,
    /// `databases.app.port`, `users.app.password`.
    pub origins: BTreeMap<String, Origin>,
}

/// What a configuration is made of, already in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sources<'a> {
    /// Path and text of the file; the path is only named in origins.
    pub file: Option<(&'a str, &'a str)>,
    /// Environment variables; those without the prefix `PGWEIR_` are ignored.
    pub env: &'a [(String, String)],
    /// The command line after the subcommand. `--config` is accepted and means nothing here.
    pub args: &'a [String],
}

/// A layer of variables.
type EnvLayer = fn(&mut Draft, &[(String, String)]);

/// One line of [`Config::describe`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// `default_pool_size`, or `databases.app.port`.
    pub key: String,
    /// The value as text; secrets are masked.
    pub value: String,
    /// The default as text; empty if absent by default.
    pub default: &'static str,
    /// Where the value came from.
    pub origin: Origin,
    /// When a change takes effect.
    pub reload: Reload,
}

impl Config {
    /// Puts the layers on top of each other: defaults, file, environment, command line.
    ///
    /// # Errors
    ///
    /// Every fault of every layer, and every contradiction between values.
    pub fn from_sources(sources: Sources<'_>) -> Result<Self, Faults> {
        Self::build(Draft::default(), sources, |_, _| {})
    }

    /// As [`Config::from_sources`], with the file that `--config` or `PGWEIR_CONFIG` names; without either, no file.
    ///
    /// # Errors
    ///
    /// As [`Config::from_sources`]; a file that is missing, unreadable, larger than 16 MiB or not UTF-8 is a fault,
    /// and so are those of `auth_file` and `auth_ident_file`, if nothing else is wrong.
    pub fn load(args: &[String], env: &[(String, String)]) -> Result<Self, Faults> {
        Self::load_draft(Draft::default(), args, env, |_, _| {})
    }

    /// As [`Config::load`], with `base` in place of the defaults, and with the buildpack's variables of [`crate::ALIASES`]: for
    /// `pgweir exec`.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn load_exec(base: Self, args: &[String], env: &[(String, String)]) -> Result<Self, Faults> {
        Self::load_draft(Draft::over(base), args, env, env::read_buildpack)
    }

    fn load_draft(
        mut draft: Draft,
        args: &[String],
        env: &[(String, String)],
        aliases: EnvLayer,
    ) -> Result<Self, Faults> {
        let mut file = None;
        if let Some((path, origin)) = config_path(args, env) {
            match read_file(path) {
                Ok(text) => file = Some((path, text)),
                Err((line, problem)) => {
                    let in_file = line.map(|line| Origin::File { path: path.into(), line });
                    draft.blind_fault(path, Some(in_file.unwrap_or(origin)), problem);
                }
            }
        }
        let file = file.as_ref().map(|(path, text)| (*path, text.as_str()));
        let config = Self::build(draft, Sources { file, env, args }, aliases)?;
        config.read_auth_file()?;
        config.read_ident_map()?;
        Ok(config)
    }

    /// The users of `auth_file` as it is now; none without one.
    ///
    /// # Errors
    ///
    /// As [`UserList::load`].
    pub fn read_auth_file(&self) -> Result<UserList, Faults> {
        if self.auth.auth_file.is_empty() { Ok(UserList::default()) } else { UserList::load(&self.auth.auth_file) }
    }

    /// The map of `auth_ident_file` as it is now; none without one.
    ///
    /// # Errors
    ///
    /// As [`IdentMap::load`].
    pub fn read_ident_map(&self) -> Result<Option<IdentMap>, Faults> {
        let Auth { auth_ident_file: file, auth_ident_map: map, .. } = &self.auth;
        if file.is_empty() { Ok(None) } else { IdentMap::load(file, map).map(Some) }
    }

    /// Where the value of `key` came from: `default_pool_size`, `databases.app.port`.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or_default()
    }

    /// Every global setting, then every key that a database or user entry sets, each with its origin.
    pub fn describe(&self) -> impl Iterator<Item = Described> {
        let globals = settings::all().map(|setting| self.describe_one(String::new(), setting, self));
        let databases = self
            .databases
            .iter()
            .flat_map(|(name, database)| self.describe_entry(format!("databases.{name}."), database_keys(), database));
        let users =
            self.users.iter().flat_map(|(name, user)| self.describe_entry(format!("users.{name}."), user_keys(), user));
        globals.chain(databases).chain(users)
    }

    /// The global settings whose values differ in `new`, for a reload. Entries are maps that compare with `==`.
    pub fn changes(&self, new: &Self) -> impl Iterator<Item = &'static Setting<Self>> {
        settings::all().filter(move |setting| setting.show(self) != setting.show(new))
    }

    fn build(mut draft: Draft, sources: Sources<'_>, aliases: EnvLayer) -> Result<Self, Faults> {
        if let Some((path, text)) = sources.file {
            file::read(&mut draft, path, text);
        }
        aliases(&mut draft, sources.env);
        env::read(&mut draft, sources.env);
        args::read(&mut draft, sources.args);
        draft.finish()
    }

    fn describe_entry<T>(
        &self,
        prefix: String,
        keys: &'static [Setting<T>],
        entry: &T,
    ) -> impl Iterator<Item = Described> {
        let set = keys.iter().filter(move |setting| !setting.show(entry).is_empty());
        set.map(move |setting| self.describe_one(prefix.clone(), setting, entry))
    }

    fn describe_one<T>(&self, prefix: String, setting: &'static Setting<T>, target: &T) -> Described {
        let key = prefix + setting.name;
        Described {
            value: setting.show(target),
            default: setting.default,
            origin: self.origin(&key),
            reload: setting.reload,
            key,
        }
    }
}

/// The file to read, and who named it. The flag outranks the variable; an empty variable names none.
fn config_path<'a>(args: &'a [String], env: &'a [(String, String)]) -> Option<(&'a str, Origin)> {
    let flag = args::flags(args).into_iter().find(|flag| flag.name == "--config");
    if let Some(path) = flag.and_then(|flag| flag.value.ok()) {
        return Some((path, Origin::Flag { name: "--config".into() }));
    }
    let (_, path) = env.iter().find(|(name, path)| name == env::CONFIG && !path.is_empty())?;
    Some((path, Origin::Env { name: env::CONFIG.into() }))
}

/// The text of a file, or the line where it is not UTF-8 and what is wrong.
pub(crate) fn read_file(path: &str) -> Result<String, (Option<usize>, Problem)> {
    let unreadable = |error: std::io::Error| (None, Problem::Unreadable { error: error.to_string() });
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    let limit = MAX_FILE.saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err((None, Problem::TooLarge { limit: MAX_FILE }));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = valid.filter(|byte| **byte == b'\n').count().saturating_add(1);
        (Some(line), Problem::NotUtf8)
    })
}
