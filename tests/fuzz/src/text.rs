//! Texts: SQL, and the start-up parameter `options`.

use pgweir::settings::parse_options;
use pgweir::sql::{self, EffectSet};

/// A text of SQL. One that goes over the wire has no NUL.
pub fn sql(input: &[u8]) {
    let text: Vec<u8> = input.iter().copied().filter(|byte| *byte != 0).collect();
    let effects = sql::scan(&text);
    let mut cache = sql::Cache::default();
    let body = [&text[..], b"\0"].concat();
    for _ in 0..2 {
        assert_eq!(cache.scan(&body), Ok((&text[..], effects)));
    }
    for name in sql::custom_names(&text) {
        assert!(!name.is_empty() && !name.bytes().any(|byte| byte.is_ascii_uppercase()));
    }
    if sql::is_transaction_end(&text) {
        assert!(!effects.set.intersects(EffectSet::SETTINGS.union(EffectSet::LISTEN)));
    }
    // What comes behind it runs, and so is seen.
    let behind = sql::scan(&[&text[..], b"\n;LISTEN c"].concat());
    assert!(behind.set.intersects(EffectSet::LISTEN.union(EffectSet::OPAQUE)), "LISTEN is overlooked");
}

/// Words are separated by white space; a backslash takes the next byte as it is.
///
/// Source: `pg_split_opts` and the switches `-c` and `--` of the `PostgreSQL` 17 docs, "postgres".
pub fn options(input: &[u8]) {
    let text: Vec<u8> = input.iter().copied().filter(|byte| *byte != 0).collect();
    let Ok(entries) = parse_options(&text) else { return };
    // Written out again, it is the same.
    let mut again = Vec::new();
    for (name, value) in &entries {
        again.extend_from_slice(b"-c ");
        for byte in name.bytes().chain([b'=']).chain(value.iter().copied()) {
            if byte == b'\\' || byte.is_ascii_whitespace() || byte == 0x0b {
                again.push(b'\\');
            }
            again.push(byte);
        }
        again.push(b' ');
    }
    assert_eq!(parse_options(&again).ok(), Some(entries));
}
