//! The handle on a load generator process.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::fault::Fault;
use crate::generate::{Order, Outcome, Spec, Window};
use crate::pooler::die_with_parent;

/// The hidden subcommand this program starts itself with.
pub const SUBCOMMAND: &str = "generate";

/// A running generator; all its clients are logged in. Dropped, it is killed.
#[derive(Debug)]
pub struct Generator {
    child: Child,
    orders: ChildStdin,
    outcomes: BufReader<ChildStdout>,
}

impl Generator {
    /// Starts this program again as a generator and waits until all clients are logged in.
    ///
    /// # Errors
    ///
    /// [`Fault::Generator`] with what it said; [`Fault::Io`] if it cannot be started.
    pub fn start(spec: &Spec) -> Result<Self, Fault> {
        let program = std::env::current_exe().map_err(Fault::io("finding this program"))?;
        Self::start_program(&program, spec)
    }

    /// As [`Generator::start`], with `pgweir-load` where it is said to be.
    ///
    /// # Errors
    ///
    /// As [`Generator::start`].
    pub fn start_program(program: &Path, spec: &Spec) -> Result<Self, Fault> {
        let spec = serde_json::to_string(spec).map_err(|error| Fault::Generator(error.to_string()))?;
        let mut command = Command::new(program);
        command.args([SUBCOMMAND, &spec]).stdin(Stdio::piped()).stdout(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = command.spawn().map_err(Fault::io("starting a load generator"))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let Some((orders, outcomes)) = pipes else { return Err(Fault::Generator("no pipes".to_owned())) };
        let mut generator = Self { child, orders, outcomes: BufReader::new(outcomes) };
        match generator.outcome()? {
            Outcome::Ready => Ok(generator),
            other => Err(Fault::Generator(format!("ready expected, {other:?} came"))),
        }
    }

    /// Runs one window; returns when the last answer has come and all clients are idle.
    ///
    /// # Errors
    ///
    /// [`Fault::Generator`] with what it said.
    pub fn run(&mut self, order: Order) -> Result<Window, Fault> {
        let line = serde_json::to_string(&order).map_err(|error| Fault::Generator(error.to_string()))?;
        writeln!(self.orders, "{line}").map_err(Fault::io("giving an order"))?;
        match self.outcome()? {
            Outcome::Done(window) => Ok(window),
            other => Err(Fault::Generator(format!("a window expected, {other:?} came"))),
        }
    }

    fn outcome(&mut self) -> Result<Outcome, Fault> {
        let mut line = String::new();
        self.outcomes.read_line(&mut line).map_err(Fault::io("reading a generator's answer"))?;
        if line.is_empty() {
            return Err(Fault::Generator("it ended without an answer".to_owned()));
        }
        match serde_json::from_str(&line).map_err(|error| Fault::Generator(error.to_string()))? {
            Outcome::Failed(reason) => Err(Fault::Generator(reason)),
            outcome => Ok(outcome),
        }
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // It has nothing to lose; an error only means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
