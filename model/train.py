"""Training: encoded splits to the weights that score best on validation; resumable to the bit.

Nothing random is remembered between steps: each step's dropout and dropped records come from (seed,
step), each epoch's order from (seed, epoch). A resumed run therefore ends with the weights of an
uninterrupted one.
"""

import copy
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import OptimizerConfig, TrainConfig
from model.contract.blocks import Blocks
from model.contract.encode import Encoder
from model.contract.errors import TrainError
from model.contract.spec import FIRST_CODE, UNKNOWN_CODE, Categorical
from model.contract.store_columns import StoreColumns
from model.criterion import Criterion
from model.dataset import EncodedData, EncodedSplit
from model.metrics import chain_metrics, space_names
from model.nets import build_net
from model.nets.layers import FieldEmbedding, Net, NetInput, NetSpec

CHECKPOINT = "checkpoint.pt"
PREDICT_ROWS = 16384

Metrics = dict[str, float | list[float]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Called as training goes: rows done of all in this epoch, and the running loss."""

    on_rows: Callable[[int, int, int, float], None]  # epoch, rows done, rows of the epoch, loss
    on_evaluation: Callable[[int, Metrics], None]  # step, validation metrics


@dataclass(kw_only=True)
class RunState:
    """Where a run is; saved with the weights.

    Attributes:
        step: optimiser steps done.
        best: validation loss of the kept weights, at `best_step`: the lowest so far, or the last.
        stale: evaluations since.
        evaluations: (step, validation metrics).
        seconds: training time, without evaluations.
    """

    step: int = 0
    best: float = float("inf")
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # Any: JSON metrics


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The network with its best weights, in evaluation mode, and how it came about."""

    net: Net
    state: RunState
    rows_per_second: float
    criterion: dict[str, Any]  # Any: JSON, see `Criterion.statistics`


def make_net(config: TrainConfig, data: EncodedData) -> Net:
    """The configured network, freshly initialised from the seed, heads at the base rates.

    Raises:
        SpecError: the architecture or an option is unknown.
    """
    torch.manual_seed(config.optimizer.seed)
    encoder = Encoder(data.fitted)
    net = build_net(config.net.architecture, spec=NetSpec.of(encoder), options=config.net.options)
    net.set_base_rates(_base_rates(data.splits["train"]))
    return net


def train(
    config: TrainConfig, data: EncodedData, *, run_dir: Path, progress: Progress
) -> TrainResult:
    """Trains to the end, from the run directory's checkpoint if there is one.

    Raises:
        SpecError: the configuration names what does not exist.
        TrainError: the loss is not finite, the checkpoint is of another configuration, or there is
            nothing to choose the best weights by.
    """
    _check_validation(data)
    torch.set_num_threads(config.optimizer.num_threads or os.cpu_count() or 1)
    run = _Run(config, data, run_dir=run_dir, progress=progress)
    run.resume()
    run.fit()
    run.net.load_state_dict(run.best_weights)
    run.net.eval()
    rows = run.state.step * run.batch_rows
    return TrainResult(
        net=run.net,
        state=run.state,
        rows_per_second=rows / max(run.state.seconds, 1e-9),
        criterion=run.criterion.statistics(),
    )


def predict(net: Net, split: EncodedSplit, *, without_records: StoreColumns | None = None) -> Any:
    """Step logits of a whole split, float32 [N, T], in evaluation mode.

    Args:
        net: left in evaluation mode.
        split: what to score.
        without_records: score as if every user record were missing.
    """
    net.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(split), PREDICT_ROWS):
            blocks = split.blocks(slice(start, start + PREDICT_ROWS))
            if without_records is not None:
                drop_records(blocks, np.ones(len(blocks.request), np.bool_), without_records)
            parts.append(net(NetInput.of(blocks)).logits.float().numpy())
    return np.concatenate(parts)


def conditional_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sigmoid of uncalibrated step logits."""
    return torch.sigmoid(torch.from_numpy(logits)).numpy()


def drop_records(blocks: Blocks, requests: npt.NDArray[np.bool_], stored: StoreColumns) -> None:
    """Overwrites, in place, the stored columns of the given requests with those of no record."""
    rows = np.flatnonzero(requests)
    request = blocks.request
    request.ids[np.ix_(rows, stored.request_ids)] = stored.request_id_values
    request.dense[np.ix_(rows, stored.request_dense)] = stored.request_dense_values
    request.history[np.ix_(rows, stored.request_history)] = 0
    candidates = np.flatnonzero(requests[blocks.request_of])
    blocks.candidate.dense[np.ix_(candidates, stored.candidate_dense)] = (
        stored.candidate_dense_values
    )


class _Run:
    """One run in progress: the network, its optimiser, its place in the data."""

    def __init__(
        self, config: TrainConfig, data: EncodedData, *, run_dir: Path, progress: Progress
    ) -> None:
        self.config = config
        self.data = data
        self.run_dir = run_dir
        self.progress = progress
        self.state = RunState()
        self.net = make_net(config, data)
        self.average = copy.deepcopy(self.net)
        self.best_weights = copy.deepcopy(self.net.state_dict())
        self._train = data.splits["train"]
        if config.optimizer.with_validation:
            self._train = self._train.followed_by(data.splits["validation"])
        self.criterion = Criterion(config, self.net, step_rates=_base_rates(self._train))
        self.optimizer = _make_optimizer(self.net, self.criterion, config.optimizer)
        encoder = Encoder(data.fitted)
        self._stored = StoreColumns.of(encoder)
        self._vocabulary_columns = np.array(
            [
                j
                for j, name in enumerate(encoder.candidate_layout.ids)
                if isinstance(encoder.schema.feature(name), Categorical)
            ],
            np.int64,
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._train) // self.batch_rows)

    @property
    def batch_rows(self) -> int:
        """The configured rows, or the power of two, 64 or more, that makes `min_steps` an epoch."""
        options = self.config.optimizer
        fitting = len(self._train) // max(options.min_steps, 1)
        return min(options.batch_rows, max(64, 1 << max(fitting.bit_length() - 1, 0)))

    @property
    def num_epochs(self) -> int:
        """The configured epochs, or as many as make `min_steps`, 10 at most."""
        options = self.config.optimizer
        needed = -(-options.min_steps // self.steps_per_epoch)
        return max(options.max_epochs, min(needed, 10))

    @property
    def _epochs_are_chosen(self) -> bool:
        """Whether the epochs are the configured ones.

        Of a small log's many, each is too short to learn new tables in.
        """
        return self.num_epochs <= self.config.optimizer.max_epochs

    @property
    def _is_out_of_patience(self) -> bool:
        """Never where tables are drawn anew: at first they score worse than the old ones did."""
        options = self.config.optimizer
        if options.fresh_embeddings and options.max_epochs > 1 and self._epochs_are_chosen:
            return False
        return self.state.stale >= options.patience

    def fit(self) -> None:
        """Steps until patience or epochs run out; evaluates and saves on the way."""
        options = self.config.optimizer
        last_step = self.steps_per_epoch * self.num_epochs
        every = max(1, -(-self.steps_per_epoch // options.evaluations_per_epoch))
        order, epoch_of_order = np.empty(0, np.int64), -1
        running = 0.0
        while self.state.step < last_step and not self._is_out_of_patience:
            started = time.perf_counter()
            epoch, place = divmod(self.state.step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                order, epoch_of_order = self._order(epoch), epoch
            if epoch and not place and options.fresh_embeddings and self._epochs_are_chosen:
                self._draw_embeddings(epoch)
            rows = order[place * self.batch_rows : (place + 1) * self.batch_rows]
            loss = self._step(rows, last_step)
            running = loss if not running else 0.98 * running + 0.02 * loss
            self.state.step += 1
            self.state.seconds += time.perf_counter() - started
            done = min((place + 1) * self.batch_rows, len(self._train))
            self.progress.on_rows(epoch, done, len(self._train), running)
            in_epoch = place + 1
            if in_epoch % every == 0 or in_epoch == self.steps_per_epoch:
                self._evaluate()
                self.save()

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The epoch's order of the training rows, which lie by time."""
        options, count = self.config.optimizer, len(self._train)
        rng = np.random.default_rng([options.seed, epoch])
        is_last = 0 < epoch == self.num_epochs - 1
        if options.recent_last and is_last and self._epochs_are_chosen:
            blurred = np.arange(count) + rng.random(count) * options.recent_blur * count
            return np.argsort(blurred)
        return rng.permutation(count)

    def resume(self) -> None:
        """Takes up the checkpoint of the run directory, if there is one.

        Raises:
            TrainError: it is of another configuration or damaged.
        """
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            return
        try:
            saved = torch.load(path, weights_only=True)
            fingerprint = saved["config"]
        except Exception as exc:  # torch raises many kinds for a damaged file
            raise TrainError(f"{path} is damaged: {exc}", where=str(path)) from exc
        if fingerprint != self._fingerprint():
            raise TrainError(
                f"{path} is of a run with another configuration or other data; choose another run "
                "directory or delete it",
                where=str(path),
            )
        self.net.load_state_dict(saved["weights"])
        self.average.load_state_dict(saved["average"])
        self.criterion.load_state_dict(saved["criterion"])
        self.best_weights = saved["best_weights"]
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = RunState(**saved["state"])

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.run_dir / f".{CHECKPOINT}"
        torch.save(
            {
                "config": self._fingerprint(),
                "weights": self.net.state_dict(),
                "average": self.average.state_dict(),
                "criterion": self.criterion.state_dict(),
                "best_weights": self.best_weights,
                "optimizer": self.optimizer.state_dict(),
                "state": asdict(self.state),
            },
            temporary,
        )
        temporary.replace(self.run_dir / CHECKPOINT)

    def _fingerprint(self) -> str:
        sections = self.config.model_dump_json(exclude={"data", "calibration", "gates"})
        # Vocabularies and moments are of all features: other events or attributes change them.
        digest = hashlib.sha256(self.data.fitted.model_dump_json().encode())
        digest.update(self._train.label_values.tobytes())
        return f"{sections} {digest.hexdigest()}"

    def _step(self, rows: npt.NDArray[np.int64], last_step: int) -> float:
        options, step = self.config.optimizer, self.state.step
        torch.manual_seed(options.seed * 1_000_003 + step)
        self.net.train()
        blocks = self._train.blocks(rows)
        self._corrupt(blocks, np.random.default_rng([options.seed, step, 1]))
        labels = self._train.labels.take(rows)
        row_weight = torch.from_numpy(labels.known * labels.weight[:, None])
        loss: Tensor = self.criterion(
            self.net(NetInput.of(blocks)),
            torch.from_numpy(labels.values).float(),
            row_weight=row_weight,
            blocks=blocks,
            progress=step / last_step,
        )
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainError(f"the loss is {value} at step {step}")
        share = 1.0 - (1.0 - options.final_learning_rate_share) * step / last_step
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * group["rate_share"] * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own method is untyped
        self.optimizer.step()
        self._update_average()
        return value

    def _draw_embeddings(self, epoch: int) -> None:
        """New id tables for an epoch, in the average, too; the optimiser forgets the old ones."""
        torch.manual_seed(self.config.optimizer.seed * 1_000_003 - epoch)
        for module in self.net.modules():
            if isinstance(module, FieldEmbedding):
                module.reset()
        tables = zip(
            self.net.embedding_parameters(), self.average.embedding_parameters(), strict=True
        )
        with torch.no_grad():
            for table, average in tables:
                average.copy_(table)
                self.optimizer.state.pop(table, None)

    def _update_average(self) -> None:
        """Moves the average towards the weights; at first it nearly follows them."""
        step = self.state.step
        decay = min(self.config.optimizer.average_decay, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.net.parameters()), 1.0 - decay
            )

    def _corrupt(self, blocks: Blocks, rng: np.random.Generator) -> None:
        """Trains for degraded answers: some requests lose their record, some ids are unknown."""
        options = self.config.optimizer
        lost = rng.random(len(blocks.request)) < options.drop_record_share
        drop_records(blocks, lost, self._stored)
        ids = blocks.candidate.ids
        unknown = rng.random((len(ids), len(self._vocabulary_columns))) < options.drop_id_share
        known = ids[:, self._vocabulary_columns] >= FIRST_CODE
        ids[:, self._vocabulary_columns] = np.where(
            unknown & known, UNKNOWN_CODE, ids[:, self._vocabulary_columns]
        )

    def _evaluate(self) -> None:
        schema = self.data.fitted.schema_
        validation = self.data.splits["validation"]
        logits = predict(self.average, validation)
        metrics = chain_metrics(conditional_probabilities(logits), validation.labels, schema=schema)
        # Normalised entropies, so that the rare last step counts as much as the first.
        loss = float(np.sum([metrics[f"ne_{name}"] for name in space_names(schema)[0]]))
        self.state.evaluations.append({"step": self.state.step, "loss": loss, **metrics})
        if loss < self.state.best or self.config.keeps_last:
            self.state.best, self.state.best_step, self.state.stale = loss, self.state.step, 0
            self.best_weights = copy.deepcopy(self.average.state_dict())
        else:
            self.state.stale += 1
        self.progress.on_evaluation(self.state.step, metrics)


def _check_validation(data: EncodedData) -> None:
    """Each step needs validation rows with and without it: else no loss tells weights apart."""
    validation = data.splits["validation"]
    for t, step in enumerate(data.fitted.schema_.steps):
        known = validation.label_values[validation.label_known[:, t], t]
        if not len(known) or known.min() == known.max():
            raise TrainError(
                f"of {len(known)} validation rows old enough, {int(known.sum())} have step "
                f"{step.name!r}: some with and some without it are needed",
                where="validation",
            )


def _make_optimizer(
    net: Net, criterion: Criterion, options: OptimizerConfig
) -> torch.optim.Optimizer:
    tables = net.embedding_parameters()
    known = {id(parameter) for parameter in tables}
    dense = [parameter for parameter in net.parameters() if id(parameter) not in known]
    return torch.optim.AdamW(
        [
            {"params": tables, "weight_decay": options.embedding_decay, "rate_share": 1.0},
            {"params": dense, "weight_decay": options.dense_decay, "rate_share": 1.0},
            *criterion.parameter_groups(),
        ],
        lr=options.learning_rate,
    )


def _base_rates(split: EncodedSplit) -> list[float]:
    """Conditional rate of each step over the rows with the step before."""
    rates, reached = [], np.ones(len(split), np.bool_)
    for t in range(split.label_values.shape[1]):
        rows = reached & split.label_known[:, t]
        positive = split.label_values[rows, t]
        weight = split.weight[rows].astype(np.float64)
        rates.append(float(np.clip((positive @ weight) / max(weight.sum(), 1e-9), 1e-6, 1 - 1e-6)))
        reached = rows & (split.label_values[:, t] == 1)
    return rates
