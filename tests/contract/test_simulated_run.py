"""The simulator's files go through the verbs as they are; the truth comes out at the end."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from model.config import TrainConfig, load_config
from model.contract.spec import load_schema
from model.dataset import EncodedData, load_data, prepare
from model.datasets.simulate import Simulation
from model.evaluate import evaluate_run
from model.run import read_run
from model.simulation_study import result_path, run_seed, summarize
from model.train import Progress, train
from model.verbs import evaluate as evaluate_verb
from model.verbs import train as train_verb
from model.verbs_data import data as data_verb

QUICK = ("optimizer.max_epochs=1", "optimizer.num_threads=1", "optimizer.batch_rows=512")


def invoke(command: click.Command, *arguments: str) -> Any:
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated")
    made = invoke(data_verb, "simulate", str(out), "--rows", "20000", "--features", "restricted")
    assert made["rows"] == 20_000
    assert set(made["labels"]) == {"click", "conversion"}
    return out


def encoded(path: Path, config: TrainConfig) -> EncodedData:
    return load_data(config, cache=path / "cache", progress=lambda text: None)


def test_verbs_take_the_written_files_as_they_are(simulated: Path) -> None:
    run, cache = str(simulated / "run"), str(simulated / "cache")
    sets = [part for override in QUICK for part in ("--set", override)]
    invoke(train_verb, str(simulated / "train.toml"), "--run", run, "--cache", cache, *sets)
    found = invoke(evaluate_verb, run, "--cache", cache)

    assert set(found) >= {"test", "truth", "truth_uncalibrated"}
    assert found["truth"]["true_mean_cvr_all"] == pytest.approx(0.0649, abs=0.004)
    assert found["truth"]["pcoc_ctr"] == pytest.approx(1.0, abs=0.2)
    trained = read_run(simulated / "run")
    assert evaluate_run(trained, encoded(simulated, trained.config))["truth"] == pytest.approx(
        found["truth"]
    )


def test_truth_goes_through_the_cache(simulated: Path) -> None:
    config = load_config(simulated / "train.toml")
    fresh = prepare(config, schema=load_schema(config.data.schema_file), progress=lambda text: None)

    encoded(simulated, config)  # written now, if not before
    cached = encoded(simulated, config)

    for name, split in fresh.splits.items():
        found = cached.splits[name].truth
        assert split.truth is not None
        assert found is not None
        assert split.truth.shape == (len(split), 2)
        np.testing.assert_array_equal(found, split.truth)


def test_truth_is_no_column_that_models_see(simulated: Path) -> None:
    split = encoded(simulated, load_config(simulated / "train.toml")).splits["train"]

    # x1, x2 and whether they are missing.
    assert split.candidate_dense.shape[1] == 4
    assert split.request_dense.shape[1] == 0


def test_a_run_keeps_its_last_weights_where_told_to(simulated: Path, tmp_path: Path) -> None:
    # At a rate this high that does not fall, the validation loss goes up and down.
    wild = (
        "optimizer.learning_rate=0.5",
        "optimizer.final_learning_rate_share=1.0",
        "optimizer.average_decay=0.0",
        "optimizer.evaluations_per_epoch=12",
        "optimizer.patience=1",
    )
    kept = {}
    for keep in ("best", "last"):
        config = load_config(
            simulated / "train.toml",
            overrides=[*QUICK, *wild, f"optimizer.keep={keep}"],
        )
        silent = Progress(on_rows=lambda *_: None, on_evaluation=lambda *_: None)
        kept[keep] = train(
            config, encoded(simulated, config), run_dir=tmp_path / keep, progress=silent
        ).state

    losses = [entry["loss"] for entry in kept["last"].evaluations]
    assert kept["last"].best_step == kept["last"].step == 24
    assert kept["last"].best == losses[-1]
    assert min(losses) < losses[-1]
    assert kept["best"].best_step < kept["best"].step


def test_study_leaves_one_result_per_training_and_goes_on_from_there(tmp_path: Path) -> None:
    simulation = Simulation(rows=10_000, users=200, items=50)

    def study(*objectives: str) -> None:
        run_seed(
            tmp_path, simulation, objectives=objectives, overrides=QUICK, progress=lambda text: None
        )

    study("ipw")
    first = result_path(tmp_path, simulation, "restricted", "ipw")
    written = first.stat().st_mtime_ns
    study("ipw", "e2e")

    assert first.stat().st_mtime_ns == written
    summary = summarize(tmp_path, [simulation], objectives=("ipw", "e2e"))
    assert set(summary) == {"restricted-ipw", "restricted-e2e", "rich-ipw", "rich-e2e"}
    cell = summary["rich-e2e"]["truth_uncalibrated"]["pcoc_cvr_all"]
    assert (
        cell["mean"]
        == json.loads(result_path(tmp_path, simulation, "rich", "e2e").read_bytes())[
            "truth_uncalibrated"
        ]["pcoc_cvr_all"]
    )
    assert not (tmp_path / "data" / "10000-1").exists()
