//! The scanner, against a reader that has the whole stream at once.

use pgweir_proto::Malformed;
use pgweir_proto::scanner::{HEADER, Scanned, Scanner};

use crate::Source;

/// What a stream consists of: whole messages, perhaps the front of one more, perhaps a length word that is refused.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stream {
    messages: Vec<(u8, Vec<u8>)>,
    /// Tag, length of the whole body, and the body so far.
    part: Option<(u8, u32, Vec<u8>)>,
    refused: Option<Malformed>,
}

/// A limit, where to cut, which messages to stream; then the stream.
pub fn scanner(input: &[u8]) {
    let mut source = Source::new(input);
    let limit = source.pick(&[4, 8, 64, 1 << 20, u32::MAX]);
    let cuts = source.below(8);
    let cuts = source.take(cuts);
    let streams = source.byte();
    let stream = source.rest();
    assert_eq!(chunked(limit, stream, cuts, streams), naive(limit, stream));
}

fn naive(limit: u32, mut rest: &[u8]) -> Stream {
    let mut stream = Stream::default();
    while rest.len() >= 5 {
        let (tag, length) = (rest[0], u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]));
        if length < 4 || length > limit {
            stream.refused = Some(Malformed::Length { tag, length, limit });
            break;
        }
        let len = length as usize - 4;
        rest = &rest[5..];
        if rest.len() < len {
            stream.part = Some((tag, length - 4, rest.to_vec()));
            break;
        }
        stream.messages.push((tag, rest[..len].to_vec()));
        rest = &rest[len..];
    }
    stream
}

fn chunked(limit: u32, stream: &[u8], cuts: &[u8], streams: u8) -> Stream {
    let mut reader = Reader { scanner: Scanner::new(limit), kept: Vec::new(), found: Stream::default(), streams };
    let mut rest = stream;
    for nth in 0.. {
        let len = cuts.get(nth % cuts.len().max(1)).map_or(usize::MAX, |cut| usize::from(*cut).max(1));
        let (chunk, tail) = rest.split_at(len.min(rest.len()));
        reader.kept.extend_from_slice(chunk);
        if !reader.read() || tail.is_empty() {
            break;
        }
        rest = tail;
    }
    reader.end()
}

struct Reader {
    scanner: Scanner,
    kept: Vec<u8>,
    found: Stream,
    /// One bit per message: whether it is streamed as soon as its header is there.
    streams: u8,
}

impl Reader {
    /// Reads what is kept. False if the stream is refused.
    fn read(&mut self) -> bool {
        let kept = std::mem::take(&mut self.kept);
        let mut rest = &kept[..];
        let going = loop {
            let used = match self.scanner.next(rest) {
                Ok(Scanned::Short) => break true,
                Ok(Scanned::Inside { len }) => {
                    assert!(len > 0, "no progress inside a message");
                    self.inside(&rest[..len]);
                    len
                }
                Ok(Scanned::Whole { tag, body }) => {
                    self.found.messages.push((tag, body.to_vec()));
                    HEADER + body.len()
                }
                Ok(Scanned::Part { body_len, seen, .. }) => {
                    assert!(seen.len() < body_len as usize && seen.len() + HEADER == rest.len());
                    if self.streams >> (self.found.messages.len() % 8) & 1 == 0 {
                        break true;
                    }
                    self.scanner.stream(body_len, seen.len());
                    assert!(self.scanner.is_inside());
                    self.found.part = Some((rest[0], body_len, seen.to_vec()));
                    rest.len()
                }
                Err(refused) => {
                    self.found.refused = Some(refused);
                    break false;
                }
            };
            rest = &rest[used..];
        };
        self.kept = rest.to_vec();
        going
    }

    /// More of the message that is being streamed.
    fn inside(&mut self, bytes: &[u8]) {
        let (tag, body_len, mut body) = self.found.part.take().expect("a message is being streamed");
        body.extend_from_slice(bytes);
        if body.len() == body_len as usize {
            assert!(!self.scanner.is_inside());
            self.found.messages.push((tag, body));
        } else {
            assert!(self.scanner.is_inside());
            self.found.part = Some((tag, body_len, body));
        }
    }

    fn end(mut self) -> Stream {
        // What was not streamed waits with its header.
        if self.found.part.is_none() && self.found.refused.is_none() && self.kept.len() >= HEADER {
            let length = u32::from_be_bytes([self.kept[1], self.kept[2], self.kept[3], self.kept[4]]);
            self.found.part = Some((self.kept[0], length - 4, self.kept[HEADER..].to_vec()));
        }
        self.found
    }
}
