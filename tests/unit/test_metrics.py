import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract.spec import Schema, parse_schema
from model.logs import Labels
from model.metrics import (
    auc,
    chain_metrics,
    ece,
    gauc,
    log_loss,
    ne,
    pcoc,
    pcoc_interval,
    space_names,
)

Floats = npt.NDArray[np.float64]


def schema(*names: str) -> Schema:
    return parse_schema(
        {
            "steps": [{"name": name, "label": f"is_{name}"} for name in names],
            "features": [{"name": "a", "kind": "categorical", "scope": "item", "source": "items"}],
        }
    )


def array(*values: float) -> Floats:
    return np.array(values, np.float64)


def ones(values: Floats) -> Floats:
    return np.ones(len(values), np.float64)


def brute_auc(predicted: Floats, label: Floats, weight: Floats) -> float:
    """Every pair of a positive and a negative; a tie is half."""
    total, wins = 0.0, 0.0
    for p, y, w in zip(predicted, label, weight, strict=True):
        for q, z, v in zip(predicted, label, weight, strict=True):
            if y == 1 and z == 0:
                total += w * v
                wins += w * v * (1.0 if p > q else 0.5 if p == q else 0.0)
    return wins / total if total else math.nan


rows = st.lists(
    st.tuples(
        st.sampled_from([0.1, 0.2, 0.3, 0.9]), st.integers(0, 1), st.sampled_from([1.0, 2.0, 0.5])
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(rows)
def test_t44_auc_is_the_share_of_pairs_with_ties_half(
    rows: list[tuple[float, int, float]],
) -> None:
    predicted, label, weight = np.array(rows, np.float64).T

    np.testing.assert_allclose(
        auc(predicted, label, weight), brute_auc(predicted, label, weight), rtol=1e-12
    )


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_t44_auc_of_one_class_is_nan(label: float) -> None:
    predicted = array(0.1, 0.2)

    assert math.isnan(auc(predicted, np.full(2, label), ones(predicted)))


def test_t45_the_three_auc_spaces_on_six_rows() -> None:
    """Rows: pctr, pcvr, click, conversion."""
    rows = [
        (0.9, 0.2, 1, 0),  # pctcvr 0.18
        (0.8, 0.5, 1, 1),  # 0.40
        (0.7, 0.9, 0, 0),  # 0.63
        (0.4, 0.5, 1, 0),  # 0.20
        (0.3, 0.1, 0, 0),  # 0.03
        (0.1, 0.8, 1, 1),  # 0.08
    ]
    pctr, pcvr, click, conversion = np.array(rows).T
    labels = Labels(
        values=np.stack([click, conversion], axis=1).astype(np.int8),
        known=np.ones((6, 2), np.bool_),
        weight=np.ones(6, np.float32),
    )

    metrics = chain_metrics(
        np.stack([pctr, pcvr], axis=1).astype(np.float32),
        labels,
        schema=schema("click", "conversion"),
    )

    # Clicked .9 .8 .4 .1 above unclicked .7 .3: 2 + 2 + 1 + 0 of 8 pairs.
    assert metrics["auc_ctr"] == pytest.approx(5 / 8)
    # All rows: .40 above .18 .20 .03, not .63; .08 above .03 only: 4 of 8 pairs.
    assert metrics["auc_ctcvr"] == pytest.approx(4 / 8)
    # Clicked rows: .5 above .2, equal to .5; .8 above both: 3.5 of 4 pairs.
    assert metrics["auc_cvr_clicked"] == pytest.approx(3.5 / 4)
    assert [metrics[f"rows_{name}"] for name in ("ctr", "ctcvr", "cvr_clicked")] == [6, 6, 4]
    assert [metrics[f"positives_{name}"] for name in ("ctr", "ctcvr", "cvr_clicked")] == [4, 2, 2]


@pytest.mark.parametrize("metric", [auc, log_loss, ne, pcoc])
def test_a_weight_is_so_many_equal_rows(metric: object) -> None:
    assert callable(metric)
    predicted, label = array(0.1, 0.4, 0.35, 0.8), array(0, 0, 1, 1)
    weight = array(1, 3, 2, 1)
    repeats = weight.astype(np.int64)

    weighted = metric(predicted, label, weight)
    repeated = metric(
        np.repeat(predicted, repeats), np.repeat(label, repeats), np.ones(int(weight.sum()))
    )

    assert weighted == pytest.approx(repeated, rel=1e-12)


def test_log_loss_by_hand() -> None:
    predicted, label = array(0.5, 0.25), array(1, 0)

    # -(ln 0.5 + ln 0.75) / 2
    assert log_loss(predicted, label, ones(label)) == pytest.approx(0.490414626505863)


def test_log_loss_of_certainty_that_fails_is_finite() -> None:
    assert 700 < log_loss(array(0.0, 1.0), array(1, 0), array(1, 1)) < 710


def test_ne_of_the_base_rate_is_one() -> None:
    label = array(1, 0, 0, 0)

    assert ne(np.full(4, 0.25), label, ones(label)) == pytest.approx(1.0)


def test_ne_by_hand() -> None:
    predicted, label = array(0.8, 0.2, 0.2, 0.2), array(1, 0, 0, 0)

    # -ln 0.8 = 0.223144 over the entropy of 0.25, 0.562335
    assert ne(predicted, label, ones(label)) == pytest.approx(0.396816, abs=1e-6)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_ne_of_one_class_is_nan(label: float) -> None:
    assert math.isnan(ne(array(0.1, 0.2), np.full(2, label), array(1, 1)))


def test_pcoc_is_predicted_over_observed() -> None:
    assert pcoc(array(0.2, 0.4, 0.6), array(0, 1, 1), array(1, 1, 2)) == pytest.approx(1.8 / 3)


def test_pcoc_without_an_event_is_nan() -> None:
    assert math.isnan(pcoc(array(0.2), array(0), array(1)))


def test_ece_is_the_mean_gap_of_equal_bins() -> None:
    # 40 rows: 20 bins of 2. Half predict 0.25, of which one in two happens; half 0.75, all happen.
    predicted = np.repeat(array(0.25, 0.75), 20)
    label = np.concatenate([np.tile([0.0, 1.0], 10), np.ones(20)])

    assert ece(predicted, label, ones(label)) == pytest.approx(0.25)


def test_ece_of_the_truth_is_zero() -> None:
    label = np.repeat(array(0, 1), 30)

    assert ece(label, label, ones(label)) == 0.0


def test_ece_of_fewer_rows_than_bins() -> None:
    assert ece(array(0.25, 0.5), array(0, 1), array(1, 3)) == pytest.approx((0.25 + 1.5) / 4)


def test_pcoc_interval_holds_pcoc_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(50), 10)
    predicted = rng.uniform(0.1, 0.5, 500)
    label = (rng.random(500) < predicted).astype(np.float64)

    low, high = pcoc_interval(predicted, label, np.ones(500), user=user)

    assert low < pcoc(predicted, label, np.ones(500)) < high
    assert (low, high) == pcoc_interval(predicted, label, np.ones(500), user=user)


def test_pcoc_interval_is_wider_for_few_users_with_rows_alike() -> None:
    """Rows of one user are not independent: ten users of fifty equal rows are ten, not 500."""
    label = np.repeat(np.tile([0.0, 1.0], 5), 50)
    predicted = np.full(500, 0.5)

    by_user = pcoc_interval(predicted, label, np.ones(500), user=np.repeat(np.arange(10), 50))
    by_row = pcoc_interval(predicted, label, np.ones(500), user=np.arange(500))

    assert by_user[1] - by_user[0] > 4 * (by_row[1] - by_row[0])


@pytest.mark.parametrize(
    ("names", "cumulative", "conditional"),
    [
        (("click", "conversion"), ("ctr", "ctcvr"), ("cvr_clicked",)),
        (
            ("click", "cart", "buy"),
            ("p_click", "p_cart", "p_buy"),
            ("cart_given_click", "buy_given_cart"),
        ),
    ],
)
def test_spaces_are_named_by_steps(
    names: tuple[str, ...], cumulative: tuple[str, ...], conditional: tuple[str, ...]
) -> None:
    assert space_names(schema(*names)) == (cumulative, conditional)


def test_a_step_before_the_served_ones_leaves_their_names() -> None:
    longer = schema("category", "click", "conversion")
    first = longer.steps[0].model_copy(update={"served": False})
    hidden = longer.model_copy(update={"steps": (first, *longer.steps[1:])})

    assert space_names(hidden) == (
        ("p_category", "ctr", "ctcvr"),
        ("click_given_category", "cvr_clicked"),
    )


def chain_labels(values: list[list[int]], known: list[list[bool]]) -> Labels:
    return Labels(
        values=np.array(values, np.int8),
        known=np.array(known),
        weight=np.ones(len(values), np.float32),
    )


def test_rows_whose_label_is_not_known_are_left_out_of_the_step() -> None:
    labels = chain_labels(
        [[1, 1], [1, 0], [0, 0], [1, 0]],
        [[True, True], [True, True], [True, True], [True, False]],
    )

    metrics = chain_metrics(
        np.full((4, 2), 0.5, np.float32), labels, schema=schema("click", "conversion")
    )

    assert (metrics["rows_ctr"], metrics["rows_ctcvr"], metrics["rows_cvr_clicked"]) == (4, 3, 2)
    assert metrics["pcoc_ctcvr"] == pytest.approx(0.75)  # 3 rows at 0.25, one conversion


def test_a_space_without_rows_says_so_and_no_more() -> None:
    labels = chain_labels([[0, 0], [0, 0]], [[True, True]] * 2)

    metrics = chain_metrics(
        np.full((2, 2), 0.5, np.float32), labels, schema=schema("click", "conversion")
    )

    assert metrics["rows_cvr_clicked"] == 0
    assert "auc_cvr_clicked" not in metrics
    assert math.isnan(metrics["auc_ctr"])  # type: ignore[arg-type]  # a number


def test_intervals_are_given_where_users_are() -> None:
    labels = chain_labels([[1, 1], [1, 0], [0, 0], [1, 1]], [[True, True]] * 4)
    conditional = np.full((4, 2), 0.5, np.float32)
    described = schema("click", "conversion")

    metrics = chain_metrics(conditional, labels, schema=described, user=np.arange(4))

    assert {name for name in metrics if name.startswith("pcoc_interval")} == {
        "pcoc_interval_ctr",
        "pcoc_interval_ctcvr",
    }
    assert "pcoc_interval_ctr" not in chain_metrics(conditional, labels, schema=described)


def test_three_steps_have_metrics_of_every_product() -> None:
    labels = chain_labels([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], [[True] * 3] * 4)
    conditional = np.array([[0.5, 0.5, 0.5]] * 4, np.float32)

    metrics = chain_metrics(conditional, labels, schema=schema("click", "cart", "buy"))

    assert metrics["pcoc_p_buy"] == pytest.approx(0.5)  # 4 rows at 1/8, one buys
    assert metrics["pcoc_buy_given_cart"] == pytest.approx(1.0)
    assert metrics["rows_buy_given_cart"] == 2


@pytest.mark.parametrize("seed", range(8))
def test_gauc_is_the_mean_of_each_users_auc(seed: int) -> None:
    """Ties and weights included; a user with one class only does not count."""
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, 5, 60) / 4.0
    label = (rng.random(60) < 0.3).astype(np.float64)
    weight = rng.choice([0.5, 1.0, 3.0], 60)
    user = rng.integers(0, 12, 60)
    total, impressions = 0.0, 0.0
    for one in range(12):
        own = user == one
        value = brute_auc(predicted[own], label[own], weight[own])
        if not math.isnan(value):
            total += value * weight[own].sum()
            impressions += weight[own].sum()

    assert gauc(predicted, label, weight, user=user) == pytest.approx(total / impressions)


def test_gauc_ignores_what_tells_users_apart() -> None:
    """Both users' order is perfect; across users it is upside down. User 3 has no positive."""
    predicted, label = array(0.2, 0.1, 0.9, 0.8, 0.5), array(1, 0, 1, 0, 0)
    user = np.array([1, 1, 2, 2, 3])

    assert gauc(predicted, label, ones(label), user=user) == 1.0


def test_gauc_weighs_users_by_impressions() -> None:
    """User 1: AUC 1 on 2 rows; user 2: AUC 0 on 6."""
    predicted = array(0.9, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    label, user = array(1, 0, 1, 0, 0, 0, 0, 0), np.array([1, 1, 2, 2, 2, 2, 2, 2])

    assert gauc(predicted, label, ones(label), user=user) == pytest.approx(0.25)


@pytest.mark.parametrize("count", [0, 3])
def test_gauc_without_a_user_of_both_classes_is_nan(count: int) -> None:
    label = np.zeros(count)

    assert math.isnan(gauc(label, label, ones(label), user=np.arange(count)))


def test_gauc_is_told_of_cumulative_steps_when_users_are_known() -> None:
    labels = Labels(
        values=np.array([[1, 0], [0, 0], [1, 1], [0, 0]], np.int8),
        known=np.ones((4, 2), np.bool_),
        weight=np.ones(4, np.float32),
    )
    conditional = np.array([[0.9, 0.5], [0.1, 0.5], [0.3, 0.5], [0.4, 0.5]], np.float32)
    described = schema("click", "conversion")

    metrics = chain_metrics(conditional, labels, schema=described, user=np.array([1, 1, 2, 2]))

    # User 1 is in order, user 2 is not; only user 2 converted.
    assert metrics["gauc_user_by_impressions_ctr"] == pytest.approx(0.5)
    assert metrics["gauc_user_by_impressions_ctcvr"] == pytest.approx(0.0)
    assert "gauc_user_by_impressions_cvr_clicked" not in metrics
