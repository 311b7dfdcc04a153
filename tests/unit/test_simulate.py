"""The simulator: its truth has the moments of papers.md 1.7, its labels follow the truth."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from model.config import DataConfig, SplitConfig
from model.contract.spec import parse_schema
from model.datasets import simulate
from model.datasets.simulate import (
    Simulation,
    SimulationSummary,
    draw_blocks,
    schema_content,
    write_simulation,
)
from model.logs import ImpressionLog, read_log, read_table

SMALL = Simulation(rows=20_000, users=300, items=50)


@cache
def drawn(**changes: Any) -> pl.DataFrame:
    return pl.concat(draw_blocks(Simulation(**{"rows": 200_000, **changes})))


def truth(frame: pl.DataFrame, *names: str) -> np.ndarray:
    return frame.select(f"true_p_{name}" for name in names).to_numpy().astype(np.float64)


def write(out: Path, simulation: Simulation) -> SimulationSummary:
    return write_simulation(out, simulation, progress=lambda text: None)


def read(out: Path, simulation: Simulation) -> ImpressionLog:
    return read_log(
        DataConfig(impressions=out / "impressions", schema_file=out / "schema.toml"),
        schema=parse_schema(schema_content(simulation)),
        split=SplitConfig(),
    )


def test_t10_truth_has_the_moments_of_the_paper() -> None:
    p, q = truth(drawn(), "click", "conversion").T

    # Sampling errors of 200,000 rows are near 0.0003, 0.0001 and 0.0002; the paper has 4 decimals.
    assert p.mean() == pytest.approx(0.1688, abs=0.0015)
    assert q.mean() == pytest.approx(0.0649, abs=0.0005)
    assert (p @ q) / p.sum() == pytest.approx(0.0764, abs=0.0010)


def test_truth_of_a_row_is_that_of_its_numbers() -> None:
    found = simulate.conditional_probabilities(
        np.array([0.0, 1.0]), np.array([0.0, 2.0]), np.array([0.0, 1.0]), num_steps=3
    )

    # sigmoid of -2, -2.5, -1 and of -0.8, -1.3, 0.2
    expected = [[0.11920292, 0.07585818, 0.26894142], [0.31002552, 0.21416502, 0.54983400]]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_factors_have_mean_0_and_variance_1_however_few_there_are() -> None:
    factors = simulate._factors(7, np.random.default_rng(0))

    np.testing.assert_allclose(factors.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(factors.var(axis=0), 1, atol=1e-12)


def test_labels_happen_as_often_as_the_truth_says() -> None:
    frame = drawn()
    p, q = truth(frame, "click", "conversion").T

    # Four standard errors.
    assert frame["click"].sum() == pytest.approx(p.sum(), abs=4 * np.sqrt(p @ (1 - p)))
    assert frame["conversion"].sum() == pytest.approx(p @ q, abs=4 * np.sqrt(p @ q))


@pytest.mark.parametrize("correlation", [-1.0, 0.0, 0.6])
def test_correlation_is_of_the_click_logit_and_x1(correlation: float) -> None:
    frame = drawn(correlation=correlation)
    p, q = truth(frame, "click", "conversion").T

    logit = np.log(p / (1 - p))
    # 1 / sqrt(200,000) = 0.0022.
    assert np.corrcoef(logit, frame["x1"].to_numpy())[0, 1] == pytest.approx(correlation, abs=0.01)
    assert p.mean() == pytest.approx(0.1688, abs=0.002)
    assert q.mean() == pytest.approx(0.0649, abs=0.0005)


def test_restricted_features_are_the_same_log_without_the_square() -> None:
    rich, restricted = drawn(rows=1_000), drawn(rows=1_000, features="restricted")

    assert set(rich.columns) - set(restricted.columns) == {"x1_squared"}
    assert rich.drop("x1_squared").equals(restricted)


def test_click_factor_of_its_own_is_a_column_only_where_there_is_one() -> None:
    assert "x3" not in drawn(rows=1_000).columns
    assert "x3" in drawn(rows=1_000, correlation=0.5).columns


def test_equal_arguments_write_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, SMALL)
    write(tmp_path / "c", replace(SMALL, seed=2))

    paths = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(paths) == 3
    for path in paths:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    part = "impressions/part-00000.parquet"
    assert (tmp_path / "a" / part).read_bytes() != (tmp_path / "c" / part).read_bytes()


def test_log_does_not_depend_on_how_it_is_cut_into_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = replace(SMALL, rows=140_000)
    write(tmp_path / "one", simulation)
    monkeypatch.setattr(simulate, "PART_BLOCKS", 1)
    write(tmp_path / "parts", simulation)

    assert len(list((tmp_path / "parts" / "impressions").iterdir())) == 3
    one, parts = (read_table(tmp_path / name / "impressions") for name in ("one", "parts"))
    assert len(one) == 140_000
    assert one.equals(parts)


def test_files_of_a_longer_log_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "PART_BLOCKS", 1)
    write(tmp_path, replace(SMALL, rows=140_000))
    write(tmp_path, replace(SMALL, rows=2_000))

    assert len(read_table(tmp_path / "impressions")) == 2_000


def test_summary_counts_what_was_written(tmp_path: Path) -> None:
    summary = write(tmp_path, SMALL)

    frame = read_table(tmp_path / "impressions")
    assert summary.rows == len(frame) == 20_000
    assert summary.labels == {name: frame[name].sum() for name in ("click", "conversion")}
    assert summary.true_means["click"] == pytest.approx(frame["true_p_click"].mean())


def test_log_reads_with_its_schema_whole_and_split(tmp_path: Path) -> None:
    write(tmp_path, SMALL)

    log = read(tmp_path, SMALL)

    assert (log.num_read, log.num_broken_chain) == (20_000, 0)
    shares = {name: float((log.split == name).mean()) for name in np.unique(log.split)}
    expected = {"train": 0.6, "validation": 0.05, "calibration": 0.2, "test": 0.15}
    assert shares == pytest.approx(expected, abs=0.02)


def test_three_steps_are_a_chain() -> None:
    frame = drawn(steps=3)
    labels = frame.select("click", "conversion", "step_3").to_numpy()
    expected = truth(frame, "click", "conversion", "step_3").prod(axis=1).sum()

    assert (labels[:, 1:] <= labels[:, :-1]).all()
    assert labels[:, 2].sum() == pytest.approx(expected, abs=4 * np.sqrt(expected))


def test_delayed_steps_are_known_only_if_they_happened_by_the_logs_end() -> None:
    frame = drawn(delay_days=5.0)
    converted = frame["conversion"] == 1

    assert frame["conversion_time"].is_null().equals(~converted)
    assert (frame["conversion_time"] >= frame["time"]).all()
    assert frame["conversion_time"].max() <= frame["time"].max()
    # Of the first ten days nearly all are known by then, of the last ten 57 %: 1 - (1 - e^-2) / 2.
    rates = [float(part["conversion"].mean()) for part in (frame[:33_000], frame[-33_000:])]
    assert rates[1] < 0.7 * rates[0]


def test_truth_of_delayed_steps_is_of_the_window() -> None:
    plain, delayed = drawn(steps=3), drawn(steps=3, delay_days=5.0)

    ratio = [
        truth(delayed, name)[0, 0] / truth(plain, name)[0, 0]
        for name in ("click", "conversion", "step_3")
    ]
    # Three mean delays: 1 - e^-3 = 0.950213; (1 - 4 e^-3) / 0.950213 = 0.842815.
    assert ratio == pytest.approx([1.0, 0.950213, 0.842815], abs=1e-5)


def test_delayed_labels_of_old_rows_follow_the_truth(tmp_path: Path) -> None:
    simulation = replace(SMALL, rows=200_000, steps=3, delay_days=4.0)
    write(tmp_path, simulation)

    log = read(tmp_path, simulation)

    # A window of 12 days of 60.
    assert log.labels.known.mean(axis=0) == pytest.approx([1.0, 0.8, 0.8], abs=1e-3)
    assert log.truth is not None
    for t in (1, 2):
        known = log.labels.known[:, t]
        expected = log.truth[known].astype(np.float64)[:, : t + 1].prod(axis=1).sum()
        found = log.labels.values[known, t].sum()
        assert found == pytest.approx(expected, abs=4 * np.sqrt(expected))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"users": 1},
        {"steps": 1},
        {"correlation": 1.1},
        {"correlation": float("nan")},
        {"delay_days": -1.0},
        {"delay_days": float("inf")},
    ],
)
def test_option_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"simulated|chain|correlation|delay_days"):
        next(draw_blocks(Simulation(**wrong)))
