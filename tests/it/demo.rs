//! `pgweir demo`, as `make demo` runs it: that it does its job, says so, and leaves nothing.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// From the start of two servers to the end of both, on a busy machine.
const LIMIT: Duration = Duration::from_mins(2);

/// One that runs. Its output is read line by line, and it is told to end if the test fails.
struct Demo {
    child: Child,
    lines: Receiver<String>,
    said: String,
}

impl Demo {
    fn start(seconds: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgweir"));
        command.arg("demo").env("DEMO_SECONDS", seconds).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines, said: String::new() }
    }

    /// Reads until a line is as wanted; none when it has ended.
    fn read_until(&mut self, mut is_it: impl FnMut(&str) -> bool) -> bool {
        let until = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.said.push_str(&line);
                    self.said.push('\n');
                    if is_it(&line) {
                        return true;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return false,
                Err(RecvTimeoutError::Timeout) => panic!("it says no more:\n{}", self.said),
            }
        }
    }

    fn interrupt(&self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }

    /// It ends well, and nobody listens any more where it said that somebody did.
    fn end(mut self) -> String {
        assert!(!self.read_until(|_| false));
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.said);
        let ports: Vec<u16> = self.said.split("127.0.0.1:").skip(1).filter_map(port).collect();
        // Both servers, pgweir's two listeners.
        assert!(ports.len() >= 4, "{}", self.said);
        for port in ports {
            assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "{port} is still open:\n{}", self.said);
        }
        std::mem::take(&mut self.said)
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.interrupt();
            let _ = self.child.wait();
        }
    }
}

/// The digits at the beginning.
fn port(text: &str) -> Option<u16> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A line of figures: clients, and transactions per second.
fn figures(line: &str) -> Option<(u32, u32)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.get(1) != Some(&"s") {
        return None;
    }
    Some((words.get(2)?.parse().ok()?, words.get(6)?.parse().ok()?))
}

#[test]
fn it_does_its_job_for_the_time_it_is_given_and_leaves_nothing() {
    let mut demo = Demo::start("2");
    let busy = demo.read_until(|line| figures(line).is_some_and(|(clients, tps)| clients >= 200 && tps > 0));
    assert!(busy, "it was never busy:\n{}", demo.said);
    let said = demo.end();
    assert!(said.contains("psql postgres://") || said.contains("psql \"postgres://"), "{said}");
}

#[test]
fn ctrl_c_ends_it_in_order() {
    let mut demo = Demo::start("0");
    assert!(demo.read_until(|line| figures(line).is_some_and(|(clients, _)| clients > 0)), "{}", demo.said);
    demo.interrupt();
    demo.end();
}
