//! What becomes of each message of a server, without sockets.

mod unnamed;

use pgweir_harness::wire::build::{
    bind, close_statement, copy_data, copy_done, describe_statement, execute, message, parse, query, sync,
};
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin, Owed};
use proptest::prelude::*;

use super::super::desk::{Desk, STATEMENTS_MAX, reply};
use super::super::statements::Unnamed;
use super::{Heard, Unserved, owed};
use crate::prepared::{AUDIT, REPLAY, RESTORE};
use crate::state::Findings;

fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// A client whose statement `s` another server connection had: this one has it not.
fn moved() -> Desk {
    let mut desk = Desk::new();
    desk.client(&[parse("s", "SELECT 1", &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.conn.shelf.clear();
    desk.to_client.clear();
    desk.has_word = false;
    desk
}

/// A name, how it begins, what the client sends, what the server answers, what the client gets.
type Case = (&'static str, fn() -> Desk, Vec<u8>, Vec<u8>, Vec<u8>);

#[test]
fn the_client_gets_the_answers_to_what_it_asked_itself() {
    let (one, bound, parsed, closed) =
        (reply::done("SELECT 1"), reply::bare(b'2'), reply::bare(b'1'), reply::bare(b'3'));
    let (idle, failed) = (reply::ready(b'I'), reply::error("ERROR", "22012", "division by zero"));
    #[rustfmt::skip]
    let table: [Case; 11] = [
        ("simple query", Desk::new, query("SELECT 1"),
            [reply::row(b"1"), one.clone(), idle.clone()].concat(),
            [reply::row(b"1"), one.clone(), idle.clone()].concat()),
        ("our Parse", moved, [bind("", "s", &[]), execute("", 0), sync()].concat(),
            [parsed.clone(), bound.clone(), one.clone(), idle.clone()].concat(),
            [bound.clone(), one.clone(), idle.clone()].concat()),
        ("an answer of ours waits its turn", moved, [bind("", "s", &[]), close_statement("s"), execute("", 0), sync()].concat(),
            [parsed.clone(), bound.clone(), one.clone(), idle.clone()].concat(),
            [bound.clone(), closed.clone(), one.clone(), idle.clone()].concat()),
        ("an answer of ours behind an error", moved, [bind("", "s", &[]), execute("", 0), close_statement("s"), sync()].concat(),
            [parsed.clone(), bound.clone(), failed.clone(), idle.clone()].concat(),
            [bound.clone(), failed.clone(), idle.clone()].concat()),
        ("an error ends its batch only", Desk::new,
            [parse("", "A", &[]), bind("", "", &[]), execute("", 0), sync(), query("B")].concat(),
            [failed.clone(), idle.clone(), one.clone(), idle.clone()].concat(),
            [failed.clone(), idle.clone(), one.clone(), idle.clone()].concat()),
        ("another's notification", Desk::new, query("SELECT 1"),
            [message(b'A', b"\0\0\0\x01c\0p\0"), one.clone(), idle.clone()].concat(),
            [one.clone(), idle.clone()].concat()),
        ("a notice", Desk::new, query("SELECT 1"),
            [message(b'N', b"SNOTICE\0\0"), one.clone(), idle.clone()].concat(),
            [message(b'N', b"SNOTICE\0\0"), one.clone(), idle.clone()].concat()),
        ("COPY in", Desk::new, [query("COPY t FROM STDIN"), copy_data(b"1"), copy_done()].concat(),
            [message(b'G', b"\0\0\0"), reply::done("COPY 1"), idle.clone()].concat(),
            [message(b'G', b"\0\0\0"), reply::done("COPY 1"), idle.clone()].concat()),
        ("COPY out", Desk::new, query("COPY t TO STDOUT"),
            [message(b'H', b"\0\0\0"), copy_data(b"1"), copy_done(), reply::done("COPY 1"), idle.clone()].concat(),
            [message(b'H', b"\0\0\0"), copy_data(b"1"), copy_done(), reply::done("COPY 1"), idle.clone()].concat()),
        ("a COPY that fails", Desk::new, [query("COPY t FROM STDIN"), copy_data(b"1"), copy_done()].concat(),
            [failed.clone(), idle.clone()].concat(),
            [failed.clone(), idle.clone()].concat()),
        ("described", moved, [describe_statement("s"), sync()].concat(),
            [parsed.clone(), message(b't', b"\0\0"), reply::bare(b'n'), idle.clone()].concat(),
            [message(b't', b"\0\0"), reply::bare(b'n'), idle.clone()].concat()),
    ];
    for (name, make, input, answer, want) in table {
        let mut desk = make();
        desk.client(&input);
        let (got, heard) = desk.server(&answer);
        assert!(matches!(heard, Heard::Short), "{name}: {heard:?}");
        assert_eq!(show(&got), show(&want), "{name}");
        assert!(desk.conn.pipeline.is_free(), "{name}: {:?}", desk.conn.pipeline);
        assert_eq!(show(&desk.to_client), show(&want), "{name}: nothing was told before");
    }
}

#[test]
fn a_follower_that_ends_the_connection_has_told_nothing_of_a_batch_that_runs_elsewhere() {
    let batch = [parse("", "SELECT 1", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    let begun = [reply::bare(b'1'), reply::bare(b'2')].concat();
    let whole = [&*begun, &reply::row(b"1"), &reply::done("SELECT 1"), &reply::ready(b'I')].concat();
    // As when a conflict with recovery finds the server between two messages of the batch.
    let fatal = reply::error("FATAL", "40001", "terminating connection due to conflict with recovery");
    #[rustfmt::skip]
    let table: [(&str, bool, &[u8], &[u8]); 4] = [
        ("under way",        true,  &begun, b""),
        ("answered",         true,  &whole, &whole),
        ("on the primary",   false, &begun, &begun),
        ("nothing came yet", true,  b"",    b""),
    ];
    for (name, elsewhere, said, want) in table {
        let mut desk = Desk::new();
        desk.elsewhere = elsewhere;
        desk.client(&batch);
        let (got, heard) = desk.server(&[said, &fatal].concat());
        assert!(matches!(heard, Heard::Lost(_)), "{name}: {heard:?}");
        assert_eq!(show(&got), show(want), "{name}");
    }
}

#[test]
fn a_name_is_shown_without_the_tag() {
    const TAG: &str = "[pgweir web.1/ab12cd#7]";
    const SHOW: &str = "SHOW application_name";
    let make = || {
        let mut desk = Desk::logged_in_with(&[("application_name", "app")]);
        desk.conn.tag = TAG.into();
        desk
    };
    let (tagged, done, idle) = (format!("app {TAG}"), reply::done("SHOW"), reply::ready(b'I'));
    let extended =
        |portal: &str, text: &str| [parse("", text, &[]), bind(portal, "", &[]), execute(portal, 0), sync()].concat();
    let answered = [reply::bare(b'1'), reply::bare(b'2')].concat();
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &[u8], &str, &str); 8] = [
        ("a simple query",       query(SHOW),                                    b"",       &tagged,   "app"),
        ("a portal",             extended("", SHOW),                             &answered, &tagged,   "app"),
        ("a named portal",       extended("p", SHOW),                            &answered, &tagged,   "app"),
        ("no name at all",       query(SHOW),                                    b"",       TAG,       ""),
        ("set a moment ago",     query(SHOW),                                    b"",       "mine",    "mine"),
        ("a tag of its own",     query(SHOW),                                    b"",       "[pgweir x/y#1]", "[pgweir x/y#1]"),
        ("another query",        query("SELECT application_name FROM pg_stat_activity"), b"", &tagged, &tagged),
        ("another portal",       extended("", "SELECT current_setting('application_name')"), &answered, &tagged, &tagged),
    ];
    for (name, input, first, told, want) in table {
        let mut desk = make();
        desk.client(&input);
        let answer = [first, &reply::row(told.as_bytes()), &done, &idle].concat();
        let want = [first, &reply::row(want.as_bytes()), &done, &idle].concat();
        let (got, heard) = desk.server(&answer);
        assert!(matches!(heard, Heard::Short), "{name}: {heard:?}");
        assert_eq!(show(&got), show(&want), "{name}");
        // In pieces of any size.
        let mut desk = make();
        desk.client(&input);
        for byte in &answer {
            desk.server(&[*byte]);
        }
        assert_eq!(show(&desk.to_client), show(&want), "{name}, byte by byte");
        // What follows it is no name.
        desk.client(&query("SELECT 1"));
        let row = [reply::row(tagged.as_bytes()), reply::done("SELECT 1"), reply::ready(b'I')].concat();
        assert_eq!(show(&desk.server(&row).0), show(&row), "{name}, behind it");
    }
}

#[test]
fn errors_bear_the_clients_own_names() {
    let mut desk = moved();
    desk.client(&[bind("", "s", &[]), sync()].concat());
    let text = |name: &str| format!("bind message supplies 0 parameters, but prepared statement \"{name}\" requires 1");
    let error = |name: &str| reply::error("ERROR", "08P01", &text(name));
    let ours = error(&desk.name(1));
    let (got, _) = desk.server(&[reply::bare(b'1'), ours, reply::ready(b'I')].concat());
    assert_eq!(show(&got), show(&[error("s"), reply::ready(b'I')].concat()));
}

#[test]
fn what_a_server_says_on_its_own_account_is_no_word_of_an_answer() {
    let status = || reply::parameter("TimeZone", "UTC");
    let notice = || message(b'N', b"SNOTICE\0\0");
    let notified = || message(b'A', b"\0\0\0\x01c\0p\0");
    let parsed = || reply::bare(b'1');
    #[rustfmt::skip]
    let table: [(&str, Vec<Vec<u8>>, Vec<Vec<u8>>, bool); 7] = [
        ("nothing",                 vec![],           vec![],                                 true),
        ("behind the error",        vec![],           vec![notified(), notice(), status()],   true),
        ("notified in front of it", vec![notified()], vec![],                                 true),
        ("a notice of its own",     vec![notice()],   vec![],                                 false),
        ("a setting of its own",    vec![status()],   vec![],                                 false),
        ("our own Parse",           vec![parsed()],   vec![notice()],                         true),
        ("a word",                  vec![parsed(), reply::bare(b'2')], vec![],                false),
    ];
    for (name, before, behind, heals) in table {
        for at_once in [true, false] {
            // With a Parse of ours in front, or with the statement there already.
            let ours = before.first() == Some(&parsed());
            let mut desk = moved();
            desk.heals = true;
            desk.marks.listening = true;
            if !ours {
                desk.conn.shelf.put(1, 8, 0);
            }
            desk.client(&[bind("", "s", &[]), execute("", 0), sync()].concat());
            let lost = format!("prepared statement \"{}\" does not exist", desk.name(1));
            let error = vec![reply::error("ERROR", "26000", &lost)];
            let mut pieces = [before.clone(), error, behind.clone(), vec![reply::ready(b'I')]].concat();
            if at_once {
                pieces = vec![pieces.concat()];
            }
            let mut again = false;
            for piece in pieces {
                again |= matches!(desk.server(&piece).1, Heard::Again);
            }
            assert_eq!(again, heals, "{name}, at once: {at_once}");
            assert!(!heals || !desk.has_word, "{name}");
        }
    }
}

#[test]
fn a_statement_too_many_gets_our_error_for_the_servers() {
    let mut desk = Desk::new();
    for n in 0..=STATEMENTS_MAX {
        desk.client(&parse(&format!("s{n}"), &format!("SELECT {n}"), &[]));
    }
    desk.client(&sync());
    let answers = reply::bare(b'1').repeat(STATEMENTS_MAX);
    let refused = reply::error("ERROR", "42601", "syntax error at or near \"refused\"");
    let (got, _) = desk.server(&[answers.clone(), refused, reply::ready(b'I')].concat());
    let got = show(&got);
    assert!(got.contains("C53200") && got.contains("max_client_statements") && !got.contains("42601"), "{got}");
}

#[test]
fn our_own_conversation_is_not_the_clients() {
    // An audit, and behind it what the client sent meanwhile.
    let mut desk = Desk::new();
    desk.aside.audit = Some(Findings::default());
    desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, AUDIT);
    desk.client(&query("SELECT 1"));
    let finding = message(b'D', b"\0\x03\0\0\0\x01t\0\0\0\0\0\0\0\0");
    let audit = [message(b'T', b"\0\0"), finding, reply::done("SELECT 1"), reply::ready(b'I')].concat();
    let own = [reply::row(b"1"), reply::done("SELECT 1"), reply::ready(b'I')].concat();
    let (got, _) = desk.server(&[audit, own.clone()].concat());
    assert_eq!(show(&got), show(&own));
    assert!(desk.aside.audited && desk.aside.audit.is_some_and(|findings| !findings.pins.is_empty()));

    // A replay of settings: the client knows them. What its own statement sets, it is told, and is looked into.
    let mut desk = Desk::new();
    desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
    desk.aside.replaying = true;
    desk.client(&query("SELECT 1"));
    let zone = reply::parameter("TimeZone", "UTC");
    let (got, _) = desk.server(&[reply::done("SELECT 1"), zone.clone(), reply::ready(b'I')].concat());
    assert_eq!((show(&got), desk.aside.replaying, desk.marks.tainted), (String::new(), false, false));
    let (got, _) = desk.server(&[zone.clone(), reply::done("SELECT 1"), reply::ready(b'I')].concat());
    assert_eq!(show(&got), show(&[zone, reply::done("SELECT 1"), reply::ready(b'I')].concat()));
    assert!(desk.marks.tainted);
}

/// The client left a channel and listens to it again behind the audit, and all of that is read at once.
#[test]
fn an_audit_tells_what_was_left_before_anybody_looks_at_it() {
    let mut desk = Desk::new();
    desk.aside.audit = Some(Findings::default());
    desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, AUDIT);
    let listens = message(b'D', b"\0\x03\0\0\0\x01n\0\0\0\x04kept\0\0\0\0");
    desk.server(&[message(b'T', b"\0\0"), listens].concat());
    assert!(!desk.aside.finds_left(b"left"), "there may be more");
    desk.server(&[reply::done("SELECT 1"), reply::ready(b'I')].concat());
    assert!(desk.aside.finds_left(b"left") && !desk.aside.finds_left(b"kept"));
}

#[test]
fn a_failed_replay_is_told_from_the_clients_own_errors() {
    let mut desk = Desk::new();
    desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
    let (got, heard) = desk.server(&reply::error("ERROR", "22023", "invalid value"));
    assert!(got.is_empty() && matches!(heard, Heard::ReplayFailed(_)), "{heard:?}");
}

#[test]
fn what_no_server_may_send_loses_it() {
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &str); 6] = [
        ("FATAL",                reply::error("FATAL", "57P01", "shut down"), "Lost(Fatal"),
        ("out of turn",          reply::bare(b'2'),                           "Lost(Protocol"),
        ("no such tag",          message(b'?', b""),                          "Lost(Protocol"),
        ("an impossible length", b"D\0\0\0\x03".to_vec(),                    "Lost(Protocol"),
        ("no such status",       message(b'Z', b"X"),                         "Lost(Protocol"),
        ("too long to be read",  b"T\x7f\xff\xff\xff".to_vec(),               "Lost(Protocol"),
    ];
    for (name, answer, want) in table {
        let mut desk = Desk::new();
        desk.client(&query("SELECT 1"));
        let (got, heard) = desk.server(&[reply::row(b"1"), answer].concat());
        assert!(format!("{heard:?}").starts_with(want), "{name}: {heard:?}");
        assert_eq!(show(&got), show(&reply::row(b"1")), "{name}: what came before passes");
    }
    let mut desk = Desk::new();
    let (_, heard) = desk.server(&reply::ready(b'I'));
    assert!(matches!(heard, Heard::Lost(_)), "nothing was asked: {heard:?}");
}

#[test]
fn nothing_of_ours_comes_inside_a_servers_message() {
    let mut desk = moved();
    desk.client(&[bind("", "s", &[]), execute("", 0)].concat());
    let row = reply::row(&[b'x'; 1000]);
    let (mut got, _) = desk.server(&[reply::bare(b'1'), reply::bare(b'2'), row[..500].to_vec()].concat());
    assert!(desk.is_inside_answer());
    // Its answer is ours to give, and due only when the row is whole and its statement is done.
    let told = desk.to_client.len();
    desk.client(&[close_statement("s"), sync()].concat());
    assert_eq!(desk.to_client.len(), told);
    let (rest, _) = desk.server(&[&row[500..], &reply::done("SELECT 1"), &reply::ready(b'I')].concat());
    got.extend(rest);
    let want =
        [reply::bare(b'2'), row, reply::done("SELECT 1"), encode::CLOSE_COMPLETE.to_vec(), reply::ready(b'I')].concat();
    assert_eq!(show(&got), show(&want));
}

#[test]
fn what_a_follower_refuses_is_told_from_what_any_server_may_say() {
    let changed = message(b'E', super::CHANGED);
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, Unserved); 4] = [
        ("refused",              reply::error("ERROR", "25006", "read-only"),       Unserved::Failed(*b"25006")),
        ("in the way",           reply::error("ERROR", "40001", "conflict"),        Unserved::Failed(*b"40001")),
        ("not on a follower",    reply::error("ERROR", "0A000", "not supported"),   Unserved::Failed(*b"0A000")),
        ("a table was altered",  changed,                                           Unserved::Stale),
    ];
    for (name, error, want) in table {
        let mut desk = moved();
        desk.elsewhere = true;
        desk.client(&[bind("", "s", &[]), execute("", 0), sync()].concat());
        let (got, heard) = desk.server(&[reply::bare(b'1'), reply::bare(b'2'), error, reply::ready(b'I')].concat());
        assert!(got.is_empty() && matches!(heard, Heard::Again), "{name}: {} {heard:?}", show(&got));
        assert_eq!(desk.aside.unserved, Some(want), "{name}");
    }
}

#[test]
fn what_a_follower_said_before_it_was_promoted_is_told_to_nobody_and_run_again_only_if_it_is_proven_to_read() {
    for harmless in [true, false] {
        let mut desk = Desk::new();
        (desk.elsewhere, desk.harmless) = (true, harmless);
        desk.client(&query("SELECT charge()"));
        let promoted = reply::parameter("in_hot_standby", "off");
        let (got, heard) =
            desk.server(&[reply::row(b"1"), reply::done("SELECT 1"), promoted, reply::ready(b'I')].concat());
        assert_eq!(show(&got), "");
        assert!(matches!((&heard, harmless), (Heard::Again, true) | (Heard::Lost(_), false)), "{harmless}: {heard:?}");
    }
}

#[test]
fn a_promotion_that_is_told_in_the_answer_to_a_query_of_ours_loses_the_server_connection() {
    for answer in [&[][..], &[reply::row(b"1"), reply::done("SELECT 1"), reply::ready(b'I')]] {
        let mut desk = Desk::new();
        desk.elsewhere = true;
        desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, REPLAY);
        desk.client(&query("SELECT 1"));
        let promoted = [reply::done("SET"), reply::parameter("in_hot_standby", "off"), reply::ready(b'I')].concat();
        let (got, heard) = desk.server(&[promoted, answer.concat()].concat());
        assert_eq!(show(&got), "");
        assert!(matches!(heard, Heard::Lost(_)), "{heard:?}");
        assert!(desk.conn.littered && desk.aside.unserved == Some(Unserved::Promoted));
    }
}

/// A conversation: what the client sends, and what the server answers.
fn some_turn() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let (bound, idle) = (reply::bare(b'2'), reply::ready(b'I'));
    let failed = reply::error("ERROR", "22012", "division by zero");
    let long = reply::row(&[b'x'; 700]);
    // Both are answered by us: the server has the text of `t`.
    let ours = [parse("t", "SELECT 2", &[]), close_statement("t")].concat();
    let batch = |middle: &[u8]| [&bind("", "s", &[])[..], middle, &execute("", 0), &sync()].concat();
    let turns = vec![
        (query("SELECT 1"), [long.clone(), reply::done("SELECT 1"), idle.clone()].concat()),
        (query("SELECT 1"), [long.clone(), failed.clone(), idle.clone()].concat()),
        (batch(b""), [bound.clone(), long.clone(), reply::done("SELECT 1"), idle.clone()].concat()),
        (batch(&ours), [bound.clone(), long, reply::done("SELECT 1"), idle.clone()].concat()),
        (batch(&ours), [failed, idle.clone()].concat()),
        (
            query("SELECT 1"),
            [message(b'H', b"\0\0\0"), copy_data(&[b'd'; 400]), copy_done(), reply::done("COPY 1"), idle].concat(),
        ),
    ];
    prop::sample::select(turns)
}

proptest! {
    #[test]
    fn whatever_the_chunks_the_client_gets_the_same(
        turns in prop::collection::vec(some_turn(), 1..12),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let start = || {
            let mut desk = Desk::new();
            let both = [parse("s", "SELECT 1", &[]), parse("t", "SELECT 2", &[]), close_statement("t"), sync()];
            desk.client(&both.concat());
            desk.server(&[reply::bare(b'1'), reply::bare(b'1'), reply::ready(b'I')].concat());
            desk.to_client.clear();
            desk
        };
        let (mut whole, mut pieces) = (start(), start());
        for (request, answer) in &turns {
            let (sent, stop) = whole.client(request);
            let (same, also) = pieces.client(request);
            prop_assert_eq!((sent.len(), stop), (same.len(), also));
            whole.server(answer);
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(answer.len())).collect();
            at.sort_unstable();
            at.push(answer.len());
            let mut before = 0;
            for end in at {
                let (_, heard) = pieces.server(&answer[before..end]);
                prop_assert!(matches!(heard, Heard::Short), "{heard:?}");
                before = end;
            }
            prop_assert_eq!(show(&pieces.to_client), show(&whole.to_client));
            prop_assert!(whole.conn.pipeline.is_free() && pieces.conn.pipeline.is_free());
        }
    }
}

/// Names and values.
type Values<'a> = &'a [(&'a str, &'a str)];

#[test]
fn a_reset_setting_is_reported_once_and_only_if_the_client_has_not_heard_of_its_value() {
    let reported = |values: &[(&str, &str)]| -> Vec<u8> {
        values.iter().flat_map(|(name, value)| reply::parameter(name, value)).collect()
    };
    #[rustfmt::skip]
    let table: [(&str, Values<'_>, Values<'_>, Values<'_>, Values<'_>); 6] = [
        // What was told before, what the reset reports, what our own query does, and what the client is told.
        ("as it was",       &[],                     &[("TimeZone", "UTC")], &[("TimeZone", "Asia/Kolkata")], &[]),
        ("another",         &[("TimeZone", "Cuba")], &[("TimeZone", "UTC")], &[("TimeZone", "Asia/Kolkata")], &[("TimeZone", "Asia/Kolkata")]),
        ("was the default", &[("TimeZone", "UTC")],  &[],                    &[("TimeZone", "Asia/Kolkata")], &[("TimeZone", "Asia/Kolkata")]),
        ("told before",     &[("TimeZone", "Cuba"), ("TimeZone", "Asia/Kolkata")],
            &[("TimeZone", "UTC")], &[("TimeZone", "Asia/Kolkata")], &[]),
        ("of no login",     &[],                     &[("DateStyle", "ISO, MDY")], &[], &[("DateStyle", "ISO, MDY")]),
        ("both",            &[],                     &[("DateStyle", "ISO, MDY"), ("TimeZone", "UTC")], &[("TimeZone", "Asia/Kolkata")],
            &[("DateStyle", "ISO, MDY")]),
    ];
    for (name, before, by_reset, by_us, want) in table {
        let mut desk = Desk::logged_in_with(&[("timezone", "asia/kolkata")]);
        desk.conn.profile.prove(vec![("TimeZone".into(), b"Asia/Kolkata"[..].into())], Vec::new());
        desk.client(&query("SET x TO y"));
        desk.server(&[&reply::done("SET"), &*reported(before), &reply::ready(b'I')].concat());
        desk.client(&query("DISCARD ALL"));
        let (done, ready) = (reply::done("DISCARD ALL"), reply::ready(b'I'));
        let ours = [reply::row(b"x"), reply::done("SELECT 1")].concat();
        let (got, _) = desk.server(&[&*done, &reported(by_reset), &ready, &ours, &reported(by_us), &ready].concat());
        assert_eq!(show(&got), show(&[&*done, &reported(want), &ready].concat()), "{name}");
    }
}

#[test]
fn what_is_put_into_a_query_is_answered_to_nobody_and_moves_no_position() {
    let splices = |name: &str| Desk::logged_in_with(&[("search_path", "a, b"), (name, "1MB")]);
    let (given, one) = (reply::done("SET"), reply::done("SELECT 1"));
    let ready = reply::ready(b'I');
    let mut desk = splices("work_mem");
    // What is sent before that is answered has nothing of ours in it, and is followed by a query instead.
    let text = "RESET work_mem; SELECT 3";
    let (sent, _) = desk.client(&[query("SELECT 1; RESET ALL; SELECT 2"), query(text)].concat());
    let path = "SELECT pg_catalog.set_config(E'search_path',E'a, b',false);";
    let all = query(&format!("SELECT 1; RESET ALL;{path}SET \"work_mem\" TO E'1MB'; SELECT 2"));
    assert!(sent.starts_with(&[all, query(text)].concat()), "{}", show(&sent));
    assert_eq!(memchr::memmem::find_iter(&sent, "AS startup").count(), 1);
    let row = |value: &[u8]| [message(b'T', b"\0\0"), reply::row(value), one.clone()].concat();
    let parameter = reply::parameter("TimeZone", "UTC");
    let reset = reply::done("RESET");
    let answer =
        [&row(b"1"), &reset, &row(b"a, b"), &given, &row(b"2"), &parameter, &ready].map(|part| &part[..]).concat();
    let behind = [&*reset, &row(b"3"), &ready].concat();
    let (got, _) = desk.server(&[&*answer, &behind, &reply::done("SELECT 0"), &ready].concat());
    let want = [&row(b"1"), &reset, &row(b"2"), &parameter, &ready].map(|part| &part[..]).concat();
    assert_eq!(show(&got), show(&[want, behind].concat()));
    assert!(desk.conn.pipeline.is_free() && !desk.marks.resets);
    // One that fails behind it, with a warning before.
    let mut desk = splices("work_mem");
    let text = "RESET work_mem; SELECT 'a', x";
    let (sent, _) = desk.client(&query(text));
    let at = |text: &[u8]| String::from_utf8_lossy(text).split(", x").next().unwrap().chars().count() + 2;
    let body = |at: usize| format!("SERROR\0VERROR\0C42703\0Mno x\0P{at}\0\0").into_bytes();
    let (theirs, ours) = (at(&sent[5..]) + 1, at(text.as_bytes()) + 1);
    assert!(theirs > ours);
    let (got, _) = desk.server(
        &[message(b'N', &body(theirs)), reset.clone(), given.clone(), message(b'E', &body(theirs)), ready.clone()]
            .concat(),
    );
    assert_eq!(
        show(&got),
        show(&[message(b'N', &body(ours)), reset, message(b'E', &body(ours)), ready.clone()].concat())
    );
    // What has another note is read as ever.
    desk.client(&query("SELECT 3"));
    let (got, _) = desk.server(&[&row(b"3"), &ready[..]].concat());
    assert_eq!(show(&got), show(&[&row(b"3"), &ready[..]].concat()));
}

#[test]
fn a_query_that_is_not_ascii_is_read_in_the_encoding_in_force() {
    let spliced = |sent: &[u8]| memchr::memmem::find(sent, b"TO E'1MB'").is_some();
    let text = query("RESET work_mem; SELECT 'é'");
    let parameters = |values: &[(&str, &str)]| -> Vec<u8> {
        values.iter().flat_map(|(name, value)| reply::parameter(name, value)).collect()
    };
    let told = |values: &[(&str, &str)], desk: &mut Desk| {
        desk.client(&query("SET x TO y"));
        desk.server(&[reply::done("SET"), parameters(values), reply::ready(b'I')].concat());
    };
    let (server, client) = (("server_encoding", "UTF8"), ("client_encoding", "UTF8"));
    #[rustfmt::skip]
    let table: [(Values<'_>, bool); 6] = [
        (&[],                                          false),
        (&[client],                                    false),
        (&[server, client],                            true),
        (&[server, ("client_encoding", "LATIN1")],     true),
        (&[server, client, ("client_encoding", "SJIS")], false),
        (&[client, ("server_encoding", "SQL_ASCII")],  false),
    ];
    for (values, want) in table {
        let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
        told(values, &mut desk);
        let (sent, _) = desk.client(&text);
        assert_eq!(spliced(&sent), want, "{values:?}: {}", show(&sent));
    }
    // What is put back may be the encoding; what is replayed is known, where nothing else was set.
    for (note, encoding, unsettled, want) in [
        (RESTORE, "UTF8", false, false),
        (REPLAY, "UTF8", false, true),
        (REPLAY, "UTF8", true, false),
        (REPLAY, "SJIS", false, false),
    ] {
        let mut desk = Desk::logged_in_with(&[("client_encoding", encoding), ("work_mem", "1MB")]);
        told(&[server, client], &mut desk);
        desk.marks.unsettled = unsettled;
        desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, note);
        let (sent, _) = desk.client(&text);
        assert_eq!(spliced(&sent), want, "{encoding} {unsettled}: {}", show(&sent));
    }
}

#[test]
fn behind_an_execute_that_resets_stands_what_puts_it_back() {
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    let reset = [parse("", "RESET work_mem", &[]), bind("", "", &[]), execute("", 0)].concat();
    let next = [parse("", "SHOW work_mem", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    let (sent, _) = desk.client(&[&*reset, &next].concat());
    let portal = String::from_utf8(desk.interner.prefix.as_bytes().to_vec()).unwrap();
    let ours = [
        parse("", "SET \"work_mem\" TO E'1MB'", &[]),
        bind(&portal, "", &[]),
        execute(&portal, 0),
        message(b'C', format!("P{portal}\0").as_bytes()),
    ];
    assert_eq!(show(&sent), show(&[&*reset, &ours.concat(), &next].concat()));
    let (parsed, bound, done) = (reply::bare(b'1'), reply::bare(b'2'), reply::done("RESET"));
    let theirs = [&*parsed, &bound, &done].concat();
    let answer = [&*parsed, &bound, &reply::done("SET"), &reply::bare(b'3')].concat();
    let behind = [&*parsed, &bound, &reply::row(b"1MB"), &reply::done("SHOW"), &reply::ready(b'I')].concat();
    let (got, _) = desk.server(&[&*theirs, &answer, &behind].concat());
    assert_eq!(show(&got), show(&[&*theirs, &behind].concat()));
    assert!(desk.conn.pipeline.is_free() && !desk.marks.resets);
    // Executed in another batch, it is followed all the same; and never executed, by a query behind the Sync.
    desk.client(&query("BEGIN"));
    desk.server(&[reply::done("BEGIN"), reply::ready(b'T')].concat());
    let (sent, _) = desk.client(&[parse("", "RESET work_mem", &[]), bind("p", "", &[]), sync()].concat());
    assert!(memchr::memmem::find(&sent, b"AS startup").is_some());
    let (sent, _) = desk.client(&execute("p", 0));
    assert!(memchr::memmem::find(&sent, b"TO E'1MB'").is_some());
    // What was bound to that portal since is another.
    let (sent, _) = desk.client(&[parse("", "RESET work_mem", &[]), bind("", "", &[])].concat());
    assert!(memchr::memmem::find(&sent, b"TO E'1MB'").is_none());
    let (sent, _) = desk.client(&[parse("", "SELECT 1", &[]), bind("", "", &[]), execute("", 0)].concat());
    assert!(memchr::memmem::find(&sent, b"TO E'1MB'").is_none());
    let (sent, _) = desk.client(&sync());
    assert!(memchr::memmem::find(&sent, b"AS startup").is_some());
}

#[test]
fn the_start_up_value_in_the_place_of_null_is_parsed_and_moves_no_position() {
    const TEXT: &str = "SELECT set_config('work_mem', NULL, false), x";
    let given = TEXT.replace("NULL", "E'16384kB'");
    let body = |text: &str| {
        let at = text.find(", x").unwrap() + 3;
        format!("SERROR\0VERROR\0C42703\0Mno x\0P{at}\0\0").into_bytes()
    };
    let (theirs, ours) = (message(b'E', &body(&given)), message(b'E', &body(TEXT)));
    let ready = reply::ready(b'I');
    for name in ["", "s"] {
        let mut desk = Desk::logged_in_with(&[("work_mem", "16384kB")]);
        let batch =
            |name: &str, text: &str| [parse(name, text, &[16]), bind("", name, &[]), execute("", 0), sync()].concat();
        let (sent, _) = desk.client(&batch(name, TEXT));
        // The client's own text was the first.
        let our = if name.is_empty() { String::new() } else { desk.name(2) };
        // Nothing is to be put back behind it.
        assert_eq!(show(&sent), show(&batch(&our, &given)));
        let (got, _) = desk.server(&[&*theirs, &ready].concat());
        assert_eq!(show(&got), show(&[&*ours, &ready].concat()), "{name}");
        assert!(desk.conn.pipeline.is_free() && !desk.marks.resets);
    }
    // Behind it in the batch stands another text; and what was said of that is as it is.
    let mut desk = Desk::logged_in_with(&[("work_mem", "16384kB")]);
    let batch = [parse("", TEXT, &[]), parse("", "SELECT 1", &[]), sync()].concat();
    desk.client(&batch);
    let notice = |text: &str| message(b'N', &body(text));
    let (got, _) = desk.server(&[&*notice(&given), &theirs, &ready].concat());
    assert_eq!(show(&got), show(&[&*notice(TEXT), &ours, &ready].concat()));
    desk.client(&batch);
    let (got, _) = desk.server(&[&*reply::bare(b'1'), &theirs, &ready].concat());
    assert_eq!(show(&got), show(&[&*reply::bare(b'1'), &theirs, &ready].concat()));
    // One that the client has taken the name from, and one that it sent itself.
    let mut desk = Desk::logged_in_with(&[("work_mem", "16384kB")]);
    desk.client(&[parse("s", TEXT, &[]), close_statement("s"), sync()].concat());
    let (got, _) = desk.server(&[&*theirs, &ready].concat());
    assert_eq!(show(&got), show(&[&*ours, &ready].concat()));
    desk.client(&[parse("s", &given, &[]), sync()].concat());
    let (got, _) = desk.server(&[&*theirs, &ready].concat());
    assert_eq!(show(&got), show(&[&*theirs, &ready].concat()));
}

#[test]
fn behind_an_execute_that_does_more_stands_nothing_before_its_sync() {
    let late = |sent: &[u8]| memchr::memmem::find(sent, b"AS startup").is_some();
    let early = |sent: &[u8]| memchr::memmem::find(sent, b"TO E'1MB'").is_some();
    #[rustfmt::skip]
    let table: [(&str, i32, bool); 5] = [
        ("RESET work_mem",                               0, true),
        ("RESET work_mem",                               1, false),
        ("DISCARD ALL",                                  1, false),
        ("SELECT set_config('work_mem' || '', NULL, false)", 0, false),
        // Another name, perhaps.
        ("RESET sort_mem",                               0, false),
    ];
    for (text, rows, want) in table {
        let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
        let (sent, _) = desk.client(&[parse("", text, &[]), bind("", "", &[]), execute("", rows)].concat());
        assert!(early(&sent) == want && !late(&sent), "{text}: {}", show(&sent));
        let (sent, _) = desk.client(&sync());
        assert!(late(&sent) != want, "{text}: {}", show(&sent));
    }
    // Nobody but the server has its unnamed statement, and the client may name it again.
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    desk.client(&[parse("s", "RESET work_mem", &[]), bind("", "s", &[])].concat());
    desk.statements.unnamed = Unnamed::Raw;
    let (sent, _) = desk.client(&[execute("", 0), sync()].concat());
    assert!(!early(&sent) && late(&sent), "{}", show(&sent));
}

#[test]
fn behind_a_discard_all_stands_a_transaction_of_ours() {
    let late = |sent: &[u8]| memchr::memmem::find(sent, b"AS startup").is_some();
    let early = |sent: &[u8]| memchr::memmem::find(sent, b"TO E'1MB'").is_some();
    let discard = [parse("", "DISCARD ALL", &[]), bind("", "", &[]), execute("", 0)].concat();
    let show = [parse("", "SHOW work_mem", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    let (sent, _) = desk.client(&[&*discard, &show].concat());
    assert!(
        early(&sent) && late(&sent) && memchr::memmem::find(&sent, b"\0COMMIT\0").is_some(),
        "{}",
        self::show(&sent)
    );
    // The server warns of ours, and tells the client nothing of it.
    let (parsed, bound, closed) = (reply::bare(b'1'), reply::bare(b'2'), reply::bare(b'3'));
    let ours = |extra: &[u8], tag| [&*parsed, &bound, extra, &reply::done(tag), &closed].concat();
    let warning = message(b'N', b"SWARNING\0C25P01\0Mno transaction\0\0");
    let theirs = [&*parsed, &bound, &reply::done("DISCARD ALL")].concat();
    let behind = [&*parsed, &bound, &reply::row(b"1MB"), &reply::done("SHOW"), &reply::ready(b'I')].concat();
    let back = [reply::done("SELECT 0"), reply::ready(b'I')].concat();
    let (got, _) = desk.server(&[&*theirs, &ours(b"", "SET"), &ours(&warning, "COMMIT"), &behind, &back].concat());
    assert_eq!(self::show(&got), self::show(&[theirs, behind].concat()));
    assert!(desk.conn.pipeline.is_free() && !desk.marks.resets);
    // Where it is refused, ours is skipped with what the client sent behind it.
    desk.client(&[&*discard, &show].concat());
    let refused = message(b'E', b"SERROR\0C25001\0Mno\0\0");
    let answer = [&*parsed, &bound, &refused, &reply::ready(b'I')].concat();
    let (got, _) = desk.server(&[&*answer, &back].concat());
    assert_eq!(self::show(&got), self::show(&answer));
    assert!(desk.conn.pipeline.is_free());
    // A Sync is followed by all of it.
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    let (sent, _) = desk.client(&[discard.clone(), sync()].concat());
    assert!(!early(&sent) && late(&sent) && !desk.marks.resets, "{}", self::show(&sent));
    // What is in front of it is not committed by us.
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    let first = [parse("", "INSERT INTO t VALUES (1)", &[]), bind("", "", &[]), execute("", 0)].concat();
    let (sent, _) = desk.client(&[&*first, &discard, &show].concat());
    assert!(!early(&sent) && late(&sent), "{}", self::show(&sent));
}

#[test]
fn a_list_that_was_spelled_anew_is_spelled_as_at_the_start_behind_the_batch() {
    let spelled = |sent: &[u8]| memchr::memmem::find(sent, b"quote_ident").is_some();
    let reset = [parse("", "RESET search_path", &[]), bind("", "", &[]), execute("", 0)].concat();
    for (value, want) in [("a,b", true), ("a, b", false)] {
        let mut desk = Desk::logged_in_with(&[("search_path", value)]);
        let (sent, _) = desk.client(&reset);
        assert!(memchr::memmem::find(&sent, b"TO E'a',E'b'").is_some(), "{}", show(&sent));
        let (sent, _) = desk.client(&sync());
        assert_eq!(spelled(&sent), want, "{}", show(&sent));
        assert!(!desk.marks.respells && !desk.marks.resets);
        let mut desk = Desk::logged_in_with(&[("search_path", value)]);
        let (sent, _) = desk.client(&query("BEGIN; RESET search_path; COMMIT"));
        assert_eq!(spelled(&sent), want, "{}", show(&sent));
    }
}

#[test]
fn of_resets_nothing_is_left_to_the_next_client_and_no_more_is_kept_than_once() {
    let mut desk = Desk::logged_in_with(&[("app.x", "1"), ("work_mem", "1MB")]);
    let text = "RESET work_mem; SET app.x = ''";
    for _ in 0..3 {
        desk.client(&[parse("", text, &[]), bind("", "", &[])].concat());
    }
    assert_eq!(desk.marks.own.len(), 1);
    desk.client(&[parse("", "RESET work_mem", &[]), bind("", "", &[])].concat());
    assert!(desk.marks.resets && desk.marks.resets_late && desk.marks.placing.late);
    desk.marks.forget_resets();
    let marks = &desk.marks;
    assert!(marks.spliced.is_none() && marks.own.is_empty() && !marks.resets && !marks.resets_late);
    assert!(marks.placing.restores.is_empty() && !marks.placing.resets && !marks.placing.late);
    // What a text needs nothing late for, it keeps nothing for; and of texts with statements of ours the last is kept alone.
    let mut desk = Desk::logged_in_with(&[("app.x", "1"), ("work_mem", "1MB")]);
    for _ in 0..3 {
        desk.client(&query(text));
        assert!(desk.marks.own.is_empty() && !desk.marks.resets && desk.marks.spliced.is_some());
        desk.server(&[reply::done("RESET"), reply::done("SET"), reply::done("SET"), reply::ready(b'I')].concat());
    }
    assert!(desk.conn.pipeline.is_free());
}

#[test]
fn behind_what_puts_values_back_nothing_is_on_its_way() {
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    let (sent, _) = desk.client(&query("BEGIN; SELECT 1; COMMIT; RESET work_mem"));
    assert!(memchr::memmem::find(&sent, b"AS startup").is_some(), "{}", show(&sent));
    let all = ["BEGIN", "SELECT 1", "COMMIT", "RESET"].map(reply::done).concat();
    desk.server(&[&*all, &reply::ready(b'I')].concat());
    assert!(desk.marks.begin_sent && desk.marks.commit_sent);
    desk.server(&[reply::done("SELECT 1"), reply::ready(b'I')].concat());
    assert!(desk.conn.pipeline.is_free() && !desk.marks.begin_sent && !desk.marks.commit_sent);
}

#[test]
fn what_puts_values_back_is_not_cancelled_and_what_is_in_front_of_it_and_behind_it_is() {
    let mut desk = Desk::logged_in_with(&[("app.x", "1")]);
    desk.client(&[query("RESET ALL"), query("SELECT 1")].concat());
    assert!(!desk.aside.bars_cancel(&desk.conn.pipeline), "it is the RESET that runs");
    desk.server(&[reply::done("RESET"), reply::ready(b'I')].concat());
    assert!(desk.aside.bars_cancel(&desk.conn.pipeline));
    let done = desk.server(&[reply::done("SELECT 1"), reply::ready(b'I')].concat()).0;
    assert_eq!(show(&done), show(&reply::ready(b'I')));
    assert!(!desk.aside.bars_cancel(&desk.conn.pipeline), "it is the client's next");
}

#[test]
fn a_ready_that_is_held_back_is_owed_when_the_server_is_lost() {
    let held = Owed { expect: Expect::Sync, origin: Origin::Client, note: 0 };
    let next = Owed { expect: Expect::Query, ..held };
    let mut desk = Desk::logged_in_with(&[("app.x", "1")]);
    desk.client(&[query("RESET ALL"), query("SELECT 1")].concat());
    assert_eq!(owed(desk.aside.held_sync(), desk.conn.pipeline.iter()), [next, next]);
    desk.server(&[reply::done("RESET"), reply::ready(b'I')].concat());
    assert_eq!(owed(desk.aside.held_sync(), desk.conn.pipeline.iter()), [held, next]);
    desk.server(&[reply::done("SELECT 1"), reply::ready(b'I')].concat());
    assert_eq!(owed(desk.aside.held_sync(), desk.conn.pipeline.iter()), [next]);
}
