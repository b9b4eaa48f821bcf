"""An application that finishes its work when it is asked to end: five transactions, each on a connection of its own. Ends with 6;
argv is the table. Asked again, it goes on."""
import os
import signal
import sys
import time

import psycopg

asked = 0


def ask(_number, _frame):
    global asked
    asked += 1


signal.signal(signal.SIGTERM, ask)
print("ready", flush=True)
while not asked:
    time.sleep(0.02)
for number in range(5):
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        connection.execute("SELECT pg_sleep(0.2)")
        connection.execute(f"INSERT INTO {sys.argv[1]} VALUES (%s)", (number,))
print("asked", asked, flush=True)
sys.exit(6)
