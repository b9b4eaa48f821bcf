//! The second stage: a text read token by token, statement by statement.

use std::borrow::Cow;

use super::bound::{Bound, Value};
use super::effects::EffectSet;
use super::frozen::is_frozen;
use super::head::{FirstWord, Head, is_role, is_seed};
use super::lexer::{Backslash, Doubt, Lexer, Token};
use super::names::{Naming, name};

/// What one way of reading a text has found.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub(super) struct Reading {
    /// Everything that any of the statements may do.
    pub(super) set: EffectSet,
    /// The command word of the first non-empty statement.
    pub(super) first: FirstWord,
    /// Whether there is more to fear than `set` tells.
    pub(super) doubt: Doubt,
    /// Whether a call of `set_config` makes a text mean something else until the end of the transaction, or may.
    pub(super) means_else: bool,
    /// A call of `set_config` takes its names from `pg_settings`. (In a function a variable may have the name of the column.)
    pub(super) lists: bool,
    /// A call of `set_config` may reset a setting, by a parameter that is NULL.
    pub(super) resets: bool,
    /// What a call of `set_config` sets until the end of the transaction is in parameters, whose values are not here.
    pub(super) by_values: bool,
    /// It is not to be known.
    pub(super) is_made: bool,
}

/// Reads `text`; adds to `names` each custom setting it sets for the session, if asked to.
pub(super) fn read<'a>(text: &'a [u8], backslash: Backslash, names: Option<&mut Vec<Cow<'a, str>>>) -> Reading {
    read_with(text, backslash, None, names, None)
}

/// The same, with the values of the parameters: what `set_config` is called with is read as if they stood in the text.
pub(super) fn read_bound<'a>(
    text: &'a [u8],
    backslash: Backslash,
    bound: Option<&'a Bound<'a>>,
    names: Option<&mut Vec<Cow<'a, str>>>,
) -> Reading {
    read_with(text, backslash, bound, names, None)
}

/// Reads `text`; adds to `prepared` what it does to prepared statements by their names, in its order.
pub(super) fn read_prepared(text: &[u8], backslash: Backslash, prepared: &mut Vec<Naming>) -> Reading {
    read_with(text, backslash, None, None, Some(prepared))
}

fn read_with<'a>(
    text: &'a [u8],
    backslash: Backslash,
    bound: Option<&'a Bound<'a>>,
    names: Option<&mut Vec<Cow<'a, str>>>,
    prepared: Option<&mut Vec<Naming>>,
) -> Reading {
    let mut reader = Reader { reading: Reading::default(), bound, names, prepared, statement: None, seen: false };
    let mut lexer = Lexer::new(text, backslash);
    loop {
        let here = lexer;
        let Some(token) = lexer.token() else { break };
        reader.token(token, here);
    }
    reader.finish(lexer.doubt())
}

/// The state between two tokens of a text.
struct Reader<'a, 'n> {
    reading: Reading,
    bound: Option<&'a Bound<'a>>,
    names: Option<&'n mut Vec<Cow<'a, str>>>,
    prepared: Option<&'n mut Vec<Naming>>,
    statement: Option<Statement<'a>>,
    /// Whether a statement came before this one.
    seen: bool,
}

/// The state between two tokens of a statement.
struct Statement<'a> {
    /// Where it begins.
    start: Lexer<'a>,
    /// Whether it reads `pg_settings` and nothing else, once that was asked.
    lists: Option<bool>,
    command: FirstWord,
    routine: bool,
    /// Parentheses open.
    depth: u32,
    /// Open `BEGIN ATOMIC` and the `CASE`s in it: semicolons do not end the statement.
    blocks: u32,
    last: Last,
    /// The function that the last token names.
    callee: Option<Callee>,
    /// The call of `set_config` whose arguments are being read.
    call: Option<SetConfig<'a>>,
}

/// The last token, as far as it matters to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    /// None: the statement begins.
    Start,
    /// An opening parenthesis, behind which another may begin.
    Open,
    /// `INSERT`, `MERGE`: the `INTO` that follows names a table that exists.
    Insert,
    /// Any other `INTO`, perhaps with `LOCAL` or `GLOBAL`: a table is created.
    Into,
    As,
    Begin,
    Dot,
    Other,
}

#[derive(Clone, Copy)]
enum Callee {
    SetConfig,
    Does(EffectSet),
}

/// A call of `set_config(name, value, is_local)` as far as it has been read.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
struct SetConfig<'a> {
    /// Parentheses open inside it, its own included.
    depth: u32,
    /// The argument being read, from 0.
    argument: u32,
    name: Argument<Cow<'a, [u8]>>,
    /// Whether the change is local.
    local: Argument<()>,
    /// The value may be NULL.
    resets: bool,
    /// The value names the schema of temporary objects, or may.
    temp: bool,
    /// It may, too: it is no literal and no parameter.
    is_made: bool,
    /// It is a parameter's, which is not here.
    by_value: bool,
    /// A parameter tells whether the change is local.
    is_bound: bool,
}

/// An argument that is of use only as a literal, or the value of a parameter.
enum Argument<T> {
    Missing,
    Literal(T),
    /// A parameter whose value is not here.
    Parameter,
    /// A custom setting's name, of which the beginning is a literal.
    Custom,
    /// What `pg_settings` calls the names of settings.
    Column,
    Unreadable,
}

impl<'a> Reader<'a, '_> {
    /// Takes the next token; `here` stands before it.
    fn token(&mut self, token: Token<'a>, here: Lexer<'a>) {
        let Some(statement) = self.statement.take() else {
            if token != Token::Mark(b';') {
                let statement = self.begin(here);
                self.inside(statement, token, here);
            }
            return;
        };
        if token == Token::Mark(b';') && statement.depth == 0 && statement.blocks == 0 {
            self.seen = true;
            return;
        }
        if let Some(prepared) = &mut self.prepared
            && statement.is_execute(token)
        {
            let mut behind = here;
            behind.token();
            prepared.push(Naming::Executes(name(&mut behind)));
        }
        self.inside(statement, token, here);
    }

    /// A statement begins.
    fn begin(&mut self, here: Lexer<'a>) -> Statement<'a> {
        let head = Head::read(here);
        if self.seen {
            self.reading.set |= EffectSet::MULTI;
        } else {
            self.reading.first = head.first;
        }
        self.reading.set |= head.set;
        if let Some(prepared) = &mut self.prepared {
            prepared.extend(Naming::of(here));
        }
        if let Some(name) = head.custom {
            self.custom(name.is_spelled(), || name.spell());
        }
        Statement {
            start: here,
            lists: None,
            command: head.command,
            routine: head.routine,
            depth: 0,
            blocks: 0,
            last: Last::Start,
            callee: None,
            call: None,
        }
    }

    /// A token inside `statement`, which goes on after it; `here` stands before it.
    fn inside(&mut self, mut statement: Statement<'a>, token: Token<'a>, here: Lexer<'a>) {
        let callee = statement.callee.take();
        let last = std::mem::replace(&mut statement.last, Last::Other);
        if let Some(call) = &mut statement.call {
            call.token(token, here, statement.depth, self.bound);
        }
        match token {
            Token::Word(word) => {
                self.reading.set |= statement.word(word, last) | statement.name(word, last);
            }
            Token::Quoted(name) => self.reading.set |= statement.name(name, last),
            Token::Escaped => self.reading.set |= EffectSet::OPAQUE,
            Token::Text { body, .. } => {
                let value = statement.command == FirstWord::Set || statement.call.is_some();
                if value && names_temp_schema(body) {
                    self.reading.set |= EffectSet::TEMP;
                }
            }
            Token::Mark(b'(') => {
                statement.depth += 1;
                statement.last = Last::Open;
                match callee {
                    Some(Callee::Does(set)) => self.reading.set |= set,
                    Some(Callee::SetConfig) => {
                        // A call among the arguments of another would need a stack; nobody writes it.
                        let outer = statement.call.replace(SetConfig::open(statement.depth));
                        self.reading.set |= outer.map_or(EffectSet::NONE, |_| SetConfig::UNREAD);
                    }
                    None => {}
                }
            }
            Token::Mark(b')') => {
                if let Some(call) = statement.call.take_if(|call| call.depth == statement.depth) {
                    self.set_config(call, &mut statement);
                }
                statement.depth = statement.depth.saturating_sub(1);
            }
            Token::Mark(b'.') => statement.last = Last::Dot,
            Token::Mark(_) | Token::Number | Token::Parameter => {}
        }
        self.statement = Some(statement);
    }

    /// A call of `set_config` in `statement` has been read to its end.
    fn set_config(&mut self, call: SetConfig<'a>, statement: &mut Statement<'a>) {
        // Brackets have commas of their own: what stands third is the third argument only if it is the last.
        let is_local = matches!(call.local, Argument::Literal(())) && call.argument == 2;
        // Where a name cannot be read, a value may turn out to be no truth value.
        let is_known = !call.is_bound || matches!(call.name, Argument::Literal(_));
        let is_plain = match &call.name {
            Argument::Literal(name) => !is_frozen(name),
            name => matches!(name, Argument::Custom),
        };
        self.reading.means_else |= is_local && !is_plain;
        self.reading.resets |= call.resets;
        if call.temp && call.may_lead() {
            self.reading.set |= EffectSet::TEMP;
        }
        let set = match call.name {
            // The seed stays, however local the setting is.
            Argument::Literal(name) if is_seed(&name) => {
                EffectSet::LOAD | if is_local { EffectSet::LOCAL } else { EffectSet::SETTINGS }
            }
            _ if is_local && is_known => self.sets_locally(&call, statement),
            Argument::Literal(name) if is_role(&name) => EffectSet::SETTINGS | EffectSet::ROLE,
            Argument::Literal(name) if name.contains(&b'.') => {
                self.custom(std::str::from_utf8(&name).is_ok(), || spell(name));
                EffectSet::SETTINGS | EffectSet::CUSTOM
            }
            Argument::Literal(_) => EffectSet::SETTINGS,
            // All of them are settings that an audit finds. Should somebody's own table bear the name, nothing of it stays.
            Argument::Column if statement.lists_settings() && call.argument == 2 => {
                self.reading.lists = true;
                EffectSet::SETTINGS | EffectSet::OPAQUE
            }
            Argument::Parameter | Argument::Custom | Argument::Column | Argument::Missing | Argument::Unreadable => {
                SetConfig::UNREAD
            }
        };
        self.reading.set |= set;
    }

    /// What a call does that changes something until the end of the transaction: all of it is over then, unless that is the seed, or
    /// the path on which a table is made in between.
    fn sets_locally(&mut self, call: &SetConfig<'a>, statement: &Statement<'a>) -> EffectSet {
        match &call.name {
            Argument::Parameter => self.reading.by_values = true,
            Argument::Literal(name) if is_path(name) && call.is_made => return EffectSet::LOCAL | EffectSet::TEMP,
            Argument::Literal(name) => self.reading.by_values |= is_path(name) && call.by_value,
            Argument::Custom => {}
            Argument::Column | Argument::Missing | Argument::Unreadable => {
                match sets_pairs(statement.start).map(|number| self.bound.map(|bound| bound.value(number))) {
                    Some(None) => self.reading.by_values = true,
                    Some(Some(Value::Bytes(pairs))) if !may_lead(pairs) => {}
                    _ => {
                        self.reading.is_made = true;
                        return EffectSet::LOCAL | EffectSet::OPAQUE;
                    }
                }
            }
        }
        EffectSet::LOCAL
    }

    /// The text sets a custom setting; `spelled` if its name can be read.
    fn custom(&mut self, spelled: bool, spell: impl FnOnce() -> Option<Cow<'a, str>>) {
        if !spelled {
            self.reading.set |= EffectSet::OPAQUE;
        }
        let Some(names) = &mut self.names else { return };
        names.extend(spell());
    }

    /// The text has ended.
    fn finish(self, doubt: Doubt) -> Reading {
        let mut reading = Reading { doubt, ..self.reading };
        if let Some(statement) = self.statement {
            if statement.depth > 0 || statement.blocks > 0 {
                reading.doubt = doubt.max(Doubt::Cut);
            }
            if statement.call.is_some() {
                reading.set |= SetConfig::UNREAD;
            }
        }
        reading
    }
}

impl Statement<'_> {
    /// Whether it is a `SELECT` from `pg_settings` and from nothing else: no other may be in it, and no join. Asked as often as may
    /// be, it is looked through once.
    fn lists_settings(&mut self) -> bool {
        let start = self.start;
        *self.lists.get_or_insert_with(|| lists_settings(start))
    }

    /// Whether `token` is the `EXECUTE` of a `CREATE TABLE ... AS EXECUTE`.
    fn is_execute(&self, token: Token<'_>) -> bool {
        self.command == FirstWord::Create
            && self.last == Last::As
            && matches!(token, Token::Word(word) if word.eq_ignore_ascii_case(b"execute"))
    }

    /// What `word` does as a keyword behind `last`.
    fn word(&mut self, word: &[u8], last: Last) -> EffectSet {
        let is = |keyword: &[u8]| word.eq_ignore_ascii_case(keyword);
        let mut set = EffectSet::NONE;
        match last {
            Last::Into if is(b"temp") || is(b"temporary") => set = EffectSet::TEMP,
            Last::Into if is(b"local") || is(b"global") => self.last = Last::Into,
            Last::As if self.command == FirstWord::Create && is(b"execute") => {
                set = EffectSet::EXECUTE | EffectSet::OPAQUE;
            }
            Last::Begin if self.routine && is(b"atomic") => self.blocks += 1,
            _ => {}
        }
        // `x AS end` and `t.end` are names.
        if self.blocks > 0 && !matches!(last, Last::As | Last::Dot) {
            if is(b"case") {
                self.blocks += 1;
            } else if is(b"end") {
                self.blocks -= 1;
            }
        }
        if is(b"into") && last != Last::Insert {
            self.last = Last::Into;
        } else if matches!(last, Last::Start | Last::Open) && (is(b"insert") || is(b"merge")) {
            // Anywhere else it may be a column's name, and what follows the INTO of a SELECT.
            self.last = Last::Insert;
        } else if is(b"as") {
            self.last = Last::As;
        } else if is(b"begin") {
            self.last = Last::Begin;
        }
        set
    }

    /// What `name` does as the name of an object behind `last`, quoted or not.
    fn name(&mut self, name: &[u8], last: Last) -> EffectSet {
        self.callee = Callee::of(name);
        let creates = self.command.is_ddl() || self.command == FirstWord::Set || last == Last::Into;
        if creates && names_temp_schema(name) { EffectSet::TEMP } else { EffectSet::NONE }
    }
}

impl Callee {
    /// The function of interest that `name` names. Upper case in quotes counts too, though the server has no such name.
    fn of(name: &[u8]) -> Option<Self> {
        let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
        match name.len() {
            6 if is(b"setval") => Some(Self::Does(EffectSet::SEQUENCE)),
            7 if is(b"setseed") => Some(Self::Does(EffectSet::LOAD)),
            7 if is(b"nextval") => Some(Self::Does(EffectSet::SEQUENCE)),
            7 if is(b"currval") || is(b"lastval") => Some(Self::Does(EffectSet::SEQUENCE.union(EffectSet::CURRVAL))),
            10 if is(b"set_config") => Some(Self::SetConfig),
            16 | 20 | 23 | 27
                if is(b"pg_advisory_lock")
                    || is(b"pg_try_advisory_lock")
                    || is(b"pg_advisory_lock_shared")
                    || is(b"pg_try_advisory_lock_shared") =>
            {
                Some(Self::Does(EffectSet::ADVISORY_LOCK))
            }
            18 | 22 | 25
                if is(b"pg_advisory_unlock") || is(b"pg_advisory_unlock_all") || is(b"pg_advisory_unlock_shared") =>
            {
                Some(Self::Does(EffectSet::ADVISORY_UNLOCK))
            }
            _ => None,
        }
    }
}

impl<'a> SetConfig<'a> {
    /// What a call may do whose arguments cannot be read.
    const UNREAD: EffectSet =
        EffectSet::SETTINGS.union(EffectSet::ROLE).union(EffectSet::CUSTOM).union(EffectSet::OPAQUE);

    const fn open(depth: u32) -> Self {
        Self {
            depth,
            argument: 0,
            name: Argument::Missing,
            local: Argument::Missing,
            resets: false,
            temp: false,
            is_made: false,
            by_value: false,
            is_bound: false,
        }
    }

    /// A token somewhere inside the parentheses, with `depth` of them open before it; `here` stands before it.
    fn token(&mut self, token: Token<'a>, here: Lexer<'a>, depth: u32, bound: Option<&'a Bound<'a>>) {
        if self.argument == 1 {
            self.second(token, here, bound);
        }
        if depth != self.depth || token == Token::Mark(b')') {
            return;
        }
        if token == Token::Mark(b',') {
            self.argument = self.argument.saturating_add(1);
            return;
        }
        match self.argument {
            0 => {
                self.name = match (std::mem::replace(&mut self.name, Argument::Unreadable), token) {
                    (Argument::Missing, Token::Text { body, exact: true }) => Argument::Literal(Cow::Borrowed(body)),
                    (Argument::Missing, Token::Text { body, exact: false }) => {
                        here.unescape(body).map_or(Argument::Unreadable, |name| Argument::Literal(Cow::Owned(name)))
                    }
                    (Argument::Missing, Token::Parameter) => match bound {
                        Some(bound) => bound
                            .text(here.parameter())
                            .map_or(Argument::Unreadable, |name| Argument::Literal(Cow::Borrowed(name))),
                        None => Argument::Parameter,
                    },
                    (Argument::Missing, Token::Word(word)) if word.eq_ignore_ascii_case(b"name") => Argument::Column,
                    (name @ (Argument::Literal(_) | Argument::Parameter | Argument::Column), token)
                        if casts(token, b"text") =>
                    {
                        name
                    }
                    (Argument::Literal(name), Token::Mark(b'|')) if begins_custom(&name) => Argument::Custom,
                    (Argument::Custom, _) => Argument::Custom,
                    _ => Argument::Unreadable,
                }
            }
            2 => {
                self.local = match (&self.local, token) {
                    (Argument::Missing, Token::Word(word)) if word.eq_ignore_ascii_case(b"true") => {
                        Argument::Literal(())
                    }
                    (Argument::Missing, Token::Text { body: b"true" | b"t", exact: true }) => Argument::Literal(()),
                    (Argument::Missing, Token::Parameter)
                        if bound.is_some_and(|bound| bound.is_true(here.parameter())) =>
                    {
                        self.is_bound = true;
                        Argument::Literal(())
                    }
                    (Argument::Literal(()), token) if casts(token, b"boolean") || casts(token, b"bool") => {
                        Argument::Literal(())
                    }
                    _ => Argument::Unreadable,
                }
            }
            _ => {}
        }
    }

    /// A token in the second argument.
    fn second(&mut self, token: Token<'a>, here: Lexer<'a>, bound: Option<&'a Bound<'a>>) {
        match (token, bound) {
            (Token::Parameter, Some(bound)) => self.value(bound.value(here.parameter())),
            (Token::Parameter, None) => self.by_value = true,
            (Token::Text { exact: true, .. } | Token::Mark(b',' | b'(' | b')'), _) => {}
            // One of those in its brackets.
            (Token::Word(word), _) if word.eq_ignore_ascii_case(b"coalesce") => {}
            (Token::Text { body, exact: false }, _) => match here.unescape(body) {
                Some(value) => self.temp |= names_temp_schema(&value),
                None => self.is_made = true,
            },
            (token, _) => {
                let is_null = matches!(token, Token::Word(word) if word.eq_ignore_ascii_case(b"null"));
                self.is_made |= !is_null && !casts(token, b"text");
            }
        }
    }

    /// A parameter in the second argument.
    fn value(&mut self, value: Value<'_>) {
        self.resets |= !matches!(value, Value::Bytes(_));
        self.temp |= match value {
            Value::Unknown => true,
            Value::Null => false,
            Value::Bytes(value) => names_temp_schema(value),
        };
    }

    /// Whether its value may be where tables are made.
    fn may_lead(&self) -> bool {
        !matches!(&self.name, Argument::Literal(name) if !is_path(name))
    }
}

/// Whether the setting `name` is the path on which objects are looked for, and made.
fn is_path(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"search_path")
}

/// Whether `name` is the beginning of a custom setting's, and of nothing else: with an operator behind it, it is still text.
fn begins_custom(name: &[u8]) -> bool {
    let is_letter = |byte: &u8| byte.is_ascii_alphabetic() || *byte == b'_';
    let may_follow = |byte: &u8| is_letter(byte) || byte.is_ascii_digit() || *byte == b'.';
    name.contains(&b'.') && name.first().is_some_and(is_letter) && name.iter().all(may_follow)
}

/// Whether the statement that begins here is a `SELECT` from `pg_settings` and from nothing else.
fn lists_settings(mut lexer: Lexer<'_>) -> bool {
    let is = |word: &[u8], known: &[u8]| word.eq_ignore_ascii_case(known);
    if !lexer.take_word(b"select") {
        return false;
    }
    let mut found = false;
    while let Some(token) = lexer.token() {
        match token {
            Token::Mark(b';') => break,
            Token::Word(word) if is(word, b"select") || is(word, b"from") && found => return false,
            Token::Word(word) if is(word, b"from") => {
                let _ = lexer.take_word(b"pg_catalog") && lexer.take_mark(b'.');
                found = lexer.take_word(b"pg_settings");
                let mut ahead = lexer;
                let ends = match ahead.token() {
                    None | Some(Token::Mark(b';')) => true,
                    Some(Token::Word(word)) => is(word, b"where") || is(word, b"order") || is(word, b"limit"),
                    Some(_) => false,
                };
                if !(found && ends) {
                    return false;
                }
            }
            _ => {}
        }
    }
    found
}

/// The parameter from which the statement that begins here takes names and values, in JSON: `PostGraphile` has it so.
fn sets_pairs(mut lexer: Lexer<'_>) -> Option<usize> {
    const TEXT: &[u8] =
        b"select set_config ( el - > > 0 , el - > > 1 , true ) from json_array_elements ( $ : : json ) el";
    let mut number = None;
    for piece in TEXT.split(|byte| *byte == b' ') {
        lexer.skip_blank();
        let here = lexer;
        let token = lexer.token()?;
        let length = here.rest().len() - lexer.rest().len();
        if token == Token::Parameter && piece == b"$" {
            number = Some(here.parameter());
        } else if !here.rest().get(..length)?.eq_ignore_ascii_case(piece) {
            return None;
        }
    }
    let ends = matches!(lexer.token(), None | Some(Token::Mark(b';')));
    number.filter(|_| ends)
}

/// Whether names or values of settings in this JSON may be the seed, or a path on which tables are made that are temporary.
fn may_lead(json: &[u8]) -> bool {
    let has = |part: &[u8]| json.windows(part.len()).any(|here| here.eq_ignore_ascii_case(part));
    // What else is escaped is no letter.
    has(br"\u") || has(b"seed") || names_temp_schema(json)
}

/// Whether `token` can be part of a cast to the type `name`, written with two colons.
fn casts(token: Token<'_>, name: &[u8]) -> bool {
    match token {
        Token::Mark(mark) => mark == b':',
        Token::Word(word) => word.eq_ignore_ascii_case(name),
        _ => false,
    }
}

/// Whether the schema of temporary objects is named somewhere in `bytes`: `pg_temp`, or `pg_temp_3` as the server calls it.
#[must_use]
pub fn names_temp_schema(bytes: &[u8]) -> bool {
    bytes.windows(7).any(|name| name.eq_ignore_ascii_case(b"pg_temp"))
}

/// The value of a literal as the name of a setting, folded.
fn spell(literal: Cow<'_, [u8]>) -> Option<Cow<'_, str>> {
    let name = match literal {
        Cow::Borrowed(name) => Cow::Borrowed(std::str::from_utf8(name).ok()?),
        Cow::Owned(name) => Cow::Owned(String::from_utf8(name).ok()?),
    };
    Some(if name.bytes().any(|byte| byte.is_ascii_uppercase()) { Cow::Owned(name.to_ascii_lowercase()) } else { name })
}
