//! The questions to the catalog.
//!
//! Each runs in a transaction of its own, under a `search_path` of ours: nothing of a user's is called by it. Object ids
//! from 16384 on are those of what was created after `initdb`. The planner knows little of a catalog that has just grown,
//! so it is told what to leave alone: a loop over everything for everything, and compiling what runs for milliseconds.

/// What changes whenever an answer to [`SURVEY`] may: cheap, a scan of a few small tables. And what changes with the settings
/// that a session of this role in this database begins with.
pub const FINGERPRINT: &str = "SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 2000; \
    SET LOCAL jit TO off; SELECT concat_ws(':', \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_proc WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_trigger WHERE NOT tgisinternal), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_rewrite WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_policy), \
    (SELECT concat(count(*), '/', sum(((indexrelid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_index \
    WHERE indexprs IS NOT NULL OR indpred IS NOT NULL), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_attrdef), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_constraint WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((inhrelid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_inherits), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_operator WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_cast WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_event_trigger), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_type \
    WHERE oid >= 16384 AND typtype IN ('d', 'r')), \
    (SELECT concat(count(*), '/', sum((attrelid::bigint << 16) + attnum)) FROM pg_attribute \
    WHERE NOT attisdropped AND atttypid IN (SELECT oid FROM pg_type WHERE oid >= 16384 AND typtype = 'd' AND typdefaultbin IS NOT NULL)), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_amproc WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(((oid::bigint << 31) # xmin::text::bigint) % 999999937)) FROM pg_amop WHERE oid >= 16384), \
    (SELECT concat(count(*), '/', sum(oid::bigint), '/', sum(hashname(relname)), '/', \
     sum(oid::bigint) FILTER (WHERE relpersistence = 'u')) FROM pg_class \
     WHERE oid >= 16384 AND relpersistence <> 't' AND relkind IN ('r', 'p', 'v', 'm', 'f'))), \
    (SELECT concat(count(*), '/', sum(hashtext(concat(setdatabase, ' ', setrole, ' ', setconfig))::bigint)) FROM pg_db_role_setting \
     WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) \
     AND setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user)))";

/// Functions, relations, and what leads from one to another, a row each: kind, and up to four columns. See [`Survey`].
///
/// Of a body in a language that nobody reads here, `keeps` stands for one that mentions what its language keeps for a session. A
/// type that the grammar knows by other names is not told by its name, nor is an array. A cast to a domain is one to its type.
/// The functions of operator classes are called without being named; those in C are trusted.
///
/// A built-in function leaves no trace in `pg_depend`; in a stored expression it is found by its object id. A constant
/// needs no such search. A rule's expressions are long: they are cut at the ids, which costs a third of a search by pattern.
///
/// [`Survey`]: super::Survey
pub const SURVEY: &str = "SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 2000; \
    SET LOCAL jit TO off; SET LOCAL enable_nestloop TO off; \
    WITH known AS MATERIALIZED (SELECT oid, CASE WHEN proname IN ('currval', 'lastval') THEN 's0' ELSE 'f0' END AS node FROM pg_proc WHERE oid < 16384 AND proname IN ('set_config', 'setseed', \
    'pg_advisory_lock', 'pg_advisory_lock_shared', 'pg_try_advisory_lock', 'pg_try_advisory_lock_shared', \
    'query_to_xml', 'query_to_xml_and_xmlschema', 'query_to_xmlschema', 'cursor_to_xml', 'cursor_to_xmlschema', \
    'table_to_xml', 'table_to_xml_and_xmlschema', 'schema_to_xml', 'schema_to_xml_and_xmlschema', 'database_to_xml', \
    'database_to_xml_and_xmlschema', 'ts_rewrite', 'ts_stat', 'currval', 'lastval', 'pg_listening_channels', 'pg_notify')), \
    builtin AS MATERIALIZED (SELECT concat(':(?:funcid|opfuncid) (?:', string_agg(oid::text, '|'), ') ') AS wanted FROM known), \
    called AS MATERIALIZED (SELECT DISTINCT d.classid, d.objid, coalesce(o.oprcode::oid, d.refobjid) AS func \
    FROM pg_depend d LEFT JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid \
    WHERE d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass) AND d.refobjid >= 16384), \
    extension AS MATERIALIZED (SELECT d.objid, min(e.extname) AS name FROM pg_depend d JOIN pg_extension e \
    ON e.oid = d.refobjid WHERE d.refclassid = 'pg_extension'::regclass AND d.classid = 'pg_proc'::regclass \
    AND d.deptype = 'e' GROUP BY d.objid) \
    (SELECT 'f', p.oid::text, p.proname::text, concat(l.lanname, ' ', p.provolatile, ' ', x.name), \
    CASE WHEN CASE WHEN l.lanname LIKE 'plperl%' THEN p.prosrc ~ '_SHARED|(^|[^A-Za-z0-9_$@%])our *[($@%]|[$@%]([{]|main)?::' \
    WHEN l.lanname LIKE 'plpython%' THEN p.prosrc ~ '(^|[^A-Za-z0-9_])([GS]D|globals?)([^A-Za-z0-9_]|$)' \
    WHEN l.lanname LIKE 'pltcl%' THEN p.prosrc ~ '(^|[^A-Za-z0-9_])(GD|global|variable|#0)([^A-Za-z0-9_]|$)|::' \
    WHEN l.lanname NOT IN ('sql', 'plpgsql', 'internal', 'c') \
    THEN p.prosrc ~ '(^|[^A-Za-z0-9_])(this *[.[]|globalThis|plv8[.][A-Za-z0-9_$]+ *=[^=]|(set)?shared *[(.])|<<-' END THEN 'keeps' \
    WHEN l.lanname NOT IN ('sql', 'plpgsql') THEN '' WHEN length(p.prosrc) > 65536 THEN 'EXECUTE' \
    WHEN p.prosrc = '' THEN pg_get_functiondef(p.oid) ELSE p.prosrc END \
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang LEFT JOIN extension x ON x.objid = p.oid \
    WHERE p.oid >= 16384 LIMIT 10001) \
    UNION ALL (SELECT 'r', oid::text, relname::text, concat(relpersistence, relkind), '' FROM pg_class \
    WHERE oid >= 16384 AND relpersistence <> 't' AND relkind IN ('r', 'p', 'v', 'm', 'f') LIMIT 20001) \
    UNION ALL SELECT 'e', concat('f', objid), concat('f', func), '', '' FROM called WHERE classid = 'pg_proc'::regclass \
    UNION ALL SELECT 'e', concat('f', oid), 'f0', '', '' FROM pg_proc WHERE oid >= 16384 AND proconfig::text LIKE '%seed=%' \
    UNION ALL SELECT 'e', concat('f', oid), 'f0', '', '' FROM pg_proc \
    WHERE oid >= 16384 AND pronargdefaults > 0 AND proargdefaults::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'e', concat('f', aggfnoid::oid), 'f0', '', '' FROM pg_aggregate WHERE aggfnoid::oid >= 16384 AND EXISTS \
    (SELECT FROM known WHERE oid IN (aggtransfn::oid, aggfinalfn::oid, aggcombinefn::oid, aggmtransfn::oid, aggminvtransfn::oid, aggmfinalfn::oid)) \
    UNION ALL SELECT 'e', concat('w', tgrelid), concat('f', tgfoid), '', '' FROM pg_trigger WHERE NOT tgisinternal \
    UNION ALL SELECT 'e', concat('w', tgrelid), 'f0', '', '' FROM pg_trigger \
    WHERE tgqual::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'e', concat('w', tgrelid), concat('f', func), '', '' FROM pg_trigger t JOIN called c \
    ON c.classid = 'pg_trigger'::regclass AND c.objid = t.oid \
    UNION ALL SELECT 'e', concat('w', confrelid), concat('w', conrelid), '', '' FROM pg_constraint \
    WHERE contype = 'f' AND (confdeltype IN ('c', 'n', 'd') OR confupdtype IN ('c', 'n', 'd')) \
    UNION ALL SELECT 'i', inhparent::text, inhrelid::text, '', '' FROM pg_inherits \
    UNION ALL SELECT CASE ev_type WHEN '1' THEN 'v' ELSE 'd' END, ev_class::text, concat('f', func), '', '' \
    FROM pg_rewrite r JOIN called c ON c.classid = 'pg_rewrite'::regclass AND c.objid = r.oid \
    UNION ALL (SELECT DISTINCT CASE ev_type WHEN '1' THEN 'v' ELSE 'd' END, ev_class::text, k.node, '', '' \
    FROM pg_rewrite r CROSS JOIN LATERAL unnest(string_to_array(ev_action::text, 'funcid ')) AS piece \
    JOIN known k ON k.oid::text = split_part(piece, ' ', 1) WHERE r.oid >= 16384) \
    UNION ALL SELECT 'd', ev_class::text, 'f0', '', '' FROM pg_rewrite \
    WHERE oid >= 16384 AND ev_qual::text <> '<>' AND ev_qual::text ~ (SELECT wanted FROM builtin) \
    UNION ALL (SELECT DISTINCT CASE r.ev_type WHEN '1' THEN 'v' ELSE 'd' END, r.ev_class::text, concat('v', d.refobjid), '', '' \
    FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid \
    AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class WHERE r.oid >= 16384) \
    UNION ALL SELECT CASE WHEN polcmd IN ('*', 'r') THEN 'v' ELSE 'd' END, polrelid::text, concat('f', func), '', '' \
    FROM pg_policy p JOIN called c ON c.classid = 'pg_policy'::regclass AND c.objid = p.oid \
    UNION ALL SELECT CASE WHEN polcmd IN ('*', 'r') THEN 'v' ELSE 'd' END, polrelid::text, 'f0', '', '' FROM pg_policy \
    WHERE polqual::text ~ (SELECT wanted FROM builtin) OR polwithcheck::text ~ (SELECT wanted FROM builtin) \
    UNION ALL (SELECT DISTINCT CASE WHEN p.polcmd IN ('*', 'r') THEN 'v' ELSE 'd' END, p.polrelid::text, concat('r', d.refobjid), '', '' \
    FROM pg_policy p JOIN pg_depend d \
    ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refclassid = 'pg_class'::regclass \
    AND d.refobjid <> p.polrelid) \
    UNION ALL SELECT 'd', adrelid::text, concat('f', func), '', '' FROM pg_attrdef a JOIN called c \
    ON c.classid = 'pg_attrdef'::regclass AND c.objid = a.oid \
    UNION ALL SELECT 'e', concat('w', adrelid), 'f0', '', '' FROM pg_attrdef \
    WHERE adbin::text NOT LIKE '{CONST %' AND adbin::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'e', concat('w', conrelid), concat('f', func), '', '' FROM pg_constraint k JOIN called c \
    ON c.classid = 'pg_constraint'::regclass AND c.objid = k.oid WHERE conrelid <> 0 \
    UNION ALL SELECT 'e', concat('w', conrelid), 'f0', '', '' FROM pg_constraint \
    WHERE conrelid <> 0 AND contype = 'c' AND conbin::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'e', 'all', concat('f', func), '', '' FROM pg_constraint k JOIN called c \
    ON c.classid = 'pg_constraint'::regclass AND c.objid = k.oid WHERE contypid <> 0 \
    UNION ALL SELECT 'e', 'all', 'f0', '', '' FROM pg_constraint \
    WHERE contypid <> 0 AND oid >= 16384 AND conbin::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'd', attrelid::text, concat('f', func), '', '' FROM pg_attribute a JOIN called c \
    ON c.classid = 'pg_type'::regclass AND c.objid = a.atttypid JOIN pg_type t ON t.oid = a.atttypid \
    WHERE t.typtype = 'd' AND t.typdefaultbin IS NOT NULL AND NOT attisdropped \
    UNION ALL SELECT 'e', concat('w', attrelid), 'f0', '', '' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
    WHERE t.oid >= 16384 AND t.typtype = 'd' AND NOT attisdropped AND typdefaultbin::text ~ (SELECT wanted FROM builtin) \
    UNION ALL SELECT 'e', 'all', concat('f', func), '', '' FROM called c JOIN pg_type t \
    ON c.classid = 'pg_type'::regclass AND c.objid = t.oid WHERE t.typtype = 'r' \
    UNION ALL (SELECT DISTINCT 'e', 'all', concat('f', p.oid), '', '' FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang \
    WHERE p.oid >= 16384 AND l.lanname NOT IN ('internal', 'c') AND (p.oid IN (SELECT amproc::oid FROM pg_amproc) \
    OR p.oid IN (SELECT oprcode::oid FROM pg_amop JOIN pg_operator o ON o.oid = amopopr))) \
    UNION ALL SELECT 'e', concat('w', objid), concat('f', func), '', '' FROM called WHERE classid = 'pg_class'::regclass \
    UNION ALL SELECT 'e', concat('w', indrelid), concat('f', func), '', '' FROM pg_index i JOIN called c \
    ON c.classid = 'pg_class'::regclass AND c.objid = i.indexrelid \
    UNION ALL SELECT 'e', concat('o', oprname), concat('f', oprcode::oid), '', '' FROM pg_operator WHERE oprcode::oid >= 16384 \
    UNION ALL SELECT 'e', concat('o', oprname), 'f0', '', '' FROM pg_operator \
    WHERE oid >= 16384 AND oprcode::oid IN (SELECT oid FROM known) \
    UNION ALL SELECT 'e', CASE WHEN castcontext = 'e' AND typcategory <> 'A' AND typname NOT IN ('bool', 'bpchar', 'float4', 'float8', 'int2', \
    'int4', 'int8', 'json', 'jsonb', 'numeric', 'timestamptz', 'timetz', 'varbit', 'varchar') \
    THEN concat('t', typname) ELSE 'all' END, concat('f', castfunc), '', '' \
    FROM pg_cast JOIN pg_type t ON t.oid = casttarget WHERE castfunc >= 16384 \
    UNION ALL SELECT 'e', concat('t', d.typname), concat('t', b.typname), '', '' \
    FROM pg_type d JOIN pg_type b ON b.oid = d.typbasetype WHERE d.typtype = 'd' AND d.oid >= 16384 \
    UNION ALL SELECT 'e', 'ddl', concat('f', evtfoid), '', '' FROM pg_event_trigger";

/// What leads to something that is built in and not for a follower, as further rows of a [`Survey`] with routes.
///
/// It writes, or tells of the server or the session; but for `current_setting` of an application's own setting, one with a
/// dot (46) in its name. No pattern has a backslash in it, so that all mean the same under every setting.
///
/// [`Survey`]: super::Survey
pub const ROUTES: &str = "SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL statement_timeout TO 2000; \
    SET LOCAL jit TO off; \
    WITH barred AS MATERIALIZED (SELECT oid::text AS id, proname FROM pg_proc WHERE oid < 16384 AND (provolatile = 'v' \
    AND proname NOT IN ('array_sample', 'array_shuffle', 'clock_timestamp', 'gen_random_uuid', 'pg_partition_ancestors', \
    'pg_partition_tree', 'pg_sleep', 'pg_sleep_for', 'pg_sleep_until', 'random', 'random_normal', 'timeofday', 'uuidv4', \
    'uuidv7') OR proname ~ '^(pg_stat_get_|inet_(client|server)_|txid_|(database|schema|table)_to_xml|pg_(available_extension|current_|get_replication|is_other_temp|my_temp|relation_file|tablespace_|timezone_|walfile))' \
    OR proname IN ('current_setting', 'icu_unicode_version', 'pg_backend_pid', 'pg_conf_load_time', 'pg_config', \
    'pg_cursor', 'pg_extension_update_paths', 'pg_filenode_relation', 'pg_listening_channels', \
    'pg_postmaster_start_time', 'pg_prepared_statement', 'pg_settings_get_flags', 'pg_show_all_settings', \
    'pg_trigger_depth', 'system_user', 'unicode_version', 'version'))), \
    hidden AS MATERIALIZED (SELECT oid::text AS id FROM pg_class WHERE oid < 16384 AND relkind = 'v' \
    AND relnamespace = 'pg_catalog'::regnamespace AND relname NOT IN ('pg_group', 'pg_indexes', 'pg_matviews', \
    'pg_policies', 'pg_publication_tables', 'pg_roles', 'pg_rules', 'pg_seclabels', 'pg_shadow', 'pg_stats', \
    'pg_stats_ext', 'pg_stats_ext_exprs', 'pg_tables', 'pg_user', 'pg_user_mappings', 'pg_views')), \
    trees AS NOT MATERIALIZED (SELECT 'v' AS kind, ev_class::text AS id, ev_action::text AS tree FROM pg_rewrite \
    WHERE oid >= 16384 AND ev_type = '1' \
    UNION ALL SELECT 'v', polrelid::text, polqual::text FROM pg_policy WHERE polcmd IN ('*', 'r') \
    UNION ALL SELECT 'e', concat('f', oid), proargdefaults::text FROM pg_proc WHERE oid >= 16384 AND pronargdefaults > 0 \
    UNION ALL SELECT 'e', 'all', conbin::text FROM pg_constraint WHERE contypid <> 0 AND oid >= 16384) \
    (SELECT DISTINCT kind, t.id, CASE WHEN proname LIKE '%advisory%' THEN 'b1' ELSE 'b0' END, '', '' \
    FROM trees t CROSS JOIN LATERAL unnest(string_to_array(tree, 'funcid ')) AS piece \
    JOIN barred b ON b.id = split_part(piece, ' ', 1) WHERE NOT (proname = 'current_setting' AND piece ~ \
    '^[0-9]+ [^{]*:args [(][{]CONST [^}[]*[[] (?:-?[0-9]+ )*46 (?:-?[0-9]+ )*[]]')) \
    UNION ALL (SELECT DISTINCT kind, t.id, 'b0', '', '' \
    FROM trees t CROSS JOIN LATERAL unnest(string_to_array(tree, ':relid ')) AS piece \
    JOIN hidden h ON h.id = split_part(piece, ' ', 1))";

#[cfg(all(test, feature = "grammar"))]
mod tests {
    use super::*;
    use crate::sql::Library;

    #[test]
    fn the_questions_are_read_by_the_grammar_and_need_no_backslash() {
        for text in [FINGERPRINT, SURVEY, ROUTES] {
            let facts = Library::default().read(text.as_bytes())[0].facts.clone();
            assert_eq!((facts.statements > 3, facts.writes, text.contains('\\')), (true, false, false), "{text}");
        }
    }
}
