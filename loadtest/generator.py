"""The generator as a process of its own: plan and trace go through files, the start through stdout.

    python -m loadtest.generator DIRECTORY

So that faults, probes and the garbage of whoever asks do not delay what it sends.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.openloop import OpenLoop, Plan, Trace
from loadtest.procs import pinned

_PLAN, _ARRAYS, _BYTES = "plan.json", "plan.npz", "requests.bin"
_TRACE, _TRACE_META, _ANSWERS = "trace.npz", "trace.json", "answers.bin"
_COLUMNS = ("scheduled", "late", "latency", "status", "degraded")

Action = tuple[float, Callable[[], None]]


class GeneratorError(RuntimeError):
    """The generator's process ended without a trace; its reason went to stderr."""


def generate(plan: Plan, *, cpu: int | None = None, actions: Sequence[Action] = ()) -> Trace:
    """Runs a plan in a process of its own.

    Args:
        plan: What to send.
        cpu: Core the generator is pinned to.
        actions: (seconds from the start, what to do), ascending; done in this process meanwhile.

    Raises:
        GeneratorError: It found no server, or the answers are not HTTP/1.1 as it reads it.
    """
    with tempfile.TemporaryDirectory() as directory:
        _write_plan(plan, Path(directory))
        with pinned(cpu):
            process = subprocess.Popen(
                [sys.executable, "-m", "loadtest.generator", directory],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if line:
                started_at = float(line)
                for at, action in actions:
                    time.sleep(max(started_at + at - time.monotonic(), 0.0))
                    action()
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if code:
            raise GeneratorError(f"the load generator ended with exit code {code}")
        return _read_trace(Path(directory))


def _write_plan(plan: Plan, directory: Path) -> None:
    scalars = {
        "host": plan.host,
        "port": plan.port,
        "callers": plan.callers,
        "seconds": plan.seconds,
        "connections": plan.connections,
        "keep_answers": plan.keep_answers,
    }
    (directory / _PLAN).write_text(json.dumps(scalars))
    arrays: dict[str, npt.NDArray[Any]] = {"order": plan.order}  # Any: of two kinds
    if plan.times is not None:
        arrays["times"] = plan.times
    arrays["ends"] = _write_parts(plan.requests, directory / _BYTES)
    np.savez(directory / _ARRAYS, allow_pickle=False, **arrays)


def _read_plan(directory: Path) -> Plan:
    scalars: dict[str, Any] = json.loads((directory / _PLAN).read_text())  # Any: JSON
    with np.load(directory / _ARRAYS, allow_pickle=False) as arrays:
        return Plan(
            requests=_read_parts(directory / _BYTES, arrays["ends"]),
            order=arrays["order"],
            times=arrays.get("times"),
            **scalars,
        )


def _write_trace(trace: Trace, directory: Path) -> None:
    columns = {name: getattr(trace, name) for name in _COLUMNS}
    ends = _write_parts(trace.answers, directory / _ANSWERS)
    np.savez(directory / _TRACE, allow_pickle=False, ends=ends, **columns)
    meta = {"started_at": trace.started_at, "cpu_share": trace.cpu_share}
    (directory / _TRACE_META).write_text(json.dumps(meta))


def _read_trace(directory: Path) -> Trace:
    meta: dict[str, Any] = json.loads((directory / _TRACE_META).read_text())  # Any: JSON
    with np.load(directory / _TRACE, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in _COLUMNS}
        answers = _read_parts(directory / _ANSWERS, arrays["ends"])
    return Trace(**columns, **meta, answers=answers)


def _write_parts(parts: Sequence[bytes], path: Path) -> npt.NDArray[np.int64]:
    path.write_bytes(b"".join(parts))
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


def _read_parts(path: Path, ends: npt.NDArray[np.int64]) -> list[bytes]:
    whole = path.read_bytes()
    starts = [0, *ends[:-1].tolist()]
    return [whole[start:end] for start, end in zip(starts, ends.tolist(), strict=False)]


def _main(directory: Path) -> None:
    plan = _read_plan(directory)
    loop = OpenLoop(plan)
    gc.collect()
    gc.disable()
    try:
        trace = loop.run(lambda at: print(at, flush=True))  # noqa: T201 - how the parent learns it
    except OSError as exc:
        sys.exit(f"the load generator cannot reach {plan.host}:{plan.port}: {exc.strerror}")
    _write_trace(trace, directory)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
