//! What a text makes of the session's role, in its own words.

use super::lexer::{Backslash, Lexer, Token};

/// What a text did last about the role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoleWord {
    /// It named one, or none (`SET ROLE NONE`).
    Set,
    /// It went back to the role of the session's start.
    Reset,
}

/// What `text` does last about the session's role, as far as it says so itself.
#[must_use]
pub fn role_word(text: &[u8]) -> Option<RoleWord> {
    let mut lexer = Lexer::new(text, Backslash::Plain);
    let mut last = None;
    loop {
        last = statement(&mut lexer).or(last);
        if lexer.rest().is_empty() {
            return last;
        }
    }
}

/// Of one statement, and moves past its semicolon.
fn statement(lexer: &mut Lexer<'_>) -> Option<RoleWord> {
    let told = if lexer.take_word(b"reset") {
        // Whoever it is from then on begins anew.
        let is_of_session = lexer.take_word(b"session") && lexer.take_word(b"authorization");
        (is_of_session || takes_role(lexer)).then_some(RoleWord::Reset)
    } else if lexer.take_word(b"set") {
        let _ = lexer.take_word(b"local");
        let is_of_session = lexer.take_word(b"session") && lexer.take_word(b"authorization");
        (is_of_session || takes_role(lexer)).then_some(RoleWord::Set)
    } else {
        (lexer.take_word(b"discard") && lexer.take_word(b"all")).then_some(RoleWord::Reset)
    };
    let (mut defaults, mut configures, mut names, mut value) = (false, false, false, None);
    while let Some(token) = lexer.token() {
        if names && !matches!(token, Token::Mark(b',' | b';')) {
            // What cannot be read here may be null: then it is a reset.
            names = false;
            value = Some(if matches!(token, Token::Text { .. }) { RoleWord::Set } else { RoleWord::Reset });
        }
        match token {
            Token::Mark(b';') => break,
            Token::Word(word) => {
                defaults |= word.eq_ignore_ascii_case(b"default");
                configures |= word.eq_ignore_ascii_case(b"set_config");
            }
            Token::Text { body, exact: true } => names = configures && body.eq_ignore_ascii_case(b"role"),
            _ => {}
        }
    }
    match told {
        Some(RoleWord::Set) if defaults => Some(RoleWord::Reset),
        told => told.or(value),
    }
}

fn takes_role(lexer: &mut Lexer<'_>) -> bool {
    let mut ahead = *lexer;
    lexer.take_word(b"role") || matches!(ahead.token(), Some(Token::Quoted(name)) if name.eq_ignore_ascii_case(b"role"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_about_the_role_counts() {
        use RoleWord::{Reset, Set};
        #[rustfmt::skip]
        let table: [(&str, Option<RoleWord>); 29] = [
            ("",                                            None),
            ("SELECT 1",                                    None),
            ("RESET ROLE",                                  Some(Reset)),
            ("reset /* it */ \"Role\"",                     Some(Reset)),
            ("SET ROLE NONE",                               Some(Set)),
            ("set session role x",                          Some(Set)),
            ("SET role TO DEFAULT",                         Some(Reset)),
            ("SET \"role\" = 'x'",                          Some(Set)),
            ("RESET SESSION AUTHORIZATION",                 Some(Reset)),
            ("SET SESSION AUTHORIZATION DEFAULT",           Some(Reset)),
            ("SET LOCAL SESSION AUTHORIZATION x",           Some(Set)),
            ("SET LOCAL ROLE x",                            Some(Set)),
            ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", None),
            ("DISCARD ALL",                                 Some(Reset)),
            ("DISCARD PLANS",                               None),
            ("RESET work_mem",                              None),
            ("RESET ALL",                                   None),
            ("SET search_path = role",                      None),
            ("RESET ROLE; SELECT 1",                        Some(Reset)),
            ("RESET ROLE; SET ROLE NONE;",                  Some(Set)),
            ("SET ROLE x; RESET ROLE",                      Some(Reset)),
            ("SELECT 'x; RESET ROLE'",                      None),
            ("SELECT set_config('role', 'none', false)",    Some(Set)),
            ("SELECT set_config('role', NULL, false)",      Some(Reset)),
            ("SELECT set_config('role', NULL, false), set_config('role', 'x', false)", Some(Set)),
            ("SELECT set_config('role', $1, false)",        Some(Reset)),
            ("SELECT set_config('role', nullif('x', 'x'), false)", Some(Reset)),
            ("SELECT set_config('work_mem', '1MB', true)",  None),
            ("GRANT a TO b; RESET ROLE",                    Some(Reset)),
        ];
        for (text, want) in table {
            assert_eq!(role_word(text.as_bytes()), want, "{text}");
        }
    }
}
