"""The table of scenarios."""

from collections.abc import Callable, Mapping

from loadtest.faults import (
    bundle_swap,
    item_swap,
    poisoned,
    redis_gone,
    redis_stall,
    sigterm,
    swaps,
)
from loadtest.loads import burst, memory, overload, steady, step
from loadtest.outcome import Base, Outcome
from loadtest.stand import Stand

SCENARIOS: Mapping[str, Callable[[Stand, Base], Outcome]] = {
    "steady": steady,
    "step": step,
    "burst": burst,
    "overload": overload,
    "redis-stall": redis_stall,
    "redis-gone": redis_gone,
    "bundle-swap": bundle_swap,
    "item-swap": item_swap,
    "sigterm": sigterm,
    "poisoned": poisoned,
    "memory": memory,
    "swaps": swaps,
}

# Minutes each; run when named, not with all.
LONG = ("memory", "swaps")
