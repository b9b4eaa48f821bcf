//! Effects of the texts seen lately: an application sends few different ones, and sends them often.

use std::hash::BuildHasher;

use super::{Effects, scan};

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
    effects: Effects,
}

impl Default for Cache {
    fn default() -> Self {
        // The empty text is in every slot, truly.
        let empty = Slot { len: 0, text: [0; TEXT_MAX], effects: scan(b"") };
        Self { slots: vec![empty; SLOTS], hasher: foldhash::fast::RandomState::default() }
    }
}

impl Cache {
    /// The same as [`scan`].
    #[inline]
    pub fn scan(&mut self, text: &[u8]) -> Effects {
        if text.len() > TEXT_MAX {
            return scan(text);
        }
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let at = self.hasher.hash_one(text) as usize % SLOTS;
        let Some(slot) = self.slots.get_mut(at) else {
            return scan(text);
        };
        if slot.text.get(..slot.len) != Some(text) {
            slot.len = text.len();
            if let Some(room) = slot.text.get_mut(..text.len()) {
                room.copy_from_slice(text);
            }
            slot.effects = scan(text);
        }
        slot.effects
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
                prop_assert_eq!(cache.scan(text.as_bytes()), scan(text.as_bytes()));
            }
        }
    }
}
