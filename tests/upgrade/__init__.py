"""`make upgrade-test`: the code of two versions side by side on one database (docs/upgrade.md).

    python -m tests.upgrade --old COMMIT_OR_TREE --seconds 20 --seed 7

1. Each code is built and installed as the wheel it is, into a directory of its own (code.py): the released
   commit, this tree, and a next release that is made up from this tree (release.py).
2. From each code to the next one: migrate first, then migrate last (orders.py), with producers and sessions
   at work (ground.py, sessions.py, shop/), one worker killed, and a worker alone at some time.
3. Every row has to end once (check.py). Last, a made-up release beside which older code must stop.
"""
