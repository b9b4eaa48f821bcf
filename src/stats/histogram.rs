//! Durations in fixed buckets.

use std::fmt;

/// log2 of the buckets per octave.
const SUB_BITS: u32 = 4;
/// Buckets per octave: each is 1/16 of its octave wide.
const SUB: usize = 1 << SUB_BITS;
/// log2 of the longest duration told apart, microseconds.
const MAX_BITS: u32 = 31;
/// Buckets with an upper bound; one more takes what is longer.
const BOUNDED: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// A histogram of durations in microseconds, in fixed log-linear buckets.
///
/// Buckets are one microsecond wide up to 32 us and then 1/16 of their octave, up to
/// [`Histogram::MAX_US`] (36 minutes); one last bucket takes everything longer. A bucket includes its
/// upper bound, as the `le` of Prometheus does, so that every power of two from 16 us up is an exact
/// bound. 0 us counts as 1 us. 3.6 kB.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BOUNDED + 1],
    count: u64,
    /// Microseconds.
    sum: u64,
}

const _: () = assert!(size_of::<Histogram>() <= 3616);

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BOUNDED + 1], count: 0, sum: 0 }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.count)
            .field("sum_us", &self.sum)
            .field("p50_us", &self.quantile(500))
            .field("p99_us", &self.quantile(990))
            .finish_non_exhaustive()
    }
}

impl Histogram {
    /// The longest duration told apart, microseconds; longer ones are reported as this.
    pub const MAX_US: u64 = 1 << MAX_BITS;

    /// Counts one duration. A few instructions: no allocation, no floating point, no division.
    #[inline]
    pub fn record(&mut self, us: u64) {
        if let Some(bucket) = self.buckets.get_mut(bucket_of(us)) {
            *bucket += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(us);
    }

    /// How many durations were recorded.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of all durations, microseconds; exact, saturating.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The mean, microseconds, rounded down; 0 when nothing was recorded.
    #[must_use]
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// The duration that `permille`/1000 of all durations do not exceed, microseconds: the upper
    /// bound of the bucket of the sample of rank `ceil(count * permille / 1000)`.
    ///
    /// Never below that sample, and at most 1/16 (6.25 %) above it; exact up to 32 us. Samples longer
    /// than [`Self::MAX_US`] are reported as that. `None` when nothing was recorded; a `permille`
    /// above 1000 counts as 1000, and 0 asks for the shortest.
    #[must_use]
    pub fn quantile(&self, permille: u16) -> Option<u64> {
        let permille = u128::from(permille.min(1000));
        let rank = (u128::from(self.count) * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let position = self.buckets.iter().position(|&bucket| {
            seen += u128::from(bucket);
            seen >= rank
        })?;
        Some(upper_bound(position))
    }

    /// Cumulative counts for a Prometheus histogram: for each power of two from `2^low` to `2^high`
    /// microseconds, how many durations were at most that long. Exact, not interpolated.
    ///
    /// Both ends are brought into 4..=31, where powers of two are bucket bounds.
    pub fn cumulative(&self, low: u32, high: u32) -> impl Iterator<Item = (u64, u64)> + '_ {
        let high = high.clamp(SUB_BITS, MAX_BITS);
        let mut buckets = self.buckets.iter();
        let mut taken = 0;
        let mut total = 0;
        (low.clamp(SUB_BITS, MAX_BITS)..=high).map(move |power| {
            let end = (power - SUB_BITS + 1) as usize * SUB;
            total += buckets.by_ref().take(end - taken).sum::<u64>();
            taken = end;
            (1 << power, total)
        })
    }

    /// Adds everything that `other` recorded.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
    }

    /// What was recorded since `earlier`, an older copy of this histogram. Never negative: of a copy
    /// that is not older, what it has too much is ignored.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut period = Self::default();
        let pairs = self.buckets.iter().zip(&earlier.buckets);
        for (bucket, (now, then)) in period.buckets.iter_mut().zip(pairs) {
            *bucket = now.saturating_sub(*then);
            period.count += *bucket;
        }
        period.sum = self.sum.saturating_sub(earlier.sum);
        period
    }
}

/// The bucket of a duration. Below 16 the number is its own bucket; above, the bucket is the octave
/// and the four bits under the leading one. Counts from 1 us, so that bounds are inclusive.
#[inline]
fn bucket_of(us: u64) -> usize {
    let zero_based = us.saturating_sub(1).min(Histogram::MAX_US);
    let shift = (zero_based | 1).ilog2().saturating_sub(SUB_BITS);
    // At most 2 * SUB - 1 after the shift: fits every usize.
    let within = usize::try_from(zero_based >> shift).unwrap_or(BOUNDED);
    ((shift as usize) * SUB + within).min(BOUNDED)
}

/// The longest duration of a bucket, microseconds.
fn upper_bound(bucket: usize) -> u64 {
    if bucket >= BOUNDED {
        return Histogram::MAX_US;
    }
    let shift = (bucket / SUB).saturating_sub(1);
    let within = bucket - shift * SUB;
    (within as u64 + 1) << shift
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Durations over every magnitude, bucket edges included.
    fn duration() -> impl Strategy<Value = u64> {
        (0..=34_u32, any::<u64>(), -2..=2_i64).prop_map(|(bits, noise, edge)| {
            let base = 1_u64 << bits;
            if noise % 3 == 0 { base.saturating_add_signed(edge) } else { base + noise % base }
        })
    }

    fn histogram_of(samples: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &us in samples {
            histogram.record(us);
        }
        histogram
    }

    /// The naive quantile: sort and take the sample of that rank.
    fn sorted_quantile(samples: &[u64], permille: u16) -> u64 {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = (sorted.len() * usize::from(permille)).div_ceil(1000).max(1);
        sorted[rank - 1]
    }

    proptest! {
        #[test]
        fn quantiles_are_never_below_and_at_most_a_sixteenth_above_the_sorted_samples(
            samples in prop::collection::vec(duration(), 1..200),
            permille in 0..=1000_u16,
        ) {
            let want = sorted_quantile(&samples, permille).clamp(1, Histogram::MAX_US);
            let got = histogram_of(&samples).quantile(permille).unwrap();
            prop_assert!(got >= want, "{got} < {want}");
            prop_assert!(got - want <= want / 16, "{got} is more than 6.25 % above {want}");
            prop_assert!(want > 32 || got == want, "{got} != {want}, which is told apart exactly");
        }

        #[test]
        fn cumulative_counts_equal_counting_the_samples(
            samples in prop::collection::vec(duration(), 0..200),
            (low, high) in (0..40_u32, 0..40_u32),
        ) {
            let got: Vec<_> = histogram_of(&samples).cumulative(low, high).collect();
            let want: Vec<_> = (low.clamp(4, 31)..=high.clamp(4, 31))
                .map(|power| 1_u64 << power)
                .map(|le| (le, samples.iter().filter(|&&us| us <= le).count() as u64))
                .collect();
            prop_assert_eq!(got, want);
        }

        #[test]
        fn merging_equals_recording_both_and_since_takes_it_back(
            first in prop::collection::vec(duration(), 0..100),
            second in prop::collection::vec(duration(), 0..100),
        ) {
            let (a, b) = (histogram_of(&first), histogram_of(&second));
            let mut merged = a.clone();
            merged.merge(&b);
            let both: Vec<u64> = first.iter().chain(&second).copied().collect();
            prop_assert_eq!(&merged, &histogram_of(&both));
            prop_assert_eq!(merged.sum(), both.iter().sum::<u64>());
            prop_assert_eq!(merged.count(), both.len() as u64);
            prop_assert_eq!(&merged.since(&a), &b);
            prop_assert_eq!(a.since(&merged), histogram_of(&[]));
        }
    }

    #[test]
    fn every_bucket_bound_falls_into_its_bucket_and_the_next_microsecond_into_the_next() {
        for bucket in 0..BOUNDED {
            let bound = upper_bound(bucket);
            assert_eq!(bucket_of(bound), bucket, "bound {bound} of bucket {bucket}");
            assert_eq!(bucket_of(bound + 1), bucket + 1, "after bucket {bucket}");
        }
        assert_eq!(upper_bound(BOUNDED - 1), Histogram::MAX_US);
        assert_eq!(bucket_of(u64::MAX), BOUNDED);
    }

    #[test]
    fn an_empty_histogram_has_no_quantile_and_mean_zero() {
        let empty = Histogram::default();
        assert_eq!((empty.quantile(500), empty.mean()), (None, 0));
    }

    #[test]
    fn the_sum_saturates_instead_of_overflowing() {
        let histogram = histogram_of(&[u64::MAX, u64::MAX]);
        assert_eq!(histogram.sum(), u64::MAX);
        assert_eq!(histogram.quantile(1000), Some(Histogram::MAX_US));
    }
}
