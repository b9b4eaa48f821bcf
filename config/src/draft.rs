//! A [`Config`] under construction, and the faults found so far.

use std::collections::{BTreeMap, BTreeSet};

use crate::check;
use crate::config::Config;
use crate::entries::{CONSOLE, Database, database_keys, user_keys};
use crate::fault::{Fault, Faults, Problem};
use crate::origin::Origin;
use crate::setting::Setting;
use crate::settings;
use crate::typed::{Kind, Raw};
use crate::url::Target;

/// Longest name that is compared with the known ones; comparing costs the product of both lengths.
const COMPARED: usize = 64;
/// Shortest name that counts as part of a longer one; shorter ones are part of too many.
const CONTAINED: usize = 4;

/// The layers call its methods from the weakest to the strongest; [`Draft::finish`] gives the result.
#[derive(Default)]
pub(crate) struct Draft {
    config: Config,
    faults: Vec<Fault>,
    /// Whether part of the input could not be read at all, so that nothing may be said about what is missing.
    blind: bool,
}

impl Draft {
    /// A draft whose weakest layer is `base` in place of the defaults.
    pub(crate) fn over(base: Config) -> Self {
        Self { config: base, ..Self::default() }
    }

    /// The finished configuration, or all faults in the order of the layers.
    pub(crate) fn finish(mut self) -> Result<Config, Faults> {
        check::fill_hosts(&mut self.config);
        if self.blind {
            self.drop_echoes();
        } else {
            let suspects: BTreeSet<String> = self.faults.iter().map(|fault| fault.key.clone()).collect();
            self.faults.extend(check::whole(&self.config, &suspects));
        }
        if self.faults.is_empty() {
            check::fill_followers_only(&mut self.config);
            return Ok(self.config);
        }
        self.faults.sort_by(|left, right| left.origin.cmp(&right.origin));
        Err(Faults(self.faults))
    }

    /// Drops what is said about a line that is not TOML anyway: the parser guessed what stood there.
    fn drop_echoes(&mut self) {
        let broken = |fault: &&Fault| matches!(fault.problem, Problem::Syntax { .. });
        let lines: BTreeSet<_> = self.faults.iter().filter(broken).map(|fault| fault.origin.clone()).collect();
        self.faults.retain(|fault| broken(&fault) || !lines.contains(&fault.origin));
    }

    /// Notes a fault.
    pub(crate) fn fault(&mut self, key: impl Into<String>, origin: &Origin, problem: Problem) {
        let (key, origin) = (key.into(), Some(origin.clone()));
        self.faults.push(Fault { key, value: None, origin, problem });
    }

    /// Notes that a source could not be read whole.
    pub(crate) fn blind_fault(&mut self, key: &str, origin: Option<Origin>, problem: Problem) {
        self.blind = true;
        self.faults.push(Fault { key: key.to_owned(), value: None, origin, problem });
    }

    /// Sets a global setting.
    pub(crate) fn set(&mut self, setting: &Setting<Config>, raw: &Raw<'_>, origin: &Origin) {
        if self.claim(setting.name, origin) {
            let read = (setting.read)(&mut self.config, raw);
            self.judge(setting.name, setting.kind, raw, origin, read);
        }
    }

    /// Sets one key of `[databases.NAME]`.
    pub(crate) fn set_database_key(&mut self, name: &str, key: &str, raw: &Raw<'_>, origin: &Origin) {
        let Some(setting) = database_keys().iter().find(|setting| setting.name == key) else {
            let names = database_keys().iter().map(|setting| setting.name);
            return self.unknown_entry_key(&format!("databases.{name}.{key}"), "key of a database", key, names, origin);
        };
        let path = format!("databases.{name}.{key}");
        let read = match self.config.databases.get_mut(name) {
            Some(database) => (setting.read)(database, raw),
            None => return,
        };
        self.config.origins.insert(path.clone(), origin.clone());
        self.judge(&path, setting.kind, raw, origin, read);
    }

    /// Sets one key of `[users.NAME]`.
    pub(crate) fn set_user_key(&mut self, name: &str, key: &str, raw: &Raw<'_>, origin: &Origin) {
        let Some(setting) = user_keys().iter().find(|setting| setting.name == key) else {
            let names = user_keys().iter().map(|setting| setting.name);
            return self.unknown_entry_key(&format!("users.{name}.{key}"), "key of a user", key, names, origin);
        };
        let path = format!("users.{name}.{key}");
        let read = match self.config.users.get_mut(name) {
            Some(user) => (setting.read)(user, raw),
            None => return,
        };
        self.config.origins.insert(path.clone(), origin.clone());
        self.judge(&path, setting.kind, raw, origin, read);
    }

    /// Opens a database entry. `false` if the name cannot be one or the layer gave it before; that fault is noted.
    pub(crate) fn open_database(&mut self, name: &str, origin: &Origin) -> bool {
        let path = format!("databases.{name}");
        if name == CONSOLE {
            self.fault(path, origin, Problem::Reserved);
            return false;
        }
        if !self.open(path, name, origin) {
            return false;
        }
        self.config.databases.entry(name.to_owned()).or_default();
        true
    }

    /// Opens a user entry, likewise.
    pub(crate) fn open_user(&mut self, name: &str, origin: &Origin) -> bool {
        if !self.open(format!("users.{name}"), name, origin) {
            return false;
        }
        self.config.users.entry(name.to_owned()).or_default();
        true
    }

    /// Sets a database entry by URL. The URL says where the database is, whole: host, port, dbname, user and password
    /// of a weaker layer are forgotten even where the URL is silent (and with the password whatever stands for it), so
    /// that credentials never reach another host.
    /// The other keys stay.
    pub(crate) fn set_database_url(&mut self, name: &str, url: &str, origin: &Origin) {
        if !self.open_database(name, origin) {
            return;
        }
        let target = Target::parse(url);
        for problem in &target.problems {
            self.fault(format!("databases.{name}"), origin, Problem::Url(*problem));
        }
        let Some(database) = self.config.databases.get_mut(name) else {
            return;
        };
        let fresh = Database::default();
        database.host = target.host.unwrap_or(fresh.host);
        database.port = target.port.unwrap_or(fresh.port);
        database.dbname = target.dbname;
        database.user = target.user;
        database.password = target.password;
        (database.password_file, database.password_command) = (None, None);
        database.allow_cleartext_password = None;
        for key in ["host", "port", "dbname", "user", "password"] {
            self.config.origins.insert(format!("databases.{name}.{key}"), origin.clone());
        }
        for key in ["password_file", "password_command", "allow_cleartext_password"] {
            self.config.origins.remove(&format!("databases.{name}.{key}"));
        }
        let mut seen = BTreeSet::new();
        for (key, value) in target.options {
            if seen.insert(key) {
                self.set_database_key(name, key, &Raw::Word(&value), origin);
            } else {
                self.fault(format!("databases.{name}.{key}"), origin, Problem::Repeated);
            }
        }
    }

    /// Sets a user's password. The other keys stay.
    pub(crate) fn set_user_password(&mut self, name: &str, password: &str, origin: &Origin) {
        if self.open_user(name, origin) {
            self.set_user_key(name, "password", &Raw::Word(password), origin);
        }
    }

    /// Notes that `typed` names nothing. `key` is its part that should be a setting's name or one of `specials`, and
    /// `spell` turns a name into the source's spelling.
    pub(crate) fn unknown(
        &mut self,
        typed: &str,
        key: &str,
        origin: &Origin,
        specials: &[&str],
        spell: fn(&str) -> String,
    ) {
        let names = settings::all().map(|setting| setting.name);
        let nearest = spell(nearest(key, names.chain(specials.iter().copied())));
        self.fault(typed, origin, Problem::Unknown { what: "setting", nearest });
    }

    fn unknown_entry_key(
        &mut self,
        path: &str,
        what: &'static str,
        key: &str,
        names: impl Iterator<Item = &'static str>,
        origin: &Origin,
    ) {
        let nearest = nearest(key, names).to_owned();
        self.fault(path, origin, Problem::Unknown { what, nearest });
    }

    fn open(&mut self, path: String, name: &str, origin: &Origin) -> bool {
        if name.is_empty() || name.contains('\0') {
            let problem = if name.is_empty() { Problem::NoName } else { Problem::Nul };
            self.fault(path, origin, problem);
            return false;
        }
        self.claim(&path, origin)
    }

    /// Notes where `key` comes from; `false` if the same layer already gave it.
    fn claim(&mut self, key: &str, origin: &Origin) -> bool {
        let origins: &mut BTreeMap<String, Origin> = &mut self.config.origins;
        if origins.get(key).is_some_and(|first| first.same_layer(origin)) {
            self.fault(key, origin, Problem::Repeated);
            return false;
        }
        origins.insert(key.to_owned(), origin.clone());
        true
    }

    fn judge(&mut self, key: &str, kind: Kind, raw: &Raw<'_>, origin: &Origin, read: Result<(), Problem>) {
        let Err(problem) = read else { return };
        // A list of followers may hold a URL with a password.
        let is_secret = kind == Kind::Secret || matches!(problem, Problem::Follower { .. });
        let value = if is_secret { None } else { raw.shown() };
        let (key, origin) = (key.to_owned(), Some(origin.clone()));
        self.faults.push(Fault { key, value, origin, problem });
    }
}

/// The name most alike `typed`: one that contains it whole if there is any (`pool_size` in `min_pool_size`), and of
/// those, or of all, the one with the fewest letters to change, drop, add or swap.
pub(crate) fn nearest<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    let typed: String = typed.chars().take(COMPARED).collect();
    let contains = |name: &str| typed.len() >= CONTAINED && name.contains(&typed);
    names.min_by_key(|name| (!contains(name), strsim::damerau_levenshtein(name, &typed))).unwrap_or_default()
}
