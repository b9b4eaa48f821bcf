//! What becomes of each message of a client, without sockets.

use pgweir_config::StatementMode;
use pgweir_harness::wire::build::{
    bind, close_statement, copy_data, copy_done, describe_portal, describe_statement, execute, flush, message, parse,
    query, sync, terminate,
};
use pgweir_proto::encode;
use pgweir_proto::pipeline::{Expect, Origin, Owed};
use proptest::prelude::*;

use super::super::desk::{Desk, INSPECT_MAX, STATEMENTS_MAX, reply};
use super::{PIPELINE_MAX, Stop};
use crate::backend::Unnamed as Held;
use crate::prepared::{AUDIT, NAMED};
use crate::settings::{self, Profiles};
use crate::stats::PinReason;

const ONE: &str = "SELECT $1::int";

/// A client whose statement `s` the server has, as the first of ours.
fn prepared() -> Desk {
    let mut desk = Desk::new();
    let (_, stop) = desk.client(&[parse("s", ONE, &[]), sync()].concat());
    assert_eq!(stop, Stop::Short);
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.to_client.clear();
    assert!(desk.conn.pipeline.is_free() && desk.marks.is_blank());
    desk
}

/// The same server connection, and a client that has no statement.
fn after_another() -> Desk {
    let mut desk = prepared();
    desk.next_client();
    desk
}

/// The server has the client's statement no more.
fn forgotten() -> Desk {
    let mut desk = prepared();
    desk.conn.shelf.clear();
    desk
}

/// A batch that has failed, and whose `Sync` the client has not sent yet.
fn failed() -> Desk {
    let mut desk = prepared();
    desk.client(&parse("", "SELECT wrong", &[]));
    desk.server(&reply::error("ERROR", "42703", "column \"wrong\" does not exist"));
    desk.to_client.clear();
    desk
}

/// A name, how it begins, what the client sends, what the server gets (given the name of the first statement of ours),
/// what the client is answered at once.
type Case = (&'static str, fn() -> Desk, Vec<u8>, fn(&str) -> Vec<u8>, &'static [u8]);

const PARSED: &[u8] = &encode::PARSE_COMPLETE;
const CLOSED: &[u8] = &encode::CLOSE_COMPLETE;

#[test]
fn each_message_becomes_what_the_server_is_to_get() {
    let our = prepared().name(1).len();
    #[rustfmt::skip]
    let table: [Case; 17] = [
        ("simple query",        Desk::new,     query("SELECT 1"),                     |_| query("SELECT 1"), b""),
        ("two queries",         Desk::new,     [query("A"), query("B")].concat(),     |_| [query("A"), query("B")].concat(), b""),
        ("unnamed statement",   Desk::new,     [parse("", ONE, &[]), sync()].concat(), |_| [parse("", ONE, &[]), sync()].concat(), b""),
        ("flush and COPY data", Desk::new,     [flush(), copy_data(b"1"), copy_done()].concat(),
            |_| [flush(), copy_data(b"1"), copy_done()].concat(), b""),
        ("a new name",          Desk::new,     parse("s", ONE, &[23]),                |our| parse(our, ONE, &[23]), b""),
        ("bound",               prepared,      bind("p", "s", &[Some(b"1")]),         |our| bind("p", our, &[Some(b"1")]), b""),
        ("described",           prepared,      describe_statement("s"),               describe_statement, b""),
        ("a portal described",  prepared,      describe_portal("s"),                  |_| describe_portal("s"), b""),
        ("closed",              prepared,      close_statement("s"),                  |_| vec![], CLOSED),
        ("another's text",      after_another, parse("mine", ONE, &[]),               |_| vec![], PARSED),
        ("another's name",      after_another, bind("", "s", &[]),                    |_| bind("", "s", &[]), b""),
        ("parsed again",        forgotten,     bind("", "s", &[]),                    |our| [parse(our, ONE, &[]), bind("", our, &[])].concat(), b""),
        ("known by no one",     prepared,      close_statement("t"),                  |_| close_statement("t"), b""),
        ("behind an error",     failed,        [bind("", "s", &[]), execute("", 0), sync()].concat(),
            |_| [bind("", "s", &[]), execute("", 0), sync()].concat(), b""),
        ("sequences of others", Desk::new,     query("SELECT lastval()"),             |_| [query("DISCARD SEQUENCES"), query("SELECT lastval()")].concat(), b""),
        ("all at once",         prepared,      [bind("", "s", &[]), execute("", 0), sync(), query("C")].concat(),
            |our| [bind("", our, &[]), execute("", 0), sync(), query("C")].concat(), b""),
        ("in use",              prepared,      parse("s", "SELECT 2", &[]),
            |our| [close_statement(our), parse(our, ONE, &[]), parse(our, "SELECT 2", &[])].concat(), b""),
    ];
    for (name, make, input, want, answered) in table {
        let mut desk = make();
        assert_eq!(desk.name(1).len(), our, "{name}");
        let (sent, stop) = desk.client(&input);
        let want = want(&desk.name(1));
        assert_eq!(stop, Stop::Short, "{name}");
        assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string(), "{name}");
        assert_eq!(desk.to_client, answered, "{name}");
    }
}

#[test]
fn what_strangers_took_from_sequences_is_forgotten_in_front_of_the_question_wherever_it_comes() {
    let done = |tag: &str, status| [reply::done(tag), reply::ready(status)].concat();
    let forget = query("DISCARD SEQUENCES");
    let ask = query("SELECT lastval()");
    // In a transaction, in which nothing was taken; once.
    let mut desk = Desk::new();
    desk.client(&query("BEGIN"));
    desk.server(&done("BEGIN", b'T'));
    assert_eq!(desk.client(&ask).0, [&*forget, &ask].concat());
    assert!(desk.aside.replaying, "no cancel request is to hit it");
    assert_eq!(desk.server(&done("DISCARD SEQUENCES", b'T')).0, b"");
    assert!(!desk.aside.replaying);
    assert_eq!(desk.client(&ask).0, ask);
    // What the transaction took itself is not forgotten.
    let mut desk = Desk::new();
    let insert = query("INSERT INTO t DEFAULT VALUES");
    assert_eq!(desk.client(&[&*insert, &ask].concat()).0, [&*insert, &ask].concat());
    // What may ask unseen is taken for a question.
    let mut desk = Desk::new();
    let unseen = query("DO 'BEGIN PERFORM lastval(); END'");
    desk.client(&query("BEGIN"));
    desk.server(&done("BEGIN", b'T'));
    assert_eq!(desk.client(&unseen).0, [&*forget, &unseen].concat());
    // Inside of a batch, without its end, and beside the client's portal.
    let mut desk = Desk::new();
    let (begin, batch) = (
        [parse("", "BEGIN", &[]), bind("", "", &[]), execute("", 0)].concat(),
        [parse("", "SELECT lastval()", &[]), bind("", "", &[]), execute("", 0), sync()].concat(),
    );
    let portal = std::str::from_utf8(desk.interner.prefix.as_bytes()).unwrap().to_owned();
    let forgets = [
        parse("", "DISCARD SEQUENCES", &[]),
        bind(&portal, "", &[]),
        execute(&portal, 0),
        message(b'C', format!("P{portal}\0").as_bytes()),
    ];
    let (sent, _) = desk.client(&[&*begin, &batch].concat());
    assert_eq!(
        sent.escape_ascii().to_string(),
        [&*begin, &forgets.concat(), &batch].concat().escape_ascii().to_string()
    );
    let ours = [reply::bare(b'1'), reply::bare(b'2'), reply::done("DISCARD SEQUENCES"), reply::bare(b'3')].concat();
    let first = [reply::bare(b'1'), reply::bare(b'2'), reply::done("BEGIN")].concat();
    assert_eq!(desk.server(&[&*first, &ours].concat()).0, first);
    assert!(desk.marks.own_values);
    // If that failed, who knows.
    desk.server(&reply::error("ERROR", "55000", "lastval is not yet defined in this session"));
    assert!(!desk.marks.own_values);
}

#[test]
fn a_client_that_listens_does_so_in_front_of_what_may_do_more_than_read_and_behind_nothing() {
    let listening = || {
        let mut desk = Desk::new();
        desk.channels = vec![Box::from(&b"c"[..]), Box::from(&b"d\"e"[..])];
        desk
    };
    let done = |tag: &str| [reply::done(tag), reply::ready(b'I')].concat();
    let listen = query("LISTEN \"c\";LISTEN \"d\"\"e\";");
    let (read, write) = (query("SELECT a FROM t"), query("INSERT INTO t VALUES (1)"));
    let mut desk = listening();
    // A read goes alone, and what may do more waits for its end: a cancel request is the read's until then.
    let (sent, stop) = desk.client(&[read.clone(), write.clone()].concat());
    assert_eq!((sent, stop), (read.clone(), Stop::Unsettled));
    assert!(!desk.marks.listens_too && !desk.aside.replaying);
    desk.server(&done("SELECT 0"));
    let (sent, stop) = desk.client(&[write.clone(), read.clone()].concat());
    assert_eq!(sent.escape_ascii().to_string(), [&*listen, &write, &write, &read].concat().escape_ascii().to_string());
    assert_eq!(stop, Stop::Short);
    assert!(desk.marks.listens_too && desk.marks.listening && desk.aside.replaying);
    desk.server(&done("LISTEN"));
    assert!(!desk.aside.replaying, "from now on a cancel request reaches what it is for");
    // Nor does it listen behind an audit, which would not tell of it.
    let mut desk = listening();
    desk.conn.pipeline.sent(Expect::Query, Origin::Pooler, AUDIT);
    assert_eq!(desk.client(&write), (vec![], Stop::Unsettled));
    // What a batch has in it is not known at its beginning.
    let mut desk = listening();
    let batch = [parse("", "SELECT a FROM t", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    assert_eq!(desk.client(&batch), ([listen, batch.clone()].concat(), Stop::Short));
    // What waits for nothing else goes with it, and what is not whole yet makes nobody listen.
    let mut desk = prepared();
    desk.channels = listening().channels;
    let (sent, stop) = desk.client(&query("DEALLOCATE s"));
    assert!(
        sent.starts_with(&query("LISTEN \"c\";LISTEN \"d\"\"e\";")) && sent.ends_with(&sync()),
        "{}",
        sent.escape_ascii()
    );
    assert_eq!(stop, Stop::Short);
    for (front, len) in
        [(parse("name", &"x".repeat(INSPECT_MAX), &[]), 8), (bind("portal", "s", &[Some(&[b'x'; 99])]), 9)]
    {
        let mut desk = listening();
        assert_eq!(desk.client(&front[..len]), (vec![], Stop::Short));
        assert!(!desk.marks.listens_too);
    }
    // In a transaction it is too late.
    let mut desk = listening();
    desk.channels.clear();
    desk.client(&query("BEGIN"));
    desk.server(&[reply::done("BEGIN"), reply::ready(b'T')].concat());
    desk.channels = listening().channels;
    assert_eq!(desk.client(&write), (write.clone(), Stop::Short));
}

#[test]
fn a_name_of_ours_in_a_clients_mouth_names_nothing() {
    let mut desk = prepared();
    desk.next_client();
    let ours = desk.name(1);
    let (sent, _) = desk.client(&[bind("", &ours, &[]), close_statement(&ours)].concat());
    let prefix = ours.trim_end_matches('1');
    assert_eq!(sent, [bind("", prefix, &[]), close_statement(prefix)].concat());
}

#[test]
fn the_unnamed_statement_of_another_is_replaced_before_it_is_bound() {
    let mut desk = Desk::new();
    desk.client(&[parse("", ONE, &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.conn.unnamed = Held::Unknown;
    let (sent, _) = desk.client(&bind("", "", &[]));
    assert_eq!(sent, [parse("", ONE, &[]), bind("", "", &[])].concat(), "one's own is parsed again");
    let mut desk = Desk::new();
    desk.conn.unnamed = Held::Unknown;
    let (sent, _) = desk.client(&bind("", "", &[]));
    assert_eq!(sent, [close_statement(""), bind("", "", &[])].concat(), "a stranger's is closed");
}

#[test]
fn the_unnamed_statement_of_another_is_not_bound_behind_batches_that_failed_together() {
    let mut desk = Desk::new();
    desk.mode = StatementMode::Strip;
    desk.client(&[parse("s", ONE, &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.conn.unnamed = Held::Unknown;
    let failing = execute("no such portal", 0);
    let first = [failing.clone(), bind("", "s", &[]), sync()].concat();
    let second = [failing, parse("", "ROLLBACK", &[]), sync()].concat();
    let (sent, _) = desk.client(&[first, second].concat());
    assert!(memchr::memmem::find(&sent, ONE.as_bytes()).is_some(), "our Parse is on its way: {}", sent.escape_ascii());
    // It is skipped, and so is the client's.
    let failed = [reply::error("ERROR", "34000", "portal does not exist"), reply::ready(b'I')].concat();
    desk.server(&failed.repeat(2));
    let (sent, _) = desk.client(&[bind("", "s", &[]), sync()].concat());
    let want = [parse("", ONE, &[]), bind("", "", &[]), sync()].concat();
    assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());
}

/// The answer to a `Describe` of a statement with one parameter and one column, both of type `kind`.
fn described(kind: u8) -> Vec<u8> {
    let parameters = message(b't', &[0, 1, 0, 0, 0, kind]);
    let rows =
        message(b'T', &[&b"\0\x01a\0"[..], &[0; 6], &[0, 0, 0, kind, 0, 4, 255, 255, 255, 255], &[0; 2]].concat());
    [parameters, rows].concat()
}

#[test]
fn the_answer_to_one_question_is_not_taken_for_that_to_the_next() {
    const TWO: &str = "SELECT $1::bool";
    let mut desk = Desk::new();
    // The client was told of two statements, which the server does not have any more.
    for (name, text, kind) in [("s", ONE, 23), ("t", TWO, 16)] {
        desk.client(&[parse(name, text, &[]), describe_statement(name), sync()].concat());
        desk.server(&[reply::bare(b'1'), described(kind), reply::ready(b'I')].concat());
    }
    desk.conn.shelf.clear();
    let (one, two) = (desk.name(1), desk.name(2));
    let run = |name: &str| [bind("", name, &[Some(b"1")]), execute("", 0)].concat();
    let asks = |name: &str, text: &str| [parse(name, text, &[]), describe_statement(name), flush()].concat();
    // What it describes itself is parsed for that, and once more to be compared.
    let (sent, stop) = desk.client(&[describe_statement("s"), run("s"), run("t"), sync()].concat());
    let first = [parse(&one, ONE, &[]), describe_statement(&one), close_statement(&one), asks(&one, ONE)].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (first.escape_ascii().to_string(), Stop::Unsettled));
    // Its own description says it all: it is bound, and ours is still to come.
    desk.server(&[reply::bare(b'1'), described(23)].concat());
    let (sent, stop) = desk.client(b"");
    assert_eq!((sent.escape_ascii().to_string(), stop), (run(&one).escape_ascii().to_string(), Stop::Unsettled));
    // Now the other one is asked about, and only that answer is an answer.
    desk.server(&[reply::bare(b'3'), reply::bare(b'1'), described(23)].concat());
    let (sent, stop) = desk.client(b"");
    let second = asks(&two, TWO);
    assert_eq!((sent.escape_ascii().to_string(), stop), (second.escape_ascii().to_string(), Stop::Unsettled));
    assert_eq!(desk.client(b""), (vec![], Stop::Unsettled));
    desk.server(&[reply::bare(b'2'), reply::done("SELECT 1"), reply::bare(b'1'), described(16)].concat());
    let (sent, stop) = desk.client(b"");
    let rest = [run(&two), sync()].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (rest.escape_ascii().to_string(), Stop::Short));
}

#[test]
fn who_is_told_of_the_rows_again_waits_for_nothing_and_its_parameters_are_as_it_was_told() {
    for mode in [StatementMode::Rewrite, StatementMode::Strip] {
        let mut desk = Desk::new();
        desk.mode = mode;
        let our = if mode == StatementMode::Strip { String::new() } else { desk.name(1) };
        desk.client(&[parse("s", ONE, &[]), describe_statement("s"), sync()].concat());
        desk.server(&[reply::bare(b'1'), described(20), reply::ready(b'I')].concat());
        let run = |name: &str| [bind("", name, &[Some(b"1")]), describe_portal(""), execute("", 0), sync()].concat();
        let rows = described(20)[11..].to_vec();
        let answer = |parsed: bool| {
            let parsed = if parsed { reply::bare(b'1') } else { vec![] };
            [parsed, reply::bare(b'2'), rows.clone(), reply::done("SELECT 0"), reply::ready(b'I')].concat()
        };
        // On another server connection; and on this one, where it is as it was told by then.
        desk.conn.shelf.clear();
        desk.conn.unnamed = Held::Unknown;
        for want in [[parse(&our, ONE, &[20]), run(&our)].concat(), run(&our)] {
            let (sent, stop) = desk.client(&run("s"));
            assert_eq!(
                (sent.escape_ascii().to_string(), stop),
                (want.escape_ascii().to_string(), Stop::Short),
                "{mode:?}"
            );
            desk.server(&answer(want.starts_with(b"P")));
        }
        // Another client's own Parse is its own.
        desk.next_client();
        let (sent, _) = desk.client(&parse("mine", ONE, &[]));
        assert!(sent.ends_with(&parse(&our, ONE, &[])), "{mode:?}: {}", sent.escape_ascii());
    }
}

#[test]
fn beside_temporary_objects_a_text_is_the_clients_own() {
    // Behind what makes one, in its batch or before it; and whenever the client has one.
    let make = "CREATE TEMP TABLE t (a int)";
    let batch = [parse("", make, &[]), bind("", "", &[]), execute("", 0)].concat();
    for (before, number) in [(query(make), 2), (batch, 3), (vec![], 2)] {
        let mut desk = after_another();
        if before.is_empty() {
            desk.marks.pins.add(PinReason::Temp);
            desk.marks.settle();
        }
        let (sent, _) = desk.client(&[before.clone(), parse("mine", ONE, &[])].concat());
        let want = [before, parse(&desk.name(number), ONE, &[])].concat();
        assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());
    }
    let mut desk = after_another();
    assert_eq!(desk.client(&parse("mine", ONE, &[])).0, b"");
}

#[test]
fn what_no_client_may_send_stops_it() {
    #[rustfmt::skip]
    let table: [(&str, Vec<u8>, &str); 9] = [
        ("goodbye",               terminate(),                                     "Quit"),
        ("no such tag",           message(b'?', b""),                              "Tag(63)"),
        ("a password",            message(b'p', b"x\0"),                           "Tag(112)"),
        ("Sync with a body",      message(b'S', b"x"),                             "Malformed"),
        ("Flush with a body",     message(b'H', b"x"),                             "Malformed"),
        ("text without an end",   message(b'Q', b"SELECT 1"),                      "Malformed"),
        ("Parse without types",   message(b'P', b"s\0SELECT 1\0"),                 "Malformed"),
        ("Bind without names",    message(b'B', b"s"),                             "Malformed"),
        ("an impossible length",  b"Q\0\0\0\x03".to_vec(),                         "Malformed"),
    ];
    for (name, input, want) in table {
        let mut desk = Desk::new();
        // What came before it passes, and nothing behind it is looked at.
        let (sent, stop) = desk.client(&[query("A"), input, query("B")].concat());
        assert!(format!("{stop:?}").starts_with(want), "{name}: {stop:?}");
        assert_eq!(sent, query("A"), "{name}");
    }
}

#[test]
fn one_statement_too_many_is_refused_and_the_others_stay() {
    let mut desk = Desk::new();
    for n in 0..STATEMENTS_MAX {
        desk.client(&parse(&format!("s{n}"), &format!("SELECT {n}"), &[]));
    }
    let (sent, stop) = desk.client(&parse("more", "SELECT 'more'", &[]));
    assert_eq!((sent, stop), (parse("", "refused", &[]), Stop::Short));
}

#[test]
fn reading_stops_when_too_much_is_owed_but_never_inside_a_message() {
    let owe = |desk: &mut Desk, count: usize| {
        while desk.conn.pipeline.depth() < count {
            desk.conn.pipeline.sent(Expect::Execute, Origin::Client, 0);
        }
    };
    let mut desk = Desk::new();
    owe(&mut desk, PIPELINE_MAX - 1);
    let (sent, stop) = desk.client(&[execute("", 0), sync()].concat());
    assert_eq!((sent, stop), (execute("", 0), Stop::Full));

    // A Bind whose end has not come yet makes it full: the rest of it has to pass first.
    let whole = bind("", "", &[Some(&[b'x'; 1000])]);
    for cut in [40, 500, whole.len() - 1] {
        let mut desk = Desk::new();
        owe(&mut desk, PIPELINE_MAX - 1);
        let (mut sent, stop) = desk.client(&whole[..cut]);
        assert_eq!((stop, desk.is_inside_request()), (Stop::Short, true), "cut at {cut}");
        assert_eq!(desk.conn.pipeline.depth(), PIPELINE_MAX);
        let (rest, stop) = desk.client(&[&whole[cut..], &sync()].concat());
        sent.extend(rest);
        assert_eq!((stop, desk.is_inside_request()), (Stop::Full, false), "cut at {cut}");
        assert_eq!(sent, whole, "cut at {cut}");
    }
}

#[test]
fn a_name_that_hangs_on_an_earlier_batch_is_waited_for() {
    let mut desk = Desk::new();
    let input = [parse("s", ONE, &[]), sync(), bind("", "s", &[]), sync()].concat();
    let (sent, stop) = desk.client(&input);
    assert_eq!((sent, stop), ([parse(&desk.name(1), ONE, &[]), sync()].concat(), Stop::Unsettled));
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    let (sent, stop) = desk.client(b"");
    assert_eq!((sent, stop), ([bind("", &desk.name(1), &[]), sync()].concat(), Stop::Short));
}

#[test]
fn what_is_deallocated_behind_its_parse_is_not_there_when_that_is_answered() {
    let mut desk = forgotten();
    let name = desk.name(1);
    let (sent, _) = desk.client(&[bind("", "s", &[]), sync(), query("DEALLOCATE ALL")].concat());
    let want = [parse(&name, ONE, &[]), bind("", &name, &[]), sync(), query("DEALLOCATE ALL")].concat();
    assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());
    desk.server(&[reply::bare(b'1'), reply::bare(b'2'), reply::ready(b'I')].concat());
    desk.server(&[reply::done("DEALLOCATE ALL"), reply::ready(b'I')].concat());
    let (sent, _) = desk.client(&[parse("s", ONE, &[]), bind("", "s", &[]), sync()].concat());
    let want = [close_statement(&name), parse(&name, ONE, &[]), bind("", &name, &[]), sync()].concat();
    assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());
}

#[test]
fn a_setting_named_by_a_parameter_is_asked_for_by_its_name() {
    const TEXT: &str = "SELECT set_config($1, $2, $3)";
    let values = |name: &'static str, local: &'static str| [name, "x", local].map(|value| Some(value.as_bytes()));
    #[rustfmt::skip]
    let table = [
        ("app.x",    "f", true,  "app.x", false),
        ("TimeZone", "f", true,  "",      false),
        ("app.x",    "t", false, "",      false),
        ("seed",     "f", true,  "",      true),
    ];
    for statement in ["", "s"] {
        for (name, local, tainted, custom, pins) in table {
            let mut desk = Desk::new();
            desk.client(&[parse(statement, TEXT, &[]), sync()].concat());
            desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
            assert!(desk.marks.is_blank(), "nothing has run");
            desk.client(&bind("", statement, &values(name, local)));
            let marks = &desk.marks;
            assert_eq!(
                (marks.tainted, &*marks.custom.concat(), !marks.pins.is_empty()),
                (tainted, custom, pins),
                "{name}"
            );
            assert!(marks.unsettled && !marks.scrub && !marks.placing.drops, "{name}: no more than it says");
        }
    }
    // NULL puts a start-up value back, and what follows is to find that.
    let mut desk = Desk::logged_in_with(&[("work_mem", "1MB")]);
    desk.client(&[parse("", "SELECT set_config($1, $2, false)", &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    let (sent, _) = desk.client(&[bind("", "", &[Some(b"work_mem"), None]), execute("", 0), sync()].concat());
    assert!(memchr::memmem::find(&sent, b"AS startup").is_some(), "{}", sent.escape_ascii());
    // In one batch, each has its own.
    let mut desk = Desk::new();
    let both = [bind("", "s", &values("a.b", "f")), execute("", 0), bind("", "s", &values("c.d", "f"))].concat();
    desk.client(&[parse("s", TEXT, &[]), both].concat());
    assert_eq!(desk.marks.custom.join(" "), "a.b c.d");
    assert!(desk.marks.pins.is_empty());
    // Of one whose values are not all here nothing is known.
    let mut desk = Desk::new();
    desk.client(&parse("s", TEXT, &[]));
    let long = bind("", "s", &values("app.x", "f"));
    desk.client(&long[..5 + 3 + 2]);
    assert!(desk.marks.pins.has(PinReason::Unknown) && desk.marks.scrub);
}

#[test]
fn start_up_values_are_put_back_behind_a_reset() {
    let mut desk = Desk::logged_in_with(&[("timezone", "Asia/Tokyo")]);
    let (sent, _) = desk.client(&[query("DISCARD ALL"), query("SELECT 1")].concat());
    let mut restore = Vec::new();
    settings::restore(
        &Profiles::default().intern([("timezone".into(), b"Asia/Tokyo"[..].into())]),
        &[],
        "",
        &mut restore,
    );
    let restore = query(&String::from_utf8(restore).unwrap());
    assert_eq!(sent, [query("DISCARD ALL"), restore.clone(), query("SELECT 1")].concat());
    // Whatever the text is, if it cannot be read.
    let text = "RESET TimeZone; SELECT 'x\\', ' '";
    let (sent, _) = desk.client(&query(text));
    assert_eq!(sent, [query(text), restore].concat());
}

#[test]
fn what_writes_has_the_rows_that_the_client_was_told_though_it_is_told_of_them_anew() {
    for (text, asks) in [("INSERT INTO t VALUES ($1) returning a", true), ("SELECT a FROM t WHERE a = $1", false)] {
        for (kind, fits) in [(23, true), (16, false)] {
            let mut desk = Desk::new();
            desk.client(&[parse("s", text, &[]), describe_statement("s"), sync()].concat());
            desk.server(&[reply::bare(b'1'), described(23), reply::ready(b'I')].concat());
            desk.conn.shelf.clear();
            let our = desk.name(1);
            let run =
                |name: &str| [bind("", name, &[Some(b"1")]), describe_portal(""), execute("", 0), sync()].concat();
            let parsed = parse(&our, text, &[23]);
            let (sent, stop) = desk.client(&run("s"));
            if !asks {
                assert_eq!((sent, stop), ([parsed, run(&our)].concat(), Stop::Short), "{text}");
                continue;
            }
            let first = [parsed, describe_statement(&our), flush()].concat();
            assert_eq!((sent.escape_ascii().to_string(), stop), (first.escape_ascii().to_string(), Stop::Unsettled));
            desk.server(&[reply::bare(b'1'), described(kind)].concat());
            let (sent, _) = desk.client(b"");
            assert_eq!(sent == run(&our), fits, "{text}: {}", sent.escape_ascii());
        }
    }
}

#[test]
fn in_a_transaction_that_has_failed_an_empty_text_stands_in_for_what_is_described_without_rows_or_bound() {
    const INSERT: &str = "INSERT INTO t VALUES ($1)";
    #[rustfmt::skip]
    let table: [(&str, Option<&[u32]>, bool, bool); 8] = [
        // A text, the types of its parameters if its client was told that there are these and no rows; whether one stands in for it
        // to be described, and to be bound.
        ("BEGIN",             None,            true,  true),
        ("SAVEPOINT s",       None,            true,  true),
        ("BEGIN",             Some(&[]),       true,  true),
        (INSERT,              Some(&[23]),     true,  true),
        (INSERT,              None,            false, false),
        ("SELECT 1",          None,            false, true),
        ("COMMIT",            Some(&[]),       false, false),
        ("ROLLBACK TO s",     None,            false, false),
    ];
    for name in ["", "s"] {
        for (text, types, describes, binds) in table {
            let desk = |status: u8| {
                let mut desk = Desk::new();
                desk.client(&[parse(name, text, &[]), sync()].concat());
                desk.server(&[reply::bare(b'1'), reply::ready(status)].concat());
                if let Some(types) = types {
                    let ids = types.iter().flat_map(|kind| kind.to_be_bytes()).collect::<Vec<_>>();
                    let count = u16::try_from(types.len()).unwrap().to_be_bytes();
                    desk.client(&[describe_statement(name), sync()].concat());
                    let told = message(b't', &[&count[..], &ids].concat());
                    desk.server(&[told, reply::bare(b'n'), reply::ready(status)].concat());
                }
                // The server has it no more.
                desk.conn.shelf.clear();
                desk.conn.unnamed = Held::Unknown;
                desk
            };
            let stand_in = parse("", "", types.unwrap_or_default());
            let begins = |desk: &mut Desk, input: &[u8]| desk.client(input).0.starts_with(&stand_in);
            let bound = bind("", name, &[]);
            assert_eq!(begins(&mut desk(b'E'), &describe_statement(name)), describes, "{name} {text}: described");
            assert_eq!(begins(&mut desk(b'E'), &bound), binds, "{name} {text}: bound");
            assert!(
                !begins(&mut desk(b'T'), &describe_statement(name)),
                "{name} {text}: described, and nothing failed"
            );
            assert!(!begins(&mut desk(b'T'), &bound), "{name} {text}: bound, and nothing failed");
            // It is not taken for the statement.
            let mut desk = desk(b'E');
            desk.client(&describe_statement(name));
            assert!(!matches!(desk.conn.unnamed, Held::Holds(..)) || !describes, "{name} {text}");
            if describes {
                // What stands in front may have ended the transaction: there it would be run.
                let sent = desk.client(&bound).0;
                assert!(!begins(&mut desk, &bound) && !sent.starts_with(&stand_in), "{name} {text}: bound behind it");
            }
        }
    }
}

/// The types of a stand-in: `internal`.
const UNEXECUTABLE: [u32; 1] = [2281];

#[test]
fn what_a_portal_would_have_done_to_names_ends_with_it() {
    let call = [parse("", "CALL p()", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    let called = [reply::bare(b'1'), reply::bare(b'2'), reply::done("CALL"), reply::ready(b'I')].concat();
    let bound = [reply::bare(b'1'), reply::bare(b'2')].concat();
    let named = || {
        let mut desk = prepared();
        // Nothing has to be forgotten in front of a CALL.
        desk.marks.own_values = true;
        desk
    };
    for text in ["DEALLOCATE ALL", "DEALLOCATE s"] {
        // Its transaction ended, and it was never executed.
        let mut desk = named();
        desk.client(&[parse("", text, &[]), bind("", "", &[]), sync()].concat());
        desk.server(&[&*bound, &reply::ready(b'I')].concat());
        let after = |mut desk: Desk| {
            desk.client(&call);
            desk.server(&called);
            assert!(desk.marks.changes.is_empty() && desk.conn.pipeline.is_free(), "{text}");
            assert_ne!(desk.client(&bind("", "s", &[])).0, bind("", "s", &[]), "{text}: it is still there");
        };
        after(desk);
        // Something else was bound to it.
        let mut desk = named();
        desk.client(&[parse("", text, &[]), bind("", "", &[])].concat());
        desk.server(&bound);
        after(desk);
        // It had a name, and another portal was given it.
        let mut desk = named();
        desk.client(&query("BEGIN"));
        desk.server(&[reply::done("BEGIN"), reply::ready(b'T')].concat());
        desk.client(&[parse("", text, &[]), bind("p", "", &[]), sync()].concat());
        desk.server(&[&*bound, &reply::ready(b'T')].concat());
        desk.client(&query("COMMIT"));
        desk.server(&[reply::done("COMMIT"), reply::ready(b'I')].concat());
        desk.client(&[parse("", "CALL p()", &[]), bind("p", "", &[]), execute("p", 0), sync()].concat());
        desk.server(&called);
        after(desk);
        // Its client is another's.
        let mut desk = named();
        desk.client(&[parse("", text, &[]), bind("", "", &[]), sync()].concat());
        desk.marks.placing.prepares = true;
        desk.marks.placing.end();
        assert!(!desk.marks.placing.may_drop(true) && !desk.marks.placing.prepares, "{text}");
        assert!(desk.marks.placing.take_renaming(|_| true).is_none(), "{text}");
    }
}

/// The client of [`prepared`] in a transaction.
fn in_transaction(status: u8) -> Desk {
    let mut desk = prepared();
    desk.marks.own_values = true;
    desk.client(&query("BEGIN"));
    desk.server(&[reply::done("BEGIN"), reply::ready(status)].concat());
    desk.to_client.clear();
    desk
}

/// A client whose statement `s` is this, and for whom nothing has to be forgotten in front of what may ask.
fn with(text: &str) -> Desk {
    let mut desk = Desk::new();
    desk.marks.own_values = true;
    desk.client(&[parse("s", text, &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.to_client.clear();
    desk
}

#[test]
fn what_is_lent_stays_only_where_it_cannot_be_taken_back() {
    const READ: &str = "COPY t FROM STDIN";
    const TOLD: &str = "COPY t TO STDOUT";
    #[rustfmt::skip]
    let table = vec![
        ("the end of a transaction",   with(ONE),             "EXECUTE s(1); COMMIT; DEALLOCATE s",                 ONE,      false),
        ("its begin",                  with(ONE),             "BEGIN; EXECUTE s(1)",                                ONE,      false),
        ("one that ends it itself",    with("COMMIT"),        "SELECT 1; EXECUTE s",                                "COMMIT", false),
        ("in a transaction",           in_transaction(b'T'),  "ROLLBACK; EXECUTE s(1)",                             ONE,      false),
        ("one that reads data",        with(READ),            "EXECUTE s",                                          READ,     true),
        ("one that tells data",        with(TOLD),            "EXECUTE s",                                          TOLD,     false),
        ("beside what reads data",     with(ONE),             "EXECUTE s(1); COPY t FROM STDIN",                    ONE,      true),
        ("beside what tells data",     with(ONE),             "COPY t TO STDOUT; EXECUTE s(1)",                     ONE,      false),
        ("given anew",                 with(ONE),             "DEALLOCATE s; PREPARE s AS SELECT 2",                "",       true),
        ("executed and given anew",    with(ONE),             "EXECUTE s(1); DEALLOCATE s; PREPARE s AS SELECT 2",  ONE,      true),
        ("given anew, of all",         with(ONE),             "PREPARE s AS SELECT 2; DEALLOCATE ALL",              "",       true),
        ("not given, as it is there",  with(ONE),             "PREPARE s AS SELECT 2; DEALLOCATE s",                "",       false),
        ("by SQL that is made",        with(ONE),             "DO $$ BEGIN EXECUTE 'EXECUTE s(1)'; END $$",         ONE,      false),
        ("the same, and deallocated",  with(ONE),             "DO 'BEGIN EXECUTE ''EXECUTE s(1)''; END'; DEALLOCATE s", ONE,  false),
        ("the end of a failed one",    in_transaction(b'E'),  "ROLLBACK; DEALLOCATE s",                             "",       false),
    ];
    for (name, mut desk, text, lent, is_left) in table {
        let (sent, stop) = desk.client(&query(text));
        let types: &[u32] = if lent.is_empty() { &UNEXECUTABLE } else { &[] };
        let behind = if is_left { vec![] } else { [close_statement("s"), sync()].concat() };
        let want = [close_statement("s"), parse("s", lent, types), sync(), query(text), behind].concat();
        assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Short), "{name}");
        assert_eq!(desk.conn.littered, is_left, "{name}: nobody else is lent the server connection");
    }
}

#[test]
fn what_is_refused_or_would_be_told_to_commit_is_lent_nothing() {
    #[rustfmt::skip]
    let table = vec![
        ("refused",               in_transaction(b'E'), "DEALLOCATE s"),
        ("refused behind its end", in_transaction(b'E'), "ROLLBACK; EXECUTE s(1)"),
        ("a COMMIT in front",     in_transaction(b'T'), "COMMIT; EXECUTE s(1)"),
        ("an END in front",       in_transaction(b'T'), "END; EXECUTE s(1)"),
        ("one of two phases",     in_transaction(b'T'), "PREPARE TRANSACTION 'a'; EXECUTE s(1)"),
        ("another's name",        with(ONE),            "DO $$ BEGIN EXECUTE 'EXECUTE t'; END $$"),
        ("no word of it",         with(ONE),            "DO $$ BEGIN EXECUTE q || 's'; END $$"),
    ];
    for (name, mut desk, text) in table {
        let (sent, stop) = desk.client(&query(text));
        let want = (query(text).escape_ascii().to_string(), Stop::Short);
        assert_eq!((sent.escape_ascii().to_string(), stop), want, "{name}");
    }
    // A portal's, where the server refuses it.
    let batch = [parse("d", "DEALLOCATE s", &[]), bind("", "d", &[]), execute("", 0), sync()].concat();
    let (sent, _) = in_transaction(b'E').client(&batch);
    assert!(memchr::memmem::find(&sent, &close_statement("s")).is_none(), "{}", sent.escape_ascii());
    let batch = [parse("", "EXECUTE s(1)", &[]), sync()].concat();
    assert_eq!(in_transaction(b'E').client(&batch).0, batch);
}

#[test]
fn what_a_query_gives_anew_is_what_sql_made_of_it_as_far_as_it_got() {
    let lent = [reply::bare(b'3'), reply::bare(b'1'), reply::ready(b'I')].concat();
    let text = "EXECUTE s(1); DEALLOCATE s; PREPARE s AS SELECT 2";
    let done = [reply::done("SELECT 1"), reply::done("DEALLOCATE"), reply::done("PREPARE")].concat();
    let failed = reply::error("ERROR", "22012", "division by zero");
    for (name, answer, is_gone) in [("all of it", done, true), ("nothing", failed, false)] {
        let mut desk = with(ONE);
        desk.client(&query(text));
        desk.server(&[&lent, &answer, &reply::ready(b'I')[..]].concat());
        assert_eq!(desk.to_client, [answer, reply::ready(b'I')].concat(), "{name}");
        assert!(desk.conn.pipeline.is_free() && desk.conn.littered, "{name}");
        let (sent, _) = desk.client(&bind("", "s", &[]));
        assert_eq!(sent == bind("", "s", &[]), is_gone, "{name}");
    }
}

#[test]
fn what_executes_by_messages_is_lent_once_and_taken_back_behind_its_batch() {
    let executing = "EXECUTE s(1)";
    let batch = [parse("x", executing, &[]), bind("", "x", &[]), execute("", 0), sync()].concat();
    let lent = [close_statement("s"), parse("s", ONE, &[])].concat();
    let taken = [close_statement("s"), sync()].concat();
    let told = [reply::bare(b'1'), reply::bare(b'2'), reply::done("SELECT 1"), reply::ready(b'I')].concat();
    let ours = [reply::bare(b'3'), reply::bare(b'1')].concat();
    let closed = [reply::bare(b'3'), reply::ready(b'I')].concat();
    let mut desk = with(ONE);
    let (sent, stop) = desk.client(&batch);
    // One that nobody shares: it is described as what the client has under the name.
    let own = desk.name(3);
    let run = [bind("", &own, &[]), execute("", 0), sync()].concat();
    let want = [lent.clone(), parse(&own, executing, &[]), run.clone(), taken.clone()].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Short));
    assert_eq!(desk.server(&[&*ours, &told, &closed].concat()).0, told);
    assert!(desk.conn.pipeline.is_free() && !desk.conn.littered && desk.marks.changes.is_empty());
    assert!(desk.marks.tainted && !desk.marks.resets && desk.marks.placing.lent.is_empty());
    // Once more, by its name; the statement that it executes is another by now, and then none.
    desk.client(&[close_statement("s"), parse("s", "SELECT 2", &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    let (sent, _) =
        desk.client(&[bind("", "x", &[]), execute("", 0), close_statement("s"), bind("", "x", &[]), sync()].concat());
    let second = [close_statement("s"), parse("s", "SELECT 2", &[])].concat();
    let is_in = |part: &[u8]| memchr::memmem::find_iter(&sent, part).count();
    assert_eq!((is_in(&second), is_in(&lent), is_in(&taken)), (1, 0, 0), "{}", sent.escape_ascii());
    assert_eq!(
        is_in(&close_statement("s")),
        2,
        "in front of the second Bind, as on Postgres it is not there: {}",
        sent.escape_ascii()
    );
}

#[test]
fn what_fails_by_messages_leaves_nothing_of_what_was_lent() {
    let refused = reply::error("ERROR", "42P01", "relation \"t\" does not exist");
    let failed = reply::error("ERROR", "22012", "division by zero");
    let front = [reply::bare(b'3'), reply::bare(b'1'), reply::bare(b'1'), reply::bare(b'2')].concat();
    let closed = [reply::bare(b'3'), reply::ready(b'I')].concat();
    let batch = [parse("", "EXECUTE s(1)", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    for (name, answer) in [
        ("refused", [&reply::bare(b'3'), &refused, &reply::ready(b'I')[..]].concat()),
        ("executed in vain", [&front, &failed, &reply::ready(b'I')[..]].concat()),
    ] {
        let mut desk = with(ONE);
        desk.client(&batch);
        desk.server(&[answer, closed.clone()].concat());
        assert!(desk.to_client.ends_with(&reply::ready(b'I')), "{name}");
        assert!(desk.conn.pipeline.is_free() && !desk.conn.littered && desk.marks.changes.is_empty(), "{name}");
        assert_ne!(desk.client(&bind("", "s", &[])).0, bind("", "s", &[]), "{name}: it is still the client's");
    }
    // Behind an error nothing of it runs, and nothing is lent.
    let mut desk = with(ONE);
    desk.client(&bind("", "nowhere", &[]));
    desk.server(&reply::error("ERROR", "26000", "prepared statement does not exist"));
    assert_eq!(desk.client(&batch).0, batch);
    // Where data may be read behind the batch nothing is put there.
    let mut desk = with("COPY t FROM STDIN");
    let batch = [parse("", "EXECUTE s", &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    let (sent, _) = desk.client(&batch);
    assert!(sent.ends_with(&[execute("", 0), sync()].concat()) && desk.conn.littered, "{}", sent.escape_ascii());
    // Nor behind a call that ends the batch.
    let mut desk = with(ONE);
    desk.client(&[parse("", "EXECUTE s(1)", &[]), message(b'F', &[0; 12])].concat());
    assert!(desk.conn.littered && desk.marks.placing.lent.is_empty());
}

#[test]
fn a_portal_that_tells_the_name_does_so_beside_one_that_may_drop_statements() {
    let mut desk = Desk::new();
    desk.conn.tag = " [tag]".into();
    let batch = [
        parse("c", "CALL p()", &[]),
        bind("q", "c", &[]),
        parse("", "SHOW application_name", &[]),
        bind("p", "", &[]),
        execute("p", 0),
    ];
    desk.client(&batch.concat());
    assert!(desk.conn.pipeline.iter().any(|owed| owed.expect == Expect::Execute && owed.note == NAMED));
}

#[test]
fn a_query_that_names_very_many_is_read_in_time() {
    let mut desk = prepared();
    let text = "DEALLOCATE s;PREPARE s AS SELECT 1;".repeat(INSPECT_MAX / 40);
    let lent = [close_statement("s"), parse("s", "", &UNEXECUTABLE), sync()].concat();
    assert_eq!(desk.client(&query(&text)).0, [lent, query(&text)].concat());
    let mut desk = prepared();
    let text = format!("DO '{}'", "EXECUTE a ".repeat(INSPECT_MAX / 11));
    assert!(desk.client(&query(&text)).0.ends_with(&query(&text)));
}

#[test]
fn what_a_query_is_about_is_lent_in_front_of_it_and_taken_back_behind_it() {
    let close = [close_statement("s"), sync()].concat();
    let (ready, closed) = (reply::ready(b'I'), [reply::bare(b'3'), reply::ready(b'I')].concat());
    let lent = [reply::bare(b'3'), reply::bare(b'1'), reply::ready(b'I')].concat();
    let cancelled = reply::error("ERROR", "57014", "canceling statement due to user request");
    #[rustfmt::skip]
    let table = [
        ("deallocated",                "DEALLOCATE s",                 "",  reply::done("DEALLOCATE"), true),
        ("a DEALLOCATE cancelled",     "DEALLOCATE s /* comment */",   "",  cancelled,                 false),
        ("prepared again",             "PREPARE s AS SELECT 2",        "",  reply::error("ERROR", "42P05", "prepared statement \"s\" already exists"), false),
        ("executed",                   "EXECUTE s(1)",                 ONE, [reply::row(b"1"), reply::done("SELECT 1")].concat(), false),
        ("executed and deallocated",   "EXECUTE s(1); DEALLOCATE s",   ONE, [reply::done("SELECT 1"), reply::done("DEALLOCATE")].concat(), true),
        ("explained",                  "EXPLAIN EXECUTE s(1)",         ONE, [reply::row(b"1"), reply::done("EXPLAIN")].concat(), false),
        ("among others",               "SELECT 1; DEALLOCATE s",       "",  [reply::done("SELECT 1"), reply::done("DEALLOCATE")].concat(), true),
        ("not reached among others",   "SELECT 1/0; DEALLOCATE s",     "",  reply::error("ERROR", "22012", "division by zero"), false),
    ];
    for (name, text, stands_in, answer, is_gone) in table {
        let mut desk = prepared();
        let (sent, stop) = desk.client(&query(text));
        let types: &[u32] = if stands_in.is_empty() { &UNEXECUTABLE } else { &[] };
        let want = [close_statement("s"), parse("s", stands_in, types), sync(), query(text), close.clone()].concat();
        // EXPLAIN and EXECUTE may ask for what sequences gave.
        let forget = query("DISCARD SEQUENCES");
        let sent_own = sent.strip_prefix(&*forget).unwrap_or(&sent);
        assert_eq!(
            (sent_own.escape_ascii().to_string(), stop),
            (want.escape_ascii().to_string(), Stop::Short),
            "{name}"
        );
        if sent_own.len() < sent.len() {
            desk.server(&[reply::done("DISCARD SEQUENCES"), ready.clone()].concat());
        }
        // What comes next waits for the answer.
        assert_eq!(desk.client(&bind("", "s", &[Some(b"1")])), (vec![], Stop::Unsettled), "{name}");
        desk.server(&lent);
        assert_eq!(desk.to_client, b"", "{name}");
        desk.server(&[&answer, &ready, &closed[..]].concat());
        assert_eq!(desk.to_client, [answer, ready.clone()].concat(), "{name}");
        assert!(desk.conn.pipeline.is_free() && !desk.conn.littered && !desk.conn.mixed, "{name}");
        let (sent, _) = desk.client(b"");
        let is_bound_as_it_is = sent == bind("", "s", &[Some(b"1")]);
        assert_eq!(is_bound_as_it_is, is_gone, "{name}: {}", sent.escape_ascii());
    }
}

#[test]
fn what_cannot_be_lent_is_told_where_the_query_gets_to_it() {
    let refused = reply::error("ERROR", "42P01", "relation \"t\" does not exist");
    let unknown = |name: &str| reply::error("ERROR", "26000", &format!("prepared statement {name} does not exist"));
    let (ours, others, foreign) = (unknown("\"s\""), unknown("\"t\""), unknown("»s«"));
    let aborted = reply::error("ERROR", "25P02", "current transaction is aborted");
    let divided = reply::error("ERROR", "22012", "division by zero");
    let before = reply::done("SELECT 1");
    #[rustfmt::skip]
    let table = vec![
        ("at once",                  with(ONE),            "EXECUTE s(1)",              b'I', vec![],         &ours,                 &refused),
        ("in another language",      with(ONE),            "EXECUTE s(1)",              b'I', vec![],         &foreign,              &refused),
        ("behind an answer",         with(ONE),            "SELECT 'a'; EXECUTE s(1)",  b'I', before.clone(), &ours,                 &refused),
        ("another is not there",     with(ONE),            "EXECUTE t; EXECUTE s(1)",   b'I', vec![],         &others,               &others),
        ("never",                    with(ONE),            "SELECT 1/0; EXECUTE s(1)",  b'I', vec![],         &divided,              &divided),
        ("in a transaction",         in_transaction(b'T'), "SELECT 'a'; EXECUTE s(1)",  b'E', vec![],         &aborted,              &refused),
        ("behind its end",           in_transaction(b'T'), "ROLLBACK; EXECUTE s(1)",    b'I', reply::done("ROLLBACK"), &ours,        &refused),
    ];
    for (name, mut desk, text, status, told, error, want) in table {
        let status_before = desk.conn.pipeline.status();
        desk.client(&query(text));
        let after_refusal = reply::ready(if status_before as u8 == b'T' { b'E' } else { b'I' });
        desk.server(&[&reply::bare(b'3'), &refused, &after_refusal[..]].concat());
        assert_eq!(desk.to_client, b"", "{name}");
        let ready = reply::ready(status);
        desk.server(&[&*told, error, &ready, &reply::bare(b'3'), &ready].concat());
        let want = [&*told, want, &ready].concat();
        assert_eq!(desk.to_client.escape_ascii().to_string(), want.escape_ascii().to_string(), "{name}");
        assert!(desk.conn.pipeline.is_settled() && desk.marks.changes.is_empty() && !desk.conn.littered, "{name}");
    }
    // What the query does not need after all is told nobody, and is nobody's later.
    let mut desk = with(ONE);
    desk.client(&query("DO $$ BEGIN IF false THEN EXECUTE 'EXECUTE s(1)'; END IF; END $$"));
    desk.server(&[&reply::bare(b'3'), &refused, &reply::ready(b'I')[..]].concat());
    let answer = [reply::done("DO"), reply::ready(b'I')].concat();
    desk.server(&[&*answer, &reply::bare(b'3'), &reply::ready(b'I')].concat());
    desk.client(&query("EXECUTE s(1)"));
    let lent = [reply::bare(b'3'), reply::bare(b'1'), reply::ready(b'I')].concat();
    let told = [ours.clone(), reply::ready(b'I')].concat();
    desk.server(&[&*lent, &told].concat());
    assert_eq!(desk.to_client, [answer, told].concat());
}

#[test]
fn what_a_portal_deallocates_is_lent_in_front_of_its_execute_alone() {
    let batch = [parse("", "DEALLOCATE s", &[]), bind("", "", &[]), execute("", 0), sync()];
    let told = [reply::bare(b'1'), reply::bare(b'2')].concat();
    let cancelled = reply::error("ERROR", "57014", "canceling statement due to user request");
    for (name, answer, littered) in
        [("done", [reply::done("DEALLOCATE"), reply::bare(b'3')].concat(), false), ("cancelled", cancelled, true)]
    {
        let mut desk = prepared();
        let (sent, stop) = desk.client(&batch.concat());
        let [parsed, bound, executed, synced] = &batch;
        let want = [
            parsed,
            bound,
            &close_statement("s"),
            &parse("s", "", &UNEXECUTABLE),
            executed,
            &close_statement("s"),
            synced,
        ]
        .map(|part| &**part)
        .concat();
        assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Short), "{name}");
        desk.server(&[&told, &reply::bare(b'3'), &reply::bare(b'1'), &*answer, &reply::ready(b'I')].concat());
        assert!(desk.to_client.ends_with(&reply::ready(b'I')), "{name}");
        assert_eq!((desk.conn.littered, desk.conn.pipeline.is_free()), (littered, true), "{name}");
        let (sent, _) = desk.client(&bind("", "s", &[]));
        assert_eq!(sent == bind("", "s", &[]), !littered, "{name}");
    }
    // Behind an error nothing of it runs.
    let mut desk = prepared();
    desk.client(&[vec![bind("", "nowhere", &[])], batch.to_vec()].concat().concat());
    desk.server(&[reply::error("ERROR", "26000", "prepared statement does not exist"), reply::ready(b'I')].concat());
    assert!(!desk.conn.littered && desk.conn.pipeline.is_free() && desk.marks.changes.is_empty());
    assert_ne!(desk.client(&bind("", "s", &[])).0, bind("", "s", &[]), "it is still there");
}

#[test]
fn a_name_that_sql_may_have_given_is_tried_before_it_is_given_again() {
    let mut desk = Desk::new();
    desk.client(&query("PREPARE p AS SELECT 1"));
    desk.server(&[reply::done("PREPARE"), reply::ready(b'I')].concat());
    let (sent, _) = desk.client(&[parse("p", ONE, &[]), sync()].concat());
    let want = [parse("p", ONE, &[]), close_statement("p"), parse(&desk.name(1), ONE, &[]), sync()].concat();
    assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());
    let refused =
        [reply::error("ERROR", "42P05", "prepared statement \"p\" already exists"), reply::ready(b'I')].concat();
    desk.to_client.clear();
    desk.server(&refused);
    assert_eq!(desk.to_client, refused);
    assert_eq!(desk.client(&bind("", "p", &[])).0, bind("", "p", &[]), "it is SQL's");
}

/// A message of a client that prepares and uses two statements, with texts and values of its own.
fn some_message() -> impl Strategy<Value = Vec<u8>> {
    let name = || prop::sample::select(vec!["", "s", "t"]);
    let text = || prop::sample::select(vec!["SELECT 1", "SELECT $1::int", "INSERT INTO t VALUES ($1)", "SET x = 1"]);
    prop_oneof![
        text().prop_map(query),
        (name(), text()).prop_map(|(name, text)| parse(name, text, &[])),
        (name(), 0..300_usize).prop_map(|(name, len)| bind("", name, &[Some(&vec![b'v'; len])])),
        name().prop_map(describe_statement),
        name().prop_map(close_statement),
        Just(execute("", 0)),
        Just(sync()),
        Just(flush()),
        (0..300_usize).prop_map(|len| copy_data(&vec![b'd'; len])),
    ]
}

proptest! {
    #[test]
    fn whatever_the_chunks_the_server_gets_the_same(
        messages in prop::collection::vec(some_message(), 1..25),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let input = messages.concat();
        let mut whole = Desk::new();
        let (want, stop) = whole.client(&input);
        let mut pieces = Desk::new();
        // The same names for the same statements.
        pieces.interner.prefix = whole.interner.prefix;
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len())).collect();
        at.sort_unstable();
        at.push(input.len());
        let (mut got, mut before, mut last) = (Vec::new(), 0, Stop::Short);
        for end in at {
            let (sent, stop) = pieces.client(&input[before..end]);
            got.extend(sent);
            (before, last) = (end, stop);
        }
        prop_assert_eq!(last, stop);
        prop_assert_eq!(got.escape_ascii().to_string(), want.escape_ascii().to_string());
        let owed = |desk: &Desk| desk.conn.pipeline.iter().collect::<Vec<Owed>>();
        prop_assert_eq!(owed(&pieces), owed(&whole));
        prop_assert_eq!(&pieces.to_client, &whole.to_client);
        prop_assert_eq!(pieces.marks.tainted, whole.marks.tainted);
    }
}

/// A client that has prepared `text` as `s`, and then set its time zone.
fn elsewhen(text: &str) -> Desk {
    let mut desk = Desk::new();
    desk.client(&[parse("s", text, &[]), sync()].concat());
    desk.server(&[reply::bare(b'1'), reply::ready(b'I')].concat());
    desk.set(&[("timezone", "Asia/Tokyo")]);
    desk
}

#[test]
fn a_statement_is_parsed_under_the_settings_that_it_was_prepared_under() {
    const TEXT: &str = "SELECT timestamptz '2024-01-01'";
    let mut desk = elsewhen(TEXT);
    let run = [bind("", "s", &[]), execute("", 0), sync()].concat();
    let (sent, stop) = desk.client(&run);
    let anew = |desk: &Desk| [parse(&desk.name(2), TEXT, &[]), describe_statement(&desk.name(2)), sync()].concat();
    let patience = "SELECT pg_catalog.set_config(E'lock_timeout',E'1s',false);";
    let sets = [query("RESET \"timezone\";"), query(patience)].concat();
    let want = [sets.clone(), anew(&desk)].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Held));
    assert!(desk.aside.replaying && desk.conn.profile.get("timezone").is_none(), "what is in force now");
    // All of it is ours, and what it is about to be refused is told to nobody.
    let told = [reply::done("RESET"), reply::parameter("TimeZone", "GMT"), reply::ready(b'I')].concat();
    let all = [told, reply::done("SELECT 1"), reply::ready(b'I')].concat();
    assert_eq!(desk.server(&all).0, b"");
    assert!(desk.aside.replaying);
    let described = [reply::bare(b'1'), message(b't', &[0, 0]), reply::bare(b'n'), reply::ready(b'I')].concat();
    assert_eq!(desk.server(&described).0, b"");
    assert!(!desk.aside.replaying && !desk.marks.tainted);
    desk.replayed();
    let (sent, _) = desk.client(b"");
    let want = [bind("", &desk.name(2), &[]), execute("", 0), sync()].concat();
    assert_eq!(sent.escape_ascii().to_string(), want.escape_ascii().to_string());

    // Refused, it is parsed under those of the moment, and once.
    let mut desk = elsewhen(TEXT);
    let (_, stop) = desk.client(&run);
    assert_eq!(stop, Stop::Held);
    let put_on = [reply::done("RESET"), reply::ready(b'I'), reply::done("SELECT 1"), reply::ready(b'I')].concat();
    let refused = [put_on, reply::error("ERROR", "42P01", "gone"), reply::ready(b'I')];
    assert_eq!(desk.server(&refused.concat()).0, b"");
    assert!(!desk.conn.littered);
    desk.replayed();
    let (sent, stop) = desk.client(b"");
    let want = [parse(&desk.name(2), TEXT, &[]), bind("", &desk.name(2), &[]), execute("", 0), sync()].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Short));

    // In a transaction all is as before when it is done.
    let mut desk = elsewhen(TEXT);
    desk.client(&query("BEGIN"));
    desk.server(&[reply::done("BEGIN"), reply::ready(b'T')].concat());
    let (sent, stop) = desk.client(&run);
    let point = format!("{}original", String::from_utf8_lossy(desk.interner.prefix.as_bytes()));
    let front = [query(&format!("SAVEPOINT {point}")), sets].concat();
    let behind = query(&format!("ROLLBACK TO {point};RELEASE {point}"));
    assert_eq!(sent.escape_ascii().to_string(), [front, anew(&desk), behind].concat().escape_ascii().to_string());
    assert_eq!((stop, desk.conn.profile.get("timezone")), (Stop::Held, Some(&b"Asia/Tokyo"[..])));

    // Settings that were not put on are not known any more, nor what was read by them.
    let mut desk = elsewhen(TEXT);
    desk.client(&run);
    let failed = [reply::error("ERROR", "57014", "canceled"), reply::ready(b'I')].concat();
    let behind =
        [reply::done("SELECT 1"), reply::ready(b'I'), reply::bare(b'1'), message(b't', &[0, 0]), reply::bare(b'n')];
    assert_eq!(desk.server(&[failed, behind.concat(), reply::ready(b'I')].concat()).0, b"");
    assert!(desk.conn.littered && !desk.conn.shelf.has(2));
    // No room, no settings.
    let mut desk = elsewhen(TEXT);
    desk.budget.count = 0;
    let (sent, stop) = desk.client(&run);
    let want = [parse("", TEXT, &[]), bind("", "", &[]), execute("", 0), sync()].concat();
    assert_eq!((sent.escape_ascii().to_string(), stop), (want.escape_ascii().to_string(), Stop::Short));
    // What has no constants means the same.
    let mut desk = elsewhen("SELECT $1::int + 1");
    let (sent, stop) = desk.client(&run);
    assert_eq!(stop, Stop::Short, "{}", sent.escape_ascii());
    // In the middle of a batch there is no way back.
    let mut desk = elsewhen(TEXT);
    let (sent, stop) = desk.client(&[parse("", "SELECT 1", &[]), run].concat());
    assert_eq!(stop, Stop::Short, "{}", sent.escape_ascii());
}
