import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from model.comparison.bootstrap import SEED, drawn_metrics
from model.contract.spec import Schema, parse_schema
from model.logs import Labels
from model.metrics import log_loss, ne

Floats = npt.NDArray[np.float64]

NUM_ROWS, NUM_USERS, NUM_DRAWS = 300, 20, 25


@pytest.fixture
def schema() -> Schema:
    steps = [{"name": name, "label": name} for name in ("click", "conversion")]
    features = [{"name": "a", "kind": "categorical", "scope": "item", "source": "items"}]
    return parse_schema({"steps": steps, "features": features})


@pytest.fixture
def rows() -> tuple[npt.NDArray[np.float32], Labels, npt.NDArray[np.int64]]:
    """Coarse scores, so that many are equal; users numbered with gaps; unequal weights."""
    rng = np.random.default_rng(1)
    conditional = rng.integers(1, 9, (NUM_ROWS, 2)).astype(np.float32) / 10
    click = rng.random(NUM_ROWS) < conditional[:, 0]
    conversion = click & (rng.random(NUM_ROWS) < conditional[:, 1])
    known = np.ones((NUM_ROWS, 2), np.bool_)
    known[:40, 1] = False
    labels = Labels(
        values=np.stack([click, conversion], axis=1).astype(np.int8),
        known=known,
        weight=rng.choice([0.5, 1.0, 2.0], NUM_ROWS).astype(np.float32),
    )
    return conditional, labels, rng.integers(NUM_USERS, size=NUM_ROWS) * 7 + 3


def weights_of_draws(user: npt.NDArray[np.int64]) -> list[Floats]:
    """How often each row's user is drawn, written out."""
    rng = np.random.default_rng(SEED)
    users = sorted(set(user.tolist()))
    draws = []
    for _ in range(NUM_DRAWS):
        drawn = [users[k] for k in rng.integers(len(users), size=len(users))]
        draws.append(np.array([drawn.count(u) for u in user.tolist()], np.float64))
    return draws


def test_auc_under_draws_is_the_weighted_auc(schema: Schema, rows: tuple) -> None:
    conditional, labels, user = rows
    clicked = labels.known[:, 1] & (labels.values[:, 0] == 1)
    cases = {
        "auc_ctr": (conditional[:, 0], labels.values[:, 0], labels.known[:, 0]),
        "auc_cvr_clicked": (conditional[:, 1], labels.values[:, 1], clicked),
        "auc_ctcvr": (
            np.cumprod(conditional.astype(np.float64), axis=1)[:, 1],
            labels.values[:, 1],
            labels.known[:, 1],
        ),
    }

    drawn = drawn_metrics(conditional, labels, user=user, schema=schema, num_draws=NUM_DRAWS)

    for name, (score, label, taken) in cases.items():
        expected = [
            roc_auc_score(label[taken], score[taken], sample_weight=(labels.weight * count)[taken])
            for count in weights_of_draws(user)
        ]
        # Sums in another order.
        np.testing.assert_allclose(
            drawn.values[:, drawn.names.index(name)], expected, rtol=1e-9, err_msg=name
        )


@pytest.mark.parametrize(("name", "function"), [("log_loss_ctr", log_loss), ("ne_ctr", ne)])
def test_losses_under_draws_are_those_of_the_drawn_rows(
    schema: Schema, rows: tuple, name: str, function: object
) -> None:
    assert callable(function)
    conditional, labels, user = rows
    score, label = (a[:, 0].astype(np.float64) for a in (conditional, labels.values))

    drawn = drawn_metrics(conditional, labels, user=user, schema=schema, num_draws=NUM_DRAWS)

    expected = [function(score, label, labels.weight * count) for count in weights_of_draws(user)]
    np.testing.assert_allclose(drawn.values[:, drawn.names.index(name)], expected, rtol=1e-9)


def test_more_draws_begin_with_the_same_ones(schema: Schema, rows: tuple) -> None:
    """Pairs are by the number of the draw."""
    conditional, labels, user = rows
    few, many = (
        drawn_metrics(conditional, labels, user=user, schema=schema, num_draws=n) for n in (3, 9)
    )

    np.testing.assert_array_equal(few.values, many.values[:3])


def test_draws_without_a_class_are_nan(schema: Schema) -> None:
    labels = Labels(
        values=np.zeros((4, 2), np.int8),
        known=np.ones((4, 2), np.bool_),
        weight=np.ones(4, np.float32),
    )
    conditional = np.full((4, 2), 0.5, np.float32)

    drawn = drawn_metrics(conditional, labels, user=np.arange(4), schema=schema, num_draws=2)

    told = dict(zip(drawn.names, drawn.values.T.tolist(), strict=True))
    assert np.isnan([told["auc_ctr"], told["auc_cvr_clicked"], told["ne_ctr"]]).all()
    assert told["log_loss_ctr"] == pytest.approx([np.log(2)] * 2)
