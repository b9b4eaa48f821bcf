//! The scripts' format: plain text, described in `tests/scripts/README.md`.

use std::fmt;

use pgweir_harness::wire::build;

/// One behaviour: what clients do, line by line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Script {
    /// The sentence behind `==`.
    pub(crate) title: String,
    /// Where it stands: `settings.script:12`.
    pub(crate) place: String,
    /// What is known about it.
    pub(crate) notes: Notes,
    /// What clients do.
    pub(crate) lines: Vec<Line>,
}

/// The lines that begin with `@`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// `@ wrong: why`: a known fault, to be mended. The script must fail.
    pub(crate) wrong: Option<String>,
    /// `@ differs: why`: one of the documented differences. The script must fail.
    pub(crate) differs: Option<String>,
    /// `@ sometimes: why`: a known fault that does not always show. The script may fail.
    pub(crate) sometimes: Option<String>,
    /// `@ pins: why`: a client keeps its server connection for a while, so neighbours have to wait for it.
    pub(crate) pins: Option<String>,
    /// `@ pool 3`: several of its clients need a server connection at a time.
    pub(crate) crowded: bool,
    /// `@ setup SQL`: run by the owner, past pgweir, each time before the script is played.
    pub(crate) setup: Vec<String>,
}

impl Notes {
    /// Why its transcripts are expected to differ.
    pub(crate) fn expected(&self) -> Option<&str> {
        self.wrong.as_deref().or(self.differs.as_deref()).or(self.sometimes.as_deref())
    }
}

/// One line of a script.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Which client does it.
    pub(crate) client: char,
    /// As it is written, without the client.
    pub(crate) text: String,
    /// What that means.
    pub(crate) acts: Vec<Act>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.client, self.text)
    }
}

/// What a client does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Puts messages behind those that wait to be written.
    Add(Vec<u8>),
    /// Writes what waits.
    Send,
    /// Writes what waits, and reads up to and with the nth `ReadyForQuery`.
    Ready(usize),
    /// Writes what waits, and reads up to and with the next message with this tag.
    Await(u8),
    /// Logs in (again) with these startup parameters.
    Connect(Vec<(String, String)>),
    /// Ends the connection as one should.
    Leave,
    /// Ends it by a reset.
    Vanish,
}

/// Reads all scripts of a file. `me` stands for `{me}`: the role and the database.
///
/// # Errors
///
/// What is wrong, with its place.
pub(crate) fn read(file: &str, text: &str, me: &str) -> Result<Vec<Script>, String> {
    let mut scripts: Vec<Script> = Vec::new();
    for (number, line) in logical_lines(text) {
        let place = format!("{file}:{number}");
        let wrong = |what: &str| format!("{place}: {what}: {line}");
        if let Some(title) = line.strip_prefix("== ") {
            let (title, notes, lines) = (title.to_owned(), Notes::default(), Vec::new());
            if scripts.iter().any(|script| script.title == title) {
                return Err(wrong("a second script with this title"));
            }
            scripts.push(Script { title, place, notes, lines });
            continue;
        }
        let script = scripts.last_mut().ok_or_else(|| wrong("before the first title"))?;
        let line = line.replace("{me}", me);
        if let Some(note) = line.strip_prefix("@ ") {
            note_into(&mut script.notes, note).map_err(wrong)?;
        } else {
            script.lines.push(Line::read(&line).map_err(wrong)?);
        }
    }
    match scripts.iter().find(|script| script.lines.is_empty()) {
        Some(empty) => Err(format!("{}: nothing is done", empty.place)),
        None => Ok(scripts),
    }
}

/// Lines with their numbers, without comments and empty ones; those that begin with a blank continue the one before.
fn logical_lines(text: &str) -> Vec<(usize, String)> {
    let mut lines: Vec<(usize, String)> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.starts_with('#') || line.trim().is_empty() {
            continue;
        }
        match lines.last_mut() {
            Some((_, before)) if line.starts_with(' ') => {
                before.push('\n');
                before.push_str(line);
            }
            _ => lines.push((number + 1, line.trim_end().to_owned())),
        }
    }
    lines
}

fn note_into(notes: &mut Notes, note: &str) -> Result<(), &'static str> {
    let (kind, rest) = note.split_once(' ').unwrap_or((note, ""));
    let reason = Some(rest.to_owned()).filter(|reason| !reason.is_empty());
    match kind {
        "wrong:" => notes.wrong = Some(reason.ok_or("no reason")?),
        "differs:" => notes.differs = Some(reason.ok_or("no reason")?),
        "sometimes:" => notes.sometimes = Some(reason.ok_or("no reason")?),
        "pins:" => notes.pins = Some(reason.ok_or("no reason")?),
        "pool" if rest == "3" => notes.crowded = true,
        "setup" => notes.setup.push(reason.ok_or("no SQL")?),
        _ => return Err("an unknown note"),
    }
    Ok(())
}

impl Line {
    /// Reads one line: `SQL`, `\command`, both with or without `c: ` in front.
    pub(crate) fn read(line: &str) -> Result<Self, &'static str> {
        let mut letters = line.chars();
        let (client, text) = match (letters.next(), letters.next(), letters.next()) {
            (Some(client @ 'a'..='z'), Some(':'), Some(' ')) => (client, &line[3..]),
            _ => ('a', line),
        };
        let acts = match text.strip_prefix('\\') {
            Some(command) => acts(command)?,
            None => vec![Act::Add(build::query(text)), Act::Ready(1)],
        };
        Ok(Self { client, text: text.to_owned(), acts })
    }
}

fn acts(command: &str) -> Result<Vec<Act>, &'static str> {
    let (word, rest) = command.split_once(' ').unwrap_or((command, ""));
    let add = |messages: &[Vec<u8>]| vec![Act::Add(messages.concat())];
    let (head, values) = values(rest);
    Ok(match word {
        "query" => add(&[build::query(rest)]),
        "parse" => {
            let (name, sql) = rest.split_once(' ').ok_or("a name and a text are needed")?;
            let (name, types) = typed(name)?;
            add(&[build::parse(name, sql, &types)])
        }
        "bind" => {
            let (statement, portal) = head.split_once('>').unwrap_or((head, ""));
            add(&[build::bind(portal, unnamed(statement), &values)])
        }
        "bind-binary" => {
            let (statement, portal) = head.split_once('>').unwrap_or((head, ""));
            add(&[build::bind_formats(portal, unnamed(statement), &[], &values, &[1])])
        }
        "describe" => match rest.strip_prefix('>') {
            Some(portal) => add(&[build::describe_portal(portal)]),
            None => add(&[build::describe_statement(unnamed(rest))]),
        },
        "execute" => {
            let (portal, rows) = rest.split_once(' ').unwrap_or((rest, "0"));
            let portal = portal.strip_prefix('>').unwrap_or_default();
            add(&[build::execute(portal, rows.parse().map_err(|_| "no number of rows")?)])
        }
        "close" => match rest.strip_prefix('>') {
            Some(portal) => add(&[build::close_portal(portal)]),
            None => add(&[build::close_statement(unnamed(rest))]),
        },
        // A statement's whole way, but for the Sync.
        "add" => add(&[build::parse("", head, &[]), run("", &values)]),
        "call" => add(&[run(unnamed(head), &values)]),
        // The same with the Sync.
        "run" => vec![Act::Add([build::parse("", head, &[]), run("", &values), build::sync()].concat()), Act::Ready(1)],
        "exec" => vec![Act::Add([run(unnamed(head), &values), build::sync()].concat()), Act::Ready(1)],
        "prepare" => {
            let (name, sql) = rest.split_once(' ').ok_or("a name and a text are needed")?;
            let (name, types) = typed(name)?;
            let messages = [build::parse(name, sql, &types), build::describe_statement(name), build::sync()];
            vec![Act::Add(messages.concat()), Act::Ready(1)]
        }
        "end" => add(&[build::sync()]),
        "sync" => vec![Act::Add(build::sync()), Act::Ready(1)],
        "flush" => vec![Act::Add(build::flush()), Act::Send],
        "copydata" => add(&[build::copy_data(rest.replace("\\n", "\n").replace("\\t", "\t").as_bytes())]),
        "copydone" => add(&[build::copy_done()]),
        "copyfail" => add(&[build::copy_fail(rest)]),
        "send" => vec![Act::Send],
        "ready" if rest.is_empty() => vec![Act::Ready(1)],
        "ready" => vec![Act::Ready(rest.parse().map_err(|_| "no number")?)],
        "await" => match rest.as_bytes() {
            [tag] => vec![Act::Await(*tag)],
            _ => return Err("one letter is needed"),
        },
        "connect" => vec![Act::Connect(parameters(rest)?)],
        "leave" => vec![Act::Leave],
        "vanish" => vec![Act::Vanish],
        _ => return Err("an unknown command"),
    })
}

fn run(statement: &str, values: &[Option<&[u8]>]) -> Vec<u8> {
    [build::bind("", statement, values), build::describe_portal(""), build::execute("", 0)].concat()
}

/// `-` is the unnamed statement.
fn unnamed(name: &str) -> &str {
    if name == "-" { "" } else { name }
}

/// `s1:23,25`: a name and the object ids of the parameters' types.
fn typed(name: &str) -> Result<(&str, Vec<u32>), &'static str> {
    let (name, types) = name.split_once(':').unwrap_or((name, ""));
    let types = types.split(',').filter(|number| !number.is_empty()).map(str::parse).collect::<Result<_, _>>();
    Ok((unnamed(name), types.map_err(|_| "no object id")?))
}

/// `text | 1 | NULL | x`: a text and values.
fn values(rest: &str) -> (&str, Vec<Option<&[u8]>>) {
    let mut parts = rest.split(" | ");
    let head = parts.next().unwrap_or_default();
    (head, parts.map(|value| (value != "NULL").then_some(value.as_bytes())).collect())
}

/// `name=value name='a value'`.
fn parameters(mut rest: &str) -> Result<Vec<(String, String)>, &'static str> {
    let mut all = Vec::new();
    while let Some((name, after)) = rest.trim_start().split_once('=') {
        let (value, after) = match after.strip_prefix('\'') {
            Some(quoted) => quoted.split_once('\'').ok_or("an open quote")?,
            None => after.split_once(' ').unwrap_or((after, "")),
        };
        all.push((name.to_owned(), value.to_owned()));
        rest = after;
    }
    if rest.trim().is_empty() { Ok(all) } else { Err("name=value is needed") }
}

#[test]
fn a_script_is_read() {
    let text = "# comment\n\n== a title\n@ pins: it must\n@ pool 3\n@ setup CREATE TABLE x ()\nSELECT 1,\n  2\nb: \\run SELECT $1 | NULL | x\n";
    let scripts = read("x.script", text, "me").unwrap();
    let [script] = scripts.as_slice() else { panic!("{scripts:?}") };
    assert_eq!((script.title.as_str(), script.place.as_str()), ("a title", "x.script:3"));
    assert!(script.notes.crowded && script.notes.pins.is_some() && script.notes.expected().is_none());
    assert_eq!(script.notes.setup, ["CREATE TABLE x ()"]);
    assert_eq!(
        format!("{:?}", script.lines),
        r"[a: SELECT 1,
  2, b: \run SELECT $1 | NULL | x]"
    );
    let Some(Act::Add(bytes)) = script.lines[1].acts.first() else { panic!() };
    let want = [build::parse("", "SELECT $1", &[]), run("", &[None, Some(b"x")]), build::sync()].concat();
    assert_eq!(*bytes, want);
}

#[test]
fn what_is_no_script_is_told_with_its_place() {
    #[rustfmt::skip]
    let table: [(&str, &str); 7] = [
        ("SELECT 1",                   "x:1: before the first title: SELECT 1"),
        ("== a\n== b\n",               "x:1: nothing is done"),
        ("== a\nSELECT 1\n== a\n",     "x:3: a second script with this title: == a"),
        ("== a\n\\nonsense",           "x:2: an unknown command: \\nonsense"),
        ("== a\n@ nonsense",           "x:2: an unknown note: @ nonsense"),
        ("== a\n@ wrong:",             "x:2: no reason: @ wrong:"),
        ("== a\n\\connect a='b",       "x:2: an open quote: \\connect a='b"),
    ];
    for (text, want) in table {
        assert_eq!(read("x", text, "me").unwrap_err(), want, "{text}");
    }
}
