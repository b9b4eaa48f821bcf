-- What every script finds, run by the owner of the database.
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO t SELECT n, 'row ' || n FROM generate_series(1, 20) n;
CREATE TABLE log (what text);
CREATE TABLE serials (id serial PRIMARY KEY, v text);
CREATE SEQUENCE q;
CREATE SEQUENCE q2;
CREATE SCHEMA mine;
CREATE TABLE mine.t (id int PRIMARY KEY, v text);
INSERT INTO mine.t VALUES (1, 'mine');
CREATE SCHEMA "My, Schema";
CREATE TABLE "My, Schema".t (id int PRIMARY KEY, v text);
INSERT INTO "My, Schema".t VALUES (1, 'My, Schema');
GRANT USAGE ON SCHEMA mine TO script_reader;
GRANT SELECT ON t, log, mine.t TO script_reader;
GRANT SELECT, INSERT, UPDATE, DELETE ON t, log TO script_writer;
-- The neighbours'.
CREATE SCHEMA theirs;
CREATE TABLE theirs.t (id int PRIMARY KEY, v text);
INSERT INTO theirs.t VALUES (1, 'theirs');
CREATE SEQUENCE theirs.q;
GRANT USAGE ON SCHEMA theirs TO PUBLIC;
GRANT SELECT ON theirs.t TO PUBLIC;
GRANT USAGE ON SEQUENCE theirs.q TO PUBLIC;
-- Functions that do to a session what their names do not say.
CREATE FUNCTION login(name text, value text) RETURNS text LANGUAGE sql AS $$ SELECT set_config(name, value, false) $$;
CREATE FUNCTION login_local(name text, value text) RETURNS text LANGUAGE sql AS $$ SELECT set_config(name, value, true) $$;
CREATE FUNCTION hush(statement text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE statement; END $$;
CREATE FUNCTION zone_of_tenant() RETURNS void LANGUAGE plpgsql AS $$ BEGIN SET TimeZone = 'Asia/Kolkata'; END $$;
CREATE FUNCTION subscribe() RETURNS void LANGUAGE plpgsql AS $$ BEGIN LISTEN hidden; END $$;
CREATE FUNCTION tell(word text) RETURNS void LANGUAGE sql AS $$ SELECT pg_notify('here', word) $$;
CREATE FUNCTION guard(key int) RETURNS void LANGUAGE sql AS $$ SELECT pg_advisory_lock(key) $$;
CREATE FUNCTION scratch() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CREATE TEMP TABLE scratch_paper (a int); INSERT INTO scratch_paper VALUES (1); END $$;
CREATE FUNCTION with_zone() RETURNS text LANGUAGE sql SET TimeZone = 'Asia/Kolkata' AS $$ SELECT current_setting('TimeZone') $$;
CREATE FUNCTION noisy(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1..n LOOP RAISE NOTICE 'notice %', i USING DETAIL = 'detail', HINT = 'hint'; END LOOP;
    RAISE WARNING 'warning' USING ERRCODE = '01234';
    RETURN n;
END $$;
CREATE PROCEDURE set_zone(zone text) LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('TimeZone', zone, false); END $$;
CREATE PROCEDURE twice(what text) LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO log VALUES (what); COMMIT; INSERT INTO log VALUES (what || ' again'); COMMIT;
END $$;
CREATE PROCEDURE doubled(INOUT n int) LANGUAGE plpgsql AS $$ BEGIN n := 2 * n; END $$;
CREATE TABLE watched (id int, v text);
CREATE FUNCTION on_watched() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM set_config('app.watched', NEW.v, false); PERFORM set_config('TimeZone', 'Asia/Kolkata', false); RETURN NEW; END $$;
CREATE TRIGGER watched BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION on_watched();
CREATE VIEW sly AS SELECT set_config('TimeZone', 'Asia/Kolkata', false) AS zone;
CREATE TYPE mood AS ENUM ('sad', 'glad');
CREATE FUNCTION remember(value text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('work_mem', value, false) $$;
CREATE FUNCTION remember(n int, value text) RETURNS text LANGUAGE sql AS $$ SELECT remember(value) $$;
CREATE TABLE defaulted (a text DEFAULT remember('1MB'));
CREATE OPERATOR @@@ (LEFTARG = int, RIGHTARG = text, FUNCTION = remember);
CREATE TYPE sly_type AS (a text);
CREATE TYPE sly_target AS (b text);
CREATE FUNCTION sly_cast(sly_type) RETURNS sly_target LANGUAGE sql AS $$ SELECT ROW(remember(($1).a))::sly_target $$;
CREATE CAST (sly_type AS sly_target) WITH FUNCTION sly_cast(sly_type);
CREATE VIEW ruled AS SELECT 1 AS a;
CREATE RULE ruled_in AS ON INSERT TO ruled DO INSTEAD SELECT remember('1MB');
CREATE TABLE policed (a int);
INSERT INTO policed VALUES (1);
ALTER TABLE policed ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON policed USING (remember('1MB') IS NOT NULL);
