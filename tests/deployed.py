"""What lies under deploy/, read for the tests: rules, panels, every query, sections of Markdown."""

import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
RUNBOOK = DEPLOY / "RUNBOOK.md"
PROMETHEUS = DEPLOY / "prometheus"
RULE_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))

Json = dict[str, Any]  # Any: JSON values

_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# What is in braces, or a comparison.
_COMPARISON = re.compile(r"(\{[^}]*\})|(==|!=|>=|<=|>|<)")
# What Grafana would put in place of its variables.
_VARIABLES = {
    "$__rate_interval": "1m",
    "$job": "scoring",
    "$instance": ".*",
    "$output": ".*",
}


@dataclass(frozen=True)
class Query:
    """An expression, and where it stands: `alerts.yml ScoringNotReady`."""

    where: str
    expr: str


def needs(program: str) -> pytest.MarkDecorator:
    """Skips where the program is not installed; in CI a skip is a failure (see conftest)."""
    return pytest.mark.skipif(
        shutil.which(program) is None,
        reason=f"no {program} is installed (Debian's package prometheus has it)",
    )


@functools.cache
def read_yaml(path: Path) -> Any:  # Any: what the file holds; not to be changed
    return yaml.safe_load(path.read_text())


def rules() -> list[Json]:
    """Recording rules and alerts, in their order."""
    return [rule for group in _groups() for rule in group["rules"]]


def alerts() -> dict[str, Json]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded_names() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


@functools.cache
def dashboards() -> dict[str, Json]:
    return {path.name: json.loads(path.read_text()) for path in DASHBOARDS}


def panels() -> list[tuple[str, Json]]:
    """Every panel that shows something, with where it is."""
    return [
        (f"{name} {panel['title']}", panel)
        for name, dashboard in dashboards().items()
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    ]


def queries() -> list[Query]:
    """Every expression of every rule, panel, annotation; variables of Grafana replaced."""
    found = [Query(f"{r.get('record') or r['alert']}", r["expr"]) for r in rules()]
    for where, panel in panels():
        found += [Query(f"{where} {t['refId']}", t["expr"]) for t in panel["targets"]]
    for name, dashboard in dashboards().items():
        events = dashboard["annotations"]["list"]
        found += [Query(f"{name} annotation {e['name']}", e["expr"]) for e in events]
    return [Query(query.where, _without_variables(query.expr)) for query in found]


def as_values(expr: str) -> str:
    """The expression, made to answer 0 or 1 where it would be empty because nothing is wrong.

    Comparisons tell instead of filter, of alternatives both are asked for, and in place of what
    would have to be absent stands itself. What is still empty has no data.
    """
    expr = re.sub(r"\babsent\(", "(", expr)
    expr = re.sub(r"\bor\b", "and", expr)
    return _COMPARISON.sub(lambda found: found[1] or f"{found[2]} bool ", expr)


def names_in(expr: str) -> set[str]:
    """Names of metrics in an expression: the service's, and recorded ones."""
    found = set(_NAME.findall(_QUOTED.sub('""', expr)))
    return {name for name in found if name.startswith("scoring_") or ":" in name}


def sections(path: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def _groups() -> list[Json]:
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    return [group for path in files for group in read_yaml(path)["groups"]]


def _without_variables(expr: str) -> str:
    for variable, text in _VARIABLES.items():
        expr = expr.replace(variable, text)
    return expr
