//! Whether the worker hangs.
//!
//! It is told ten times a second that time has passed, and every one of its turns is far shorter than a second: one that
//! heeds nothing for long is in a loop without end, or waits for something that does not come. Or it does not get to run. What
//! tells these apart is how its thread looks to the system:
//!
//! | the thread | what it means |
//! |---|---|
//! | has used 10 s of CPU since it heeded a tick | it is in a loop: it hangs |
//! | was asleep at each of 100 looks, a tenth of a second apart | it waits, and not for its ticks: it hangs |
//! | is ready to run, and is not let | the machine is busy |
//! | waits for a disk (its pages, mostly) | the machine is short of memory |
//! | is stopped | by a debugger, or by whoever stopped the process |
//!
//! Only the first two count. Looks are counted, not time: while the whole process stands still (SIGSTOP, a suspended laptop, a
//! paused container) nobody looks, and afterwards the worker has all the time it needs for its next tick.
//!
//! Source: proc(5), `/proc/PID/task/TID/stat`. Where there is no such file nothing is known, and nobody is taken to hang.

use std::time::Duration;

/// Ticks without an answer before the thread is looked at: a second.
const PATIENCE: u32 = 10;

/// Looks at which it was asleep.
const ASLEEP_MAX: u32 = 100;

/// CPU that it used meanwhile.
const CPU_MAX: Duration = Duration::from_secs(10);

/// How a thread looks from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// It waits for something that is not a disk.
    is_asleep: bool,
    /// CPU that it has used so far.
    cpu: Duration,
}

/// What a worker that hangs does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hang {
    /// It runs in a loop.
    Loops,
    /// It waits.
    Waits,
}

/// The worker's answers to its ticks, seen from the supervisor.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pulse {
    /// Ticks that it had heeded when that was last another number.
    beats: u64,
    /// Ticks of ours since then.
    silent: u32,
    /// Looks since then at which it was asleep.
    asleep: u32,
    /// Its CPU at the first of the looks.
    cpu: Option<Duration>,
}

impl Pulse {
    /// At a tick of the supervisor: whether the worker hangs, which has heeded so many ticks. `look` is only called when it
    /// is late.
    pub(super) fn tick(&mut self, beats: u64, look: impl FnOnce() -> Option<Look>) -> Option<Hang> {
        if beats != self.beats {
            *self = Self { beats, ..Self::default() };
            return None;
        }
        self.silent = self.silent.saturating_add(1);
        if self.silent < PATIENCE {
            return None;
        }
        let Look { is_asleep, cpu } = look()?;
        let since = *self.cpu.get_or_insert(cpu);
        self.asleep += u32::from(is_asleep);
        if cpu.saturating_sub(since) >= CPU_MAX {
            Some(Hang::Loops)
        } else if self.asleep >= ASLEEP_MAX {
            Some(Hang::Waits)
        } else {
            None
        }
    }
}

/// How a thread of this process looks; none if the system does not tell.
pub(super) fn look(thread: i32) -> Option<Look> {
    parse(&std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?)
}

fn parse(stat: &str) -> Option<Look> {
    // The second field is a name in parentheses, with anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    // Fields 14 and 15: in user code and in the kernel.
    let user: u64 = fields.nth(10)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let cpu = Duration::from_millis(user.saturating_add(system).saturating_mul(1000) / per_second);
    Some(Look { is_asleep: state == "S", cpu })
}

#[cfg(test)]
mod tests {
    use super::*;

    type Show = fn(u64, &dyn Fn(bool, u64) -> Option<Look>) -> Option<Look>;

    #[test]
    fn only_a_thread_that_loops_or_waits_hangs() {
        let look = |is_asleep, ms| Some(Look { is_asleep, cpu: Duration::from_millis(ms) });
        // What the look at the nth tick shows, whether the worker heeds every so many ticks, and after how many it hangs.
        #[rustfmt::skip]
        let table: [(&str, Show, Option<u64>, Option<(u64, Hang)>); 8] = [
            ("well",                        |_, look| look(true, 5),                 Some(1),   None),
            ("slow, and asleep at looks",   |_, look| look(true, 5),                 Some(100), None),
            ("waits",                       |_, look| look(true, 5),                 None,      Some((109, Hang::Waits))),
            ("loops",                       |n, look| look(false, n * 100),          None,      Some((110, Hang::Loops))),
            ("loops on half a CPU",         |n, look| look(false, n * 50),           None,      Some((210, Hang::Loops))),
            ("gets no CPU",                 |n, look| look(false, n),                None,      None),
            ("seldom gets any, and sleeps", |n, look| look(n % 4 == 0, n),           None,      Some((408, Hang::Waits))),
            ("nothing is known",            |_, _| None,                             None,      None),
        ];
        for (name, show, heeds, want) in table {
            let mut pulse = Pulse::default();
            let hang = (1..1000).find_map(|n| {
                let beats = heeds.map_or(0, |every| n / every);
                pulse.tick(beats, || show(n, &look)).map(|hang| (n, hang))
            });
            assert_eq!(hang, want, "{name}");
        }
    }

    #[test]
    fn threads_look_like_what_they_do() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("a) S (b".into()).spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = ended.recv();
            let begun = std::time::Instant::now();
            let me = nix::unistd::gettid().as_raw();
            let before = look(me).unwrap();
            while look(me).unwrap().cpu == before.cpu && begun.elapsed() < Duration::from_secs(20) {}
            (before, look(me).unwrap())
        });
        let (thread, id) = (thread.unwrap(), told.recv().unwrap());
        wait_until(|| look(id).unwrap().is_asleep);
        drop(end);
        let (before, after) = thread.join().unwrap();
        assert!(!before.is_asleep && after.cpu > before.cpu, "{before:?} {after:?}");
        assert_eq!(look(-1), None);
    }

    /// Waits until it is so.
    fn wait_until(is_so: impl Fn() -> bool) {
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(std::time::Instant::now() < until, "it never was");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
