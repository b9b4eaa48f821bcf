//! Counts a process's system calls over one burst of load: by `perf stat` where it may, else by `strace -c`.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::pooler::die_with_parent;

/// A tool that counts system calls, from the cheapest for the process that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// `perf stat -e raw_syscalls:sys_enter`: a counter in the kernel.
    Perf,
    /// `strace -f -c`: stops the process at every call, so only the count is of use.
    Strace,
}

impl Tool {
    /// The first tool that can watch a process of ours; `None` if there is none. Tried on a shell that never rests,
    /// since a process without system calls looks to perf like one it may not watch.
    #[must_use]
    pub fn find() -> Option<Self> {
        [Self::Perf, Self::Strace].into_iter().find(|tool| {
            let Ok(mut shell) = Command::new("sh").args(["-c", "while :; do sleep 0.05; done"]).spawn() else {
                return false;
            };
            let counted = tool.attach(shell.id()).and_then(Counter::detach);
            let _ = shell.kill();
            let _ = shell.wait();
            counted.is_ok()
        })
    }

    /// Its name and what it is asked for.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Perf => "perf stat -e raw_syscalls:sys_enter",
            Self::Strace => "strace -f -c",
        }
    }

    /// Starts counting the system calls of process `pid` and its threads.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if the tool is not there.
    pub fn attach(self, pid: u32) -> Result<Counter, Fault> {
        let pid = pid.to_string();
        let mut command = match self {
            Self::Perf => Command::new("perf"),
            Self::Strace => Command::new("strace"),
        };
        match self {
            Self::Perf => command.args(["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p", &pid]),
            Self::Strace => command.args(["-f", "-c", "-p", &pid]),
        };
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let child = command.spawn().map_err(Fault::io("starting a counter of system calls"))?;
        // Neither tells when it is attached.
        std::thread::sleep(Duration::from_millis(300));
        Ok(Counter { tool: self, child })
    }
}

/// A tool at work.
#[derive(Debug)]
pub struct Counter {
    tool: Tool,
    child: Child,
}

impl Counter {
    /// Stops counting; returns the calls counted.
    ///
    /// # Errors
    ///
    /// [`Fault::Io`] if the tool tells no count, as when it may not watch the process.
    pub fn detach(mut self) -> Result<u64, Fault> {
        let pid = i32::try_from(self.child.id()).map_err(|_| std::io::ErrorKind::InvalidInput.into());
        let pid = pid.map_err(Fault::io("stopping a counter of system calls"))?;
        kill(Pid::from_raw(pid), Signal::SIGINT).map_err(Fault::errno("stopping a counter of system calls"))?;
        let mut text = String::new();
        let pipe = self.child.stderr.take();
        pipe.map_or(Ok(0), |mut pipe| pipe.read_to_string(&mut text)).map_err(Fault::io("reading a count"))?;
        self.child.wait().map_err(Fault::io("stopping a counter of system calls"))?;
        let count = match self.tool {
            Tool::Perf => perf_count(&text),
            Tool::Strace => strace_count(&text),
        };
        count.ok_or(Fault::Io { what: "reading a count", source: std::io::Error::other(text.trim().to_owned()) })
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        // After `detach` it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Source: perf-stat(1), "CSV FORMAT": value, unit, event, ...
fn perf_count(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains("raw_syscalls:sys_enter"))?;
    line.split(',').next()?.parse().ok()
}

/// The line `100.00 seconds usecs/call calls [errors] total`; the column usecs/call is absent in old versions.
fn strace_count(text: &str) -> Option<u64> {
    let header: Vec<&str> = text.lines().find(|line| line.starts_with("% time"))?.split_ascii_whitespace().collect();
    // "% time" is one column in two words.
    let place = header.iter().position(|word| *word == "calls")?.checked_sub(1)?;
    let total = text.lines().rfind(|line| line.ends_with(" total"))?;
    total.split_ascii_whitespace().nth(place)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perf_tells_its_count_in_the_first_field() {
        let refused = "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n";
        let table = [
            ("count", "48231,,raw_syscalls:sys_enter,1000,100.00,,\n", Some(48231)),
            ("not counted", refused, None),
            ("no access", "event syntax error: 'raw_syscalls:sys_enter'\n", None),
            ("nothing", "", None),
        ];
        for (name, text, want) in table {
            assert_eq!(perf_count(text), want, "{name}");
        }
    }

    #[test]
    fn strace_tells_its_count_in_the_column_calls_of_the_total() {
        let new = "strace: Process 7 attached\n\
            % time     seconds  usecs/call     calls    errors syscall\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
             60.00    0.003000           3      1000           sendto\n\
             40.00    0.002000           2      1001         5 recvfrom\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
            100.00    0.005000           2      2001         5 total\n";
        assert_eq!(strace_count(new), Some(2001));
        assert_eq!(strace_count("strace: attach: ptrace(PTRACE_SEIZE, 7): Operation not permitted\n"), None);
    }
}
