"""An application on asyncpg with its defaults (statement cache, pool with reset): argv is host, port, user, name."""
import asyncio
import sys

import asyncpg

host, port, user, me = sys.argv[1:5]
zone = {"one": "Asia/Kolkata", "two": "Europe/Paris"}[me]


async def main():
    async with asyncpg.create_pool(
        host=host, port=int(port), user=user, database=user, min_size=2, max_size=4, server_settings={"TimeZone": zone}
    ) as pool:
        async with pool.acquire() as conn:
            await conn.execute(f"DROP TABLE IF EXISTS ap_{me}; CREATE TABLE ap_{me} (id serial PRIMARY KEY, v text, tags text[])")

        async def worker(number):
            for round in range(20):
                async with pool.acquire() as conn:
                    assert await conn.fetchval("SHOW TimeZone") == zone
                    await conn.execute("SET work_mem = '3MB'")
                    got = await conn.fetchrow("SELECT $1::int AS n, $2::text[] AS tags", number, [me, str(round)])
                    assert (got["n"], got["tags"]) == (number, [me, str(round)])
                    async with conn.transaction():
                        id = await conn.fetchval(
                            f"INSERT INTO ap_{me} (v, tags) VALUES ($1, $2) RETURNING id", f"{number} {round}", ["a"]
                        )
                        assert await conn.fetchval(f"SELECT v FROM ap_{me} WHERE id = $1", id) == f"{number} {round}"

        await asyncio.gather(*(worker(number) for number in range(4)))
        async with pool.acquire() as conn:
            # What the pool's reset undid.
            assert await conn.fetchval("SHOW work_mem") != "3MB"
            assert await conn.fetchval("SHOW TimeZone") == zone
            assert await conn.fetchval(f"SELECT count(*) FROM ap_{me}") == 80
            async with conn.transaction():
                seen = [row["id"] async for row in conn.cursor(f"SELECT id FROM ap_{me} ORDER BY id", prefetch=9)]
            assert len(seen) == 80
            # Types that it asks the catalog about.
            await conn.execute(f"CREATE TYPE mood_{me} AS ENUM ('sad', 'glad')")
            assert await conn.fetchval(f"SELECT $1::mood_{me}", "sad") == "sad"
            await conn.copy_records_to_table(f"ap_{me}", records=[("x", ["b"])], columns=["v", "tags"])
            for n in range(1, 40):
                marks = ", ".join(f"${i}" for i in range(1, n + 1))
                rows = await conn.fetch(f"SELECT id FROM ap_{me} WHERE id IN ({marks})", *range(1, n + 1))
                assert len(rows) == n
            try:
                await conn.fetchval("SELECT 1/$1::int", 0)
                raise AssertionError("no error")
            except asyncpg.DivisionByZeroError:
                pass
            heard = asyncio.Queue()
            hear = lambda *notice: heard.put_nowait(notice[3])  # noqa: E731
            await conn.add_listener(f"ap_{me}", hear)
            await conn.execute(f"NOTIFY ap_{me}, 'hello'")
            assert await asyncio.wait_for(heard.get(), 20) == "hello"
            await conn.remove_listener(f"ap_{me}", hear)
            await conn.execute(f"DROP TABLE ap_{me}; DROP TYPE mood_{me}")


asyncio.run(main())
print("ok")
