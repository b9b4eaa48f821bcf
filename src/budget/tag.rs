//! The tag in `application_name`: what a server connection says of itself to everyone who looks at `pg_stat_activity`.
//!
//! ```text
//! [pgweir web.1/ab12cd#7]       the member's seventh connection
//! [pgweir web.1*3/ab12cd#7]     the same of a member whose weight is 3
//! [pgweir web.1/ab12cd#7 +2@mfk3v9ai]  it stands for two logins under way as well, until then: claims
//! [pgweir web.1/ab12cd#1 ?]     logged in, and finding out whether it may stay: a probe
//! [pgweir web.1/ab12cd#4 ?@mfk3uzrt~2s]  the same of a member that has wanted a connection, and had none, since then; 100 ms after
//!                               then it was about to look
//! [pgweir web.1/ab12cd#4 ?@mfk3uzrt+3k]  it has looked, 128 ms after then, without getting its turn, and will again
//! [pgweir web.1/ab12cd ?3@mfk3uzrt+f1c]  a probe that waits for room, since three periods, and 19.5 s after then it still did
//! [pgweir web.1/ab12cd#7 !]     its pgweir is on its way out
//! ```
//!
//! Times are milliseconds since 1970, by the server's clock, in base 36. A client's own name stands in front of it all. Postgres keeps 63 bytes of a name, and of those only printable ASCII.

use std::fmt::Write as _;

/// Begins every tag.
const OPEN: &[u8] = b"[pgweir ";

/// Of the name of a process in the tag, so many bytes are kept.
const NAME_MAX: usize = 16;

/// A member has this weight at most.
pub const WEIGHT_MAX: u32 = 100;

/// The time of claims and probes that do not tell theirs.
pub const NEVER: u64 = u64::MAX;

/// What a tag says of its connection, besides whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It is there.
    Plain,
    /// It stands for so many logins under way as well, until the server's clock shows this: milliseconds since 1970, or
    /// [`NEVER`].
    Claims(u32, u64),
    /// It is a probe that is about to look whether it may stay. Its member has had no connection since the first of these, and
    /// the second is this moment, by the server's clock.
    Coming(u64, u64),
    /// It is a probe that has not found out yet whether it may stay. The same, and when it last looked; or [`NEVER`], if it does
    /// not know, or its member has others.
    Proving(u64, u64),
    /// It is a probe that found no room and waits for some.
    Waiting(Wait),
    /// Its pgweir will end soon.
    Draining,
}

/// What a probe says of its wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Whole periods for which its member has had no connection.
    pub periods: u32,
    /// Since when that is so, by the server's clock; or [`NEVER`].
    pub since: u64,
    /// When it last looked, by the same clock, and no earlier; or [`NEVER`].
    pub seen: u64,
}

/// A tag, borrowed from a row's `application_name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Whose connection it is.
    pub member: &'a [u8],
    /// What it says.
    pub mark: Mark,
}

/// The digits of numbers in tags.
const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// The name of a member: that of its process, cut and with what is not plain replaced, its weight unless that is 1, and what
/// tells it from all others.
#[must_use]
pub fn member(process: &str, weight: u32, entropy: u64) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let mut name: String = process.chars().take(NAME_MAX).map(plain).collect();
    if weight > 1 {
        // Writing to a text does not fail.
        let _ = write!(name, "*{}", weight.min(WEIGHT_MAX));
    }
    name.push('/');
    let mut rest = entropy;
    for _ in 0..6 {
        name.push(digit(rest));
        rest /= 36;
    }
    name
}

/// Whether a connection of this tag says that its pgweir will end soon.
#[must_use]
pub fn is_leaving(tag: &str) -> bool {
    tag.ends_with("!]")
}

/// The weight that the name of a member tells.
#[must_use]
pub fn weight(member: &[u8]) -> u32 {
    let process = member.iter().rposition(|byte| *byte == b'/').and_then(|at| member.get(..at)).unwrap_or_default();
    let digits = process.iter().rposition(|byte| *byte == b'*').and_then(|at| process.get(at + 1..));
    digits.and_then(number).unwrap_or(1).clamp(1, WEIGHT_MAX)
}

/// The last digit of a number.
fn digit(number: u64) -> char {
    let at = usize::try_from(number % 36).unwrap_or_default();
    DIGITS.get(at).copied().map_or('0', char::from)
}

/// A number in base 36.
fn base_36(mut number: u64) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(digit(number));
        number /= 36;
        if number == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

/// The tag of a member's connection of this number.
#[must_use]
pub fn write(member: &str, number: u32, mark: Mark) -> String {
    let mut tag = String::with_capacity(48);
    tag.push_str("[pgweir ");
    tag.push_str(member);
    // Writing to a text does not fail.
    let _ = match mark {
        Mark::Plain => write!(tag, "#{number}]"),
        Mark::Claims(claims, NEVER) => write!(tag, "#{number} +{claims}]"),
        Mark::Claims(claims, until) => write!(tag, "#{number} +{claims}@{}]", base_36(until)),
        Mark::Coming(since, seen) => {
            write!(tag, "#{number} ?@{}~{}]", base_36(since), base_36(seen.saturating_sub(since)))
        }
        Mark::Proving(NEVER, _) => write!(tag, "#{number} ?]"),
        Mark::Proving(since, seen) => {
            write!(tag, "#{number} ?@{}+{}]", base_36(since), base_36(seen.saturating_sub(since)))
        }
        Mark::Waiting(Wait { periods, since: NEVER, .. }) => write!(tag, " ?{periods}]"),
        Mark::Waiting(Wait { periods, since, seen }) => {
            write!(tag, " ?{periods}@{}+{}]", base_36(since), base_36(seen.saturating_sub(since)))
        }
        Mark::Draining => write!(tag, "#{number} !]"),
    };
    tag
}

/// A tag with a number, with another mark.
#[must_use]
pub fn marked(plain: &str, mark: Mark) -> String {
    let inner = plain.strip_prefix("[pgweir ").and_then(|rest| rest.strip_suffix(']')).unwrap_or_default();
    let (member, rest) = inner.split_once('#').unwrap_or_default();
    let number = rest.split(' ').next().and_then(|number| number.parse().ok());
    write(member, number.unwrap_or_default(), mark)
}

/// A client's part of a name and the tag behind it. None without a tag.
#[must_use]
pub fn split(name: &[u8]) -> Option<(&[u8], Tag<'_>)> {
    let inner = name.strip_suffix(b"]")?;
    let at = memchr::memmem::rfind(inner, OPEN)?;
    let (client, tag) = inner.split_at_checked(at)?;
    let body = tag.get(OPEN.len()..)?;
    let end = body.iter().position(|byte| matches!(byte, b'#' | b' '))?;
    let (member, rest) = body.split_at_checked(end)?;
    let mark = mark(rest)?;
    (!member.is_empty()).then(|| (client.strip_suffix(b" ").unwrap_or(client), Tag { member, mark }))
}

/// The client's part of a name; all of it without a tag.
#[must_use]
pub fn without(name: &[u8]) -> &[u8] {
    split(name).map_or(name, |(client, _)| client)
}

fn mark(rest: &[u8]) -> Option<Mark> {
    if let Some(wait) = rest.strip_prefix(b" ?") {
        return waiting(wait).map(Mark::Waiting);
    }
    let rest = rest.strip_prefix(b"#")?;
    let end = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
    let (digits, rest) = rest.split_at_checked(end)?;
    number(digits)?;
    match rest {
        b"" => Some(Mark::Plain),
        b" ?" => Some(Mark::Proving(NEVER, NEVER)),
        b" !" => Some(Mark::Draining),
        _ => match rest.strip_prefix(b" ?@") {
            Some(text) => {
                let proving = || times(text, b'+').map(|(since, seen)| Mark::Proving(since, seen));
                times(text, b'~').map(|(since, seen)| Mark::Coming(since, seen)).or_else(proving)
            }
            None => claims(rest.strip_prefix(b" +")?),
        },
    }
}

fn waiting(text: &[u8]) -> Option<Wait> {
    let end = text.iter().position(|byte| *byte == b'@').unwrap_or(text.len());
    let (count, text) = text.split_at_checked(end)?;
    let periods = number(count)?;
    let (since, seen) = if text.is_empty() { (NEVER, NEVER) } else { times(text.strip_prefix(b"@")?, b'+')? };
    Some(Wait { periods, since, seen })
}

/// Since when, and when it was seen last.
fn times(text: &[u8], between: u8) -> Option<(u64, u64)> {
    let at = text.iter().position(|byte| *byte == between)?;
    let (since, rest) = text.split_at_checked(at)?;
    let since = time(since)?;
    Some((since, since.saturating_add(time(rest.get(1..)?)?)))
}

fn claims(text: &[u8]) -> Option<Mark> {
    let end = text.iter().position(|byte| *byte == b'@').unwrap_or(text.len());
    let (count, until) = text.split_at_checked(end)?;
    let until = until.strip_prefix(b"@").map_or(Some(NEVER), time)?;
    Some(Mark::Claims(number(count)?, until))
}

/// A time in base 36: of up to 12 digits, which is long enough.
fn time(digits: &[u8]) -> Option<u64> {
    let digit = |byte: &u8| DIGITS.iter().position(|one| one == byte).and_then(|at| u64::try_from(at).ok());
    if digits.is_empty() || digits.len() > 12 {
        return None;
    }
    digits.iter().try_fold(0, |sum, byte| Some(sum * 36 + digit(byte)?))
}

fn number(digits: &[u8]) -> Option<u32> {
    let digit = |byte: &u8| byte.is_ascii_digit().then(|| u32::from(byte - b'0'));
    if digits.is_empty() || digits.len() > 9 {
        return None;
    }
    digits.iter().try_fold(0, |sum, byte| Some(sum * 10 + digit(byte)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_behind_any_name() {
        let member = member("web.1 (ö)", 1, 36 * 36 * 36 * 36 * 36 * 35 + 10);
        assert_eq!(member, "web.1__ö_/a0000z".replace('ö', "_"));
        let claims = [Mark::Claims(2, NEVER), Mark::Claims(8, 1_764_342_000_123), Mark::Claims(1, 0)];
        let (since, seen) = (1_764_342_000_123, 1_764_342_099_999);
        let marks = [Mark::Plain, Mark::Proving(NEVER, NEVER), Mark::Draining];
        let marks = marks.into_iter().chain([Mark::Proving(since, seen), Mark::Coming(since, seen)]);
        let waits = [Wait { periods: 0, since: NEVER, seen: NEVER }, Wait { periods: 12, since, seen }];
        let waits = waits.into_iter().chain([Wait { periods: 3, since, seen: since }]).map(Mark::Waiting);
        for mark in marks.chain(claims).chain(waits) {
            let tag = write(&member, 1234, mark);
            assert!(tag.len() < 52, "{tag}");
            assert_eq!(marked(&write(&member, 1234, Mark::Plain), mark), tag);
            for client in ["", "app", "a [pgweir x/y#1]"] {
                let name = if client.is_empty() { tag.clone() } else { format!("{client} {tag}") };
                let (own, read) = split(name.as_bytes()).unwrap();
                assert_eq!((own, read), (client.as_bytes(), Tag { member: member.as_bytes(), mark }), "{name}");
                assert_eq!(without(name.as_bytes()), client.as_bytes());
            }
        }
    }

    #[test]
    fn the_longest_tag_is_not_cut() {
        let member = member(&"w".repeat(40), 1000, u64::MAX);
        assert_eq!(weight(member.as_bytes()), WEIGHT_MAX);
        // Beyond the year 5000.
        let since = 100_000_000_000_000;
        let wait = Wait { periods: 1_000_000, since, seen: since + 1_000_000_000 };
        let seen = since + 1_000_000_000;
        let marks =
            [Mark::Claims(8, since), Mark::Coming(since, seen), Mark::Proving(since, seen), Mark::Waiting(wait)];
        for mark in marks {
            let tag = write(&member, 1_000_000, mark);
            assert!(tag.len() <= 63 && split(tag.as_bytes()).is_some(), "{} {tag}", tag.len());
        }
    }

    #[test]
    fn a_weight_is_read_from_where_no_name_of_a_process_can_have_it() {
        #[rustfmt::skip]
        let table = [
            ("web.1/ab12cd", 1), ("web.1*3/ab12cd", 3), ("web.1*0/ab12cd", 1), ("web.1*101/ab12cd", 100), ("web.1*/ab12cd", 1),
            ("web.1*x/ab12cd", 1), ("web.1*2*5/ab12cd", 5), ("*7/x", 7), ("web*3", 1), ("", 1),
        ];
        for (name, want) in table {
            assert_eq!(weight(name.as_bytes()), want, "{name}");
        }
        assert_eq!(weight(member("web*9", 1, 7).as_bytes()), 1);
        assert_eq!(weight(member("web*9", 4, 7).as_bytes()), 4);
    }

    #[test]
    fn anything_else_is_a_name() {
        #[rustfmt::skip]
        let table = [
            "", "psql", "[pgweir ]", "[pgweir a/b]", "[pgweir a/b#]", "[pgweir a/b#x]", "[pgweir a/b#1", "[pgweir #1]",
            "[pgweir a/b#1 +]", "[pgweir a/b#1 +-1]", "[pgweir a/b#1 + 1]", "[pgweir a/b#1 !?]", "[pgweir a/b#1] ",
            "[pgweir a/b#1 +99999999999]", "[pgweir a/b ?x]", "[pgweir a/b ?]", "[pgweir a/b ?1@]",
            "[pgweir a/b ?1@1]", "[pgweir a/b ?1@1+]", "[pgweir a/b ?@1+1]", "[pgweir a/b#1 ?@]", "[pgweir a/b#1 ?@1]", "[pgweir a/b#1 ?@1+]", "[pgweir a/b#1 ?@1+1~1]", "[pgweir a/b ?1@1~1]",
            "[pgweir a/b#1 ?1@1+1]", "[pgweir a/b !]", "[pgweir a/b#1 +1@]", "[pgweir a/b#1 +@1]",
            "[pgweir a/b#1 +1@1 ]", "[pgweir a/b#1 +1@A]", "[pgweir a/b#1 +1@1234567890123]", "[pgweir a/b#1 +1@1@1]",
        ];
        for name in table {
            assert_eq!(split(name.as_bytes()), None, "{name}");
            assert_eq!(without(name.as_bytes()), name.as_bytes());
        }
    }
}
