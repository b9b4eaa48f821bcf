//! How often a text was executed lately, without keeping it: a count-min sketch that forgets.
//!
//! Source: Cormode and Muthukrishnan, "An Improved Data Stream Summary" (2005); the ageing is that of `TinyLFU`
//! (Einziger, Friedman and Manes, 2017).

/// Counters of one row; a power of two.
const WIDTH: usize = 1 << 14;

/// Rows: an estimate is wrong only if the text shares a counter with others in each of them.
const ROWS: usize = 4;

/// Executions after which every count is halved.
const WINDOW: u32 = 1 << 14;

/// Counts of executions by the hash of the text: never too low, hardly ever too high.
pub struct Sketch {
    counters: Box<[u8]>,
    added: u32,
}

impl std::fmt::Debug for Sketch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sketch").field("added", &self.added).finish_non_exhaustive()
    }
}

impl Default for Sketch {
    fn default() -> Self {
        Self { counters: vec![0; ROWS * WIDTH].into(), added: 0 }
    }
}

impl Sketch {
    /// The text was executed once more. How often that was lately.
    pub fn add(&mut self, hash: u64) -> u8 {
        self.added += 1;
        if self.added >= WINDOW {
            self.added = 0;
            self.counters.iter_mut().for_each(|counter| *counter /= 2);
        }
        let count = self.count(hash).saturating_add(1);
        for at in places(hash) {
            // Only those that are lower: the others count somebody else's already.
            if let Some(counter) = self.counters.get_mut(at).filter(|counter| **counter < count) {
                *counter = count;
            }
        }
        count
    }

    /// How often the text was executed lately.
    #[must_use]
    pub fn count(&self, hash: u64) -> u8 {
        places(hash).filter_map(|at| self.counters.get(at)).min().copied().unwrap_or(0)
    }
}

/// Its counter in each row.
fn places(hash: u64) -> impl Iterator<Item = usize> {
    (0..ROWS).map(move |row| {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let column = (hash >> (row * 16)) as usize % WIDTH;
        row * WIDTH + column
    })
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use super::*;

    #[test]
    fn counts_are_never_too_low_and_hardly_ever_too_high() {
        let hasher = foldhash::fast::FixedState::default();
        let mut sketch = Sketch::default();
        // As many different texts as fit into a window, and a few that come again and again.
        let mut often = [0_u8; 10];
        for n in 0..WINDOW - 1 {
            if n % 64 == 0 {
                let which = n as usize / 64 % 10;
                often[which] += 1;
                assert!(sketch.add(hasher.hash_one(which)) >= often[which], "{n}");
            } else {
                sketch.add(hasher.hash_one(n + 1000));
            }
        }
        let once = (0..WINDOW - 1).filter(|n| n % 64 != 0);
        let wrong = once.filter(|n| sketch.count(hasher.hash_one(n + 1000)) >= super::super::PROMOTE_AT).count();
        assert!(wrong <= 16, "{wrong} of {WINDOW} seem to come again");
    }

    #[test]
    fn what_comes_no_more_is_forgotten() {
        let mut sketch = Sketch::default();
        for _ in 0..100 {
            sketch.add(7);
        }
        assert_eq!(sketch.count(7), 100);
        for n in 0..WINDOW * 8 {
            sketch.add(u64::from(n).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        }
        assert!(sketch.count(7) < 10, "{}", sketch.count(7));
    }
}
