"""docker-compose.yml and the Dockerfile against the code: names, commands and the old incident."""

import json
import os
import shlex
import subprocess
import tomllib
from typing import Any

import pytest
import yaml

from outwake.app.auth.identity import is_loopback
from outwake.app.dashboard.signin import CALLBACK
from outwake.settings import Settings
from tests.support.process import ROOT, SCRIPTS, command_line

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "outwake"}
NEEDED = {"postgres", "migrate", "api", "worker"}
VARIABLES = {field.alias for field in Settings.model_fields.values()}


def dockerfile() -> list[list[str]]:
    """The instructions as words; continued lines are joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip(" #")]


def instructions(name: str) -> list[list[str]]:
    return [words[1:] for words in dockerfile() if words and words[0] == name]


def condition(service: str, on: str) -> object:
    return SERVICES[service].get("depends_on", {}).get(on, {}).get("condition")


def test_the_services_are_those_a_session_needs() -> None:
    assert set(SERVICES) == NEEDED | {"prometheus", "grafana", "keycloak"}
    assert set(OURS) == {"migrate", "api", "worker"}


def test_everything_starts_by_default() -> None:
    """In the system before, the poller was left out and sessions stayed active for ever."""
    for service in (SERVICES[name] for name in NEEDED):
        assert "profiles" not in service
        assert service.get("scale", 1) >= 1
        assert service.get("deploy", {}).get("replicas", 1) >= 1


@pytest.mark.parametrize("name", ["postgres", "api", "worker", "prometheus", "grafana", "keycloak"])
def test_what_keeps_running_has_a_health_check_and_comes_back(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_migrate_needs_no_health_check_as_the_others_wait_for_its_success() -> None:
    assert "healthcheck" not in SERVICES["migrate"]
    assert condition("migrate", "postgres") == "service_healthy"
    assert condition("api", "migrate") == "service_completed_successfully"
    assert condition("worker", "migrate") == "service_completed_successfully"


@pytest.mark.parametrize("name", ["migrate", "api", "worker"])
def test_commands_are_ours_and_take_these_arguments(name: str) -> None:
    script, *arguments = OURS[name]["command"]
    assert help_of(script, arguments)


def test_the_workers_health_check_is_an_option_of_the_worker() -> None:
    cmd, script, *arguments = SERVICES["worker"]["healthcheck"]["test"]
    assert (cmd, script, arguments) == ("CMD", "worker", ["--check"])
    assert "--check" in help_of(script, [])


def help_of(script: str, arguments: list[str]) -> str:
    assert script in SCRIPTS
    done = subprocess.run(
        [*command_line(script), *arguments, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["migrate", "api", "worker"])
def test_environment_variables_are_settings(name: str) -> None:
    assert set(OURS[name]["environment"]) <= VARIABLES
    assert "DATABASE_URL" in OURS[name]["environment"]


def test_the_old_verification_query_finds_its_table() -> None:
    """SELECT … FROM session, without a schema: by the server's search_path, which changes no database."""
    schema = Settings.model_fields["schema_name"].default
    assert SERVICES["postgres"]["command"] == ["postgres", "-c", f"search_path={schema}, public"]
    assert all("OUTWAKE_SCHEMA" not in service["environment"] for service in OURS.values())


def test_the_worker_may_drain_before_it_is_killed() -> None:
    grace = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["drain_grace"].default


def test_ports_are_published_on_loopback_only_and_the_database_not_at_all() -> None:
    ports = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)
    assert ports["postgres"] == []


def test_the_image_holds_every_package_and_its_variables_are_settings() -> None:
    copied = {word for words in instructions("COPY") for word in words[:-1]}
    packages = {"outwake", *(path.name for path in (ROOT / "outwake").iterdir() if path.is_symlink())}
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["outwake"]
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert packages | files <= copied
    assert all((ROOT / name).exists() for name in packages)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name}" for name in packages | files} <= set(ignored)
    (variables,) = instructions("ENV")
    names = {word.partition("=")[0] for word in variables}
    assert names - {"PATH", "PYTHONUNBUFFERED"} <= VARIABLES


def test_the_image_has_the_extras_of_its_commands() -> None:
    (requirement,) = {word for words in instructions("RUN") for word in words if word.startswith(".[")}
    extras = set(requirement[2:-1].split(","))
    assert extras >= {
        name for name in ("worker", "api") if any(one["command"][-1] == name for one in OURS.values())
    }
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_image_has_git_and_does_not_run_as_root() -> None:
    assert any("git" in words for words in instructions("RUN"))
    assert instructions("USER") == [["10001:10001"]]
    assert instructions("FROM")[-1] == ["python:3.13-slim"]


# Keycloak, for trying out authentication

REALM = json.loads((ROOT / "keycloak" / "outwake-realm.json").read_text())


def default(name: str) -> Any:
    return Settings.model_fields[name].default


def test_the_realm_is_the_issuer_that_the_pages_name() -> None:
    issuer = f"{SERVICES['keycloak']['environment']['KC_HOSTNAME']}/realms/{REALM['realm']}"
    for page in ("docker-compose.yml", "docs/authentication.md"):
        assert f"OUTWAKE_OIDC_ISSUER={issuer}" in (ROOT / page).read_text()
    host = issuer.removeprefix("http://").partition(":")[0]
    assert SERVICES["keycloak"]["networks"]["default"]["aliases"] == [host]
    assert is_loopback(host)  # browsers and curl take any name below localhost for loopback


def test_the_realms_tokens_are_for_us_and_name_operators() -> None:
    assert {role["name"] for role in REALM["roles"]["realm"]} == {default("oidc_operator_role")}
    clients = {client["clientId"]: client for client in REALM["clients"]}
    assert clients.keys() == {"outwake-cli", default("oidc_client_id")}
    for client in clients.values():
        audiences = {
            mapper["config"]["included.custom.audience"]
            for mapper in client["protocolMappers"]
            if mapper["protocolMapper"] == "oidc-audience-mapper"
            and mapper["config"]["access.token.claim"] == "true"
        }
        assert audiences == {default("oidc_audience")}
    operators = {
        user["username"] for user in REALM["users"] if default("oidc_operator_role") in user["realmRoles"]
    }
    assert operators == {"olga"}


def test_the_realm_takes_the_dashboards_way_back() -> None:
    client = next(one for one in REALM["clients"] if one["clientId"] == default("oidc_client_id"))
    assert {url.removeprefix("http://localhost:8000") for url in client["redirectUris"]} >= {CALLBACK}
    assert client["attributes"]["pkce.code.challenge.method"] == "S256"


def test_the_realm_is_mounted_where_it_is_imported_from() -> None:
    assert "--import-realm" in SERVICES["keycloak"]["command"]
    assert SERVICES["keycloak"]["volumes"] == ["./keycloak:/opt/keycloak/data/import:ro"]


def test_keycloaks_health_check_is_bash() -> None:
    *_, script = SERVICES["keycloak"]["healthcheck"]["test"]
    subprocess.run(["bash", "-n", "-c", script.replace("$$", "$")], check=True)
