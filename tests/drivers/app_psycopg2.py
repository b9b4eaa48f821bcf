"""An application on psycopg2 with its defaults: argv is the conninfo and the application's name."""
import select
import sys

import psycopg2
import psycopg2.extras

dsn, me = sys.argv[1], sys.argv[2]
style = {"one": "German", "two": "ISO, DMY"}[me]

conn = psycopg2.connect(dsn, application_name=me)
with conn, conn.cursor() as cursor:
    cursor.execute("SET SESSION statement_timeout = %s", ("31s" if me == "one" else "32s",))
    cursor.execute(f"DROP TABLE IF EXISTS p2_{me}")
    cursor.execute(f"CREATE TABLE p2_{me} (id serial PRIMARY KEY, v text)")
for round in range(40):
    with conn, conn.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone()[0] == ("31s" if me == "one" else "32s")
        cursor.execute(f"INSERT INTO p2_{me} (v) VALUES (%s) RETURNING id", (f"{me} {round}",))
        cursor.execute(f"SELECT v FROM p2_{me} WHERE id = %s", (cursor.fetchone()[0],))
        assert cursor.fetchone() == (f"{me} {round}",)
# Named cursors, in a transaction and beyond.
with conn, conn.cursor("c") as cursor:
    cursor.itersize = 7
    cursor.execute(f"SELECT v FROM p2_{me} ORDER BY id")
    assert [row[0] for row in cursor] == [f"{me} {n}" for n in range(40)]
cursor = conn.cursor("h", withhold=True)
cursor.execute(f"SELECT id FROM p2_{me} ORDER BY id")
assert cursor.fetchmany(2) == [(1,), (2,)]
conn.commit()
assert len(cursor.fetchall()) == 38
cursor.close()
conn.commit()
conn.set_session(isolation_level="SERIALIZABLE", readonly=True)
with conn, conn.cursor() as cursor:
    cursor.execute("SHOW transaction_isolation")
    assert cursor.fetchone() == ("serializable",)
conn.set_session(isolation_level="READ COMMITTED", readonly=False)
with conn, conn.cursor() as cursor:
    psycopg2.extras.execute_values(cursor, f"INSERT INTO p2_{me} (v) VALUES %s", [("x",), ("y",)])
    cursor.execute("SELECT 1/1; SELECT 2")
    assert cursor.fetchone() == (2,)
conn.autocommit = True
with conn.cursor() as cursor:
    cursor.execute(f"LISTEN p2_{me}; NOTIFY p2_{me}, 'hello'")
    while not conn.notifies:
        assert select.select([conn], [], [], 20)[0], "no notification"
        conn.poll()
    assert conn.notifies.pop().payload == "hello"
    cursor.execute("UNLISTEN *")
    try:
        cursor.execute("SELECT 1/0")
        raise AssertionError("no error")
    except psycopg2.errors.DivisionByZero as error:
        assert error.pgcode == "22012"
    cursor.execute(f"DROP TABLE p2_{me}")
conn.close()
print("ok")
