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
use crate::observe::{Excerpt, Overview, limits};
use crate::stats::PoolSnapshot;

/// Its name, without the process id.
const NAME: &str = "pgweir/exec/";

/// Where Linux lists Unix-domain sockets.
const SOCKETS: &str = "/proc/net/unix";

/// Longest time for one exchange, on either side.
const LIMIT: Duration = Duration::from_secs(2);

/// Longest time for all of them together.
const ALL_LIMIT: Duration = Duration::from_secs(10);

/// The longest answer; bytes. Of a longer one only that is told.
const ANSWER_MAX: usize = 1 << 20;

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

    async fn tell(&self) -> Value {
        let urls = self.listening.iter().map(|listening| {
            json!({
                "variable": listening.name,
                "listening": listening.address.map(|address| address.to_string()),
                "server": listening.server,
                "database": listening.database,
                "user": listening.user,
            })
        });
        let limits = limits::ask(&self.overview).await;
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
            "limits": limits,
        })
    }

    /// As text, within the bound.
    async fn answer(&self) -> String {
        bounded(self.tell().await.to_string())
    }
}

/// An answer that nobody would read to its end is replaced by one that says so.
fn bounded(answer: String) -> String {
    if answer.len() <= ANSWER_MAX {
        return answer;
    }
    let error = format!(
        "its answer has {} bytes, more than the {ANSWER_MAX} that are read; /limits on http_listen has no such bound",
        answer.len()
    );
    json!({ "pid": std::process::id(), "error": error }).to_string()
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
                let _ = timeout(LIMIT, stream.write_all(board.answer().await.as_bytes())).await;
            }
        }
    });
    Ok(())
}

/// Runs `pgweir status`: asks every `pgweir exec` of this machine. Exit code 1 if there is none, or if an answer is refused.
#[must_use]
pub fn run(as_json: bool) -> ExitCode {
    let table = std::fs::read_to_string(SOCKETS).unwrap_or_default();
    let until = Instant::now() + ALL_LIMIT;
    let (mut answers, mut code) = (Vec::new(), ExitCode::SUCCESS);
    for name in names(&table) {
        match ask(&name, until) {
            Ok(answer) => answers.push(answer),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let process = name.strip_prefix(NAME).unwrap_or_default();
                let _ = writeln!(io::stderr(), "pgweir status: process {}: {error}", Excerpt::of(process));
                code = ExitCode::FAILURE;
            }
            // It has just gone, or is somebody else's.
            Err(_) => {}
        }
    }
    if answers.is_empty() && code == ExitCode::SUCCESS {
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
    code
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
///
/// # Errors
///
/// [`io::ErrorKind::InvalidData`] if the answer is refused; others if there is none.
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
    let mut stream = StdStream::from(socket);
    let until = until.min(Instant::now() + LIMIT);
    let (mut answer, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => return believe(&answer),
            read => answer.extend_from_slice(part.get(..read).unwrap_or_default()),
        }
        if answer.len() > ANSWER_MAX {
            let error = format!("its answer has more than the {ANSWER_MAX} bytes that are read");
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
}

fn believe(answer: &[u8]) -> io::Result<Value> {
    let answer: Value = serde_json::from_slice(answer).map_err(io::Error::other)?;
    match answer.get("error") {
        None => Ok(answer),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, text(&answer, "/error"))),
    }
}

/// An answer as text for people.
fn describe(answer: &Value) -> String {
    let of = |path: &str| text(answer, path);
    let draining = if answer.get("draining") == Some(&Value::Bool(true)) { ", draining" } else { "" };
    let mut lines = vec![format!(
        "pgweir {} exec, process {}, application {}, up {} s, restarts {}{draining}",
        of("/version"),
        of("/pid"),
        of("/application"),
        of("/uptime_s"),
        of("/restarts"),
    )];
    lines.extend(list(answer, "/urls").iter().map(describe_url));
    lines.extend(list(answer, "/pools").iter().map(describe_pool));
    for server in list(answer, "/limits/servers") {
        describe_server(server, &mut lines);
    }
    lines.join("\n") + "\n"
}

fn describe_url(url: &Value) -> String {
    let of = |path: &str| text(url, path);
    format!(
        "  {}: {} to {}, database {}, user {}",
        of("/variable"),
        of("/listening"),
        of("/server"),
        of("/database"),
        of("/user"),
    )
}

fn describe_pool(pool: &Value) -> String {
    let of = |path: &str| text(pool, path);
    // Pools of several URLs may have the same names.
    let url = if pool.get("url").is_some_and(Value::is_string) { of("/url") + " " } else { String::new() };
    format!(
        "  pool {url}{}/{}: {}; clients {} active, {} waiting ({} ms), {} idle; servers {} active ({} pinned), {} idle, {} logging in, limit {}",
        of("/database"),
        of("/user"),
        of("/health"),
        of("/clients_active"),
        of("/clients_waiting"),
        of("/oldest_wait_ms"),
        of("/clients_idle"),
        of("/servers_active"),
        of("/servers_pinned"),
        of("/servers_idle"),
        of("/servers_logging_in"),
        of("/servers_limit"),
    )
}

/// A server of `/limits`, and below it each of its limits.
fn describe_server(server: &Value, lines: &mut Vec<String>) {
    let of = |path: &str| text(server, path);
    let is_known = |path: &str| server.pointer(path).is_some_and(|value| !value.is_null());
    let mut parts =
        vec![format!("  server {}, {}: own connections {}", of("/server"), of("/sharing"), of("/connections"))];
    if is_known("/census_seconds_ago") {
        parts.push(format!("limits looked at {} s ago", seconds(server, "/census_seconds_ago")));
    } else {
        parts.push(format!("limits unknown: {}", of("/why_no_census")));
    }
    if is_known("/sidecars") {
        parts.push(format!(
            "{} more pgweirs fit, {} if each uses what one uses now",
            of("/sidecars/more"),
            of("/sidecars/more_at_present_use"),
        ));
    }
    if is_known("/last_refusal") {
        let scope =
            if is_known("/last_refusal/scope") { of("/last_refusal/scope") } else { "not told which".to_owned() };
        parts.push(format!("last 53300 {} s ago (limit: {scope})", seconds(server, "/last_refusal/seconds_ago")));
    }
    lines.push(parts.join("; "));
    for limit in list(server, "/limits").iter().filter(|limit| limit.get("limit").is_some_and(Value::is_number)) {
        let binds = ["scope", "of"].iter().all(|key| server.pointer(&format!("/binds/{key}")) == limit.get(key));
        lines.push(describe_limit(limit, binds));
    }
}

fn describe_limit(limit: &Value, binds: bool) -> String {
    let of = |path: &str| text(limit, path);
    let whose = Some(of("/of")).filter(|whose| !whose.is_empty()).map(|whose| format!(" {whose}")).unwrap_or_default();
    let number = |path: &str| limit.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let mut parts = vec![format!(
        "    limit of the {}{whose}: {} of {} used: {} here, {} by peers, {} by others; headroom {}, room {}{}; \
         claims {}, probes {} ({} waiting)",
        of("/scope"),
        of("/used"),
        of("/limit"),
        number("/own/connections") + number("/own/claims"),
        of("/peers/connections"),
        of("/foreigners/connections"),
        of("/headroom"),
        of("/room"),
        if binds { " (it binds)" } else { "" },
        of("/claims"),
        of("/probes"),
        of("/waiting_probes"),
    )];
    if limit.get("share").is_some_and(Value::is_number) {
        parts.push(format!("share {}, pools {}", of("/share"), of("/pools")));
    }
    if limit.get("exhausted_in_seconds").is_some_and(Value::is_number) {
        parts.push(format!("exhausted in {} s", of("/exhausted_in_seconds")));
    }
    parts.join("; ")
}

/// What stands at that place, as text; empty if nothing does. Names are not ours: they get no way to forge a line.
fn text(value: &Value, path: &str) -> String {
    match value.pointer(path) {
        None => String::new(),
        Some(Value::String(text)) => Excerpt::of(text).to_string(),
        Some(other) => other.to_string(),
    }
}

/// Whole seconds.
fn seconds(value: &Value, path: &str) -> String {
    format!("{:.0}", value.pointer(path).and_then(Value::as_f64).unwrap_or_default())
}

fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value.pointer(path).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Shared;
    use crate::stats::{
        Holder, Holders, LastRefusal, PoolGauges, PoolHealth, PoolLimits, PoolName, PoolStats, ScopeStanding, Sharing,
        Snapshot, Standing,
    };

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

    /// A limit, and how many connections of it are this process's.
    fn scope(limit: u32, used: u32) -> ScopeStanding {
        ScopeStanding {
            limit: Some(limit),
            used,
            own: Holder { connections: 2, claims: 1, ..Holder::default() },
            peers: Holders { used: 4, ..Holders::default() },
            foreigners: Holders { used: 5, ..Holders::default() },
            probes: 2,
            waiting: 1,
            share: Some(4),
            usable: limit - 2,
            ..ScopeStanding::sample()
        }
    }

    #[tokio::test]
    async fn an_answer_is_told_in_words() {
        let board = Board::new(7, Vec::new(), Arc::new(Overview::new(&[Arc::default()])));
        board.set_draining(true);
        board.count_restart();
        let answer = board.tell().await;
        assert_eq!(answer["limits"], Value::Null, "nobody has told anything yet");
        let told = describe(&answer);
        assert!(told.contains("application 7, up 0 s, restarts 1, draining\n"), "{told}");
    }

    #[tokio::test]
    async fn limits_are_told_in_words_as_far_as_they_are_known() {
        let now = Instant::now();
        let standing = |scopes| Some(Arc::new(Standing { taken: now, scopes }));
        let refusal = Some(LastRefusal { at: now, scope: None });
        let limits = |server: &str, standing, refusal| PoolLimits {
            server: server.into(),
            login: "we\nb".into(),
            sharing: Sharing::Shared,
            standing,
            refusal,
            ..PoolLimits::default()
        };
        let pools = [
            limits("a:5432", standing(vec![scope(14, 12), ScopeStanding { scope: "server", ..scope(100, 12) }]), None),
            limits("b:5432", None, refusal),
        ];
        let pools = pools.map(|limits| PoolSnapshot {
            name: PoolName::primary("app", "web"),
            url: None,
            health: PoolHealth::Usable,
            stats: PoolStats::default(),
            gauges: PoolGauges::default(),
            limits,
        });
        let shared = Arc::new(Shared::new(now));
        shared.publish(Arc::new(Snapshot { pools: pools.into(), ..Snapshot::empty(now) }), now);
        let board = Board::new(7, Vec::new(), Arc::new(Overview::of(shared)));
        let told = describe(&board.tell().await);
        let lines: Vec<&str> = told.lines().skip_while(|line| !line.starts_with("  server")).collect();
        let want = [
            "  server a:5432, shared: own connections 0; limits looked at 0 s ago; 4 more pgweirs fit, 0 if each uses what one uses now",
            "    limit of the role we\\u{a}b: 12 of 14 used: 3 here, 4 by peers, 5 by others; headroom 2, room 0 (it binds); \
             claims 1, probes 2 (1 waiting); share 4, pools 3; exhausted in 0 s",
            "    limit of the server: 12 of 100 used: 3 here, 4 by peers, 5 by others; headroom 2, room 86; \
             claims 1, probes 2 (1 waiting); share 4, pools 3",
            "  server b:5432, shared: own connections 0; limits unknown: no server connection has been opened yet, and \
             none is opened for this; last 53300 0 s ago (limit: not told which)",
        ];
        assert_eq!(lines, want, "{told}");
    }

    #[test]
    fn an_answer_beyond_the_bound_is_refused_by_both_sides_in_plain_words() {
        let text = |length: usize| json!("x".repeat(length - 2)).to_string();
        assert_eq!(bounded(text(ANSWER_MAX)), text(ANSWER_MAX));
        // The name is no exec's: no other test finds it.
        let name = format!("pgweir/test/{}", std::process::id());
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(format!("\0{name}")).unwrap()).unwrap();
        socket.listen(BACKLOG).unwrap();
        let listener = StdListener::from(socket);
        let exchange = |answer: &str| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    // Who has read enough hangs up.
                    let _ = stream.write_all(answer.as_bytes());
                });
                ask(&name, Instant::now() + ALL_LIMIT)
            })
        };
        assert_eq!(exchange(&text(ANSWER_MAX)).unwrap().as_str().unwrap().len(), ANSWER_MAX - 2);
        #[rustfmt::skip]
        let table = [
            ("one that does not know the bound", text(ANSWER_MAX + 1),          "its answer has more than the 1048576 bytes that are read"),
            ("one that does",                    bounded(text(ANSWER_MAX + 1)), "its answer has 1048577 bytes, more than the 1048576 that are read"),
        ];
        for (who, answer, want) in table {
            let refused = exchange(&answer).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{who}");
            assert!(refused.to_string().starts_with(want), "{who}: {refused}");
        }
        // One that is killed while it speaks has no answer, and is nobody's fault.
        assert_ne!(exchange("{\"pid\":").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
