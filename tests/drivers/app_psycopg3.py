"""An application on psycopg 3 with its defaults: argv is the conninfo and the application's name."""
import sys

import psycopg

dsn, me = sys.argv[1], sys.argv[2]
zone = {"one": "Asia/Kolkata", "two": "Europe/Paris"}[me]

with psycopg.connect(dsn, autocommit=True, application_name=me) as conn:
    conn.execute(f"SET TIME ZONE '{zone}'")
    conn.execute(f"DROP TABLE IF EXISTS p3_{me}")
    conn.execute(f"CREATE TABLE p3_{me} (id serial PRIMARY KEY, v text)")
    for round in range(30):
        # Prepared by the driver at the fifth time; more texts than it keeps.
        row = conn.execute("SELECT %s::text, current_setting('TimeZone')", (me,)).fetchone()
        assert row == (me, zone), row
        for n in range(4):
            number = round * 4 + n
            for _ in range(6 if n == 0 else 1):
                assert conn.execute(f"SELECT %s::int + {number}", (1,)).fetchone() == (number + 1,)
        conn.execute(f"INSERT INTO p3_{me} (v) VALUES (%s)", (f"{me} {round}",))
    # A named cursor in a transaction, and one that outlives it.
    with conn.transaction(), conn.cursor(name="c") as cursor:
        cursor.execute(f"SELECT v FROM p3_{me} ORDER BY id")
        assert [row[0] for row in cursor] == [f"{me} {n}" for n in range(30)]
    with conn.cursor(name="h", withhold=True) as cursor:
        cursor.execute(f"SELECT id FROM p3_{me} ORDER BY id")
        assert cursor.fetchmany(3) == [(1,), (2,), (3,)]
        assert len(cursor.fetchall()) == 27
    # Notifications.
    channel = f"p3_{me}"
    conn.execute(f"LISTEN {channel}")
    conn.execute("SELECT pg_notify(%s, %s)", (channel, me))
    notify = next(conn.notifies(timeout=20, stop_after=1))
    assert (notify.channel, notify.payload) == (channel, me), notify
    conn.execute(f"UNLISTEN {channel}")
    # Savepoints and errors.
    with conn.transaction():
        try:
            with conn.transaction():
                conn.execute("SELECT 1/0")
        except psycopg.errors.DivisionByZero:
            pass
        assert conn.execute("SELECT current_setting('TimeZone')").fetchone() == (zone,)
    with conn.cursor() as cursor, cursor.copy(f"COPY p3_{me} (v) FROM STDIN") as copy:
        copy.write_row(("copied",))
    with conn.pipeline():
        rows = [conn.execute("SELECT %s::int", (n,)) for n in range(20)]
    assert [cursor.fetchone()[0] for cursor in rows] == list(range(20))
    conn.execute(f"DROP TABLE p3_{me}")
print("ok")
