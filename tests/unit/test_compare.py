"""The comparison's file, its plan, what is run again, and workers that fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tomli_w

from model.comparison.plan import CompareConfig, Plan, execute, load_compare, make_plan
from model.comparison.pool import Report, run_tasks
from model.comparison.worker import Task, claim_run_dir
from model.contract.errors import SpecError

ROOT = Path(__file__).parent.parent.parent
CONFIG: dict[str, Any] = {
    "config": "train.toml",
    "reference": "trees",
    "seeds": [1, 2],
    "arms": [
        {"name": "trees", "kind": "lightgbm", "options": {"max_rounds": 30}},
        {"name": "plain", "set": ["net.architecture=shared_bottom"]},
    ],
}
SCHEMA = {
    "steps": [{"name": "click", "label": "click"}, {"name": "buy", "label": "buy"}],
    "features": [{"name": "brand", "kind": "categorical", "scope": "item", "source": "request"}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A comparison's file beside its base configuration and a log."""
    pl.DataFrame({"brand": ["a", "b"], "click": [0, 1], "buy": [0, 0]}).write_parquet(
        tmp_path / "log.parquet"
    )
    (tmp_path / "schema.toml").write_text(tomli_w.dumps(SCHEMA))
    train = {"data": {"impressions": "log.parquet", "schema_file": "schema.toml"}}
    (tmp_path / "train.toml").write_text(tomli_w.dumps(train))
    (tmp_path / "compare.toml").write_text(tomli_w.dumps(CONFIG))
    return tmp_path / "compare.toml"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(tomli_w.dumps({**CONFIG, **changes}))


def plan_of(path: Path, *, only: tuple[str, ...] = ()) -> Plan:
    out, cache = path.parent / "out", path.parent / "cache"
    return make_plan(load_compare(path), out=out, cache=cache, only=only)


def finish(task: Task) -> None:
    task.arm_dir.mkdir(parents=True, exist_ok=True)
    task.result_path.write_text(json.dumps({"fingerprint": task.fingerprint}))
    np.savez(task.predictions_path, draws=np.zeros((300, 1)), draw_names=np.array(["auc_ctr"]))


def test_plan_has_a_run_per_arm_and_seed(path: Path) -> None:
    plan = plan_of(path)

    told = {name: [task.config.optimizer.seed for task in t] for name, t in plan.runs.items()}
    assert told == {"trees": [1, 2], "plain": [1, 2]}
    assert plan.runs["plain"][0].config.net.architecture == "shared_bottom"
    assert plan.runs["trees"][0].boosting is not None
    assert plan.runs["trees"][0].boosting.max_rounds == 30
    assert plan.finished == plan.changed == set()


def test_arms_with_the_same_data_share_them(path: Path) -> None:
    split = {"name": "other", "set": ["split.test_share=0.2"]}
    rewrite(path, arms=[*CONFIG["arms"], split])

    runs = plan_of(path).runs
    keys = {name: {task.data_key for task in tasks} for name, tasks in runs.items()}
    assert keys["trees"] == keys["plain"] != keys["other"]
    assert len(keys["trees"]) == len(keys["other"]) == 1


def test_arm_whose_data_fail_does_not_stop_the_preparation_of_others(path: Path) -> None:
    """This log has no user ids, so that nothing can be encoded: each data set says so, once."""
    split = {"name": "other", "set": ["split.test_share=0.2"]}
    rewrite(path, arms=[*CONFIG["arms"], split])
    silent = Report(
        on_start=lambda task: None,
        on_say=lambda task, text: None,
        on_end=lambda task, seconds, error: None,
    )

    failures = execute(plan_of(path), num_workers=2, report=silent)

    assert list(failures) == ["data of trees", "data of other"]
    assert "user_id" in failures["data of other"]


def test_common_overrides_come_before_an_arms_own(path: Path) -> None:
    arms = [{"name": "a"}, {"name": "b", "set": ["optimizer.max_epochs=3"]}]
    rewrite(path, arms=arms, reference="a", set=["optimizer.max_epochs=2", "net.architecture=ple"])

    runs = plan_of(path).runs
    assert [runs[name][0].config.optimizer.max_epochs for name in "ab"] == [2, 3]
    assert [runs[name][0].config.net.architecture for name in "ab"] == ["ple", "ple"]


def test_grid_is_the_cross_product(path: Path) -> None:
    grid = {"architectures": ["tafe", "shared_bottom"], "objectives": ["e2e"]}
    rewrite(path, arms=[], grid=grid, reference="tafe+e2e")

    runs = plan_of(path).runs
    assert list(runs) == ["tafe+e2e", "shared_bottom+e2e"]
    assert runs["shared_bottom+e2e"][0].config.net.architecture == "shared_bottom"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reference": "nobody"}, "reference 'nobody' is no arm; arms: trees, plain"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seed '1' is there twice"),
        ({"arms": []}, "there are no arms"),
        ({"arms": [CONFIG["arms"][0]] * 2}, "arm 'trees' is there twice"),
        ({"epochs": 3}, "epochs"),
        ({"arms": [{"name": "trees", "rounds": 3}]}, "rounds"),
        ({"arms": [{"name": "../trees"}]}, "arms"),
        ({"arms": [{"name": "trees", "options": {}}]}, "'options' are of lightgbm"),
        ({"arms": [{"name": "trees", "kind": "lightgbm", "set": ["a.b=1"]}]}, "'set' is of net"),
        (
            {"arms": [{"name": "trees", "kind": "lightgbm", "options": {"rounds": 3}}]},
            "rounds",
        ),
    ],
)
def test_fault_in_the_file_is_named(path: Path, changes: dict[str, Any], says: str) -> None:
    rewrite(path, **changes)

    with pytest.raises(SpecError, match=says):
        load_compare(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.batch_rows=-1", "arm 'plain'.*batch_rows"),
        ("optimizer.seed=7", "arm 'plain' sets optimizer.seed"),
        ("nonsense", "arm 'plain'.*is not section.key=value"),
    ],
)
def test_fault_in_an_arm_is_found_before_anything_runs(
    path: Path, override: str, says: str
) -> None:
    rewrite(path, arms=[CONFIG["arms"][0], {"name": "plain", "set": [override]}])

    with pytest.raises(SpecError, match=says):
        plan_of(path)


def test_unknown_arm_is_named(path: Path) -> None:
    with pytest.raises(SpecError, match="no arm 'nobody'; there are trees, plain"):
        plan_of(path, only=("nobody",))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no comparison at"):
        load_compare(tmp_path / "compare.toml")


def test_finished_run_is_known_again(path: Path) -> None:
    finish(plan_of(path).runs["plain"][1])

    plan = plan_of(path)
    assert plan.finished == {"plain seed 2"}
    assert plan.changed == set()


def test_run_without_its_predictions_is_not_finished(path: Path) -> None:
    task = plan_of(path).runs["plain"][1]
    finish(task)
    task.predictions_path.unlink()

    assert plan_of(path).finished == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": [CONFIG["arms"][0], {"name": "plain", "set": ["optimizer.learning_rate=0.1"]}]},
        {"arms": [CONFIG["arms"][0], {"name": "plain", "kind": "lightgbm"}]},
    ],
)
def test_run_of_another_configuration_is_run_again(path: Path, changes: dict[str, Any]) -> None:
    finish(plan_of(path).runs["plain"][0])
    rewrite(path, **changes)

    plan = plan_of(path)
    assert plan.finished == set()
    assert plan.changed == {"plain seed 1"}


def test_run_on_other_data_is_run_again(path: Path) -> None:
    finish(plan_of(path).runs["plain"][0])
    log = pl.DataFrame({"brand": ["a", "c"], "click": [0, 1], "buy": [0, 0]})
    log.write_parquet(path.parent / "log.parquet")

    assert plan_of(path).changed == {"plain seed 1"}


@pytest.mark.parametrize(
    "changes", [{"draws": 50}, {"seeds": [1, 2, 3]}, {"sort_by": "auc_p_click"}]
)
def test_what_no_run_depends_on_keeps_it(path: Path, changes: dict[str, Any]) -> None:
    finish(plan_of(path).runs["plain"][0])
    rewrite(path, **changes)

    assert plan_of(path).finished == {"plain seed 1"}


def test_number_of_threads_and_place_of_the_data_keep_a_run(path: Path, tmp_path: Path) -> None:
    finish(plan_of(path).runs["plain"][0])
    os.link(path.parent / "log.parquet", path.parent / "copy.parquet")
    train = path.parent / "train.toml"
    content = train.read_text().replace("log.parquet", "copy.parquet")
    train.write_text(content + "\n[optimizer]\nnum_threads = 3\n")

    assert plan_of(path).finished == {"plain seed 1"}


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [({}, True), ({"fingerprint": "of now"}, False), ({"num_threads": 2}, False)],
)
def test_stopped_run_goes_on_from_its_own_checkpoint_only(
    path: Path, changes: dict[str, Any], is_kept: bool
) -> None:
    task = plan_of(path).runs["plain"][0]
    claim_run_dir(task)
    checkpoint = task.run_dir / "checkpoint.pt"
    checkpoint.touch()

    claim_run_dir(task.model_copy(update=changes))

    assert checkpoint.exists() is is_kept


def test_shipped_comparison_is_valid() -> None:
    shipped = ROOT / "model" / "datasets" / "complete_journey_compare.toml"

    config = CompareConfig.model_validate(tomllib.loads(shipped.read_text()))

    assert config.reference in [arm.name for arm in config.all_arms()]


def wait_for_reader(fifo: Path) -> int:
    """A descriptor of the writing end, once a worker reads the other one; it waits for bytes."""
    for _ in range(12_000):  # two minutes: importing is slow on a busy machine
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    raise AssertionError("no worker came to read")


@pytest.fixture
def stuck(path: Path) -> tuple[Task, Path]:
    """A task whose worker waits for a log that never comes, and that log."""
    task = plan_of(path).runs["plain"][0]
    fifo = path.parent / "log.parquet"
    fifo.unlink()
    os.mkfifo(fifo)
    return task, fifo


def test_interrupt_ends_the_workers(stuck: tuple[Task, Path]) -> None:
    task, fifo = stuck
    ends: list[int] = []

    def interrupt() -> None:
        ends.append(wait_for_reader(fifo))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    silent = Report(
        on_start=lambda task: None,
        on_say=lambda task, text: None,
        on_end=lambda task, seconds, error: None,
    )
    with pytest.raises(KeyboardInterrupt):
        run_tasks([task], num_workers=1, report=silent)

    with pytest.raises(BrokenPipeError):
        os.write(ends[0], b"x")
    os.close(ends[0])


def test_worker_ends_when_its_parent_is_gone(stuck: tuple[Task, Path]) -> None:
    """However the parent ended, its end of the pipe is closed."""
    task, fifo = stuck
    command = [sys.executable, "-m", "model.comparison.worker", task.model_dump_json()]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=ROOT
    ) as worker:
        end = wait_for_reader(fifo)
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(120) == 1
    os.close(end)


def test_worker_that_fails_tells_why_and_the_others_go_on(path: Path) -> None:
    """Neither has enough of a log: both fail, each with its own words."""
    tasks = plan_of(path).runs["plain"]
    lost = tasks[0].config.data.model_copy(update={"impressions": Path("/nowhere.parquet")})
    tasks[0] = tasks[0].model_copy(
        update={"config": tasks[0].config.model_copy(update={"data": lost})}
    )
    ended: list[tuple[str, str | None]] = []
    report = Report(
        on_start=lambda task: None,
        on_say=lambda task, text: None,
        on_end=lambda task, seconds, error: ended.append((task.name, error)),
    )

    errors = run_tasks(tasks, num_workers=2, report=report)

    assert sorted(name for name, _ in ended) == ["plain seed 1", "plain seed 2"]
    assert dict(ended) == errors
    assert "/nowhere.parquet" in errors["plain seed 1"]
    assert "/nowhere.parquet" not in errors["plain seed 2"]
