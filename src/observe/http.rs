//! The HTTP endpoints, for scrapers, load balancers and people.
//!
//! The server is small on purpose and bounded in everything a peer chooses: [`Limits`] says how many
//! connections are open, how long each lives and how much it may send. A connection carries one
//! request, so that one deadline covers it from accept to close and none can sit idle on a place that
//! a scraper needs.

use super::shared::{NotReady, Shared};
use crate::metrics;
use crate::stats::PoolHealth;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
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
    shared: Arc<Shared>,
    prometheus: PrometheusHandle,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = router(shared, prometheus);
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
pub fn router(shared: Arc<Shared>, prometheus: PrometheusHandle) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(Observed { shared, prometheus })
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(axum::middleware::map_response(finish))
}

/// What the endpoints read.
#[derive(Clone)]
struct Observed {
    shared: Arc<Shared>,
    prometheus: PrometheusHandle,
}

/// The endpoints and what they are for; one table for the index and the 404.
const ENDPOINTS: [(&str, &str); 4] = [
    ("/", "this index"),
    ("/metrics", "counters, gauges and histograms, Prometheus text format 0.0.4"),
    ("/healthz", "200 while the worker runs, else 503"),
    ("/readyz", "200 while clients can be served, else 503 with the reasons"),
];

async fn index() -> String {
    let lines = ENDPOINTS.map(|(path, what)| format!("{path:<10} {what}\n")).concat();
    format!("pgweir {}\n\n{lines}", env!("CARGO_PKG_VERSION"))
}

async fn render_metrics(State(observed): State<Observed>) -> impl IntoResponse {
    let snapshot = observed.shared.snapshot();
    let text = metrics::render(&observed.prometheus, snapshot.as_deref());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn healthz(State(observed): State<Observed>) -> (StatusCode, Json<Value>) {
    let now = Instant::now();
    let healthy = observed.shared.is_healthy(now);
    let since = observed.shared.since_tick(now).map(|since| since.as_secs_f64());
    (status(healthy), Json(json!({ "healthy": healthy, "last_tick_seconds_ago": since })))
}

async fn readyz(State(observed): State<Observed>) -> (StatusCode, Json<Value>) {
    let reasons = observed.shared.not_ready(Instant::now());
    let ready = reasons.is_empty();
    let reasons: Vec<Value> = reasons.iter().map(reason_json).collect();
    (status(ready), Json(json!({ "ready": ready, "reasons": reasons })))
}

fn reason_json(reason: &NotReady) -> Value {
    match reason {
        NotReady::Starting => json!({ "reason": "starting" }),
        NotReady::Draining => json!({ "reason": "draining" }),
        NotReady::Stalled { for_s } => json!({ "reason": "worker_stalled", "seconds": for_s }),
        NotReady::Pool { name, health } => {
            let sqlstate = match health {
                PoolHealth::WrongCredentials(code) => Some(code.to_string()),
                PoolHealth::Untried | PoolHealth::Usable | PoolHealth::Unreachable => None,
            };
            json!({
                "reason": health.as_str(),
                "database": &*name.database,
                "user": &*name.user,
                "role": name.role.to_string(),
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
    use crate::metrics::{Exporter, Publisher};
    use crate::observe::Stage;
    use crate::stats::{PoolGauges, PoolName, PoolSnapshot, PoolStats, Snapshot, Sqlstate};
    use std::io::{Read, Write};
    use std::net::TcpStream as Peer;
    use std::thread::JoinHandle;
    use tokio::sync::oneshot;

    /// A server on its own thread, as in the program.
    struct Server {
        address: SocketAddr,
        shared: Arc<Shared>,
        exporter: Arc<Exporter>,
        stop: Option<oneshot::Sender<()>>,
        thread: Option<JoinHandle<io::Result<()>>>,
    }

    impl Server {
        fn start(limits: Limits) -> Self {
            let listener = bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let shared = Arc::new(Shared::new(Instant::now()));
            let exporter = Arc::new(Exporter::new());
            let router = router(Arc::clone(&shared), exporter.handle());
            let (stop, stopped) = oneshot::channel();
            let thread = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(serve_router(listener, router, limits, async move {
                    let _ = stopped.await;
                }))
            });
            Self { address, shared, exporter, stop: Some(stop), thread: Some(thread) }
        }

        fn publish(&self, pools: Vec<PoolSnapshot>) {
            let snapshot = Snapshot { pools, ..Snapshot::empty(Instant::now()) };
            Publisher::new(Arc::clone(&self.exporter)).publish(&snapshot);
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
        PoolSnapshot { name: PoolName::primary("app", "web"), health, stats, gauges: PoolGauges::default() }
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
            { "reason": "wrong_credentials", "database": "app", "user": "web", "role": "primary", "sqlstate": "28P01" },
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
    fn unknown_paths_methods_and_garbage_get_an_answer_of_their_own() {
        let server = Server::start(Limits::DEFAULT);
        #[rustfmt::skip]
        let table = [
            ("unknown path",  "GET /nope HTTP/1.1\r\nHost: x\r\n\r\n",                              404, "not_found"),
            ("wrong method",  "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",     405, "method_not_allowed"),
            ("head",          "HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n",                          503, ""),
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
        let life = Duration::from_millis(200);
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
