"""From logs to a bundle through the real functions, on a small synthetic shop with every kind."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
import tiny
import tomli_w
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from pydantic import ValidationError

from model import export, verbs
from model.calibrate import Calibrator, calibrated_probabilities
from model.config import TrainConfig
from model.contract.bundle import PARITY_ABSOLUTE, PARITY_RELATIVE, Bundle, read_bundle
from model.contract.encode import Encoder
from model.contract.errors import GateError, LogError, ParityError, SpecError, TrainError
from model.contract.histograms import number_names
from model.contract.record import pack_record, unpack_record
from model.contract.spec import FIRST_CODE, FittedSchema, load_schema, parse_schema
from model.contract.store_columns import StoreColumns
from model.dataset import EncodedData, EncodedSplit, load_data
from model.evaluate import calibrate_run, evaluate_run
from model.export import ScoringGraph, check_parity, export_bundle, make_session, to_onnx
from model.golden import golden_requests
from model.history import AsOf
from model.logs import read_log
from model.metrics import auc
from model.nets import ARCHITECTURES, build_net
from model.nets.layers import FieldEmbedding, Net, NetSpec
from model.objectives import OBJECTIVES
from model.run import EVALUATION, read_run, write_config, write_run
from model.serving_graph import ServingGraph
from model.tables import Tables
from model.train import CHECKPOINT, Metrics, Progress, TrainResult, _Run, predict, train
from service.features import Candidates, FeatureSource, GivenColumn
from service.item_snapshot import load_item_table
from service.sampler import Sampler

HOUR, DAY = 3_600, 86_400
NUM_REQUESTS, PER_REQUEST, NUM_DAYS = 1_000, 4, 40
NUM_USERS, NUM_ITEMS = 40, 40
START = 1_700_000_000 // DAY * DAY
BRANDS = ("acme", "bolt", "crux", "dune", "echo")

SCHEMA: dict[str, Any] = {
    "time_zone": "Europe/Berlin",
    "availability_lag_s": HOUR,
    "log": {"request_id": "request_id"},
    "steps": [{"name": "click", "label": "click"}, {"name": "conversion", "label": "bought"}],
    "features": [
        {"name": "hour", "kind": "time_part", "part": "hour"},
        {"name": "weekday", "kind": "time_part", "part": "weekday"},
        {"name": "device", "kind": "categorical", "scope": "context", "source": "request"},
        {"name": "town", "kind": "categorical", "scope": "user", "source": "store"},
        {
            "name": "purchases",
            "kind": "numeric",
            "scope": "user",
            "source": "store",
            "log1p": True,
            "minimum": 0,
            "statistic": {"event": "buy", "aggregate": "count"},
        },
        {
            "name": "last_purchase",
            "kind": "elapsed",
            "scope": "user",
            "source": "store",
            "statistic": {"event": "buy", "aggregate": "last_time"},
        },
        {"name": "recent", "kind": "history", "of": "item_id", "max_length": 5},
        {
            "name": "clicks",
            "kind": "recent",
            "column": "discount",
            "context": "device",
            "windows_days": [7],
            "large": 0.5,
            "max_length": 4,
        },
        {
            "name": "item_id",
            "kind": "hashed",
            "scope": "item",
            "source": "items",
            "num_buckets": 64,
        },
        {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"},
        {
            "name": "sales",
            "kind": "numeric",
            "scope": "item",
            "source": "items",
            "statistic": {
                "event": "buy",
                "aggregate": "count",
                "attribute": "item_id",
                "whole_periods": 2,
            },
        },
        {
            "name": "buyers",
            "kind": "numeric",
            "scope": "item",
            "source": "items",
            "statistic": {"event": "buy", "aggregate": "users", "attribute": "item_id"},
        },
        {"name": "discount", "kind": "numeric", "scope": "cross", "source": "request"},
        {
            "name": "position",
            "kind": "numeric",
            "scope": "cross",
            "source": "log_only",
            "serving_value": 1,
        },
        {"name": "bought_item", "kind": "match", "attribute": "item_id", "events": ["buy"]},
        {
            "name": "seen_brand",
            "kind": "match",
            "attribute": "brand",
            "max_age_days": 20,
        },
    ],
}
SETTINGS: dict[str, Any] = {
    "split": {"train_share": 0.6, "test_share": 0.2},
    "net": {
        "architecture": "tafe",
        "options": {
            "embedding": 4,
            "width": 8,
            "patterns": 2,
            "pattern_hidden": 16,
            "pattern": 12,
            "head": 8,
            "indicator": 4,
        },
    },
    "optimizer": {
        "batch_rows": 128,
        "learning_rate": 1e-2,
        "average_decay": 0.9,
        "max_epochs": 2,
        "min_steps": 0,
        "evaluations_per_epoch": 2,
        "num_threads": 1,
    },
}


def write_shop(path: Path) -> None:
    """Users like a brand, and buy again what they bought: matches and histories tell."""
    rng = np.random.default_rng(7)
    brand_of = rng.integers(0, 4, NUM_ITEMS)
    brand_of[-3:] = 4  # "echo" is shown in the last days only
    taste = rng.integers(0, 4, NUM_USERS)
    time = np.sort(START + rng.integers(0, NUM_DAYS * DAY, NUM_REQUESTS))
    user = rng.integers(0, NUM_USERS, NUM_REQUESTS)
    request = np.repeat(np.arange(NUM_REQUESTS), PER_REQUEST)
    is_late = time > START + 0.85 * NUM_DAYS * DAY
    item = np.concatenate(
        [rng.choice(NUM_ITEMS if late else NUM_ITEMS - 3, PER_REQUEST, False) for late in is_late]
    )
    position = np.tile(np.arange(1, PER_REQUEST + 1), NUM_REQUESTS)
    is_liked = brand_of[item] == taste[user[request]]
    logit = -1.5 + 2.5 * is_liked - 0.2 * position
    click = rng.random(len(item)) < 1 / (1 + np.exp(-logit))
    bought = click & (rng.random(len(item)) < np.where(is_liked, 0.6, 0.25))
    impressions = pl.DataFrame(
        {
            "request_id": request,
            "user_id": user[request],
            "item_id": item,
            "time": time[request],
            "device": np.array(["phone", "desktop"])[(request % 3 == 0).astype(int)],
            "discount": np.where(rng.random(len(item)) < 0.2, np.nan, rng.random(len(item))),
            "position": position,
            "click": click.astype(int),
            "bought": bought.astype(int),
        }
    )
    events = impressions.filter(pl.col("click") == 1).with_columns(
        pl.when(pl.col("bought") == 1).then(pl.lit("buy")).otherwise(pl.lit("view")).alias("event"),
        time=pl.col("time") + 60,
    )
    items = pl.DataFrame(
        {"item_id": np.arange(NUM_ITEMS), "brand": np.array(BRANDS)[brand_of].tolist()}
    )
    towns = [None if i % 10 == 0 else "north" if i % 2 else "south" for i in range(NUM_USERS)]
    users = pl.DataFrame({"user_id": np.arange(NUM_USERS), "town": towns})
    impressions.write_parquet(path / "impressions.parquet")
    columns = ("user_id", "item_id", "event", "time", "device", "discount")
    events.select(columns).write_parquet(path / "events.parquet")
    items.write_parquet(path / "items.parquet")
    users.write_parquet(path / "users.parquet")
    (path / "schema.toml").write_text(tomli_w.dumps(SCHEMA))


def make_config(path: Path, **optimizer: Any) -> TrainConfig:
    tables = ("impressions", "events", "items", "users")
    return TrainConfig.model_validate(
        {
            **SETTINGS,
            "data": {
                "schema_file": path / "schema.toml",
                **{name: path / f"{name}.parquet" for name in tables},
            },
            "optimizer": {**SETTINGS["optimizer"], **optimizer},
        }
    )


def quiet(
    on_rows: Callable[[int, int, int, float], None] | None = None,
    on_evaluation: Callable[[int, Metrics], None] | None = None,
) -> Progress:
    return Progress(
        on_rows=on_rows or (lambda *_: None), on_evaluation=on_evaluation or (lambda *_: None)
    )


def fit(config: TrainConfig, data: EncodedData, run_dir: Path) -> TrainResult:
    return train(config, data, run_dir=run_dir, progress=quiet())


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The shop's run: what each test needs of it."""

    path: Path
    config: TrainConfig
    data: EncodedData
    result: TrainResult
    calibrators: list[Calibrator]
    evaluation: dict[str, Any]
    bundle: Bundle

    @property
    def graph(self) -> ScoringGraph:
        return ScoringGraph(self.result.net, self.calibrators).eval()

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.data.fitted)

    @property
    def last_time(self) -> float:
        time_range = self.data.report["time_range"]
        assert isinstance(time_range, list)
        return float(time_range[1])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained, calibrated, evaluated and exported once; parity is checked on 10,000 random rows."""
    path = tmp_path_factory.mktemp("shop")
    write_shop(path)
    config = make_config(path)
    data = load_data(config, cache=path / "cache", progress=lambda text: None)
    result = fit(config, data, path / "run")
    calibrators = calibrate_run(result.net, data, config)
    training = {"data": data.report, "best_step": result.state.best_step}
    write_run(
        path / "run",
        config=config,
        fitted=data.fitted,
        net=result.net,
        calibrators=calibrators,
        training=training,
    )
    evaluation = evaluate_run(read_run(path / "run"), data)
    time_range = data.report["time_range"]
    assert isinstance(time_range, list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "NUM_PARITY_ROWS", 10_000)
        bundle = export_bundle(
            result.net,
            calibrators,
            encoder=Encoder(data.fitted),
            train=data.splits["train"],
            out=path / "bundles",
            training=training,
            metrics={},
            last_time=float(time_range[1]),
        )
    return Trained(
        path=path,
        config=config,
        data=data,
        result=result,
        calibrators=calibrators,
        evaluation=evaluation,
        bundle=read_bundle(bundle),
    )


def scored(bundle: Bundle, split: EncodedSplit) -> dict[str, np.ndarray]:
    """Test rows through the bundle's graph, as the service runs it."""
    names = list(bundle.manifest.outputs)
    outputs = make_session(bundle.model).run(names, split.blocks(slice(None)).feeds())
    return dict(zip(names, outputs, strict=True))


def with_labels(split: EncodedSplit, values: np.ndarray) -> EncodedSplit:
    return replace(split, label_values=values.astype(np.int8))


def weights(net: Net) -> dict[str, torch.Tensor]:
    return dict(net.state_dict())


def same_weights(first: Net, second: Net) -> bool:
    one, other = weights(first), weights(second)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_the_shop_has_every_kind_of_feature() -> None:
    kinds = {feature["kind"] for feature in SCHEMA["features"]}

    assert kinds == tiny.feature_kinds()


def test_t46_splits_hold_every_row_once(trained: Trained) -> None:
    sizes = {name: len(split) for name, split in trained.data.splits.items()}

    assert sum(sizes.values()) == NUM_REQUESTS * PER_REQUEST
    assert sizes["train"] == pytest.approx(2400, abs=8)
    assert sizes["test"] == pytest.approx(800, abs=8)


def test_requests_are_stored_once(trained: Trained) -> None:
    for split in trained.data.splits.values():
        assert len(split.request_ids) * PER_REQUEST == len(split)


def test_t46_vocabulary_is_of_training_rows_only(trained: Trained) -> None:
    """The brand "echo" is shown in test rows only."""
    brands = trained.data.fitted.vocabularies["brand"]
    column = trained.encoder.candidate_layout.ids.index("brand")

    assert sorted(brands) == ["acme", "bolt", "crux", "dune"]
    assert (trained.data.splits["train"].candidate_ids[:, column] >= FIRST_CODE).all()
    assert (trained.data.splits["test"].candidate_ids[:, column] == 2).sum() > 20


def test_t46_no_user_id_is_in_a_vocabulary(trained: Trained) -> None:
    assert set(trained.data.fitted.vocabularies) == {"device", "town", "brand"}


def test_t46_splits_are_disjoint(trained: Trained) -> None:
    """Train, then validation and calibration by user, then test: no request is in two."""
    log = read_log(
        trained.config.data,
        schema=load_schema(trained.config.data.schema_file),
        split=trained.config.split,
    )
    request, user = (log.frame[name].to_numpy() for name in ("request_id", "user_id"))
    parts = {name: set(request[log.split == name].tolist()) for name in trained.data.splits}

    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == NUM_REQUESTS
    held_out = [set(user[log.split == name]) for name in ("validation", "calibration")]
    assert not held_out[0] & held_out[1]


def test_t46_no_single_column_tells_a_label(trained: Trained) -> None:
    split = trained.data.splits["train"]
    request = split.blocks(slice(None))
    columns = np.concatenate(
        [
            split.candidate_dense,
            split.candidate_ids,
            request.request.dense[request.request_of],
            request.request.ids[request.request_of],
            request.request.history[request.request_of],
        ],
        axis=1,
    ).astype(np.float64)

    aucs = [
        auc(column, label, np.ones(len(split)))
        for label in split.label_values.astype(np.float64).T
        for column in columns.T
    ]

    assert len(aucs) == 2 * columns.shape[1] > 50
    assert max(abs(value - 0.5) for value in aucs) < 0.45


def test_position_is_read_where_the_model_is_fitted_and_chosen_and_fixed_elsewhere(
    trained: Trained,
) -> None:
    column = trained.encoder.candidate_layout.dense_columns.index("position")

    distinct = {
        name: len(np.unique(split.candidate_dense[:, column]))
        for name, split in trained.data.splits.items()
    }

    assert distinct == {"train": 4, "validation": 4, "calibration": 1, "test": 1}


def test_small_logs_get_smaller_batches_and_more_epochs(trained: Trained, tmp_path: Path) -> None:
    config = trained.config.model_copy(
        update={
            "optimizer": trained.config.optimizer.model_copy(
                update={"batch_rows": 2048, "max_epochs": 1, "min_steps": 100, "patience": 99}
            )
        }
    )

    result = fit(config, trained.data, tmp_path)

    rows = len(trained.data.splits["train"])
    per_epoch = -(-rows // 64)
    assert result.state.step == per_epoch * -(-100 // per_epoch)
    assert result.state.step >= 100


def test_the_model_learns(trained: Trained) -> None:
    test, base = trained.evaluation["test"], trained.evaluation["test_base_rate"]

    assert test["auc_ctr"] > 0.62
    assert test["ne_ctr"] < 1.0
    assert base["auc_ctr"] == 0.5
    assert base["rate_ctr"] > base["rate_ctcvr"] > 0.0


def test_evaluation_without_records_loses_what_they_tell(trained: Trained) -> None:
    """In this shop nothing else tells who likes what."""
    full, empty = trained.evaluation["test"], trained.evaluation["test_without_records"]

    assert empty["auc_ctr"] < full["auc_ctr"] - 0.1
    assert empty["auc_ctr"] == pytest.approx(0.5, abs=0.1)


def test_scoring_without_records_ignores_what_is_stored(trained: Trained) -> None:
    """Two requests that differ in their record only score alike without it."""
    split = trained.data.splits["test"]
    stored = StoreColumns.of(trained.encoder)
    spoilt = replace(
        split,
        request_ids=split.request_ids.copy(),
        request_dense=split.request_dense.copy(),
        request_history=np.zeros_like(split.request_history),
        candidate_dense=split.candidate_dense.copy(),
    )
    spoilt.request_ids[:, stored.request_ids] = 3
    spoilt.request_dense[:, stored.request_dense] = 9.0
    spoilt.candidate_dense[:, stored.candidate_dense] = -9.0

    net = trained.result.net
    one, other = (predict(net, part, without_records=stored) for part in (split, spoilt))

    np.testing.assert_array_equal(one, other)
    assert not np.allclose(one, predict(net, split))


def test_t47_shuffled_labels_teach_nothing(trained: Trained, tmp_path: Path) -> None:
    """Labels shuffled in every split; mean of eight shuffles on rows that nothing was chosen by."""
    config = make_config(trained.path, max_epochs=1, evaluations_per_epoch=1)
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        splits = {
            name: with_labels(split, split.label_values[rng.permutation(len(split))])
            for name, split in trained.data.splits.items()
        }
        result = fit(config, replace(trained.data, splits=splits), tmp_path / str(seed))
        held_out = [splits["calibration"], splits["test"]]
        scores = np.concatenate([predict(result.net, split)[:, 0] for split in held_out])
        clicks = np.concatenate([split.label_values[:, 0] for split in held_out])
        found.append(
            auc(scores.astype(np.float64), clicks.astype(np.float64), np.ones(len(clicks)))
        )

    assert np.mean(found) == pytest.approx(0.5, abs=0.02)


def test_t48_equal_seeds_give_the_same_curve_and_weights(trained: Trained, tmp_path: Path) -> None:
    losses: list[float] = []
    again = train(
        trained.config,
        trained.data,
        run_dir=tmp_path,
        progress=quiet(on_rows=lambda *args: losses.append(args[3])),
    )

    assert again.state.evaluations == trained.result.state.evaluations
    assert same_weights(again.net, trained.result.net)
    assert len(losses) == again.state.step == 2 * 19


def test_another_seed_gives_other_weights(trained: Trained, tmp_path: Path) -> None:
    other = fit(make_config(trained.path, seed=2, max_epochs=1), trained.data, tmp_path)

    assert not same_weights(other.net, trained.result.net)


def aligned(trained: Trained, architecture: str = "tafe", **alignment: Any) -> TrainConfig:
    """The shop's configuration with an alignment, on its own or another small network."""
    small = {"embedding": 4, "widths": [16, 12], "head": 8}
    net = SETTINGS["net"] if architecture == "tafe" else {"options": small}
    return TrainConfig.model_validate(
        {
            **trained.config.model_dump(),
            "net": {**net, "architecture": architecture},
            "alignment": {"mode": "prior", "network_rate_share": 1.0, **alignment},
        }
    )


@pytest.mark.parametrize("architecture", ["tafe", "shared_bottom"])
def test_a_run_with_alignment_tells_its_temperatures(
    trained: Trained, tmp_path: Path, architecture: str
) -> None:
    config = aligned(trained, architecture, weight=0.1)

    found = fit(config, trained.data, tmp_path).criterion["alignment"]

    assert found["steps"] == 2 * 19
    assert 0.05 <= found["temperature_min"] <= found["temperature_mean"] < 1.0
    assert found["log_temperature_std"] > 0.0
    assert 0.0 < found["loss"] < 1.5
    assert found["projected_cosine"] > 0.1


def test_t33_a_run_with_weight_zero_ends_with_the_base_models_weights(
    trained: Trained, tmp_path: Path
) -> None:
    result = fit(aligned(trained, weight=0.0), trained.data, tmp_path)

    assert same_weights(result.net, trained.result.net)
    assert result.state.evaluations == trained.result.state.evaluations


def test_a_killed_run_with_alignment_resumes_to_the_same_statistics(
    trained: Trained, tmp_path: Path
) -> None:
    def kill(epoch: int, done: int, total: int, loss: float) -> None:
        if epoch == 0 and done > 12 * 128:  # the first evaluation was after step 10
            raise Killed

    config = aligned(trained, weight=0.1, negatives="one")
    whole = fit(config, trained.data, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, trained.data, run_dir=tmp_path / "cut", progress=quiet(on_rows=kill))

    resumed = fit(config, trained.data, tmp_path / "cut")

    assert same_weights(resumed.net, whole.net)
    assert resumed.criterion == whole.criterion


def with_objective(config: TrainConfig, outputs: str = "conditional", **dials: Any) -> TrainConfig:
    """By another loss."""
    content = config.model_dump()
    content["objective"] = {**content["objective"], **dials}
    content["net"]["options"]["outputs"] = outputs
    return TrainConfig.model_validate(content)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_calibrates(name: str, trained: Trained, tmp_path: Path) -> None:
    outputs = "marginal" if name == "hinge" else "conditional"
    config = with_objective(trained.config, outputs, name=name, e2e_weight=0.5)

    result = fit(config, trained.data, tmp_path)
    calibrators = calibrate_run(result.net, trained.data, config)

    probabilities = calibrated_probabilities(
        predict(result.net, trained.data.splits["test"]), calibrators
    )
    clicks = trained.data.splits["test"].label_values[:, 0].astype(np.float64)
    score = probabilities[:, 0].astype(np.float64)
    assert auc(score, clicks, np.ones(len(clicks))) > 0.55
    steps = result.criterion.get("propensity_weights", {}).get("steps", [])
    assert [step["step"] for step in steps] == ([2] if name in ("ipw", "tempered", "dr") else [])


class Killed(Exception):
    """Stands for a signal in the middle of a run."""


def test_a_run_killed_between_evaluations_resumes_to_the_same_weights(
    trained: Trained, tmp_path: Path
) -> None:
    def kill(epoch: int, done: int, total: int, loss: float) -> None:
        if epoch == 0 and done > 12 * 128:  # the first evaluation was after step 10
            raise Killed

    with pytest.raises(Killed):
        train(trained.config, trained.data, run_dir=tmp_path, progress=quiet(on_rows=kill))
    assert (tmp_path / CHECKPOINT).exists()

    resumed = fit(trained.config, trained.data, tmp_path)

    assert same_weights(resumed.net, trained.result.net)
    assert resumed.state.evaluations == trained.result.state.evaluations


def test_a_small_logs_many_epochs_keep_their_tables(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is too short to learn new tables in."""
    drawn = []
    monkeypatch.setattr(_Run, "_draw_embeddings", lambda self, epoch: drawn.append(epoch))
    config = make_config(trained.path, max_epochs=2, min_steps=200, patience=99)

    assert fit(config, trained.data, tmp_path).state.step > 2 * 19
    assert drawn == []


def test_a_checkpoint_of_other_events_is_not_taken_up(trained: Trained, tmp_path: Path) -> None:
    config = make_config(trained.path, max_epochs=1)
    fit(config, trained.data, tmp_path)
    moments = {
        name: entry.model_copy(update={"mean": entry.mean + 1.0})
        for name, entry in trained.data.fitted.moments.items()
    }
    fitted = trained.data.fitted.model_copy(update={"moments": moments})

    with pytest.raises(TrainError, match="other data"):
        fit(config, replace(trained.data, fitted=fitted), tmp_path)


@pytest.mark.parametrize(("is_fresh", "expected"), [(True, 3), (False, 1)])
def test_id_tables_start_anew_at_each_further_epoch(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_fresh: bool,
    expected: int,
) -> None:
    drawn = []
    reset = FieldEmbedding.reset

    def counted(self: FieldEmbedding) -> None:
        drawn.append(self)
        reset(self)

    monkeypatch.setattr(FieldEmbedding, "reset", counted)

    config = make_config(trained.path, max_epochs=3, patience=99, fresh_embeddings=is_fresh)
    fit(config, trained.data, tmp_path)

    assert len(drawn) == expected


def test_the_last_of_several_epochs_goes_by_time(trained: Trained, tmp_path: Path) -> None:
    config = make_config(trained.path, max_epochs=3, recent_blur=0.1)
    run = _Run(config, trained.data, run_dir=tmp_path, progress=quiet())
    rows = len(trained.data.splits["train"])

    orders = [run._order(epoch) for epoch in range(3)]

    assert all(np.array_equal(np.sort(order), np.arange(rows)) for order in orders)
    lags = [np.abs(order - np.arange(rows)).max() / rows for order in orders]
    assert lags[0] > 0.5
    assert lags[1] > 0.5
    assert lags[2] <= 0.1


def test_validation_rows_are_trained_on_when_all_is_chosen(
    trained: Trained, tmp_path: Path
) -> None:
    config = make_config(trained.path, max_epochs=1, with_validation=True)
    train_split, validation = (trained.data.splits[n] for n in ("train", "validation"))

    run = _Run(config, trained.data, run_dir=tmp_path, progress=quiet())

    joined = run._train
    assert len(joined) == len(train_split) + len(validation)
    rows = np.arange(len(train_split), len(joined))
    found, expected = joined.blocks(rows), validation.blocks(rows - len(train_split))
    np.testing.assert_array_equal(found.request.dense, expected.request.dense)
    np.testing.assert_array_equal(found.candidate.ids, expected.candidate.ids)
    np.testing.assert_array_equal(found.request_of, expected.request_of)
    np.testing.assert_array_equal(joined.label_values[rows], validation.label_values)
    assert fit(config, trained.data, tmp_path).state.step == -(-len(joined) // 128)


def test_validation_rows_cannot_be_trained_on_and_chosen_by(trained: Trained) -> None:
    with pytest.raises(ValidationError, match="nothing to choose the best weights by"):
        make_config(trained.path, with_validation=True, keep="best")


def test_a_single_epoch_is_in_random_order(trained: Trained, tmp_path: Path) -> None:
    config = make_config(trained.path, max_epochs=1)
    run = _Run(config, trained.data, run_dir=tmp_path, progress=quiet())

    order = run._order(0)

    assert np.abs(order - np.arange(len(order))).max() > len(order) / 2


def test_fresh_id_tables_are_near_zero_while_the_layers_above_stay(
    trained: Trained, tmp_path: Path
) -> None:
    config = make_config(trained.path, max_epochs=2, learning_rate=1e-12)
    run = _Run(config, trained.data, run_dir=tmp_path, progress=quiet())
    with torch.no_grad():
        for parameter in run.net.parameters():
            parameter.fill_(5.0)

    run._draw_embeddings(1)

    tables = {id(parameter) for parameter in run.net.embedding_parameters()}
    for parameter, average in zip(run.net.parameters(), run.average.parameters(), strict=True):
        if id(parameter) in tables:
            assert 0.0 < float(parameter.detach().abs().max()) < 0.5
            assert torch.equal(parameter, average)
        else:
            assert bool((parameter == 5.0).all())


def test_a_run_killed_while_evaluating_resumes_to_the_same_weights(
    trained: Trained, tmp_path: Path
) -> None:
    def kill(step: int, metrics: Metrics) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(trained.config, trained.data, run_dir=tmp_path, progress=quiet(on_evaluation=kill))

    resumed = fit(trained.config, trained.data, tmp_path)

    assert same_weights(resumed.net, trained.result.net)
    assert resumed.state.evaluations == trained.result.state.evaluations


@pytest.mark.parametrize("form", ["label", "error"])
def test_a_run_with_a_tower_resumes_to_the_same_weights_and_report(
    form: str, trained: Trained, tmp_path: Path
) -> None:
    config = with_objective(trained.config, name="dr", imputation=form)
    whole = fit(config, trained.data, tmp_path / "whole")

    def kill(epoch: int, done: int, total: int, loss: float) -> None:
        if done > 12 * 128:  # the first evaluation was after step 10
            raise Killed

    with pytest.raises(Killed):
        train(config, trained.data, run_dir=tmp_path / "cut", progress=quiet(on_rows=kill))
    resumed = fit(config, trained.data, tmp_path / "cut")

    assert same_weights(resumed.net, whole.net)
    assert resumed.criterion == whole.criterion
    towers = [
        torch.load(tmp_path / name / CHECKPOINT, weights_only=True)["criterion"]
        for name in ("whole", "cut")
    ]
    assert len(towers[0]) == 6
    assert all(torch.equal(towers[0][key], towers[1][key]) for key in towers[0])


def test_a_finished_run_resumes_without_another_step(trained: Trained, tmp_path: Path) -> None:
    steps: list[int] = []
    (tmp_path / CHECKPOINT).write_bytes((trained.path / "run" / CHECKPOINT).read_bytes())

    again = train(
        trained.config,
        trained.data,
        run_dir=tmp_path,
        progress=quiet(on_rows=lambda *_: steps.append(1)),
    )

    assert steps == []
    assert same_weights(again.net, trained.result.net)


def test_a_checkpoint_of_another_configuration_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes((trained.path / "run" / CHECKPOINT).read_bytes())

    with pytest.raises(TrainError, match="of a run with another configuration"):
        fit(make_config(trained.path, learning_rate=1e-3), trained.data, tmp_path)


@pytest.mark.parametrize("data", [b"", b"no checkpoint"])
def test_a_damaged_checkpoint_is_named(trained: Trained, tmp_path: Path, data: bytes) -> None:
    (tmp_path / CHECKPOINT).write_bytes(data)

    with pytest.raises(TrainError, match=f"{CHECKPOINT} is damaged"):
        fit(trained.config, trained.data, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(trained: Trained, tmp_path: Path) -> None:
    broken = replace(
        trained.data.splits["train"],
        candidate_dense=np.full_like(trained.data.splits["train"].candidate_dense, np.nan),
    )
    data = replace(trained.data, splits={**trained.data.splits, "train": broken})

    with pytest.raises(TrainError, match="the loss is nan at step 0"):
        fit(trained.config, data, tmp_path)


def test_validation_rows_without_a_conversion_stop_the_run(
    trained: Trained, tmp_path: Path
) -> None:
    """Nothing could be chosen by: the weights kept would be those of before the first step."""
    validation = trained.data.splits["validation"]
    values = validation.label_values.copy()
    values[:, 1] = 0
    splits = {**trained.data.splits, "validation": with_labels(validation, values)}

    with pytest.raises(TrainError, match=r"validation.*'conversion'"):
        fit(trained.config, replace(trained.data, splits=splits), tmp_path)


def test_validation_rows_all_too_young_stop_the_run(trained: Trained, tmp_path: Path) -> None:
    validation = trained.data.splits["validation"]
    masked = replace(validation, label_known=np.zeros_like(validation.label_known))
    splits = {**trained.data.splits, "validation": masked}

    with pytest.raises(TrainError, match=r"validation.*'click'"):
        fit(trained.config, replace(trained.data, splits=splits), tmp_path)


def test_test_rows_all_too_young_are_reported_without_metrics(trained: Trained) -> None:
    test = trained.data.splits["test"]
    known = test.label_known.copy()
    known[:, 1] = False
    splits = {**trained.data.splits, "test": replace(test, label_known=known)}
    run = read_run(trained.path / "run")

    evaluation = evaluate_run(run, replace(trained.data, splits=splits))

    assert evaluation["test"]["rows_ctcvr"] == 0
    assert "rate_ctcvr" not in evaluation["test_base_rate"]
    assert evaluation["test"]["auc_ctr"] == trained.evaluation["test"]["auc_ctr"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": {"name": "magic"}}, "no objective 'magic'; there are e2e"),
        ({"objective": {"step_weights": [1.0]}}, "does not have one weight per step"),
        ({"net": {"architecture": "magic"}}, "no architecture 'magic'"),
        ({"net": {"options": {"magic": 1}}}, "magic: Extra inputs"),
    ],
)
def test_a_configuration_of_what_does_not_exist_is_named(
    trained: Trained, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    config = TrainConfig.model_validate({**trained.config.model_dump(), **change})

    with pytest.raises(SpecError, match=named):
        fit(config, trained.data, tmp_path)


def test_a_cache_hit_gives_equal_data(trained: Trained) -> None:
    said: list[str] = []

    again = load_data(trained.config, cache=trained.path / "cache", progress=said.append)

    assert said == ["reading the encoded impressions"]
    assert again.fitted == trained.data.fitted
    assert again.report == trained.data.report
    for name, split in trained.data.splits.items():
        assert split.truth is again.splits[name].truth is None
        for field, array in vars(split).items():
            if field != "truth":
                np.testing.assert_array_equal(getattr(again.splits[name], field), array)
                assert getattr(again.splits[name], field).dtype == array.dtype


def test_a_cache_that_was_not_finished_is_made_anew(trained: Trained, tmp_path: Path) -> None:
    (entry,) = (trained.path / "cache").iterdir()
    half = tmp_path / entry.name
    half.mkdir()
    (half / "train.weight.npy").write_bytes(b"cut off")

    data = load_data(trained.config, cache=tmp_path, progress=lambda text: None)

    np.testing.assert_array_equal(
        data.splits["train"].candidate_dense, trained.data.splits["train"].candidate_dense
    )


@pytest.mark.parametrize("changed", ["impressions", "events", "items", "users", "schema"])
def test_a_change_of_any_table_misses_the_cache(
    trained: Trained, tmp_path: Path, changed: str
) -> None:
    for file in trained.path.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if changed == "schema":
        (tmp_path / "schema.toml").write_text(tomli_w.dumps({**SCHEMA, "time_zone": "UTC"}))
    else:
        table = tmp_path / f"{changed}.parquet"
        pl.read_parquet(table)[:-1].write_parquet(table)
    said: list[str] = []

    def stop_once_missed(text: str) -> None:
        said.append(text)
        raise Killed

    with pytest.raises(Killed):
        load_data(make_config(tmp_path), cache=trained.path / "cache", progress=stop_once_missed)

    assert said == ["reading the impression log"]


def test_a_feature_that_no_table_has_is_named(trained: Trained, tmp_path: Path) -> None:
    for file in trained.path.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pl.read_parquet(tmp_path / "users.parquet").drop("town").write_parquet(
        tmp_path / "users.parquet"
    )

    with pytest.raises(
        LogError, match="feature 'town' is in neither the impressions nor the users"
    ):
        load_data(make_config(tmp_path), cache=tmp_path / "cache", progress=lambda text: None)


def test_a_request_of_two_users_is_named(trained: Trained, tmp_path: Path) -> None:
    for file in trained.path.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    log = pl.read_parquet(tmp_path / "impressions.parquet")
    log.with_columns(user_id=pl.int_range(pl.len())).write_parquet(tmp_path / "impressions.parquet")

    with pytest.raises(LogError, match="request 0 has impressions of several users or times"):
        load_data(make_config(tmp_path), cache=tmp_path / "cache", progress=lambda text: None)


def test_a_run_is_read_back_as_it_was_written(trained: Trained) -> None:
    run = read_run(trained.path / "run")

    assert same_weights(run.net, trained.result.net)
    assert run.fitted == trained.data.fitted
    assert run.calibrators == trained.calibrators
    assert run.config == trained.config
    assert run.last_time == trained.last_time


def test_an_unfinished_run_is_no_run(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no finished run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "error"),
    [("weights.pt", TrainError), ("schema.json", LogError), ("calibration.json", LogError)],
)
def test_a_damaged_file_of_a_run_is_named(
    trained: Trained, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    for file in (trained.path / "run").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50])

    with pytest.raises(error, match=r"damaged|does not fit"):
        read_run(tmp_path)


def test_graph_scores_test_rows_as_the_network_does(trained: Trained) -> None:
    split = trained.data.splits["test"]
    conditional = calibrated_probabilities(
        predict(trained.result.net, split), trained.calibrators
    ).astype(np.float64)

    found = scored(trained.bundle, split)

    expected = {
        "pctr": conditional[:, 0],
        "pcvr": conditional[:, 1],
        "pctcvr": conditional[:, 0] * conditional[:, 1],
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, rtol=0, atol=PARITY_ABSOLUTE)
        np.testing.assert_allclose(found[name], values, rtol=PARITY_RELATIVE, atol=0)


def test_pctcvr_is_never_above_pctr(trained: Trained) -> None:
    for split in trained.data.splits.values():
        found = scored(trained.bundle, split)
        assert (found["pctcvr"] <= found["pctr"]).all()
        assert all(((values > 0) & (values < 1)).all() for values in found.values())


def test_golden_rows_score_as_written(trained: Trained) -> None:
    bundle = trained.bundle
    names = list(bundle.manifest.outputs)

    outputs = make_session(bundle.model).run(names, bundle.golden.blocks.feeds())

    for name, values in zip(names, outputs, strict=True):
        np.testing.assert_allclose(values, bundle.golden.expected[name], rtol=0, atol=1e-5)
    assert len(bundle.golden.time) == 64
    assert max(np.bincount(bundle.golden.blocks.request_of)) == 200


def test_golden_rows_encode_to_their_blocks(trained: Trained) -> None:
    golden = trained.bundle.golden

    fresh = golden.encode(Encoder(trained.bundle.fitted)).feeds()

    for name, array in golden.blocks.feeds().items():
        np.testing.assert_array_equal(fresh[name], array)


def test_manifest_says_what_the_graph_takes_and_gives(trained: Trained) -> None:
    manifest = trained.bundle.manifest
    session = make_session(trained.bundle.model)

    assert {i.name for i in session.get_inputs()} == set(manifest.inputs)
    assert manifest.inputs["candidate_dense"] == "float32"
    assert [o.name for o in session.get_outputs()] == list(manifest.outputs)
    assert manifest.outputs == ("pctr", "pctcvr", "pcvr")
    assert set(manifest.calibration) == {"click", "conversion"}
    assert manifest.schema_sha256 == load_schema(trained.path / "schema.toml").sha256


def test_histograms_are_of_every_encoded_column(trained: Trained) -> None:
    encoder, found = trained.encoder, trained.bundle.histograms
    layouts = (encoder.request_layout, encoder.candidate_layout)

    assert found is not None
    assert set(found.ids) == {name for layout in layouts for name in layout.ids}
    assert set(found.numbers) == {n for layout in layouts for n in number_names(layout)}


def test_histograms_count_every_training_row(trained: Trained) -> None:
    found, split = trained.bundle.histograms, trained.data.splits["train"]
    assert found is not None

    for names, num_rows in (
        (trained.encoder.request_layout.ids, len(split.request_ids)),
        (trained.encoder.candidate_layout.ids, len(split)),
    ):
        for name in names:
            of = found.ids[name]
            assert sum(of.counts) + of.other + of.missing + of.unknown == num_rows
            assert all(count >= 0.01 * num_rows for count in of.counts)


def test_training_rows_do_not_drift_from_their_histograms(trained: Trained) -> None:
    split = trained.data.splits["train"]
    sampler = Sampler(
        "b",
        trained.encoder,
        trained.bundle.histograms,
        probabilities={},
        bounds=(),
        every=1,
        window_s=3600,
    )
    for request in range(len(split.request_ids)):
        sampler.take(split.blocks(np.flatnonzero(split.request_of == request)), {})
    sampler.count()

    assert sampler.drift is not None
    found = sampler.drift.indices([sampler.drift.told()])
    assert len(found) > 5
    assert max(found.values()) < 0.05


def test_graph_runs_one_candidate_and_many_of_one_request(trained: Trained) -> None:
    blocks = trained.bundle.golden.blocks
    session = make_session(trained.bundle.model)
    rows = np.flatnonzero(blocks.request_of == 3)  # the request of 200
    feeds = blocks.feeds()
    whole = session.run(["pctr"], feeds)[0]

    alone = {name: array[3:4] for name, array in feeds.items() if name.startswith("request_")}
    for take in (rows, rows[:1]):
        alone["request_of"] = np.zeros(len(take), np.int64)
        alone |= {n: feeds[n][take] for n in feeds if n.startswith("candidate_")}
        # Batching changes the last bits.
        np.testing.assert_allclose(session.run(["pctr"], alone)[0], whole[take], rtol=0, atol=1e-6)


def three_steps_without_a_request_side() -> Encoder:
    schema = parse_schema(
        {
            "steps": [{"name": name, "label": name} for name in ("click", "cart", "buy")],
            "features": [
                {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"},
                {"name": "discount", "kind": "numeric", "scope": "cross", "source": "request"},
            ],
        }
    )
    return Encoder(FittedSchema(schema=schema, vocabularies={"brand": BRANDS}, moments={}))


def tiny_encoder() -> Encoder:
    return Encoder(tiny.fitted_schema())


# Each takes seconds: a case covers several switches of its architecture.
EXPORTS: dict[str, tuple[str, dict[str, Any], Callable[[], Encoder]]] = {
    "single task": ("single_task", {"widths": (8, 8)}, tiny_encoder),
    "shared bottom": ("shared_bottom", {"widths": (16, 8)}, tiny_encoder),
    "cross-stitch": ("cross_stitch", {"widths": (8, 8)}, three_steps_without_a_request_side),
    "mmoe": ("mmoe", {"experts": 3, "widths": (8, 8)}, tiny_encoder),
    "ple": ("ple", {"levels": 3, "widths": (8, 8)}, tiny_encoder),
    "aitm": ("aitm", {"bottom": (8,), "widths": (8,)}, three_steps_without_a_request_side),
    "linear head": ("linear_head", {"widths": (16, 8)}, tiny_encoder),
    "three steps": ("tafe", {"width": 8}, three_steps_without_a_request_side),
    "field tokens": (
        "tafe",
        {
            "tokens": "fields",
            "width": 8,
            "selector": "sparsemax",
            "samples_inducing": True,
            "use_transfer": True,
        },
        tiny_encoder,
    ),
    "element-wise gate": (
        "tafe",
        {"width": 8, "selector": "gate", "use_excitation": False, "outputs": "marginal"},
        tiny_encoder,
    ),
    "hard choice": (
        "tafe",
        {"width": 8, "selector": "hard", "use_attention": False},
        tiny_encoder,
    ),
    "one pattern for all": (
        "tafe",
        {"width": 8, "selector": "off", "patterns": 1},
        three_steps_without_a_request_side,
    ),
}


def test_every_architecture_is_exported_here() -> None:
    assert {name for name, _, _ in EXPORTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", EXPORTS)
def test_graph_of_every_architecture_is_within_parity(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sort of calibrator; `check_parity` raises where torch and ONNX Runtime differ."""
    monkeypatch.setattr(export, "NUM_PARITY_ROWS", 10_000)
    name, options, make_encoder = EXPORTS[case]
    encoder = make_encoder()
    torch.manual_seed(0)
    net = build_net(name, spec=NetSpec.of(encoder), options={**options, "embedding": 4})
    net.set_base_rates([0.04, 0.01, 0.3][: len(encoder.schema.steps)])
    calibrators = [
        Calibrator(method="platt", slope=1.3, offset=-0.2),
        Calibrator(method="isotonic", x=(-5.0, -4.0, -3.0), y=(-6.0, -4.5, -4.4)),
        Calibrator(),
    ][: len(encoder.schema.steps)]
    graph = ScoringGraph(net, calibrators).eval()
    blocks = golden_requests(encoder, last_time=tiny.NOON).encode(encoder)

    serving = ServingGraph(net, calibrators).eval()
    model = to_onnx(serving, blocks=blocks, outputs=encoder.schema.output_names)

    check_parity(graph, model, encoder=encoder, last_time=tiny.NOON)
    names = [output.name for output in make_session(model).get_outputs()]
    assert names == list(encoder.schema.output_names)


def altered(model: bytes, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The graph with its largest weight matrix changed."""
    proto = onnx.load_model_from_string(model)
    tensors = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    largest = max(tensors, key=lambda t: int(np.prod(t.dims)))
    largest.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(largest)), largest.name))
    content: bytes = proto.SerializeToString()
    return content


def test_an_altered_weight_is_a_parity_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "NUM_PARITY_ROWS", 0)
    model = altered(trained.bundle.model, lambda w: w * np.float32(1.01))

    with pytest.raises(ParityError, match="on golden rows: the graph differs") as caught:
        check_parity(trained.graph, model, encoder=trained.encoder, last_time=trained.last_time)

    assert caught.value.max_abs_diff > caught.value.tolerance == PARITY_ABSOLUTE


def test_a_nan_in_the_graph_is_a_parity_error(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "NUM_PARITY_ROWS", 0)
    model = altered(trained.bundle.model, lambda w: np.full_like(w, np.nan))

    with pytest.raises(ParityError):
        check_parity(trained.graph, model, encoder=trained.encoder, last_time=trained.last_time)


def test_no_bundle_is_written_when_the_graph_scores_otherwise(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = altered(trained.bundle.model, lambda w: w * np.float32(1.01))
    monkeypatch.setattr(export, "NUM_PARITY_ROWS", 0)
    monkeypatch.setattr(export, "to_onnx", lambda *args, **kwargs: model)

    with pytest.raises(ParityError):
        export_bundle(
            trained.result.net,
            trained.calibrators,
            encoder=trained.encoder,
            train=trained.data.splits["train"],
            out=tmp_path / "bundles",
            training={},
            metrics={},
            last_time=trained.last_time,
        )

    assert not (tmp_path / "bundles").exists()


def gated_run(
    trained: Trained, path: Path, *, is_evaluated: bool = True, **gates: Any
) -> list[str]:
    """A copy of the run with gates set; the arguments to export it with."""
    copy = path / "run"
    shutil.copytree(trained.path / "run", copy, ignore=shutil.ignore_patterns(CHECKPOINT))
    content = {**trained.config.model_dump(), "gates": gates}
    write_config(copy, TrainConfig.model_validate(content))
    if is_evaluated:
        (copy / EVALUATION).write_text(json.dumps(trained.evaluation))
    cache = str(trained.path / "cache")
    return [str(copy), "--out", str(path / "bundles"), "--cache", cache, "--json"]


def test_export_is_refused_with_every_failed_gate(trained: Trained, tmp_path: Path) -> None:
    arguments = gated_run(trained, tmp_path, min_auc={"auc_ctr": 0.99}, max_ne={"ne_ctr": 0.01})

    with pytest.raises(GateError, match=r"auc_ctr is 0\.\d+, .*; ne_ctr is 0\.\d+") as caught:
        CliRunner().invoke(verbs.export, arguments, catch_exceptions=False)

    assert len(caught.value.failures) == 2
    assert not (tmp_path / "bundles").exists()


def test_export_with_gates_is_refused_before_evaluation(trained: Trained, tmp_path: Path) -> None:
    arguments = gated_run(trained, tmp_path, is_evaluated=False, min_auc={"auc_ctr": 0.1})

    with pytest.raises(GateError, match="never evaluated"):
        CliRunner().invoke(verbs.export, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("bound", "flags", "num_failed"), [(0.99, ["--ignore-gates"], 1), (0.1, [], 0)]
)
def test_a_bundle_tells_the_gates_it_failed(
    bound: float,
    flags: list[str],
    num_failed: int,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "NUM_PARITY_ROWS", 1_000)
    # The same network's graph: making it takes seconds, and is tested elsewhere.
    monkeypatch.setattr(export, "to_onnx", lambda *_, **__: trained.bundle.model)
    arguments = gated_run(trained, tmp_path, min_auc={"auc_ctr": bound})

    result = CliRunner().invoke(verbs.export, [*arguments, *flags], catch_exceptions=False)

    assert result.exit_code == 0
    manifest = read_bundle(Path(json.loads(result.stdout)["bundle"])).manifest
    failed = manifest.training.get("failed_gates", [])
    assert len(failed) == num_failed
    assert all(text.startswith("auc_ctr is 0.") and text in result.stderr for text in failed)


@pytest.mark.parametrize("request_id", [850, 900, 990])
def test_a_record_and_a_snapshot_encode_to_the_trainer_s_row(
    trained: Trained, request_id: int, tmp_path: Path
) -> None:
    """What the store and the item table would hold at a test request's time."""
    log = pl.read_parquet(trained.path / "impressions.parquet")
    rows = log.filter(pl.col("request_id") == request_id)
    time = np.array([float(rows["time"][0])])
    schema = load_schema(trained.path / "schema.toml")
    tables = {name: trained.path / f"{name}.parquet" for name in ("events", "items", "users")}
    as_of = AsOf(Tables.read(**tables, schema=schema), schema=schema)
    user = rows["user_id"][0]
    ((_, made),) = as_of.user_records(float(time[0]), max_keys=100, only=pl.Series([user]))
    record = unpack_record(pack_record(made))
    assert len(record.recents["clicks"].times) > 0
    as_of.item_snapshot(float(time[0])).write_parquet(tmp_path / "items.parquet")
    encoder = trained.encoder
    source = FeatureSource(encoder, load_item_table(tmp_path / "items.parquet", encoder))

    encoded = source.encode(
        user_id=user,
        time=float(time[0]),
        context={"device": rows["device"][0]},
        user_features={},
        candidates=Candidates(
            item_ids=rows["item_id"].to_list(),
            columns={"discount": GivenColumn(values=rows["discount"].fill_nan(None).to_list())},
        ),
        record=record,
    )
    request, candidate = encoded.blocks.request, encoded.blocks.candidate

    split = trained.data.splits["test"]
    first_row = log.height - len(split)
    place = np.flatnonzero(log["request_id"].to_numpy() == request_id) - first_row
    expected = split.blocks(place)
    np.testing.assert_array_equal(request.ids, expected.request.ids)
    np.testing.assert_array_equal(request.history, expected.request.history)
    np.testing.assert_array_equal(request.dense, expected.request.dense)
    np.testing.assert_array_equal(candidate.ids, expected.candidate.ids)
    np.testing.assert_array_equal(candidate.dense, expected.candidate.dense)


def test_cached_data_are_mapped_and_equal_those_that_were_made(trained: Trained) -> None:
    """Read-only: what wrote into them would spoil them for the processes that share them."""
    again = load_data(trained.config, cache=trained.path / "cache", progress=lambda text: None)

    assert again.fitted == trained.data.fitted
    for name, split in again.splits.items():
        assert split.truth is None
        for field, array in vars(split).items():
            np.testing.assert_array_equal(array, getattr(trained.data.splits[name], field))
            assert array is None or not array.flags.writeable
