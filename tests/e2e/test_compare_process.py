"""`ctr compare` as a process, of which one arm fails; once more without it, nothing is run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_verbs_process import write_tables

from model.comparison.plan import load_compare, make_plan
from model.comparison.results import read_draws
from model.comparison.worker import do
from model.verbs_compare import compare

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
set = ["net.architecture=shared_bottom", "net.options={}", "optimizer.min_steps=0"]
"""
FAILING = """
[[arms]]
name = "failing"
kind = "lightgbm"
options = { first = { num_leaves = -5 } }
"""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison's directory and its process."""

    path: Path
    done: subprocess.CompletedProcess[str]

    @property
    def arguments(self) -> list[str]:
        return arguments(self.path)


def arguments(path: Path) -> list[str]:
    options = {"--out": path / "out", "--cache": path / "cache"}
    return [str(path / "compare.toml"), *(str(p) for pair in options.items() for p in pair)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    path = tmp_path_factory.mktemp("compare")
    write_tables(path)
    (path / "compare.toml").write_text(ARMS + FAILING)
    command = [sys.executable, "-m", "service", "compare", *arguments(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Compared(path=path, done=done)


def test_failed_run_is_named_and_the_others_are_shown(compared: Compared) -> None:
    assert compared.done.returncode == 3
    assert "1 failed" in compared.done.stderr
    assert "failing seed 1: " in compared.done.stderr
    assert "num_leaves" in compared.done.stderr
    assert "Traceback" not in compared.done.stderr
    assert "without a finished run: failing" in compared.done.stdout


def test_everything_is_written(compared: Compared) -> None:
    out = compared.path / "out"

    summary = json.loads((out / "summary.json").read_text())
    plain = next(arm for arm in summary["arms"] if arm["name"] == "plain")
    assert sorted(arm["name"] for arm in summary["arms"]) == ["plain", "trees"]
    assert plain["microseconds"] > 0
    assert plain["metrics"]["auc_ctr"]["interval"] is not None
    assert "Difference to trees" in (out / "table.md").read_text()
    assert (out / "frontier.png").stat().st_size > 10_000
    assert [p.name for p in (out / "plain" / "run-1").glob("*.pt")] == ["weights.pt"]


def test_kept_predictions_are_a_chain(compared: Compared) -> None:
    for arm in ("trees", "plain"):
        with np.load(compared.path / "out" / arm / "seed-1.npz") as kept:
            cumulative, conditional = kept["cumulative"], kept["conditional"]
            assert kept["draws"].shape[0] == 40
        assert cumulative.dtype == conditional.dtype == np.float32
        assert (cumulative[:, 1] <= cumulative[:, 0]).all()
        np.testing.assert_array_equal(cumulative[:, 0], conditional[:, 0])


def test_more_draws_are_made_of_the_kept_predictions(compared: Compared) -> None:
    config = load_compare(compared.path / "compare.toml")
    more = config.model_copy(update={"draws": 60})
    plan = make_plan(more, out=compared.path / "out", cache=compared.path / "cache")
    task = plan.runs["plain"][0]
    before = read_draws(task.predictions_path)

    do(task.model_copy(update={"kind": "draw"}), say=lambda text: None)

    after = read_draws(task.predictions_path)
    assert before is not None
    assert after is not None
    assert len(after.values) == 60
    np.testing.assert_array_equal(after.values[:40], before.values)
    do(task.model_copy(update={"kind": "draw", "num_draws": 40}), say=lambda text: None)


def test_finished_runs_are_not_run_again(compared: Compared) -> None:
    (compared.path / "compare.toml").write_text(ARMS)
    kept = [compared.path / "out" / arm / "seed-1.json" for arm in ("trees", "plain")]
    before = [path.stat().st_mtime_ns for path in kept]

    again = CliRunner().invoke(compare, compared.arguments, catch_exceptions=False)

    assert again.exit_code == 0
    assert "2 of 2 runs are finished and kept" in again.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before
