//! The same bytes sent to Postgres itself and through pgweir must be answered with the same messages.

use std::fmt::{self, Write as _};
use std::time::Duration;

use pgweir_harness::wire::{Message, Outcome, Wire, WireError, build};

use crate::support::{PASSWORD, Place, Site, primary};

/// One thing a client does.
#[derive(Clone)]
pub(crate) enum Step {
    /// Writes these bytes at once.
    Send(Vec<u8>),
    /// Reads up to and with the next `ReadyForQuery`.
    Ready,
    /// Reads up to and with the next message with this tag.
    Until(u8),
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send(bytes) => write!(f, "send \"{}\"", bytes.escape_ascii()),
            Self::Ready => f.write_str("ready"),
            Self::Until(tag) => write!(f, "until {}", char::from(*tag)),
        }
    }
}

/// A named client's doings.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    name: String,
    steps: Vec<Step>,
    alone: bool,
}

impl Script {
    /// A script without steps.
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), steps: Vec::new(), alone: false }
    }

    /// What it is called in a failure.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What it does.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Keeps its server connection for itself (it pins, or never comes to the end of a transaction):
    /// nobody else is to use a pool of one meanwhile.
    pub(crate) fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Writes these messages in one go.
    pub(crate) fn send(mut self, messages: &[Vec<u8>]) -> Self {
        self.steps.push(Step::Send(messages.concat()));
        self
    }

    /// Reads up to and with the `n`th `ReadyForQuery` from here.
    pub(crate) fn ready(mut self, n: usize) -> Self {
        self.steps.extend(std::iter::repeat_n(Step::Ready, n));
        self
    }

    /// Reads up to and with the next message with this tag.
    pub(crate) fn until(mut self, tag: u8) -> Self {
        self.steps.push(Step::Until(tag));
        self
    }

    /// Runs this query before all else.
    pub(crate) fn before(mut self, text: &str) -> Self {
        self.steps.splice(0..0, [Step::Send(build::query(text)), Step::Ready]);
        self
    }

    /// Simple queries, each awaited.
    pub(crate) fn queries(self, texts: &[&str]) -> Self {
        texts.iter().fold(self, |script, text| script.send(&[build::query(text)]).ready(1))
    }
}

/// Parse, Bind, Describe and Execute of the unnamed statement; no Sync.
pub(crate) fn unnamed(sql: &str, parameters: &[Option<&[u8]>]) -> Vec<u8> {
    [build::parse("", sql, &[]), build::bind("", "", parameters), build::describe_portal(""), build::execute("", 0)]
        .concat()
}

/// Bind, Describe and Execute of a named statement; no Sync.
pub(crate) fn named(statement: &str, parameters: &[Option<&[u8]>]) -> Vec<u8> {
    [build::bind("", statement, parameters), build::describe_portal(""), build::execute("", 0)].concat()
}

/// A database, and pgweirs before it that serve it in different ways.
pub(crate) struct Comparison {
    place: Place<'static>,
    /// One server connection for all clients.
    one: Site<'static>,
    /// Three of them, so that a client meets another one each time.
    three: Site<'static>,
    /// A server connection keeps whatever its client has prepared.
    keeps: bool,
}

impl Comparison {
    /// On a new database, with `setup` run in it by its owner.
    pub(crate) async fn start(setup: &str) -> Self {
        Self::start_with(setup, &[]).await
    }

    /// The same, with further settings.
    pub(crate) async fn start_with(setup: &str, settings: &[(&str, &str)]) -> Self {
        let place = Place::on(primary());
        let mut owner = place.direct().await;
        let outcome = owner.query(setup).await.unwrap();
        assert_eq!(outcome.error, None);
        Self::before(place, settings)
    }

    /// On the same database, with pgweirs that remember nothing.
    pub(crate) fn fresh(&self) -> Self {
        Self::before(self.place.clone(), &[])
    }

    fn before(place: Place<'static>, settings: &[(&str, &str)]) -> Self {
        let of = |size| Site::before(place.clone(), &[&[("default_pool_size", size)], settings].concat());
        let (one, three) = (of("1"), of("3"));
        let keeps = settings.iter().any(|setting| matches!(setting, ("prepared_statements", "rewrite" | "session")));
        Self { place, one, three, keeps }
    }

    /// Plays each script directly and in every way through pgweir.
    pub(crate) async fn check(&self, scripts: impl IntoIterator<Item = Script>) {
        let mut faults = Vec::new();
        for script in scripts {
            faults.extend(self.faults(&script).await);
        }
        assert!(faults.is_empty(), "\n{}", faults.concat());
    }

    /// How the answers to a script differ, a text for each way through pgweir in which they do.
    pub(crate) async fn faults(&self, script: &Script) -> Vec<String> {
        let want = play(self.place.direct().await, &script.steps, Company::None).await;
        assert!(!want.is_empty(), "{}: a script must be answered", script.name);
        let mut faults = Vec::new();
        for way in Way::ALL.into_iter().filter(|way| !(script.alone && *way == Way::Intruded)) {
            let site = if way == Way::Shuffled { &self.three } else { &self.one };
            let got = match way.company(site).await {
                Ok(company) => play(site.client().await, &script.steps, company).await,
                Err(trouble) => vec![format!("before it began: {trouble}")],
            };
            if let Some(at) = unlike(&want, &got, way != Way::Single || !self.keeps) {
                faults.push(format!("{}, {way:?}:\n{}", script.name, differences(&want, &got, at)));
            }
        }
        faults
    }
}

/// How a script is played through pgweir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Alone, on a pool of one.
    Single,
    /// On a pool of one that another client uses in between.
    Intruded,
    /// On a pool of three, on another server connection each time.
    Shuffled,
}

impl Way {
    const ALL: [Self; 3] = [Self::Single, Self::Intruded, Self::Shuffled];

    async fn company(self, site: &Site<'_>) -> Result<Company, String> {
        match self {
            Self::Single => Ok(Company::None),
            Self::Intruded => Ok(Company::Intruder(Box::new(Intruder::enter(site).await?))),
            Self::Shuffled => Ok(Company::Shuffler(Box::new(Shuffler::enter(site).await))),
        }
    }
}

/// Who else uses the pool, whenever the client is between transactions.
pub(crate) enum Company {
    /// Nobody.
    None,
    /// Another client uses the same server connection.
    Intruder(Box<Intruder>),
    /// Others see to it that the client gets another server connection.
    Shuffler(Box<Shuffler>),
}

impl Company {
    /// Does its part; what went wrong if it was not answered as it must be.
    async fn act(&mut self) -> Result<(), String> {
        match self {
            Self::None => Ok(()),
            Self::Intruder(intruder) => intruder.act().await,
            Self::Shuffler(shuffler) => shuffler.act().await,
        }
    }
}

/// A client with other settings, and with other statements under the names that scripts use.
pub(crate) struct Intruder {
    wire: Wire,
}

impl Intruder {
    async fn enter(site: &Site<'_>) -> Result<Self, String> {
        let settings = [("TimeZone", "Asia/Tokyo"), ("DateStyle", "German"), ("application_name", "intruder")];
        let mut wire = site.client_with(&settings).await;
        let prepared = [build::parse("s1", "SELECT 'intruder''s s1'", &[]), build::sync()].concat();
        let outcome = exchange(&mut wire, &prepared).await?;
        if outcome.error.is_none() { Ok(Self { wire }) } else { Err(format!("{outcome:?}")) }
    }

    async fn act(&mut self) -> Result<(), String> {
        let unnamed = unnamed("SELECT 'intruder', $1::int", &[Some(b"7")]);
        let outcome = exchange(&mut self.wire, &[unnamed, named("s1", &[]), build::sync()].concat()).await?;
        let rows: Vec<Vec<&str>> = outcome
            .rows
            .iter()
            .map(|row| row.iter().map(|value| value.as_deref().unwrap_or("NULL")).collect())
            .collect();
        if rows == [vec!["intruder", "7"], vec!["intruder's s1"]] { Ok(()) } else { Err(format!("{outcome:?}")) }
    }
}

/// Two clients of which one is always in a transaction, on the server connection used last.
pub(crate) struct Shuffler {
    wires: [Wire; 2],
    holding: Option<usize>,
}

impl Shuffler {
    async fn enter(site: &Site<'_>) -> Self {
        Self { wires: [site.client().await, site.client().await], holding: None }
    }

    async fn act(&mut self) -> Result<(), String> {
        let next = self.holding.map_or(0, |holder| 1 - holder);
        let begun = exchange(&mut self.wires[next], &build::query("BEGIN")).await?;
        let ended = match self.holding {
            Some(holder) => exchange(&mut self.wires[holder], &build::query("COMMIT")).await?.status,
            None => b'I',
        };
        self.holding = Some(next);
        if (begun.status, ended) == (b'T', b'I') { Ok(()) } else { Err(format!("{begun:?}")) }
    }
}

async fn exchange(wire: &mut Wire, bytes: &[u8]) -> Result<Outcome, String> {
    wire.send(bytes).await.map_err(|error| error.to_string())?;
    wire.outcome().await.map_err(|error| error.to_string())
}

/// Plays steps on a connection that has logged in; what came is what is returned, a line a message. Ends at
/// the first trouble of whoever else uses the pool.
pub(crate) async fn play(mut wire: Wire, steps: &[Step], mut company: Company) -> Vec<String> {
    let mut lines = Vec::new();
    let mut trouble = company.act().await.err();
    for (at, step) in steps.iter().enumerate() {
        let ended = match step {
            Step::Send(bytes) => wire.send(bytes).await,
            Step::Ready => read(&mut wire, &mut lines, |message| message.tag == b'Z').await,
            Step::Until(tag) => read(&mut wire, &mut lines, |message| message.tag == *tag).await,
        };
        if let Err(error) = ended {
            lines.push(match error {
                // A close with bytes unread is a reset; which of the two a client sees is a race.
                WireError::Closed { .. } | WireError::Io { .. } => "the end".to_owned(),
                other => other.to_string(),
            });
            return lines;
        }
        let idle = matches!(step, Step::Ready) && lines.last().is_some_and(|line| line == "Z\"I\"");
        if idle && !matches!(steps.get(at + 1), Some(Step::Ready | Step::Until(_))) {
            trouble = trouble.or(company.act().await.err());
        }
        if let Some(trouble) = &trouble {
            lines.push(format!("another client: {trouble}"));
            return lines;
        }
    }
    // Nothing may follow. Whatever is still on its way stands before the answer to this.
    if wire.send(&build::query("SELECT 'the last'")).await.is_err() {
        lines.push("the end".to_owned());
        return lines;
    }
    wire.set_patience(Duration::from_secs(20));
    if let Err(error) = read(&mut wire, &mut lines, |message| message.tag == b'Z').await {
        lines.push(error.to_string());
    }
    lines
}

async fn read(wire: &mut Wire, lines: &mut Vec<String>, last: impl Fn(&Message) -> bool) -> Result<(), WireError> {
    loop {
        let message = wire.recv().await?;
        lines.push(line(&message));
        if last(&message) {
            return Ok(());
        }
    }
}

/// A message as text. A notification's process id is the one thing that may differ.
fn line(message: &Message) -> String {
    if let Some((_, channel, payload)) = message.notification() {
        return format!("A {channel:?} {payload:?}");
    }
    format!("{message:?}")
}

/// Where two transcripts stop to tell the same: lines of each in front of the first batch that is answered otherwise. Inside a
/// failed transaction a statement that is unknown to the server connection cannot be prepared on it: there, and only there,
/// 25P02 may come from another place in the server's source, and if `elsewhere` (the client has not had this server connection
/// for itself all the time) also stand for another answer. One of the documented differences.
fn unlike(want: &[String], got: &[String], elsewhere: bool) -> Option<(usize, usize)> {
    let batches = |lines: &[String]| -> Vec<Vec<String>> {
        lines.split_inclusive(|line| line.starts_with("Z\"")).map(<[String]>::to_vec).collect()
    };
    let (want, got) = (batches(want), batches(got));
    let (mut in_failed, mut at) = (false, (0, 0));
    for (want, got) in want.iter().zip(&got) {
        let fails = |batch: &[String]| batch.last().is_some_and(|line| line == "Z\"E\"");
        let refused = |batch: &[String]| batch.iter().any(|line| line.contains("C25P02"));
        let tolerated = in_failed && fails(want) && fails(got) && refused(got) && (elsewhere || refused(want));
        if want != got && !tolerated {
            return Some(at);
        }
        in_failed = fails(want);
        at = (at.0 + want.len(), at.1 + got.len());
    }
    (want.len() != got.len()).then_some(at)
}

#[test]
fn only_25p02_in_a_failed_transaction_counts_as_alike() {
    type Lines = &'static [&'static str];
    #[rustfmt::skip]
    let table: [(&str, Lines, Lines, bool, bool); 7] = [
        ("equal",                       &["C", "Z\"I\""],                          &["C", "Z\"I\""],                           true,  true),
        ("different",                   &["C", "Z\"I\""],                          &["D", "Z\"I\""],                           true,  false),
        ("shorter",                     &["C", "Z\"I\"", "Z\"I\""],                &["C", "Z\"I\""],                           true,  false),
        ("25P02 in a failed one",       &["E1", "Z\"E\"", "t", "Z\"E\""],          &["E1", "Z\"E\"", "E\"C25P02\"", "Z\"E\""], true,  true),
        ("the same, but its own",       &["E1", "Z\"E\"", "t", "Z\"E\""],          &["E1", "Z\"E\"", "E\"C25P02\"", "Z\"E\""], false, false),
        ("25P02 from elsewhere",        &["E1", "Z\"E\"", "E\"C25P02 a\"", "Z\"E\""], &["E1", "Z\"E\"", "E\"C25P02 b\"", "Z\"E\""], false, true),
        ("25P02 in a good one",         &["E1", "Z\"T\"", "t", "Z\"E\""],          &["E1", "Z\"T\"", "E\"C25P02\"", "Z\"E\""], true,  false),
    ];
    for (name, want, got, elsewhere, expected) in table {
        let lines = |lines: Lines| -> Vec<String> { lines.iter().map(|line| (*line).to_owned()).collect() };
        assert_eq!(unlike(&lines(want), &lines(got), elsewhere).is_none(), expected, "{name}");
    }
}

fn differences(want: &[String], got: &[String], at: (usize, usize)) -> String {
    let (want, got) = (&want[at.0..], &got[at.1..]);
    let same = want.iter().zip(got).take_while(|(want, got)| want == got).count();
    let show = |lines: &[String]| {
        let mut text = String::new();
        for line in lines.iter().skip(same).take(6) {
            let _ = writeln!(text, "      {}", line.chars().take(400).collect::<String>());
        }
        text
    };
    let alike = at.0 + same;
    format!("  {alike} messages alike, then Postgres:\n{}  pgweir:\n{}", show(want), show(got))
}

/// Logs in to any address with a place's names: to go through a proxy.
pub(crate) async fn login_at(address: std::net::SocketAddr, place: &Place<'_>) -> Wire {
    let mut wire = Wire::connect(address).await.unwrap();
    wire.set_patience(Duration::from_mins(1));
    wire.login(&place.name, &place.name, PASSWORD).await.unwrap();
    wire
}
