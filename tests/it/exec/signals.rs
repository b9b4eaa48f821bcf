//! Signals, exit codes, deaths, orphans.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::time::{Duration, Instant};

use pgweir_harness::wait_until;

use super::place;
use super::wrapped::Wrapping;
use crate::support::SOON;

/// Waits for signals, and says which came.
const TRAPS: &str = "for s in HUP INT QUIT USR1 USR2 TTIN TTOU WINCH TERM; do trap \"echo got $s\" $s; done; \
                     trap 'exit 9' ALRM; echo ready; while :; do sleep 0.02; done";

#[test]
fn the_exit_code_of_the_command_is_ours() {
    let (_place, url, _) = place();
    for code in [0, 1, 7, 128, 255] {
        let ended = Wrapping::sh(&url, &format!("exit {code}")).finish();
        assert_eq!(ended.status.code(), Some(code), "{}", ended.err);
    }
}

#[test]
fn a_death_by_signal_is_ours_too() {
    let (_place, url, _) = place();
    for number in [libc::SIGTERM, libc::SIGKILL, libc::SIGSEGV, libc::SIGHUP, libc::SIGRTMIN() + 2] {
        let ended = Wrapping::sh(&url, &format!("ulimit -c 0; kill -{number} $$")).finish();
        assert_eq!(ended.status.signal(), Some(number), "{}", ended.err);
        assert!(!ended.status.core_dumped());
    }
}

#[test]
fn every_signal_for_the_application_reaches_it_once() {
    let (_place, url, _) = place();
    let mut wrapped = Wrapping::sh(&url, TRAPS).start();
    wrapped.await_said("ready");
    let names = ["HUP", "INT", "QUIT", "USR1", "USR2", "TTIN", "TTOU", "WINCH", "TERM"];
    let numbers = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGTTIN,
        libc::SIGTTOU,
        libc::SIGWINCH,
        libc::SIGTERM,
    ];
    for (name, number) in names.iter().zip(numbers) {
        wrapped.signal(number);
        wrapped.await_said(&format!("got {name}\n"));
        assert!(wrapped.is_running(), "{name}");
    }
    assert_eq!(wrapped.said().matches("got ").count(), names.len(), "{}", wrapped.said());
    let application = nix::unistd::Pid::from_raw(wrapped.application());
    nix::sys::signal::kill(application, nix::sys::signal::Signal::SIGALRM).unwrap();
    assert_eq!(wrapped.finish().status.code(), Some(9));
}

#[test]
fn on_a_dyno_sigterm_is_left_to_the_platform() {
    let (_place, url, _) = place();
    for (variables, times) in
        [(&[("DYNO", "web.1")][..], 0), (&[("DYNO", "web.1"), ("PGWEIR_FORWARD_TERM", "always")], 1)]
    {
        let mut wrapping = Wrapping::sh(&url, TRAPS);
        for (name, value) in variables {
            wrapping = wrapping.var(name, value);
        }
        let wrapped = wrapping.start();
        wrapped.await_said("ready");
        wrapped.signal(libc::SIGTERM);
        if times > 0 {
            wrapped.await_said("got TERM\n");
        }
        // They are passed on in order: what was not passed on before these never will be.
        for count in 1..=2 {
            wrapped.signal(libc::SIGUSR1);
            wait_until(SOON, || wrapped.said().matches("got USR1\n").count() == count);
        }
        assert_eq!(wrapped.said().matches("got TERM\n").count(), times, "{variables:?}");
    }
}

#[test]
fn a_terminal_that_hangs_up_is_told_to_the_application() {
    let (_place, url, _) = place();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("said");
    // The wrapper leads a session with a terminal of its own, as under ssh; then the terminal goes away.
    // When the wrapper is killed, it gets SIGTERM, and ends.
    let script = format!("exec >{}; trap 'echo got HUP' HUP; echo ready; while :; do sleep 0.02; done", file.display());
    let leader = "import os, pty, sys, time\n\
                  pid, terminal = pty.fork()\n\
                  if pid == 0: os.execvp('setpriv', ['setpriv', '--pdeathsig', 'KILL', *sys.argv[1:]])\n\
                  while 'ready' not in (open(sys.argv[-1]).read() if os.path.exists(sys.argv[-1]) else ''): time.sleep(0.02)\n\
                  os.close(terminal)\n\
                  while 'got HUP' not in open(sys.argv[-1]).read(): time.sleep(0.02)\n\
                  os.kill(pid, 9)\n\
                  print('told')";
    let words = ["-c", leader, env!("CARGO_BIN_EXE_pgweir"), "exec", "--", "sh", "-c", &script, file.to_str().unwrap()];
    let python = crate::drivers::python();
    let wrapped = Wrapping::of(&python, &words).var("DATABASE_URL", &url).start();
    wrapped.await_said("told");
}

#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    let (_place, url, _) = place();
    let script = "grep SigIgn /proc/self/status; echo ready; read line";
    #[allow(unsafe_code, reason = "as nohup does; the hook makes one async-signal-safe call")]
    let wrapping = Wrapping::sh(&url, script).with(|command| {
        // SAFETY: signal(2) is async-signal-safe and sets a disposition.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGHUP, libc::SIG_IGN);
                Ok(())
            });
        }
    });
    let mut wrapped = wrapping.start();
    wrapped.await_said("ready");
    wrapped.signal_group(libc::SIGHUP);
    wrapped.tell("end");
    let out = wrapped.finish().well();
    let mask = out.split_whitespace().nth(1).map(|mask| u64::from_str_radix(mask, 16).unwrap()).unwrap();
    assert_eq!(mask & 1, 1, "{out}");
}

#[test]
fn sigterm_to_every_process_twice_lets_the_application_finish_its_work_and_begin_some_more() {
    for variables in [&[][..], &[("DYNO", "web.1"), ("PGWEIR_SERVER_TLS_SSLMODE", "disable")]] {
        let (place, url, psql) = place();
        place.psql(&format!("CREATE TABLE work (n int); GRANT ALL ON work TO {}", place.name));
        // What the application does when it is told to end: it finishes a transaction and opens new connections for others.
        let script = format!(
            "trap 'asked=1' TERM; echo ready; while [ -z \"$asked\" ]; do sleep 0.02; done; \
             for n in 1 2 3 4 5; do {psql} \"BEGIN; SELECT pg_sleep(0.2); INSERT INTO work VALUES ($n); COMMIT\" || exit 1; done; exit 6"
        );
        let mut wrapping = Wrapping::sh(&url, &script);
        for (name, value) in variables {
            wrapping = wrapping.var(name, value);
        }
        let mut wrapped = wrapping.start();
        wrapped.await_said("ready");
        // A shell's own children would die of it: only those two are there yet.
        for _ in 0..2 {
            wrapped.signal(libc::SIGTERM);
            let application = nix::unistd::Pid::from_raw(wrapped.application());
            nix::sys::signal::kill(application, nix::sys::signal::Signal::SIGTERM).unwrap();
        }
        wait_until(SOON, || place.psql("SELECT count(*) FROM work") != "0");
        wrapped.signal(libc::SIGTERM);
        assert!(wrapped.is_running());
        let ended = wrapped.finish();
        assert_eq!(ended.status.code(), Some(6), "{}", ended.err);
        assert_eq!(place.psql("SELECT count(*) FROM work"), "5");
        wait_until(SOON, || place.servers() == 0);
    }
}

#[test]
fn when_the_time_after_sigterm_is_over_server_connections_are_closed_and_the_application_lives() {
    let (place, url, psql) = place();
    let script = format!(
        "trap 'echo asked' TERM; {psql} 'SELECT pg_sleep(600)' & echo ready; wait; wait; wait; echo over; read line; exit 3"
    );
    // psql is in the group, and gets no SIGTERM here.
    let mut wrapped = Wrapping::sh(&url, &script).var("PGWEIR_SHUTDOWN_TIMEOUT", "1s").start();
    wrapped.await_said("ready");
    wait_until(SOON, || {
        place.psql(&format!(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' AND state = 'active' AND usename = '{}'",
            place.name
        )) == "1"
    });
    let start = Instant::now();
    wrapped.signal(libc::SIGTERM);
    wait_until(SOON, || place.servers() == 0);
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    wrapped.await_said("over");
    assert!(wrapped.is_running());
    // Nobody killed us: it is served again, after a while.
    wrapped.await_log(|log| log.contains("data plane started anew"));
    wrapped.tell("end");
    assert_eq!(wrapped.finish().status.code(), Some(3));
}

#[test]
fn orphans_are_reaped_as_process_1_does_and_the_command_is_not_taken_for_one() {
    let (_place, url, _) = place();
    // Each leaves a grandchild behind that ends by itself.
    let script = "for n in 1 2 3 4 5; do sh -c 'sleep 0.1 &'; done; echo left; read line; exit 8";
    #[allow(unsafe_code, reason = "the hook makes one async-signal-safe call")]
    let wrapping = Wrapping::sh(&url, script).with(|command| {
        // SAFETY: prctl(2) with PR_SET_CHILD_SUBREAPER takes a number and touches no memory; it survives exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
                Ok(())
            });
        }
    });
    let mut wrapped = wrapping.start();
    wrapped.await_said("left");
    let (pid, application) = (wrapped.pid(), wrapped.application());
    let children = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    wait_until(SOON, || children().trim() == application.to_string());
    wrapped.tell("end");
    assert_eq!(wrapped.finish().status.code(), Some(8));
}

#[test]
fn as_process_1_it_reaps_and_passes_sigterm_on_and_ends_with_128_and_the_signal() {
    let (_place, url, _) = place();
    let script = "sh -c 'sleep 0.1 &'; echo \"I am $$, child of $PPID\"; sleep 0.3; ps -eo stat,comm | grep -c '^Z' ; \
                  echo ready; while :; do sleep 0.02; done";
    let mut words = vec!["-p", "-f", "--mount-proc", env!("CARGO_BIN_EXE_pgweir"), "exec", "--", "sh", "-c", script];
    // Without root, one needs a user namespace.
    if !nix::unistd::geteuid().is_root() {
        words.insert(0, "-r");
    }
    let wrapped = Wrapping::of(Path::new("unshare"), &words).var("DATABASE_URL", &url).start();
    wrapped.await_said("ready");
    assert!(wrapped.said().contains("child of 1\n0\n"), "{}", wrapped.said());
    // unshare's only child is process 1 in there.
    let own = wrapped.pid();
    let inner = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap();
    let inner = nix::unistd::Pid::from_raw(inner.trim().parse().unwrap());
    nix::sys::signal::kill(inner, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(wrapped.finish().status.code(), Some(128 + libc::SIGTERM));
}

#[test]
fn when_the_wrapper_is_killed_the_application_is_asked_to_end() {
    let (_place, url, _) = place();
    let wrapped = Wrapping::sh(&url, TRAPS).start();
    wrapped.await_said("ready");
    wrapped.signal(libc::SIGKILL);
    wrapped.await_said("got TERM");
    let application = nix::unistd::Pid::from_raw(wrapped.application());
    nix::sys::signal::kill(application, nix::sys::signal::Signal::SIGKILL).unwrap();
}
