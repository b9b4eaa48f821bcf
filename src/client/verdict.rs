//! Where a batch is to run, from what is known of its texts. Pure.

use pgweir_config::ReadRouting;

use crate::catalog::{Hint, Judged, Route, Suspects};
use crate::replica::watermark::{self, Watermark};
use crate::settings::Profile;
use crate::sql::{self, EffectSet, Effects, FirstWord, Library};
use crate::stats::RouteReason;

/// What the client's settings say of where its transactions go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Circumstances {
    routing: ReadRouting,
    /// `pgweir.route`.
    wish: Wish,
    /// `default_transaction_read_only`, if the session says so itself.
    read_only: Option<bool>,
    /// `default_transaction_isolation` is serializable.
    serializable: bool,
    /// `pgweir.watermark`.
    least: Least,
}

/// What reads have to see whatever their level of freshness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Least {
    #[default]
    Nothing,
    Watermark(Watermark),
    /// Nobody can tell what was meant.
    Unreadable,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wish {
    #[default]
    None,
    Primary,
    Follower,
    Auto,
}

/// The setting that says it for a session.
const ROUTE: &str = "pgweir.route";

/// The setting that each of a follower's connections has from its start-up packet.
const READ_ONLY: &str = "default_transaction_read_only";

impl Circumstances {
    /// Those of a client with these settings.
    #[must_use]
    pub fn of(routing: ReadRouting, profile: &Profile) -> Self {
        const YES: [&[u8]; 6] = [b"on", b"true", b"yes", b"1", b"t", b"y"];
        if profile.entries().is_empty() {
            return Self { routing, ..Self::default() };
        }
        let is = |name: &str, value: &[u8]| profile.get(name).is_some_and(|own| own.eq_ignore_ascii_case(value));
        let wish = match profile.get(ROUTE) {
            Some(wish) if wish.eq_ignore_ascii_case(b"primary") => Wish::Primary,
            Some(wish) if wish.eq_ignore_ascii_case(b"follower") => Wish::Follower,
            Some(wish) if wish.eq_ignore_ascii_case(b"auto") => Wish::Auto,
            _ => Wish::None,
        };
        let read_only = profile.get(READ_ONLY);
        let least = match profile.get(watermark::NAME) {
            // As a RESET leaves it.
            None | Some(b"") => Least::Nothing,
            Some(told) => Watermark::parse(told).map_or(Least::Unreadable, Least::Watermark),
        };
        Self {
            routing,
            wish,
            read_only: read_only.map(|own| YES.iter().any(|yes| own.eq_ignore_ascii_case(yes))),
            serializable: is("default_transaction_isolation", b"serializable"),
            least,
        }
    }

    /// Up to where a follower has to have come.
    #[must_use]
    pub const fn watermark(&self) -> Option<Watermark> {
        match self.least {
            Least::Watermark(watermark) => Some(watermark),
            Least::Nothing | Least::Unreadable => None,
        }
    }
}

/// What of a batch may go to a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// All of it: it is a transaction of its own.
    Lone,
    /// It opens a read-only transaction.
    Opening,
}

/// Whether a batch begins with a `BEGIN`, and what that says of being read-only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Begin {
    #[default]
    No,
    Yes(Option<bool>),
}

/// What is known of a batch, text by text.
#[derive(Debug, Default)]
pub struct Verdict {
    texts: u32,
    begin: Begin,
    hint: Option<Hint>,
    against: Option<RouteReason>,
}

/// Whether it is merely not known whether a follower can do it: that it finds out, if somebody asks for it.
#[must_use]
const fn is_soft(reason: RouteReason) -> bool {
    use RouteReason::{Function, Relation, Server, Unknown};
    matches!(reason, Function | Relation | Server | Unknown)
}

impl Verdict {
    /// A text of the batch. Whether it must not run on a follower, whatever a hint says, is asked if a hint might lead it there.
    pub fn hear(&mut self, judged: Judged, is_unfit: impl FnOnce() -> bool) {
        if matches!(judged.route, Route::Primary(reason) if is_soft(reason)) && is_unfit() {
            self.oppose(RouteReason::Session);
        }
        self.add(judged);
    }

    fn add(&mut self, judged: Judged) {
        match judged.hint {
            Some(Hint::Primary) => self.hint = Some(Hint::Primary),
            hint => self.hint = self.hint.or(hint),
        }
        match judged.route {
            Route::Read => {}
            Route::Begin { read_only } if self.texts == 0 => self.begin = Begin::Yes(read_only),
            Route::Begin { .. } => self.oppose(RouteReason::Transaction),
            Route::Primary(reason) => self.oppose(reason),
        }
        self.texts += 1;
    }

    /// Something speaks against a follower.
    pub fn oppose(&mut self, reason: RouteReason) {
        if self.against.is_none_or(is_soft) {
            self.against = Some(reason);
        }
    }

    /// Where it is to run.
    ///
    /// # Errors
    ///
    /// Why on the primary.
    pub fn errand(&self, at: Circumstances) -> Result<(Errand, RouteReason), RouteReason> {
        if self.hint == Some(Hint::Primary) || at.wish == Wish::Primary && self.hint.is_none() {
            return Err(RouteReason::HintPrimary);
        }
        if at.serializable {
            return Err(RouteReason::Serializable);
        }
        if at.read_only == Some(false) {
            // With that setting replayed, what was a follower a moment ago would take whatever it is sent.
            return Err(RouteReason::Session);
        }
        if at.least == Least::Unreadable {
            return Err(RouteReason::Stale);
        }
        let asked = self.hint == Some(Hint::Follower) || at.wish == Wish::Follower;
        if !(asked || at.wish == Wish::Auto || at.routing == ReadRouting::Auto) {
            return Err(self.against.unwrap_or(RouteReason::Transaction));
        }
        match (self.begin, self.against) {
            (Begin::No, Some(reason)) if asked && is_soft(reason) => Ok((Errand::Lone, RouteReason::Hint)),
            (_, Some(reason)) => Err(reason),
            (Begin::No, None) if self.texts == 0 => Err(RouteReason::Transaction),
            (Begin::No, None) => Ok((Errand::Lone, if asked { RouteReason::Hint } else { RouteReason::Read })),
            (Begin::Yes(_), None) if self.opens_read_only(at) => Ok((Errand::Opening, RouteReason::ReadOnly)),
            (Begin::Yes(_), None) => Err(RouteReason::Transaction),
        }
    }

    /// What it is proven to be, wherever it runs: a read, or the beginning of a read-only transaction.
    #[must_use]
    pub fn proven(&self, at: Circumstances) -> Option<Errand> {
        match self.against {
            Some(_) => None,
            None if self.opens_read_only(at) => Some(Errand::Opening),
            // Of another transaction nothing writes so far; what comes behind is looked at then.
            None => Some(Errand::Lone),
        }
    }

    fn opens_read_only(&self, at: Circumstances) -> bool {
        matches!(self.begin, Begin::Yes(says) if says.unwrap_or(at.read_only == Some(true)))
    }

    /// Whether no more than one text was seen.
    pub const fn is_alone(&self) -> bool {
        self.texts <= 1
    }

    /// Whether the texts seen open a transaction.
    #[must_use]
    pub const fn begins(&self) -> bool {
        matches!(self.begin, Begin::Yes(_))
    }
}

/// Where a text goes that comes by itself, from a client with these settings: to a follower, if there is one that is fresh
/// enough; and why.
///
/// # Errors
///
/// Why it goes to the primary.
pub fn route(
    text: &[u8],
    routing: ReadRouting,
    profile: &Profile,
    suspects: &Suspects,
    library: &mut Library,
) -> Result<RouteReason, RouteReason> {
    let judged = suspects.route(text, library);
    let mut verdict = Verdict::default();
    verdict.hear(judged, || {
        let own = sql::scan(text).set;
        is_unfit(own | suspects.judge(text, own, library), text)
    });
    verdict.errand(Circumstances::of(routing, profile)).map(|(_, reason)| reason)
}

/// What a follower accepts and must not: it would lock nothing, or leave something on a server connection that its client
/// does not keep; and what it accepts only to fail with all that follows.
const UNFIT: EffectSet = EffectSet::ADVISORY_LOCK
    .union(EffectSet::XACT_LOCK)
    .union(EffectSet::HOLD_CURSOR)
    .union(EffectSet::LISTEN)
    .union(EffectSet::PREPARE)
    .union(EffectSet::EXECUTE)
    .union(EffectSet::TEMP)
    .union(EffectSet::LOAD)
    .union(EffectSet::SUSPECT)
    .union(EffectSet::OPAQUE);

/// Whether a text with these effects must not run in a read-only transaction on a follower.
#[must_use]
pub fn is_unfit(set: EffectSet, text: &[u8]) -> bool {
    // The next transaction would be on the follower whatever it is.
    let chains = set.intersects(EffectSet::BEGIN) || ends(set) && set.intersects(EffectSet::MULTI);
    set.intersects(UNFIT) || chains || mentions(text, b"advisory") || mentions(text, b"serializable")
}

/// Whether a text with these effects is, or may be, about what its client listens to: a follower accepts that, and knows of
/// nothing.
#[must_use]
pub fn concerns_channels(set: EffectSet, text: &[u8]) -> bool {
    set.intersects(EffectSet::UNLISTEN) || mentions(text, b"listening_channels")
}

/// Whether a text with these effects may make a read-only transaction one that writes, or end it and go on.
#[must_use]
pub fn escapes(effects: Effects) -> bool {
    const MAY: EffectSet = EffectSet::SETTINGS
        .union(EffectSet::LOCAL)
        .union(EffectSet::MULTI)
        .union(EffectSet::BEGIN)
        .union(EffectSet::OPAQUE)
        .union(EffectSet::SUSPECT)
        .union(EffectSet::UNJUDGED);
    effects.has(MAY) || effects.first == FirstWord::Set
}

/// Whether a text does nothing but end a transaction, or a part of one.
#[must_use]
pub fn only_ends(text: &[u8]) -> bool {
    const PARTS: EffectSet = EffectSet::SAVEPOINT.union(EffectSet::ROLLBACK_TO);
    let set = sql::scan(text).set;
    sql::is_transaction_end(text) || !set.is_empty() && PARTS.contains(set)
}

/// Whether a text with these effects ends the transaction.
#[must_use]
pub fn ends(set: EffectSet) -> bool {
    set.intersects(EffectSet::COMMIT.union(EffectSet::ROLLBACK))
}

fn mentions(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word))
}

/// Whether what failed with this on a follower may do on the primary: it was refused, it was in the way of the replay, or
/// the follower has not got what it names yet.
///
/// Source: `PostgreSQL` 17 docs, §26.4 "Hot Standby", and measured.
#[must_use]
pub fn may_do_elsewhere(code: &[u8]) -> bool {
    const NOT_THERE_YET: [&[u8]; 5] = [b"42P01", b"42703", b"42704", b"42883", b"3F000"];
    matches!(code, b"25006" | b"0A000" | b"55000" | b"40001" | b"40P01")
        || code.starts_with(b"57P0")
        || NOT_THERE_YET.contains(&code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Profiles;
    use crate::sql::scan;

    const READ: Judged = Judged { route: Route::Read, hint: None };
    const WRITE: Judged = Judged { route: Route::Primary(RouteReason::Write), hint: None };
    const CALL: Judged = Judged { route: Route::Primary(RouteReason::Function), hint: None };

    fn begin(read_only: Option<bool>) -> Judged {
        Judged { route: Route::Begin { read_only }, hint: None }
    }

    fn hinted(hint: Hint, judged: Judged) -> Judged {
        Judged { hint: Some(hint), ..judged }
    }

    fn at(routing: ReadRouting, settings: &[(&str, &str)]) -> Circumstances {
        let entries = settings.iter().map(|(name, value)| ((*name).into(), value.as_bytes().into()));
        Circumstances::of(routing, &Profiles::default().intern(entries))
    }

    #[test]
    fn a_batch_goes_to_a_follower_only_if_all_of_it_may() {
        use Errand::{Lone, Opening};
        use ReadRouting::{Auto, Hinted};
        use RouteReason as Why;
        let [on, off] = ["on", "off"].map(|value| ("default_transaction_read_only", value));
        let [primary, follower] = ["primary", "follower"].map(|value| ("pgweir.route", value));
        let serializable = ("default_transaction_isolation", "Serializable");
        let [mark, none, garbage] = ["7301-00000003-0/1", "", "0/1"].map(|value| ("pgweir.watermark", value));
        #[rustfmt::skip]
        let table: [(&str, ReadRouting, &[(&str, &str)], &[Judged], Result<(Errand, Why), Why>); 26] = [
            ("a read",               Auto,   &[],             &[READ],                            Ok((Lone, Why::Read))),
            ("nothing",              Auto,   &[],             &[],                                Err(Why::Transaction)),
            ("reads and a write",    Auto,   &[],             &[READ, WRITE, READ],               Err(Why::Write)),
            ("the harder reason",    Auto,   &[],             &[CALL, WRITE],                     Err(Why::Write)),
            ("read-only",            Auto,   &[],             &[begin(Some(true))],               Ok((Opening, Why::ReadOnly))),
            ("read-only, and reads", Auto,   &[],             &[begin(Some(true)), READ],         Ok((Opening, Why::ReadOnly))),
            ("and a write",          Auto,   &[],             &[begin(Some(true)), WRITE],        Err(Why::Write)),
            ("read-write",           Auto,   &[on],           &[begin(Some(false))],              Err(Why::Transaction)),
            ("by default",           Auto,   &[on],           &[begin(None)],                     Ok((Opening, Why::ReadOnly))),
            ("not by default",       Auto,   &[],             &[begin(None)],                     Err(Why::Transaction)),
            ("a begin behind",       Auto,   &[],             &[READ, begin(Some(true))],         Err(Why::Transaction)),
            ("serializable",         Auto,   &[serializable], &[READ],                            Err(Why::Serializable)),
            ("hint away",            Auto,   &[],             &[hinted(Hint::Primary, READ)],     Err(Why::HintPrimary)),
            ("setting away",         Auto,   &[primary],      &[READ],                            Err(Why::HintPrimary)),
            ("hint above setting",   Auto,   &[primary],      &[hinted(Hint::Follower, READ)],    Ok((Lone, Why::Hint))),
            ("unasked",              Hinted, &[],             &[READ],                            Err(Why::Transaction)),
            ("asked",                Hinted, &[],             &[hinted(Hint::Follower, READ)],    Ok((Lone, Why::Hint))),
            ("asked by setting",     Hinted, &[follower],     &[READ],                            Ok((Lone, Why::Hint))),
            ("asked, and unsure",    Hinted, &[],             &[hinted(Hint::Follower, CALL)],    Ok((Lone, Why::Hint))),
            ("asked, and a write",   Hinted, &[follower],     &[WRITE],                           Err(Why::Write)),
            ("may write",            Auto,   &[off],          &[READ],                            Err(Why::Session)),
            ("may write, and asked", Hinted, &[off, follower],&[CALL],                            Err(Why::Session)),
            ("marked",               Auto,   &[mark],         &[READ],                            Ok((Lone, Why::Read))),
            ("not marked any more",  Auto,   &[none],         &[READ],                            Ok((Lone, Why::Read))),
            ("marked by who knows",  Auto,   &[garbage],      &[hinted(Hint::Follower, READ)],    Err(Why::Stale)),
            ("may write by default", Auto,   &[off],          &[begin(Some(true))],               Err(Why::Session)),
        ];
        for (name, routing, settings, texts, want) in table {
            let mut verdict = Verdict::default();
            for judged in texts {
                verdict.add(*judged);
            }
            assert_eq!(verdict.errand(at(routing, settings)), want, "{name}");
        }
    }

    #[test]
    fn what_is_about_channels_is_told_from_all_else() {
        #[rustfmt::skip]
        let table = [
            ("UNLISTEN *",                           true),
            ("SELECT 1; UNLISTEN news",              true),
            ("SELECT * FROM pg_listening_channels()", true),
            ("SELECT 1",                             false),
        ];
        for (text, want) in table {
            assert_eq!(concerns_channels(scan(text.as_bytes()).set, text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn what_a_follower_accepts_and_must_not_is_unfit_and_what_may_write_is_no_read_only_transaction() {
        #[rustfmt::skip]
        let table: [(&str, bool, bool); 15] = [
            ("SELECT 1",                                     false, false),
            ("SET LOCAL work_mem = '1MB'",                   false, true),
            ("SAVEPOINT s",                                  false, false),
            ("COMMIT",                                       false, false),
            ("ROLLBACK TO s",                                false, false),
            ("DECLARE c CURSOR FOR SELECT 1",                false, false),
            ("DECLARE c CURSOR WITH HOLD FOR SELECT 1",      true,  false),
            ("SELECT pg_advisory_lock(1)",                   true,  false),
            ("SELECT pg_advisory_xact_lock(1)",              true,  false),
            ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", true,  true),
            ("SET TRANSACTION READ WRITE",                   false, true),
            ("COMMIT AND CHAIN",                             true,  true),
            ("COMMIT; INSERT INTO t VALUES (1)",             true,  true),
            ("PREPARE p AS SELECT 1",                        true,  false),
            ("DO $$ BEGIN END $$",                           true,  true),
        ];
        for (text, unfit, escaping) in table {
            let effects = scan(text.as_bytes());
            assert_eq!((is_unfit(effects.set, text.as_bytes()), escapes(effects)), (unfit, escaping), "{text}");
        }
    }
}
