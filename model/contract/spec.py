"""The schema: which raw values describe an impression, whose they are, and which steps follow it.

A schema is written by a person (TOML), travels in the bundle (JSON) and never changes while it is
used. What is learnt from data (vocabularies, means) is kept beside it in `FittedSchema`.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from model.contract import log_spec
from model.contract.errors import SpecError
from model.contract.log_spec import EventStatistic, Frozen, LogColumns, Step

CONTRACT_VERSION = 1

PADDING_CODE = 0  # a place in a history that holds nothing
MISSING_CODE = 1  # no value was given
UNKNOWN_CODE = 2  # a value the vocabulary does not hold
FIRST_CODE = 3  # code of the first value of a vocabulary, of bucket 0, of hour 0

Scope = Literal["user", "context", "item", "cross"]
Source = Literal["request", "store", "items", "log_only"]
RawValue = str | int | float | None


class _Feature(Frozen):
    name: str
    scope: Scope
    source: Source

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError(f"{value!r} is not a name (letters, digits, underscore)")
        return value

    @property
    def is_request_side(self) -> bool:
        """Whether one request has one value of it (user and context features)."""
        return self.scope in ("user", "context")


class Categorical(_Feature):
    """One id out of a vocabulary fitted on training rows.

    Attributes:
        min_count: values seen in fewer training rows are unknown.
        max_size: keep only the most frequent values.
        default: raw value used when none is given; None means the missing code.
        serving_value: for `log_only` features, the value used online and in calibration.
    """

    kind: Literal["categorical"] = "categorical"
    min_count: int = Field(default=1, ge=1)
    max_size: int | None = Field(default=None, ge=1)
    default: str | int | None = None
    serving_value: str | int | None = None


class Hashed(_Feature):
    """One id, hashed into a fixed number of buckets: no vocabulary, no unknown values."""

    kind: Literal["hashed"] = "hashed"
    num_buckets: int = Field(ge=2, le=2**31)
    default: str | int | None = None
    serving_value: str | int | None = None


class Numeric(_Feature):
    """One number: clipped, optionally log1p, standardised; that it is missing is told beside it."""

    kind: Literal["numeric"] = "numeric"
    log1p: bool = False
    minimum: float | None = None
    maximum: float | None = None
    default: float | None = None
    serving_value: float | None = None
    statistic: EventStatistic | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.log1p and (self.minimum is None or self.minimum < 0):
            raise ValueError(f"feature {self.name!r}: log1p needs a minimum of 0 or more")
        if None not in (self.minimum, self.maximum) and self.minimum >= self.maximum:  # type: ignore[operator]  # checked
            raise ValueError(f"feature {self.name!r}: minimum is not below maximum")
        return self


class TimePart(_Feature):
    """Hour of the day or day of the week of the request's time, in the schema's time zone."""

    kind: Literal["time_part"] = "time_part"
    scope: Literal["context"] = "context"
    source: Literal["request"] = "request"
    part: Literal["hour", "weekday"]

    @property
    def num_values(self) -> int:
        """How many values the part has."""
        return 24 if self.part == "hour" else 7


class Elapsed(_Feature):
    """Days from a stored time (unix seconds) to the request's time; a later time is ignored."""

    kind: Literal["elapsed"] = "elapsed"
    scope: Literal["user", "context"]
    log1p: Literal[True] = True
    statistic: EventStatistic | None = None


class History(_Feature):
    """The newest ids of a user's events, pooled; they share the vocabulary and table of `of`.

    A list column of that name in the user table goes before events; an id weighs by its places.
    """

    kind: Literal["history"] = "history"
    scope: Literal["user"] = "user"
    source: Literal["store", "request"] = "store"
    of: str
    max_length: int = Field(default=50, ge=1, le=1000)
    events: tuple[str, ...] = ()


class Recent(_Feature):
    """Numbers about the user's newest events, as of the request: how many, how large, how alike.

    Dense columns `NAME_<statistic>`, see `contract.recent`: within windows of days, at this hour,
    on this weekday, and, with `context`, where the request is. All are missing where there is no
    event.

    Attributes:
        events: which events count; empty means all.
        column: what is averaged, a number of 0 or more per event; log1p is taken.
        context: a categorical or hashed context feature that the events have as a column, too.
        windows_days: lengths of the windows.
        large: an event of at least so much in `column` is a large one; its age is told.
        max_length: newest events kept.
    """

    kind: Literal["recent"] = "recent"
    scope: Literal["user"] = "user"
    source: Literal["store"] = "store"
    events: tuple[str, ...] = ()
    column: str
    context: str | None = None
    windows_days: tuple[PositiveInt, ...] = (7, 30, 90)
    large: float | None = Field(default=None, ge=0)
    max_length: int = Field(default=100, ge=2, le=1000)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the dense columns, in order."""
        parts = [f"{kind}_{days}" for days in self.windows_days for kind in ("count", "mean")]
        parts += ["last", "gap", "hour_count", "hour_mean", "weekday_count", "weekday_mean"]
        if self.large is not None:
            parts.append("large_days")
        if self.context is not None:
            parts += ["here_count", "here_mean", "here_days"]
        return tuple(f"{self.name}_{part}" for part in parts)


class Match(_Feature):
    """How often, and how many days ago, the user's events had the candidate's value of `attribute`.

    Events of one instant (the lines of one basket) count once.

    Attributes:
        attribute: a categorical or hashed candidate feature, or the item id column.
        events: which events count; empty means all.
        max_age_days: an entry whose last event is older counts as missing.
    """

    kind: Literal["match"] = "match"
    scope: Literal["cross"] = "cross"
    source: Literal["store"] = "store"
    attribute: str
    events: tuple[str, ...] = ()
    max_age_days: int | None = Field(default=None, ge=1)

    @property
    def count_column(self) -> str:
        """Raw column of the count in a log or an inline candidate."""
        return f"{self.name}_count"

    @property
    def last_time_column(self) -> str:
        """Raw column of the last event's time in a log or an inline candidate."""
        return f"{self.name}_last_time"


Feature = Annotated[
    Categorical | Hashed | Numeric | TimePart | Elapsed | History | Recent | Match,
    Field(discriminator="kind"),
]


class Schema(Frozen):
    """Everything the trainer and the service must agree on.

    Attributes:
        time_zone: IANA name; hour and weekday are told in it.
        availability_lag_s: events become known this long after they happened.
        period_days: length of a whole period for item statistics.
        period_start: unix seconds at which some period began.
        log: the log's own columns.
        steps: the chain, in order; at least two.
        features: in order; the order is that of the encoded columns.
    """

    time_zone: str = "UTC"
    availability_lag_s: int = Field(default=0, ge=0)
    period_days: int = Field(default=7, ge=1)
    period_start: int = 345600  # Monday 1970-01-05 00:00 UTC
    log: LogColumns = LogColumns()
    steps: tuple[Step, ...] = Field(min_length=2)
    features: tuple[Feature, ...] = Field(min_length=1)

    @field_validator("time_zone")
    @classmethod
    def _check_time_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as exc:
            raise ValueError(f"{value!r} is not an IANA time zone") from exc
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [raw for feature in self.features for raw in raw_columns(feature)]
        # The dense columns of a recent feature stand beside those of the numeric ones, by name.
        names += [n for f in self.features if isinstance(f, Recent) for n in f.statistics]
        _refuse_repeats(names, "feature")
        _refuse_repeats([step.name for step in self.steps], "step")
        log_spec.check_served(self.steps)
        forbidden = {c for step in self.steps for c in (step.label, step.time, step.truth)}
        forbidden |= {self.log.weight, self.log.negative_keep_rate, self.log.split}
        for feature in self.features:
            _check_source(feature)
            if feature.name in forbidden:
                raise ValueError(
                    f"feature {feature.name!r} is known only after the impression (a label, an "
                    "event time, a true probability, a weight or the split)"
                )
            self._check_references(feature)
        if len({step.truth is None for step in self.steps}) > 1:
            raise ValueError("give 'truth' for every step or for none")
        if not any(not feature.is_request_side for feature in self.features):
            raise ValueError("the schema has no item or cross feature")
        return self

    def _check_references(self, feature: Feature) -> None:
        named = {f.name: f for f in self.features}
        if isinstance(feature, History):
            if not isinstance(named.get(feature.of), Categorical | Hashed):
                raise ValueError(
                    f"feature {feature.name!r}: 'of' must name a categorical or hashed feature, "
                    f"not {feature.of!r}"
                )
        elif isinstance(feature, Recent) and feature.context is not None:
            context = named.get(feature.context)
            if not isinstance(context, Categorical | Hashed) or (
                (context.scope, context.source) != ("context", "request")
            ):
                raise ValueError(
                    f"feature {feature.name!r}: 'context' must name a categorical or hashed "
                    f"context feature of the request, not {feature.context!r}"
                )
        elif isinstance(feature, Match):
            self._check_attribute(feature.name, feature.attribute)
        elif isinstance(feature, Numeric | Elapsed) and feature.statistic is not None:
            statistic = feature.statistic
            if feature.scope == "item":
                if statistic.attribute is None or (
                    statistic.whole_periods is None and statistic.aggregate != "users"
                ):
                    raise ValueError(
                        f"feature {feature.name!r}: an item statistic needs 'attribute' and "
                        "'whole_periods'"
                    )
                if statistic.aggregate == "last_time":
                    raise ValueError(
                        f"feature {feature.name!r}: an item statistic is a count, a mean or users"
                    )
                self._check_attribute(feature.name, statistic.attribute)
            elif statistic.attribute is not None or statistic.whole_periods is not None:
                raise ValueError(
                    f"feature {feature.name!r}: 'attribute' and 'whole_periods' are for item "
                    "statistics"
                )

    def _check_attribute(self, name: str, attribute: str) -> None:
        target = next((f for f in self.features if f.name == attribute), None)
        if attribute == self.log.item_id:
            return
        if not isinstance(target, Categorical | Hashed) or target.scope != "item":
            raise ValueError(
                f"feature {name!r}: 'attribute' must name a categorical or hashed item feature "
                f"or the item id column, not {attribute!r}"
            )

    @property
    def sha256(self) -> str:
        """Digest of the schema's canonical JSON, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph's outputs, see `log_spec.output_names`."""
        return log_spec.output_names(self.steps)

    def feature(self, name: str) -> Feature:
        """The feature of that name.

        Raises:
            SpecError: there is none.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        raise SpecError(f"the schema has no feature {name!r}", where=name)


class Moments(Frozen):
    """What one dense column is shifted and scaled by: encoded = (value - mean) / std, missing = 0.

    The mean is over present values, the deviation over all training rows: a column that is nearly
    always missing then speaks loudly where it is not. Values are after clipping and log1p; missing
    flags are columns of their own, 0 or 1.
    """

    mean: float
    std: float = Field(gt=0)


class FittedSchema(Frozen):
    """A schema and what was learnt from the training rows to encode by it.

    Attributes:
        vocabularies: canonical ids of each categorical feature, most frequent first; the code of
            entry i is FIRST_CODE + i.
        moments: by dense column name (see `encode.Layout`).
    """

    schema_: Schema = Field(alias="schema")
    vocabularies: dict[str, tuple[str, ...]]
    moments: dict[str, Moments]

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


def raw_columns(feature: Feature) -> tuple[str, ...]:
    """Names of the raw columns a feature is encoded from; empty for time parts."""
    if isinstance(feature, Match):
        return (feature.count_column, feature.last_time_column)
    if isinstance(feature, TimePart):
        return ()
    if isinstance(feature, History):
        return (feature.name, f"{feature.name}_time")
    if isinstance(feature, Recent):
        context = () if feature.context is None else (f"{feature.name}_{feature.context}",)
        return (feature.name, f"{feature.name}_time", *context)
    return (feature.name,)


def load_schema(path: Path) -> Schema:
    """Reads a schema from TOML.

    Raises:
        SpecError: the file is missing or not TOML, or the schema contradicts itself; every fault is
        named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise SpecError(f"no schema at {path}", where=str(path)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path} is not TOML: {exc}", where=str(path)) from exc
    return parse_schema(content, where=str(path))


def parse_schema(content: object, *, where: str = "schema") -> Schema:
    """Builds a schema from plain data.

    Raises:
        SpecError: naming every field at fault.
    """
    try:
        return Schema.model_validate(content)
    except ValidationError as exc:
        raise SpecError(f"{where}: {describe_errors(exc)}", where=where) from exc


def describe_errors(error: ValidationError) -> str:
    """One line for a pydantic error: every field with what is wrong with it."""
    parts = []
    for entry in error.errors():
        place = ".".join(str(part) for part in entry["loc"])
        message = entry["msg"].removeprefix("Value error, ")
        parts.append(f"{place}: {message}" if place else message)
    return "; ".join(parts)


def _refuse_repeats(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is there twice")
        seen.add(name)


def _check_source(feature: Feature) -> None:
    allowed: dict[str, tuple[str, ...]] = {
        "user": ("store", "request", "log_only"),
        "context": ("request", "log_only"),
        "item": ("items", "request", "log_only"),
        "cross": ("request", "store", "log_only"),
    }
    if feature.source not in allowed[feature.scope]:
        raise ValueError(
            f"feature {feature.name!r}: a feature of scope {feature.scope} comes from "
            f"{' or '.join(allowed[feature.scope])}, not {feature.source}"
        )
    if feature.scope == "cross" and feature.source == "store" and not isinstance(feature, Match):
        raise ValueError(f"feature {feature.name!r}: only match features are cross and stored")
    serving = getattr(feature, "serving_value", None)
    if feature.source != "log_only" and serving is not None:
        raise ValueError(f"feature {feature.name!r}: serving_value is for log_only features")
    if feature.source == "log_only" and (not hasattr(feature, "serving_value") or serving is None):
        raise ValueError(f"feature {feature.name!r}: a log_only feature needs a serving_value")
