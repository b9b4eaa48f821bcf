//! A map that forgets what was not put in lately, so that memory is bounded whatever comes.

use std::collections::HashMap;
use std::hash::Hash;

/// Two halves take turns to be the fresh one: when it is full, the stale one goes.
///
/// Keys are others' choice, hence the standard hasher, which they cannot aim at.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    half: usize,
    fresh: HashMap<K, V>,
    stale: HashMap<K, V>,
}

impl<K: Hash + Eq, V> Recent<K, V> {
    /// Holds at least the last `half` keys that were put in, and at most twice as many.
    pub(super) fn new(half: usize) -> Self {
        Self { half, fresh: HashMap::new(), stale: HashMap::new() }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.fresh.get(key).or_else(|| self.stale.get(key))
    }

    pub(super) fn put(&mut self, key: K, value: V) {
        if self.fresh.len() >= self.half && !self.fresh.contains_key(&key) {
            self.stale = std::mem::take(&mut self.fresh);
        }
        self.fresh.insert(key, value);
    }

    pub(super) fn remove(&mut self, key: &K) {
        self.fresh.remove(key);
        self.stale.remove(key);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.fresh.len() + self.stale.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_there_and_memory_is_bounded() {
        let mut recent = Recent::new(100);
        for n in 0..10_000_u32 {
            recent.put(n, n);
            recent.put(7, n);
            assert!(recent.len() <= 200);
            assert!((n.saturating_sub(40)..=n).all(|last| recent.get(&last).is_some()));
            assert_eq!(recent.get(&7), Some(&n));
        }
        recent.remove(&7);
        assert_eq!(recent.get(&7), None);
    }
}
