// An application on Prisma with its driver adapter's defaults: argv is host, port, user and the application's name. Its
// schema is .ci/node/schema.prisma; .ci/deps makes the client.
const path = require('node:path');
const assert = require('node:assert');

const modules = process.env.NODE_PATH;
const { PrismaClient } = require(path.join(modules, '..', 'prisma-app'));
const { PrismaPg } = require('@prisma/adapter-pg');

const [host, port, user, me] = process.argv.slice(2);
const schema = `prisma_${me}`;
const adapter = new PrismaPg({ connectionString: `postgresql://${user}@${host}:${port}/${user}` }, { schema });
const prisma = new PrismaClient({ adapter });

async function main() {
  for (const statement of [
    `DROP SCHEMA IF EXISTS ${schema} CASCADE`,
    `CREATE SCHEMA ${schema}`,
    `CREATE TABLE ${schema}."Item" (id serial PRIMARY KEY, owner text NOT NULL, value jsonb)`,
    `CREATE TABLE ${schema}."Part" (id serial PRIMARY KEY, size int NOT NULL,
       "itemId" int NOT NULL REFERENCES ${schema}."Item")`,
  ]) await prisma.$executeRawUnsafe(statement);

  await Promise.all([0, 1, 2, 3].map(async (worker) => {
    for (let round = 0; round < 20; round++) {
      // Several statements in a transaction of Prisma's own, then one of the application's.
      const made = await prisma.item.create({
        data: { owner: me, value: { worker, round }, parts: { create: [{ size: 1 }, { size: 2 }] } },
        include: { parts: true },
      });
      assert.deepStrictEqual([made.owner, made.parts.length], [me, 2]);
      const seen = await prisma.$transaction(async (tx) => {
        await tx.part.create({ data: { size: 3, itemId: made.id } });
        return tx.item.findUnique({ where: { id: made.id }, include: { parts: { orderBy: { size: 'asc' } } } });
      });
      assert.deepStrictEqual(seen.value, { worker, round });
      assert.deepStrictEqual(seen.parts.map((part) => part.size), [1, 2, 3]);
      const [{ who }] = await prisma.$queryRaw`SELECT ${me}::text AS who`;
      assert.strictEqual(who, me);
    }
  }));
  assert.strictEqual(await prisma.item.count({ where: { owner: me } }), 80);
  const ids = (await prisma.item.findMany({ select: { id: true } })).map((item) => item.id);
  for (let n = 1; n < 40; n++) {
    const found = await prisma.item.findMany({ where: { id: { in: ids.slice(0, n) } } });
    assert.strictEqual(found.length, n);
  }
  // What fails takes its transaction with it.
  await assert.rejects(prisma.$transaction(async (tx) => {
    await tx.item.create({ data: { owner: 'nobody' } });
    await tx.part.create({ data: { size: 1, itemId: -1 } });
  }), (error) => error.code === 'P2003');
  assert.strictEqual(await prisma.item.count(), 80);
  const [first, second] = await prisma.$transaction([
    prisma.part.updateMany({ where: { size: 3 }, data: { size: { increment: 1 } } }),
    prisma.part.count({ where: { size: 4 } }),
  ], { isolationLevel: 'Serializable' });
  assert.deepStrictEqual([first.count, second], [80, 80]);
  await prisma.$executeRawUnsafe(`DROP SCHEMA ${schema} CASCADE`);
  await prisma.$disconnect();
  console.log('ok');
}

main().catch((error) => { console.error(error); process.exit(1); });
