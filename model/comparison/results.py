"""What a comparison's results say: means, paired intervals, and which arms no other one beats."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.comparison.bootstrap import DrawnMetrics
from model.comparison.worker import COST, Task

INTERVAL = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run: its result file, and its metrics under the draws of users."""

    content: dict[str, Any]  # Any: JSON
    drawn: DrawnMetrics


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of one arm.

    Attributes:
        mean, deviation: over seeds; the deviation (n - 1) is None for one seed.
        difference: of the mean to the reference's; None for the reference itself.
        interval: 95 % of the difference, over draws of users, seeds averaged; None where no draws
            are kept of the metric, or the test rows differ.
    """

    mean: float
    deviation: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """One row of the table.

    Attributes:
        metrics: by name, as in `chain_metrics`; `raw_pcoc_...` before calibration.
        microseconds: CPU time per candidate; None where it is not measured yet.
        runtime: what that was measured in.
        same_test_rows: as the reference; without them there are no intervals.
    """

    name: str
    kind: str
    seeds: tuple[int, ...]
    metrics: dict[str, Estimate]
    parameters: int
    dense_parameters: int
    rows_per_second: float
    microseconds: float | None
    runtime: str
    same_test_rows: bool = True


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A comparison's outcome.

    Attributes:
        spaces: names of the cumulative and of the conditional steps' metrics.
        arms: ordered by `sort_by`, the best first.
        frontier: by AUC metric of the cumulative steps, the arms that no other one beats in both
            that and cost, the cheapest first.
        missing: arms without a finished run.
        failures: errors by run.
    """

    reference: str
    sort_by: str
    spaces: dict[str, list[str]]
    num_draws: int
    arms: list[ArmSummary]
    frontier: dict[str, tuple[str, ...]]
    missing: list[str]
    failures: dict[str, str] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:  # Any: JSON
        """Plain data."""
        return asdict(self)


def summarise(
    runs: Mapping[str, Sequence[Task]],
    *,
    reference: str,
    sort_by: str = "",
    failures: Mapping[str, str] | None = None,
) -> Summary | None:
    """Reads every finished run of the plan; None when there is none.

    Results of another configuration than the plan's are not taken.
    """
    results = {name: read_results(tasks) for name, tasks in runs.items()}
    present = {name: found for name, found in results.items() if found}
    if not present:
        return None
    first = next(iter(present.values()))[0]
    # Arms may differ in the steps before the served ones.
    spaces = {
        kind: _shared([found[0].content["spaces"][kind] for found in present.values()])
        for kind in first.content["spaces"]
    }
    sort_by = sort_by or f"auc_{spaces['cumulative'][-1]}"
    base = present.get(reference)
    arms = [
        _summarise_arm(found, None if name == reference else base, _read_cost(runs[name]))
        for name, found in present.items()
    ]
    arms.sort(key=lambda arm: _order(arm, sort_by))
    return Summary(
        reference=reference,
        sort_by=sort_by,
        spaces=spaces,
        num_draws=len(first.drawn.values),
        arms=arms,
        frontier={
            metric: frontier(
                {
                    arm.name: (arm.microseconds, arm.metrics[metric].mean)
                    for arm in arms
                    if arm.microseconds is not None and metric in arm.metrics
                }
            )
            for metric in (f"auc_{name}" for name in spaces["cumulative"])
        },
        missing=[name for name in runs if name not in present],
        failures=dict(failures or {}),
    )


def frontier(points: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """Names that no other one beats, by rising cost.

    A point is (cost, accuracy); one beats another if it is no dearer and no worse, and either
    cheaper or better.
    """
    kept = []
    for name, (cost, accuracy) in points.items():
        beaten = any(
            c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points.values()
        )
        if not beaten:
            kept.append(name)
    return tuple(sorted(kept, key=lambda name: points[name]))


def read_results(tasks: Sequence[Task]) -> list[RunResult]:
    """Results of those tasks that are finished as they stand."""
    results = []
    for task in tasks:
        content = read_json(task.result_path)
        drawn = read_draws(task.predictions_path)
        if content is not None and content["fingerprint"] == task.fingerprint and drawn is not None:
            results.append(RunResult(content=content, drawn=drawn))
    return results


def read_json(path: Path) -> dict[str, Any] | None:  # Any: JSON
    """A kept file's content; None where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "fingerprint" in content else None


def read_draws(path: Path) -> DrawnMetrics | None:
    """The kept draws of a run; None where there are none, or the file is damaged."""
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as kept:
            return DrawnMetrics(names=tuple(kept["draw_names"].tolist()), values=kept["draws"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _summarise_arm(
    runs: Sequence[RunResult],
    reference: Sequence[RunResult] | None,
    cost: Mapping[str, Any],
) -> ArmSummary:
    own = _means(runs)
    other = None if reference is None else _means(reference)
    pairs = None if reference is None else _drawn_differences(runs, reference)
    metrics = {}
    for name, values in own.items():
        difference = None
        if other is not None and name in other:
            difference = float(np.mean(values) - np.mean(other[name]))
        metrics[name] = Estimate(
            mean=float(np.mean(values)),
            deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
            difference=difference,
            interval=None if pairs is None else pairs.get(name),
        )
    contents = [run.content for run in runs]
    return ArmSummary(
        name=contents[0]["arm"],
        kind=contents[0]["kind"],
        seeds=tuple(content["seed"] for content in contents),
        metrics=metrics,
        parameters=round(np.mean([content["parameters"] for content in contents])),
        dense_parameters=round(np.mean([content["dense_parameters"] for content in contents])),
        rows_per_second=float(np.mean([content["rows_per_second"] for content in contents])),
        microseconds=cost.get("microseconds_per_candidate"),
        runtime=cost.get("runtime", ""),
        same_test_rows=reference is None or _same_rows(runs, reference),
    )


def _means(runs: Sequence[RunResult]) -> dict[str, list[float]]:
    """Each metric's value by seed; those that are null in some run are left out."""
    per_run = [
        {
            **run.content["test"],
            **{f"raw_{name}": value for name, value in run.content["uncalibrated"].items()},
        }
        for run in runs
    ]
    return {
        name: [values[name] for values in per_run]
        for name in per_run[0]
        if all(isinstance(values.get(name), float) for values in per_run)
    }


def _same_rows(runs: Sequence[RunResult], reference: Sequence[RunResult]) -> bool:
    return len({run.content["test_sha256"] for run in (*runs, *reference)}) == 1


def _drawn_differences(
    runs: Sequence[RunResult], reference: Sequence[RunResult]
) -> dict[str, tuple[float, float]] | None:
    """Interval of each metric's difference; draw k of both sides is of the same users."""
    both = (*runs, *reference)
    if not _same_rows(runs, reference) or len({len(run.drawn.values) for run in both}) > 1:
        return None
    intervals = {}
    for name in _shared([run.drawn.names for run in both]):
        own, other = (
            np.mean([run.drawn.values[:, run.drawn.names.index(name)] for run in side], axis=0)
            for side in (runs, reference)
        )
        values = own - other
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.quantile(values, INTERVAL)
            intervals[name] = (float(low), float(high))
    return intervals


def _shared(names: Sequence[Sequence[str]]) -> list[str]:
    """Those that all have, in the first one's order."""
    return [name for name in names[0] if all(name in other for other in names)]


def _read_cost(tasks: Sequence[Task]) -> dict[str, Any]:
    """The arm's measured cost, of one of its runs as they stand; empty without."""
    content = read_json(tasks[0].arm_dir / COST)
    fits = content is not None and content["fingerprint"] in {task.fingerprint for task in tasks}
    return content if content is not None and fits else {}


def _order(arm: ArmSummary, sort_by: str) -> float:
    """Rising: the best AUC first, but the lowest loss first; arms without the metric last."""
    if sort_by not in arm.metrics:
        return float("inf")
    mean = arm.metrics[sort_by].mean
    return -mean if sort_by.startswith(("auc_", "gauc_")) else mean
