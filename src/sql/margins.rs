//! What stands around the statements of a text: blanks and comments.

use super::lexer::{Backslash, Doubt, Lexer, Token};

/// What stands in front of the first token of `text`, and what stands behind the last one but for semicolons: blanks and
/// comments. Nothing if it is not certain where a token ends.
#[must_use]
pub fn margins(text: &[u8]) -> (&[u8], &[u8]) {
    let at = |lexer: &Lexer<'_>| text.len() - lexer.rest().len();
    let mut lexer = Lexer::new(text, Backslash::Plain);
    lexer.skip_blank();
    let begin = at(&lexer);
    let mut end = begin;
    while let Some(token) = lexer.token() {
        if token != Token::Mark(b';') {
            end = at(&lexer);
        }
    }
    if lexer.doubt() != Doubt::None {
        return (&[], &[]);
    }
    (text.get(..begin).unwrap_or_default(), text.get(end..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_hold_comments_and_no_token() {
        #[rustfmt::skip]
        let table: [(&str, &str, &str); 8] = [
            ("/* a */ SELECT 1 -- b",         "/* a */ ",   " -- b"),
            ("SELECT 1; /* a */ ;",           "",           "; /* a */ ;"),
            ("SELECT '/* a */'",              "",           ""),
            ("SELECT /* a */ 1",              "",           ""),
            ("-- a\nSELECT 1",                "-- a\n",     ""),
            ("/* only */",                    "/* only */", ""),
            ("/* a */ SELECT 'open",          "",           ""),
            ("",                              "",           ""),
        ];
        for (text, front, behind) in table {
            let (got, last) = margins(text.as_bytes());
            assert_eq!((got, last), (front.as_bytes(), behind.as_bytes()), "{text}");
        }
    }
}
