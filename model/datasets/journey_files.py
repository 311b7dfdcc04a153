"""Configuration files beside the log of the Complete Journey: schemas, runs and comparisons."""

import shutil
from pathlib import Path

SHIPPED = Path(__file__).parent
COPIED = ("schema", "train", "tafe", "tafe_three_steps", "compare", "ablations")
FIRST_STEP = """\
[[steps]]
name = "category"
label = "category"
"""
NOT_SERVED = "served = false\n"


def with_first_step(shipped: str, *, is_served: bool) -> str:
    """The shipped schema's text with the step "category" before its first one."""
    before, first, after = shipped.partition("[[steps]]\n")
    return before + FIRST_STEP + ("" if is_served else NOT_SERVED) + first + after


def write_files(out: Path) -> None:
    """Writes the files named in `COPIED`, and the schema's variants, into a log's directory."""
    for name in COPIED:
        shutil.copyfile(SHIPPED / f"complete_journey_{name}.toml", out / f"{name}.toml")
    schema = (out / "schema.toml").read_text(encoding="utf-8")
    for name, text in (
        ("schema_category", with_first_step(schema, is_served=False)),
        ("schema_three_steps", with_first_step(schema, is_served=True)),
    ):
        (out / f"{name}.toml").write_text(text, encoding="utf-8")
