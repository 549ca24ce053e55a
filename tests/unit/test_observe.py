"""Alerts, the dashboard and their wiring: every query parses, and asks for what is really exported."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
import pytest
import yaml

from outwake.app.api.metrics import REGISTRY
from outwake.telemetry.metrics import WORKER_STATES, _families
from outwake.worker.agents.usage import declare_usage
from outwake.worker.engine.metrics import OUTCOMES, Stats, families
from tests.support.process import ROOT

OBSERVE = ROOT / "observe"
ALERTS = yaml.safe_load((OBSERVE / "alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
TESTS = yaml.safe_load((OBSERVE / "alerts_test.yml").read_text())
DASHBOARD = json.loads((OBSERVE / "grafana" / "dashboards" / "outwake.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def exported() -> dict[str, set[str]]:
    """The names of all series, with their labels."""
    api = [*REGISTRY.collect(), *_families([("outbox", "t", "ready", "due", 1.0, 1.0)])]
    declare_usage()
    worker = families(Stats().snapshot({}))
    series: dict[str, set[str]] = {"up": {"job", "instance"}, "outwake_api_listen_connected": set()}
    for family in [*api, *worker]:
        # A family made by hand knows its labels; the API's own have them on the metric in its registry.
        names = getattr(family, "_labelnames", None)
        if names is None:
            names = REGISTRY._names_to_collectors[family.name]._labelnames  # type: ignore[attr-defined]
        for suffix in SUFFIXES[family.type]:
            labels = set(names) | {"job", "instance"} | ({"le"} if suffix == "_bucket" else set())
            series[family.name + suffix] = labels
    return series


SERIES = exported()


def parts(expression: Any) -> Iterator[Any]:
    """The expression and all below it."""
    yield expression
    for name in ("lhs", "rhs", "expr", "args", "param", "vector_selector"):
        below = getattr(expression, name, None)
        for part in below if isinstance(below, list) else [below]:
            if part is not None:
                yield from parts(part)


def check(query: str) -> None:
    known: set[str] = set()
    grouped: set[str] = set()
    for part in parts(promql.parse(query.replace("$__rate_interval", "5m").replace("$topic", "t"))):
        if isinstance(part, promql.VectorSelector):
            assert part.name in SERIES, f"{part.name} is not exported"
            labels = SERIES[part.name]
            known |= labels
            assert {matcher.name for matcher in part.matchers.matchers} <= labels, query
        elif isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            grouped |= set(part.modifier.labels)
    assert grouped <= known, query


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_alerts_ask_for_what_is_exported(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith((".", "nothing.'"))


@pytest.mark.parametrize("query", QUERIES)
def test_the_dashboard_asks_for_what_is_exported(query: str) -> None:
    check(query)


def test_a_query_for_something_else_is_found() -> None:
    for wrong in ("outwake_outbox_row", "sum by (tpic) (outwake_outbox_rows)", 'outwake_workers{stat="x"}'):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(ValueError, match=r"unclosed|unexpected|parse"):
        check("sum(")


def test_every_metric_is_on_the_dashboard() -> None:
    """Or in an alert: what nobody looks at need not be counted."""
    asked = set(re.findall(r"outwake_\w+", " ".join(QUERIES + [rule["expr"] for rule in RULES])))
    looked_at = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    names = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in SERIES} - {"up"}
    assert names - looked_at <= {"outwake_http_requests_in_progress", "outwake_worker_leases_lost"}


def test_values_of_labels_are_those_that_occur() -> None:
    text = " ".join(QUERIES + [rule["expr"] for rule in RULES])
    states = {word for found in re.findall(r'state=~?"([^"]+)"', text) for word in found.split("|")}
    assert states <= {*WORKER_STATES, "ready", "running", "dead"}
    assert set(re.findall(r'outcome="(\w+)"', text)) <= set(OUTCOMES)


def test_every_alert_is_tested_and_explained() -> None:
    names = {rule["alert"] for rule in RULES}
    fired = {
        case["alertname"] for test in TESTS["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]
    }
    assert fired == names
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert {name for name in names if f"`{name}`" not in page} == set()


PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool (Debian: apt install prometheus); parsed above")
@pytest.mark.parametrize(
    "arguments", ["check rules alerts.yml", "check config prometheus.yml", "test rules alerts_test.yml"]
)
def test_promtool(arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *arguments.split()], cwd=OBSERVE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_wires_them_under_a_profile() -> None:
    for name in ("prometheus", "grafana"):
        assert COMPOSE[name]["profiles"] == ["observe"]
        for volume in COMPOSE[name]["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (ROOT / source).exists(), volume
    scraped = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    targets = {
        (name, config["port"])
        for job in scraped
        for config in job["dns_sd_configs"]
        for name in config["names"]
    }
    environment = COMPOSE["worker"]["environment"]
    assert targets == {
        ("api", int(COMPOSE["api"]["environment"]["OUTWAKE_PORT"])),
        ("worker", int(environment["OUTWAKE_HEALTH_PORT"])),
    }
    assert {job["job_name"] for job in scraped} == {"outwake-api", "outwake-worker"}
    assert environment["OUTWAKE_HEALTH_HOST"] == "0.0.0.0"
    source = yaml.safe_load(
        (OBSERVE / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    used = {panel["datasource"]["uid"] for panel in PANELS}
    assert used == {source["uid"]}


def test_panels_have_their_own_places_and_words() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert all(panel["description"] for panel in PANELS)
