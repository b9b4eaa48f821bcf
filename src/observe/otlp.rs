//! The metrics by OTLP over HTTP, if the environment names a receiver (`OTEL_EXPORTER_OTLP_ENDPOINT`); else none of this runs.
//!
//! A thread of its own takes what `/metrics` would say, period after period, and sends it. The worker knows nothing of it. Sums
//! are cumulative, so that a period that could not be sent loses detail and no count; nothing is queued, and nothing is
//! tried twice. Traces and logs are not sent.
//!
//! Source: the OpenTelemetry specification, "OTLP" 1.x, "OpenTelemetry Protocol Exporter", "Environment Variable Specification".

mod message;
mod post;
mod settings;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::oneshot;

use super::log::Excerpt;
use super::overview::{Exposition, Overview};

pub use settings::{Fault, Protocol, Target};

/// How long the last message of a process may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// Failures between two lines that tell of them.
const FAILURES_PER_LINE: u64 = 60;

/// The thread that sends. Dropped, it ends at its leisure.
#[derive(Debug)]
pub struct Sender {
    /// Closed, the last message is sent.
    open: SyncSender<()>,
    /// Told when that was done.
    done: oneshot::Receiver<()>,
}

/// The last message of a pooler, on its way.
#[derive(Debug)]
pub struct Farewell(oneshot::Receiver<()>);

impl Farewell {
    /// Waits until all of them are sent, two seconds at most for all together.
    pub async fn all(farewells: Vec<Self>) {
        let all = futures_util::future::join_all(farewells.into_iter().map(|farewell| farewell.0));
        // Late or lost: nothing is left to be done about it.
        let _ = tokio::time::timeout(FAREWELL, all).await;
    }
}

impl Sender {
    /// Starts it: it tells `target` of what `overview` has, as the pooler that is known by `instance`.
    ///
    /// # Errors
    ///
    /// The system has no thread.
    pub fn start(target: Target, overview: Arc<Overview>, instance: String) -> io::Result<Self> {
        let (open, closed) = sync_channel(1);
        let (finished, done) = oneshot::channel();
        let began = SystemTime::now();
        std::thread::Builder::new().name("otlp".into()).spawn(move || {
            tracing::info!(endpoint = %Excerpt::of(&target.shown()), period_s = target.period.as_secs_f64(), "otlp: sending metrics");
            let mut teller = Teller::new(target, overview, instance, began);
            let mut next = Instant::now() + teller.target.period;
            let until = |next: Instant| next.saturating_duration_since(Instant::now());
            while let Err(RecvTimeoutError::Timeout) = closed.recv_timeout(until(next)) {
                teller.tell(teller.target.timeout);
                // A receiver that takes long is told less often.
                next = (next + teller.target.period).max(Instant::now());
            }
            teller.tell(teller.target.timeout.min(FAREWELL));
            let _ = finished.send(());
        })?;
        Ok(Self { open, done })
    }

    /// Has the last message sent.
    #[must_use]
    pub fn finish(self) -> Farewell {
        drop(self.open);
        Farewell(self.done)
    }
}

/// What the thread does, and how it went so far.
struct Teller {
    target: Target,
    overview: Arc<Overview>,
    metrics: Exposition,
    instance: String,
    began: SystemTime,
    post: Option<post::Post>,
    /// Messages in a row that did not arrive.
    failed: u64,
}

impl Teller {
    fn new(target: Target, overview: Arc<Overview>, instance: String, began: SystemTime) -> Self {
        let metrics = Exposition::new(Arc::clone(&overview));
        Self { target, overview, metrics, instance, began, post: None, failed: 0 }
    }

    /// One message, which takes so long at most.
    fn tell(&mut self, limit: Duration) {
        let Some(snapshot) = self.overview.snapshot() else { return };
        let body = self.body(snapshot.taken);
        match self.send(&body, limit) {
            Ok(()) => {
                if self.failed > 0 {
                    tracing::info!(lost = self.failed, "otlp: the receiver takes metrics again");
                }
                self.failed = 0;
            }
            Err(error) => {
                if self.failed.is_multiple_of(FAILURES_PER_LINE) {
                    let lost_total = self.failed + 1;
                    tracing::warn!(lost_total, error = %Excerpt::of(&error.to_string()), "otlp: metrics not sent");
                }
                self.failed += 1;
                // The file of authorities may be another by now.
                self.post = None;
            }
        }
    }

    /// What was published at `taken`.
    fn body(&self, taken: Instant) -> Vec<u8> {
        let text = self.metrics.text();
        let now = SystemTime::now().checked_sub(taken.elapsed()).unwrap_or(self.began);
        let request = message::request(&text, &self.target.resource(&self.instance), self.began, now);
        match self.target.protocol {
            Protocol::Json => message::json(&request).into_bytes(),
            Protocol::Protobuf => message::protobuf(&request),
        }
    }

    fn send(&mut self, body: &[u8], limit: Duration) -> Result<(), post::PostError> {
        if self.post.is_none() {
            self.post = Some(post::Post::new(&self.target)?);
        }
        let Some(post) = &self.post else { return Ok(()) };
        post.send(&self.target, body, limit)
    }
}
