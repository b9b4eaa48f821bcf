//! Where a primary was, and when it was asked.

use std::collections::VecDeque;

use super::Position;
use crate::clock::Moment;

/// Samples of either kind that are kept, at most.
const SAMPLES_MAX: usize = 64;

/// Samples of one life and timeline of a primary, the newest last; neither moments nor positions ever decrease. The newest are
/// all there, of older ones some, at a distance: so that it is known how far behind one is that is far behind.
#[derive(Debug)]
pub(super) struct History {
    /// Microseconds from one of the older ones to the next, at least.
    distance: u64,
    older: VecDeque<(Moment, Position)>,
    newest: VecDeque<(Moment, Position)>,
}

impl History {
    pub(super) fn new(distance: u64) -> Self {
        Self { distance, older: VecDeque::new(), newest: VecDeque::new() }
    }

    /// Notes that the primary was at `position` or past it from `sent` on. False if it has been past it before: then it is
    /// another history.
    pub(super) fn note(&mut self, sent: Moment, position: Position) -> bool {
        if let Some((last_sent, last)) = self.newest.back_mut() {
            if sent < *last_sent {
                // An answer that was overtaken by a later one.
                return true;
            }
            if position <= *last {
                *last_sent = sent;
                return position == *last;
            }
        }
        if self.newest.len() == SAMPLES_MAX
            && let Some(oldest) = self.newest.pop_front()
            && self.older.back().is_none_or(|(before, _)| oldest.0.since(*before) >= self.distance)
        {
            if self.older.len() == SAMPLES_MAX {
                self.older.pop_front();
            }
            self.older.push_back(oldest);
        }
        self.newest.push_back((sent, position));
        true
    }

    /// The newest sample.
    pub(super) fn latest(&self) -> Option<(Moment, Position)> {
        self.newest.back().copied()
    }

    /// The latest moment whose position is not past this one.
    pub(super) fn covered_by(&self, position: Position) -> Option<Moment> {
        let last_of = |samples: &VecDeque<(Moment, Position)>| {
            let covered = samples.partition_point(|(_, known)| *known <= position);
            samples.get(covered.checked_sub(1)?).map(|(sent, _)| *sent)
        };
        last_of(&self.newest).or_else(|| last_of(&self.older))
    }

    /// How long ago, seen from the newest sample, the primary was at this position; microseconds. At least so long, if
    /// that was before the first sample.
    pub(super) fn lag(&self, position: Position) -> u64 {
        let first = self.older.front().or_else(|| self.newest.front());
        let (Some((latest, last)), Some((first, _))) = (self.latest(), first.copied()) else { return 0 };
        if position >= last { 0 } else { latest.since(self.covered_by(position).unwrap_or(first)) }
    }
}
