//! Starts a pooler with the settings both must have: transaction pooling, SCRAM on both sides from a list of
//! users, connections not logged, statistics on, everything else at its default.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::{User, geteuid};
use tempfile::TempDir;

use crate::fault::Fault;
use crate::login::{Account, Session};

/// A pooler that accepts no login for this long will not.
const READY_WITHIN: Duration = Duration::from_secs(15);

/// Statements `PgBouncer` prepares per server connection; its default, written out.
const MAX_PREPARED_STATEMENTS: u32 = 200;

/// Which pooler a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `PgBouncer`.
    PgBouncer,
    /// pgweir.
    Pgweir,
}

/// A pooler's program, asked for its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where it is, or its name to be found by `PATH`.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Name and version as it tells them.
    pub version: String,
    /// What of pgweir it leaves out, as its feature `mutant` names it.
    pub lacks: Option<&'static str>,
}

/// Where a pgweir that was built with the feature `mutant` is told what to leave out, and what it calls itself.
const LACKS: &str = "PGWEIR_TEST_MUTANT";
const MUTANT: &str = "(mutant)";

impl Program {
    /// Asks the program what it is.
    ///
    /// # Errors
    ///
    /// [`Fault::Program`] if it cannot be run or is neither pooler.
    pub fn identify(path: &Path) -> Result<Self, Fault> {
        let fault = |reason: String| Fault::Program { path: path.to_owned(), reason };
        let output = Command::new(path).arg("--version").output().map_err(|error| fault(error.to_string()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().next().unwrap_or_default().trim();
        let kind =
            kind(version).ok_or_else(|| fault(format!("tells the version {version:?}: no pooler known here")))?;
        Ok(Self { path: path.to_owned(), kind, version: version.to_owned(), lacks: None })
    }

    /// Whether it takes prepared statements in transaction mode: `PgBouncer` does from 1.21 on.
    #[must_use]
    pub fn prepares(&self) -> bool {
        let mut numbers = self.version.split([' ', '.']).filter_map(|part| part.parse().ok());
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        self.kind != Kind::PgBouncer || version >= (1, 21)
    }

    /// The same program, which leaves out what `guard` names.
    ///
    /// # Errors
    ///
    /// [`Fault::Program`] if it would leave out nothing: it was built without the feature `mutant`.
    pub fn without(&self, guard: &'static str) -> Result<Self, Fault> {
        if self.kind != Kind::Pgweir || !self.version.contains(MUTANT) {
            let reason = format!("{} leaves nothing out: build it with --features mutant", self.version);
            return Err(Fault::Program { path: self.path.clone(), reason });
        }
        Ok(Self { lacks: Some(guard), ..self.clone() })
    }
}

fn kind(version: &str) -> Option<Kind> {
    match version.split_ascii_whitespace().next()?.to_ascii_lowercase().as_str() {
        "pgbouncer" => Some(Kind::PgBouncer),
        "pgweir" => Some(Kind::Pgweir),
        _ => None,
    }
}

/// What differs from one run of a pooler to another.
#[derive(Clone, Copy, Debug, Default)]
pub struct Setup<'a> {
    /// Server connections it may use.
    pub pool_size: u32,
    /// Whether its clients use TLS 1.3.
    pub tls: bool,
    /// pgweir's `prepared_statements`; `None`: its default.
    pub statements: Option<&'static str>,
    /// pgweir's followers; `None`: it knows of none.
    pub reads: Option<Reads<'a>>,
}

/// Where reads go.
#[derive(Clone, Copy, Debug)]
pub struct Reads<'a> {
    /// The followers of the server.
    pub followers: &'a [SocketAddr],
    /// `read_freshness`.
    pub freshness: &'static str,
}

/// A running pooler; killed and cleared away when dropped.
#[derive(Debug)]
pub struct Pooler {
    child: Child,
    addr: SocketAddr,
    http: SocketAddr,
    tls: bool,
    // Holds its configuration and its log; removed last.
    _folder: TempDir,
}

impl Pooler {
    /// Starts `program` before the Postgres that `server` names and waits until it lets that account in.
    ///
    /// # Errors
    ///
    /// [`Fault::NotReady`] with the end of its log, [`Fault::Io`] if it cannot be started.
    pub fn start(program: &Program, server: &Account, setup: Setup<'_>) -> Result<Self, Fault> {
        let folder = tempfile::Builder::new().prefix("pgweir-load-").tempdir();
        let folder = folder.map_err(Fault::io("creating a folder"))?;
        let addr = free_address()?;
        let http = free_address()?;
        let mut command = command(program, folder.path(), server, [addr, http], setup)?;
        let log = folder.path().join("log");
        let writer = fs::File::create(&log).map_err(Fault::io("creating a log"))?;
        let second = writer.try_clone().map_err(Fault::io("creating a log"))?;
        command.stdin(Stdio::null()).stdout(writer).stderr(second);
        die_with_parent(&mut command);
        let spawned =
            command.spawn().map_err(|error| Fault::Program { path: program.path.clone(), reason: error.to_string() });
        let mut pooler = Self { child: spawned?, addr, http, tls: setup.tls, _folder: folder };
        let account = pooler.account(server);
        let begin = Instant::now();
        while Session::open(&account).and_then(Session::terminate).is_err() {
            let ended = matches!(pooler.child.try_wait(), Ok(Some(_)));
            if ended || begin.elapsed() > READY_WITHIN {
                let label = program.version.clone();
                return Err(Fault::NotReady { label, within: begin.elapsed(), log: tail(&log) });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(pooler)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What pgweir tells at `/metrics`; a second old at most.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if it does not answer.
    pub fn metrics(&self) -> Result<String, Fault> {
        let asking = Fault::io("asking for metrics");
        let mut stream = TcpStream::connect(self.http).map_err(&asking)?;
        stream.set_read_timeout(Some(READY_WITHIN)).map_err(&asking)?;
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: {}\r\n\r\n", self.http).map_err(&asking)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(&asking)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let is_well = head.split(' ').nth(1) == Some("200");
        if is_well { Ok(body.to_owned()) } else { Err(asking(std::io::Error::other(head.to_owned()))) }
    }

    /// The account of `server` as reached through this pooler.
    #[must_use]
    pub fn account(&self, server: &Account) -> Account {
        Account { addr: self.addr, tls: self.tls, ..server.clone() }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        // It has nothing to lose; an error only means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free now and outside the range clients' own ports come from (32768 and up by default), or
/// thousands of clients would sooner or later sit on it.
fn free_address() -> Result<SocketAddr, Fault> {
    let mut last = None;
    for _ in 0..100 {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(20_000..32_000)));
        match TcpListener::bind(addr) {
            Ok(_) => return Ok(addr),
            Err(error) => last = Some(error),
        }
    }
    Err(Fault::Io { what: "finding a free port", source: last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()) })
}

fn command(
    program: &Program,
    folder: &Path,
    server: &Account,
    [addr, http]: [SocketAddr; 2],
    setup: Setup<'_>,
) -> Result<Command, Fault> {
    let pool_size = setup.pool_size;
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Fault::io("writing a configuration"))?;
        Ok::<_, Fault>(path)
    };
    let mut command = Command::new(&program.path);
    // The caller's settings are not the benchmark's.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command.envs(program.lacks.map(|guard| (LACKS, guard)));
    let identity = setup.tls.then(|| identity(folder)).transpose()?;
    match program.kind {
        Kind::PgBouncer => {
            let users = write("users.txt", format!("\"{}\" \"{}\"\n", server.user, server.password))?;
            let mut text = pgbouncer_ini(server, addr, pool_size, &users, program.prepares());
            if let Some([cert, key]) = &identity {
                let _ = writeln!(
                    text,
                    "client_tls_sslmode = require\nclient_tls_cert_file = {}\nclient_tls_key_file = {}\n\
                     client_tls_protocols = tlsv1.3",
                    cert.display(),
                    key.display()
                );
            }
            let config = write("pgbouncer.ini", text)?;
            command.arg(&config);
            // It refuses to be root.
            if geteuid().is_root() {
                let files: Vec<&Path> =
                    identity.iter().flatten().chain([&users, &config]).map(PathBuf::as_path).collect();
                give_away(&mut command, folder, &files)?;
            }
        }
        Kind::Pgweir => {
            let mut text = pgweir_toml(server, [addr, http], setup);
            if let Some([cert, key]) = &identity {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    text,
                    "[tls]\nclient_tls_sslmode = \"require\"\nclient_tls_cert_file = \"{}\"\n\
                     client_tls_key_file = \"{}\"\nclient_tls_protocols = \"tlsv1.3\"",
                    cert.display(),
                    key.display()
                );
            }
            let config = write("pgweir.toml", text)?;
            command.args(["serve", "--config"]).arg(config);
        }
    }
    Ok(command)
}

/// A certificate and its key, ECDSA on P-256: their files.
fn identity(folder: &Path) -> Result<[PathBuf; 2], Fault> {
    let failed = |error: rcgen::Error| Fault::io("making a certificate")(std::io::Error::other(error));
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).map_err(failed)?;
    let texts = [("server.crt", made.cert.pem()), ("server.key", made.signing_key.serialize_pem())];
    let mut paths = Vec::new();
    for (name, text) in texts {
        let path = folder.join(name);
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(Fault::io("writing a certificate"))?;
        paths.push(path);
    }
    <[PathBuf; 2]>::try_from(paths).map_err(|_| Fault::io("making a certificate")(std::io::Error::other("two files")))
}

fn give_away(command: &mut Command, folder: &Path, files: &[&Path]) -> Result<(), Fault> {
    let named = User::from_name("nobody").map_err(Fault::errno("finding the user nobody"))?;
    let (uid, gid) = named.map_or((65534, 65534), |user| (user.uid.as_raw(), user.gid.as_raw()));
    for path in files.iter().chain([&folder]) {
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(Fault::io("giving a file away"))?;
    }
    command.uid(uid).gid(gid).current_dir(folder);
    Ok(())
}

fn pgbouncer_ini(server: &Account, addr: SocketAddr, pool_size: u32, users: &Path, prepares: bool) -> String {
    // It refuses a setting that it does not know.
    let statements =
        if prepares { format!("max_prepared_statements = {MAX_PREPARED_STATEMENTS}\n") } else { String::new() };
    format!(
        "[databases]\n\
         {database} = host={host} port={port} dbname={database}\n\
         [pgbouncer]\n\
         listen_addr = {listen}\n\
         listen_port = {listen_port}\n\
         listen_backlog = 1024\n\
         unix_socket_dir =\n\
         auth_type = scram-sha-256\n\
         auth_file = {users}\n\
         server_tls_sslmode = disable\n\
         pool_mode = transaction\n\
         default_pool_size = {pool_size}\n\
         max_client_conn = 10000\n\
         {statements}\
         log_connections = 0\n\
         log_disconnections = 0\n",
        database = server.database,
        host = server.addr.ip(),
        port = server.addr.port(),
        listen = addr.ip(),
        listen_port = addr.port(),
        users = users.display(),
    )
}

fn pgweir_toml(server: &Account, [addr, http]: [SocketAddr; 2], setup: Setup<'_>) -> String {
    let pool_size = setup.pool_size;
    let (routing, followers) = setup.reads.map_or_else(Default::default, |reads| {
        let routing = format!("[followers]\nread_routing = \"auto\"\nread_freshness = \"{}\"\n", reads.freshness);
        let all: Vec<_> = reads.followers.iter().map(SocketAddr::to_string).collect();
        (routing, format!("followers = \"{}\"\n", all.join(", ")))
    });
    let statements = setup.statements.map(|mode| format!("prepared_statements = \"{mode}\"\n")).unwrap_or_default();
    format!(
        "[listen]\n\
         listen_addr = \"{listen}\"\n\
         listen_port = {listen_port}\n\
         listen_backlog = 1024\n\
         [auth]\n\
         auth_type = \"scram-sha-256\"\n\
         [pool]\n\
         pool_mode = \"transaction\"\n\
         default_pool_size = {pool_size}\n\
         {statements}\
         [client]\n\
         max_client_conn = 10000\n\
         [http]\n\
         http_listen = \"{http}\"\n\
         [log]\n\
         log_connections = false\n\
         log_disconnections = false\n\
         {routing}\
         [databases.{database}]\n\
         host = \"{host}\"\n\
         port = {port}\n\
         sslmode = \"disable\"\n\
         {followers}\
         [users.{user}]\n\
         password = \"{password}\"\n",
        listen = addr.ip(),
        listen_port = addr.port(),
        database = server.database,
        host = server.addr.ip(),
        port = server.addr.port(),
        user = server.user,
        password = server.password,
    )
}

/// Puts a child into a process group of its own, so that Ctrl-C reaches only the benchmark, which then stops its
/// children in order; and has the kernel kill it if the benchmark is killed.
#[allow(unsafe_code, reason = "a fork hook has no safe form in std; the proof stands at its use")]
pub fn die_with_parent(command: &mut Command) {
    command.process_group(0);
    let hook = || nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: the hook makes one plain system
    // call, prctl, and turns an errno into an io::Error, which does not allocate. It captures nothing. std runs
    // it after changing the user, which would clear the setting (prctl(2)).
    unsafe {
        command.pre_exec(hook);
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(15);
    lines.into_iter().skip(from).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pooler_is_known_by_the_version_it_tells() {
        #[rustfmt::skip]
        let table = [
            ("PgBouncer 1.25.2",           Some(Kind::PgBouncer)),
            ("pgweir 0.1.0 (abc 2026)",    Some(Kind::Pgweir)),
            ("psql (PostgreSQL) 15.3",     None),
            ("",                           None),
        ];
        for (version, want) in table {
            assert_eq!(kind(version), want, "{version}");
        }
    }

    #[test]
    fn statements_are_prepared_from_1_21_on() {
        for (version, can) in [
            ("PgBouncer 1.18.0", false),
            ("PgBouncer 1.20.1", false),
            ("PgBouncer 1.21.0", true),
            ("PgBouncer 1.25.2", true),
            ("PgBouncer 2.0.0", true),
            ("pgweir 0.1.0", true),
        ] {
            let program = Program {
                path: PathBuf::new(),
                kind: kind(version).unwrap(),
                version: version.to_owned(),
                lacks: None,
            };
            assert_eq!(program.prepares(), can, "{version}");
        }
        let server = Account {
            addr: "127.0.0.1:5432".parse().unwrap(),
            user: "u".to_owned(),
            password: "p".to_owned(),
            database: "d".to_owned(),
            tls: false,
            options: String::new(),
        };
        let ini = |prepares| pgbouncer_ini(&server, server.addr, 1, Path::new("/users"), prepares);
        assert!(ini(true).contains("\nmax_prepared_statements = 200\n"));
        assert_eq!(ini(true).replace("max_prepared_statements = 200\n", ""), ini(false));
    }

    #[test]
    fn only_a_program_that_can_leave_something_out_is_run_without_it() {
        let program = |version: &str| {
            let kind = kind(version).unwrap();
            Program { path: PathBuf::from("program"), kind, version: version.to_owned(), lacks: None }
        };
        for (version, can) in [("pgweir 0.1.0 (mutant)", true), ("pgweir 0.1.0", false), ("PgBouncer 1.25.2", false)] {
            let without = program(version).without("Inspection").ok();
            assert_eq!(without.map(|one| one.lacks), can.then_some(Some("Inspection")), "{version}");
        }
    }

    #[test]
    fn both_configurations_have_the_same_pool_and_place() {
        let server = Account {
            addr: "127.0.0.1:5433".parse().unwrap(),
            user: "app".to_owned(),
            password: "secret".to_owned(),
            database: "app".to_owned(),
            tls: false,
            options: String::new(),
        };
        let addr = "127.0.0.1:21000".parse().unwrap();
        let ini = pgbouncer_ini(&server, addr, 13, Path::new("/users"), true);
        let followers = ["127.0.0.1:5434".parse().unwrap(), "127.0.0.1:5435".parse().unwrap()];
        let reads = Some(Reads { followers: &followers, freshness: "session" });
        let setup = Setup { pool_size: 13, tls: false, statements: Some("strip"), reads };
        let toml = pgweir_toml(&server, [addr, "127.0.0.1:21001".parse().unwrap()], setup);
        for want in
            ["default_pool_size = 13", "listen_port = 21000", "listen_backlog = 1024", "max_client_conn = 10000"]
        {
            assert!(ini.contains(want) && toml.contains(want), "{want}");
        }
        assert!(ini.contains("port=5433") && toml.contains("\nport = 5433"));

        let sources = pgweir_config::Sources { file: Some(("pgweir.toml", &toml)), env: &[], args: &[] };
        let config = pgweir_config::Config::from_sources(sources).unwrap();
        assert_eq!((config.pool.default_pool_size, config.listen.listen_port), (13, 21000));
        assert_eq!(config.pool.prepared_statements, pgweir_config::StatementMode::Strip);
        assert!(!config.log.log_connections && !config.log.log_disconnections);
        let database = config.databases.get("app").unwrap();
        assert_eq!(database.port, 5433);
        assert_eq!(config.followers.read_routing, pgweir_config::ReadRouting::Auto);
        assert_eq!(config.followers.read_freshness, pgweir_config::ReadFreshness::Session);
        assert_eq!(database.followers.as_ref().map_or(0, |list| list.all().len()), 2);
        let none = pgweir_toml(&server, [addr, addr], Setup { pool_size: 13, ..Setup::default() });
        assert!(!none.contains("followers"), "{none}");
    }
}
