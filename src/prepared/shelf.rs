//! The named statements of one server connection: which it has, and which of them goes next.

use hashbrown::HashMap;
use slab::Slab;

use super::{Described, Parsed};

/// What one server connection may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Statements.
    pub count: usize,
    /// Bytes of their texts.
    pub bytes: usize,
}

/// What has to be done before one more statement may be put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing.
    Enough,
    /// This one has to go first.
    Without(u64),
    /// It cannot be: whatever could make room is in use, or worth more.
    None,
}

/// One statement.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    id: u64,
    /// Bytes of its text.
    size: usize,
    /// The server has it, or will have when what was sent has run; else it is not certain whether it has.
    certain: bool,
    /// It was run under settings by which it may have been read anew: it may not mean the same any more.
    strayed: bool,
    /// What is known of it.
    pub parsed: Parsed,
    /// When it was used last; see [`Shelf::uses`].
    used: u64,
    newer: usize,
    older: usize,
}

/// No place.
const NOWHERE: usize = usize::MAX;

/// All of them, in the order of their last use.
///
/// ```text
/// (absent) ──Parse sent──▶ certain ──DEALLOCATE, or an error that leaves it open──▶ uncertain
///     ▲                      │  ▲                                                   │      │
///     ├──────Close sent──────┘  └───────────────Close and Parse sent────────────────┘      │
///     └───────────────────────────────────Close sent───────────────────────────────────────┘
/// ```
///
/// One that is not certain takes as much room as any other: the server may have it.
#[derive(Debug)]
pub struct Shelf {
    places: Slab<Place>,
    by_id: HashMap<u64, usize, foldhash::fast::RandomState>,
    newest: usize,
    oldest: usize,
    /// Bytes of all texts.
    bytes: usize,
    /// Executions so far, of these statements and of others.
    uses: u64,
    /// Those at the end of the last batch: what was used since is in use.
    fence: u64,
}

impl Default for Shelf {
    fn default() -> Self {
        Self {
            places: Slab::new(),
            by_id: HashMap::default(),
            newest: NOWHERE,
            oldest: NOWHERE,
            bytes: 0,
            uses: 0,
            fence: 0,
        }
    }
}

impl Shelf {
    /// How many there are, certain or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Bytes of all texts.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The statement, if the server has it for certain. It was used just now.
    #[inline]
    pub fn get(&mut self, id: u64) -> Option<&mut Place> {
        let at = *self.by_id.get(&id)?;
        if !self.places.get(at)?.certain {
            return None;
        }
        if self.newest != at {
            self.unlink(at);
            self.link(at);
        }
        self.uses += 1;
        let place = self.places.get_mut(at)?;
        place.used = self.uses;
        Some(place)
    }

    /// Whether the server has it for certain.
    #[must_use]
    pub fn has(&self, id: u64) -> bool {
        self.peek(id).is_some_and(|place| place.certain)
    }

    /// Whether the server may have it.
    #[must_use]
    pub fn may_have(&self, id: u64) -> bool {
        self.by_id.contains_key(&id)
    }

    fn peek(&self, id: u64) -> Option<&Place> {
        self.by_id.get(&id).and_then(|at| self.places.get(*at))
    }

    /// The server has told how it describes the statement.
    pub fn describe(&mut self, id: u64, described: Described) {
        let at = self.by_id.get(&id).copied();
        if let Some(place) = at.and_then(|at| self.places.get_mut(at)) {
            place.parsed.described = place.parsed.described.with(described);
        }
    }

    /// Something else was executed: what is here has not been used for one execution more.
    #[inline]
    pub fn pass(&mut self) {
        self.uses += 1;
    }

    /// A batch ends: none of its statements is in use any more.
    #[inline]
    pub fn end_batch(&mut self) {
        self.fence = self.uses;
    }

    /// Whether a statement of `size` bytes fits. With `cold`, what makes room must not have been used for so many
    /// executions: then what is in steady use is never exchanged for what is not.
    #[must_use]
    pub fn room(&self, budget: Budget, size: usize, cold: Option<u64>) -> Room {
        if self.len() < budget.count && self.bytes.saturating_add(size) <= budget.bytes {
            return Room::Enough;
        }
        if budget.count == 0 || size > budget.bytes {
            return Room::None;
        }
        let Some(oldest) = self.places.get(self.oldest) else { return Room::None };
        let is_cold = cold.is_none_or(|cold| !oldest.certain || self.uses.saturating_sub(oldest.used) >= cold);
        if oldest.used <= self.fence && is_cold { Room::Without(oldest.id) } else { Room::None }
    }

    /// A `Parse` of it was sent.
    pub fn put(&mut self, id: u64, size: usize, epoch: u32) {
        self.remove(id);
        self.insert(id, size, epoch, true);
    }

    /// The server has confirmed a `Parse` of it. What was put in doubt since that was sent stays so: what did it may have been sent
    /// behind it. An error of an earlier batch may have struck it off meanwhile.
    pub fn confirm(&mut self, id: u64) {
        if !self.may_have(id) {
            self.insert(id, 0, 0, false);
        }
    }

    /// A `Close` of it was sent, or it never was there.
    pub fn remove(&mut self, id: u64) {
        let Some(at) = self.by_id.remove(&id) else { return };
        self.unlink(at);
        if let Some(place) = self.places.try_remove(at) {
            self.bytes = self.bytes.saturating_sub(place.size);
        }
    }

    /// The server may have it or not.
    pub fn doubt(&mut self, id: u64) {
        match self.by_id.get(&id).and_then(|at| self.places.get_mut(*at)) {
            Some(place) => place.certain = false,
            None => self.insert(id, 0, 0, false),
        }
    }

    /// It is run under settings by which it may be read anew.
    pub fn stray(&mut self, id: u64) {
        if let Some(place) = self.by_id.get(&id).and_then(|at| self.places.get_mut(*at)) {
            place.strayed = true;
        }
    }

    /// Whoever comes next needs each as it was parsed.
    pub fn doubt_strays(&mut self) {
        for (_, place) in &mut self.places {
            place.certain &= !place.strayed;
        }
    }

    /// The server may have any of them or not.
    pub fn doubt_all(&mut self) {
        for (_, place) in &mut self.places {
            place.certain = false;
        }
    }

    /// The server has none of them.
    pub fn clear(&mut self) {
        *self = Self { uses: self.uses, fence: self.fence, ..Self::default() };
    }

    fn insert(&mut self, id: u64, size: usize, epoch: u32, certain: bool) {
        self.uses += 1;
        let parsed = Parsed { epoch, ..Parsed::default() };
        let place =
            Place { id, size, certain, strayed: false, parsed, used: self.uses, newer: NOWHERE, older: NOWHERE };
        let at = self.places.insert(place);
        self.by_id.insert(id, at);
        self.bytes += size;
        self.link(at);
    }

    fn link(&mut self, at: usize) {
        let before = std::mem::replace(&mut self.newest, at);
        if let Some(place) = self.places.get_mut(at) {
            (place.newer, place.older) = (NOWHERE, before);
        }
        match self.places.get_mut(before) {
            Some(place) => place.newer = at,
            None => self.oldest = at,
        }
    }

    fn unlink(&mut self, at: usize) {
        let Some(Place { newer, older, .. }) = self.places.get(at).copied() else { return };
        match self.places.get_mut(newer) {
            Some(place) => place.older = older,
            None => self.newest = older,
        }
        match self.places.get_mut(older) {
            Some(place) => place.newer = newer,
            None => self.oldest = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET: Budget = Budget { count: 3, bytes: 100 };

    #[test]
    fn the_one_used_longest_ago_makes_room_unless_it_is_in_use() {
        let mut shelf = Shelf::default();
        for id in 1..=3 {
            assert_eq!(shelf.room(BUDGET, 10, None), Room::Enough);
            shelf.put(id, 10, 0);
        }
        assert_eq!(shelf.room(BUDGET, 10, None), Room::None, "all are of this batch");
        shelf.end_batch();
        assert!(shelf.get(1).is_some());
        assert_eq!(shelf.room(BUDGET, 10, None), Room::Without(2));
        assert_eq!(shelf.room(BUDGET, 10, Some(100)), Room::None, "it is not cold yet");
        (0..100).for_each(|_| shelf.pass());
        assert_eq!(shelf.room(BUDGET, 10, Some(100)), Room::Without(2));
        assert_eq!(shelf.room(BUDGET, 101, None), Room::None, "larger than everything");
        shelf.remove(2);
        assert_eq!(shelf.room(BUDGET, 80, None), Room::Enough);
        assert_eq!(shelf.room(BUDGET, 81, None), Room::Without(3));
        assert_eq!(shelf.room(Budget { count: 0, ..BUDGET }, 1, None), Room::None);
    }

    #[test]
    fn what_is_in_doubt_takes_room_and_makes_it_first() {
        let mut shelf = Shelf::default();
        (1..=3).for_each(|id| shelf.put(id, 10, 0));
        shelf.end_batch();
        shelf.doubt_all();
        assert!(shelf.get(1).is_none() && shelf.may_have(1) && !shelf.has(1));
        assert_eq!(shelf.room(BUDGET, 10, Some(1000)), Room::Without(1));
        shelf.put(2, 10, 0);
        assert!(shelf.has(2));
        shelf.clear();
        assert_eq!((shelf.len(), shelf.bytes(), shelf.room(BUDGET, 10, None)), (0, 0, Room::Enough));
    }

    #[test]
    fn what_is_put_in_doubt_behind_its_parse_is_not_certain_by_the_answer() {
        let mut shelf = Shelf::default();
        (1..=2).for_each(|id| shelf.put(id, 10, 0));
        shelf.confirm(1);
        assert!(shelf.has(1));
        // A DEALLOCATE ALL was sent; the answer to the Parse in front of it comes only now.
        shelf.doubt_all();
        shelf.confirm(2);
        assert!(shelf.may_have(2) && !shelf.has(2) && shelf.get(2).is_none());
        // Struck off by an error of an earlier batch.
        shelf.remove(2);
        shelf.confirm(2);
        assert!(shelf.may_have(2) && !shelf.has(2));
        shelf.put(2, 10, 0);
        shelf.confirm(2);
        assert!(shelf.has(2));
    }

    /// What a shelf is told.
    #[derive(Clone, Debug)]
    enum Told {
        Parsed(u64, usize),
        Used(u64),
        Closed(u64),
        Doubted(u64),
        Ended,
    }

    fn told() -> impl Strategy<Value = Told> {
        let id = || 0..8_u64;
        prop_oneof![
            4 => (id(), 1..40_usize).prop_map(|(id, size)| Told::Parsed(id, size)),
            4 => id().prop_map(Told::Used),
            1 => id().prop_map(Told::Closed),
            1 => id().prop_map(Told::Doubted),
            2 => Just(Told::Ended),
        ]
    }

    proptest! {
        /// Against a list that is searched from its front.
        #[test]
        fn a_shelf_is_a_list_in_the_order_of_use(all in prop::collection::vec(told(), 1..200)) {
            let mut shelf = Shelf::default();
            // (id, size, certain, in use), the oldest first.
            let mut list: Vec<(u64, usize, bool, bool)> = Vec::new();
            for told in all {
                match told {
                    Told::Parsed(id, size) => {
                        // As the callers do: first room, then the statement.
                        list.retain(|known| known.0 != id);
                        shelf.remove(id);
                        while let Room::Without(victim) = shelf.room(BUDGET, size, None) {
                            prop_assert_eq!(Some(victim), list.first().map(|first| first.0));
                            prop_assert!(!list[0].3, "in use");
                            list.remove(0);
                            shelf.remove(victim);
                        }
                        if shelf.room(BUDGET, size, None) == Room::Enough {
                            shelf.put(id, size, 0);
                            list.push((id, size, true, true));
                        }
                    }
                    Told::Used(id) => {
                        let at = list.iter().position(|known| known.0 == id);
                        prop_assert_eq!(shelf.get(id).is_some(), at.is_some_and(|at| list[at].2));
                        if let Some(at) = at.filter(|at| list[*at].2) {
                            let known = list.remove(at);
                            list.push((known.0, known.1, true, true));
                        }
                    }
                    Told::Closed(id) => {
                        shelf.remove(id);
                        list.retain(|known| known.0 != id);
                    }
                    Told::Doubted(id) if shelf.peek(id).is_some() => {
                        shelf.doubt(id);
                        for known in list.iter_mut().filter(|known| known.0 == id) {
                            known.2 = false;
                        }
                    }
                    Told::Doubted(_) => {}
                    Told::Ended => {
                        shelf.end_batch();
                        for known in &mut list {
                            known.3 = false;
                        }
                    }
                }
                prop_assert_eq!(shelf.len(), list.len());
                prop_assert_eq!(shelf.bytes(), list.iter().map(|known| known.1).sum::<usize>());
                prop_assert!(shelf.len() <= BUDGET.count && shelf.bytes() <= BUDGET.bytes);
                let mut at = shelf.oldest;
                for known in &list {
                    let place = shelf.places[at];
                    prop_assert_eq!((place.id, place.size, place.certain), (known.0, known.1, known.2));
                    at = place.newer;
                }
                prop_assert_eq!(at, NOWHERE);
            }
        }
    }
}
