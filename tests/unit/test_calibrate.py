from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import calibrate
from model.calibrate import (
    LOGIT_BOUND,
    Calibrator,
    CalibratorLayer,
    calibrated_probabilities,
    fit_calibrators,
)
from model.config import ObjectiveConfig
from model.logs import Labels
from model.metrics import log_loss

Floats = npt.NDArray[np.float64]
METHODS = ("identity", "temperature", "platt", "isotonic")
# Within the logits of the fit and twice as far outside them.
GRID = np.linspace(-30.0, 30.0, 2001)


def sigmoid(x: Floats) -> Floats:
    probability: Floats = 1.0 / (1.0 + np.exp(-x))
    return probability


def sample(
    seed: int, *, rows: int = 600, slope: float = 1.0, offset: float = 0.0, users: int = 60
) -> tuple[Floats, Labels, npt.NDArray[np.int64]]:
    """One step whose truth is sigmoid(slope * logit + offset)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.0, 1.5, rows)
    label = (rng.random(rows) < sigmoid(slope * logits + offset)).astype(np.int8)
    return logits, labels_of(label[:, None]), rng.integers(0, users, rows)


def labels_of(values: npt.NDArray[np.int8], weight: Any = None) -> Labels:
    return Labels(
        values=values,
        known=np.ones(values.shape, np.bool_),
        weight=np.ones(len(values), np.float32) if weight is None else weight,
    )


def fit_one(method: str, seed: int, **kwargs: Any) -> Calibrator:
    logits, labels, user = sample(seed, **kwargs)
    return fit_calibrators(logits[:, None].astype(np.float32), labels, user=user, methods=[method])[
        0
    ]


def layer(calibrator: Calibrator, logits: Floats) -> Floats:
    with torch.inference_mode():
        mapped = CalibratorLayer(calibrator)(torch.tensor(logits, dtype=torch.float32))
    return mapped.numpy().astype(np.float64)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    method=st.sampled_from(METHODS),
    slope=st.floats(-1.0, 3.0),
    rows=st.integers(80, 800),
)
def test_calibrated_logits_never_fall_and_stay_bounded(
    seed: int, method: str, slope: float, rows: int
) -> None:
    calibrator = fit_one(method, seed, slope=slope, rows=rows)

    for mapped in (calibrator.apply(GRID), layer(calibrator, GRID)):
        assert (np.diff(mapped) >= 0).all()
        assert np.abs(mapped).max() <= LOGIT_BOUND


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), method=st.sampled_from(METHODS), rows=st.integers(80, 800))
def test_the_graph_s_map_is_the_fitted_one(seed: int, method: str, rows: int) -> None:
    calibrator = fit_one(method, seed, rows=rows)
    logits = np.random.default_rng(seed).uniform(-8.0, 8.0, 500).astype(np.float32)

    exact = sigmoid(calibrator.apply(logits.astype(np.float64)))

    # float32 against float64: a few units in the last place of logits up to 16.
    np.testing.assert_allclose(
        sigmoid(layer(calibrator, logits.astype(np.float64))), exact, rtol=0, atol=1e-6
    )


def test_bound_keeps_probabilities_from_0_and_1() -> None:
    probabilities = calibrated_probabilities(
        np.array([[-1e4], [1e4]], np.float32), [Calibrator(method="platt", slope=3.0)]
    )

    assert probabilities.dtype == np.float32
    assert 1.0e-7 < probabilities[0, 0] < 1.2e-7
    assert probabilities[1, 0] < 1.0


def test_identity_passes_logits_through() -> None:
    assert Calibrator().apply(np.array([-3.0, 0.0, 3.0])).tolist() == [-3.0, 0.0, 3.0]


def test_line_is_applied() -> None:
    calibrator = Calibrator(method="platt", slope=2.0, offset=-1.0)

    assert calibrator.apply(np.array([1.0, -1.0])).tolist() == [1.0, -3.0]
    assert layer(calibrator, np.array([1.0, -1.0])).tolist() == [1.0, -3.0]


def test_knots_are_joined_by_lines_and_go_on_with_slope_one() -> None:
    calibrator = Calibrator(method="isotonic", x=(-1.0, 0.0, 2.0), y=(-2.0, 0.0, 1.0))
    logits = np.array([-2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0])

    expected = [-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
    assert calibrator.apply(logits).tolist() == expected
    np.testing.assert_allclose(layer(calibrator, logits), expected, rtol=0, atol=1e-6)


def test_platt_recovers_a_known_distortion() -> None:
    """Predictions that are too steep by 2 and too high by 1: the truth is half the logit less 1."""
    calibrator = fit_one("platt", 0, rows=40_000, slope=0.5, offset=-1.0)

    assert calibrator.method == "platt"
    assert calibrator.slope == pytest.approx(0.5, abs=0.03)
    assert calibrator.offset == pytest.approx(-1.0, abs=0.03)


def test_temperature_recovers_a_known_distortion() -> None:
    """Predictions that are too steep by 2: the truth is half the logit, T = 2."""
    calibrator = fit_one("temperature", 0, rows=40_000, slope=0.5)

    assert calibrator.method == "temperature"
    assert calibrator.slope == pytest.approx(0.5, abs=0.03)
    assert calibrator.offset == 0.0
    assert calibrator.apply(np.array([0.0])).tolist() == [0.0]


def test_temperature_is_where_the_log_loss_is_least() -> None:
    """Three of four rows at logit +-1 are right: the slope is log 3."""
    logits = np.tile([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0], 20)[:, None].astype(np.float32)
    label = np.tile([1, 1, 1, 0, 0, 0, 0, 1], 20).astype(np.int8)[:, None]

    (calibrator,) = fit_calibrators(
        logits, labels_of(label), user=np.arange(160), methods=["temperature"]
    )

    assert calibrator.slope == pytest.approx(1.0986123, abs=1e-3)


def test_temperature_is_never_steep() -> None:
    """Separable scores would make any slope better than the last."""
    logits = np.tile([0.01, -0.01], 100)[:, None].astype(np.float32)
    label = np.tile([1, 0], 100).astype(np.int8)[:, None]

    (calibrator,) = fit_calibrators(
        logits, labels_of(label), user=np.arange(200), methods=["temperature"]
    )

    assert calibrator.slope == 20.0


def test_a_step_s_fit_weighs_rows_as_the_objective_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calibrated click probabilities: 0.5, 0.2 and 0.005, which is clipped at 0.01."""
    weights: list[Floats] = []

    def record(logits: Floats, label: Floats, weight: Floats, **_: Any) -> Calibrator:
        weights.append(weight / weight.min())
        return Calibrator(method="platt", slope=1.0, offset=-1.0)

    monkeypatch.setattr(calibrate, "_choose", record)
    clicks = np.array([0.5, 0.2, 0.005, 0.3])
    logits = np.stack([np.log(clicks / (1 - clicks)) + 1.0, np.zeros(4)], axis=1)
    values = np.array([[1, 1], [1, 0], [1, 0], [0, 0]], np.int8)

    def second(**objective: Any) -> list[float]:
        weights.clear()
        fit_calibrators(
            logits.astype(np.float32),
            labels_of(values, np.array([1.0, 1.0, 1.0, 9.0], np.float32)),
            user=np.arange(4),
            methods=METHODS,
            objective=ObjectiveConfig(**objective),
        )
        assert weights[0].tolist() == [1.0, 1.0, 1.0, 9.0]
        return weights[1].tolist()

    for name in ("ipw", "dr"):
        assert second(name=name) == pytest.approx([1.0, 2.5, 50.0], rel=1e-5)
    tempered = second(name="tempered", tempering=0.5)
    assert tempered == pytest.approx([1.0, 1.5811388, 7.0710678], rel=1e-5)
    for name in ("e2e", "chain", "adjacent_mean", "hinge"):
        assert second(name=name) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("name", "expected"), [("e2e", 0.186364), ("ipw", 0.125)])
def test_calibration_keeps_a_constant_cvr_in_the_space_it_was_trained_for(
    name: str, expected: float
) -> None:
    """Two kinds of impressions, (p, q) = (0.5, 0.2) and (0.05, 0.05): papers.md section 9, T7."""
    counts = {(0.5, 0.2): (8000, 4000, 800), (0.05, 0.05): (8000, 400, 20)}
    logits, values = [], []
    for (p, _), (shown, clicks, conversions) in counts.items():
        place = np.arange(shown)
        values.append(np.stack([place < clicks, place < conversions], axis=1))
        logits.append(np.tile([np.log(p / (1 - p)), -1.0], (shown, 1)))
    labels = labels_of(np.concatenate(values).astype(np.int8))

    _, second = fit_calibrators(
        np.concatenate(logits).astype(np.float32),
        labels,
        user=np.random.default_rng(0).permutation(16_000),
        methods=["platt"],
        objective=ObjectiveConfig(name=name),
    )

    assert sigmoid(second.apply(np.array([-1.0])))[0] == pytest.approx(expected, abs=1e-3)


def test_isotonic_recovers_a_step_that_no_line_has() -> None:
    rng = np.random.default_rng(0)
    logits = rng.uniform(-2.0, 2.0, 20_000)
    truth = np.where(logits > 0.0, 0.6, 0.1)
    labels = labels_of((rng.random(20_000) < truth).astype(np.int8)[:, None])

    (calibrator,) = fit_calibrators(
        logits[:, None].astype(np.float32),
        labels,
        user=np.arange(20_000) % 500,
        methods=METHODS,
    )

    assert calibrator.method == "isotonic"
    assert len(calibrator.x) <= 64
    found = sigmoid(calibrator.apply(np.array([-1.5, -0.5, 0.5, 1.5])))
    np.testing.assert_allclose(found, [0.1, 0.1, 0.6, 0.6], rtol=0, atol=0.03)


@pytest.mark.parametrize("spread", [0.001, 0.03, 1.0])
def test_isotonic_is_never_steep(spread: float) -> None:
    """A slope multiplies the graph's rounding: torch and ONNX Runtime would differ too much."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-2.0, spread, 3000)
    label = (rng.random(3000) < sigmoid(-2.0 + (logits + 2.0) / spread)).astype(np.int8)

    (calibrator,) = fit_calibrators(
        logits[:, None].astype(np.float32),
        labels_of(label[:, None]),
        user=np.arange(3000),
        methods=["isotonic"],
    )

    mapped = calibrator.apply(np.linspace(-2.0 - 4 * spread, -2.0 + 4 * spread, 500))
    assert np.diff(mapped).max() <= 20.001 * 8 * spread / 499


def test_weights_count_as_rows() -> None:
    logits, labels, user = sample(3, rows=2000)
    weight = np.where(np.arange(2000) % 2, 3.0, 1.0).astype(np.float32)
    repeats = weight.astype(np.int64)

    weighted = fit_calibrators(
        logits[:, None].astype(np.float32),
        labels_of(labels.values, weight),
        user=user,
        methods=["platt"],
    )[0]
    repeated = fit_calibrators(
        np.repeat(logits, repeats)[:, None].astype(np.float32),
        labels_of(np.repeat(labels.values, repeats, axis=0)),
        user=np.repeat(user, repeats),
        methods=["platt"],
    )[0]

    assert weighted.slope == pytest.approx(repeated.slope, rel=1e-3)
    assert weighted.offset == pytest.approx(repeated.offset, rel=1e-3)


def test_reversed_scores_are_left_alone() -> None:
    assert fit_one("platt", 0, slope=-1.0, rows=2000).method == "identity"


@pytest.mark.parametrize("positives", [0, 1, 9])
def test_few_positives_give_the_identity(positives: int) -> None:
    label = np.zeros(500, np.int8)
    label[:positives] = 1

    (calibrator,) = fit_calibrators(
        np.zeros((500, 1), np.float32),
        labels_of(label[:, None]),
        user=np.arange(500),
        methods=METHODS,
    )

    assert calibrator == Calibrator()


def test_few_negatives_give_the_identity() -> None:
    label = np.ones(500, np.int8)
    label[:9] = 0

    (calibrator,) = fit_calibrators(
        np.zeros((500, 1), np.float32),
        labels_of(label[:, None]),
        user=np.arange(500),
        methods=METHODS,
    )

    assert calibrator == Calibrator()


@pytest.mark.parametrize("method", METHODS)
def test_all_positives_of_one_user_do_not_stop_the_fit(method: str) -> None:
    """Left out of a fold, the user leaves rows of one class behind."""
    logits, labels, user = sample(0)
    user = np.where(labels.values[:, 0] == 1, 0, user + 1)

    calibrator = fit_calibrators(
        logits[:, None].astype(np.float32), labels, user=user, methods=[method]
    )[0]

    assert np.isfinite(calibrator.apply(GRID)).all()


def test_rows_of_one_user_do_not_stop_the_fit() -> None:
    logits, labels, _ = sample(0)

    (calibrator,) = fit_calibrators(
        logits[:, None].astype(np.float32),
        labels,
        user=np.zeros(600, np.int64),
        methods=METHODS,
    )

    assert np.isfinite(calibrator.apply(GRID)).all()


def test_equal_logits_do_not_stop_the_fit() -> None:
    _, labels, user = sample(0)

    (calibrator,) = fit_calibrators(
        np.full((600, 1), -1.0, np.float32), labels, user=user, methods=["isotonic"]
    )

    assert calibrator.method == "identity"


def choose(seed: int, **kwargs: Any) -> Calibrator:
    logits, labels, user = sample(seed, **kwargs)
    return fit_calibrators(logits[:, None].astype(np.float32), labels, user=user, methods=METHODS)[
        0
    ]


def test_every_method_s_cross_validated_loss_is_told() -> None:
    logits, labels, _ = sample(1, rows=5000, slope=0.3, offset=-2.0)

    calibrator = choose(1, rows=5000, slope=0.3, offset=-2.0)

    assert set(calibrator.log_loss) == set(METHODS)
    raw = log_loss(sigmoid(logits), labels.values[:, 0].astype(np.float64), np.ones(5000))
    assert calibrator.log_loss["identity"] == pytest.approx(raw, rel=1e-6)
    assert calibrator.log_loss["platt"] < 0.9 * raw


def test_a_method_that_is_clearly_better_is_chosen() -> None:
    assert choose(1, rows=5000, slope=0.3, offset=-2.0).method == "platt"


def test_a_gain_within_one_standard_error_is_not_taken() -> None:
    calibrator = choose(1, rows=5000, slope=0.3, offset=-2.0)

    assert calibrator.log_loss["isotonic"] < calibrator.log_loss["platt"]
    assert calibrator.method == "platt"


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_scores_are_left_alone(seed: int) -> None:
    assert choose(seed, rows=2000).method == "identity"


def test_ties_go_to_the_first_method() -> None:
    logits, labels, user = sample(2)
    names = ("first", "second")
    fitters = dict.fromkeys(names, calibrate._identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_FITTERS", fitters)
        (calibrator,) = fit_calibrators(
            logits[:, None].astype(np.float32), labels, user=user, methods=names
        )

    assert list(calibrator.log_loss) == ["first", "second"]


def test_no_user_is_in_two_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are the user's number here, so that a fit tells whose rows it was given."""
    seen: list[set[float]] = []

    def record(logits: Floats, label: Floats, weight: Floats) -> Calibrator:
        seen.append(set(logits.tolist()))
        return Calibrator()

    monkeypatch.setattr(calibrate, "_FITTERS", {"platt": record})
    user = np.random.default_rng(0).integers(0, 40, 800)
    labels = labels_of((np.random.default_rng(1).random(800) < 0.5).astype(np.int8)[:, None])

    fit_calibrators(user[:, None].astype(np.float32), labels, user=user, methods=["platt"])

    *inside, whole = seen
    left_out = [whole - part for part in inside]
    assert len(inside) == 5
    assert whole == set(map(float, range(40)))
    # Each user is left out of exactly one fit: with all of its rows.
    assert sorted(user for part in left_out for user in part) == sorted(whole)


def test_a_step_is_fitted_on_rows_with_the_step_before_and_a_known_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[list[float]] = []

    def record(
        logits: Floats, label: Floats, weight: Floats, *, user: Any, methods: Any
    ) -> Calibrator:
        fitted.append(logits.tolist())
        return Calibrator()

    monkeypatch.setattr(calibrate, "_choose", record)
    labels = Labels(
        values=np.array([[1, 1], [1, 0], [0, 0], [1, 0]], np.int8),
        known=np.array([[True, True], [True, True], [True, True], [True, False]]),
        weight=np.ones(4, np.float32),
    )

    fit_calibrators(
        np.arange(8).reshape(4, 2).astype(np.float32),
        labels,
        user=np.arange(4),
        methods=METHODS,
    )

    assert fitted == [[0.0, 2.0, 4.0, 6.0], [1.0, 3.0]]


def test_equal_data_give_equal_calibrators() -> None:
    assert fit_one("isotonic", 5) == fit_one("isotonic", 5)


def test_a_calibrator_comes_back_from_json() -> None:
    calibrator = fit_one("isotonic", 5)

    assert Calibrator.model_validate_json(calibrator.model_dump_json()) == calibrator
