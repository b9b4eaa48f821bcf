//! Framing: where messages begin and end in a stream cut into arbitrary chunks.

use crate::Malformed;

/// Bytes of a message header: the tag and the length word.
pub const HEADER: usize = 5;

/// Frames tagged messages in one direction of a connection.
///
/// ```text
/// Between ──whole message──▶ Between
///    └──part, caller streams it──▶ Inside{left} ──left bytes──▶ Between
/// ```
///
/// The scanner keeps no bytes: an incomplete header, or a message that its caller wants whole, stays
/// with the caller, who offers it again with more behind it. Any chunking gives the same messages.
///
/// Source: `PostgreSQL` 17 docs, §54.1.1 "Messaging Overview".
#[derive(Clone, Copy, Debug)]
pub struct Scanner {
    /// Body bytes still to come of a message whose front was passed on.
    left: u32,
    /// The largest length word accepted; bytes.
    limit: u32,
}

/// What is at the front of the bytes offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scanned<'a> {
    /// Fewer bytes than a header (perhaps none): offer them again with more.
    Short,
    /// More of a message that is being streamed: `len` bytes of it are here.
    Inside {
        /// Bytes of the message at hand.
        len: usize,
    },
    /// A whole message.
    Whole {
        /// The message's tag.
        tag: u8,
        /// What follows the header.
        body: &'a [u8],
    },
    /// A header and part of the body. Either offer it again with more, or [`Scanner::stream`] it.
    Part {
        /// The message's tag.
        tag: u8,
        /// The body's length when complete; bytes.
        body_len: u32,
        /// The body so far.
        seen: &'a [u8],
    },
}

impl Scanner {
    /// A scanner that refuses length words above `limit` bytes.
    #[must_use]
    pub const fn new(limit: u32) -> Self {
        Self { left: 0, limit }
    }

    /// Looks at the front of `input`. Consumes nothing but what [`Scanned::Inside`] reports.
    ///
    /// # Errors
    ///
    /// [`Malformed::Length`] for a length word below 4 or above the limit.
    #[inline]
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Scanned<'a>, Malformed> {
        if self.left > 0 {
            return Ok(self.inside(input));
        }
        let Some(([tag, word @ ..], rest)) = input.split_first_chunk::<HEADER>() else {
            return Ok(Scanned::Short);
        };
        let (tag, length) = (*tag, u32::from_be_bytes(*word));
        if length < 4 || length > self.limit {
            return Err(Malformed::Length { tag, length, limit: self.limit });
        }
        let body_len = length - 4;
        Ok(match rest.get(..body_len as usize) {
            Some(body) => Scanned::Whole { tag, body },
            None => Scanned::Part { tag, body_len, seen: rest },
        })
    }

    /// The [`Scanned::Part`] just seen is passed on as it comes: from here on its bytes are
    /// reported as [`Scanned::Inside`], beginning with what follows `seen`.
    #[inline]
    pub const fn stream(&mut self, body_len: u32, seen: usize) {
        debug_assert!(self.left == 0 && seen < body_len as usize);
        #[expect(clippy::cast_possible_truncation, reason = "seen is a part of body_len bytes")]
        let seen = seen as u32;
        self.left = body_len.saturating_sub(seen);
    }

    /// Whether the stream stands in the middle of a message whose front was passed on.
    #[must_use]
    pub const fn is_inside(&self) -> bool {
        self.left > 0
    }

    #[cold]
    fn inside<'a>(&mut self, input: &[u8]) -> Scanned<'a> {
        if input.is_empty() {
            return Scanned::Short;
        }
        let len = input.len().min(self.left as usize);
        #[expect(clippy::cast_possible_truncation, reason = "len is at most self.left, a u32")]
        let taken = len as u32;
        self.left -= taken;
        Scanned::Inside { len }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend(body);
        out
    }

    /// Feeds `chunks`, streaming every part, and gives (tag, body) of each message.
    fn collect(chunks: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut scanner = Scanner::new(u32::MAX);
        let mut carry: Vec<u8> = Vec::new();
        let mut out: Vec<(u8, Vec<u8>)> = Vec::new();
        for chunk in chunks {
            carry.extend(*chunk);
            loop {
                let used = match scanner.next(&carry).unwrap() {
                    Scanned::Short => break,
                    Scanned::Inside { len } => {
                        let body = carry[..len].to_vec();
                        out.last_mut().unwrap().1.extend(body);
                        len
                    }
                    Scanned::Whole { tag, body } => {
                        out.push((tag, body.to_vec()));
                        HEADER + body.len()
                    }
                    Scanned::Part { tag, body_len, seen } => {
                        out.push((tag, seen.to_vec()));
                        let n = seen.len();
                        scanner.stream(body_len, n);
                        HEADER + n
                    }
                };
                carry.drain(..used);
            }
        }
        assert!(carry.is_empty() && !scanner.is_inside());
        out
    }

    #[test]
    fn a_length_word_outside_its_range_is_refused() {
        #[rustfmt::skip]
        let table: [(&str, u32, bool); 5] = [
            ("zero",        0,        false),
            ("below four",  3,        false),
            ("empty body",  4,        true),
            ("at limit",    100,      true),
            ("above limit", 101,      false),
        ];
        for (name, length, ok) in table {
            let mut bytes = vec![b'Q'];
            bytes.extend(length.to_be_bytes());
            assert_eq!(Scanner::new(100).next(&bytes).is_ok(), ok, "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_messages(
            messages in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..12),
            cuts in prop::collection::vec(1usize..17, 1..80),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|(t, b)| message(*t, b)).collect();
            let mut chunks = Vec::new();
            let (mut rest, mut cuts) = (&stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                chunks.push(chunk);
                rest = tail;
            }
            prop_assert_eq!(collect(&chunks), messages);
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut scanner = Scanner::new(1 << 20);
            let mut rest = &bytes[..];
            while let Ok(scanned) = scanner.next(rest) {
                let used = match scanned {
                    Scanned::Short => break,
                    Scanned::Inside { len } => len,
                    Scanned::Whole { body, .. } => HEADER + body.len(),
                    Scanned::Part { body_len, seen, .. } => {
                        scanner.stream(body_len, seen.len());
                        HEADER + seen.len()
                    }
                };
                rest = &rest[used..];
            }
        }
    }
}
