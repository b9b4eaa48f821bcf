//! The figures: condensed from the windows, as JSON and as Markdown tables.

use std::fmt::Write as _;

use serde::Serialize;

use super::{Contender, Scenario};
use crate::generate::Window;
use crate::machine::Context;
use crate::statistics::{Estimate, RESAMPLES, median};

/// Seed of the bootstrap, so that the same windows always give the same intervals.
const BOOTSTRAP_SEED: u64 = 0x7067_7765_6972;

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where and when.
    pub context: Context,
    /// pgweir's name and version.
    pub subject: String,
    /// Postgres' version.
    pub postgres: String,
    /// Windows of each contender.
    pub rounds: usize,
    /// A window's length, seconds.
    pub window_seconds: f64,
    /// Load before it, seconds.
    pub warm_up_seconds: f64,
    /// Cores other processes may use on average in a window that counts.
    pub others_at_most: f64,
    /// Seed of the order of windows.
    pub seed: u64,
    /// The loads, in the order in which they ran.
    pub scenarios: Vec<Figures>,
}

/// What pgweir counted from the first round to the last, warm-up included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Transactions that went to a follower.
    pub on_followers: f64,
    /// Reads that went to the primary because no follower was known to be fresh enough.
    pub stale: f64,
    /// Reads that went there because no follower was usable, or had a server connection.
    pub no_follower: f64,
    /// Reads that failed on a follower and ran again on the primary.
    pub rerun: f64,
    /// Transactions that somebody wished to be on the primary.
    pub hint: f64,
    /// Transactions that write.
    pub write: f64,
    /// Reads that went to the primary for any other reason; there should be none.
    pub other: f64,
    /// Texts that were known.
    pub texts_recent: f64,
    /// Texts of which one was known that differs in its literals alone.
    pub texts_fingerprint: f64,
    /// Texts that were parsed.
    pub texts_grammar: f64,
}

impl Counts {
    /// Those at `/metrics`.
    #[must_use]
    pub fn read(metrics: &str) -> Self {
        let of = |name: &str, label: &str| sum(metrics, name, label);
        let route = |reason: &str| of("pgweir_routes_total", &format!("reason=\"{reason}\""));
        let text = |by: &str| of("pgweir_texts_total", &format!("by=\"{by}\""));
        let mut counts = Self {
            on_followers: route("read") + route("read_only"),
            stale: route("stale"),
            no_follower: route("no_follower"),
            rerun: route("rerun"),
            hint: route("hint_primary"),
            write: route("write"),
            other: 0.0,
            texts_recent: text("recent"),
            texts_fingerprint: text("fingerprint"),
            texts_grammar: text("grammar"),
        };
        counts.other = of("pgweir_routes_total", "") - counts.routed();
        counts
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(self, earlier: &Self) -> Self {
        self.with(earlier, |now, before| now - before)
    }

    fn plus(self, other: &Self) -> Self {
        self.with(other, |one, two| one + two)
    }

    fn with(self, other: &Self, join: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            on_followers: join(self.on_followers, other.on_followers),
            stale: join(self.stale, other.stale),
            no_follower: join(self.no_follower, other.no_follower),
            rerun: join(self.rerun, other.rerun),
            hint: join(self.hint, other.hint),
            write: join(self.write, other.write),
            other: join(self.other, other.other),
            texts_recent: join(self.texts_recent, other.texts_recent),
            texts_fingerprint: join(self.texts_fingerprint, other.texts_fingerprint),
            texts_grammar: join(self.texts_grammar, other.texts_grammar),
        }
    }

    fn routed(&self) -> f64 {
        self.on_followers + self.stale + self.no_follower + self.rerun + self.hint + self.write
    }

    /// Reads, wherever they went. One that ran again counts once. With clients that wish for the primary, their writes are among them.
    fn reads(&self) -> f64 {
        self.on_followers + self.stale + self.no_follower + self.hint + self.other
    }

    /// The share of reads that were answered by a follower.
    fn share_on_followers(&self) -> Option<f64> {
        share(self.on_followers - self.rerun, self.reads())
    }

    /// The share of reads that no follower was fresh enough for.
    fn share_stale(&self) -> Option<f64> {
        share(self.stale, self.reads())
    }

    /// The share of texts that had not to be parsed.
    fn share_known(&self) -> Option<f64> {
        let known = self.texts_recent + self.texts_fingerprint;
        share(known, known + self.texts_grammar)
    }
}

fn share(part: f64, of: f64) -> Option<f64> {
    (of > 0.0).then(|| part / of)
}

/// Sums the samples of `name` that have `label` among their labels; empty: all.
fn sum(metrics: &str, name: &str, label: &str) -> f64 {
    let samples = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (found, labels) = series.split_once('{').unwrap_or((series, ""));
        (found == name && labels.contains(label)).then(|| value.parse::<f64>().ok())?
    });
    samples.sum()
}

/// One scenario's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// The scenario's name.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// Each contender's.
    pub sides: Vec<Side>,
    /// Windows dropped because other processes were busy.
    pub dropped: usize,
    /// Windows kept although other processes were busy, patience being at its end.
    pub disturbed: usize,
}

/// One contender's.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// Who.
    #[serde(skip)]
    pub contender: Contender,
    /// The name.
    pub name: &'static str,
    /// The windows, in the order of the rounds.
    pub windows: Vec<Window>,
    /// What it counted.
    pub counts: Counts,
    /// The share of reads that a follower answered.
    pub share_on_followers: Option<f64>,
    /// The share of texts that had not to be parsed.
    pub share_known: Option<f64>,
    /// The CPU time per transaction of the primary, to that without followers.
    pub primary_ratio: Option<Estimate>,
    /// The same of the pooler.
    pub pooler_ratio: Option<Estimate>,
    /// The highest of these that is good enough.
    pub bar: Option<f64>,
}

impl Figures {
    /// Nothing yet.
    #[must_use]
    pub fn new(scenario: &Scenario) -> Self {
        let side = |contender: Contender| Side {
            contender,
            name: contender.name(),
            windows: Vec::new(),
            counts: Counts::default(),
            share_on_followers: None,
            share_known: None,
            primary_ratio: None,
            pooler_ratio: None,
            bar: scenario.bar_of(contender),
        };
        let sides = scenario.contenders.iter().copied().map(side).collect();
        Self { name: scenario.name, about: scenario.about, sides, dropped: 0, disturbed: 0 }
    }

    /// All windows are there: condenses them.
    pub fn conclude(&mut self) {
        let Some((off, others)) = self.sides.split_first_mut() else { return };
        off.conclude();
        for side in others {
            side.conclude();
            side.primary_ratio = side.ratio_to(off, primary_us);
            side.pooler_ratio = side.ratio_to(off, pooler_us);
        }
    }

    fn side(&mut self, contender: Contender) -> Option<&mut Side> {
        self.sides.iter_mut().find(|side| side.contender == contender)
    }

    /// A window.
    pub fn add(&mut self, contender: Contender, window: Window) {
        if let Some(side) = self.side(contender) {
            side.windows.push(window);
        }
    }

    /// What was counted in some rounds.
    pub fn count(&mut self, contender: Contender, counts: Counts) {
        if let Some(side) = self.side(contender) {
            side.counts = side.counts.plus(&counts);
        }
    }

    /// What matters most, in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut out = String::new();
        for side in self.sides.iter().skip(1) {
            // Writing to a String does not fail.
            let _ = write!(
                out,
                "{}: {} of reads on followers, primary {}, pooler {}; ",
                side.name,
                percent(side.share_on_followers),
                ratio(side.primary_ratio),
                ratio(side.pooler_ratio),
            );
        }
        out
    }
}

impl Side {
    fn conclude(&mut self) {
        self.share_on_followers = self.counts.share_on_followers();
        self.share_known = self.counts.share_known();
    }

    /// A figure of this side's to the same of the one without followers, round by round.
    fn ratio_to(&self, off: &Self, figure: fn(&Window) -> Option<f64>) -> Option<Estimate> {
        let pairs = off.windows.iter().zip(&self.windows);
        let ratios: Option<Vec<f64>> = pairs.map(|(off, own)| Some(figure(own)? / figure(off)?)).collect();
        Estimate::of(&ratios?, RESAMPLES, BOOTSTRAP_SEED)
    }
}

fn per_transaction(ns: u64, window: &Window) -> Option<f64> {
    (window.transactions > 0).then(|| float(ns) / 1e3 / float(window.transactions))
}

fn primary_us(window: &Window) -> Option<f64> {
    per_transaction(window.primary_ns, window)
}

fn followers_us(window: &Window) -> Option<f64> {
    per_transaction(window.followers_ns, window)
}

fn pooler_us(window: &Window) -> Option<f64> {
    per_transaction(window.cpu?.total_ns, window)
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

#[expect(clippy::cast_precision_loss, reason = "counts and nanoseconds of a minute, far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

impl Report {
    /// The tables for the README.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let context = &self.context;
        writeln!(
            out,
            "{}, {}, a primary and two streaming followers; {} CPUs ({}), Linux {}; {}. {} windows of {} s of each in random order; \
             windows in which other processes used more than {} cores are dropped and repeated. Each transaction is a SELECT or an \
             UPDATE of one row of {} by primary key. CPU times are µs per transaction: of all processes of the primary, of those of both followers, of pgweir; \
             ratios to `off` are medians with their 95 % intervals.\n",
            self.subject,
            self.postgres,
            context.cpus,
            context.cpu,
            context.kernel,
            context.date,
            self.rounds,
            self.window_seconds,
            self.others_at_most,
            crate::mix::TABLE_ROWS,
        )?;
        for figures in &self.scenarios {
            writeln!(out, "{}: {}.\n", figures.name, figures.about)?;
            writeln!(
                out,
                "| {} | tps | p50, µs | p99, µs | reads on followers | not fresh enough | run twice | primary | ratio | followers | pgweir | ratio | bar | texts known |",
                figures.name
            )?;
            writeln!(out, "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")?;
            for side in &figures.sides {
                writeln!(out, "| {} | {} |", side.name, cells(side).join(" | "))?;
            }
            if figures.dropped + figures.disturbed > 0 {
                writeln!(out, "\n{} windows dropped, {} disturbed.", figures.dropped, figures.disturbed)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

fn cells(side: &Side) -> [String; 13] {
    let middle = |figure: fn(&Window) -> Option<f64>, digits| {
        let values: Option<Vec<f64>> = side.windows.iter().map(figure).collect();
        number(values.and_then(|values| median(&values)), digits)
    };
    let bar = side.bar.zip(side.pooler_ratio).map_or("-".to_owned(), |(bar, ratio)| {
        format!("{bar:.2} {}", if ratio.median <= bar { "met" } else { "missed" })
    });
    [
        middle(tps, 0),
        middle(p50_us, 0),
        middle(p99_us, 0),
        percent(side.share_on_followers),
        percent(side.counts.share_stale()),
        number(side.share_on_followers.map(|_| side.counts.rerun), 0),
        middle(primary_us, 2),
        ratio(side.primary_ratio),
        middle(followers_us, 2),
        middle(pooler_us, 2),
        ratio(side.pooler_ratio),
        bar,
        percent(side.share_known),
    ]
}

fn ratio(estimate: Option<Estimate>) -> String {
    estimate.map_or("-".to_owned(), |ratio| format!("**{:.3}** ({:.3} to {:.3})", ratio.median, ratio.low, ratio.high))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::followers::SCENARIOS;
    use crate::machine::CpuTime;

    const METRICS: &str = "# TYPE pgweir_routes_total counter\n\
        pgweir_routes_total{database=\"app\",reason=\"read\"} 80\n\
        pgweir_routes_total{database=\"app\",reason=\"read_only\"} 0\n\
        pgweir_routes_total{database=\"app\",reason=\"stale\"} 15\n\
        pgweir_routes_total{database=\"app\",reason=\"rerun\"} 5\n\
        pgweir_routes_total{database=\"app\",reason=\"write\"} 10\n\
        pgweir_routes_total{database=\"app\",reason=\"hint\"} 0\n\
        pgweir_routes_total{database=\"app\",reason=\"hint_primary\"} 2\n\
        pgweir_routes_total{database=\"app\",reason=\"function\"} 3\n\
        pgweir_texts_total{by=\"fingerprint\"} 99\n\
        pgweir_texts_total{by=\"grammar\"} 1\n";

    fn window(transactions: u64, pooler: u64, primary_ns: u64) -> Window {
        let cpu = Some(CpuTime { total_ns: pooler, ..CpuTime::default() });
        Window { transactions, seconds: 1.0, cpu, primary_ns, p50_ns: 1, p99_ns: 2, ..Window::default() }
    }

    #[test]
    fn shares_are_of_reads_and_of_texts() {
        let counts = Counts::read(METRICS);
        assert_eq!((counts.other, counts.write, counts.hint), (3.0, 10.0, 2.0));
        // 80 began on a follower, of which 5 ran again; 15, 2 and 3 stayed.
        assert_eq!(counts.share_on_followers(), Some(75.0 / 100.0));
        assert_eq!(counts.share_stale(), Some(15.0 / 100.0));
        assert_eq!(counts.share_known(), Some(0.99));
        let none = counts.since(&counts);
        assert_eq!((none.share_stale(), none.share_known()), (None, None));
        assert_eq!(none.plus(&counts), counts);
    }

    #[test]
    fn ratios_are_to_the_one_without_followers_round_by_round() {
        let mut figures = Figures::new(&SCENARIOS[0]);
        for (pooler, factor) in [(1000, 2), (3000, 1)] {
            figures.add(Contender::Off, window(10, pooler, 5000));
            figures.add(Contender::Stays, window(10, pooler * factor, 5000));
            figures.add(Contender::Eventual, window(10, pooler, 1000));
            figures.add(Contender::Pool, window(10, pooler, 0));
        }
        figures.conclude();
        let of = |contender: Contender| {
            let side = figures.sides.iter().find(|side| side.contender == contender).unwrap();
            [side.primary_ratio, side.pooler_ratio].map(|ratio| ratio.map(|ratio| ratio.median))
        };
        assert_eq!(of(Contender::Off), [None, None]);
        assert_eq!(of(Contender::Stays), [Some(1.0), Some(1.5)]);
        assert_eq!(of(Contender::Eventual), [Some(0.2), Some(1.0)]);
        assert_eq!(of(Contender::Pool), [Some(0.0), Some(1.0)], "a primary that did nothing");
    }

    #[test]
    fn bars_are_held_against_those_of_whom_they_are_asked() {
        let held = |name: &str| {
            let scenario = SCENARIOS.iter().find(|scenario| scenario.name == name).unwrap();
            let sides = Figures::new(scenario).sides;
            sides.iter().filter_map(|side| Some((side.contender, side.bar?))).collect::<Vec<_>>()
        };
        assert_eq!(held("mix-prepared"), [(Contender::Stays, 1.03), (Contender::Eventual, 1.03)]);
        assert_eq!(held("read-literals"), [(Contender::Stays, 1.10), (Contender::Pool, 1.10)]);
        assert_eq!(held("literal-ridden"), []);
    }

    #[test]
    fn the_first_contender_is_what_the_others_are_compared_with() {
        for scenario in &SCENARIOS {
            assert_eq!(scenario.contenders.first(), Some(&Contender::Off), "{}", scenario.name);
        }
    }

    #[test]
    fn every_line_of_a_table_has_as_many_cells_as_its_head() {
        let scenarios = SCENARIOS.iter().map(|scenario| {
            let mut figures = Figures::new(scenario);
            for contender in scenario.contenders.iter().copied() {
                figures.add(contender, window(10, 1000, 5000));
                figures.count(contender, Counts::read(METRICS));
            }
            figures.conclude();
            figures
        });
        let report = Report {
            context: Context::read(),
            subject: "pgweir".to_owned(),
            postgres: "Postgres".to_owned(),
            rounds: 1,
            window_seconds: 1.0,
            warm_up_seconds: 0.0,
            others_at_most: 0.25,
            seed: 1,
            scenarios: scenarios.collect(),
        };
        let table = report.markdown();
        let lines: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
        let want: usize = SCENARIOS.iter().map(|scenario| 2 + scenario.contenders.len()).sum();
        assert_eq!(lines.len(), want, "{table}");
        for line in lines {
            assert_eq!(line.matches('|').count(), 15, "{line}");
        }
    }
}
