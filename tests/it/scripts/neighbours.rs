//! Who else uses the pool while a script is played: clients that set, prepare and wipe the same things, and look each time
//! whether all is as they left it.

use std::time::Duration;

use pgweir_harness::wire::{Message, Outcome, Wire, build};

use super::script::{Notes, Script};
use crate::support::{SOON, Site};

/// How long a neighbour tries to get a server connection that a script may keep.
const GLANCE: Duration = Duration::from_millis(8);

/// What a neighbour sees of its session; each value as text.
pub(crate) const LOOK: &str = "SELECT current_setting('TimeZone'), current_setting('DateStyle'), \
    current_setting('search_path'), current_setting('statement_timeout'), current_setting('lock_timeout'), \
    coalesce(current_setting('app.mine', true), ''), current_user, \
    (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()), \
    (SELECT count(*) FROM pg_listening_channels()), (SELECT count(*) FROM pg_cursors WHERE is_holdable), \
    (SELECT count(*) FROM pg_prepared_statements WHERE from_sql), \
    (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema())";

/// What a dressed neighbour sets, besides what it logs in with.
const DRESS: &str = "SET statement_timeout = '57s'; SET search_path = theirs; SET app.mine = 'neighbour''s'; \
                     SET ROLE script_reader";
const STARTUP: [(&str, &str); 4] = [
    ("TimeZone", "Asia/Tokyo"),
    ("DateStyle", "German"),
    ("application_name", "neighbour"),
    ("options", "-c lock_timeout=56s"),
];
const DRESSED: [&str; 7] = ["Asia/Tokyo", "German, DMY", "theirs", "57s", "56s", "neighbour's", "script_reader"];
/// Locks, channels, cursors, statements and temporary tables of a session that has none.
const NOTHING: [&str; 5] = ["0"; 5];

/// Something that ends with its transaction: names that scripts use, too.
const TRANSACTION: &str = "BEGIN; SET LOCAL work_mem = '1MB'; CREATE TEMP TABLE tt (x text) ON COMMIT DROP; \
    INSERT INTO tt VALUES ('theirs'); DECLARE c CURSOR FOR SELECT x FROM tt; FETCH c; SAVEPOINT s; \
    SET LOCAL TimeZone = 'UTC'; ROLLBACK TO s; SELECT pg_advisory_xact_lock(77); COMMIT";

/// The neighbours at one pgweir.
pub(crate) struct Company {
    neighbours: [Neighbour; 2],
    turn: usize,
    shuffles: bool,
    shuffling: Shuffling,
    /// One of them did not get a server connection in time.
    waited: bool,
}

/// Whether they see to it that a client gets another server connection each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shuffling {
    /// They do not.
    No,
    /// Nobody holds a server connection yet.
    Begins,
    /// This one is in a transaction, on the server connection used last.
    Held(usize),
}

/// One of them.
struct Neighbour {
    wire: Wire,
    /// What it sees of its session.
    sees: Vec<String>,
    is_dressed: bool,
    acts: usize,
    /// Asked and not yet answered.
    asked: Option<Asked>,
}

/// A question.
struct Asked {
    readies: usize,
    messages: Vec<Message>,
    want: Vec<Vec<String>>,
}

impl Company {
    /// Two clients, of whom one has settings of its own. `plain` is what [`LOOK`] shows to one that has none. If
    /// they `shuffle`, they hold one server connection of the pool at any time.
    pub(crate) async fn enter(site: &Site<'_>, plain: &[String], shuffle: bool) -> Result<Self, String> {
        let neighbours = [Neighbour::enter(site, Vec::new()).await?, Neighbour::enter(site, plain.to_vec()).await?];
        Ok(Self { neighbours, turn: 0, shuffles: shuffle, shuffling: Shuffling::No, waited: false })
    }

    /// A script begins: what they do in it depends on it alone. Where several of its clients may keep a server
    /// connection each there is none left to be held.
    pub(crate) async fn prepare(&mut self, script: &Script) -> Result<(), String> {
        let seed = script.title.bytes().map(usize::from).sum::<usize>();
        self.turn = seed;
        for neighbour in &mut self.neighbours {
            neighbour.acts = seed;
        }
        let shuffle = self.shuffles && !(script.notes.crowded && script.notes.pins.is_some());
        if let (Shuffling::Held(holder), false) = (self.shuffling, shuffle) {
            self.neighbours[holder].ask(build::query("COMMIT"), 1, Vec::new(), SOON).await?;
        }
        self.shuffling = match self.shuffling {
            Shuffling::Held(holder) if shuffle => Shuffling::Held(holder),
            _ if shuffle => Shuffling::Begins,
            _ => Shuffling::No,
        };
        Ok(())
    }

    /// One of them does something, and then, if they shuffle, the server connection used last is taken. If a script pins they may find all
    /// server connections kept, and come back later; else they must get one.
    pub(crate) async fn act(&mut self, notes: &Notes) -> Result<(), String> {
        let pins = notes.pins.is_some();
        let patience = match notes.expected() {
            _ if pins => GLANCE,
            Some(_) => GLANCE * 100,
            None => SOON,
        };
        self.turn += 1;
        let next = match self.shuffling {
            Shuffling::No => self.turn % 2,
            Shuffling::Begins => 0,
            Shuffling::Held(holder) => 1 - holder,
        };
        if self.neighbours[next].act(self.shuffling != Shuffling::No, patience).await? {
            return self.hand_over(next).await;
        }
        self.waited = true;
        if pins { Ok(()) } else { Err("got no server connection: the script's client keeps it".to_owned()) }
    }

    /// Whether one of them has waited for a server connection since this was asked last.
    pub(crate) fn has_waited(&mut self) -> bool {
        std::mem::take(&mut self.waited)
    }

    /// The script's clients are gone: whoever waits must be answered.
    pub(crate) async fn finish(&mut self) -> Result<(), String> {
        let late = || Err("still got no server connection when the script's clients were gone".to_owned());
        for number in 0..self.neighbours.len() {
            if self.neighbours[number].asked.is_none() {
                continue;
            }
            if !self.neighbours[number].answered(SOON).await? {
                return late();
            }
            self.hand_over(number).await?;
        }
        Ok(())
    }

    /// If they shuffle: this one has begun a transaction, the other ends its own.
    async fn hand_over(&mut self, next: usize) -> Result<(), String> {
        let before = self.shuffling;
        if before != Shuffling::No {
            self.shuffling = Shuffling::Held(next);
        }
        if let Shuffling::Held(holder) = before {
            let committed = self.neighbours[holder].ask(build::query("COMMIT"), 1, Vec::new(), SOON).await?;
            assert!(committed, "a COMMIT waits for nobody");
        }
        Ok(())
    }
}

impl Neighbour {
    /// Logs in. Without anything to see it dresses.
    async fn enter(site: &Site<'_>, sees: Vec<String>) -> Result<Self, String> {
        let is_dressed = sees.is_empty();
        let wire = site.client_with(if is_dressed { &STARTUP[..] } else { &[] }).await;
        let sees = if is_dressed { DRESSED.iter().chain(&NOTHING).map(|s| (*s).to_owned()).collect() } else { sees };
        let mut neighbour = Self { wire, sees, is_dressed, acts: 0, asked: None };
        let mut begin = [build::parse("s1", "SELECT 'neighbour''s s1'", &[]), build::sync()].concat();
        let mut readies = 1;
        if is_dressed {
            begin.extend(build::query(DRESS));
            readies += 1;
        }
        if neighbour.ask(begin, readies, Vec::new(), SOON).await? {
            Ok(neighbour)
        } else {
            Err("got no server connection at first".to_owned())
        }
    }

    /// Does the next thing, and then begins a transaction if it is to `hold`. False: it is still waiting.
    async fn act(&mut self, hold: bool, patience: Duration) -> Result<bool, String> {
        if self.asked.is_some() {
            return self.answered(patience).await;
        }
        self.acts += 1;
        let word = |word: &str| vec![vec![word.to_owned()]];
        let (mut bytes, mut readies, want) = match self.acts % 8 {
            1 => (build::query(TRANSACTION), 1, [word("theirs"), word("")].concat()),
            3 => (build::query("SELECT nextval('theirs.q') > 0"), 1, word("t")),
            4 => (build::query("UNLISTEN *; SELECT pg_advisory_unlock_all(); CLOSE ALL"), 1, word("")),
            6 => {
                let prepare = [build::parse("s1", "SELECT 'neighbour''s s1'", &[]), build::sync()].concat();
                ([build::query("DEALLOCATE ALL"), prepare].concat(), 2, Vec::new())
            }
            7 if self.is_dressed => ([build::query("RESET ALL"), build::query(DRESS)].concat(), 2, Vec::new()),
            _ => {
                let unnamed = [build::parse("", LOOK, &[]), build::bind("", "", &[]), build::execute("", 0)];
                let named = [build::bind("", "s1", &[]), build::execute("", 0), build::sync()];
                let want = [vec![self.sees.clone()], word("neighbour's s1")].concat();
                ([unnamed, named].concat().concat(), 1, want)
            }
        };
        if hold {
            bytes.extend(build::query("BEGIN"));
            readies += 1;
        }
        self.ask(bytes, readies, want, patience).await
    }

    /// Sends something that must be answered with these rows and no error. False: not in time.
    async fn ask(
        &mut self,
        bytes: Vec<u8>,
        readies: usize,
        want: Vec<Vec<String>>,
        patience: Duration,
    ) -> Result<bool, String> {
        self.wire.send(&bytes).await.map_err(|error| error.to_string())?;
        self.asked = Some(Asked { readies, messages: Vec::new(), want });
        self.answered(patience).await
    }

    async fn answered(&mut self, patience: Duration) -> Result<bool, String> {
        let Some(asked) = &mut self.asked else { return Ok(true) };
        while asked.readies > 0 {
            match self.wire.recv_within(patience).await {
                Ok(None) => return Ok(false),
                Ok(Some(message)) => {
                    asked.readies -= usize::from(message.tag == b'Z');
                    asked.messages.push(message);
                }
                Err(error) => return Err(format!("{error}, after {:?}", asked.messages)),
            }
        }
        let outcome = Outcome::of(&asked.messages);
        let rows: Vec<Vec<String>> = outcome
            .rows
            .iter()
            .map(|row| row.iter().map(|value| value.clone().unwrap_or_else(|| "NULL".to_owned())).collect())
            .collect();
        let want = std::mem::take(&mut asked.want);
        self.asked = None;
        if outcome.error.is_some() || rows != want {
            return Err(format!("was answered {rows:?} {:?}, not {want:?}", outcome.error));
        }
        Ok(true)
    }
}
