//! What serves those who look from outside, for as long as the process lives: the HTTP endpoints, OTLP, and the memory of what
//! was. Data planes come and go beneath it.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pgweir_config::Config;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::plane::{StartError, log_listener};
use crate::net::Listener;
use crate::observe::http::Rules;
use crate::observe::{self, Exposition, Overview, otlp};

/// How often what the workers have published is taken in; they publish every second.
const RENEW_EVERY: Duration = Duration::from_millis(500);

/// The same where nobody can ask for series or metrics: the limits alone are followed, for the log and `pgweir status`.
const FOLLOW_EVERY: Duration = Duration::from_secs(2);

/// All of it. Needs a runtime around it.
pub struct Observers {
    http: Option<HttpServer>,
    otlp: Option<otlp::Sender>,
    memory: JoinHandle<()>,
}

/// The HTTP server's task and the way to end it.
struct HttpServer {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Observers {
    /// Starts the HTTP endpoints on `http`, and OTLP if the environment names a receiver, which knows the process by
    /// `instance`.
    ///
    /// # Errors
    ///
    /// [`StartError::Io`]; nothing is left running.
    pub fn start(
        config: &Config,
        overview: &Arc<Overview>,
        http: Option<TcpListener>,
        instance: String,
    ) -> Result<Self, StartError> {
        // Only who is asked for metrics needs them.
        let metrics = http.is_some().then(|| Arc::new(Exposition::new(Arc::clone(overview))));
        let http = http.zip(metrics.as_ref());
        let http = http.map(|(listener, metrics)| serve_http(listener, config, overview, metrics)).transpose()?;
        let otlp = start_otlp(overview, instance);
        let is_asked = http.is_some() || otlp.is_some();
        let overview = Arc::clone(overview);
        let memory =
            if is_asked { tokio::spawn(remember(overview, metrics)) } else { tokio::spawn(follow_limits(overview)) };
        Ok(Self { http, otlp, memory })
    }

    /// Ends it. The last word by OTLP, if there is one, is on its way then.
    pub async fn close(self) -> Option<otlp::Farewell> {
        if let Some(HttpServer { stop, task }) = self.http {
            // It may have ended by itself. Its own limits bound its farewell.
            let _ = stop.send(());
            let _ = task.await;
        }
        self.memory.abort();
        // With the counts of the very end.
        self.otlp.map(otlp::Sender::finish)
    }
}

/// Takes in what the workers publish, until it is aborted.
async fn remember(overview: Arc<Overview>, metrics: Option<Arc<Exposition>>) {
    let mut ticks = interval(RENEW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        overview.record(SystemTime::now());
        if let Some(metrics) = &metrics {
            metrics.renew();
        }
    }
}

/// Takes in how the limits stand, until it is aborted.
async fn follow_limits(overview: Arc<Overview>) {
    let mut ticks = interval(FOLLOW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        overview.record_limits();
    }
}

fn serve_http(
    listener: TcpListener,
    config: &Config,
    overview: &Arc<Overview>,
    metrics: &Arc<Exposition>,
) -> Result<HttpServer, StartError> {
    log_listener("http", listener.local_addr())?;
    let (stop, stopped) = oneshot::channel();
    let stopped = async {
        // If nobody is left to stop it, it stops, too.
        let _ = stopped.await;
    };
    let served = observe::serve(listener, Rules::new(config), Arc::clone(overview), Arc::clone(metrics), stopped);
    let task = tokio::spawn(async {
        if let Err(error) = served.await {
            tracing::error!(%error, "http endpoints not served");
        }
    });
    Ok(HttpServer { stop, task })
}

/// Sends metrics by OTLP, if the environment names a receiver. Whatever is wrong with that is no reason not to serve.
fn start_otlp(overview: &Arc<Overview>, instance: String) -> Option<otlp::Sender> {
    let target = otlp::Target::of(&pgweir_config::environment()).unwrap_or_else(|fault| {
        tracing::warn!("{fault}");
        None
    })?;
    match otlp::Sender::start(target, Arc::clone(overview), instance) {
        Ok(sender) => Some(sender),
        Err(error) => {
            tracing::warn!(%error, "no thread for OTLP: no metrics are sent by it");
            None
        }
    }
}

/// What this pooler is called among those of a fleet: its name there, and its first port.
#[must_use]
pub fn instance(config: &Config, listeners: &[Listener]) -> String {
    let name = crate::pool::fleet_name(&config.fleet);
    let port = listeners.iter().find_map(|listener| match listener {
        Listener::Tcp(socket) => socket.local_addr().ok(),
        Listener::Unix { .. } => None,
    });
    port.map_or_else(|| name.clone(), |address| format!("{name}:{}", address.port()))
}
