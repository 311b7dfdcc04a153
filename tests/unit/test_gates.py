"""Gates of an export, on literal evaluations."""

from typing import Any

import pytest
import tiny
from pydantic import ValidationError

from model.config import GatesConfig
from model.gates import check_gates

EVALUATION: dict[str, Any] = {
    "test": {
        "auc_ctr": 0.62,
        "auc_ctcvr": None,
        "ne_ctr": 0.97,
        "ne_ctcvr": 1.01,
        "pcoc_ctr": 1.04,
        "pcoc_ctcvr": 0.85,
        "pcoc_cvr_clicked": 5.0,
    },
    "test_base_rate": {"auc_ctr": 0.5, "pcoc_ctr": 9.0},
}


def failures(**gates: Any) -> list[str]:
    return check_gates(GatesConfig.model_validate(gates), EVALUATION, schema=tiny.schema())


def test_nothing_is_checked_where_nothing_is_set() -> None:
    assert check_gates(GatesConfig(), {}, schema=tiny.schema()) == []


def test_gates_that_hold_do_not_fail() -> None:
    assert failures(max_pcoc_error=0.16, min_auc={"auc_ctr": 0.62}, max_ne={"ne_ctr": 0.97}) == []


def test_every_failed_gate_is_named_with_its_figure() -> None:
    found = failures(
        max_pcoc_error=0.1,
        min_auc={"auc_ctr": 0.65},
        max_ne={"ne_ctr": 0.98, "ne_ctcvr": 1.0},
    )

    assert found == [
        "pcoc_ctcvr is 0.85, expected off 1 by 0.1 at most",
        "auc_ctr is 0.62, expected 0.65 or more",
        "ne_ctcvr is 1.01, expected 1 or less",
    ]


def test_pcoc_is_of_every_cumulative_step_only() -> None:
    """Not of the conditional ones, whose PCOC on clicked rows is far off here."""
    assert failures(max_pcoc_error=0.01) == [
        "pcoc_ctr is 1.04, expected off 1 by 0.01 at most",
        "pcoc_ctcvr is 0.85, expected off 1 by 0.01 at most",
    ]


@pytest.mark.parametrize("name", ["auc_ctcvr", "auc_nothing"])
def test_a_metric_that_is_not_known_fails_its_gate(name: str) -> None:
    assert failures(min_auc={name: 0.1}) == [f"{name} is not known, expected 0.1 or more"]


@pytest.mark.parametrize(
    "gates", [{"max_pcoc_error": 9.0}, {"min_auc": {"auc_ctr": 0.0}}, {"max_ne": {"ne_ctr": 9.0}}]
)
def test_a_run_never_evaluated_fails_every_gate(gates: dict[str, Any]) -> None:
    (found,) = check_gates(GatesConfig.model_validate(gates), {}, schema=tiny.schema())

    assert "never evaluated" in found


@pytest.mark.parametrize(
    "gates", [{"min_auc": {"ctr": 0.6}}, {"max_ne": {"auc_ctr": 0.6}}, {"max_pcoc_error": 0.0}]
)
def test_a_gate_that_can_never_be_meant_is_refused(gates: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatesConfig.model_validate(gates)
