//! How many failed logins, and guesses at cancel keys, an address may make.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::recent::Recent;

/// Addresses, and users of an address, that are remembered at least.
const REMEMBERED: usize = 8192;

/// How many times as many failures an address may make over all users, or sessions, as for one.
const ALL_USERS: u32 = 10;

/// Failed logins by address and user, and by address; guesses at cancel keys by address and session, and by address, apart
/// from those: many clients may be behind one address, and none of them is to be kept from cancelling by another's password.
///
/// What is remembered of one is the time at which all its failures will be forgiven: each moves it by the time that one
/// costs at the rate, and it may lie as far ahead as the burst costs.
#[derive(Debug)]
pub struct Throttle {
    /// Failures per second; none for no limit.
    rate: u32,
    burst: u32,
    hasher: RandomState,
    forgiven: Recent<Key, Instant>,
}

/// What was guessed at.
#[derive(Clone, Copy, Debug, Hash)]
pub enum Guess<'a> {
    /// This user's password.
    User(&'a str),
    /// The cancel key of the session with this process id.
    Session(u32),
}

/// Whose failures these are: an address, and the hash of what it guessed at.
type Key = (IpAddr, Option<u64>);

impl Throttle {
    /// Nobody failed yet. A `rate` of 0 sets no limit.
    #[must_use]
    pub fn new(rate: u32, burst: u32) -> Self {
        Self { rate, burst, hasher: RandomState::new(), forgiven: Recent::new(REMEMBERED) }
    }

    /// Whether `source` has failed too often, at this or over all, to try again now.
    #[must_use]
    pub fn is_over(&self, source: IpAddr, guess: Guess<'_>, now: Instant) -> bool {
        let keys = self.keys(source, guess);
        let left =
            |key: &Key| self.forgiven.get(key).map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        // At a session that nobody has guessed at, a key is right or the first wrong one.
        let untouched = keys.first().is_none_or(|(key, _)| left(key).is_zero());
        if untouched && matches!(guess, Guess::Session(_)) {
            return false;
        }
        keys.iter().any(|(key, times)| {
            // One more failure has to fit.
            let room = self.cost(*times).saturating_mul(self.burst.saturating_mul(*times).saturating_sub(1));
            left(key) > room
        })
    }

    /// A login from `source` failed, or it has not known a session's key.
    pub fn failed(&mut self, source: IpAddr, guess: Guess<'_>, now: Instant) {
        for (key, times) in self.keys(source, guess) {
            let until = self.forgiven.get(&key).copied().filter(|until| *until > now).unwrap_or(now);
            let later = until.checked_add(self.cost(times)).unwrap_or(until);
            // The first guess at each of many sessions is heeded: more than the burst all the same.
            let latest = now.checked_add(self.cost(times).saturating_mul(self.burst.saturating_mul(times)));
            let capped = matches!(guess, Guess::Session(_)).then_some(latest).flatten();
            self.forgiven.put(key, capped.map_or(later, |latest| later.min(latest)));
        }
    }

    /// What counts a failure, each with how many times the limit is its own. None without a limit.
    fn keys(&self, source: IpAddr, guess: Guess<'_>) -> Vec<(Key, u32)> {
        if self.rate == 0 {
            return Vec::new();
        }
        let source = network(source);
        let all = match guess {
            Guess::User(_) => None,
            Guess::Session(_) => Some(self.hasher.hash_one("all sessions")),
        };
        vec![((source, Some(self.hasher.hash_one(guess))), 1), ((source, all), ALL_USERS)]
    }

    /// The time after which one failure is forgiven.
    fn cost(&self, times: u32) -> Duration {
        Duration::from_secs(1) / self.rate.saturating_mul(times).max(1)
    }
}

/// The network that one host can speak for: of IPv4 an address, of IPv6 a /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::Guess::{Session, User};
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many logins that all fail get as far as that.
    fn failures(throttle: &mut Throttle, source: IpAddr, users: &[&str], now: Instant) -> u32 {
        let mut failures = 0;
        for user in users.iter().cycle().take(10_000) {
            if !throttle.is_over(source, User(user), now) {
                throttle.failed(source, User(user), now);
                failures += 1;
            }
        }
        failures
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut throttle = Throttle::new(10, 5);
        let start = Instant::now();
        let source = ip("192.0.2.1");
        assert_eq!(failures(&mut throttle, source, &["a"], start), 5);
        assert_eq!(failures(&mut throttle, source, &["a"], start + Duration::from_millis(99)), 0);
        assert_eq!(failures(&mut throttle, source, &["a"], start + Duration::from_millis(300)), 3);
        assert_eq!(failures(&mut throttle, source, &["a"], start + Duration::from_hours(1)), 5);
    }

    #[test]
    fn one_users_failures_are_not_anothers_but_all_together_have_a_limit() {
        let mut throttle = Throttle::new(10, 5);
        let now = Instant::now();
        let source = ip("192.0.2.1");
        assert_eq!(failures(&mut throttle, source, &["a"], now), 5);
        assert!(throttle.is_over(source, User("a"), now) && !throttle.is_over(source, User("b"), now));
        let names: Vec<String> = (0..1000).map(|n| format!("user{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(failures(&mut throttle, source, &names, now), 45);
        assert!(throttle.is_over(source, User("b"), now));
        assert!(!throttle.is_over(ip("192.0.2.2"), User("a"), now));
    }

    #[test]
    fn guesses_at_one_sessions_key_are_not_anothers_and_no_failed_logins() {
        let mut throttle = Throttle::new(10, 5);
        let (now, source) = (Instant::now(), ip("192.0.2.1"));
        let mut guess = |pid| {
            let heeded = !throttle.is_over(source, Session(pid), now);
            if heeded {
                throttle.failed(source, Session(pid), now);
            }
            heeded
        };
        assert_eq!((0..100).filter(|_| guess(7)).count(), 5);
        // The first at each session is heeded, since the key may be right; a second one is too much by then.
        for heeded in [1000, 0] {
            assert_eq!((1000..2000).filter(|pid| guess(*pid)).count(), heeded);
        }
        assert!(!throttle.is_over(source, User("a"), now), "it is no failed login");
        assert!(!throttle.is_over(ip("192.0.2.2"), Session(7), now));
        assert!(throttle.is_over(source, Session(7), now + Duration::from_millis(99)));
        assert!(!throttle.is_over(source, Session(7), now + Duration::from_millis(101)));
        // Nor do failed logins keep anyone from cancelling.
        let mut throttle = Throttle::new(10, 5);
        let names: Vec<String> = (0..1000).map(|n| format!("user{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        failures(&mut throttle, source, &names, now);
        throttle.failed(source, Session(7), now);
        assert!(throttle.is_over(source, User("b"), now) && !throttle.is_over(source, Session(7), now));
    }

    #[test]
    fn an_address_is_one_of_ipv4_and_a_network_of_ipv6() {
        #[rustfmt::skip]
        let table = [
            ("192.0.2.1",     "192.0.2.1",              true),
            ("192.0.2.1",     "192.0.2.2",              false),
            ("192.0.2.1",     "::ffff:192.0.2.1",       true),
            ("2001:db8::1",   "2001:db8::ffff:1:2:3",   true),
            ("2001:db8::1",   "2001:db8:0:1::1",        false),
        ];
        let now = Instant::now();
        for (one, other, same) in table {
            let mut throttle = Throttle::new(1, 1);
            throttle.failed(ip(one), User("a"), now);
            assert_eq!(throttle.is_over(ip(other), User("a"), now), same, "{one} {other}");
        }
    }

    #[test]
    fn memory_is_bounded_and_who_goes_on_failing_is_remembered() {
        let mut throttle = Throttle::new(1, 3);
        let now = Instant::now();
        let bad = ip("192.0.2.1");
        // Its last failure lies at most half of what is remembered back: each address takes two places.
        for n in 0..43_000 + u32::try_from(REMEMBERED / 2).unwrap() - 1 {
            throttle.failed(IpAddr::V4((0x0a00_0000 | n).into()), User("a"), now);
            if n % 1000 == 0 && !throttle.is_over(bad, User("a"), now) {
                throttle.failed(bad, User("a"), now);
            }
        }
        assert!(throttle.forgiven.len() <= 2 * REMEMBERED && throttle.is_over(bad, User("a"), now));
        assert!(Throttle::new(0, 1).keys(bad, User("a")).is_empty());
    }
}
