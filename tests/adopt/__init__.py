"""`make adopt-test`: producers and examples with the real libraries, each in a fresh environment.

    python -m tests.adopt

tests/integration/test_producers.py makes the same checks with the packages of this environment.
"""
