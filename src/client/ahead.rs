//! What a client has sent of its next batch, looked at before any of it is passed on. Pure: bytes in, pieces out.

use pgweir_proto::frontend::{Bind, Parse, Tag, Target, query_text};
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

/// Longer batches are not looked at to their end; bytes.
pub const BATCH_MAX: usize = 64 * 1024;

/// Names of statements in a batch that are compared with each other, at most.
const NAMES_MAX: usize = 64;

/// Something in a batch that says what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The text of a `Query`.
    Query(&'a [u8]),
    /// The name and the text of a `Parse`.
    Parse(&'a [u8], &'a [u8]),
    /// A statement that is named by a `Bind` or `Describe`.
    Names(&'a [u8]),
    /// A statement that a `Close` takes away.
    Closes(&'a [u8]),
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
    /// It gives statements, or takes some away: by other messages than a query alone.
    pub changes: bool,
}

impl Ahead {
    /// Goes through the first batch in `input`. `scanner` is where the stream stands; a text of up to `text_max` bytes is
    /// passed on when it is whole.
    #[inline]
    pub fn look<'a>(scanner: Scanner, input: &'a [u8], text_max: usize, see: impl FnMut(Piece<'a>)) -> Self {
        let mut found = Self { len: 0, edge: Edge::Open, changes: false };
        found.edge = found.go_through(scanner, input, text_max, see);
        found
    }

    #[inline]
    fn go_through<'a>(
        &mut self,
        mut scanner: Scanner,
        input: &'a [u8],
        text_max: usize,
        mut see: impl FnMut(Piece<'a>),
    ) -> Edge {
        if scanner.is_inside() {
            return Edge::Inside;
        }
        while self.len <= BATCH_MAX {
            let (tag, body) = match scanner.next(input.get(self.len..).unwrap_or_default()) {
                Ok(Scanned::Whole { tag, body }) => (tag, body),
                Ok(Scanned::Short) => return Edge::Short,
                Ok(Scanned::Part { body_len, .. }) if self.len + HEADER + body_len as usize <= BATCH_MAX => {
                    return Edge::Short;
                }
                Ok(Scanned::Part { tag: b'Q' | b'P', body_len, .. }) if body_len as usize <= text_max => {
                    return Edge::Short;
                }
                Ok(Scanned::Part { tag, seen, .. }) => {
                    // What a long text does is not known before its end.
                    match tag {
                        b'Q' | b'P' | b'F' => see(Piece::Untold),
                        b'B' => see(Bind::parse(seen).map_or(Piece::Untold, |bind| Piece::Names(bind.statement))),
                        _ => {}
                    }
                    return Edge::Inside;
                }
                Ok(Scanned::Inside { .. }) => return Edge::Inside,
                // The session is about to end.
                Err(_) => return Edge::Open,
            };
            let Ok(tag) = Tag::from_byte(tag) else { return Edge::Open };
            let before = self.len;
            self.len += HEADER + body.len();
            match tag {
                Tag::Query => {
                    // It destroys the unnamed statement, which something in front of it may have used.
                    self.changes |= before > 0;
                    see(query_text(body).map_or(Piece::Untold, Piece::Query));
                    return Edge::Whole;
                }
                Tag::FunctionCall => {
                    see(Piece::Untold);
                    return Edge::Whole;
                }
                Tag::Sync => return Edge::Whole,
                Tag::Parse => {
                    self.changes = true;
                    see(Parse::parse(body).map_or(Piece::Untold, |parse| Piece::Parse(parse.statement, parse.query)));
                }
                Tag::Bind => see(Bind::parse(body).map_or(Piece::Untold, |bind| Piece::Names(bind.statement))),
                Tag::Describe => {
                    if let Ok(Target::Statement(name)) = Target::parse(body) {
                        see(Piece::Names(name));
                    }
                }
                Tag::Close => {
                    self.changes = true;
                    if let Ok(Target::Statement(name)) = Target::parse(body) {
                        see(Piece::Closes(name));
                    }
                }
                Tag::Execute => {}
                Tag::Flush => return Edge::Open,
                _ => {
                    self.len = before;
                    return Edge::Open;
                }
            }
        }
        Edge::Open
    }

    /// Whether the first batch in `input` would find other statements if it ran a second time: it gives a name that is known
    /// already, or takes away or replaces what it has used. True also of one that uses or gives very many.
    pub fn spoils(scanner: Scanner, input: &[u8], text_max: usize, is_known: impl Fn(&[u8]) -> bool) -> bool {
        // Used, and not given by the batch itself before.
        let (mut used, mut given): (Vec<&[u8]>, Vec<&[u8]>) = (Vec::new(), Vec::new());
        let mut spoils = false;
        let _ = Self::look(scanner, input, text_max, |piece| match piece {
            _ if spoils => {}
            Piece::Names(name) => {
                if !given.contains(&name) && !used.contains(&name) {
                    used.push(name);
                }
                spoils = used.len() > NAMES_MAX;
            }
            Piece::Parse(name, _) => {
                let is_lost = !name.is_empty() && is_known(name);
                if !given.contains(&name) {
                    given.push(name);
                }
                spoils = is_lost || used.contains(&name) || given.len() > NAMES_MAX;
            }
            Piece::Closes(name) => spoils = used.contains(&name),
            // It destroys the unnamed statement.
            Piece::Query(_) => spoils = used.iter().any(|name| name.is_empty()),
            Piece::Untold => {}
        });
        spoils
    }
}

#[cfg(test)]
mod tests {
    use pgweir_harness::wire::build::{
        bind, close_portal, close_statement, copy_data, describe_statement, execute, flush,
    };
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
                Piece::Closes(name) => format!("-{}", text(name)),
                Piece::Untold => "?".to_owned(),
            });
        });
        (found.len, found.edge, seen)
    }

    #[test]
    fn a_batch_is_spoilt_by_what_it_takes_from_itself() {
        let (s, unnamed, run) = (bind("", "s", &[]), bind("", "", &[]), execute("", 0));
        let (give_s, give_t, give_unnamed) = (parse("s", "A", &[]), parse("t", "A", &[]), parse("", "A", &[]));
        let (take_s, take_unnamed, end) = (close_statement("s"), close_statement(""), sync());
        let many: Vec<u8> = (0..=NAMES_MAX).flat_map(|number| describe_statement(&number.to_string())).collect();
        let cat = |pieces: &[&[u8]]| pieces.concat();
        #[rustfmt::skip]
        let table: [(&str, Vec<u8>, bool); 15] = [
            ("a known name, used",                cat(&[&s, &run, &end]),                            false),
            ("a new name, used",                  cat(&[&give_t, &s, &run, &end]),                   false),
            ("a known name, given",               cat(&[&give_s, &end]),                             true),
            ("used and closed",                   cat(&[&s, &run, &take_s, &end]),                   true),
            ("described and closed",              cat(&[&describe_statement("s"), &take_s, &end]),   true),
            ("closed alone",                      cat(&[&take_s, &end]),                             false),
            ("another one closed",                cat(&[&s, &run, &close_statement("u"), &end]),     false),
            ("a portal of that name closed",      cat(&[&s, &run, &close_portal("s"), &end]),        false),
            ("given, used, closed",               cat(&[&give_t, &bind("", "t", &[]), &run, &close_statement("t"), &end]), false),
            ("unnamed, given first",              cat(&[&give_unnamed, &unnamed, &run, &end]),       false),
            ("unnamed, given twice",              cat(&[&give_unnamed, &unnamed, &run, &give_unnamed, &unnamed, &run, &end]), false),
            ("unnamed of before, then given",     cat(&[&unnamed, &run, &give_unnamed, &unnamed, &run, &end]), true),
            ("unnamed of before, then closed",    cat(&[&unnamed, &run, &take_unnamed, &end]),       true),
            ("unnamed of before, then destroyed", cat(&[&unnamed, &run, &query("q")]),               true),
            ("very many",                         cat(&[&many, &end]),                               true),
        ];
        for (name, input, want) in table {
            let spoils = Ahead::spoils(Scanner::new(u32::MAX >> 1), &input, BATCH_MAX, |name| name == b"s");
            assert_eq!(spoils, want, "{name}");
            // Without any change it is not even asked.
            let changes = Ahead::look(Scanner::new(u32::MAX >> 1), &input, BATCH_MAX, |_| {}).changes;
            assert!(changes || !spoils || input == cat(&[&many, &end]), "{name}");
        }
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
            ("too long, the front", big[..99].to_vec(),                          0,              Edge::Inside, &["@s"]),
        ];
        for (name, input, len, edge, pieces) in table {
            let (got_len, got_edge, got_pieces) = look(&input);
            assert_eq!((got_len, got_edge), (len, edge), "{name}");
            assert_eq!(got_pieces, pieces, "{name}");
        }
    }
}
