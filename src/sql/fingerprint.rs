//! What is left of a text when its literals are taken out.

use std::fmt::Write as _;

use super::lexer::{Backslash, Doubt, Lexer, Token};

/// The class of a literal. A number's sign is an operator, and `NULL` a word: neither is part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Class {
    /// A string of any spelling.
    String = 1,
    /// A whole number that fits an `int4`.
    Int4 = 2,
    /// One that fits only an `int8`.
    Int8 = 3,
    /// Any other number.
    Numeric = 4,
    /// A bit string, `B'1'` or `X'1F'`.
    Bit = 5,
    /// `TRUE` or `FALSE`.
    Bool = 6,
}

/// A literal of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Literal {
    /// Its class.
    pub class: Class,
    /// Where it begins in the text; bytes.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
}

/// A text's fingerprint: two texts with the same one differ in their literals' values, comments and blanks at most, and so
/// the grammar makes the same tree of them, but for those values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint {
    /// The tokens. A literal is one byte, its [`Class`].
    pub tokens: Vec<u8>,
    /// The literals, in order.
    pub literals: Vec<Literal>,
}

/// Stands between two tokens that touch, though each could be part of the other.
const TOUCH: u8 = 8;

impl Fingerprint {
    /// The fingerprint of `text`, if its tokens are certain: the text is not cut off inside of one, no byte of it is an
    /// unprintable one, and no character of a client encoding can have been mistaken.
    #[must_use]
    pub fn of(text: &[u8], escapes: bool) -> Option<Self> {
        let mut made = Self::default();
        made.tokens.reserve(text.len());
        made.take(text, escapes).then_some(made)
    }

    /// Becomes the fingerprint of `text`, in the room that it has. False if its tokens are not certain.
    pub(super) fn take(&mut self, text: &[u8], escapes: bool) -> bool {
        self.tokens.clear();
        self.literals.clear();
        self.read(text, escapes).is_some()
    }

    fn read(&mut self, text: &[u8], escapes: bool) -> Option<()> {
        let mut lexer = Lexer::new(text, if escapes { Backslash::Escape } else { Backslash::Plain });
        let mut last = Edge::None;
        let mut end = 0;
        loop {
            lexer.skip_blank();
            let start = text.len() - lexer.rest().len();
            let Some(token) = lexer.token_here() else { break };
            let gap = start > end;
            end = text.len() - lexer.rest().len();
            let span = text.get(start..end)?;
            let edge = if matches!(token, Token::Mark(_)) { Edge::Mark } else { Edge::Word };
            if edge == last {
                match (edge, gap) {
                    (Edge::Mark, false) | (Edge::None, _) => {}
                    (Edge::Word, false) => self.tokens.push(TOUCH),
                    (_, true) => self.tokens.push(b' '),
                }
            }
            last = edge;
            self.token(token, span, start, end)?;
        }
        (lexer.doubt() == Doubt::None).then_some(())
    }

    fn token(&mut self, token: Token<'_>, span: &[u8], start: usize, end: usize) -> Option<()> {
        let class = match token {
            Token::Word(word) if word.eq_ignore_ascii_case(b"true") || word.eq_ignore_ascii_case(b"false") => {
                Class::Bool
            }
            Token::Word(_) => {
                self.tokens.extend(span.iter().map(u8::to_ascii_lowercase));
                return Some(());
            }
            Token::Quoted(_) | Token::Escaped | Token::Parameter => {
                // Upper case, and what is not printable, mean what they are.
                self.tokens.extend_from_slice(span);
                return span.iter().all(|byte| *byte >= b' ').then_some(());
            }
            Token::Mark(byte) => {
                self.tokens.push(byte);
                return (byte > b' ' && byte != 0x7f).then_some(());
            }
            Token::Number => number(span),
            Token::Text { .. } if matches!(span.first(), Some(b'b' | b'B' | b'x' | b'X')) => Class::Bit,
            Token::Text { .. } => Class::String,
        };
        self.tokens.push(class as u8);
        self.literals.push(Literal { class, start, end });
        Some(())
    }
}

/// What the neighbour of a token would see of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Edge {
    None,
    Mark,
    Word,
}

/// The class of a number.
fn number(span: &[u8]) -> Class {
    let (base, digits) = match span {
        [b'0', b'x' | b'X', digits @ ..] => (16, digits),
        [b'0', b'o' | b'O', digits @ ..] => (8, digits),
        [b'0', b'b' | b'B', digits @ ..] => (2, digits),
        digits => (10, digits),
    };
    let mut value = 0_i64;
    for byte in digits.iter().filter(|byte| **byte != b'_') {
        let digit = char::from(*byte).to_digit(base).map(i64::from);
        let next = digit.and_then(|digit| value.checked_mul(i64::from(base))?.checked_add(digit));
        let Some(next) = next else { return Class::Numeric };
        value = next;
    }
    if i32::try_from(value).is_ok() { Class::Int4 } else { Class::Int8 }
}

/// A fingerprint as an operator reads it: a question mark and its class for each literal.
impl std::fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for part in String::from_utf8_lossy(&self.tokens).chars() {
            match u32::from(part) {
                1 => f.write_str("?string")?,
                2 => f.write_str("?int4")?,
                3 => f.write_str("?int8")?,
                4 => f.write_str("?numeric")?,
                5 => f.write_str("?bit")?,
                6 => f.write_str("?bool")?,
                8 => {}
                _ => f.write_char(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_replaced_by_their_class_and_nothing_else_is() {
        #[rustfmt::skip]
        let table: [(&str, &str); 18] = [
            ("SELECT  1",                                    "select?int4"),
            ("select /* a */ 2147483647,-- b\n2147483648",   "select?int4,?int8"),
            ("select 9223372036854775808, 1.5, 1e3, .5, 2.", "select?numeric,?numeric,?numeric,?numeric,?numeric"),
            ("select 0xFF, 0b1, 0o7, 1_000",                 "select?int4,?int4,?int4,?int4"),
            ("select 'a''b', E'\\'', $$x$$, U&'\\0041'",     "select?string,?string,?string,?string"),
            ("select B'1', x'1f'",                           "select?bit,?bit"),
            ("select NULL, True",                            "select null,?bool"),
            ("select $1, $23::int",                          "select$1,$23::int"),
            ("SELECT \"A\".\"b c\" FROM T",                  "select\"A\".\"b c\"from t"),
            ("select a - -1",                                "select a- -?int4"),
            ("select a<=b, a < = b",                         "select a<=b,a< =b"),
            ("select 'a'\n 'b'",                             "select?string"),
            ("select -1",                                    "select-?int4"),
            ("select a.b.c",                                 "select a.b.c"),
            ("select 1..2",                                  "select?int4.?int4"),
            ("",                                             ""),
            ("-- nothing",                                   ""),
            ("select N'x'",                                  "select n?string"),
        ];
        for (text, want) in table {
            let got = Fingerprint::of(text.as_bytes(), false).unwrap();
            assert_eq!(got.to_string().replace(' ', ""), want.replace(' ', ""), "{text}");
        }
    }

    #[test]
    fn what_differs_in_more_than_literals_has_another_fingerprint() {
        #[rustfmt::skip]
        let table: [(&str, &str, bool); 10] = [
            ("select 1",          "SELECT\n/* x */ 23",  true),
            ("select 'a'",        "select $x$b$x$",      true),
            ("select 1",          "select '1'",          false),
            ("select 1",          "select 10000000000",  false),
            ("select a b",        "select ab",           false),
            ("select a < = b",    "select a <= b",       false),
            ("select \"A\"",      "select a",            false),
            ("select 1 a",        "select 1a",           false),
            ("select null",       "select true",         false),
            ("select $1",         "select $2",           false),
        ];
        for (one, two, same) in table {
            let of = |text: &str| Fingerprint::of(text.as_bytes(), false).unwrap().tokens;
            assert_eq!(of(one) == of(two), same, "{one} | {two}");
        }
        for text in ["select 'a", "select \u{1}", "select $a$ x", "select /* x", "select \"\u{2}\""] {
            assert_eq!(Fingerprint::of(text.as_bytes(), false), None, "{text}");
        }
    }

    #[test]
    fn literals_are_found_where_they_stand() {
        let text = "SELECT set_config('app.x', $1, TRUE), 0x1F";
        let made = Fingerprint::of(text.as_bytes(), false).unwrap();
        let spans: Vec<&str> = made.literals.iter().map(|literal| &text[literal.start..literal.end]).collect();
        assert_eq!(spans, ["'app.x'", "TRUE", "0x1F"]);
    }
}
