//! The HTTP endpoints, for scrapers, load balancers and people.
//!
//! The server is small on purpose and bounded in everything a peer chooses: [`Limits`] says how many
//! connections are open, how long each lives and how much it may send. A connection carries one
//! request, so that one deadline covers it from accept to close and none can sit idle on a place that
//! a scraper needs.

use super::gate::{Gate, Verdict};
use super::history::{EVERY, Moment};
use super::overview::{Exposition, Overview};
use super::shared::NotReady;
use super::{blame, limits};
use crate::stats::PoolHealth;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use axum::{Json, Router};
use pgweir_config::Config;
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

/// What a peer may use up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more wait in the kernel's queue.
    pub connections: usize,
    /// From accept to close.
    pub connection_life: Duration,
    /// Request line, headers and body of a connection together, bytes. No endpoint takes a body.
    pub request_bytes: usize,
    /// How long requests that are being answered may hold up [`serve`] after its shutdown.
    pub farewell: Duration,
}

impl Limits {
    /// Room for a few scrapers, a balancer and a browser.
    pub const DEFAULT: Self = Self {
        connections: 32,
        connection_life: Duration::from_secs(10),
        request_bytes: 16 * 1024,
        farewell: Duration::from_secs(1),
    };
}

/// Longest wait for the sessions to tell what they hold: two ticks, if the worker is well.
const BLAME_WAIT: Duration = Duration::from_secs(2);

/// What the settings say of the endpoints.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Who may ask.
    pub gate: Gate,
    /// The kind of process that this is, as `HireFire` names it: `web` of `web.1`.
    pub process: String,
}

impl Rules {
    /// Of a configuration; on Heroku, of the dyno's name.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let given = Some(config.fleet.fleet_name.clone()).filter(|name| !name.is_empty());
        let name = given.or_else(|| std::env::var("DYNO").ok()).unwrap_or_default();
        let process = name.split('.').next().filter(|kind| !kind.is_empty()).unwrap_or("pgweir").to_owned();
        Self { gate: Gate::new(config.http.http_token.clone()), process }
    }
}

/// The HTTP address cannot be listened on; the configuration or the host is at fault.
#[derive(Debug, thiserror::Error)]
#[error("http_listen = {address}: cannot listen: {source}")]
pub struct BindFailed {
    /// What `http_listen` says.
    pub address: String,
    /// Why the operating system refused.
    pub source: io::Error,
}

/// Listens on the address of the setting `http_listen`, `host:port`. Port 0 takes any free port; of a
/// name with several addresses, the first that can be had. Blocks while a name is looked up.
pub fn bind(address: &str) -> Result<std::net::TcpListener, BindFailed> {
    // The standard library sets SO_REUSEADDR, so a restart does not wait for old connections.
    std::net::TcpListener::bind(address).map_err(|source| BindFailed { address: address.to_owned(), source })
}

/// Serves the endpoints on `listener` within [`Limits::DEFAULT`] until `shutdown` is ready.
///
/// # Errors
///
/// If the listener cannot be put into the runtime's hands. Once it serves, it does not fail: a
/// connection that cannot be accepted is tried again.
pub async fn serve(
    listener: std::net::TcpListener,
    rules: Rules,
    overview: Arc<Overview>,
    metrics: Arc<Exposition>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = router(rules, overview, metrics);
    serve_router(listener, router, Limits::DEFAULT, shutdown).await
}

/// As [`serve`], with a router that may have further endpoints, and chosen limits.
pub async fn serve_router(
    listener: std::net::TcpListener,
    router: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let listener = BoundedListener { listener, places: Arc::new(Semaphore::new(limits.connections)), limits };
    let (stopped, stopping) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Nobody listens if the server has ended by itself.
        let _ = stopped.send(());
    };
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown);
    let farewell = async move {
        if stopping.await.is_err() {
            // The sender went without a word: the server below has ended, and wins the race.
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(limits.farewell).await;
    };
    tokio::select! {
        result = served.into_future() => result,
        () = farewell => Ok(()),
    }
}

/// The endpoints; further ones can be merged into it.
pub fn router(rules: Rules, overview: Arc<Overview>, metrics: Arc<Exposition>) -> Router {
    let gate = rules.gate.clone();
    Router::new()
        .route("/", get(dashboard))
        .route("/dashboard.css", get(async || file("text/css; charset=utf-8", include_str!("dashboard/dashboard.css"))))
        .route(
            "/dashboard.js",
            get(async || file("text/javascript; charset=utf-8", include_str!("dashboard/dashboard.js"))),
        )
        .route("/limits", get(tell_limits))
        .route("/limits/schema", get(async || file("application/schema+json", limits::SCHEMA)))
        .route("/blame", get(tell_blame))
        .route("/series", get(series))
        .route("/hirefire", get(hirefire))
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Observed { overview, metrics, process: rules.process.into() })
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(axum::middleware::from_fn_with_state(gate, guard))
        .layer(axum::middleware::map_response(finish))
}

/// What the endpoints read.
#[derive(Clone)]
struct Observed {
    overview: Arc<Overview>,
    metrics: Arc<Exposition>,
    /// See [`Rules::process`].
    process: Arc<str>,
}

/// The endpoints and what they are for; one table for the index and the 404.
const ENDPOINTS: [(&str, &str); 9] = [
    ("/", "in a browser the dashboard, else this index"),
    ("/limits", "how close everybody is to the servers' connection limits, JSON"),
    ("/limits/schema", "the form of /limits, JSON schema"),
    ("/blame", "who holds each server connection, since when, and why, JSON"),
    ("/series", "the last 15 minutes, JSON"),
    ("/hirefire", "clients that have or want a server connection, for HireFire, JSON"),
    ("/metrics", "counters, gauges and histograms, Prometheus text format 0.0.4"),
    ("/healthz", "200 while the worker runs, else 503"),
    ("/readyz", "200 while clients can be served, else 503 with the reasons"),
];

/// What the page may load and do: its own script and style, and questions to its own origin. Nothing else, from nowhere.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                              base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Asked by whom, it is answered to whom.
async fn guard(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    match gate.judge(request.uri(), request.headers()) {
        Verdict::Whole => next.run(request).await,
        Verdict::YesOrNo => {
            let status = next.run(request).await.status();
            (status, Json(json!({ "ok": status.is_success() }))).into_response()
        }
        Verdict::NoToken => {
            let body =
                json!({ "error": "unauthorized", "hint": "send Authorization: Bearer and the value of http_token" });
            let wanted = [(header::WWW_AUTHENTICATE, "Bearer realm=\"pgweir\"")];
            (StatusCode::UNAUTHORIZED, wanted, Json(body)).into_response()
        }
        Verdict::OtherHost => {
            let hint = "ask for localhost or 127.0.0.1, or set http_token and send it: without a token no other name is \
                        answered to";
            (StatusCode::MISDIRECTED_REQUEST, Json(json!({ "error": "misdirected", "hint": hint }))).into_response()
        }
    }
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind)], text)
}

/// Browsers get the page, everybody else the index.
async fn dashboard(headers: HeaderMap) -> Response {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let vary = (header::VARY, "accept");
    if accepts.contains("text/html") {
        let policy = (header::CONTENT_SECURITY_POLICY, CONTENT_POLICY);
        let kind = (header::CONTENT_TYPE, "text/html; charset=utf-8");
        let referrer = (header::REFERRER_POLICY, "no-referrer");
        return ([kind, policy, referrer, vary], include_str!("dashboard/index.html")).into_response();
    }
    let lines = ENDPOINTS.map(|(path, what)| format!("{path:<15} {what}\n")).concat();
    ([vary], format!("pgweir\n\n{lines}")).into_response()
}

async fn tell_limits(State(observed): State<Observed>) -> Response {
    limits::ask(&observed.overview).await.map_or_else(silent, |report| Json(report).into_response())
}

async fn tell_blame(State(observed): State<Observed>) -> Response {
    let Some(told) = observed.overview.blame(BLAME_WAIT).await else { return silent() };
    let snapshot = observed.overview.snapshot();
    Json(blame::report(&told, snapshot.as_deref(), Instant::now())).into_response()
}

/// The worker does not answer.
fn silent() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": "worker_silent" }))).into_response()
}

/// What a moment of `/series` has, in this order; times in milliseconds.
const COLUMNS: [&str; 19] = [
    "time",
    "clients_active",
    "clients_waiting",
    "clients_idle",
    "servers_active",
    "servers_idle",
    "oldest_wait_ms",
    "transactions_per_second",
    "queries_per_second",
    "errors_per_second",
    "wait_p50_ms",
    "wait_p95_ms",
    "wait_p99_ms",
    "query_p50_ms",
    "query_p95_ms",
    "query_p99_ms",
    "transaction_p50_ms",
    "transaction_p95_ms",
    "transaction_p99_ms",
];

/// With `?since=TIME` only what came later.
async fn series(State(observed): State<Observed>, uri: Uri) -> Json<Value> {
    let since = uri.query().and_then(|query| query.strip_prefix("since=")?.parse().ok()).unwrap_or(f64::MIN);
    let history = observed.overview.history();
    // Times are told in whole milliseconds.
    let rows: Vec<Value> = history.moments().filter(|moment| moment.time > since + 0.001).map(row).collect();
    Json(json!({ "every_seconds": EVERY.as_secs_f64(), "columns": COLUMNS, "rows": rows }))
}

fn row(moment: &Moment) -> Value {
    let round = |value: f64| (value * 10.0).round() / 10.0;
    let ms = |us: Option<u64>| us.map(|us| blame::seconds(us) * 1000.0);
    let [wait_50, wait_95, wait_99] = moment.wait.map(ms);
    let [query_50, query_95, query_99] = moment.query.map(ms);
    let [transaction_50, transaction_95, transaction_99] = moment.transaction.map(ms);
    json!([
        (moment.time * 1000.0).round() / 1000.0,
        moment.clients_active,
        moment.clients_waiting,
        moment.clients_idle,
        moment.servers_active,
        moment.servers_idle,
        ms(Some(moment.oldest_wait)),
        round(moment.transactions),
        round(moment.queries),
        round(moment.errors),
        wait_50,
        wait_95,
        wait_99,
        query_50,
        query_95,
        query_99,
        transaction_50,
        transaction_95,
        transaction_99,
    ])
}

/// `HireFire` reads `value`, its older versions `quantity`.
async fn hirefire(State(observed): State<Observed>) -> Json<Value> {
    let snapshot = observed.overview.snapshot();
    let gauges = snapshot.iter().flat_map(|snapshot| &snapshot.pools).map(|pool| &pool.gauges);
    let demand: u32 = gauges.map(|gauges| gauges.clients_active + gauges.clients_waiting).sum();
    Json(json!([{ "name": &*observed.process, "value": demand, "quantity": demand }]))
}

async fn render_metrics(State(observed): State<Observed>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], observed.metrics.text())
}

async fn healthz(State(observed): State<Observed>) -> (StatusCode, Json<Value>) {
    let now = Instant::now();
    let healthy = observed.overview.is_healthy(now);
    let since = observed.overview.since_tick(now).map(|since| since.as_secs_f64());
    (status(healthy), Json(json!({ "healthy": healthy, "last_tick_seconds_ago": since })))
}

async fn readyz(State(observed): State<Observed>) -> (StatusCode, Json<Value>) {
    let reasons = observed.overview.not_ready(Instant::now());
    let ready = reasons.is_empty();
    let reasons: Vec<Value> = reasons.iter().map(reason_json).collect();
    (status(ready), Json(json!({ "ready": ready, "reasons": reasons })))
}

fn reason_json(reason: &NotReady) -> Value {
    match reason {
        NotReady::Starting => json!({ "reason": "starting" }),
        NotReady::Draining => json!({ "reason": "draining" }),
        NotReady::Stalled { for_s } => json!({ "reason": "worker_stalled", "seconds": for_s }),
        NotReady::Pool { name, url, health } => {
            let sqlstate = match health {
                PoolHealth::WrongCredentials(code) => Some(code.to_string()),
                PoolHealth::Untried | PoolHealth::Usable | PoolHealth::Unreachable => None,
            };
            json!({
                "reason": health.as_str(),
                "database": &*name.database,
                "user": &*name.user,
                "role": name.role.to_string(),
                "url": url.as_deref(),
                "sqlstate": sqlstate,
            })
        }
    }
}

/// 200 or 503.
fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn not_found() -> (StatusCode, Json<Value>) {
    let endpoints = ENDPOINTS.map(|(path, _)| path);
    (StatusCode::NOT_FOUND, Json(json!({ "error": "not_found", "endpoints": endpoints })))
}

async fn method_not_allowed() -> (StatusCode, Json<Value>) {
    let body = json!({ "error": "method_not_allowed", "allowed": ["GET", "HEAD"] });
    (StatusCode::METHOD_NOT_ALLOWED, Json(body))
}

/// What every answer says: it is the connection's last, of this moment, and what it claims to be.
async fn finish(mut response: Response) -> Response {
    let headers: &mut HeaderMap = response.headers_mut();
    let fixed: [(HeaderName, &str); 3] = [
        (header::CONNECTION, "close"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    for (name, value) in fixed {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Accepts a connection when there is a place for it.
struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    limits: Limits,
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                // The semaphore is ours and never closed.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    return (BoundedStream::new(stream, place, self.limits), address);
                }
                Err(error) => {
                    // Out of descriptors, or a peer that left in the queue. Both pass; a pause keeps
                    // the first from turning into a busy loop.
                    tracing::warn!(%error, "http connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection with a deadline, a limit on what it may send, and a place that it gives back.
struct BoundedStream {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    /// Bytes that the peer may still send.
    readable: usize,
    _place: OwnedSemaphorePermit,
}

impl BoundedStream {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit, limits: Limits) -> Self {
        let deadline = Box::pin(tokio::time::sleep(limits.connection_life));
        Self { stream, deadline, readable: limits.request_bytes, _place: place }
    }

    /// Fails once the deadline is over; else has the task woken then.
    fn in_time(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.in_time(cx)?;
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let read = buf.filled().len() - before;
        match self.readable.checked_sub(read) {
            Some(left) => {
                self.readable = left;
                Poll::Ready(Ok(()))
            }
            None => Poll::Ready(Err(io::ErrorKind::FileTooLarge.into())),
        }
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::{Shared, Stage};
    use crate::stats::{PoolGauges, PoolLimits, PoolName, PoolSnapshot, PoolStats, Snapshot, Sqlstate};
    use pgweir_config::Secret;
    use std::io::{Read, Write};
    use std::net::TcpStream as Peer;
    use std::thread::JoinHandle;
    use tokio::sync::oneshot;

    /// A server on its own thread, as in the program.
    struct Server {
        address: SocketAddr,
        shared: Arc<Shared>,
        stop: Option<oneshot::Sender<()>>,
        thread: Option<JoinHandle<io::Result<()>>>,
    }

    impl Server {
        fn start(limits: Limits) -> Self {
            Self::start_with(limits, Rules::default())
        }

        fn start_with(limits: Limits, rules: Rules) -> Self {
            let listener = bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let shared = Arc::new(Shared::new(Instant::now()));
            let overview = Arc::new(Overview::of(Arc::clone(&shared)));
            let router = router(rules, Arc::clone(&overview), Arc::new(Exposition::new(overview)));
            let (stop, stopped) = oneshot::channel();
            let thread = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(serve_router(listener, router, limits, async move {
                    let _ = stopped.await;
                }))
            });
            Self { address, shared, stop: Some(stop), thread: Some(thread) }
        }

        fn publish(&self, pools: Vec<PoolSnapshot>) {
            let snapshot = Snapshot { pools, ..Snapshot::empty(Instant::now()) };
            self.shared.publish(Arc::new(snapshot), Instant::now());
        }

        fn connect(&self) -> Peer {
            let peer = Peer::connect(self.address).unwrap();
            peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            peer
        }

        /// Sends `request` and reads to the end of the connection: status, headers, body.
        fn ask(&self, request: &str) -> (u16, String, String) {
            let mut peer = self.connect();
            peer.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            peer.read_to_string(&mut answer).unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            (status, head.to_ascii_lowercase(), body.to_owned())
        }

        fn get(&self, path: &str) -> (u16, String, String) {
            self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        }

        fn stop(&mut self) -> io::Result<()> {
            drop(self.stop.take());
            self.thread.take().unwrap().join().unwrap()
        }
    }

    impl Drop for Server {
        fn drop(&mut self) {
            if self.thread.is_some() {
                self.stop().unwrap();
            }
        }
    }

    fn pool(health: PoolHealth) -> PoolSnapshot {
        let mut stats = PoolStats { leases: 42, ..PoolStats::default() };
        stats.wait.record(1000);
        let limits = PoolLimits::default();
        PoolSnapshot {
            name: PoolName::primary("app", "web"),
            url: None,
            health,
            stats,
            gauges: PoolGauges::default(),
            limits,
        }
    }

    #[test]
    fn metrics_are_served_in_the_text_format_with_both_halves() {
        let server = Server::start(Limits::DEFAULT);
        server.publish(vec![pool(PoolHealth::Usable)]);
        let (status, head, body) = server.get("/metrics");
        assert_eq!(status, 200);
        assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        assert!(head.contains("connection: close"), "{head}");
        for line in [
            "pgweir_leases_total{database=\"app\",user=\"web\",role=\"primary\"} 42",
            "pgweir_wait_seconds_bucket{database=\"app\",user=\"web\",role=\"primary\",le=\"0.001024\"} 1",
        ] {
            let found = body.lines().any(|got| same_series(got, line));
            assert!(found, "{line} is not in {body}");
        }
    }

    /// The exporter orders labels as it likes.
    fn same_series(a: &str, b: &str) -> bool {
        let parts = |line: &str| {
            let mut parts: Vec<String> = line.split(['{', '}', ',', ' ']).map(str::to_owned).collect();
            parts.sort_unstable();
            parts
        };
        parts(a) == parts(b)
    }

    #[test]
    fn healthz_follows_the_ticks_of_the_worker() {
        let server = Server::start(Limits::DEFAULT);
        let (status, _, body) = server.get("/healthz");
        assert_eq!((status, body.as_str()), (503, r#"{"healthy":false,"last_tick_seconds_ago":null}"#));
        server.publish(Vec::new());
        assert_eq!(server.get("/healthz").0, 200);
    }

    #[test]
    fn readyz_tells_the_reasons() {
        let server = Server::start(Limits::DEFAULT);
        server.shared.enter(Stage::Listening);
        server.publish(vec![pool(PoolHealth::Usable)]);
        let (status, _, body) = server.get("/readyz");
        assert_eq!((status, body.as_str()), (200, r#"{"ready":true,"reasons":[]}"#));

        let code = Sqlstate::new(b"28P01").unwrap();
        server.publish(vec![pool(PoolHealth::WrongCredentials(code))]);
        server.shared.enter(Stage::Draining);
        let (status, _, body) = server.get("/readyz");
        let got: Value = serde_json::from_str(&body).unwrap();
        let want = json!({ "ready": false, "reasons": [
            { "reason": "draining" },
            { "reason": "wrong_credentials", "database": "app", "user": "web", "role": "primary", "url": null, "sqlstate": "28P01" },
        ]});
        assert_eq!((status, got), (503, want));
    }

    #[test]
    fn the_index_names_every_endpoint_and_each_of_them_answers() {
        let server = Server::start(Limits::DEFAULT);
        let (status, _, body) = server.get("/");
        assert_eq!(status, 200);
        for (path, _) in ENDPOINTS {
            assert!(body.contains(path), "{path}");
            assert!([200, 503].contains(&server.get(path).0), "{path}");
        }
    }

    #[test]
    fn browsers_get_the_page_with_a_policy_that_lets_nothing_else_in() {
        let server = Server::start(Limits::DEFAULT);
        let (status, head, body) =
            server.ask("GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html,*/*;q=0.8\r\n\r\n");
        assert_eq!(status, 200);
        assert!(body.starts_with("<!doctype html>"), "{body}");
        for part in [
            "content-security-policy: default-src 'none'; script-src 'self'",
            "content-type: text/html",
            "vary: accept",
        ] {
            assert!(head.contains(part), "{part} is not in {head}");
        }
        for (path, kind) in [("/dashboard.css", "text/css"), ("/dashboard.js", "text/javascript")] {
            let (status, head, body) = server.get(path);
            assert!(status == 200 && head.contains(kind) && !body.is_empty(), "{path}: {head}");
            // Which the name of SVG's elements does not.
            let body = body.replace("http://www.w3.org/2000/svg", "");
            assert!(!body.contains("://"), "{path} asks elsewhere");
        }
    }

    #[test]
    fn what_is_asked_without_a_token_or_under_another_name_is_not_told() {
        let server = Server::start(Limits::DEFAULT);
        let (status, _, body) = server.ask("GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n");
        assert!(status == 421 && body.contains("misdirected") && !body.contains("pgweir_"), "{body}");

        let rules = Rules { gate: Gate::new(Some(Secret::new("a-token-of-a-test"))), process: "web".into() };
        let server = Server::start_with(Limits::DEFAULT, rules);
        server.publish(vec![pool(PoolHealth::Unreachable)]);
        server.shared.enter(Stage::Listening);
        let ask = |path: &str, line: &str| server.ask(&format!("GET {path} HTTP/1.1\r\nHost: pod\r\n{line}\r\n"));
        let (status, head, body) = ask("/metrics", "");
        assert!(
            status == 401 && head.contains("www-authenticate: bearer") && !body.contains("pgweir_"),
            "{head}{body}"
        );
        assert_eq!(ask("/nowhere", "").0, 401);
        assert_eq!(ask("/metrics", "Authorization: Bearer a-token-of-a-test\r\n").0, 200);
        // Nobody learns the names of pools, but a balancer learns what it has to.
        assert_eq!((ask("/readyz", "").0, ask("/readyz", "").2), (503, "{\"ok\":false}".to_owned()));
        assert_eq!((ask("/healthz", "").0, ask("/healthz", "").2), (200, "{\"ok\":true}".to_owned()));
        assert!(ask("/readyz", "Authorization: Bearer a-token-of-a-test\r\n").2.contains("server_unreachable"));
    }

    #[test]
    fn the_limits_and_the_holders_are_not_waited_for_when_the_worker_is_silent() {
        let server = Server::start(Limits::DEFAULT);
        assert_eq!(server.get("/limits").0, 503);
        server.publish(vec![pool(PoolHealth::Usable)]);
        assert_eq!(server.get("/limits").0, 200);
        assert_eq!(server.get("/blame").0, 503);
        assert!(server.shared.is_blame_asked());
        let (_, _, body) = server.get("/hirefire");
        assert_eq!(body, r#"[{"name":"","quantity":0,"value":0}]"#);
    }

    #[test]
    fn unknown_paths_methods_and_garbage_get_an_answer_of_their_own() {
        let server = Server::start(Limits::DEFAULT);
        #[rustfmt::skip]
        let table = [
            ("unknown path",  "GET /nope HTTP/1.1\r\nHost: localhost\r\n\r\n",                              404, "not_found"),
            ("wrong method",  "POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",     405, "method_not_allowed"),
            ("head",          "HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",                          503, ""),
            ("garbage",       "\0\0\0\x08\x04\x05\x16\x2f\r\n\r\n",                                 400, ""),
            ("http 1.0",      "GET / HTTP/1.0\r\n\r\n",                                             200, "pgweir"),
        ];
        for (name, request, want, says) in table {
            let (status, _, body) = server.ask(request);
            assert_eq!(status, want, "{name}: {body}");
            assert!(body.contains(says), "{name}: {body}");
        }
    }

    #[test]
    fn a_request_past_the_byte_limit_is_cut_off_and_the_server_lives_on() {
        let server = Server::start(Limits { request_bytes: 1000, ..Limits::DEFAULT });
        let mut peer = server.connect();
        peer.write_all(format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1000)).as_bytes()).unwrap();
        let mut answer = Vec::new();
        // Closed, or reset because bytes were left unread.
        let _ = peer.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(server.get("/").0, 200);
    }

    #[test]
    fn a_peer_that_sends_nothing_loses_its_place_at_the_deadline() {
        // One that asks has no longer, either, on however busy a machine.
        let life = Duration::from_secs(2);
        let server = Server::start(Limits { connections: 2, connection_life: life, ..Limits::DEFAULT });
        let start = Instant::now();
        let mut silent = [server.connect(), server.connect()];
        // A trickle does not extend the life of a connection.
        silent[0].write_all(b"GET / HT").unwrap();
        assert_eq!(server.get("/").0, 200, "a place came free");
        assert!(start.elapsed() >= life, "both places were taken until then");
        for peer in &mut silent {
            let mut rest = Vec::new();
            let _ = peer.read_to_end(&mut rest);
            assert!(!rest.starts_with(b"HTTP/1.1 200"));
        }
    }

    #[test]
    fn shutdown_does_not_wait_for_a_silent_peer() {
        let farewell = Duration::from_millis(100);
        let mut server = Server::start(Limits { farewell, ..Limits::DEFAULT });
        let mut silent = server.connect();
        silent.write_all(b"GET / HT").unwrap();
        assert_eq!(server.get("/").0, 200);
        let start = Instant::now();
        server.stop().unwrap();
        assert!(start.elapsed() < Limits::DEFAULT.connection_life / 2, "{:?}", start.elapsed());
        assert!(Peer::connect(server.address).is_err(), "the port is closed");
    }

    #[test]
    fn a_taken_port_gives_one_error_that_names_the_setting() {
        let taken = bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        for address in [address.to_string(), "127.0.0.1".into(), "192.0.2.1:1".into()] {
            let error = bind(&address).unwrap_err().to_string();
            assert!(error.starts_with(&format!("http_listen = {address}: cannot listen: ")), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
