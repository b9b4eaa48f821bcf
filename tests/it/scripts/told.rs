//! Transcripts: what clients were told, in words, and how two of them differ.

use std::fmt::Write as _;

use pgweir_harness::wire::Message;

use super::script::Line;

/// What came of a script's lines, one entry for each line that was played.
pub(crate) type Transcript = Vec<Vec<String>>;

/// Puts messages into words. What may differ between two sessions of Postgres itself is told in the order of its first
/// appearance instead: object ids of what scripts create. The number of the session's temporary schema is left out, and so is the process id of
/// a notification's sender.
#[derive(Debug, Default)]
pub(crate) struct Teller {
    objects: Vec<u32>,
}

/// Object ids from here on are given to what users create. Source: `PostgreSQL` 17 docs, §67.2.2.
const FIRST_USERS: u32 = 16384;

impl Teller {
    /// One message as a line.
    pub(crate) fn tell(&mut self, message: &Message) -> String {
        let body = &message.body;
        let words = match message.tag {
            b'D' => message.columns().map(|columns| {
                let mut words = String::from("row");
                for column in columns {
                    let _ = match column {
                        Some(value) => write!(words, " '{}'", value.escape_ascii()),
                        None => write!(words, " NULL"),
                    };
                }
                words
            }),
            b'T' => self.columns(body),
            b't' => self.types(body),
            b'E' | b'N' => message.server_error().map(|error| {
                let mut words = String::from(if message.tag == b'E' { "error" } else { "notice" });
                for (code, text) in error.fields {
                    let _ = write!(words, " {}=[{text}]", char::from(code));
                }
                words
            }),
            b'C' => message.command_tag().map(|tag| format!("done {tag}")),
            b'S' => message.parameter().map(|(name, value)| format!("parameter {name} = {value}")),
            b'Z' => message.ready_status().map(|status| format!("ready {}", char::from(status))),
            b'A' => message.notification().map(|(_, channel, payload)| format!("notification {channel} '{payload}'")),
            _ => None,
        };
        without_numbers(&words.unwrap_or_else(|| format!("{message:?}")))
    }

    fn columns(&mut self, body: &[u8]) -> Option<String> {
        let mut words = String::from("columns");
        let (count, mut rest) = take::<2>(body)?;
        for _ in 0..u16::from_be_bytes(count) {
            let end = rest.iter().position(|byte| *byte == 0)?;
            let (name, after) = rest.split_at_checked(end)?;
            let (_, after) = take::<1>(after)?;
            let (table, after) = take::<4>(after)?;
            let (number, after) = take::<2>(after)?;
            let (kind, after) = take::<4>(after)?;
            let (size, after) = take::<2>(after)?;
            let (modifier, after) = take::<4>(after)?;
            let (format, after) = take::<2>(after)?;
            rest = after;
            let _ = write!(
                words,
                " {} (of {}.{} type {} size {} mod {} format {})",
                name.escape_ascii(),
                self.object(table),
                u16::from_be_bytes(number),
                self.object(kind),
                i16::from_be_bytes(size),
                i32::from_be_bytes(modifier),
                u16::from_be_bytes(format),
            );
        }
        Some(words)
    }

    fn types(&mut self, body: &[u8]) -> Option<String> {
        let mut words = String::from("parameters");
        let (count, mut rest) = take::<2>(body)?;
        for _ in 0..u16::from_be_bytes(count) {
            let (kind, after) = take::<4>(rest)?;
            rest = after;
            let _ = write!(words, " {}", self.object(kind));
        }
        Some(words)
    }

    fn object(&mut self, id: [u8; 4]) -> String {
        let id = u32::from_be_bytes(id);
        if id < FIRST_USERS {
            return id.to_string();
        }
        let at = self.objects.iter().position(|known| *known == id).unwrap_or_else(|| {
            self.objects.push(id);
            self.objects.len() - 1
        });
        format!("#{at}")
    }
}

fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    bytes.split_first_chunk::<N>().map(|(taken, rest)| (*taken, rest))
}

/// `pg_temp_3` is `pg_temp_N`.
fn without_numbers(words: &str) -> String {
    const PREFIX: &str = "pg_temp_";
    let mut parts = words.split(PREFIX);
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        out.push_str(PREFIX);
        out.push_str(if rest.len() < part.len() { "N" } else { "" });
        out.push_str(rest);
    }
    out
}

/// The lines of a script, and behind those on which two transcripts differ what each says: `-` Postgres, `+` pgweir.
/// Empty if they are equal.
pub(crate) fn difference(lines: &[Line], want: &Transcript, got: &Transcript) -> String {
    if want == got {
        return String::new();
    }
    let mut text = String::new();
    let none = Vec::new();
    for at in 0..want.len().max(got.len()) {
        let (want, got) = (want.get(at).unwrap_or(&none), got.get(at).unwrap_or(&none));
        let line = lines.get(at).map_or_else(|| "at the end".to_owned(), |line| format!("{line:?}"));
        let _ = writeln!(text, "    {line}");
        if want == got {
            continue;
        }
        let front = want.iter().zip(got).take_while(|(want, got)| want == got).count();
        let tail = |lines: &[String]| lines.iter().rev().cloned().collect::<Vec<_>>();
        let (want_back, got_back) = (tail(&want[front..]), tail(&got[front..]));
        let back = want_back.iter().zip(&got_back).take_while(|(want, got)| want == got).count();
        for line in &want[..front] {
            let _ = writeln!(text, "          {line}");
        }
        for line in &want[front..want.len() - back] {
            let _ = writeln!(text, "        - {line}");
        }
        for line in &got[front..got.len() - back] {
            let _ = writeln!(text, "        + {line}");
        }
        for line in &want[want.len() - back..] {
            let _ = writeln!(text, "          {line}");
        }
    }
    text
}

#[test]
fn only_numbers_of_users_objects_and_temporary_schemas_are_not_compared() {
    let mut teller = Teller::default();
    let column = |table: u32, kind: u32| {
        [&b"\0\x01a\0"[..], &table.to_be_bytes(), b"\0\x01", &kind.to_be_bytes(), b"\0\x04\xff\xff\xff\xff\0\0"]
            .concat()
    };
    #[rustfmt::skip]
    let table: [(u8, Vec<u8>, &str); 8] = [
        (b'T', column(20000, 23),                        "columns a (of #0.1 type 23 size 4 mod -1 format 0)"),
        (b'T', column(30000, 20000),                     "columns a (of #1.1 type #0 size 4 mod -1 format 0)"),
        (b'D', b"\0\x02\0\0\0\x01'\xff\xff\xff\xff".to_vec(), r"row '\'' NULL"),
        (b'E', b"SERROR\0C42P01\0M\"pg_temp_12.x\"\0\0".to_vec(), "error S=[ERROR] C=[42P01] M=[\"pg_temp_N.x\"]"),
        (b'C', b"SELECT 1\0".to_vec(),                   "done SELECT 1"),
        (b'A', b"\0\0\0\x09here\0hi\0".to_vec(),         "notification here 'hi'"),
        (b'Z', b"T".to_vec(),                            "ready T"),
        (b'1', Vec::new(),                               "1\"\""),
    ];
    for (tag, body, want) in table {
        assert_eq!(teller.tell(&Message { tag, body }), want);
    }
}

#[test]
fn a_difference_shows_both_sides_where_they_differ() {
    let lines = ["SELECT 1", "SELECT 2"].map(|line| Line::read(line).unwrap());
    let told = |all: &[&[&str]]| all.iter().map(|told| told.iter().map(|s| (*s).to_owned()).collect()).collect();
    let (want, got) = (told(&[&["x"], &["a", "b", "d"]]), told(&[&["x"], &["a", "c", "d"]]));
    assert_eq!(difference(&lines, &want, &want), "");
    let shown = difference(&lines, &want, &got);
    let shown: Vec<&str> = shown.lines().map(str::trim).collect();
    assert_eq!(shown, ["a: SELECT 1", "a: SELECT 2", "a", "- b", "+ c", "d"]);
}
