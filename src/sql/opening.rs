//! Texts that open a transaction.

use super::lexer::{Backslash, Doubt, Lexer, Token};

/// What a `BEGIN` says of its transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opening {
    /// `READ ONLY` or `READ WRITE`; `READ WRITE` if it says both.
    pub read_only: Option<bool>,
    /// `ISOLATION LEVEL SERIALIZABLE`; none if it names no level.
    pub serializable: Option<bool>,
}

/// What `text` says of the transaction that it opens; none unless it is one `BEGIN` or `START TRANSACTION` and nothing
/// else.
#[must_use]
pub fn opens(text: &[u8]) -> Option<Opening> {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    if lexer.take_word(b"start") {
        lexer.take_word(b"transaction").then_some(())?;
    } else {
        lexer.take_word(b"begin").then_some(())?;
        let _ = lexer.take_word(b"work") || lexer.take_word(b"transaction");
    }
    let mut opening = Opening::default();
    loop {
        let mut ahead = lexer;
        match ahead.token() {
            None | Some(Token::Mark(b';')) => break,
            Some(Token::Mark(b',')) => lexer = ahead,
            _ => opening.mode(&mut lexer)?,
        }
    }
    while let Some(token) = lexer.token() {
        (token == Token::Mark(b';')).then_some(())?;
    }
    (lexer.doubt() == Doubt::None).then_some(opening)
}

impl Opening {
    /// One mode.
    fn mode(&mut self, lexer: &mut Lexer<'_>) -> Option<()> {
        if lexer.take_word(b"isolation") {
            lexer.take_word(b"level").then_some(())?;
            let serializable = lexer.take_word(b"serializable");
            let known = serializable
                || lexer.take_word(b"repeatable") && lexer.take_word(b"read")
                || lexer.take_word(b"read") && (lexer.take_word(b"committed") || lexer.take_word(b"uncommitted"));
            self.serializable = Some(serializable || self.serializable == Some(true));
            return known.then_some(());
        }
        if lexer.take_word(b"read") {
            let only = lexer.take_word(b"only");
            self.read_only = Some(only && self.read_only != Some(false));
            return (only || lexer.take_word(b"write")).then_some(());
        }
        lexer.take_word(b"not");
        lexer.take_word(b"deferrable").then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_as_they_are_spelled() {
        const ONLY: Opening = Opening { read_only: Some(true), serializable: None };
        const WRITE: Opening = Opening { read_only: Some(false), serializable: None };
        const PLAIN: Opening = Opening { read_only: None, serializable: None };
        #[rustfmt::skip]
        let table: [(&str, Option<Opening>); 20] = [
            ("BEGIN",                                               Some(PLAIN)),
            ("begin work;",                                         Some(PLAIN)),
            ("/* a */ BEGIN TRANSACTION -- b",                      Some(PLAIN)),
            ("START TRANSACTION",                                   Some(PLAIN)),
            ("BEGIN READ ONLY",                                     Some(ONLY)),
            ("BEGIN NOT DEFERRABLE READ ONLY;;",                    Some(ONLY)),
            ("START TRANSACTION READ WRITE",                        Some(WRITE)),
            ("BEGIN READ WRITE, READ ONLY",                         Some(WRITE)),
            ("BEGIN READ ONLY READ WRITE",                          Some(WRITE)),
            ("BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY",       Some(Opening { serializable: Some(true), ..ONLY })),
            ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",     Some(Opening { serializable: Some(false), ..ONLY })),
            ("BEGIN ISOLATION LEVEL READ COMMITTED",                Some(Opening { serializable: Some(false), ..PLAIN })),
            ("BEGIN; SELECT 1",                                     None),
            ("BEGIN READ",                                          None),
            ("BEGIN READ MOSTLY",                                   None),
            ("START",                                               None),
            ("BEGIN ISOLATION SERIALIZABLE",                        None),
            ("BEGIN 'x'",                                           None),
            ("BEGIN /* x",                                          None),
            ("SELECT 1",                                            None),
        ];
        for (text, want) in table {
            assert_eq!(opens(text.as_bytes()), want, "{text}");
        }
    }
}
