//! What followers refused lately.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use hashbrown::HashMap;

use crate::clock::Moment;
use crate::sql::Fingerprint;

/// How long a refusal is remembered; microseconds. Then a follower is asked once more.
const REMEMBERED_US: u64 = 60_000_000;

/// Refusals that are remembered, at most; the oldest makes room.
const REFUSALS_MAX: usize = 1024;

/// The texts that a follower refused (25006, 0A000, 55000), by database, `search_path` and fingerprint: they go to the
/// primary at once for a while. A conflict or a loss is no refusal.
///
/// Kept by a hash: if two should ever have the same, a read goes to the primary that need not.
#[derive(Debug, Default)]
pub struct Refusals {
    since: HashMap<u64, Moment>,
    /// The same, the oldest first. One that was refused again stands here more than once.
    order: VecDeque<(Moment, u64)>,
    hasher: foldhash::fast::RandomState,
}

impl Refusals {
    /// Remembers that a follower refused `text`.
    #[cold]
    pub fn remember(&mut self, database: &str, search_path: &str, text: &[u8], now: Moment) {
        let key = self.key(database, search_path, text);
        while self.order.len() >= REFUSALS_MAX {
            self.forget_oldest();
        }
        self.since.insert(key, now);
        self.order.push_back((now, key));
    }

    /// Whether a follower refused `text` lately. Costs next to nothing while none refused anything.
    #[inline]
    pub fn holds(&mut self, database: &str, search_path: &str, text: &[u8], now: Moment) -> bool {
        !self.since.is_empty() && self.look_up(database, search_path, text, now)
    }

    /// Refusals that are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.since.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.since.is_empty()
    }

    #[cold]
    fn look_up(&mut self, database: &str, search_path: &str, text: &[u8], now: Moment) -> bool {
        while self.order.front().is_some_and(|(since, _)| now.since(*since) >= REMEMBERED_US) {
            self.forget_oldest();
        }
        self.since.contains_key(&self.key(database, search_path, text))
    }

    fn forget_oldest(&mut self) {
        if let Some((then, key)) = self.order.pop_front()
            && self.since.get(&key) == Some(&then)
        {
            self.since.remove(&key);
        }
    }

    fn key(&self, database: &str, search_path: &str, text: &[u8]) -> u64 {
        // A text that is none to the lexer stands for itself.
        match Fingerprint::of(text, false) {
            Some(made) => self.hasher.hash_one((database, search_path, 0, &*made.tokens)),
            None => self.hasher.hash_one((database, search_path, 1, text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_remembered_for_a_while_whatever_the_literals() {
        let mut refusals = Refusals::default();
        assert!(!refusals.holds("d", "public", b"SELECT f(1)", Moment::at(1)));
        refusals.remember("d", "public", b"SELECT f(1)", Moment::at(1));
        let at = Moment::at(REMEMBERED_US);
        assert!(refusals.holds("d", "public", b"select  f(2) -- again", at));
        assert!(!refusals.holds("e", "public", b"SELECT f(1)", at), "another database");
        assert!(!refusals.holds("d", "other", b"SELECT f(1)", at), "another path");
        assert!(!refusals.holds("d", "public", b"SELECT g(1)", at), "another function");
        refusals.remember("d", "public", b"SELECT f(3)", at);
        assert!(refusals.holds("d", "public", b"SELECT f(1)", Moment::at(REMEMBERED_US + 1)), "refused again");
        assert!(!refusals.holds("d", "public", b"SELECT f(1)", Moment::at(2 * REMEMBERED_US)));
        assert!(refusals.is_empty());
        refusals.remember("d", "public", b"SELECT 'open", at);
        assert!(refusals.holds("d", "public", b"SELECT 'open", at));
        assert!(!refusals.holds("d", "public", b"SELECT 'other", at));
    }

    #[test]
    fn refusals_are_bounded() {
        let mut refusals = Refusals::default();
        for n in 0..10_000_u64 {
            refusals.remember("d", "", format!("SELECT a{n}").as_bytes(), Moment::at(n));
            refusals.remember("d", "", b"SELECT again", Moment::at(n));
        }
        assert!(refusals.len() <= REFUSALS_MAX && refusals.order.len() <= REFUSALS_MAX, "{}", refusals.len());
        assert!(refusals.holds("d", "", b"SELECT again", Moment::at(10_000)));
        assert!(refusals.holds("d", "", b"SELECT a9999", Moment::at(10_000)));
        assert!(!refusals.holds("d", "", b"SELECT a1", Moment::at(10_000)));
    }
}
