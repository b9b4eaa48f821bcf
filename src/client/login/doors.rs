//! Who is at the door, the oldest first: when it gets too crowded, that one gives way.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Time that a client has to log in even when others want its place. Most are in before.
pub const GRACE: Duration = Duration::from_millis(500);

/// The clients that are logging in, in the order in which they came.
///
/// A client that never says who it is costs a place until its time limit. If so many take all places, whoever comes
/// then would wait for their time limits. So the one that has been at it for longest gives its place away; a client that
/// has proved itself, and waits for a server, does not.
#[derive(Debug, Default)]
pub struct Doors {
    queue: RefCell<VecDeque<Weak<Place>>>,
    taken: Cell<u32>,
    freed: Notify,
}

/// What comes of asking for a place when all are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// The oldest gives way.
    Made,
    /// Nobody has had its time yet: ask again when a place is [free](Doors::freed), or after [`GRACE`].
    Soon,
    /// All have proved themselves, and wait for servers.
    None,
}

/// One client's place.
#[derive(Debug)]
struct Place {
    since: Instant,
    counts: Cell<bool>,
    proved: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// A place that is taken, for as long as this lives.
#[derive(Debug)]
pub struct AtDoor {
    doors: Rc<Doors>,
    place: Rc<Place>,
}

/// The place went to another.
#[derive(Debug)]
pub struct GaveWay;

impl Doors {
    /// Places taken.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.taken.get()
    }

    /// Takes a place.
    pub fn enter(self: &Rc<Self>, now: Instant) -> AtDoor {
        let place =
            Rc::new(Place { since: now, counts: Cell::new(true), proved: Cell::new(false), waker: RefCell::default() });
        let mut queue = self.queue.borrow_mut();
        if queue.len() > 2 * self.taken.get() as usize + 16 {
            queue.retain(|place| place.strong_count() > 0);
        }
        queue.push_back(Rc::downgrade(&place));
        self.taken.set(self.taken.get() + 1);
        AtDoor { doors: self.clone(), place }
    }

    /// Takes the place of the client that has been at it for longest.
    pub fn make_room(&self, now: Instant) -> Room {
        let mut queue = self.queue.borrow_mut();
        while let Some(front) = queue.front() {
            let place = front.upgrade().filter(|place| place.counts.get() && !place.proved.get());
            let Some(place) = place else {
                queue.pop_front();
                continue;
            };
            if now.saturating_duration_since(place.since) < GRACE {
                return Room::Soon;
            }
            queue.pop_front();
            place.counts.set(false);
            self.taken.set(self.taken.get().saturating_sub(1));
            if let Some(waker) = place.waker.take() {
                waker.wake();
            }
            return Room::Made;
        }
        Room::None
    }

    /// Waits until a place is free; it may be taken again by then.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }
}

impl AtDoor {
    /// The client has proved who it is: it gives way to no one any more.
    pub fn proved(&self) {
        self.place.proved.set(true);
    }

    /// Runs `login` until it has to give way.
    ///
    /// # Errors
    ///
    /// [`GaveWay`].
    pub async fn run<T>(&self, login: impl Future<Output = T>) -> Result<T, GaveWay> {
        let mut login = pin!(login);
        poll_fn(|cx| {
            if !self.place.counts.get() {
                return Poll::Ready(Err(GaveWay));
            }
            let polled = login.as_mut().poll(cx).map(Ok);
            if polled.is_pending() {
                self.place.waker.replace(Some(cx.waker().clone()));
            }
            polled
        })
        .await
    }
}

impl Drop for AtDoor {
    fn drop(&mut self) {
        if self.place.counts.get() {
            self.doors.taken.set(self.doors.taken.get().saturating_sub(1));
            self.doors.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::future::pending;

    #[test]
    fn the_oldest_gives_way_once_it_has_had_its_time_unless_it_has_proved_itself() {
        let doors = Rc::new(Doors::default());
        let begin = Instant::now();
        let (first, second, third) = (doors.enter(begin), doors.enter(begin), doors.enter(begin + GRACE));
        first.proved();
        assert_eq!(doors.make_room(begin + GRACE / 2), Room::Soon);
        assert_eq!((doors.make_room(begin + GRACE), doors.taken()), (Room::Made, 2));
        assert!(matches!(second.run(pending::<()>()).now_or_never(), Some(Err(GaveWay))));
        assert_eq!(doors.make_room(begin + GRACE), Room::Soon, "the third is new");
        drop(second);
        assert_eq!(doors.taken(), 2);
        drop(third);
        assert!(doors.freed().now_or_never().is_some());
        assert_eq!(doors.make_room(begin + GRACE * 9), Room::None, "the first does not give way");
        assert!(first.run(pending::<()>()).now_or_never().is_none());
        drop(first);
        assert_eq!(doors.taken(), 0);
    }
}
