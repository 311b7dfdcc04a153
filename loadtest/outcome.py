"""What a scenario found: its runs, its facts, and the claims that held or did not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.openloop import Trace
from loadtest.stand import Measured
from loadtest.summary import Summary, summarize

Fact = float | int | str | bool | None | dict[str, float] | dict[str, int] | list[float]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What every scenario starts from.

    Attributes:
        saturation: Requests per second that a closed loop gets answered.
        seconds: Length of one run.
        repeats: Of runs whose median is reported.
        seed: Of schedules and of the order of requests.
        timeout_ms: Deadline of the requests, as their bodies or the service's settings have it.
    """

    saturation: float
    seconds: float
    repeats: int = 1
    seed: int = 1
    timeout_ms: int = 100


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one scenario.

    Attributes:
        name: The scenario's.
        runs: Figures by what the run was.
        facts: What was found, by a name with its unit.
        claims: What should hold, and whether it does.
        skipped: Why nothing was run; None if it was.
    """

    name: str
    runs: Mapping[str, Summary] = field(default_factory=dict)
    facts: Mapping[str, Fact] = field(default_factory=dict)
    claims: Mapping[str, bool] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def void(self) -> str | None:
        """Why it does not count: the first void run's reason."""
        reasons = (f"{name}: {run.void}" for name, run in self.runs.items() if run.void)
        return next(reasons, None)

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Plain data."""
        return {**asdict(self), "void": self.void}


def phases(
    measured: Measured, marks: Mapping[str, tuple[float, float]], *, late_limit_ms: float
) -> dict[str, Summary]:
    """Figures of the parts of a run, by name and [begin, end) in seconds; empty parts left out."""
    parts: dict[str, tuple[Trace, float]] = {
        name: (measured.trace.between(begin, end), end - begin)
        for name, (begin, end) in marks.items()
    }
    return {
        name: summarize(trace, seconds=seconds, late_limit_ms=late_limit_ms)
        for name, (trace, seconds) in parts.items()
        if len(trace)
    }
