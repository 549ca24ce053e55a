"""In which order the processes of two versions and the migration follow each other."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.support.process import running
from tests.upgrade.code import Code
from tests.upgrade.ground import Ground
from tests.upgrade.release import numbers

Order = Callable[[Ground, Code, Code, float], Awaitable[None]]


async def migrate_first(ground: Ground, old: Code, new: Code, seconds: float) -> None:
    """The usual one: the schema, then the API, then the workers. Then all of it back, and forth again."""
    stretch = seconds / 6
    await ground.migrate(old)
    await ground.prepare()
    old_worker, old_api = await asyncio.gather(ground.start("worker", old), ground.start("api", old))
    await ground.start_load(old, new)
    await ground.work(stretch)

    await ground.migrate(new)
    for part in (old_worker, old_api):
        await ground.readiness(part, fit(old, new))
    await ground.work(stretch)
    await ground.roll_call()  # an old worker alone, on the new schema

    new_api = await ground.replace("api", new)
    await ground.readiness(new_api, "current")
    new_worker = await ground.replace("worker", new)
    await ground.readiness(new_worker, "current")
    await ground.work(stretch)
    await ground.roll_call()  # side by side
    await ground.kill(new_worker)
    new_worker = await ground.replace("worker", new)
    await ground.leave(old_worker, old_api)
    ground.say("the old code has left")
    await ground.work(stretch)

    old_worker, old_api = await asyncio.gather(ground.replace("worker", old), ground.replace("api", old))
    await ground.leave(new_worker, new_api)
    ground.say("rolled back: the old code on the new schema")
    for part in (old_worker, old_api):
        await ground.readiness(part, fit(old, new))
    await ground.migrate(old)  # a replica's start may do so: it must change nothing
    await ground.readiness(old_api, fit(old, new))
    await ground.work(stretch)
    await ground.roll_call()

    new_worker, new_api = await asyncio.gather(ground.replace("worker", new), ground.replace("api", new))
    await ground.leave(old_worker, old_api)
    ground.say("the new code again")
    await ground.readiness(new_api, "current")
    await ground.work(stretch)


async def migrate_last(ground: Ground, old: Code, new: Code, seconds: float) -> None:
    """New code on the schema of the version before, until somebody migrates."""
    stretch = seconds / 4
    await ground.migrate(old)
    await ground.prepare()
    old_worker, old_api = await asyncio.gather(ground.start("worker", old), ground.start("api", old))
    await ground.start_load(old, new)
    await ground.work(stretch)

    new_worker = await ground.replace("worker", new)
    await ground.readiness(new_worker, fit(new, old))
    await ground.work(stretch)
    await ground.roll_call()  # side by side, and the API is old
    await ground.kill(old_worker)

    new_api = await ground.replace("api", new)
    await ground.readiness(new_api, fit(new, old))
    await ground.leave(old_api)
    ground.say("the old code has left; the schema is still its")
    await ground.work(stretch)
    await ground.roll_call()  # a new worker alone, on the old schema

    await ground.migrate(new)
    for part in (new_worker, new_api):
        await ground.readiness(part, "current")
    await ground.work(stretch)
    await ground.roll_call()


async def must_stop(ground: Ground, old: Code, breaking: Code) -> None:
    """A release beside which older code must stop: the older code says so, wherever it meets the schema."""
    await ground.migrate(old)
    worker, api = await asyncio.gather(ground.start("worker", old), ground.start("api", old))
    await ground.migrate(breaking)
    answer = await ground.ask(api, "/readyz", 503)
    if breaking.version not in str(answer.get("detail")):
        ground.fail(f"{api.name} is not ready and does not say why: {answer}")
    for words in (["worker"], ["outwake", "migrate"]):
        async with running(old.command(words[0]), *words[1:], env=ground.environment(old)) as refused:
            status = await refused.ended()
        lines = [*refused.stdout, *(line for line in refused.stderr if not line.startswith("{"))]
        if status != 2 or len(lines) != 1 or "upgrade outwake" not in lines[0]:
            ground.fail(f"{' '.join(words)} of {old} ended with status {status} and wrote {lines}")
    status = await worker.process.ended()
    last = worker.process.stderr[-1]
    if status != 2 or "upgrade outwake" not in last:
        ground.fail(f"{worker.name}, which ran meanwhile, ended with status {status} and wrote {last}")
    ground.say(f"{old} said: {last}")
    ground.parts.clear()


def fit(code: Code, schema_of: Code) -> str:
    """What `code` has to say of the schema that `schema_of` made, as outwake/_migrate.py has it."""
    ours, theirs = _files(code), _files(schema_of)
    unknown = theirs.keys() - ours.keys()
    changed = {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]}
    later = numbers(schema_of.version) > numbers(code.version)
    if any("/functions/" not in name for name in unknown) or (later and (changed or unknown)):
        return "newer"
    return "older" if changed or ours.keys() - theirs.keys() else "current"


def _files(code: Code) -> dict[str, str]:
    """The SQL files of a version, by name, with their hashes."""
    root = code.directory / "outwake" / "sql"
    return {str(path.relative_to(root)): _hash(path) for path in root.rglob("*.sql")}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
