//! Who is at the door, the oldest first: when it gets too crowded, that one gives way.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::clock::TICK;

/// Time that a client has to log in even when others want its place. Most are in before.
const GRACE: Duration = Duration::from_millis(500);

/// The time that passes between two ticks, at most, however late the second one is. While the event loop stood still
/// nobody could be heard: that is not the clients' fault.
const PASSES_MAX: Duration = TICK.saturating_mul(2);

/// The clients that are logging in, in the order in which they came.
///
/// A client that never says who it is costs a place until its time limit. If so many take all places, whoever comes
/// then would wait for their time limits. So the one that has been at it for longest gives its place away, and first of all of
/// those that have not even said who they are; a client that has proved itself, and waits for a server, does not.
#[derive(Debug, Default)]
pub struct Doors {
    /// Who has not said who it is. One that has is passed over.
    strangers: RefCell<Queue>,
    /// Who has.
    named: RefCell<Queue>,
    taken: Cell<u32>,
    freed: Notify,
    /// As it passes here, up to the last tick.
    time: Cell<Duration>,
    ticked: Cell<Option<Instant>>,
}

/// What comes of asking for a place when all are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// The oldest gives way.
    Made,
    /// Nobody has had its time yet: ask again when that may be [different](Doors::changed).
    Soon,
    /// All have proved themselves, and wait for servers.
    None,
}

/// One client's place.
#[derive(Debug)]
struct Place {
    /// When it came, by the time of the doors.
    since: Duration,
    named: Cell<bool>,
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

/// Tells how the client at a place gets on.
#[derive(Debug)]
pub struct Progress {
    doors: Rc<Doors>,
    place: Weak<Place>,
}

/// The place went to another.
#[derive(Debug)]
pub struct GaveWay;

/// Places in the order in which they are to be given away; some of them are gone, or in another queue.
#[derive(Debug, Default)]
struct Queue(VecDeque<Weak<Place>>);

impl Queue {
    /// As long as there are places, nearly.
    fn push(&mut self, place: &Rc<Place>, taken: u32, named: bool) {
        if self.0.len() > 2 * taken as usize + 16 {
            self.0.retain(|entry| waiting(entry, named).is_some());
        }
        self.0.push_back(Rc::downgrade(place));
    }

    /// The first that may have to go.
    fn front(&mut self, named: bool) -> Option<Rc<Place>> {
        while let Some(front) = self.0.front() {
            let place = waiting(front, named);
            if place.is_some() {
                return place;
            }
            self.0.pop_front();
        }
        None
    }
}

/// The place, if it may have to go.
fn waiting(place: &Weak<Place>, named: bool) -> Option<Rc<Place>> {
    place.upgrade().filter(|place| place.counts.get() && !place.proved.get() && place.named.get() == named)
}

impl Doors {
    /// Places taken.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.taken.get()
    }

    /// Takes a place.
    pub fn enter(self: &Rc<Self>) -> AtDoor {
        let place = Rc::new(Place {
            since: self.time.get(),
            named: Cell::new(false),
            counts: Cell::new(true),
            proved: Cell::new(false),
            waker: RefCell::default(),
        });
        self.strangers.borrow_mut().push(&place, self.taken.get(), false);
        self.taken.set(self.taken.get() + 1);
        AtDoor { doors: self.clone(), place }
    }

    /// About a tenth of a second has passed.
    pub fn tick(&self, now: Instant) {
        let last = self.ticked.replace(Some(now));
        let passed = last.map_or(TICK, |last| now.saturating_duration_since(last)).min(PASSES_MAX);
        self.time.set(self.time.get().saturating_add(passed));
        // Somebody may have had its time.
        self.freed.notify_waiters();
    }

    /// Takes the place of a client that has had its time.
    pub fn make_room(&self) -> Room {
        let mut all_proved = true;
        for (queue, named) in [(&self.strangers, false), (&self.named, true)] {
            let Some(place) = queue.borrow_mut().front(named) else { continue };
            all_proved = false;
            // It may have come right in front of the tick that it is counted from.
            if self.time.get().saturating_sub(place.since) >= GRACE + TICK {
                place.counts.set(false);
                self.taken.set(self.taken.get().saturating_sub(1));
                if let Some(waker) = place.waker.take() {
                    waker.wake();
                }
                return Room::Made;
            }
        }
        if all_proved { Room::None } else { Room::Soon }
    }

    /// Waits until a place may be free; it may be taken again by then.
    pub async fn changed(&self) {
        self.freed.notified().await;
    }
}

impl Progress {
    /// The client has said who it is, or has done a handshake: whoever has not gives way first.
    pub fn named(&self) {
        if let Some(place) = waiting(&self.place, false) {
            place.named.set(true);
            self.doors.named.borrow_mut().push(&place, self.doors.taken.get(), true);
        }
    }
}

impl AtDoor {
    /// What tells how the client gets on.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { doors: self.doors.clone(), place: Rc::downgrade(&self.place) }
    }

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
        if self.place.counts.replace(false) {
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

    /// A tick less than that.
    const NEARLY: Duration = Duration::from_millis(400);

    /// Time passes, a tick at a time.
    fn pass(doors: &Doors, now: &mut Instant, time: Duration) {
        for _ in 0..time.as_millis() / TICK.as_millis() {
            *now += TICK;
            doors.tick(*now);
        }
    }

    #[test]
    fn the_oldest_gives_way_once_it_has_had_its_time_unless_it_has_proved_itself() {
        let (doors, mut now) = (Rc::new(Doors::default()), Instant::now());
        doors.tick(now);
        let (first, second) = (doors.enter(), doors.enter());
        first.proved();
        pass(&doors, &mut now, GRACE);
        let third = doors.enter();
        assert_eq!(doors.make_room(), Room::Soon, "the second came up to a tick later than it is counted from");
        pass(&doors, &mut now, TICK);
        assert_eq!((doors.make_room(), doors.taken()), (Room::Made, 2));
        assert!(matches!(second.run(pending::<()>()).now_or_never(), Some(Err(GaveWay))));
        assert_eq!(doors.make_room(), Room::Soon, "the third is new");
        drop(second);
        assert_eq!(doors.taken(), 2);
        drop(third);
        assert!(doors.changed().now_or_never().is_some());
        pass(&doors, &mut now, GRACE * 9);
        assert_eq!(doors.make_room(), Room::None, "the first does not give way");
        assert!(first.run(pending::<()>()).now_or_never().is_none());
        drop(first);
        assert_eq!(doors.taken(), 0);
    }

    #[test]
    fn strangers_give_way_before_those_who_have_said_who_they_are_and_these_after_their_time() {
        let (doors, mut now) = (Rc::new(Doors::default()), Instant::now());
        let named = doors.enter();
        let progress = named.progress();
        // Once is enough.
        for _ in 0..3 {
            progress.named();
        }
        pass(&doors, &mut now, TICK);
        let stranger = doors.enter();
        pass(&doors, &mut now, GRACE + TICK);
        assert_eq!((doors.make_room(), doors.taken()), (Room::Made, 1));
        assert!(!stranger.place.counts.get() && named.place.counts.get());
        let late = doors.enter();
        assert_eq!((doors.make_room(), doors.taken()), (Room::Made, 1), "it has had its time, and the other has not");
        assert!(matches!(named.run(pending::<()>()).now_or_never(), Some(Err(GaveWay))));
        progress.named();
        assert_eq!((doors.make_room(), doors.taken()), (Room::Soon, 1));
        drop((named, stranger, late));
        assert_eq!((doors.make_room(), doors.taken()), (Room::None, 0));
    }

    #[test]
    fn a_place_that_was_given_back_is_not_given_away_again() {
        let (doors, mut now) = (Rc::new(Doors::default()), Instant::now());
        let (refused, proved) = (doors.enter(), doors.enter());
        proved.proved();
        let progress = refused.progress();
        progress.named();
        // It hears why, and that takes a while.
        drop(refused);
        pass(&doors, &mut now, GRACE * 9);
        progress.named();
        assert_eq!((doors.make_room(), doors.taken()), (Room::None, 1));
    }

    #[test]
    fn time_in_which_nobody_was_heard_counts_against_nobody() {
        let (doors, mut now) = (Rc::new(Doors::default()), Instant::now());
        doors.tick(now);
        let one = doors.enter();
        // The machine had something else to do; its ticks come all at once.
        now += GRACE * 8;
        for _ in 0..40 {
            doors.tick(now);
        }
        assert_eq!(doors.make_room(), Room::Soon);
        pass(&doors, &mut now, NEARLY);
        assert_eq!((doors.make_room(), doors.taken()), (Room::Made, 0));
        drop(one);
    }

    #[test]
    fn the_queue_stays_as_long_as_there_are_places_whatever_clients_do() {
        let (doors, mut now) = (Rc::new(Doors::default()), Instant::now());
        let kept: Vec<AtDoor> = (0..10).map(|_| doors.enter()).collect();
        for _ in 0..1000 {
            drop(doors.enter());
            let passing = doors.enter();
            passing.progress().named();
            pass(&doors, &mut now, TICK);
        }
        let [strangers, named] = [&doors.strangers, &doors.named].map(|queue| queue.borrow().0.len());
        assert!(strangers <= 2 * 11 + 17 && named <= 2 * 11 + 17, "{strangers} and {named}");
        drop(kept);
    }
}
