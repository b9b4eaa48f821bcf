//! An application on sqlx with its defaults: migrations under an advisory lock, its cache of prepared statements, streams,
//! savepoints, COPY, a listener.

use futures_util::TryStreamExt;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgListener, PgPool, PgPoolCopyExt, PgPoolOptions};
use sqlx::{Acquire, Connection, Executor, Row};

use super::stage_of_two;

type Result<T = ()> = std::result::Result<T, sqlx::Error>;

const TABLE: &str = "CREATE TABLE items (id bigserial PRIMARY KEY, owner text NOT NULL, tags text[] NOT NULL);";
const INDEX: &str = "CREATE INDEX ON items (owner);";

/// Two migrations, read from files as an application's are.
async fn migrate(pool: &PgPool) -> Result {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("1_items.sql"), TABLE)?;
    std::fs::write(folder.path().join("2_index.sql"), INDEX)?;
    let migrator = Migrator::new(folder.path()).await?;
    // All its processes do this when they start.
    let (one, two) = tokio::join!(migrator.run(pool), migrator.run(pool));
    one.and(two).map_err(sqlx::Error::from)
}

/// Statements that come often, ever new ones, and one whose table is altered.
async fn work(pool: &PgPool, me: &str) -> Result {
    for round in 0..30_i64 {
        let tags = vec![me.to_owned(), round.to_string()];
        let insert = sqlx::query("INSERT INTO items (owner, tags) VALUES ($1, $2) RETURNING id");
        let id: i64 = insert.bind(me).bind(&tags).fetch_one(pool).await?.get("id");
        let back = sqlx::query("SELECT tags, current_setting('search_path') AS path FROM items WHERE id = $1");
        let row = back.bind(id).fetch_one(pool).await?;
        assert_eq!(row.get::<Vec<String>, _>("tags"), tags);
        assert_eq!(row.get::<String, _>("path"), format!("sqlx_{me}"));
        for n in 0..5 {
            let text = format!("SELECT $1::int8 + {}", round * 5 + n);
            assert_eq!(sqlx::query_scalar::<_, i64>(&text).bind(1_i64).fetch_one(pool).await?, round * 5 + n + 1);
        }
    }
    let mut rows = sqlx::query_scalar::<_, i64>("SELECT id FROM items ORDER BY id").fetch(pool);
    let mut seen = 0;
    while let Some(id) = rows.try_next().await? {
        seen += 1;
        assert_eq!(id, seen);
    }
    assert_eq!(seen, 30);
    Ok(())
}

/// A savepoint goes, its transaction stays; one that is dropped is rolled back.
async fn transact(pool: &PgPool) -> Result {
    let mut outer = pool.begin().await?;
    sqlx::query("DELETE FROM items WHERE id = 1").execute(&mut *outer).await?;
    let mut inner = outer.begin().await?;
    let error = sqlx::query("SELECT 1 / $1::int4").bind(0).execute(&mut *inner).await.unwrap_err();
    assert_eq!(error.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref(), Some("22012"));
    inner.rollback().await?;
    outer.commit().await?;
    let mut dropped = pool.begin().await?;
    sqlx::query("DELETE FROM items").execute(&mut *dropped).await?;
    drop(dropped);
    assert_eq!(sqlx::query_scalar::<_, i64>("SELECT count(*) FROM items").fetch_one(pool).await?, 29);
    Ok(())
}

/// A table altered under a statement of the cache: its next execution is right, or says that the plan has changed, once.
async fn alter(pool: &PgPool) -> Result {
    let mut connection = pool.acquire().await?;
    let all = "SELECT * FROM items WHERE id = 2";
    assert_eq!(sqlx::query(all).fetch_one(&mut *connection).await?.len(), 3);
    connection.execute("ALTER TABLE items ADD COLUMN more int8 DEFAULT 7").await?;
    let again = match sqlx::query(all).fetch_one(&mut *connection).await {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("0A000") => {
            connection.clear_cached_statements().await?;
            sqlx::query(all).fetch_one(&mut *connection).await?
        }
        other => other?,
    };
    if again.len() == 4 {
        assert_eq!(again.get::<i64, _>("more"), 7);
    }
    Ok(())
}

async fn copy(pool: &PgPool, me: &str) -> Result {
    let mut sink = pool.copy_in_raw("COPY items (owner, tags) FROM STDIN").await?;
    for _ in 0..100 {
        sink.send(format!("{me}\t{{copied}}\n").into_bytes()).await?;
    }
    assert_eq!(sink.finish().await?, 100);
    Ok(())
}

async fn listen(pool: &PgPool, me: &str) -> Result {
    let channel = format!("sqlx_{me}");
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen(&channel).await?;
    sqlx::query("SELECT pg_notify($1, $2)").bind(&channel).bind("hello").execute(pool).await?;
    let heard = listener.recv().await?;
    assert_eq!((heard.channel(), heard.payload()), (&*channel, "hello"));
    listener.unlisten_all().await
}

async fn application(url: String, me: &str) -> Result {
    let schema = format!("sqlx_{me}");
    let mut setup = sqlx::PgConnection::connect(&url).await?;
    setup.execute(&*format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")).await?;
    let url = format!("{url}?options=-c%20search_path%3D{schema}&application_name={me}");
    let pool = PgPoolOptions::new().max_connections(4).connect(&url).await?;
    migrate(&pool).await?;
    work(&pool, me).await?;
    transact(&pool).await?;
    alter(&pool).await?;
    copy(&pool, me).await?;
    listen(&pool, me).await?;
    pool.close().await;
    setup.execute(&*format!("DROP SCHEMA {schema} CASCADE")).await?;
    setup.close().await
}

#[tokio::test]
async fn sqlx_migrates_under_a_lock_caches_statements_and_listens() {
    let stage = stage_of_two();
    let watch = stage.place.cap_watch(2);
    let url = format!("postgres://{0}@{1}/{0}", stage.name(), stage.addr());
    let (one, two) = tokio::join!(application(url.clone(), "one"), application(url, "two"));
    one.unwrap();
    two.unwrap();
    assert!(watch.finish() > 0);
}
