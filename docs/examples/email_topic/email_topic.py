"""A topic of one's own: see docs/outbox.md."""

from outwake import Handler, Job, Permanent


async def send(job: Job) -> None:
    """Record the mail as sent, in the commit that ends the row."""
    article = job.payload.get("article")
    if article is None:
        raise Permanent("no article")
    async with job.transaction() as conn:
        await conn.execute("INSERT INTO sent (row_id, article) VALUES (%s, %s)", (job.row.id, article))
        await job.complete(conn)


handler = Handler("email.send", send)
