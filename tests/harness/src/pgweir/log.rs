//! What a process writes to standard error, line by line, and how to wait for a line.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A log that grows while others wait for what comes.
#[derive(Debug, Default)]
pub(super) struct Log {
    text: Mutex<Text>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct Text {
    /// Whole lines.
    lines: String,
    /// The stream ended.
    ended: bool,
}

impl Log {
    /// Reads lines to the end of the stream.
    pub(super) fn read(&self, stream: impl Read) {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            self.text().lines.push_str(&String::from_utf8_lossy(&line));
            self.grown.notify_all();
            line.clear();
        }
        self.text().ended = true;
        self.grown.notify_all();
    }

    /// All so far.
    pub(super) fn all(&self) -> String {
        self.text().lines.clone()
    }

    /// Waits until `look` finds something in the text; `None` when the stream ends or the time is
    /// up without it.
    pub(super) fn wait<T>(&self, within: Duration, mut look: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + within;
        let mut text = self.text();
        loop {
            if let Some(found) = look(&text.lines) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if text.ended || left.is_zero() {
                return None;
            }
            let waited = self.grown.wait_timeout(text, left);
            text = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn text(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value of `key` in a line of logfmt (`key=value`, `key="va\"lue"`) or JSON (`"key":"value"`,
/// wherever in the object it stands).
pub(super) fn field(line: &str, key: &str) -> Option<String> {
    let json = line.trim_start().starts_with('{');
    let needle = if json { format!("\"{key}\":") } else { format!("{key}=") };
    let mut from = 0;
    loop {
        let at = from + line.get(from..)?.find(&needle)?;
        let before = line.get(..at)?.chars().next_back();
        let value = line.get(at + needle.len()..)?;
        if json || before.is_none_or(char::is_whitespace) {
            return Some(value_at_start(value));
        }
        from = at + needle.len();
    }
}

fn value_at_start(text: &str) -> String {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| c.is_whitespace() || c == ',' || c == '}');
        return text.get(..end.unwrap_or(text.len())).unwrap_or("").to_owned();
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => value.extend(chars.next()),
            c => value.push(c),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::{Log, field};
    use std::time::Duration;

    #[test]
    fn fields_are_found_in_any_order_and_quoting() {
        let plain = r#"ts=1 level=info target_addr=9 msg="it \"listens\"" addr=127.0.0.1:6432 role=postgres"#;
        let json = r#"{"level":"INFO","fields":{"msg":"ready","addr":"[::1]:1","n":3}}"#;
        #[rustfmt::skip]
        let table = [
            ("quoted",                  plain,  "msg",   Some("it \"listens\"")),
            ("not the tail of a key",   plain,  "addr",  Some("127.0.0.1:6432")),
            ("last",                    plain,  "role",  Some("postgres")),
            ("absent",                  plain,  "port",  None),
            ("json text",               json,   "addr",  Some("[::1]:1")),
            ("json number",             json,   "n",     Some("3")),
            ("json absent",             json,   "role",  None),
        ];
        for (name, line, key, want) in table {
            assert_eq!(field(line, key).as_deref(), want, "{name}");
        }
    }

    #[test]
    fn a_wait_ends_with_the_stream() {
        let log = Log::default();
        log.read(&b"one\ntwo"[..]);
        assert_eq!(log.all(), "one\ntwo");
        let patience = Duration::from_mins(10);
        let find = |what: &'static str| move |text: &str| text.find(what);
        assert_eq!(log.wait(patience, find("two")), Some(4));
        assert_eq!(log.wait(patience, find("three")), None);
    }
}
