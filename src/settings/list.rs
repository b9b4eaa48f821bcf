//! A list of names, `search_path` above all: as a SET takes it, which has one literal for each name.

/// The characters that stand between names.
///
/// Source: `PostgreSQL` 17, `scanner_isspace` in `scansup.c`; a vertical tab is one since 16 alone.
const BLANKS: [char; 5] = [' ', '\t', '\n', '\r', '\u{c}'];

/// What Postgres puts in quotes in one version or another, though nothing in its letters asks for it.
///
/// Source: `pg_get_keywords()` of `PostgreSQL` 15, without those that are not reserved; and those of 16 and 17.
const KEYWORDS: &str = " all analyse analyze and any array as asc asymmetric authorization between bigint binary bit boolean \
    both case cast char character check coalesce collate collation column concurrently constraint create cross \
    current_catalog current_date current_role current_schema current_time current_timestamp current_user dec decimal default \
    deferrable desc distinct do else end except exists extract false fetch float for foreign freeze from full grant greatest \
    group grouping having ilike in initially inner inout int integer intersect interval into is isnull join json json_array \
    json_arrayagg json_exists json_object json_objectagg json_query json_scalar json_serialize json_table json_value lateral \
    leading least left like limit localtime localtimestamp merge_action national natural nchar none normalize not notnull \
    null nullif numeric offset on only or order out outer overlaps overlay placing position precision primary real references \
    returning right row select session_user setof similar smallint some substring symmetric system_user table tablesample \
    then time timestamp to trailing treat trim true union unique user using values varchar variadic verbose when where window \
    with xmlattributes xmlconcat xmlelement xmlexists xmlforest xmlnamespaces xmlparse xmlpi xmlroot xmlserialize xmltable ";

/// The names in an ASCII `value`, folded as the server does it; a nameless one where there is none, as a SET spells that. None if
/// it is not certain what they are.
///
/// Source: `PostgreSQL` 17, `SplitIdentifierString` in `varlena.c`.
pub fn names(value: &[u8]) -> Option<Vec<String>> {
    let value = std::str::from_utf8(value).ok().filter(|value| value.is_ascii() && !value.contains('\u{b}'))?;
    let mut rest = value.trim_matches(BLANKS);
    let mut names = Vec::new();
    if rest.is_empty() {
        return Some(vec![String::new()]);
    }
    loop {
        let (name, behind) = if let Some(quoted) = rest.strip_prefix('"') { unquote(quoted)? } else { bare(rest)? };
        // A longer one is cut.
        names.push(Some(name).filter(|name| name.len() <= super::NAME_MAX)?);
        let behind = behind.trim_start_matches(BLANKS);
        if behind.is_empty() {
            return Some(names);
        }
        rest = behind.strip_prefix(',')?.trim_start_matches(BLANKS);
    }
}

/// A name in quotes, the first of which is gone, and what is behind it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let (mut name, mut rest) = (String::new(), text);
    loop {
        let (part, behind) = rest.split_once('"')?;
        name.push_str(part);
        let Some(more) = behind.strip_prefix('"') else { return Some((name, behind)) };
        name.push('"');
        rest = more;
    }
}

/// A name without quotes, and what is behind it.
fn bare(text: &str) -> Option<(String, &str)> {
    let end = text.find(|char| char == ',' || BLANKS.contains(&char)).unwrap_or(text.len());
    let (name, behind) = text.split_at_checked(end).filter(|(name, _)| !name.is_empty())?;
    Some((name.to_ascii_lowercase(), behind))
}

/// Whether a SET of `names` certainly makes `value` of them: Postgres spells them anew, in quotes if need be.
///
/// Source: `PostgreSQL` 17, `flatten_set_variable_args` in `guc_funcs.c`, `quote_identifier` in `ruleutils.c`.
pub fn is_spelled(names: &[String], value: &[u8]) -> bool {
    let is_keyword = |name: &String| KEYWORDS.contains(&format!(" {name} "));
    let spelled: Vec<String> = names.iter().map(|name| spelled(name)).collect();
    !names.iter().any(is_keyword) && spelled.join(", ").as_bytes() == value
}

fn spelled(name: &str) -> String {
    let is_plain =
        |(at, byte): (usize, u8)| byte.is_ascii_lowercase() || byte == b'_' || at > 0 && byte.is_ascii_digit();
    if !name.is_empty() && name.bytes().enumerate().all(is_plain) {
        return name.to_owned();
    }
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_server_reads_them() {
        let long = "a".repeat(64);
        #[rustfmt::skip]
        let table: [(&str, Option<&[&str]>, bool); 22] = [
            ("mine, public",            Some(&["mine", "public"]),       true),
            ("mine,public",             Some(&["mine", "public"]),       false),
            (" mine ,\t public\n",      Some(&["mine", "public"]),       false),
            ("Mine",                    Some(&["mine"]),                 false),
            ("\"$user\", public",       Some(&["$user", "public"]),      true),
            ("$user",                   Some(&["$user"]),                false),
            ("\"My, \"\"Schema\"\"\"",  Some(&["My, \"Schema\""]),       true),
            ("a\"b",                    Some(&["a\"b"]),                 false),
            ("\"public\"",              Some(&["public"]),               false),
            ("1a",                      Some(&["1a"]),                   false),
            ("_1, \"1a\"",              Some(&["_1", "1a"]),             true),
            // Quoted by some of them.
            ("user",                    Some(&["user"]),                 false),
            ("\"user\"",                Some(&["user"]),                 false),
            ("json_table",              Some(&["json_table"]),           false),
            ("",                        Some(&[""]),                     false),
            ("\"\"",                    Some(&[""]),                     true),
            // None at all, or not in every version.
            ("a,",                      None,                            false),
            ("a b",                     None,                            false),
            ("\"a",                     None,                            false),
            ("\"a\"b",                  None,                            false),
            ("a\u{b}, b",               None,                            false),
            (&long,                     None,                            false),
        ];
        for (value, want, own) in table {
            let got = names(value.as_bytes());
            let want: Option<Vec<String>> = want.map(|all| all.iter().map(|&name| name.to_owned()).collect());
            assert_eq!(got, want, "{value}");
            assert_eq!(got.is_some_and(|names| is_spelled(&names, value.as_bytes())), own, "{value}");
        }
        assert_eq!(names("\u{e9}".as_bytes()), None);
        assert!(names("a".repeat(63).as_bytes()).is_some());
    }
}
