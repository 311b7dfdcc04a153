"""The JSON of the scoring API: request bodies to `ScoreRequest`, results to answers.

Knows no HTTP and no schema: whether a feature exists is asked later.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from model.contract.errors import EncodeError
from model.contract.times import parse_time
from service.errors import InvalidRequest, PayloadTooLarge, TooManyCandidates
from service.features import Candidates, GivenColumn
from service.scorer import Explanation, ScoreRequest, ScoreResult
from service.settings import LimitSettings

ITEM_ID = "item_id"
MAX_REQUEST_ID_LENGTH = 128

_ENCODER = msgspec.json.Encoder()


# One object per candidate, or one list per name.
Layout = Literal["rows", "columns"]


# Any in feature values: the encoder checks each against its feature and names the field.
class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    user_id: int | str | float
    candidates: list[int | str | float | dict[str, Any]] | dict[str, list[Any]]
    time: str | None = None
    context: dict[str, Any] | None = None
    user_features: dict[str, Any] | None = None
    request_id: str | None = None
    timeout_ms: int | None = None
    layout: Layout | None = None


_DECODER = msgspec.json.Decoder(_Body)
_FIELDS = ", ".join(field.name for field in msgspec.structs.fields(_Body))


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedBody:
    """A request and what its body says about the exchange.

    Attributes:
        request: What to score.
        request_id: None if the body names none.
        timeout_ms: None if the body names none.
        layout: Of the answer.
    """

    request: ScoreRequest
    request_id: str | None
    timeout_ms: int | None
    layout: Layout = "rows"


def parse_body(data: bytes | bytearray, *, limits: LimitSettings) -> ParsedBody:
    """Reads the body of a scoring request.

    Raises:
        InvalidRequest: It is no JSON, or a field is missing, unknown or of the wrong type.
        TooManyCandidates: More than `limits.max_candidates`.
        PayloadTooLarge: Longer than `limits.body_limit_bytes`.
    """
    if len(data) > limits.body_limit_bytes:
        raise too_large(limits)
    body = _decode(data)
    if body.request_id is not None and not is_request_id(body.request_id):
        raise InvalidRequest(
            f"expected 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters",
            field="request_id",
        )
    return ParsedBody(
        request=ScoreRequest(
            user_id=body.user_id,
            candidates=_candidates(body.candidates, limits=limits),
            time=_time(body.time),
            context=body.context or {},
            user_features=body.user_features or {},
        ),
        request_id=body.request_id,
        timeout_ms=_checked_timeout_ms(body.timeout_ms, limits),
        layout=body.layout or "rows",
    )


def encode_answer(result: ScoreResult, *, request_id: str, layout: Layout = "rows") -> bytes:
    """The answer's JSON. Probabilities that are not finite are null."""
    is_all_ok = bool(result.is_known.all() and result.is_finite.all())
    statuses = ["ok"] * len(result.item_ids) if is_all_ok else _statuses(result)
    if layout == "columns":
        return _encode_columns(result, request_id, statuses)
    columns: list[list[Any]] = [values.tolist() for values in result.outputs.values()]
    if not is_all_ok:
        columns = [_with_nulls(column, result.is_finite) for column in columns]
    answer = _Answer(
        request_id=request_id,
        bundle=result.bundle_id,
        degraded=result.degraded,
        user_status=result.user_status,
        ignored_features=result.ignored_features,
        items=list(map(_item_type(tuple(result.outputs)), result.item_ids, *columns, statuses)),
    )
    return _ENCODER.encode(answer)


def encode_explanation(explanation: Explanation, *, request_id: str) -> bytes:
    """The answer's JSON in rows; contributions of each candidate from the largest to the least."""
    answer = msgspec.json.decode(encode_answer(explanation.result, request_id=request_id))
    for row, item in enumerate(answer["items"]):
        item["contributions"] = {
            name: _by_size(explanation.features, values[row].tolist())
            for name, values in explanation.contributions.items()
        }
    return _ENCODER.encode(answer)


def _by_size(names: Sequence[str], values: list[float]) -> dict[str, float | None]:
    pairs = sorted(zip(names, values, strict=True), key=lambda pair: -abs(pair[1]))
    return dict(pairs)


def _encode_columns(result: ScoreResult, request_id: str, statuses: list[str]) -> bytes:
    is_finite = result.is_finite
    head = {
        "request_id": request_id,
        "bundle": result.bundle_id,
        "degraded": result.degraded,
        "user_status": result.user_status,
        "ignored_features": result.ignored_features,
    }
    outputs: dict[str, Any] = dict(result.outputs)  # Any: arrays, or lists with nulls
    if not is_finite.all():
        outputs = {k: _with_nulls(v.tolist(), is_finite) for k, v in outputs.items()}
    columns = {ITEM_ID: result.item_ids, **outputs, "status": statuses}
    try:
        # Writes float32 arrays as they are: no Python number per candidate, and half the digits.
        return orjson.dumps({**head, "columns": columns}, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # an item id beyond 64 bits
        lists = {k: _with_nulls(v.tolist(), is_finite) for k, v in result.outputs.items()}
        return _ENCODER.encode({**head, "columns": {**columns, **lists}})


def _statuses(result: ScoreResult) -> list[str]:
    statuses = np.where(result.is_known, "ok", "unknown_item")
    found: list[str] = np.where(result.is_finite, statuses, "non_finite").tolist()
    return found


def _with_nulls(values: list[Any], is_finite: npt.NDArray[np.bool_]) -> list[Any]:
    # Any: numbers, and None where the candidate has an output that is none.
    for row in np.flatnonzero(~is_finite).tolist():
        values[row] = None
    return values


def encode_json(content: object) -> bytes:
    """JSON of plain data; NaN and infinity become null."""
    return _ENCODER.encode(content)


def is_request_id(text: str) -> bool:
    """Whether a text can be a request id: short, and harmless in a header and a log."""
    return 1 <= len(text) <= MAX_REQUEST_ID_LENGTH and text.isascii() and text.isprintable()


def too_large(limits: LimitSettings) -> PayloadTooLarge:
    """The error for a body over the limit."""
    return PayloadTooLarge(f"the body is longer than {limits.body_limit_bytes} bytes")


class _Answer(msgspec.Struct, kw_only=True, gc=False):
    request_id: str
    bundle: str
    degraded: tuple[str, ...]
    user_status: str
    ignored_features: tuple[str, ...]
    items: list[Any]  # Any: structs of `_item_type`


@functools.lru_cache(maxsize=8)
def _item_type(output_names: tuple[str, ...]) -> type[msgspec.Struct]:
    # A struct per item is built and written several times faster than a dict.
    names = (ITEM_ID, *output_names, "status")
    return msgspec.defstruct("ScoredItem", [(name, Any) for name in names], gc=False)


def _decode(data: bytes | bytearray) -> _Body:
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError as exc:
        message, field = _locate(str(exc))
        raise InvalidRequest(message, field=field) from exc
    except msgspec.DecodeError as exc:
        raise InvalidRequest(str(exc), field="body") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequest("JSON is malformed: text is not UTF-8", field="body") from exc
    except RecursionError as exc:
        raise InvalidRequest("JSON is nested too deeply", field="body") from exc


def _locate(text: str) -> tuple[str, str]:
    # msgspec says: Expected `int`, got `str` - at `$.candidates[0]`
    message, _, place = text.partition(" - at `")
    path = place.rstrip("`").removeprefix("$").lstrip(".")
    for start in ("Object contains unknown field `", "Object missing required field `"):
        if message.startswith(start):
            name = message.removeprefix(start).rstrip("`")[:100]
            kind = "unknown" if "unknown" in start else "missing"
            return f"{kind} field {name!r}, the fields are {_FIELDS}", name
    return message, path or "body"


def _time(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_time(text)
    except EncodeError as exc:
        raise InvalidRequest(exc.reason, field="time") from exc


def _checked_timeout_ms(timeout_ms: int | None, limits: LimitSettings) -> int | None:
    if timeout_ms is not None and not 1 <= timeout_ms <= limits.max_timeout_ms:
        raise InvalidRequest(
            f"got {timeout_ms}, expected 1 to {limits.max_timeout_ms}", field="timeout_ms"
        )
    return timeout_ms


def _candidates(
    given: list[int | str | float | dict[str, Any]] | dict[str, list[Any]],
    *,
    limits: LimitSettings,
) -> Candidates:
    if isinstance(given, dict):
        return _from_columns(given, limits)
    _check_number(len(given), limits)
    has_objects = isinstance(given[0], dict)
    kinds = set(map(type, given))
    if dict in kinds and len(kinds) > 1:
        row = next(i for i, entry in enumerate(given) if isinstance(entry, dict) != has_objects)
        expected = "an object" if has_objects else "an id"
        raise InvalidRequest(f"expected {expected}, like the first", field=f"candidates[{row}]")
    return _from_objects(given) if has_objects else Candidates(item_ids=given)  # type: ignore[arg-type]  # just checked


def _check_number(number: int, limits: LimitSettings) -> None:
    if number == 0:
        raise InvalidRequest("there is none, expected at least 1", field="candidates")
    if number > limits.max_candidates:
        raise TooManyCandidates(
            f"candidates: got {number}, expected at most {limits.max_candidates}"
        )


def _from_columns(columns: dict[str, list[Any]], limits: LimitSettings) -> Candidates:
    item_ids = columns.pop(ITEM_ID, None)
    if item_ids is None:
        raise InvalidRequest("missing column", field=f"candidates.{ITEM_ID}")
    _check_number(len(item_ids), limits)
    for name, values in columns.items():
        if len(values) != len(item_ids):
            raise InvalidRequest(
                f"got {len(values)} values for {len(item_ids)} candidates",
                field=f"candidates.{name}",
            )
    return Candidates(
        item_ids=item_ids,
        columns={name: GivenColumn(values=values) for name, values in columns.items()},
        is_columnar=True,
    )


def _from_objects(objects: Sequence[dict[str, Any]]) -> Candidates:
    values: dict[str, list[object]] = {}
    rows: dict[str, list[int]] = {}
    for row, entry in enumerate(objects):
        for name, value in entry.items():
            values.setdefault(name, []).append(value)
            rows.setdefault(name, []).append(row)
    item_ids: list[Any] = values.pop(ITEM_ID, [])
    if len(item_ids) != len(objects):
        given = set(rows.get(ITEM_ID, ()))
        row = next(row for row in range(len(objects)) if row not in given)
        raise InvalidRequest("missing field", field=f"candidates[{row}].{ITEM_ID}")
    return Candidates(
        item_ids=item_ids,
        columns={
            name: GivenColumn(
                values=column, rows=None if len(column) == len(objects) else rows[name]
            )
            for name, column in values.items()
        },
        has_objects=True,
    )
