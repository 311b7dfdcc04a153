from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.config import DataConfig, SplitConfig
from model.contract.errors import LogError
from model.contract.spec import Schema, parse_schema
from model.logs import ImpressionLog, read_log, read_table, unix_seconds

DAY = 86_400
NUM_ROWS = 60
START = 1_700_000_000


def schema(**changes: Any) -> Schema:
    return parse_schema(
        {
            "steps": [
                {"name": "click", "label": "click"},
                {"name": "conversion", "label": "bought"},
            ],
            "features": [
                {"name": "item_id", "kind": "categorical", "scope": "item", "source": "items"}
            ],
            **changes,
        }
    )


def table(**changes: Any) -> pl.DataFrame:
    """60 rows, one a day: each fourth clicked, each eighth bought; users 0 to 59."""
    n = np.arange(NUM_ROWS)
    columns = {
        "user_id": n,
        "item_id": n % 7,
        "time": START + n * DAY,
        "click": (n % 4 == 0).astype(int),
        "bought": (n % 8 == 0).astype(int),
    }
    return pl.DataFrame({**columns, **changes})


def read(
    path: Path,
    frame: pl.DataFrame,
    *,
    described: Schema | None = None,
    split: SplitConfig | None = None,
    observed_until: datetime | None = None,
) -> ImpressionLog:
    target = path / "impressions.parquet"
    frame.write_parquet(target)
    return read_log(
        DataConfig(
            impressions=target, schema_file=path / "schema.toml", observed_until=observed_until
        ),
        schema=schema() if described is None else described,
        split=SplitConfig() if split is None else split,
    )


def labels_with(**rows: list[int]) -> pl.DataFrame:
    """The table with ones added: click=[2] makes row 2 a click."""
    frame = table()
    for name, indices in rows.items():
        values = frame[name].to_numpy().copy()
        values[indices] = 1
        frame = frame.with_columns(pl.Series(name, values))
    return frame


def step(time: str | None = None, window_days: float | None = None) -> list[dict[str, Any]]:
    """Both steps, the second with an event time and a window."""
    second: dict[str, Any] = {"name": "conversion", "label": "bought"}
    if time is not None:
        second["time"] = time
    if window_days is not None:
        second["window_days"] = window_days
    return [{"name": "click", "label": "click"}, second]


def test_t16_rows_that_break_the_chain_are_counted_and_dropped(tmp_path: Path) -> None:
    log = read(tmp_path, labels_with(bought=[1, 2]))  # bought without a click

    assert (log.num_read, log.num_broken_chain, len(log.frame)) == (60, 2, 58)
    assert not {1, 2} & set(log.frame["user_id"].to_list())


def test_labels_are_those_of_the_log(tmp_path: Path) -> None:
    labels = read(tmp_path, table()).labels

    assert labels.values[:9].tolist() == [[1, 1], *[[0, 0]] * 3, [1, 0], *[[0, 0]] * 3, [1, 1]]
    assert labels.values.dtype == np.int8
    assert labels.known.all()
    assert labels.weight.tolist() == [1.0] * NUM_ROWS


def test_rows_are_sorted_by_time_and_ties_keep_their_order(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    frame = table(time=START + np.arange(NUM_ROWS) // 2 * DAY)[order]

    log = read(tmp_path, frame)

    assert log.time(schema()).tolist() == sorted(frame["time"].to_list())
    expected = frame.with_row_index("n").sort("time", "n")["user_id"].to_list()
    assert log.frame["user_id"].to_list() == expected
    assert log.labels.values[:, 0].tolist() == [int(user % 4 == 0) for user in expected]


def test_t16_more_broken_rows_than_one_in_twenty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="4 of 60 rows break the chain"):
        read(tmp_path, labels_with(bought=[1, 2, 3, 5]))


def test_t16_reversed_labels_are_recognised(tmp_path: Path) -> None:
    frame = table().rename({"click": "bought", "bought": "click"})

    with pytest.raises(LogError, match=r"'conversion' \(15 rows\) is commoner than 'click' \(8"):
        read(tmp_path, frame)


def test_a_step_that_never_happens_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no row has step 'conversion'"):
        read(tmp_path, table(bought=np.zeros(NUM_ROWS, int)))


def test_every_missing_column_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    frame = table().drop("click", "time")

    with pytest.raises(LogError, match="no column 'time', 'click'; it has 'user_id', 'item_id'"):
        read(tmp_path, frame)


@pytest.mark.parametrize("role", ["request_id", "weight", "negative_keep_rate", "split"])
def test_a_missing_column_that_the_schema_names_is_named(tmp_path: Path, role: str) -> None:
    with pytest.raises(LogError, match="no column 'extra'"):
        read(tmp_path, table(), described=schema(log={role: "extra"}))


def test_a_missing_event_time_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no column 'bought_at'"):
        read(tmp_path, table(), described=schema(steps=step("bought_at")))


@pytest.mark.parametrize(
    ("value", "shown"), [(2, "2"), (-1, "-1"), (None, "None"), (0.5, "0.5"), (float("nan"), "nan")]
)
def test_a_label_other_than_0_and_1_is_named_with_its_row(
    tmp_path: Path, value: float | None, shown: str
) -> None:
    clicks = [*table()["click"].to_list()[:-1], value]
    frame = table(click=pl.Series(clicks, strict=False))[::-1]  # the file runs backwards in time

    with pytest.raises(
        LogError, match=rf"'click' .* is {shown}(\.0)? in row 0, expected 0 or 1"
    ) as caught:
        read(tmp_path, frame)

    assert caught.value.row_number == 0


def test_labels_as_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="'click' of step 'click' is '1' in row 0"):
        read(tmp_path, table(click=table()["click"].cast(pl.String)))


@pytest.mark.parametrize("dtype", [pl.Boolean, pl.Float64, pl.UInt8])
def test_labels_of_other_types_are_read(tmp_path: Path, dtype: type[pl.DataType]) -> None:
    log = read(tmp_path, table(click=table()["click"].cast(dtype)))

    assert log.labels.values[:5, 0].tolist() == [1, 0, 0, 0, 1]


def test_time_as_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="column 'time' is text; expected time stamps"):
        read(tmp_path, table(time=["2023-11-15"] * NUM_ROWS))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_row_without_time_is_named(tmp_path: Path, value: float | None) -> None:
    times = pl.Series([float(t) for t in table()["time"]])
    times[3] = value

    with pytest.raises(LogError, match="row 3 has no 'time'") as caught:
        read(tmp_path, table(time=times))

    assert caught.value.row_number == 3


def test_time_stamps_and_unix_seconds_are_one(tmp_path: Path) -> None:
    zoned = [datetime.fromtimestamp(START, UTC) + timedelta(days=i) for i in range(NUM_ROWS)]
    frame = table(time=pl.Series(zoned).dt.convert_time_zone("America/New_York"))

    assert read(tmp_path, frame).time(schema()).tolist() == table()["time"].to_list()


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (pl.Series([datetime(1970, 1, 2)]), 86_400.0),  # noqa: DTZ001  # without a zone: UTC
        (pl.Series([datetime(1970, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC)]), 0.25),
        (pl.Series([datetime(1970, 1, 2).date()]), 86_400.0),  # noqa: DTZ001
        (pl.Series([7]), 7.0),
        (pl.Series([None], dtype=pl.Datetime("ms")), np.nan),
    ],
)
def test_unix_seconds_of_a_column(series: pl.Series, expected: float) -> None:
    np.testing.assert_array_equal(unix_seconds(series), [expected])


def test_a_log_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="has no rows"):
        read(tmp_path, table().clear())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"cannot read .*nowhere\.parquet"):
        read_table(tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x01" * 3 if name.endswith("t") else b"")

    with pytest.raises(LogError, match=f"cannot read .*{name}"):
        read_table(tmp_path / name)


def test_csv_and_a_directory_of_parquet_read_as_one_file(tmp_path: Path) -> None:
    frame = table(time=[datetime.fromtimestamp(START, UTC) + timedelta(i) for i in range(60)])
    parts = tmp_path / "parts"
    parts.mkdir()
    frame[:30].write_parquet(parts / "0.parquet")
    frame[30:].write_parquet(parts / "1.parquet")
    frame.write_csv(tmp_path / "log.csv")
    frame.write_parquet(tmp_path / "log.parquet")

    whole = read_table(tmp_path / "log.parquet")

    assert read_table(parts).equals(whole)
    csv = read_table(tmp_path / "log.csv")
    assert csv.drop("time").equals(whole.drop("time"))
    assert unix_seconds(csv["time"]).tolist() == unix_seconds(whole["time"]).tolist()


def test_integral_floating_point_ids_become_integers(tmp_path: Path) -> None:
    log = read(tmp_path, table(user_id=np.arange(60.0), item_id=np.arange(60.0)))

    assert log.frame["user_id"].to_list() == list(range(60))
    assert log.frame["item_id"].dtype == pl.Int64


def test_fractional_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="column 'item_id' holds fractions, not ids"):
        read(tmp_path, table(item_id=np.arange(60.0) + 0.5))


def test_rows_younger_than_the_window_are_masked_for_that_step(tmp_path: Path) -> None:
    log = read(tmp_path, table(), described=schema(steps=step(window_days=10)))

    # The log ends with its last row, on day 59: rows after day 49 are younger than 10 days.
    assert log.labels.known[:, 0].all()
    assert log.labels.known[:, 1].tolist() == [True] * 50 + [False] * 10


def test_masks_are_cumulative(tmp_path: Path) -> None:
    steps = [
        {"name": "click", "label": "click", "window_days": 10},
        {"name": "conversion", "label": "bought"},
    ]

    known = read(tmp_path, table(), described=schema(steps=steps)).labels.known

    assert known[:, 1].tolist() == known[:, 0].tolist() == [True] * 50 + [False] * 10


def test_observation_that_goes_on_after_the_log_unmasks(tmp_path: Path) -> None:
    until = datetime.fromtimestamp(START + 64 * DAY, UTC)

    log = read(
        tmp_path, table(), described=schema(steps=step(window_days=10)), observed_until=until
    )

    assert log.labels.known[:, 1].sum() == 55


def test_the_log_ends_with_its_last_event(tmp_path: Path) -> None:
    bought_at = [None] * NUM_ROWS
    bought_at[56] = START + 61 * DAY
    frame = table(bought_at=pl.Series(bought_at, dtype=pl.Int64))

    log = read(tmp_path, frame, described=schema(steps=step("bought_at", 10)))

    assert log.labels.known[:, 1].sum() == 52


def test_an_event_after_its_window_did_not_happen(tmp_path: Path) -> None:
    bought_at = np.full(NUM_ROWS, np.nan)
    bought_at[0] = START + 10 * DAY  # the window's last instant
    bought_at[8] = START + 18 * DAY + 1  # a second late
    frame = table(bought_at=bought_at)

    log = read(tmp_path, frame, described=schema(steps=step("bought_at", 10)))

    assert log.labels.values[[0, 8]].tolist() == [[1, 1], [1, 0]]


def test_an_event_without_time_counts_as_logged(tmp_path: Path) -> None:
    frame = table(bought_at=np.full(NUM_ROWS, np.nan))

    log = read(tmp_path, frame, described=schema(steps=step("bought_at", 10)))

    assert log.labels.values[:, 1].sum() == 8


def test_a_step_after_one_that_came_too_late_did_not_happen(tmp_path: Path) -> None:
    clicked_at = np.full(NUM_ROWS, np.nan)
    clicked_at[0] = START + 2 * DAY
    steps = [
        {"name": "click", "label": "click", "time": "clicked_at", "window_days": 1},
        {"name": "conversion", "label": "bought"},
    ]

    log = read(tmp_path, table(clicked_at=clicked_at), described=schema(steps=steps))

    assert log.labels.values[0].tolist() == [0, 0]


def test_weights_are_those_of_the_log(tmp_path: Path) -> None:
    frame = table(w=np.linspace(0.5, 2.0, NUM_ROWS))[::-1]

    log = read(tmp_path, frame, described=schema(log={"weight": "w"}))

    np.testing.assert_allclose(log.labels.weight, np.linspace(0.5, 2.0, NUM_ROWS), rtol=1e-6)


def test_kept_negatives_weigh_as_many_as_they_stand_for(tmp_path: Path) -> None:
    frame = table(kept=[0.1] * 30 + [0.5] * 30)

    log = read(tmp_path, frame, described=schema(log={"negative_keep_rate": "kept"}))

    # Rows 0 and 32 are clicks; 1 stands for 10 rows, 33 for 2.
    assert log.labels.weight[[0, 1, 32, 33]].tolist() == [1.0, 10.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("role", "value", "expected"),
    [
        ("weight", 0.0, "above 0"),
        ("weight", -1.0, "above 0"),
        ("weight", None, "above 0"),
        ("weight", float("inf"), "above 0"),
        ("negative_keep_rate", 0.0, r"in \(0, 1\]"),
        ("negative_keep_rate", 1.5, r"in \(0, 1\]"),
    ],
)
def test_a_weight_that_is_none_is_named_with_its_row(
    tmp_path: Path, role: str, value: float | None, expected: str
) -> None:
    weights = pl.Series([*[1.0] * 59, value])

    with pytest.raises(LogError, match=f"'w' is .* in row 59, expected a number {expected}"):
        read(tmp_path, table(w=weights), described=schema(log={role: "w"}))


def test_split_column_is_taken_as_it_is(tmp_path: Path) -> None:
    names = [["train", "validation", "calibration", "test"][i % 4] for i in range(NUM_ROWS)]

    log = read(tmp_path, table(part=names), described=schema(log={"split": "part"}))

    assert log.split.tolist() == names


@pytest.mark.parametrize("name", ["valid", "calibrations", "Test", None])
def test_a_split_of_another_name_is_named(tmp_path: Path, name: str | None) -> None:
    names = [["train", "validation", "calibration", "test"][i % 4] for i in range(59)]

    with pytest.raises(LogError, match=f"split '{name}' is none of train, validation"):
        read(tmp_path, table(part=[*names, name]), described=schema(log={"split": "part"}))


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    names = [["train", "validation", "test"][i % 3] for i in range(NUM_ROWS)]

    with pytest.raises(LogError, match="the calibration split is empty"):
        read(tmp_path, table(part=names), described=schema(log={"split": "part"}))


def test_one_instant_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="split is empty"):
        read(tmp_path, table(time=[START] * NUM_ROWS))


def test_shares_are_those_asked_for(tmp_path: Path) -> None:
    split = read(tmp_path, table(), split=SplitConfig(train_share=0.5, test_share=0.25)).split

    counts = {name: int((split == name).sum()) for name in ("train", "test")}
    assert counts == {"train": 30, "test": 16}  # the cut of 0.75 falls on row 44


def test_split_between_validation_and_calibration_is_by_user_and_fixed(tmp_path: Path) -> None:
    as_numbers = read(tmp_path, table()).split
    as_text = read(tmp_path, table(user_id=[str(i) for i in range(60)])).split

    assert as_numbers.tolist() == as_text.tolist()
    # XXH64 of 43, 44, 47 and 49 is even, of 41, 42, 45, 46 and 48 odd; test begins with row 50.
    assert np.flatnonzero(as_numbers == "validation").tolist() == [43, 44, 47, 49]
    assert np.flatnonzero(as_numbers == "calibration").tolist() == [41, 42, 45, 46, 48]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_time_split_never_cuts_inside_an_instant(tmp_path: Path, data: st.DataObject) -> None:
    num_instants = data.draw(st.integers(4, 30))
    times = data.draw(st.lists(st.integers(0, num_instants), min_size=NUM_ROWS, max_size=NUM_ROWS))
    users = data.draw(st.lists(st.integers(0, 12), min_size=NUM_ROWS, max_size=NUM_ROWS))
    train_share = data.draw(st.floats(0.2, 0.7))
    frame = table(time=times, user_id=users)

    try:
        log = read(tmp_path, frame, split=SplitConfig(train_share=train_share, test_share=0.15))
    except LogError as error:
        assert "split is empty" in str(error)  # noqa: PT017  # few instants cannot fill four
        return

    time = log.time(schema())
    parts = {name: log.split == name for name in ("train", "validation", "calibration", "test")}
    assert sum(part.sum() for part in parts.values()) == NUM_ROWS
    between = parts["validation"] | parts["calibration"]
    assert time[parts["train"]].max() < time[between].min()
    assert time[between].max() < time[parts["test"]].min()
    of = {name: set(log.frame["user_id"].to_numpy()[part]) for name, part in parts.items()}
    assert not of["validation"] & of["calibration"]
