//! What of a text goes back to where its session began, and where it says so.

use std::ops::Range;

use super::head::{Scope, qualified, take_scope};
use super::lexer::{Doubt, Lexer, Token};
use super::{Backslash, readings};

/// The resets of a text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resets {
    /// Statements, but for empty ones.
    pub statements: usize,
    /// In their order.
    pub all: Vec<Reset>,
    /// What stands outside of them.
    pub rest: Vec<Range<usize>>,
}

/// One of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Reset {
    /// What it resets.
    pub what: What,
    /// The place behind its statement.
    pub place: usize,
    /// Statements up to its own.
    pub nth: usize,
    /// Whether its statement has a semicolon, which is in front of its place.
    pub ended: bool,
}

/// What is reset. Names are folded.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// `RESET ALL`.
    All,
    /// `DISCARD ALL`, which does not stand beside other statements.
    Discard,
    /// `RESET name`, `SET [LOCAL] name TO DEFAULT`, `SET TIME ZONE LOCAL`, and the like.
    One {
        /// The setting.
        name: String,
        /// Only for the transaction.
        local: bool,
    },
}

/// The resets of `text`. None if it is not certain where its statements end.
#[must_use]
pub fn resets(text: &[u8]) -> Option<Resets> {
    let mut found = None;
    for backslash in readings(text) {
        let resets = read(text, *backslash)?;
        if found.as_ref().is_some_and(|other| *other != resets) {
            return None;
        }
        found = Some(resets);
    }
    found
}

fn read(text: &[u8], backslash: Backslash) -> Option<Resets> {
    let mut lexer = Lexer::new(text, backslash);
    let mut resets = Resets::default();
    let at = |lexer: &Lexer<'_>| text.len() - lexer.rest().len();
    loop {
        lexer.skip_blank();
        if lexer.rest().is_empty() {
            break;
        }
        if lexer.take_mark(b';') {
            continue;
        }
        resets.statements += 1;
        let start = at(&lexer);
        let what = what(lexer);
        let ended = skip(&mut lexer)?;
        let place = at(&lexer);
        if let Some(what) = what {
            resets.all.push(Reset { what, place, nth: resets.statements, ended });
        } else {
            resets.rest.push(start..place);
        }
    }
    (lexer.doubt() == Doubt::None).then_some(resets)
}

/// Moves past the statement at `lexer`, with its semicolon: whether it has one. None if nobody knows where it ends.
fn skip(lexer: &mut Lexer<'_>) -> Option<bool> {
    let creates = { *lexer }.take_word(b"create");
    let mut depth = 0_u32;
    loop {
        match lexer.token() {
            None => return (depth == 0).then_some(false),
            Some(Token::Mark(b';')) if depth == 0 => return Some(true),
            Some(Token::Mark(b'(')) => depth += 1,
            Some(Token::Mark(b')')) => depth = depth.checked_sub(1)?,
            // The semicolons of its body end nothing.
            Some(Token::Word(word)) if creates && word.eq_ignore_ascii_case(b"atomic") => return None,
            Some(_) => {}
        }
    }
}

/// What the statement at `lexer` resets by itself, if it is one that does.
fn what(mut lexer: Lexer<'_>) -> Option<What> {
    let what = if lexer.take_word(b"discard") {
        lexer.take_word(b"all").then_some(What::Discard)?
    } else if lexer.take_word(b"reset") {
        if lexer.take_word(b"all") {
            What::All
        } else {
            let name = if takes_time_zone(&mut lexer) { "timezone".to_owned() } else { name(&mut lexer)? };
            What::One { name, local: false }
        }
    } else {
        lexer.take_word(b"set").then_some(())?;
        set_to_default(&mut lexer)?
    };
    matches!(lexer.token(), None | Some(Token::Mark(b';'))).then_some(what)
}

/// What follows a `SET` up to its `DEFAULT`.
fn set_to_default(lexer: &mut Lexer<'_>) -> Option<What> {
    let local = !qualified(*lexer) && take_scope(lexer) == Some(Scope::Local);
    let plain = |name: &str| What::One { name: name.to_owned(), local };
    if takes_time_zone(lexer) {
        return (lexer.take_word(b"default") || lexer.take_word(b"local")).then(|| plain("timezone"));
    }
    let mut ahead = *lexer;
    if ahead.take_word(b"names")
        && !matches!({ ahead }.token(), Some(Token::Mark(b'=' | b'.')))
        && !{ ahead }.take_word(b"to")
    {
        *lexer = ahead;
        lexer.take_word(b"default");
        return Some(plain("client_encoding"));
    }
    let name = name(lexer)?;
    (lexer.take_mark(b'=') || lexer.take_word(b"to")).then_some(())?;
    lexer.take_word(b"default").then_some(What::One { name, local })
}

/// Moves past `TIME ZONE`.
fn takes_time_zone(lexer: &mut Lexer<'_>) -> bool {
    let mut ahead = *lexer;
    let taken = ahead.take_word(b"time") && ahead.take_word(b"zone");
    if taken {
        *lexer = ahead;
    }
    taken
}

/// A setting's name, with its dots; folded.
fn name(lexer: &mut Lexer<'_>) -> Option<String> {
    let mut name = String::new();
    loop {
        let Some(Token::Word(part) | Token::Quoted(part)) = lexer.token() else { return None };
        name.push_str(std::str::from_utf8(part).ok().filter(|part| !part.contains('"'))?);
        if !lexer.take_mark(b'.') {
            break;
        }
        name.push('.');
    }
    name.make_ascii_lowercase();
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each as `what@nth:the text behind its place`.
    fn shown(text: &str) -> Option<String> {
        let resets = resets(text.as_bytes())?;
        let show = |reset: &Reset| {
            let what = match &reset.what {
                What::All => "all".to_owned(),
                What::Discard => "discard".to_owned(),
                What::One { name, local } => format!("{}{name}", if *local { "local " } else { "" }),
            };
            let end = if reset.ended { ";" } else { "" };
            format!("{what}@{}{end}:{}", reset.nth, &text[reset.place..])
        };
        Some(resets.all.iter().map(show).collect::<Vec<_>>().join("|"))
    }

    #[test]
    fn a_reset_is_found_wherever_it_stands() {
        #[rustfmt::skip]
        let table: [(&str, Option<&str>); 42] = [
            ("RESET work_mem",                                     Some("work_mem@1:")),
            ("SELECT 1; RESET work_mem; SHOW work_mem",            Some("work_mem@2;: SHOW work_mem")),
            (";; reset /* x; */ Work_Mem -- back",                 Some("work_mem@1:")),
            ("RESET \"App\".mine",                                 Some("app.mine@1:")),
            ("RESET \"app.mine\";",                                Some("app.mine@1;:")),
            ("RESET TIME ZONE",                                    Some("timezone@1:")),
            ("RESET ALL; SELECT 1;",                               Some("all@1;: SELECT 1;")),
            ("RESET \"all\"",                                      Some("all@1:")),
            ("DISCARD ALL",                                        Some("discard@1:")),
            ("DISCARD TEMP",                                       Some("")),
            ("RESET SESSION AUTHORIZATION",                        Some("")),
            ("RESET TRANSACTION ISOLATION LEVEL",                  Some("")),
            ("RESET a b",                                          Some("")),
            ("RESET U&\"a\"",                                      Some("")),
            ("SET a TO DEFAULT",                                   Some("a@1:")),
            ("SET SESSION a = default",                            Some("a@1:")),
            ("SET LOCAL a.b TO DEFAULT; SELECT 1",                 Some("local a.b@1;: SELECT 1")),
            ("SET local TO DEFAULT",                               Some("local@1:")),
            ("SET local.x TO DEFAULT",                             Some("local.x@1:")),
            ("SET session.x TO DEFAULT",                           Some("session.x@1:")),
            ("SET a TO DEFAULT, b",                                Some("")),
            ("SET a TO 'default'",                                 Some("")),
            ("SET a TO b",                                         Some("")),
            ("SET TIME ZONE LOCAL",                                Some("timezone@1:")),
            ("SET LOCAL TIME ZONE DEFAULT",                        Some("local timezone@1:")),
            ("SET TIME ZONE 'UTC'",                                Some("")),
            ("SET NAMES",                                          Some("client_encoding@1:")),
            ("SET NAMES DEFAULT; SELECT 1",                        Some("client_encoding@1;: SELECT 1")),
            ("SET NAMES 'LATIN1'",                                 Some("")),
            ("SET names TO DEFAULT",                               Some("names@1:")),
            ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", Some("")),
            ("SET SESSION AUTHORIZATION DEFAULT",                  Some("")),
            ("SELECT 'RESET a; RESET b'; RESET c",                 Some("c@2:")),
            ("SELECT $$;RESET a;$$; RESET c; RESET d",             Some("c@2;: RESET d|d@3:")),
            ("CREATE RULE r AS ON INSERT TO t DO (SELECT 1; SELECT 2); RESET a", Some("a@2:")),
            ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END; RESET a", None),
            ("SELECT set_config('A', NULL, false), 1; RESET b",    Some("b@2:")),
            ("RESET a; SELECT 'C:\\dir'; RESET b",                 Some("a@1;: SELECT 'C:\\dir'; RESET b|b@3:")),
            ("RESET a; SELECT 'x\\', ' '; RESET b",                None),
            ("RESET a; SELECT 'open",                              None),
            ("RESET a; SELECT (1",                                 None),
            ("RESET a; SELECT 1)",                                 None),
        ];
        for (text, want) in table {
            assert_eq!(shown(text).as_deref(), want, "{text}");
        }
    }

    #[test]
    fn what_is_no_reset_is_told_and_every_statement_counted() {
        let text = "RESET a; SELECT 1;; SELECT set_config('b', NULL, true); DO 'x'";
        let resets = resets(text.as_bytes()).unwrap();
        let rest: Vec<&str> = resets.rest.iter().map(|range| &text[range.clone()]).collect();
        assert_eq!(rest, ["SELECT 1;", "SELECT set_config('b', NULL, true);", "DO 'x'"]);
        assert_eq!(resets.statements, 4);
    }
}
