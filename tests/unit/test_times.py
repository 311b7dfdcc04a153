import pytest

from model.contract.errors import EncodeError
from model.contract.times import format_time, parse_time


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01T00:00:00z", 0.0),
        ("1970-01-01t00:00:00Z", 0.0),
        ("1970-01-01 00:00:00+00:00", 0.0),
        ("2023-11-15T12:00:00Z", 1_700_049_600.0),
        ("2023-11-15T13:00:00+01:00", 1_700_049_600.0),
        ("2023-11-15T07:00:00-05:00", 1_700_049_600.0),
        ("2023-11-15T12:00:00.250Z", 1_700_049_600.25),
        ("1969-12-31T23:59:59Z", -1.0),
    ],
)
def test_rfc3339_is_read(text: str, expected: float) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2023-11-15",
        "2023-11-15T12:00:00",
        "2023-11-15T12:00Z",
        "20231115T120000Z",
        "2023-W46-3T12:00:00Z",
        "2023-13-01T00:00:00Z",
        "2023-02-29T00:00:00Z",
        "2023-11-15T25:00:00Z",
        "2023-11-15T12:00:00+0100",
        "2023-11-15T12:00:00+99:00",
        "1700049600",
        "now",
        "\uff12\uff10\uff12\uff13-11-15T12:00:00Z",  # digits, but not ASCII ones
    ],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(EncodeError, match="feature 'at': expected an RFC 3339 time") as caught:
        parse_time(text, field="at")

    assert caught.value.feature == "at"


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(EncodeError) as caught:
        parse_time("9" * 10_000)

    assert len(str(caught.value)) < 200


def test_the_first_instant_of_the_calendar_is_no_other_error() -> None:
    assert parse_time("0001-01-01T00:00:00Z") == -62_135_596_800.0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "1970-01-01T00:00:00Z"),
        (1_700_049_600.0, "2023-11-15T12:00:00Z"),
        (1_700_049_600.25, "2023-11-15T12:00:00.250000Z"),
        (-1.0, "1969-12-31T23:59:59Z"),
    ],
)
def test_times_are_written_in_utc(seconds: float, expected: str) -> None:
    assert format_time(seconds) == expected


def test_what_is_written_is_read_back() -> None:
    assert parse_time(format_time(1_483_228_800.123456)) == 1_483_228_800.123456
