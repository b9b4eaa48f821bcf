//! Gives back the pages of the program's file that only its start, or an hour of work, needed.
//!
//! What is read of the program's code and constants stays in the process' resident set, since nobody has a reason to take
//! it out: some 5 MiB of a program that idles in one or two of its own. They are pages of a file that is never written: taken
//! out of the address space they come back, sixteen at a time, when something needs them. What falls by it is the resident
//! set (`VmRSS`). The file stays in the page cache, and charged to the cgroup that read it, until the kernel wants its memory:
//! for a quota that counts the cache nothing is won.
//!
//! Done when no client has asked anything for some seconds, once in a minute at most, and only if there is something to gain:
//! neither a busy pooler nor one that is asleep does anything here.

use std::time::{Duration, Instant};

/// How often it is looked whether the process is at rest.
const LOOK: Duration = Duration::from_secs(1);

/// Looks in a row that find it so.
const LOOKS: u32 = 3;

/// From one time to the next, at least.
const PAUSE: Duration = Duration::from_mins(1);

/// Page faults that make it worth while; each is up to sixteen pages.
const FAULTS: u64 = 96;

/// What a process has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Whatever clients asked.
    pub(super) asked: u64,
    /// Page faults.
    pub(super) faults: u64,
}

/// When to do it. Pure: the time and what was done are arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trim {
    due: Instant,
    asked: u64,
    /// Looks in a row at a process at rest.
    rested: u32,
    /// When it was done last, and the page faults then.
    last: Option<(Instant, u64)>,
}

impl Trim {
    /// Of a process that starts at `now`.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now + LOOK, asked: 0, rested: 0, last: None }
    }

    /// When it is looked next.
    pub(super) fn due(self) -> Instant {
        self.due
    }

    /// A look: what is next, and whether to do it now.
    pub(super) fn tick(self, now: Instant, done: Done) -> (Self, bool) {
        if now < self.due {
            return (self, false);
        }
        let rested = if done.asked == self.asked { self.rested + 1 } else { 0 };
        let pays = self.last.is_none_or(|(at, faults)| {
            now.saturating_duration_since(at) >= PAUSE && done.faults.saturating_sub(faults) >= FAULTS
        });
        let now_is_it = rested >= LOOKS && pays;
        let last = if now_is_it { Some((now, done.faults)) } else { self.last };
        (Self { due: now + LOOK, asked: done.asked, rested, last }, now_is_it)
    }
}

/// Page faults of this process so far; none where the system does not tell.
#[allow(unsafe_code, reason = "resource usage has no safe form in std; the call carries its proof")]
pub(super) fn faults() -> u64 {
    // SAFETY: rusage is plain numbers, of which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: getrusage writes one rusage to the address it gets, which is that of a live local.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) } != 0 {
        return 0;
    }
    u64::try_from(usage.ru_minflt).unwrap_or(0)
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
    fn a_process_at_rest_is_trimmed_if_there_is_something_to_gain() {
        let start = Instant::now();
        let mut trim = Trim::new(start);
        #[rustfmt::skip]
        let table: [(&str, u64, u64, u64, bool); 10] = [
            ("not yet",                    0,   0,  400, false),
            ("asked something",            1,   5,  500, false),
            ("at rest",                    2,   5,  500, false),
            ("still",                      3,   5,  500, false),
            ("long enough",                4,   5,  500, true),
            ("what it needs came back",    5,   5,  900, false),
            ("not twice in a minute",     30,   5,  900, false),
            ("after it",                  64,   5,  900, true),
            ("nothing to gain",          180,   5,  995, false),
            ("something to gain",        181,   5,  996, true),
        ];
        for (name, at_s, asked, faults, want) in table {
            let (next, now_is_it) = trim.tick(start + Duration::from_secs(at_s), Done { asked, faults });
            assert_eq!(now_is_it, want, "{name}");
            trim = next;
        }
        // Fifty questions a second, and whatever else faults: never.
        for second in 182..1000 {
            let done = Done { asked: second * 50, faults: second * 1000 };
            let (next, now_is_it) = trim.tick(start + Duration::from_secs(second), done);
            assert!(!now_is_it);
            trim = next;
        }
        assert!(trim.due() > start + Duration::from_secs(999));
    }

    #[test]
    fn the_programs_pages_are_given_back_and_it_goes_on() {
        let parts = read_only_parts();
        assert!(!parts.is_empty());
        let here = the_programs_pages_are_given_back_and_it_goes_on as fn() as usize;
        assert!(parts.iter().any(|(start, len)| (*start..start + len).contains(&here)), "its code is among them");
        let before = faults();
        // While another thread runs.
        let other =
            std::thread::spawn(|| (0..200_000).fold(0_u64, |sum, n| sum.wrapping_add(format!("{n}").len() as u64)));
        for _ in 0..50 {
            give_back();
        }
        assert_eq!(other.join().unwrap(), 1_088_890);
        assert!(faults() > before, "what is needed comes back");
    }
}
