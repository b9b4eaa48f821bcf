//! What the body of a function does and mentions, as far as it has to be known before it may run on a follower.

use super::lexer::{Backslash, Doubt, Lexer, Token};

/// Tokens that are looked at to tell the columns of a common table expression from arguments.
const COLUMNS_MAX: usize = 64;

/// Something that a body mentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mention<'a> {
    /// A command that writes, or may.
    Writes,
    /// Rows or tables are locked.
    Locks,
    /// A command that changes the session or the transaction.
    Session,
    /// What is run cannot be read.
    Opaque,
    /// A word in front of a parenthesis: a function's name, unless it is one of the syntax.
    Call {
        /// The name, as typed.
        name: &'a [u8],
        /// It stands in quotes.
        quoted: bool,
        /// The string that the parenthesis begins with.
        literal: Option<&'a [u8]>,
    },
    /// Any other word.
    Name(&'a [u8]),
}

/// Tells `each` what the body `text` mentions. A body in PL/pgSQL assigns by `INTO`, and declares variables by `DECLARE`.
/// What is made from a body in standard SQL begins with the whole `CREATE FUNCTION`.
///
/// It errs on one side: a body may do less.
pub fn routine<'a>(text: &'a [u8], plpgsql: bool, each: &mut dyn FnMut(Mention<'a>)) {
    let doubtful = Walk::new(text, Backslash::Plain, plpgsql).run(each) != Doubt::None;
    if doubtful || memchr::memchr(b'\\', text).is_some() {
        // Its quotes may be others than they seem.
        Walk::new(text, Backslash::Escape, plpgsql).run(each);
    }
}

struct Walk<'a> {
    lexer: Lexer<'a>,
    plpgsql: bool,
    /// A statement may begin here.
    begins: bool,
    last: Last,
}

/// The last token, as far as it matters to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    For,
    As,
    /// Behind it a common table expression may be named.
    With,
    Other,
}

impl<'a> Walk<'a> {
    fn new(text: &'a [u8], backslash: Backslash, plpgsql: bool) -> Self {
        let mut walk = Self { lexer: Lexer::new(text, backslash), plpgsql, begins: true, last: Last::Other };
        let mut ahead = walk.lexer;
        if ahead.take_word(b"create") && ahead.take_word(b"or") && ahead.take_word(b"replace") {
            walk.skip_header();
        }
        walk
    }

    /// Moves to where the body begins.
    fn skip_header(&mut self) {
        while let Some(token) = self.lexer.token() {
            if matches!(token, Token::Word(word) if is_any(word, &[b"atomic", b"return"])) {
                return;
            }
        }
    }

    fn run(mut self, each: &mut dyn FnMut(Mention<'a>)) -> Doubt {
        while let Some(token) = self.lexer.token() {
            let began = std::mem::replace(&mut self.begins, matches!(token, Token::Mark(b';' | b'>')));
            let last = std::mem::replace(&mut self.last, Last::Other);
            match token {
                Token::Word(word) => self.word(word, began, last, each),
                Token::Quoted(name) => self.name(name, true, last, each),
                Token::Escaped => each(Mention::Opaque),
                Token::Mark(b',') => self.last = Last::With,
                _ => {}
            }
        }
        self.lexer.doubt()
    }

    fn word(&mut self, word: &'a [u8], began: bool, last: Last, each: &mut dyn FnMut(Mention<'a>)) {
        let is = |known: &[u8]| word.eq_ignore_ascii_case(known);
        self.begins = is_any(word, &[b"begin", b"then", b"else", b"loop", b"atomic"]);
        if last == Last::For && is_any(word, &[b"update", b"share", b"no", b"key"]) {
            // `FOR key IN` is a loop.
            let mut ahead = self.lexer;
            if !(is(b"key") && ahead.take_word(b"in")) {
                each(Mention::Locks);
            }
            return;
        }
        if is_any(word, &[b"insert", b"update", b"delete", b"merge"]) {
            return each(Mention::Writes);
        }
        if is(b"execute") {
            return each(Mention::Opaque);
        }
        if is(b"into") && !self.plpgsql {
            return each(Mention::Writes);
        }
        if began && let Some(mention) = command(word, self.plpgsql) {
            return each(mention);
        }
        self.last = match () {
            () if is(b"for") => Last::For,
            () if is(b"as") => Last::As,
            () if is(b"with") || is(b"recursive") => Last::With,
            () => Last::Other,
        };
        self.name(word, false, last, each);
    }

    /// A word that may be a name.
    fn name(&mut self, name: &'a [u8], quoted: bool, last: Last, each: &mut dyn FnMut(Mention<'a>)) {
        let mut ahead = self.lexer;
        if !ahead.take_mark(b'(') {
            return each(Mention::Name(name));
        }
        if last == Last::As || last == Last::With && self.names_columns() {
            return each(Mention::Name(name));
        }
        let literal = match ahead.token() {
            Some(Token::Text { body, exact: true }) => Some(body),
            _ => None,
        };
        each(Mention::Call { name, quoted, literal });
    }

    /// Whether what is in the parentheses here are the columns of a common table expression.
    fn names_columns(&self) -> bool {
        let mut lexer = self.lexer;
        let mut depth = 0_usize;
        for _ in 0..COLUMNS_MAX {
            match lexer.token() {
                None => return false,
                Some(Token::Mark(b'(')) => depth += 1,
                Some(Token::Mark(b')')) if depth == 1 => {
                    if !lexer.take_word(b"as") {
                        return false;
                    }
                    lexer.take_word(b"not");
                    lexer.take_word(b"materialized");
                    return lexer.take_mark(b'(');
                }
                Some(Token::Mark(b')')) => depth = depth.saturating_sub(1),
                Some(_) => {}
            }
        }
        false
    }
}

fn is_any(word: &[u8], known: &[&[u8]]) -> bool {
    known.iter().any(|known| word.eq_ignore_ascii_case(known))
}

/// What the command does that begins with `word`, if it is none that reads.
fn command(word: &[u8], plpgsql: bool) -> Option<Mention<'static>> {
    const SESSION: [&[u8]; 13] = [
        b"set",
        b"reset",
        b"listen",
        b"unlisten",
        b"load",
        b"discard",
        b"prepare",
        b"deallocate",
        b"commit",
        b"rollback",
        b"savepoint",
        b"release",
        b"abort",
    ];
    const WRITES: [&[u8]; 19] = [
        b"truncate",
        b"create",
        b"alter",
        b"drop",
        b"grant",
        b"revoke",
        b"copy",
        b"notify",
        b"refresh",
        b"reindex",
        b"cluster",
        b"vacuum",
        b"analyze",
        b"analyse",
        b"comment",
        b"security",
        b"import",
        b"checkpoint",
        b"reassign",
    ];
    if is_any(word, &SESSION) || !plpgsql && is_any(word, &[b"declare", b"fetch", b"move", b"close", b"start"]) {
        Some(Mention::Session)
    } else if is_any(word, &WRITES) {
        Some(Mention::Writes)
    } else if is_any(word, &[b"do", b"call"]) {
        Some(Mention::Opaque)
    } else {
        word.eq_ignore_ascii_case(b"lock").then_some(Mention::Locks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `w`rites, `l`ocks, `s`ession, `o`paque, and the names called.
    fn seen(text: &str, plpgsql: bool) -> String {
        let mut seen = Vec::new();
        routine(text.as_bytes(), plpgsql, &mut |mention| {
            let word = match mention {
                Mention::Writes => "!w".to_owned(),
                Mention::Locks => "!l".to_owned(),
                Mention::Session => "!s".to_owned(),
                Mention::Opaque => "!o".to_owned(),
                Mention::Call { name, literal, .. } => {
                    let literal = literal.map(|text| format!("'{}'", String::from_utf8_lossy(text)));
                    format!("{}{}", String::from_utf8_lossy(name), literal.unwrap_or_default())
                }
                Mention::Name(_) => return,
            };
            seen.push(word);
        });
        seen.join(" ")
    }

    #[test]
    fn bodies_are_told_by_what_they_do_and_call() {
        #[rustfmt::skip]
        let table: [(&str, bool, &str); 24] = [
            ("SELECT 1",                                                       false, ""),
            ("SELECT f(g(1)), now()",                                          false, "f g now"),
            ("SELECT a INTO b FROM t",                                         false, "!w"),
            ("BEGIN SELECT a INTO b FROM t; RETURN b; END",                    true,  ""),
            ("BEGIN RETURN current_setting('app.x', true); END",               true,  "current_setting'app.x'"),
            ("BEGIN IF a THEN INSERT INTO t VALUES (1); END IF; END",          true,  "!w VALUES"),
            ("SELECT * FROM t FOR UPDATE",                                     false, "!l"),
            ("SELECT * FROM t FOR NO KEY UPDATE",                              false, "!l !w"),
            ("BEGIN FOR key IN SELECT k FROM t LOOP END LOOP; END",            true,  ""),
            ("BEGIN FOR r IN EXECUTE q LOOP END LOOP; END",                    true,  "!o"),
            ("BEGIN SET LOCAL a.b = 1; END",                                   true,  "!s"),
            ("DECLARE c int; BEGIN RETURN c; END",                             true,  ""),
            ("DECLARE c CURSOR FOR SELECT 1",                                  false, "!s"),
            ("WITH x(a, b) AS (SELECT 1, 2), y (c) AS MATERIALIZED (SELECT 3) SELECT f(c, a)", false, "AS f"),
            ("SELECT * FROM f(1) AS g(a, b)",                                  false, "f"),
            ("WITH x AS (DELETE FROM t RETURNING a) SELECT a FROM x",          false, "AS !w"),
            ("SELECT comment, lock FROM t",                                    false, ""),
            ("BEGIN LOCK t; PERFORM 1; CALL p(); END",                         true,  "!l !o p"),
            ("BEGIN RETURN 'INSERT f()'; /* DELETE g() */ END -- UPDATE h()",  true,  ""),
            ("SELECT U&\"\\0066\"(1)",                                         false, "!o !o"),
            ("CREATE OR REPLACE FUNCTION f(a integer DEFAULT g(1))\n RETURNS integer\n SET x TO '1'\nBEGIN ATOMIC\n SELECT h(1);\nEND", false, "h"),
            ("CREATE OR REPLACE FUNCTION f()\n RETURNS integer\nRETURN nextval('s'::regclass)", false, "nextval's'"),
            ("SELECT 'a\\', f(), '",                                           false, "f"),
            ("SELECT \"F\"(1)",                                                false, "F"),
        ];
        for (text, plpgsql, want) in table {
            assert_eq!(seen(text, plpgsql), want, "{text}");
        }
    }
}
