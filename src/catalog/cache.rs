//! Where the texts seen lately may run: an application sends few different ones, and sends them often.

use std::hash::BuildHasher;

use super::Judged;

/// Longer texts are not kept; bytes.
const TEXT_MAX: usize = 1024;

/// Texts kept, at most. A power of two.
const SLOTS: usize = 512;

/// What [`Suspects::route`](super::Suspects::route) said of recent texts. The whole text is compared, so that an answer is
/// never another text's.
#[derive(Debug)]
pub struct RouteCache {
    slots: Vec<Slot>,
    /// Texts that were known.
    pub hits: u64,
    hasher: foldhash::fast::RandomState,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    /// Keeps its room when another text takes its place.
    text: Vec<u8>,
    /// None if the slot is empty; else what is known of the text in the catalog of this key.
    judged: Option<(u64, Judged)>,
}

impl Default for RouteCache {
    fn default() -> Self {
        Self { slots: vec![Slot::default(); SLOTS], hits: 0, hasher: foldhash::fast::RandomState::default() }
    }
}

impl RouteCache {
    /// What `route` says of `text`, or has said of it while the catalog had this key; see
    /// [`Knowledge::key`](crate::pool::Knowledge::key).
    #[inline]
    pub fn judge(&mut self, text: &[u8], catalog: u64, route: impl FnOnce() -> Judged) -> Judged {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let at = self.hasher.hash_one(text) as usize % SLOTS;
        let Some(slot) = self.slots.get_mut(at).filter(|_| text.len() <= TEXT_MAX) else { return route() };
        let same = *slot.text == *text;
        match slot.judged {
            Some((key, judged)) if same && key == catalog => {
                self.hits += 1;
                judged
            }
            _ => {
                let judged = route();
                if !same {
                    slot.text.clear();
                    slot.text.extend_from_slice(text);
                }
                slot.judged = Some((catalog, judged));
                judged
            }
        }
    }

    /// Bytes of all texts that are kept, with the room that they leave.
    #[cfg(test)]
    fn size(&self) -> usize {
        self.slots.iter().map(|slot| slot.text.capacity()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::catalog::Route;

    #[test]
    fn a_text_is_judged_once_for_each_catalog() {
        let mut cache = RouteCache::default();
        let asked = Cell::new(0);
        let mut judge = |text: &str, catalog| {
            let judged = cache.judge(text.as_bytes(), catalog, || {
                asked.set(asked.get() + 1);
                Judged { route: Route::Begin { read_only: Some(text.len() > 9) }, hint: None }
            });
            assert_eq!(judged.route, Route::Begin { read_only: Some(text.len() > 9) }, "{text}");
            asked.get()
        };
        assert_eq!([judge("", 1), judge("", 1), judge("a", 1), judge("a", 1), judge("", 1)], [1, 1, 2, 2, 2]);
        assert_eq!([judge("a", 2), judge("a", 2), judge("a", 1)], [3, 3, 4], "another catalog");
        let long = "x".repeat(TEXT_MAX + 1);
        assert_eq!([judge(&long, 1), judge(&long, 1)], [5, 6], "too long to be kept");
        for n in 0..5000 {
            let _ = judge(&format!("{n} {}", "y".repeat(n % TEXT_MAX)), 1);
        }
        assert!(cache.size() <= SLOTS * TEXT_MAX * 2, "{}", cache.size());
    }
}
