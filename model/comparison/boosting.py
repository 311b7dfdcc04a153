"""Gradient boosted trees as a chain: one LightGBM model per step, on the networks' own columns.

Model t is fitted on the training rows with step t - 1, so that its raw score is the logit of the
conditional probability, as a network's is. LightGBM is an optional extra: it is imported when used.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.contract.blocks import Blocks
from model.contract.encode import Encoder
from model.contract.errors import TrainError
from model.dataset import EncodedData, EncodedSplit

Matrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Parameters = dict[str, Any]  # Any: what LightGBM takes

COLUMNS = "columns.json"
FIRST: Parameters = {
    "learning_rate": 0.05,
    "num_leaves": 63,
    "min_data_in_leaf": 100,
    "lambda_l2": 1.0,
    "feature_fraction": 0.8,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
}
LATER: Parameters = {**FIRST, "learning_rate": 0.03, "num_leaves": 15, "min_data_in_leaf": 20}
SPACE: dict[str, tuple[float, ...]] = {
    "learning_rate": (0.02, 0.03, 0.05, 0.08),
    "num_leaves": (7, 15, 31, 63, 127),
    "min_data_in_leaf": (20, 50, 100, 200),
    "lambda_l2": (0.0, 1.0, 10.0),
    "feature_fraction": (0.6, 0.8, 1.0),
}


class BoostingOptions(BaseModel):
    """How the chain is fitted.

    Attributes:
        first: LightGBM parameters of the first step's model, over `FIRST`.
        later: of the later steps' models, over `LATER`: they have far fewer rows.
        trials: settings drawn from `SPACE` and tried beside those, per step; the one with the
            lowest validation loss is kept.
        max_categories: id features with at most so many codes are categorical columns; the others
            are left out, their target statistics being among the dense columns.
        max_rounds: trees of one model at most.
        patience: rounds without a better validation loss before the end.
        with_validation: whether the validation rows are fitted, too; the number of rounds is then
            that of the parameters (`num_iterations`), found before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first: Parameters = Field(default_factory=dict)
    later: Parameters = Field(default_factory=dict)
    trials: int = Field(default=0, ge=0)
    max_categories: int = Field(default=300, ge=0)
    max_rounds: int = Field(default=600, ge=1)
    patience: int = Field(default=30, ge=1)
    with_validation: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = all("num_iterations" in parameters for parameters in (self.first, self.later))
        if self.with_validation and (self.trials or not given):
            raise ValueError(
                "with_validation leaves nothing to choose by: it needs num_iterations in first and "
                "later, and no trials"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """Which encoded columns make up the matrix.

    Order: dense columns of the request, of the candidate, then ids of the request, of the
    candidate.

    Attributes:
        names: of the matrix's columns.
        request_ids, candidate_ids: positions of the taken columns in the blocks' ids.
        left_out: id features with too many codes, and histories.
    """

    names: tuple[str, ...]
    request_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, encoder: Encoder, *, max_categories: int) -> "ColumnPlan":
        sides = (encoder.request_layout, encoder.candidate_layout)
        taken = [
            tuple(j for j, n in enumerate(s.ids) if encoder.table_size(n) <= max_categories)
            for s in sides
        ]
        ids = [side.ids[j] for side, chosen in zip(sides, taken, strict=True) for j in chosen]
        dense = [name for side in sides for name in side.dense_columns]
        out = [name for side in sides for name in side.ids if name not in ids]
        histories = [history.name for side in sides for history in side.histories]
        return cls(
            names=(*dense, *ids),
            request_ids=taken[0],
            candidate_ids=taken[1],
            left_out=(*out, *histories),
        )

    @property
    def categorical(self) -> list[int]:
        """Positions of the id columns in the matrix."""
        count = len(self.request_ids) + len(self.candidate_ids)
        return list(range(len(self.names) - count, len(self.names)))

    def matrix(self, split: EncodedSplit, rows: Rows | None = None) -> Matrix:
        """Columns of some rows, or of all, [N, len(names)] float32."""
        taken: Rows | slice = slice(None) if rows is None else rows
        requests = split.request_of[taken]
        parts: tuple[tuple[npt.NDArray[Any], Any], ...] = (
            (split.request_dense, requests),
            (split.candidate_dense, taken),
            (split.request_ids[:, self.request_ids], requests),
            (split.candidate_ids[:, self.candidate_ids], taken),
        )
        matrix = np.empty((len(requests), len(self.names)), np.float32)
        start = 0
        for array, at in parts:
            stop = start + array.shape[1]
            matrix[:, start:stop] = array[at]
            start = stop
        return matrix

    def matrix_of_blocks(self, blocks: Blocks) -> Matrix:
        """The same columns of some blocks."""
        request, candidate, of = blocks.request, blocks.candidate, blocks.request_of
        parts = (
            request.dense[of],
            candidate.dense,
            request.ids[:, self.request_ids][of],
            candidate.ids[:, self.candidate_ids],
        )
        return np.concatenate(parts, axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class BoostedChain:
    """One booster per step; fitted by `fit_chain`.

    Attributes:
        boosters: lightgbm.Booster, which is not typed and not imported here.
        rows_per_second: training rows over the seconds of all fits, trials included.
        fits: per step: rows, settings tried with validation loss and rounds, the kept one first.
    """

    plan: ColumnPlan
    boosters: list[Any]
    rows_per_second: float
    fits: list[dict[str, Any]]

    @property
    def num_parameters(self) -> int:
        """Leaf values, and feature and threshold of every split."""
        trees = [tree for booster in self.boosters for tree in booster.dump_model()["tree_info"]]
        return sum(3 * tree["num_leaves"] - 2 for tree in trees)

    def logits(self, split: EncodedSplit, *, num_threads: int) -> Matrix:
        """Step logits [N, T] float32, uncalibrated."""
        return self.matrix_logits(self.plan.matrix(split), num_threads=num_threads)

    def matrix_logits(self, matrix: Matrix, *, num_threads: int) -> Matrix:
        """The same, of rows in the plan's columns."""
        options = {"raw_score": True, "num_threads": num_threads}
        columns = [booster.predict(matrix, **options) for booster in self.boosters]
        return np.stack(columns, axis=1).astype(np.float32)

    def write(self, path: Path) -> None:
        """Writes the models as LightGBM's text files."""
        path.mkdir(parents=True, exist_ok=True)
        for t, booster in enumerate(self.boosters):
            booster.save_model(path / f"booster-{t}.txt")
        facts = {key: vars(self)[key] for key in ("rows_per_second", "fits")}
        (path / COLUMNS).write_text(json.dumps({"plan": vars(self.plan), **facts}))

    @classmethod
    def read(cls, path: Path) -> "BoostedChain":
        """Reads what `write` wrote."""
        import lightgbm

        content = json.loads((path / COLUMNS).read_bytes())
        plan = ColumnPlan(**{key: tuple(value) for key, value in content.pop("plan").items()})
        files = [path / f"booster-{t}.txt" for t in range(len(content["fits"]))]
        boosters = [lightgbm.Booster(model_file=file) for file in files]
        return cls(plan=plan, boosters=boosters, **content)


def fit_chain(
    data: EncodedData,
    options: BoostingOptions,
    *,
    seed: int,
    num_threads: int,
    progress: Callable[[str], None],
) -> BoostedChain:
    """Fits one model per step.

    Raises:
        TrainError: a split has no rows with, or none without, a step.
    """
    import lightgbm

    encoder = Encoder(data.fitted)
    plan = ColumnPlan.of(encoder, max_categories=options.max_categories)
    boosters, fits, seconds = [], [], 0.0
    for t, step in enumerate(data.fitted.schema_.steps):
        started = time.perf_counter()
        splits = dict(data.splits)
        if options.with_validation:
            splits["train"] = splits["train"].followed_by(splits["validation"])
        name_of_step = data.fitted.schema_.steps[t].name
        sets = _data_sets(lightgbm, splits, plan, step=t, name_of_step=name_of_step)
        base = {**LATER, **options.later} if t else {**FIRST, **options.first}
        best: Any = None  # Any: lightgbm.Booster
        tried: list[Parameters] = []
        for k, setting in enumerate(_settings(base, options.trials, seed=seed, step=t)):
            progress(f"step {step.name}, setting {k + 1} of {options.trials + 1}")
            booster, loss = _fit(lightgbm, sets, setting, options, seed, num_threads)
            entry = {"validation_loss": loss, "rounds": booster.num_trees(), "setting": setting}
            if best is None or loss < tried[0]["validation_loss"]:
                best = booster
                tried.insert(0, entry)
            else:
                tried.append(entry)
        boosters.append(best)
        fits.append({"rows": sets[0].num_data(), "tried": tried})
        seconds += time.perf_counter() - started
    return BoostedChain(
        plan=plan,
        boosters=boosters,
        rows_per_second=len(data.splits["train"]) / max(seconds, 1e-9),
        fits=fits,
    )


def step_rows(
    split: EncodedSplit, t: int
) -> tuple[Rows, npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Rows a conditional step is fitted on (all steps before it, label known), label, weight."""
    reached = split.label_known[:, t].copy()
    if t:
        reached &= split.label_values[:, t - 1] == 1
    rows = np.flatnonzero(reached)
    return rows, split.label_values[rows, t], split.weight[rows]


def _data_sets(
    lightgbm: Any,  # Any: the module, untyped
    splits: Mapping[str, EncodedSplit],
    plan: ColumnPlan,
    *,
    step: int,
    name_of_step: str,
) -> list[Any]:
    """A step's rows for training and for validation, as lightgbm.Dataset."""
    sets: list[Any] = []
    for name in ("train", "validation"):
        rows, label, weight = step_rows(splits[name], step)
        if not len(rows) or label.min() == label.max():
            raise TrainError(
                f"of {len(rows)} {name} rows old enough, {int(label.sum())} have step "
                f"{name_of_step!r}: some with and some without it are needed",
                where=name,
            )
        sets.append(
            lightgbm.Dataset(
                plan.matrix(splits[name], rows),
                label,
                weight=weight,
                categorical_feature=plan.categorical,
                reference=sets[0] if sets else None,
                # Else min_data_in_leaf could not change between trials.
                params={"verbosity": -1, "feature_pre_filter": False},
            )
        )
    return sets


def _fit(
    lightgbm: Any,  # Any: the module, untyped
    sets: list[Any],
    setting: Parameters,
    options: BoostingOptions,
    seed: int,
    num_threads: int,
) -> tuple[Any, float]:
    """The booster at its best round, and its validation log-loss."""
    parameters = {
        **setting,
        "objective": "binary",
        "metric": "binary_logloss",
        "seed": seed,
        "num_threads": num_threads,
        "verbosity": -1,
        "feature_pre_filter": False,
        "deterministic": True,
        "force_row_wise": True,
    }
    booster = lightgbm.train(
        parameters,
        sets[0],
        num_boost_round=options.max_rounds,
        valid_sets=[sets[1]],
        valid_names=["validation"],
        callbacks=[]
        if options.with_validation
        else [lightgbm.early_stopping(options.patience, verbose=False)],
    )
    if options.with_validation:
        return booster, float("nan")
    loss = float(booster.best_score["validation"]["binary_logloss"])
    best = booster.model_to_string(num_iteration=booster.best_iteration)
    return lightgbm.Booster(model_str=best), loss


def _settings(base: Parameters, trials: int, *, seed: int, step: int) -> list[Parameters]:
    """The given setting, then random ones of the space."""
    rng = np.random.default_rng([seed, step])
    drawn = [
        {name: values[rng.integers(len(values))] for name, values in SPACE.items()}
        for _ in range(trials)
    ]
    return [base, *({**base, **setting} for setting in drawn)]
