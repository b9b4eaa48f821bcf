//! What may be shown of a text to people: its fingerprint, and less where values are no literals.

use super::fingerprint::{Class, Fingerprint};

/// Longer texts have none; bytes.
pub const OUTLINE_TEXT_MAX: usize = 64 * 1024;

/// Commands whose `SET` takes a value as a bare word.
const SETTERS: [&str; 3] = ["set", "alter", "create"];

/// What is left of `text` without its literals and comments, as an operator reads it: `select * from t where id=?int4`.
///
/// That is so of a text that the server has read: one that it refuses may have a word where its author meant a literal. None if
/// it is not certain what of it is a literal: it cannot be read to its end, or its quotes depend on
/// `standard_conforming_strings`. Nothing is shown behind the `SET` of a setting, whose value need not be a literal, nor of
/// a list of literals behind the first.
#[must_use]
pub fn outline(text: &[u8]) -> Option<String> {
    if text.len() > OUTLINE_TEXT_MAX {
        return None;
    }
    let mut made = Fingerprint::of(text, false)?;
    if memchr::memchr(b'\\', text).is_some() && Fingerprint::of(text, true)?.tokens != made.tokens {
        return None;
    }
    made.tokens = shorten(&made.tokens);
    let mut shown = made.to_string();
    if let Some(end) = end_of_set(&shown) {
        shown.truncate(end);
        shown.push_str(" …");
    }
    Some(shown)
}

/// A run of literals of one class, separated by commas, becomes the first of them and an ellipsis.
fn shorten(tokens: &[u8]) -> Vec<u8> {
    let mut made = Vec::with_capacity(tokens.len());
    let mut rest = tokens;
    while let Some((&first, behind)) = rest.split_first() {
        made.push(first);
        rest = behind;
        if !(Class::String as u8..=Class::Bool as u8).contains(&first) {
            continue;
        }
        let mut left_out = false;
        while let [b',', next, more @ ..] = rest
            && *next == first
        {
            rest = more;
            left_out = true;
        }
        if left_out {
            made.extend_from_slice(",…".as_bytes());
        }
    }
    made
}

/// Where the word `set` of a command that has settings ends.
fn end_of_set(shown: &str) -> Option<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    let mut begins = true;
    let mut sets = false;
    let mut start = None;
    for (at, c) in shown.char_indices().chain([(shown.len(), ' ')]) {
        if is_word(c) {
            start.get_or_insert(at);
            continue;
        }
        if let Some(word) = start.take().and_then(|start| shown.get(start..at)) {
            sets |= begins && SETTERS.contains(&word);
            begins = false;
            if sets && word == "set" {
                return Some(at);
            }
        }
        // One inside a quoted name shows less than it might.
        begins |= c == ';';
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_shown_without_what_a_client_put_into_it() {
        #[rustfmt::skip]
        let table: [(&str, Option<&str>); 19] = [
            ("SELECT * FROM t WHERE a = 'secret' AND b=12",      Some("select*from t where a=?string and b=?int4")),
            ("/* secret */ SELECT 1 -- secret",                  Some("select?int4")),
            ("SELECT $x$secret$x$, E'\\x73', U&'secret'",        Some("select?string,…")),
            ("SELECT 1 WHERE 5 IN (1, 2, 3) AND 'a' IN ('b')",   Some("select?int4 where?int4 in(?int4,…)and?string in(?string)")),
            ("INSERT INTO t VALUES (1, 'secret'), (2, NULL)",    Some("insert into t values(?int4,?string),(?int4,null)")),
            ("UPDATE t SET a = 'secret', b = c WHERE d = 1",     Some("update t set a=?string,b=c where d=?int4")),
            ("SET app.user = secret",                            Some("set …")),
            ("begin; set local app.user to secret; select 1",    Some("begin;set …")),
            ("ALTER ROLE r SET app.user = secret",               Some("alter role r set …")),
            ("CREATE FUNCTION f() RETURNS int SET x = secret",   Some("create function f()returns int set …")),
            ("ALTER ROLE r PASSWORD 'secret'",                   Some("alter role r password?string")),
            ("COMMIT;ALTER TABLE t ADD c int DEFAULT 1",         Some("commit;alter table t add c int default?int4")),
            ("select set_config('a.b', 'secret', true)",         Some("select set_config(?string,…,?bool)")),
            ("select 1 as \"a;set\"",                            Some("select?int4 as\"a;set …")),
            ("select 'a\\' || 'secret",                          None),
            ("select 'a\\' , 'secret\\'",                        None),
            ("select 'unfinished",                               None),
            ("select \u{1}",                                     None),
            ("",                                                 Some("")),
        ];
        for (text, want) in table {
            let got = outline(text.as_bytes()).map(|text| text.replace("? ", "?"));
            let close = |text: &str| text.replace(' ', "");
            assert_eq!(got.as_deref().map(close), want.map(close), "{text}");
        }
        assert_eq!(outline(&b"x".repeat(OUTLINE_TEXT_MAX + 1)), None);
    }
}
