//! What a comment of a text wishes.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::sql::margins;

/// What a comment in the text wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// `/* pgweir.route=primary */`
    Primary,
    /// `/* pgweir.route=follower */`
    Follower,
}

const KEY: &[u8] = b"pgweir.route";

static FINDER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));

impl Hint {
    /// What the comments in front of the first token of `text` and behind its last one wish; `primary` if they wish both.
    pub(super) fn of(text: &[u8]) -> Option<Self> {
        let finder = &*FINDER;
        finder.find(text)?;
        let (front, behind) = margins(text);
        let mut wish = None;
        for margin in [front, behind] {
            for at in finder.find_iter(margin) {
                match Self::at(margin, at) {
                    None => {}
                    Some(Self::Primary) => return Some(Self::Primary),
                    follower => wish = follower,
                }
            }
        }
        wish
    }

    /// The wish whose key begins `at` there.
    fn at(comment: &[u8], at: usize) -> Option<Self> {
        let joins = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        if at.checked_sub(1).and_then(|before| comment.get(before)).is_some_and(joins) {
            return None;
        }
        let value = comment.get(at + KEY.len()..)?.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
        let value = value.strip_prefix(b"'").unwrap_or(value);
        let end = value.iter().position(|byte| !joins(byte)).unwrap_or(value.len());
        match value.get(..end)? {
            b"primary" => Some(Self::Primary),
            b"follower" => Some(Self::Follower),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_stand_in_comments_around_the_statement_and_nowhere_else() {
        const PRIMARY: Option<Hint> = Some(Hint::Primary);
        const FOLLOWER: Option<Hint> = Some(Hint::Follower);
        #[rustfmt::skip]
        let table: [(&str, Option<Hint>); 22] = [
            ("/* pgweir.route=follower */ SELECT 1",                         FOLLOWER),
            ("/*pgweir.route=primary*/SELECT 1",                             PRIMARY),
            ("-- pgweir.route = follower\nSELECT 1",                         FOLLOWER),
            ("SELECT 1 /* pgweir.route=follower */",                         FOLLOWER),
            ("SELECT 1; -- pgweir.route=follower",                           FOLLOWER),
            ("/* a='b' */ /* app=x, pgweir.route=follower, y=z */ SELECT 1", FOLLOWER),
            ("/* pgweir.route='follower' */ SELECT 1",                       FOLLOWER),
            ("/* pgweir.route=follower */ SELECT 1 /* pgweir.route=primary */", PRIMARY),
            ("/* pgweir.route=primary */ SELECT 1 /* pgweir.route=follower */", PRIMARY),
            ("/* pgweir.route=follower */ BEGIN",                            FOLLOWER),
            ("/* pgweir.route=auto */ SELECT 1",                             None),
            ("/* pgweir.route=followers */ SELECT 1",                        None),
            ("/* my.pgweir.route=follower */ SELECT 1",                      None),
            ("/* pgweir.routes=follower */ SELECT 1",                        None),
            ("/* pgweir.route */ SELECT 1",                                  None),
            ("SELECT /* pgweir.route=follower */ 1",                         None),
            ("SELECT '/* pgweir.route=follower */'",                         None),
            ("SELECT 1 AS \"pgweir.route=follower\"",                        None),
            ("SELECT $$ -- pgweir.route=follower\n$$",                       None),
            ("/* pgweir.route=follower */ SELECT 'open",                     None),
            ("SELECT 1",                                                     None),
            ("",                                                             None),
        ];
        for (text, want) in table {
            assert_eq!(Hint::of(text.as_bytes()), want, "{text}");
        }
    }
}
