"""The configuration of a training run: one TOML file to frozen models, with overrides."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from model.contract.errors import SpecError
from model.contract.spec import describe_errors


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """The tables of a run; relative paths are relative to the configuration file."""

    impressions: Path
    schema_file: Path
    events: Path | None = None
    items: Path | None = None
    users: Path | None = None
    observed_until: AwareDatetime | None = None


class SplitConfig(_Section):
    """Split by time, where the log names no split: train first, test last, the rest between."""

    train_share: float = Field(default=0.7, gt=0, lt=1)
    test_share: float = Field(default=0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train_share + self.test_share >= 1.0:
            raise ValueError("train_share and test_share leave no rows between them")
        return self


class NetConfig(_Section):
    """Architecture and its options (those of the architecture's options class)."""

    architecture: str = "tafe"
    options: dict[str, Any] = Field(default_factory=dict)  # Any: checked by the architecture


class ObjectiveConfig(_Section):
    """Which loss, an entry of `model.objectives.OBJECTIVES`, and its dials.

    Attributes:
        step_weights: weight of each step's term; one for all when empty.
        propensity_clip: smallest P_{t-1} that ipw, tempered and dr divide by: weights are at most
            its inverse.
        tempering: alpha of `tempered`, weights P_{t-1}^-alpha: 0 is chain, 1 is ipw.
        e2e_weight: of the e2e terms of the steps after the first, added to ipw, tempered and dr
            (ESCM2 adds them with 1); 0 leaves them pure.
        imputation: what dr's tower says of rows without the step before: their "label", or their
            "error" as in ESCM2-DR, whose head learns exactly as under ipw.
        imputation_hidden: width of that tower.
        hinge_weight: of `hinge`'s penalty on P_t > P_{t-1}, alpha of AITM.
    """

    name: str = "e2e"
    step_weights: tuple[float, ...] = ()
    propensity_clip: float = Field(default=0.01, gt=0, le=1)
    tempering: float = Field(default=0.5, ge=0, le=1)
    e2e_weight: float = Field(default=0.0, ge=0)
    imputation: Literal["label", "error"] = "label"
    imputation_hidden: int = Field(default=64, ge=1)
    hinge_weight: float = Field(default=0.6, ge=0)


class AlignmentConfig(_Section):
    """AdaFTR-style alignment of neighbouring steps' representations; see `model.alignment`.

    Attributes:
        mode: how the temperature of a row is found: "off" aligns nothing, "fixed" is plain InfoNCE
            at `temperature`, "prior" (M1), "robust" (M2) and "naive" learn it per row.
        weight: alpha, of the whole term.
        warm_up_share: of the training steps over which the weight rises from 0.
        temperature: tau_0; the range is `min_temperature` to `max_temperature`.
        prior_weight: lambda_tau of "prior".
        robust_share: rho of "robust", as a share of log of the number of negatives.
        projection: width of the projections; 0 aligns the representations themselves.
        hidden: width of the relatedness network's layer.
        rows: most rows of a batch that are contrasted: the cost is quadratic in them.
        negatives: "batch" takes all other rows, "one" a single random one.
        is_symmetric: also from the later step to the earlier; without, the earlier is detached.
        network_rate_share: learning rate of the relatedness network, as a share of the main one.
    """

    mode: Literal["off", "fixed", "prior", "robust", "naive"] = "off"
    weight: float = Field(default=0.01, ge=0)
    warm_up_share: float = Field(default=0.1, ge=0, le=1)
    temperature: float = Field(default=0.2, gt=0)
    min_temperature: float = Field(default=0.05, gt=0)
    max_temperature: float = Field(default=1.0, gt=0)
    prior_weight: float = Field(default=0.1, ge=0)
    robust_share: float = Field(default=0.4, gt=0, lt=1)
    projection: int = Field(default=64, ge=0)
    hidden: int = Field(default=64, ge=1)
    rows: int = Field(default=512, ge=2)
    negatives: Literal["batch", "one"] = "batch"
    is_symmetric: bool = True
    network_rate_share: float = Field(default=0.1, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min_temperature < self.temperature < self.max_temperature:
            raise ValueError("temperature is not between min_temperature and max_temperature")
        if self.mode == "robust" and (self.negatives == "one" or self.rows < 3):
            raise ValueError('mode "robust" needs two negatives or more: rho is below log|N|')
        return self


class OptimizerConfig(_Section):
    """Adam and the order of rows.

    Models with id tables over-fit from the second epoch on, on the real data as in the literature:
    one epoch is the default, with a rate that falls linearly to its end. With `fresh_embeddings`
    the tables start anew at each epoch, so that further epochs train the layers above without
    learning the training rows by heart.

    Attributes:
        batch_rows: the largest batch; smaller logs get smaller ones, down to 64 rows, and then more
            epochs, up to 10, until there are `min_steps` steps.
        embedding_decay, dense_decay: decoupled weight decay per step, as a share of the rate.
        fresh_embeddings: whether the id tables are drawn anew at the start of each further epoch.
            Source: multi-epoch learning by re-initialised embeddings (arXiv 2305.19531) [memory].
        recent_last: whether the last epoch of several goes through the rows by time, blurred by
            `recent_blur` of the epoch: the weights then end on what is nearest to serving. Epochs
            before, and a single one, are in random order.
        drop_record_share: share of requests trained without their user record.
        drop_id_share: share of item ids trained as unknown.
        average_decay: of the running average of weights that is evaluated and kept; 0 keeps the
            weights themselves.
        evaluations_per_epoch: how often validation is scored, and a checkpoint written.
        patience: evaluations without a better validation loss before the end; with fresh
            embeddings all epochs are run.
        with_validation: whether the validation rows are trained on, too, after the training rows:
            for the last training, when all is chosen, to come nearer to the time of serving. The
            last weights are kept; validation metrics then are of rows that were seen.
        keep: which weights: "best" has the lowest validation loss, the sum of the cumulative steps'
            normalised entropies; "last" trains to the end whatever the validation says; "auto" is
            "last" for objectives that trade the cumulative probabilities for the conditional ones
            (ipw, tempered and dr without e2e) and `with_validation`, else "best".
    """

    batch_rows: int = Field(default=2048, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    final_learning_rate_share: float = Field(default=0.02, ge=0, le=1)
    average_decay: float = Field(default=0.998, ge=0, lt=1)
    embedding_decay: float = Field(default=0.0, ge=0)
    dense_decay: float = Field(default=0.0, ge=0)
    max_epochs: int = Field(default=1, ge=1)
    min_steps: int = Field(default=1000, ge=0)
    fresh_embeddings: bool = True
    recent_last: bool = True
    recent_blur: float = Field(default=0.2, gt=0, le=1)
    patience: int = Field(default=3, ge=1)
    keep: Literal["auto", "best", "last"] = "auto"
    with_validation: bool = False
    evaluations_per_epoch: int = Field(default=4, ge=1)
    drop_record_share: float = Field(default=0.03, ge=0, lt=1)
    drop_id_share: float = Field(default=0.01, ge=0, lt=1)
    seed: int = 1
    num_threads: int = Field(default=0, ge=0, description="0: all cores")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.with_validation and self.keep == "best":
            raise ValueError("with_validation leaves nothing to choose the best weights by")
        return self


class FitConfig(_Section):
    """Calibration of the conditional steps, on the calibration split.

    Attributes:
        methods: calibrators tried per step, the simplest first; one that is better by a standard
            error replaces those before it.
    """

    methods: tuple[Literal["identity", "temperature", "platt", "isotonic"], ...] = (
        "identity",
        "temperature",
        "platt",
        "isotonic",
    )

    @field_validator("methods")
    @classmethod
    def _check(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one method; 'identity' leaves the logits as they are")
        return value


class GatesConfig(_Section):
    """Bounds that a run must keep on its test rows, as served, to be exported; none when unset.

    Attributes:
        max_pcoc_error: largest |PCOC - 1| of every cumulative step.
        min_auc: smallest AUC by metric name, {"auc_ctr": 0.6}.
        max_ne: largest normalised entropy by metric name, {"ne_ctcvr": 0.99}.
    """

    max_pcoc_error: float | None = Field(default=None, gt=0)
    min_auc: dict[str, float] = Field(default_factory=dict)
    max_ne: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for bounds, prefix in ((self.min_auc, "auc_"), (self.max_ne, "ne_")):
            for name in bounds:
                if not name.startswith(prefix):
                    raise ValueError(f"{name!r} is no metric {prefix}SPACE, such as {prefix}ctr")
        return self


class TrainConfig(_Section):
    """All of a run."""

    data: DataConfig
    split: SplitConfig = SplitConfig()
    net: NetConfig = NetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    calibration: FitConfig = FitConfig()
    gates: GatesConfig = GatesConfig()

    @property
    def keeps_last(self) -> bool:
        """Whether the last weights are kept, not those of the lowest validation loss.

        That loss is of the cumulative steps, against which `ipw`, `tempered` and `dr` alone work.
        """
        objective, optimizer = self.objective, self.optimizer
        is_weighted = objective.name in ("ipw", "tempered", "dr") and not objective.e2e_weight
        is_last_by_itself = is_weighted or optimizer.with_validation
        return optimizer.keep == "last" or (optimizer.keep == "auto" and is_last_by_itself)

    def dump(self) -> dict[str, Any]:  # Any: TOML values
        """Plain data for TOML and JSON; unset values are left out."""
        return self.model_dump(mode="json", exclude_none=True)


def load_config(path: Path, *, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a run's TOML, applies `section.key=value` overrides (values as TOML, else text).

    Raises:
        SpecError: the file or an override is at fault; every fault is named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise SpecError(f"no configuration at {path}", where=str(path)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path} is not TOML: {exc}", where=str(path)) from exc
    for override in overrides:
        _apply(content, override)
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as exc:
        raise SpecError(f"{path}: {describe_errors(exc)}", where=str(path)) from exc
    return config.model_copy(update={"data": _resolve(config.data, path.parent)})


def _apply(content: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise SpecError(f"override {override!r} is not section.key=value", where=override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise SpecError(f"override {override!r}: {section!r} is no section", where=override)
    content[last] = value


def _resolve(data: DataConfig, base: Path) -> DataConfig:
    paths = {name: (base / value).resolve() for name, value in data if isinstance(value, Path)}
    return data.model_copy(update=paths)
