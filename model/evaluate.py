"""Evaluation on test rows: calibrated, beside the base rate, and once more without user records."""

from typing import Any

import numpy as np
import numpy.typing as npt

from model.calibrate import Calibrator, calibrated_probabilities, fit_calibrators
from model.config import TrainConfig
from model.contract.encode import Encoder
from model.contract.spec import Schema
from model.dataset import EncodedData, EncodedSplit
from model.metrics import chain_metrics
from model.nets.layers import Net
from model.run import Run
from model.train import predict


def calibrate_run(net: Net, data: EncodedData, config: TrainConfig) -> list[Calibrator]:
    """Calibrators fitted on the calibration split, which nothing else was fitted or chosen on."""
    return calibrate_logits(predict(net, data.splits["calibration"]), data, config)


def calibrate_logits(
    logits: npt.NDArray[np.float32], data: EncodedData, config: TrainConfig
) -> list[Calibrator]:
    """Calibrators of any model's step logits [N, T] of the calibration split."""
    split = data.splits["calibration"]
    methods = config.calibration.methods
    if any(f.source == "log_only" for f in data.fitted.schema_.features):
        # At its serving value a position says something else than the rows were logged at.
        methods = tuple(name for name in methods if name != "identity") or methods
    return fit_calibrators(logits, split.labels, user=split.user, methods=methods)


def evaluate_run(run: Run, data: EncodedData) -> dict[str, Any]:
    """Test metrics as served (`test`), with empty user records, and of the training base rate."""
    test = data.splits["test"]
    schema = data.fitted.schema_
    stored = Encoder(data.fitted).store_columns()
    served = calibrated_probabilities(predict(run.net, test), run.calibrators)
    empty = calibrated_probabilities(
        predict(run.net, test, without_records=stored), run.calibrators
    )
    return {
        "test": chain_metrics(served, test.labels, schema=schema, user=test.user),
        "test_without_records": chain_metrics(empty, test.labels, schema=schema),
        "test_base_rate": _base_rate_metrics(data.splits["train"], test, schema),
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
