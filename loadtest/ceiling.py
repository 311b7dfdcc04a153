"""What the generator itself can send, measured on a server that only answers."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from loadtest.openloop import http_request
from loadtest.procs import pinned
from loadtest.rig import free_port, wait_for_port
from loadtest.stand import Target, core_pair

_RATES = (1000, 2000, 3000, 5000, 7000, 10_000, 14_000, 20_000, 28_000, 40_000)
_BODY_BYTES = 1000


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Highest rate that the generator kept without being late; None if none.

    Attributes:
        rate: Requests per second on one core.
        p50_ms: Latency of the null server then: what generator, kernel and an answer cost.
    """

    rate: float | None
    p50_ms: float | None
    tried: list[dict[str, Any]]  # Any: JSON


def measure_ceiling(*, seconds: float, pin: bool, seed: int, late_limit_ms: float) -> Ceiling:
    """Raises the rate until a run is void or an answer is missing."""
    server_cpu, generator_cpu = core_pair(pin=pin)
    port = free_port()
    with pinned(server_cpu):
        process = subprocess.Popen([sys.executable, "-m", "loadtest.nullserver", str(port)])
    tried: list[dict[str, Any]] = []
    best: tuple[float, float] | None = None
    try:
        wait_for_port(port)
        target = Target(
            url=f"http://127.0.0.1:{port}",
            requests=[http_request("127.0.0.1", "/", b"x" * _BODY_BYTES)],
            pid=process.pid,
            has_metrics=False,
            generator_cpu=generator_cpu,
            late_limit_ms=late_limit_ms,
        )
        for rate in _RATES:
            figures = target.at_rate(rate, seconds, seed=seed).summary
            holds = figures.void is None and figures.failed_share == 0.0
            tried.append(
                {
                    "rate": rate,
                    "late_p99_ms": figures.late_ms["p99"],
                    "generator_cpu_share": figures.generator_cpu_share,
                    "p50_ms": figures.latency_ms.get("p50"),
                    "holds": holds,
                }
            )
            if not holds:
                break
            best = (float(rate), figures.latency_ms["p50"])
    finally:
        process.terminate()
        process.wait(10)
    return Ceiling(rate=best[0] if best else None, p50_ms=best[1] if best else None, tried=tried)
