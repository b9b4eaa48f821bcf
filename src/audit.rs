//! What is asked of a server connection, and what was found there: everything that a client may leave on it.
//!
//! Settings become the client's profile, or are nobody's; everything that cannot be carried over pins the connection.

mod proof;

use pgweir_proto::backend::row_columns;

use crate::settings::{self, Entry};
use crate::stats::{PinReason, Reason as _};

pub use proof::{Baseline, Known};

/// Why a session keeps its server connection: a set of reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins(u16);

impl Pins {
    /// Whether there is none.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the reasons may be gone after the next statement. One that lasts makes the others not matter.
    #[must_use]
    #[inline]
    pub fn may_end(self) -> bool {
        !self.is_empty() && self.lasting().is_empty()
    }

    /// Adds a reason.
    pub fn add(&mut self, reason: PinReason) {
        self.0 |= Self::bit(reason);
    }

    /// Takes a reason away.
    pub fn remove(&mut self, reason: PinReason) {
        self.0 &= !Self::bit(reason);
    }

    /// Whether there is no other reason than this.
    #[must_use]
    pub fn is_at_most(self, reason: PinReason) -> bool {
        self.0 & !Self::bit(reason) == 0
    }

    /// Whether the reason is among them.
    #[must_use]
    pub fn has(self, reason: PinReason) -> bool {
        self.0 & Self::bit(reason) != 0
    }

    /// The reasons.
    pub fn iter(self) -> impl Iterator<Item = PinReason> {
        PinReason::ALL.iter().copied().filter(move |reason| self.has(*reason))
    }

    /// Those that an audit cannot see, and so cannot find gone: they last as long as the session.
    #[must_use]
    pub fn lasting(self) -> Self {
        let mut lasting = Self::default();
        let unseen =
            [PinReason::Load, PinReason::Statements, PinReason::Startup, PinReason::Unknown, PinReason::Settings];
        for reason in unseen {
            if self.has(reason) {
                lasting.add(reason);
            }
        }
        lasting
    }

    fn bit(reason: PinReason) -> u16 {
        1 << (reason as u16)
    }
}

/// Custom settings that are carried for one client from one server connection to the next, besides those that it
/// logged in with. With more it keeps its server connection, and they are only there.
pub const CARRIED_CUSTOM_MAX: usize = 100;

/// The longest value of a setting that is carried; bytes. With a longer one the client keeps its server connection.
pub const CARRIED_VALUE_MAX: usize = 16 * 1024;

/// Names and values of one client's settings, all together, that are carried; bytes. Above it the client keeps its server
/// connection.
pub const CARRIED_MAX: usize = 64 * 1024;

/// The custom settings to ask for: all `startup` ones, and up to [`CARRIED_CUSTOM_MAX`] of the `others`. False if that
/// leaves any out.
#[must_use]
pub fn carried<'a>(
    startup: impl Iterator<Item = &'a str>,
    others: impl Iterator<Item = &'a str>,
) -> (Vec<&'a str>, bool) {
    let is_custom = |name: &&str| name.contains('.');
    let mut names: Vec<&str> = startup.filter(is_custom).collect();
    let most = names.len() + CARRIED_CUSTOM_MAX;
    for name in others.filter(is_custom) {
        if names.contains(&name) {
            continue;
        }
        if names.len() == most {
            return (names, false);
        }
        names.push(name);
    }
    (names, true)
}

/// Channels that one client listens to by the hub, at most. With more it keeps its server connection.
pub const CHANNELS_MAX: usize = 1000;

/// Appends the audit: one query, one row per finding: kind, name, value. `custom` names the custom settings
/// that the client may have set: the catalog does not list them. `login` is the role that logged in: what it may not set
/// (another role did, or a function of another's) is told apart. Values are cut when they are too long to be carried.
///
/// Everything is schema-qualified: the client's own `search_path` is in force.
pub fn audit(login: &str, custom: &[&str], out: &mut Vec<u8>) {
    let session = format!(
        " UNION ALL SELECT 's', 'session_authorization', session_user::pg_catalog.text \
         WHERE session_user OPERATOR(pg_catalog.<>) {}",
        quoted(login)
    );
    // A character more than fits tells that there was more.
    let cut = CARRIED_VALUE_MAX + 1;
    let settings = format!(
        "SELECT CASE WHEN context OPERATOR(pg_catalog.=) 'superuser' AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles \
         WHERE rolname OPERATOR(pg_catalog.=) {}) THEN 'u' ELSE 's' END, name, pg_catalog.left(setting, {cut}) \
         FROM pg_catalog.pg_settings ",
        quoted(login)
    );
    out.extend_from_slice(settings.as_bytes());
    out.extend_from_slice(AUDIT.as_bytes());
    out.extend_from_slice(OBJECTS.as_bytes());
    out.extend_from_slice(session.as_bytes());
    for name in custom {
        let name = quoted(name);
        let value = format!("pg_catalog.left(pg_catalog.current_setting({name}, true), {cut})");
        out.extend_from_slice(format!(" UNION ALL SELECT 's', {name}, {value} WHERE {value} IS NOT NULL").as_bytes());
    }
}

/// A literal that reads the same in whatever encoding the client has.
fn quoted(text: &str) -> String {
    let mut out = Vec::new();
    settings::literal(&mut out, text.as_bytes());
    String::from_utf8_lossy(&out).into_owned()
}

/// What follows the settings' columns and table.
const AUDIT: &str = "WHERE source OPERATOR(pg_catalog.=) 'session' AND NOT name OPERATOR(pg_catalog.=) \
    ANY ('{transaction_isolation,transaction_read_only,transaction_deferrable}'::pg_catalog.text[]) \
    UNION ALL SELECT 's', 'role', pg_catalog.current_setting('role') \
    WHERE pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) 'none'";

/// What else stays with a session.
const OBJECTS: &str = " UNION ALL SELECT 'l', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_locks \
    WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()) \
    UNION ALL SELECT 't', '', '' WHERE pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0 AND EXISTS \
    (SELECT FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass \
    AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()) \
    UNION ALL SELECT 'n', channel, '' FROM pg_catalog.pg_listening_channels() AS channel \
    UNION ALL SELECT 'c', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable) \
    UNION ALL SELECT 'p', '', '' WHERE EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql)";

/// What an audit found so far.
#[derive(Debug, Default)]
pub struct Findings {
    /// Settings of the session.
    pub settings: Vec<Entry>,
    /// Those that are not as they are known to be, if that was asked.
    pub differing: Vec<Box<str>>,
    /// Why the connection must stay with its client.
    pub pins: Pins,
    /// The channels that it listens to, up to [`CHANNELS_MAX`].
    pub channels: Vec<Box<[u8]>>,
    /// There are more.
    pub more_channels: bool,
    /// Bytes of the settings' names and values.
    bytes: usize,
}

impl Findings {
    /// Takes in one `DataRow` of the audit.
    pub fn row(&mut self, body: &[u8]) {
        let mut columns = row_columns(body).map(Option::unwrap_or_default);
        let mut next = || columns.next().unwrap_or_default();
        let (kind, name, value) = (next(), next(), next());
        match kind {
            b"s" | b"u" => {
                self.bytes += name.len() + value.len();
                if kind == b"u" || value.len() > CARRIED_VALUE_MAX || self.bytes > CARRIED_MAX {
                    self.pins.add(PinReason::Settings);
                }
                self.settings.push((crate::settings::setting_name(name).into(), value.into()));
            }
            b"d" => self.differing.push(crate::settings::setting_name(name).into()),
            b"l" => self.pins.add(PinReason::AdvisoryLock),
            b"t" => self.pins.add(PinReason::Temp),
            b"n" => {
                self.pins.add(PinReason::Listen);
                self.more_channels |= self.channels.len() >= CHANNELS_MAX;
                if !self.more_channels {
                    self.channels.push(name.into());
                }
            }
            b"c" => self.pins.add(PinReason::HoldCursor),
            b"p" => self.pins.add(PinReason::Prepare),
            _ => self.pins.add(PinReason::Unknown),
        }
    }
}

impl Findings {
    /// Whether nothing differs and nothing pins but what is known to.
    #[must_use]
    pub fn agree_with(&self, pins: Pins) -> bool {
        self.differing.is_empty() && self.pins.iter().all(|reason| pins.has(reason))
    }
}

/// The names of what was found and not known; values may be secrets.
impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for name in &self.differing {
            write!(f, "{name} ")?;
        }
        for reason in self.pins.iter() {
            write!(f, "{} ", reason.as_str())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_a_set_and_some_outlast_an_audit() {
        let mut pins = Pins::default();
        assert!(pins.is_empty());
        assert!(!pins.may_end());
        pins.add(PinReason::Temp);
        assert!(pins.may_end());
        pins.add(PinReason::Load);
        assert_eq!(pins.iter().collect::<Vec<_>>(), [PinReason::Temp, PinReason::Load]);
        assert_eq!(pins.lasting().iter().collect::<Vec<_>>(), [PinReason::Load]);
        assert!(!pins.may_end());
    }

    #[test]
    fn custom_names_are_asked_for_as_literals() {
        let mut out = Vec::new();
        audit("app", &["app.it's"], &mut out);
        assert!(String::from_utf8(out).unwrap().contains("current_setting(E'app.it''s', true)"));
        let mut out = Vec::new();
        audit("app", &["app.\u{c1}\\"], &mut out);
        assert!(String::from_utf8(out).unwrap().contains("current_setting($v$app.\u{c1}\\$v$, true)"));
    }

    #[test]
    fn what_a_client_logged_in_with_is_always_asked_for_and_a_limited_number_of_others() {
        let names = |from: usize, to: usize| (from..to).map(|n| format!("app.s{n}")).collect::<Vec<_>>();
        #[rustfmt::skip]
        let table: [(&str, Vec<String>, Vec<String>, (usize, bool)); 5] = [
            ("none",           vec![],        vec![],            (0, true)),
            ("as many as fit", names(0, 150), names(100, 250),   (250, true)),
            ("one more",       names(0, 150), names(100, 251),   (250, false)),
            ("known ones",     names(0, 101), names(0, 101),     (101, true)),
            ("not custom",     vec![],        vec!["a".into()],  (0, true)),
        ];
        for (name, startup, others, (count, all)) in table {
            let got = carried(startup.iter().map(String::as_str), others.iter().map(String::as_str));
            assert_eq!((got.0.len(), got.1), (count, all), "{name}");
        }
    }

    #[test]
    fn settings_that_are_too_long_or_may_not_be_set_pin() {
        let row_of = |kind: &[u8], value: &[u8]| {
            let mut body = 3_u16.to_be_bytes().to_vec();
            for column in [kind, b"app.x", value] {
                body.extend_from_slice(&u32::try_from(column.len()).unwrap().to_be_bytes());
                body.extend_from_slice(column);
            }
            body
        };
        let row = |value: &[u8]| row_of(b"s", value);
        let mut findings = Findings::default();
        findings.row(&row_of(b"u", b"v"));
        assert!(findings.pins.has(PinReason::Settings) && findings.settings.len() == 1, "not the client's to set");
        let mut findings = Findings::default();
        for _ in 0..3 {
            findings.row(&row(&vec![b'v'; CARRIED_VALUE_MAX]));
            assert!(findings.pins.is_empty());
        }
        findings.row(&row(&vec![b'v'; CARRIED_VALUE_MAX]));
        assert!(findings.pins.has(PinReason::Settings), "too much together");
        let mut findings = Findings::default();
        findings.row(&row(&vec![b'v'; CARRIED_VALUE_MAX + 1]));
        assert!(findings.pins.has(PinReason::Settings), "one too long");
    }
}
