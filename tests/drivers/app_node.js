// An application on node-postgres with its defaults, and with the startup parameters that it has options for: argv is host,
// port, user and the application's name.
const { Pool, Client } = require('pg');
const assert = require('node:assert');

const [host, port, user, me] = process.argv.slice(2);
const config = {
  host, port: Number(port), user, database: user, application_name: me,
  statement_timeout: me === 'one' ? 31000 : 32000, lock_timeout: 5000, idle_in_transaction_session_timeout: 60000,
  options: `-c search_path=node_${me},public`,
};

async function main() {
  const setup = new Client(config);
  await setup.connect();
  await setup.query(`DROP SCHEMA IF EXISTS node_${me} CASCADE; CREATE SCHEMA node_${me}; CREATE TABLE items (id serial PRIMARY KEY, v jsonb)`);
  const pool = new Pool(config);
  await Promise.all([0, 1, 2, 3].map(async (worker) => {
    for (let round = 0; round < 25; round++) {
      const shown = await pool.query("SELECT current_setting('statement_timeout') AS s, current_setting('search_path') AS p");
      assert.deepStrictEqual(shown.rows[0], { s: me === 'one' ? '31s' : '32s', p: `node_${me},public` });
      const named = await pool.query({ name: 'by-text', text: 'SELECT $1::text AS who, $2::int AS n', values: [me, round] });
      assert.deepStrictEqual(named.rows[0], { who: me, n: round });
      const client = await pool.connect();
      await client.query('BEGIN');
      const { rows } = await client.query({ name: 'insert', text: 'INSERT INTO items (v) VALUES ($1) RETURNING id', values: [{ worker, round }] });
      const back = await client.query({ name: 'back', text: 'SELECT v FROM items WHERE id = $1', values: [rows[0].id] });
      assert.deepStrictEqual(back.rows[0].v, { worker, round });
      await client.query('COMMIT');
      client.release();
    }
  }));
  for (let n = 1; n < 40; n++) {
    const marks = Array.from({ length: n }, (_, i) => `$${i + 1}`).join(', ');
    const { rowCount } = await pool.query(`SELECT id FROM items WHERE id IN (${marks})`, Array.from({ length: n }, (_, i) => i + 1));
    assert.strictEqual(rowCount, n);
  }
  await assert.rejects(pool.query('SELECT 1/$1::int', [0]), (error) => error.code === '22012');
  await setup.query(`SET TIME ZONE 'Asia/Kolkata'`);
  assert.strictEqual((await setup.query('SHOW TimeZone')).rows[0].TimeZone, 'Asia/Kolkata');
  const heard = new Promise((resolve) => setup.on('notification', resolve));
  await setup.query(`LISTEN node_${me}`);
  await setup.query(`NOTIFY node_${me}, 'hello'`);
  assert.strictEqual((await heard).payload, 'hello');
  await setup.query('UNLISTEN *');
  await setup.query(`DROP SCHEMA node_${me} CASCADE`);
  await pool.end();
  await setup.end();
  console.log('ok');
}

main().catch((error) => { console.error(error); process.exit(1); });
