//! What a client does in transaction mode, and what it must be answered.

use std::time::Duration;

use pgweir_harness::wire::{Outcome, build, cancel};
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::actor::{Actor, Done, Trouble, expect_rows, wrong};
use super::model::Setting;

/// One thing that a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// One statement.
    Single,
    /// Several statements in one simple query.
    Several,
    /// The unnamed statement, prepared in one batch and bound in the next.
    Unnamed,
    /// A statement whose name others use for other texts.
    Prepared,
    /// One batch in steps, each awaited by a Flush, the Sync last.
    Stepwise,
    /// A message in pieces, with pauses.
    Slowly,
    /// Several batches without waiting, an error among them.
    BrokenPipeline,
    /// A transaction of several statements, which may fail.
    Transaction,
    /// A cursor in a transaction.
    Cursor,
    /// COPY out, and COPY in.
    Copy,
    /// A row by itself.
    Insert,
    /// SET, RESET and the like.
    Set,
    /// A look at all settings.
    Look,
    /// A query and a cancel of it.
    Cancel,
    /// The end of the connection in some way.
    Leave,
    /// See `belongings`.
    TemporaryTable,
    /// See `belongings`.
    AdvisoryLock,
    /// See `belongings`.
    Listen,
    /// See `belongings`.
    HeldCursor,
    /// See `belongings`.
    SqlPrepare,
    /// See `belongings`.
    Sequence,
    /// See `belongings`.
    DiscardAll,
    /// See `belongings`.
    LookAround,
    /// See `belongings`.
    Interrupted,
    /// See `belongings`.
    Vanish,
}

/// What clients do in transaction mode, and how often.
pub(crate) const TRANSACTIONS: &[(Act, usize)] = &[
    (Act::Single, 20),
    (Act::Several, 6),
    (Act::Unnamed, 4),
    (Act::Prepared, 20),
    (Act::Stepwise, 4),
    (Act::Slowly, 2),
    (Act::BrokenPipeline, 6),
    (Act::Transaction, 20),
    (Act::Cursor, 3),
    (Act::Copy, 3),
    (Act::Insert, 6),
    (Act::Set, 8),
    (Act::Look, 10),
    (Act::Cancel, 1),
    (Act::Leave, 1),
];

/// Names of prepared statements, the same for all clients.
const NAMES: [&str; 5] = ["s0", "s1", "S_1", "a statement", "stmtcache_1"];

/// Parse to Sync of one statement without parameters, by the unnamed statement.
pub(crate) fn unnamed(sql: &str, parameters: &[Option<&[u8]>]) -> Vec<u8> {
    [
        build::parse("", sql, &[]),
        build::bind("", "", parameters),
        build::describe_portal(""),
        build::execute("", 0),
        build::sync(),
    ]
    .concat()
}

impl Actor {
    /// Does it.
    pub(crate) async fn act(&mut self, act: Act) -> Done {
        match act {
            Act::Single => self.single().await,
            Act::Several => self.several().await,
            Act::Unnamed => self.unnamed().await,
            Act::Prepared => self.prepared().await,
            Act::Stepwise => self.stepwise().await,
            Act::Slowly => self.slowly().await,
            Act::BrokenPipeline => self.broken_pipeline().await,
            Act::Transaction => self.transaction().await,
            Act::Cursor => self.cursor().await,
            Act::Copy => self.copy().await,
            Act::Insert => self.insert().await,
            Act::Set => self.set().await,
            Act::Look => self.look().await,
            Act::Cancel => self.cancel().await,
            Act::Leave => self.leave().await,
            belonging => self.use_belonging(belonging).await,
        }
    }

    async fn single(&mut self) -> Done {
        let tag = self.tag();
        self.expect(&format!("SELECT '{tag}'"), &tag).await
    }

    async fn several(&mut self) -> Done {
        let (first, second) = (self.tag(), self.tag());
        let sql = format!("SELECT '{first}'; SELECT name FROM place; SELECT '{second}'");
        self.send(&sql, &build::query(&sql)).await?;
        let outcome = self.outcome().await?;
        let schema = self.model.schema().to_owned();
        expect_rows(&sql, &outcome, &[&first, &schema, &second])
    }

    async fn unnamed(&mut self) -> Done {
        let (constant, parameter) = (self.tag(), self.tag());
        let sql = format!("SELECT '{constant} ' || $1");
        let parse = [build::parse("", &sql, &[25]), build::describe_statement(""), build::sync()];
        self.send(&sql, &parse.concat()).await?;
        let outcome = self.outcome().await?;
        if outcome.error.is_some() {
            return wrong(format!("{sql}: {outcome:?}"));
        }
        let run = [build::bind("", "", &[Some(parameter.as_bytes())]), build::execute("", 0), build::sync()];
        self.send("its Bind", &run.concat()).await?;
        let outcome = self.outcome().await?;
        expect_rows(&sql, &outcome, &[&format!("{constant} {parameter}")])
    }

    /// The text of the variant `which` of this client's statements. Even ones are the same for every client, odd ones
    /// its own.
    fn statement_text(&self, which: u64) -> String {
        let own = if which.is_multiple_of(2) { String::new() } else { format!("client {} ", self.number) };
        format!("SELECT '{own}{which} ' || name || ' ' || $1 FROM place")
    }

    fn statement_answer(&self, which: u64, parameter: &str) -> String {
        let own = if which.is_multiple_of(2) { String::new() } else { format!("client {} ", self.number) };
        format!("{own}{which} {} {parameter}", self.model.schema())
    }

    async fn prepared(&mut self) -> Done {
        let name = *self.dice.pick(&NAMES);
        match self.dice.below(12) {
            0 => return self.close_statement(name).await,
            1 => return self.prepare_wrongly(name).await,
            _ => {}
        }
        let mut bytes = Vec::new();
        if !self.statements.contains_key(name) {
            let which = self.dice.below(20);
            bytes.extend(build::parse(name, &self.statement_text(which), &[25]));
            self.statements.insert(name, which);
        }
        // Several executions in one batch, of all the statements there are.
        let names: Vec<(&'static str, u64)> = self.statements.iter().map(|(name, which)| (*name, *which)).collect();
        let mut want = Vec::new();
        for _ in 0..=self.dice.below(3) {
            let (name, which) = *self.dice.pick(&names);
            let parameter = self.tag();
            if self.dice.once_in(4) {
                bytes.extend(build::describe_statement(name));
            }
            bytes.extend(build::bind("", name, &[Some(parameter.as_bytes())]));
            bytes.extend(build::execute("", 0));
            want.push(self.statement_answer(which, &parameter));
        }
        bytes.extend(build::sync());
        self.send(format!("prepared {want:?}"), &bytes).await?;
        let outcome = self.outcome().await?;
        let want: Vec<&str> = want.iter().map(String::as_str).collect();
        expect_rows("prepared", &outcome, &want)
    }

    async fn close_statement(&mut self, name: &'static str) -> Done {
        let bytes = [build::close_statement(name), build::sync()].concat();
        self.send(format!("close {name}"), &bytes).await?;
        let outcome = self.outcome().await?;
        self.statements.remove(name);
        if outcome.error.is_some() { wrong(format!("close {name}: {outcome:?}")) } else { Ok(()) }
    }

    /// A name that exists cannot be prepared again, one that does not exist cannot be bound.
    async fn prepare_wrongly(&mut self, name: &'static str) -> Done {
        let (bytes, sqlstate) = if self.statements.contains_key(name) {
            (build::parse(name, "SELECT 'not this'", &[]), "42P05")
        } else {
            (build::bind("", name, &[Some(b"")]), "26000")
        };
        self.send(format!("{sqlstate} with {name}"), &[bytes, build::sync()].concat()).await?;
        let outcome = self.outcome().await?;
        let told = outcome.error.as_ref().map_or("", |error| error.message());
        if outcome.sqlstate() != sqlstate || !told.contains(&format!("\"{name}\"")) {
            return wrong(format!("{name}, not {sqlstate}: {outcome:?}"));
        }
        Ok(())
    }

    /// Between the steps nothing is owed and no transaction is open, and yet the server connection is not free.
    async fn stepwise(&mut self) -> Done {
        let (constant, parameter) = (self.tag(), self.tag());
        let sql = format!("SELECT '{constant} ' || $1");
        let steps = [
            (build::parse("", &sql, &[25]), b'1'),
            (build::bind("", "", &[Some(parameter.as_bytes())]), b'2'),
            (build::execute("", 0), b'C'),
        ];
        let mut messages = Vec::new();
        for (bytes, answer) in steps {
            self.send(format!("a step of {sql}"), &[bytes, build::flush()].concat()).await?;
            messages.extend(self.receive_until(answer).await?);
            sleep(self.dice.time_below(Duration::from_millis(3))).await;
        }
        self.send("its Sync", &build::sync()).await?;
        messages.extend(self.receive_until(b'Z').await?);
        let outcome = self.outcome_in(&messages, 1)?;
        expect_rows(&sql, &outcome, &[&format!("{constant} {parameter}")])
    }

    async fn slowly(&mut self) -> Done {
        let tag = self.tag();
        // Some are larger than any buffer that a message is kept in until it is whole.
        let padding = " ".repeat(if self.dice.once_in(2) { 300_000 } else { 20 });
        let sql = format!("SELECT{padding}'{tag}'");
        let bytes = if self.dice.once_in(2) { build::query(&sql) } else { unnamed(&sql, &[]) };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (piece, others) = rest.split_at(1 + self.dice.index(rest.len()));
            self.send(format!("{} bytes of a query of {tag}", piece.len()), piece).await?;
            rest = others;
            sleep(self.dice.time_below(Duration::from_millis(3))).await;
        }
        let outcome = self.outcome().await?;
        expect_rows(&tag, &outcome, &[&tag])
    }

    async fn broken_pipeline(&mut self) -> Done {
        let batches = 2 + self.dice.index(4);
        let mut bytes = Vec::new();
        let mut want = Vec::new();
        for _ in 0..batches {
            let mut tags = Vec::new();
            let mut broken = false;
            for _ in 0..=self.dice.below(4) {
                let tag = self.tag();
                let breaks = self.dice.once_in(4);
                let sql = if breaks { "SELECT 1/0".to_owned() } else { format!("SELECT '{tag}'") };
                bytes.extend([build::parse("", &sql, &[]), build::bind("", "", &[]), build::execute("", 0)].concat());
                if self.dice.once_in(5) {
                    bytes.extend(build::flush());
                }
                broken |= breaks;
                if !broken {
                    tags.push(tag);
                }
            }
            bytes.extend(build::sync());
            want.push((tags, broken));
        }
        self.send(format!("pipeline {want:?}"), &bytes).await?;
        for (tags, broken) in want {
            let outcome = self.outcome().await?;
            let got: Vec<String> = outcome.rows.iter().flatten().flatten().cloned().collect();
            let sqlstate = if broken { "22012" } else { "" };
            if got != tags || outcome.sqlstate() != sqlstate {
                return wrong(format!("not {tags:?} and {sqlstate:?}: {outcome:?}"));
            }
        }
        Ok(())
    }

    async fn transaction(&mut self) -> Done {
        let begin =
            *self.dice.pick(&["BEGIN", "begin;", "START TRANSACTION", "/* a */ BEGIN ISOLATION LEVEL REPEATABLE READ"]);
        self.succeed(begin).await?;
        self.model.mark();
        let mut rows = Vec::new();
        let mut failed = false;
        for _ in 0..=self.dice.below(5) {
            if failed {
                self.expect_error("SELECT 1", "25P02").await?;
                continue;
            }
            match self.dice.below(10) {
                0 => {
                    self.expect_error("SELECT 1/0", "22012").await?;
                    failed = true;
                }
                1 | 2 => {
                    let local = self.dice.once_in(2);
                    self.set_something(local).await?;
                }
                3 => self.look().await?,
                4 => self.savepoint().await?,
                5 | 6 => {
                    let n = self.ledger_number();
                    self.succeed(&format!("INSERT INTO public.ledger VALUES ({}, {n})", self.number)).await?;
                    rows.push(n);
                }
                _ => self.single().await?,
            }
        }
        self.end_transaction(failed, &rows).await
    }

    async fn end_transaction(&mut self, failed: bool, rows: &[u64]) -> Done {
        let rollback = self.dice.once_in(3);
        let sql = if rollback { "ROLLBACK" } else { *self.dice.pick(&["COMMIT", "commit work", "END"]) };
        let want = if rollback || failed { "ROLLBACK" } else { "COMMIT" };
        let outcome = match self.succeed(sql).await {
            Err(Trouble::Lost) if want == "COMMIT" => {
                self.account.unknown += rows.len() as u64;
                return Err(Trouble::Lost);
            }
            outcome => outcome?,
        };
        if outcome.tags != [want] || outcome.status != b'I' {
            return wrong(format!("{sql}, not {want}: {outcome:?}"));
        }
        if want == "COMMIT" {
            self.model.commit();
            self.account.committed += rows.len() as u64;
            self.account.committed_sum += rows.iter().sum::<u64>();
        } else {
            self.model.rollback();
        }
        Ok(())
    }

    /// A savepoint, settings, an error, and back.
    async fn savepoint(&mut self) -> Done {
        self.succeed("SAVEPOINT here").await?;
        self.model.mark();
        let local = self.dice.once_in(2);
        self.set_something(local).await?;
        if self.dice.once_in(2) {
            self.expect_error("SELECT 1/0", "22012").await?;
        }
        self.succeed("ROLLBACK TO SAVEPOINT here").await?;
        self.model.back_to_mark();
        self.look().await
    }

    async fn cursor(&mut self) -> Done {
        let tag = self.tag();
        self.succeed("BEGIN").await?;
        self.model.mark();
        self.succeed(&format!("DECLARE mine CURSOR FOR SELECT '{tag}.' || n FROM generate_series(1, 5) n")).await?;
        for first in [1, 3] {
            let outcome = self.ask("FETCH 2 FROM mine").await?;
            expect_rows("FETCH", &outcome, &[&format!("{tag}.{first}"), &format!("{tag}.{}", first + 1)])?;
        }
        if self.dice.once_in(2) {
            self.succeed("CLOSE mine").await?;
        }
        self.end_transaction(false, &[]).await?;
        self.expect_error("FETCH 1 FROM mine", "34000").await.map(|_| ())
    }

    async fn copy(&mut self) -> Done {
        let tag = self.tag();
        let sql = format!("COPY (SELECT '{tag}' FROM generate_series(1, 3)) TO STDOUT");
        self.send(&sql, &build::query(&sql)).await?;
        let messages = self.receive_until(b'Z').await?;
        self.outcome_in(&messages, 1)?;
        let data: Vec<u8> =
            messages.iter().filter(|message| message.tag == b'd').flat_map(|m| m.body.clone()).collect();
        if data != format!("{tag}\n").repeat(3).as_bytes() {
            return wrong(format!("{sql}: {messages:?}"));
        }
        let n = self.ledger_number();
        let fails = self.dice.once_in(4);
        let end = if fails { build::copy_fail("changed my mind") } else { build::copy_done() };
        let row = build::copy_data(format!("{}\t{n}\n", self.number).as_bytes());
        let copy = build::query("COPY public.ledger FROM STDIN");
        self.send(format!("COPY in of {n}, fails: {fails}"), &[copy, row, end].concat()).await?;
        let outcome = self.outcome().await;
        self.settle_insert(n, outcome, fails.then_some("57014"))
    }

    async fn insert(&mut self) -> Done {
        let n = self.ledger_number();
        let fails = self.dice.once_in(4);
        let value = if fails { format!("{n}/0") } else { n.to_string() };
        let outcome = self.ask(&format!("INSERT INTO public.ledger VALUES ({}, {value})", self.number)).await;
        self.settle_insert(n, outcome, fails.then_some("22012"))
    }

    /// Books a row that was inserted outside a transaction.
    fn settle_insert(&mut self, n: u64, outcome: Done<Outcome>, sqlstate: Option<&str>) -> Done {
        let outcome = match outcome {
            Err(Trouble::Lost) if sqlstate.is_none() => {
                self.account.unknown += 1;
                return Err(Trouble::Lost);
            }
            outcome => outcome?,
        };
        if outcome.sqlstate() != sqlstate.unwrap_or("") {
            return wrong(format!("row {n}, not {sqlstate:?}: {outcome:?}"));
        }
        if sqlstate.is_none() {
            self.account.committed += 1;
            self.account.committed_sum += n;
        }
        Ok(())
    }

    async fn set(&mut self) -> Done {
        if self.is_plain {
            return self.single().await;
        }
        match self.dice.below(12) {
            0 => {
                self.succeed("RESET ALL").await?;
                self.model.reset_all(false);
                Ok(())
            }
            1..=3 => {
                let setting = *self.dice.pick(&self.play.settings);
                let sql = setting.reset(&mut self.dice);
                self.succeed(&sql).await?;
                self.model.reset(setting);
                Ok(())
            }
            4 => {
                // An error in the same string takes the SET back.
                let setting = *self.dice.pick(&self.play.settings);
                let value = setting.value(&self.play.name, self.number, &mut self.dice);
                let sql = format!("{}; SELECT 1/0", setting.set(&value, false, &mut self.dice));
                self.send(&sql, &build::query(&sql)).await?;
                let outcome = self.outcome().await?;
                if outcome.sqlstate() == "22012" { Ok(()) } else { wrong(format!("{sql}: {outcome:?}")) }
            }
            _ => self.set_something(false).await,
        }
    }

    async fn set_something(&mut self, local: bool) -> Done {
        if self.is_plain {
            return self.look().await;
        }
        let setting = *self.dice.pick(&self.play.settings);
        let value = setting.value(&self.play.name, self.number, &mut self.dice);
        if self.dice.once_in(4) {
            self.set_by_parameters(setting, &value, local).await?;
        } else {
            let sql = setting.set(&value, local, &mut self.dice);
            self.succeed(&sql).await?;
        }
        self.model.set(setting, value, local);
        Ok(())
    }

    /// The text does not tell which setting.
    async fn set_by_parameters(&mut self, setting: Setting, value: &str, local: bool) -> Done {
        let scope = if local { "true" } else { "f" };
        let values = [setting.name(), value, scope].map(|value| Some(value.as_bytes()));
        let sql = "SELECT set_config($1, $2, $3)";
        let bytes = [build::parse("", sql, &[]), build::bind("", "", &values), build::execute("", 0), build::sync()];
        self.send(format!("{sql}: {setting:?} {value} {scope}"), &bytes.concat()).await?;
        let outcome = self.outcome().await?;
        if outcome.error.is_some() { wrong(format!("{sql}: {outcome:?}")) } else { Ok(()) }
    }

    /// All settings, the user and the search path as they are in force.
    async fn look(&mut self) -> Done {
        if self.dice.once_in(3) {
            let setting = *self.dice.pick(&self.play.settings);
            let want = self.model.value(setting).to_owned();
            // Postgres does not know a made-up setting that nobody has set.
            if setting == Setting::Tenant {
                return Ok(());
            }
            return self.expect(&format!("SHOW {}", setting.name()), &want).await;
        }
        let tag = self.tag();
        let role = match self.model.value(Setting::Role) {
            "" | "none" => self.play.name.clone(),
            role => role.to_owned(),
        };
        let mut want = vec![tag.clone(), role, self.model.schema().to_owned()];
        let mut columns = vec![format!("'{tag}'"), "current_user".to_owned(), "(SELECT name FROM place)".to_owned()];
        for setting in self.play.settings.iter().filter(|setting| **setting != Setting::ApplicationName) {
            want.push(self.model.value(*setting).to_owned());
            columns.push(setting.expression());
        }
        let sql = format!("SELECT {}", columns.join(", "));
        let outcome = self.ask(&sql).await?;
        let got: Vec<String> = outcome.rows.iter().flatten().flatten().cloned().collect();
        if outcome.error.is_some() || got != want {
            return wrong(format!("settings, not {want:?}: {outcome:?}"));
        }
        Ok(())
    }

    async fn cancel(&mut self) -> Done {
        let tag = self.tag();
        let sql = format!("SELECT '{tag}' FROM pg_sleep(0.04)");
        let outcome = self.interrupt(&sql, Duration::from_millis(50)).await?;
        if outcome.sqlstate() == "57014" { Ok(()) } else { expect_rows(&sql, &outcome, &[&tag]) }
    }

    /// A query, and a cancel of it within so much time.
    pub(crate) async fn interrupt(&mut self, sql: &str, within: Duration) -> Done<Outcome> {
        self.send(sql, &build::query(sql)).await?;
        let wire = self.wire()?;
        let (pid, secret) = (wire.pid, wire.secret.clone());
        let (addr, pause) = (self.play.addr, self.dice.time_below(within));
        self.account.cancels += 1;
        let cancelling = spawn_local(async move {
            sleep(pause).await;
            cancel(addr, pid, &secret).await
        });
        let outcome = self.outcome().await;
        // The answer to a cancel is the end of its connection: after that nothing later is hit.
        let cancelled = cancelling.await.unwrap();
        let outcome = outcome?;
        if let Err(error) = cancelled {
            return wrong(format!("a cancel: {error}"));
        }
        self.account.cancelled += u64::from(outcome.sqlstate() == "57014");
        Ok(outcome)
    }

    /// Leaves in some way; whatever was open must be undone.
    async fn leave(&mut self) -> Done {
        self.account.disconnects += 1;
        let n = self.ledger_number();
        let row = format!("INSERT INTO public.ledger VALUES ({}, {n})", self.number);
        let lasting = format!("{row}; SELECT pg_sleep(0.05)");
        let whole = build::query(&lasting);
        match self.dice.below(7) {
            0 => self.note("terminate"),
            1 => {
                self.succeed("BEGIN").await?;
                self.succeed(&row).await?;
                self.note("terminate in a transaction");
            }
            2 => {
                self.succeed("BEGIN").await?;
                self.succeed(&row).await?;
                self.leave_abruptly();
                return Ok(());
            }
            3 => {
                self.succeed("BEGIN").await?;
                self.send(&lasting, &whole).await?;
                sleep(self.dice.time_below(Duration::from_millis(20))).await;
                self.leave_abruptly();
                return Ok(());
            }
            4 => {
                let half = self.dice.index(whole.len());
                self.send("half a message", &whole[..half]).await?;
                sleep(self.dice.time_below(Duration::from_millis(5))).await;
                self.leave_abruptly();
                return Ok(());
            }
            5 => {
                let half = unnamed(&lasting.replace(';', "--"), &[]);
                let half = &half[..self.dice.index(half.len() - 5)];
                self.send("half a batch", half).await?;
                drop(self.take_wire()?);
                return Ok(());
            }
            _ => {
                self.leave_abruptly();
                return Ok(());
            }
        }
        // An orderly goodbye may cross a FATAL; nothing of ours hangs on it.
        let _ = self.take_wire()?.terminate().await;
        Ok(())
    }
}
