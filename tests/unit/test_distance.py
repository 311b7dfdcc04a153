import numpy as np
import pytest

from service.distance import Bounds, Distance, distance, reasons_against


def random(seed: int, num: int = 4000) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).beta(1, 9, num)


def ends(num: int, size: int = 40) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(size, num + 1, size)


def test_same_probabilities_are_at_distance_0() -> None:
    found = distance(random(1), random(1), ends=ends(4000))

    assert (found.mean_absolute, found.max_absolute, found.psi, found.ks) == (0, 0, 0, 0)
    assert found.rank_correlation == pytest.approx(1)
    assert found.top_overlap == 1


def test_shuffled_probabilities_are_spread_alike_and_ranked_otherwise() -> None:
    before = random(1)
    after = np.random.default_rng(2).permutation(before)

    found = distance(before, after, ends=ends(4000))

    assert found.psi == 0
    assert found.ks == 0
    assert found.rank_correlation is not None
    assert abs(found.rank_correlation) < 0.1
    assert found.top_overlap == pytest.approx(0.25, abs=0.08)
    assert [r.partition(" is")[0][:24] for r in reasons_against({"pctr": found}, Bounds())] == [
        "pctr: rank correlation -" if found.rank_correlation < 0 else "pctr: rank correlation 0"
    ]


def test_psi_by_hand() -> None:
    # Ten tenths of 0 to 99; the other half as many of the first five, the rest in the last.
    before = np.arange(100.0)
    after = np.concatenate([np.repeat(np.arange(0.0, 50.0, 2.0), 1), np.full(75, 99.0)])
    share_before = np.full(10, 0.1)
    share_after = np.array([0.05] * 5 + [0.005] * 4 + [0.75])
    expected = np.sum((share_before - share_after) * np.log(share_before / share_after))

    found = distance(before, after, ends=np.array([100]))

    assert found.psi == pytest.approx(expected)


def test_ks_by_hand() -> None:
    found = distance(
        np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0, 6.0]), ends=np.array([4])
    )

    assert found.ks == 0.5


def test_equal_values_share_a_rank() -> None:
    # Spearman of (1, 1, 2, 3) and (1, 2, 3, 3) by the ranks (1.5, 1.5, 3, 4) and (1, 2, 3.5, 3.5).
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5])[0, 1]

    found = distance(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 3, 3]), ends=np.array([4]))

    assert found.rank_correlation == pytest.approx(expected)


def test_requests_that_cannot_be_ranked_say_nothing() -> None:
    found = distance(np.array([1.0, 2.0, 2.0]), np.array([1.0, 1.0, 2.0]), ends=np.array([1, 3]))

    assert found.rank_correlation is None
    assert found.top_overlap is None
    assert reasons_against({"pctr": found}, Bounds(max_psi=9, max_mean_ratio=9)) == []


def test_means_too_far_apart_are_a_reason_either_way() -> None:
    values = random(1)
    for before, after in ((values, values * 1.5), (values * 1.5, values)):
        found = distance(before, after, ends=ends(4000))
        reasons = reasons_against({"pctcvr": found}, Bounds(max_psi=9))
        assert len(reasons) == 1
        assert "a ratio beyond 1.25" in reasons[0]


def test_what_is_not_finite_is_a_reason() -> None:
    before = random(1)
    found = distance(before, np.where(before > 0.5, np.nan, before), ends=ends(4000))

    assert reasons_against({"pctr": found}, Bounds()) == ["pctr: not finite"]


def test_bounds_are_kept_at_their_edge() -> None:
    edge = Distance(
        mean_before=1.0,
        mean_after=1.25,
        mean_absolute=0.1,
        max_absolute=0.1,
        psi=0.25,
        ks=1.0,
        rank_correlation=0.5,
        top_overlap=0.0,
    )
    assert reasons_against({"pctr": edge}, Bounds()) == []
