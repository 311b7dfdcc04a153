from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from model.config import TrainConfig, load_config
from model.contract.errors import SpecError

CONTENT = {"data": {"impressions": "logs/impressions.parquet", "schema_file": "schema.toml"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(tomli_w.dumps(CONTENT))
    return path


def test_paths_are_relative_to_the_file(path: Path) -> None:
    data = load_config(path).data

    assert data.impressions == path.parent / "logs" / "impressions.parquet"
    assert data.schema_file == path.parent / "schema.toml"
    assert data.events is None


def test_absolute_paths_stay(path: Path) -> None:
    config = load_config(path, overrides=["data.events=/elsewhere/events.parquet"])

    assert config.data.events == Path("/elsewhere/events.parquet")


def test_everything_else_has_a_default(path: Path) -> None:
    config = load_config(path)

    assert config.net.architecture == "tafe"
    assert config.objective.name == "e2e"
    assert (config.split.train_share, config.split.test_share) == (0.7, 0.15)
    assert config.calibration.methods == ("identity", "temperature", "platt", "isotonic")


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optimizer.seed=7", "optimizer", "seed", 7),
        ("optimizer.learning_rate = 5e-4", "optimizer", "learning_rate", 5e-4),
        ("net.architecture=shared_bottom", "net", "architecture", "shared_bottom"),
        ('net.architecture="shared_bottom"', "net", "architecture", "shared_bottom"),
        ("net.options={ width = 8 }", "net", "options", {"width": 8}),
        ("net.options.width=8", "net", "options", {"width": 8}),
        ('calibration.methods=["platt"]', "calibration", "methods", ("platt",)),
        ("objective.step_weights=[1.0, 2.0]", "objective", "step_weights", (1.0, 2.0)),
        (
            "data.observed_until=2017-12-31T00:00:00Z",
            "data",
            "observed_until",
            datetime(2017, 12, 31, tzinfo=UTC),
        ),
    ],
)
def test_override_sets_one_value(
    path: Path, override: str, section: str, field: str, value: object
) -> None:
    config = load_config(path, overrides=[override])

    assert getattr(getattr(config, section), field) == value


def test_the_last_override_wins(path: Path) -> None:
    config = load_config(path, overrides=["optimizer.seed=1", "optimizer.seed=2"])

    assert config.optimizer.seed == 2


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.sede=1", r"optimizer\.sede: Extra inputs"),
        ("optimiser.seed=1", "optimiser: Extra inputs"),
        ("seed=1", "seed: Extra inputs"),
        ("optimizer.batch_rows=0", r"optimizer\.batch_rows: "),
        ("optimizer.learning_rate=nan", r"optimizer\.learning_rate: "),
        ("optimizer.drop_record_share=1.0", r"optimizer\.drop_record_share: "),
        ("split.train_share=1.5", r"split\.train_share: "),
        ('calibration.methods=["spline"]', r"calibration\.methods\.0: "),
        ("data.observed_until=2017-12-31T00:00:00", r"data\.observed_until: "),
        ("optimizer.seed", "override 'optimizer.seed' is not section.key=value"),
        ("data.impressions.deep=1", "'impressions' is no section"),
    ],
)
def test_a_wrong_override_is_named(path: Path, override: str, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        load_config(path, overrides=[override])


def test_every_fault_is_named_at_once(path: Path) -> None:
    overrides = ["optimizer.sede=1", "split.train_share=2"]

    with pytest.raises(SpecError, match=r"split\.train_share.*optimizer\.sede"):
        load_config(path, overrides=overrides)


def test_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")

    with pytest.raises(SpecError, match="data: Field required"):
        load_config(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no configuration at .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("data", [b"= 1", b"\xff"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)

    with pytest.raises(SpecError, match=r"bad\.toml is not TOML"):
        load_config(path)


def test_what_is_dumped_is_read_back_the_same(path: Path) -> None:
    config = load_config(
        path, overrides=["net.options.width=8", "data.observed_until=2017-12-31T00:00:00Z"]
    )
    dumped = path.parent / "elsewhere" / "config.toml"
    dumped.parent.mkdir()
    dumped.write_text(tomli_w.dumps(config.dump()))

    again: TrainConfig = load_config(dumped)

    assert again == config


def test_shares_that_leave_nothing_between_are_refused(path: Path) -> None:
    with pytest.raises(SpecError, match="train_share"):
        load_config(path, overrides=["split.train_share=0.9", "split.test_share=0.2"])


@pytest.mark.parametrize(
    ("objective", "optimizer", "expected"),
    [
        ({"name": "e2e"}, {}, False),
        ({"name": "ipw"}, {}, True),
        ({"name": "dr"}, {}, True),
        ({"name": "ipw", "e2e_weight": 1.0}, {}, False),
        ({"name": "ipw"}, {"keep": "best"}, False),
        ({"name": "e2e"}, {"keep": "last"}, True),
        ({"name": "e2e"}, {"with_validation": True}, True),
    ],
)
def test_last_weights_are_kept_where_the_validation_loss_says_nothing(
    objective: dict[str, Any], optimizer: dict[str, Any], expected: bool
) -> None:
    config = TrainConfig.model_validate(
        {
            "data": {"impressions": "x", "schema_file": "y"},
            "objective": objective,
            "optimizer": optimizer,
        }
    )

    assert config.keeps_last is expected
