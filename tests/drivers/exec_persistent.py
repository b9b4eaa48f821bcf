"""An application that asks all the time on four threads, opens what was lost anew, and outlives every failure: argv is for how
many seconds. Says how many queries worked and how many failed."""
import os
import sys
import threading
import time

import psycopg

until = time.monotonic() + float(sys.argv[1])
worked, failed = [0] * 4, [0] * 4


def work(me):
    connection = None
    while time.monotonic() < until:
        try:
            if connection is None or connection.closed:
                connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
            assert connection.execute("SELECT %s::int", (me,)).fetchone() == (me,)
            worked[me] += 1
        except psycopg.OperationalError:
            failed[me] += 1
            connection = None
        time.sleep(0.02)
    # The last word is a success, however often it takes.
    while True:
        try:
            with psycopg.connect(os.environ["DATABASE_URL"]) as last:
                last.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            time.sleep(0.1)


threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(worked), sum(failed))
