//! Medians and bootstrap intervals. Pure: the random numbers come from a seed, so the same figures give the same
//! interval.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// Resamples of one interval. At 10,000 the ends move by less than the figures' last printed digit.
pub const RESAMPLES: usize = 10_000;

/// A figure and its 95 % bootstrap interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The median.
    pub median: f64,
    /// The 2.5th percentile of resampled medians.
    pub low: f64,
    /// The 97.5th percentile.
    pub high: f64,
}

impl Estimate {
    /// The median of `values` and its interval from `resamples` resamples drawn with `seed`.
    /// `None` without values, or if one of them is no number.
    #[must_use]
    pub fn of(values: &[f64], resamples: usize, seed: u64) -> Option<Self> {
        let centre = median(values)?;
        let mut random = StdRng::seed_from_u64(seed);
        let mut drawn = Vec::with_capacity(values.len());
        let mut medians = Vec::with_capacity(resamples);
        for _ in 0..resamples {
            drawn.clear();
            drawn.extend((0..values.len()).filter_map(|_| values.get(random.random_range(0..values.len()))));
            medians.push(median(&drawn)?);
        }
        Some(Self { median: centre, low: quantile(&medians, 0.025)?, high: quantile(&medians, 0.975)? })
    }
}

/// The middle value, or the mean of the middle two. `None` without values, or if one of them is no number.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The value below which a share `at` (0 to 1) of `values` lies, linear between neighbours. `None` without
/// values, or if one of them is no number.
#[must_use]
pub fn quantile(values: &[f64], at: f64) -> Option<f64> {
    if values.iter().any(|value| value.is_nan()) {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    #[expect(clippy::cast_precision_loss, reason = "counts of windows, far below 2^52")]
    let place = at.clamp(0.0, 1.0) * last as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= place <= last")]
    let below = place.floor() as usize;
    let low = *sorted.get(below)?;
    let high = *sorted.get(below.saturating_add(1).min(last))?;
    Some(low + (high - low) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: Option<f64>, want: Option<f64>) -> bool {
        match (got, want) {
            (Some(got), Some(want)) => (got - want).abs() < 1e-9,
            (None, None) => true,
            _ => false,
        }
    }

    #[test]
    fn quantiles_lie_between_their_neighbours() {
        #[rustfmt::skip]
        let table: [(&str, &[f64], f64, Option<f64>); 9] = [
            ("none",            &[],                    0.5,   None),
            ("one",             &[3.0],                 0.5,   Some(3.0)),
            ("odd, unsorted",   &[9.0, 1.0, 4.0],       0.5,   Some(4.0)),
            ("even",            &[4.0, 1.0, 2.0, 8.0],  0.5,   Some(3.0)),
            ("low end",         &[4.0, 1.0, 2.0, 8.0],  0.0,   Some(1.0)),
            ("high end",        &[4.0, 1.0, 2.0, 8.0],  1.0,   Some(8.0)),
            ("quarter",         &[0.0, 10.0, 20.0],     0.25,  Some(5.0)),
            ("outside",         &[0.0, 10.0],           7.0,   Some(10.0)),
            ("not a number",    &[0.0, f64::NAN],       0.5,   None),
        ];
        for (name, values, at, want) in table {
            let got = quantile(values, at);
            assert!(close(got, want), "{name}: got {got:?}, want {want:?}");
        }
    }

    #[test]
    fn the_interval_depends_on_the_seed_alone() {
        let values: Vec<f64> = (0..25).map(|index| f64::from(index * index % 17)).collect();
        let first = Estimate::of(&values, 500, 7).unwrap();
        assert_eq!(first, Estimate::of(&values, 500, 7).unwrap());
        assert!(first.low <= first.median && first.median <= first.high, "{first:?}");
        assert!(first.low >= 0.0 && first.high <= 16.0, "{first:?}");
    }

    #[test]
    fn equal_values_have_an_interval_of_no_width() {
        let got = Estimate::of(&[0.9; 5], 200, 1).unwrap();
        assert_eq!(got, Estimate { median: 0.9, low: 0.9, high: 0.9 });
    }

    #[test]
    fn nothing_or_no_number_gives_no_estimate() {
        assert_eq!(Estimate::of(&[], 10, 1), None);
        assert_eq!(Estimate::of(&[1.0, f64::NAN], 10, 1), None);
    }

    /// Samples of 25 with a known median of 1: about 95 of 100 intervals must hold it. The band 86..=100 is three
    /// and a half standard deviations wide, and the seeds are fixed.
    #[test]
    fn about_95_of_100_intervals_hold_the_true_median() {
        let mut random = StdRng::seed_from_u64(11);
        let held = (0..100_u64).filter(|seed| {
            let values: Vec<f64> = (0..25).map(|_| random.random_range(0.9..1.1)).collect();
            let got = Estimate::of(&values, 400, *seed).unwrap();
            got.low <= 1.0 && 1.0 <= got.high
        });
        let held = held.count();
        assert!((86..=100).contains(&held), "{held} of 100");
    }

    #[test]
    fn more_values_narrow_the_interval() {
        let mut random = StdRng::seed_from_u64(3);
        let mut width = |count: usize| {
            let values: Vec<f64> = (0..count).map(|_| random.random_range(0.0..1.0)).collect();
            let got = Estimate::of(&values, 500, 5).unwrap();
            got.high - got.low
        };
        let (few, many) = (width(10), width(1000));
        assert!(many * 3.0 < few, "{many} against {few}");
    }
}
