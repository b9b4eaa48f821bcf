//! Effects of the texts seen lately: an application sends few different ones, and sends them often.

use std::hash::BuildHasher;

use pgweir_proto::Malformed;
use pgweir_proto::frontend::query_text;

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
    /// The text in the body of a `Query`, and the same as [`scan`] says of it.
    ///
    /// # Errors
    ///
    /// [`Malformed`] as [`query_text`] says.
    #[inline]
    pub fn scan<'a>(&mut self, body: &'a [u8]) -> Result<(&'a [u8], Effects), Malformed> {
        // Whatever is kept was read before, so it ends where it should and nowhere before.
        if let Some((0, text)) = body.split_last()
            && let Some(slot) = self.slot(text)
        {
            if slot.text.get(..slot.len) != Some(text) {
                query_text(body)?;
                slot.learn(text);
            }
            return Ok((text, slot.effects));
        }
        query_text(body).map(|text| (text, scan(text)))
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
