// As kinds.py, on a connection of node-postgres, by the SQL function outwake.enqueue.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

// Its package lies elsewhere: argv[2] is a file beside node_modules.
const pg = createRequire(pathToFileURL(process.argv[2]))("pg");
const types = { priority: "integer", max_attempts: "integer", available_at: "timestamptz", payload: "jsonb" };

const client = new pg.Client({ connectionString: process.env.SHOP_DATABASE_URL });
await client.connect();
for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  const answers = [];
  await client.query("BEGIN");
  await client.query("INSERT INTO shop_order (article) VALUES ('lamp')");
  for (const row of request.rows) {
    const names = Object.keys(row);
    const places = names.map((name, n) => `${name} => $${n + 1}::${types[name] ?? "text"}`);
    const values = names.map((name) => (name === "payload" ? JSON.stringify(row[name]) : row[name]));
    if (row.unique_key) await client.query("SAVEPOINT one"); // an error would end the transaction
    try {
      const { rows } = await client.query(`SELECT outwake.enqueue(${places}) AS id`, values);
      answers.push(Number(rows[0].id));
    } catch (error) {
      if (error.constraint !== "outbox_unique_key") throw error;
      await client.query("ROLLBACK TO one");
      answers.push({ duplicate_of: Number(error.message.match(/row (\d+)$/)[1]) });
    }
  }
  await client.query(request.commit ? "COMMIT" : "ROLLBACK");
  console.log(JSON.stringify({ answers, traceparent: null }));
}
await client.end();
