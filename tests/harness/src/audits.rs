//! What pgweir's own audits found: session state on a server connection that seemed clean. It must be nothing, anywhere.
//!
//! [`Pgweir`](crate::Pgweir) is searched for it when it stops, its log and its last `/metrics`; the log of one that is started
//! another way, [`assert_none_in`] searches.

/// What pgweir logs, as an error, when an audit finds something.
pub const FINDING: &str = "an audit found what was not known";

/// The counter of those.
pub const FAILURES: &str = "pgweir_audit_failures_total";

/// The first line of a log, or of metrics, that tells of a finding.
#[must_use]
pub fn found_in(text: &str) -> Option<&str> {
    text.lines().find(|line| line.contains(FINDING) || line.starts_with(FAILURES) && counts_any(line))
}

fn counts_any(sample: &str) -> bool {
    let value = sample.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok());
    value.is_some_and(|value| value > 0.0)
}

/// Fails the test if an audit found something.
///
/// # Panics
///
/// If one did.
#[track_caller]
#[allow(clippy::panic, reason = "test support: a test's failure is a panic")]
pub fn assert_none_in(what: &str, text: &str) {
    if let Some(line) = found_in(text) {
        panic!("an audit found something, says {what}: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::found_in;

    #[test]
    fn a_finding_is_a_line_of_the_log_or_a_sample_above_zero() {
        let log = "ts=1 level=error msg=\"an audit found what was not known\" client=7 found=\"settings a\"";
        #[rustfmt::skip]
        let table = [
            ("a log",          log,                                                            true),
            ("JSON",           r#"{"level":"ERROR","msg":"an audit found what was not known"}"#, true),
            ("another line",   "ts=1 level=error msg=\"an audit came to its end\"",            false),
            ("none",           "pgweir_audit_failures_total{pool=\"a 1\"} 0",                  false),
            ("some",           "pgweir_audit_failures_total{pool=\"a 1\"} 2",                  true),
            ("without labels", "pgweir_audit_failures_total 1",                                true),
            ("its help",       "# HELP pgweir_audit_failures_total Audits that found 1",       false),
            ("another",        "pgweir_audits_total 1",                                        false),
        ];
        for (name, line, want) in table {
            let text = format!("one\n{line}\nthree\n");
            assert_eq!(found_in(&text), want.then_some(line), "{name}");
        }
    }
}
