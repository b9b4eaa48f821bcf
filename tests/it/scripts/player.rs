//! Plays a script's clients.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use pgweir_harness::wire::{Message, Wire, WireError, build};

use super::neighbours::Company;
use super::script::{Act, Line, Script};
use super::told::{Teller, Transcript};
use crate::support::PASSWORD;

/// Longest wait for a message; far more than any takes.
const PATIENCE: Duration = Duration::from_secs(8);

/// The clients of one script in one play.
pub(crate) struct Player<'a> {
    address: SocketAddr,
    /// User and database.
    name: &'a str,
    clients: BTreeMap<char, Client>,
    teller: Teller,
}

/// One client.
#[derive(Default)]
struct Client {
    /// None: it has left, or was cut.
    wire: Option<Wire>,
    /// To be written next.
    unsent: Vec<u8>,
    /// `ReadyForQuery`s that it has asked for and not read yet.
    owed: usize,
    /// Its last batch has no `Sync` yet.
    is_open: bool,
    /// From the last `ReadyForQuery`.
    status: u8,
    /// It waited for something that did not come.
    gave_up: bool,
}

impl<'a> Player<'a> {
    /// Clients that log in there.
    pub(crate) fn new(address: SocketAddr, name: &'a str) -> Self {
        Self { address, name, clients: BTreeMap::new(), teller: Teller::default() }
    }

    /// Plays a script to its end, or to the first thing that did not come, or trouble of the neighbours'.
    pub(crate) async fn play(mut self, script: &Script, mut company: Option<&mut Company>) -> Transcript {
        let mut told = Transcript::new();
        for line in &script.lines {
            let mut lines = self.line(line).await;
            if let Some(company) = company.as_deref_mut().filter(|_| self.is_quiet())
                && let Err(trouble) = company.act(&script.notes).await
            {
                lines.push(format!("a neighbour: {trouble}"));
                told.push(lines);
                return told;
            }
            told.push(lines);
            if self.clients.values().any(|client| client.gave_up) {
                return told;
            }
        }
        told.push(self.end().await);
        told
    }

    /// Whether no client has anything under way.
    fn is_quiet(&self) -> bool {
        self.clients.values().filter(|client| client.wire.is_some()).all(Client::is_quiet)
    }

    async fn line(&mut self, line: &Line) -> Vec<String> {
        let mut lines = Vec::new();
        let connects = matches!(line.acts.first(), Some(Act::Connect(_)));
        if !connects && !self.clients.contains_key(&line.client) {
            self.connect(line.client, &[], &mut lines).await;
        }
        for act in &line.acts {
            if let Act::Connect(parameters) = act {
                if let Some(wire) = self.clients.remove(&line.client).and_then(|client| client.wire) {
                    let _ = wire.terminate().await;
                }
                self.connect(line.client, parameters, &mut lines).await;
                continue;
            }
            let Some(client) = self.clients.get_mut(&line.client) else { continue };
            if let Err(error) = client.act(act, &mut self.teller, &mut lines).await {
                lines.push(match error {
                    // A close with bytes unread is a reset; which of the two a client sees is a race.
                    WireError::Closed { .. } | WireError::Io { .. } => "the end".to_owned(),
                    WireError::Late { .. } => "nothing more".to_owned(),
                    other => other.to_string(),
                });
                client.gave_up = matches!(lines.last().map(String::as_str), Some("nothing more"));
                client.wire = None;
                break;
            }
        }
        lines
    }

    async fn connect(&mut self, letter: char, parameters: &[(String, String)], lines: &mut Vec<String>) {
        let mut all = vec![("user", self.name), ("database", self.name)];
        all.extend(parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let mut wire = Wire::connect(self.address).await.unwrap();
        wire.set_patience(PATIENCE);
        let client = match wire.login_with(&all, PASSWORD).await {
            Ok(messages) => {
                // Servers report parameters in an order of their own.
                let mut told: Vec<String> = messages
                    .iter()
                    .filter(|message| message.tag != b'K')
                    .map(|message| self.teller.tell(message))
                    .collect();
                told.sort();
                lines.extend(told);
                Client { wire: Some(wire), status: b'I', ..Client::default() }
            }
            Err(WireError::Refused(error)) => {
                let fields = error.fields.iter().map(|(code, text)| format!(" {}=[{text}]", char::from(*code)));
                lines.push(format!("refused{}", fields.collect::<String>()));
                Client::default()
            }
            Err(error) => {
                lines.push(format!("no login: {error}"));
                Client { gave_up: true, ..Client::default() }
            }
        };
        self.clients.insert(letter, client);
    }

    /// Nothing may be left to be said: whatever still is stands before the answers to this.
    async fn end(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let acts = [Act::Add(build::query("SELECT 'the last'")), Act::Ready(1)];
        for client in self.clients.values_mut().filter(|client| client.wire.is_some()) {
            for act in &acts {
                if let Err(error) = client.act(act, &mut self.teller, &mut lines).await {
                    lines.push(error.to_string());
                    break;
                }
            }
            if let Some(wire) = client.wire.take() {
                let _ = wire.terminate().await;
            }
        }
        lines
    }
}

impl Client {
    fn is_quiet(&self) -> bool {
        self.owed == 0 && !self.is_open && self.unsent.is_empty() && self.status == b'I'
    }

    async fn act(&mut self, act: &Act, teller: &mut Teller, lines: &mut Vec<String>) -> Result<(), WireError> {
        let Some(wire) = &mut self.wire else {
            lines.push("no connection".to_owned());
            return Ok(());
        };
        if let Act::Send | Act::Ready(_) | Act::Await(_) = act {
            wire.send(&std::mem::take(&mut self.unsent)).await?;
        }
        match act {
            Act::Add(bytes) => {
                for tag in tags(bytes) {
                    match tag {
                        b'Q' | b'F' => self.owed += 1,
                        b'S' => (self.owed, self.is_open) = (self.owed + 1, false),
                        b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => self.is_open = true,
                        _ => {}
                    }
                }
                self.unsent.extend_from_slice(bytes);
            }
            Act::Send | Act::Connect(_) => {}
            Act::Ready(count) => {
                for _ in 0..*count {
                    self.read(b'Z', teller, lines).await?;
                }
            }
            Act::Await(tag) => self.read(*tag, teller, lines).await?,
            Act::Leave | Act::Vanish => {
                if let Some(wire) = self.wire.take() {
                    if *act == Act::Leave {
                        wire.terminate().await?;
                    } else {
                        wire.abort()?;
                    }
                }
                *self = Self::default();
            }
        }
        Ok(())
    }

    async fn read(&mut self, last: u8, teller: &mut Teller, lines: &mut Vec<String>) -> Result<(), WireError> {
        let Some(wire) = &mut self.wire else { return Ok(()) };
        loop {
            let message: Message = wire.recv().await?;
            lines.push(teller.tell(&message));
            if let Some(status) = message.ready_status() {
                self.owed = self.owed.saturating_sub(1);
                self.status = status;
            }
            if message.tag == last {
                return Ok(());
            }
        }
    }
}

/// The first byte of each message.
fn tags(mut bytes: &[u8]) -> Vec<u8> {
    let mut tags = Vec::new();
    while let Some((&[tag, a, b, c, d], _)) = bytes.split_first_chunk::<5>() {
        tags.push(tag);
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap();
        bytes = bytes.get(1 + length..).unwrap_or_default();
    }
    tags
}
