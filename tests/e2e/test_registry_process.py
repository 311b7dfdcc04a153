"""A service of two workers follows the pointer of a registry."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny
from test_serve_process import BODY, LIMIT_S, Served, environment, serving

from model.contract.bundle import MODEL
from service.registry import CURRENT, VERSIONS, Registry

pytestmark = pytest.mark.process

SETTINGS = {
    "CTR_STORE__URL": "memory://",
    "CTR_WORKERS": 2,
    "CTR_RELOAD_POLL_S": 0.1,
    "CTR_DRAIN_DELAY_MS": 0,
}


@pytest.fixture
def registry(tmp_path: Path, tiny_bundle: Path) -> Registry:
    path = tmp_path / "registry"
    path.mkdir()
    registry = Registry(path)
    registry.publish(tiny_bundle)
    return registry


@pytest.fixture
def served(tmp_path: Path, registry: Registry, tiny_items: Path) -> Iterator[Served]:
    with serving(tmp_path, registry.path / CURRENT, tiny_items, **SETTINGS) as process:
        yield process
        process.process.terminate()
        process.wait()


def status(
    registry: Registry, served: Served, *, wait_s: float
) -> subprocess.CompletedProcess[str]:
    where = ["--registry", str(registry.path), "--url", served.url, "--wait", str(wait_s)]
    return subprocess.run(
        [sys.executable, "-m", "service", "bundle", "status", *where, "--json"],
        env=environment(registry.path),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_workers_follow_the_pointer_there_and_back(
    tmp_path: Path, registry: Registry, served: Served, tiny_bundle: Path
) -> None:
    other = tiny.write(tmp_path / "bundles", seed=4)
    for move in (lambda: registry.publish(other), registry.roll_back):
        move()
        told = status(registry, served, wait_s=LIMIT_S / 2)

        assert told.returncode == 0, told.stderr
        assert json.loads(told.stdout)["workers"] == {registry.current: 2}
        answer = httpx.post(f"{served.url}/score", json={**BODY, "timeout_ms": 2000})
        assert answer.json()["bundle"] == registry.current
    assert registry.current == tiny_bundle.name


def test_status_says_which_bundle_was_not_followed_to(
    tmp_path: Path, registry: Registry, served: Served, tiny_bundle: Path
) -> None:
    # Whole, but it does not answer its golden rows as it should: the service alone can know.
    bad = tiny.write(
        tmp_path / "bundles", model=(tiny.write(tmp_path, seed=9) / MODEL).read_bytes()
    )
    registry.publish(bad)

    told = status(registry, served, wait_s=2.0)

    assert told.returncode == 4, (told.stderr, served.lines)
    assert f"2 of 2 workers do not serve {bad.name}" in told.stderr
    assert json.loads(told.stdout)["workers"] == {tiny_bundle.name: 2}
    assert json.loads(told.stdout)["refused"] == 2
    assert (registry.path / VERSIONS / tiny_bundle.name).is_dir()
