//! The table of rows: what is measured, with how many clients over how large a pool, and the bar it must meet.

use crate::workload::Workload;

/// Clients of the rows that measure memory.
const IDLE_CLIENTS: usize = 5000;

/// What a row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// CPU time per transaction, rate and latency.
    Cpu(Workload),
    /// Anonymous memory per client that is logged in and idle after one query.
    Memory(Queries),
}

/// How the clients of a memory row make their one query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queries {
    /// Each before the next client logs in.
    InTurn,
    /// All at the same moment, so that most of them wait for a server connection.
    AtOnce,
}

/// One row of the benchmark.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its name on the command line and in the tables.
    pub name: String,
    /// What it measures.
    pub measure: Measure,
    /// Client connections.
    pub clients: usize,
    /// Server connections the pooler may use.
    pub pool_size: u32,
    /// Whether clients use TLS 1.3.
    pub tls: bool,
    /// The highest ratio (CPU) or KiB per client (memory) that is good enough. `None`: only reported.
    pub bar: Option<f64>,
    /// The time of a transaction that may not be above the baseline's.
    pub latency: Option<Percentile>,
}

/// A percentile of the times of a window's transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Percentile {
    /// The median.
    P50,
    /// The 99th.
    P99,
}

impl Row {
    /// Whether it makes sense without a pooler: with a thousand clients Postgres would measure its own
    /// process switches, memory is about the pooler, and TLS is not between it and Postgres.
    #[must_use]
    pub fn runs_direct(&self) -> bool {
        !self.tls && self.clients <= 64 && matches!(self.measure, Measure::Cpu(_))
    }
}

/// Every row, in the order of the table.
#[must_use]
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    for (mode, workload) in
        [("simple", Workload::Simple), ("extended", Workload::Extended), ("prepared", Workload::Prepared)]
    {
        for (clients, pool_size) in [(1, 10), (16, 10), (16, 20), (64, 10), (1000, 20)] {
            let suffix = if (clients, pool_size) == (16, 20) { "-pool20" } else { "" };
            rows.push(Row {
                name: format!("select1-{mode}-{clients}{suffix}"),
                measure: Measure::Cpu(workload),
                clients,
                pool_size,
                tls: false,
                bar: select_bar(workload, clients),
                latency: latency_bar(clients),
            });
        }
    }
    let others = [
        ("begin-16", Workload::Begin, 16, Some(0.95)),
        ("result-1mb-4", Workload::Megabyte, 4, Some(0.65)),
        ("reconnect-4", Workload::Reconnect, 4, Some(1.0)),
        ("tls-select1-simple-16", Workload::Simple, 16, Some(1.0)),
        ("tls-reconnect-4", Workload::Reconnect, 4, Some(1.0)),
    ];
    rows.extend(others.map(|(name, workload, clients, bar)| Row {
        name: name.to_owned(),
        measure: Measure::Cpu(workload),
        clients,
        pool_size: 10,
        tls: name.starts_with("tls-"),
        bar,
        latency: None,
    }));
    let memory = [("idle", Queries::InTurn, Some(1.1)), ("burst", Queries::AtOnce, None)];
    rows.extend(memory.map(|(name, queries, bar)| Row {
        name: format!("{name}-{IDLE_CLIENTS}"),
        measure: Measure::Memory(queries),
        clients: IDLE_CLIENTS,
        pool_size: 20,
        tls: false,
        bar,
        latency: None,
    }));
    rows
}

/// The rows for what it costs to look at simple queries: texts that were seen lately, texts that never were (short ones, and such with
/// up to 50 keys and comments), and those between which a transaction begins and ends. None mentions what a session would keep.
#[must_use]
pub fn inspection() -> Vec<Row> {
    let rows = [
        ("inspect-select1-1", Workload::Simple, 1),
        ("inspect-select1-16", Workload::Simple, 16),
        ("inspect-select1-64", Workload::Simple, 64),
        ("inspect-literals-16", Workload::ReadLiterals, 16),
        ("inspect-anew-16", Workload::Anew, 16),
        ("inspect-begin-16", Workload::Begin, 16),
    ];
    let row = |(name, workload, clients): (&str, Workload, usize)| Row {
        name: name.to_owned(),
        measure: Measure::Cpu(workload),
        clients,
        pool_size: 10,
        tls: false,
        bar: Some(1.05),
        latency: None,
    };
    rows.map(row).to_vec()
}

/// The bars of issue 2's table for the select-1 rows.
fn select_bar(workload: Workload, clients: usize) -> Option<f64> {
    match (workload, clients) {
        (Workload::Prepared, 16 | 64) => Some(0.85),
        (_, 16) => Some(1.0),
        (_, 64 | 1000) => Some(0.88),
        _ => None,
    }
}

/// What a lone client waits for, and what the slowest of many do.
const fn latency_bar(clients: usize) -> Option<Percentile> {
    match clients {
        1 => Some(Percentile::P50),
        64 => Some(Percentile::P99),
        _ => None,
    }
}

/// Those of `rows` whose names are asked for, in the table's order; all of them if none is. A name ending in `*` asks
/// for every row that begins with what stands before it.
///
/// # Errors
///
/// The first name no row answers to.
pub fn select(rows: Vec<Row>, wanted: &[String]) -> Result<Vec<Row>, String> {
    choose(rows, |row| &row.name, wanted)
}

/// The same of any table.
///
/// # Errors
///
/// As [`select`].
pub fn choose<T>(rows: Vec<T>, name: impl Fn(&T) -> &str, wanted: &[String]) -> Result<Vec<T>, String> {
    if wanted.is_empty() {
        return Ok(rows);
    }
    let matches = |row: &T, wish: &str| match wish.strip_suffix('*') {
        Some(beginning) => name(row).starts_with(beginning),
        None => name(row) == wish,
    };
    if let Some(unknown) = wanted.iter().find(|wish| !rows.iter().any(|row| matches(row, wish))) {
        return Err(unknown.clone());
    }
    Ok(rows.into_iter().filter(|row| wanted.iter().any(|wish| matches(row, wish))).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(wanted: &[&str]) -> Result<Vec<String>, String> {
        let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        Ok(select(all(), &wanted)?.into_iter().map(|row| row.name).collect())
    }

    #[test]
    fn names_are_unique() {
        let rows = [all(), inspection()].concat();
        let names: BTreeSet<_> = rows.iter().map(|row| &row.name).collect();
        assert_eq!(names.len(), rows.len());
    }

    #[test]
    fn rows_are_chosen_by_name_or_beginning() {
        assert_eq!(names(&[]).map(|rows| rows.len()), Ok(all().len()));
        assert_eq!(names(&["begin-16"]), Ok(vec!["begin-16".to_owned()]));
        assert_eq!(names(&["select1-simple-*"]).map(|rows| rows.len()), Ok(5));
        assert_eq!(names(&["begin-16", "begin-*"]).map(|rows| rows.len()), Ok(1));
        assert_eq!(names(&["begin-16", "begin-17"]), Err("begin-17".to_owned()));
        assert_eq!(names(&["nothing-*"]), Err("nothing-*".to_owned()));
    }
}
