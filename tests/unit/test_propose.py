from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from model.config import DataConfig, SplitConfig
from model.contract.errors import LogError
from model.contract.spec import Categorical, Hashed, Numeric, Schema, load_schema
from model.logs import read_log
from model.propose import Proposal, propose_schema

NUM_ROWS = 600
NUM_USERS = 40


def table() -> pl.DataFrame:
    """A log of 150 requests of 4 items with every sort of column."""
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(NUM_ROWS // 4), 4)
    user = (request * 7) % NUM_USERS
    item = rng.integers(0, 30, NUM_ROWS)
    click = (rng.random(NUM_ROWS) < 0.3).astype(int)
    conversion = click * (rng.random(NUM_ROWS) < 0.4)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    return pl.DataFrame(
        {
            "request_id": request,
            "user_id": user,
            "item_id": item,
            "timestamp": [start + timedelta(hours=int(r)) for r in request],
            "click": click,
            "conversion": conversion,
            "age_band": np.array(["18-24", "25-34", "65+"])[user % 3],  # the user's
            "brand": np.array(["acme", "bolt", "crux", "dune"])[item % 4],  # the item's
            "price": 2.5 + item * 1.5,
            "device": np.array(["phone", "desktop"])[request // 3 % 2],  # the request's
            "discount": rng.random(NUM_ROWS),  # the pair's
            "distance": np.round(rng.lognormal(0.0, 3.0, NUM_ROWS), 3),
            "position": np.tile([1, 2, 3, 4], NUM_ROWS // 4),
            "ad_slot": rng.integers(0, 3, NUM_ROWS),
        }
    )


def write(path: Path, frame: pl.DataFrame, *, suffix: str) -> Path:
    target = path / f"log.{suffix}"
    if suffix == "csv":
        frame.write_csv(target)
    else:
        frame.write_parquet(target)
    return target


def propose(path: Path, frame: pl.DataFrame, *, suffix: str = "parquet", **names: Any) -> Proposal:
    return propose_schema(write(path, frame, suffix=suffix), **names)


def schema_of(path: Path, proposal: Proposal) -> Schema:
    target = path / "schema.toml"
    target.write_text(proposal.toml)
    return load_schema(target)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_kinds_and_scopes_follow_what_a_column_depends_on(tmp_path: Path, suffix: str) -> None:
    schema = schema_of(tmp_path, propose(tmp_path, table(), suffix=suffix))

    found = {f.name: (f.kind, f.scope, f.source) for f in schema.features}
    assert found == {
        "hour": ("time_part", "context", "request"),
        "weekday": ("time_part", "context", "request"),
        "item_id": ("categorical", "item", "items"),
        "age_band": ("categorical", "user", "request"),
        "brand": ("categorical", "item", "request"),
        "price": ("numeric", "item", "request"),
        "device": ("categorical", "context", "request"),
        "discount": ("numeric", "cross", "request"),
        "distance": ("numeric", "cross", "request"),
        "position": ("categorical", "cross", "log_only"),
        "ad_slot": ("categorical", "cross", "log_only"),
    }


def test_log_columns_and_steps_are_found(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, propose(tmp_path, table()))

    log = schema.log
    assert (log.user_id, log.item_id, log.time) == ("user_id", "item_id", "timestamp")
    assert log.request_id == "request_id"
    assert log.split is None
    assert [(s.name, s.label, s.time) for s in schema.steps] == [
        ("click", "click", None),
        ("conversion", "conversion", None),
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_proposal_reads_the_log_it_was_made_from(tmp_path: Path, suffix: str) -> None:
    frame = table()
    schema = schema_of(tmp_path, propose(tmp_path, frame, suffix=suffix))

    log = read_log(
        DataConfig(impressions=tmp_path / f"log.{suffix}", schema_file=tmp_path / "schema.toml"),
        schema=schema,
        split=SplitConfig(),
    )

    assert (log.num_read, log.num_broken_chain) == (NUM_ROWS, 0)
    assert log.labels.values.sum(axis=0).tolist() == [
        frame["click"].sum(),
        frame["conversion"].sum(),
    ]


def test_position_is_known_in_the_log_only_and_served_as_the_first(tmp_path: Path) -> None:
    position = schema_of(tmp_path, propose(tmp_path, table())).feature("position")

    assert isinstance(position, Categorical)
    assert position.serving_value == 1


def test_fractional_rank_is_a_number_known_in_the_log_only(tmp_path: Path) -> None:
    frame = table().with_columns((pl.col("position") + 0.5).alias("rank"))

    rank = schema_of(tmp_path, propose(tmp_path, frame)).feature("rank")

    assert isinstance(rank, Numeric)
    assert (rank.source, rank.serving_value) == ("log_only", 1.5)


def test_decimals_are_numbers(tmp_path: Path) -> None:
    frame = table().with_columns(pl.col("discount").cast(pl.Decimal(10, 4)))

    assert isinstance(schema_of(tmp_path, propose(tmp_path, frame)).feature("discount"), Numeric)


def test_numbers_over_orders_of_magnitude_are_logged(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, propose(tmp_path, table()))

    logged = {f.name: f.log1p for f in schema.features if isinstance(f, Numeric)}
    assert logged == {"price": False, "discount": False, "distance": True}


def test_ids_by_the_hundred_thousands_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.propose.MAX_VOCABULARY", 20)

    assert isinstance(schema_of(tmp_path, propose(tmp_path, table())).feature("item_id"), Hashed)


def test_counts_are_numbers_and_codes_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = table().with_columns(
        pl.Series("num_views", rng.integers(0, 500, NUM_ROWS)),
        pl.Series("shop_code", rng.integers(0, 500, NUM_ROWS)),
        pl.Series("stars", rng.integers(1, 6, NUM_ROWS)),
    )

    schema = schema_of(tmp_path, propose(tmp_path, frame))

    kinds = {name: schema.feature(name).kind for name in ("num_views", "shop_code", "stars")}
    assert kinds == {"num_views": "numeric", "shop_code": "categorical", "stars": "categorical"}


AFTERWARDS: dict[str, tuple[Any, str]] = {
    "order_value": (
        np.random.default_rng(2).random(NUM_ROWS),
        "by its name it is known only after the impression",
    ),
    "total_revenue": (
        np.random.default_rng(2).random(NUM_ROWS),
        "by its name it is known only after the impression",
    ),
    "tells_all": (
        table()["click"].to_numpy() + np.random.default_rng(3).random(NUM_ROWS) * 0.5,
        "it alone tells 'click' nearly perfectly (AUC 1.0000): it must come after it",
    ),
    "tells_by_absence": (
        [1.0 * i if click else None for i, click in enumerate(table()["click"])],
        "it is filled only where 'click' is 1",
    ),
    "seen_at": (table()["timestamp"], "a time; declare it as kind 'elapsed'"),
    "tags": ([["a", "b"]] * NUM_ROWS, "a list; declare it as kind 'history'"),
    "is_member": ([True, False] * (NUM_ROWS // 2), "true or false; write it as 0 and 1"),
    "constant": ([7] * NUM_ROWS, "it has one value only"),
    "nothing": (pl.Series([None] * NUM_ROWS, dtype=pl.Int64), "it has one value only"),
    "odd-name": (table()["discount"], "its name is not of letters, digits and underscores"),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_a_column_that_is_left_out_is_named_with_the_reason(tmp_path: Path, name: str) -> None:
    values, reason = AFTERWARDS[name]
    frame = table().with_columns(pl.Series(name, values))

    proposal = propose(tmp_path, frame)

    assert set(proposal.refused) == {name}
    assert proposal.refused[name].startswith(reason)
    assert f"#   {name}: {reason}" in proposal.toml
    assert name not in {f.name for f in schema_of(tmp_path, proposal).features}


def test_a_column_that_tells_the_label_upside_down_is_left_out(tmp_path: Path) -> None:
    frame = table().with_columns((1.0 - pl.col("conversion")).alias("distance_left"))

    assert "tells 'conversion'" in propose(tmp_path, frame).refused["distance_left"]


def test_event_times_become_the_steps_times_with_a_window(tmp_path: Path) -> None:
    times = [
        time + timedelta(hours=1) if bought else None
        for time, bought in table().select("timestamp", "conversion").rows()
    ]
    frame = table().with_columns(pl.Series("conversion_time", times))

    proposal = propose(tmp_path, frame)

    step = schema_of(tmp_path, proposal).steps[1]
    assert (step.time, step.window_days) == ("conversion_time", 7)
    assert proposal.refused == {}


def test_names_that_are_given_are_taken(tmp_path: Path) -> None:
    frame = table().rename(
        {"user_id": "who", "item_id": "what", "timestamp": "when", "click": "a", "conversion": "b"}
    )

    proposal = propose(
        tmp_path, frame, user_id="who", item_id="what", time="when", labels=("a", "b")
    )

    schema = schema_of(tmp_path, proposal)
    assert (schema.log.user_id, schema.log.item_id, schema.log.time) == ("who", "what", "when")
    assert [step.label for step in schema.steps] == ["a", "b"]
    assert schema.feature("what").scope == "item"


def test_three_labels_make_three_steps(tmp_path: Path) -> None:
    frame = table().with_columns(pl.col("conversion").alias("refund") * (pl.col("item_id") > 9))

    schema = schema_of(tmp_path, propose(tmp_path, frame, labels=("click", "conversion", "refund")))

    assert [step.name for step in schema.steps] == ["click", "conversion", "refund"]


def test_a_split_column_is_taken(tmp_path: Path) -> None:
    frame = table().with_columns(split=pl.lit("train"))

    schema = schema_of(tmp_path, propose(tmp_path, frame))

    assert schema.log.split == "split"
    assert "split" not in {f.name for f in schema.features}


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        ("user_id", "which column is the user.*name it with --user"),
        ("item_id", "which column is the item.*name it with --item"),
        ("timestamp", "which column is the time.*name it with --time"),
        ("conversion", "found 1 label columns, need two or more; .*--label"),
    ],
)
def test_a_column_that_cannot_be_found_is_asked_for(tmp_path: Path, drop: str, named: str) -> None:
    with pytest.raises(LogError, match=named):
        propose(tmp_path, table().drop(drop))


@pytest.mark.parametrize(
    "names", [{"user_id": "nobody"}, {"time": "nobody"}, {"labels": ("click", "nobody")}]
)
def test_a_given_name_that_is_not_there_is_named(tmp_path: Path, names: dict[str, Any]) -> None:
    with pytest.raises(LogError, match="has no column 'nobody'"):
        propose(tmp_path, table(), **names)


def test_a_log_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="has no rows"):
        propose(tmp_path, table().clear())


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    frame = table().with_columns(pl.Series("click", ["yes", "no"] * (NUM_ROWS // 2)))

    with pytest.raises(LogError, match="label 'click' is text"):
        propose(tmp_path, frame)


def test_reading_the_log_twice_proposes_the_same(tmp_path: Path) -> None:
    assert propose(tmp_path, table()) == propose(tmp_path, table())


def test_without_requests_what_follows_nothing_is_context(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, propose(tmp_path, table().drop("request_id").unique("user_id")))

    assert schema.feature("device").scope == "context"


def test_keep_rate_is_found_and_is_no_feature(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, propose(tmp_path, table().with_columns(keep_rate=pl.lit(0.5))))

    assert schema.log.negative_keep_rate == "keep_rate"
    assert "keep_rate" not in {feature.name for feature in schema.features}


def test_position_in_words_is_served_as_the_commonest(tmp_path: Path) -> None:
    words = pl.when(pl.col("position") == 1).then(pl.lit("top")).otherwise(pl.lit("low"))
    schema = schema_of(tmp_path, propose(tmp_path, table().with_columns(position=words)))

    assert schema.feature("position").serving_value == "low"
