//! What the kernel knows: CPU time and memory of a process, and how busy everything else is. Linux only.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::ClockId;
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;

/// CPU time a process has used since it started, threads that ended included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTime {
    /// All of it, nanoseconds: the scheduler's own account, exact.
    pub total_ns: u64,
    /// In user mode, clock ticks; the kernel divides the total by what its timer saw.
    pub user_ticks: u64,
    /// In the kernel, clock ticks.
    pub system_ticks: u64,
}

impl CpuTime {
    /// Reads the process's clock.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if there is no such process.
    ///
    /// Source: `clock_getcpuclockid(3)`; `proc_pid_stat(5)`. `/proc/PID/schedstat` would do for one thread, but
    /// leaves out what a running thread has used since the last tick.
    pub fn of(pid: u32) -> Result<Self, Fault> {
        let stat = Stat::of(pid)
            .ok_or(Fault::Io { what: "reading a process's state", source: std::io::ErrorKind::NotFound.into() })?;
        let total_ns = cpu_clock(pid).map_err(Fault::errno("reading a process's CPU clock"))?;
        Ok(Self { total_ns, user_ticks: stat.user, system_ticks: stat.system })
    }

    /// What was used since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            total_ns: self.total_ns.saturating_sub(earlier.total_ns),
            user_ticks: self.user_ticks.saturating_sub(earlier.user_ticks),
            system_ticks: self.system_ticks.saturating_sub(earlier.system_ticks),
        }
    }
}

fn cpu_clock(pid: u32) -> nix::Result<u64> {
    let pid = i32::try_from(pid).map_err(|_| nix::errno::Errno::ESRCH)?;
    let now = Duration::from(ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?.now()?);
    Ok(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

/// The fields of `/proc/PID/stat` that are used here; ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    user: u64,
    system: u64,
    /// User and system time of children that ended and were waited for.
    reaped: u64,
}

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The program's name stands in brackets and may hold anything, so fields count from the last bracket.
    fn parse(line: &str) -> Option<Self> {
        let (_, fields) = line.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
        Some(Self {
            parent: u32::try_from(field(4)?).ok()?,
            user: field(14)?,
            system: field(15)?,
            reaped: field(16)? + field(17)?,
        })
    }
}

/// What the children of a process have used, nanoseconds, those included that ended and were waited for; of these the kernel
/// tells no more than clock ticks. Children of running children are left out.
///
/// Source: `proc_pid_task(5)`, `children`; the process is taken to have one thread.
///
/// # Errors
///
/// [`Fault::Io`] if the system does not tell its clock tick.
pub fn below(parent: u32) -> Result<u64, Fault> {
    let text = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    let pids = text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
    // One may have ended since.
    let running: u64 = pids.filter_map(|pid| cpu_clock(pid).ok()).sum();
    let reaped = Stat::of(parent).map_or(0, |stat| stat.reaped);
    let tick = u64::try_from(tick()?.as_nanos()).unwrap_or(u64::MAX);
    Ok(running.saturating_add(reaped.saturating_mul(tick)))
}

/// The parent of a process; `None` if there is no such process.
#[must_use]
pub fn parent(pid: u32) -> Option<u32> {
    Stat::of(pid).map(|stat| stat.parent)
}

/// A process's anonymous resident memory, KiB.
///
/// # Errors
///
/// [`Fault::Io`] if there is no such process.
pub fn anonymous_kib(pid: u32) -> Result<u64, Fault> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).map_err(Fault::io("reading a process's status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()).and_then(|word| word.parse().ok());
    kib.ok_or(Fault::Io { what: "finding RssAnon", source: std::io::ErrorKind::InvalidData.into() })
}

/// What the whole machine and our own processes had used at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    at: Instant,
    all: Duration,
    ours: Duration,
}

impl Usage {
    /// Adds up now; `roots` and everything below them in the process tree are ours.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] without `/proc`.
    pub fn now(roots: &[u32]) -> Result<Self, Fault> {
        let tick = tick()?;
        let total = fs::read_to_string("/proc/stat").map_err(Fault::io("reading /proc/stat"))?;
        Ok(Self { at: Instant::now(), all: busy_ticks(&total) * tick, ours: used_by(roots, tick)? })
    }

    /// Cores that others (and the hypervisor, by stealing) used on average since `earlier`.
    #[must_use]
    pub fn others_since(&self, earlier: &Self) -> f64 {
        let all = self.all.saturating_sub(earlier.all);
        let ours = self.ours.saturating_sub(earlier.ours);
        all.saturating_sub(ours).as_secs_f64() / self.at.duration_since(earlier.at).as_secs_f64().max(1e-9)
    }
}

/// One clock tick of `/proc`.
///
/// # Errors
///
/// [`Fault::Io`] if the system does not tell.
pub fn tick() -> Result<Duration, Fault> {
    let per_second = sysconf(SysconfVar::CLK_TCK).map_err(Fault::errno("asking for the clock tick"))?;
    let per_second = per_second.and_then(|ticks| u32::try_from(ticks).ok()).filter(|ticks| *ticks > 0);
    Ok(Duration::from_secs(1) / per_second.unwrap_or(100))
}

/// Everything but idle and waiting for disks, in ticks. Guests are contained in user.
///
/// Source: `proc_stat(5)`: user nice system idle iowait irq softirq steal guest `guest_nice`.
fn busy_ticks(stat: &str) -> u32 {
    let line = stat.lines().next().unwrap_or_default();
    let fields = line.split_ascii_whitespace().skip(1).take(8).enumerate();
    let busy = fields.filter(|(place, _)| !matches!(place, 3 | 4));
    let sum: u64 = busy.filter_map(|(_, field)| field.parse::<u64>().ok()).sum();
    u32::try_from(sum).unwrap_or(u32::MAX)
}

fn used_by(roots: &[u32], tick: Duration) -> Result<Duration, Fault> {
    let mut below: HashMap<u32, Vec<u32>> = HashMap::new();
    let mut stats: HashMap<u32, Stat> = HashMap::new();
    for entry in fs::read_dir("/proc").map_err(Fault::io("reading /proc"))? {
        let name = entry.map_err(Fault::io("reading /proc"))?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // It may have ended since.
        let Some(stat) = Stat::of(pid) else { continue };
        below.entry(stat.parent).or_default().push(pid);
        stats.insert(pid, stat);
    }
    let mut seen = HashSet::new();
    let mut open = roots.to_vec();
    let mut sum = Duration::ZERO;
    while let Some(pid) = open.pop() {
        if !seen.insert(pid) {
            continue;
        }
        open.extend(below.get(&pid).into_iter().flatten());
        let reaped = stats.get(&pid).map_or(0, |stat| stat.reaped);
        sum += Duration::from_nanos(cpu_clock(pid).unwrap_or(0)) + tick * u32::try_from(reaped).unwrap_or(u32::MAX);
    }
    Ok(sum)
}

/// Where and when the figures were made.
#[derive(Clone, Debug, Serialize)]
pub struct Context {
    /// The day, UTC, as year-month-day.
    pub date: String,
    /// Kernel release.
    pub kernel: String,
    /// Processor model.
    pub cpu: String,
    /// Processors online.
    pub cpus: usize,
}

impl Context {
    /// Reads it from the system.
    #[must_use]
    pub fn read() -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let cpu = model.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, model)| model.trim());
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self {
            date: civil_date(seconds / 86_400),
            kernel: kernel.trim().to_owned(),
            cpu: cpu.to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        }
    }
}

/// The Gregorian date of a day counted from 1 January 1970.
fn civil_date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        #[rustfmt::skip]
        let table = [
            (0,      "1970-01-01"),
            (30,     "1970-01-31"),
            (31,     "1970-02-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ];
        for (days, want) in table {
            assert_eq!(civil_date(days), want, "{days}");
        }
    }

    #[test]
    fn a_program_name_with_brackets_and_spaces_moves_no_field() {
        let line = "7 (a) b (c) S 3 7 7 0 -1 4194560 1 2 3 4 50 60 7 8 20 0 1 0 99 1 2";
        let want = Stat { parent: 3, user: 50, system: 60, reaped: 15 };
        assert_eq!(Stat::parse(line), Some(want));
        assert_eq!(Stat::parse("7 (a) S 3"), None);
    }

    #[test]
    fn idle_and_waiting_are_not_busy_and_guests_not_counted_twice() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 9 9"), 63);
        assert_eq!(busy_ticks(""), 0);
    }

    #[test]
    fn what_a_child_has_used_is_told_after_it_has_ended() {
        let me = std::process::id();
        let before = below(me).unwrap();
        let mut shell = std::process::Command::new("sh");
        let counts = "read line; i=0; while [ $i -lt 1000000 ]; do i=$((i+1)); done";
        let mut child = shell.args(["-c", counts]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        // The kernel lists them by the thread that started them, and tests have threads.
        let task = nix::unistd::gettid();
        let text = fs::read_to_string(format!("/proc/self/task/{task}/children")).unwrap();
        assert!(text.split_ascii_whitespace().any(|pid| pid == child.id().to_string()), "{text}");
        // It goes on when its input ends.
        drop(child.stdin.take());
        child.wait().unwrap();
        let used = below(me).unwrap() - before;
        assert!(used >= 20_000_000, "{used} ns");
    }

    #[test]
    fn work_of_our_own_shows_on_our_clock_and_not_as_others() {
        let me = std::process::id();
        let (clock, usage) = (CpuTime::of(me).unwrap(), Usage::now(&[me]).unwrap());
        let begin = Instant::now();
        let mut sum = 0_u64;
        while begin.elapsed() < Duration::from_millis(200) {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(7));
        }
        let used = CpuTime::of(me).unwrap().since(clock).total_ns;
        assert!(used > 20_000_000, "{used} ns of 200 ms, {sum}");
        let ours = Usage::now(&[me]).unwrap().ours.saturating_sub(usage.ours);
        assert!(ours >= Duration::from_millis(20), "{ours:?}");
    }
}
