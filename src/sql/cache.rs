//! Effects of the texts seen lately: an application sends few different ones, and sends them often.

use std::hash::BuildHasher;

use pgweir_proto::Malformed;
use pgweir_proto::frontend::query_text;

use super::{EffectSet, Effects, scan};

/// Longer texts are not kept; bytes.
const TEXT_MAX: usize = 240;

/// Texts kept, at most. A power of two.
const SLOTS: usize = 256;

/// What [`scan`] said of recent texts. The whole text is compared, so that an answer is never another text's.
#[derive(Debug)]
pub struct Cache {
    slots: Vec<Slot>,
    hasher: foldhash::fast::RandomState,
}

#[derive(Clone, Debug)]
struct Slot {
    len: usize,
    text: [u8; TEXT_MAX],
    /// What the text does by itself.
    own: EffectSet,
    /// That, and what it sets in motion, in the catalog that `judged` names.
    effects: Effects,
    judged: u64,
}

/// The catalog of no database: nothing is set in motion in it.
const NO_CATALOG: u64 = u64::MAX;

impl Default for Cache {
    fn default() -> Self {
        // The empty text is in every slot, truly.
        let effects = scan(b"");
        let empty = Slot { len: 0, text: [0; TEXT_MAX], own: effects.set, effects, judged: NO_CATALOG };
        Self { slots: vec![empty; SLOTS], hasher: foldhash::fast::RandomState::default() }
    }
}

impl Cache {
    /// The text in the body of a `Query`, and the same as [`scan`] says of it.
    ///
    /// # Errors
    ///
    /// [`Malformed`] as [`query_text`] says.
    pub fn scan<'a>(&mut self, body: &'a [u8]) -> Result<(&'a [u8], Effects), Malformed> {
        self.judge(body, NO_CATALOG, |_, _| EffectSet::NONE)
    }

    /// The same, with what the text sets in motion: `through` says it, given the text and what it does by itself.
    /// `catalog` names what `through` knows: it is asked again when that is another.
    ///
    /// # Errors
    ///
    /// [`Malformed`] as [`query_text`] says.
    #[inline]
    pub fn judge<'a>(
        &mut self,
        body: &'a [u8],
        catalog: u64,
        through: impl FnOnce(&[u8], EffectSet) -> EffectSet,
    ) -> Result<(&'a [u8], Effects), Malformed> {
        // Whatever is kept was read before, so it ends where it should and nowhere before.
        if let Some((0, text)) = body.split_last()
            && let Some(slot) = self.slot(text)
        {
            if slot.text.get(..slot.len) != Some(text) {
                query_text(body)?;
                slot.learn(text);
                slot.effects.set = slot.own | through(text, slot.own);
                slot.judged = catalog;
            } else if slot.judged != catalog {
                slot.effects.set = slot.own | through(text, slot.own);
                slot.judged = catalog;
            }
            return Ok((text, slot.effects));
        }
        let text = query_text(body)?;
        let mut effects = scan(text);
        effects.set |= through(text, effects.set);
        Ok((text, effects))
    }

    #[inline]
    fn slot(&mut self, text: &[u8]) -> Option<&mut Slot> {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let at = self.hasher.hash_one(text) as usize % SLOTS;
        self.slots.get_mut(at).filter(|slot| text.len() <= slot.text.len())
    }
}

impl Slot {
    fn learn(&mut self, text: &[u8]) {
        self.len = text.len();
        if let Some(room) = self.text.get_mut(..text.len()) {
            room.copy_from_slice(text);
        }
        self.effects = scan(text);
        self.own = self.effects.set;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_remembered_answer_is_the_scanners_own(picks in prop::collection::vec((0usize..5, 0u32..600), 1..400)) {
            let mut cache = Cache::default();
            for (kind, n) in picks {
                let text = match kind {
                    0 => format!("SELECT {n}"),
                    1 => format!("SET work_mem = {n}"),
                    2 => format!("LISTEN c{n}"),
                    3 => String::new(),
                    _ => format!("SELECT '{}'", "x".repeat(n as usize)),
                };
                let body = [text.as_bytes(), b"\0"].concat();
                prop_assert_eq!(cache.scan(&body), Ok((text.as_bytes(), scan(text.as_bytes()))));
                prop_assert_eq!(cache.scan(text.as_bytes()).ok(), None, "no NUL at the end");
                let cut = [text.as_bytes(), b"\0\0"].concat();
                prop_assert_eq!(cache.scan(&cut), query_text(&cut).map(|text| (text, scan(text))), "one too many");
            }
        }
    }
}
