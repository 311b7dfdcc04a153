"""Metrics against known probabilities, and how the truth gets to them from a log's columns."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny

from model.config import DataConfig, SplitConfig
from model.contract.errors import LogError, SpecError
from model.contract.spec import Schema, parse_schema
from model.logs import read_log
from model.truth import entire_space_names, truth_metrics

STEPS = [
    {"name": "click", "label": "click", "truth": "p"},
    {"name": "conversion", "label": "bought", "truth": "q"},
]


def schema(**changes: Any) -> Schema:
    content = {
        "log": {"split": "split"},
        "steps": STEPS,
        "features": [{"name": "x", "kind": "numeric", "scope": "cross", "source": "request"}],
    }
    return parse_schema({**content, **changes})


def read(path: Path, *, leave_out: str | None = None, **columns: Any) -> Any:
    frame = {
        "user_id": [1, 2, 3, 4],
        "item_id": [1] * 4,
        "time": [40, 30, 20, 10],
        "split": ["train", "validation", "calibration", "test"],
        "click": [1, 1, 0, 0],
        "bought": [1, 0, 0, 0],
        "p": [0.4, 0.3, 0.2, 0.1],
        "q": [0.04, 0.03, 0.02, 0.01],
    }
    kept = {name: column for name, column in {**frame, **columns}.items() if name != leave_out}
    pl.DataFrame(kept).write_parquet(path / "log.parquet")
    data = DataConfig(impressions=path / "log.parquet", schema_file=path / "schema.toml")
    return read_log(data, schema=schema(), split=SplitConfig())


def metrics(conditional: list[list[float]], truth: list[list[float]], weight: list[float]) -> Any:
    return truth_metrics(
        np.array(conditional, np.float32),
        np.array(truth, np.float32),
        weight=np.array(weight, np.float32),
        schema=schema(),
    )


def test_pcoc_is_predicted_over_true_on_all_rows() -> None:
    found = metrics([[0.5, 0.2], [0.1, 0.4]], [[0.4, 0.1], [0.2, 0.3]], [1.0, 1.0])

    assert found["pcoc_ctr"] == pytest.approx(0.6 / 0.6)
    assert found["pcoc_cvr_all"] == pytest.approx(0.6 / 0.4)
    assert found["pcoc_ctcvr"] == pytest.approx((0.10 + 0.04) / (0.04 + 0.06))


def test_error_is_the_root_of_the_mean_square() -> None:
    found = metrics([[0.5, 0.2], [0.1, 0.4]], [[0.4, 0.1], [0.2, 0.3]], [1.0, 1.0])

    assert found["rmse_cvr_all"] == pytest.approx(0.1)
    assert found["rmse_ctcvr"] == pytest.approx(np.sqrt((0.06**2 + 0.02**2) / 2))


def test_excess_log_loss_is_the_divergence_from_the_truth() -> None:
    found = metrics([[0.25, 0.5]] * 2, [[0.5, 0.5]] * 2, [1.0, 1.0])

    # 0.5 ln 2 + 0.5 ln (2/3)
    assert found["excess_log_loss_ctr"] == pytest.approx(0.1438410)
    assert found["excess_log_loss_cvr_all"] == pytest.approx(0.0, abs=1e-9)


def test_row_weights_count() -> None:
    found = metrics([[0.5, 0.2], [0.1, 0.4]], [[0.4, 0.1], [0.2, 0.3]], [3.0, 1.0])

    assert found["mean_cvr_all"] == pytest.approx(0.25)
    assert found["true_mean_cvr_all"] == pytest.approx(0.15)


def test_certain_predictions_have_a_finite_divergence() -> None:
    found = metrics([[1.0, 0.0]], [[0.5, 0.5]], [1.0])

    assert np.isfinite(list(found.values())).all()


def test_names_say_the_space() -> None:
    longer = schema(steps=[{"name": name, "label": name} for name in ("view", "cart", "buy")])

    assert entire_space_names(schema()) == (("ctr", "ctcvr"), ("cvr_all",))
    assert entire_space_names(longer) == (
        ("p_view", "p_cart", "p_buy"),
        ("cart_given_view_all", "buy_given_cart_all"),
    )


def test_truth_of_a_log_follows_its_rows(tmp_path: Path) -> None:
    log = read(tmp_path)  # sorted by time, which turns it around

    assert log.truth.dtype == np.float32
    np.testing.assert_allclose(log.truth[:, 0], [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(log.truth[:, 1], [0.01, 0.02, 0.03, 0.04])


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), None])
def test_truth_that_is_no_probability_is_refused(tmp_path: Path, wrong: float | None) -> None:
    with pytest.raises(LogError, match="'q' holds what is no probability"):
        read(tmp_path, q=[0.1, wrong, 0.1, 0.1])


def test_missing_truth_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no column 'p'"):
        read(tmp_path, leave_out="p")


def test_true_probability_is_no_feature() -> None:
    feature = {"name": "q", "kind": "numeric", "scope": "cross", "source": "request"}

    with pytest.raises(SpecError, match="'q' is known only after the impression"):
        schema(features=[feature])


def test_truth_is_of_every_step_or_of_none() -> None:
    with pytest.raises(SpecError, match="'truth' for every step or for none"):
        schema(steps=[STEPS[0], {"name": "conversion", "label": "bought"}])


def test_schema_with_truth_comes_back_from_json() -> None:
    assert Schema.model_validate_json(schema().model_dump_json()) == schema()


def test_schema_without_truth_does_not_speak_of_it() -> None:
    assert "truth" not in tiny.schema().model_dump_json()
