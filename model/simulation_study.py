"""The simulation of papers.md 1.7 with whole trainings: objectives against restricted features.

    python -m model.simulation_study --rows 1200000 --seeds 5 --out runs/simulation

Not a test: one training of 1.2 million impressions takes a minute or so. Each one's result is a
file under OUT; a study that was stopped, or is given more seeds, goes on from there. After a change
of the code, take another OUT.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import tomli_w
from rich.console import Console
from rich.table import Table

from model.calibrate import calibrated_probabilities
from model.config import TrainConfig, load_config
from model.console import spinner, without_nan
from model.contract.spec import load_schema
from model.dataset import EncodedData, prepare
from model.datasets.simulate import Simulation, schema_content, write_simulation
from model.evaluate import calibrate_run, evaluate_run
from model.nets.layers import Net
from model.run import read_run, write_run
from model.train import CHECKPOINT, Progress, predict, train
from model.truth import truth_metrics

Features = Literal["restricted", "rich"]
FEATURES: tuple[Features, ...] = ("restricted", "rich")
OBJECTIVES = ("e2e", "chain", "ipw", "dr")
# Of the evaluation; and by calibrators that are never the identity, so that what calibration does
# is seen where the default finds none to be needed.
UNCALIBRATED, CALIBRATED, FORCED = "truth_uncalibrated", "truth", "truth_forced_calibration"
FORCED_METHODS = ("platt", "isotonic")
COLUMNS = (
    ("PCOC CVR(D)", UNCALIBRATED, "pcoc_cvr_all"),
    ("calibrated", CALIBRATED, "pcoc_cvr_all"),
    ("forced", FORCED, "pcoc_cvr_all"),
    ("RMSE CVR(D)", UNCALIBRATED, "rmse_cvr_all"),
    ("PCOC CTCVR", UNCALIBRATED, "pcoc_ctcvr"),
    ("calibrated", CALIBRATED, "pcoc_ctcvr"),
    ("forced", FORCED, "pcoc_ctcvr"),
)

Results = dict[str, dict[str, float]]  # by section of the evaluation, by metric


def run_seed(
    out: Path,
    simulation: Simulation,
    *,
    objectives: Sequence[str],
    overrides: Sequence[str],
    progress: Callable[[str], None],
) -> None:
    """Simulates once and trains everything of this seed that has no result yet.

    Both sets of features are of the same impressions, so that they can be compared within a seed.
    """
    data_dir = out / "data" / f"{simulation.rows}-{simulation.seed}"
    for features in FEATURES:
        todo = [
            name for name in objectives if not result_path(out, simulation, features, name).exists()
        ]
        if not todo:
            continue
        if not (data_dir / "train.toml").exists():
            write_simulation(data_dir, replace(simulation, features="rich"), progress=progress)
        schema_file = data_dir / f"schema_{features}.toml"
        schema_file.write_text(
            tomli_w.dumps(schema_content(replace(simulation, features=features)))
        )
        base = load_config(
            data_dir / "train.toml",
            overrides=[*overrides, f'data.schema_file="{schema_file.name}"'],
        )
        data = prepare(base, schema=load_schema(schema_file), progress=progress)
        for name in todo:
            progress(f"seed {simulation.seed}, {features} features: training by {name}")
            config = base.model_copy(
                update={"objective": base.objective.model_copy(update={"name": name})}
            )
            path = result_path(out, simulation, features, name)
            results = _train_and_measure(config, data, run_dir=out / "runs" / path.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(without_nan(results), indent=1))
    shutil.rmtree(data_dir, ignore_errors=True)


def result_path(out: Path, simulation: Simulation, features: Features, objective: str) -> Path:
    """Where one training's result lies."""
    return out / "results" / f"{features}-{objective}-{simulation.rows}-{simulation.seed}.json"


def summarize(
    out: Path, simulations: Sequence[Simulation], *, objectives: Sequence[str]
) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Mean and standard deviation over seeds of every metric, by "features-objective"."""
    summary: dict[str, dict[str, Any]] = {}
    for features in FEATURES:
        for name in objectives:
            paths = [result_path(out, s, features, name) for s in simulations]
            results = [json.loads(path.read_bytes()) for path in paths]
            summary[f"{features}-{name}"] = {
                section: {
                    metric: _mean_and_deviation([r[section][metric] for r in results])
                    for metric in results[0][section]
                }
                for section in results[0]
            }
    return summary


def _train_and_measure(config: TrainConfig, data: EncodedData, *, run_dir: Path) -> Results:
    silent = Progress(on_rows=lambda *_: None, on_evaluation=lambda *_: None)
    result = train(config, data, run_dir=run_dir, progress=silent)
    calibrators = calibrate_run(result.net, data, config)
    write_run(
        run_dir,
        config=config,
        fitted=data.fitted,
        net=result.net,
        calibrators=calibrators,
        training={"data": data.report, "criterion": result.criterion},
    )
    (run_dir / CHECKPOINT).unlink()
    evaluation = evaluate_run(read_run(run_dir), data)
    return {
        UNCALIBRATED: evaluation[UNCALIBRATED],
        CALIBRATED: evaluation[CALIBRATED],
        FORCED: _with_forced_calibration(result.net, data, config),
    }


def _with_forced_calibration(net: Net, data: EncodedData, config: TrainConfig) -> dict[str, float]:
    calibration = config.calibration.model_copy(update={"methods": FORCED_METHODS})
    forced = config.model_copy(update={"calibration": calibration})
    test = data.splits["test"]
    assert test.truth is not None
    predicted = calibrated_probabilities(predict(net, test), calibrate_run(net, data, forced))
    return truth_metrics(predicted, test.truth, weight=test.weight, schema=data.fitted.schema_)


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "sd": deviation}


def _print(summary: dict[str, dict[str, Any]], *, rows: int, seeds: int) -> None:
    table = Table(
        "features",
        "objective",
        *(name for name, _, _ in COLUMNS),
        title=f"{rows:,} impressions, mean +- sd of {seeds} seeds",
    )
    for key, sections in summary.items():
        cells = [sections[section][metric] for _, section, metric in COLUMNS]
        table.add_row(*key.split("-", 1), *(f"{c['mean']:.3f} +- {c['sd']:.3f}" for c in cells))
    Console().print(table)


def _claim(out: Path, overrides: Sequence[str]) -> None:
    """Keeps results of other overrides from being taken for these."""
    path, text = out / "overrides.json", json.dumps(sorted(overrides))
    if path.exists() and path.read_text() != text:
        raise click.UsageError(f"{out} holds results of --set {path.read_text()}; take another OUT")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@click.command()
@click.option("--rows", type=click.IntRange(min=10_000), default=1_200_000, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--objective", "objectives", multiple=True, default=OBJECTIVES, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
def main(
    rows: int, seeds: int, out: Path, objectives: tuple[str, ...], overrides: tuple[str, ...]
) -> None:
    """Trains linear heads on restricted and rich features by each objective, against the truth."""
    _claim(out, overrides)
    simulations = [Simulation(rows=rows, seed=seed) for seed in range(1, seeds + 1)]
    with spinner() as say:
        for simulation in simulations:
            run_seed(out, simulation, objectives=objectives, overrides=overrides, progress=say)
    summary = summarize(out, simulations, objectives=objectives)
    content = {"rows": rows, "seeds": seeds, "overrides": overrides, "results": summary}
    (out / "summary.json").write_text(json.dumps(without_nan(content), indent=1))
    _print(summary, rows=rows, seeds=seeds)


if __name__ == "__main__":
    main()
