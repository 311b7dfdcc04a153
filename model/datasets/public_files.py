"""Configuration files beside the logs of public data sets: schema.toml and train.toml."""

from pathlib import Path
from typing import Any

import tomli_w

from model.datasets import aliexpress

SHIPPED = Path(__file__).parent
SLOTS = "max_length = 50\n"
SERVED_POSITION = "serving_value = 0\n"


def write_ali_ccp_files(out: Path, *, slots: int, position: int | None) -> None:
    """Writes them with the histories' length and the position that the model serves by."""
    schema = _shipped("ali_ccp_schema")
    schema = schema.replace(SLOTS, f"max_length = {slots}\n")
    if position is not None:
        schema = schema.replace(SERVED_POSITION, f"serving_value = {position}\n")
    _write(out, schema, _shipped("ali_ccp_train"))


def write_aliexpress_files(out: Path) -> None:
    _write(out, _toml(aliexpress.schema_content()), _toml(aliexpress.train_content()))


def write_criteo_attribution_files(out: Path) -> None:
    _write(out, _shipped("criteo_attribution_schema"), _shipped("criteo_attribution_train"))


def _shipped(name: str) -> str:
    return (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")


def _toml(content: dict[str, Any]) -> str:  # Any: TOML values
    return tomli_w.dumps(content)


def _write(out: Path, schema: str, train: str) -> None:
    (out / "schema.toml").write_text(schema, encoding="utf-8")
    (out / "train.toml").write_text(train, encoding="utf-8")
