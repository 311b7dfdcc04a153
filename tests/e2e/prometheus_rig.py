"""A real Prometheus that scrapes one target by the rules and settings under deploy/."""

import copy
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from deployed import PROMETHEUS, read_yaml

LIMIT_S = 60.0
SCRAPE = "500ms"

Json = dict[str, Any]  # Any: JSON values


class Prometheus:
    """A running server: asks it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.lines: list[str] = []
        self._address = ""
        self._process = process
        self._is_known = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._is_known.wait(LIMIT_S), "".join(self.lines)
        assert self._address, "".join(self.lines)
        self._client = httpx.Client(base_url=f"http://{self._address}", timeout=LIMIT_S)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            found = re.search(r'msg="Listening on" address=(\S+)', line)
            if found:
                self._address = found[1]
            if self._address and "Server is ready" in line:
                self._is_known.set()
        self._is_known.set()

    def get(self, path: str, **parameters: str) -> Any:  # Any: JSON of the path
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expr: str) -> list[float]:
        """One number per series that the expression has now, NaN among them."""
        return [float(series["value"][1]) for series in self.get("query", query=expr)["result"]]

    def close(self) -> None:
        self._client.close()


@contextmanager
def prometheus(directory: Path, *, target: str) -> Iterator[Prometheus]:
    """Serves what deploy/ configures, with another target and shorter intervals."""
    directory.mkdir()
    config = copy.deepcopy(read_yaml(PROMETHEUS / "prometheus.yml"))
    config["global"] = {
        "scrape_interval": SCRAPE,
        "scrape_timeout": SCRAPE,
        "evaluation_interval": SCRAPE,
    }
    config["rule_files"] = [str(PROMETHEUS / "rules" / "*.yml")]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={path}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        started = Prometheus(process)
        yield started
        started.close()
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        assert process.stderr is not None
        process.stderr.close()
