//! The same scripts played on Postgres itself and through pgweir, while neighbours do conflicting things, must be
//! answered the same. The scripts are the files in `tests/scripts`; its README says how to write one.

mod neighbours;
mod player;
mod program;
mod script;
mod told;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;

use pgweir_harness::wire::Wire;

use self::neighbours::{Company, LOOK};
use self::player::Player;
use self::script::Script;
use self::told::{Transcript, difference};
use crate::support::{Place, Site, primary};

/// Postgres and pgweirs in front of it, with neighbours, for the scripts of one file.
pub(crate) struct Theatre {
    place: Place<'static>,
    owner: Wire,
    /// What a session without settings looks like to a neighbour.
    plain: Vec<String>,
    one: Stage,
    three: Stage,
}

/// One pgweir, and who else uses it.
struct Stage {
    settings: Vec<(String, String)>,
    shuffle: bool,
    /// None: it is still to be started.
    open: Option<(Site<'static>, Company)>,
}

impl Stage {
    fn new(size: &str, shuffle: bool, settings: &[(&str, &str)]) -> Self {
        let own = [("default_pool_size", size), ("query_wait_timeout", "30s")];
        let all = own.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self { settings: all.collect(), shuffle, open: None }
    }

    async fn open(&mut self, place: &Place<'static>, plain: &[String]) -> &mut (Site<'static>, Company) {
        if self.open.is_none() {
            let settings: Vec<(&str, &str)> =
                self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let site = Site::before(place.clone(), &settings);
            let company = Company::enter(&site, plain, self.shuffle).await.unwrap();
            self.open = Some((site, company));
        }
        self.open.as_mut().unwrap()
    }
}

/// How a script is played through pgweir.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Alone, on a pool of one.
    Alone,
    /// On a pool of one that neighbours use in between.
    Intruded,
    /// On a pool of three and the connection that listens, with no neighbour that does anything.
    Spread,
    /// On such a pool, on another server connection each time.
    Shuffled,
}

impl Way {
    fn of(script: &Script) -> &'static [Self] {
        if script.notes.crowded {
            &[Self::Spread, Self::Shuffled]
        } else {
            &[Self::Alone, Self::Intruded, Self::Shuffled]
        }
    }
}

impl Theatre {
    /// A new database with what all scripts find there, and pgweirs with these settings.
    pub(crate) async fn open(settings: &[(&str, &str)]) -> Self {
        let place = Place::on(primary());
        roles(&place);
        let mut owner = place.direct().await;
        let setup = fs::read_to_string(folder().join("setup.sql")).unwrap();
        let done = owner.query(&setup).await.unwrap();
        assert_eq!(done.error, None);
        let looked = place.direct().await.query(LOOK).await.unwrap();
        let plain = looked.rows[0].iter().map(|value| value.clone().unwrap()).collect();
        // Three for clients, one that listens for them.
        let (one, three) = (Stage::new("1", false, settings), Stage::new("4", true, settings));
        Self { place, owner, plain, one, three }
    }

    /// Plays a script in every way; what is wrong with it. Empty if nothing is.
    pub(crate) async fn faults(&mut self, script: &Script) -> String {
        let (faults, waited) = self.differences(script).await;
        let needless = script.notes.pins.is_some() && !script.notes.crowded && !waited;
        let head = format!("{} == {}\n", script.place, script.title);
        match (script.notes.expected(), faults.is_empty()) {
            (None, true) if needless => format!("{head}  it pins nothing: take the note `@ pins` away\n"),
            (None, true) | (Some(_), false) => String::new(),
            (None, false) => head + &faults,
            (Some(reason), true) if script.notes.sometimes.is_some() => {
                println!("{head}  it is equal this time ({reason})");
                String::new()
            }
            (Some(reason), true) => format!("{head}  it is equal now: take the note away ({reason})\n"),
        }
    }

    /// Plays a script in every way: how the answers differ from Postgres', and whether a neighbour had to wait where it
    /// is certain that a pin would have let it.
    pub(crate) async fn differences(&mut self, script: &Script) -> (String, bool) {
        let want = self.play_directly(script).await;
        if std::env::var_os("PGWEIR_SCRIPT").is_some() {
            let none = vec![Vec::new(); want.len()];
            println!("{} == {}\n{}", script.place, script.title, difference(&script.lines, &want, &none));
        }
        let (mut faults, mut has_waited) = (String::new(), false);
        for way in Way::of(script) {
            let (got, waited) = self.play(script, *way).await;
            has_waited |= *way == Way::Intruded && waited;
            let shown = difference(&script.lines, &want, &got);
            if !shown.is_empty() {
                let _ = write!(faults, "  {way:?}:\n{shown}");
                // What went wrong may have left something behind, and the next script is not to be blamed for it.
                self.stage(*way).open = None;
            }
        }
        (faults, has_waited)
    }

    /// What Postgres itself answers.
    async fn play_directly(&mut self, script: &Script) -> Transcript {
        self.set_up(script).await;
        Player::new(self.place.cluster.addr(), &self.place.name).play(script, None).await
    }

    /// What is answered through pgweir, and whether a neighbour had to wait.
    async fn play(&mut self, script: &Script, way: Way) -> (Transcript, bool) {
        self.set_up(script).await;
        let stage = if matches!(way, Way::Alone | Way::Intruded) { &mut self.one } else { &mut self.three };
        let (site, company) = stage.open(&self.place, &self.plain).await;
        let player = Player::new(site.pgweir.addr(), &self.place.name);
        if matches!(way, Way::Alone | Way::Spread) {
            return (player.play(script, None).await, false);
        }
        company.prepare(script).await.unwrap();
        let mut got = player.play(script, Some(company)).await;
        if let Err(trouble) = company.finish().await {
            got.push(vec![format!("a neighbour: {trouble}")]);
        }
        (got, company.has_waited())
    }

    fn stage(&mut self, way: Way) -> &mut Stage {
        if matches!(way, Way::Alone | Way::Intruded) { &mut self.one } else { &mut self.three }
    }

    async fn set_up(&mut self, script: &Script) {
        // The session of the last play may still be ending, and what it holds be held: the lock that scripts try to get.
        let free = self.owner.query("SELECT pg_advisory_lock(1), pg_advisory_unlock(1)").await.unwrap();
        assert_eq!(free.error, None, "{}", script.place);
        for sql in &script.notes.setup {
            let done = self.owner.query(sql).await.unwrap();
            assert_eq!(done.error, None, "{}: {sql}", script.place);
        }
    }
}

/// The roles that scripts set, and that every place's role may.
fn roles(place: &Place<'_>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let sql = "CREATE ROLE script_reader; CREATE ROLE script_writer; CREATE ROLE \"Script Role\"";
        place.cluster.psql("postgres", sql).unwrap();
    });
    let grant = format!("GRANT script_reader, script_writer, \"Script Role\" TO {}", place.name);
    place.cluster.psql("postgres", &grant).unwrap();
}

/// The folder of the scripts.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts")
}

/// Plays all scripts of a file.
async fn play(name: &str) {
    play_with(name, &[]).await;
}

/// Plays all scripts of a file with these settings of pgweir.
async fn play_with(name: &str, settings: &[(&str, &str)]) {
    let mut theatre = Theatre::open(settings).await;
    let file = format!("{name}.script");
    let text = fs::read_to_string(folder().join(&file)).unwrap();
    let scripts = script::read(&file, &text, &theatre.place.name).unwrap();
    let only = std::env::var("PGWEIR_SCRIPT").unwrap_or_default();
    let mut faults = Vec::new();
    for script in scripts.iter().filter(|script| script.title.contains(&only)) {
        faults.push(theatre.faults(script).await);
    }
    faults.retain(|fault| !fault.is_empty());
    assert!(faults.is_empty(), "{} of {} scripts:\n{}", faults.len(), scripts.len(), faults.join("\n"));
}

#[tokio::test]
async fn settings_are_the_clients_own_as_on_a_session_of_postgres() {
    play("settings").await;
}

#[tokio::test]
async fn what_a_client_logs_in_with_is_where_reset_goes_back_to() {
    play("startup").await;
}

#[tokio::test]
async fn roles_are_the_clients_own_as_on_a_session_of_postgres() {
    play("roles").await;
}

#[tokio::test]
async fn prepared_statements_are_the_clients_own_as_on_a_session_of_postgres() {
    play("statements").await;
}

#[tokio::test]
async fn notifications_come_as_on_a_session_of_postgres() {
    play("notify").await;
}

#[tokio::test]
async fn advisory_locks_are_kept_as_on_a_session_of_postgres() {
    play("locks").await;
}

#[tokio::test]
async fn temporary_tables_and_cursors_are_kept_as_on_a_session_of_postgres() {
    play("temp").await;
}

#[tokio::test]
async fn sequences_are_read_as_on_a_session_of_postgres() {
    play("sequences").await;
}

#[tokio::test]
async fn discard_wipes_what_it_wipes_on_a_session_of_postgres() {
    play("discard").await;
}

#[tokio::test]
async fn transactions_errors_and_notices_are_as_on_a_session_of_postgres() {
    play("transactions").await;
}

#[tokio::test]
async fn copy_is_as_on_a_session_of_postgres() {
    play("copy").await;
}

#[tokio::test]
async fn state_behind_functions_triggers_and_views_is_the_clients_own() {
    play("hidden").await;
}

#[test]
fn every_file_of_scripts_is_played() {
    let source = include_str!("scripts.rs");
    for entry in fs::read_dir(folder()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(stem) = name.strip_suffix(".script") {
            assert!(source.contains(&format!("play(\"{stem}\")")), "{name} is played by no test");
        }
    }
}
