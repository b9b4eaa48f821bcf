//! Session state that no text shows: what functions, triggers, views, rules, policies, defaults and operators leave behind.

use pgweir_harness::wire::Wire;
use pgweir_harness::wire::build::{bind, execute, parse, sync};
use pgweir_harness::{audits, wait_until};

use crate::stage::{SOON, Stage, succeed, value};

/// Each way leads to one of the functions at the top, and those to a setting, a lock, a channel, a table.
const SETUP: &str = r"
CREATE FUNCTION hide(v text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN PERFORM set_config('app.hidden', v, false); RETURN v; END $$;
CREATE FUNCTION by_set(v text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN SET app.hidden = 'by set'; RETURN v; END $$;
CREATE FUNCTION by_name(n text, v text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN RETURN set_config(n, v, false); END $$;
CREATE FUNCTION by_execute(v text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN EXECUTE format('SET work_mem = %L', v); RETURN v; END $$;
CREATE FUNCTION local(v text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN RETURN set_config('app.hidden', v, true); END $$;
CREATE FUNCTION listens() RETURNS int LANGUAGE plpgsql AS $$ BEGIN LISTEN hidden; RETURN 1; END $$;
CREATE FUNCTION temps() RETURNS int LANGUAGE plpgsql AS $$ BEGIN CREATE TEMP TABLE hidden (a int); RETURN 1; END $$;
CREATE FUNCTION locks() RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_lock(4711); RETURN 1; END $$;
CREATE FUNCTION holds() RETURNS int LANGUAGE plpgsql AS $$
BEGIN EXECUTE 'DECLARE hidden CURSOR WITH HOLD FOR SELECT 1'; RETURN 1; END $$;
CREATE FUNCTION becomes() RETURNS int LANGUAGE plpgsql AS $$
BEGIN EXECUTE format('SET ROLE %I', session_user || '_other'); RETURN 1; END $$;
CREATE FUNCTION caller(v text) RETURNS text LANGUAGE sql AS $$ SELECT Hide(v) $$;
CREATE FUNCTION atomic(v text) RETURNS text LANGUAGE sql BEGIN ATOMIC SELECT set_config('work_mem', v, false); END;
CREATE PROCEDURE proc(v text) LANGUAGE plpgsql AS $$ BEGIN PERFORM caller(v); END $$;
CREATE FUNCTION on_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM hide(NEW.a); RETURN NEW; END $$;
CREATE TABLE audited (a text); CREATE TRIGGER t BEFORE INSERT OR UPDATE ON audited FOR EACH ROW EXECUTE FUNCTION on_change();
CREATE FUNCTION writes(v text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audited VALUES (v); RETURN v; END $$;
CREATE TABLE parent (a text) PARTITION BY LIST (a); CREATE TABLE child PARTITION OF parent DEFAULT;
CREATE TRIGGER t BEFORE INSERT ON child FOR EACH ROW EXECUTE FUNCTION on_change();
CREATE TABLE master (a text PRIMARY KEY); INSERT INTO master VALUES ('a');
CREATE TABLE detail (a text REFERENCES master ON UPDATE CASCADE); INSERT INTO detail VALUES ('a');
CREATE TRIGGER t BEFORE UPDATE ON detail FOR EACH ROW EXECUTE FUNCTION on_change();
CREATE TABLE defaulted (a text, b text DEFAULT hide('default'));
CREATE TABLE plain_default (a text, b text DEFAULT set_config('work_mem', '7777kB', false));
CREATE VIEW peek AS SELECT hide('view') AS h; CREATE VIEW over AS SELECT h FROM peek;
CREATE VIEW builtin AS SELECT set_config('work_mem', '8888kB', false) AS h;
CREATE TABLE ruled (a text); CREATE RULE r AS ON INSERT TO ruled DO ALSO SELECT hide('rule');
CREATE OPERATOR === (RIGHTARG = text, FUNCTION = hide);
CREATE FUNCTION by_sign(n int, v text) RETURNS text LANGUAGE sql AS $$ SELECT hide(v) $$;
CREATE TABLE policed (a text); INSERT INTO policed VALUES ('a'); ALTER TABLE policed ENABLE ROW LEVEL SECURITY;
ALTER TABLE policed FORCE ROW LEVEL SECURITY; CREATE POLICY p ON policed USING (hide('policy') IS NOT NULL);
CREATE OPERATOR @@@ (LEFTARG = int, RIGHTARG = text, FUNCTION = by_sign);
CREATE FUNCTION innocent(v text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN 1@@@v; END $$;
CREATE TYPE mood AS (a text); CREATE FUNCTION to_mood(v xml) RETURNS mood LANGUAGE plpgsql AS $$
BEGIN PERFORM hide('cast'); RETURN ROW(v::text); END $$; CREATE CAST (xml AS mood) WITH FUNCTION to_mood(xml);
CREATE FUNCTION casting(v xml) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN (v::mood).a; END $$;
CREATE DOMAIN feeling AS mood;
CREATE DOMAIN by_domain AS text DEFAULT hide('domain'); CREATE TABLE of_domain (a text, b by_domain);
CREATE DOMAIN builtin_domain AS text DEFAULT set_config('work_mem', '9999kB', false);
CREATE TABLE of_builtin (a text, b builtin_domain);
CREATE FUNCTION argued(x text DEFAULT set_config('work_mem', '4444kB', false)) RETURNS text LANGUAGE sql AS $$ SELECT x $$;
CREATE AGGREGATE builtin_state(text, bool) (SFUNC = set_config, STYPE = text, INITCOND = 'work_mem');
CREATE TABLE quiet (a text); CREATE FUNCTION harmless(v text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN UPDATE quiet SET a = v; RETURN v; END $$;
";

const HIDDEN: &str = "SELECT coalesce(current_setting('app.hidden', true), '')";
const WORK_MEM: &str = "SELECT current_setting('work_mem')";

/// Each in a database of its own, since it makes every statement a suspect: what is there, what a client does, and what `HIDDEN` is then.
const EVERYWHERE: [(&str, &str, &str); 3] = [
    (
        "CREATE FUNCTION to_number(m mood) RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM hide(m.a); RETURN 1; END $$; \
         CREATE CAST (mood AS int) WITH FUNCTION to_number(mood)",
        "SELECT ROW('c2')::mood::integer",
        "c2",
    ),
    (
        "CREATE FUNCTION to_words(m mood) RETURNS text[] LANGUAGE plpgsql AS $$ BEGIN RETURN ARRAY[hide(m.a)]; END $$; \
         CREATE CAST (mood AS text[]) WITH FUNCTION to_words(mood)",
        "SELECT ROW('c3')::mood::text[]",
        "c3",
    ),
    (
        "CREATE FUNCTION less(a xml, b xml) RETURNS bool LANGUAGE sql AS $$ SELECT a::text < b::text $$; \
         CREATE FUNCTION same(a xml, b xml) RETURNS bool LANGUAGE sql AS $$ SELECT a::text = b::text $$; \
         CREATE FUNCTION compares(a xml, b xml) RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM hide('sorted'); RETURN 0; END $$; \
         RESET ROLE; CREATE OPERATOR < (LEFTARG = xml, RIGHTARG = xml, FUNCTION = less); \
         CREATE OPERATOR = (LEFTARG = xml, RIGHTARG = xml, FUNCTION = same); CREATE OPERATOR CLASS xml_ops DEFAULT FOR TYPE xml \
         USING btree AS OPERATOR 1 <, OPERATOR 3 =, FUNCTION 1 compares(xml, xml)",
        "SELECT x FROM (VALUES (xml '<a/>'), ('<b/>')) AS v(x) ORDER BY x",
        "sorted",
    ),
];

/// A stage where every check-in is audited.
fn stage(pool_size: &str) -> Stage<'static> {
    stage_with(pool_size, "")
}

/// The same, and more is there.
fn stage_with(pool_size: &str, more: &str) -> Stage<'static> {
    let settings = [
        ("default_pool_size", pool_size),
        ("audit_every", "1"),
        ("catalog_check_interval", "1h"),
        ("users.PLACE_other.password", "none"),
    ];
    let place = crate::support::Place::on(crate::support::primary());
    let (name, cluster) = (place.name.clone(), place.cluster);
    cluster.psql("postgres", &format!("CREATE ROLE {name}_other; GRANT {name}_other TO {name}")).unwrap();
    place.psql(&format!("CREATE EXTENSION pg_trgm; CREATE EXTENSION dblink; GRANT CREATE ON SCHEMA public TO {name}; SET ROLE {name}; {SETUP} {more}"));
    Stage::at(place, &settings, &[])
}

/// Waits until no audit is under way. What one finds that was not known is logged, and fails the test when pgweir stops.
fn settle(stage: &Stage<'_>) {
    let holds = |holder: &serde_json::Value| holder["doing"] != "listening";
    wait_until(SOON, || {
        let (status, body) = stage.pgweir.http_get("/blame").unwrap();
        assert_eq!(status, 200, "{body}");
        let told: serde_json::Value = serde_json::from_str(&body).unwrap();
        !told["holders"].as_array().unwrap().iter().any(holds)
    });
}

/// What a client does, what it reads then, and what it must find.
type Row = (&'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const ROWS: [Row; 35] = [
    ("function",            "SELECT hide('a1')",                                          HIDDEN,   "a1"),
    ("SET in a function",   "SELECT by_set('x')",                                         HIDDEN,   "by set"),
    ("caller",              "SELECT caller('a2')",                                        HIDDEN,   "a2"),
    ("in a transaction",    "BEGIN; SELECT caller('a3'); COMMIT",                         HIDDEN,   "a3"),
    ("rolled back",         "BEGIN; SELECT caller('a4'); ROLLBACK",                       HIDDEN,   ""),
    ("local",               "BEGIN; SELECT local('a5'); COMMIT",                          HIDDEN,   ""),
    ("EXECUTE",             "SELECT by_execute('5555kB')",                                WORK_MEM, "5555kB"),
    ("SQL-standard body",   "SELECT atomic('6666kB')",                                    WORK_MEM, "6666kB"),
    ("DO",                  "DO $$ BEGIN SET app.hidden = 'a6'; END $$",                  HIDDEN,   "a6"),
    ("DO, a call",          "DO $$ BEGIN PERFORM caller('a7'); END $$",                   HIDDEN,   "a7"),
    ("DO, set_config",      "DO 'BEGIN PERFORM set_config(''app.hidden'', ''a8'', false); END'", HIDDEN, "a8"),
    ("CALL",                "CALL proc('a9')",                                            HIDDEN,   "a9"),
    ("trigger",             "INSERT INTO audited VALUES ('b1')",                          HIDDEN,   "b1"),
    ("writer",              "SELECT writes('b2')",                                        HIDDEN,   "b2"),
    ("partition",           "INSERT INTO parent VALUES ('b3')",                           HIDDEN,   "b3"),
    ("cascade",             "UPDATE master SET a = a || 'b4'",                            HIDDEN,   "*"),
    ("default",             "INSERT INTO defaulted (a) VALUES ('x')",                     HIDDEN,   "default"),
    ("built-in default",    "INSERT INTO plain_default (a) VALUES ('x')",                 WORK_MEM, "7777kB"),
    ("view",                "SELECT * FROM peek",                                         HIDDEN,   "view"),
    ("view over it",        "SELECT * FROM over",                                         HIDDEN,   "view"),
    ("built-in in a view",  "SELECT * FROM builtin",                                      WORK_MEM, "8888kB"),
    ("rule",                "INSERT INTO ruled VALUES ('x')",                             HIDDEN,   "rule"),
    ("operator",            "SELECT === 'b5'::text",                                      HIDDEN,   "b5"),
    ("operator in a body",  "SELECT innocent('c1')",                                      HIDDEN,   "c1"),
    ("cast in a body",      "SELECT casting('<a/>')",                                     HIDDEN,   "cast"),
    ("cast of an array",    "SELECT ARRAY[xml '<a/>']::mood[]",                           HIDDEN,   "cast"),
    ("cast to a domain",    "SELECT (xml '<a/>')::feeling",                               HIDDEN,   "cast"),
    ("domain's default",    "INSERT INTO of_domain (a) VALUES ('x')",                     HIDDEN,   "domain"),
    ("built-in, a domain's", "INSERT INTO of_builtin (a) VALUES ('x')",                   WORK_MEM, "9999kB"),
    ("argument's default",  "SELECT argued()",                                            WORK_MEM, "4444kB"),
    ("aggregate of a built-in", "SELECT builtin_state('3333kB', false)",                  WORK_MEM, "3333kB"),
    ("policy",              "SELECT * FROM policed",                                      HIDDEN,   "policy"),
    ("view by its name",    "SELECT table_to_xml('peek', true, false, '')",               HIDDEN,   "view"),
    ("an extension's",      "SELECT set_limit(0.7)",                                      "SELECT show_limit()", "0.7"),
    ("query as text",       "SELECT ts_rewrite('a', 'SELECT tsquery ''a'', hide(''b'')::tsquery')", HIDDEN, "b"),
];

#[tokio::test]
async fn settings_made_behind_a_text_stay_their_clients_and_nobody_elses() {
    for pool_size in ["1", "3"] {
        let stage = stage(pool_size);
        for (name, text, read, want) in ROWS {
            let (mut one, mut other) = (stage.client().await, stage.client().await);
            let before = value(&mut other, read).await;
            succeed(&mut one, text).await;
            for round in 0..4 {
                assert_eq!(value(&mut other, read).await, before, "{name}, round {round}: leaked");
                let own = value(&mut one, read).await;
                let fits = own == want || want == "*" && !own.is_empty();
                assert!(fits, "{name}, round {round}: {own:?}, not {want:?}");
            }
        }
        assert!(stage.metric("pgweir_servers_pinned") < 0.5, "none of these pins");
        settle(&stage);
    }
}

#[tokio::test]
async fn what_a_statement_leads_to_without_naming_it_is_found_by_nobody_else() {
    for (setup, text, want) in EVERYWHERE {
        let stage = stage_with("1", setup);
        let (mut one, mut other) = (stage.client().await, stage.client().await);
        for _ in 0..2 {
            succeed(&mut one, text).await;
            assert_eq!(value(&mut other, HIDDEN).await, "", "{text}: leaked");
            assert_eq!(value(&mut one, HIDDEN).await, want, "{text}");
        }
        settle(&stage);
    }
}

#[tokio::test]
async fn a_prepared_statement_is_judged_like_its_text() {
    let stage = stage("1");
    let (mut one, mut other) = (stage.client().await, stage.client().await);
    for name in ["", "s"] {
        let batch = [parse(name, "SELECT hide($1)", &[]), bind("", name, &[Some(b"v")]), execute("", 0), sync()];
        one.send(&batch.concat()).await.unwrap();
        assert_eq!(one.outcome().await.unwrap().error, None);
        assert_eq!(value(&mut other, HIDDEN).await, "");
        assert_eq!(value(&mut one, HIDDEN).await, "v");
        succeed(&mut one, "RESET app.hidden").await;
        assert_eq!(value(&mut one, HIDDEN).await, "");
    }
    settle(&stage);
}

#[tokio::test]
async fn what_cannot_be_carried_pins_and_is_found_by_nobody_else() {
    const SLOTS: &str = "SELECT count(*) FROM pg_replication_slots WHERE active_pid = pg_backend_pid()";
    #[rustfmt::skip]
    let rows: [Row; 7] = [
        ("listen",  "SELECT listens()",             "SELECT count(*) FROM pg_listening_channels()",                "1"),
        ("temp",    "SELECT temps()",               "SELECT count(*) FROM pg_class WHERE relname = 'hidden' AND relnamespace = pg_my_temp_schema()", "1"),
        ("lock",    "SELECT locks()",               "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", "1"),
        ("cursor",  "SELECT holds()",               "SELECT count(*) FROM pg_cursors WHERE name = 'hidden'",       "1"),
        ("a name",  "SELECT by_name('app.n', 'v')", "SELECT count(*) WHERE current_setting('app.n', true) = 'v'",  "1"),
        ("slot",    "SELECT pg_create_physical_replication_slot(current_database()::name, false, true)", SLOTS,     "1"),
        ("body",    "SELECT slots()",               SLOTS,                                                         "1"),
    ];
    let stage = stage("3");
    let name = stage.name();
    stage.place.cluster.psql("postgres", &format!("ALTER ROLE {name} REPLICATION")).unwrap();
    stage.own_sql(
        "CREATE FUNCTION slots() RETURNS text LANGUAGE sql AS \
         $$ SELECT slot_name FROM pg_create_physical_replication_slot(current_database() || '_2', false, true) $$",
    );
    for (name, text, read, want) in rows {
        let mut one = stage.client().await;
        succeed(&mut one, text).await;
        let (mut two, mut three) = (stage.client().await, stage.client().await);
        succeed(&mut two, "BEGIN").await;
        succeed(&mut three, "BEGIN").await;
        for wire in [&mut two, &mut three] {
            let found = value(wire, read).await;
            assert_eq!(found, "0", "{name}: leaked");
            succeed(wire, "COMMIT").await;
        }
        for _ in 0..2 {
            assert_eq!(value(&mut one, read).await, want, "{name}");
        }
        one.send(&pgweir_harness::wire::build::terminate()).await.unwrap();
        // It is wiped for the next.
        let clean = |wire: Wire| clean(wire, read);
        clean(stage.client().await).await;
    }
    settle(&stage);
}

#[tokio::test]
async fn a_connection_that_a_session_has_opened_to_elsewhere_is_found_by_nobody_else() {
    const OPEN: &str = "SELECT coalesce(array_length(dblink_get_connections(), 1), 0)";
    let stage = stage("2");
    let (name, address) = (stage.name(), stage.place.cluster.addr());
    let there = format!(
        "host={} port={} dbname={name} user={name} password={}",
        address.ip(),
        address.port(),
        crate::support::PASSWORD
    );
    stage.own_sql(
        "CREATE FUNCTION opens(c text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN dblink_connect('hidden', c); END $$",
    );
    for text in [format!("SELECT dblink_connect('hidden', '{there}')"), format!("SELECT opens('{there}')")] {
        let mut one = stage.client().await;
        succeed(&mut one, &text).await;
        let mut two = stage.client().await;
        for _ in 0..4 {
            assert_eq!(value(&mut two, OPEN).await, "0", "leaked");
            assert_eq!(value(&mut one, OPEN).await, "1");
        }
        one.send(&pgweir_harness::wire::build::terminate()).await.unwrap();
        let mut three = stage.client().await;
        succeed(&mut two, "BEGIN").await;
        succeed(&mut three, "BEGIN").await;
        for wire in [&mut two, &mut three] {
            assert_eq!(value(wire, OPEN).await, "0", "leaked to who came next");
        }
    }
}

/// Each way to seed `random()` with 0.5.
const SEEDS: &str = r"
CREATE FUNCTION seeds() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM setseed(0.5); END $$;
CREATE FUNCTION by_setting() RETURNS int LANGUAGE plpgsql AS $$ BEGIN SET LOCAL seed TO 0.5; RETURN 1; END $$;
CREATE FUNCTION by_text() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT setseed(0.5)'; RETURN 1; END $$;
CREATE FUNCTION by_parts() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT set' || 'seed(0.5)'; RETURN 1; END $$;
CREATE FUNCTION under_it() RETURNS int LANGUAGE sql SET seed = 0.5 AS $$ SELECT 1 $$;
CREATE FUNCTION on_insert() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM seeds(); RETURN NEW; END $$;
CREATE TABLE seeded (a int); CREATE TRIGGER t BEFORE INSERT ON seeded FOR EACH ROW EXECUTE FUNCTION on_insert();
CREATE TABLE by_default (a int, b text DEFAULT setseed(0.5)::text);
CREATE VIEW seeding AS SELECT setseed(0.5)::text AS s;
CREATE FUNCTION locally(n text, v text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config(n, v, true); END $$;
";

/// The ways, and whether who goes them keeps what follows from the seed.
#[rustfmt::skip]
const SEEDING: [(&str, bool); 18] = [
    ("SELECT setseed(0.5)",                                  true),
    ("SELECT \"setseed\" (0.5) FROM (VALUES (1)) AS x",      true),
    ("SET seed TO 0.5",                                      true),
    ("BEGIN; SET LOCAL seed TO 0.5; COMMIT",                 true),
    ("SELECT set_config('seed', '0.5', false)",              true),
    ("SELECT set_config('seed', '0.5', true)",               true),
    ("DO $$ BEGIN PERFORM setseed(0.5); END $$",             true),
    ("SELECT seeds()",                                       true),
    ("SELECT by_setting()",                                  true),
    ("SELECT by_text()",                                     true),
    ("INSERT INTO seeded VALUES (1)",                        true),
    ("SELECT by_parts()",                                    false),
    ("SELECT under_it()",                                    false),
    ("SELECT * FROM seeding",                                false),
    ("SELECT set_config('se' || 'ed', '0.5', true)",         false),
    ("SELECT set_config(lower('SEED'), '0.5', true)",        false),
    ("SELECT set_config(s, '0.5', true) FROM (VALUES ('seed')) AS v (s)", false),
    ("SELECT locally('seed', '0.5')",                        false),
];

/// The same with values for parameters, and whether a server connection is kept for it.
#[rustfmt::skip]
const SEEDING_BY_VALUE: [(&str, &[&str], bool); 5] = [
    ("SELECT set_config($1, '0.5', true)",                   &["seed"],                true),
    ("SELECT set_config($1, $2, true)",                      &["SEED", "0.5"],         true),
    ("SELECT set_config($1::name, $2, true)",                &["seed", "0.5"],         false),
    ("SELECT set_config(el->>0, el->>1, true) FROM json_array_elements($1::json) el", &[r#"[["seed", "0.5"]]"#], false),
    ("SELECT set_config(el->>0, el->>1, true) FROM json_array_elements($1::json) el", &[r#"[["\u0073eed", "0.5"]]"#], false),
];

/// A client of Postgres itself.
async fn direct(stage: &Stage<'_>) -> Wire {
    let address = stage.place.cluster.addr();
    Wire::open(address, stage.name(), stage.name(), crate::support::PASSWORD).await.unwrap()
}

/// What `random()` says, so many times.
async fn sequence(wire: &mut Wire, length: usize) -> Vec<String> {
    let mut told = Vec::new();
    for _ in 0..length {
        told.push(value(wire, "SELECT random()").await);
    }
    told
}

#[tokio::test]
async fn a_seed_is_its_clients_own_and_tells_nobody_else_what_is_random() {
    for pool_size in ["1", "2"] {
        let stage = stage(pool_size);
        stage.own_sql(SEEDS);
        let mut direct = direct(&stage).await;
        succeed(&mut direct, "SELECT setseed(0.5)").await;
        let want = sequence(&mut direct, 8).await;
        let alone = pool_size == "1";
        let fresh = |told: &[String], text: &str| assert!(told.iter().all(|one| !want.contains(one)), "{text}: leaked");
        for (text, keeps) in SEEDING.into_iter().chain([("INSERT INTO by_default VALUES (1)", false)]) {
            let mut one = stage.client().await;
            succeed(&mut one, text).await;
            if keeps {
                for expected in want.get(..4).unwrap() {
                    assert_eq!(value(&mut one, "SELECT random()").await, *expected, "{text}: lost");
                    if !alone {
                        fresh(&sequence(&mut stage.client().await, 2).await, text);
                    }
                }
            }
            one.send(&pgweir_harness::wire::build::terminate()).await.unwrap();
            let (mut two, mut three) = (stage.client().await, stage.client().await);
            succeed(&mut two, "BEGIN").await;
            fresh(&sequence(&mut two, 2).await, text);
            if !alone {
                fresh(&sequence(&mut three, 2).await, text);
            }
        }
    }
}

/// What is bound to the unnamed statement, or to one with a name that was prepared in another batch.
async fn run_with(wire: &mut Wire, name: &str, text: &str, values: &[&str]) {
    let values: Vec<Option<&[u8]>> = values.iter().map(|value| Some(value.as_bytes())).collect();
    if !name.is_empty() {
        wire.send(&[parse(name, text, &[]), sync()].concat()).await.unwrap();
        assert_eq!(wire.outcome().await.unwrap().error, None, "{text}");
    }
    let first = if name.is_empty() { parse(name, text, &[]) } else { Vec::new() };
    wire.send(&[first, bind("", name, &values), execute("", 0), sync()].concat()).await.unwrap();
    assert_eq!(wire.outcome().await.unwrap().error, None, "{text}");
}

#[tokio::test]
async fn a_seed_whose_setting_is_named_by_a_value_is_its_clients_own() {
    let stage = stage("1");
    let mut direct = direct(&stage).await;
    succeed(&mut direct, "SELECT setseed(0.5)").await;
    let want = sequence(&mut direct, 4).await;
    for name in ["", "s"] {
        for (text, values, keeps) in SEEDING_BY_VALUE {
            let mut one = stage.client().await;
            run_with(&mut one, name, text, values).await;
            if keeps {
                assert_eq!(value(&mut one, "SELECT random()").await, want[0], "{text}: lost");
            }
            one.send(&pgweir_harness::wire::build::terminate()).await.unwrap();
            let told = sequence(&mut stage.client().await, 2).await;
            assert!(told.iter().all(|one| !want.contains(one)), "{name} {text}: leaked");
        }
    }
}

/// Ways to set the path for a transaction, and whether a table made there is temporary.
#[rustfmt::skip]
const PATHS: [(&str, &[&str], bool); 8] = [
    ("SELECT set_config('search_path', $1, true)",           &["pg_temp"],                    true),
    ("SELECT set_config('search_path', $1, true)",           &["PG_Temp, public"],            true),
    ("SELECT set_config('search_path', $1, true)",           &["\"pg_temp\",public"],         true),
    ("SELECT set_config('search_path', $1 || '_temp', true)", &["pg"],                        true),
    ("SELECT set_config($1, $2, true)",                      &["search_path", "pg_temp"],     true),
    ("SELECT set_config(lower($1), $2, true)",               &["search_path", "pg_temp"],     true),
    ("SELECT set_config(el->>0, el->>1, true) FROM json_array_elements($1::json) el", &[r#"[["search_path", "pg_temp"]]"#], true),
    ("SELECT set_config('search_path', $1, true)",           &["public"],                     false),
];

#[tokio::test]
async fn a_table_that_a_path_by_value_makes_temporary_is_found_by_nobody_else() {
    const FIND: &str = "SELECT count(*) FROM pg_class WHERE relname = 'mine' AND relnamespace = pg_my_temp_schema()";
    let stage = stage("2");
    for name in ["", "s"] {
        for (text, values, is_temporary) in PATHS {
            for creates in ["SELECT 1 AS a INTO mine", "CREATE TABLE mine (a int)"] {
                let mut one = stage.client().await;
                succeed(&mut one, "BEGIN").await;
                run_with(&mut one, name, text, values).await;
                succeed(&mut one, creates).await;
                succeed(&mut one, "COMMIT").await;
                let mut two = stage.client().await;
                for _ in 0..4 {
                    assert_eq!(value(&mut two, FIND).await, "0", "{text}, {values:?}: leaked");
                    let own = value(&mut one, FIND).await;
                    assert_eq!(own, if is_temporary { "1" } else { "0" }, "{text}, {values:?}");
                }
                succeed(&mut one, "DROP TABLE mine").await;
            }
        }
    }
    // For the whole session, spelled in a way of one's own.
    let mut one = stage.client().await;
    succeed(&mut one, "SELECT set_config('search_path', 'PG_TEMP', false)").await;
    succeed(&mut one, "SELECT 1 AS a INTO mine").await;
    for _ in 0..4 {
        assert_eq!(value(&mut stage.client().await, FIND).await, "0", "leaked");
        assert_eq!(value(&mut one, FIND).await, "1");
    }
    one.send(&pgweir_harness::wire::build::terminate()).await.unwrap();
    settle(&stage);
}

/// Settings of libraries, what they are made, what they are where nobody sets them, and what loads the library.
#[rustfmt::skip]
const OF_LIBRARIES: [(&str, &str, &str, &str); 2] = [
    ("PG_trgm.similarity_threshold", "0.7", "0.3",  "SELECT show_limit()"),
    ("plpgsql.extra_warnings",       "all", "none", "DO 'BEGIN END'"),
];

/// How a client sets them for its session: in one text, or by what it binds.
#[rustfmt::skip]
const FOR_SESSIONS: [(&str, &[&str]); 3] = [
    ("SELECT set_config('NAME', 'VALUE', false)", &[]),
    ("SELECT set_config($1, $2, false)",          &["NAME", "VALUE"]),
    ("SELECT set_config($1, $2, $3)",             &["NAME", "VALUE", "f"]),
];

#[tokio::test]
async fn settings_of_libraries_are_their_clients_own_however_they_are_named() {
    for (name, set, plain, loads) in OF_LIBRARIES {
        let read = format!("SELECT coalesce(current_setting('{name}', true), '')");
        let fill = |text: &str| text.replace("NAME", name).replace("VALUE", set);
        for (text, values) in FOR_SESSIONS {
            let values: Vec<String> = values.iter().map(|value| fill(value)).collect();
            let values: Vec<&str> = values.iter().map(String::as_str).collect();
            // Who loads the library, if anybody does, and before which round. A server connection that has it has it for good.
            for (who, when) in [("one", 0), ("one", 2), ("two", 2), ("none", 0)] {
                let stage = stage("1");
                let (mut one, mut two) = (stage.client().await, stage.client().await);
                if when == 0 && who == "one" {
                    succeed(&mut one, loads).await;
                }
                succeed(&mut one, "BEGIN").await;
                run_with(&mut one, "", &fill(text), &values).await;
                succeed(&mut one, "ROLLBACK").await;
                assert_ne!(value(&mut one, &read).await, set, "{name}, {text}, {who} in {when}: not rolled back");
                run_with(&mut one, "s", &fill(text), &values).await;
                for round in 1..5 {
                    let loader = match who {
                        "one" => Some(&mut one),
                        "two" => Some(&mut two),
                        _ => None,
                    };
                    if let Some(wire) = loader.filter(|_| round == when) {
                        succeed(wire, loads).await;
                    }
                    let is_loaded = who != "none" && round >= when;
                    let told = value(&mut two, &read).await;
                    assert_eq!(told, if is_loaded { plain } else { "" }, "{name}, {text}, {who}, {when}: leaked");
                    assert_eq!(value(&mut one, &read).await, set, "{name}, {text}, {who}, {when}: lost");
                }
                assert!(stage.metric("pgweir_servers_pinned") < 0.5, "{name}, {text}: a name that is read pins nobody");
                settle(&stage);
            }
        }
    }
}

#[tokio::test]
async fn ordinary_settings_of_a_transaction_by_value_cost_nothing_of_ours() {
    let stage = Stage::new(&[("default_pool_size", "1"), ("catalog_check_interval", "1h")]);
    succeed(&mut stage.client().await, "SELECT 1").await;
    #[rustfmt::skip]
    let rows: [(&str, &[&str]); 6] = [
        ("SELECT set_config($1, $2, true)",                            &["app.tenant", "7"]),
        ("SELECT set_config('app.tenant', $1, true)",                  &["pg_temp"]),
        ("SELECT set_config('app.' || $1, $2, true)",                  &["tenant", "7"]),
        ("SELECT set_config('search_path', $1, true), set_config('role', $2, true)", &["tenant_7, public", "none"]),
        ("SELECT set_config($1, $2, true), set_config($3, $4, true)",  &["search_path", "tenant_7", "app.tenant", "pg_temp"]),
        ("SELECT set_config(el->>0, el->>1, true) FROM json_array_elements($1::json) el", &[r#"[["search_path", "a"], ["app.x", "{\"a\": 1}"]]"#]),
    ];
    for (text, values) in rows {
        for name in ["", "s"] {
            let mut one = stage.client().await;
            run_with(&mut one, name, text, values).await;
            assert_eq!(last_query(&stage), text, "nothing of ours follows it");
        }
    }
    assert!(stage.metric("pgweir_servers_pinned") < 0.5);
}

#[tokio::test]
async fn a_seed_that_a_client_logs_in_with_is_none() {
    let stage = stage("1");
    let mut direct = direct(&stage).await;
    succeed(&mut direct, "SELECT setseed(0.5)").await;
    let want = sequence(&mut direct, 4).await;
    for (parameter, text) in [("seed", "0.5"), ("options", "-c seed=0.5"), ("options", "-c SEED=0.5")] {
        let mut one = stage.client_with(&[(parameter, text)]).await;
        succeed(&mut one, "SELECT 1").await;
        for wire in [&mut one, &mut stage.client().await] {
            assert!(sequence(wire, 2).await.iter().all(|told| !want.contains(told)), "{parameter}: {text}");
        }
    }
}

async fn clean(mut wire: Wire, read: &str) {
    assert_eq!(value(&mut wire, read).await, "0");
}

#[tokio::test]
async fn a_role_taken_in_a_function_is_given_back() {
    let stage = stage("1");
    let (mut one, mut other) = (stage.client().await, stage.client().await);
    succeed(&mut one, "SELECT becomes()").await;
    assert_eq!(value(&mut other, "SELECT current_user = session_user").await, "t");
    assert_eq!(value(&mut one, "SELECT current_user = session_user").await, "f");
    settle(&stage);
}

#[tokio::test]
async fn a_function_is_known_as_soon_as_it_is_defined_through_the_pooler() {
    let stage = stage("1");
    let (mut one, mut other) = (stage.client().await, stage.client().await);
    // The same text is cleared first, and suspicious then.
    succeed(&mut one, "CREATE FUNCTION late(v text) RETURNS text LANGUAGE sql AS 'SELECT v'").await;
    succeed(&mut one, "SELECT late('x')").await;
    for (n, define) in [
        "CREATE OR REPLACE FUNCTION late(v text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('app.hidden', v, false) $$",
        "BEGIN; DROP FUNCTION late; CREATE FUNCTION late(v text) RETURNS text LANGUAGE sql AS $$ SELECT caller(v) $$; COMMIT",
        "DO $x$ BEGIN CREATE OR REPLACE FUNCTION late(v text) RETURNS text LANGUAGE sql AS $$ SELECT hide(v) $$; END $x$",
    ]
    .iter()
    .enumerate()
    {
        succeed(&mut one, define).await;
        succeed(&mut one, "SELECT late('x')").await;
        assert_eq!(value(&mut other, HIDDEN).await, "", "definition {n}");
        assert_eq!(value(&mut one, HIDDEN).await, "x", "definition {n}");
        succeed(&mut one, "RESET app.hidden").await;
    }
    settle(&stage);
}

#[tokio::test]
async fn what_is_sent_while_an_audit_is_on_its_way_costs_no_settings() {
    // Every other of what seems clean is audited, too: sooner or later behind such a reset.
    let place = crate::support::Place::on(crate::support::primary());
    let name = place.name.clone();
    place.cluster.psql("postgres", &format!("CREATE ROLE {name}_other")).unwrap();
    place.psql(&format!("GRANT CREATE ON SCHEMA public TO {name}; SET ROLE {name}; {SETUP}"));
    let stage = Stage::at(place, &[("default_pool_size", "1"), ("audit_every", "2")], &[]);
    let mut one = stage.client().await;
    succeed(&mut one, "SET statement_timeout = '57s'").await;
    for round in 0..40 {
        // It is audited, and all is reset behind that.
        succeed(&mut one, "SELECT by_execute('5555kB')").await;
        assert_eq!(value(&mut one, "SHOW statement_timeout").await, "57s", "round {round}");
    }
    settle(&stage);
}

#[tokio::test]
async fn a_definition_of_one_pools_client_is_known_to_the_other_pools_of_its_database() {
    let stage = stage("1");
    let another = format!("{}_other", stage.name());
    let other = || Wire::open(stage.addr(), &another, stage.name(), "");
    let (mut definer, mut one, mut two) = (stage.client().await, other().await.unwrap(), other().await.unwrap());
    succeed(&mut definer, "CREATE FUNCTION late(v text) RETURNS text LANGUAGE sql AS 'SELECT v'").await;
    succeed(&mut one, "SELECT late('x')").await;
    let hides = "CREATE OR REPLACE FUNCTION late(v text) RETURNS text LANGUAGE sql AS 'SELECT hide(v)'";
    succeed(&mut definer, hides).await;
    succeed(&mut one, "SELECT late('x')").await;
    assert_eq!(value(&mut two, HIDDEN).await, "");
    settle(&stage);
}

#[tokio::test]
async fn what_is_defined_elsewhere_is_noticed_in_time() {
    let settings = [("default_pool_size", "1"), ("catalog_check_interval", "200ms")];
    let stage = Stage::new(&settings);
    let mut one = stage.client().await;
    succeed(&mut one, "SELECT 1").await;
    stage.sql(
        "CREATE FUNCTION hide(v text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('app.hidden', v, false) $$",
    );
    let deadline = std::time::Instant::now() + SOON;
    loop {
        succeed(&mut one, "SELECT hide('x')").await;
        // A client of its own each time: what one has once seen, and reset, it has as a setting of its own.
        if value(&mut stage.client().await, HIDDEN).await.is_empty() {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "never noticed");
    }
    let mut other = stage.client().await;
    for _ in 0..20 {
        succeed(&mut one, "SELECT hide('x')").await;
        assert_eq!(value(&mut other, HIDDEN).await, "", "noticed, and forgotten");
        assert_eq!(value(&mut one, HIDDEN).await, "x");
    }
}

#[tokio::test]
async fn an_audit_finds_what_was_not_known() {
    let stage = stage("2");
    stage.pgweir.audits_may_find();
    let mut one = stage.client().await;
    succeed(&mut one, "SELECT 1").await;
    // Past pgweir, which looks once an hour.
    stage.sql("CREATE FUNCTION sneaks() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_lock(1)'");
    succeed(&mut one, "SELECT sneaks()").await;
    // What the harness looks for when any other pgweir stops.
    let line = stage.pgweir.wait_log(audits::FINDING, SOON).unwrap();
    assert!(line.contains("level=error"), "{line}");
    wait_until(SOON, || stage.metric(audits::FAILURES) > 0.5);
    assert_eq!(value(&mut one, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await, "1");
}

/// Past pgweir, which looks once an hour: it knows of none of these.
const SNEAKS: &str = r"
CREATE FUNCTION sneaks(n text, v text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config(n, v, false); END $$;
";

/// A setting, what it is made, and what it is where nobody sets it.
#[rustfmt::skip]
const SNEAKED: [(&str, &str, &str); 6] = [
    ("search_path",           "pg_temp",      "\"$user\", public"),
    ("role",                  "PLACE_other",  "none"),
    ("statement_timeout",     "59s",          "0"),
    ("work_mem",              "5555kB",       "4MB"),
    ("app.hidden",            "sneaked",      ""),
    ("pg_trgm.strict_word_similarity_threshold", "0.7", "0.5"),
];

#[tokio::test]
async fn an_audit_finds_settings_that_were_not_known_and_takes_them_for_nobodys() {
    // Of a client that has none itself, and of one that logged in with others.
    let startup =
        "-c work_mem=64MB -c statement_timeout=57000 -c DateStyle=german -c app.mine=x -c app.hidden=mine -c geqo=true";
    for options in ["", startup] {
        let stage = stage("1");
        stage.pgweir.audits_may_find();
        // Some client has it: the catalog does not list custom settings.
        let (mut other, mut one) = (stage.client().await, stage.client_with(&[("options", options)]).await);
        succeed(&mut other, "SET app.hidden = 'other'").await;
        // A server connection knows the settings of a library that it has loaded.
        let loads = "SELECT show_limit()";
        succeed(&mut one, loads).await;
        stage.sql(SNEAKS);
        for (was, (name, sneaked, plain)) in (0..).zip(SNEAKED) {
            let found = |count: u32| (stage.metric(audits::FAILURES) - f64::from(count)).abs() < 0.5;
            let show = format!("SELECT coalesce(current_setting('{name}', true), '')");
            let (before, pid) = (value(&mut one, &show).await, stage.backends());
            assert!(found(was), "{name}, {options}: found too much");
            succeed(&mut one, &format!("SELECT sneaks('{name}', '{}')", sneaked.replace("PLACE", stage.name()))).await;
            wait_until(SOON, || found(was + 1));
            let line = stage.pgweir.log().lines().rev().find(|line| line.contains(audits::FINDING)).unwrap().to_owned();
            assert!(line.contains(name) && !line.contains(sneaked), "{name}, {options}: {line}");
            // The server connection is gone, and what was on it is no client's.
            succeed(&mut one, loads).await;
            assert_eq!(value(&mut one, &show).await, before, "{name}, {options}");
            assert_ne!(stage.backends(), pid, "{name}, {options}");
            let theirs = if name == "app.hidden" { "other" } else { plain };
            assert_eq!(value(&mut other, &show).await, theirs, "{name}, {options}: leaked");
        }
    }
}

#[tokio::test]
async fn an_audit_finds_nothing_where_settings_are_only_spelled_otherwise() {
    let long_name = "x".repeat(80);
    let startup = [
        (
            "options",
            "-c work_mem=64MB -c statement_timeout=57000 -c DateStyle=german -c app.Mine=x -c geqo=true -c seq_page_cost=1.50 \
          -c search_path=\"$user\",pg_catalog -c default_text_search_config=simple -c role=PLACE_other -c jit=0 -c bytea_output=ESCAPE",
        ),
        ("client_encoding", "utf-8"),
        ("TimeZone", "europe/berlin"),
        ("application_name", &long_name),
    ];
    for connect_query in [
        "",
        "SET work_mem = '1MB'; SET app.connected = 'x'; SET search_path = pg_catalog, public",
        "SELECT set_config('app.connected', clock_timestamp()::text, false), set_config('work_mem', '1MB', false)",
    ] {
        for tagged in ["false", "true"] {
            let place = crate::support::Place::on(crate::support::primary());
            let name = place.name.clone();
            place.cluster.psql("postgres", &format!("CREATE ROLE {name}_other; GRANT {name}_other TO {name}")).unwrap();
            // What nobody set is there, too.
            let own = format!(
                "ALTER ROLE {name} SET app.role = 'r'; ALTER DATABASE {name} SET app.connected = 'd'; \
                 ALTER ROLE {name} SET role = '{name}_other'; GRANT {name}_other TO {name}"
            );
            place.psql(&own);
            let settings = [
                ("default_pool_size", "2"),
                ("audit_every", "1"),
                ("fleet_budget", tagged),
                ("databases.PLACE.connect_query", connect_query),
            ];
            let stage = Stage::at(place, &settings, &[]);
            let startup = startup.map(|(key, value)| (key, value.replace("PLACE", &name)));
            let startup: Vec<(&str, &str)> = startup.iter().map(|(key, value)| (*key, &**value)).collect();
            let (mut one, mut two) = (stage.client_with(&startup).await, stage.client().await);
            let mut three = stage.client().await;
            for round in 0..3 {
                succeed(
                    &mut three,
                    "SET app.role = 'three'; SET app.connected = ''; SET TIME ZONE INTERVAL '+02:00' HOUR TO MINUTE",
                )
                .await;
                for _ in 0..3 {
                    for client in [&mut one, &mut two, &mut three] {
                        succeed(client, "SELECT 1").await;
                    }
                }
                succeed(&mut one, "RESET ALL").await;
                succeed(&mut two, ["RESET ALL", "SET work_mem = '3MB'", "RESET ROLE"][round]).await;
                succeed(&mut three, "DISCARD ALL").await;
                for client in [&mut one, &mut two, &mut three] {
                    succeed(client, "SELECT 1").await;
                }
            }
            assert!(stage.metric("pgweir_servers_pinned") < 0.5, "{connect_query}");
            settle(&stage);
        }
    }
}

#[tokio::test]
async fn what_mentions_no_suspect_is_not_audited() {
    let settings = [("default_pool_size", "1"), ("catalog_check_interval", "1h")];
    let place = crate::support::Place::on(crate::support::primary());
    let name = place.name.clone();
    place.cluster.psql("postgres", &format!("CREATE ROLE {name}_other")).unwrap();
    place.psql(&format!("GRANT CREATE ON SCHEMA public TO {name}; SET ROLE {name}; {SETUP}"));
    let stage = Stage::at(place, &settings, &[]);
    let mut one = stage.client().await;
    succeed(&mut one, "SELECT 1").await;
    // What a text has to be understood for, and not just read word by word.
    let understood = cfg!(feature = "grammar");
    for (text, by_its_words) in [
        ("SELECT harmless('x')", true),
        ("SELECT * FROM quiet", true),
        ("SELECT * FROM audited", false),
        ("SELECT 'hide(1)', a AS hide FROM audited", false),
        ("INSERT INTO quiet VALUES ('audited')", false),
        ("DELETE FROM quiet USING audited", false),
    ] {
        if !(by_its_words || understood) {
            continue;
        }
        succeed(&mut one, text).await;
        assert_eq!(last_query(&stage), text, "nothing of ours follows it");
    }
}

/// What the only server connection has run last.
fn last_query(stage: &Stage<'_>) -> String {
    let text = "SELECT query FROM pg_stat_activity WHERE usename = 'NAME' AND backend_type = 'client backend'";
    stage.place.cluster.psql("postgres", &text.replace("NAME", stage.name())).unwrap()
}
