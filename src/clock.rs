//! Time, read once per turn; sleeping, woken by the worker's tick.
//!
//! The worker's runtime has no timer of its own: reading the clock whenever the loop parks costs every
//! transaction. Instead a tick arrives about ten times a second, and what is due then is woken. All
//! waits of this program are far longer than a tick.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

/// The time between two ticks.
pub const TICK: Duration = Duration::from_millis(100);

/// Polls of sessions for which one reading of the clock serves, at most, while the event loop does not pause.
const POLLS_PER_READING: u32 = 32;

/// Tells a clock that the event loop was waiting for events: what it read before is old.
#[derive(Clone, Debug, Default)]
pub struct Pauses(Arc<AtomicBool>);

impl Pauses {
    /// The loop goes on after a pause.
    #[inline]
    pub fn over(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A moment on a worker's clock, for what is measured often: microseconds since the clock was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// So many microseconds after the clock was made.
    #[cfg(test)]
    #[must_use]
    pub const fn at(us: u64) -> Self {
        Self(us)
    }

    /// So many microseconds later.
    #[must_use]
    pub const fn after(self, us: u64) -> Self {
        Self(self.0.saturating_add(us))
    }

    /// Microseconds since `earlier`.
    #[must_use]
    #[inline]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One worker's clock.
#[derive(Debug)]
pub struct Clock {
    made: Instant,
    now: Cell<Instant>,
    moment: Cell<Moment>,
    pauses: Pauses,
    /// Polls for which the last reading still serves.
    polls: Cell<u32>,
    alarms: RefCell<Slab<(Instant, Waker)>>,
}

/// One sleeper's place among the alarms, given back when it wakes or is dropped.
struct Alarm<'a> {
    clock: &'a Clock,
    key: usize,
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.clock.alarms.borrow_mut().try_remove(self.key);
    }
}

/// A wait reached its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl Default for Clock {
    fn default() -> Self {
        Self::new(Pauses::default())
    }
}

impl Clock {
    /// The clock of an event loop that tells of its pauses.
    #[must_use]
    pub fn new(pauses: Pauses) -> Self {
        let made = Instant::now();
        let (now, moment) = (Cell::new(made), Cell::default());
        Self { made, now, moment, pauses, polls: Cell::new(0), alarms: RefCell::default() }
    }

    /// A session is polled: reads the clock if this is the first since the event loop paused, or if many have been.
    #[inline]
    pub fn turn(&self) {
        let left = self.polls.get();
        if left == 0 || self.pauses.0.load(Ordering::Relaxed) {
            self.pauses.0.store(false, Ordering::Relaxed);
            self.polls.set(POLLS_PER_READING);
            self.refresh();
        } else {
            self.polls.set(left - 1);
        }
    }

    /// The time at the beginning of this turn.
    #[must_use]
    #[inline]
    pub fn now(&self) -> Instant {
        self.now.get()
    }

    /// The same time as [`Self::now`].
    #[must_use]
    #[inline]
    pub fn moment(&self) -> Moment {
        self.moment.get()
    }

    /// Reads the clock.
    #[inline]
    pub fn refresh(&self) -> Instant {
        let now = Instant::now();
        self.now.set(now);
        let passed = now.saturating_duration_since(self.made);
        self.moment.set(Moment(u64::try_from(passed.as_micros()).unwrap_or(u64::MAX)));
        now
    }

    /// A tick: wakes what is due.
    pub fn tick(&self) {
        let now = self.refresh();
        let due = |(_, (at, waker)): (usize, &(Instant, Waker))| (*at <= now).then(|| waker.clone());
        let due: Vec<Waker> = self.alarms.borrow().iter().filter_map(due).collect();
        for waker in due {
            waker.wake();
        }
    }

    /// Waits for `duration`, rounded up to the next tick.
    pub async fn sleep(&self, duration: Duration) {
        let Some(at) = self.now().checked_add(duration) else {
            return std::future::pending().await;
        };
        let mut alarm = None;
        poll_fn(|cx| {
            if self.now() >= at {
                return Poll::Ready(());
            }
            alarm.get_or_insert_with(|| {
                let key = self.alarms.borrow_mut().insert((at, cx.waker().clone()));
                Alarm { clock: self, key }
            });
            Poll::Pending
        })
        .await;
    }

    /// Runs `future` for at most `limit`; zero is no limit.
    ///
    /// # Errors
    ///
    /// [`Elapsed`] when the limit is reached first.
    pub async fn limit<F: Future>(&self, limit: Duration, future: F) -> Result<F::Output, Elapsed> {
        if limit.is_zero() {
            return Ok(future.await);
        }
        let mut future = pin!(future);
        let mut sleep = pin!(self.sleep(limit));
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            sleep.as_mut().poll(cx).map(|()| Err(Elapsed))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::rc::Rc;

    #[test]
    fn a_limit_ends_a_wait_at_the_tick_after_it() {
        let clock = Rc::new(Clock::default());
        let mut wait = pin!(clock.limit(Duration::from_millis(1), std::future::pending::<()>()));
        assert!(wait.as_mut().now_or_never().is_none());
        let begun = clock.now();
        while clock.now() < begun + Duration::from_millis(1) {
            assert!(wait.as_mut().now_or_never().is_none());
            clock.tick();
        }
        assert_eq!(wait.now_or_never(), Some(Err(Elapsed)));
    }

    #[test]
    fn a_reading_serves_until_the_loop_pauses_or_many_sessions_were_polled() {
        let pauses = Pauses::default();
        let clock = Clock::new(pauses.clone());
        let turns_until_read = || {
            let before = clock.now();
            while before == Instant::now() {}
            (1..=1000).find(|_| {
                clock.turn();
                clock.now() != before
            })
        };
        assert_eq!(turns_until_read(), Some(1), "the first");
        assert_eq!(turns_until_read(), Some(POLLS_PER_READING + 1), "without a pause");
        pauses.over();
        assert_eq!(turns_until_read(), Some(1), "after a pause");
    }

    #[test]
    fn zero_is_no_limit() {
        let clock = Clock::default();
        assert_eq!(clock.limit(Duration::ZERO, async { 7 }).now_or_never(), Some(Ok(7)));
    }
}
