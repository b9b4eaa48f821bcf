//! How a raw value becomes a number, a time, a size, a word; and back to text.

use std::time::Duration;

use crate::fault::Problem;
use crate::secret::Secret;
use crate::setting::Bounds;

/// What a setting's value is, and so how it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole number.
    Count,
    /// A whole number of bytes, or a text such as `64KiB`.
    Bytes,
    /// Seconds, or a text such as `250ms`.
    Time,
    /// True or false.
    Flag,
    /// Any text.
    Text,
    /// A text that is never shown.
    Secret,
    /// One of these words.
    Choice(&'static [&'static str]),
}

impl Kind {
    /// The kind with its article, for a sentence: `a whole number`.
    #[must_use]
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Count => "a whole number",
            Self::Bytes => "a size",
            Self::Time => "a time",
            Self::Flag => "true or false",
            Self::Text | Self::Secret => "a text",
            Self::Choice(_) => "a word",
        }
    }

    /// How such a value is written in the file, and what else is taken.
    #[must_use]
    pub const fn spelling(self) -> &'static str {
        match self {
            Self::Count => "Write it in digits, without quotes or a unit",
            Self::Bytes => r#"Write bytes, or a text with B, KiB, MiB or GiB such as "64KiB""#,
            Self::Time => r#"Write seconds, or a text with ms, s, min, h or d such as "250ms""#,
            Self::Flag => "Write true or false, without quotes in a file",
            Self::Text | Self::Secret | Self::Choice(_) => "Write it in double quotes",
        }
    }
}

/// A value before its setting has looked at it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Raw<'a> {
    /// From a variable, a flag or a URL: the setting decides what it is.
    Word(&'a str),
    /// A TOML string.
    Text(&'a str),
    /// A TOML integer; one outside `i128` stands at the nearer end.
    Integer(i128),
    /// A TOML float.
    Float(f64),
    /// A TOML boolean.
    Bool(bool),
    /// Something no setting is: its noun with the article.
    Other(&'static str),
}

impl Raw<'_> {
    /// What was found, with its article, for a sentence.
    pub(crate) fn noun(&self) -> &'static str {
        match self {
            Self::Word(_) => "a word",
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a fraction",
            Self::Bool(_) => "a boolean",
            Self::Other(noun) => noun,
        }
    }

    /// The value as it was written, near enough to be recognised; `None` where showing it helps nobody.
    pub(crate) fn shown(&self) -> Option<String> {
        match self {
            Self::Word(text) => Some((*text).to_owned()),
            Self::Text(text) => Some(format!("\"{text}\"")),
            Self::Integer(number) => Some(number.to_string()),
            Self::Float(number) => Some(number.to_string()),
            Self::Bool(flag) => Some(flag.to_string()),
            Self::Other(_) => None,
        }
    }
}

/// A type that a setting can have.
pub(crate) trait Typed: Sized {
    /// How values of the type are written.
    const KIND: Kind;

    /// Reads `raw`; numbers, times and sizes must lie within `bounds`.
    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem>;

    /// The value as text that [`Typed::read`] reads back; secrets are masked, an absent value is empty.
    fn show(&self) -> String;
}

/// Reads one of `words` and gives the member of `values` at the same place.
pub(crate) fn choose<T: Copy>(raw: &Raw<'_>, words: &'static [&'static str], values: &[T]) -> Result<T, Problem> {
    let (Raw::Word(text) | Raw::Text(text)) = raw else {
        return Err(mistyped(Kind::Choice(words), raw));
    };
    words
        .iter()
        .zip(values)
        .find(|(word, _)| *word == text)
        .map(|(_, value)| *value)
        .ok_or(Problem::NotAChoice { words })
}

macro_rules! whole {
    ($($type:ty: $kind:ident,)+) => {$(
        impl Typed for $type {
            const KIND: Kind = Kind::$kind;
            fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
                let amount = measure(raw, Self::KIND, bounds)?;
                Self::try_from(amount).map_err(|_| Problem::Outside { bounds })
            }
            fn show(&self) -> String {
                whole!(@show $kind, *self)
            }
        }
    )+};
    (@show Count, $value:expr) => { $value.to_string() };
    (@show Bytes, $value:expr) => { show_bytes($value) };
}
whole! { u16: Count, u32: Count, usize: Bytes, }

impl Typed for Duration {
    const KIND: Kind = Kind::Time;

    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
        let nanos = measure(raw, Self::KIND, bounds)?;
        u64::try_from(nanos).map(Self::from_nanos).map_err(|_| Problem::Outside { bounds })
    }

    fn show(&self) -> String {
        if self.subsec_nanos() == 0 {
            format!("{}s", self.as_secs())
        } else if self.subsec_nanos().is_multiple_of(1_000_000) {
            format!("{}ms", self.as_millis())
        } else {
            format!("{}s", self.as_secs_f64())
        }
    }
}

impl Typed for bool {
    const KIND: Kind = Kind::Flag;

    fn read(raw: &Raw<'_>, _: Option<Bounds>) -> Result<Self, Problem> {
        match raw {
            Raw::Bool(flag) => Ok(*flag),
            Raw::Word("true" | "1" | "on" | "yes") => Ok(true),
            Raw::Word("false" | "0" | "off" | "no") => Ok(false),
            _ => Err(mistyped(Self::KIND, raw)),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Typed for String {
    const KIND: Kind = Kind::Text;

    fn read(raw: &Raw<'_>, _: Option<Bounds>) -> Result<Self, Problem> {
        match raw {
            // Every text may end up as a C string on the wire, where a NUL would begin the next field.
            Raw::Word(text) | Raw::Text(text) if text.contains('\0') => Err(Problem::Nul),
            Raw::Word(text) | Raw::Text(text) => Ok((*text).to_owned()),
            _ => Err(mistyped(Self::KIND, raw)),
        }
    }

    fn show(&self) -> String {
        self.clone()
    }
}

impl Typed for Secret {
    const KIND: Kind = Kind::Secret;

    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
        String::read(raw, bounds).map(Self::new)
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl<T: Typed> Typed for Option<T> {
    const KIND: Kind = T::KIND;

    fn read(raw: &Raw<'_>, bounds: Option<Bounds>) -> Result<Self, Problem> {
        match raw {
            Raw::Word("") | Raw::Text("") if matches!(T::KIND, Kind::Text | Kind::Secret) => Ok(None),
            _ => T::read(raw, bounds).map(Some),
        }
    }

    fn show(&self) -> String {
        self.as_ref().map(Typed::show).unwrap_or_default()
    }
}

/// The amount in the kind's base unit (one, byte, nanosecond), if it is one and lies within `bounds`.
fn measure(raw: &Raw<'_>, kind: Kind, bounds: Option<Bounds>) -> Result<i128, Problem> {
    let amount = amount(raw, kind).ok_or_else(|| mistyped(kind, raw))?;
    let inside = bounds.is_none_or(|Bounds { low, high }| {
        let end = |text| crate::typed::amount(&Raw::Word(text), kind);
        end(low).is_some_and(|low| low <= amount) && end(high).is_some_and(|high| amount <= high)
    });
    if inside { Ok(amount) } else { Err(Problem::Outside { bounds }) }
}

fn amount(raw: &Raw<'_>, kind: Kind) -> Option<i128> {
    match (kind, raw) {
        (Kind::Count | Kind::Bytes, Raw::Integer(number)) => Some(*number),
        (Kind::Count, Raw::Word(text)) => parse_whole(text),
        (Kind::Bytes, Raw::Word(text) | Raw::Text(text)) => parse_bytes(text),
        (Kind::Time, Raw::Integer(seconds)) => Some(seconds.saturating_mul(1_000_000_000)),
        (Kind::Time, Raw::Float(seconds)) => nanos(*seconds),
        (Kind::Time, Raw::Word(text) | Raw::Text(text)) => parse_time(text),
        _ => None,
    }
}

/// Digits with an optional sign; a number beyond `i128` stands at the nearer end, which no range contains.
fn parse_whole(text: &str) -> Option<i128> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let end = if text.starts_with('-') { i128::MIN } else { i128::MAX };
    Some(text.parse().unwrap_or(end))
}

const BYTE_UNITS: [(&str, i128); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

fn parse_bytes(text: &str) -> Option<i128> {
    let (digits, factor) =
        BYTE_UNITS.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor))).unwrap_or((text, 1));
    parse_whole(digits.trim_end()).map(|number| number.saturating_mul(factor))
}

fn show_bytes(bytes: usize) -> String {
    let whole = BYTE_UNITS.iter().find_map(|(unit, factor)| {
        let factor = usize::try_from(*factor).ok().filter(|factor| *factor > 1)?;
        (bytes > 0 && bytes.is_multiple_of(factor)).then(|| format!("{}{unit}", bytes / factor))
    });
    whole.unwrap_or_else(|| bytes.to_string())
}

/// The units of time, in seconds. `m` is not among them: Postgres and people disagree whether it is a minute.
const TIME_UNITS: [(&str, f64); 5] = [("ms", 0.001), ("s", 1.0), ("min", 60.0), ("h", 3_600.0), ("d", 86_400.0)];

fn parse_time(text: &str) -> Option<i128> {
    let start = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(start)?;
    let number = number.trim_end();
    let plain = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'+');
    if !number.bytes().all(plain) {
        return None;
    }
    let factor = match unit {
        "" => 1.0,
        unit => TIME_UNITS.iter().find(|(name, _)| *name == unit)?.1,
    };
    nanos(number.parse::<f64>().ok()? * factor)
}

/// Nanoseconds, to the nearest microsecond. `None` for a NaN and for what is too short to be told from the 0 that
/// often means "no limit". Beyond what a `Duration` holds stands at the nearer end.
fn nanos(seconds: f64) -> Option<i128> {
    if seconds.is_nan() {
        return None;
    }
    if seconds < 0.0 {
        return Some(i128::MIN);
    }
    let Ok(exact) = Duration::try_from_secs_f64(seconds) else {
        return Some(i128::MAX);
    };
    let micros = exact.as_nanos().saturating_add(500) / 1_000;
    if micros == 0 && seconds > 0.0 {
        return None;
    }
    i128::try_from(micros).ok().map(|micros| micros.saturating_mul(1_000))
}

pub(crate) fn mistyped(kind: Kind, raw: &Raw<'_>) -> Problem {
    Problem::NotA { kind, found: raw.noun() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_and_without_units() {
        #[rustfmt::skip]
        let table: [(&str, Raw<'_>, Option<Duration>); 22] = [
            ("TOML integer",          Raw::Integer(20),     Some(Duration::from_secs(20))),
            ("TOML float",            Raw::Float(0.25),     Some(Duration::from_millis(250))),
            ("TOML string",           Raw::Text("250ms"),   Some(Duration::from_millis(250))),
            ("bare word is seconds",  Raw::Word("20"),      Some(Duration::from_secs(20))),
            ("fraction of a second",  Raw::Word("1.5"),     Some(Duration::from_millis(1500))),
            ("seconds",               Raw::Word("20s"),     Some(Duration::from_secs(20))),
            ("minutes",               Raw::Word("2min"),    Some(Duration::from_mins(2))),
            ("a space is fine",       Raw::Word("2 min"),   Some(Duration::from_mins(2))),
            ("inexact in binary",     Raw::Word("2.3min"),  Some(Duration::from_secs(138))),
            ("hours",                 Raw::Word("1h"),      Some(Duration::from_hours(1))),
            ("days",                  Raw::Word("1d"),      Some(Duration::from_hours(24))),
            ("zero",                  Raw::Word("0"),       Some(Duration::ZERO)),
            ("m is ambiguous",        Raw::Word("2m"),      None),
            ("shorter than told",     Raw::Word("0.0001ms"), None),
            ("negative",              Raw::Word("-1s"),     None),
            ("infinite",              Raw::Word("inf"),     None),
            ("not a number",          Raw::Float(f64::NAN), None),
            ("huge",                  Raw::Float(1e300),    None),
            ("exponent",              Raw::Word("1e3"),     None),
            ("empty",                 Raw::Word(""),        None),
            ("unit alone",            Raw::Word("s"),       None),
            ("boolean",               Raw::Bool(true),      None),
        ];
        let bounds = Some(Bounds { low: "0", high: "365d" });
        for (name, raw, want) in table {
            assert_eq!(Duration::read(&raw, bounds).ok(), want, "{name}");
        }
    }

    #[test]
    fn sizes_are_read_with_and_without_units() {
        #[rustfmt::skip]
        let table: [(&str, Raw<'_>, Option<usize>); 10] = [
            ("TOML integer",       Raw::Integer(8192),   Some(8192)),
            ("TOML string",        Raw::Text("64KiB"),   Some(65_536)),
            ("word",               Raw::Word("8192"),    Some(8192)),
            ("bytes by name",      Raw::Word("8192B"),   Some(8192)),
            ("a space is fine",    Raw::Word("1 MiB"),   Some(1 << 20)),
            ("gibibytes",          Raw::Word("1GiB"),    Some(1 << 30)),
            ("decimal units",      Raw::Word("64kB"),    None),
            ("a fraction",         Raw::Word("1.5MiB"),  None),
            ("above the range",    Raw::Word("3GiB"),    None),
            ("beyond any integer", Raw::Word("99999999999999999999999999999999999999999GiB"), None),
        ];
        let bounds = Some(Bounds { low: "1", high: "2GiB" });
        for (name, raw, want) in table {
            assert_eq!(usize::read(&raw, bounds).ok(), want, "{name}");
        }
    }

    #[test]
    fn what_is_shown_reads_back_as_the_same_value() {
        for nanos in [0, 1_000, 250_000_000, 1_000_000_000, 90_000_000_000, 1_234_567_000] {
            let time = Duration::from_nanos(nanos);
            assert_eq!(Duration::read(&Raw::Word(&time.show()), None), Ok(time));
        }
        for bytes in [0_usize, 1, 1023, 1024, 1025, 1 << 20, 3 << 30, 2_147_483_647] {
            assert_eq!(usize::read(&Raw::Word(&bytes.show()), None), Ok(bytes));
        }
        for mode in crate::PoolMode::ALL {
            assert_eq!(crate::PoolMode::read(&Raw::Word(&mode.show()), None), Ok(*mode));
        }
    }

    #[test]
    fn booleans_are_words_outside_a_file_and_booleans_inside() {
        #[rustfmt::skip]
        let table: [(Raw<'_>, Option<bool>); 12] = [
            (Raw::Word("true"), Some(true)), (Raw::Word("false"), Some(false)),
            (Raw::Word("1"), Some(true)),    (Raw::Word("0"), Some(false)),
            (Raw::Word("on"), Some(true)),   (Raw::Word("off"), Some(false)),
            (Raw::Word("yes"), Some(true)),  (Raw::Word("no"), Some(false)),
            (Raw::Bool(true), Some(true)),   (Raw::Bool(false), Some(false)),
            (Raw::Text("true"), None),       (Raw::Word("maybe"), None),
        ];
        for (raw, want) in table {
            assert_eq!(bool::read(&raw, None).ok(), want, "{raw:?}");
        }
    }
}
