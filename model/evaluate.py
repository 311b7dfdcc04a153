"""Evaluation on test rows: calibrated, beside the base rate, and once more without user records."""

from typing import Any

import numpy as np
import numpy.typing as npt

from model.calibrate import Calibrator, calibrated_probabilities, fit_calibrators
from model.config import ObjectiveConfig, TrainConfig
from model.contract.encode import Encoder
from model.contract.spec import Schema
from model.contract.store_columns import StoreColumns
from model.dataset import EncodedData, EncodedSplit
from model.metrics import chain_metrics
from model.nets.layers import Net
from model.run import Run
from model.train import conditional_probabilities, predict
from model.truth import truth_metrics


def calibrate_run(net: Net, data: EncodedData, config: TrainConfig) -> list[Calibrator]:
    """Calibrators fitted on the calibration split, which nothing else was fitted or chosen on."""
    logits = predict(net, data.splits["calibration"])
    return calibrate_logits(logits, data, config, objective=config.objective)


def calibrate_logits(
    logits: npt.NDArray[np.float32],
    data: EncodedData,
    config: TrainConfig,
    *,
    objective: ObjectiveConfig | None,
) -> list[Calibrator]:
    """Calibrators of any model's step logits [N, T] of the calibration split.

    With an objective, rows weigh as they did in it: calibration must not undo what it achieved.
    """
    split = data.splits["calibration"]
    methods = config.calibration.methods
    if any(f.source == "log_only" for f in data.fitted.schema_.features):
        # At its serving value a position says something else than the rows were logged at.
        # That is an offset, which neither the identity nor a temperature can take out.
        shifting = tuple(name for name in methods if name not in ("identity", "temperature"))
        methods = shifting or methods
    return fit_calibrators(
        logits,
        split.labels,
        user=split.user,
        methods=methods,
        objective=objective,
    )


def evaluate_run(run: Run, data: EncodedData) -> dict[str, Any]:
    """Test metrics as served (`test`), with empty user records, and of the training base rate.

    Where the log has true probabilities also against them, on all test impressions, without
    calibration and with it.
    """
    test = data.splits["test"]
    schema = data.fitted.schema_
    stored = StoreColumns.of(Encoder(data.fitted))
    logits = predict(run.net, test)
    served = calibrated_probabilities(logits, run.calibrators)
    empty = calibrated_probabilities(
        predict(run.net, test, without_records=stored), run.calibrators
    )
    against_truth = {}
    if test.truth is not None:
        for name, predicted in (
            ("truth_uncalibrated", conditional_probabilities(logits)),
            ("truth", served),
        ):
            against_truth[name] = truth_metrics(
                predicted, test.truth, weight=test.weight, schema=schema
            )
    return {
        "test": chain_metrics(served, test.labels, schema=schema, user=test.user),
        "test_without_records": chain_metrics(empty, test.labels, schema=schema),
        "test_base_rate": _base_rate_metrics(data.splits["train"], test, schema),
        **against_truth,
    }


def _base_rate_metrics(train: EncodedSplit, test: EncodedSplit, schema: Schema) -> dict[str, Any]:
    """What the training rates alone would score."""
    values = train.label_values.astype(np.float64)
    weight = train.weight.astype(np.float64)
    cumulative = np.array(
        [
            np.average(values[known, t], weights=weight[known])
            for t, known in enumerate(train.label_known.T)
        ]
    )
    conditional = cumulative / np.concatenate([[1.0], cumulative[:-1]])
    rows = np.broadcast_to(conditional.astype(np.float32), (len(test), len(conditional)))
    return chain_metrics(rows, test.labels, schema=schema)
