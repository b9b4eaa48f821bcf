//! One row of a table of settings, and the macro that turns rows into structs.

use crate::fault::Problem;
use crate::typed::{Kind, Raw};

/// When a changed value takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// At the next reload (`SIGHUP` or `RELOAD`).
    Live,
    /// At the next start.
    Restart,
}

impl Reload {
    /// `live` or `restart`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Restart => "restart",
        }
    }
}

/// The least and the greatest value, both allowed, in the setting's own notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The least value.
    pub low: &'static str,
    /// The greatest value.
    pub high: &'static str,
}

/// A setting: everything there is to know about it, and how to set and show it in a `T`.
pub struct Setting<T: 'static> {
    /// Its key, `snake_case`; the same in the file, and in a variable and a flag with their own spelling.
    pub name: &'static str,
    /// The table it stands under: `pool` for `[pool]`, `databases` for `[databases.NAME]`.
    pub group: &'static str,
    /// How its value is written.
    pub kind: Kind,
    /// Its default as text; empty if it is absent by default.
    pub default: &'static str,
    /// An example for a setting that is absent by default; empty otherwise.
    pub example: &'static str,
    /// The range of a number, a time or a size.
    pub bounds: Option<Bounds>,
    /// When a change takes effect.
    pub reload: Reload,
    /// What it means; one sentence or more, lines as in the source.
    pub doc: &'static str,
    pub(crate) read: fn(&mut T, &Raw<'_>) -> Result<(), Problem>,
    pub(crate) show: fn(&T) -> String,
}

impl<T> Setting<T> {
    /// The value in `target` as text; secrets are masked, an absent value is empty.
    #[must_use]
    pub fn show(&self, target: &T) -> String {
        (self.show)(target)
    }
}

/// Defines a group of settings once: the struct, its defaults and its rows.
///
/// A row is `name: Type = default, in low..=high, check function => live;` where all but the name, the type and the
/// reload class may be missing; `as example` stands in place of a default for what is absent by default.
/// Everything that is derived from a row (the field's doc included) cannot drift from it.
macro_rules! group {
    (
        $(#[doc = $group_doc:literal])*
        $Group:ident, $key:literal, |$target:ident: $Target:ty| $place:expr, $ROWS:ident {
            $(
                $(#[doc = $doc:literal])*
                $name:ident: $Type:ty
                    $(= $default:literal)? $(as $example:literal)?
                    $(, in $low:literal..=$high:literal)?
                    $(, check $check:path)?
                    => $reload:ident;
            )+
        }
    ) => {
        $(#[doc = $group_doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $Group {
            $(
                $(#[doc = $doc])*
                #[doc = ""]
                $(#[doc = concat!("Default `", stringify!($default), "`.")])?
                $(#[doc = concat!("Range `", stringify!($low), "..=", stringify!($high), "`.")])?
                #[doc = concat!("Reload: ", stringify!($reload), ".")]
                pub $name: $Type,
            )+
        }

        impl Default for $Group {
            fn default() -> Self {
                // A test reads every default back, so that the fallback below is never taken.
                Self {
                    $($name: <$Type as $crate::typed::Typed>::read(
                        &$crate::typed::Raw::Word(concat!($($default)?)),
                        None,
                    ).unwrap_or_default(),)+
                }
            }
        }

        pub(crate) static $ROWS: &[$crate::setting::Setting<$Target>] = &[$(
            $crate::setting::Setting {
                name: stringify!($name),
                group: $key,
                kind: <$Type as $crate::typed::Typed>::KIND,
                default: concat!($($default)?),
                example: concat!($($example)?),
                bounds: $crate::setting::group!(@bounds $($low, $high)?),
                reload: $crate::setting::group!(@reload $reload),
                doc: concat!($($doc, "\n"),*),
                read: |$target, raw| {
                    let bounds = $crate::setting::group!(@bounds $($low, $high)?);
                    let value = <$Type as $crate::typed::Typed>::read(raw, bounds)?;
                    $($check(&value)?;)?
                    $place.$name = value;
                    Ok(())
                },
                show: |$target| $crate::typed::Typed::show(&$place.$name),
            },
        )+];
    };
    (@bounds) => { None };
    (@bounds $low:literal, $high:literal) => {
        Some($crate::setting::Bounds { low: concat!($low), high: concat!($high) })
    };
    (@reload live) => { $crate::setting::Reload::Live };
    (@reload restart) => { $crate::setting::Reload::Restart };
}
pub(crate) use group;
