//! The vocabulary of effects.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

use super::head::FirstWord;

/// What a text may do to its session; the answer of [`scan`](super::scan).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Everything that any of its statements may do.
    pub set: EffectSet,
    /// The command word of its first non-empty statement.
    pub first: FirstWord,
    /// Run twice, it is as good as run once: nothing of it outlives its transaction, nothing of a user's is called.
    pub harmless: bool,
    /// It may take values from sequences: it writes, calls something, or cannot be read. What a view, an operator or a cast
    /// calls is left out.
    pub takes_values: bool,
    /// The values of its parameters tell more of what it does: see [`Bound`](super::Bound).
    pub by_values: bool,
}

impl Effects {
    /// Whether the text may do at least one of `any`.
    #[must_use]
    pub const fn has(self, any: EffectSet) -> bool {
        self.set.intersects(any)
    }
}

const _: () = assert!(size_of::<Effects>() == 8);

/// A set of effects: what a text may do, by the name of the thing done.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct EffectSet(u32);

/// Numbers the effects in the order of their names, and spells each name once.
macro_rules! effects {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "one variant a constant, for its number")]
        enum Number { $($name,)+ }

        impl EffectSet {
            $($(#[doc = $doc])+ pub const $name: Self = Self(1 << Number::$name as u32);)+

            /// Every single effect and its name.
            const NAMES: &'static [(Self, &'static str)] = &[$((Self::$name, stringify!($name)),)+];
        }
    };
}

effects! {
    /// Settings may change for the session: `SET`, `RESET`, `DISCARD ALL`, `set_config` unless its third argument is `true`.
    SETTINGS,
    /// Settings change until the end of the transaction: `SET LOCAL`, `set_config(.., true)`.
    LOCAL,
    /// The role or the session authorization may change for the session. Always with [`Self::SETTINGS`].
    ROLE,
    /// A custom setting may change for the session; see [`custom_names`](super::custom_names). Always with [`Self::SETTINGS`].
    CUSTOM,
    /// `LISTEN`.
    LISTEN,
    /// `UNLISTEN`.
    UNLISTEN,
    /// `PREPARE name AS`, not `PREPARE TRANSACTION`.
    PREPARE,
    /// `DEALLOCATE`.
    DEALLOCATE,
    /// `DEALLOCATE ALL`. Always with [`Self::DEALLOCATE`].
    DEALLOCATE_ALL,
    /// `EXECUTE`, also under `EXPLAIN` and `CREATE TABLE AS`. Always with [`Self::OPAQUE`]: it does what the prepared statement does.
    EXECUTE,
    /// `DECLARE ... WITH HOLD`.
    HOLD_CURSOR,
    /// A temporary object may appear: `CREATE TEMP`, `SELECT INTO TEMP`, `pg_temp` named in DDL or given to a setting.
    TEMP,
    /// A session advisory lock may be taken.
    ADVISORY_LOCK,
    /// A session advisory lock, or all, may be given back.
    ADVISORY_UNLOCK,
    /// Something that only the end of the session undoes: `LOAD`; `setseed`, or the setting `seed`, which no one can read back.
    LOAD,
    /// `DISCARD`, whatever follows.
    DISCARD,
    /// `DISCARD ALL`. Always with [`Self::DISCARD`], [`Self::SETTINGS`] and [`Self::ROLE`].
    DISCARD_ALL,
    /// `CLOSE ALL`.
    CLOSE_ALL,
    /// The text does not tell: `DO`, `CALL`, `EXECUTE`, an unknown command, a setting's name that is not spelled out, `U&"..."`, an open quote.
    OPAQUE,
    /// `nextval`, `setval`, `currval` or `lastval` is called.
    SEQUENCE,
    /// `currval` or `lastval` is called. Always with [`Self::SEQUENCE`].
    CURRVAL,
    /// A command that changes the catalog: `CREATE`, `ALTER`, `DROP`, `TRUNCATE`, `COMMENT`, `GRANT` and their like.
    DDL,
    /// `COMMIT`, `END`, `PREPARE TRANSACTION` or `COMMIT PREPARED`.
    COMMIT,
    /// `ROLLBACK`, `ABORT` or `ROLLBACK PREPARED`; not `ROLLBACK TO`.
    ROLLBACK,
    /// `ROLLBACK TO` a savepoint.
    ROLLBACK_TO,
    /// `SAVEPOINT` or `RELEASE`.
    SAVEPOINT,
    /// A transaction block begins: `BEGIN`, `START TRANSACTION`, `AND CHAIN`.
    BEGIN,
    /// There is more than one non-empty statement.
    MULTI,
    /// `COPY`.
    COPY,
    /// What the text mentions may take an advisory lock until the end of the transaction, which a follower would grant: known from
    /// the catalog, never said by [`scan`](super::scan).
    XACT_LOCK,
    /// What the text mentions may do any of it by itself: known from the catalog, never said by [`scan`](super::scan).
    SUSPECT,
    /// Nobody knows what it sets in motion: the catalog was not read yet. Never said by [`scan`](super::scan) either.
    UNJUDGED,
}

impl EffectSet {
    /// No effect.
    pub const NONE: Self = Self(0);

    /// Whether nothing is in the set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `all` is in the set.
    #[must_use]
    pub const fn contains(self, all: Self) -> bool {
        self.0 & all.0 == all.0
    }

    /// Whether some of `any` is in the set.
    #[must_use]
    pub const fn intersects(self, any: Self) -> bool {
        self.0 & any.0 != 0
    }

    /// What is in either set; `|` for constants.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOr for EffectSet {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl BitOrAssign for EffectSet {
    fn bitor_assign(&mut self, other: Self) {
        *self = self.union(other);
    }
}

/// The names, separated by `|`; `NONE` for the empty set.
impl fmt::Debug for EffectSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("NONE");
        }
        let mut separator = "";
        for (_, name) in Self::NAMES.iter().filter(|(one, _)| self.contains(*one)) {
            write!(f, "{separator}{name}")?;
            separator = "|";
        }
        Ok(())
    }
}
