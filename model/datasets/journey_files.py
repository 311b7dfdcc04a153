"""Configuration files beside the log of the Complete Journey: schemas, runs and comparisons."""

import shutil
from pathlib import Path

SHIPPED = Path(__file__).parent
COPIED = ("schema", "train", "tafe", "tafe_three_steps", "compare", "ablations")
NOT_SERVED = "served = false\n"


def two_step_schema(shipped: str) -> str:
    """The shipped schema's text without its first step, "category"."""
    before, _, rest = shipped.partition("[[steps]]\n")
    _, separator, after = rest.partition("[[steps]]\n")
    return before + separator + after


def three_step_schema(shipped: str) -> str:
    """The shipped schema's text with its first step answered like the others."""
    return shipped.replace(NOT_SERVED, "", 1)


def write_files(out: Path) -> None:
    """Writes the files named in `COPIED`, and the schema's variants, into a log's directory."""
    for name in COPIED:
        shutil.copyfile(SHIPPED / f"complete_journey_{name}.toml", out / f"{name}.toml")
    schema = (out / "schema.toml").read_text(encoding="utf-8")
    for name, text in (
        ("schema_two_steps", two_step_schema(schema)),
        ("schema_three_steps", three_step_schema(schema)),
    ):
        (out / f"{name}.toml").write_text(text, encoding="utf-8")
