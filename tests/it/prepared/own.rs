//! Texts that mean something to one client alone, for as long as it has temporary tables, or settings that nobody sees: they are
//! not run as what another client has prepared, nor are another client's as what it has.

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{bind, close_statement, describe_portal, execute, parse, query, sync};

use super::{prepare, run};
use crate::stage::succeed;
use crate::support::{Site, assert_value};

const TABLES: &str = "CREATE TABLE t AS SELECT 7 AS a; CREATE TABLE tt AS SELECT 'permanent'::text AS b; \
    CREATE FUNCTION zone() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('TimeZone', 'Asia/Tokyo', true); END $$; \
    CREATE FUNCTION nulls() RETURNS text LANGUAGE plpgsql AS $$ BEGIN SET LOCAL transform_null_equals = on; RETURN 'on'; END $$; \
    CREATE FUNCTION calls_nulls() RETURNS text LANGUAGE sql AS 'SELECT nulls()'";

/// A pool of one server connection, which has made temporary tables before: what the server has prepared there is not parsed
/// anew when the next is made.
async fn site(mode: &str) -> Site<'static> {
    let site = Site::start(&[("default_pool_size", "1"), ("prepared_statements", mode)]);
    site.place.psql(&format!("GRANT CREATE ON SCHEMA public TO {0}; SET ROLE {0}; {TABLES}", site.name()));
    let mut client = site.client().await;
    succeed(&mut client, "CREATE TEMP TABLE before (a int)").await;
    succeed(&mut client, "DROP TABLE before").await;
    client.terminate().await.unwrap();
    site
}

/// A site where another client has the text prepared, under a name, by having run it often enough; that client, and one that has
/// prepared nothing.
async fn shelved(mode: &str, text: &str, value: &str) -> (Site<'static>, Wire, Wire) {
    let site = site(mode).await;
    let (mut other, client) = (site.client().await, site.client().await);
    prepare(&mut other, "s", text).await;
    for _ in 0..4 {
        assert_value(&run(&mut other, &execution("s")).await, value);
    }
    (site, other, client)
}

fn execution(name: &str) -> [Vec<u8>; 4] {
    [bind("", name, &[]), describe_portal(""), execute("", 0), sync()]
}

#[tokio::test]
async fn a_text_prepared_beside_a_temporary_table_means_that_table() {
    for mode in ["rewrite", "adaptive", "strip"] {
        let read = "SELECT a FROM t";
        let (site, mut other, mut client) = shelved(mode, read, "7").await;
        for round in 0..3 {
            succeed(&mut client, "CREATE TEMP TABLE t AS SELECT 99 AS a").await;
            prepare(&mut client, "q", read).await;
            assert_value(&run(&mut client, &execution("q")).await, "99");
            assert_value(&run(&mut client, &[&[parse("q2", read, &[])][..], &execution("q2")].concat()).await, "99");
            // What writes, too.
            prepare(&mut client, "w", "UPDATE t SET a = a + 1").await;
            assert_eq!(run(&mut client, &execution("w")).await.error, None);
            assert_value(&client.query("SELECT a FROM t").await.unwrap(), "100");
            assert_eq!(site.place.psql("SELECT a FROM public.t").trim(), "7", "{mode}, round {round}");
            succeed(&mut client, "DROP TABLE t").await;
            run(&mut client, &[close_statement("q"), close_statement("q2"), close_statement("w"), sync()]).await;
            assert_value(&run(&mut other, &execution("s")).await, "7");
        }
    }
}

#[tokio::test]
async fn a_text_parsed_behind_a_temporary_table_of_its_transaction_or_batch_means_that_table() {
    for mode in ["rewrite", "adaptive", "strip"] {
        let read = "SELECT * FROM tt";
        let (_site, mut other, mut client) = shelved(mode, read, "permanent").await;
        let make = "CREATE TEMP TABLE tt ON COMMIT DROP AS SELECT 99 AS a";
        for way in ["one by one", "pipelined", "in a batch"] {
            let parsed = parse("q", read, &[]);
            let told = match way {
                "one by one" => {
                    succeed(&mut client, "BEGIN").await;
                    succeed(&mut client, make).await;
                    prepare(&mut client, "q", read).await;
                    run(&mut client, &execution("q")).await
                }
                "pipelined" => {
                    client
                        .send(&[query("BEGIN"), query(make), parsed, execution("q").concat()].concat())
                        .await
                        .unwrap();
                    assert_eq!(client.outcome().await.unwrap().error, None);
                    assert_eq!(client.outcome().await.unwrap().error, None);
                    client.outcome().await.unwrap()
                }
                _ => {
                    succeed(&mut client, "BEGIN").await;
                    let makes = [parse("", make, &[]), bind("", "", &[]), execute("", 0)];
                    run(&mut client, &[&makes[..], &[parsed], &execution("q")].concat()).await
                }
            };
            assert_eq!((told.sqlstate(), told.value()), ("", Some("99")), "{mode}, {way}: {told:?}");
            succeed(&mut client, "ROLLBACK").await;
            run(&mut client, &[close_statement("q"), sync()]).await;
            assert_value(&run(&mut other, &execution("s")).await, "permanent");
        }
    }
}

#[tokio::test]
async fn a_text_parsed_behind_what_a_function_sets_for_its_transaction_is_nobody_elses() {
    let instant = "SELECT extract(epoch FROM timestamptz '2024-01-01 00:00')::int8";
    let nulls = "SELECT count(*) FROM (VALUES (NULL::int)) v(a) WHERE a = NULL";
    let cases = [
        ("SELECT zone()", instant, "1704034800", "1704067200"),
        ("SELECT nulls()", nulls, "1", "0"),
        ("SELECT calls_nulls()", nulls, "1", "0"),
    ];
    for mode in ["rewrite", "adaptive"] {
        for (call, text, own, others) in cases {
            for pipelined in [true, false] {
                let site = site(mode).await;
                let (mut client, mut other) = (site.client().await, site.client().await);
                for one in [&mut client, &mut other] {
                    succeed(one, "SET TimeZone = 'UTC'").await;
                }
                let what = format!("{mode}, {call}, pipelined: {pipelined}");
                for _ in 0..4 {
                    let batches = [query("BEGIN"), query(call), [parse("s", text, &[]), sync()].concat()];
                    if pipelined {
                        client.send(&batches.concat()).await.unwrap();
                    }
                    for batch in batches {
                        if !pipelined {
                            client.send(&batch).await.unwrap();
                        }
                        assert_eq!(client.outcome().await.unwrap().error, None, "{what}");
                    }
                    let told = run(&mut client, &execution("s")).await;
                    assert_eq!(told.value(), Some(own), "{what}: {told:?}");
                    succeed(&mut client, "COMMIT").await;
                    prepare(&mut other, "s", text).await;
                    let told = run(&mut other, &execution("s")).await;
                    assert_eq!(told.value(), Some(others), "{what}: {told:?}");
                    for one in [&mut client, &mut other] {
                        run(one, &[close_statement("s"), sync()]).await;
                    }
                }
            }
        }
    }
}

/// Has the server read anew what it has prepared of the table.
fn touch(site: &Site<'_>, round: usize) {
    site.place.psql(&format!("ALTER TABLE t SET (fillfactor = {})", 90 - round));
}

#[tokio::test]
async fn what_the_server_reads_anew_under_the_settings_of_one_client_is_nobody_elses() {
    let text = "SELECT extract(epoch FROM timestamptz '2024-01-01 00:00')::int8 FROM t";
    let (utc, tokyo) = ("1704067200", "1704034800");
    for mode in ["rewrite", "adaptive", "strip"] {
        let (site, mut other, mut client) = shelved(mode, text, utc).await;
        prepare(&mut client, "s", text).await;
        assert_value(&run(&mut client, &execution("s")).await, utc);
        for round in 0..4 {
            // For a transaction, as Postgres does: read anew, it means what it would mean now.
            succeed(&mut client, "BEGIN").await;
            succeed(&mut client, "SET LOCAL TimeZone = 'Asia/Tokyo'").await;
            touch(&site, round);
            let told = run(&mut client, &execution("s")).await;
            assert_eq!(told.value(), Some(tokyo), "{mode}, {round}: {told:?}");
            succeed(&mut client, "COMMIT").await;
            assert_value(&run(&mut other, &execution("s")).await, utc);
            run(&mut client, &[close_statement("s"), sync()]).await;
            prepare(&mut client, "s", text).await;
        }
        // For the session: what was prepared before keeps its meaning as long as the server keeps it.
        succeed(&mut client, "SET TimeZone = 'Asia/Tokyo'").await;
        for round in 4..8 {
            touch(&site, round);
            let told = run(&mut client, &execution("s")).await;
            assert!([utc, tokyo].map(Some).contains(&told.value()), "{mode}, {round}: {told:?}");
            assert_value(&run(&mut other, &execution("s")).await, utc);
        }
        // And back.
        succeed(&mut client, "RESET TimeZone").await;
        assert_value(&run(&mut client, &execution("s")).await, utc);
    }
}

#[tokio::test]
async fn a_statement_means_what_it_meant_when_it_was_prepared_wherever_it_runs() {
    let text = "SELECT extract(epoch FROM timestamptz '2024-01-01 00:00')::int8, current_setting('TimeZone')";
    for mode in ["rewrite", "adaptive", "session"] {
        let site = Site::start(&[("default_pool_size", "2"), ("prepared_statements", mode)]);
        let (mut client, mut other) = (site.client().await, site.client().await);
        succeed(&mut client, "SET TimeZone = 'Asia/Kolkata'").await;
        prepare(&mut client, "s", text).await;
        succeed(&mut client, "SET TimeZone = 'Asia/Tokyo'").await;
        let (kolkata, tokyo) = ("1704047400", "Asia/Tokyo");
        for round in 0..6 {
            // Another server connection, if there is one to choose.
            succeed(&mut other, "BEGIN").await;
            for in_transaction in [false, true] {
                if in_transaction {
                    succeed(&mut client, "BEGIN").await;
                }
                let told = run(&mut client, &execution("s")).await;
                let row = [Some(kolkata.to_owned()), Some(tokyo.to_owned())];
                assert_eq!(told.rows, [row], "{mode}, {round}, {in_transaction}: {told:?}");
                assert_value(&client.query("SHOW TimeZone").await.unwrap(), tokyo);
                if in_transaction {
                    succeed(&mut client, "ROLLBACK").await;
                }
            }
            succeed(&mut other, "DEALLOCATE ALL").await;
            succeed(&mut other, "ROLLBACK").await;
            assert_value(&other.query("SHOW TimeZone").await.unwrap(), "GMT");
        }
    }
}
