//! What the first words of a statement say.

use std::borrow::Cow;

use super::effects::EffectSet;
use super::lexer::{Lexer, Token};

/// Spells every command word once; the frequent ones first, because they are compared in this order.
macro_rules! first_words {
    ($($name:ident $word:literal,)+) => {
        /// The command word of a statement.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub enum FirstWord {
            /// There is no statement: nothing but blanks, comments and semicolons.
            #[default]
            Empty,
            /// No command that this list knows.
            Other,
            $(#[doc = concat!("`", $word, "`, in any case.")] $name,)+
        }

        impl FirstWord {
            /// Every command word, in lower case.
            #[cfg(test)]
            pub(super) const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$name),)+];

            fn of_folded(word: &[u8]) -> Self {
                match word {
                    $(word if *word == *$word.as_bytes() => Self::$name,)+
                    _ => Self::Other,
                }
            }
        }
    };
}

first_words! {
    Select "select", Insert "insert", Update "update", Delete "delete", Begin "begin", Commit "commit",
    Rollback "rollback", With "with", Set "set", Show "show", Values "values", Table "table", Merge "merge",
    Abort "abort", Alter "alter", Analyse "analyse", Analyze "analyze", Call "call", Checkpoint "checkpoint",
    Close "close", Cluster "cluster", Comment "comment", Copy "copy", Create "create", Deallocate "deallocate",
    Declare "declare", Discard "discard", Do "do", Drop "drop", End "end", Execute "execute", Explain "explain",
    Fetch "fetch", Grant "grant", Import "import", Listen "listen", Load "load", Lock "lock", Move "move",
    Notify "notify", Prepare "prepare", Reassign "reassign", Refresh "refresh", Reindex "reindex",
    Release "release", Reset "reset", Revoke "revoke", Savepoint "savepoint", Security "security", Start "start",
    Truncate "truncate", Unlisten "unlisten", Vacuum "vacuum",
}

impl FirstWord {
    /// The command that `word` names; [`Self::Other`] if none.
    pub(super) fn of(word: &[u8]) -> Self {
        let mut folded = [0; 10];
        let Some(folded) = folded.get_mut(..word.len()) else {
            return Self::Other;
        };
        folded.copy_from_slice(word);
        folded.make_ascii_lowercase();
        Self::of_folded(folded)
    }

    /// The command word at `lexer`, past blanks, comments and opening parentheses; moves past it.
    pub(super) fn next(lexer: &mut Lexer<'_>) -> Self {
        loop {
            match lexer.token() {
                None => return Self::Empty,
                Some(Token::Mark(b'(')) => {}
                Some(Token::Word(word)) => return Self::of(word),
                Some(_) => return Self::Other,
            }
        }
    }

    /// Whether the command changes the catalog.
    pub(super) const fn is_ddl(self) -> bool {
        matches!(
            self,
            Self::Alter
                | Self::Comment
                | Self::Create
                | Self::Drop
                | Self::Grant
                | Self::Import
                | Self::Reassign
                | Self::Refresh
                | Self::Revoke
                | Self::Security
                | Self::Truncate
        )
    }
}

/// The head of one statement, as far as it had to be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head<'a> {
    /// The command word.
    pub(super) first: FirstWord,
    /// The command that runs: under `EXPLAIN` the one that is explained, else `first`.
    pub(super) command: FirstWord,
    /// What the command does by itself, whatever it calls.
    pub(super) set: EffectSet,
    /// The custom setting that the command sets or resets for the session.
    pub(super) custom: Option<SettingName<'a>>,
    /// Whether the command may have an SQL body, `BEGIN ATOMIC ... END`.
    pub(super) routine: bool,
}

impl<'a> Head<'a> {
    /// Reads the head of the statement that begins at `lexer`.
    pub(super) fn read(mut lexer: Lexer<'a>) -> Self {
        let first = FirstWord::next(&mut lexer);
        let mut command = first;
        if first == FirstWord::Explain {
            skip_explain(&mut lexer);
            command = FirstWord::next(&mut lexer);
        }
        let mut head = Self { first, command, set: EffectSet::NONE, custom: None, routine: false };
        head.set = match command {
            FirstWord::Set => head.set_command(lexer),
            FirstWord::Reset => head.named(lexer),
            FirstWord::Create => head.create_command(lexer),
            other => of_command(other, lexer),
        };
        if command.is_ddl() {
            head.set |= EffectSet::DDL;
        }
        head
    }

    /// `SET [SESSION | LOCAL] ...`.
    fn set_command(&mut self, mut lexer: Lexer<'a>) -> EffectSet {
        if qualified(lexer) {
            return self.named(lexer);
        }
        let local = take_scope(&mut lexer) == Some(Scope::Local);
        if !qualified(lexer) && (lexer.take_word(b"transaction") || lexer.take_word(b"constraints")) {
            return EffectSet::NONE;
        }
        if local && SettingName(lexer).is_seed() {
            // What follows from it stays, however local the setting is.
            return EffectSet::LOCAL | EffectSet::LOAD;
        }
        if local { EffectSet::LOCAL } else { self.named(lexer) }
    }

    /// A setting of the session, named at `lexer`.
    fn named(&mut self, lexer: Lexer<'a>) -> EffectSet {
        let name = SettingName(lexer);
        if name.is_custom() {
            self.custom = Some(name);
            return EffectSet::SETTINGS | EffectSet::CUSTOM;
        }
        if name.is_seed() {
            return EffectSet::SETTINGS | EffectSet::LOAD;
        }
        if name.is_role() { EffectSet::SETTINGS | EffectSet::ROLE } else { EffectSet::SETTINGS }
    }

    /// `CREATE [OR REPLACE] [GLOBAL | LOCAL] [TEMP | TEMPORARY] ...`.
    fn create_command(&mut self, mut lexer: Lexer<'a>) -> EffectSet {
        if lexer.take_word(b"or") {
            lexer.take_word(b"replace");
        }
        self.routine = lexer.take_word(b"function") || lexer.take_word(b"procedure");
        let _ = lexer.take_word(b"global") || lexer.take_word(b"local");
        if lexer.take_word(b"temp") || lexer.take_word(b"temporary") { EffectSet::TEMP } else { EffectSet::NONE }
    }
}

/// The name of a setting in `SET` and `RESET`, unread.
#[derive(Clone, Copy, Debug)]
pub(super) struct SettingName<'a>(Lexer<'a>);

impl<'a> SettingName<'a> {
    /// Whether there is a dot in the name: between two words, or inside a quoted one.
    fn is_custom(self) -> bool {
        let mut lexer = self.0;
        match lexer.token() {
            Some(Token::Quoted(name)) if name.contains(&b'.') => true,
            Some(Token::Word(_) | Token::Quoted(_) | Token::Escaped) => lexer.take_mark(b'.'),
            _ => false,
        }
    }

    /// Whether it is the role or the session authorization, by either of their spellings.
    fn is_role(self) -> bool {
        let mut lexer = self.0;
        match lexer.token() {
            Some(Token::Word(name) | Token::Quoted(name)) => {
                is_role(name) || (name.eq_ignore_ascii_case(b"session") && lexer.take_word(b"authorization"))
            }
            Some(Token::Escaped) => true,
            _ => false,
        }
    }

    /// Whether it is that of the seed of `random()`.
    fn is_seed(self) -> bool {
        let mut lexer = self.0;
        matches!(lexer.token(), Some(Token::Word(name) | Token::Quoted(name)) if is_seed(name))
            && !lexer.take_mark(b'.')
    }

    /// Whether [`Self::spell`] has an answer.
    pub(super) fn is_spelled(self) -> bool {
        self.parts(|_| {})
    }

    /// The name, folded; `None` if the text does not spell it out or it is not UTF-8.
    pub(super) fn spell(self) -> Option<Cow<'a, str>> {
        let mut name = String::new();
        let spelled = self.parts(|part| {
            if !name.is_empty() {
                name.push('.');
            }
            name.push_str(part);
        });
        name.make_ascii_lowercase();
        spelled.then_some(Cow::Owned(name))
    }

    /// Calls `each` with what stands between the dots; false if a part cannot be read.
    fn parts(self, mut each: impl FnMut(&'a str)) -> bool {
        let mut lexer = self.0;
        loop {
            let Some(Token::Word(part) | Token::Quoted(part)) = lexer.token() else { return false };
            match std::str::from_utf8(part) {
                Ok(part) if !part.contains('"') => each(part),
                _ => return false,
            }
            if !lexer.take_mark(b'.') {
                return true;
            }
        }
    }
}

/// How long a `SET` lasts, where it says so.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    Local,
    Session,
}

/// Moves past `LOCAL` or `SESSION` behind `SET`, unless the word belongs to what follows.
pub(super) fn take_scope(lexer: &mut Lexer<'_>) -> Option<Scope> {
    let mut ahead = *lexer;
    let scope = if ahead.take_word(b"local") {
        Scope::Local
    } else if ahead.take_word(b"session") {
        Scope::Session
    } else {
        return None;
    };
    let behind = ahead;
    // `SET SESSION AUTHORIZATION x` and `SET session = x` have no scope.
    let own = scope == Scope::Session && (ahead.take_word(b"authorization") || ahead.take_word(b"characteristics"));
    if own || ahead.take_mark(b'=') || ahead.take_word(b"to") {
        return None;
    }
    *lexer = behind;
    Some(scope)
}

/// Whether a dot follows the next word, which is then no keyword but half of a setting's name.
pub(super) fn qualified(mut lexer: Lexer<'_>) -> bool {
    lexer.token();
    lexer.take_mark(b'.')
}

/// Whether the setting `name` is the role or the session authorization.
pub(super) const fn is_role(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"role") || name.eq_ignore_ascii_case(b"session_authorization")
}

/// Whether the setting `name` is the seed of `random()`.
pub(super) const fn is_seed(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"seed")
}

/// What a command does that is neither `SET`, `RESET` nor `CREATE`; `lexer` stands behind its first word.
fn of_command(command: FirstWord, mut lexer: Lexer<'_>) -> EffectSet {
    match command {
        FirstWord::Begin | FirstWord::Start => EffectSet::BEGIN,
        FirstWord::Commit | FirstWord::End => EffectSet::COMMIT | chain(lexer),
        FirstWord::Rollback | FirstWord::Abort => rollback(lexer),
        FirstWord::Savepoint | FirstWord::Release => EffectSet::SAVEPOINT,
        FirstWord::Prepare => prepare(lexer),
        FirstWord::Execute => EffectSet::EXECUTE | EffectSet::OPAQUE,
        FirstWord::Deallocate => {
            lexer.take_word(b"prepare");
            let all = lexer.take_word(b"all");
            EffectSet::DEALLOCATE | if all { EffectSet::DEALLOCATE_ALL } else { EffectSet::NONE }
        }
        FirstWord::Discard if lexer.take_word(b"all") => {
            EffectSet::DISCARD | EffectSet::DISCARD_ALL | EffectSet::SETTINGS | EffectSet::ROLE
        }
        FirstWord::Discard => EffectSet::DISCARD,
        FirstWord::Listen => EffectSet::LISTEN,
        FirstWord::Unlisten => EffectSet::UNLISTEN,
        FirstWord::Declare => declare(lexer),
        FirstWord::Close if lexer.take_word(b"all") => EffectSet::CLOSE_ALL,
        FirstWord::Load => EffectSet::LOAD,
        FirstWord::Copy => EffectSet::COPY,
        FirstWord::Do | FirstWord::Call | FirstWord::Other => EffectSet::OPAQUE,
        _ => EffectSet::NONE,
    }
}

/// `PREPARE TRANSACTION 'id'`, or `PREPARE name`, whose name may be `transaction`.
fn prepare(mut lexer: Lexer<'_>) -> EffectSet {
    if lexer.take_word(b"transaction") && matches!(lexer.token(), Some(Token::Text { .. })) {
        return EffectSet::COMMIT;
    }
    EffectSet::PREPARE
}

/// `ROLLBACK [WORK | TRANSACTION] [TO ... | AND [NO] CHAIN]`, `ROLLBACK PREPARED`.
fn rollback(mut lexer: Lexer<'_>) -> EffectSet {
    let chain = chain(lexer);
    let _ = lexer.take_word(b"work") || lexer.take_word(b"transaction");
    if lexer.take_word(b"to") { EffectSet::ROLLBACK_TO } else { EffectSet::ROLLBACK | chain }
}

/// `[WORK | TRANSACTION] AND CHAIN`: the next transaction begins at once.
fn chain(mut lexer: Lexer<'_>) -> EffectSet {
    let _ = lexer.take_word(b"work") || lexer.take_word(b"transaction");
    if lexer.take_word(b"and") && lexer.take_word(b"chain") { EffectSet::BEGIN } else { EffectSet::NONE }
}

/// `DECLARE name [options] CURSOR [WITH | WITHOUT HOLD] FOR ...`.
fn declare(mut lexer: Lexer<'_>) -> EffectSet {
    lexer.token();
    // BINARY, INSENSITIVE, NO SCROLL, CURSOR: the options may be repeated, but not without end.
    for _ in 0..16 {
        match lexer.token() {
            Some(Token::Word(word)) if word.eq_ignore_ascii_case(b"cursor") => {
                let hold = lexer.take_word(b"with") && lexer.take_word(b"hold");
                return if hold { EffectSet::HOLD_CURSOR } else { EffectSet::NONE };
            }
            Some(Token::Word(_)) => {}
            _ => return EffectSet::HOLD_CURSOR,
        }
    }
    EffectSet::HOLD_CURSOR
}

/// Moves past the options of `EXPLAIN`, in parentheses or bare.
pub(super) fn skip_explain(lexer: &mut Lexer<'_>) {
    let mut ahead = *lexer;
    // A parenthesis opens the options, or the explained query itself.
    let options =
        ahead.take_mark(b'(') && !matches!(FirstWord::next(&mut { ahead }), word if runs_in_parentheses(word));
    if !options {
        let _ = lexer.take_word(b"analyze") || lexer.take_word(b"analyse");
        lexer.take_word(b"verbose");
        return;
    }
    while let Some(token) = ahead.token() {
        match token {
            Token::Mark(b')') => break,
            Token::Mark(b';') => return,
            _ => {}
        }
    }
    *lexer = ahead;
}

/// Whether the command may stand in parentheses of its own.
const fn runs_in_parentheses(word: FirstWord) -> bool {
    matches!(word, FirstWord::Select | FirstWord::With | FirstWord::Values | FirstWord::Table)
}
