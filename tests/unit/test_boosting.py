"""The chain of LightGBM models on encoded splits of the tiny schema, which has every kind."""

from pathlib import Path

import numpy as np
import pytest
import tiny

from model.comparison.boosting import (
    BoostedChain,
    BoostingOptions,
    ColumnPlan,
    fit_chain,
    step_rows,
)
from model.contract.encode import Encoder
from model.contract.errors import TrainError
from model.dataset import EncodedData, EncodedSplit
from model.golden import synthetic_requests

FAST = {"max_rounds": 25, "patience": 5}


def make_split(encoder: Encoder, *, requests: int, seed: int) -> EncodedSplit:
    """Clicks follow the discount, conversions of clicks the price."""
    rng = np.random.default_rng(seed)
    blocks = synthetic_requests(encoder, sizes=[4] * requests, last_time=tiny.NOON, rng=rng).encode(
        encoder
    )
    dense = encoder.candidate_layout.dense_columns
    logits = [2.0 * blocks.candidate.dense[:, dense.index(n)] for n in ("discount", "price")]
    click, bought = (rng.random(len(x)) < 1 / (1 + np.exp(-x)) for x in logits)
    values = np.stack([click, click & bought], axis=1).astype(np.int8)
    return tiny.encoded_split(blocks, label_values=values, user=rng.integers(20, size=len(values)))


@pytest.fixture(scope="module")
def data() -> EncodedData:
    fitted = tiny.fitted_schema()
    encoder = Encoder(fitted)
    sizes = {"train": 600, "validation": 200, "calibration": 100, "test": 200}
    splits = {
        name: make_split(encoder, requests=count, seed=k)
        for k, (name, count) in enumerate(sizes.items())
    }
    return EncodedData(fitted=fitted, splits=splits, report={})


@pytest.fixture(scope="module")
def chain(data: EncodedData) -> BoostedChain:
    options = BoostingOptions.model_validate(FAST)
    return fit_chain(data, options, seed=1, num_threads=1, progress=lambda text: None)


def test_columns_are_the_networks_columns(data: EncodedData) -> None:
    encoder, split = Encoder(data.fitted), data.splits["test"]
    plan = ColumnPlan.of(encoder, max_categories=300)
    matrix = plan.matrix(split)

    request, candidate = encoder.request_layout, encoder.candidate_layout
    assert plan.names == (
        *request.dense_columns,
        *candidate.dense_columns,
        *request.ids,
        *candidate.ids,
    )
    np.testing.assert_array_equal(
        matrix[:, plan.names.index("basket")],
        split.request_dense[split.request_of, request.dense_columns.index("basket")],
    )
    np.testing.assert_array_equal(
        matrix[:, plan.names.index("brand")],
        split.candidate_ids[:, candidate.ids.index("brand")],
    )


def test_ids_with_many_codes_and_histories_are_left_out(data: EncodedData) -> None:
    plan = ColumnPlan.of(Encoder(data.fitted), max_categories=60)

    assert plan.left_out == ("item_id", "recent")
    assert [plan.names[j] for j in plan.categorical] == [
        *("age_band", "loyalty", "store_id", "hour", "weekday", "brand", "display")
    ]


def test_columns_of_blocks_are_those_of_the_split(data: EncodedData) -> None:
    split = data.splits["test"]
    plan = ColumnPlan.of(Encoder(data.fitted), max_categories=60)
    rows = np.array([7, 3, 150])

    np.testing.assert_array_equal(
        plan.matrix_of_blocks(split.blocks(rows)), plan.matrix(split, rows)
    )


def test_later_steps_are_fitted_on_rows_with_the_step_before(
    data: EncodedData, chain: BoostedChain
) -> None:
    clicks = int(data.splits["train"].label_values[:, 0].sum())

    assert [fit["rows"] for fit in chain.fits] == [2400, clicks]
    rows, label, _ = step_rows(data.splits["train"], 1)
    assert data.splits["train"].label_values[rows, 0].min() == 1
    np.testing.assert_array_equal(label, data.splits["train"].label_values[rows, 1])


def test_each_step_learns_its_own_cause(data: EncodedData, chain: BoostedChain) -> None:
    names = chain.plan.names
    best = [names[int(np.argmax(b.feature_importance("gain")))] for b in chain.boosters]

    assert best == ["discount", "price"]


def test_logits_are_of_the_conditional_steps(data: EncodedData, chain: BoostedChain) -> None:
    test = data.splits["test"]
    logits = chain.logits(test, num_threads=1)
    clicked = test.label_values[:, 0] == 1
    predicted = 1 / (1 + np.exp(-logits.astype(np.float64)))

    assert logits.shape == (800, 2)
    assert logits.dtype == np.float32
    # Four standard errors of a rate near a half over 800 and about 400 rows.
    assert predicted[:, 0].mean() == pytest.approx(test.label_values[:, 0].mean(), abs=0.07)
    assert predicted[clicked, 1].mean() == pytest.approx(
        test.label_values[clicked, 1].mean(), abs=0.1
    )


def test_written_chain_scores_the_same(
    data: EncodedData, chain: BoostedChain, tmp_path: Path
) -> None:
    chain.write(tmp_path / "run")
    again = BoostedChain.read(tmp_path / "run")

    np.testing.assert_array_equal(
        again.logits(data.splits["test"], num_threads=1),
        chain.logits(data.splits["test"], num_threads=1),
    )
    assert again.num_parameters == chain.num_parameters > 0


def test_the_best_of_the_trials_is_kept(data: EncodedData) -> None:
    options = BoostingOptions.model_validate({**FAST, "trials": 2, "first": {"num_leaves": 2}})

    chain = fit_chain(data, options, seed=1, num_threads=1, progress=lambda text: None)

    for fit in chain.fits:
        losses = [entry["validation_loss"] for entry in fit["tried"]]
        assert len(losses) == 3
        assert losses[0] == min(losses)
    settings = [entry["setting"]["num_leaves"] for entry in chain.fits[0]["tried"]]
    assert 2 in settings
    assert chain.boosters[0].num_trees() == chain.fits[0]["tried"][0]["rounds"]


def test_split_without_a_step_is_named(data: EncodedData) -> None:
    train = data.splits["train"]
    values = train.label_values.copy()
    values[:, 1] = 0
    spoilt = {**data.splits, "train": EncodedSplit(**{**vars(train), "label_values": values})}
    none = EncodedData(fitted=data.fitted, splits=spoilt, report={})

    with pytest.raises(TrainError, match="0 have step 'conversion'"):
        fit_chain(
            none,
            BoostingOptions.model_validate(FAST),
            seed=1,
            num_threads=1,
            progress=lambda text: None,
        )
