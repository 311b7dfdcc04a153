"""One /metrics that is right for all workers, whichever of them is asked.

Each worker tells its own values over a unix socket in a directory that the workers share; the one
that is asked puts them together. Counters and histograms are summed; gauges are told per worker,
with a label `worker`; drift is made of the sums of what the workers have counted. Recording stays
as cheap as in one process.

Sums never go back. A worker writes what it is about to tell to a file first: the file stands in
while it does not answer, and a worker started in its place goes on from it.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from service.drift import WindowCounts
from service.exposition import Family, render_families, with_label
from service.observe import Metrics

_log = logging.getLogger(__name__)

_ANSWER_LIMIT_S = 0.5
_READY = "scoring_ready"
_RESTARTS = "scoring_worker_restarts_total"


class Told(msgspec.Struct, array_like=True):
    """What a worker tells: all its values, and what its drift is made of."""

    families: list[Family]
    windows: list[WindowCounts]


_DECODER = msgspec.msgpack.Decoder(Told)


@dataclass(frozen=True, slots=True)
class Report:
    """One worker's values; not live if they are what it told last."""

    worker: int
    is_live: bool
    families: Sequence[Family]
    windows: Sequence[WindowCounts] = ()


class WorkerMetrics:
    """Async context manager: while it is open, siblings get this worker's values."""

    def __init__(
        self, metrics: Metrics, *, worker: int, num_workers: int, num_restarts: int, directory: Path
    ) -> None:
        """Opens nothing yet.

        Args:
            metrics: This worker's.
            worker: Its number, from 0.
            num_workers: How many there are.
            num_restarts: How often a worker of this number has been started again.
            directory: The same for all; not empty if one of this number was here before.
        """
        self._metrics = metrics
        self._worker = worker
        self._num_workers = num_workers
        self._num_restarts = num_restarts
        self._directory = directory
        self._before: list[Family] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        """Goes on from what the worker before told, and begins to tell."""
        self._before = totals(await asyncio.to_thread(self._read_last, self._worker))
        counted = sum(value for f in self._before if f.name == _RESTARTS for *_, value in f.samples)
        self._metrics.worker_restarted(max(0, self._num_restarts - int(counted)))
        self._server = await asyncio.start_unix_server(self._answer, self._socket(self._worker))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Keeps the last values for the siblings, and stops telling."""
        await self._tell()
        if self._server is not None:
            self._server.close()

    async def render(self) -> bytes:
        """The values of all workers in the Prometheus text format; at most half a second late."""
        others = [worker for worker in range(self._num_workers) if worker != self._worker]
        reports = await asyncio.gather(*map(self._ask, others))
        own = _DECODER.decode(await self._tell())
        reports = [Report(self._worker, True, own.families, own.windows), *reports]
        merged = merge(reports)
        merged.append(self._metrics.drift(w for report in reports for w in report.windows))
        await asyncio.sleep(0)  # Each half holds the loop for milliseconds: requests go between.
        return render_families(merged)

    async def _tell(self) -> bytes:
        families = add(self._before, self._metrics.families())
        told = msgspec.msgpack.encode(Told(families, self._metrics.windows()))
        await asyncio.to_thread(self._write_last, told)
        return told

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        try:
            writer.write(await self._tell())
            await writer.drain()
        except ConnectionError:
            pass  # The sibling has given up; it says so itself.
        finally:
            writer.close()

    async def _ask(self, worker: int) -> Report:
        try:
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(worker))
                try:
                    told = _DECODER.decode(await reader.read())
                finally:
                    writer.close()
            return Report(worker, True, told.families, told.windows)
        except (TimeoutError, OSError, msgspec.MsgspecError) as exc:
            _log.warning("worker %d did not tell its metrics: %s", worker, type(exc).__name__)
        self._metrics.worker_silent()
        return Report(worker, False, await asyncio.to_thread(self._read_last, worker))

    def _socket(self, worker: int) -> str:
        return str(self._directory / f"{worker}.sock")

    def _read_last(self, worker: int) -> list[Family]:
        path = self._directory / f"{worker}.metrics"
        return _DECODER.decode(path.read_bytes()).families if path.exists() else []

    def _write_last(self, told: bytes) -> None:
        path = self._directory / f"{self._worker}.metrics"
        part = path.with_suffix(".part")
        part.write_bytes(told)
        part.replace(path)


def merge(reports: Iterable[Report]) -> list[Family]:
    """Puts the workers' values together; a worker that is not live has no gauges but ready = 0."""
    told = (
        [_labelled(f, report) if f.kind == "gauge" else f for f in report.families]
        for report in reports
    )
    return add(*told)


def add(*reports: Sequence[Family]) -> list[Family]:
    """Sums equal samples of lists of families; order as they come.

    Of what all workers tell of one machine the largest counts: who is asked later knows more.
    """
    families: dict[str, Family] = {}
    sums: dict[str, dict[str, float]] = {}
    for family in itertools.chain.from_iterable(reports):
        known = sums.get(family.name)
        if known is None:
            families[family.name] = family
            sums[family.name] = dict(family.samples)
        elif family.is_shared:
            for series, value in family.samples:
                known[series] = max(known.get(series, value), value)
        else:
            for series, value in family.samples:
                known[series] = known.get(series, 0.0) + value
    return [
        Family(f.name, f.text, f.kind, list(sums[name].items()), f.is_shared)
        for name, f in families.items()
    ]


def totals(families: Iterable[Family]) -> list[Family]:
    """Without the gauges, which mean nothing once their worker is gone."""
    return [family for family in families if family.kind != "gauge"]


def _labelled(family: Family, report: Report) -> Family:
    worker = str(report.worker)
    samples = [
        (with_label(series, "worker", worker), value if report.is_live else 0.0)
        for series, value in family.samples
        if report.is_live or family.name == _READY
    ]
    return Family(family.name, family.text, family.kind, samples)
