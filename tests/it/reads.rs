//! What is called a read is one: on a real primary and its follower.

use std::collections::BTreeSet;
use std::fs;
use std::sync::OnceLock;

use pgweir::catalog::{ROUTES, Route, SURVEY, Survey, Suspects};
use pgweir::sql::Library;
use pgweir::stats::Reason;
use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::query;
use pgweir_harness::{Cluster, ClusterOptions};

use crate::support::{PASSWORD, Place, SOON};

/// The built-in functions that are volatile and yet for a follower.
const HARMLESS: [&str; 14] = [
    "array_sample",
    "array_shuffle",
    "clock_timestamp",
    "gen_random_uuid",
    "pg_partition_ancestors",
    "pg_partition_tree",
    "pg_sleep",
    "pg_sleep_for",
    "pg_sleep_until",
    "random",
    "random_normal",
    "timeofday",
    "uuidv4",
    "uuidv7",
];

/// A primary with what `reads/setup.sql` makes.
fn place() -> &'static Place<'static> {
    static PRIMARY: OnceLock<Cluster> = OnceLock::new();
    static PLACE: OnceLock<Place<'static>> = OnceLock::new();
    PLACE.get_or_init(|| {
        let options = ClusterOptions::default().set("autovacuum", "off");
        let place = Place::on(PRIMARY.get_or_init(|| Cluster::start(options).unwrap()));
        place.psql(&read("setup.sql").replace("PLACE", &place.name));
        place
    })
}

fn read(file: &str) -> String {
    fs::read_to_string(format!("{}/tests/reads/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

async fn surveyed(place: &Place<'_>) -> Suspects {
    let mut survey = Survey::with_routes();
    let mut wire = place.direct().await;
    for question in [SURVEY, ROUTES] {
        let rows = wire.query(question).await.unwrap();
        assert_eq!(rows.error, None);
        for row in &rows.rows {
            survey.row(row.iter().map(|column| column.as_deref().map(str::as_bytes)));
        }
    }
    survey.close().unwrap()
}

fn word(route: Route) -> &'static str {
    match route {
        Route::Read => "read",
        Route::Begin { read_only: None } => "begin",
        Route::Begin { read_only: Some(true) } => "begin_read_only",
        Route::Begin { read_only: Some(false) } => "begin_read_write",
        Route::Primary(reason) => reason.as_str(),
    }
}

/// All that comes back.
async fn answer(wire: &mut Wire, text: &str) -> Vec<(u8, Vec<u8>)> {
    wire.send(&query(text)).await.unwrap();
    let messages = wire.recv_until_ready().await.unwrap();
    messages.iter().map(|message| (message.tag, message.body.clone())).collect()
}

#[tokio::test]
async fn what_is_called_a_read_is_answered_by_a_follower_as_by_the_primary() {
    let place = place();
    let follower = place.cluster.follower(ClusterOptions::default()).unwrap();
    let suspects = surveyed(place).await;
    let mut library = Library::default();
    let mut here = place.direct().await;
    let mut there = Wire::open(follower.addr(), &place.name, &place.name, PASSWORD).await.unwrap();
    for wire in [&mut here, &mut there] {
        assert_eq!(wire.query("SET app.tenant = 'a'; SET app.who = 'user 3'").await.unwrap().error, None);
    }
    place.cluster.await_replay(&follower, SOON).unwrap();

    let (mut wrong, mut found, mut missed) = (Vec::new(), 0, 0);
    let corpus = read("corpus.txt");
    for line in corpus.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (want, text) = line.split_once(' ').unwrap();
        let text = text.trim_start().replace('⏎', "\n");
        let got = word(suspects.route(text.as_bytes(), &mut library).route);
        if got != want.trim_end_matches(['~', '*']) {
            wrong.push(format!("{text}\n    {got}, not {want}"));
        }
        missed += usize::from(want.ends_with('*'));
        if got != "read" {
            continue;
        }
        found += 1;
        let (one, other) = (answer(&mut here, &text).await, answer(&mut there, &text).await);
        let failed = |answer: &[(u8, Vec<u8>)]| answer.iter().any(|(tag, _)| *tag == b'E');
        let alike = if want.ends_with('~') { !failed(&one) && !failed(&other) } else { one == other };
        if !alike {
            let shown = |answer: &[(u8, Vec<u8>)]| {
                let text =
                    |(tag, body): &(u8, Vec<u8>)| format!("{} {}", char::from(*tag), String::from_utf8_lossy(body));
                answer.iter().map(text).collect::<Vec<_>>().join("\n        ")
            };
            wrong.push(format!(
                "{text}\n    primary\n        {}\n    follower\n        {}",
                shown(&one),
                shown(&other)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{found} statements on both servers; {missed} a follower could have run, too");
    assert!(100 * found >= 95 * (found + missed), "{found}, {missed}");
    // Nothing of it was a write that went unseen.
    assert_eq!(place.psql("SELECT count(*), (SELECT is_called FROM counter) FROM log"), "0|f");
}

#[tokio::test]
async fn no_built_in_function_that_does_more_than_read_is_taken_for_one_that_reads() {
    let place = place();
    let suspects = surveyed(place).await;
    let mut library = Library::default();
    let mut reads = |text: String| suspects.route(text.as_bytes(), &mut library).route == Route::Read;
    let list = |sql: &str| -> Vec<String> { place.psql(sql).lines().map(str::to_owned).collect() };

    let volatile = list("SELECT DISTINCT proname FROM pg_proc WHERE oid < 16384 AND provolatile = 'v' ORDER BY 1");
    let (_, condition) = ROUTES.split_once("FROM pg_proc WHERE oid < 16384 AND (provolatile").unwrap();
    let (condition, _) = condition.split_once("), hidden AS").unwrap();
    let barred =
        format!("SELECT DISTINCT proname FROM pg_proc WHERE oid < 16384 AND (provolatile{condition} ORDER BY 1");
    let barred = list(&barred);
    assert!(volatile.len() > 150 && barred.len() > 250, "{} {}", volatile.len(), barred.len());
    for name in &volatile {
        let harmless = HARMLESS.contains(&&**name);
        assert_eq!(barred.contains(name), !harmless, "{name}, in a view");
        // The user's own function of this name writes.
        let read = name != "lower" && reads(format!("SELECT pg_catalog.\"{name}\"(1)"));
        assert_eq!(read, harmless, "{name}");
    }
    for name in &barred {
        assert!(!reads(format!("SELECT \"{name}\"('work_mem')")), "{name}");
    }
    let leads = "SELECT oprname FROM pg_operator o JOIN pg_proc p ON p.oid = oprcode WHERE o.oid < 16384 AND provolatile = 'v' \
                 UNION ALL SELECT proname FROM pg_cast c JOIN pg_proc p ON p.oid = castfunc WHERE c.oid < 16384 AND provolatile = 'v'";
    assert_eq!(list(leads), Vec::<String>::new(), "an operator or a cast of the server's own does more than read");

    let views = list(
        "SELECT relname FROM pg_class WHERE oid < 16384 AND relkind = 'v' AND relnamespace = 'pg_catalog'::regnamespace",
    );
    let taken: BTreeSet<&str> =
        views.iter().map(|name| &**name).filter(|name| reads(format!("TABLE {name}"))).collect();
    let (_, named) = ROUTES.split_once("AND relname NOT IN (").unwrap();
    let (named, _) = named.split_once(')').unwrap();
    let in_views: BTreeSet<&str> =
        views.iter().map(|name| &**name).filter(|name| named.contains(&format!("'{name}'"))).collect();
    assert_eq!(taken, in_views, "a view means the same in a text and in a view over it");
    assert!(taken.len() > 10 && taken.len() < views.len() / 3, "{taken:?}");
}
