//! What the demo shows.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::Duration;

use super::clients::Kind;
use super::stage::{DATABASE, FOLLOWER_DATABASE, POOL_SIZE, Seen, Stage};
use super::tally::{Tally, quantile};

/// Status lines between two headings, where lines scroll.
const HEADING_EVERY: u32 = 20;
/// Cursor to the line's start, two lines up, and clear what is below.
const BACK: &str = "\r\x1b[2A\x1b[J";

/// Standard output: a block that is redrawn on a terminal, lines elsewhere.
pub(super) struct Screen {
    terminal: bool,
    /// Statuses shown since the last other text.
    shown: u32,
}

/// One second of the demo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Status {
    /// Since the first client.
    pub(super) elapsed: Duration,
    /// Clients connected.
    pub(super) clients: u32,
    /// Server connections on the primary.
    pub(super) primary: u32,
    /// Server connections on the follower.
    pub(super) follower: u32,
    /// Clients that wait for a server connection.
    pub(super) waiting: u64,
    /// Waits per second.
    pub(super) waits_per_s: u64,
    /// Transactions per second.
    pub(super) tps: u64,
    /// Median latency, microseconds.
    pub(super) p50_us: u64,
    /// What 99 of 100 did not exceed, microseconds.
    pub(super) p99_us: u64,
    /// Faults so far.
    pub(super) faults: u64,
}

impl Screen {
    /// A screen that redraws only on a `terminal`.
    pub(super) fn new(terminal: bool) -> Self {
        Self { terminal, shown: 0 }
    }

    /// Shows text below everything else. A reader that has gone away is no reason to fail.
    pub(super) fn say(&mut self, text: &str) {
        self.shown = 0;
        write(text);
    }

    /// Shows the latest second.
    pub(super) fn status(&mut self, status: &Status) {
        let redraws = self.terminal && self.shown > 0;
        let heading = if self.terminal { self.shown == 0 } else { self.shown.is_multiple_of(HEADING_EVERY) };
        let mut text = String::new();
        if redraws {
            text.push_str(BACK);
        }
        if redraws || heading {
            text.push_str(HEADING);
        }
        text.push_str(&line(status));
        self.shown = self.shown.saturating_add(1);
        write(&text);
    }
}

fn write(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

const HEADING: &str = "  time  clients   servers  waiting  waits/s      tps       p50       p99  faults\n";

fn line(status: &Status) -> String {
    let Status { elapsed, clients, primary, follower, waiting, waits_per_s, tps, p50_us, p99_us, faults } = status;
    let (seconds, servers) = (elapsed.as_secs(), format!("{primary}+{follower}"));
    let (p50, p99) = (ms(*p50_us), ms(*p99_us));
    format!(
        "{seconds:>4} s {clients:>8} {servers:>9} {waiting:>8} {waits_per_s:>8} {tps:>8} {p50:>9} {p99:>9} {faults:>7}\n"
    )
}

/// Microseconds as milliseconds with two digits.
fn ms(us: u64) -> String {
    format!("{}.{:02} ms", us / 1000, us % 1000 / 10)
}

/// What is there to try, before the first client.
pub(super) fn banner(stage: &Stage, length: Option<Duration>) -> String {
    let clients = Kind::total();
    let until = length.map_or_else(|| "until Ctrl-C".to_owned(), |length| format!("for {} s", length.as_secs()));
    let (version, (primary, follower)) = (stage.version(), stage.server_ports());
    let mut text = format!(
        "\n{clients} clients on pools of {POOL_SIZE} server connections, {until} (DEMO_SECONDS; Ctrl-C ends it)\n\n\
         \x20 primary   PostgreSQL {version} on 127.0.0.1:{primary}, as database {DATABASE}\n\
         \x20 follower  PostgreSQL {version} on 127.0.0.1:{follower}, as database {FOLLOWER_DATABASE}\n\
         \x20 try       psql {}\n",
        stage.url()
    );
    if let Some(port) = stage.http_port() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  http      http://127.0.0.1:{port}/  (/metrics, /healthz, /readyz)");
    }
    for kind in Kind::ALL {
        let _ = writeln!(text, "  {:>4}      {kind}", kind.clients());
    }
    text.push('\n');
    text
}

/// What was done, what was seen, and what was wrong.
pub(super) fn summary(tally: &Tally, seen: &Seen, lasted: Duration) -> String {
    let total: u64 = tally.done.iter().sum();
    let tps = super::per_second(total, lasted);
    let quantiles = [0.5, 0.99].map(|part| ms(quantile(&tally.latency, part)));
    let [p50, p99] = quantiles;
    let max = ms(if total > 0 { tally.latency.max() } else { 0 });
    let mut text = format!(
        "\n{total} transactions in {:.1} s: {tps} per second, p50 {p50}, p99 {p99}, longest {max}\n",
        lasted.as_secs_f64()
    );
    for (kind, done) in Kind::ALL.iter().zip(tally.done) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {kind:<24} {done:>9}");
    }
    let Seen { primary, follower, samples, waits, transfers } = seen;
    let _ = writeln!(
        text,
        "clients: {} at once at most, {} connections in all\n\
         server connections: {primary} at once at most on the primary, {follower} on the follower, \
         each pool's size is {POOL_SIZE} ({samples} counts); {waits} waits for one\n\
         transfers: {} acknowledged, {transfers} found",
        tally.most_live, tally.connects, tally.transfers
    );
    for fault in &tally.faults {
        let _ = writeln!(text, "WRONG: {fault}");
    }
    let kept = u64::try_from(tally.faults.len()).unwrap_or(u64::MAX);
    if tally.faults_total > kept {
        let _ = writeln!(text, "WRONG: {} more", tally.faults_total - kept);
    }
    text.push_str(if tally.faults_total == 0 {
        "all well: every answer was its asker's, every pool kept to its size, nothing is left behind\n"
    } else {
        "something was wrong, see above\n"
    });
    text
}

#[cfg(test)]
mod tests {
    use super::super::tally::Fault;
    use super::*;

    #[test]
    fn a_status_stands_under_its_heading_and_fits_a_terminal() {
        let status = Status {
            elapsed: Duration::from_secs(12),
            clients: 300,
            primary: 8,
            follower: 8,
            waiting: 42,
            waits_per_s: 3211,
            tps: 9123,
            p50_us: 1234,
            p99_us: 14_809,
            faults: 0,
        };
        let line = line(&status);
        assert_eq!(line.len(), HEADING.len(), "{line}");
        assert!(HEADING.len() <= 81, "80 columns and the line feed");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["12", "s", "300", "8+8", "42", "3211", "9123", "1.23", "ms", "14.80", "ms", "0"]);
    }

    #[test]
    fn a_summary_is_all_well_only_without_faults() {
        let mut tally = Tally::new().unwrap();
        let seen = Seen::default();
        let text = summary(&tally, &seen, Duration::from_secs(1));
        assert!(text.contains("all well") && !text.contains("WRONG"), "{text}");
        for count in 0..30 {
            tally.fault(Fault::ClientsLate { count });
        }
        let text = summary(&tally, &seen, Duration::from_secs(1));
        assert!(!text.contains("all well") && text.contains("WRONG: 10 more"), "{text}");
        assert_eq!(text.matches("WRONG").count(), 21, "{text}");
    }
}
