//! The audit of a sample: whether a server connection that seems clean has what is known of it, and nothing else.
//!
//! The server compares: only it knows that `64MB` is `65536`. What differs is told by its name; it is nobody's, and never
//! taken for a client's wish.

use super::{CARRIED_VALUE_MAX, Findings, OBJECTS, Pins, audit};
use crate::settings::{self, APPLICATION_NAME, Entry, Profile};
use crate::sql;

/// What the operator's own queries leave on a server connection: `connect_query`, and `server_reset_query`.
#[derive(Debug)]
pub struct Baseline {
    settings: Vec<Entry>,
    pins: Pins,
    /// They set the same each time.
    is_fixed: bool,
}

impl Baseline {
    /// The query whose rows tell what these `queries` have left on a server connection where nothing else has run.
    #[must_use]
    pub fn question(login: &str, queries: &[&str]) -> Vec<u8> {
        let mut names: Vec<Box<str>> = Vec::new();
        for text in queries {
            names.extend(sql::custom_names(text.as_bytes()).map(|name| Box::from(&*name)));
            names.append(&mut sql::hidden_names(text.as_bytes()));
        }
        let custom: Vec<&str> = names.iter().map(|name| &**name).collect();
        let mut out = Vec::new();
        audit(login, &custom, &mut out);
        out
    }

    /// What was found there.
    #[must_use]
    pub fn new(queries: &[&str], findings: Findings) -> Self {
        // What is computed may be another value the next time.
        let is_fixed = queries.iter().all(|text| !text.contains('('));
        Self { settings: findings.settings, pins: findings.pins, is_fixed }
    }
}

/// What is known of a server connection at the end of a lease.
#[derive(Debug)]
pub struct Known<'a> {
    /// The role that logged in.
    pub login: &'a str,
    /// The settings of the client.
    pub own: &'a Profile,
    /// Those that were sent there: the client's start-up values may be to come.
    pub sent: &'a Profile,
    /// What was there before.
    pub baseline: Option<&'a Baseline>,
    /// What stands behind its name.
    pub tag: &'a str,
    /// Its name may be any.
    pub is_untagged: bool,
}

/// What is expected of one setting.
#[derive(Debug)]
struct Expected<'a> {
    name: &'a str,
    want: Want,
    /// It was set: without that it may also be as it is where nobody sets it.
    is_set: bool,
}

#[derive(Debug)]
enum Want {
    Value(Vec<u8>),
    /// As it is where nobody sets it.
    Default,
    Anything,
}

impl Known<'_> {
    /// Appends the query: one row for each difference, and for all that pins. `foreign` are custom settings that other
    /// clients have: the catalog lists none.
    pub fn prove<'a>(&'a self, foreign: impl Iterator<Item = &'a str>, out: &mut Vec<u8>) {
        let mut expected = self.expected();
        for name in foreign {
            if expected.iter().all(|known| known.name != name) {
                expected.push(Expected { name, want: Want::Default, is_set: false });
            }
        }
        out.extend_from_slice(
            b"WITH expected(name,want,is_set,free)AS(VALUES(''::pg_catalog.text,''::pg_catalog.text,false,true)",
        );
        for Expected { name, want, is_set } in &expected {
            out.extend_from_slice(b",(");
            settings::literal(out, name.as_bytes());
            out.push(b',');
            if let Want::Value(value) = want {
                settings::literal(out, value);
            } else {
                out.extend_from_slice(b"NULL");
            }
            let is_free = matches!(want, Want::Anything);
            out.extend_from_slice(format!(",{is_set},{is_free})").as_bytes());
        }
        out.extend_from_slice(b"),");
        out.extend_from_slice(DIFFERENCES.replace("{cut}", &(CARRIED_VALUE_MAX + 1).to_string()).as_bytes());
        identity(&expected, "role", ROLE, b"none", out);
        identity(&expected, "session_authorization", AUTHORIZATION, self.login.as_bytes(), out);
        out.extend_from_slice(OBJECTS.as_bytes());
    }

    /// Takes what was there before from what was found.
    pub fn forgive(&self, findings: &mut Findings) {
        for reason in self.baseline.iter().flat_map(|baseline| baseline.pins.iter()) {
            findings.pins.remove(reason);
        }
    }

    fn expected(&self) -> Vec<Expected<'_>> {
        let mut expected = Vec::new();
        for (name, value) in self.own.entries() {
            let want = Want::Value(value.to_vec());
            expected.push(Expected { name, want, is_set: self.sent.get(name).is_some() });
        }
        if let Some(baseline) = self.baseline {
            // The client may have taken it back.
            for (name, value) in baseline.settings.iter().filter(|(name, _)| self.own.get(name).is_none()) {
                let want = if baseline.is_fixed { Want::Value(value.to_vec()) } else { Want::Anything };
                expected.push(Expected { name, want, is_set: false });
            }
        }
        if !self.tag.is_empty() {
            let name = settings::tagged(self.own.get(APPLICATION_NAME).unwrap_or_default(), self.tag);
            let want = if self.is_untagged { Want::Anything } else { Want::Value(name) };
            expected.retain(|known| known.name != APPLICATION_NAME);
            expected.push(Expected { name: APPLICATION_NAME, want, is_set: false });
        }
        expected
    }
}

/// Appends the branch that tells whether a role is not the one that is expected, `plain` if none is.
fn identity(expected: &[Expected<'_>], name: &str, now: &str, plain: &[u8], out: &mut Vec<u8>) {
    let known = expected.iter().find(|known| known.name == name);
    let (value, is_set) = match known.map(|known| (&known.want, known.is_set)) {
        Some((Want::Anything, _)) => return,
        Some((Want::Value(value), is_set)) => (Some(value), is_set),
        Some((Want::Default, _)) | None => (None, false),
    };
    out.extend_from_slice(format!(" UNION ALL SELECT 'd','{name}',''WHERE CASE WHEN {now} ").as_bytes());
    out.extend_from_slice(b"OPERATOR(pg_catalog.=)");
    settings::literal(out, value.map_or(plain, |value| value));
    out.extend_from_slice(b" THEN false");
    if !is_set {
        out.extend_from_slice(format!(" WHEN {now} OPERATOR(pg_catalog.=)").as_bytes());
        settings::literal(out, plain);
        out.extend_from_slice(b" THEN false");
        if name == "role" {
            // The role or the database may have it as a setting of its own.
            out.extend_from_slice(b" ELSE pg_catalog.current_setting('role')OPERATOR(pg_catalog.<>)pg_catalog.set_config('role',NULL,true)END");
            return;
        }
    }
    out.extend_from_slice(b" ELSE true END");
}

const ROLE: &str = "pg_catalog.current_setting('role')";

const AUTHORIZATION: &str = "session_user::pg_catalog.text";

/// The settings. Where the texts differ the server is asked what it would make of the expected one, by setting it until the
/// end of this query (`now` is read as a whole before); where that takes more than everybody's rights, nothing is said. Nor is
/// anything of a custom setting that is gone: a library that was loaded takes away what bears its name.
const DIFFERENCES: &str = "now AS(SELECT pg_catalog.lower(name COLLATE pg_catalog.\"C\")COLLATE pg_catalog.\"default\" AS name,pg_catalog.left(setting,{cut})AS setting,context,source \
    FROM pg_catalog.pg_settings WHERE NOT name OPERATOR(pg_catalog.=)\
    ANY('{transaction_isolation,transaction_read_only,transaction_deferrable}'::pg_catalog.text[]))\
    SELECT 'd',now.name,''FROM now LEFT JOIN expected ON expected.name OPERATOR(pg_catalog.=)now.name \
    WHERE now.source OPERATOR(pg_catalog.=)'session' AND CASE WHEN expected.name IS NULL OR expected.want IS NULL AND NOT free THEN true \
    WHEN free THEN false WHEN pg_catalog.left(want,{cut})OPERATOR(pg_catalog.=)setting \
    OR want OPERATOR(pg_catalog.=)pg_catalog.current_setting(now.name)THEN false \
    WHEN context OPERATOR(pg_catalog.<>)'user' THEN false \
    ELSE pg_catalog.current_setting(now.name)OPERATOR(pg_catalog.<>)pg_catalog.set_config(now.name,want,true)END \
    UNION ALL SELECT 'd',now.name,''FROM now JOIN expected ON expected.name OPERATOR(pg_catalog.=)now.name \
    WHERE is_set AND source OPERATOR(pg_catalog.<>)'session' AND pg_catalog.strpos(now.name,'.')OPERATOR(pg_catalog.=)0 \
    UNION ALL SELECT 'd',custom.name,''FROM(SELECT name,want,is_set,free,\
    coalesce(pg_catalog.left(pg_catalog.current_setting(name,true),{cut}),'')AS have FROM expected \
    WHERE pg_catalog.strpos(name,'.')OPERATOR(pg_catalog.>)0 OFFSET 0)AS custom \
    WHERE NOT EXISTS(SELECT FROM now WHERE now.name OPERATOR(pg_catalog.=)custom.name)AND CASE WHEN free THEN false \
    WHEN have OPERATOR(pg_catalog.=)coalesce(pg_catalog.left(want,{cut}),'')THEN false \
    WHEN have OPERATOR(pg_catalog.=)''THEN false WHEN is_set THEN true \
    ELSE have OPERATOR(pg_catalog.<>)pg_catalog.set_config(name,NULL,true)END";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Profiles;

    fn text(known: &Known<'_>, foreign: &[&str]) -> String {
        let mut out = Vec::new();
        known.prove(foreign.iter().copied(), &mut out);
        let text = String::from_utf8(out).unwrap();
        let (_, rest) = text.split_once(",false,true)").unwrap();
        rest.split_once("),now AS").unwrap().0.to_owned()
    }

    #[test]
    fn what_is_expected_is_the_clients_then_the_operators_then_nothing() {
        let entries = |all: &[(&str, &str)]| -> Vec<Entry> {
            all.iter().map(|(name, value)| ((*name).into(), value.as_bytes().into())).collect()
        };
        let profiles = Profiles::default();
        let own = profiles.intern(entries(&[("a", "it's"), ("b", "1"), ("x.own", "1")]));
        let sent = profiles.intern(entries(&[("a", "other"), ("x.own", "1")]));
        let found = |query: &str| {
            let findings = Findings { settings: entries(&[("b", "2"), ("c", "3")]), ..Findings::default() };
            Baseline::new(&[query], findings)
        };
        let (fixed, computed) = (found("SET b = 2; SET c = 3"), found("SELECT sets()"));
        #[rustfmt::skip]
        let table: [(&str, Option<&Baseline>, &str, bool, &str); 5] = [
            ("alone",    None,            "",    false, ""),
            ("fixed",    Some(&fixed),    "",    false, ",(E'c',E'3',false,false)"),
            ("computed", Some(&computed), "",    false, ",(E'c',NULL,false,true)"),
            ("tagged",   None,            "tag", false, ",(E'application_name',E'tag',false,false)"),
            ("untagged", None,            "tag", true,  ",(E'application_name',NULL,false,true)"),
        ];
        for (name, baseline, tag, is_untagged, more) in table {
            let known = Known { login: "app", own: &own, sent: &sent, baseline, tag, is_untagged };
            let front = ",(E'a',E'it''s',true,false),(E'b',E'1',false,false),(E'x.own',E'1',true,false)";
            let foreign = ",(E'x.foreign',NULL,false,false)";
            assert_eq!(text(&known, &["x.own", "x.foreign"]), format!("{front}{more}{foreign}"), "{name}");
        }
    }

    #[test]
    fn what_was_there_before_pins_nobody() {
        use crate::stats::PinReason;

        let profiles = Profiles::default();
        let mut before = Findings::default();
        before.pins.add(PinReason::Temp);
        let baseline = Baseline::new(&[], before);
        let plain = profiles.plain();
        let baseline = Some(&baseline);
        let known = Known { login: "app", own: &plain, sent: &plain, baseline, tag: "", is_untagged: false };
        let mut findings = Findings::default();
        findings.pins.add(PinReason::Temp);
        findings.pins.add(PinReason::AdvisoryLock);
        known.forgive(&mut findings);
        assert_eq!(findings.pins.iter().collect::<Vec<_>>(), [PinReason::AdvisoryLock]);
    }
}
