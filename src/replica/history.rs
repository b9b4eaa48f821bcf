//! Where a primary was, and when it was asked.

use std::collections::VecDeque;

use super::Position;
use crate::clock::Moment;

/// Samples that are kept, at most; of the older half every second one goes to make room.
const SAMPLES_MAX: usize = 128;

/// Samples of one life and timeline of a primary, the newest last; neither moments nor positions ever decrease.
#[derive(Debug, Default)]
pub(super) struct History {
    samples: VecDeque<(Moment, Position)>,
}

impl History {
    /// Notes that the primary was at `position` or past it from `sent` on. False if it has been past it before: then it is
    /// another history.
    pub(super) fn note(&mut self, sent: Moment, position: Position) -> bool {
        if let Some((last_sent, last)) = self.samples.back_mut() {
            if position < *last {
                // An answer that was overtaken by a later one.
                return sent <= *last_sent;
            }
            if position == *last {
                *last_sent = sent.max(*last_sent);
                return true;
            }
        }
        if self.samples.len() == SAMPLES_MAX {
            let mut at = 0;
            self.samples.retain(|_| {
                at += 1;
                at > SAMPLES_MAX / 2 || at % 2 == 0
            });
        }
        self.samples.push_back((sent, position));
        true
    }

    /// The newest sample.
    pub(super) fn latest(&self) -> Option<(Moment, Position)> {
        self.samples.back().copied()
    }

    /// The latest moment whose position is not past this one.
    pub(super) fn covered_by(&self, position: Position) -> Option<Moment> {
        let covered = self.samples.partition_point(|(_, known)| *known <= position);
        self.samples.get(covered.checked_sub(1)?).map(|(sent, _)| *sent)
    }

    /// How long ago, seen from the newest sample, the primary was at this position; microseconds. At least so long, if
    /// that was before the first sample.
    pub(super) fn lag(&self, position: Position) -> u64 {
        let (Some((latest, last)), Some((first, _))) = (self.latest(), self.samples.front().copied()) else { return 0 };
        if position >= last { 0 } else { latest.since(self.covered_by(position).unwrap_or(first)) }
    }
}
