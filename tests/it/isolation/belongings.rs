//! What a client does with state that stays in a server connection, and what it must never find there of another's: whatever
//! is killed, cancelled or broken off meanwhile.

use std::time::{Duration, Instant};

use pgweir_harness::wire::{Message, build};
use tokio::time::sleep;

use super::actor::{Actor, Done, expect_rows, wrong};
use super::acts::Act;
use super::model::{Setting, roles};

/// What clients do with such state, and how often; ordinary acts in between make server connections change hands.
pub(crate) const BELONGINGS: &[(Act, usize)] = &[
    (Act::TemporaryTable, 4),
    (Act::AdvisoryLock, 4),
    (Act::Listen, 4),
    (Act::HeldCursor, 4),
    (Act::SqlPrepare, 4),
    (Act::Sequence, 4),
    (Act::DiscardAll, 1),
    (Act::Single, 10),
    (Act::Transaction, 5),
    (Act::Prepared, 5),
    (Act::Set, 5),
    (Act::Look, 5),
    (Act::LookAround, 120),
    (Act::Cancel, 1),
    (Act::Interrupted, 3),
    (Act::Vanish, 2),
    (Act::Leave, 1),
];

/// Counts the advisory locks of the server connection.
const LOCKS: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";

/// What of a client's is in its server connection, one thing at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Owned {
    #[default]
    Nothing,
    Table,
    Lock,
    Channel,
    Cursor,
    Plan,
}

impl Actor {
    /// Does one of these.
    pub(crate) async fn use_belonging(&mut self, act: Act) -> Done {
        match act {
            Act::TemporaryTable => self.temporary_table().await,
            Act::AdvisoryLock => self.advisory_lock().await,
            Act::Listen => self.listen().await,
            Act::HeldCursor => self.held_cursor().await,
            Act::SqlPrepare => self.sql_prepare().await,
            Act::Sequence => self.sequence().await,
            Act::DiscardAll => self.discard_all().await,
            Act::LookAround => self.look_around().await,
            Act::Interrupted => self.interrupted().await,
            Act::Vanish => self.vanish().await,
            other => wrong(format!("{other:?} is not of a server connection's state")),
        }
    }

    /// A few looks around, between which others may get the server connection.
    async fn pass_time(&mut self) -> Done {
        for _ in 0..self.dice.below(3) {
            self.look_around().await?;
            if self.dice.once_in(2) {
                sleep(self.dice.time_below(Duration::from_millis(2))).await;
            }
        }
        Ok(())
    }

    /// Many looks at once at what is in the server connection, each a statement: there is what is one's own, and nothing else.
    async fn look_around(&mut self) -> Done {
        let simple = self.dice.once_in(4);
        let mut bytes = Vec::new();
        let mut batches = vec![Vec::new()];
        for _ in 0..12 + self.dice.below(25) {
            let (sql, want) = self.one_look();
            if simple {
                bytes.extend(build::query(&sql));
            } else {
                bytes.extend([build::parse("", &sql, &[]), build::bind("", "", &[]), build::execute("", 0)].concat());
            }
            if let Some(batch) = batches.last_mut() {
                batch.push((sql, want));
            }
            if simple || self.dice.once_in(12) {
                if !simple {
                    bytes.extend(build::sync());
                }
                batches.push(Vec::new());
            }
        }
        if simple {
            batches.pop();
        } else {
            bytes.extend(build::sync());
        }
        self.send(format!("{} looks, simple: {simple}", batches.concat().len()), &bytes).await?;
        for batch in batches {
            let outcome = self.outcome_of(batch.len()).await?;
            let got = outcome.rows.iter().map(|row| row.first().and_then(Option::as_deref));
            if outcome.error.is_some() || !got.eq(batch.iter().map(|(_, want)| Some(want.as_str()))) {
                return wrong(format!("{:?}: {batch:?}, but {outcome:?}", self.owned));
            }
        }
        Ok(())
    }

    /// Something to look at, and what must be found: one value.
    fn one_look(&mut self) -> (String, String) {
        let has = |owned: Owned, this: Owned| u8::from(owned == this).to_string();
        let owned = self.owned;
        match self.dice.below(16) {
            0 | 1 => {
                let tag = self.tag();
                (format!("SELECT '{tag}'"), tag)
            }
            2 => ("SELECT session_user".to_owned(), self.play.name.clone()),
            3 => {
                let role = match self.model.value(Setting::Role) {
                    "" | "none" => self.play.name.clone(),
                    role => role.to_owned(),
                };
                ("SELECT current_user".to_owned(), role)
            }
            4 => ("SELECT name FROM place".to_owned(), self.model.schema().to_owned()),
            5 => ("SELECT count(*) FROM pg_prepared_statements WHERE from_sql".to_owned(), has(owned, Owned::Plan)),
            6 => ("SELECT count(*) FROM pg_cursors WHERE name = 'held'".to_owned(), has(owned, Owned::Cursor)),
            7 => ("SELECT (to_regclass('pg_temp.mine') IS NOT NULL)::int".to_owned(), has(owned, Owned::Table)),
            8 => (LOCKS.to_owned(), has(owned, Owned::Lock)),
            9 => ("SELECT count(*) FROM pg_listening_channels()".to_owned(), has(owned, Owned::Channel)),
            _ => {
                let setting = *self.dice.pick(&self.play.settings);
                if setting == Setting::ApplicationName {
                    return ("SELECT 1".to_owned(), "1".to_owned());
                }
                (format!("SELECT {}", setting.expression()), self.model.value(setting).to_owned())
            }
        }
    }

    /// What makes something, cancelled on the way: it is made or it is not, and the next client finds nothing of it.
    async fn interrupted(&mut self) -> Done {
        const LASTS: Duration = Duration::from_millis(12);
        let key = self.number;
        match self.dice.below(if self.is_plain { 2 } else { 3 }) {
            0 => {
                let sql = "CREATE TEMP TABLE mine AS SELECT 1 AS tag FROM pg_sleep(0.01)";
                let outcome = self.interrupt(sql, LASTS).await?;
                if outcome.error.is_none() {
                    self.owned = Owned::Table;
                    self.pass_time().await?;
                    self.succeed("DISCARD TEMP").await?;
                    self.owned = Owned::Nothing;
                } else if outcome.sqlstate() != "57014" {
                    return wrong(format!("{sql}: {outcome:?}"));
                }
            }
            1 => {
                let sql = format!("SELECT pg_try_advisory_lock({key}) FROM pg_sleep(0.01)");
                let outcome = self.interrupt(&sql, LASTS).await?;
                if outcome.error.is_some() && outcome.sqlstate() != "57014" {
                    return wrong(format!("{sql}: {outcome:?}"));
                }
                // No rollback takes it back: it may be held in either case.
                self.succeed("SELECT pg_advisory_unlock_all()").await?;
            }
            _ => {
                let value = format!("{}kB", 2000 + self.dice.below(900));
                let sql = format!("SELECT set_config('work_mem', '{value}', false) FROM pg_sleep(0.01)");
                let outcome = self.interrupt(&sql, LASTS).await?;
                if outcome.error.is_none() {
                    self.model.set(Setting::WorkMem, value, false);
                } else if outcome.sqlstate() != "57014" {
                    return wrong(format!("{sql}: {outcome:?}"));
                }
            }
        }
        self.look_around().await
    }

    /// Vanishes while something is made, or in the middle of a message about it.
    async fn vanish(&mut self) -> Done {
        self.account.disconnects += 1;
        let number = self.number;
        let making = match self.dice.below(8) {
            0 => "CREATE TEMP TABLE mine AS SELECT 1 AS tag".to_owned(),
            1 => format!("SELECT pg_try_advisory_lock({number})"),
            2 => format!("LISTEN channel{number}"),
            3 => "PREPARE plan AS SELECT 1".to_owned(),
            4 => "DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 100)".to_owned(),
            5 => format!("SET ROLE {}", roles(&self.play.name)[0]),
            6 => "SET work_mem = '2345kB'".to_owned(),
            _ => format!("SELECT nextval('public.sequence{number}')"),
        };
        let waits = "SELECT pg_sleep(0.01)";
        let mut bytes = match self.dice.below(3) {
            0 => build::query(&format!("{making}; {waits}")),
            1 => [build::query(&making), build::query(waits)].concat(),
            _ => [super::acts::unnamed(&making, &[]), super::acts::unnamed(waits, &[])].concat(),
        };
        if self.dice.once_in(3) {
            bytes.truncate(self.dice.index(bytes.len()));
        }
        self.send(format!("{making}, and away"), &bytes).await?;
        sleep(self.dice.time_below(Duration::from_millis(12))).await;
        self.leave_abruptly();
        Ok(())
    }

    async fn temporary_table(&mut self) -> Done {
        // A name that all clients use.
        self.expect("SELECT to_regclass('pg_temp.mine') IS NULL", "t").await?;
        let tag = self.tag();
        self.succeed(&format!("CREATE TEMP TABLE mine AS SELECT '{tag}'::text AS tag")).await?;
        self.owned = Owned::Table;
        self.pass_time().await?;
        self.expect("SELECT tag FROM mine", &tag).await?;
        self.pass_time().await?;
        match self.dice.below(4) {
            0 => self.leave_abruptly(),
            1 => {
                self.succeed("DISCARD TEMP").await?;
            }
            _ => {
                // Its owner may be a role that was given up since.
                self.expect("SELECT tag FROM pg_temp.mine", &tag).await?;
                self.succeed("DROP TABLE pg_temp.mine").await?;
            }
        }
        self.owned = Owned::Nothing;
        Ok(())
    }

    async fn advisory_lock(&mut self) -> Done {
        self.expect(LOCKS, "0").await?;
        // A key that nobody else uses, and that this client uses again.
        let key = self.number;
        let patience = Instant::now();
        loop {
            let outcome = self.succeed(&format!("SELECT pg_try_advisory_lock({key})")).await?;
            if outcome.value() == Some("t") {
                break;
            }
            // An earlier connection of this client's vanished with it.
            if patience.elapsed() > Duration::from_secs(20) {
                return wrong(format!("advisory lock {key} outlived the connection that took it"));
            }
            sleep(Duration::from_millis(10)).await;
        }
        self.owned = Owned::Lock;
        self.pass_time().await?;
        self.expect(LOCKS, "1").await?;
        self.pass_time().await?;
        match self.dice.below(4) {
            0 => {
                self.leave_abruptly();
                return Ok(());
            }
            1 => {
                self.succeed("SELECT pg_advisory_unlock_all()").await?;
            }
            _ => self.expect(&format!("SELECT pg_advisory_unlock({key})"), "t").await?,
        }
        self.owned = Owned::Nothing;
        self.expect(LOCKS, "0").await
    }

    async fn listen(&mut self) -> Done {
        let channel = format!("channel{}", self.number);
        self.warned = false;
        self.succeed(&format!("LISTEN {channel}")).await?;
        self.owned = Owned::Channel;
        self.pass_time().await?;
        let other = self.dice.below(64);
        let tag = self.tag();
        self.succeed(&format!("NOTIFY channel{other}, 'from {tag}'")).await?;
        let outcome = self.succeed("SELECT pg_listening_channels()").await?;
        let foreign = outcome.rows.iter().flatten().flatten().find(|found| **found != channel);
        if let Some(foreign) = foreign {
            return wrong(format!("the server connection listens to {foreign}"));
        }
        self.hear_oneself(&channel, &tag).await?;
        if self.dice.once_in(4) {
            self.leave_abruptly();
            return Ok(());
        }
        let unlisten = if self.dice.once_in(2) { "UNLISTEN *".to_owned() } else { format!("UNLISTEN {channel}") };
        self.succeed(&unlisten).await?;
        self.owned = Owned::Nothing;
        Ok(())
    }

    /// What it tells itself arrives; or, if the connection that listens was killed meanwhile, it was warned, and the next does.
    async fn hear_oneself(&mut self, channel: &str, tag: &str) -> Done {
        let notify = format!("SELECT pg_notify('{channel}', '{tag}')");
        let begun = Instant::now();
        let mut sent = Instant::now();
        let mut heard = self.hears(&notify, tag).await?;
        while !heard {
            if begun.elapsed() > Duration::from_secs(20) {
                let warned = self.warned;
                return wrong(format!("{tag} was not heard on {channel}; warned: {warned}"));
            }
            sleep(self.dice.time_below(Duration::from_millis(4))).await;
            let again = self.play.kills && self.warned && sent.elapsed() > Duration::from_millis(200);
            if again {
                sent = Instant::now();
            }
            heard = self.hears(if again { &notify } else { "SELECT 1" }, tag).await?;
        }
        Ok(())
    }

    /// Asks, and whether a notification with this payload came meanwhile.
    async fn hears(&mut self, sql: &str, tag: &str) -> Done<bool> {
        self.send(sql, &build::query(sql)).await?;
        let messages = self.receive_until(b'Z').await?;
        let outcome = self.outcome_in(&messages, 1)?;
        if outcome.error.is_some() {
            return wrong(format!("{sql}: {outcome:?}"));
        }
        Ok(messages.iter().filter_map(Message::notification).any(|(_, _, payload)| payload == tag))
    }

    async fn held_cursor(&mut self) -> Done {
        self.expect_error("FETCH 1 FROM held", "34000").await?;
        let tag = self.tag();
        self.succeed("BEGIN").await?;
        self.model.mark();
        self.succeed(&format!("DECLARE held CURSOR WITH HOLD FOR SELECT '{tag}.' || n FROM generate_series(1, 2) n"))
            .await?;
        self.succeed("COMMIT").await?;
        self.model.commit();
        self.owned = Owned::Cursor;
        self.pass_time().await?;
        self.expect("FETCH 1 FROM held", &format!("{tag}.1")).await?;
        self.pass_time().await?;
        self.expect("FETCH 1 FROM held", &format!("{tag}.2")).await?;
        match self.dice.below(4) {
            0 => self.leave_abruptly(),
            1 => drop(self.succeed("CLOSE ALL").await?),
            _ => drop(self.succeed("CLOSE held").await?),
        }
        self.owned = Owned::Nothing;
        Ok(())
    }

    async fn sql_prepare(&mut self) -> Done {
        self.expect_error("EXECUTE plan", "26000").await?;
        let tag = self.tag();
        self.succeed(&format!("PREPARE plan AS SELECT '{tag}'")).await?;
        self.owned = Owned::Plan;
        self.pass_time().await?;
        self.expect("EXECUTE plan", &tag).await?;
        self.pass_time().await?;
        self.expect("EXECUTE plan", &tag).await?;
        match self.dice.below(4) {
            0 => self.leave_abruptly(),
            1 => {
                self.succeed("DEALLOCATE ALL").await?;
                // It takes the protocol's statements with it.
                self.statements.clear();
            }
            _ => drop(self.succeed("DEALLOCATE plan").await?),
        }
        self.owned = Owned::Nothing;
        Ok(())
    }

    async fn sequence(&mut self) -> Done {
        let name = format!("public.sequence{}", self.number);
        if self.last_value.is_none() || self.dice.once_in(2) {
            let outcome = self.succeed(&format!("SELECT nextval('{name}')")).await?;
            let value: i64 = outcome.value().unwrap_or_default().parse().unwrap_or_default();
            let first = (i64::try_from(self.number).unwrap_or_default() + 1) * 1_000_000;
            if !(first..first + 1_000_000).contains(&value) {
                return wrong(format!("nextval: {outcome:?}"));
            }
            self.last_value = Some(value);
            self.pass_time().await?;
        }
        let sql =
            if self.dice.once_in(2) { "SELECT lastval()".to_owned() } else { format!("SELECT currval('{name}')") };
        let outcome = self.ask(&sql).await?;
        // `55000` when the server connection that served nextval is another's now: an error, never a stranger's value.
        if outcome.sqlstate() == "55000" {
            return Ok(());
        }
        expect_rows(&sql, &outcome, &[&self.last_value.unwrap_or_default().to_string()])
    }

    async fn discard_all(&mut self) -> Done {
        self.succeed("DISCARD ALL").await?;
        self.model.reset_all(true);
        self.statements.clear();
        self.last_value = None;
        Ok(())
    }
}
