//! The figures of a run: condensed from the windows, as JSON and as a Markdown table.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::generate::Window;
use crate::machine::Context;
use crate::rows::{Measure, Percentile, Row};
use crate::statistics::{Estimate, RESAMPLES, median};
use crate::trial::{Side, Trial};

/// Pairs of quiet windows that a verdict wants.
const PAIRS_AT_LEAST: usize = 12;

/// The ratio of the times that may not be above the baseline's.
const LATENCY_BAR: f64 = 1.0;

/// Seed of the bootstrap, so that the same windows always give the same intervals.
const BOOTSTRAP_SEED: u64 = 0x7067_7765_6972;

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where and when.
    pub context: Context,
    /// How.
    pub method: Method,
    /// The rows, in the order they ran.
    pub rows: Vec<RowReport>,
}

/// What was run, and with which settings.
#[derive(Clone, Debug, Serialize)]
pub struct Method {
    /// Name and version of what the subject is compared with.
    pub baseline: String,
    /// Name and version of the pooler the ratios are about.
    pub subject: String,
    /// Postgres' version.
    pub postgres: String,
    /// What counted system calls; `None`: nothing did.
    pub syscalls: Option<&'static str>,
    /// Pairs of windows per row.
    pub pairs: usize,
    /// A window's length, seconds.
    pub window_seconds: f64,
    /// Load before it, seconds.
    pub warm_up_seconds: f64,
    /// Cores other processes may use on average in a window that counts.
    pub others_at_most: f64,
    /// Seed of the order of windows.
    pub seed: u64,
}

/// One row's figures.
#[derive(Clone, Debug, Serialize)]
pub struct RowReport {
    /// The row's name.
    pub name: String,
    /// Client connections.
    pub clients: usize,
    /// Server connections at most.
    pub pool_size: u32,
    /// The bar: of the CPU ratio, or of KiB per client.
    pub bar: Option<f64>,
    /// Pairs of windows in which others were quiet: only they count.
    pub pairs: usize,
    /// Which time of a transaction may not be above the baseline's.
    #[serde(skip)]
    pub latency: Option<Percentile>,
    /// CPU time per transaction, subject to baseline.
    pub cpu_ratio: Option<Estimate>,
    /// Transactions per second, subject to baseline.
    pub tps_ratio: Option<Estimate>,
    /// Median time of a transaction, subject to baseline.
    pub p50_ratio: Option<Estimate>,
    /// 99th percentile, subject to baseline.
    pub p99_ratio: Option<Estimate>,
    /// What the subject is compared with.
    pub baseline: SideReport,
    /// The pooler the ratios are about.
    pub subject: SideReport,
    /// Straight to Postgres.
    pub direct: SideReport,
    /// The windows themselves.
    pub trial: Trial,
}

/// Medians over the windows of one side; `None` where there was nothing to measure.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct SideReport {
    /// The pooler's CPU time per transaction, microseconds.
    pub cpu_us: Option<f64>,
    /// The part of it in user mode, microseconds: divided by the kernel's ticks over all windows.
    pub user_us: Option<f64>,
    /// Transactions per second.
    pub tps: Option<f64>,
    /// Median time of a transaction, microseconds.
    pub p50_us: Option<f64>,
    /// 99th percentile, microseconds.
    pub p99_us: Option<f64>,
    /// The pooler's system calls per transaction.
    pub syscalls: Option<f64>,
    /// Anonymous memory per idle client, KiB.
    pub kib_per_client: Option<f64>,
}

impl RowReport {
    /// Condenses a row's windows: those in which others used no more than so many cores.
    #[must_use]
    pub fn new(row: &Row, trial: Trial, others_at_most: f64) -> Self {
        let is_quiet = |(baseline, subject): &(&Window, &Window)| {
            baseline.others <= others_at_most && subject.others <= others_at_most
        };
        let pairs: Vec<_> = trial.baseline.windows.iter().zip(&trial.subject.windows).filter(is_quiet).collect();
        let compare = |figure: fn(&Window) -> Option<f64>| {
            let ratios: Option<Vec<f64>> =
                pairs.iter().map(|(baseline, subject)| Some(figure(subject)? / figure(baseline)?)).collect();
            Estimate::of(&ratios?, RESAMPLES, BOOTSTRAP_SEED)
        };
        Self {
            name: row.name.clone(),
            clients: row.clients,
            pool_size: row.pool_size,
            bar: row.bar,
            pairs: pairs.len(),
            latency: row.latency,
            cpu_ratio: compare(cpu_us),
            tps_ratio: compare(tps),
            p50_ratio: compare(p50_us),
            p99_ratio: compare(p99_us),
            baseline: SideReport::new(&trial.baseline, others_at_most),
            subject: SideReport::new(&trial.subject, others_at_most),
            direct: SideReport::new(&trial.direct, others_at_most),
            trial,
        }
    }

    /// What the bar of the CPU ratio, or of the memory, comes to.
    fn verdict(&self) -> String {
        match (self.bar, self.cpu_ratio, self.subject.kib_per_client) {
            (Some(bar), Some(ratio), _) => self.verdict_of(ratio, bar),
            (Some(bar), None, Some(kib)) => format!("{bar:.2} {}", met(kib <= bar)),
            (Some(bar), None, None) => format!("{bar:.2}"),
            (None, ..) => "-".to_owned(),
        }
    }

    /// Whether a ratio meets its bar; `~` if the interval does not tell.
    fn verdict_of(&self, ratio: Estimate, bar: f64) -> String {
        if self.pairs < PAIRS_AT_LEAST {
            return format!("{bar:.2}, too few pairs");
        }
        let crosses = ratio.low <= bar && bar < ratio.high;
        format!("{bar:.2} {}{}", met(ratio.median <= bar), if crosses { " ~" } else { "" })
    }

    /// A ratio of times, with its verdict where it has a bar.
    fn latency(&self, percentile: Percentile, ratio: Option<Estimate>) -> String {
        let told = number(ratio.map(|ratio| ratio.median), 2);
        match ratio {
            Some(ratio) if self.latency == Some(percentile) => {
                format!("{told}, {}", self.verdict_of(ratio, LATENCY_BAR))
            }
            _ => told,
        }
    }
}

impl SideReport {
    fn new(side: &Side, others_at_most: f64) -> Self {
        let windows: Vec<_> = side.windows.iter().filter(|window| window.others <= others_at_most).collect();
        let middle = |figure: fn(&Window) -> Option<f64>| {
            let values: Option<Vec<f64>> = windows.iter().map(|window| figure(window)).collect();
            median(&values?)
        };
        let cpu_us = middle(cpu_us);
        Self {
            cpu_us,
            user_us: cpu_us.zip(user_share(&windows)).map(|(all, share)| all * share),
            tps: middle(tps),
            p50_us: middle(p50_us),
            p99_us: middle(p99_us),
            syscalls: side.syscalls,
            kib_per_client: median(&side.kib_per_client),
        }
    }
}

fn cpu_us(window: &Window) -> Option<f64> {
    let used = Duration::from_nanos(window.cpu?.total_ns);
    (window.transactions > 0).then(|| used.as_secs_f64() * 1e6 / float(window.transactions))
}

fn tps(window: &Window) -> Option<f64> {
    (window.seconds > 0.0).then(|| float(window.transactions) / window.seconds)
}

fn p50_us(window: &Window) -> Option<f64> {
    (window.p50_ns > 0).then(|| float(window.p50_ns) / 1e3)
}

fn p99_us(window: &Window) -> Option<f64> {
    (window.p99_ns > 0).then(|| float(window.p99_ns) / 1e3)
}

/// The share of user mode in all CPU time, over all windows together: one window has too few ticks.
fn user_share(windows: &[&Window]) -> Option<f64> {
    let cpu = || windows.iter().filter_map(|window| window.cpu);
    let user: u64 = cpu().map(|cpu| cpu.user_ticks).sum();
    let system: u64 = cpu().map(|cpu| cpu.system_ticks).sum();
    (user + system > 0).then(|| float(user) / float(user + system))
}

#[expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of a minute, far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

impl Report {
    /// The tables for the README: CPU with its bars, then rate and latency, then memory.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.write_head(&mut out);
        let _ = self.write_cpu(&mut out);
        let _ = self.write_speed(&mut out);
        let _ = self.write_memory(&mut out);
        out
    }

    fn write_head(&self, out: &mut String) -> std::fmt::Result {
        let (method, context) = (&self.method, &self.context);
        writeln!(
            out,
            "{} against {}, {}; {} CPUs ({}), Linux {}; {}. Per row {} pairs of {} s windows in random order; windows in which other processes used more than {} cores are dropped and repeated. `~`: the interval crosses the bar.\n",
            method.subject,
            method.baseline,
            method.postgres,
            context.cpus,
            context.cpu,
            context.kernel,
            context.date,
            method.pairs,
            method.window_seconds,
            method.others_at_most,
        )
    }

    fn write_cpu(&self, out: &mut String) -> std::fmt::Result {
        let (subject, baseline) = (&self.method.subject, &self.method.baseline);
        let rows: Vec<_> = self.rows.iter().filter(|row| row.cpu_ratio.is_some()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let counted = self.method.syscalls.unwrap_or("not counted");
        writeln!(
            out,
            "Pooler CPU time per transaction, \u{b5}s (user + system); system calls per transaction ({counted}).\n"
        )?;
        writeln!(
            out,
            "| row | pool | {baseline} | {subject} | ratio, 95 % interval | bar | calls {baseline} | calls {subject} | pairs | dropped |"
        )?;
        writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for row in rows {
            let ratio = row.cpu_ratio.map_or_else(String::new, |ratio| {
                format!("**{:.3}** ({:.3} to {:.3})", ratio.median, ratio.low, ratio.high)
            });
            writeln!(
                out,
                "| {} | {} | {} | {} | {ratio} | {} | {} | {} | {} | {} |",
                row.name,
                row.pool_size,
                split(row.baseline),
                split(row.subject),
                row.verdict(),
                number(row.baseline.syscalls, 2),
                number(row.subject.syscalls, 2),
                row.pairs,
                row.trial.dropped + row.trial.disturbed,
            )?;
        }
        writeln!(out)
    }

    fn write_speed(&self, out: &mut String) -> std::fmt::Result {
        let (subject, baseline) = (&self.method.subject, &self.method.baseline);
        let rows: Vec<_> = self.rows.iter().filter(|row| row.tps_ratio.is_some()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "Transactions per second; p50 and p99 of a transaction, \u{b5}s; ratios of the medians of pairs.\n"
        )?;
        writeln!(
            out,
            "| row | tps direct | {baseline} | {subject} | ratio | p50 direct | {baseline} | {subject} | ratio | p99 direct | {baseline} | {subject} | ratio |"
        )?;
        writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
        for row in rows {
            let middle = |ratio: Option<Estimate>| number(ratio.map(|ratio| ratio.median), 2);
            let cells = [
                number(row.direct.tps, 0),
                number(row.baseline.tps, 0),
                number(row.subject.tps, 0),
                middle(row.tps_ratio),
                number(row.direct.p50_us, 0),
                number(row.baseline.p50_us, 0),
                number(row.subject.p50_us, 0),
                row.latency(Percentile::P50, row.p50_ratio),
                number(row.direct.p99_us, 0),
                number(row.baseline.p99_us, 0),
                number(row.subject.p99_us, 0),
                row.latency(Percentile::P99, row.p99_ratio),
            ];
            writeln!(out, "| {} | {} |", row.name, cells.join(" | "))?;
        }
        writeln!(out)
    }

    fn write_memory(&self, out: &mut String) -> std::fmt::Result {
        let (subject, baseline) = (&self.method.subject, &self.method.baseline);
        let rows: Vec<_> = self.rows.iter().filter(|row| row.subject.kib_per_client.is_some()).collect();
        if rows.is_empty() {
            return Ok(());
        }
        writeln!(
            out,
            "Anonymous memory per client, KiB, idle after a query each: in turn (idle), or all at the same moment (burst).\n"
        )?;
        writeln!(out, "| row | clients | {baseline} | {subject} | bar |\n|---|--:|--:|--:|--:|")?;
        for row in rows {
            let (left, right) = (number(row.baseline.kib_per_client, 2), number(row.subject.kib_per_client, 2));
            writeln!(out, "| {} | {} | {left} | {right} | {} |", row.name, row.clients, row.verdict())?;
        }
        writeln!(out)
    }
}

impl Report {
    /// A line on one row, for the terminal.
    #[must_use]
    pub fn line(row: &RowReport, measure: Measure) -> String {
        match (measure, row.cpu_ratio) {
            (Measure::Cpu(_), Some(ratio)) => format!(
                "{} against {} \u{b5}s, ratio {:.3} ({:.3} to {:.3}), bar {}",
                split(row.subject),
                split(row.baseline),
                ratio.median,
                ratio.low,
                ratio.high,
                row.verdict(),
            ),
            _ => format!(
                "{} against {} KiB per client, bar {}",
                number(row.subject.kib_per_client, 2),
                number(row.baseline.kib_per_client, 2),
                row.verdict(),
            ),
        }
    }
}

fn split(side: SideReport) -> String {
    match (side.cpu_us, side.user_us) {
        (Some(all), Some(user)) => format!("{all:.2} ({user:.2} + {:.2})", all - user),
        (all, _) => number(all, 2),
    }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "n/a".to_owned(), |value| format!("{value:.digits$}"))
}

const fn met(is_met: bool) -> &'static str {
    if is_met { "met" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::CpuTime;
    use crate::rows::Queries;
    use crate::workload::Workload;

    fn window(transactions: u64, total_ns: u64) -> Window {
        let cpu = Some(CpuTime { total_ns, user_ticks: 1, system_ticks: 3 });
        Window { transactions, seconds: 2.0, cpu, p50_ns: 1000, p99_ns: 5000, ..Window::default() }
    }

    fn row() -> Row {
        let measure = Measure::Cpu(Workload::Simple);
        Row { name: "r".to_owned(), measure, clients: 16, pool_size: 10, tls: false, bar: Some(0.9), latency: None }
    }

    /// Pairs of 0.5, 0.8 and 0.9: the median of ratios, not the ratio of medians, which would be 1.6/2.
    #[test]
    fn the_ratio_is_the_median_over_pairs() {
        let mut trial = Trial::default();
        trial.baseline.windows = vec![window(1000, 2_000_000), window(1000, 4_000_000), window(1000, 1_000_000)];
        trial.subject.windows = vec![window(1000, 1_000_000), window(2000, 6_400_000), window(500, 450_000)];
        let report = RowReport::new(&row(), trial, 0.5);
        let ratio = report.cpu_ratio.unwrap();
        assert!((ratio.median - 0.8).abs() < 1e-9, "{ratio:?}");
        assert!((ratio.low - 0.5).abs() < 1e-9 && (ratio.high - 0.9).abs() < 1e-9, "{ratio:?}");
        assert!((report.baseline.cpu_us.unwrap() - 2.0).abs() < 1e-9);
        assert!((report.baseline.user_us.unwrap() - 0.5).abs() < 1e-9);
        assert!((report.subject.tps.unwrap() - 500.0).abs() < 1e-9);
        assert_eq!(report.verdict(), "0.90, too few pairs");
    }

    #[test]
    fn a_window_without_transactions_gives_no_figure_instead_of_an_infinite_one() {
        let mut trial = Trial::default();
        trial.baseline.windows = vec![window(0, 1_000_000)];
        trial.subject.windows = vec![window(10, 1_000_000)];
        let report = RowReport::new(&row(), trial, 0.5);
        assert_eq!(report.cpu_ratio, None);
        assert_eq!(report.verdict(), "0.90");
    }

    #[test]
    fn a_pair_with_a_disturbed_window_counts_for_nothing() {
        let mut trial = Trial::default();
        trial.baseline.windows = vec![window(1000, 2_000_000); PAIRS_AT_LEAST + 1];
        trial.subject.windows = vec![window(1000, 1_600_000); PAIRS_AT_LEAST + 1];
        trial.subject.windows[3] = Window { others: 0.6, ..window(1000, 9_000_000) };
        let row = Row { latency: Some(Percentile::P99), ..row() };
        let report = RowReport::new(&row, trial, 0.5);
        assert_eq!(report.pairs, PAIRS_AT_LEAST);
        let ratio = report.cpu_ratio.unwrap();
        assert!((ratio.low - 0.8).abs() < 1e-9 && (ratio.high - 0.8).abs() < 1e-9, "{ratio:?}");
        assert_eq!(report.verdict(), "0.90 met");
        assert_eq!(report.verdict_of(Estimate { median: 0.89, low: 0.8, high: 0.92 }, 0.9), "0.90 met ~");
        assert_eq!(report.verdict_of(Estimate { median: 0.91, low: 0.8, high: 0.92 }, 0.9), "0.90 missed ~");
        assert_eq!(report.latency(Percentile::P99, report.p99_ratio), "1.00, 1.00 met");
        assert_eq!(report.latency(Percentile::P50, report.p50_ratio), "1.00");
    }

    #[test]
    fn every_line_of_a_table_has_as_many_cells_as_its_head() {
        let mut trial = Trial::default();
        trial.baseline.windows = vec![window(1000, 2_000_000); PAIRS_AT_LEAST];
        trial.subject.windows = vec![window(1000, 1_900_000); PAIRS_AT_LEAST];
        let mut memory = Trial::default();
        memory.baseline.kib_per_client = vec![1.0];
        memory.subject.kib_per_client = vec![1.2];
        let idle = Row { name: "idle".to_owned(), measure: Measure::Memory(Queries::InTurn), bar: Some(1.1), ..row() };
        let report = Report {
            context: Context::read(),
            method: Method {
                baseline: "PgBouncer 1".to_owned(),
                subject: "pgweir 1".to_owned(),
                postgres: "Postgres 1".to_owned(),
                syscalls: None,
                pairs: 1,
                window_seconds: 2.0,
                warm_up_seconds: 0.5,
                others_at_most: 0.5,
                seed: 1,
            },
            rows: vec![RowReport::new(&row(), trial, 0.5), RowReport::new(&idle, memory, 0.5)],
        };
        let text = report.markdown();
        for table in text.split("\n\n").filter(|part| part.starts_with('|')) {
            let cells: Vec<_> = table.lines().map(|line| line.matches('|').count()).collect();
            assert!(cells.len() >= 3 && cells.iter().all(|count| Some(count) == cells.first()), "{table}");
        }
        assert!(text.contains("| r | 10 | 2.00 (0.50 + 1.50) |"), "{text}");
        assert!(text.contains("0.950") && text.contains("0.90 missed"), "{text}");
        assert!(text.contains("| idle | 16 | 1.00 | 1.20 | 1.10 missed |"), "{text}");
    }
}
