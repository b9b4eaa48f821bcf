"""psycopg 3 with its defaults where reads go to followers: each reads what it has written, prepared or not.

Usage: psycopg_routing.py CONNINFO. Ends with 0 and the line "ok", or with a traceback.
"""

import sys
import threading
import time

import psycopg

CONNINFO = sys.argv[1]
CLIENTS = 4
ROUNDS = 40


def work(number):
    read = "SELECT n FROM routed WHERE id = %s /* psycopg reads */"
    with psycopg.connect(CONNINFO, autocommit=True) as conn:
        # More than prepare_threshold (5) of each: prepared, under names that all clients use.
        for n in range(ROUNDS):
            conn.execute("UPDATE routed SET n = %s WHERE id = %s /* psycopg writes */", (n, number))
            # On the primary first, on a follower when it has caught up.
            for _ in range(4):
                assert conn.execute(read, (number,)).fetchone() == (n,)
                time.sleep(0.005)
        for _ in range(ROUNDS):
            assert conn.execute(read, (number,)).fetchone() == (ROUNDS - 1,)
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone()[0] >= 2
        with conn.pipeline():
            cursors = [conn.execute(read, (number,)) for _ in range(20)]
            assert [cursor.fetchone()[0] for cursor in cursors] == [ROUNDS - 1] * 20
        # Several results of one text.
        cursor = conn.execute(f"SELECT n FROM routed WHERE id = {number}; SELECT 'second'")
        assert cursor.fetchone() == (ROUNDS - 1,)
        assert cursor.nextset() and cursor.fetchone() == ("second",)
    with psycopg.connect(CONNINFO) as conn:
        conn.read_only = True
        for _ in range(ROUNDS):
            assert conn.execute(read, (number,)).fetchone() == (ROUNDS - 1,)
            with conn.cursor(name="rows") as cursor:
                cursor.execute("SELECT id FROM routed ORDER BY id")
                assert [row[0] for row in cursor] == list(range(CLIENTS))
            try:
                conn.execute("UPDATE routed SET n = 0")
            except psycopg.errors.ReadOnlySqlTransaction:
                conn.rollback()
            else:
                raise AssertionError("it wrote")


def main():
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # a thread's failure is to fail the program
            failures.append((number, repr(error)))

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        sys.exit(f"{failures}")
    print("ok")


main()
