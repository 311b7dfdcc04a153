"""Configuration files beside the log of the Complete Journey: schemas, runs and comparisons."""

import shutil
from pathlib import Path

SHIPPED = Path(__file__).parent
COPIED = ("schema", "train", "train_three_steps", "baseline", "compare", "ablations")
FIRST_STEP = """\
[[steps]]
name = "category"
label = "category"
"""


def three_step_schema(two_steps: str) -> str:
    """The schema's text with the step "category" before its first one, nothing else changed."""
    before, first, after = two_steps.partition("[[steps]]\n")
    return before + FIRST_STEP + first + after


def write_files(out: Path) -> None:
    """Writes the files named in `COPIED`, and `schema_three_steps.toml`, into a log's directory."""
    for name in COPIED:
        shutil.copyfile(SHIPPED / f"complete_journey_{name}.toml", out / f"{name}.toml")
    schema = (out / "schema.toml").read_text(encoding="utf-8")
    (out / "schema_three_steps.toml").write_text(three_step_schema(schema), encoding="utf-8")
