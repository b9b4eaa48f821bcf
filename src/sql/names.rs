//! The names of prepared statements in a text: what SQL's `PREPARE`, `EXECUTE` and `DEALLOCATE` are about.

use super::head::{FirstWord, skip_explain};
use super::lexer::{Doubt, Lexer, Token};
use super::readings;
use super::statement::read_prepared;

/// The longest name that SQL can have; bytes. What is longer is cut by the server, and so is another name.
///
/// Source: `PostgreSQL` 17 docs, §4.1.1 "Identifiers and Key Words".
const IDENTIFIER_MAX: usize = 63;

/// What a statement does to a prepared statement, by its name: as the server reads that, or empty where it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `PREPARE name AS`.
    Prepares(Box<[u8]>),
    /// `EXECUTE name`, also under `EXPLAIN` and `CREATE TABLE AS`.
    Executes(Box<[u8]>),
    /// `DEALLOCATE name`.
    Deallocates(Box<[u8]>),
}

impl Naming {
    /// That of the statement which begins at `lexer`.
    pub(super) fn of(mut lexer: Lexer<'_>) -> Option<Self> {
        let mut command = FirstWord::next(&mut lexer);
        if command == FirstWord::Explain {
            skip_explain(&mut lexer);
            command = FirstWord::next(&mut lexer);
            if command != FirstWord::Execute {
                return None;
            }
        }
        match command {
            FirstWord::Prepare => {
                let mut ahead = lexer;
                let is_transaction =
                    ahead.take_word(b"transaction") && matches!(ahead.token(), Some(Token::Text { .. }));
                (!is_transaction).then(|| Self::Prepares(name(&mut lexer)))
            }
            FirstWord::Execute => Some(Self::Executes(name(&mut lexer))),
            FirstWord::Deallocate => {
                let mut behind = lexer;
                if behind.take_word(b"prepare") && !matches!({ behind }.token(), None | Some(Token::Mark(_))) {
                    lexer = behind;
                }
                (!lexer.take_word(b"all")).then(|| Self::Deallocates(name(&mut lexer)))
            }
            _ => None,
        }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        let (Self::Prepares(name) | Self::Executes(name) | Self::Deallocates(name)) = self;
        name
    }
}

/// What the statements of `text` do to prepared statements by their names, in their order. Nothing if that depends on how the
/// text is read. Cold: allocates.
#[must_use]
pub fn prepared_names(text: &[u8]) -> Vec<Naming> {
    let mut found: Option<Vec<Naming>> = None;
    for backslash in readings(text) {
        let mut names = Vec::new();
        let reading = read_prepared(text, *backslash, &mut names);
        if reading.doubt != Doubt::None || found.as_ref().is_some_and(|found| *found != names) {
            return Vec::new();
        }
        found = Some(names);
    }
    found.unwrap_or_default()
}

/// The names that `text` spells out behind the word `execute`, wherever that is: in strings, and in comments, too. SQL that is made
/// when the text runs may be made of them.
pub fn spelled_executions(text: &[u8]) -> impl Iterator<Item = Box<[u8]>> {
    const WORD: &[u8] = b"execute";
    // The rarest of its letters tells where to look.
    memchr::memchr2_iter(b'x', b'X', text).filter_map(|second| {
        let (before, at) = text.split_at_checked(second.checked_sub(1)?)?;
        let (word, behind) = at.split_at_checked(WORD.len())?;
        if !word.eq_ignore_ascii_case(WORD) || before.last().copied().is_some_and(is_in_word) {
            return None;
        }
        Some(name_behind(behind)).filter(|name| !name.is_empty())
    })
}

/// Whether a byte may be one of an unquoted name, behind its first.
const fn is_in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | 128..)
}

/// The name behind a word that ends here; empty if none is.
fn name_behind(text: &[u8]) -> Box<[u8]> {
    let trimmed = text.trim_ascii_start();
    let length = |part: &[u8]| part.iter().take_while(|byte| is_in_word(**byte)).count();
    let name = match trimmed.strip_prefix(b"\"") {
        Some(quoted) => quoted.get(..memchr::memchr(b'"', quoted).unwrap_or(0)).unwrap_or_default().to_vec(),
        None if trimmed.len() == text.len() => Vec::new(),
        None => trimmed.get(..length(trimmed)).unwrap_or_default().to_ascii_lowercase(),
    };
    if name.len() > IDENTIFIER_MAX { Box::default() } else { name.into() }
}

/// Whether `text`, in which there is a `COPY`, may be one that reads what its client sends. Cold: reads it once more.
#[must_use]
pub fn reads_copy(text: &[u8]) -> bool {
    readings(text).iter().any(|backslash| {
        let mut lexer = Lexer::new(text, *backslash);
        let mut is_behind_from = false;
        while let Some(token) = lexer.token() {
            let is = |words: &[&[u8]]| {
                matches!(token, Token::Word(word) if words.iter().any(|known| word.eq_ignore_ascii_case(known)))
            };
            // Either word is taken for the other.
            if is_behind_from && is(&[b"stdin", b"stdout"]) {
                return true;
            }
            is_behind_from = is(&[b"from"]);
        }
        lexer.doubt() != Doubt::None
    })
}

/// The name at `lexer`; empty if it cannot be read.
pub(super) fn name(lexer: &mut Lexer<'_>) -> Box<[u8]> {
    let name = match lexer.token() {
        Some(Token::Word(word)) => word.to_ascii_lowercase(),
        Some(Token::Quoted(name)) => unquote(name),
        _ => Vec::new(),
    };
    if name.len() > IDENTIFIER_MAX { Box::default() } else { name.into() }
}

/// What stands between double quotes, of which each in it is doubled.
fn unquote(quoted: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(quoted.len());
    let mut rest = quoted;
    while let Some(at) = memchr::memchr(b'"', rest) {
        name.extend_from_slice(rest.get(..=at).unwrap_or_default());
        rest = rest.get(at + 2..).unwrap_or_default();
    }
    name.extend_from_slice(rest);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_server_reads_them() {
        use Naming::{Deallocates, Executes, Prepares};
        let long = "x".repeat(64);
        #[rustfmt::skip]
        let table: [(&str, Vec<Naming>); 33] = [
            ("DEALLOCATE s1",                                    vec![Deallocates(b"s1"[..].into())]),
            (" deallocate  prepare S1 ; ",                       vec![Deallocates(b"s1"[..].into())]),
            ("DEALLOCATE \"S 1\"",                               vec![Deallocates(b"S 1"[..].into())]),
            ("DEALLOCATE PREPARE \"_pg3_0\"",                    vec![Deallocates(b"_pg3_0"[..].into())]),
            ("DEALLOCATE\"s\";",                                 vec![Deallocates(b"s"[..].into())]),
            ("DEALLOCATE prepare",                               vec![Deallocates(b"prepare"[..].into())]),
            ("DEALLOCATE prepare; DEALLOCATE s",                 vec![Deallocates(b"prepare"[..].into()), Deallocates(b"s"[..].into())]),
            ("DEALLOCATE /* a */ s -- b",                        vec![Deallocates(b"s"[..].into())]),
            ("DEALLOCATE",                                       vec![Deallocates(b""[..].into())]),
            ("DEALLOCATE \"a\"\"b\"",                            vec![Deallocates(b"a\"b"[..].into())]),
            ("DEALLOCATE U&\"a\"",                               vec![Deallocates(b""[..].into())]),
            ("DEALLOCATE 1a",                                    vec![Deallocates(b""[..].into())]),
            ("DEALLOCATE ALL",                                   vec![]),
            ("DEALLOCATE PREPARE ALL",                           vec![]),
            ("DEALLOCATE \"all\"",                               vec![Deallocates(b"all"[..].into())]),
            ("DEALLOCATED a",                                    vec![]),
            ("PREPARE a AS SELECT 1",                            vec![Prepares(b"a"[..].into())]),
            ("PREPARE A (int) AS SELECT $1",                     vec![Prepares(b"a"[..].into())]),
            ("PREPARE transaction AS SELECT 1",                  vec![Prepares(b"transaction"[..].into())]),
            ("PREPARE TRANSACTION 'a'",                          vec![]),
            ("EXECUTE s1(5)",                                    vec![Executes(b"s1"[..].into())]),
            ("execute s1",                                       vec![Executes(b"s1"[..].into())]),
            ("EXPLAIN EXECUTE s1",                               vec![Executes(b"s1"[..].into())]),
            ("EXPLAIN (COSTS OFF) EXECUTE s1 (1)",               vec![Executes(b"s1"[..].into())]),
            ("EXPLAIN ANALYZE VERBOSE EXECUTE s1",               vec![Executes(b"s1"[..].into())]),
            ("CREATE TABLE a AS EXECUTE s1",                     vec![Executes(b"s1"[..].into())]),
            ("CREATE TEMP TABLE a (b) ON COMMIT DROP AS EXECUTE \"S\" (1)", vec![Executes(b"S"[..].into())]),
            ("EXPLAIN CREATE TABLE a AS EXECUTE s1",             vec![Executes(b"s1"[..].into())]),
            ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END; EXECUTE a", vec![Executes(b"a"[..].into())]),
            ("SELECT 'DEALLOCATE a'; DEALLOCATE b;;SELECT 1 AS execute; EXECUTE c",
                vec![Deallocates(b"b"[..].into()), Executes(b"c"[..].into())]),
            ("SELECT '\\'; DEALLOCATE a; SELECT ''",             vec![]),
            ("SELECT '\\ '; DEALLOCATE a",                       vec![Deallocates(b"a"[..].into())]),
            ("DEALLOCATE a; SELECT 'cut",                        vec![]),
        ];
        for (text, want) in table {
            assert_eq!(prepared_names(text.as_bytes()), want, "{text}");
        }
        assert_eq!(prepared_names(format!("DEALLOCATE {long}").as_bytes()), [Deallocates(Box::default())]);
    }

    #[test]
    fn what_sql_made_at_run_time_may_execute_is_found_by_its_spelling() {
        #[rustfmt::skip]
        let table: [(&str, &[&str]); 10] = [
            ("DO $$ BEGIN EXECUTE 'EXECUTE s1(NULL)'; END $$",  &["s1"]),
            ("DO 'BEGIN execute ''execute S_1''; END'",         &["s_1"]),
            ("DO $$ BEGIN EXECUTE 'EXECUTE \"S 1\"'; END $$", &["S 1"]),
            ("DO $$ BEGIN EXECUTE q; EXECUTE\n\tr; END $$",   &["q", "r"]),
            ("SELECT reexecute a, execute_b c, $execute d",     &[]),
            ("execute",                                         &[]),
            ("execute \"a",                                    &[]),
            ("execute execute a",                               &["execute", "a"]),
            ("-- execute a",                                    &["a"]),
            ("EXECUTE'a'",                                      &[]),
        ];
        for (text, want) in table {
            let found: Vec<_> =
                spelled_executions(text.as_bytes()).map(|name| String::from_utf8(name.into()).unwrap()).collect();
            assert_eq!(found, want, "{text}");
        }
        assert!(spelled_executions("EXECUTE ".repeat(3).as_bytes()).all(|name| &*name == b"execute"));
        assert!(spelled_executions(format!("execute {}", "x".repeat(64)).as_bytes()).next().is_none());
    }

    #[test]
    fn a_copy_that_reads_from_its_client_is_told_from_one_that_does_not() {
        #[rustfmt::skip]
        let table = [
            ("COPY t FROM STDIN",                                true),
            ("copy t (a) from /* c */ stdin with (format csv)",  true),
            ("COPY t FROM STDOUT",                               true),
            ("SELECT 1; COPY t FROM STDIN",                      true),
            ("COPY t FROM '/tmp/stdin'",                         false),
            ("COPY t TO STDOUT",                                 false),
            ("COPY (SELECT a FROM t) TO STDOUT",                 false),
            ("COPY t TO STDOUT -- from stdin",                   false),
            ("COPY t TO STDOUT; SELECT 'cut",                    true),
        ];
        for (text, want) in table {
            assert_eq!(reads_copy(text.as_bytes()), want, "{text}");
        }
    }
}
