// `node shop.mjs ARTICLE` stores an order, and the mail that must follow it, in one transaction.
import pg from "pg";

const pool = new pg.Pool({ connectionString: process.env.SHOP_DATABASE_URL });

// The mail will be sent if the order is there, and only then.
async function order(article) {
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    await client.query("INSERT INTO shop_order (article) VALUES ($1)", [article]);
    const enqueue = "SELECT outwake.enqueue('email.send', $1, unique_key => $2, on_duplicate => 'keep') AS id";
    const { rows } = await client.query(enqueue, [{ article }, `mail:${article}`]);
    await client.query("COMMIT");
    return rows[0].id;
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  } finally {
    client.release();
  }
}

await pool.query("CREATE TABLE IF NOT EXISTS shop_order (id bigserial PRIMARY KEY, article text)");
console.log(await order(process.argv[2]));
await pool.end();
