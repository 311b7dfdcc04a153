"""Prometheus's own tool accepts the configuration and the rules, and the rules' cases hold."""

import subprocess
from pathlib import Path

import pytest
from deployed import PROMETHEUS, RULE_TESTS, needs

pytestmark = needs("promtool")


def promtool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_configuration_is_accepted() -> None:
    # The rules lie elsewhere in a container; they are checked below.
    done = promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    assert done.returncode == 0, done.stderr


def test_rules_are_accepted() -> None:
    done = promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SUCCESS") == 2


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_cases_of_the_alerts_hold(path: Path) -> None:
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
