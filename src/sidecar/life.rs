//! The state machines of [the process](super): the application's life, and the upkeep of each data plane. Events and the time in,
//! orders out.

use std::time::{Duration, Instant};

/// How long the application may live on after `shutdown_timeout` before it is served again: whoever sent the SIGTERM
/// did not mean to kill it. Heroku kills 5 s after, Kubernetes as well.
const REVIVED_AFTER: Duration = Duration::from_secs(15);

/// Pause before a lost data plane is started anew; doubles when that comes to nothing.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest such pause.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A data plane that served for so long is not failing.
const SOUND_AFTER: Duration = Duration::from_mins(1);

/// How the application ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// With this code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

/// A signal that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    /// Its number.
    pub(super) number: i32,
    /// The kernel sent it, because of the terminal, and so to the whole group.
    pub(super) from_kernel: bool,
}

/// What holds for the whole life.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// SIGTERM is passed on.
    pub(super) passes_term: bool,
    /// `shutdown_timeout`.
    pub(super) drain: Duration,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Signal(Received),
    /// The application ended.
    Ended(Fate),
    /// Something is [due](Life::due), or a plane came to its end.
    Tick,
}

/// What has to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Nothing,
    /// Send the application this signal.
    Forward(i32),
    /// Stop ourselves, as the application was stopped: the terminal's job control.
    Suspend,
    /// Let sessions finish, for so long.
    Drain(Duration),
    /// Cancel what is left.
    Stop,
}

/// ```text
/// Running ──deadline──▶ Released ──until──▶ Running
///    └──────ended───────────┴──ended──▶ Closing ──planes off──▶ over
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It runs and is served.
    Running {
        /// When server connections are closed: SIGTERM has come.
        deadline: Option<Instant>,
    },
    /// It runs and is not served any more.
    Released {
        /// When it is served again.
        until: Instant,
    },
    /// It has ended.
    Closing {
        /// How.
        fate: Fate,
        /// SIGTERM has come, before or since.
        terminated: bool,
    },
}

impl Default for Life {
    fn default() -> Self {
        Self::Running { deadline: None }
    }
}

impl Life {
    /// What `event` leads to at `now`.
    pub(super) fn on(self, event: Event, now: Instant, rules: &Rules) -> (Self, Order) {
        match (self, event) {
            (Self::Running { deadline }, Event::Signal(signal)) => {
                let set = if signal.number == libc::SIGTERM { Some(now + rules.drain) } else { None };
                (Self::Running { deadline: deadline.or(set) }, forward(signal, rules))
            }
            (Self::Released { .. }, Event::Signal(signal)) => (self, forward(signal, rules)),
            // The application may have ended by the same SIGTERM, sent to every process: it cuts nothing.
            (Self::Closing { fate, terminated: false }, Event::Signal(signal)) if signal.number == libc::SIGTERM => {
                (Self::Closing { fate, terminated: true }, Order::Nothing)
            }
            (Self::Closing { .. }, Event::Signal(signal)) => {
                let ends = matches!(signal.number, libc::SIGTERM | libc::SIGINT | libc::SIGQUIT);
                (self, if ends { Order::Stop } else { Order::Nothing })
            }
            (Self::Running { deadline }, Event::Ended(fate)) => {
                let left = deadline.map_or(rules.drain, |deadline| deadline.saturating_duration_since(now));
                (Self::Closing { fate, terminated: deadline.is_some() }, Order::Drain(left))
            }
            (Self::Released { .. }, Event::Ended(fate)) => (Self::Closing { fate, terminated: true }, Order::Nothing),
            (Self::Running { deadline: Some(deadline) }, Event::Tick) if now >= deadline => {
                (Self::Released { until: now + REVIVED_AFTER }, Order::Stop)
            }
            (Self::Released { until }, Event::Tick) if now >= until => (Self::default(), Order::Nothing),
            // A process ends once.
            (Self::Closing { .. }, Event::Ended(_)) | (_, Event::Tick) => (self, Order::Nothing),
        }
    }

    /// When it has to be looked at again.
    pub(super) fn due(self) -> Option<Instant> {
        match self {
            Self::Running { deadline } => deadline,
            Self::Released { until } => Some(until),
            Self::Closing { .. } => None,
        }
    }

    /// Whether the application is to be served.
    pub(super) fn wants_planes(self) -> bool {
        matches!(self, Self::Running { .. })
    }

    /// Whether its end is near.
    pub(super) fn is_terminated(self) -> bool {
        !matches!(self, Self::Running { deadline: None })
    }

    /// How it all ended, once it has.
    pub(super) fn over(self, planes_off: bool) -> Option<Fate> {
        match self {
            Self::Closing { fate, .. } if planes_off => Some(fate),
            _ => None,
        }
    }
}

/// Whether the application gets a signal from us that it has not got already.
fn forward(signal: Received, rules: &Rules) -> Order {
    match signal.number {
        // A terminal that hangs up tells the leader of its session alone.
        libc::SIGHUP => Order::Forward(libc::SIGHUP),
        libc::SIGTTIN | libc::SIGTTOU if signal.from_kernel => Order::Suspend,
        _ if signal.from_kernel => Order::Nothing,
        libc::SIGTERM if !rules.passes_term => Order::Nothing,
        number => Order::Forward(number),
    }
}

/// One data plane.
///
/// ```text
/// Up ──ended, wanted──▶ Down{until} ──until──▶ Up
///  └──ended───────────────▶ Off ◀──not wanted──┘    Off ──wanted──▶ Up
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upkeep {
    /// It serves.
    Up {
        since: Instant,
        /// Starts that came to nothing, in a row.
        failures: u32,
    },
    /// It was lost.
    Down {
        /// When it is started again.
        until: Instant,
        failures: u32,
    },
    /// It is not wanted.
    Off,
}

impl Upkeep {
    /// Of a plane that was started.
    pub(super) fn up(now: Instant) -> Self {
        Self::Up { since: now, failures: 0 }
    }

    /// It came to its end, or could not be started.
    pub(super) fn ended(self, now: Instant, wanted: bool) -> Self {
        let failures = match self {
            _ if !wanted => return Self::Off,
            Self::Up { since, .. } if now.saturating_duration_since(since) >= SOUND_AFTER => 0,
            Self::Up { failures, .. } | Self::Down { failures, .. } => failures,
            Self::Off => 0,
        };
        // Never at once: the server notices the loss of the old connections only when it next writes to them.
        let pause = PAUSE.saturating_mul(1 << failures.min(8)).min(PAUSE_MAX);
        Self::Down { until: now + pause, failures: failures.saturating_add(1) }
    }

    /// Whether it is to be started now.
    pub(super) fn tick(self, now: Instant, wanted: bool) -> (Self, bool) {
        match self {
            Self::Down { .. } if !wanted => (Self::Off, false),
            Self::Down { until, failures } if now >= until => (Self::Up { since: now, failures }, true),
            Self::Off if wanted => (Self::up(now), true),
            _ => (self, false),
        }
    }

    /// When it has to be looked at again.
    pub(super) fn due(self) -> Option<Instant> {
        match self {
            Self::Down { until, .. } => Some(until),
            Self::Up { .. } | Self::Off => None,
        }
    }

    pub(super) fn is_off(self) -> bool {
        self == Self::Off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAIN: Duration = Duration::from_secs(25);
    const RULES: Rules = Rules { passes_term: true, drain: DRAIN };

    fn sent(number: i32) -> Event {
        Event::Signal(Received { number, from_kernel: false })
    }

    #[test]
    fn every_event_is_answered_in_every_phase() {
        let now = Instant::now();
        let later = now + Duration::from_secs(10);
        let (running, warned, late) = (
            Life::Running { deadline: None },
            Life::Running { deadline: Some(later) },
            Life::Running { deadline: Some(now) },
        );
        let (released, over) = (Life::Released { until: later }, Life::Released { until: now });
        let (fate, other) = (Fate::Exited(3), Fate::Killed(9));
        let closing = Life::Closing { fate, terminated: true };
        let (unasked, asked) = (Life::Closing { fate, terminated: false }, Life::Closing { fate, terminated: true });
        let given_up = Life::Released { until: now + REVIVED_AFTER };
        #[rustfmt::skip]
        let table = [
            (running,  sent(libc::SIGTERM), Life::Running { deadline: Some(now + DRAIN) }, Order::Forward(libc::SIGTERM)),
            (running,  sent(libc::SIGINT),  running,  Order::Forward(libc::SIGINT)),
            (running,  sent(libc::SIGHUP),  running,  Order::Forward(libc::SIGHUP)),
            (running,  Event::Ended(fate),  unasked,  Order::Drain(DRAIN)),
            (unasked,  sent(libc::SIGTERM), asked,    Order::Nothing),
            (unasked,  sent(libc::SIGQUIT), unasked,  Order::Stop),
            (running,  Event::Tick,         running,  Order::Nothing),
            (warned,   sent(libc::SIGTERM), warned,   Order::Forward(libc::SIGTERM)),
            (warned,   sent(libc::SIGUSR1), warned,   Order::Forward(libc::SIGUSR1)),
            (warned,   Event::Ended(fate),  closing,  Order::Drain(Duration::from_secs(10))),
            (warned,   Event::Tick,         warned,   Order::Nothing),
            (late,     Event::Ended(fate),  closing,  Order::Drain(Duration::ZERO)),
            (late,     Event::Tick,         given_up, Order::Stop),
            (released, sent(libc::SIGTERM), released, Order::Forward(libc::SIGTERM)),
            (released, Event::Ended(fate),  closing,  Order::Nothing),
            (released, Event::Tick,         released, Order::Nothing),
            (over,     Event::Tick,         running,  Order::Nothing),
            (closing,  sent(libc::SIGTERM), closing,  Order::Stop),
            (closing,  sent(libc::SIGINT),  closing,  Order::Stop),
            (closing,  sent(libc::SIGUSR1), closing,  Order::Nothing),
            (closing,  Event::Ended(other), closing,  Order::Nothing),
            (closing,  Event::Tick,         closing,  Order::Nothing),
        ];
        for (life, event, next, order) in table {
            assert_eq!(life.on(event, now, &RULES), (next, order), "{life:?}, {event:?}");
        }
    }

    #[test]
    fn signals_that_the_application_has_already_are_not_passed_on() {
        let quiet = Rules { passes_term: false, ..RULES };
        let forward = |number, from_kernel, rules: &Rules| {
            let (life, order) =
                Life::default().on(Event::Signal(Received { number, from_kernel }), Instant::now(), rules);
            (life.is_terminated(), order)
        };
        assert_eq!(forward(libc::SIGINT, true, &RULES), (false, Order::Nothing), "the terminal's");
        assert_eq!(
            forward(libc::SIGHUP, true, &RULES),
            (false, Order::Forward(libc::SIGHUP)),
            "a hang-up is the leader's"
        );
        assert_eq!(forward(libc::SIGTTOU, true, &RULES), (false, Order::Suspend), "job control");
        assert_eq!(forward(libc::SIGTTIN, false, &RULES), (false, Order::Forward(libc::SIGTTIN)), "somebody's");
        assert_eq!(forward(libc::SIGTERM, false, &quiet), (true, Order::Nothing), "the platform's");
        assert_eq!(forward(libc::SIGUSR2, false, &quiet), (false, Order::Forward(libc::SIGUSR2)));
    }

    #[test]
    fn the_process_ends_with_the_application_and_after_its_planes() {
        let fate = Fate::Exited(0);
        let closing = Life::Closing { fate, terminated: false };
        assert_eq!(closing.over(false), None);
        assert_eq!(closing.over(true), Some(fate));
        assert_eq!(Life::default().over(true), None);
    }

    #[test]
    fn a_lost_plane_is_started_soon_then_ever_more_seldom_and_never_when_it_is_not_wanted() {
        let mut now = Instant::now();
        let mut upkeep = Upkeep::up(now);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            upkeep = upkeep.ended(now, true);
            let until = upkeep.due().unwrap();
            pauses.push((until - now).as_secs());
            assert!(!upkeep.tick(now, true).1);
            now = until;
            let (next, start) = upkeep.tick(now, true);
            assert!(start);
            upkeep = next;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30]);
        let sound = upkeep.ended(now + SOUND_AFTER, true);
        assert_eq!(sound.due(), Some(now + SOUND_AFTER + PAUSE), "it had served for long");
        assert_eq!(upkeep.ended(now, false), Upkeep::Off);
        assert_eq!(sound.tick(now + SOUND_AFTER, false), (Upkeep::Off, false));
        assert_eq!(Upkeep::Off.tick(now, false), (Upkeep::Off, false));
        assert_eq!(Upkeep::Off.tick(now, true), (Upkeep::up(now), true), "served again");
    }
}
