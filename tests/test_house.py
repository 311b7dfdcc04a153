"""House rules that a tool can hold: imports, sizes, and that the README is true."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from model.contract.spec import load_schema
from model.nets import ARCHITECTURES
from service.cli import VERBS
from service.errors import error_codes
from service.observe import Metrics
from service.settings import setting_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted(
    p for name in ("model", "service", "loadtest") for p in (ROOT / name).rglob("*.py")
)


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_import_contract_names_every_module_of_the_trainer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (service,) = (c for c in contracts["contracts"] if c["source_modules"] == ["service"])
    trainer = {f"model.{p.stem}" for p in (ROOT / "model").glob("*.py")} - {"model.__init__"}
    assert trainer - set(service["forbidden_modules"]) == set()


def test_every_module_is_found() -> None:
    assert len(MODULES) > 50


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_is_short_and_says_its_job(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 450
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_a_screen(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_readme_lists_every_setting_with_its_default() -> None:
    rows = [f"| `{r.variable}` | {r.default} | {r.description} |" for r in setting_rows()]
    assert [row for row in rows if row not in README] == []
    assert set(re.findall(r"^\| `(CTR_\w+)` \|", README, re.M)) == {
        r.variable for r in setting_rows()
    }


def test_readme_lists_every_metric() -> None:
    families = re.findall(r"^# HELP (\S+) (.*)$", Metrics().render().decode(), re.M)
    rows = [f"| `{name}` | {text} |" for name, text in families]
    assert [row for row in rows if row not in README] == []


def test_readme_names_every_error_code() -> None:
    assert [code for code in error_codes() if f"`{code}`" not in README] == []


def test_readme_names_every_verb() -> None:
    assert [verb for verb in VERBS if f"ctr {verb}" not in README] == []


def test_readme_names_every_architecture() -> None:
    assert [name for name in ARCHITECTURES if f'"{name}"' not in README] == []


def test_help_imports_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys, json; sys.argv = ['ctr', '--help']\n"
        "from service.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({'torch', 'fastapi', 'polars'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_shipped_schema_is_valid() -> None:
    schema = load_schema(ROOT / "model" / "datasets" / "complete_journey_schema.toml")
    assert schema.output_names == ("pctr", "pctcvr", "pcvr")
