//! What a client does with state that stays in a server connection, and what it must never find there of another's.

use std::time::{Duration, Instant};

use pgweir_harness::wire::Message;
use tokio::time::sleep;

use super::actor::{Actor, Done, expect_rows, wrong};
use super::acts::Act;

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
    (Act::Leave, 1),
];

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
            other => wrong(format!("{other:?} is not of a server connection's state")),
        }
    }

    /// A few ordinary queries, between which others may get the server connection.
    async fn pass_time(&mut self) -> Done {
        for _ in 0..self.dice.below(3) {
            let tag = self.tag();
            self.expect(&format!("SELECT '{tag}'"), &tag).await?;
            sleep(self.dice.time_below(Duration::from_millis(2))).await;
        }
        Ok(())
    }

    async fn temporary_table(&mut self) -> Done {
        // A name that all clients use.
        self.expect("SELECT to_regclass('pg_temp.mine') IS NULL", "t").await?;
        let tag = self.tag();
        self.succeed(&format!("CREATE TEMP TABLE mine AS SELECT '{tag}'::text AS tag")).await?;
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
        Ok(())
    }

    async fn advisory_lock(&mut self) -> Done {
        const HELD: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
        self.expect(HELD, "0").await?;
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
        self.pass_time().await?;
        self.expect(HELD, "1").await?;
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
        self.expect(HELD, "0").await
    }

    async fn listen(&mut self) -> Done {
        let channel = format!("channel{}", self.number);
        self.succeed(&format!("LISTEN {channel}")).await?;
        self.pass_time().await?;
        let other = self.dice.below(64);
        let tag = self.tag();
        self.succeed(&format!("NOTIFY channel{other}, 'from {tag}'")).await?;
        let outcome = self.succeed("SELECT pg_listening_channels()").await?;
        let foreign = outcome.rows.iter().flatten().flatten().find(|found| **found != channel);
        if let Some(foreign) = foreign {
            return wrong(format!("the server connection listens to {foreign}"));
        }
        // What it tells itself arrives.
        let mut messages = self.notify_self(&channel, &tag).await?;
        while !messages.iter().filter_map(Message::notification).any(|(_, _, payload)| payload == tag) {
            messages = self.receive_until(b'A').await?;
        }
        if self.dice.once_in(4) {
            self.leave_abruptly();
            return Ok(());
        }
        let unlisten = if self.dice.once_in(2) { "UNLISTEN *".to_owned() } else { format!("UNLISTEN {channel}") };
        self.succeed(&unlisten).await.map(|_| ())
    }

    async fn notify_self(&mut self, channel: &str, tag: &str) -> Done<Vec<Message>> {
        let sql = format!("SELECT pg_notify('{channel}', '{tag}')");
        self.send(&sql, &pgweir_harness::wire::build::query(&sql)).await?;
        let messages = self.receive_until(b'Z').await?;
        self.play.count();
        Ok(messages)
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
        self.pass_time().await?;
        self.expect("FETCH 1 FROM held", &format!("{tag}.1")).await?;
        self.pass_time().await?;
        self.expect("FETCH 1 FROM held", &format!("{tag}.2")).await?;
        match self.dice.below(4) {
            0 => {
                self.leave_abruptly();
                Ok(())
            }
            1 => self.succeed("CLOSE ALL").await.map(|_| ()),
            _ => self.succeed("CLOSE held").await.map(|_| ()),
        }
    }

    async fn sql_prepare(&mut self) -> Done {
        self.expect_error("EXECUTE plan", "26000").await?;
        let tag = self.tag();
        self.succeed(&format!("PREPARE plan AS SELECT '{tag}'")).await?;
        self.pass_time().await?;
        self.expect("EXECUTE plan", &tag).await?;
        self.pass_time().await?;
        self.expect("EXECUTE plan", &tag).await?;
        match self.dice.below(4) {
            0 => {
                self.leave_abruptly();
                Ok(())
            }
            1 => {
                self.succeed("DEALLOCATE ALL").await?;
                // It takes the protocol's statements with it.
                self.statements.clear();
                Ok(())
            }
            _ => self.succeed("DEALLOCATE plan").await.map(|_| ()),
        }
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
