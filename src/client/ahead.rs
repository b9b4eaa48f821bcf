//! What a client has sent of its next batch, looked at before any of it is passed on. Pure: bytes in, pieces out.

use pgweir_proto::frontend::{Bind, Parse, Tag, Target, query_text};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

/// Longer batches are not looked at to their end; bytes.
pub const BATCH_MAX: usize = 64 * 1024;

/// Something in a batch that says what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The text of a `Query`.
    Query(&'a [u8]),
    /// The name and the text of a `Parse`.
    Parse(&'a [u8], &'a [u8]),
    /// A statement that is named by a `Bind` or `Describe`.
    Names(&'a [u8]),
    /// Something that no text tells of: a `FunctionCall`.
    Untold,
}

/// How what is there of a batch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// With a message that earns a `ReadyForQuery`: it is whole.
    Whole,
    /// Between two messages, or in front of the rest of a short one: more has to come.
    Short,
    /// Where its client may wait for an answer (a `Flush`), or with something that is not looked at.
    Open,
    /// The same, with the front of a long message, or the end of one.
    Inside,
}

/// A batch, as far as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// Bytes of its whole messages.
    pub len: usize,
    /// What comes behind them.
    pub edge: Edge,
}

impl Ahead {
    /// Goes through the first batch in `input`. `scanner` is where the stream stands; a text of up to `text_max` bytes is
    /// passed on when it is whole.
    pub fn look<'a>(mut scanner: Scanner, input: &'a [u8], text_max: usize, mut see: impl FnMut(Piece<'a>)) -> Self {
        let mut len = 0;
        let at = |len, edge| Self { len, edge };
        if scanner.is_inside() {
            return at(0, Edge::Inside);
        }
        while len <= BATCH_MAX {
            let (tag, body) = match scanner.next(input.get(len..).unwrap_or_default()) {
                Ok(Scanned::Whole { tag, body }) => (tag, body),
                Ok(Scanned::Short) => return at(len, Edge::Short),
                Ok(Scanned::Part { body_len, .. }) if len + HEADER + body_len as usize <= BATCH_MAX => {
                    return at(len, Edge::Short);
                }
                Ok(Scanned::Part { tag: b'Q' | b'P', body_len, .. }) if body_len as usize <= text_max => {
                    return at(len, Edge::Short);
                }
                Ok(Scanned::Part { tag, .. }) => {
                    // What a long text does is not known before its end.
                    if matches!(tag, b'Q' | b'P' | b'F') {
                        see(Piece::Untold);
                    }
                    return at(len, Edge::Inside);
                }
                Ok(Scanned::Inside { .. }) => return at(len, Edge::Inside),
                // The session is about to end.
                Err(_) => return at(len, Edge::Open),
            };
            let Ok(tag) = Tag::from_byte(tag) else { return at(len, Edge::Open) };
            let before = len;
            len += HEADER + body.len();
            match tag {
                Tag::Query => {
                    see(query_text(body).map_or(Piece::Untold, Piece::Query));
                    return at(len, Edge::Whole);
                }
                Tag::FunctionCall => {
                    see(Piece::Untold);
                    return at(len, Edge::Whole);
                }
                Tag::Sync => return at(len, Edge::Whole),
                Tag::Parse => {
                    see(Parse::parse(body).map_or(Piece::Untold, |parse| Piece::Parse(parse.statement, parse.query)));
                }
                Tag::Bind => see(Bind::parse(body).map_or(Piece::Untold, |bind| Piece::Names(bind.statement))),
                Tag::Describe => {
                    if let Ok(Target::Statement(name)) = Target::parse(body) {
                        see(Piece::Names(name));
                    }
                }
                Tag::Execute | Tag::Close => {}
                Tag::Flush => return at(len, Edge::Open),
                _ => return at(before, Edge::Open),
            }
        }
        at(len, Edge::Open)
    }
}

#[cfg(test)]
mod tests {
    use pgweir_harness::wire::build::{bind, close_portal, copy_data, describe_statement, execute, flush};
    use pgweir_harness::wire::build::{function_call, parse, query, sync, terminate};

    use super::*;

    fn look(input: &[u8]) -> (usize, Edge, Vec<String>) {
        let mut seen = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let found = Ahead::look(Scanner::new(u32::MAX >> 1), input, 3 * BATCH_MAX, |piece| {
            seen.push(match piece {
                Piece::Query(query) => text(query),
                Piece::Parse(name, query) => format!("{}={}", text(name), text(query)),
                Piece::Names(name) => format!("@{}", text(name)),
                Piece::Untold => "?".to_owned(),
            });
        });
        (found.len, found.edge, seen)
    }

    #[test]
    fn a_batch_ends_where_the_server_would_say_that_it_is_ready() {
        let extended = [parse("s", "SELECT 1", &[]), bind("", "s", &[]), execute("", 0), close_portal("")].concat();
        let whole = [extended.clone(), sync()].concat();
        let (next, long) = (query("next"), "x".repeat(BATCH_MAX));
        let big = bind("", "s", &[Some(long.as_bytes())]);
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, usize, Edge, &[&str]); 15] = [
            ("a query",           query("q"),                                    7,              Edge::Whole,  &["q"]),
            ("two queries",       [query("q"), next.clone()].concat(),           7,              Edge::Whole,  &["q"]),
            ("a batch",           whole.clone(),                                 whole.len(),    Edge::Whole,  &["s=SELECT 1", "@s"]),
            ("and more",          [whole.clone(), next].concat(),                whole.len(),    Edge::Whole,  &["s=SELECT 1", "@s"]),
            ("without its sync",  extended.clone(),                              extended.len(), Edge::Short,  &["s=SELECT 1", "@s"]),
            ("cut",               whole[..whole.len() - 7].to_vec(),             whole.len() - 12, Edge::Short, &["s=SELECT 1", "@s"]),
            ("flushed",           [describe_statement("d"), flush()].concat(),   13,             Edge::Open,   &["@d"]),
            ("a call",            function_call(1, &[]),                         15,             Edge::Whole,  &["?"]),
            ("a goodbye",         [query("q"), terminate()].concat(),            7,              Edge::Whole,  &["q"]),
            ("a goodbye first",   terminate(),                                   0,              Edge::Open,   &[]),
            ("a long text, cut",    query(&"x".repeat(2 * BATCH_MAX))[..99].to_vec(), 0, Edge::Short,  &[]),
            ("too long a text, cut", query(&"x".repeat(4 * BATCH_MAX))[..99].to_vec(), 0, Edge::Inside, &["?"]),
            ("data",              copy_data(b"x"),                               0,              Edge::Open,   &[]),
            ("too long",          [big.clone(), sync()].concat(),                big.len(),      Edge::Open,   &["@s"]),
            ("too long, the front", big[..99].to_vec(),                          0,              Edge::Inside, &[]),
        ];
        for (name, input, len, edge, pieces) in table {
            let (got_len, got_edge, got_pieces) = look(&input);
            assert_eq!((got_len, got_edge), (len, edge), "{name}");
            assert_eq!(got_pieces, pieces, "{name}");
        }
    }
}
