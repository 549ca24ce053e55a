"""One name for the schema, and every query names it.

Our connections do not rely on search_path: where others may create objects, a name without its schema can be
theirs. Nor may a query depend on how many columns a table has: a newer version's migration adds some.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outwake import schema
from outwake.embedded.demo import SEED_QUERY
from outwake.errors import ConfigurationError
from outwake.schema import LOCKS, Schema
from tests.support.process import ROOT

FOLDERS = ("outwake", "app", "worker", "embedded")
FOR_PEOPLE = {SEED_QUERY}
"""What is typed into psql, where the database's search_path names the schema."""


# The name and what derives from it


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("SELECT :schema.outbox_wake()", "SELECT shop_jobs.outbox_wake()"),
        ("NOTIFY :schema_wake", "NOTIFY shop_jobs_wake"),
        ("set_config(':schema.named', 'yes')", "set_config('shop_jobs.named', 'yes')"),
        ("pg_try_advisory_lock(:lock_key, 1)", f"pg_try_advisory_lock({Schema('shop_jobs').lock('key')}, 1)"),
        ("SELECT x::text, y::schema, %(schema)s, a[1:2]", "SELECT x::text, y::schema, %(schema)s, a[1:2]"),
    ],
)
def test_placeholders_are_filled_in_and_casts_left_alone(text: str, filled: str) -> None:
    assert Schema("shop_jobs").sql(text) == filled


@pytest.mark.parametrize("name", ["outwake", "_jobs", "shop_jobs2", "a" * 40])
def test_name_that_need_not_be_quoted(name: str) -> None:
    assert Schema(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *("", "Outwake", "2jobs", "shop-jobs", "shop jobs", 'shop"', "jobs\n", "a" * 41, "jöbs"),
        *("public", "pg_jobs", "information_schema"),
    ],
)
def test_other_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Schema(name)
    assert str(refused.value).startswith("OUTWAKE_SCHEMA: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("given", "name"), [(None, "outwake"), ("", "outwake"), ("shop_jobs", "shop_jobs")])
def test_environment_names_it(given: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTWAKE_SCHEMA", raising=False)
    if given is not None:
        monkeypatch.setenv("OUTWAKE_SCHEMA", given)
    assert schema._configured().name == name


def test_import_does_not_fail_on_a_bad_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` says it in one line, an import would with a traceback. No database has what stands in for it."""
    monkeypatch.setenv("OUTWAKE_SCHEMA", "public")
    assert schema._configured().name not in ("public", "outwake")


def test_locks_of_two_schemas_differ() -> None:
    """Advisory locks belong to the database, whatever the schema."""
    numbers = [Schema(name).lock(what) for name in ("outwake", "shop_jobs") for what in LOCKS]
    assert len(set(numbers)) == 2 * len(LOCKS)
    assert all(0 < number < 2**31 for number in numbers)


def test_the_numbers_of_the_default_stay() -> None:
    """An old version's worker beside a new one takes the same locks."""
    assert {what: Schema("outwake").lock(what) for what in LOCKS} == {
        "presence": 855844737,
        "key": 855844738,
        "topic": 855844739,
        "migrate": 855844740,
        "watch": 855844741,
        "sleepers": 855844742,
    }


CODE = """
from outwake.session import watch
from outwake.app.api import sessions
from outwake._claim import _FENCE
from outwake.worker.engine import claims as claims
from outwake.worker.engine import listen
print(_FENCE, listen.WAKE, listen._LOCK, watch.CHANNEL, watch.LOCK, sep="\\n")
print(b"shop.session_create(" in sessions._CREATE.text, claims._COMPLETE.text.decode())
"""


def test_queries_channels_and_locks_of_a_process_follow_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTWAKE_SCHEMA", "shop")
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    shop = Schema("shop")
    assert done.stdout.splitlines() == [
        "SELECT shop.outbox_fence(%s, %s, %s)",
        "shop_wake",
        str(shop.lock("presence")),
        "shop_session",
        str(shop.lock("watch")),
        "True SELECT r FROM shop.outbox_complete($1, $2::bigint[], $3::integer[]) AS r",
    ]


# What is ours, and queries that say so

_OBJECT = re.compile(
    r"\bCREATE (?:OR REPLACE )?(?:UNLOGGED )?(TABLE|VIEW|FUNCTION|SEQUENCE|TYPE|DOMAIN) (?:IF NOT EXISTS )?"
    r"(?::schema\.)?(\w+)"
)


def _ours() -> dict[str, set[str]]:
    """The names of our objects, by what they are."""
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "sql").rglob("*.sql"), ROOT / "outwake/_ledger.py"]:
        for kind, name in _OBJECT.findall(re.sub(r"--.*", "", path.read_text())):
            found.setdefault(kind, set()).add(name)
    return found


OURS = _ours()
RELATIONS = OURS["TABLE"] | OURS["VIEW"] | OURS["SEQUENCE"]
TYPES = OURS["TYPE"] | OURS["DOMAIN"] | OURS["TABLE"] | OURS["VIEW"]
FUNCTIONS = OURS["FUNCTION"]
ALL = RELATIONS | TYPES | FUNCTIONS

_QUERY = re.compile(
    r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|FROM|JOIN|COPY|LISTEN|NOTIFY|ALTER|TRUNCATE|CALL)\b"
)
_HOLE = "Ω"  # stands for what an f-string puts in: a letter, so that `outbox_{name}` stays one word
_LITERAL = re.compile(r"'((?:[^']|'')*)'(?=(\s*::\s*reg)?)")
_TOKEN = re.compile(r":schema\.[\w]+|::\s*[\w.]+|\w+(?:\.\w+)*|=>|[(),;]|\S")
_CTE = re.compile(r"\b(\w+)\s*(?:\([^()]*\)\s*)?AS\s+(?:NOT\s+)?(?:MATERIALIZED\s*)?\(")
_CHANNEL = re.compile(r"\b(?:LISTEN|NOTIFY)\s+(\w+_(?:wake|cancel|probe|session))\b|pg_notify\(\s*'(\w+)'")
_BEFORE_A_RELATION = {"FROM", "JOIN", "INTO", "UPDATE", "COPY", "TABLE", "USING", "TRUNCATE"}
_STILL_BEFORE_IT = {"ONLY", "LATERAL", "IF", "EXISTS", "NOT", "ROWS"}
_ENDS_A_LIST = {
    *("WHERE", "GROUP", "ORDER", "LIMIT", "SET", "SELECT", "UNION", "RETURNING", "WINDOW", "HAVING"),
    *("VALUES", "FOR", "ON"),
}
_FROM_IS_NO_CLAUSE = {"extract", "substring", "trim", "overlay", "position"}


def unqualified(text: str) -> list[str]:
    """Our names that a query uses without `:schema.`; none if the text is no query."""
    if not _QUERY.search(text):
        return []
    wrong = [first or second for first, second in _CHANNEL.findall(text)]
    text = re.sub(r"--.*", "", text)
    text = re.sub(r"%\(\w+\)s|%s", _HOLE, text)
    wrong += [
        literal[1]
        for literal in _LITERAL.finditer(text)
        if literal[1] in ALL
        and (
            literal[2] or re.search(r"(to_reg\w+|pg_\w+_size|nextval|setval)\(\s*$", text[: literal.start()])
        )
    ]
    text = _LITERAL.sub("''", text)
    made_here = set(_CTE.findall(text))
    tokens = _TOKEN.findall(text)
    openers: list[str] = [""]
    in_list = [False]
    expected = False  # a table, a view or a function that returns rows
    for place, token in enumerate(tokens):
        before = tokens[place - 1] if place else ""
        after = tokens[place + 1] if place + 1 < len(tokens) else ""
        if token == "(":
            openers.append(before.lower())
            in_list.append(False)
            expected = False
        elif token == ")":
            if len(openers) > 1:
                openers.pop()
                in_list.pop()
            expected = False
        elif token == ",":
            expected = in_list[-1]
        elif token.startswith("::"):
            if token.removeprefix("::").strip() in TYPES:
                wrong.append(token)
        elif token in _BEFORE_A_RELATION:
            no_clause = token == "FROM" and (openers[-1] in _FROM_IS_NO_CLAUSE or before == "DISTINCT")
            locks = token == "UPDATE" and before in ("FOR", "KEY", "DO", "OF")
            expected = not (no_clause or locks)
            in_list[-1] = in_list[-1] if no_clause else token in ("FROM", "USING")
        elif token in _ENDS_A_LIST:
            in_list[-1] = expected = False
        elif token in _STILL_BEFORE_IT:
            pass
        elif re.match(r"\w", token):
            if _is_wrong(token, before, after, openers[-1], made_here, expected=expected):
                wrong.append(token)
            expected = False
    return wrong


def _is_wrong(
    word: str, before: str, after: str, opener: str, made_here: set[str], *, expected: bool
) -> bool:
    if "." in word:  # of a schema that was written out; o.topic is a column
        first, second, *_ = word.split(".")
        return first in ("outwake", "public") and second in ALL
    if _HOLE in word:
        known = word.partition(_HOLE)[0]
        return bool(known) and any(name.startswith(known) for name in ALL)
    if after == "=>" or word in made_here:
        return False
    if after == "(" and word in FUNCTIONS:
        return True
    if before == "AS" and opener == "cast":
        return word in TYPES
    if expected:
        return word in RELATIONS
    # A name with an underscore is no column of ours and no alias: it is wrong wherever it stands.
    return "_" in word and word in RELATIONS | OURS["TYPE"] and before != "AS"


PLANTED = [
    ("SELECT id FROM outbox WHERE id = %s", ["outbox"]),
    ("SELECT id FROM outwake.outbox", ["outwake.outbox"]),
    ("SELECT outbox_rescue(%s, %s)", ["outbox_rescue"]),
    ("SELECT outbox_Ω(%s)", ["outbox_Ω"]),
    ("SELECT r FROM outbox_complete(%s) AS r", ["outbox_complete"]),
    ("SELECT 1 FROM :schema.session AS s, prompt AS p", ["prompt"]),
    ("SELECT 1 FROM f(1, 2), worker", ["worker"]),
    ("SELECT 1 FROM :schema.session AS s\nLEFT JOIN prompt AS p ON p.session_id = s.id", ["prompt"]),
    ("SELECT (SELECT max(id) FROM outbox)", ["outbox"]),
    ("WITH o AS (DELETE FROM watcher RETURNING 1) SELECT 1 FROM o", ["watcher"]),
    ("INSERT INTO topic (name) VALUES ('t')", ["topic"]),
    ("UPDATE worker SET parked = false", ["worker"]),
    ("COPY outbox (topic) FROM STDIN", ["outbox"]),
    ("SELECT 1 FROM :schema.a CROSS JOIN LATERAL session_cancel(s.id) AS c", ["session_cancel"]),
    ("SELECT x::session FROM :schema.a", ["::session"]),
    ("SELECT CAST(x AS outbox_claimed)", ["outbox_claimed"]),
    ("SELECT to_regclass('outbox'), 'session'::regclass", ["outbox", "session"]),
    ("LISTEN outwake_wake", ["outwake_wake"]),
    ("SELECT pg_notify('outwake_cancel', %s)", ["outwake_cancel"]),
]
HARMLESS = [
    "SELECT topic, worker, 'outbox', o.session FROM :schema.outbox AS o WHERE topic = %(topic)s",
    "SELECT count(*) FROM :schema.worker AS worker WHERE worker.parked AND x IS DISTINCT FROM topic",
    "SELECT extract(epoch FROM topic) FROM f(of_id => 1, worker_present => %(worker_present)s)",
    "WITH topic AS MATERIALIZED (SELECT 1) SELECT 1 FROM topic FOR UPDATE OF topic",
    "SELECT 1 FROM :schema.session -- and prompt, which is FROM prompt\n",
    "INSERT INTO :schema.outbox AS o (topic) SELECT 'x' ON CONFLICT (topic) DO UPDATE SET topic = o.topic",
    "the LISTEN connection of a worker, from outbox",
    "insert rows into outbox",
]


@pytest.mark.parametrize(("text", "names"), PLANTED)
def test_planted_name_is_found(text: str, names: list[str]) -> None:
    assert unqualified(text) == names


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_name_of_ours_is_left_alone(text: str) -> None:
    assert unqualified(text) == []


# By how many columns there are, or by their order.
_ALL_COLUMNS = re.compile(
    r"\bSELECT\s+(?:\w+\.)?\*|,\s*\w+\.\*|\bINSERT INTO\s+[\w:.]+(?:\s+AS\s+\w+)?\s+(?!AS\b)[^\s(]"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SELECT * FROM t", True),
        ("SELECT o.* FROM t AS o", True),
        ("SELECT 1, o.* FROM t AS o", True),
        ("INSERT INTO :schema.t VALUES (1)", True),
        ("INSERT INTO :schema.t SELECT 1", True),
        ("INSERT INTO :schema.t AS o (a) SELECT count(*), 2 * 3 FROM u", False),
    ],
)
def test_planted_star_is_found(text: str, found: bool) -> None:
    assert bool(_ALL_COLUMNS.search(text)) is found


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """Every string of a module, with its line. A string that is a statement of its own is documentation; an
    f-string is one text, with holes.
    """
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
            parts = (part.value if isinstance(part, ast.Constant) else _HOLE for part in node.values)
            yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node not in skipped:
            if isinstance(node.value, str):
                yield node.lineno, node.value
            elif isinstance(node.value, bytes):
                yield node.lineno, node.value.decode("latin-1")


def test_documentation_is_no_query_and_an_f_string_is_one() -> None:
    source = '''
"""SELECT id FROM outbox"""
class C:
    x = 1
    """UPDATE outbox"""
def f(name): return f"SELECT outbox_{name}() FROM :schema.a", b"COPY outbox FROM STDIN"
'''
    assert [unqualified(text) for _, text in _texts(source)] == [["outbox_Ω"], ["outbox"]]


def _sources() -> set[Path]:
    """Each once: outwake/ has links to the other folders."""
    return {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def test_the_names_are_known() -> None:
    assert {"outbox", "session", "worker_present", "outbox_sleepers", "migration"} <= RELATIONS
    assert {"outbox_claim", "session_create", "uuid_v7"} <= FUNCTIONS
    assert {"outbox_claimed", "topic_name"} <= TYPES


def test_every_query_names_the_schema() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{line}": names
        for path in sorted(_sources())
        for line, text in _texts(path.read_text())
        if text not in FOR_PEOPLE and (names := unqualified(text))
    }
    assert wrong == {}


def test_no_query_depends_on_a_tables_columns() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{line}": text
        for path in sorted(_sources())
        for line, text in _texts(path.read_text())
        if _QUERY.search(text) and _ALL_COLUMNS.search(text)
    }
    assert wrong == {}
