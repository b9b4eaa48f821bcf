//! Gives back the pages of the program's file that only its start, or an hour of work, needed.
//!
//! What is read of the program's code and constants stays in the process' resident set for good, since the kernel
//! has no reason to take it: some 5 MiB of a program that idles in half a MiB, which counts against a dyno's memory like
//! any other. They are pages of a file that is never written: taken out of the address space they cost nothing, and come back,
//! sixteen at a time and without a disk, when something needs them.
//!
//! Done when the process has been quiet for a second, and only if there is something to gain: neither a busy pooler nor one
//! that is asleep does anything here.

use std::time::{Duration, Instant};

/// How often it is looked whether the process is quiet.
const LOOK: Duration = Duration::from_secs(1);

/// CPU time within [`LOOK`] of a process that is quiet; 3 %, where its ticks cost 0.2 %.
const QUIET: Duration = Duration::from_millis(30);

/// Page faults that make it worth while; each is up to sixteen pages.
const FAULTS: u64 = 32;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    cpu: Duration,
    faults: u64,
}

/// When to do it. Pure: the time and what was used are arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trim {
    due: Instant,
    used: Used,
    /// Page faults when it was done last.
    faults: u64,
}

impl Trim {
    /// Of a process that starts at `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now + LOOK, used: Used::default(), faults: 0 }
    }

    /// When it is looked next.
    pub(super) fn due(self) -> Instant {
        self.due
    }

    /// A look: what is next, and whether to do it now.
    pub(super) fn tick(self, now: Instant, used: Used) -> (Self, bool) {
        if now < self.due {
            return (self, false);
        }
        let quiet = used.cpu.saturating_sub(self.used.cpu) <= QUIET;
        let now_is_it = quiet && used.faults.saturating_sub(self.faults) >= FAULTS;
        let faults = if now_is_it { used.faults } else { self.faults };
        (Self { due: now + LOOK, used, faults }, now_is_it)
    }
}

/// What this process has used; nothing where the system does not tell.
#[allow(unsafe_code, reason = "resource usage has no safe form in std; the call carries its proof")]
pub(super) fn used() -> Used {
    // SAFETY: rusage is plain numbers, of which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: getrusage writes one rusage to the address it gets, which is that of a live local.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } != 0 {
        return Used::default();
    }
    let time = |time: libc::timeval| {
        let whole = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
        whole + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    Used { cpu: time(usage.ru_utime) + time(usage.ru_stime), faults: u64::try_from(usage.ru_minflt).unwrap_or(0) }
}

/// Takes the program's own pages that are never written out of the address space.
#[allow(unsafe_code, reason = "the mappings of the program have no safe form in std; each call carries its proof")]
pub(super) fn give_back() {
    for (start, len) in read_only_parts() {
        // SAFETY: the range is whole pages inside one PT_LOAD segment of the running program without PF_W, which the loader
        // maps from the program's file, private and never writable (there are no relocations in it: those of a PIE are in
        // the segment with PF_W). So its pages are those of the file, and after this call the next access of any thread reads
        // the same bytes from there.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTNEED) };
    }
}

/// The segments of this program that nobody may write: whole pages, address and length.
#[allow(unsafe_code, reason = "the program's headers are read where the loader has them")]
fn read_only_parts() -> Vec<(usize, usize)> {
    unsafe extern "C" fn first(
        info: *mut libc::dl_phdr_info,
        _: libc::size_t,
        found: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the loader hands over a live dl_phdr_info, and `found` is what dl_iterate_phdr was given below.
        let (info, found) = unsafe { (&*info, &mut *found.cast::<Vec<(usize, usize)>>()) };
        // SAFETY: dlpi_phdr points to dlpi_phnum program headers, which stay as long as the object is loaded.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
        let page = rustix::param::page_size();
        for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0)
        {
            let (Ok(base), Ok(address), Ok(len)) =
                (usize::try_from(info.dlpi_addr), usize::try_from(header.p_vaddr), usize::try_from(header.p_memsz))
            else {
                continue;
            };
            // What is not a whole page may share its page with a neighbour.
            let start = (base + address).next_multiple_of(page);
            let end = (base + address + len) / page * page;
            found.extend((end > start).then(|| (start, end - start)));
        }
        // The first object is the program itself; the others, shared with every process, stay as they are.
        1
    }
    let mut found: Vec<(usize, usize)> = Vec::new();
    // SAFETY: the callback takes `found` for what it is, and the call ends before it does.
    unsafe { libc::dl_iterate_phdr(Some(first), (&raw mut found).cast()) };
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_trimmed_when_it_is_quiet_and_there_is_something_to_gain() {
        let start = Instant::now();
        let used = |cpu_ms, faults| Used { cpu: Duration::from_millis(cpu_ms), faults };
        let mut trim = Trim::new(start);
        #[rustfmt::skip]
        let table = [
            ("not yet",                       500,  used(900, 400), false),
            ("busy",                          1000, used(900, 400), false),
            ("quiet",                         2000, used(905, 410), true),
            ("nothing came back",             3000, used(910, 415), false),
            ("little by little",              4000, used(915, 441), false),
            ("enough to gain",                5000, used(920, 442), true),
            ("busy again",                    6000, used(999, 900), false),
            ("quiet again, after a pause",    9000, used(1020, 900), true),
        ];
        for (name, at_ms, used, want) in table {
            let (next, now_is_it) = trim.tick(start + Duration::from_millis(at_ms), used);
            assert_eq!(now_is_it, want, "{name}");
            trim = next;
        }
        assert!(trim.due() > start + Duration::from_secs(9));
    }

    #[test]
    fn the_programs_pages_are_given_back_and_it_goes_on() {
        let parts = read_only_parts();
        assert!(!parts.is_empty());
        let here = the_programs_pages_are_given_back_and_it_goes_on as fn() as usize;
        assert!(parts.iter().any(|(start, len)| (*start..start + len).contains(&here)), "its code is among them");
        let before = used();
        // While another thread runs.
        let other =
            std::thread::spawn(|| (0..200_000).fold(0_u64, |sum, n| sum.wrapping_add(format!("{n}").len() as u64)));
        for _ in 0..50 {
            give_back();
        }
        assert_eq!(other.join().unwrap(), 1_088_890);
        assert!(used().faults > before.faults, "what is needed comes back");
    }
}
