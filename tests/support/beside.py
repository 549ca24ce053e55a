"""What stands beside Outwake in a database: an application that uses all its names, and an attacker.

`squatters` makes relations, types and functions of all our names in another schema. A query of ours that does
not name the schema finds those.

`traps` makes functions and operators in another schema that fit the arguments of our calls better than the
right ones do. A query of ours whose search_path has that schema in it calls them, even behind pg_catalog.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from tests.support.process import ROOT
from tests.support.steps import Connection, column

_RELATIONS = """
SELECT relname::text, relkind::text FROM pg_class WHERE relnamespace = 'outwake'::regnamespace ORDER BY 1
"""
_DOMAINS = """
SELECT typname::text, format_type(typbasetype, NULL) FROM pg_type
WHERE typnamespace = 'outwake'::regnamespace AND typtype = 'd' ORDER BY 1
"""
_OUR_FUNCTIONS = "SELECT DISTINCT proname::text FROM pg_proc WHERE pronamespace = 'outwake'::regnamespace"
# Once for each number of arguments that it can be called with.
_FUNCTIONS = """
SELECT p.proname::text,
    ARRAY(
        SELECT format_type(a.type, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY AS a (type, place)
        WHERE a.place <= n.arguments ORDER BY a.place),
    CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL)
FROM pg_proc AS p
CROSS JOIN generate_series((p.pronargs - p.pronargdefaults)::integer, p.pronargs::integer) AS n (arguments)
WHERE p.pronamespace = %s::regnamespace AND p.proname = ANY (%s) AND p.prorettype <> 'trigger'::regtype
  AND p.provariadic = 0
ORDER BY 1, 2
"""

Types = tuple[str, ...]


@dataclass
class Function:
    name: str
    arguments: Types
    result: str


async def squatters(migrated: Connection, schema: str) -> str:
    """SQL that makes tables, views, sequences, types and functions of all our names, unlike ours.

    `migrated` is a connection to a database that has ours.
    """
    await migrated.execute("SET search_path = pg_catalog")
    made: list[str] = []
    for name, kind in await (await migrated.execute(_RELATIONS)).fetchall():
        made += _relation(f"{schema}.{name}", kind)
    for name, _ in await (await migrated.execute(_DOMAINS)).fetchall():
        made.append(f"CREATE DOMAIN {schema}.{name} AS integer CHECK (VALUE < 0)")
    functions = await _functions(migrated, "outwake", await column(migrated, _OUR_FUNCTIONS))
    # Of types that the server has, or the shop's own of these names.
    signatures = {(f.name, ", ".join(f.arguments).replace("outwake.", f"{schema}.")) for f in functions}
    made += [
        f"CREATE FUNCTION {schema}.{name}({arguments}) RETURNS text LANGUAGE plpgsql"
        f" AS 'BEGIN RAISE ''the {name} of the shop was called''; END'"
        for name, arguments in sorted(signatures)
    ]
    return ";\n".join(made)


def _relation(place: str, kind: str) -> list[str]:
    match kind:
        case "v":
            return [f"CREATE VIEW {place} AS SELECT 'x' AS text", f"COMMENT ON VIEW {place} IS 'The shop''s'"]
        case "S":
            return [f"CREATE SEQUENCE {place} START 41", f"SELECT pg_catalog.nextval('{place}')"]
        case "c":
            return [f"CREATE TYPE {place} AS ENUM ('of the shop')"]
        case _:  # indexes too: their names are relations'
            return [
                f"CREATE TABLE {place} (article integer)",
                f"INSERT INTO {place} VALUES (1), (2)",
                f"COMMENT ON TABLE {place} IS 'The shop''s'",
            ]


async def traps(migrated: Connection, schema: str, attacker: str) -> str:
    """SQL that sets the traps, as `attacker`. Anybody else who steps into one gets an error, and the sequence
    `trapped` counts it even then.
    """
    await migrated.execute("SET search_path = pg_catalog")
    found = await (await migrated.execute(_DOMAINS)).fetchall()
    domains = {f"outwake.{name}": base for name, base in found}
    ours = await _functions(migrated, "outwake", await column(migrated, _OUR_FUNCTIONS))
    servers = await _functions(migrated, "pg_catalog", _called())
    functions = {
        (function.name, fitting): function.result
        for function in [*servers, *_of_any(domains), *ours]
        for fitting in _fitting(function.arguments, domains)
    }
    made = [
        f"CREATE SEQUENCE {schema}.trapped",
        f"GRANT USAGE ON SEQUENCE {schema}.trapped TO PUBLIC",
        f"CREATE FUNCTION {schema}.trap(what text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog"
        f" AS $$BEGIN IF current_user <> '{attacker}' THEN PERFORM nextval('{schema}.trapped');"
        " RAISE 'trapped by % as %', what, current_user; END IF; END$$",
        *(_trap(schema, Function(*key, result)) for key, result in functions.items()),
        *_operators(schema, domains),
        # Becomes a text, without a word, where it is given for a topic.
        f"CREATE TYPE {schema}.sly AS (text pg_catalog.text)",
        f"CREATE FUNCTION {schema}.sly_text({schema}.sly) RETURNS pg_catalog.text LANGUAGE plpgsql"
        f" AS $$BEGIN PERFORM {schema}.trap('sly_text'); RETURN ($1).text; END$$",
        f"CREATE CAST ({schema}.sly AS pg_catalog.text)"
        f" WITH FUNCTION {schema}.sly_text({schema}.sly) AS IMPLICIT",
    ]
    return ";\n".join(made)


async def _functions(migrated: Connection, schema: str, names: list[str]) -> list[Function]:
    """But those of pseudo-types, which `_of_any` is for."""
    found = [Function(n, tuple(t), r) for n, t, r in await _rows(migrated, schema, names)]
    return [f for f in found if not re.search(r"\bany|internal|cstring", " ".join([*f.arguments, f.result]))]


async def _rows(migrated: Connection, schema: str, names: list[str]) -> list[tuple[str, list[str], str]]:
    return await (await migrated.execute(_FUNCTIONS, (schema, names))).fetchall()


def _called() -> list[str]:
    """Every word of our SQL and Python that may be a function's name."""
    words: set[str] = set()
    for pattern in ("sql/**/*.sql", "outwake/*.py", "outwake/cli/*.py", "worker/**/*.py", "app/**/*.py"):
        for path in ROOT.glob(pattern):
            words |= set(re.findall(r"\b([a-z_0-9]+)\(", path.read_text()))
    return sorted(words)


_BASES: Types = (
    *("smallint", "integer", "bigint", "oid", "double precision", "numeric", "boolean", "text", "name"),
    *("uuid", "timestamp with time zone", "interval", "jsonb", "bytea", "regclass"),
    *("text[]", "bigint[]", "integer[]"),
)
_OF_ANY: Types = (
    *("array_agg", "array_append", "array_prepend", "cardinality", "concat_ws", "count", "format"),
    *("jsonb_build_object", "max", "min", "num_nonnulls", "to_jsonb", "unnest"),
)
_OPERATORS = {
    **dict.fromkeys(("=", "<>", "<", ">", "<=", ">=", "~", "~~", "!~", "?", "@>"), "boolean"),
    **dict.fromkeys(("||", "->>"), "text"),
    **dict.fromkeys(("+", "-", "*", "/", "^"), "interval"),
    "->": "jsonb",
}
"""With what a trap of it returns."""


def _of_any(domains: dict[str, str]) -> list[Function]:
    """What the server has for any type, for each type."""
    types = [*_BASES, *domains]
    return [Function(name, (t,) * many, t) for name, t, many in product(_OF_ANY, types, (1, 2))]


def _fitting(types: Types, domains: dict[str, str]) -> set[Types]:
    """The argument types themselves, and with types of ours in place of what those are made of."""
    found = {types}
    for domain, base in domains.items():
        found.add(tuple(domain if t == base else t for t in types))
    several = {base: domain for domain, base in domains.items()}
    for text in ("outwake.topic_name", "outwake.state_name", "outwake.key_text"):
        found.add(tuple((several | {"text": text}).get(t, t) for t in types))
    return found


def _trap(schema: str, function: Function) -> str:
    what = f"{function.name}({', '.join(function.arguments)})"
    nothing = "" if function.result == "void" or function.result.startswith("SETOF") else " NULL"
    return (
        f"CREATE FUNCTION {schema}.{what} RETURNS {function.result} LANGUAGE plpgsql"
        f" AS $$BEGIN PERFORM {schema}.trap('{what}'); RETURN{nothing}; END$$"
    )


def _operators(schema: str, domains: dict[str, str]) -> Iterator[str]:
    pairs = [*product(_BASES, _BASES)]
    for domain, base in domains.items():
        pairs += [(domain, domain), (domain, base), (base, domain), (domain, "text"), ("text", domain)]
    results = dict.fromkeys(_OPERATORS.values())
    for number, (pair, result) in enumerate(product(dict.fromkeys(pairs), results)):
        yield _trap(schema, Function(f"operator_{number}", pair, result))
        for operator, of in _OPERATORS.items():
            if of == result:
                yield (
                    f"CREATE OPERATOR {schema}.{operator} (FUNCTION = {schema}.operator_{number},"
                    f" LEFTARG = {pair[0]}, RIGHTARG = {pair[1]})"
                )
