"""What a log and its events are read by: columns, the chain's steps, statistics of events."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Frozen(BaseModel):
    """Base of the schema's parts: nothing in them changes, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Step(Frozen):
    """One event of the chain.

    Attributes:
        name: of the step; the graph's output is `p_<name>`, see `output_names`.
        label: label column, 0 or 1.
        time: column with the event's time, None when the log has none.
        window_days: how long after the impression the event counts. Rows younger than this when the
            log ends are masked for the step: their label may still turn.
        truth: column with the known probability of the step given the one before, as the label is
            defined (within the window); simulators have it. Never a feature, never trained on.
        served: whether the graph answers the step. The first steps of a chain may be left out: they
            are learnt, because a common step before a rare one teaches it, and stay a factor of
            the steps after them.
    """

    name: str
    label: str
    time: str | None = None
    window_days: float | None = Field(default=None, gt=0)
    truth: str | None = None
    served: bool = True

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        # The digest of a schema without them stays that of releases that did not know them.
        content: dict[str, object] = handler(self)
        unset = {"truth": None, "served": True}
        return {k: v for k, v in content.items() if k not in unset or v is not unset[k]}


def check_served(steps: Sequence[Step]) -> None:
    """Refuses steps that are left out of the answer elsewhere than at the chain's start.

    Raises:
        ValueError: one is left out after a served step, or fewer than two are served.
    """
    first = num_unserved(steps)
    for step in steps[first:]:
        if not step.served:
            raise ValueError(
                f"step {step.name!r}: served = false is for the first steps of a chain"
            )
    if len(steps) - first < 2:
        raise ValueError("the last two steps of a chain are always served")


def num_unserved(steps: Sequence[Step]) -> int:
    """How many steps at the chain's start are learnt and not answered."""
    return next((t for t, step in enumerate(steps) if step.served), len(steps))


def serves_click_and_conversion(steps: Sequence[Step]) -> bool:
    """Whether the answer is that of the field's usual chain, under its usual names."""
    return tuple(step.name for step in steps if step.served) == ("click", "conversion")


def output_names(steps: Sequence[Step]) -> tuple[str, ...]:
    """Names of the graph's outputs: the cumulative of every served step, the last conditional."""
    if serves_click_and_conversion(steps):
        return ("pctr", "pctcvr", "pcvr")
    names = [step.name for step in steps if step.served]
    return (*(f"p_{name}" for name in names), f"p_{names[-1]}_given_{names[-2]}")


class LogColumns(Frozen):
    """Names of the log's columns that are not features.

    Attributes:
        request_id: groups the impressions of one request; None makes each row its own.
        weight: row weight for loss, calibration and metrics.
        negative_keep_rate: share in (0, 1] at which rows without the first step were kept; such a
            row then weighs 1 / rate. Not together with `weight`.
        split: column naming train, validation, calibration or test; None splits by time.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    time: str = "time"
    request_id: str | None = None
    weight: str | None = None
    negative_keep_rate: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight is not None and self.negative_keep_rate is not None:
            raise ValueError("give 'weight' or 'negative_keep_rate', not both")
        return self


class EventStatistic(Frozen):
    """How a raw value is made from events strictly before an impression's time (minus the lag).

    Attributes:
        event: which events count.
        aggregate: their number, the mean of `column`, the time of the last one, or ("users", item
            statistics only) the number of users who ever had one.
        column: the column averaged; only with `mean`.
        attribute: an item feature; for item statistics, all events of items sharing its value.
        whole_periods: count only so many last whole periods of `period_days`; None counts all
            before. Item statistics but "users" need it: one snapshot then serves a whole period.
    """

    event: str
    aggregate: Literal["count", "mean", "last_time", "users"]
    column: str | None = None
    attribute: str | None = None
    whole_periods: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.aggregate == "mean") != (self.column is not None):
            raise ValueError("'column' is given exactly when aggregate is 'mean'")
        if self.aggregate == "users" and (self.attribute is None or self.whole_periods is not None):
            raise ValueError("aggregate 'users' is of an 'attribute', and of all periods before")
        return self
