import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w

from model.contract.errors import SpecError
from model.contract.spec import (
    Elapsed,
    Feature,
    FittedSchema,
    Match,
    Moments,
    Schema,
    load_schema,
    parse_schema,
    raw_columns,
)

STEPS = [{"name": "click", "label": "click"}, {"name": "conversion", "label": "conversion"}]
BRAND = {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"}


def content(*features: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"steps": STEPS, "features": [BRAND, *features], **changes}


def feature(kind: str, **fields: Any) -> dict[str, Any]:
    scopes = {"match": {}, "history": {}, "recent": {}, "time_part": {}}
    default = {"scope": "user", "source": "store"}
    return {"name": "x", "kind": kind, **scopes.get(kind, default), **fields}


def item_statistic(**fields: Any) -> dict[str, Any]:
    statistic = {"event": "sale", "aggregate": "count", **fields}
    return feature("numeric", scope="item", source="items", statistic=statistic)


def user_statistic(**fields: Any) -> dict[str, Any]:
    return feature("numeric", statistic={"event": "sale", "aggregate": "count", **fields})


# Every refusal of the schema, by what is wrong, and what its message must name.
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no features": ({"steps": STEPS, "features": []}, "features: .*at least 1"),
    "one step": (content(steps=STEPS[:1]), "steps: .*at least 2"),
    "no steps": ({"features": [BRAND]}, "steps: Field required"),
    "step twice": (content(steps=[STEPS[0], STEPS[0]]), "step 'click' is there twice"),
    "window of nothing": (
        content(steps=[STEPS[0], {**STEPS[1], "window_days": 0}]),
        r"steps\.1\.window_days: .*greater than 0",
    ),
    "unknown kind": (content(feature("tensor")), r"features\.1: .*tensor"),
    "unknown scope": (content(feature("categorical", scope="shop")), r"scope: .*'user'"),
    "unknown field": (content(feature("categorical", colour=1)), r"colour: Extra inputs"),
    "unknown section": (content(colour=1), "colour: Extra inputs"),
    "name of other letters": (
        content(feature("categorical", name="a-b")),
        r"name: 'a-b' is not a name",
    ),
    "feature twice": (content(BRAND), "feature 'brand' is there twice"),
    "raw column twice": (
        content(
            {"name": "x", "kind": "match", "attribute": "brand"},
            feature("numeric", name="x_count"),
        ),
        "feature 'x_count' is there twice",
    ),
    "time zone": (content(time_zone="Mars/Base"), "time_zone: 'Mars/Base' is not an IANA"),
    "time zone outside the data base": (content(time_zone="../etc/passwd"), "time_zone: "),
    "negative lag": (content(availability_lag_s=-1), "availability_lag_s: "),
    "period of nothing": (content(period_days=0), "period_days: "),
    "weight beside keep rate": (
        content(log={"weight": "w", "negative_keep_rate": "k"}),
        "log: give 'weight' or 'negative_keep_rate', not both",
    ),
    "a label as feature": (content(feature("numeric", name="click")), "'click' is known only"),
    "an event time as feature": (
        content(
            feature("elapsed", name="sold_at"),
            steps=[STEPS[0], {**STEPS[1], "time": "sold_at"}],
        ),
        "'sold_at' is known only",
    ),
    "a weight as feature": (
        content(feature("numeric", name="w"), log={"weight": "w"}),
        "'w' is known only",
    ),
    "a keep rate as feature": (
        content(feature("numeric", name="k"), log={"negative_keep_rate": "k"}),
        "'k' is known only",
    ),
    "the split as feature": (
        content(feature("categorical", name="fold"), log={"split": "fold"}),
        "'fold' is known only",
    ),
    "no candidate side": (
        {"steps": STEPS, "features": [feature("categorical")]},
        "no item or cross feature",
    ),
    "user feature from items": (
        content(feature("categorical", source="items")),
        "'x': a feature of scope user comes from store or request or log_only, not items",
    ),
    "context feature from the store": (
        content(feature("categorical", scope="context")),
        "'x': a feature of scope context comes from request or log_only, not store",
    ),
    "item feature from the store": (
        content(feature("categorical", scope="item")),
        "'x': a feature of scope item comes from items or request or log_only, not store",
    ),
    "cross feature from items": (
        content(feature("categorical", scope="cross", source="items")),
        "'x': a feature of scope cross comes from request or store or log_only, not items",
    ),
    "stored cross number": (
        content(feature("numeric", scope="cross")),
        "'x': only match features are cross and stored",
    ),
    "log_only without a serving value": (
        content(feature("categorical", scope="context", source="log_only")),
        "'x': a log_only feature needs a serving_value",
    ),
    "log_only time": (
        content(feature("elapsed", source="log_only")),
        "'x': a log_only feature needs a serving_value",
    ),
    "serving value of what is known online": (
        content(feature("numeric", serving_value=1.0)),
        "'x': serving_value is for log_only features",
    ),
    "min_count": (content(feature("categorical", min_count=0)), "min_count: "),
    "max_size": (content(feature("categorical", max_size=0)), "max_size: "),
    "one bucket": (content(feature("hashed", num_buckets=1)), "num_buckets: "),
    "no buckets": (content(feature("hashed")), "num_buckets: Field required"),
    "too many buckets": (content(feature("hashed", num_buckets=2**31 + 1)), "num_buckets: "),
    "log1p without a minimum": (
        content(feature("numeric", log1p=True)),
        "'x': log1p needs a minimum of 0 or more",
    ),
    "log1p of negatives": (
        content(feature("numeric", log1p=True, minimum=-1)),
        "'x': log1p needs a minimum of 0 or more",
    ),
    "minimum above maximum": (
        content(feature("numeric", minimum=2, maximum=2)),
        "'x': minimum is not below maximum",
    ),
    "infinite limit": (content(feature("numeric", maximum=float("inf"))), "maximum: .*finite"),
    "time part": (content(feature("time_part", part="minute")), "part: .*'hour'"),
    "time part of a user": (
        content(feature("time_part", part="hour", scope="user")),
        "scope: .*'context'",
    ),
    "elapsed of an item": (
        content(feature("elapsed", scope="item", source="items")),
        "scope: ",
    ),
    "history of nothing": (
        content(feature("history", of="town")),
        "'x': 'of' must name a categorical or hashed feature, not 'town'",
    ),
    "history of a number": (
        content(feature("history", of="n"), feature("numeric", name="n")),
        "'x': 'of' must name a categorical or hashed feature, not 'n'",
    ),
    "empty history": (content(feature("history", of="brand", max_length=0)), "max_length: "),
    "endless history": (content(feature("history", of="brand", max_length=1001)), "max_length: "),
    "recent events without a column": (content(feature("recent")), "column: Field required"),
    "recent events of a nameless place": (
        content(feature("recent", column="n", context="town")),
        "'x': 'context' must name a categorical or hashed context feature of the request, not 't",
    ),
    "recent events at a user feature": (
        content(feature("recent", column="n", context="town"), feature("categorical", name="town")),
        "'x': 'context' must name a categorical or hashed context feature",
    ),
    "recent events at a number": (
        content(
            feature("recent", column="n", context="size"),
            feature("numeric", name="size", scope="context", source="request"),
        ),
        "'x': 'context' must name a categorical or hashed context feature",
    ),
    "recent events where only the log knows": (
        content(
            feature("recent", column="n", context="shop"),
            feature(
                "hashed",
                name="shop",
                num_buckets=9,
                scope="context",
                source="log_only",
                serving_value=1,
            ),
        ),
        "'x': 'context' must name a categorical or hashed context feature of the request",
    ),
    "recent events from the request": (
        content(feature("recent", column="n", source="request")),
        "source: .*'store'",
    ),
    "a statistic's name": (
        content(feature("recent", column="n"), feature("numeric", name="x_last")),
        "feature 'x_last' is there twice",
    ),
    "windows twice": (
        content(feature("recent", column="n", windows_days=[7, 7])),
        "feature 'x_count_7' is there twice",
    ),
    "window of no days": (
        content(feature("recent", column="n", windows_days=[0])),
        "windows_days.0: .*greater than 0",
    ),
    "one recent event": (content(feature("recent", column="n", max_length=1)), "max_length: "),
    "endless recent events": (
        content(feature("recent", column="n", max_length=1001)),
        "max_length: ",
    ),
    "large below nothing": (content(feature("recent", column="n", large=-1)), "large: "),
    "match of nothing": (
        content(feature("match", attribute="colour")),
        "'x': 'attribute' must name a categorical or hashed item feature or the item id column",
    ),
    "match of a user feature": (
        content(feature("match", attribute="town"), feature("categorical", name="town")),
        "'x': 'attribute' must name a categorical or hashed item feature",
    ),
    "match of no age": (
        content(feature("match", attribute="brand", max_age_days=0)),
        "max_age_days: ",
    ),
    "mean without a column": (content(user_statistic(aggregate="mean")), "'column' is given"),
    "column without a mean": (content(user_statistic(column="price")), "'column' is given"),
    "unknown aggregate": (content(user_statistic(aggregate="median")), "aggregate: "),
    "item statistic without attribute": (
        content(item_statistic(whole_periods=4)),
        "'x': an item statistic needs 'attribute' and 'whole_periods'",
    ),
    "item statistic without periods": (
        content(item_statistic(attribute="brand")),
        "'x': an item statistic needs 'attribute' and 'whole_periods'",
    ),
    "users of nothing": (
        content(item_statistic(aggregate="users")),
        "aggregate 'users' is of an 'attribute', and of all periods before",
    ),
    "users of some periods": (
        content(item_statistic(aggregate="users", attribute="brand", whole_periods=4)),
        "aggregate 'users' is of an 'attribute', and of all periods before",
    ),
    "users of a column": (
        content(item_statistic(aggregate="users", attribute="brand", column="n")),
        "'column' is given exactly when",
    ),
    "users of a user": (
        content(user_statistic(aggregate="users", attribute="brand")),
        "'x': 'attribute' and 'whole_periods' are for item statistics",
    ),
    "item statistic of a time": (
        content(item_statistic(aggregate="last_time", attribute="brand", whole_periods=4)),
        "'x': an item statistic is a count, a mean or users",
    ),
    "item statistic of no attribute": (
        content(item_statistic(attribute="colour", whole_periods=4)),
        "'x': 'attribute' must name",
    ),
    "user statistic over periods": (
        content(user_statistic(whole_periods=4)),
        "'x': 'attribute' and 'whole_periods' are for item statistics",
    ),
    "user statistic of an attribute": (
        content(user_statistic(attribute="brand")),
        "'x': 'attribute' and 'whole_periods' are for item statistics",
    ),
    "not a table": ([1], "schema: "),  # type: ignore[dict-item]  # what a wrong file may hold
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_what_is_at_fault(case: str) -> None:
    wrong, named = REFUSALS[case]

    with pytest.raises(SpecError, match=named):
        parse_schema(wrong)


def test_every_fault_is_named_at_once() -> None:
    wrong = content(feature("categorical", min_count=0), time_zone="Mars/Base", period_days=0)

    with pytest.raises(SpecError, match=r"(?s)time_zone.*period_days.*min_count"):
        parse_schema(wrong)


def test_toml_round_trip_gives_an_equal_schema(tmp_path: Path) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(tomli_w.dumps(tiny.SCHEMA_CONTENT))

    assert load_schema(path) == tiny.schema()


def test_json_round_trip_gives_an_equal_schema() -> None:
    assert Schema.model_validate_json(tiny.schema().model_dump_json()) == tiny.schema()


def test_fitted_schema_comes_back_from_json() -> None:
    fitted = tiny.fitted_schema()

    text = fitted.model_dump_json(by_alias=True)

    assert FittedSchema.model_validate_json(text) == fitted
    assert set(json.loads(text)) == {"schema", "vocabularies", "moments"}


def test_a_schema_is_hashable_and_frozen() -> None:
    schema = tiny.schema()

    assert hash(schema) == hash(tiny.schema())
    with pytest.raises(ValueError, match="frozen"):
        schema.time_zone = "UTC"  # type: ignore[misc]  # what must not be possible


def test_digest_is_that_of_earlier_releases() -> None:
    # A bundle carries it: if it moves, no bundle written before can be read.
    assert parse_schema(content()).sha256 == (
        "7fd4662e5c7f71cf03c35d2be2f6b893a426a266bf0d17d22cb0223b7ad0b60c"
    )


def test_digest_is_of_the_content_not_of_how_it_was_written() -> None:
    spelt_out = content(time_zone="UTC", log={"user_id": "user_id"})

    assert parse_schema(spelt_out).sha256 == parse_schema(content()).sha256


def test_digest_moves_with_any_change() -> None:
    assert parse_schema(content(period_days=8)).sha256 != parse_schema(content()).sha256


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (("click", "conversion"), ("pctr", "pctcvr", "pcvr")),
        (("view", "buy"), ("p_view", "p_buy", "p_buy_given_view")),
        (("click", "cart", "buy"), ("p_click", "p_cart", "p_buy", "p_buy_given_cart")),
    ],
)
def test_output_names(names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    steps = [{"name": name, "label": f"is_{name}"} for name in names]

    assert parse_schema(content(steps=steps)).output_names == outputs


def test_steps_not_served_are_not_among_the_outputs() -> None:
    steps = [
        {"name": "category", "label": "is_category", "served": False},
        {"name": "click", "label": "is_click"},
        {"name": "conversion", "label": "is_conversion"},
    ]

    assert parse_schema(content(steps=steps)).output_names == ("pctr", "pctcvr", "pcvr")


@pytest.mark.parametrize(
    ("served", "message"),
    [
        ((True, False, True), "step 'b': served = false is for the first steps of a chain"),
        ((True, True, False), "step 'c': served = false is for the first steps of a chain"),
        ((False, False, True), "the last two steps of a chain are always served"),
        ((False, False, False), "the last two steps of a chain are always served"),
    ],
)
def test_only_the_first_steps_can_be_left_out(served: tuple[bool, ...], message: str) -> None:
    steps = [
        {"name": name, "label": f"is_{name}", "served": is_served}
        for name, is_served in zip("abc", served, strict=True)
    ]

    with pytest.raises(SpecError, match=message):
        parse_schema(content(steps=steps))


def test_served_steps_leave_the_digest_as_it_was() -> None:
    spelt_out = content(steps=[{**step, "served": True} for step in content()["steps"]])

    assert parse_schema(spelt_out).sha256 == parse_schema(content()).sha256


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (BRAND, ("brand",)),
        ({"name": "h", "kind": "time_part", "part": "hour"}, ()),
        ({"name": "h", "kind": "history", "of": "brand"}, ("h", "h_time")),
        ({"name": "m", "kind": "match", "attribute": "brand"}, ("m_count", "m_last_time")),
        ({"name": "r", "kind": "recent", "column": "n"}, ("r", "r_time")),
        ({"name": "e", "kind": "elapsed", "scope": "user", "source": "store"}, ("e",)),
    ],
)
def test_raw_columns_of_a_kind(described: dict[str, Any], expected: tuple[str, ...]) -> None:
    others = [] if described is BRAND else [described]
    schema = parse_schema(content(*others))

    assert raw_columns(schema.features[-1]) == expected


def test_recent_events_have_a_raw_column_of_their_context() -> None:
    shop = feature("categorical", name="shop", scope="context", source="request")
    schema = parse_schema(content(shop, feature("recent", column="n", context="shop")))

    assert raw_columns(schema.features[-1]) == ("x", "x_time", "x_shop")


def test_the_tiny_schema_has_every_kind_of_feature() -> None:
    assert {found.kind for found in tiny.schema().features} == tiny.feature_kinds()
    assert len(tiny.feature_kinds()) == 8


def test_users_need_no_periods() -> None:
    parse_schema(content(item_statistic(aggregate="users", attribute="brand")))


def test_feature_is_found_by_name() -> None:
    found: Feature = tiny.schema().feature("last_trip")

    assert isinstance(found, Elapsed)


def test_a_name_that_is_no_feature_is_an_error() -> None:
    with pytest.raises(SpecError, match="no feature 'colour'"):
        tiny.schema().feature("colour")


def test_match_may_name_the_item_id_column_that_is_no_feature() -> None:
    schema = parse_schema(content(feature("match", attribute="sku"), log={"item_id": "sku"}))

    assert isinstance(schema.feature("x"), Match)


def test_sides_follow_the_scope() -> None:
    sides = {f.name: f.is_request_side for f in tiny.schema().features}

    assert {name for name, is_request in sides.items() if not is_request} == {
        *("item_id", "brand", "price", "display", "discount", "position"),
        *("bought_item", "bought_brand"),
    }


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no schema at .*nowhere\.toml"):
        load_schema(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("data", [b"features = [", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "schema.toml"
    path.write_bytes(data)

    with pytest.raises(SpecError, match=r"schema\.toml is not TOML"):
        load_schema(path)


def test_a_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="std"):
        Moments(mean=0.0, std=0.0)
