"""psycopg 3 with its defaults, through a pool: what works against Postgres works here.

Usage: psycopg_defaults.py CONNINFO [POOL_MODE]. In statement mode it does what needs no transaction of several statements.
Ends with 0 and the line "ok", or with a traceback.
"""

import sys
import threading

import psycopg

CONNINFO = sys.argv[1]
POOL_MODE = sys.argv[2] if len(sys.argv) > 2 else "transaction"
CLIENTS = 6
ROUNDS = 30


def connect(**options):
    return psycopg.connect(CONNINFO, **options)


def prepared_statements(number):
    """The same query more than prepare_threshold (5) times, which prepares it under a name that all clients use."""
    with connect(autocommit=True) as conn:
        for n in range(ROUNDS):
            row = conn.execute("SELECT %s::text, %s::int", (f"client {number}", n)).fetchone()
            assert row == (f"client {number}", n), row
            row = conn.execute(f"SELECT 'constant {number}', %s::int", (n,)).fetchone()
            assert row == (f"constant {number}", n), row


def transactions(number):
    with connect() as conn:
        for n in range(ROUNDS):
            with conn.transaction():
                conn.execute("INSERT INTO driver_rows VALUES (%s, %s)", (number, n))
                try:
                    with conn.transaction():
                        conn.execute("INSERT INTO driver_rows VALUES (%s, %s)", (number, 1000 + n))
                        conn.execute("SELECT 1/0")
                except psycopg.errors.DivisionByZero:
                    pass
            if n % 3 == 0:
                conn.execute("INSERT INTO driver_rows VALUES (%s, %s)", (number, 2000 + n))
                conn.rollback()
        count = conn.execute("SELECT count(*) FROM driver_rows WHERE client = %s", (number,)).fetchone()[0]
        assert count == ROUNDS, count


def pipelines(number):
    with connect(autocommit=True) as conn:
        for n in range(ROUNDS):
            with conn.pipeline():
                cursors = [conn.execute("SELECT %s::int + %s::int", (number, m)) for m in range(20)]
                got = [cursor.fetchone()[0] for cursor in cursors]
            assert got == [number + m for m in range(20)], got
        # An error in the middle: what comes after it in the pipeline is aborted, and the next pipeline works.
        try:
            with conn.pipeline():
                first = conn.execute("SELECT 1")
                conn.execute("SELECT 1/0")
                conn.execute("SELECT 2")
                first.fetchone()
        except (psycopg.errors.DivisionByZero, psycopg.errors.PipelineAborted):
            pass
        else:
            raise AssertionError("the error was lost")
        assert conn.execute("SELECT 3").fetchone() == (3,)


def copies(number):
    with connect() as conn:
        rows = [(number, n, f"text {n}\twith a tab") for n in range(5000)]
        with conn.cursor() as cursor:
            with cursor.copy("COPY driver_copy FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        conn.commit()
        with conn.cursor() as cursor:
            query = "COPY (SELECT * FROM driver_copy WHERE client = %s ORDER BY n) TO STDOUT"
            with cursor.copy(query, (number,)) as copy:
                copy.set_types(["int4", "int4", "text"])
                got = list(copy.rows())
        assert got == rows
        # An error on the client's side sends CopyFail.
        try:
            with conn.cursor() as cursor:
                with cursor.copy("COPY driver_copy FROM STDIN") as copy:
                    copy.write_row((number, -1, "never"))
                    raise KeyError("changed my mind")
        except KeyError:
            conn.rollback()
        count = conn.execute("SELECT count(*) FROM driver_copy WHERE client = %s AND n < 0", (number,)).fetchone()[0]
        assert count == 0, count


def server_side_cursors(number):
    with connect() as conn:
        for _ in range(3):
            with conn.cursor(name="driver_cursor") as cursor:
                cursor.itersize = 50
                cursor.execute("SELECT %s::int * 1000 + n FROM generate_series(0, 499) n", (number,))
                assert [row[0] for row in cursor] == [number * 1000 + n for n in range(500)]
            conn.commit()


def types_and_errors(number):
    with connect(autocommit=True) as conn:
        values = (number, 1.5, "text", b"\x00\x01\xff", True, None, [1, 2, 3])
        for binary in (False, True):
            with conn.cursor(binary=binary) as cursor:
                sql = "SELECT %s::int8, %s::float8, %s::text, %s::bytea, %s::bool, %s::text, %s::int4[]"
                assert cursor.execute(sql, values).fetchone() == values
        for sql, error in (
            ("SELEC 1", psycopg.errors.SyntaxError),
            ("SELECT * FROM no_such_table", psycopg.errors.UndefinedTable),
            ("INSERT INTO driver_unique VALUES (1)", psycopg.errors.UniqueViolation),
        ):
            try:
                conn.execute(sql)
            except error as caught:
                assert caught.diag.severity_nonlocalized == "ERROR"
            else:
                raise AssertionError(f"no {error.__name__}")
        assert conn.info.parameter_status("server_version")
        assert conn.info.encoding == "utf-8"


def cancels(number):
    with connect(autocommit=True) as conn:
        timer = threading.Timer(0.1, conn.cancel)
        timer.start()
        try:
            conn.execute("SELECT pg_sleep(30)")
        except psycopg.errors.QueryCanceled:
            pass
        else:
            raise AssertionError("the cancel was lost")
        timer.join()
        assert conn.execute("SELECT 'on'").fetchone() == ("on",)


def main():
    failures = []

    def guarded(work, number):
        try:
            work(number)
        except BaseException as error:  # a thread's failure is to fail the program
            failures.append((work.__name__, number, repr(error)))

    everything = [
        prepared_statements,
        transactions,
        pipelines,
        copies,
        server_side_cursors,
        types_and_errors,
        cancels,
    ]
    begins = {transactions, copies, server_side_cursors}
    for work in everything:
        if POOL_MODE == "statement" and work in begins:
            continue
        threads = [threading.Thread(target=guarded, args=(work, number)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        sys.exit(f"{failures}")
    print("ok")


main()
