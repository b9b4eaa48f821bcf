//! Facts from the grammar of the Postgres server itself, the crate `pg_query`.
//!
//! The tree is walked as a value of names and fields, whatever its nodes are: a kind of node that is new in the grammar is
//! walked like the others, and a statement of a kind that is not known here writes.

#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

use super::effects::EffectSet;
use super::facts::{Aside, Call, Facts, Relation, Source};
use super::fingerprint::Literal;
use super::head::is_role;

/// `backslash_quote` and the like are of no interest; this is `standard_conforming_strings = off`.
const ESCAPES: i32 = 32;

/// Nodes that are walked of one text, at most: with more it is not known.
const NODES_MAX: usize = 200_000;

/// The facts of `text`; none if the grammar refuses it, or it is too deep or too large to be walked. `literals` are those
/// of its fingerprint. Takes microseconds to milliseconds.
pub(super) fn facts(text: &[u8], escapes: bool, literals: &[Literal]) -> Option<Facts> {
    let text = std::str::from_utf8(text).ok()?;
    let parsed = pg_query::parse(text, if escapes { ESCAPES } else { 0 }).ok()?;
    let tree = serde_json::to_value(&parsed.protobuf).ok()?;
    let mut walk = Walk {
        literals,
        facts: Facts::default(),
        calls: Vec::new(),
        relations: Vec::new(),
        expressions: Vec::new(),
        nodes: 0,
    };
    let (mut operators, mut types) = (Vec::new(), Vec::new());
    for statement in tree.get("stmts").and_then(Value::as_array).into_iter().flatten() {
        let Some((name, node)) = statement.get("stmt").and_then(named) else { continue };
        walk.facts.statements += 1;
        let writes = walk.statement(name, node);
        walk.fields(name, node, writes, &mut operators, &mut types);
    }
    if walk.nodes > NODES_MAX {
        return None;
    }
    if walk.facts.statements > 1 {
        walk.facts.set |= EffectSet::MULTI;
    }
    let mut facts = walk.facts;
    facts.calls = walk.calls.into();
    facts.relations = walk.relations.into();
    facts.expressions = walk.expressions.into();
    facts.operators = operators.into();
    facts.types = types.into();
    Some(facts)
}

/// The kind and the fields of a node.
fn named(node: &Value) -> Option<(&str, &Map<String, Value>)> {
    let (name, fields) = node.get("node")?.as_object()?.iter().next()?;
    Some((name, fields.as_object()?))
}

fn text<'a>(node: &'a Map<String, Value>, field: &str) -> &'a str {
    node.get(field).and_then(Value::as_str).unwrap_or_default()
}

fn number(node: &Map<String, Value>, field: &str) -> i64 {
    node.get(field).and_then(Value::as_i64).unwrap_or_default()
}

fn flag(node: &Map<String, Value>, field: &str) -> bool {
    node.get(field).and_then(Value::as_bool).unwrap_or_default()
}

fn list<'a>(node: &'a Map<String, Value>, field: &str) -> impl Iterator<Item = &'a Value> {
    node.get(field).and_then(Value::as_array).into_iter().flatten()
}

/// The parts of a qualified name.
fn parts<'a>(node: &'a Map<String, Value>, field: &str) -> Vec<&'a str> {
    let part = |node: &'a Value| named(node).map_or("", |(_, string)| text(string, "sval"));
    list(node, field).map(part).collect()
}

struct Walk<'a> {
    literals: &'a [Literal],
    facts: Facts,
    calls: Vec<Call>,
    relations: Vec<Relation>,
    expressions: Vec<Box<str>>,
    nodes: usize,
}

impl Walk<'_> {
    /// A statement that runs: at the top, or inside of one that runs it. Whether it writes what it names.
    fn statement(&mut self, name: &str, node: &Map<String, Value>) -> bool {
        let inner = |field: &str| node.get(field).and_then(named);
        let (set, writes) = match name {
            "VariableSetStmt" => (variable_set(node), false),
            "TransactionStmt" => (transaction(node), false),
            "PrepareStmt" => (EffectSet::PREPARE, false),
            "ExecuteStmt" => (EffectSet::EXECUTE | EffectSet::OPAQUE, true),
            "DeallocateStmt" if text(node, "name").is_empty() => {
                (EffectSet::DEALLOCATE | EffectSet::DEALLOCATE_ALL, false)
            }
            "DeallocateStmt" => (EffectSet::DEALLOCATE, false),
            "DiscardStmt" if number(node, "target") == 1 => {
                (EffectSet::DISCARD | EffectSet::DISCARD_ALL | EffectSet::SETTINGS | EffectSet::ROLE, false)
            }
            "DiscardStmt" => (EffectSet::DISCARD, false),
            "ListenStmt" => (EffectSet::LISTEN, false),
            "UnlistenStmt" => (EffectSet::UNLISTEN, false),
            "LockStmt" => {
                self.facts.locks = true;
                (EffectSet::NONE, true)
            }
            "DeclareCursorStmt" if number(node, "options") & 0x20 != 0 => (EffectSet::HOLD_CURSOR, false),
            "ClosePortalStmt" if text(node, "portalname").is_empty() => (EffectSet::CLOSE_ALL, false),
            "LoadStmt" => (EffectSet::LOAD, true),
            "CopyStmt" => {
                let file = flag(node, "is_program") || !text(node, "filename").is_empty();
                (EffectSet::COPY, flag(node, "is_from") || file)
            }
            "DoStmt" | "CallStmt" => (EffectSet::OPAQUE, true),
            "ExplainStmt" => {
                let (name, query) = inner("query").unwrap_or(("", node));
                // What is only planned does nothing; but an option may have any value, and a plan may call functions.
                (EffectSet::NONE, !name.is_empty() && self.statement(name, query))
            }
            "CreateTableAsStmt" => {
                if let Some(("ExecuteStmt", _)) = inner("query") {
                    self.facts.set |= EffectSet::EXECUTE | EffectSet::OPAQUE;
                }
                (EffectSet::DDL, true)
            }
            "SelectStmt" | "VariableShowStmt" | "FetchStmt" | "ConstraintsSetStmt" | "DeclareCursorStmt"
            | "ClosePortalStmt" => (EffectSet::NONE, false),
            "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt" | "NotifyStmt" | "CheckPointStmt"
            | "VacuumStmt" | "ClusterStmt" | "ReindexStmt" => (EffectSet::NONE, true),
            _ => (EffectSet::DDL, true),
        };
        self.facts.set |= set;
        self.facts.writes |= writes;
        self.facts.aside = self.facts.aside.or(aside(name, node));
        writes
    }

    /// Everything in a node of the kind `name`. `written`: the tables that it names are.
    fn fields(
        &mut self,
        name: &str,
        node: &Map<String, Value>,
        written: bool,
        operators: &mut Vec<Box<str>>,
        types: &mut Vec<Box<str>>,
    ) {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return;
        }
        // A node of a known kind stands under its field's name alone: it is told by its own fields.
        let has = |field: &str| node.contains_key(field);
        if has("relname") && has("relpersistence") {
            self.relation(node, written);
        } else if has("funcname") && has("agg_star") {
            self.call(node);
        } else if has("names") && has("typmods") {
            add(types, parts(node, "names").last().copied());
        }
        match name {
            "SelectStmt" => {
                self.facts.locks |= list(node, "locking_clause").next().is_some();
                self.facts.writes |= node.get("into_clause").is_some_and(|into| !into.is_null());
            }
            "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt" => self.facts.writes = true,
            "CommonTableExpr" => add(&mut self.expressions, Some(text(node, "ctename"))),
            "AExpr" => add(operators, parts(node, "name").last().copied()),
            "SubLink" => add(operators, parts(node, "oper_name").last().copied()),
            "SortBy" => add(operators, parts(node, "use_op").last().copied()),
            // `row.name` and `(row).name` may be a function of the row.
            "ColumnRef" if list(node, "fields").nth(1).is_some() => self.attribute(parts(node, "fields").last()),
            "AIndirection" => {
                for name in parts(node, "indirection") {
                    self.attribute(Some(&name));
                }
            }
            _ => {}
        }
        let dml = matches!(name, "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt");
        for (field, value) in node {
            // Of a statement that changes data, only its target is written; what an INTO names, always is.
            let written = match (dml, &**field) {
                (true, "relation") | (_, "into_clause") => true,
                (true, _) => false,
                (false, _) => written,
            };
            self.value(value, written, operators, types);
        }
    }

    fn value(&mut self, value: &Value, written: bool, operators: &mut Vec<Box<str>>, types: &mut Vec<Box<str>>) {
        match value {
            Value::Array(values) => values.iter().for_each(|value| self.value(value, written, operators, types)),
            Value::Object(node) => match named(value) {
                // A query inside a statement reads, unless it is told otherwise.
                Some((name @ "SelectStmt", node)) => self.fields(name, node, false, operators, types),
                Some((name, node)) => self.fields(name, node, written, operators, types),
                None if node.contains_key("target_list") && node.contains_key("into_clause") => {
                    self.fields("SelectStmt", node, false, operators, types);
                }
                None => self.fields("", node, written, operators, types),
            },
            _ => {}
        }
    }

    fn relation(&mut self, node: &Map<String, Value>, written: bool) {
        let (schema, name) = (text(node, "schemaname"), text(node, "relname"));
        if text(node, "relpersistence") == "t" || written && schema.starts_with("pg_temp") {
            self.facts.set |= EffectSet::TEMP;
        }
        let relation = Relation { schema: schema.into(), name: name.into(), written };
        if !self.relations.contains(&relation) {
            self.relations.push(relation);
        }
    }

    fn call(&mut self, node: &Map<String, Value>) {
        let path = parts(node, "funcname");
        let Some((name, schema)) = path.split_last() else { return };
        let arguments = if Call::keeps_arguments(name) {
            list(node, "args").map(|argument| self.source(argument)).collect()
        } else {
            Box::default()
        };
        let schema = schema.last().copied().unwrap_or_default().into();
        self.add(Call { schema, name: (*name).into(), arguments, column: false });
    }

    fn attribute(&mut self, name: Option<&&str>) {
        // Those whose effect is known take no row.
        if let Some(name) = name.filter(|name| !name.is_empty() && !Call::has_holes(name)) {
            let (schema, arguments) = (Box::default(), Box::default());
            self.add(Call { schema, name: (**name).into(), arguments, column: true });
        }
    }

    fn add(&mut self, call: Call) {
        if !self.calls.contains(&call) {
            self.calls.push(call);
        }
    }

    /// Where an argument's value comes from; a cast does not hide it.
    fn source(&self, argument: &Value) -> Source {
        match named(argument) {
            Some(("TypeCast", cast)) => cast.get("arg").map_or(Source::Unreadable, |inner| self.source(inner)),
            Some(("ParamRef", parameter)) => {
                u32::try_from(number(parameter, "number")).map_or(Source::Unreadable, Source::Parameter)
            }
            Some(("AConst", constant)) => {
                let at = usize::try_from(number(constant, "location")).ok();
                let literal = self.literals.iter().position(|literal| Some(literal.start) == at);
                literal.map_or(Source::Unreadable, Source::Literal)
            }
            _ => Source::Unreadable,
        }
    }
}

fn add(names: &mut Vec<Box<str>>, name: Option<&str>) {
    if let Some(name) = name.filter(|name| !name.is_empty() && !names.iter().any(|known| **known == **name)) {
        names.push(name.into());
    }
}

/// `VAR_SET_MULTI` in the protobuf's numbering.
const MULTI: i64 = 4;

/// What a statement is about that has no effect and writes nothing, and yet is no query.
fn aside(name: &str, node: &Map<String, Value>) -> Option<Aside> {
    match name {
        "VariableShowStmt" => Some(Aside::Server),
        "VariableSetStmt" if number(node, "kind") == MULTI => Some(Aside::Session),
        "ConstraintsSetStmt" | "DeclareCursorStmt" | "FetchStmt" | "ClosePortalStmt" => Some(Aside::Session),
        _ => None,
    }
}

/// `SET` and `RESET`.
fn variable_set(node: &Map<String, Value>) -> EffectSet {
    let name = text(node, "name");
    if number(node, "kind") == MULTI && name != "SESSION CHARACTERISTICS" {
        return EffectSet::NONE;
    }
    if flag(node, "is_local") {
        EffectSet::LOCAL
    } else if is_role(name.as_bytes()) {
        EffectSet::SETTINGS | EffectSet::ROLE
    } else if name.contains('.') {
        EffectSet::SETTINGS | EffectSet::CUSTOM
    } else {
        EffectSet::SETTINGS
    }
}

fn transaction(node: &Map<String, Value>) -> EffectSet {
    let chain = if flag(node, "chain") { EffectSet::BEGIN } else { EffectSet::NONE };
    match number(node, "kind") {
        1 | 2 => EffectSet::BEGIN,
        3 => EffectSet::COMMIT | chain,
        4 => EffectSet::ROLLBACK | chain,
        5 | 6 => EffectSet::SAVEPOINT,
        7 => EffectSet::ROLLBACK_TO,
        8 | 9 => EffectSet::COMMIT,
        _ => EffectSet::ROLLBACK,
    }
}
