//! Counts answers without reading them: frames the backend's messages in a stream of any chunking and keeps three
//! numbers. This is all the load generator does with what it receives.

/// Bytes of an error's body that are kept to tell what it said.
const ERROR_KEPT: usize = 512;

/// The peer's bytes are no backend messages; the stream is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("message {tag:#04x} declares {length} bytes, less than its own length word")]
pub struct Broken {
    /// The message's first byte.
    pub tag: u8,
    /// Its length word, bytes.
    pub length: u32,
}

/// What one connection has received so far.
///
/// ```text
/// Header{have} ──fifth byte──▶ Body{left} ──last byte──▶ Header{0}
/// ```
///
/// Source: `PostgreSQL` docs, "Message Formats": a tag byte, then a length word that counts itself.
#[derive(Clone, Debug, Default)]
pub struct ReplyCounter {
    place: Place,
    ready: u64,
    rows: u64,
    errors: u64,
    first_error: Vec<u8>,
}

/// Where the next byte belongs.
#[derive(Clone, Copy, Debug)]
enum Place {
    Header { bytes: [u8; 5], have: usize },
    Body { tag: u8, left: usize },
}

impl Default for Place {
    fn default() -> Self {
        Self::Header { bytes: [0; 5], have: 0 }
    }
}

impl ReplyCounter {
    /// Takes the next bytes of the stream; returns how many `ReadyForQuery` ended within them.
    ///
    /// # Errors
    ///
    /// [`Broken`] if a length word is below 4.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<u64, Broken> {
        let before = self.ready;
        while !bytes.is_empty() {
            bytes = match self.place {
                Place::Header { bytes: head, have } => self.take_header(head, have, bytes)?,
                Place::Body { tag, left } => self.take_body(tag, left, bytes),
            };
        }
        Ok(self.ready - before)
    }

    /// `ReadyForQuery` messages so far.
    #[must_use]
    pub fn ready(&self) -> u64 {
        self.ready
    }

    /// `DataRow` messages so far.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// `ErrorResponse` messages so far.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors
    }

    /// The text of the first error, its fields joined by spaces; empty if there was none.
    #[must_use]
    pub fn first_error(&self) -> String {
        error_text(&self.first_error)
    }

    fn take_header<'a>(&mut self, mut head: [u8; 5], mut have: usize, mut bytes: &'a [u8]) -> Result<&'a [u8], Broken> {
        for slot in head.iter_mut().skip(have) {
            let Some((byte, rest)) = bytes.split_first() else { break };
            *slot = *byte;
            have += 1;
            bytes = rest;
        }
        if have < head.len() {
            self.place = Place::Header { bytes: head, have };
            return Ok(bytes);
        }
        let [tag, a, b, c, d] = head;
        let length = u32::from_be_bytes([a, b, c, d]);
        let body = length.checked_sub(4).ok_or(Broken { tag, length })?;
        if body == 0 {
            self.finish(tag);
        } else {
            self.place = Place::Body { tag, left: body as usize };
        }
        Ok(bytes)
    }

    fn take_body<'a>(&mut self, tag: u8, left: usize, bytes: &'a [u8]) -> &'a [u8] {
        let (body, rest) = bytes.split_at_checked(left).unwrap_or((bytes, &[]));
        if tag == b'E' && self.errors == 0 {
            let room = ERROR_KEPT.saturating_sub(self.first_error.len());
            self.first_error.extend(body.iter().take(room));
        }
        if body.len() == left {
            self.finish(tag);
        } else {
            self.place = Place::Body { tag, left: left - body.len() };
        }
        rest
    }

    fn finish(&mut self, tag: u8) {
        match tag {
            b'Z' => self.ready += 1,
            b'D' => self.rows += 1,
            b'E' => self.errors += 1,
            _ => {}
        }
        self.place = Place::default();
    }
}

/// An `ErrorResponse` body as one line: severity, SQLSTATE and message.
///
/// Source: `PostgreSQL` docs, "Error and Notice Message Fields".
#[must_use]
pub fn error_text(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0).filter_map(|field| {
        let (code, text) = field.split_first()?;
        matches!(code, b'S' | b'C' | b'M').then(|| String::from_utf8_lossy(text).into_owned())
    });
    fields.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), body].concat()
    }

    fn answer() -> Vec<u8> {
        [
            message(b'1', b""),
            message(b'T', &[7; 33]),
            message(b'D', b"Z\0\0\0\x05I"),
            message(b'D', &[0; 700]),
            message(b'C', b"SELECT 2\0"),
            message(b'E', b"SERROR\0C57014\0Mstop\0\0"),
            message(b'Z', b"I"),
            message(b'N', b""),
            message(b'Z', b"T"),
        ]
        .concat()
    }

    #[test]
    fn counts_do_not_depend_on_the_chunking() {
        let bytes = answer();
        for size in 1..=bytes.len() {
            let mut counter = ReplyCounter::default();
            let mut told = 0;
            for chunk in bytes.chunks(size) {
                told += counter.feed(chunk).unwrap();
            }
            let got = (told, counter.ready(), counter.rows(), counter.errors());
            assert_eq!(got, (2, 2, 2, 1), "chunks of {size}");
            assert_eq!(counter.first_error(), "ERROR 57014 stop", "chunks of {size}");
        }
    }

    #[test]
    fn a_ready_counts_only_when_its_last_byte_is_there() {
        let mut counter = ReplyCounter::default();
        let ready = message(b'Z', b"I");
        let (head, last) = ready.split_at(5);
        assert_eq!(counter.feed(head), Ok(0));
        assert_eq!(counter.feed(last), Ok(1));
    }

    #[test]
    fn a_length_below_its_own_word_breaks_the_stream() {
        #[rustfmt::skip]
        let table: [(&str, &[u8], Result<u64, Broken>); 4] = [
            ("nothing",     b"",                 Ok(0)),
            ("empty body",  b"n\0\0\0\x04",      Ok(0)),
            ("three",       b"Z\0\0\0\x03I",     Err(Broken { tag: b'Z', length: 3 })),
            ("zero",        b"D\0\0\0\0",        Err(Broken { tag: b'D', length: 0 })),
        ];
        for (name, bytes, want) in table {
            assert_eq!(ReplyCounter::default().feed(bytes), want, "{name}");
        }
    }

    #[test]
    fn only_the_first_error_is_kept_and_only_its_beginning() {
        let mut counter = ReplyCounter::default();
        let long = [b"M".as_slice(), &[b'x'; 5000], b"\0\0"].concat();
        counter.feed(&message(b'E', &long)).unwrap();
        counter.feed(&message(b'E', b"Msecond\0\0")).unwrap();
        assert_eq!(counter.errors(), 2);
        assert_eq!(counter.first_error().len(), ERROR_KEPT - 1);
    }
}
