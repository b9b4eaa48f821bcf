//! What the environment asks for: which URLs are pooled, how they are grouped behind listeners, what they are rewritten to.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use pgweir_config::entries::database_keys;
use pgweir_config::{
    AppUrl, Config, Database, Faults, Follower, FollowerList, Origin, ReadRouting, Secret, SslMode, Surroundings, User,
    exec_base, is_socket_dir,
};

/// The URL of an application's database, by custom.
const DATABASE_URL: &str = "DATABASE_URL";

/// Around the colour in the names of Heroku's other attachments.
const COLOUR: (&str, &str) = ("HEROKU_POSTGRESQL_", "_URL");

/// The URL that leads to followers of the application's database, if reads are routed to them.
const FOLLOWER_URL: &str = "DATABASE_FOLLOWER_URL";

/// Behind the name of the database: the one that is served by its followers alone.
const FOLLOWERS: &str = "_followers";

/// Behind the name of a variable: its URL as it was.
const DIRECT: &str = "_DIRECT";

/// Tells a wrapper inside this one which addresses are pooled already; separated by commas.
const POOLED: &str = "PGWEIR_POOLED";

/// The variable that Heroku sets on every dyno.
const DYNO: &str = "DYNO";

/// The variables of `pgweir exec` that are no settings of the pooler.
pub const VARIABLES: [&str; 5] = ["PGWEIR_ENABLED", "PGWEIR_URLS", "PGWEIR_ON_FAILURE", "PGWEIR_FORWARD_TERM", POOLED];

/// Those of them that Heroku's buildpack for `PgBouncer` has under another name.
const ALIASES: [(&str, &str); 2] = [("PGWEIR_ENABLED", "PGBOUNCER_ENABLED"), ("PGWEIR_URLS", "PGBOUNCER_URLS")];

/// The buildpack's: when off, every rewritten URL says so to the application.
const PREPARED_STATEMENTS: &str = "PGBOUNCER_PREPARED_STATEMENTS";

/// What is done when nothing can be pooled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// The command runs with its URLs as they are.
    #[default]
    Direct,
    /// The command does not run.
    Exit,
}

/// Whether the application gets SIGTERM from us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ForwardTerm {
    /// Unless the platform sends it to every process itself.
    #[default]
    Auto,
    Always,
    Never,
}

/// What the variables of `pgweir exec` say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) enabled: bool,
    /// Names of variables; `None` finds them.
    urls: Option<Vec<String>>,
    pub(super) on_failure: OnFailure,
    forward_term: ForwardTerm,
    /// Added to each rewritten URL whose query does not have the key.
    extra: Vec<&'static str>,
    on_dyno: bool,
}

impl Wishes {
    /// Reads them; and what is wrong with them, each with its remedy.
    pub(super) fn read(variables: &[(String, String)]) -> (Self, Vec<String>) {
        let mut faults = Vec::new();
        let value = |name: &str| {
            let alias = ALIASES.iter().find(|(own, _)| *own == name).map(|(_, alias)| *alias);
            let found = |name: &str| variable(variables, name).map(|value| (name.to_owned(), value));
            found(name).or_else(|| alias.and_then(found))
        };
        let mut choose = |name: &str, words: &[&str]| {
            let (name, value) = value(name)?;
            let place = words.iter().position(|word| word.eq_ignore_ascii_case(value));
            if place.is_none() {
                faults.push(format!("{name} is none of {}. Write one of these", words.join(", ")));
            }
            place
        };
        let enabled = choose("PGWEIR_ENABLED", &["1", "true", "yes", "on", "0", "false", "no", "off"]);
        let on_failure = choose("PGWEIR_ON_FAILURE", &["direct", "exit"]);
        let forward_term = choose("PGWEIR_FORWARD_TERM", &["auto", "always", "never"]);
        let prepared = choose(PREPARED_STATEMENTS, &["1", "true", "yes", "on", "0", "false", "no", "off"]);
        let names = value("PGWEIR_URLS").map(|(_, list)| list).filter(|list| *list != "auto");
        let names = names.map(|list| list.split([' ', '\t', '\n', ',']).filter(|name| !name.is_empty()));
        let wishes = Self {
            enabled: enabled.is_none_or(|place| place < 4),
            urls: names.map(|names| names.map(str::to_owned).collect()),
            on_failure: if on_failure == Some(1) { OnFailure::Exit } else { OnFailure::Direct },
            forward_term: match forward_term {
                Some(1) => ForwardTerm::Always,
                Some(2) => ForwardTerm::Never,
                _ => ForwardTerm::Auto,
            },
            extra: if prepared.is_some_and(|place| place >= 4) {
                vec!["prepared_statements=false"]
            } else {
                Vec::new()
            },
            on_dyno: variable(variables, DYNO).is_some(),
        };
        (wishes, faults)
    }

    /// Whether SIGTERM is passed on. A dyno's processes get it from the platform, all of them; process 1 alone gets it
    /// where there are process namespaces.
    pub(super) fn passes_term(&self, is_init: bool) -> bool {
        match self.forward_term {
            ForwardTerm::Always => true,
            ForwardTerm::Never => false,
            ForwardTerm::Auto => is_init || !self.on_dyno,
        }
    }

    /// The names to look at, each once, with whether it was asked for by name.
    fn names(&self, variables: &[(String, String)]) -> Vec<(String, bool)> {
        if let Some(names) = &self.urls {
            let mut once: Vec<(String, bool)> = Vec::new();
            for name in names {
                if !once.iter().any(|(other, _)| other == name) {
                    once.push((name.clone(), true));
                }
            }
            return once;
        }
        let is_colour = |name: &str| {
            let middle = name.strip_prefix(COLOUR.0).and_then(|rest| rest.strip_suffix(COLOUR.1));
            middle.is_some_and(|colour| !colour.is_empty())
        };
        let mut names: Vec<String> =
            variables.iter().map(|(name, _)| name).filter(|name| is_colour(name)).cloned().collect();
        names.sort();
        if variable(variables, DATABASE_URL).is_some() {
            names.insert(0, DATABASE_URL.to_owned());
        }
        names.into_iter().map(|name| (name, false)).collect()
    }
}

/// The value of a variable that is not empty.
fn variable<'a>(variables: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = variables.iter().find(|(other, value)| other == name && !value.is_empty());
    found.map(|(_, value)| value.as_str())
}

/// Whether there is any URL to look at.
pub(super) fn finds_any(wishes: &Wishes, variables: &[(String, String)]) -> bool {
    wishes.names(variables).iter().any(|(name, _)| variable(variables, name).is_some())
}

/// A variable that is rewritten.
#[derive(Debug)]
pub(super) struct Pooled {
    pub(super) name: String,
    pub(super) url: AppUrl,
    /// Its group.
    pub(super) group: usize,
    original: Secret,
}

/// A variable that stays as it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) name: String,
    /// What is wrong with it and how to mend it.
    pub(super) reason: String,
}

/// URLs that one listener can serve: what they call a database is one database, and who they say they are is one user.
#[derive(Debug, Default)]
pub(super) struct Group {
    databases: BTreeMap<String, (Database, String)>,
    /// The password, whether there was none and it was made up, and the variable.
    users: BTreeMap<String, (Secret, bool, String)>,
}

impl Group {
    /// Takes a URL in, if it means the same by its names as the others.
    fn take(&mut self, name: &str, url: &AppUrl, made_up: &mut impl FnMut() -> Secret) -> bool {
        let database = self.databases.get(url.dbname());
        let user = self.users.get(url.user());
        let same_database = database.is_none_or(|(other, _)| other == url.server());
        let same_user = user.is_none_or(|(password, was_made, _)| match url.password() {
            Some(own) => !was_made && own == password,
            None => *was_made,
        });
        if !same_database || !same_user {
            return false;
        }
        self.databases.entry(url.dbname().to_owned()).or_insert_with(|| (url.server().clone(), name.to_owned()));
        self.users.entry(url.user().to_owned()).or_insert_with(|| match url.password() {
            Some(password) => (password.clone(), false, name.to_owned()),
            None => (made_up(), true, name.to_owned()),
        });
        true
    }
}

/// What is done with the URLs of an environment.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) pooled: Vec<Pooled>,
    pub(super) left: Vec<Left>,
    pub(super) groups: Vec<Group>,
    /// Some lead to a pgweir around this one.
    pub(super) already: bool,
    on_dyno: bool,
}

impl Plan {
    /// Makes it. `made_up` gives passwords where there are none.
    pub(super) fn make(
        wishes: &Wishes,
        variables: &[(String, String)],
        around: &Surroundings,
        mut made_up: impl FnMut() -> Secret,
    ) -> Self {
        let mut plan = Self { on_dyno: wishes.on_dyno, ..Self::default() };
        let outer: Vec<&str> = variable(variables, POOLED).map(|list| list.split(',').collect()).unwrap_or_default();
        for (name, by_name) in wishes.names(variables) {
            let Some(text) = variable(variables, &name) else {
                plan.leave(&name, "it is not set. Take it off PGWEIR_URLS, or set it");
                continue;
            };
            match AppUrl::parse(text, around) {
                Ok(url) if outer.contains(&address(url.server()).as_str()) => plan.already = true,
                Ok(url) => plan.take(name, url, text, &mut made_up),
                // Heroku's variables of such names are Postgres', but nobody said so.
                Err(problems) if by_name || name == DATABASE_URL || is_postgres(text) => {
                    let problems: Vec<String> =
                        problems.iter().map(|problem| format!("{problem}. {}", problem.remedy())).collect();
                    plan.leave(&name, &problems.join(" "));
                }
                Err(_) => {}
            }
        }
        plan
    }

    fn leave(&mut self, name: &str, reason: &str) {
        self.left.push(Left { name: name.to_owned(), reason: reason.to_owned() });
    }

    fn take(&mut self, name: String, url: AppUrl, text: &str, made_up: &mut impl FnMut() -> Secret) {
        let found = self.groups.iter_mut().position(|group| group.take(&name, &url, made_up));
        let group = found.unwrap_or_else(|| {
            let mut group = Group::default();
            group.take(&name, &url, made_up);
            self.groups.push(group);
            self.groups.len() - 1
        });
        self.pooled.push(Pooled { name, url, group, original: Secret::new(text) });
    }

    /// What each group is told by: the variable that came first.
    pub(super) fn urls(&self) -> Vec<Arc<str>> {
        let first = |group: usize| self.pooled.iter().find(|pooled| pooled.group == group);
        (0..self.groups.len())
            .map(|group| first(group).map_or_else(Arc::default, |url| url.name.as_str().into()))
            .collect()
    }

    /// Why nothing is pooled.
    pub(super) fn nothing(&self, wishes: &Wishes) -> String {
        if self.left.is_empty() {
            let wanted =
                if wishes.urls.is_some() { "PGWEIR_URLS names no variable" } else { "DATABASE_URL is not set" };
            return format!("{wanted}. Set DATABASE_URL, or name the variables of your URLs in PGWEIR_URLS");
        }
        let reasons: Vec<String> = self.left.iter().map(|left| format!("{}: {}", left.name, left.reason)).collect();
        reasons.join(" ")
    }

    /// The configuration of a group's data plane.
    ///
    /// # Errors
    ///
    /// Every fault of the settings.
    pub(super) fn configure(
        &self,
        index: usize,
        settings: &[String],
        variables: &[(String, String)],
    ) -> Result<Config, Faults> {
        let mut base = exec_base(self.on_dyno);
        for (name, (database, variable)) in self.groups.get(index).iter().flat_map(|group| &group.databases) {
            let set = database_keys().iter().filter(|key| !key.show(database).is_empty());
            let keys = set.map(|key| format!("databases.{name}.{}", key.name)).chain([format!("databases.{name}")]);
            base.origins.extend(keys.map(|key| (key, origin(variable))));
            base.databases.insert(name.clone(), database.clone());
        }
        for (name, (password, _, variable)) in self.groups.get(index).iter().flat_map(|group| &group.users) {
            let user = User { password: Some(password.clone()), ..User::default() };
            base.users.insert(name.clone(), user);
            let keys = [format!("users.{name}"), format!("users.{name}.password")];
            base.origins.extend(keys.map(|key| (key, origin(variable))));
        }
        let ours = variables.iter().filter(|(name, _)| !VARIABLES.contains(&name.as_str())).cloned();
        let mut config = Config::load_exec(base, settings, &ours.collect::<Vec<_>>())?;
        if config.origin("server_tls_sslmode") == Origin::Exec {
            // What a dyno's servers all have, one on the dyno itself need not have.
            for database in config.databases.values_mut().filter(|database| is_local(&database.host)) {
                database.sslmode = database.sslmode.or(Some(SslMode::Prefer));
            }
        }
        self.name_followers(index, &mut config);
        if config.listen.listen_port != 0 {
            // One port for each group, from the one that was asked for.
            let offset = u16::try_from(index).unwrap_or(u16::MAX);
            config.listen.listen_port = config.listen.listen_port.saturating_add(offset);
        }
        Ok(config)
    }

    /// Where reads are routed: the servers of the other URLs of the application's database are its followers, if they prove
    /// to be, and there is a database that is served by them alone.
    fn name_followers(&self, index: usize, config: &mut Config) {
        let home = self.pooled.iter().find(|pooled| pooled.name == DATABASE_URL && pooled.group == index);
        let Some(home) = home.filter(|_| config.followers.read_routing != ReadRouting::Off) else { return };
        let (name, server) = (home.url.dbname(), home.url.server());
        // A follower is a copy, users and passwords included.
        let is_candidate = |other: &&Pooled| {
            let (url, at) = (&other.url, other.url.server());
            let is_elsewhere = (&at.host, at.port) != (&server.host, server.port);
            is_elsewhere
                && url.dbname() == name
                && url.user() == home.url.user()
                && url.password() == home.url.password()
        };
        let candidates = self.pooled.iter().filter(is_candidate).map(|other| {
            let at = other.url.server();
            Follower::new(at.host.clone(), at.port)
        });
        let candidates = FollowerList::new(candidates);
        if let Some(entry) = config.databases.get_mut(name)
            && entry.followers.is_none()
            && !candidates.all().is_empty()
        {
            entry.followers = Some(candidates);
        }
        if config.databases.get(name).is_some_and(|entry| entry.followers.is_some()) {
            config.add_followers_only(&format!("{name}{FOLLOWERS}"), name);
        }
    }

    /// What the application gets as the URL of the followers: those of a configuration that has any, else the primary's.
    fn follower_url(&self, config: &Config, address: SocketAddr, wishes: &Wishes) -> Option<Secret> {
        let home = self.pooled.iter().find(|pooled| pooled.name == DATABASE_URL)?;
        let name = format!("{}{FOLLOWERS}", home.url.dbname());
        let is_there = config.databases.get(&name).is_some_and(|entry| entry.followers_of.is_some());
        let url = if is_there { home.url.of_database(&name) } else { home.url.clone() };
        Some(url.through(address, self.made_up(home), &wishes.extra))
    }

    /// The variables that the application gets in place of, and besides, its own. `is_set` tells whether it has a variable of
    /// a name: its own `NAME_DIRECT` stays.
    pub(super) fn changes(
        &self,
        addresses: &[SocketAddr],
        configs: &[Arc<Config>],
        wishes: &Wishes,
        is_set: impl Fn(&str) -> bool,
    ) -> Vec<(String, OsString)> {
        let mut changes = Vec::new();
        for pooled in &self.pooled {
            let Some(address) = addresses.get(pooled.group) else { continue };
            let rewritten = pooled.url.through(*address, self.made_up(pooled), &wishes.extra);
            changes.push((pooled.name.clone(), OsString::from(rewritten.expose())));
            let direct = format!("{}{DIRECT}", pooled.name);
            if !is_set(&direct) {
                changes.push((direct, OsString::from(pooled.original.expose())));
            }
        }
        let home = self.pooled.iter().find(|pooled| pooled.name == DATABASE_URL).map_or(0, |home| home.group);
        if let (Some(config), Some(address)) = (configs.get(home), addresses.get(home))
            && config.followers.read_routing != ReadRouting::Off
            && !is_set(FOLLOWER_URL)
            && let Some(url) = self.follower_url(config, *address, wishes)
        {
            changes.push((FOLLOWER_URL.to_owned(), OsString::from(url.expose())));
        }
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        changes.push((POOLED.to_owned(), OsString::from(addresses.join(","))));
        changes
    }

    fn made_up(&self, pooled: &Pooled) -> Option<&Secret> {
        let (password, was_made, _) = self.groups.get(pooled.group)?.users.get(pooled.url.user())?;
        was_made.then_some(password)
    }

    /// One line for each variable, without secrets: what it would become and where it leads, or why it stays.
    pub(super) fn describe(&self, wishes: &Wishes) -> String {
        let mut text = String::new();
        for Pooled { name, url, group, .. } in &self.pooled {
            let port = if *group == 0 { "PORT".to_owned() } else { format!("PORT{}", group + 1) };
            let through = url.masked_through(&format!("127.0.0.1:{port}"), &wishes.extra);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name}={through}\n{name}{DIRECT}={}", url.masked());
        }
        for Left { name, reason } in &self.left {
            let _ = writeln!(text, "# {name} stays as it is: {reason}");
        }
        if self.already {
            text.push_str("# some lead to a pgweir already, and stay as they are\n");
        }
        if text.is_empty() {
            let _ = writeln!(text, "# {}", self.nothing(wishes));
        }
        text
    }
}

fn origin(variable: &str) -> Origin {
    Origin::Env { name: variable.into() }
}

fn address(server: &Database) -> String {
    let host = &server.host;
    if host.contains(':') { format!("[{host}]:{}", server.port) } else { format!("{host}:{}", server.port) }
}

/// Whether a host is this machine.
fn is_local(host: &str) -> bool {
    let is_loopback = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || is_socket_dir(host) || host.eq_ignore_ascii_case("localhost")
}

fn is_postgres(text: &str) -> bool {
    text.starts_with("postgres")
}

#[cfg(test)]
mod tests;
