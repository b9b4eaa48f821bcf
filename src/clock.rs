//! Time, read once per turn; sleeping, woken by the worker's tick.
//!
//! The worker's runtime has no timer of its own: reading the clock whenever the loop parks costs every
//! transaction. Instead a tick arrives about ten times a second, and what is due then is woken. All
//! waits of this program are far longer than a tick.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

/// The time between two ticks.
pub const TICK: Duration = Duration::from_millis(100);

/// One worker's clock.
#[derive(Debug)]
pub struct Clock {
    now: Cell<Instant>,
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
        Self { now: Cell::new(Instant::now()), alarms: RefCell::default() }
    }
}

impl Clock {
    /// The time at the beginning of this turn.
    #[must_use]
    #[inline]
    pub fn now(&self) -> Instant {
        self.now.get()
    }

    /// Reads the clock: a turn begins.
    #[inline]
    pub fn refresh(&self) -> Instant {
        let now = Instant::now();
        self.now.set(now);
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
    fn zero_is_no_limit() {
        let clock = Clock::default();
        assert_eq!(clock.limit(Duration::ZERO, async { 7 }).now_or_never(), Some(Ok(7)));
    }
}
