"""docs/protocol.md names functions and tests that exist, and marks the tests that take a rule out."""

import re

import pytest

from tests.support.process import ROOT

PAGE = (ROOT / "docs" / "protocol.md").read_text()
RULES = re.findall(r"^\d+\. \*\*.*?(?=^\d+\. \*\*|^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
OTHERWISE = "take_out", "replace_body", "without"
"""How a test takes a rule out, if it is not `with_and_without`."""


def test_the_page_has_rules() -> None:
    assert len(RULES) > 40
    assert all("- In " in rule and "- Test" in rule for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.partition(".")[0])
def test_places_and_tests_of_a_rule_exist(rule: str) -> None:
    places, _, tests = rule.partition("- Test")
    names: list[str] = []
    for found in re.finditer(
        r"`([\w.]+)`|((?:sql|worker|app|outwake)/[\w/.]+\.(?:py|sql))", places.partition("- In ")[2]
    ):
        if found[1]:
            names.append(found[1])
            continue
        text = (ROOT / found[2]).read_text()
        for name in names:
            last = name.rpartition(".")[2]
            assert re.search(rf"(?:def|class) {last}\b|FUNCTION {last}\(", text), (name, found[2])
        names = []
    assert names == [], "each is followed by its file"
    text = ""
    for found in re.finditer(r"((?:tests/\w+/)?test_\w+\.py)|`(test_\w+)`( †)?", tests):
        if found[1]:
            folder = "" if "/" in found[1] else "tests/integration/"
            text = (ROOT / f"{folder}{found[1]}").read_text()
            continue
        begin = text.find(f"def {found[2]}(")
        assert begin >= 0, found[2]
        whole = text[:begin].rpartition("\n\n\n")[2] + text[begin:].partition("\n\n\n")[0]
        if found[3]:
            assert "with_and_without" in whole or any(word in whole for word in OTHERWISE), found[2]
