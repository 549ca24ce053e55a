"""`make wheel-test`: what is built, installed into fresh environments and tried there.

    python -m tests.wheel

The packages of others are fetched once, into .state/wheelhouse. No environment of the caller's is used.
"""
