"""Runs a comparison's tasks in processes, some at a time; a failed one does not stop the others."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import model
from model.comparison.worker import Task

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
STOP_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Called from several threads as tasks go."""

    on_start: Callable[[Task], None]
    on_say: Callable[[Task, str], None]
    on_end: Callable[[Task, float, str | None], None]  # seconds, error


def run_tasks(tasks: Sequence[Task], *, num_workers: int, report: Report) -> dict[str, str]:
    """Runs every task, `num_workers` at a time, in the given order.

    Ctrl-C, and anything else that ends this call early, ends the processes.

    Returns:
        Error by the name of the task, of those that failed.
    """
    processes = _Processes(report)
    pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="compare")
    try:
        futures = {task.name: pool.submit(processes.run, task) for task in tasks}
        # In short waits: not every platform lets a signal into a wait for a lock.
        while wait(futures.values(), timeout=0.2).not_done:
            pass
        errors = {name: future.result() for name, future in futures.items()}
    finally:
        processes.stop()
        pool.shutdown(cancel_futures=True)
    return {name: error for name, error in errors.items() if error is not None}


class _Processes:
    """The processes that are under way, and the way to end them all."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, task: Task) -> str | None:
        """One task to its end; the error, or None."""
        started = time.monotonic()
        self._report.on_start(task)
        task.arm_dir.mkdir(parents=True, exist_ok=True)
        log = task.arm_dir / f"{task.kind}-{task.seed}.log"
        with log.open("wb") as file:
            process = self._start(task, stderr=file.fileno())
            if process is None:
                return "stopped"
            error = self._listen(task, process)
            code = process.wait()
            assert process.stdin is not None
            process.stdin.close()  # not before: the worker would take it for this process's end
        with self._lock:
            self._running.discard(process)
            if self._is_stopped:
                return "stopped"
        if code and error is None:
            last = _last_line(log)
            error = f"{last} (see {log})" if last else f"the process ended with code {code}"
        if not code or not log.stat().st_size:
            log.unlink()
        self._report.on_end(task, time.monotonic() - started, error)
        return error

    def stop(self) -> None:
        """Ends what runs, and starts nothing more."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, task: Task, *, stderr: int) -> subprocess.Popen[bytes] | None:
        # The worker runs this very code, wherever the verb was started from: -P keeps a directory
        # named like one of its packages from being taken for it.
        root = str(Path(model.__path__[0]).parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = dict.fromkeys(THREAD_VARIABLES, str(task.num_threads))
        with self._lock:
            if self._is_stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "model.comparison.worker", task.model_dump_json()],
                stdin=subprocess.PIPE,  # kept open: its end tells the worker to end
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
            )
            self._running.add(process)
        return process

    def _listen(self, task: Task, process: subprocess.Popen[bytes]) -> str | None:
        """Passes on what the worker says; the error it told, or None."""
        assert process.stdout is not None
        error = None
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # cut off by the process's end
            message = json.loads(line)
            if "error" in message:
                error = str(message["error"])
            else:
                self._report.on_say(task, message["say"])
        process.stdout.close()
        return error


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
