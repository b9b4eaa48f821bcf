//! What a text does that tells the names of settings by its parameters: a hole that each `Bind` fills.

use std::borrow::Cow;

use pgweir_proto::frontend::Bind;

use super::EffectSet;

/// Parameters with greater numbers are not read: each costs a walk through all before it.
const NUMBER_MAX: usize = 200;

/// Types whose values are what `set_config` is told, however they are sent: `text` and `varchar`.
const TEXTS: [u32; 2] = [25, 1043];
const BOOLEAN: u32 = 16;
/// The type is whatever its place makes it.
const UNKNOWN: [u32; 2] = [0, 705];

/// Whether the value of a parameter is text: by its type, as the client has given it in a `Parse`, or, if it has given none, for being
/// where one belongs and `alone`, nowhere else in the text.
#[must_use]
pub fn is_text(types: &[u8], number: usize, alone: bool) -> bool {
    let kind = kind(types, number);
    TEXTS.contains(&kind) || UNKNOWN.contains(&kind) && alone
}

/// The type that the client has given a parameter; 0 if none.
fn kind(types: &[u8], number: usize) -> u32 {
    let types = types.get(2..).unwrap_or_default();
    let kind = number.checked_sub(1).and_then(|at| types.get(4 * at..)).and_then(<[u8]>::first_chunk);
    kind.map_or(0, |kind| u32::from_be_bytes(*kind))
}

/// A statement and the values that a `Bind` brings for its parameters.
#[derive(Debug)]
pub struct Bound<'a> {
    text: &'a [u8],
    /// A count and as many object ids, as in the `Parse` message.
    types: &'a [u8],
    bind: Bind<'a>,
    /// How often each parameter may be in the text.
    mentions: Vec<u8>,
}

/// The value of a parameter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    /// It is not here, or not to be read.
    Unknown,
    Null,
    Bytes(&'a [u8]),
}

/// What a text does with the values of its parameters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Filled<'a> {
    /// What it does by itself: as [`scan`](super::scan) says it of a text in which the values stand.
    pub set: EffectSet,
    /// The custom settings that it sets for the session; see [`custom_names`](super::custom_names).
    pub names: Vec<Cow<'a, str>>,
    /// It may reset a setting, by a value that is NULL.
    pub resets: bool,
}

impl<'a> Bound<'a> {
    /// `types` are those of the `Parse` message, and the `Bind` may be cut. Cold: allocates.
    #[must_use]
    pub fn new(text: &'a [u8], types: &'a [u8], bind: Bind<'a>) -> Self {
        let mut mentions = vec![0_u8; NUMBER_MAX + 1];
        for at in memchr::memchr_iter(b'$', text) {
            // In a comment or a string it does not count, and does no harm.
            let digits = text.get(at + 1..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_digit());
            let number =
                digits.fold(0_usize, |number, digit| (number * 10 + usize::from(digit - b'0')).min(NUMBER_MAX + 1));
            if let Some(count) = mentions.get_mut(number) {
                *count = count.saturating_add(1);
            }
        }
        Self { text, types, bind, mentions }
    }

    /// Reads the text once more.
    #[must_use]
    pub fn read(&'a self) -> Filled<'a> {
        let mut filled = Filled::default();
        let (effects, resets) = super::read_bound(self.text, Some(self), Some(&mut filled.names));
        (filled.set, filled.resets) = (effects.set | super::by_update(self.text), resets);
        filled
    }

    /// The value of the parameter with this number, whatever its type is.
    pub(super) fn value(&self, number: usize) -> Value<'a> {
        match self.parameter(number) {
            Some((_, Some(bytes))) => Value::Bytes(bytes),
            Some((_, None)) => Value::Null,
            None => Value::Unknown,
        }
    }

    /// The value of a parameter of type `text`, unless the encoding may make it another. A NULL is no setting's name: it reads as
    /// an empty one, which is none either.
    pub(super) fn text(&self, number: usize) -> Option<&'a [u8]> {
        let (_, value) = self.parameter(number)?;
        let value = value.unwrap_or_default();
        let is_plain = value.is_ascii() && memchr::memchr(0, value).is_none();
        let is_text = TEXTS.contains(&self.kind(number)) || self.is_inferred(number);
        (is_plain && is_text).then_some(value)
    }

    /// Whether a parameter of type `boolean` is known to be true.
    ///
    /// Source: `PostgreSQL` 17 docs, §8.6 "Boolean Type".
    pub(super) fn is_true(&self, number: usize) -> bool {
        let Some((is_binary, Some(value))) = self.parameter(number) else { return false };
        if self.kind(number) != BOOLEAN && !self.is_inferred(number) {
            return false;
        }
        if is_binary {
            return matches!(value, [byte] if *byte != 0);
        }
        let value = value.trim_ascii().to_ascii_lowercase();
        let begins = |word: &[u8]| !value.is_empty() && word.starts_with(&value);
        begins(b"true") || begins(b"yes") || *value == *b"on" || *value == *b"1"
    }

    fn parameter(&self, number: usize) -> Option<(bool, Option<&'a [u8]>)> {
        if number > NUMBER_MAX {
            return None;
        }
        self.bind.parameter(number)
    }

    /// Whether the type of a parameter is the one that its only place in the text gives it.
    fn is_inferred(&self, number: usize) -> bool {
        UNKNOWN.contains(&self.kind(number)) && self.mentions.get(number) == Some(&1)
    }

    /// The type that the client has given a parameter; 0 if none.
    fn kind(&self, number: usize) -> u32 {
        kind(self.types, number)
    }
}

#[cfg(test)]
mod tests {
    use super::super::scan;
    use super::*;
    use pgweir_harness::wire::build;

    const SETTINGS: EffectSet = EffectSet::SETTINGS;
    const ROLE: EffectSet = SETTINGS.union(EffectSet::ROLE);
    const CUSTOM: EffectSet = SETTINGS.union(EffectSet::CUSTOM);
    const UNREAD: EffectSet = ROLE.union(CUSTOM).union(EffectSet::OPAQUE);

    /// What a text does with values of types, all in one format: its effects, names, and whether it may reset something.
    fn filled(text: &str, types: &[u32], values: &[Option<&[u8]>], format: i16) -> (EffectSet, String, bool) {
        let parse = build::parse("", text, types);
        let body = build::bind_formats("", "", &[format], values, &[]);
        let types = &parse[5 + 1 + text.len() + 1..];
        let bound = Bound::new(text.as_bytes(), types, Bind::parse(&body[5..]).unwrap());
        let filled = bound.read();
        (filled.set, filled.names.join(" "), filled.resets)
    }

    #[test]
    fn values_are_read_as_if_they_stood_in_the_text() {
        const ALL: &str = "SELECT set_config($1, $2, $3)";
        const SESSION: &str = "SELECT set_config($1, $2, false)";
        const MANY: [Option<&[u8]>; 201] = [Some(b"a.b"); 201];
        type Values = &'static [Option<&'static [u8]>];
        #[rustfmt::skip]
        let table: [(&str, &str, Values, EffectSet, &str, bool); 30] = [
            ("a setting",       SESSION, &[Some(b"TimeZone"), Some(b"UTC")],               SETTINGS, "", false),
            ("a custom one",    SESSION, &[Some(b"App.x"), Some(b"1")],                    CUSTOM, "app.x", false),
            ("the role",        SESSION, &[Some(b"role"), Some(b"a")],                     ROLE, "", false),
            ("the seed",        SESSION, &[Some(b"seed"), Some(b"0.5")],                   SETTINGS | EffectSet::LOAD, "", false),
            ("no name",         SESSION, &[None, Some(b"a")],                              SETTINGS, "", false),
            ("no value",        SESSION, &[Some(b"a.b"), None],                            CUSTOM, "a.b", true),
            ("temporary",       SESSION, &[Some(b"search_path"), Some(b"pg_temp")],        SETTINGS | EffectSet::TEMP, "", false),
            ("beyond ASCII",    SESSION, &[Some(b"a.\xc3\xa9"), Some(b"a")],      UNREAD, "", false),
            ("with a NUL",      SESSION, &[Some(b"a.b\0c"), Some(b"a")],                  UNREAD, "", false),
            ("too few",         SESSION, &[],                                              UNREAD | EffectSet::TEMP, "", true),
            ("local",           ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"t")],          EffectSet::LOCAL, "", false),
            ("spelled out",     ALL,     &[Some(b"a.b"), Some(b"1"), Some(b" TRUE ")],     EffectSet::LOCAL, "", false),
            ("in other words",  ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"ye")],         EffectSet::LOCAL, "", false),
            ("on",              ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"on")],         EffectSet::LOCAL, "", false),
            ("not local",       ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"f")],          CUSTOM, "a.b", false),
            ("not known",       ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"o")],          CUSTOM, "a.b", false),
            ("empty",           ALL,     &[Some(b"a.b"), Some(b"1"), Some(b"")],           CUSTOM, "a.b", false),
            ("NULL",            ALL,     &[Some(b"a.b"), Some(b"1"), None],                CUSTOM, "a.b", false),
            ("the seed, so",    ALL,     &[Some(b"seed"), Some(b"1"), Some(b"t")],         EffectSet::LOCAL | EffectSet::LOAD, "", false),
            ("a cast",          "SELECT set_config($1::text, $2::text, $3::bool)", &[Some(b"a.b"), None, Some(b"1")], EffectSet::LOCAL, "", true),
            ("another cast",    "SELECT set_config($1::name, 'a', false)", &[Some(b"a.b")],           UNREAD, "", false),
            ("more than it",    "SELECT set_config('a' || $1, 'a', false)", &[Some(b"a.b")],          UNREAD, "", false),
            ("used twice",      "SELECT set_config($1, $1, false)", &[Some(b"a.b")],                  UNREAD, "", false),
            ("spelled with 0",  "SELECT set_config($01, 'a', false), $1", &[Some(b"a.b")],            UNREAD, "", false),
            ("two calls",       "SELECT set_config($1, '', false), set_config($2, '', false)", &[Some(b"a.b"), Some(b"c.d")], CUSTOM, "a.b c.d", false),
            ("one is none",     "SELECT set_config($2, '', false), set_config(a, '', false)", &[None, Some(b"c.d")], UNREAD, "c.d", false),
            ("beside another",  "SELECT set_config($1, '', false), nextval('q')", &[Some(b"a.b")],    CUSTOM | EffectSet::SEQUENCE, "a.b", false),
            ("a great number",  "SELECT set_config($201, '', false)", &MANY,           UNREAD, "", false),
            ("in brackets",     "SELECT set_config($1, ARRAY[$2,$3,$4]::text, false)", &[Some(b"a.b"), Some(b"x"), Some(b"t"), Some(b"z")], CUSTOM, "a.b", false),
            ("no number",       "SELECT set_config($99999999999999999999, '', false)", &[],           UNREAD, "", false),
        ];
        for (name, text, values, set, names, resets) in table {
            assert_eq!(filled(text, &[], values, 0), (set, names.to_owned(), resets), "{name}");
            assert!(scan(text.as_bytes()).set.contains(UNREAD), "{name}: nothing to be filled");
        }
    }

    #[test]
    fn what_is_set_for_a_transaction_leaves_something_by_some_values_alone() {
        const LOCAL: EffectSet = EffectSet::LOCAL;
        const SEED: EffectSet = LOCAL.union(EffectSet::LOAD);
        const TEMP: EffectSet = LOCAL.union(EffectSet::TEMP);
        const MADE: EffectSet = LOCAL.union(EffectSet::OPAQUE);
        const NAME: &str = "SELECT set_config($1, $2, true)";
        const PATH: &str = "SELECT set_config('search_path', $1, true), set_config('app.x', $2, true)";
        const PAIRS: &str = "select set_config(el->>0, el->>1, TRUE) from json_array_elements($1::json) el;";
        type Values = &'static [Option<&'static [u8]>];
        #[rustfmt::skip]
        let table: [(&str, &str, Values, EffectSet); 22] = [
            ("an ordinary name",   NAME,  &[Some(b"app.tenant"), Some(b"7")],                       LOCAL),
            ("a name, and pg_temp", NAME, &[Some(b"app.tenant"), Some(b"pg_temp")],                 LOCAL),
            ("the seed",           NAME,  &[Some(b"Seed"), Some(b"0.5")],                           SEED),
            ("a path",             NAME,  &[Some(b"search_path"), Some(b"tenant_7, public")],       LOCAL),
            ("a temporary path",   NAME,  &[Some(b"SEARCH_PATH"), Some(b"tenant_7,\"pg_temp\"")], TEMP),
            ("no name",            NAME,  &[None, Some(b"a")],                                      LOCAL),
            ("beyond ASCII",       NAME,  &[Some(b"s\xc3\xa9ed"), Some(b"a")],                    MADE),
            ("no values",          NAME,  &[],                                                      MADE.union(TEMP)),
            ("no value",           NAME,  &[Some(b"search_path")],                                  TEMP),
            ("a tenant's",         PATH,  &[Some(b"tenant_7"), Some(b"pg_temp")],                   LOCAL),
            ("shouted",            PATH,  &[Some(b"a, PG_TEMP"), Some(b"x")],                       TEMP),
            ("by number",          PATH,  &[Some(b"pg_temp_3"), Some(b"x")],                        TEMP),
            ("none",               PATH,  &[None, Some(b"x")],                                      LOCAL),
            ("not here",           PATH,  &[],                                                      TEMP),
            ("and more",           "SELECT set_config('search_path', $1 || '_temp', true), set_config($2, '', true)", &[Some(b"pg"), Some(b"x")], TEMP),
            ("a name that is cast", "SELECT set_config($1::name, $2, true), set_config($3, '', true)", &[Some(b"seed"), None, Some(b"x")], MADE),
            ("a list",             PAIRS, &[Some(br#"[["role", "a"], ["x.claims", "{\"a\": \"b\\n\"}"]]"#)], LOCAL),
            ("a list, the seed",   PAIRS, &[Some(br#"[["seed", "0.5"]]"#)],                         MADE),
            ("the same, escaped",  PAIRS, &[Some(br#"[["\u0073eed", "0.5"]]"#)],                   MADE),
            ("a temporary one",    PAIRS, &[Some(br#"[["search_path", "a, Pg_Temp"]]"#)],           MADE),
            ("no list",            PAIRS, &[None],                                                  MADE),
            ("none here",          PAIRS, &[],                                                      MADE),
        ];
        for (name, text, values, set) in table {
            let (got, names, _) = filled(text, &[], values, 0);
            assert_eq!((got, &*names), (set, ""), "{name}");
            assert!(scan(text.as_bytes()).by_values, "{name}: nothing to be filled");
        }
    }

    #[test]
    fn what_a_value_is_hangs_on_its_type_and_format() {
        const ALL: &str = "SELECT set_config($1, 'a', $2)";
        #[rustfmt::skip]
        let table: [(&str, &[u32], i16, &[u8], &[u8], EffectSet); 13] = [
            ("text",             &[25, 16],   0, b"a.b",   b"t",    EffectSet::LOCAL),
            ("varchar",          &[1043, 16], 0, b"a.b",   b"f",    CUSTOM),
            ("unknown",          &[705, 705], 0, b"a.b",   b"t",    EffectSet::LOCAL),
            ("one is told",      &[25],       0, b"a.b",   b"t",    EffectSet::LOCAL),
            ("binary",           &[],         1, b"a.b",   b"\x01", EffectSet::LOCAL),
            ("binary, not so",   &[25, 16],   1, b"a.b",   b"\0",   CUSTOM),
            ("binary letters",   &[],         1, b"a.b",   b"t",    EffectSet::LOCAL),
            ("binary, too long", &[],         1, b"a.b",   b"true", CUSTOM),
            ("a padded name",    &[1042],     0, b"a.b  ", b"f",    UNREAD),
            ("a name",           &[19],       0, b"a.b",   b"f",    UNREAD),
            ("a number",         &[25, 23],   0, b"a.b",   b"1",    CUSTOM),
            ("no such format",   &[25, 16],   2, b"a.b",   b"t",    UNREAD),
            ("a name, and local", &[19, 16],  0, b"seed",  b"t",    UNREAD),
        ];
        for (name, types, format, first, second, set) in table {
            assert_eq!(filled(ALL, types, &[Some(first), Some(second)], format).0, set, "{name}");
        }
        // Given by the client, a type is the same wherever it is used.
        assert_eq!(filled("SELECT set_config($1, $1, false)", &[25], &[Some(b"a.b")], 0).0, CUSTOM);
        assert_eq!(filled("SELECT $1::regclass, set_config($1::text, '', false)", &[], &[Some(b"a.b")], 0).0, UNREAD);
    }

    #[test]
    fn a_bind_that_is_cut_tells_what_is_there() {
        let text =
            "SELECT set_config($1, 'a', false), set_config('search_path', $2, false), set_config($3, 'a', false)";
        let body = build::bind("", "", &[Some(b"a.b"), Some(&[b'x'; 100]), Some(b"c.d")]);
        let read = |end: usize| {
            let bound = Bound::new(text.as_bytes(), b"\0\0", Bind::parse(&body[5..end]).unwrap());
            let filled = bound.read();
            (filled.set, filled.names.join(" "))
        };
        assert_eq!(read(body.len()), (CUSTOM, "a.b c.d".to_owned()));
        assert_eq!(read(60), (UNREAD | EffectSet::TEMP, "a.b".to_owned()));
    }
}
