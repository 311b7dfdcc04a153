"""A run directory: what training leaves behind, and how evaluation and export find it again.

config.toml (resolved), schema.json (fitted), weights.pt, calibration.json, training.json;
checkpoint.pt while it lasts; evaluation.json once evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from model.calibrate import Calibrator
from model.config import TrainConfig, load_config
from model.contract.encode import Encoder
from model.contract.errors import LogError, TrainError
from model.contract.spec import FittedSchema
from model.nets import build_net
from model.nets.layers import Net, NetSpec

CONFIG, SCHEMA, WEIGHTS = "config.toml", "schema.json", "weights.pt"
CALIBRATION, TRAINING, EVALUATION = "calibration.json", "training.json", "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, read back.

    Attributes:
        training: data report, validation history, rows per second.
        evaluation: what `ctr evaluate` found; empty before.
    """

    path: Path
    config: TrainConfig
    fitted: FittedSchema
    net: Net
    calibrators: list[Calibrator]
    training: dict[str, Any]  # Any: JSON
    evaluation: dict[str, Any]

    @property
    def last_time(self) -> float:
        """Unix seconds of the newest impression."""
        return float(self.training["data"]["time_range"][1])


def write_run(
    path: Path,
    *,
    config: TrainConfig,
    fitted: FittedSchema,
    net: Net,
    calibrators: Sequence[Calibrator],
    training: Mapping[str, Any],
) -> None:
    """Writes a finished run; weights last, so that a run with weights is whole."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(path, config)
    (path / SCHEMA).write_text(fitted.model_dump_json(by_alias=True))
    dumped = [calibrator.model_dump(mode="json") for calibrator in calibrators]
    (path / CALIBRATION).write_text(json.dumps(dumped))
    (path / TRAINING).write_text(json.dumps(training, indent=1))
    (path / EVALUATION).unlink(missing_ok=True)
    temporary = path / f".{WEIGHTS}"
    torch.save(net.state_dict(), temporary)
    temporary.replace(path / WEIGHTS)


def write_config(path: Path, config: TrainConfig) -> None:
    """Writes the resolved configuration beside the checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(tomli_w.dumps(config.dump()))


def read_run(path: Path) -> Run:
    """Reads a finished run.

    Raises:
        LogError: there is none, or a file of it is damaged.
        TrainError: the weights do not fit the configuration.
    """
    if not (path / WEIGHTS).exists():
        raise LogError(f"no finished run at {path} (no {WEIGHTS})", path=path)
    try:
        fitted = FittedSchema.model_validate_json((path / SCHEMA).read_bytes())
        calibrators = [
            Calibrator.model_validate(entry)
            for entry in json.loads((path / CALIBRATION).read_bytes())
        ]
        training = json.loads((path / TRAINING).read_bytes())
    except (OSError, ValueError) as exc:
        raise LogError(f"{path}: a file of the run is damaged: {exc}", path=path) from exc
    config = load_config(path / CONFIG)
    net = build_net(
        config.net.architecture, spec=NetSpec.of(Encoder(fitted)), options=config.net.options
    )
    try:
        net.load_state_dict(torch.load(path / WEIGHTS, weights_only=True))
    except (RuntimeError, OSError, ValueError) as exc:
        raise TrainError(f"{path / WEIGHTS} does not fit the run: {exc}", where=WEIGHTS) from exc
    net.eval()
    evaluation = path / EVALUATION
    return Run(
        path=path,
        config=config,
        fitted=fitted,
        net=net,
        calibrators=calibrators,
        training=training,
        evaluation=json.loads(evaluation.read_bytes()) if evaluation.exists() else {},
    )


def config_of(path: Path) -> TrainConfig:
    """The configuration at a path: a TOML file, or a run directory's."""
    return load_config(path / CONFIG if path.is_dir() else path)
