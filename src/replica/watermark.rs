//! A point in the primary's history that one session hands to another, past every pooler: `SHOW pgweir.watermark` behind a
//! write, `SET pgweir.watermark = '...'` wherever reads have to see it.
//!
//! `7301234567890123456-00000003-16/B374D848`: the system identifier, the timeline as in the names of its files, the position.

use super::Position;

/// The setting.
pub const NAME: &str = "pgweir.watermark";

/// What a server says of itself at this moment: the primary, where its next record will be, behind all that it has
/// acknowledged; a follower, what it has replayed, which is all that anybody can have read there.
///
/// Source: the Postgres manual, "System Administration Functions"; the names of the files: "WAL Internals".
pub const QUERY: &str = "SELECT pg_catalog.concat_ws('-', (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
    THEN pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) \
    ELSE pg_catalog.lpad(pg_catalog.to_hex(GREATEST((SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()), \
    (SELECT min_recovery_end_timeline FROM pg_catalog.pg_control_recovery()))), 8, '0') END, \
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_current_wal_insert_lsn() \
    ELSE pg_catalog.pg_last_wal_replay_lsn() END) AS \"pgweir.watermark\"";

/// Where a primary was, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// `pg_control_system().system_identifier`.
    pub system_identifier: u64,
    /// Its timeline.
    pub timeline: u32,
    /// All before it is to be seen.
    pub position: Position,
}

impl Watermark {
    /// Reads what [`QUERY`] tells.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(text).ok()?.splitn(3, '-');
        let (system, timeline, position) = (parts.next()?, parts.next()?, parts.next()?);
        let is_number = |digits: &str| !digits.starts_with('+');
        Some(Self {
            system_identifier: system.parse().ok().filter(|_| is_number(system))?,
            timeline: u32::from_str_radix(timeline, 16).ok().filter(|_| is_number(timeline))?,
            position: Position::parse(position.as_bytes())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_told_is_read_and_nothing_else() {
        let watermark = |system_identifier, timeline, bytes| {
            Some(Watermark { system_identifier, timeline, position: Position::new(bytes) })
        };
        let cases: [(&str, Option<Watermark>); 12] = [
            ("7301234567890123456-00000003-16/B374D848", watermark(7_301_234_567_890_123_456, 3, 0x16_B374_D848)),
            ("18446744073709551615-FFFFFFFF-FFFFFFFF/0", watermark(u64::MAX, u32::MAX, 0xFFFF_FFFF_0000_0000)),
            ("1-1-0/1", watermark(1, 1, 1)),
            ("", None),
            ("7301234567890123456", None),
            ("7301234567890123456-00000003", None),
            ("7301234567890123456-00000003-", None),
            ("7301234567890123456-00000003-16", None),
            ("7301234567890123456-00000003-16/B374D848-1", None),
            ("-1-00000003-16/B374D848", None),
            ("+1-+3-16/B374D848", None),
            ("18446744073709551616-00000003-16/B374D848", None),
        ];
        for (text, want) in cases {
            assert_eq!(Watermark::parse(text.as_bytes()), want, "{text}");
        }
    }
}
