"""What Redash does with psycopg2: a connection of its own for each query, asynchronous, and a cancel request for a query that
is not wanted any more, whose connection is closed without waiting for its end.

Usage: redash_pattern.py CONNINFO. Ends with 0 and the line "ok", or with a traceback.
"""

import select
import sys
import threading
import time

import psycopg2
import psycopg2.extensions

CONNINFO = sys.argv[1]
WORKERS = 6
ROUNDS = 25

class Interrupted(Exception):
    pass


def wait(conn, limit=30.0, until=None):
    end = time.monotonic() + limit
    while True:
        state = conn.poll()
        if state == psycopg2.extensions.POLL_OK:
            return
        if until is not None and until():
            raise Interrupted
        if time.monotonic() > end:
            raise AssertionError("no answer in time")
        reads = [conn.fileno()] if state == psycopg2.extensions.POLL_READ else []
        writes = [conn.fileno()] if state == psycopg2.extensions.POLL_WRITE else []
        select.select(reads, writes, [], 0.02)


def run_query(sql, arguments=None, until=None):
    conn = psycopg2.connect(CONNINFO, async_=True)
    wait(conn)
    cursor = conn.cursor()
    try:
        cursor.execute(sql, arguments)
        wait(conn, until=until)
        return cursor.fetchall() if cursor.description is not None else None
    except Interrupted:
        conn.cancel()
        raise
    finally:
        conn.close()


def expect(error, sql):
    try:
        run_query(sql)
    except error:
        return
    raise AssertionError(f"{sql}: no {error.__name__}")


def work(number):
    for n in range(ROUNDS):
        rows = run_query(f"/* Username: w{number}, Query ID: {n} */ SELECT id, {n} FROM reported ORDER BY id")
        assert rows == [(id, n) for id in range(100)], rows
        assert run_query("SELECT current_setting('cluster_name')") != [("primary",)]
    # The list of tables beside the editor.
    tables = run_query("SELECT table_schema, table_name, column_name FROM information_schema.columns "
                       "WHERE table_schema NOT IN ('pg_catalog', 'information_schema')")
    assert ("public", "reported", "id") in tables, tables
    expect(psycopg2.errors.ReadOnlySqlTransaction, "INSERT INTO reported VALUES (1)")
    expect(psycopg2.errors.UndefinedTable, "SELECT * FROM not_there")
    expect(psycopg2.errors.SyntaxError, "SELEC 1")
    # Interrupted while it runs, again and again; what the others do goes on.
    for n in range(3):
        begun = time.monotonic()
        try:
            run_query(f"SELECT 'slow {number} {n}' FROM pg_sleep(120)", until=lambda: time.monotonic() > begun + 0.3)
        except Interrupted:
            pass
        else:
            raise AssertionError("it was not interrupted")
        assert run_query(f"SELECT 'quick {number}' FROM pg_sleep(0.1)") == [(f"quick {number}",)]


def main():
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # a thread's failure is to fail the program
            failures.append((number, repr(error)))

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit(f"{failures}")
    # Whoever asks for a standby gets one here, and nobody a primary.
    for wish in ("standby", "read-only", "prefer-standby"):
        psycopg2.connect(f"{CONNINFO} target_session_attrs={wish}").close()
    for wish in ("primary", "read-write"):
        try:
            psycopg2.connect(f"{CONNINFO} target_session_attrs={wish}")
        except psycopg2.OperationalError:
            pass
        else:
            raise AssertionError(f"{wish} was granted")
    print("ok")


main()
