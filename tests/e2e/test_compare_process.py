"""`ctr compare` as a process: one arm fails, the other stays; mended, only the mended one runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_verbs_process import write_tables

pytestmark = pytest.mark.process

ARMS = """
config = "train.toml"
reference = "trees"
seeds = [1]
draws = 40
[[arms]]
name = "trees"
kind = "lightgbm"
options = { max_rounds = 20 }
[[arms]]
name = "plain"
set = ["net.architecture=ARCHITECTURE", "net.options={}", "optimizer.min_steps=0"]
"""


def compare(path: Path, architecture: str) -> subprocess.CompletedProcess[str]:
    (path / "compare.toml").write_text(ARMS.replace("ARCHITECTURE", architecture))
    command = [sys.executable, "-m", "service", "compare", str(path / "compare.toml")]
    return subprocess.run(
        [*command, "--out", str(path / "out"), "--cache", str(path / "cache")],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[subprocess.CompletedProcess[str]], list[int]]:
    """First with an architecture that does not exist, then with one that does."""
    path = tmp_path_factory.mktemp("compare")
    write_tables(path)
    done, written = [], []
    for architecture in ("no_such", "shared_bottom"):
        done.append(compare(path, architecture))
        written.append((path / "out" / "trees" / "seed-1.json").stat().st_mtime_ns)
    return path, done, written


def test_failed_run_is_named_and_the_others_are_shown(both: tuple) -> None:
    _, (first, _), _ = both

    assert first.returncode == 3
    assert "1 failed" in first.stderr
    assert "plain seed 1: no architecture 'no_such'" in first.stderr
    assert "Traceback" not in first.stderr
    assert "trees" in first.stdout


def test_finished_run_is_not_run_again(both: tuple) -> None:
    _, (_, second), written = both

    assert second.returncode == 0, second.stderr
    assert written[0] == written[1]
    assert "1 of 2 runs are finished and kept" in second.stderr


def test_everything_is_written(both: tuple) -> None:
    path, _, _ = both
    out = path / "out"

    summary = json.loads((out / "summary.json").read_text())
    plain = next(arm for arm in summary["arms"] if arm["name"] == "plain")
    assert len(summary["arms"]) == 2
    assert plain["microseconds"] > 0
    assert plain["metrics"]["auc_ctr"]["interval"] is not None
    assert "Difference to trees" in (out / "table.md").read_text()
    assert (out / "frontier.png").stat().st_size > 10_000
    assert sorted(p.name for p in (out / "plain" / "run-1").iterdir() if p.suffix == ".pt") == [
        "weights.pt"
    ]


def test_kept_predictions_are_a_chain(both: tuple) -> None:
    path, _, _ = both

    for arm in ("trees", "plain"):
        with np.load(path / "out" / arm / "seed-1.npz") as kept:
            cumulative, conditional = kept["cumulative"], kept["conditional"]
            assert kept["draws"].shape[0] == 40
        assert cumulative.dtype == conditional.dtype == np.float32
        assert (cumulative[:, 1] <= cumulative[:, 0]).all()
        np.testing.assert_array_equal(cumulative[:, 0], conditional[:, 0])
