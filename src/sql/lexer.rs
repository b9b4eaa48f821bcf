//! Bytes into tokens, as the server's own lexer cuts them.
//!
//! Only what decides where a token ends is read. A multi-character operator comes as its characters: no effect depends on
//! one.

use memchr::{memchr, memchr2, memmem};

/// What a backslash means in a string without prefix: `standard_conforming_strings` on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backslash {
    /// A character like others (`on`, the default since 9.1).
    Plain,
    /// It takes the next character with it (`off`).
    Escape,
}

/// One token; what it borrows lies in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    /// A keyword or an unquoted identifier, as typed.
    Word(&'a [u8]),
    /// What stands between double quotes; a doubled quote stays doubled.
    Quoted(&'a [u8]),
    /// An identifier with Unicode escapes, `U&"..."`.
    Escaped,
    /// A string of any kind.
    Text {
        /// What stands between the delimiters, untouched.
        body: &'a [u8],
        /// Whether `body` is the string's value: no escape, no doubled quote, no continuation on another line.
        exact: bool,
    },
    /// A number without sign, in any of its spellings.
    Number,
    /// A parameter, `$1`.
    Parameter,
    /// Any other single byte.
    Mark(u8),
}

/// Why the tokens of a text may not be those that the server finds, the graver the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Doubt {
    #[default]
    None,
    /// The text ended inside something. The server refuses such a text as a whole if it reads it likewise.
    Cut,
    /// A string may have ended elsewhere in another client encoding.
    Encoding,
}

/// A place in a text. A copy looks ahead without moving the original.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lexer<'a> {
    rest: &'a [u8],
    backslash: Backslash,
    doubt: Doubt,
}

impl<'a> Lexer<'a> {
    pub(super) const fn new(text: &'a [u8], backslash: Backslash) -> Self {
        Self { rest: text, backslash, doubt: Doubt::None }
    }

    /// What has not been read yet.
    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// What is wrong with the tokens so far.
    pub(super) const fn doubt(&self) -> Doubt {
        self.doubt
    }

    /// The next token; `None` at the end of the text.
    pub(super) fn token(&mut self) -> Option<Token<'a>> {
        self.skip_blank();
        self.token_here()
    }

    /// The token that begins here, where neither a blank nor a comment does.
    #[inline]
    pub(super) fn token_here(&mut self) -> Option<Token<'a>> {
        let (&byte, tail) = self.rest.split_first()?;
        if starts_word(byte) {
            return Some(self.word());
        }
        Some(match byte {
            b'\'' => self.text(tail, self.backslash == Backslash::Escape, true),
            b'"' => Token::Quoted(self.quoted(tail)),
            b'$' => self.dollar(tail),
            b'0'..=b'9' => self.number(),
            b'.' if tail.first().is_some_and(u8::is_ascii_digit) => self.number(),
            // One token to PL/pgSQL: the number behind it has no dot of its own.
            b'.' if tail.first() == Some(&b'.') => {
                self.rest = after(tail, 1);
                Token::Mark(byte)
            }
            _ => {
                self.rest = tail;
                Token::Mark(byte)
            }
        })
    }

    /// Moves past the keyword `word` (lower case) if it is next.
    pub(super) fn take_word(&mut self, word: &[u8]) -> bool {
        let mut ahead = *self;
        let taken = matches!(ahead.token(), Some(Token::Word(next)) if next.eq_ignore_ascii_case(word));
        if taken {
            *self = ahead;
        }
        taken
    }

    /// Moves past the single byte `mark` if it is next.
    pub(super) fn take_mark(&mut self, mark: u8) -> bool {
        let mut ahead = *self;
        let taken = ahead.token() == Some(Token::Mark(mark));
        if taken {
            *self = ahead;
        }
        taken
    }

    /// The number of the parameter that is next; 0 if that is none, or one that no statement has.
    pub(super) fn parameter(mut self) -> usize {
        self.skip_blank();
        let digits = after(self.rest, 1);
        let count = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(digits.get(..count).unwrap_or_default())
            .ok()
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    }

    /// The value of the string that is next, and has this `body`: its escapes read, unless it is of a kind, or has one, whose value
    /// depends on the server's encoding, or is in several pieces.
    ///
    /// Source: `PostgreSQL` 17 docs, §4.1.2.2 "String Constants with C-Style Escapes".
    pub(super) fn unescape(mut self, body: &[u8]) -> Option<Vec<u8>> {
        self.skip_blank();
        let escapes = match self.rest {
            [b'e' | b'E', b'\'', ..] => true,
            [b'\'', ..] => self.backslash == Backslash::Escape,
            _ => return None,
        };
        let (mut value, mut rest) = (Vec::with_capacity(body.len()), body);
        loop {
            let (byte, length) = match rest {
                [] => return Some(value),
                [b'\'', b'\'', ..] => (b'\'', 2),
                [b'\'', ..] => return None,
                [b'\\', tail @ ..] if escapes => escaped(tail).map(|(byte, length)| (byte, 1 + length))?,
                [byte, ..] => (*byte, 1),
            };
            value.push(byte);
            rest = after(rest, length);
        }
    }

    /// Moves past blanks and comments.
    #[inline]
    pub(super) fn skip_blank(&mut self) {
        // Mostly there is nothing, or a single space.
        if let [b' ', rest @ ..] = self.rest {
            self.rest = rest;
        }
        if self.rest.first().is_some_and(|byte| is_blank(*byte) || matches!(byte, b'-' | b'/')) {
            self.skip_blanks();
        }
    }

    fn skip_blanks(&mut self) {
        loop {
            match (self.rest.first(), self.rest.get(1)) {
                (Some(byte), _) if is_blank(*byte) => self.skip(1),
                (Some(b'-'), Some(b'-')) => self.skip(line_length(self.rest)),
                (Some(b'/'), Some(b'*')) => self.skip_comment(),
                _ => return,
            }
        }
    }

    /// Moves past a comment that begins here. Comments nest.
    fn skip_comment(&mut self) {
        let mut depth = 0_usize;
        while let Some(step) = memchr2(b'*', b'/', self.rest) {
            self.skip(step);
            match (self.rest.first(), self.rest.get(1)) {
                (Some(b'/'), Some(b'*')) => {
                    self.skip(2);
                    depth += 1;
                }
                (Some(b'*'), Some(b'/')) => {
                    self.skip(2);
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        return;
                    }
                }
                _ => self.skip(1),
            }
        }
        self.cut();
    }

    /// A word, or the string whose prefix it is.
    fn word(&mut self) -> Token<'a> {
        let length = self.rest.iter().position(|byte| !continues_word(*byte)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at_checked(length).unwrap_or((self.rest, &[]));
        self.rest = rest;
        // Every prefix is one letter.
        if length > 1 {
            return Token::Word(word);
        }
        match (word, self.rest) {
            (b"e" | b"E", [b'\'', tail @ ..]) => self.text(tail, true, true),
            (b"b" | b"B" | b"x" | b"X", [b'\'', tail @ ..]) | (b"u" | b"U", [b'&', b'\'', tail @ ..]) => {
                self.text(tail, false, false)
            }
            (b"u" | b"U", [b'&', b'"', tail @ ..]) => {
                self.quoted(tail);
                Token::Escaped
            }
            _ => Token::Word(word),
        }
    }

    /// A number. Letters that follow are a word of their own, as in servers before 15; later ones refuse them.
    fn number(&mut self) -> Token<'a> {
        self.skip(number_length(self.rest));
        Token::Number
    }

    /// A parameter, a string in dollar quotes, or a lone dollar sign.
    fn dollar(&mut self, tail: &'a [u8]) -> Token<'a> {
        if tail.first().is_some_and(u8::is_ascii_digit) {
            self.rest = after(tail, tail.iter().take_while(|byte| byte.is_ascii_digit()).count());
            return Token::Parameter;
        }
        let whole = self.rest;
        self.rest = tail;
        let Some(length) = tag_length(tail) else {
            return Token::Mark(b'$');
        };
        // The delimiter is the tag between its two dollar signs.
        let delimiter = whole.get(..length + 2).unwrap_or_default();
        self.skip(length + 1);
        let inside = self.rest;
        let Some(end) = memmem::find(inside, delimiter) else {
            self.cut();
            return Token::Text { body: inside, exact: false };
        };
        self.skip(end + delimiter.len());
        Token::Text { body: inside.get(..end).unwrap_or_default(), exact: true }
    }

    /// What is left of a quoted identifier after its first quote.
    fn quoted(&mut self, tail: &'a [u8]) -> &'a [u8] {
        let mut at = 0;
        while let Some(step) = memchr(b'"', after(tail, at)) {
            let end = at + step;
            if tail.get(end + 1) != Some(&b'"') {
                self.rest = after(tail, end + 1);
                return tail.get(..end).unwrap_or_default();
            }
            at = end + 2;
        }
        self.cut();
        tail
    }

    /// What is left of a string after its first quote.
    fn text(&mut self, tail: &'a [u8], escapes: bool, mut exact: bool) -> Token<'a> {
        let mut at = 0;
        loop {
            let rest = after(tail, at);
            let step = if escapes { memchr2(b'\'', b'\\', rest) } else { memchr(b'\'', rest) };
            let Some(step) = step else {
                self.cut();
                return Token::Text { body: tail, exact: false };
            };
            let hit = at + step;
            match (tail.get(hit), tail.get(hit + 1)) {
                (Some(b'\\'), next) => {
                    // In SJIS, BIG5, GBK and their like a backslash can be the second half of a character.
                    let high = hit.checked_sub(1).and_then(|before| tail.get(before)).is_some_and(|byte| *byte >= 0x80);
                    if high && matches!(next, Some(b'\'' | b'\\')) {
                        self.doubt = Doubt::Encoding;
                    }
                    at = hit + 2;
                    exact = false;
                }
                (_, Some(b'\'')) => {
                    at = hit + 2;
                    exact = false;
                }
                _ => {
                    let Some(gap) = continuation(after(tail, hit + 1)) else {
                        self.rest = after(tail, hit + 1);
                        return Token::Text { body: tail.get(..hit).unwrap_or_default(), exact };
                    };
                    at = hit + 1 + gap;
                    exact = false;
                }
            }
        }
    }

    /// Moves `count` bytes on, at most to the end.
    fn skip(&mut self, count: usize) {
        self.rest = after(self.rest, count);
    }

    /// The text ended inside a token.
    fn cut(&mut self) {
        self.rest = &[];
        self.doubt = self.doubt.max(Doubt::Cut);
    }
}

/// Whether `byte` separates tokens without being one.
pub(super) const fn is_blank(byte: u8) -> bool {
    // The vertical tab joined them in 16.
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

/// Whether `byte` may stand inside a word. Every byte of a character beyond ASCII may.
#[inline]
#[allow(clippy::indexing_slicing, reason = "there is a place for every byte")]
pub(super) const fn continues_word(byte: u8) -> bool {
    IN_WORDS[byte as usize] & CONTINUES != 0
}

#[inline]
#[allow(clippy::indexing_slicing, reason = "there is a place for every byte")]
const fn starts_word(byte: u8) -> bool {
    IN_WORDS[byte as usize] & STARTS != 0
}

const STARTS: u8 = 1;
const CONTINUES: u8 = 2;

/// What each byte may do in a word: a look into a table costs less than as many comparisons, for every byte of every text.
static IN_WORDS: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        #[allow(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "below 256")]
        {
            table[byte] = match byte as u8 {
                b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80.. => STARTS | CONTINUES,
                b'0'..=b'9' | b'$' => CONTINUES,
                _ => 0,
            };
        }
        byte += 1;
    }
    table
};

/// `bytes` without its first `count`.
fn after(bytes: &[u8], count: usize) -> &[u8] {
    bytes.get(count..).unwrap_or_default()
}

/// The character that an escape stands for whose backslash `bytes` follow, and how many of them it takes. None if it is not ASCII.
fn escaped(bytes: &[u8]) -> Option<(u8, usize)> {
    let number = |digits: &[u8], base: u32| {
        digits.iter().try_fold(0_u32, |number, digit| Some(number * base + char::from(*digit).to_digit(base)?))
    };
    let (first, tail) = bytes.split_first()?;
    let count = |bytes: &[u8], most: usize, base: u32| {
        bytes.iter().take(most).take_while(|byte| char::from(**byte).is_digit(base)).count()
    };
    let (value, length) = match first {
        b'b' => (8, 1),
        b'f' => (12, 1),
        b'n' => (10, 1),
        b'r' => (13, 1),
        b't' => (9, 1),
        b'u' | b'U' => return None,
        b'0'..=b'7' => {
            let length = count(bytes, 3, 8);
            (number(bytes.get(..length)?, 8)?, length)
        }
        b'x' if count(tail, 2, 16) > 0 => {
            let length = count(tail, 2, 16);
            (number(tail.get(..length)?, 16)?, 1 + length)
        }
        other => (u32::from(*other), 1),
    };
    let byte = u8::try_from(value).ok().filter(|byte| byte.is_ascii() && *byte != 0)?;
    Some((byte, length))
}

/// The length of the number that `bytes` begin with: `1`, `1_000`, `0x1F`, `1.5`, `.5`, `1.`, `1e-5`.
fn number_length(bytes: &[u8]) -> usize {
    let based = match bytes.get(1) {
        Some(b'x' | b'X') => digits(after(bytes, 2), u8::is_ascii_hexdigit),
        Some(b'o' | b'O') => digits(after(bytes, 2), |byte| matches!(byte, b'0'..=b'7')),
        Some(b'b' | b'B') => digits(after(bytes, 2), |byte| matches!(byte, b'0' | b'1')),
        _ => 0,
    };
    if bytes.first() == Some(&b'0') && based > 0 {
        return 2 + based;
    }
    let mut at = digits(bytes, u8::is_ascii_digit);
    // Two dots are an operator of PL/pgSQL.
    if bytes.get(at) == Some(&b'.') && bytes.get(at + 1) != Some(&b'.') {
        at += 1;
        if bytes.get(at).is_some_and(u8::is_ascii_digit) {
            at += digits(after(bytes, at), u8::is_ascii_digit);
        }
    }
    if matches!(bytes.get(at), Some(b'e' | b'E')) {
        let sign = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        let exponent = after(bytes, at + 1 + sign);
        if exponent.first().is_some_and(u8::is_ascii_digit) {
            at += 1 + sign + digits(exponent, u8::is_ascii_digit);
        }
    }
    at
}

/// How many bytes are digits; an underscore may stand in front of each.
fn digits(bytes: &[u8], is_digit: impl Fn(&u8) -> bool) -> usize {
    let mut at = 0;
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (Some(byte), _) if is_digit(byte) => at += 1,
            (Some(b'_'), Some(byte)) if is_digit(byte) => at += 2,
            _ => return at,
        }
    }
}

/// How far the end of the line is.
fn line_length(bytes: &[u8]) -> usize {
    memchr2(b'\n', b'\r', bytes).unwrap_or(bytes.len())
}

/// The length of a dollar quote's tag (0 for `$$`), if a tag and its second dollar sign are what `bytes` begins with.
fn tag_length(bytes: &[u8]) -> Option<usize> {
    let length = bytes.iter().position(|byte| *byte == b'$' || !continues_word(*byte))?;
    let starts = bytes.first().is_some_and(|byte| *byte == b'$' || starts_word(*byte));
    (starts && bytes.get(length) == Some(&b'$')).then_some(length)
}

/// How many bytes lie between a string's closing quote and the inside of its next piece, the opening quote included.
///
/// A string goes on after blanks that hold a line break, and keeps its kind: what continues an `E''` string has escapes.
fn continuation(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    let mut line_break = false;
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (Some(b'\n' | b'\r'), _) => {
                line_break = true;
                at += 1;
            }
            (Some(byte), _) if is_blank(*byte) => at += 1,
            (Some(b'-'), Some(b'-')) => at += line_length(after(bytes, at)),
            (Some(b'\''), _) if line_break => return Some(at + 1),
            _ => return None,
        }
    }
}
