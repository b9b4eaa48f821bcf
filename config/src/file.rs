//! The TOML file.

use std::sync::Arc;

use toml::de::{DeInteger, DeTable, DeValue};

use crate::draft::{Draft, nearest};
use crate::fault::Problem;
use crate::origin::Origin;
use crate::settings::{self, GROUPS};
use crate::typed::Raw;

/// Reads the text of the file at `path` into `draft`.
pub(crate) fn read(draft: &mut Draft, path: &str, text: &str) {
    let lines = Lines::new(path, text);
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let origin = lines.origin(error.span().map_or(0, |span| span.start));
        let message = error.message().to_owned();
        draft.blind_fault("file", Some(origin), Problem::Syntax { message });
    }
    for (key, value) in table.get_ref() {
        let origin = lines.origin(key.span().start);
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("databases", DeValue::Table(table)) => read_databases(draft, &lines, table),
            ("users", DeValue::Table(table)) => read_users(draft, &lines, table),
            (name, value) => read_group(draft, &lines, name, value, &origin),
        }
    }
}

fn read_group(draft: &mut Draft, lines: &Lines, name: &str, value: &DeValue<'_>, origin: &Origin) {
    let group = GROUPS.iter().find(|group| group.name == name);
    let known = group.is_some() || matches!(name, "databases" | "users");
    match value {
        DeValue::Table(table) => match group {
            Some(group) => read_settings(draft, lines, group.name, table),
            None => unknown_group(draft, name, origin),
        },
        other if known => {
            let found = raw(other).noun();
            draft.fault(name, origin, Problem::NotATable { found });
        }
        _ => match settings::find(name) {
            Some(setting) => {
                draft.fault(name, origin, Problem::WrongGroup { group: setting.group });
            }
            None => draft.unknown(name, name, origin, &[], str::to_owned),
        },
    }
}

fn unknown_group(draft: &mut Draft, name: &str, origin: &Origin) {
    let names = GROUPS.iter().map(|group| group.name).chain(["databases", "users"]);
    let nearest = nearest(name, names).to_owned();
    draft.fault(format!("[{name}]"), origin, Problem::Unknown { what: "group", nearest });
}

fn read_settings(draft: &mut Draft, lines: &Lines, group: &str, table: &DeTable<'_>) {
    for (key, value) in table {
        let (name, origin) = (key.get_ref().as_ref(), lines.origin(key.span().start));
        match settings::find(name) {
            Some(setting) if setting.group == group => {
                draft.set(setting, &raw(value.get_ref()), &origin);
            }
            Some(setting) => {
                draft.fault(name, &origin, Problem::WrongGroup { group: setting.group });
            }
            None => draft.unknown(name, name, &origin, &[], str::to_owned),
        }
    }
}

fn read_databases(draft: &mut Draft, lines: &Lines, table: &DeTable<'_>) {
    for (key, value) in table {
        let (name, origin) = (key.get_ref().as_ref(), lines.origin(key.span().start));
        match value.get_ref() {
            DeValue::String(url) => draft.set_database_url(name, url, &origin),
            DeValue::Table(keys) => {
                if draft.open_database(name, &origin) {
                    for (key, value) in keys {
                        let origin = lines.origin(key.span().start);
                        draft.set_database_key(name, key.get_ref(), &raw(value.get_ref()), &origin);
                    }
                }
            }
            other => {
                let found = raw(other).noun();
                draft.fault(format!("databases.{name}"), &origin, Problem::NotATable { found });
            }
        }
    }
}

fn read_users(draft: &mut Draft, lines: &Lines, table: &DeTable<'_>) {
    for (key, value) in table {
        let (name, origin) = (key.get_ref().as_ref(), lines.origin(key.span().start));
        match value.get_ref() {
            DeValue::Table(keys) => {
                if draft.open_user(name, &origin) {
                    for (key, value) in keys {
                        let origin = lines.origin(key.span().start);
                        draft.set_user_key(name, key.get_ref(), &raw(value.get_ref()), &origin);
                    }
                }
            }
            other => {
                let found = raw(other).noun();
                draft.fault(format!("users.{name}"), &origin, Problem::NotATable { found });
            }
        }
    }
}

fn raw<'a>(value: &'a DeValue<'_>) -> Raw<'a> {
    match value {
        DeValue::String(text) => Raw::Text(text),
        DeValue::Integer(number) => Raw::Integer(integer(number)),
        DeValue::Float(number) => number.as_str().parse().map_or(Raw::Other("a float"), Raw::Float),
        DeValue::Boolean(flag) => Raw::Bool(*flag),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Array(_) => Raw::Other("a list"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}

fn integer(number: &DeInteger<'_>) -> i128 {
    let text = number.as_str();
    let end = if text.starts_with('-') { i128::MIN } else { i128::MAX };
    i128::from_str_radix(text, number.radix()).unwrap_or(end)
}

/// Where each line of the text begins, so that a byte's line is found without reading the text again.
struct Lines {
    path: Arc<str>,
    ends: Vec<usize>,
}

impl Lines {
    fn new(path: &str, text: &str) -> Self {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Self { path: path.into(), ends: ends.map(|(at, _)| at).collect() }
    }

    fn origin(&self, at: usize) -> Origin {
        let line = self.ends.partition_point(|end| *end < at).saturating_add(1);
        Origin::File { path: Arc::clone(&self.path), line }
    }
}
