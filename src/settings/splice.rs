//! Texts in which settings go back to where their client began, and not to where the server connection did.
//!
//! Behind each reset of a start-up setting stands a SET of ours, which takes no snapshot, so that a SET TRANSACTION may follow.
//! The value in the place of the NULL of a `set_config` is that of the start. The answers to what is ours are not the client's, and
//! the positions in errors are made those of its own text. Where a SET might fail and a reset would not, or where anything else is
//! in doubt, the text stays as it is.

mod puts;

use pgweir_proto::backend::TxStatus;

use puts::Puts;
pub use puts::filled;

use super::{APPLICATION_NAME, Encoding, NAME_MAX, PATH, Profile, RISKY, is_role, list, literal, may_reset, tagged};
use crate::sql::{self, Cut, EffectSet, Reset, Resets, Splice, What};

/// What a RESET ALL leaves alone.
///
/// Source: `PostgreSQL` 17, `GUC_NO_RESET_ALL` in `guc_tables.c`.
const STAY: [&str; 4] = ["seed", "transaction_deferrable", "transaction_isolation", "transaction_read_only"];

/// Lists of names: a SET takes one literal for one name.
///
/// Source: `PostgreSQL` 17, `GUC_LIST_QUOTE` in `guc_tables.c`.
const LISTS: [&str; 5] = [
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
];

/// What everybody may set, in every version from 13 to 18, and nothing refuses that it has taken before: it names no object, file
/// or locale, and no other setting, right or load bears on it. A RESET ALL asks nobody.
///
/// Source: `PostgreSQL` 13 to 18, `PGC_USERSET` in `guc.c` and `guc_tables.c`.
const FREE: [&str; 100] = [
    "application_name",
    "array_nulls",
    "backend_flush_after",
    "backslash_quote",
    "bytea_output",
    "check_function_bodies",
    "client_min_messages",
    "commit_siblings",
    "constraint_exclusion",
    "cpu_index_tuple_cost",
    "cpu_operator_cost",
    "cpu_tuple_cost",
    "cursor_tuple_fraction",
    "datestyle",
    "debug_pretty_print",
    "debug_print_parse",
    "debug_print_plan",
    "debug_print_rewritten",
    "default_statistics_target",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "effective_cache_size",
    "effective_io_concurrency",
    "enable_bitmapscan",
    "enable_gathermerge",
    "enable_hashagg",
    "enable_hashjoin",
    "enable_incremental_sort",
    "enable_indexonlyscan",
    "enable_indexscan",
    "enable_material",
    "enable_mergejoin",
    "enable_nestloop",
    "enable_parallel_append",
    "enable_parallel_hash",
    "enable_partition_pruning",
    "enable_partitionwise_aggregate",
    "enable_partitionwise_join",
    "enable_seqscan",
    "enable_sort",
    "enable_tidscan",
    "escape_string_warning",
    "exit_on_error",
    "extra_float_digits",
    "from_collapse_limit",
    "geqo",
    "geqo_effort",
    "geqo_generations",
    "geqo_pool_size",
    "geqo_seed",
    "geqo_selection_bias",
    "geqo_threshold",
    "gin_fuzzy_search_limit",
    "gin_pending_list_limit",
    "hash_mem_multiplier",
    "idle_in_transaction_session_timeout",
    "intervalstyle",
    "jit",
    "jit_above_cost",
    "jit_expressions",
    "jit_inline_above_cost",
    "jit_optimize_above_cost",
    "jit_tuple_deforming",
    "join_collapse_limit",
    "lock_timeout",
    "log_parameter_max_length_on_error",
    "logical_decoding_work_mem",
    "maintenance_io_concurrency",
    "maintenance_work_mem",
    "max_parallel_maintenance_workers",
    "max_parallel_workers",
    "max_parallel_workers_per_gather",
    "min_parallel_index_scan_size",
    "min_parallel_table_scan_size",
    "parallel_leader_participation",
    "parallel_setup_cost",
    "parallel_tuple_cost",
    "password_encryption",
    "plan_cache_mode",
    "quote_all_identifiers",
    "random_page_cost",
    "row_security",
    "search_path",
    "seq_page_cost",
    "standard_conforming_strings",
    "synchronize_seqscans",
    "synchronous_commit",
    "timezone",
    "transform_null_equals",
    "vacuum_cost_delay",
    "vacuum_cost_limit",
    "vacuum_cost_page_dirty",
    "vacuum_cost_page_hit",
    "vacuum_cost_page_miss",
    "wal_sender_timeout",
    "wal_skip_threshold",
    "work_mem",
    "xmlbinary",
    "xmloption",
];

/// Custom settings begin with these that belong to a library: which may be loaded later, and refuse then what anybody may set
/// before. Those of Postgres itself, and of extensions that many have.
const LIBRARIES: [&str; 74] = [
    "age",
    "anon",
    "auth_delay",
    "auto_explain",
    "azure",
    "basebackup_to_shell",
    "basic_archive",
    "bdr",
    "citus",
    "columnar",
    "credcheck",
    "cron",
    "dblink_fdw",
    "google_columnar_engine",
    "hnsw",
    "hypopg",
    "isn",
    "ivfflat",
    "mysql_fdw",
    "neon",
    "oracle_fdw",
    "orafce",
    "passwordcheck",
    "pg_cron",
    "pg_hint_plan",
    "pg_net",
    "pg_partman_bgw",
    "pg_prewarm",
    "pg_qualstats",
    "pg_show_plans",
    "pg_squeeze",
    "pg_stat_kcache",
    "pg_stat_monitor",
    "pg_stat_statements",
    "pg_trgm",
    "pg_tle",
    "pg_wait_sampling",
    "pgaudit",
    "pgauditlogtofile",
    "pgcrypto",
    "pglogical",
    "pgroonga",
    "pgsodium",
    "pgtle",
    "pljava",
    "pllua",
    "plperl",
    "plperlu",
    "plpgsql",
    "plpgsql_check",
    "plprofiler",
    "plpython",
    "plpython3",
    "plpython3u",
    "plr",
    "pltcl",
    "pltclu",
    "plv8",
    "postgis",
    "postgres_fdw",
    "powa",
    "rdkit",
    "rds",
    "rum",
    "sepgsql",
    "set_user",
    "spock",
    "supautils",
    "tds_fdw",
    "temporal_tables",
    "timescaledb",
    "timescaledb_telemetry",
    "vault",
    "vectors",
];

/// A setting that has every name in quotes.
const QUOTES: &str = "quote_all_identifiers";

/// What a snapshot must not stand in front of: the words of what has its own, or waits for others.
const BEFORE_SNAPSHOT: [&[u8]; 4] = [b"begin", b"start", b"transaction", b"lock"];

/// Resets in one text.
const RESETS_MAX: usize = 16;

/// Bytes that a text may grow by.
const GROWTH_MAX: usize = 64 * 1024;

/// The longest value; bytes. One row of ours tells it.
const VALUE_MAX: usize = 1024;

/// What becomes of a text.
#[derive(Debug)]
pub struct Spliced {
    /// What the server gets.
    pub text: Vec<u8>,
    /// How its answers are read.
    pub splice: Splice,
    /// More of it may reset something.
    pub more: bool,
    /// A list may be spelled otherwise than at the start.
    pub respells: bool,
}

/// What follows an Execute of a prepared text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Behind {
    /// The texts.
    pub texts: Vec<Vec<u8>>,
    /// It is a transaction of its own: ours is another.
    pub is_alone: bool,
    /// A list may be spelled otherwise than at the start.
    pub respells: bool,
}

/// What the server is to get in place of a simple query of a client that began with `startup`, in a transaction or not, as
/// `status` tells, and in the `encoding` in force. None if it is to get the text itself: nothing in it goes back to a start-up value that the rest of it could
/// find, or something is not certain.
///
/// What the text ends with goes back behind it: the server commits before it says that its last statement is done, and that has
/// to be the client's own. Nothing is committed behind a reset that is alone in a transaction.
#[must_use]
pub fn splice(text: &[u8], startup: &Profile, tag: &str, status: TxStatus, encoding: Encoding) -> Option<Spliced> {
    // A position counts characters.
    if !encoding.reads(text) || !is_plain(startup) {
        return None;
    }
    let resets = sql::resets(text)?;
    if resets.all.len() > RESETS_MAX || resets.all.iter().any(|reset| !is_short(&reset.what)) {
        return None;
    }
    let is_alone = resets.statements == 1 && status == TxStatus::Open;
    let takes_snapshot = status == TxStatus::Idle && !spells(text, &BEFORE_SNAPSHOT);
    let (mut out, mut at) = (Vec::new(), 0);
    let (mut ours, mut cuts) = (Vec::new(), Vec::new());
    let mut puts = Puts::of(text, None, startup, tag);
    let (mut more, mut respells) = (has_more(&resets, text, &puts), false);
    for reset in &resets.all {
        if reset.nth == resets.statements && !is_alone || !is_startup(&reset.what, startup) {
            more = true;
            continue;
        }
        puts.write(text, reset.place, &mut at, &mut out, &mut cuts)?;
        out.extend_from_slice(text.get(at..reset.place)?);
        at = reset.place;
        let cut = out.len();
        respells |= !takes_snapshot && self::respells(&reset.what, startup);
        for set in sets(&reset.what, startup, tag, takes_snapshot)? {
            ours.push(reset.nth + ours.len());
            put(reset, &set, &mut out);
        }
        // What is ours is ASCII.
        let before = encoding.count(out.get(..cut)?);
        cuts.push(Cut { at: before, put: out.len() - cut, gone: 0 });
        if out.len() > at + GROWTH_MAX {
            return None;
        }
    }
    puts.write(text, text.len(), &mut at, &mut out, &mut cuts)?;
    out.extend_from_slice(text.get(at..)?);
    if out.len() > text.len() + GROWTH_MAX {
        return None;
    }
    let splice = Splice { done: 0, ours, cuts };
    (!splice.cuts.is_empty()).then_some(Spliced { text: out, splice, more, respells })
}

/// A statement of ours behind that of a reset.
fn put(reset: &Reset, set: &[u8], out: &mut Vec<u8>) {
    let parts: [&[u8]; 3] = if reset.ended { [b"", set, b";"] } else { [b"\n;", set, b""] };
    out.extend(parts.iter().copied().flatten());
}

/// Whether what a client began with means the same in each encoding, and is not cut.
fn is_plain(startup: &Profile) -> bool {
    let is_plain = |name: &str, value: &[u8]| {
        name.len() <= NAME_MAX && name.is_ascii() && value.len() <= VALUE_MAX && value.is_ascii()
    };
    startup.entries().iter().all(|(name, value)| is_plain(name, value))
}

/// Whether its name is not cut.
fn is_short(what: &What) -> bool {
    if let What::One { name, .. } = what { name.len() <= NAME_MAX } else { true }
}

/// Whether it is certain which of the start-up settings are reset: not by another name, and as nothing but settings.
fn is_startup(what: &What, startup: &Profile) -> bool {
    match what {
        What::All => true,
        What::Discard => false,
        What::One { name, .. } => startup.get(name).is_some() && !is_role(name) && !STAY.contains(&&**name),
    }
}

fn spells(text: &[u8], words: &[&[u8]]) -> bool {
    words.iter().any(|word| text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word)))
}

/// The statements that set what an Execute of a prepared `text` has reset, if that is all that the text does, and is certain.
///
/// A DISCARD ALL is a transaction of its own, which has been committed when its answer comes, and what follows may be another of
/// its kind: so it is behind a COMMIT, of which the server warns alone. Where it is refused, all that is ours is skipped.
#[must_use]
pub fn behind(text: &[u8], startup: &Profile, tag: &str) -> Option<Behind> {
    if !text.is_ascii() || !is_plain(startup) {
        return None;
    }
    let Resets { all, statements: 1, .. } = sql::resets(text)? else { return None };
    let [reset] = &*all else { return None };
    let is_alone = reset.what == What::Discard;
    if !is_short(&reset.what) || !is_alone && !is_startup(&reset.what, startup) {
        return None;
    }
    let mut texts = sets(&reset.what, startup, tag, false)?;
    if is_alone && !texts.is_empty() {
        texts.push(b"COMMIT".into());
    }
    Some(Behind { texts, is_alone, respells: respells(&reset.what, startup) })
}

/// Whether a SET of ours for the session spells a list otherwise than the client did.
fn respells(what: &What, startup: &Profile) -> bool {
    let resets = match what {
        What::All | What::Discard => true,
        What::One { name, local } => name == PATH && !local,
    };
    let is_spelled = |value: &[u8]| {
        list::names(value).is_some_and(|names| list::is_spelled(&names, value)) && startup.get(QUOTES).is_none()
    };
    resets && startup.get(PATH).is_some_and(|value| !is_spelled(value))
}

/// Whether something in a text may reset more than what was found of it.
fn has_more(resets: &Resets, text: &[u8], puts: &Puts) -> bool {
    let is_reset = |part: &[u8]| may_reset(part) && sql::scan(part).has(EffectSet::SETTINGS.union(EffectSet::OPAQUE));
    resets.rest.iter().any(|range| is_reset(&puts.filled(text, range.clone())))
}

/// The statements that set what was reset. None if one of them might fail where the reset does not, or takes a snapshot where
/// there must be none.
fn sets(what: &What, startup: &Profile, tag: &str, takes_snapshot: bool) -> Option<Vec<Vec<u8>>> {
    let is_all = matches!(what, What::All | What::Discard);
    let names: Vec<&str> = match what {
        What::All | What::Discard => startup.names().filter(|name| !STAY.contains(name)).collect(),
        What::One { name, .. } => vec![&**name],
    };
    let local = matches!(what, What::One { local: true, .. });
    let is_safe = |name: &str| if is_all { is_free(name) } else { !RISKY.contains(&name) };
    let give = |name: &str| {
        is_safe(name).then_some(())?;
        let value = startup.get(name)?;
        let mut given = Vec::new();
        if LISTS.contains(&name) {
            if takes_snapshot {
                return Some(set_config(name, local, value));
            }
            give_names(value, &mut given).filter(|()| name == PATH)?;
        } else if name == APPLICATION_NAME {
            literal(&mut given, &tagged(value, tag));
        } else {
            literal(&mut given, value);
        }
        Some(set(name, local, &given))
    };
    names.into_iter().map(give).collect()
}

/// Whether nothing refuses a start-up value that was taken before. A custom setting may be anything, unless it is a library's.
fn is_free(name: &str) -> bool {
    FREE.contains(&name) || name.split_once('.').is_some_and(|(prefix, _)| !LIBRARIES.contains(&prefix))
}

/// Names as a SET takes them: none of them has to be there.
fn give_names(value: &[u8], out: &mut Vec<u8>) -> Option<()> {
    for (at, name) in list::names(value)?.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        literal(out, name.as_bytes());
    }
    Some(())
}

/// A query that gives a setting a value as it is spelled, which takes a snapshot.
fn set_config(name: &str, local: bool, value: &[u8]) -> Vec<u8> {
    let mut out = b"SELECT pg_catalog.set_config(".to_vec();
    literal(&mut out, name.as_bytes());
    out.push(b',');
    literal(&mut out, value);
    out.extend_from_slice(if local { b",true)" } else { b",false)" });
    out
}

/// A statement that gives a setting what was `given` for it.
fn set(name: &str, local: bool, given: &[u8]) -> Vec<u8> {
    let mut out = if local { b"SET LOCAL \"".to_vec() } else { b"SET \"".to_vec() };
    out.extend_from_slice(name.replace('"', "\"\"").as_bytes());
    out.extend_from_slice(b"\" TO ");
    out.extend_from_slice(given);
    out
}

#[cfg(test)]
mod tests {
    use super::super::Profiles;
    use super::*;

    fn splice(text: &[u8], startup: &Profile, tag: &str, status: TxStatus) -> Option<Spliced> {
        super::splice(text, startup, tag, status, Encoding::Other)
    }

    pub(super) fn startup(all: &[(&str, &str)]) -> std::rc::Rc<Profile> {
        Profiles::default().intern(all.iter().map(|(name, value)| ((*name).into(), value.as_bytes().into())))
    }

    const BEGAN: [(&str, &str); 2] = [("search_path", "a, b"), ("work_mem", "1MB")];

    const MEM: &str = "SET \"work_mem\" TO E'1MB'";

    /// With what it is and whether more is to follow, if it is another.
    fn spliced(text: &str, startup: &[(&str, &str)], status: TxStatus) -> Option<(String, bool)> {
        let spliced = splice(text.as_bytes(), &self::startup(startup), "", status)?;
        Some((String::from_utf8(spliced.text).unwrap(), spliced.more))
    }

    #[test]
    fn behind_each_reset_the_start_up_value_is_set() {
        const PATH: &str = "SELECT pg_catalog.set_config(E'search_path',E'a, b',false)";
        #[rustfmt::skip]
        let table: [(&str, Option<String>, &[usize], bool); 15] = [
            ("SELECT 1; RESET work_mem; SELECT 2", Some(format!("SELECT 1; RESET work_mem;{MEM}; SELECT 2")), &[2], false),
            ("RESET work_mem; RESET ALL; SELECT 1", Some(format!("RESET work_mem;{MEM}; RESET ALL;{PATH};{MEM}; SELECT 1")), &[1, 3, 4], false),
            ("RESET search_path; SELECT 1",       Some(format!("RESET search_path;{PATH}; SELECT 1")), &[1], false),
            ("SET LOCAL work_mem TO DEFAULT; SELECT 1", Some("SET LOCAL work_mem TO DEFAULT;SET LOCAL \"work_mem\" TO E'1MB'; SELECT 1".into()), &[1], false),
            ("RESET work_mem; DO 'BEGIN RESET ALL; END'", Some(format!("RESET work_mem;{MEM}; DO 'BEGIN RESET ALL; END'")), &[1], true),
            // By another name, or the last.
            ("RESET work_mem; RESET sort_mem; SELECT 1", Some(format!("RESET work_mem;{MEM}; RESET sort_mem; SELECT 1")), &[1], true),
            ("RESET work_mem; RESET work_mem",    Some(format!("RESET work_mem;{MEM}; RESET work_mem")), &[1], true),
            ("RESET work_mem; SELECT set_config('work_mem', $1, false) -- null", Some(format!("RESET work_mem;{MEM}; SELECT set_config('work_mem', $1, false) -- null")), &[1], true),
            ("SELECT 1; RESET work_mem",          None, &[], false),
            ("RESET work_mem;",                   None, &[], false),
            ("RESET timezone; SELECT 1",          None, &[], false),
            ("RESET ROLE; SELECT 1",              None, &[], false),
            ("DISCARD ALL",                       None, &[], false),
            ("SELECT set_config('timezone', NULL, false); SELECT 1", None, &[], false),
            ("RESET work_mem; SELECT 'open",      None, &[], false),
        ];
        let startup = startup(&BEGAN);
        for (text, want, ours, more) in table {
            let got = splice(text.as_bytes(), &startup, "", TxStatus::Idle);
            assert_eq!(got.as_ref().map(|spliced| String::from_utf8(spliced.text.clone()).unwrap()), want, "{text}");
            if let Some(spliced) = got {
                assert_eq!((&*spliced.splice.ours, spliced.more), (ours, more), "{text}");
            }
        }
    }

    #[test]
    fn in_the_place_of_null_stands_the_start_up_value() {
        let of = |text: &str| spliced(text, &BEGAN, TxStatus::Idle);
        let set = |value: &str| format!("SELECT set_config('work_mem', {value}, false)");
        let (null, value) = (set("NULL"), set("E'1MB'"));
        assert_eq!(of(&null), Some((value.clone(), false)));
        assert_eq!(of(&format!("{null}; RESET timezone")), Some((format!("{value}; RESET timezone"), true)));
        let want = format!("{value}; RESET work_mem;{MEM}; {value};;{value}");
        let got =
            splice(format!("{null}; RESET work_mem; {null};;{null}").as_bytes(), &startup(&BEGAN), "", TxStatus::Open)
                .unwrap();
        assert_eq!((String::from_utf8(got.text).unwrap(), &*got.splice.ours, got.more), (want, &[2][..], false));
        // What else may go back.
        let beside =
            |value: &str| format!("SELECT set_config('work_mem', {value}, false), set_config($1, NULL, false)");
        assert_eq!(of(&beside("NULL")), Some((beside("E'1MB'"), true)));
        assert_eq!(of(&format!("{null}; RESET ALL")), Some((format!("{value}; RESET ALL"), true)));
    }

    #[test]
    fn the_last_is_followed_only_where_it_is_alone_in_a_transaction() {
        let of = |text, status| spliced(text, &BEGAN, status);
        assert_eq!(of("RESET work_mem", TxStatus::Open), Some((format!("RESET work_mem\n;{MEM}"), false)));
        assert_eq!(of("RESET work_mem;", TxStatus::Open), Some((format!("RESET work_mem;{MEM};"), false)));
        for status in [TxStatus::Idle, TxStatus::Failed] {
            assert_eq!(of("RESET work_mem", status), None);
        }
        assert_eq!(of("SELECT 1; RESET work_mem", TxStatus::Open), None);
        assert!(of("ROLLBACK; RESET work_mem; SELECT 1", TxStatus::Failed).is_some());
    }

    #[test]
    fn what_might_fail_or_take_a_snapshot_is_left_alone() {
        let of = |text, startup: &[(&str, &str)]| spliced(text, startup, TxStatus::Idle).is_some();
        let (all, one) = ("RESET ALL; SELECT 1", "RESET work_mem; SELECT 1");
        assert!(of(all, &BEGAN) && of(one, &BEGAN));
        // Rights, objects, libraries.
        for name in ["log_statement", "default_tablespace", "plpgsql.x", "hnsw.x", "role", "client_encoding"] {
            assert!(!of(all, &[BEGAN[1], (name, "x")]), "{name}");
            assert!(of(one, &[BEGAN[1], (name, "x")]), "{name}");
        }
        assert!(!of("RESET statement_timeout; SELECT 1", &[("statement_timeout", "1")]));
        assert!(!of("RESET temp_tablespaces; SELECT 1", &[("temp_tablespaces", "a")]));
        // A snapshot, where the names are not certain.
        let uncertain = [("search_path", "a\u{b}, b")];
        for text in
            ["BEGIN; RESET search_path; COMMIT", "RESET search_path; set Transaction READ ONLY", "RESET ALL; LOCK t"]
        {
            assert!(of(text, &BEGAN) && !of(text, &uncertain), "{text}");
        }
        assert!(of("RESET search_path; SELECT 1", &uncertain));
        assert_eq!(spliced("RESET search_path; SELECT 1", &uncertain, TxStatus::Open), None);
        assert_eq!(spliced("RESET temp_tablespaces", &[("temp_tablespaces", "a")], TxStatus::Open), None);
        // Bytes, and names that are cut.
        let long = "a".repeat(64);
        assert!(!of("RESET work_mem; SELECT '\u{e9}'", &BEGAN));
        assert!(!of(one, &[BEGAN[1], ("app.x", "\u{e9}")]));
        assert!(!of(one, &[BEGAN[1], (&long, "x")]));
        assert!(!of(&format!("RESET {long}; {one}"), &BEGAN));
    }

    #[test]
    fn a_list_is_set_name_by_name_where_there_must_be_no_snapshot() {
        const OWN: &str = r#"SET "search_path" TO E'a',E'b'"#;
        let of = |text: &str, value, status| {
            let began = startup(&[("search_path", value), ("app.x", "y")]);
            let spliced = splice(text.as_bytes(), &began, "", status)?;
            Some((String::from_utf8(spliced.text).unwrap(), spliced.respells))
        };
        let one = |set: &str| format!("RESET search_path\n;{set}");
        #[rustfmt::skip]
        let table: [(&str, &str, String, bool); 7] = [
            ("RESET search_path",  "a, b",              one(OWN),                                               false),
            ("RESET search_path",  "A,b",               one(OWN),                                               true),
            ("RESET search_path",  "\"A\", \"it's\"", one(r#"SET "search_path" TO E'A',E'it''s'"#),           false),
            ("RESET search_path",  "",                  one(r#"SET "search_path" TO E''"#),                     true),
            ("RESET ALL",          "a, b",              format!("RESET ALL\n;SET \"app.x\" TO E'y';{OWN}"),     false),
            ("SET LOCAL search_path TO DEFAULT", "a, b", "SET LOCAL search_path TO DEFAULT\n;SET LOCAL \"search_path\" TO E'a',E'b'".into(), false),
            ("SET LOCAL search_path TO DEFAULT", "a,b", "SET LOCAL search_path TO DEFAULT\n;SET LOCAL \"search_path\" TO E'a',E'b'".into(), false),
        ];
        for (text, value, want, respells) in table {
            // Each of several has what is behind it behind its own semicolon.
            let want = want.replace("E'y';", "E'y'\n;");
            assert_eq!(of(text, value, TxStatus::Open), Some((want, respells)), "{text} {value}");
        }
        let (text, respells) = of("RESET search_path; SELECT 1", "a,b", TxStatus::Idle).unwrap();
        assert!(text.contains("set_config(E'search_path',E'a,b',false)") && !respells, "{text}");
        let quoted = startup(&[("quote_all_identifiers", "on"), ("search_path", "a, b")]);
        assert!(splice(b"RESET search_path", &quoted, "", TxStatus::Open).unwrap().respells);
    }

    #[test]
    fn a_text_grows_by_a_bounded_number_of_values() {
        let many = |count| format!("{}SELECT 1", "RESET work_mem;".repeat(count));
        assert!(spliced(&many(RESETS_MAX), &BEGAN, TxStatus::Idle).is_some());
        assert!(spliced(&many(RESETS_MAX + 1), &BEGAN, TxStatus::Idle).is_none());
        let long = "x".repeat(VALUE_MAX);
        let startup: Vec<(&str, &str)> = FREE.iter().take(28).map(|&name| (name, &*long)).collect();
        let all = |count| format!("{}SELECT 1", "RESET ALL;".repeat(count));
        assert!(spliced(&all(1), &startup, TxStatus::Idle).is_some());
        assert!(spliced(&all(3), &startup, TxStatus::Idle).is_none());
        assert!(spliced("RESET jit; SELECT 1", &[("jit", &format!("{long}x"))], TxStatus::Idle).is_none());
    }

    #[test]
    fn a_position_is_that_in_the_clients_own_text() {
        // Each character that is the client's, told by where the server finds it.
        let text = "SELECT 'e'; RESET work_mem; SELECT 'u'; RESET ALL; SELECT x";
        let spliced = splice(text.as_bytes(), &startup(&BEGAN), "", TxStatus::Idle).unwrap();
        let sent = String::from_utf8(spliced.text).unwrap();
        let find = |text: &str, part: &str| text.find(part).unwrap() + 1;
        for part in ["SELECT 'e'", "RESET work", "SELECT 'u'", "RESET ALL", "SELECT x", "x"] {
            assert_eq!(spliced.splice.position(find(&sent, part)), find(text, part), "{part}");
        }
        assert_eq!(spliced.splice.position(find(&sent, "SET \"work_mem")), find(text, " SELECT 'u'"), "ours");
        let at = find(&sent, "SELECT x");
        let text = "SELECT set_config('work_mem', NULL, x); RESET work_mem; SELECT y, set_config('work_mem', NULL, z)";
        let both = splice(text.as_bytes(), &startup(&[("work_mem", "16384kB")]), "", TxStatus::Idle).unwrap();
        let both_sent = String::from_utf8(both.text).unwrap();
        for part in ["NULL, x", "x)", "RESET", "y,", "NULL, z", "z)"] {
            assert_eq!(
                both.splice.position(find(&both_sent, &part.replace("NULL", "E'16384kB'"))),
                find(text, part),
                "{part}"
            );
        }
        let text = "SELECT 'e'; RESET work_mem; SELECT 'u'; RESET ALL; SELECT x";
        let body = |at: usize| format!("SERROR\0C42601\0Mno P7\0P{at}\0Fscan.l\0\0").into_bytes();
        assert_eq!(spliced.splice.shift(&body(at)), Some(body(find(text, "SELECT x"))));
        for same in [body(1), b"SERROR\0\0".to_vec(), b"P".to_vec(), b"Px\0\0".to_vec(), b"".to_vec()] {
            assert_eq!(spliced.splice.shift(&same), None);
        }
    }

    #[test]
    fn a_position_counts_the_characters_of_the_encoding() {
        let text = "SELECT 'é'; RESET work_mem; SELECT 'ü😀'; RESET ALL; SELECT x";
        let latin: Vec<u8> =
            "SELECT 'é'; RESET work_mem; SELECT 'üÿ'; RESET ALL; SELECT x".chars().map(|c| c as u8).collect();
        let began = startup(&BEGAN);
        let of = |text: &[u8], encoding| super::splice(text, &began, "", TxStatus::Idle, encoding);
        assert!(of(text.as_bytes(), Encoding::Other).is_none() && of(&latin, Encoding::Other).is_none());
        assert!(of(&latin, Encoding::Utf8).is_none());
        for (text, encoding) in [(text.as_bytes(), Encoding::Utf8), (&latin, Encoding::Bytes)] {
            let spliced = of(text, encoding).unwrap();
            let find = |text: &[u8], part: &str| {
                encoding.count(&text[..memchr::memmem::find(text, part.as_bytes()).unwrap()]) + 1
            };
            for part in ["SELECT '", "RESET work", "RESET ALL", "SELECT x", "x"] {
                assert_eq!(spliced.splice.position(find(&spliced.text, part)), find(text, part), "{part} {encoding:?}");
            }
            assert_eq!(spliced.splice.position(find(&spliced.text, "SET \"work_mem")), find(text, " RESET work") + 16);
        }
        // A name that only begins like a word.
        assert!(of("RESET ALLé; SELECT 1".as_bytes(), Encoding::Utf8).is_none());
    }

    #[test]
    fn behind_a_prepared_text_stands_what_it_reset_if_that_is_all() {
        let text = |text: &str, startup: &[(&str, &str)]| {
            let behind = behind(text.as_bytes(), &self::startup(startup), "")?;
            Some(behind.texts.into_iter().map(|text| String::from_utf8(text).unwrap()).collect::<Vec<_>>())
        };
        let mem = &BEGAN[1..];
        assert_eq!(text("RESET work_mem", &BEGAN), Some(vec![MEM.to_owned()]));
        assert_eq!(text("RESET ALL", mem), Some(vec![MEM.to_owned()]));
        let local = "SET LOCAL \"work_mem\" TO E'1MB'".to_owned();
        assert_eq!(text("SET LOCAL work_mem TO DEFAULT;", &BEGAN), Some(vec![local]));
        let path = "SET \"search_path\" TO E'a',E'b'".to_owned();
        assert_eq!(text("RESET ALL", &BEGAN), Some(vec![path.clone(), MEM.to_owned()]));
        assert_eq!(text("RESET search_path", &BEGAN), Some(vec![path]));
        for (text, value, want) in [
            ("RESET search_path", "a, b", (false, false)),
            ("RESET search_path", "a,b", (false, true)),
            ("SET LOCAL search_path TO DEFAULT", "a,b", (false, false)),
            ("RESET ALL", "a,b", (false, true)),
            ("DISCARD ALL", "a, b", (true, false)),
            ("DISCARD ALL", "a,b", (true, true)),
        ] {
            let behind = behind(text.as_bytes(), &startup(&[("search_path", value)]), "").unwrap();
            assert_eq!((behind.is_alone, behind.respells), want, "{text} {value}");
        }
        assert_eq!(text("DISCARD ALL;", mem), Some(vec![MEM.to_owned(), "COMMIT".to_owned()]));
        assert_eq!(text("DISCARD ALL", &[BEGAN[1], ("default_tablespace", "t")]), None);
        for other in [
            "RESET timezone",
            "RESET sort_mem",
            "DISCARD ALL; SELECT 1",
            "SELECT 1",
            "SELECT set_config('work_mem', NULL, false)",
            "COPY t FROM STDIN",
        ] {
            assert_eq!(text(other, &BEGAN), None, "{other}");
        }
        assert_eq!(text("RESET ALL", &[BEGAN[1], ("plpgsql.x", "y")]), None);
        assert_eq!(text("RESET ALL", &[BEGAN[1], ("app.x", "y")]).unwrap().len(), 2);
    }
}
