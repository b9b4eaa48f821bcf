//! Who leads to whom in a catalog, and what follows.

use hashbrown::HashMap;

use crate::sql::EffectSet;
use crate::stats::RouteReason;

/// The graver of two reasons, if there is any: always the same of two, so that two surveys of one catalog agree.
///
/// What a follower refuses, or answers from its own point of view, is less grave than what it would accept and must not.
pub(super) fn worse(one: Option<RouteReason>, other: Option<RouteReason>) -> Option<RouteReason> {
    let rank = |reason: &RouteReason| match reason {
        RouteReason::Write => 1,
        RouteReason::Relation => 2,
        RouteReason::Server => 3,
        RouteReason::Function => 4,
        RouteReason::Transaction => 5,
        RouteReason::Unknown => 6,
        RouteReason::Serializable => 7,
        RouteReason::Lock => 8,
        RouteReason::Session => 9,
        // These are no reasons for which a text is barred.
        _ => 0,
    };
    one.into_iter().chain(other).max_by_key(rank)
}

/// For whom an edge is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Whoever runs the one does what the other does.
    Both,
    /// The same, but nobody does who only reads.
    Effects,
    /// Only the rows of the other are asked for.
    Reads,
}

/// Nodes, the edges between them, and what each node does.
#[derive(Default)]
pub(super) struct Graph {
    /// From the end of each edge to its beginnings.
    back: HashMap<Box<str>, Vec<(Box<str>, Way)>>,
    marks: HashMap<Box<str>, EffectSet>,
    /// What is not for a follower.
    bars: HashMap<Box<str>, RouteReason>,
}

impl Graph {
    pub(super) fn edge(&mut self, from: &str, to: &str, way: Way) {
        self.back.entry(to.into()).or_default().push((from.into(), way));
    }

    pub(super) fn mark(&mut self, node: &str, set: EffectSet) {
        if !set.is_empty() {
            *self.marks.entry(node.into()).or_default() |= set;
        }
    }

    pub(super) fn bar(&mut self, node: &str, why: RouteReason) {
        let known = self.bars.get(node).copied();
        if let Some(why) = worse(known, Some(why)) {
            self.bars.insert(node.into(), why);
        }
    }

    /// Whatever leads to a node does what it does.
    pub(super) fn close(mut self) -> HashMap<Box<str>, EffectSet> {
        let mut todo: Vec<Box<str>> = self.marks.keys().cloned().collect();
        while let Some(node) = todo.pop() {
            let set = self.marks.get(&node).copied().unwrap_or_default();
            for (from, way) in self.back.get(&node).into_iter().flatten() {
                if *way == Way::Reads {
                    continue;
                }
                let known = self.marks.entry(from.clone()).or_default();
                if !known.contains(set) {
                    *known |= set;
                    todo.push(from.clone());
                }
            }
        }
        self.marks
    }

    /// Whatever leads to a node by reading is as little for a follower, if it is one of these.
    pub(super) fn close_bars(&mut self, of: impl Fn(&str) -> bool) -> HashMap<Box<str>, RouteReason> {
        let mut bars = std::mem::take(&mut self.bars);
        let mut todo: Vec<Box<str>> = bars.keys().cloned().collect();
        while let Some(node) = todo.pop() {
            let why = bars.get(&node).copied();
            for (from, way) in self.back.get(&node).into_iter().flatten() {
                if *way == Way::Effects || !of(from) {
                    continue;
                }
                let known = bars.get(from).copied();
                if let Some(graver) = worse(known, why)
                    && known != Some(graver)
                {
                    bars.insert(from.clone(), graver);
                    todo.push(from.clone());
                }
            }
        }
        bars
    }
}
