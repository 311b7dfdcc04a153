"""Prints what extras of pyproject.toml need, one requirement per line: for image layers that last.

    python requirements.py PYPROJECT EXTRA ...

An extra that names others of this project (`ctr-scoring[train]`) brings what they bring. `build`
stands for what building the project's wheel needs.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_OWN_EXTRAS = re.compile(r"ctr-scoring\[(?P<extras>[\w,-]+)\]")


def requirements(pyproject: dict[str, Any], extras: list[str]) -> list[str]:  # Any: TOML
    """Sorted, each once; with what every part needs unless only `build` is asked for."""
    if extras == ["build"]:
        return sorted(pyproject["build-system"]["requires"])
    project = pyproject["project"]
    found: set[str] = set(project["dependencies"])
    waiting, seen = list(extras), set[str]()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in project["optional-dependencies"][extra]:
            own = _OWN_EXTRAS.fullmatch(line)
            if own is None:
                found.add(line)
            else:
                waiting += own["extras"].split(",")
    return sorted(found)


if __name__ == "__main__":
    parsed = tomllib.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write("\n".join(requirements(parsed, sys.argv[2:])) + "\n")
