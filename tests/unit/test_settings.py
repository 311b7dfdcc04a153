import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import (
    BatchSettings,
    HealthSettings,
    LimitSettings,
    Settings,
    SettingsError,
    StoreSettings,
    environment_of,
    load_settings,
    setting_rows,
)

SECRET = "hunter2"


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.log_level) == ("127.0.0.1", 8000, "info")
    assert settings.bundle is None
    assert settings.item_snapshot is None
    assert settings.store.url is None
    assert settings.store.timeout_ms == 20
    assert settings.store.max_record_age_s == 604_800
    assert settings.batch.max_batch_rows is None
    assert settings.limits.body_limit_bytes == 1_048_576
    assert (settings.drain_delay_ms, settings.drain_timeout_ms) == (500, 5000)


def test_environment_sets_top_level_and_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_PORT", "9000")
    monkeypatch.setenv("CTR_BUNDLE", "/srv/bundle")
    monkeypatch.setenv("CTR_LOG_LEVEL", "WARNING")
    monkeypatch.setenv("CTR_STORE__TIMEOUT_MS", "7")
    settings = load_settings()
    assert settings.port == 9000
    assert settings.bundle == Path("/srv/bundle")
    assert settings.log_level == "warning"
    assert settings.store.timeout_ms == 7
    assert settings.store.connect_timeout_ms == 50


def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_STORE__URL", "")
    monkeypatch.setenv("CTR_PORT", "")
    settings = load_settings()
    assert settings.store.url is None
    assert settings.port == 8000


def test_overrides_win_over_the_environment_field_by_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CTR_PORT", "9000")
    monkeypatch.setenv("CTR_STORE__TIMEOUT_MS", "7")
    monkeypatch.setenv("CTR_STORE__MAX_CONNECTIONS", "3")
    settings = load_settings(port=1234, store={"timeout_ms": 8}, host=None)
    assert settings.port == 1234
    assert settings.host == "127.0.0.1"
    assert (settings.store.timeout_ms, settings.store.max_connections) == (8, 3)


def test_settings_are_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]  # that it is refused is the point
    with pytest.raises(ValidationError):
        settings.store.timeout_ms = 1  # type: ignore[misc]  # likewise


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("CTR_PROT", "CTR_PORT"),
        ("ctr_hosts", "CTR_HOST"),
        ("CTR_STORE__TIMOUT_MS", "CTR_STORE__TIMEOUT_MS"),
        ("CTR_STORE_TIMEOUT_MS", "CTR_STORE__TIMEOUT_MS"),
        ("CTR_BACH__NUM_RUNNERS", "CTR_BATCH__NUM_RUNNERS"),
        ("CTR_LIMITS__MAX_CANDIDATE", "CTR_LIMITS__MAX_CANDIDATES"),
    ],
)
def test_misspelt_variable_is_refused_and_the_nearest_named(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == f"{name}: no such setting, the nearest is {nearest}"


def test_section_as_a_whole_is_refused_with_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_BATCH", "{}")
    with pytest.raises(SettingsError, match=r"CTR_BATCH: a section.*CTR_BATCH__MAX_BATCH_ROWS"):
        load_settings()


def test_every_problem_is_named_with_value_and_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_PORT", "eighty")
    monkeypatch.setenv("CTR_LIMITS__TIMEOUT_MS", "0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["CTR_PORT", "CTR_LIMITS__TIMEOUT_MS"]
    assert "'eighty'" in lines[0]
    assert "greater than or equal to 1" in lines[1]


@pytest.mark.parametrize(
    "overrides",
    [
        {"prot": 1},
        {"store": {"ulr": "x"}},
        {"store": 3},
        {"port": 65_536},
        {"log_level": "loud"},
        {"batch": {"num_runners": 0}},
        {"limits": {"timeout_ms": 3000}},
        {"limits": {"max_candidates": 500}, "batch": {"max_queue_rows": 499}},
    ],
)
def test_bad_override_is_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="CTR_"):
        load_settings(**overrides)


@pytest.mark.parametrize("url", [f"redis://:{SECRET}@h:6379/0", f"unix://:{SECRET}@/s"])
def test_secret_of_the_url_is_never_shown(url: str) -> None:
    settings = load_settings(store={"url": url})
    assert settings.store.url is not None
    assert settings.store.url.get_secret_value() == url
    for text in (repr(settings), str(settings), settings.model_dump_json()):
        assert SECRET not in text


@pytest.mark.parametrize(
    "store",
    [
        {"url": f"redis://:{SECRET}@h/" + "x" * 3000},
        {"url": [f"redis://:{SECRET}@h"]},
        {"ulr": f"redis://:{SECRET}@h"},
        {"url": f"redis://:{SECRET}@h", "timeout_ms": 0},
        f"redis://:{SECRET}@h",
    ],
)
def test_secret_is_in_no_error_and_no_traceback(store: object) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(store=store)
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_misspelt_variable_with_a_secret_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_STORE__ULR", f"redis://:{SECRET}@h")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert SECRET not in str(caught.value)


def test_rows_list_every_setting_once_with_a_description() -> None:
    rows = setting_rows()
    variables = [row.variable for row in rows]
    sections = (StoreSettings, BatchSettings, LimitSettings, HealthSettings)
    num_fields = sum(len(section.model_fields) for section in (Settings, *sections))
    assert len(set(variables)) == len(variables) == num_fields - len(sections)
    assert num_fields > 20
    assert variables[0] == "CTR_HOST"
    assert all(row.description and not row.description.endswith(".") for row in rows)
    by_name = {row.variable: row.default for row in rows}
    assert by_name["CTR_BUNDLE"] == "not set"
    assert by_name["CTR_LIMITS__BODY_LIMIT_BYTES"] == "1048576"


def test_every_row_is_a_variable_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in setting_rows():
        if row.default != "not set":
            monkeypatch.setenv(row.variable, row.default)
    assert load_settings() == Settings()


def test_every_number_has_two_bounds() -> None:
    num_checked = 0
    for section in (Settings, StoreSettings, BatchSettings, LimitSettings):
        for name, info in section.model_fields.items():
            if info.annotation in (int, int | None):
                assert {type(bound).__name__ for bound in info.metadata} == {"Ge", "Le"}, name
                num_checked += 1
    assert num_checked == 19


def test_child_with_the_environment_of_settings_has_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CTR_PORT", "7")
    monkeypatch.setenv("CTR_LOG_LEVEL", "error")
    settings = load_settings(
        port=8123,
        bundle="some/bundle",
        reload_poll_s=0.25,
        store={"url": "redis://:secret@h:1/0", "timeout_ms": 7},
    )

    environment = environment_of(settings)
    for name in ("CTR_PORT", "CTR_LOG_LEVEL"):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert environment["CTR_PORT"] == "8123"
    assert environment["CTR_STORE__URL"] == "redis://:secret@h:1/0"
    assert "CTR_ITEM_SNAPSHOT" not in environment
    assert load_settings() == settings
