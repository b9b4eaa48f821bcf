//! What the server comes with: which of its functions and relations a follower may be asked for.
//!
//! What is not on a list here is not asked of a follower: whatever tells of the server or the session and not of the data,
//! and whatever a later version of Postgres may bring.

use crate::stats::RouteReason;

/// Tables of the catalog, and views over nothing else.
#[rustfmt::skip]
const CATALOGS: [&str; 77] = [
    "pg_aggregate", "pg_am", "pg_amop", "pg_amproc", "pg_attrdef", "pg_attribute", "pg_auth_members", "pg_authid",
    "pg_cast", "pg_class", "pg_collation", "pg_constraint", "pg_conversion", "pg_database", "pg_db_role_setting",
    "pg_default_acl", "pg_depend", "pg_description", "pg_enum", "pg_event_trigger", "pg_extension",
    "pg_foreign_data_wrapper", "pg_foreign_server", "pg_foreign_table", "pg_group", "pg_index", "pg_indexes",
    "pg_inherits", "pg_init_privs", "pg_language", "pg_matviews", "pg_namespace", "pg_opclass", "pg_operator",
    "pg_opfamily", "pg_parameter_acl", "pg_partitioned_table", "pg_policies", "pg_policy", "pg_proc", "pg_publication",
    "pg_publication_namespace", "pg_publication_rel", "pg_publication_tables", "pg_range", "pg_rewrite", "pg_roles",
    "pg_rules", "pg_seclabel", "pg_seclabels", "pg_sequence", "pg_shadow", "pg_shdepend", "pg_shdescription",
    "pg_shseclabel", "pg_statistic", "pg_statistic_ext", "pg_statistic_ext_data", "pg_stats", "pg_stats_ext",
    "pg_stats_ext_exprs", "pg_subscription", "pg_subscription_rel", "pg_tables", "pg_tablespace", "pg_transform",
    "pg_trigger", "pg_ts_config", "pg_ts_config_map", "pg_ts_dict", "pg_ts_parser", "pg_ts_template", "pg_type",
    "pg_user", "pg_user_mapping", "pg_user_mappings", "pg_views",
];

/// Immutable ones, and stable ones that tell of the data. The names of types are casts.
#[rustfmt::skip]
const READS: [&str; 545] = [
    "abbrev", "abs", "acldefault", "aclexplode", "acos", "acosd", "acosh", "age", "any_value", "area", "array_agg",
    "array_append", "array_cat", "array_dims", "array_fill", "array_length", "array_lower", "array_ndims",
    "array_position", "array_positions", "array_prepend", "array_remove", "array_replace", "array_reverse",
    "array_sort", "array_to_json", "array_to_string", "array_to_tsvector", "array_upper", "arraycontained",
    "arraycontains", "arrayoverlap", "ascii", "asin", "asind", "asinh", "atan", "atan2", "atan2d", "atand", "atanh",
    "avg", "bit", "bit_and", "bit_count", "bit_length", "bit_or", "bit_xor", "bool", "bool_and", "bool_or", "bound_box",
    "box", "bpchar", "broadcast", "btrim", "bytea", "cardinality", "casefold", "cash_words", "cbrt", "ceil", "ceiling",
    "center", "char", "char_length", "character_length", "chr", "cidr", "circle", "col_description", "concat",
    "concat_ws", "convert", "convert_from", "convert_to", "corr", "cos", "cosd", "cosh", "cot", "cotd", "count",
    "covar_pop", "covar_samp", "crc32", "crc32c", "cume_dist", "current_database", "current_schema", "current_schemas",
    "current_user", "date", "date_add", "date_bin", "date_part", "date_subtract", "date_trunc", "datemultirange",
    "daterange", "decode", "degrees", "dense_rank", "diagonal", "diameter", "div", "encode", "enum_first", "enum_last",
    "enum_range", "erf", "erfc", "every", "exp", "extract", "factorial", "family", "first_value", "float4", "float8",
    "floor", "format", "format_type", "gamma", "gcd", "generate_series", "generate_subscripts", "get_bit", "get_byte",
    "get_current_ts_config", "getdatabaseencoding", "getpgusername", "has_any_column_privilege", "has_column_privilege",
    "has_database_privilege", "has_foreign_data_wrapper_privilege", "has_function_privilege", "has_language_privilege",
    "has_parameter_privilege", "has_schema_privilege", "has_sequence_privilege", "has_server_privilege",
    "has_table_privilege", "has_tablespace_privilege", "has_type_privilege", "hashint4", "hashint4extended", "hashint8",
    "hashint8extended", "hashtext", "hashtextextended", "height", "host", "hostmask", "inet_merge", "inet_same_family",
    "initcap", "int2", "int4", "int4multirange", "int4range", "int8", "int8multirange", "int8range", "interval",
    "is_normalized", "isclosed", "isempty", "isfinite", "ishorizontal", "isopen", "isparallel", "isperp", "isvertical",
    "json_agg", "json_agg_strict", "json_array_element", "json_array_element_text", "json_array_elements",
    "json_array_elements_text", "json_array_length", "json_build_array", "json_build_object", "json_each",
    "json_each_text", "json_extract_path", "json_extract_path_text", "json_object", "json_object_agg",
    "json_object_agg_strict", "json_object_agg_unique", "json_object_agg_unique_strict", "json_object_field",
    "json_object_field_text", "json_object_keys", "json_populate_record", "json_populate_recordset", "json_strip_nulls",
    "json_to_record", "json_to_recordset", "json_to_tsvector", "json_typeof", "jsonb_agg", "jsonb_agg_strict",
    "jsonb_array_element", "jsonb_array_element_text", "jsonb_array_elements", "jsonb_array_elements_text",
    "jsonb_array_length", "jsonb_build_array", "jsonb_build_object", "jsonb_concat", "jsonb_contained",
    "jsonb_contains", "jsonb_delete", "jsonb_delete_path", "jsonb_each", "jsonb_each_text", "jsonb_exists",
    "jsonb_exists_all", "jsonb_exists_any", "jsonb_extract_path", "jsonb_extract_path_text", "jsonb_insert",
    "jsonb_object", "jsonb_object_agg", "jsonb_object_agg_strict", "jsonb_object_agg_unique",
    "jsonb_object_agg_unique_strict", "jsonb_object_field", "jsonb_object_field_text", "jsonb_object_keys",
    "jsonb_path_exists", "jsonb_path_exists_tz", "jsonb_path_match", "jsonb_path_match_tz", "jsonb_path_query",
    "jsonb_path_query_array", "jsonb_path_query_array_tz", "jsonb_path_query_first", "jsonb_path_query_first_tz",
    "jsonb_path_query_tz", "jsonb_populate_record", "jsonb_populate_recordset", "jsonb_pretty", "jsonb_set",
    "jsonb_set_lax", "jsonb_strip_nulls", "jsonb_to_record", "jsonb_to_recordset", "jsonb_to_tsvector", "jsonb_typeof",
    "justify_days", "justify_hours", "justify_interval", "lag", "last_value", "lcm", "lead", "left", "length", "lgamma",
    "like", "like_escape", "line", "ln", "log", "log10", "lower", "lower_inc", "lower_inf", "lpad", "lseg", "ltrim",
    "macaddr", "macaddr8", "macaddr8_set7bit", "make_date", "make_interval", "make_time", "make_timestamp",
    "make_timestamptz", "makeaclitem", "masklen", "max", "md5", "min", "min_scale", "mod", "mode", "money",
    "multirange", "name", "netmask", "network", "normalize", "notlike", "now", "npoints", "nth_value", "ntile",
    "num_nonnulls", "num_nulls", "numeric", "nummultirange", "numnode", "numrange", "obj_description", "octet_length",
    "oid", "oidvectortypes", "overlaps", "overlay", "parse_ident", "path", "pclose", "percent_rank", "percentile_cont",
    "percentile_disc", "pg_basetype", "pg_char_to_encoding", "pg_collation_for", "pg_collation_is_visible",
    "pg_column_is_updatable", "pg_column_size", "pg_conversion_is_visible", "pg_describe_object",
    "pg_encoding_max_length", "pg_encoding_to_char", "pg_function_is_visible", "pg_get_acl", "pg_get_constraintdef",
    "pg_get_expr", "pg_get_function_arg_default", "pg_get_function_arguments", "pg_get_function_identity_arguments",
    "pg_get_function_result", "pg_get_function_sqlbody", "pg_get_functiondef", "pg_get_indexdef",
    "pg_get_object_address", "pg_get_partition_constraintdef", "pg_get_partkeydef", "pg_get_publication_tables",
    "pg_get_replica_identity_index", "pg_get_ruledef", "pg_get_serial_sequence", "pg_get_statisticsobjdef",
    "pg_get_statisticsobjdef_columns", "pg_get_statisticsobjdef_expressions", "pg_get_triggerdef", "pg_get_userbyid",
    "pg_get_viewdef", "pg_has_role", "pg_identify_object", "pg_identify_object_as_address",
    "pg_index_column_has_property", "pg_index_has_property", "pg_indexam_has_property", "pg_input_error_info",
    "pg_input_is_valid", "pg_lsn", "pg_opclass_is_visible", "pg_operator_is_visible", "pg_opfamily_is_visible",
    "pg_options_to_table", "pg_partition_root", "pg_relation_is_publishable", "pg_relation_is_updatable",
    "pg_sequence_parameters", "pg_size_bytes", "pg_size_pretty", "pg_statistics_obj_is_visible", "pg_table_is_visible",
    "pg_ts_config_is_visible", "pg_ts_dict_is_visible", "pg_ts_parser_is_visible", "pg_ts_template_is_visible",
    "pg_type_is_visible", "pg_typeof", "pg_wal_lsn_diff", "phraseto_tsquery", "pi", "plainto_tsquery", "point",
    "polygon", "popen", "position", "pow", "power", "querytree", "quote_ident", "quote_literal", "quote_nullable",
    "radians", "radius", "range_agg", "range_intersect_agg", "range_merge", "rank", "regclass", "regexp_count",
    "regexp_instr", "regexp_like", "regexp_match", "regexp_matches", "regexp_replace", "regexp_split_to_array",
    "regexp_split_to_table", "regexp_substr", "regr_avgx", "regr_avgy", "regr_count", "regr_intercept", "regr_r2",
    "regr_slope", "regr_sxx", "regr_sxy", "regr_syy", "repeat", "replace", "reverse", "right", "round", "row_number",
    "row_security_active", "row_to_json", "rpad", "rtrim", "scale", "session_user", "set_bit", "set_byte",
    "set_masklen", "setweight", "sha224", "sha256", "sha384", "sha512", "shobj_description", "sign", "similar_escape",
    "similar_to_escape", "sin", "sind", "sinh", "slope", "split_part", "sqrt", "starts_with", "statement_timestamp",
    "stddev", "stddev_pop", "stddev_samp", "string_agg", "string_to_array", "string_to_table", "strip", "strpos",
    "substr", "substring", "sum", "tan", "tand", "tanh", "text", "time", "timestamp", "timestamptz", "timetz",
    "timezone", "to_ascii", "to_bin", "to_char", "to_date", "to_hex", "to_json", "to_jsonb", "to_number", "to_oct",
    "to_regclass", "to_regcollation", "to_regnamespace", "to_regoper", "to_regoperator", "to_regproc",
    "to_regprocedure", "to_regrole", "to_regtype", "to_regtypemod", "to_timestamp", "to_tsquery", "to_tsvector",
    "transaction_timestamp", "translate", "trim_array", "trim_scale", "trunc", "ts_debug", "ts_delete", "ts_filter",
    "ts_headline", "ts_lexize", "ts_parse", "ts_rank", "ts_rank_cd", "ts_token_type", "tsmultirange", "tsquery_and",
    "tsquery_not", "tsquery_or", "tsquery_phrase", "tsrange", "tstzmultirange", "tstzrange", "tsvector_concat",
    "tsvector_to_array", "unicode_assigned", "unistr", "unnest", "upper", "upper_inc", "upper_inf",
    "uuid_extract_timestamp", "uuid_extract_version", "var_pop", "var_samp", "varbit", "varchar", "variance",
    "websearch_to_tsquery", "width", "width_bucket", "xid", "xid8", "xml", "xml_is_well_formed",
    "xml_is_well_formed_content", "xml_is_well_formed_document", "xmlagg", "xmlcomment", "xmlexists", "xmltext",
    "xpath", "xpath_exists",
];

/// Volatile ones that read, or do nothing at all.
#[rustfmt::skip]
const HARMLESS: [&str; 14] = [
    "array_sample", "array_shuffle", "clock_timestamp", "gen_random_uuid", "pg_partition_ancestors",
    "pg_partition_tree", "pg_sleep", "pg_sleep_for", "pg_sleep_until", "random", "random_normal", "timeofday", "uuidv4",
    "uuidv7",
];

/// Beginnings of the names of those that are not for a follower, and why; `pg_` aside, the server's own.
const BARRED: [(&str, RouteReason); 33] = [
    ("binary_upgrade_", RouteReason::Server),
    ("brin_", RouteReason::Write),
    ("connectby", RouteReason::Function),
    ("crosstab", RouteReason::Function),
    ("current_query", RouteReason::Server),
    ("current_setting", RouteReason::Server),
    ("currtid", RouteReason::Server),
    ("currval", RouteReason::Session),
    ("cursor_to_xml", RouteReason::Session),
    ("database_to_xml", RouteReason::Function),
    ("dblink", RouteReason::Function),
    ("gin_clean_pending_list", RouteReason::Write),
    ("icu_unicode_version", RouteReason::Server),
    ("inet_client_", RouteReason::Server),
    ("inet_server_", RouteReason::Server),
    ("lastval", RouteReason::Session),
    ("lo_", RouteReason::Write),
    ("loread", RouteReason::Write),
    ("lowrite", RouteReason::Write),
    ("nextval", RouteReason::Write),
    ("query_to_xml", RouteReason::Function),
    ("schema_to_xml", RouteReason::Function),
    ("set_config", RouteReason::Session),
    ("setseed", RouteReason::Session),
    ("setval", RouteReason::Write),
    ("system_user", RouteReason::Server),
    ("table_to_xml", RouteReason::Function),
    ("ts_rewrite", RouteReason::Function),
    ("ts_stat", RouteReason::Function),
    ("txid_", RouteReason::Server),
    ("unicode_version", RouteReason::Server),
    ("version", RouteReason::Server),
    ("xpath_table", RouteReason::Function),
];

/// Words that may stand in front of a parenthesis without being a function's name.
#[rustfmt::skip]
const SYNTAX: [&str; 134] = [
    "all", "and", "any", "array", "as", "asc", "assert", "between", "bit", "by", "case", "cast", "char", "character",
    "coalesce", "columns", "cube", "current_time", "current_timestamp", "dec", "decimal", "default", "distinct", "else",
    "elseif", "elsif", "except", "exists", "exit", "extract", "filter", "float", "for", "from", "full", "greatest",
    "group", "grouping", "having", "if", "ilike", "in", "inner", "intersect", "interval", "into", "is", "join",
    "json_array", "json_arrayagg", "json_exists", "json_object", "json_objectagg", "json_query", "json_scalar",
    "json_serialize", "json_table", "json_value", "lateral", "least", "left", "like", "limit", "localtime",
    "localtimestamp", "loop", "materialized", "natural", "nchar", "next", "normalize", "not", "nullif", "numeric",
    "offset", "on", "operator", "or", "order", "outer", "over", "overlay", "partition", "path", "perform", "position",
    "precision", "query", "raise", "recursive", "return", "returning", "reverse", "right", "rollup", "row", "rows",
    "select", "sets", "similar", "some", "strict", "substring", "symmetric", "table", "then", "time", "timestamp", "to",
    "treat", "trim", "union", "using", "values", "varchar", "variadic", "varying", "when", "where", "while", "with",
    "within", "without", "xmlattributes", "xmlconcat", "xmlelement", "xmlforest", "xmlnamespaces", "xmlparse", "xmlpi",
    "xmlroot", "xmlserialize", "xmltable", "zone",
];

/// Whether every built-in function of this name reads the data, or reads nothing.
pub(super) fn reads(function: &str) -> bool {
    READS.binary_search(&function).is_ok() || HARMLESS.binary_search(&function).is_ok()
}

/// Why a function of this name is not for a follower, if there is a built-in one that is not.
pub(super) fn bars(function: &str) -> Option<RouteReason> {
    if let Some(rest) = function.strip_prefix("pg_") {
        return match rest {
            _ if reads(function) => None,
            _ if rest.contains("advisory") => Some(RouteReason::Lock),
            "notify" | "current_xact_id" => Some(RouteReason::Write),
            _ => Some(RouteReason::Server),
        };
    }
    BARRED.iter().find(|(name, _)| function.starts_with(name)).map(|(_, why)| *why)
}

/// Whether the relation of this name in `pg_catalog` is data like any other.
pub(super) fn is_catalog(relation: &str) -> bool {
    CATALOGS.binary_search(&relation).is_ok()
}

/// Whether the word, in lower case, may stand in front of a parenthesis by the grammar of SQL or PL/pgSQL.
pub(super) fn is_syntax(word: &str) -> bool {
    SYNTAX.binary_search(&word).is_ok()
}

/// That the lists are what the look-ups take them for.
#[cfg(test)]
pub(super) fn check() {
    for list in [&READS[..], &HARMLESS, &CATALOGS, &SYNTAX] {
        assert!(list.is_sorted_by(|one, next| one < next), "{list:?}");
    }
    for name in READS.iter().chain(&HARMLESS).chain(&SYNTAX) {
        assert_eq!(bars(name), None, "{name}");
    }
    for name in HARMLESS {
        assert!(super::ROUTES.contains(&format!("'{name}'")), "{name}: it is not barred in a view either");
        assert!(!READS.contains(&name), "{name}");
    }
}
