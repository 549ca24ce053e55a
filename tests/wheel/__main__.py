"""Builds, tries, and prints how many checks were made."""

import sys
import tempfile
from pathlib import Path

from tests.wheel import beside, build, extras, rows, typed
from tests.wheel.application import Application
from tests.wheel.environment import fill_house
from tests.wheel.report import Report


def main() -> None:
    """Run all. Exit status 1 if a check failed."""
    report = Report()
    with tempfile.TemporaryDirectory(prefix="outwake-wheel-") as name:
        directory = Path(name)
        report.begin("building, and fetching the wheels of others (once)")
        built = build.build(directory)
        fill_house()
        build.check(built, report)
        extras.check(built, directory, report)
        typed.check(built, directory, report)
        application = Application(directory / "shop")
        rows.check(built, application, directory, report)
        beside.check(built, application, directory, report)
    print(report)
    sys.exit(report.failed > 0)


if __name__ == "__main__":
    main()
