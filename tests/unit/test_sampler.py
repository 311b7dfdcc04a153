"""The sampler on the tiny bundle's encoder: what it looks at, and what it says."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import tiny

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.encode import Encoder
from model.contract.histograms import FeatureHistograms
from model.histograms import histograms
from service.histograms import Histogram
from service.sampler import Outputs, Sampler

BOUNDS = (0.1, 0.5)
ENCODER = Encoder(tiny.fitted_schema())
NUM_CANDIDATES = 10


def requests(seed: int, count: int, *, price: float = 20.0, old_share: float = 0.25) -> Blocks:
    """Requests of ten candidates, drawn from one distribution; `price` is the median price."""
    rng = np.random.default_rng(seed)
    time = tiny.NOON + rng.integers(0, 7 * tiny.DAY, count).astype(np.float64)
    ages = rng.choice(["25-34", "35-44", "65+"], count, p=[0.5, 0.5 - old_share, old_share])
    num_rows = count * NUM_CANDIDATES
    request_of = np.repeat(np.arange(count), NUM_CANDIDATES).astype(np.int64)
    brands = rng.choice(["acme", "bolt", "unheard", ""], num_rows, p=[0.4, 0.3, 0.2, 0.1])
    return Blocks(
        request=ENCODER.request_block(
            {
                "age_band": ages.tolist(),
                "trips": rng.integers(0, 50, count).tolist(),
                "recent": [["1"] * int(n) for n in rng.integers(0, 4, count)],
            },
            time=time,
        ),
        candidate=ENCODER.candidate_block(
            {
                "item_id": [str(i) for i in rng.integers(1, 40, num_rows)],
                "brand": brands.tolist(),
                "price": (price * rng.lognormal(0.0, 0.7, num_rows)).tolist(),
            },
            time=time[request_of],
        ),
        request_of=request_of,
    )


@pytest.fixture(scope="module")
def trained() -> FeatureHistograms:
    made = histograms(tiny.encoded_split(requests(1, 3000)), ENCODER)
    read = FeatureHistograms.parse(made.model_dump_json().encode())
    assert read is not None
    return read


def make(
    trained: FeatureHistograms | None, *, every: int = 1
) -> tuple[Sampler, Mapping[str, Histogram]]:
    found = {name: Histogram(BOUNDS) for name in ("pctr", "pctcvr", "pcvr")}
    sampler = Sampler(
        "b",
        ENCODER,
        trained,
        probabilities=found,
        bounds=BOUNDS,
        every=every,
        window_s=3600,
        clock=lambda: 0.0,
    )
    return sampler, found


def outputs(values: Sequence[float]) -> Outputs:
    return {name: np.array(values, np.float32) for name in ("pctr", "pctcvr", "pcvr")}


def one(blocks: Blocks, index: int) -> Blocks:
    """One of the requests."""
    rows = np.flatnonzero(blocks.request_of == index)
    request = blocks.request
    return Blocks(
        request=RequestBlock(
            ids=request.ids[index : index + 1],
            dense=request.dense[index : index + 1],
            history=request.history[index : index + 1],
        ),
        candidate=blocks.candidate.take(rows),
        request_of=np.zeros(len(rows), np.int64),
    )


def serve(sampler: Sampler, blocks: Blocks) -> dict[str, float]:
    for index in range(len(blocks.request)):
        if sampler.is_due():
            sampler.take(one(blocks, index), outputs([0.2] * NUM_CANDIDATES))
    sampler.count()
    assert sampler.drift is not None
    return sampler.drift.indices([sampler.drift.told()])


def test_values_of_the_training_distribution_do_not_drift(trained: FeatureHistograms) -> None:
    sampler, _ = make(trained)

    found = serve(sampler, requests(2, 1500))

    # Without drift the index is about (bins - 1) / values: at most 30 bins of 1500.
    assert {name: index for name, index in found.items() if index > 0.03} == {}
    assert {"age_band", "trips", "recent", "brand", "price", "item_id"} <= set(found)


def test_drift_is_told_of_all_features_but_time_and_what_only_a_log_knows(
    trained: FeatureHistograms,
) -> None:
    sampler, _ = make(trained)

    found = serve(sampler, requests(2, 600))

    names = {feature.name for feature in ENCODER.schema.features}
    assert set(found) == names - {"hour", "weekday", "position"}


def test_shifted_ids_have_the_index_of_a_hand_computation(trained: FeatureHistograms) -> None:
    sampler, _ = make(trained)

    found = serve(sampler, requests(3, 4000, old_share=0.45))

    # 50, 25, 25 % in training; 50, 5, 45 % as served. The draws are of 3000 and 4000.
    by_hand = (0.05 - 0.25) * math.log(0.05 / 0.25) + (0.45 - 0.25) * math.log(0.45 / 0.25)
    assert by_hand == pytest.approx(0.439, abs=1e-3)
    assert found["age_band"] == pytest.approx(by_hand, rel=0.15)
    assert found["trips"] < 0.03


def test_index_of_numbers_is_that_of_their_bins(trained: FeatureHistograms) -> None:
    sampler, _ = make(trained)
    blocks = requests(4, 1000, price=40.0)

    found = serve(sampler, blocks)

    histogram = trained.numbers["price"]
    column = ENCODER.candidate_layout.numerics.index("price")
    # With one candidate in eight looked at, the shares of all of them are met closely.
    shares = np.histogram(blocks.candidate.dense[:, column], [-np.inf, *histogram.edges, np.inf])[
        0
    ] / len(blocks)
    expected = np.array(histogram.counts) / sum(histogram.counts)
    by_hand = float(((shares - expected) * np.log(shares / expected)).sum())
    assert by_hand > 0.5
    assert found["price"] == pytest.approx(by_hand, rel=0.15)


def test_missing_and_unknown_values_are_counted_by_feature() -> None:
    sampler, _ = make(None)
    blocks = requests(5, 800)
    for index in range(800):
        sampler.take(one(blocks, index), outputs([0.2] * NUM_CANDIDATES))

    counts = sampler.counts()

    brand, age = counts["brand"], counts["age_band"]
    assert brand.values == pytest.approx(800 * NUM_CANDIDATES / 8, abs=2)
    assert brand.missing is not None
    assert brand.unknown is not None
    assert brand.missing / brand.values == pytest.approx(0.1, abs=0.03)
    assert brand.unknown / brand.values == pytest.approx(0.2, abs=0.04)
    assert (age.values, age.missing, age.unknown) == (800, 0, 0)
    assert counts["last_trip"].missing == counts["visits"].missing == 800
    assert counts["bought_item"].missing == brand.values
    assert counts["recent"].missing == int((blocks.request.history == 0).all(axis=1).sum())
    assert (counts["hour"].missing, counts["price"].unknown) == (None, None)
    assert counts["item_id"].unknown is None
    assert "position" not in counts


def test_without_histograms_there_is_no_drift() -> None:
    assert make(None)[0].drift is None


def test_probabilities_are_counted_and_what_is_not_finite_is_left_out() -> None:
    sampler, found = make(None)
    blocks = one(requests(6, 1), 0)
    for _ in range(8):  # one candidate in eight of 80: each place as often as another, or nearly
        sampler.take(blocks, outputs([0.05, 0.3, 0.7, math.nan, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]))
    sampler.count()

    low, middle, every, count, total = found["pctr"].values()
    assert every == count
    assert 7 <= count <= 10
    assert low <= 2
    assert middle - low >= 4
    assert total == pytest.approx(0.05 * low + 0.3 * (middle - low) + 0.7 * (every - middle))


@pytest.mark.parametrize("rhythm", [1, 2, 3, 7, 8, 16, 100, 256])
def test_every_phase_of_a_rhythm_is_looked_at_equally(rhythm: int) -> None:
    sampler, _ = make(None, every=16)
    num_requests = 16 * 400 * rhythm

    due = np.array([sampler.is_due() for _ in range(num_requests)])

    by_phase = due.reshape(-1, rhythm).sum(axis=0)
    assert due.sum() == pytest.approx(num_requests / 16, abs=2)
    assert by_phase.min() >= 390
    assert by_phase.max() <= 410


def test_every_place_of_a_candidate_is_looked_at_equally() -> None:
    sampler, _ = make(None)
    seen = np.zeros(16, np.int64)
    template = one(requests(7, 1), 0)
    price = ENCODER.candidate_layout.numerics.index("price")
    dense = np.repeat(template.candidate.dense[:1], 16, axis=0)
    dense[:, price] = np.arange(16)
    blocks = Blocks(
        request=template.request,
        candidate=CandidateBlock(ids=np.repeat(template.candidate.ids[:1], 16, 0), dense=dense),
        request_of=np.zeros(16, np.int64),
    )

    for _ in range(800):
        sampler.take(blocks, outputs([0.2] * 16))
        taken = sampler._candidate._dense[: sampler._candidate.num_rows, price]
        np.add.at(seen, taken.astype(int), 1)
        sampler.count()

    assert seen.sum() == 1600
    assert seen.min() >= 95
    assert seen.max() <= 105


def test_request_larger_than_the_buffer_is_looked_at_whole() -> None:
    sampler, _ = make(None)
    template = one(requests(8, 1), 0)
    rows = np.zeros(5000, np.int64)
    blocks = Blocks(
        request=template.request, candidate=template.candidate.take(rows), request_of=rows
    )
    sampler.take(blocks, outputs([0.2] * 5000))

    assert sampler.counts()["price"].values == 625
    assert sampler.counts()["trips"].values == 1
