//! `pgweir status`: what a `pgweir exec` on this machine tells of itself.
//!
//! It listens on a Unix-domain socket in Linux' abstract namespace, `@pgweir/exec/PID`: no port, no file, nothing to clean
//! up. Whoever is the same user, or root, and connects gets one JSON object and the end.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::time::timeout;

use super::plan::Pooled;
use crate::observe::{Excerpt, Overview};
use crate::stats::{PoolSnapshot, Standing};

/// Its name, without the process id.
const NAME: &str = "pgweir/exec/";

/// Where Linux lists Unix-domain sockets.
const SOCKETS: &str = "/proc/net/unix";

/// Longest time for one exchange, on either side.
const LIMIT: Duration = Duration::from_secs(2);

/// Longest time for all of them together.
const ALL_LIMIT: Duration = Duration::from_secs(10);

/// The longest answer that is read; bytes.
const ANSWER_MAX: u64 = 1 << 20;

/// Askers that may wait.
const BACKLOG: i32 = 8;

/// A URL's place.
pub(super) struct Listening {
    name: String,
    address: Option<SocketAddr>,
    server: String,
    database: String,
    user: String,
}

impl Listening {
    pub(super) fn new(pooled: &Pooled, addresses: &[SocketAddr]) -> Self {
        let server = pooled.url.server();
        Self {
            name: pooled.name.clone(),
            address: addresses.get(pooled.group).copied(),
            server: format!("{} port {}", server.host, server.port),
            database: pooled.url.dbname().to_owned(),
            user: pooled.url.user().to_owned(),
        }
    }
}

/// What is told.
pub(super) struct Board {
    since: Instant,
    child: i32,
    listening: Vec<Listening>,
    overview: Arc<Overview>,
    draining: AtomicBool,
    restarts: AtomicU32,
}

impl Board {
    pub(super) fn new(child: i32, listening: Vec<Listening>, overview: Arc<Overview>) -> Self {
        Self {
            since: Instant::now(),
            child,
            listening,
            overview,
            draining: AtomicBool::new(false),
            restarts: AtomicU32::new(0),
        }
    }

    /// SIGTERM has come, or what it led to is over.
    pub(super) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// A plane was started anew.
    pub(super) fn count_restart(&self) {
        self.restarts.fetch_add(1, Ordering::Relaxed);
    }

    fn tell(&self) -> Value {
        let urls = self.listening.iter().map(|listening| {
            json!({
                "variable": listening.name,
                "listening": listening.address.map(|address| address.to_string()),
                "server": listening.server,
                "database": listening.database,
                "user": listening.user,
            })
        });
        // Where no fleet keeps them known they are found out for who asks next.
        self.overview.ask_limits(Instant::now());
        let snapshot = self.overview.snapshot();
        let pools: Vec<Value> = snapshot.iter().flat_map(|snapshot| &snapshot.pools).map(pool).collect();
        json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "application": self.child,
            "uptime_s": self.since.elapsed().as_secs(),
            "draining": self.draining.load(Ordering::Relaxed),
            "restarts": self.restarts.load(Ordering::Relaxed),
            "urls": urls.collect::<Vec<_>>(),
            "pools": pools,
        })
    }
}

fn pool(pool: &PoolSnapshot) -> Value {
    let gauges = &pool.gauges;
    json!({
        "database": &*pool.name.database,
        "user": &*pool.name.user,
        "url": pool.url.as_deref(),
        "health": pool.health.as_str(),
        "clients_idle": gauges.clients_idle,
        "clients_active": gauges.clients_active,
        "clients_waiting": gauges.clients_waiting,
        "oldest_wait_ms": gauges.oldest_wait_us / 1000,
        "servers_idle": gauges.servers_idle,
        "servers_active": gauges.servers_active,
        "servers_pinned": gauges.servers_pinned,
        "servers_logging_in": gauges.servers_logging_in,
        "servers_limit": gauges.servers_limit,
        "transactions": pool.stats.transactions,
        "budget": pool.limits.standing.as_ref().map(|standing| budget(pool, standing)),
    })
}

/// How the limits stand on which the pool depends; that which binds by itself.
fn budget(pool: &PoolSnapshot, standing: &Standing) -> Value {
    let scopes = standing.scopes.iter().filter(|scope| scope.limit.is_some()).map(|scope| {
        json!({
            "scope": scope.scope,
            "limit": scope.limit,
            "headroom": scope.headroom,
            "used": scope.used,
            "own": scope.own.connections + scope.own.claims,
            "peers": scope.peers.used,
            "others": scope.foreigners.used,
            "room": scope.room(),
            "share": scope.share,
        })
    });
    json!({
        "sharing": pool.limits.sharing.as_str(),
        "seconds_ago": standing.taken.elapsed().as_secs(),
        "binds": standing.binding().map(|scope| scope.scope),
        "limits": scopes.collect::<Vec<_>>(),
    })
}

/// Answers whoever asks, for as long as the runtime around it lives.
///
/// # Errors
///
/// The system refuses.
pub(super) fn serve(board: Arc<Board>) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(format!("\0{NAME}{}", std::process::id()))?)?;
    socket.listen(BACKLOG)?;
    let listener = UnixListener::from_std(StdListener::from(socket))?;
    tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                // Out of descriptors, most likely.
                tokio::time::sleep(LIMIT).await;
                continue;
            };
            let own = nix::unistd::geteuid().as_raw();
            if stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0) {
                // Whoever does not read is not waited for.
                let _ = timeout(LIMIT, stream.write_all(board.tell().to_string().as_bytes())).await;
            }
        }
    });
    Ok(())
}

/// Runs `pgweir status`: asks every `pgweir exec` of this machine. Exit code 1 if there is none.
#[must_use]
pub fn run(as_json: bool) -> ExitCode {
    let table = std::fs::read_to_string(SOCKETS).unwrap_or_default();
    let until = Instant::now() + ALL_LIMIT;
    let answers: Vec<Value> = names(&table).iter().filter_map(|name| ask(name, until).ok()).collect();
    if answers.is_empty() {
        let _ = writeln!(io::stderr(), "pgweir status: no pgweir exec of this user runs here");
        return ExitCode::FAILURE;
    }
    let text = if as_json {
        format!("{}\n", Value::Array(answers))
    } else {
        answers.iter().map(describe).collect::<Vec<_>>().join("\n")
    };
    // A reader that has gone away is no reason to fail.
    let _ = io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// The sockets of ours in the system's table, each once.
///
/// Source: proc(5), `/proc/net/unix`: an abstract name is the last column and begins with `@`.
fn names(table: &str) -> Vec<String> {
    let paths = table.lines().filter_map(|line| line.split_whitespace().last()?.strip_prefix('@'));
    let mut names: Vec<String> = paths.filter(|path| path.starts_with(NAME)).map(str::to_owned).collect();
    names.sort();
    names.dedup();
    names
}

/// The name is anybody's to take: only what the same user, or root, says is believed.
fn ask(name: &str, until: Instant) -> io::Result<Value> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(format!("\0{name}"))?)?;
    let own = nix::unistd::geteuid().as_raw();
    let peer = rustix::net::sockopt::socket_peercred(&socket)?.uid.as_raw();
    if peer != own && peer != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    socket.set_nonblocking(false)?;
    let mut stream = StdStream::from(socket).take(ANSWER_MAX);
    let until = until.min(Instant::now() + LIMIT);
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.get_ref().set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return serde_json::from_slice(&answer).map_err(io::Error::other),
            read => answer.extend_from_slice(part.get(..read).unwrap_or_default()),
        }
    }
}

/// An answer as text for people.
fn describe(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), |text| Excerpt::of(text).to_string());
    let of = |value: &Value, key: &str| value.get(key).map(text).unwrap_or_default();
    let list = |key: &str| answer.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let draining = if answer.get("draining") == Some(&Value::Bool(true)) { ", draining" } else { "" };
    let mut lines = vec![format!(
        "pgweir {} exec, process {}, application {}, up {} s, restarts {}{draining}",
        of(answer, "version"),
        of(answer, "pid"),
        of(answer, "application"),
        of(answer, "uptime_s"),
        of(answer, "restarts"),
    )];
    for url in list("urls") {
        let at = of(&url, "listening");
        let (variable, server) = (of(&url, "variable"), of(&url, "server"));
        lines.push(format!(
            "  {variable}: {at} to {server}, database {}, user {}",
            of(&url, "database"),
            of(&url, "user")
        ));
    }
    for pool in list("pools") {
        let of = |key: &str| of(&pool, key);
        // Pools of several URLs may have the same names.
        let url = if pool.get("url").is_some_and(Value::is_string) { of("url") + " " } else { String::new() };
        lines.push(format!(
            "  pool {}{}/{}: {}; clients {} active, {} waiting ({} ms), {} idle; servers {} active ({} pinned), {} idle, {} logging in, limit {}",
            url, of("database"), of("user"), of("health"),
            of("clients_active"), of("clients_waiting"), of("oldest_wait_ms"), of("clients_idle"),
            of("servers_active"), of("servers_pinned"), of("servers_idle"), of("servers_logging_in"), of("servers_limit"),
        ));
        let budget = pool.get("budget").filter(|budget| budget.is_object());
        let limits = budget.and_then(|budget| budget.get("limits")?.as_array());
        for limit in limits.into_iter().flatten() {
            let of = |key: &str| limit.get(key).map(text).unwrap_or_default();
            let binds = budget.and_then(|budget| budget.get("binds")) == limit.get("scope");
            lines.push(format!(
                "    limit of the {}: {} of {} used: {} here, {} by peers, {} by others; room {}{}",
                of("scope"),
                of("used"),
                of("limit"),
                of("own"),
                of("peers"),
                of("others"),
                of("room"),
                if binds { " (it binds)" } else { "" },
            ));
        }
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_ours_are_found_in_the_systems_table() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     0000: 00000002 00000000 00010000 0001 01 100 @pgweir/exec/12\n\
                     0000: 00000003 00000000 00000000 0001 03 101 @pgweir/exec/12\n\
                     0000: 00000002 00000000 00010000 0001 01 102 /tmp/pgweir/exec/13\n\
                     0000: 00000002 00000000 00010000 0001 01 103\n\
                     0000: 00000002 00000000 00010000 0001 01 104 @pgweir/exec/7\n";
        assert_eq!(names(table), ["pgweir/exec/12", "pgweir/exec/7"]);
    }

    #[test]
    fn an_answer_is_told_in_words() {
        let board = Board::new(7, Vec::new(), Arc::new(Overview::new(&[Arc::default()])));
        board.set_draining(true);
        board.count_restart();
        let told = describe(&board.tell());
        assert!(told.contains("application 7, up 0 s, restarts 1, draining\n"), "{told}");
    }
}
