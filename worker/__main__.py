"""`python -m outwake.worker` is the `worker` command."""

from outwake.worker.cli import main

main()
