"""One task of a comparison, in a process of its own: `python -m model.comparison.worker TASK`.

TASK is JSON. Lines of JSON go to the parent on stdout: {"say": text} and, at a failure that is
understood, {"error": text}; everything else that is printed goes to stderr. The process ends when
its stdin does: no worker outlives its parent, however that ended.

Imports of torch and the like are inside functions: the parent reads this module too.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from model.comparison.boosting import BoostedChain, BoostingOptions, fit_chain
from model.comparison.bootstrap import drawn_metrics
from model.config import TrainConfig
from model.console import without_nan
from model.contract.encode import Encoder
from model.contract.errors import ContractError
from model.contract.log_spec import num_unserved
from model.dataset import EncodedData, EncodedSplit, load_data
from model.metrics import chain_metrics, space_names

if TYPE_CHECKING:
    from model.calibrate import Calibrator

COST = "cost.json"
COST_ROWS = 100
MARK = "fingerprint"

Say = Callable[[str], None]
Logits = npt.NDArray[np.float32]


class Task(BaseModel):
    """What one worker is to do.

    Attributes:
        kind: "prepare" encodes the data into the cache, "train" makes a run and its result,
            "draw" repeats the bootstrap of a finished run, "cost" times the scoring of one.
        arm_dir: where the arm's files go.
        data_key: of the encoded data, see `dataset.cache_key`.
        fingerprint: of all that decides the run's result.
        boosting: options of a LightGBM chain; None for a network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["prepare", "train", "draw", "cost"]
    arm: str
    seed: int
    config: TrainConfig
    cache: Path
    arm_dir: Path
    data_key: str
    fingerprint: str
    num_draws: int
    num_threads: int = 1
    boosting: BoostingOptions | None = None

    @property
    def name(self) -> str:
        """As people are told of it."""
        if self.kind == "prepare":
            return f"data of {self.arm}"
        words = {"train": "seed", "draw": "draws of seed", "cost": "cost, seed"}
        return f"{self.arm} {words[self.kind]} {self.seed}"

    @property
    def run_dir(self) -> Path:
        """The model's own files."""
        return self.arm_dir / f"run-{self.seed}"

    @property
    def result_path(self) -> Path:
        """Metrics and facts, JSON; a run with this file is finished."""
        return self.arm_dir / f"seed-{self.seed}.json"

    @property
    def predictions_path(self) -> Path:
        """Test predictions and bootstrap draws, NPZ."""
        return self.arm_dir / f"seed-{self.seed}.npz"


def main() -> None:
    """Does the task of the command line."""
    task = Task.model_validate_json(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(text: str) -> None:
        channel.write(json.dumps({"say": text}) + "\n")

    try:
        do(task, say=say)
    except ContractError as exc:
        channel.write(json.dumps({"error": str(exc)}) + "\n")
        sys.exit(1)


def do(task: Task, *, say: Say) -> None:
    """Does a task in this process."""
    data = load_data(task.config, cache=task.cache, progress=say)
    if task.kind == "train":
        _train(task, data, say)
    elif task.kind == "draw":
        say("drawing users")
        with np.load(task.predictions_path) as kept:
            conditional = kept["conditional"]
        _write_predictions(task, conditional, data)
    elif task.kind == "cost":
        _write_json(task.arm_dir / COST, {"fingerprint": task.fingerprint, **_cost(task, data)})


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _train(task: Task, data: EncodedData, say: Say) -> None:
    """Fits, calibrates, scores the test rows; the result file comes last."""
    from model.calibrate import calibrated_probabilities
    from model.train import conditional_probabilities

    started = time.time()
    claim_run_dir(task)
    if task.boosting is None:
        logits, calibrators, facts = _train_net(task, data, say)
    else:
        logits, calibrators, facts = _train_boosting(task, data, task.boosting, say)
    say("measuring on the test rows")
    test, schema = data.splits["test"], data.fitted.schema_
    served = calibrated_probabilities(logits, calibrators)
    raw = chain_metrics(conditional_probabilities(logits), test.labels, schema=schema)
    cumulative_names, conditional_names = space_names(schema)
    _write_predictions(task, served, data)
    _write_json(
        task.result_path,
        {
            "arm": task.arm,
            "seed": task.seed,
            "kind": "net" if task.boosting is None else "lightgbm",
            "fingerprint": task.fingerprint,
            "spaces": {"cumulative": cumulative_names, "conditional": conditional_names},
            "test": chain_metrics(served, test.labels, schema=schema, user=test.user),
            "uncalibrated": {k: v for k, v in raw.items() if k.startswith(("pcoc_", "log_loss_"))},
            "calibration": [c.method for c in calibrators],
            **facts,
            "num_threads": task.num_threads,
            "seconds": round(time.time() - started, 1),
            "data_sha256": _digest(json.dumps(data.report, sort_keys=True).encode()),
            "test_sha256": _digest(*_label_bytes(test, num_unserved(schema.steps))),
        },
    )


def claim_run_dir(task: Task) -> None:
    """Keeps a stopped run's checkpoint, if it is of the same task with as many threads."""
    mark = f"{task.fingerprint} {task.num_threads}"
    path = task.run_dir / MARK
    if not path.exists() or path.read_text() != mark:
        # An older result is of another model than the one that is about to lie here.
        task.result_path.unlink(missing_ok=True)
        shutil.rmtree(task.run_dir, ignore_errors=True)
        task.run_dir.mkdir(parents=True)
        path.write_text(mark)


Trained = tuple[Logits, "Sequence[Calibrator]", dict[str, Any]]  # Any: JSON


def _train_net(task: Task, data: EncodedData, say: Say) -> Trained:
    """Test logits, calibrators and facts of a network; its run directory is `ctr train`'s."""
    from model.evaluate import calibrate_run
    from model.run import write_run
    from model.train import CHECKPOINT, Progress, predict, train

    last = 0.0

    def on_rows(epoch: int, done: int, total: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            say(f"epoch {epoch + 1}, {done / total:.0%}, loss {loss:.5f}")

    def on_evaluation(step: int, metrics: Mapping[str, Any]) -> None:
        del metrics
        say(f"validated at step {step}")

    progress = Progress(on_rows=on_rows, on_evaluation=on_evaluation)
    result = train(task.config, data, run_dir=task.run_dir, progress=progress)
    say("fitting calibrators")
    calibrators = calibrate_run(result.net, data, task.config)
    parameters = sum(p.numel() for p in result.net.parameters())
    tables = sum(p.numel() for p in result.net.embedding_parameters())
    facts = {
        "parameters": parameters,
        "dense_parameters": parameters - tables,
        "rows_per_second": result.rows_per_second,
        "best_step": result.state.best_step,
        "criterion": result.criterion,
    }
    write_run(
        task.run_dir,
        config=task.config,
        fitted=data.fitted,
        net=result.net,
        calibrators=calibrators,
        training={**facts, "data": data.report, "evaluations": result.state.evaluations},
    )
    (task.run_dir / CHECKPOINT).unlink(missing_ok=True)
    say("scoring the test rows")
    return predict(result.net, data.splits["test"]), calibrators, facts


def _train_boosting(task: Task, data: EncodedData, options: BoostingOptions, say: Say) -> Trained:
    """The same of a LightGBM chain."""
    from model.evaluate import calibrate_logits

    threads = task.num_threads
    chain = fit_chain(data, options, seed=task.seed, num_threads=threads, progress=say)
    chain.write(task.run_dir)
    say("fitting calibrators")
    calibration = chain.logits(data.splits["calibration"], num_threads=threads)
    calibrators = calibrate_logits(calibration, data, task.config, objective=None)
    facts = {
        "parameters": chain.num_parameters,
        "dense_parameters": chain.num_parameters,
        "rows_per_second": chain.rows_per_second,
        "best_step": [fit["tried"][0]["rounds"] for fit in chain.fits],
        "criterion": {"fits": chain.fits, "columns_left_out": chain.plan.left_out},
    }
    say("scoring the test rows")
    return chain.logits(data.splits["test"], num_threads=threads), calibrators, facts


def _cost(task: Task, data: EncodedData) -> dict[str, Any]:  # Any: JSON
    """Microseconds of CPU time per candidate, one request of COST_ROWS, one thread."""
    from functools import partial

    from model.cost import cpu_microseconds, one_request
    from model.golden import golden_requests

    encoder = Encoder(data.fitted)
    time_range = data.report["time_range"]
    assert isinstance(time_range, list)
    blocks = golden_requests(encoder, last_time=float(time_range[1])).encode(encoder)
    request = one_request(blocks, COST_ROWS)
    if task.boosting is None:
        from model.export import make_session, scoring_graph, to_onnx
        from model.run import read_run

        run = read_run(task.run_dir)
        graph = scoring_graph(run.net, run.calibrators, schema=encoder.schema)
        model = to_onnx(graph, blocks=blocks, outputs=encoder.schema.output_names)
        session = make_session(model)
        runtime = "ONNX Runtime"
        microseconds = cpu_microseconds(partial(session.run, None, request.feeds()))
    else:
        chain = BoostedChain.read(task.run_dir)
        matrix = chain.plan.matrix_of_blocks(request)
        runtime = "LightGBM predict"
        microseconds = cpu_microseconds(partial(chain.matrix_logits, matrix, num_threads=1))
    return {"runtime": runtime, "microseconds_per_candidate": microseconds / COST_ROWS}


def _write_predictions(task: Task, conditional: Logits, data: EncodedData) -> None:
    test = data.splits["test"]
    drawn = drawn_metrics(
        conditional,
        test.labels,
        user=test.user,
        schema=data.fitted.schema_,
        num_draws=task.num_draws,
    )
    temporary = task.predictions_path.with_name(f".{task.predictions_path.name}")
    with temporary.open("wb") as file:
        np.savez(
            file,
            conditional=conditional,
            cumulative=np.cumprod(conditional.astype(np.float64), axis=1).astype(np.float32),
            draws=drawn.values,
            draw_names=np.array(drawn.names),
        )
    temporary.replace(task.predictions_path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:  # Any: JSON
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(without_nan(dict(content)), indent=1))
    temporary.replace(path)


def _label_bytes(split: EncodedSplit, first: int) -> list[bytes]:
    """Of the rows and their labels from a step on: what two chains have in common."""
    labels = (split.label_values[:, first:], split.label_known[:, first:])
    arrays = (*labels, split.weight, split.user)
    return [array.tobytes() for array in arrays]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
