//! How the use of a limit develops, and when nothing would be left.
//!
//! Pure: samples and times in, a trend out. A trend is the median of the slopes between all pairs of points (Theil and Sen):
//! what a deploy doubles for some minutes does not tilt it. It is looked for in the last 80 minutes and in the last ten. It counts only if what it amounts to over the time looked at
//! stands out of what is noise around it; else the trend is 0.

use std::collections::VecDeque;
use std::time::Duration;

/// Points kept, at most. A point is the mean of the samples of its time.
const POINTS_MAX: usize = 120;

/// The time of one point at first. It doubles whenever there are [`POINTS_MAX`] points, until it is [`WIDTH_MAX`].
const WIDTH_MIN: Duration = Duration::from_secs(5);

/// The time of one point at last: 80 minutes are looked at then.
const WIDTH_MAX: Duration = Duration::from_secs(40);

/// With fewer points nothing is said.
const POINTS_MIN: usize = 20;

/// A trend has to amount to so many times the noise over the time looked at.
const NOISE_FACTOR: f64 = 2.0;

/// From the median of absolute deviations to the standard deviation of a normal distribution.
const MAD_TO_SIGMA: f64 = 1.4826;

/// The longest time that is foretold.
const HORIZON: Duration = Duration::from_hours(30 * 24);

/// The mean of the samples of a span of time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    /// The number of its span, [`Samples::width`] each.
    slot: u64,
    sum: f64,
    samples: u32,
}

impl Point {
    fn mean(&self) -> f64 {
        self.sum / f64::from(self.samples)
    }
}

/// The samples of one limit's use: of the last 80 minutes, and of the last ten, where a leak shows first.
#[derive(Clone, Debug)]
pub struct Series {
    long: Samples,
    recent: Samples,
}

impl Default for Series {
    fn default() -> Self {
        Self { long: Samples::new(WIDTH_MAX), recent: Samples::new(WIDTH_MIN) }
    }
}

impl Series {
    /// Takes in that so much was used at this time.
    pub fn add(&mut self, at: Duration, used: u32) {
        self.long.add(at, used);
        self.recent.add(at, used);
    }

    /// The steeper of the two trends; the recent one only if it goes on: a step is none. None with too few samples.
    #[must_use]
    pub fn trend(&self) -> Option<Trend> {
        let (long, recent) = (self.long.trend()?, self.recent.trend());
        let goes_on = |trend: &Trend| trend.per_hour > long.per_hour && self.recent.goes_on(trend);
        Some(recent.filter(goes_on).unwrap_or(long))
    }
}

/// Samples, bounded.
#[derive(Clone, Debug)]
struct Samples {
    width: Duration,
    /// The time of one point, at most.
    widest: Duration,
    points: VecDeque<Point>,
}

/// How a limit's use develops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trend {
    /// Connections more in an hour; 0 if nothing stands out of the noise.
    pub per_hour: f64,
    /// Connections in use, at last.
    pub level: f64,
    /// The time looked at.
    pub span: Duration,
    /// Points in it.
    pub points: usize,
}

impl Samples {
    fn new(widest: Duration) -> Self {
        Self { width: WIDTH_MIN, widest, points: VecDeque::new() }
    }

    /// Takes in how many connections were used at a time since some beginning. Times do not go back: an older sample counts
    /// to the latest span.
    fn add(&mut self, at: Duration, used: u32) {
        let mut slot = self.slot(at);
        if let Some(last) = self.points.back_mut()
            && last.slot >= slot
        {
            last.sum += f64::from(used);
            last.samples = last.samples.saturating_add(1);
            return;
        }
        if self.points.len() >= POINTS_MAX && self.width < self.widest {
            self.widen();
            slot = self.slot(at);
        }
        // The time looked at ends, whether or not there were samples all the while.
        let oldest = slot.saturating_sub(POINTS_MAX as u64 - 1);
        while self.points.front().is_some_and(|point| point.slot < oldest) {
            self.points.pop_front();
        }
        if let Some(last) = self.points.back_mut()
            && last.slot == slot
        {
            last.sum += f64::from(used);
            last.samples = last.samples.saturating_add(1);
        } else {
            self.points.push_back(Point { slot, sum: f64::from(used), samples: 1 });
        }
    }

    fn slot(&self, at: Duration) -> u64 {
        u64::try_from(at.as_millis() / self.width.as_millis().max(1)).unwrap_or(u64::MAX)
    }

    /// Points become twice as wide.
    fn widen(&mut self) {
        self.width *= 2;
        let mut wider: VecDeque<Point> = VecDeque::with_capacity(POINTS_MAX);
        for point in self.points.drain(..) {
            let slot = point.slot / 2;
            match wider.back_mut() {
                Some(last) if last.slot == slot => {
                    last.sum += point.sum;
                    last.samples = last.samples.saturating_add(point.samples);
                }
                _ => wider.push_back(Point { slot, ..point }),
            }
        }
        self.points = wider;
    }

    /// The points as seconds since the first, and connections.
    #[expect(clippy::cast_precision_loss, reason = "spans since the process began")]
    fn plane(&self) -> Vec<(f64, f64)> {
        let first = self.points.front().map_or(0, |point| point.slot);
        let width = self.width.as_secs_f64();
        self.points.iter().map(|point| ((point.slot - first) as f64 * width, point.mean())).collect()
    }

    /// Whether the last third of the time grows as well, by half as much at least.
    fn goes_on(&self, trend: &Trend) -> bool {
        let points = self.plane();
        let last = points.get(points.len() / 3 * 2..).unwrap_or_default();
        slope(last) * 3600.0 >= trend.per_hour / 2.0
    }

    /// The trend; none with too few samples to tell.
    fn trend(&self) -> Option<Trend> {
        let (first, last) = (self.points.front()?, self.points.back()?);
        if self.points.len() < POINTS_MIN {
            return None;
        }
        let width = self.width.as_secs_f64();
        let points = self.plane();
        let slope = slope(&points);
        let base = median(points.iter().map(|(x, y)| y - slope * x).collect());
        let noise = MAD_TO_SIGMA * median(points.iter().map(|(x, y)| (y - slope * x - base).abs()).collect());
        #[expect(clippy::cast_precision_loss, reason = "at most POINTS_MAX spans")]
        let span = (last.slot - first.slot) as f64 * width;
        // Less than one connection is none.
        let stands_out = (slope * span).abs() >= (NOISE_FACTOR * noise).max(1.0);
        Some(Trend {
            per_hour: if stands_out { slope * 3600.0 } else { 0.0 },
            level: last.mean(),
            span: Duration::from_secs_f64(span),
            points: points.len(),
        })
    }
}

impl Trend {
    /// When `usable` connections will be used if it goes on like this; none if it will not be, or not within 30 days.
    #[must_use]
    pub fn exhausted_in(&self, usable: u32) -> Option<Duration> {
        let left = f64::from(usable) - self.level;
        if left <= 0.0 {
            return Some(Duration::ZERO);
        }
        if self.per_hour <= 0.0 {
            return None;
        }
        Duration::try_from_secs_f64(left / self.per_hour * 3600.0).ok().filter(|time| *time <= HORIZON)
    }
}

/// The median of the slopes between all pairs of points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let pairs = points.iter().enumerate().flat_map(|(n, a)| points.iter().skip(n + 1).map(move |b| (a, b)));
    median(pairs.map(|(a, b)| (b.1 - a.1) / (b.0 - a.0)).collect())
}

/// The middle one, or the mean of the two in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |n: usize| values.get(n).copied().unwrap_or(0.0);
    if values.len().is_multiple_of(2) { f64::midpoint(at(middle.saturating_sub(1)), at(middle)) } else { at(middle) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample every 5 s for so many minutes.
    fn recorded(minutes: u64, used: impl Fn(f64) -> f64) -> Series {
        let mut samples = Series::default();
        for second in (0..minutes * 60).step_by(5) {
            #[expect(
                clippy::cast_precision_loss,
                clippy::cast_sign_loss,
                clippy::cast_possible_truncation,
                reason = "small"
            )]
            samples.add(Duration::from_secs(second), used(second as f64 / 60.0).round() as u32);
        }
        samples
    }

    /// From -1 to 1, the same each time.
    fn noise(minute: f64) -> f64 {
        let wild = (minute * 12.9898).sin() * 43758.5453;
        (wild - wild.floor()) * 2.0 - 1.0
    }

    #[test]
    fn recorded_series_have_the_trend_and_the_end_that_they_have() {
        let deploys = |minute: f64| if minute % 20.0 < 2.0 { 20.0 } else { 10.0 };
        let leak = |minute: f64| 10.0 + minute % 15.0;
        // Minutes, the series; connections per hour, and minutes until 60 are used, both give or take a tenth.
        #[rustfmt::skip]
        let table: [(&str, u64, &dyn Fn(f64) -> f64, Option<(f64, Option<f64>)>); 15] = [
            ("nothing yet",             0, &|_| 0.0,                              None),
            ("too few",                 1, &|_| 10.0,                             None),
            ("flat",                   60, &|_| 10.0,                             Some((0.0, None))),
            ("full",                   60, &|_| 60.0,                             Some((0.0, Some(0.0)))),
            ("grows",                  60, &|m| 10.0 + m / 5.0,                   Some((12.0, Some(190.0)))),
            ("grows, for 10 minutes",  10, &|m| 10.0 + m,                         Some((60.0, Some(40.0)))),
            ("grows fast, 2 minutes",   2, &|m| 10.0 + 6.0 * m,                   Some((360.0, Some(6.3)))),
            ("shrinks",                60, &|m| 40.0 - m / 5.0,                   Some((-12.0, None))),
            ("deploys double it",      80, &deploys,                              Some((0.0, None))),
            ("flat, then leaks for 10", 90, &|m| 10.0 + 2.0 * (m - 80.0).max(0.0),  Some((120.0, Some(15.0)))),
            ("flat, then leaks for 20", 100, &|m| 10.0 + 2.0 * (m - 80.0).max(0.0), Some((120.0, Some(5.0)))),
            ("a step, 6 minutes ago", 86, &|m| if m < 80.0 { 10.0 } else { 20.0 },  Some((0.0, None))),
            ("leaks, and starts anew", 80, &leak,                                 Some((0.0, None))),
            ("noise",                  80, &|m| 20.0 + 5.0 * noise(m),            Some((0.0, None))),
            ("grows in noise",         80, &|m| 10.0 + m / 5.0 + 3.0 * noise(m),  Some((12.0, Some(170.0)))),
        ];
        let near = |got: f64, want: f64| (got - want).abs() <= want.abs() / 10.0;
        for (name, minutes, series, want) in table {
            let trend = recorded(minutes, series).trend();
            assert_eq!(trend.is_some(), want.is_some(), "{name}: {trend:?}");
            let (Some(trend), Some((per_hour, end))) = (trend, want) else { continue };
            assert!(near(trend.per_hour, per_hour), "{name}: {trend:?}");
            let got = trend.exhausted_in(60).map(|time| time.as_secs_f64() / 60.0);
            assert!(got.is_some() == end.is_some() && near(got.unwrap_or(0.0), end.unwrap_or(0.0)), "{name}: {got:?}");
        }
    }

    #[test]
    fn a_deploy_at_the_very_end_is_no_trend() {
        let trend = recorded(80, |minute| if minute > 76.0 { 20.0 } else { 10.0 }).trend().unwrap();
        assert_eq!((trend.per_hour, trend.exhausted_in(60)), (0.0, None));
    }

    #[test]
    fn what_is_far_away_is_not_foretold() {
        let trend = Trend { per_hour: 0.05, level: 10.0, span: Duration::from_hours(1), points: 90 };
        assert_eq!(trend.exhausted_in(60), None);
        assert!(trend.exhausted_in(40).is_some());
    }

    #[test]
    fn a_day_and_gaps_take_no_more_room_than_there_is() {
        let mut series = recorded(24 * 60, |_| 10.0);
        for (samples, width) in [(&series.long, WIDTH_MAX), (&series.recent, WIDTH_MIN)] {
            assert!(samples.points.len() <= POINTS_MAX && samples.width == width, "{}", samples.points.len());
        }
        series.add(Duration::from_hours(48), 30);
        assert_eq!((series.long.points.len(), series.trend()), (1, None), "what was before the gap is gone");
        series.add(Duration::from_hours(47), 32);
        assert_eq!(series.long.points.len(), 1, "a time that goes back opens nothing");
    }
}
