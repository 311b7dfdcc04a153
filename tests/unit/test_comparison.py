"""What a comparison says, from result files written by hand."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from model.comparison.picture import draw_frontier
from model.comparison.results import frontier, read_results, summarise
from model.comparison.tables import TextTable, markdown, tables
from model.comparison.worker import COST, Task
from model.config import TrainConfig

SPACES = {"cumulative": ["ctr", "ctcvr"], "conditional": ["cvr_clicked"]}
DRAW_NAMES = ("auc_ctr", "log_loss_ctr")
# Five draws of auc_ctr; the second column is log_loss_ctr.
DRAWS = {
    ("rival", 1): [0.70, 0.71, 0.69, 0.72, 0.68],
    ("rival", 2): [0.72, 0.73, 0.71, 0.74, 0.70],
    ("own", 1): [0.75, 0.77, 0.74, 0.75, 0.74],
    ("own", 2): [0.75, 0.77, 0.74, 0.75, 0.74],
}
AUC = {("rival", 1): 0.70, ("rival", 2): 0.72, ("own", 1): 0.75, ("own", 2): 0.75}


def make_task(path: Path, arm: str, seed: int) -> Task:
    config = TrainConfig.model_validate(
        {"data": {"impressions": path / "log.parquet", "schema_file": path / "schema.toml"}}
    )
    return Task(
        kind="train",
        arm=arm,
        seed=seed,
        config=config,
        cache=path / "cache",
        arm_dir=path / arm,
        data_key="data",
        fingerprint=f"{arm} {seed}",
        num_draws=5,
    )


def write_result(task: Task, **changes: Any) -> None:
    key = (task.arm, task.seed)
    content = {
        "arm": task.arm,
        "seed": task.seed,
        "kind": "lightgbm" if task.arm == "rival" else "net",
        "fingerprint": task.fingerprint,
        "spaces": SPACES,
        "test": {
            "auc_ctr": AUC[key],
            "auc_ctcvr": 0.9 if task.arm == "rival" else 0.8,
            "auc_cvr_clicked": None if key == ("own", 2) else 0.6,
            "log_loss_ctr": 0.5,
            "pcoc_ctr": 1.05,
            "pcoc_interval_ctr": [0.9, 1.1],
        },
        "uncalibrated": {"pcoc_ctr": 1.25},
        "parameters": 1000 * task.seed,
        "dense_parameters": 100,
        "rows_per_second": 50_000.0 * task.seed,
        "test_sha256": "the test rows",
        **changes,
    }
    task.arm_dir.mkdir(exist_ok=True)
    task.result_path.write_text(json.dumps(content))
    write_draws(task, DRAW_NAMES, [DRAWS[key], [0.5] * 5])


def write_draws(task: Task, names: tuple[str, ...], columns: list[list[float]]) -> None:
    np.savez(task.predictions_path, draws=np.array(columns).T, draw_names=np.array(names))


def write_cost(task: Task, microseconds: float, runtime: str = "ONNX Runtime") -> None:
    content = {
        "fingerprint": task.fingerprint,
        "microseconds_per_candidate": microseconds,
        "runtime": runtime,
    }
    (task.arm_dir / COST).write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Task]]:
    runs = {arm: [make_task(tmp_path, arm, seed) for seed in (1, 2)] for arm in ("rival", "own")}
    for tasks in runs.values():
        for task in tasks:
            write_result(task)
    write_cost(runs["rival"][0], 1.5, "LightGBM predict")
    write_cost(runs["own"][0], 4.0)
    return runs


def test_means_and_deviations_over_seeds(runs: dict[str, list[Task]]) -> None:
    summary = summarise(runs, reference="rival")
    assert summary is not None
    rival = next(arm for arm in summary.arms if arm.name == "rival")

    assert rival.seeds == (1, 2)
    assert rival.metrics["auc_ctr"].mean == pytest.approx(0.71)
    assert rival.metrics["auc_ctr"].deviation == pytest.approx(0.02 / np.sqrt(2))
    assert rival.metrics["raw_pcoc_ctr"].mean == pytest.approx(1.25)
    assert (rival.parameters, rival.rows_per_second) == (1500, 75_000.0)


def test_difference_is_of_means_and_its_interval_of_paired_draws(
    runs: dict[str, list[Task]],
) -> None:
    """Rival's draws, seeds averaged: .71 .72 .70 .73 .69; own's: .75 .77 .74 .75 .74.

    Differences .04 .05 .04 .02 .05, sorted .02 .04 .04 .05 .05: the 2.5 % quantile lies a tenth of
    the way from the first to the second, .022; the 97.5 % one is .05.
    """
    summary = summarise(runs, reference="rival")
    assert summary is not None
    own = next(arm for arm in summary.arms if arm.name == "own").metrics["auc_ctr"]

    assert own.difference == pytest.approx(0.04)
    assert own.interval == pytest.approx((0.022, 0.05))


def test_reference_has_no_difference_to_itself(runs: dict[str, list[Task]]) -> None:
    summary = summarise(runs, reference="rival")
    assert summary is not None
    rival = next(arm for arm in summary.arms if arm.name == "rival")

    assert rival.metrics["auc_ctr"].difference is None
    assert rival.metrics["auc_ctr"].interval is None


def test_other_test_rows_have_no_interval(runs: dict[str, list[Task]]) -> None:
    write_result(runs["own"][0], test_sha256="other rows")

    summary = summarise(runs, reference="rival")
    assert summary is not None
    own = next(arm for arm in summary.arms if arm.name == "own")

    assert not own.same_test_rows
    assert own.metrics["auc_ctr"].interval is None


def test_arms_with_a_step_more_are_compared_in_what_both_have(
    runs: dict[str, list[Task]],
) -> None:
    longer = {
        "cumulative": ["p_category", "ctr", "ctcvr"],
        "conditional": ["click_given_category", "cvr_clicked"],
    }
    for task in runs["own"]:
        write_result(task, spaces=longer)
        columns = [[0.9] * 5, DRAWS[(task.arm, task.seed)], [0.5] * 5]
        write_draws(task, ("auc_p_category", *DRAW_NAMES), columns)

    summary = summarise(runs, reference="rival")
    assert summary is not None
    own = next(arm for arm in summary.arms if arm.name == "own")

    assert summary.spaces == SPACES
    assert own.metrics["auc_ctr"].interval == pytest.approx((0.022, 0.05))


def test_metric_that_is_null_for_a_seed_is_left_out(runs: dict[str, list[Task]]) -> None:
    summary = summarise(runs, reference="rival")
    assert summary is not None

    held = {arm.name: "auc_cvr_clicked" in arm.metrics for arm in summary.arms}
    assert held == {"rival": True, "own": False}


def test_arms_are_ordered_by_the_last_steps_auc_or_as_told(runs: dict[str, list[Task]]) -> None:
    orders = []
    for sort_by in ("", "auc_ctr"):
        summary = summarise(runs, reference="rival", sort_by=sort_by)
        assert summary is not None
        orders.append([arm.name for arm in summary.arms])

    assert orders == [["rival", "own"], ["own", "rival"]]


def test_results_of_another_configuration_are_not_taken(runs: dict[str, list[Task]]) -> None:
    write_result(runs["own"][1], fingerprint="of before")

    assert [run.content["seed"] for run in read_results(runs["own"])] == [1]


@pytest.mark.parametrize("spoil", ["half", "gone"])
def test_result_without_whole_draws_is_not_taken(runs: dict[str, list[Task]], spoil: str) -> None:
    path = runs["own"][0].predictions_path
    whole = path.read_bytes()
    path.unlink()
    if spoil == "half":
        path.write_bytes(whole[: len(whole) // 2])

    assert [run.content["seed"] for run in read_results(runs["own"])] == [2]


def test_nothing_finished_has_no_summary(tmp_path: Path) -> None:
    assert summarise({"own": [make_task(tmp_path, "own", 1)]}, reference="own") is None


def test_frontier_is_what_no_other_beats() -> None:
    points = {
        "cheap": (1.0, 0.70),
        "dear": (9.0, 0.80),
        "middle": (4.0, 0.78),
        "worse and dearer than middle": (5.0, 0.77),
        "as good as middle, dearer": (4.5, 0.78),
        "as dear as cheap, worse": (1.0, 0.69),
        "twin of dear": (9.0, 0.80),
    }

    assert frontier(points) == ("cheap", "middle", "dear", "twin of dear")


def test_frontier_of_nothing_is_empty() -> None:
    assert frontier({}) == ()


def test_arms_on_the_frontier_have_a_star(runs: dict[str, list[Task]]) -> None:
    """By auc_ctr both are; by auc_ctcvr the rival is cheaper and better."""
    summary = summarise(runs, reference="rival")
    assert summary is not None
    accuracy = tables(summary)[0]
    cells = {row[0]: dict(zip(accuracy.columns, row, strict=True)) for row in accuracy.rows}

    assert cells["own"]["auc_ctr"] == "0.7500 ± 0.0000*"
    assert cells["own"]["auc_ctcvr"] == "0.8000 ± 0.0000"
    assert cells["rival"]["auc_ctcvr"] == "0.9000 ± 0.0000*"
    assert cells["own"]["auc_cvr_clicked"] == ""


def test_markdown_tells_differences_and_costs(runs: dict[str, list[Task]], tmp_path: Path) -> None:
    runs["late"] = [make_task(tmp_path, "late", 1)]
    summary = summarise(runs, reference="rival")
    assert summary is not None
    text = markdown(summary)

    assert "+40.00 [+22.00, +50.00]" in text
    assert "| rival | 1.50 | LightGBM predict | 1,500 | 100 | 75,000 |" in text
    assert "Without a finished run: late." in text


def test_cost_of_another_configuration_is_not_told(runs: dict[str, list[Task]]) -> None:
    write_cost(runs["own"][0].model_copy(update={"fingerprint": "of before"}), 4.0)

    summary = summarise(runs, reference="rival")
    assert summary is not None

    assert {arm.name: arm.microseconds for arm in summary.arms} == {"rival": 1.5, "own": None}
    assert summary.frontier["auc_ctr"] == ("rival",)


def test_picture_has_a_panel_per_cumulative_step(
    runs: dict[str, list[Task]], tmp_path: Path
) -> None:
    summary = summarise(runs, reference="rival")
    assert summary is not None

    draw_frontier(summary, tmp_path / "frontier.png")

    with Image.open(tmp_path / "frontier.png") as image:
        width, height = image.size
    assert width > 2 * height


WIDE = TextTable(
    title="Accuracy",
    caption="Means.",
    columns=("arm", "auc_first", "auc_second", "auc_third"),
    rows=[("one", "0.1", "0.2", "0.3"), ("another", "0.4", "0.5", "0.6")],
)


def test_wide_table_is_in_parts_each_with_the_arms() -> None:
    """Characters: 1, then 7 + 3 of the arms, 9 + 3, 10 + 3 and 9 + 3 of the columns."""
    parts = WIDE.parts(36)

    assert [part.columns for part in parts] == [
        ("arm", "auc_first", "auc_second"),
        ("arm", "auc_third"),
    ]
    assert [part.rows for part in parts] == [
        [("one", "0.1", "0.2"), ("another", "0.4", "0.5")],
        [("one", "0.3"), ("another", "0.6")],
    ]
    assert [part.title for part in parts] == ["Accuracy", "Accuracy, continued"]
    assert [part.caption for part in parts] == ["", "Means."]


@pytest.mark.parametrize(("width", "num_parts"), [(48, 1), (47, 2), (36, 2), (35, 3), (1, 3)])
def test_parts_are_as_few_as_fit(width: int, num_parts: int) -> None:
    assert len(WIDE.parts(width)) == num_parts


@pytest.mark.parametrize("width", [48, 36, 24])
def test_no_part_is_cut_on_a_console_of_its_width(width: int) -> None:
    console = Console(width=width, file=io.StringIO())

    for part in WIDE.parts(width):
        console.print(part.rich())

    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "…" not in shown
    for text in (*WIDE.columns, *(cell for row in WIDE.rows for cell in row)):
        assert text in shown
