//! What a client's settings must be: Postgres' own rules for SET, SET LOCAL, RESET, transactions and savepoints.
//!
//! Source: `PostgreSQL` 17 docs, SET, "Notes".

use std::collections::BTreeMap;

use crate::stage::Dice;
use crate::support::Place;

/// Schemas, each with a table `place` whose only row is the schema's name.
pub(crate) const SCHEMAS: [&str; 6] = ["public", "north", "south", "east", "west", "Up \"there\""];

/// Roles that the play's role may turn into.
pub(crate) fn roles(name: &str) -> [String; 3] {
    [format!("{name}_reader"), format!("{name}_writer"), format!("{name}_owner")]
}

/// A setting that clients change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Setting {
    ApplicationName,
    TimeZone,
    SearchPath,
    StatementTimeout,
    WorkMem,
    DateStyle,
    /// One that applications make up, as for row security.
    Tenant,
    Role,
}

impl Setting {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::ApplicationName,
        Self::TimeZone,
        Self::SearchPath,
        Self::StatementTimeout,
        Self::WorkMem,
        Self::DateStyle,
        Self::Tenant,
        Self::Role,
    ];

    /// Its name in SQL.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::ApplicationName => "application_name",
            Self::TimeZone => "TimeZone",
            Self::SearchPath => "search_path",
            Self::StatementTimeout => "statement_timeout",
            Self::WorkMem => "work_mem",
            Self::DateStyle => "DateStyle",
            Self::Tenant => "app.tenant",
            Self::Role => "role",
        }
    }

    /// Whether the server reports changes of it. Source: `PostgreSQL` 17 docs, §53.2.7.
    pub(crate) fn is_reported(self) -> bool {
        matches!(self, Self::ApplicationName | Self::TimeZone | Self::DateStyle)
    }

    /// Whether a startup message may carry it in a play. (Postgres takes a role, too, but applies it as a default.)
    pub(crate) fn is_for_startup(self) -> bool {
        self != Self::Role
    }

    /// Whether RESET ALL resets it. Source: `guc_tables.c`, `GUC_NO_RESET_ALL`.
    pub(crate) fn is_reset_by_all(self) -> bool {
        self != Self::Role
    }

    /// A value for a client, as the server prints it.
    pub(crate) fn value(self, play: &str, client: usize, dice: &mut Dice) -> String {
        match self {
            Self::ApplicationName => format!("c{client}-{}z", dice.below(1000)),
            Self::TimeZone => (*dice.pick(&["UTC", "Asia/Tokyo", "America/St_Johns", "Etc/GMT-7"])).to_owned(),
            Self::SearchPath => {
                let schema = *dice.pick(&SCHEMAS);
                if schema.contains(' ') { r#""Up ""there""""#.to_owned() } else { schema.to_owned() }
            }
            Self::StatementTimeout => format!("{}s", 61 + dice.below(58)),
            Self::WorkMem => format!("{}kB", 1025 + dice.below(900)),
            Self::DateStyle => (*dice.pick(&["ISO, DMY", "German, DMY", "SQL, MDY", "ISO, YMD"])).to_owned(),
            Self::Tenant => format!("tenant of c{client}: it's {}", dice.below(1000)),
            Self::Role => roles(play)[dice.index(3)].clone(),
        }
    }

    /// SQL that sets it for the session, or for the transaction.
    pub(crate) fn set(self, value: &str, local: bool, dice: &mut Dice) -> String {
        let literal = format!("'{}'", value.replace('\'', "''"));
        let scope = if local { "LOCAL " } else { *dice.pick(&["", "SESSION ", ""]) };
        match self {
            Self::Role => format!("SET {scope}ROLE {value}"),
            // A list, whose elements are quoted where needed.
            Self::SearchPath => format!("SET {scope}search_path TO {value}"),
            Self::DateStyle => format!("SET {scope}datestyle = {literal}"),
            Self::TimeZone if dice.once_in(3) => format!("SET {scope}TIME ZONE {literal}"),
            _ if dice.once_in(4) => format!("SELECT set_config('{}', {literal}, {local})", self.name()),
            _ => format!("SET {scope}{} {} {literal}", self.name(), dice.pick(&["=", "TO", "to"])),
        }
    }

    /// SQL that resets it.
    pub(crate) fn reset(self, dice: &mut Dice) -> String {
        match self {
            Self::Role => (*dice.pick(&["RESET ROLE", "SET ROLE NONE"])).to_owned(),
            _ if dice.once_in(2) => format!("RESET {}", self.name()),
            _ => format!("SET {} TO DEFAULT", self.name()),
        }
    }

    /// An expression with its value, the empty text for none.
    pub(crate) fn expression(self) -> String {
        format!("coalesce(current_setting('{}', true), '')", self.name())
    }

    /// The server's own value for the place's role.
    pub(crate) fn default_at(self, place: &Place<'_>) -> String {
        match self {
            Self::ApplicationName => String::new(),
            _ => place.psql(&format!("SELECT {}", self.expression())),
        }
    }
}

type Values = BTreeMap<Setting, String>;

/// The settings of one client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// At login; what RESET goes back to.
    start: Values,
    /// Of the session.
    session: Values,
    /// Of the transaction alone.
    local: Values,
    /// `session` and `local` as they were at BEGIN and at each savepoint since.
    before: Vec<(Values, Values)>,
}

impl Model {
    /// After login with these values.
    pub(crate) fn at_login(values: Values) -> Self {
        Self { session: values.clone(), start: values, ..Self::default() }
    }

    /// The value in force.
    pub(crate) fn value(&self, setting: Setting) -> &str {
        self.local.get(&setting).or_else(|| self.session.get(&setting)).map_or("", String::as_str)
    }

    /// The schema that unqualified names are looked up in.
    pub(crate) fn schema(&self) -> &str {
        match self.value(Setting::SearchPath) {
            r#""$user", public"# => "public",
            r#""Up ""there""""# => r#"Up "there""#,
            other => other,
        }
    }

    /// SET or SET LOCAL.
    pub(crate) fn set(&mut self, setting: Setting, value: String, local: bool) {
        if local {
            // Without a transaction it has no effect.
            if !self.before.is_empty() {
                self.local.insert(setting, value);
            }
        } else {
            self.local.remove(&setting);
            self.session.insert(setting, value);
        }
    }

    /// RESET.
    pub(crate) fn reset(&mut self, setting: Setting) {
        let value = self.start.get(&setting).cloned().unwrap_or_default();
        self.set(setting, value, false);
    }

    /// RESET ALL, or DISCARD ALL with `everything`.
    pub(crate) fn reset_all(&mut self, everything: bool) {
        for setting in Setting::ALL {
            if everything || setting.is_reset_by_all() {
                self.reset(setting);
            }
        }
    }

    /// BEGIN or SAVEPOINT.
    pub(crate) fn mark(&mut self) {
        self.before.push((self.session.clone(), self.local.clone()));
    }

    /// ROLLBACK TO the last savepoint, which stays.
    pub(crate) fn back_to_mark(&mut self) {
        if let Some((session, local)) = self.before.last().cloned() {
            (self.session, self.local) = (session, local);
        }
    }

    /// COMMIT.
    pub(crate) fn commit(&mut self) {
        self.before.clear();
        self.local.clear();
    }

    /// ROLLBACK, or COMMIT of a failed transaction.
    pub(crate) fn rollback(&mut self) {
        if let Some((session, _)) = self.before.drain(..).next() {
            self.session = session;
        }
        self.local.clear();
    }
}

#[test]
fn a_rollback_takes_back_what_its_transaction_set() {
    let zone = Setting::TimeZone;
    let mut model = Model::at_login(BTreeMap::from([(zone, "UTC".to_owned())]));
    model.mark();
    model.set(zone, "Asia/Tokyo".into(), false);
    model.mark();
    model.set(zone, "Etc/GMT-7".into(), true);
    assert_eq!(model.value(zone), "Etc/GMT-7");
    model.back_to_mark();
    assert_eq!(model.value(zone), "Asia/Tokyo");
    model.rollback();
    assert_eq!(model.value(zone), "UTC");
}
