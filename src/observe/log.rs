//! Where log events go, and what must never be in them.
//!
//! One event is one line on standard error. The line is formatted by the thread that logs and
//! written by another: a log drain that stalls must not stall the worker, so what does not fit into
//! the queue is lost, counted, and reported once there is room.
//!
//! Never secrets, never SQL (of a slow statement what is left without literals and comments, if the setting
//! `log_slow_statements` asks for it). Three guards, besides everybody's care:
//!
//! - An event with a field named in [`WITHHELD`] is not logged at all, whoever wrote it.
//! - Of other crates only warnings and errors are logged, and the `log` crate is not bridged:
//!   drivers put statement texts into their debug lines.
//! - Text that a peer chose goes through [`Excerpt`]: bounded, and unable to forge a line.

use pgweir_config::{LogFormat, LogLevel};
use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::{Layer, reload};

/// Names of fields whose events are withheld: what they stand for is not for a log.
pub const WITHHELD: [&str; 12] = [
    "password",
    "passwd",
    "secret",
    "token",
    "verifier",
    "authorization",
    "cancel_key",
    "sql",
    "query",
    "statement_text",
    "url",
    "dsn",
];

/// Lines that may wait for the writer; about 250 kB of usual ones.
pub const QUEUE_LINES: usize = 1024;

/// How long [`LogHandle::flush`] waits for a drain that does not drain.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A log was set up before; the caller is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a log subscriber is installed already")]
pub struct AlreadyInstalled;

/// Sends the process' log to standard error. Keep the handle until the end: dropping it flushes.
///
/// # Errors
///
/// [`AlreadyInstalled`] the second time.
pub fn init(format: LogFormat, level: LogLevel) -> Result<LogHandle, AlreadyInstalled> {
    let queue = Queue::start(io::stderr()).map_err(|_| AlreadyInstalled)?;
    let (subscriber, handle) = assemble(format, level, queue);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| AlreadyInstalled)?;
    Ok(handle)
}

/// Changes the log while it runs, and ends it.
pub struct LogHandle {
    level: reload::Handle<LevelFilter, Registry>,
    queue: Queue,
}

impl LogHandle {
    /// Least important line that is written from now on: the setting `log_level`.
    pub fn set_level(&self, level: LogLevel) {
        // Fails only when the subscriber is gone, and with it the log.
        let _ = self.level.reload(filter_of(level));
    }

    /// Lines that were lost because the queue was full, since the start.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.queue.lost.load(Ordering::Relaxed)
    }

    /// Waits until every line logged so far is written, at most one second.
    pub fn flush(&self) {
        let deadline = Instant::now() + FLUSH_LIMIT;
        let (done, written) = sync_channel(1);
        let mut entry = Entry::Flush(done);
        while let Err(TrySendError::Full(back)) = self.queue.entries.try_send(entry) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
            entry = back;
        }
        // An error is a writer that is slow or gone: nothing is left to wait for.
        let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

impl Drop for LogHandle {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Text that a peer chose, fit for a log line: at most [`Excerpt::MAX_CHARS`] characters, with
/// everything that could end a line, move a cursor or turn the reading direction escaped.
///
/// For names and error texts. A statement's text does not belong into the log in any form.
#[derive(Clone, Copy)]
pub struct Excerpt<'a>(pub &'a [u8]);

impl<'a> Excerpt<'a> {
    /// Characters that are shown; what is cut off is marked by an ellipsis.
    pub const MAX_CHARS: usize = 96;

    /// The excerpt of a string.
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        Self(text.as_bytes())
    }
}

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A character has at most four bytes, so this prefix is enough whatever follows.
        let prefix = self.0.get(..4 * (Self::MAX_CHARS + 1)).unwrap_or(self.0);
        let text = String::from_utf8_lossy(prefix);
        let mut chars = text.chars();
        for c in chars.by_ref().take(Self::MAX_CHARS) {
            if c.is_control() || turns_or_breaks(c) {
                write!(f, "{}", c.escape_unicode())?;
            } else {
                f.write_char(c)?;
            }
        }
        if chars.next().is_some() { f.write_char('…') } else { Ok(()) }
    }
}

impl fmt::Debug for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Line and paragraph separators, and the marks that change the direction of text.
fn turns_or_breaks(c: char) -> bool {
    matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{61c}')
}

/// Builds the subscriber and its handle, without making it the process'.
fn assemble(format: LogFormat, level: LogLevel, queue: Queue) -> (impl Subscriber + Send + Sync, LogHandle) {
    let (level, reload) = reload::Layer::new(filter_of(level));
    let handle = LogHandle { level: reload, queue: queue.clone() };
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Logfmt => tracing_logfmt::builder().layer().with_writer(queue).boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(queue).boxed(),
    };
    let subscriber = Registry::default().with(level).with(lines.with_filter(filter_fn(may_be_logged)));
    (subscriber, handle)
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// The guard; asked once per place that logs, not per event.
fn may_be_logged(metadata: &Metadata<'_>) -> bool {
    let krate = metadata.target().split("::").next().unwrap_or_default();
    let ours = krate == "pgweir" || krate.starts_with("pgweir_");
    let withheld = metadata.fields().iter().any(|field| WITHHELD.contains(&field.name()));
    (ours || *metadata.level() <= Level::WARN) && !withheld
}

/// What the writing thread takes.
enum Entry {
    /// A line with its line feed.
    Line(Vec<u8>),
    /// Answer when everything before it is written.
    Flush(SyncSender<()>),
}

/// The way from the threads that log to the one that writes. Never blocks the former.
#[derive(Clone)]
struct Queue {
    entries: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Queue {
    /// Starts the writing thread; it ends with the process, or when the last queue is dropped.
    fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let (entries, receiver) = sync_channel(QUEUE_LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&lost);
        std::thread::Builder::new().name("log".into()).spawn(move || write_lines(&receiver, sink, &seen))?;
        Ok(Self { entries, lost })
    }
}

/// The writing thread.
fn write_lines(entries: &Receiver<Entry>, mut sink: impl Write, lost: &AtomicU64) {
    let mut reported = 0;
    for entry in entries {
        // Where the log itself cannot be written there is no place left to say so.
        match entry {
            Entry::Line(line) => {
                let _ = sink.write_all(&line);
            }
            Entry::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
        let lines = lost.load(Ordering::Relaxed);
        if lines > reported {
            reported = lines;
            // Goes into the queue as every event does, which has just got shorter.
            tracing::warn!(target: "pgweir::log", lost_total = lines, "log lines lost: standard error is slower than the log");
        }
    }
}

/// Takes one event's line.
struct LineWriter<'a>(&'a Queue);

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.entries.try_send(Entry::Line(line.to_vec())).is_err() {
            self.0.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LineWriter(self)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::{Mutex, MutexGuard};

    /// Collects what is written; writing stalls while a test holds the lock.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Sink {
        fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }
    }

    impl Write for Sink {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.lock().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Runs `log` with a subscriber of its own; what it wrote.
    pub(in crate::observe) fn logged(format: LogFormat, level: LogLevel, log: impl FnOnce(&LogHandle)) -> String {
        let sink = Sink::default();
        let (subscriber, handle) = assemble(format, level, Queue::start(sink.clone()).unwrap());
        tracing::subscriber::with_default(subscriber, || log(&handle));
        handle.flush();
        let written = sink.lock().clone();
        String::from_utf8(written).unwrap()
    }

    #[test]
    fn an_event_is_one_line_whatever_its_text() {
        for format in [LogFormat::Logfmt, LogFormat::Json] {
            let text = logged(format, LogLevel::Info, |_| {
                tracing::info!(target: "pgweir::x", user = "a\nlevel=error forged=1", why = ?"b\nc", "first\nsecond");
            });
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.ends_with('\n'), "{text}");
        }
    }

    #[test]
    fn json_lines_are_objects_with_the_fields_at_the_top() {
        let text = logged(LogFormat::Json, LogLevel::Info, |_| {
            tracing::warn!(target: "pgweir::x", pool = "app", waiters = 3, "no server connection");
        });
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["pool"], &line["waiters"], &line["level"]), (&"app".into(), &3.into(), &"WARN".into()));
    }

    #[test]
    fn events_with_a_withheld_field_and_the_chatter_of_other_crates_are_not_logged() {
        let text = logged(LogFormat::Logfmt, LogLevel::Trace, |_| {
            tracing::error!(target: "pgweir::x", password = "hunter2", "case=1");
            tracing::error!(target: "pgweir::x", sql = "SELECT 1", "case=2");
            tracing::error!(target: "other", url = "postgres://u:p@h/d", "case=3");
            tracing::info!(target: "tokio_postgres::query", "case=4");
            tracing::info!(target: "pgweirdo::x", "case=5");
            tracing::warn!(target: "other", "case=6");
            tracing::trace!(target: "pgweir::x", "case=7");
            tracing::debug!(target: "pgweir_proto", "case=8");
        });
        let cases: Vec<char> = text.match_indices("case=").filter_map(|(at, _)| text.chars().nth(at + 5)).collect();
        assert_eq!(cases, ['6', '7', '8'], "{text}");
    }

    #[test]
    fn the_level_can_be_changed_while_the_log_runs() {
        let text = logged(LogFormat::Logfmt, LogLevel::Info, |handle| {
            let log = |number: u32| tracing::debug!(target: "pgweir::x", number);
            log(1);
            handle.set_level(LogLevel::Debug);
            log(2);
            handle.set_level(LogLevel::Error);
            log(3);
        });
        assert!(text.contains("number=2") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn a_stalled_drain_loses_lines_and_never_stalls_who_logs() {
        let sink = Sink::default();
        let queue = Queue::start(sink.clone()).unwrap();
        let (subscriber, handle) = assemble(LogFormat::Logfmt, LogLevel::Info, queue);
        let total = QUEUE_LINES as u64 + 500;
        {
            let _stalled = sink.lock();
            tracing::subscriber::with_default(subscriber, || {
                for number in 0..total {
                    tracing::info!(target: "pgweir::x", number);
                }
            });
            // The writer may have taken one line before it stalled.
            assert!((499..=500).contains(&handle.lost()), "{}", handle.lost());
        }
        let lost = handle.lost();
        let mut lines = 0;
        // A busy machine may not write them all within one flush.
        for _ in 0..20 {
            handle.flush();
            lines = str::from_utf8(&sink.lock()).unwrap().lines().count() as u64;
            if lines + lost >= total {
                break;
            }
        }
        assert_eq!(lines + lost, total, "every line is written or counted as lost");
    }

    #[test]
    fn flush_gives_up_on_a_drain_that_does_not_drain() {
        let sink = Sink::default();
        let queue = Queue::start(sink.clone()).unwrap();
        let (_subscriber, handle) = assemble(LogFormat::Logfmt, LogLevel::Info, queue.clone());
        let stalled = sink.lock();
        queue.make_writer().write_all(b"line\n").unwrap();
        let start = Instant::now();
        handle.flush();
        assert!(start.elapsed() < 3 * FLUSH_LIMIT, "{:?}", start.elapsed());
        drop(stalled);
    }

    #[test]
    fn excerpts_are_bounded_and_cannot_forge_a_line() {
        let long = "ä".repeat(500);
        let cut = format!("{}…", "ä".repeat(Excerpt::MAX_CHARS));
        let exact = "x".repeat(Excerpt::MAX_CHARS);
        #[rustfmt::skip]
        let table: [(&str, &[u8], &str); 7] = [
            ("plain",         b"web",                 "web"),
            ("line feed",     b"a\nb",                r"a\u{a}b"),
            ("terminal",      b"a\x1b[31m",           r"a\u{1b}[31m"),
            ("not UTF-8",     b"a\xffb",              "a\u{fffd}b"),
            ("right to left", "a\u{202e}b".as_bytes(), r"a\u{202e}b"),
            ("long",          long.as_bytes(),        &cut),
            ("just fits",     exact.as_bytes(),       &exact),
        ];
        for (name, text, want) in table {
            assert_eq!(Excerpt(text).to_string(), want, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_an_excerpt_that_is_long_or_has_control_characters(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let shown = Excerpt(&bytes).to_string();
            prop_assert!(!shown.chars().any(char::is_control));
            // The longest escape is \u{10ffff}.
            prop_assert!(shown.chars().count() <= 10 * Excerpt::MAX_CHARS + 1);
        }
    }
}
