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
}
