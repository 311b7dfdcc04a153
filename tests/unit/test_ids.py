import numpy as np
import pytest
import xxhash

from model.contract.columns import map_ids
from model.contract.errors import EncodeError
from model.contract.ids import (
    HASH_NAME,
    HASH_SEED,
    NO_KEY,
    canonical_id,
    canonical_ids,
    hash_id,
    hash_ids,
)


@pytest.mark.parametrize(
    "value",
    [
        123,
        123.0,
        "123",
        b"123",
        np.int32(123),
        np.uint64(123),
        np.float32(123.0),
        np.float64(123.0),
        np.str_("123"),
    ],
)
def test_one_id_has_one_form_whatever_its_type(value: object) -> None:
    assert canonical_id(value) == "123"


@pytest.mark.parametrize("value", [None, "", b"", float("nan"), np.float32("nan")])
def test_missing_id_is_none(value: object) -> None:
    assert canonical_id(value) is None


@pytest.mark.parametrize("text", ["007", "123.0", " 123", "+1", "a b", "nan"])
def test_text_stays_as_it_is(text: str) -> None:
    assert canonical_id(text) == text


def test_negative_zero_and_zero_are_one_id() -> None:
    assert canonical_id(-0.0) == canonical_id(0) == "0"


def test_integers_beyond_float_precision_keep_every_digit() -> None:
    assert canonical_id(2**63 + 1) == "9223372036854775809"


def test_bytes_are_read_as_utf8() -> None:
    assert canonical_id("Bäckerei".encode()) == "Bäckerei"


def test_undecodable_bytes_hash_as_the_bytes_they_are() -> None:
    canonical = canonical_id(b"\xff\x00")

    assert hash_id(canonical) == 0x597248275B7BF621


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (True, "boolean"),
        (np.bool_(False), "boolean"),
        (1.5, "1.5"),
        (float("inf"), "inf"),
        ([1], "list"),
        ({"a": 1}, "dict"),
    ],
)
def test_what_is_no_id_is_refused_by_name(value: object, named: str) -> None:
    with pytest.raises(TypeError, match=f"expected an id .*{named}"):
        canonical_id(value)


def test_column_of_ids_keeps_its_order() -> None:
    assert canonical_ids([3, None, "b", 2.0]) == ["3", None, "b", "2"]


def test_hash_is_the_published_function() -> None:
    # Test vectors of the xxHash repository: empty input, seeds 0 and 2654435761.
    assert HASH_NAME == "xxh64"
    assert xxhash.xxh64_intdigest(b"", 0) == 0xEF46DB3751D8E999
    assert xxhash.xxh64_intdigest(b"", 2654435761) == 0xAC75FDA2929B17EF


# By a separate implementation written from the XXH64 specification, which gives the vectors above.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123", 0xC1DC9F98F1260F82),
        ("acme", 0x36AA6413121E41D7),
        ("Bäckerei", 0x9856B077E878ACDB),
        ("a-text-longer-than-thirty-two-bytes-0123456789", 0x4C4A594C178EFCFA),
    ],
)
def test_hash_is_seeded_xxh64_of_utf8(text: str, expected: int) -> None:
    assert HASH_SEED == 0x43545230
    assert hash_id(text) == expected


def test_missing_id_hashes_to_no_key() -> None:
    assert NO_KEY == 0
    assert hash_id(None) == 0


def test_an_id_never_hashes_to_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # No text is known whose hash is 0, so the function is replaced by one that gives it.
    monkeypatch.setattr(xxhash, "xxh64_intdigest", lambda data, seed: 0)

    assert hash_id("x") == 1


def test_hashes_of_a_column_are_uint64() -> None:
    hashes = hash_ids(["123", None, "acme"])

    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [0xC1DC9F98F1260F82, 0, 0x36AA6413121E41D7]


def test_hashes_of_no_ids() -> None:
    assert hash_ids([]).shape == (0,)


def test_text_that_no_bytes_can_hold_is_refused_with_its_row() -> None:
    with pytest.raises(EncodeError, match="feature 'brand'") as caught:
        map_ids("brand", ["ok", "\ud800"], lambda v: hash_id(canonical_id(v)), null=NO_KEY)

    assert caught.value.row == 1
