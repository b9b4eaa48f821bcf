//! The tag in `application_name`: what a server connection says of itself to everyone who looks at `pg_stat_activity`.
//!
//! ```text
//! [pgweir web.1/ab12cd#7]       the member's seventh connection
//! [pgweir web.1/ab12cd#7 +2]    it stands for two logins under way as well: claims
//! [pgweir web.1/ab12cd#1 ?]     logged in, and finding out whether it may stay: a probe
//! [pgweir web.1/ab12cd ?3]      a probe that waits for room, the third time without luck (`?` alone the first time)
//! [pgweir web.1/ab12cd#7 !]     its pgweir is on its way out
//! ```
//!
//! A client's own name stands in front of it. Postgres keeps 63 bytes of a name, and of those only printable ASCII.

use std::fmt::Write as _;

/// Begins every tag.
const OPEN: &[u8] = b"[pgweir ";

/// Of the name of a process in the tag, so many bytes are kept.
const NAME_MAX: usize = 16;

/// What a tag says of its connection, besides whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It is there.
    Plain,
    /// It stands for so many logins under way as well.
    Claims(u32),
    /// It is a probe: it has not found out yet whether it may stay.
    Proving,
    /// It is a probe that found no room and waits for some, after so many attempts in vain.
    Waiting(u32),
    /// Its pgweir will end soon.
    Draining,
}

/// A tag, borrowed from a row's `application_name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag<'a> {
    /// Whose connection it is.
    pub member: &'a [u8],
    /// What it says.
    pub mark: Mark,
}

/// The name of a member: that of its process, cut and with what is not plain replaced, and what tells it from all others.
#[must_use]
pub fn member(process: &str, entropy: u64) -> String {
    const DIGITS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let mut name: String = process.chars().take(NAME_MAX).map(plain).collect();
    name.push('/');
    let mut rest = entropy;
    for _ in 0..6 {
        let digit = usize::try_from(rest % 36).unwrap_or_default();
        name.push(DIGITS.get(digit).copied().map_or('0', char::from));
        rest /= 36;
    }
    name
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
        Mark::Claims(claims) => write!(tag, "#{number} +{claims}]"),
        Mark::Proving => write!(tag, "#{number} ?]"),
        Mark::Waiting(0) => write!(tag, " ?]"),
        Mark::Waiting(tries) => write!(tag, " ?{tries}]"),
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
    if let Some(tries) = rest.strip_prefix(b" ?") {
        return if tries.is_empty() { Some(Mark::Waiting(0)) } else { number(tries).map(Mark::Waiting) };
    }
    let rest = rest.strip_prefix(b"#")?;
    let end = rest.iter().position(|byte| *byte == b' ').unwrap_or(rest.len());
    let (digits, rest) = rest.split_at_checked(end)?;
    number(digits)?;
    match rest {
        b"" => Some(Mark::Plain),
        b" ?" => Some(Mark::Proving),
        b" !" => Some(Mark::Draining),
        _ => number(rest.strip_prefix(b" +")?).map(Mark::Claims),
    }
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
        let member = member("web.1 (ö)", 36 * 36 * 36 * 36 * 36 * 35 + 10);
        assert_eq!(member, "web.1__ö_/a0000z".replace('ö', "_"));
        for mark in [Mark::Plain, Mark::Claims(2), Mark::Proving, Mark::Waiting(0), Mark::Waiting(12), Mark::Draining] {
            let tag = write(&member, 1234, mark);
            assert!(tag.len() < 48, "{tag}");
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
    fn anything_else_is_a_name() {
        #[rustfmt::skip]
        let table = [
            "", "psql", "[pgweir ]", "[pgweir a/b]", "[pgweir a/b#]", "[pgweir a/b#x]", "[pgweir a/b#1", "[pgweir #1]",
            "[pgweir a/b#1 +]", "[pgweir a/b#1 +-1]", "[pgweir a/b#1 + 1]", "[pgweir a/b#1 !?]", "[pgweir a/b#1] ",
            "[pgweir a/b#1 +99999999999]", "[pgweir a/b ?x]", "[pgweir a/b !]",
        ];
        for name in table {
            assert_eq!(split(name.as_bytes()), None, "{name}");
            assert_eq!(without(name.as_bytes()), name.as_bytes());
        }
    }
}
