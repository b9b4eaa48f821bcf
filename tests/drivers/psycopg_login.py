"""Logs in with each connection string given, by psycopg's own libpq, and says what became of it.

Usage: psycopg_login.py CONNINFO... Prints a line for each: "ok USER", or the SQLSTATE-less words of the refusal.
"""

import sys

import psycopg

for conninfo in sys.argv[1:]:
    try:
        with psycopg.connect(conninfo, connect_timeout=10) as conn:
            print("ok", conn.execute("SELECT current_user").fetchone()[0])
    except psycopg.OperationalError as error:
        print(" ".join(str(error).split()))
