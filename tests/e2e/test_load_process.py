"""`ctr load` as a process: a stand of its own, scenarios, exit codes; and k6 beside it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import tiny

from loadtest.procs import tree
from loadtest.rig import free_port, wait_for_port
from loadtest.scenarios import SCENARIOS
from loadtest.second_opinion import run_k6
from model.contract.record import pack_record

pytestmark = [pytest.mark.process, pytest.mark.redis]

# A machine under test is no quiet one: nothing here says how fast anything is.
LENIENT = ("--no-pin", "--late-ms", "10000", "--distinct", "50", "--timeout-ms", "2000")


@pytest.fixture
def stand(tiny_bundle: Path, tiny_items: Path, tmp_path: Path) -> list[str]:
    """Options for a service of its own."""
    records = tmp_path / "records.parquet"
    users = [str(number) for number in range(1, 20)]
    frame = pl.DataFrame({"user_id": users, "record": [pack_record(tiny.record())] * len(users)})
    frame.write_parquet(records)
    paths = ("--bundle", tiny_bundle, "--items", tiny_items, "--records", records)
    return [*(str(part) for part in paths), "--candidates", "3"]


def _load(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "service", "load", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_one_rate_writes_its_figures_and_a_void_run_is_exit_code_4(
    stand: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--no-pin", "--rate", "40", "--seconds", "1", "--late-ms", "0")
    done = _load(*stand, *options, "--out", str(out))
    assert done.returncode == 4
    assert "void, the generator was late" in done.stderr
    assert "200/s" in done.stdout
    (run,) = json.loads((out / "load.json").read_text())["runs"].values()
    assert "200" in run["statuses"]
    assert run["void"].startswith("the generator was late")
    assert run["server"]["cpu_us"] > run["server"]["run_us"] > 0.0
    assert run["latency_ms"]["p50"] <= run["latency_ms"]["p99"]


def test_scenarios_hold_on_a_small_service(stand: list[str]) -> None:
    names = ("redis-stall", "sigterm", "poisoned")
    chosen = [part for name in names for part in ("--scenario", name)]
    done = _load(*stand, *LENIENT, *chosen, "--seconds", "0.8", "--saturation", "80", "--json")
    assert done.returncode == 0, done.stderr
    found = {entry["name"]: entry for entry in json.loads(done.stdout)["scenarios"]}
    assert found.keys() == set(names)
    assert found["poisoned"]["facts"]["others_compared"] > 10
    assert found["sigterm"]["facts"]["exit_code"] == 0
    assert found["redis-stall"]["facts"]["degraded_share_while_away"] > 0.9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--bundle"),
        (("--url", "http://127.0.0.1"), "port"),
        (("--scenario", "flood"), "flood"),
    ],
)
def test_wrong_use_is_exit_code_2(options: tuple[str, ...], says: str, tmp_path: Path) -> None:
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"user_id": 1, "candidates": [1]}\n')
    done = _load(*options, "--bodies", str(bodies))
    assert done.returncode == 2
    assert says in done.stderr


def test_no_service_at_the_url_is_said_in_words(tmp_path: Path) -> None:
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"user_id": 1, "candidates": [1]}\n')
    done = _load("--url", f"http://127.0.0.1:{free_port()}", "--bodies", str(bodies))
    assert done.returncode == 1
    assert "cannot reach" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_ends_what_the_load_test_has_started(stand: list[str]) -> None:
    command = [sys.executable, "-m", "service", "load", *stand, *LENIENT, "--seconds", "60"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120.0
    while len(started := tree(process.pid)) < 4:  # itself, Redis, service, generator
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 143
    deadline = time.monotonic() + 5.0  # a child of a child may take a moment longer
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_k6_sends_the_same_bodies_at_the_rate() -> None:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "loadtest.nullserver", str(port)])
    try:
        wait_for_port(port)
        url = f"http://127.0.0.1:{port}/score"
        result = run_k6(url, [b'{"n":1}', b'{"n":2}'], rate=40, seconds=2, cpu=None)
    finally:
        server.kill()
        server.wait(10)
    assert result["requests"] + result["dropped"] == pytest.approx(80, abs=2)
    assert result["failed_share"] == 0.0
    assert result["p50"] <= result["p99"]


def test_every_scenario_of_the_issue_is_there() -> None:
    assert SCENARIOS.keys() >= {
        *("steady", "step", "burst", "redis-stall", "redis-gone", "bundle-swap", "sigterm"),
        *("item-swap", "poisoned"),
    }
