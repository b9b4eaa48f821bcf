//! A private Postgres, primary or follower, that is gone when its handle is.

mod connections;
mod options;
mod template;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use connections::{ConnectionFilter, ConnectionWatch};
pub use options::{APP_DATABASE, APP_PASSWORD, APP_USER, Auth, ClusterOptions, Role, SUPERUSER, SUPERUSER_PASSWORD};

use crate::error::{Doing, HarnessError, tail};
use crate::home::{Home, hand_over};
use crate::os;
use crate::programs::ServerPrograms;
use crate::secrets;
use crate::sql::{Session, unaligned};
use crate::wire::ServerError;

/// Longest wait for a start, crash recovery included, or for an orderly stop.
const PATIENCE: Duration = Duration::from_mins(1);
/// What every cluster is started with. Crashes of the machine are no concern of tests.
const SETTINGS: [(&str, &str); 10] = [
    ("listen_addresses", "127.0.0.1"),
    ("max_connections", "200"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("wal_level", "replica"),
    ("max_wal_senders", "10"),
    ("wal_keep_size", "256MB"),
    ("hot_standby", "on"),
    ("shared_buffers", "64MB"),
    ("log_line_prefix", "%m [%p] %q%u@%d %a "),
];

/// A running Postgres of its own: data, socket, port and log are private to it. All calls block;
/// most take milliseconds, so they do no harm in an asynchronous test. Dropping it stops it at
/// once and removes its directory; killing this process does at least the former.
#[derive(Debug)]
pub struct Cluster {
    programs: ServerPrograms,
    options: ClusterOptions,
    passwords: BTreeMap<String, String>,
    port: u16,
    /// Lines of `postgresql.conf` that make it a follower.
    follow: Vec<(String, String)>,
    postmaster: Mutex<Option<Child>>,
    /// Opened at the first question and kept.
    monitor: Mutex<Option<Session>>,
    // Last: removed after everything above is gone.
    home: Home,
}

impl Cluster {
    /// Starts a primary, with the role [`APP_USER`] (not a superuser) and its database
    /// [`APP_DATABASE`]. Takes less than a second, but for the first one of a machine, which runs
    /// `initdb`, and for one that is to have a system identifier of its own.
    ///
    /// # Errors
    ///
    /// [`HarnessError::NotFound`] without Postgres' server programs; [`HarnessError::Ended`] with
    /// Postgres' log when it refuses a setting.
    pub fn start(options: ClusterOptions) -> Result<Self, HarnessError> {
        Self::start_with(&ServerPrograms::find()?, options)
    }

    /// [`Cluster::start`] with these programs.
    ///
    /// # Errors
    ///
    /// As [`Cluster::start`].
    pub fn start_with(programs: &ServerPrograms, options: ClusterOptions) -> Result<Self, HarnessError> {
        let home = Home::create()?;
        let programs = &programs.reachable(&home.path().join("programs"))?;
        if options.own_system {
            template::make(programs, &home, &home.path().join("data"))?;
        } else {
            template::place(programs, &home)?;
        }
        let fixed = [(SUPERUSER, SUPERUSER_PASSWORD), (APP_USER, APP_PASSWORD)];
        let given = options.roles.iter().map(|role| (role.name.clone(), role.password.clone()));
        let passwords =
            fixed.map(|(name, password)| (name.to_owned(), password.to_owned())).into_iter().chain(given).collect();
        let cluster = Self::launch(programs.clone(), home, options, passwords, Vec::new())?;
        cluster.furnish()?;
        Ok(cluster)
    }

    /// Starts a streaming follower of this one; waits until it accepts reads and streams.
    ///
    /// # Errors
    ///
    /// As [`Cluster::start`]; [`HarnessError::Late`] when it does not begin to stream.
    pub fn follower(&self, mut options: ClusterOptions) -> Result<Self, HarnessError> {
        let home = Home::create()?;
        let data = home.path().join("data");
        self.copy_to(&data, &home)?;
        let signal = data.join("standby.signal");
        File::create(&signal).doing("making", &signal)?;
        hand_over(&signal)?;

        let name = home.path().file_name().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        let primary = options.replicate_through.unwrap_or_else(|| self.addr());
        let follow = vec![(
            "primary_conninfo".to_owned(),
            format!(
                "host={} port={} user={SUPERUSER} password={SUPERUSER_PASSWORD} \
                 application_name={name}",
                primary.ip(),
                primary.port()
            ),
        )];
        let own = std::mem::take(&mut options.settings);
        options.settings = self.options.settings.iter().cloned().chain(own).collect();
        let passwords = self.passwords.clone();
        let follower = Self::launch(self.programs.clone(), home, options, passwords, follow)?;
        self.await_streaming(&name, &follower)?;
        Ok(follower)
    }

    /// Copies the data directory: while it runs, or, without `pg_basebackup`, while it is stopped for that.
    fn copy_to(&self, data: &Path, home: &Home) -> Result<(), HarnessError> {
        if !self.programs.has_basebackup() {
            self.stop()?;
            let mut copy = os::command("cp");
            copy.arg("-a").arg(self.data_dir()).arg(data);
            os::run(copy, Stdio::null())?;
            return self.restart();
        }
        let mut backup = os::server_command(self.programs.program("pg_basebackup"), home.path());
        backup
            .arg("-D")
            .arg(data)
            .arg("-h")
            .arg(self.home.sockets())
            .args(["-p", &self.port.to_string(), "-U", SUPERUSER])
            .args(["--checkpoint=fast", "--wal-method=stream", "--no-sync"]);
        os::run(backup, Stdio::null()).map(drop)
    }

    /// The port on 127.0.0.1; the same after a restart.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address that it listens on.
    #[must_use]
    pub fn host(&self) -> &'static str {
        "127.0.0.1"
    }

    /// Address and port.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The directory of its Unix-domain socket, where every role may log in without a password.
    #[must_use]
    pub fn socket_dir(&self) -> PathBuf {
        self.home.sockets()
    }

    /// Where to connect as `user` to `database`, with the password if the harness knows it.
    #[must_use]
    pub fn url(&self, user: &str, database: &str) -> String {
        let password = self.passwords.get(user).map_or("", String::as_str);
        url(self.addr(), user, password, database)
    }

    /// [`Cluster::url`] for the superuser and the database `postgres`.
    #[must_use]
    pub fn superuser_url(&self) -> String {
        self.url(SUPERUSER, "postgres")
    }

    /// The programs that it was started with.
    #[must_use]
    pub fn programs(&self) -> &ServerPrograms {
        &self.programs
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// Writes a file into the data directory, readable by Postgres alone: a certificate, a key, `pg_hba.conf`. It is read at
    /// the next [`Cluster::reload`].
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn place_file(&self, name: &str, text: &str) -> Result<(), HarnessError> {
        let path = self.data_dir().join(name);
        let mut file = File::create(&path).doing("making", &path)?;
        file.set_permissions(Permissions::from_mode(0o600)).doing("protecting", &path)?;
        file.write_all(text.as_bytes()).doing("writing", &path)?;
        hand_over(&path)
    }

    /// Has its configuration read again; waits until new connections get what it says now.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] when that takes too long.
    pub fn reload(&self) -> Result<(), HarnessError> {
        // A new session inherits the time from the postmaster.
        let loaded = || self.psql("postgres", "SELECT pg_conf_load_time()");
        let before = loaded()?;
        self.psql("postgres", "SELECT pg_reload_conf()")?;
        let start = Instant::now();
        while loaded()? == before {
            if start.elapsed() > PATIENCE {
                return Err(self.late("Postgres' reload", PATIENCE));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// All it has logged; empty when the log cannot be read.
    #[must_use]
    pub fn log_text(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The postmaster's process id; `None` when stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        locked(&self.postmaster).as_ref().map(Child::id)
    }

    /// Runs `sql` as the superuser on a connection of its own. Several statements are one
    /// transaction, as in every simple query. The answer is printed as `psql -At` does: columns
    /// joined by `|`, a line per row.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Sql`] with the server's error.
    pub fn psql(&self, database: &str, sql: &str) -> Result<String, HarnessError> {
        secrets::keep_sql(sql);
        let mut session = self.session(database)?;
        let outcome = session.query(sql).doing("asking Postgres", sql)?;
        if let Some(error) = outcome.error {
            return Err(sql_error(sql, error));
        }
        let answer = unaligned(&outcome);
        secrets::keep_answer(&answer);
        Ok(answer)
    }

    /// How many client connections there are now, without the harness's own. Fast enough to be
    /// asked every few milliseconds: it keeps one connection, which counts in `max_connections`.
    ///
    /// # Errors
    ///
    /// When Postgres cannot be asked.
    pub fn count_connections(&self, filter: &ConnectionFilter) -> Result<u32, HarnessError> {
        let sql = filter.sql();
        let mut monitor = locked(&self.monitor);
        if let Some(session) = monitor.as_mut()
            && let Ok(count) = connections::count(session, &sql)
        {
            return Ok(count);
        }
        // None yet, or it ended with a restart.
        let session = monitor.insert(self.session("postgres")?);
        connections::count(session, &sql)
    }

    /// Counts client connections every 2 ms until the answer is dropped, on a connection of its own.
    ///
    /// # Errors
    ///
    /// When Postgres cannot be asked.
    pub fn watch_connections(&self, filter: &ConnectionFilter) -> Result<ConnectionWatch, HarnessError> {
        self.watch_connections_every(filter, Duration::from_millis(2))
    }

    /// [`Cluster::watch_connections`] with another pause between two looks: each look costs Postgres half a
    /// millisecond and more, which a long test feels.
    ///
    /// # Errors
    ///
    /// When Postgres cannot be asked.
    pub fn watch_connections_every(
        &self,
        filter: &ConnectionFilter,
        every: Duration,
    ) -> Result<ConnectionWatch, HarnessError> {
        Ok(ConnectionWatch::start(self.session("postgres")?, filter, every))
    }

    /// Waits until `follower` has replayed all that this primary has written so far.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] when it has not `within` that time.
    pub fn await_replay(&self, follower: &Self, within: Duration) -> Result<(), HarnessError> {
        let position = self.psql("postgres", "SELECT pg_current_wal_lsn()")?;
        let question = format!("SELECT pg_last_wal_replay_lsn() >= {}", literal(&position));
        follower.await_truth("the follower's replay", &question, within)
    }

    /// Stops it in order (`SIGINT`, "fast": sessions get 57P01). No effect when stopped.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] when it does not end in a minute; then it is killed.
    pub fn stop(&self) -> Result<(), HarnessError> {
        self.end(libc::SIGINT, PATIENCE)
    }

    /// Stops it at once (`SIGQUIT`, "immediate"); the next start recovers. No effect when stopped.
    ///
    /// # Errors
    ///
    /// [`HarnessError::Late`] when it does not end in a minute; then it is killed.
    pub fn stop_immediate(&self) -> Result<(), HarnessError> {
        self.end(libc::SIGQUIT, PATIENCE)
    }

    /// Kills every process of it (`SIGKILL`): sessions end without a word. No effect when stopped.
    pub fn kill_hard(&self) {
        let mut postmaster = locked(&self.postmaster);
        let Some(child) = postmaster.as_mut() else {
            return;
        };
        let backends = os::children(child.id());
        let _ = child.kill();
        let _ = child.wait();
        // They would notice by themselves, a little later.
        for pid in &backends {
            let _ = os::signal(*pid, libc::SIGKILL);
        }
        *postmaster = None;
        *locked(&self.monitor) = None;
    }

    /// Stops it in order, if it runs, and starts it again on the same port and data.
    ///
    /// # Errors
    ///
    /// As [`Cluster::stop`] and [`Cluster::start`].
    pub fn restart(&self) -> Result<(), HarnessError> {
        self.stop()?;
        // After a kill the old processes' shared memory, and the port, may take a moment to go.
        let start = Instant::now();
        loop {
            match self.start_postmaster() {
                Err(HarnessError::Ended { .. }) if start.elapsed() < Duration::from_secs(5) => {
                    thread::sleep(Duration::from_millis(50));
                }
                done => return done,
            }
        }
    }

    /// Starts a postmaster on the data in `home`, on whichever port is free.
    fn launch(
        programs: ServerPrograms,
        home: Home,
        options: ClusterOptions,
        passwords: BTreeMap<String, String>,
        follow: Vec<(String, String)>,
    ) -> Result<Self, HarnessError> {
        let mut cluster = Self {
            programs,
            options,
            passwords,
            port: 0,
            follow,
            postmaster: Mutex::new(None),
            monitor: Mutex::new(None),
            home,
        };
        let mut tries = 5;
        loop {
            cluster.port = os::free_port()?;
            cluster.write_configuration()?;
            tries -= 1;
            match cluster.start_postmaster() {
                // Someone else took the port between our look and Postgres' bind.
                Err(HarnessError::Ended { log, .. }) if tries > 0 && log.contains("could not bind") => {}
                done => return done.map(|()| cluster),
            }
        }
    }

    fn write_configuration(&self) -> Result<(), HarnessError> {
        let data = self.data_dir();
        let sockets = self.home.sockets();
        let mut conf = String::new();
        let fixed =
            [("port", self.port.to_string()), ("unix_socket_directories", sockets.to_string_lossy().into_owned())];
        let settings = SETTINGS
            .map(|(name, value)| (name, value.to_owned()))
            .into_iter()
            .chain(fixed)
            .map(|(name, value)| (name.to_owned(), value))
            .chain(self.follow.iter().cloned())
            .chain(self.options.settings.iter().cloned());
        for (name, value) in settings {
            // Writing to a String cannot fail.
            let _ = writeln!(conf, "{name} = {}", setting(&value));
        }
        let method = self.options.auth.method();
        let hba = format!(
            "local all all trust\n\
             local replication all trust\n\
             host all all 127.0.0.1/32 {method}\n\
             host replication all 127.0.0.1/32 {method}\n"
        );
        for (name, text) in [("postgresql.conf", conf), ("pg_hba.conf", hba)] {
            let path = data.join(name);
            fs::write(&path, text).doing("writing", &path)?;
            hand_over(&path)?;
        }
        Ok(())
    }

    fn start_postmaster(&self) -> Result<(), HarnessError> {
        let path = self.log_path();
        let log = File::options().create(true).append(true).open(&path).doing("opening", &path)?;
        let errors = log.try_clone().doing("opening", &path)?;
        let mut command = os::server_command(self.programs.program("postgres"), self.home.path());
        command.arg("-D").arg(self.data_dir()).stdin(Stdio::null()).stdout(log).stderr(errors);
        // "Immediate shutdown" should we die: its children go with it.
        let child = os::spawn(command, libc::SIGQUIT).doing("starting", "postgres")?;
        *locked(&self.postmaster) = Some(child);
        let start = Instant::now();
        loop {
            if self.session("postgres").is_ok() {
                return Ok(());
            }
            self.check_alive()?;
            if start.elapsed() > PATIENCE {
                return Err(self.late("Postgres' start", PATIENCE));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// An error if the postmaster has ended.
    fn check_alive(&self) -> Result<(), HarnessError> {
        let mut postmaster = locked(&self.postmaster);
        let Some(child) = postmaster.as_mut() else {
            return Err(HarnessError::Stopped);
        };
        let Some(status) = child.try_wait().doing("awaiting", "postgres")? else {
            return Ok(());
        };
        *postmaster = None;
        Err(HarnessError::Ended { what: "Postgres", status, log: tail(&self.log_text(), 4000) })
    }

    /// Creates the roles and databases that were asked for.
    fn furnish(&self) -> Result<(), HarnessError> {
        if self.options.auth == Auth::Md5 {
            for (name, password) in [(SUPERUSER, SUPERUSER_PASSWORD), (APP_USER, APP_PASSWORD)] {
                self.psql(
                    "postgres",
                    &format!("SET password_encryption = 'md5'; ALTER ROLE {name} PASSWORD '{password}'"),
                )?;
            }
        }
        let storage = match self.options.auth {
            Auth::Md5 => "md5",
            Auth::Trust | Auth::Scram | Auth::Cleartext => "scram-sha-256",
        };
        for role in &self.options.roles {
            let sql = format!(
                "SET password_encryption = '{storage}'; CREATE ROLE {} LOGIN PASSWORD {} {}",
                identifier(&role.name),
                literal(&role.password),
                role.attributes
            );
            self.psql("postgres", &sql)?;
        }
        for (name, owner) in &self.options.databases {
            let (name, owner) = (identifier(name), identifier(owner));
            self.psql("postgres", &format!("CREATE DATABASE {name} OWNER {owner}"))?;
        }
        Ok(())
    }

    fn await_streaming(&self, name: &str, follower: &Self) -> Result<(), HarnessError> {
        let question = format!(
            "SELECT count(*) > 0 FROM pg_stat_replication \
             WHERE application_name = {} AND state = 'streaming'",
            literal(name)
        );
        self.await_truth("the follower's streaming", &question, PATIENCE).map_err(|error| match error {
            HarnessError::Late { what, within, .. } => follower.late(&what, within),
            other => other,
        })
    }

    /// Asks until the answer is true.
    fn await_truth(&self, what: &str, question: &str, within: Duration) -> Result<(), HarnessError> {
        let start = Instant::now();
        loop {
            if self.psql("postgres", question)? == "t" {
                return Ok(());
            }
            if start.elapsed() >= within {
                return Err(self.late(what, within));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(&self, signal: i32, within: Duration) -> Result<(), HarnessError> {
        *locked(&self.monitor) = None;
        let ended = {
            let mut postmaster = locked(&self.postmaster);
            let Some(child) = postmaster.as_mut() else {
                return Ok(());
            };
            os::signal(child.id(), signal).doing("signalling", "postgres")?;
            os::wait_exit(child, within).doing("awaiting", "postgres")?
        };
        if ended.is_some() {
            *locked(&self.postmaster) = None;
            return Ok(());
        }
        self.kill_hard();
        Err(self.late("Postgres' stop", within))
    }

    fn late(&self, what: &str, within: Duration) -> HarnessError {
        HarnessError::Late { what: what.to_owned(), within, log: tail(&self.log_text(), 4000) }
    }

    fn session(&self, database: &str) -> Result<Session, HarnessError> {
        let sockets = self.home.sockets();
        Session::open(&sockets, self.port, SUPERUSER, database).doing("logging in at", sockets)
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("log")
    }

    /// The directory of it all.
    #[must_use]
    pub fn home_dir(&self) -> &Path {
        self.home.path()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Late ones are killed; there is nothing more to do about an error here.
        let _ = self.end(libc::SIGQUIT, Duration::from_secs(5));
    }
}

/// A `postgres://` URL; user, password and database are percent-encoded (RFC 3986 §2.1).
#[must_use]
pub fn url(address: SocketAddr, user: &str, password: &str, database: &str) -> String {
    let (user, database) = (encoded(user), encoded(database));
    let password = match password {
        "" => String::new(),
        password => format!(":{}", encoded(password)),
    };
    format!("postgres://{user}{password}@{address}/{database}")
}

fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// A value of `postgresql.conf`, where a backslash escapes, unlike in SQL.
fn setting(value: &str) -> String {
    literal(&value.replace('\\', r"\\"))
}

/// A string constant of SQL.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn sql_error(sql: &str, error: ServerError) -> HarnessError {
    HarnessError::Sql { sql: sql.to_owned(), error }
}

/// A lock's content, even if a thread panicked while it held the lock: no content here is ever
/// half-changed.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{identifier, literal, setting, url};

    #[test]
    fn names_and_texts_are_quoted() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(setting(r"a\b'"), r"'a\\b'''");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
        let address = ([127, 0, 0, 1], 5432).into();
        assert_eq!(url(address, "a b", "p@/ss", "d"), "postgres://a%20b:p%40%2Fss@127.0.0.1:5432/d");
        assert_eq!(url(address, "a", "", "d"), "postgres://a@127.0.0.1:5432/d");
    }
}
