"""The settings of a database session that our connections set, whatever the role or the database has.

A role, a database and a server can each have settings that change what a query means or how its result is
written. The code relies on those below, so each connection that runs only our own queries sets all of them,
in its startup packet. docs/database-settings.md has the settings that we leave alone, and why.

A connection that a handler of yours shares sets only what drivers and our own statements need (SHARED). Its
search_path, time zone, isolation and timeouts are yours.
"""

SHARED = {
    # psycopg reads no other forms.
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    # They change what a literal means, or end the connection at its first error.
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "exit_on_error": "off",
    # A job ends its row on such a connection.
    "default_transaction_read_only": "off",
    "row_security": "on",
    # Before PostgreSQL 18 a disabled scan that is the only possible plan has a very high cost, so each call
    # would be compiled (sql/outbox/functions/claim.sql).
    "jit": "off",
}

OWN = {
    **SHARED,
    # Our queries name the schema. Others may define functions in public that fit a query better.
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    # The handshake and the claim read in a new snapshot for each statement.
    "default_transaction_isolation": "read\\ committed",
    "default_transaction_deferrable": "off",
    # A LISTEN connection is idle for hours, and a migration takes its time. The API sets bounds of its own.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    # Writing `= NULL`, and the quotes that quote_ident writes.
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # Plans. What a query must not use, its function or its connection turns off after these.
    "plan_cache_mode": "auto",
    "from_collapse_limit": "8",
    "join_collapse_limit": "8",
    **dict.fromkeys(
        (
            "enable_bitmapscan",
            "enable_hashagg",
            "enable_hashjoin",
            "enable_incremental_sort",
            "enable_indexonlyscan",
            "enable_indexscan",
            "enable_material",
            "enable_memoize",
            "enable_mergejoin",
            "enable_nestloop",
            "enable_seqscan",
            "enable_sort",
            "enable_tidscan",
        ),
        "on",
    ),
}

SINCE_17 = {"transaction_timeout": "0"}
"""An older server refuses a startup packet that names it. So it is set when the connection is open."""

REPORTED = ("DateStyle", "IntervalStyle", "TimeZone", "standard_conforming_strings")
"""The server reports these when the connection opens, and they are set once more if they differ. libpq's own
variables (PGDATESTYLE, PGTZ) win over the options of the startup packet. A pooler takes no options, but keeps
these for each client."""


def startup(settings: dict[str, str]) -> str:
    """The settings in the form of libpq's `options`."""
    return " ".join(f"-c {name}={value}" for name, value in settings.items())
