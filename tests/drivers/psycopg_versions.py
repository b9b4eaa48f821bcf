"""psycopg, whose libpq is of version 18, with a protocol version of its choice: it logs in, asks, cancels, and goes on.

Usage: psycopg_versions.py CONNINFO. Prints the version spoken, such as 3.2.
"""

import sys
import threading

import psycopg

with psycopg.connect(sys.argv[1], autocommit=True) as conn:
    assert conn.execute("SELECT %s::int + 1", (41,)).fetchone() == (42,)
    for _ in range(3):
        timer = threading.Timer(0.3, lambda: conn.cancel_safe(timeout=10))
        timer.start()
        try:
            conn.execute("SELECT pg_sleep(60)")
            sys.exit("was not cancelled")
        except psycopg.errors.QueryCanceled:
            pass
        timer.join()
    assert conn.execute("SELECT 'alive'").fetchone() == ("alive",)
    full = conn.pgconn.full_protocol_version
    print(f"{full // 10000}.{full % 10000}")
