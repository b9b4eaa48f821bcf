//! The client's start-up value in the place of the NULL of a `set_config(name, NULL, ..)`: it means the same on a server connection
//! that began elsewhere, and is told, too. Where a parameter is the value, which may be NULL, it stands behind that.

use std::borrow::Cow;
use std::ops::Range;

use super::super::{APPLICATION_NAME, NAME_MAX, Profile, RISKY, is_role, literal};
use super::{GROWTH_MAX, RESETS_MAX, STAY, VALUE_MAX};
use crate::sql::{self, Cut, Splice};

/// Half of it is left as it is by a value of the other half, and not put back.
const DATESTYLE: &str = "datestyle";

/// What is put into one text, in its order.
#[derive(Debug, Default)]
pub(super) struct Puts {
    all: Vec<Put>,
    /// How many of them were written.
    done: usize,
}

#[derive(Debug)]
struct Put {
    /// What it replaces.
    place: Range<usize>,
    value: Vec<u8>,
}

impl Puts {
    /// What is put into `text`. Nothing, if anything is in doubt. Parameters have `types`, as in the `Parse` message; a text without has
    /// none.
    pub(super) fn of(text: &[u8], types: Option<&[u8]>, startup: &Profile, tag: &str) -> Self {
        // A position counts characters.
        if !text.is_ascii() {
            return Self::default();
        }
        let is_text = |null: &sql::Null| types.is_some_and(|types| sql::is_text(types, null.parameter, null.alone));
        let (mut all, mut count) = (Vec::new(), 0);
        for null in sql::nulls(text) {
            let Some(value) = value(&null.name, startup, tag) else { continue };
            let mut given = Vec::new();
            literal(&mut given, value);
            let Range { start, end } = null.place;
            if null.parameter == 0 {
                all.push(Put { place: start..end, value: given });
            } else if is_text(&null) {
                all.push(Put { place: start..start, value: b"coalesce(".to_vec() });
                all.push(Put { place: end..end, value: [b", ", &*given, b")"].concat() });
            }
            count += 1;
        }
        if count > RESETS_MAX { Self::default() } else { Self { all, done: 0 } }
    }

    /// Writes `text` from `at` on up to what is put last in front of `end`, and moves `at` there.
    pub(super) fn write(
        &mut self,
        text: &[u8],
        end: usize,
        at: &mut usize,
        out: &mut Vec<u8>,
        cuts: &mut Vec<Cut>,
    ) -> Option<()> {
        while let Some(put) = self.all.get(self.done).filter(|put| put.place.end <= end) {
            out.extend_from_slice(text.get(*at..put.place.start)?);
            cuts.push(Cut { at: out.len(), put: put.value.len(), gone: put.place.len() });
            out.extend_from_slice(&put.value);
            *at = put.place.end;
            self.done += 1;
        }
        Some(())
    }

    /// A part of `text` with what is put into it.
    pub(super) fn filled<'a>(&self, text: &'a [u8], part: Range<usize>) -> Cow<'a, [u8]> {
        let mut out = Vec::new();
        let mut at = part.start;
        for put in self.all.iter().filter(|put| part.start <= put.place.start && put.place.end <= part.end) {
            out.extend_from_slice(text.get(at..put.place.start).unwrap_or_default());
            out.extend_from_slice(&put.value);
            at = put.place.end;
        }
        let rest = text.get(at..part.end).unwrap_or_default();
        if out.is_empty() {
            return Cow::Borrowed(rest);
        }
        out.extend_from_slice(rest);
        Cow::Owned(out)
    }
}

/// What the server is to parse in place of `text`, and how its errors are read. None if it is to get the text itself.
#[must_use]
pub fn filled(text: &[u8], types: &[u8], startup: &Profile, tag: &str) -> Option<(Vec<u8>, Splice)> {
    let mut puts = Puts::of(text, Some(types), startup, tag);
    let (mut out, mut at, mut cuts) = (Vec::new(), 0, Vec::new());
    puts.write(text, text.len(), &mut at, &mut out, &mut cuts)?;
    out.extend_from_slice(text.get(at..)?);
    let is_bounded = out.len() <= text.len() + GROWTH_MAX;
    (is_bounded && !cuts.is_empty()).then_some((out, Splice { cuts, ..Splice::default() }))
}

/// The start-up value of a setting, if it is certain that to set it does what a reset does, and says no more: with a tag in it, or
/// cut, a name would be told otherwise.
fn value<'a>(name: &str, startup: &'a Profile, tag: &str) -> Option<&'a [u8]> {
    if is_role(name) || STAY.contains(&name) || RISKY.contains(&name) || name == DATESTYLE {
        return None;
    }
    let is_name = name == APPLICATION_NAME;
    if is_name && !tag.is_empty() {
        return None;
    }
    let longest = if is_name { NAME_MAX } else { VALUE_MAX };
    startup.get(name).filter(|value| value.is_ascii() && value.len() <= longest)
}

#[cfg(test)]
mod tests {
    use super::super::tests::startup;
    use super::*;

    fn shown(text: &str, began: &[(&str, &str)], tag: &str) -> Option<String> {
        shown_with(text, &[0, 0], began, tag)
    }

    fn shown_with(text: &str, types: &[u8], began: &[(&str, &str)], tag: &str) -> Option<String> {
        let (text, _) = filled(text.as_bytes(), types, &startup(began), tag)?;
        Some(String::from_utf8(text).unwrap())
    }

    #[test]
    fn a_parameter_that_may_be_null_has_the_start_up_value_behind_it() {
        const UNTYPED: &[u8] = &[0, 0];
        #[rustfmt::skip]
        let table: [(&str, &[u8], Option<&str>); 9] = [
            ("SELECT set_config('a', $1, $2)",              UNTYPED,                 Some("SELECT set_config('a', coalesce($1, E'1'), $2)")),
            ("SELECT set_config('a', $1::text, false), $2", UNTYPED,                 Some("SELECT set_config('a', coalesce($1, E'1')::text, false), $2")),
            ("SELECT set_config('a', $1, false)",           &[0, 1, 0, 0, 0, 25],    Some("SELECT set_config('a', coalesce($1, E'1'), false)")),
            ("SELECT set_config('a', $1, false), $1",       &[0, 1, 0, 0, 4, 19],    Some("SELECT set_config('a', coalesce($1, E'1'), false), $1")),
            ("SELECT set_config('a', $1, false)",           &[0, 1, 0, 0, 2, 193],   Some("SELECT set_config('a', coalesce($1, E'1'), false)")),
            // The type of another place, or one that is none.
            ("SELECT $1, set_config('a', $1, false)",       UNTYPED,                 None),
            ("SELECT set_config('a', $1::text, false)",     &[0, 1, 0, 0, 0, 23],    None),
            ("SELECT set_config('b', $1, false)",           UNTYPED,                 None),
            ("SELECT set_config($2, $1, false)",            UNTYPED,                 None),
        ];
        for (text, types, want) in table {
            assert_eq!(shown_with(text, types, &[("a", "1")], "").as_deref(), want, "{text}");
        }
        // A simple query has no parameters.
        assert!(Puts::of(b"SELECT set_config('a', $1, false)", None, &startup(&[("a", "1")]), "").all.is_empty());
        let text = "SELECT set_config('a', $1, x), y";
        let (sent, splice) = filled(text.as_bytes(), UNTYPED, &startup(&[("a", "1")]), "").unwrap();
        let sent = String::from_utf8(sent).unwrap();
        for part in ["$1", ", x", "y"] {
            assert_eq!(splice.position(sent.find(part).unwrap() + 1), text.find(part).unwrap() + 1, "{part}");
        }
    }

    #[test]
    fn a_start_up_value_takes_the_place_of_null_where_that_is_the_same() {
        const TEXT: &str = "SELECT set_config('a', NULL, false)";
        let of = |name: &str, value: &str, tag| shown(&TEXT.replace('a', name), &[(name, value)], tag);
        let with = |value: &str| Some(format!("SELECT set_config('a', {value}, false)"));
        assert_eq!(shown(TEXT, &[("a", "it's \\b")], "tag"), with("E'it''s \\\\b'"));
        assert_eq!(shown(TEXT, &[("a", "")], ""), with("E''"));
        assert_eq!(shown(TEXT, &[("b", "1")], ""), None);
        assert_eq!(shown(TEXT, &[], ""), None);
        for name in ["role", "seed", "transaction_isolation", "default_tablespace", "datestyle"] {
            assert_eq!(shown(&format!("SELECT set_config('{name}', NULL, false)"), &[(name, "1")], ""), None, "{name}");
        }
        assert_eq!(of("a", &"x".repeat(VALUE_MAX), ""), with(&format!("E'{}'", "x".repeat(VALUE_MAX))));
        assert_eq!(of("a", &"x".repeat(VALUE_MAX + 1), ""), None);
        assert_eq!(of("a", "\u{e9}", ""), None);
        assert_eq!(shown("SELECT 'é', set_config('a', NULL, false)", &[("a", "1")], ""), None);
        let named = "SELECT set_config('application_name', NULL, false)";
        let name = |value: &str, tag| shown(named, &[("application_name", value)], tag).is_some();
        assert!(name("mine", "") && name(&"x".repeat(NAME_MAX), ""));
        assert!(!name("mine", "[tag]") && !name(&"x".repeat(NAME_MAX + 1), ""));
    }

    #[test]
    fn a_text_takes_a_bounded_number_of_values() {
        let many = |count| format!("SELECT {}1", "set_config('a', NULL, false),".repeat(count));
        let long = "'".repeat(VALUE_MAX);
        assert!(shown(&many(RESETS_MAX), &[("a", &long)], "").is_some());
        assert!(shown(&many(RESETS_MAX + 1), &[("a", "1")], "").is_none());
    }

    #[test]
    fn a_position_is_that_in_the_text_with_the_nulls() {
        let text = "SELECT set_config('a', NULL, x), set_config('b', null::text, y), z";
        let (sent, splice) = filled(text.as_bytes(), &[0, 0], &startup(&[("a", "longer"), ("b", "")]), "").unwrap();
        let sent = String::from_utf8(sent).unwrap();
        assert_eq!(sent, "SELECT set_config('a', E'longer', x), set_config('b', E''::text, y), z");
        let find = |text: &str, part: &str| text.find(part).unwrap() + 1;
        for part in ["SELECT", "'a'", ", x", "x)", "set_config('b'", "::text", "y)", "z"] {
            assert_eq!(splice.position(find(&sent, part)), find(text, part), "{part}");
        }
        for at in 0.."E'longer'".len() {
            assert_eq!(splice.position(find(&sent, "E'longer'") + at), find(text, "NULL"), "{at}");
        }
        assert_eq!(splice.position(find(&sent, "E''")), find(text, "null"));
    }
}
