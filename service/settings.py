"""Settings of the service; the only reader of the environment.

`CTR_PORT=9000` sets `port`, `CTR_STORE__TIMEOUT_MS=10` sets `store.timeout_ms`. An empty variable
counts as not set. A variable that begins with CTR_ and is no setting is refused.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "CTR_"
MAX_INLINE_US = 100_000
_DELIMITER = "__"


class SettingsError(ValueError):
    """A setting is unknown, out of bounds, or contradicts another; shows no secret."""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )


class StoreSettings(_Section):
    """The online store of user records."""

    url: SecretStr | None = Field(
        None,
        min_length=1,
        max_length=2048,
        description="Where user records are: redis://, rediss://, unix:// or memory://. "
        "Not set: the command line starts a Redis server of its own",
    )
    data_dir: Path = Field(
        Path("ctr-redis"),
        description="Where the Redis server keeps its data that runs if no URL is set",
    )
    timeout_ms: int = Field(
        20, ge=1, le=10_000, description="Most time one look-up takes before defaults are used"
    )
    connect_timeout_ms: int = Field(
        50, ge=1, le=10_000, description="Most time for opening a connection"
    )
    max_connections: int = Field(
        32, ge=1, le=1024, description="Most look-ups under way at once; further ones wait"
    )
    key_prefix: str = Field(
        "ctr:user:", max_length=100, description="Put before the user id to form the key"
    )
    max_record_age_s: int = Field(
        7 * 24 * 3600, ge=1, le=10 * 366 * 24 * 3600, description="A user record older is stale"
    )
    breaker_failures: int = Field(
        5, ge=1, le=1000, description="Failures in a row after which the store is left alone"
    )
    breaker_open_ms: int = Field(
        250, ge=1, le=60_000, description="How long it is left alone before one look-up tries again"
    )


class BatchSettings(_Section):
    """How requests are put together for the model."""

    max_batch_rows: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="Most rows run together; a larger request is run in parts. "
        "Not set: measured when a bundle is loaded",
    )
    max_queue_rows: int = Field(
        20_000, ge=1, le=10_000_000, description="Most rows waiting; when full, refused at once"
    )
    num_runners: int = Field(1, ge=1, le=64, description="Model runs at the same time")
    intra_op_threads: int = Field(1, ge=1, le=64, description="Threads inside one model run")
    inline_us: int | None = Field(
        None,
        ge=0,
        le=MAX_INLINE_US,
        description="Longest model run made on the event loop itself. "
        "Not set: 500, or any run if a worker has one core only",
    )


class LimitSettings(_Section):
    """What one request may ask for."""

    max_candidates: int = Field(1000, ge=1, le=100_000, description="Most candidates per request")
    body_limit_bytes: int = Field(
        1 << 20, ge=1024, le=1 << 30, description="Longest request body accepted"
    )
    timeout_ms: int = Field(
        100, ge=1, le=60_000, description="Time for one request if it names none itself"
    )
    max_timeout_ms: int = Field(
        2000, ge=1, le=600_000, description="Longest time a request may name"
    )


class HealthSettings(_Section):
    """What is sampled to tell how the model's inputs and outputs are distributed."""

    sample_every: int = Field(
        16, ge=0, le=1_000_000, description="One request in so many is looked at; 0 none"
    )
    drift_window_s: float = Field(
        3600.0,
        ge=60,
        le=30 * 24 * 3600,
        description="Length of the sliding window over which drift is told",
    )


class Settings(BaseSettings):
    """Everything that can be set, frozen. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=_DELIMITER,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="Address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0 takes a free one")
    bundle: Path | None = Field(
        None, description="Bundle directory to serve; until there is one the service is not ready"
    )
    item_snapshot: Path | None = Field(
        None, description="File with the items that requests may name by id alone"
    )
    item_sums: bool = Field(
        True,
        description="Keep what the model's first layer makes of each item, and only add it in "
        "every run (`ctr inspect` tells the bytes per item); if not, every run makes it anew",
    )
    reload_poll_s: float = Field(
        5.0,
        ge=0,
        le=86_400,
        description="Time between looks for another bundle or item snapshot; 0 waits for SIGHUP",
    )
    workers: int = Field(
        1, ge=0, le=256, description="Processes that answer; 0 takes one per CPU core available"
    )
    log_level: LogLevel = Field("info", description="Least severe level logged")
    store: StoreSettings = Field(default_factory=StoreSettings, description="Online store")
    batch: BatchSettings = Field(default_factory=BatchSettings, description="Micro-batches")
    limits: LimitSettings = Field(default_factory=LimitSettings, description="Per request")
    health: HealthSettings = Field(default_factory=HealthSettings, description="Sampling")
    drain_delay_ms: int = Field(
        500,
        ge=0,
        le=600_000,
        description="How long requests are still taken after readiness has gone, at shutdown",
    )
    drain_timeout_ms: int = Field(
        5000, ge=0, le=600_000, description="Most time for finishing what was taken, at shutdown"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.limits.timeout_ms > self.limits.max_timeout_ms:
            raise ValueError("CTR_LIMITS__TIMEOUT_MS is above CTR_LIMITS__MAX_TIMEOUT_MS")
        if self.limits.max_candidates > self.batch.max_queue_rows:
            raise ValueError(
                "CTR_LIMITS__MAX_CANDIDATES is above CTR_BATCH__MAX_QUEUE_ROWS: "
                "the largest request would never be taken"
            )
        return self


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting, as the README lists it.

    Attributes:
        variable: Name of the environment variable.
        default: The default as it would be written there, or `not set`.
        description: One sentence without a full stop.
    """

    variable: str
    default: str
    description: str


def load_settings(**overrides: Any) -> Settings:  # Any: checked by pydantic, field by field
    """Reads the environment; arguments win over it.

    Args:
        **overrides: Fields by name, sections as dicts: `port=0, store={"timeout_ms": 5}`. None
            means not given.

    Returns:
        The settings.

    Raises:
        SettingsError: A CTR_ variable or an override is unknown, out of bounds, or contradicts
            another. The message has one line per problem and no secret.
    """
    problems = [_unknown_text(name) for name in _unknown_variables(os.environ)]
    if problems:
        raise SettingsError("\n".join(problems))
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as exc:
        lines = [_problem_text(error) for error in exc.errors(include_url=False)]
        # Without the cause: a traceback would print the values, secrets among them.
        raise SettingsError("\n".join(lines)) from None


def environment_of(settings: Settings) -> dict[str, str]:
    """This process's environment with these settings in it, for a child that reads them."""
    kept = {n: v for n, v in os.environ.items() if not n.upper().startswith(PREFIX)}
    return kept | dict(_variables(settings, PREFIX))


def setting_rows() -> tuple[SettingRow, ...]:
    """Every setting, in the order of definition; sections after one another."""
    return tuple(
        SettingRow(
            variable=variable,
            default="not set" if info.default is None else str(info.default),
            description=info.description or "",
        )
        for variable, info in _leaves(Settings, PREFIX)
    )


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        variable = prefix + name.upper()
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section):
            yield from _leaves(info.annotation, variable + _DELIMITER)
        else:
            yield variable, info


def _variables(section: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    for name in type(section).model_fields:
        value, variable = getattr(section, name), prefix + name.upper()
        if isinstance(value, _Section):
            yield from _variables(value, variable + _DELIMITER)
        elif value is not None:
            is_secret = isinstance(value, SecretStr)
            yield variable, value.get_secret_value() if is_secret else str(value)


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    # pydantic-settings ignores a misspelt top-level variable; it reads names in any case.
    known = {row.variable for row in setting_rows()}
    return sorted(
        name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )


def _unknown_text(name: str) -> str:
    known = [row.variable for row in setting_rows()]
    members = [variable for variable in known if variable.startswith(name.upper() + _DELIMITER)]
    if members:
        return f"{name}: a section, set its members: {', '.join(members)}"
    nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    return f"{name}: no such setting, the nearest is {nearest[0]}"


def _problem_text(error: Mapping[str, Any]) -> str:  # Any: pydantic's ErrorDetails
    if not error["loc"]:
        return str(error["ctx"]["error"]) if "ctx" in error else str(error["msg"])
    variable = PREFIX + _DELIMITER.join(str(part) for part in error["loc"]).upper()
    info = dict(_leaves(Settings, PREFIX)).get(variable)
    if info is None:
        return _unknown_text(variable)
    if SecretStr in (info.annotation, *get_args(info.annotation)):
        return f"{variable}: {error['msg']}"
    return f"{variable}: got {str(error['input'])[:60]!r}, {error['msg']}"
