"""The commands `outwake` and `worker`. If psycopg finds no libpq, they say so in one line.

outwake.cli reports which extra is missing.
"""

import sys


def main() -> None:
    """The command `outwake`."""
    _run(sys.argv[1:])


def worker() -> None:
    """The command `worker`: the same as `outwake worker`."""
    _run(["worker", *sys.argv[1:]])


def _run(words: list[str]) -> None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        command = words[0] if words and not words[0].startswith("-") else "outwake"
        extra = command if command in ("api", "worker") else "cli"
        print(f"outwake: the command {command} needs libpq: pip install 'outwake[{extra}]'", file=sys.stderr)
        sys.exit(2)
    from outwake.cli import main

    main(words)


if __name__ == "__main__":
    main()
