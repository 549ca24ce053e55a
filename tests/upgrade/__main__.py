"""`make upgrade-test`: see docs/upgrade.md. Exit status 1 if anything was lost, happened twice or failed."""

import argparse
import asyncio
import random
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outwake.embedded.demo import make_repository
from outwake.embedded.postgres import EmbeddedPostgres
from tests.upgrade.check import Result, check
from tests.upgrade.code import RELEASED, Code, CodeError, NotInClone, install, install_shop, old_tree
from tests.upgrade.ground import Ground
from tests.upgrade.orders import Order, migrate_first, migrate_last, must_stop
from tests.upgrade.release import breaking_release, next_release, this_release

SETTINGS: dict[str, str | int] = {"fsync": "off", "max_connections": 300, "shared_buffers": "64MB"}
ORDERS: dict[str, Order] = {"migrate first": migrate_first, "migrate last": migrate_last}


class Run:
    """One run in a directory of its own."""

    def __init__(self, directory: Path, seed: int, seconds: float) -> None:
        self.results: list[Result] = []
        self._directory = directory
        self._seed = seed
        self._seconds = seconds
        self._server = EmbeddedPostgres(directory / "postgres", settings=SETTINGS)

    def install(self, given: str) -> tuple[Code, Code, Code, Code]:
        """The old code, this tree's, the next release's and a breaking one's. Raises CodeError."""
        began = time.monotonic()
        old_one = old_tree(given, self._directory)
        this_one = this_release(self._directory / "this-tree", old_one)
        trees = {
            "old": old_one,
            "this": this_one,
            "next": next_release(self._directory / "next-tree", this_one),
            "breaking": breaking_release(self._directory / "breaking-tree", this_one),
        }
        shop = install_shop(self._directory)
        with ThreadPoolExecutor(2) as pool:
            made = [pool.submit(install, name, tree, self._directory, shop) for name, tree in trees.items()]
            old, this, following, breaking = [future.result() for future in made]
        codes = ", ".join(map(str, (old, this, following, breaking)))
        print(f"{time.monotonic() - began:6.1f} s  installed: {codes}", flush=True)
        return old, this, following, breaking

    async def all(self, old: Code, this: Code, following: Code, breaking: Code) -> None:
        """Both orders side by side, from one version to the next; then what must stop."""
        repository = make_repository(self._directory / "repository")
        await asyncio.to_thread(self._server.start)
        try:
            for before, after in ((old, this), (this, following)):
                await asyncio.gather(*(self._order(name, before, after, repository) for name in ORDERS))
            await self._must_stop(this, breaking, repository)
        finally:
            await asyncio.to_thread(self._server.remove)

    async def _order(self, name: str, before: Code, after: Code, repository: Path) -> None:
        title = f"{before.name} to {after.name}, {name}"
        rnd = random.Random(f"{self._seed} {title}")
        ground = Ground(title, self._server, self._directory / title.replace(" ", "-"), repository, rnd)
        try:
            async with ground:
                await ORDERS[name](ground, before, after, self._seconds)
                await ground.stop_load()
                await ground.end()
                self.results.append(await check(ground))
        except Exception as error:
            self._failed(ground, error)

    async def _must_stop(self, old: Code, breaking: Code, repository: Path) -> None:
        title = f"{old.name} beside {breaking.name}"
        rnd = random.Random(f"{self._seed} {title}")
        ground = Ground(title, self._server, self._directory / "must-stop", repository, rnd)
        try:
            async with ground:
                await must_stop(ground, old, breaking)
                self.results.append(Result(title, wrong=ground.failures))
        except Exception as error:
            self._failed(ground, error)

    def _failed(self, ground: Ground, error: Exception) -> None:
        traceback.print_exception(error)
        text = f"{ground.title}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self.results.append(Result(ground.title, wrong=[*ground.failures, text]))


def report(results: Sequence[Result]) -> int:
    """Print what happened; return the exit status."""
    print(f"\n{'':32} {'rows':>6} {'sessions':>9} {'restarts':>9} {'rescued':>8} {'lost':>5} {'twice':>6}")
    for result in results:
        print(
            f"{result.title:32} {result.rows:6} {result.sessions:9} {result.restarts:9} {result.rescued:8}"
            f" {len(result.lost):5} {len(result.twice):6}"
        )
    warnings = sum((result.warnings for result in results), Counter[str]())
    print("warnings logged:", ", ".join(f"{event} {n}" for event, n in sorted(warnings.items())) or "none")
    faults = [fault for result in results for fault in result.faults]
    for text in faults[:40]:
        print(f"FAILED {text}")
    rows, restarts = sum(r.rows for r in results), sum(r.restarts for r in results)
    lost, twice = sum(len(r.lost) for r in results), sum(len(r.twice) for r in results)
    print(f"upgrade: {rows} rows {restarts} restarts {lost} lost {twice} twice")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.upgrade", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--old", help="a commit or a tree to upgrade from (the commit in tests/upgrade/released)"
    )
    parser.add_argument("--seconds", type=float, default=6, help="of load in each of the four orders (6)")
    parser.add_argument("--seed", type=int, help="default: a random one, which is printed")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the installed code")
    arguments = parser.parse_args()
    if arguments.old is None and not RELEASED.exists():
        parser.error("there is no tests/upgrade/released: name what to upgrade from by --old")
    old = arguments.old or RELEASED.read_text().strip()
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(10**6)
    print(f"upgrade: seed {seed}, from {old}, {arguments.seconds:.0f} s of load in each order", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="outwake-upgrade-"))
    try:
        run = Run(directory, seed, arguments.seconds)
        try:
            codes = run.install(old)
        except NotInClone as error:
            print(f"upgrade: skipped: {error}")
            return 0
        except CodeError as error:
            print(f"upgrade: {error}", file=sys.stderr)
            return 1
        asyncio.run(run.all(*codes))
        return report(run.results)
    finally:
        if arguments.keep:
            print(f"kept: {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
