import json
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest, PayloadTooLarge, TooManyCandidates
from service.scorer import ScoreResult
from service.settings import LimitSettings
from service.wire import ParsedBody, encode_answer, is_request_id, parse_body

LIMITS = LimitSettings(max_candidates=5, timeout_ms=100, max_timeout_ms=300)


def parse(**fields: Any) -> ParsedBody:
    body = {"user_id": 7, "candidates": [1], **fields}
    return parse_body(json.dumps(body).encode(), limits=LIMITS)


def refused(data: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(data, limits=LIMITS)
    return caught.value


def test_least_body() -> None:
    parsed = parse()

    assert parsed.request.user_id == 7
    assert parsed.request.candidates.item_ids == [1]
    assert parsed.request.candidates.columns == {}
    assert parsed.request.time is None
    assert parsed.request.context == {}
    assert parsed.request.user_features == {}
    assert parsed.request_id is None
    assert parsed.timeout_ms is None


def test_fullest_body() -> None:
    parsed = parse(
        user_id="u",
        time="1970-01-02T01:00:00+01:00",
        context={"a": 1},
        user_features={"b": [2]},
        request_id="r 1",
        timeout_ms=300,
    )

    assert parsed.request.user_id == "u"
    assert parsed.request.time == 86_400.0
    assert parsed.request.context == {"a": 1}
    assert parsed.request.user_features == {"b": [2]}
    assert parsed.request_id == "r 1"
    assert parsed.timeout_ms == 300


@pytest.mark.parametrize(
    "name", ["time", "context", "user_features", "request_id", "timeout_ms", "layout"]
)
def test_null_is_not_given(name: str) -> None:
    assert parse(**{name: None}) == parse()


def test_ids_stay_as_sent() -> None:
    ids = [1, "1", 1.0, "x", 10**30]

    assert parse(candidates=ids).request.candidates.item_ids == ids


def test_objects_of_one_shape_become_whole_columns() -> None:
    candidates = parse(candidates=[{"item_id": 1, "a": 2}, {"a": None, "item_id": "2"}])

    given = candidates.request.candidates
    assert given.item_ids == [1, "2"]
    assert given.columns["a"].values == [2, None]
    assert given.columns["a"].rows is None
    assert given.path("a", 1) == "candidates[1].a"


def test_objects_of_several_shapes_name_their_rows() -> None:
    candidates = parse(candidates=[{"item_id": 1}, {"item_id": 2, "a": 5}, {"item_id": 3, "b": 6}])

    columns = candidates.request.candidates.columns
    assert (columns["a"].values, columns["a"].rows) == ([5], [1])
    assert (columns["b"].values, columns["b"].rows) == ([6], [2])


def test_columns() -> None:
    given = parse(candidates={"a": [5, 6], "item_id": [1, 2]}).request.candidates

    assert given.item_ids == [1, 2]
    assert list(given.columns) == ["a"]
    assert given.path("a", 1) == "candidates.a[1]"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"user_id": None}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": [7]}, "user_id"),
        ({"candidates": None}, "candidates"),
        ({"candidates": 5}, "candidates"),
        ({"candidates": []}, "candidates"),
        ({"candidates": [1, None]}, "candidates[1]"),
        ({"candidates": [True]}, "candidates[0]"),
        ({"candidates": [[1]]}, "candidates[0]"),
        ({"candidates": [1, {"item_id": 2}]}, "candidates[1]"),
        ({"candidates": [{"item_id": 2}, 1]}, "candidates[1]"),
        ({"candidates": [{"item_id": 1}, {"a": 2}]}, "candidates[1].item_id"),
        ({"candidates": [{}]}, "candidates[0].item_id"),
        ({"candidates": {}}, "candidates.item_id"),
        ({"candidates": {"a": [1]}}, "candidates.item_id"),
        ({"candidates": {"item_id": []}}, "candidates"),
        ({"candidates": {"item_id": [1, 2], "a": [1]}}, "candidates.a"),
        ({"candidates": {"item_id": 5}}, "candidates[...]"),
        ({"time": "2023-11-15T12:00:00"}, "time"),
        ({"time": "yesterday"}, "time"),
        ({"time": 5}, "time"),
        ({"context": [1]}, "context"),
        ({"user_features": "x"}, "user_features"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "\u00e9"}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": 301}, "timeout_ms"),
        ({"timeout_ms": 1.5}, "timeout_ms"),
        ({"userid": 5}, "userid"),
    ],
)
def test_field_that_does_not_fit_is_named(fields: dict[str, Any], field: str) -> None:
    body = {"user_id": 7, "candidates": [1], **fields}

    assert refused(json.dumps(body).encode()).field == field


@pytest.mark.parametrize("name", ["user_id", "candidates"])
def test_missing_field_is_named(name: str) -> None:
    body: dict[str, Any] = {"user_id": 7, "candidates": [1]}
    del body[name]

    error = refused(json.dumps(body).encode())

    assert error.field == name
    assert str(error).startswith(f"missing field '{name}'")


def test_unknown_field_is_told_with_the_known_ones() -> None:
    error = refused(b'{"user_id":1,"candidates":[1],"items":[]}')

    assert "unknown field 'items'" in str(error)
    assert "user_features" in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"user",
        b"[]",
        b"null",
        b'{"user_id":1,"candidates":[1]} {}',
        b'{"user_id":NaN,"candidates":[1]}',
        b'{"user_id":1,"candidates":[1],"context":{"a":Infinity}}',
        b'{"user_id":1,"candidates":{"item_id":[1],"a":[-Infinity]}}',
        b'{"user_id":"\\ud800","candidates":[1]}',
        b'{"user_id":"\xff","candidates":[1]}',
        b'{"user_id":1,"candidates":[1],"\xff":1}',
        b'{"user_id":1,"candidates":{"item_id":' + b"[" * 100_000,
        b'\xef\xbb\xbf{"user_id":1,"candidates":[1]}',
    ],
)
def test_what_is_no_json_object_is_refused_as_body(data: bytes) -> None:
    assert refused(data).field == "body"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b'{"user_id":1e999,"candidates":[1]}', "user_id"),
        (b'{"user_id":1,"candidates":[-1e999]}', "candidates[0]"),
        (b'{"user_id":1,"candidates":[1],"context":{"a":1e999}}', "context[...]"),
    ],
)
def test_number_out_of_range_is_refused(data: bytes, field: str) -> None:
    assert refused(data).field == field


@pytest.mark.parametrize(
    "candidates",
    [[1] * 6, [{"item_id": 1}] * 6, {"item_id": [1] * 6}],
)
def test_too_many_candidates_are_refused_in_every_form(candidates: object) -> None:
    with pytest.raises(TooManyCandidates, match="got 6, expected at most 5"):
        parse(candidates=candidates)


def test_most_candidates_are_taken() -> None:
    assert len(parse(candidates=[1] * 5).request.candidates.item_ids) == 5


def test_too_long_a_body_is_refused() -> None:
    limits = LimitSettings(body_limit_bytes=1024)

    with pytest.raises(PayloadTooLarge):
        parse_body(b" " * 1025, limits=limits)


def result(outputs: dict[str, list[float]], **changes: Any) -> ScoreResult:
    num_rows = len(next(iter(outputs.values())))
    fields: dict[str, Any] = {
        "bundle_id": "b",
        "user_status": "ok",
        "degraded": (),
        "ignored_features": (),
        "item_ids": list(range(num_rows)),
        "outputs": {name: np.array(values, np.float32) for name, values in outputs.items()},
        "is_known": np.ones(num_rows, bool),
        "time": 0.0,
        "record": None,
        "is_finite": np.ones(num_rows, bool),
    }
    return ScoreResult(**{**fields, **changes})


def test_answer_has_one_item_per_candidate_in_order() -> None:
    answer = encode_answer(
        result({"pctr": [0.5, 0.25], "pcvr": [1, 0.5]}, item_ids=["x", 7]), request_id="r"
    )

    assert json.loads(answer) == {
        "request_id": "r",
        "bundle": "b",
        "degraded": [],
        "user_status": "ok",
        "ignored_features": [],
        "items": [
            {"item_id": "x", "pctr": 0.5, "pcvr": 1.0, "status": "ok"},
            {"item_id": 7, "pctr": 0.25, "pcvr": 0.5, "status": "ok"},
        ],
    }


def test_answer_uses_the_graph_s_output_names() -> None:
    answer = json.loads(encode_answer(result({"p_view": [0.5], "p_buy": [0.5]}), request_id="r"))

    assert list(answer["items"][0]) == ["item_id", "p_view", "p_buy", "status"]


def test_answer_is_json_whatever_the_model_gave() -> None:
    scored = result(
        {"pctr": [0.5, float("nan"), 0.5], "pcvr": [0.5, 0.5, float("inf")]},
        is_finite=np.array([True, False, False]),
        is_known=np.array([False, False, True]),
    )

    items = json.loads(encode_answer(scored, request_id="r"))["items"]

    assert [item["status"] for item in items] == ["unknown_item", "non_finite", "non_finite"]
    assert [item["pctr"] for item in items] == [0.5, None, None]
    assert [item["pcvr"] for item in items] == [0.5, None, None]


def columns_of(scored: ScoreResult) -> dict[str, Any]:
    answer = json.loads(encode_answer(scored, request_id="r", layout="columns"))
    columns: dict[str, Any] = answer.pop("columns")
    assert answer == {
        "request_id": "r",
        "bundle": "b",
        "degraded": [],
        "user_status": "ok",
        "ignored_features": [],
    }
    return columns


def test_columns_have_one_entry_per_candidate_in_order() -> None:
    scored = result({"pctr": [0.5, 0.25], "pcvr": [1, 0.5]}, item_ids=["x", 7])

    assert columns_of(scored) == {
        "item_id": ["x", 7],
        "pctr": [0.5, 0.25],
        "pcvr": [1.0, 0.5],
        "status": ["ok", "ok"],
    }


def test_columns_are_null_where_the_model_gave_no_number() -> None:
    scored = result(
        {"pctr": [0.5, float("nan"), 0.5], "pcvr": [0.5, 0.5, float("inf")]},
        is_finite=np.array([True, False, False]),
        is_known=np.array([False, False, True]),
    )

    columns = columns_of(scored)

    assert columns["status"] == ["unknown_item", "non_finite", "non_finite"]
    assert columns["pctr"] == columns["pcvr"] == [0.5, None, None]


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_both_layouts_give_the_same_float32(layout: Any) -> None:
    values = np.random.default_rng(1).random(1000).astype(np.float32) ** 4
    scored = result({"pctr": values.tolist()})

    answer = json.loads(encode_answer(scored, request_id="r", layout=layout))

    given = (
        answer["columns"]["pctr"] if layout == "columns" else [i["pctr"] for i in answer["items"]]
    )
    assert np.array(given, np.float32).tobytes() == values.tobytes()


def test_item_id_beyond_64_bits_is_answered_as_sent() -> None:
    assert columns_of(result({"pctr": [0.5, 0.25]}, item_ids=[2**70, "x"])) == {
        "item_id": [2**70, "x"],
        "pctr": [0.5, 0.25],
        "status": ["ok", "ok"],
    }


def test_layout_is_rows_unless_asked_for_columns() -> None:
    assert parse().layout == "rows"
    assert parse(layout="columns").layout == "columns"


def test_unknown_layout_is_refused_by_name() -> None:
    assert refused(b'{"user_id": 1, "candidates": [1], "layout": "rowz"}').field == "layout"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("a", True), ("a b", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("\r", False)],
)
def test_request_ids(text: str, is_one: bool) -> None:
    assert is_request_id(text) == is_one
