"""Gates of an export: bounds on the test metrics of a run, as served."""

from collections.abc import Mapping
from typing import Any

from model.config import GatesConfig
from model.contract.spec import Schema
from model.metrics import space_names


def check_gates(
    gates: GatesConfig,
    evaluation: Mapping[str, Any],  # Any: JSON
    *,
    schema: Schema,
) -> list[str]:
    """Every gate that fails, with its figure; a metric that is not known fails its gate.

    Args:
        gates: the bounds.
        evaluation: of the run, {} before `ctr evaluate`.
        schema: names the cumulative steps.
    """
    is_set = gates.max_pcoc_error is not None or gates.min_auc or gates.max_ne
    if not is_set:
        return []
    if not evaluation:
        return ["gates are set and the run was never evaluated: run `ctr evaluate` first"]
    test = evaluation["test"]
    failures = []
    if gates.max_pcoc_error is not None:
        for space in space_names(schema)[0]:
            value = test.get(f"pcoc_{space}")
            # Written so that NaN fails.
            if value is None or not abs(value - 1.0) <= gates.max_pcoc_error:
                bound = f"off 1 by {gates.max_pcoc_error:g} at most"
                failures.append(_failure(f"pcoc_{space}", value, bound))
    for name, smallest in gates.min_auc.items():
        value = test.get(name)
        if value is None or not value >= smallest:
            failures.append(_failure(name, value, f"{smallest:g} or more"))
    for name, largest in gates.max_ne.items():
        value = test.get(name)
        if value is None or not value <= largest:
            failures.append(_failure(name, value, f"{largest:g} or less"))
    return failures


def _failure(name: str, value: float | None, bound: str) -> str:
    return f"{name} is {'not known' if value is None else f'{value:.6g}'}, expected {bound}"
