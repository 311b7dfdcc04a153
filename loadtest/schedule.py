"""When requests leave: seeded arrival times. Knows nothing of what is sent."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
Arrivals = Literal["poisson", "gamma", "even"]

# Gaps of a gamma distribution with this shape come in clumps: their deviation is twice their mean.
BURST_SHAPE = 0.25


def arrival_times(
    rate: float, seconds: float, *, rng: np.random.Generator, arrivals: Arrivals = "poisson"
) -> Times:
    """Ascending times in [0, seconds), float64.

    Args:
        rate: Requests per second, on average.
        seconds: How long they go on.
        rng: Seeded by the caller.
        arrivals: `poisson`: independent callers. `gamma`: the same in bursts. `even`: as a clock
            ticks, for comparisons with tools that cannot do otherwise.
    """
    expected = rate * seconds
    if arrivals == "even":
        return np.arange(int(expected), dtype=np.float64) / rate
    shape = 1.0 if arrivals == "poisson" else BURST_SHAPE
    count = int(expected + 10.0 * np.sqrt(expected / shape) + 100.0)
    times: Times = np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), size=count))
    return times[times < seconds]


def steps(rates: list[float], seconds: float, *, rng: np.random.Generator) -> Times:
    """Poisson arrivals at one rate after another, each for so many seconds."""
    return np.concatenate(
        [
            arrival_times(rate, seconds, rng=rng) + position * seconds
            for position, rate in enumerate(rates)
        ]
    )
