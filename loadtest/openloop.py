"""Open-loop load: requests leave at their scheduled times whether or not earlier ones came back.

Latency is counted from the scheduled time, so that a stall of the server is seen by every request
that should have left during it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request's fate; times in seconds from the run's start.

    Attributes:
        status: HTTP status, 0 when the connection failed.
        late: how long after its scheduled time the generator sent it.
    """

    scheduled: float
    latency: float
    late: float
    status: int
    body: bytes


class HttpClient:
    """A pool of keep-alive HTTP/1.1 connections to one server; a connection has one request."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._host, self._port = parts.hostname, parts.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one POST; status 0 when the connection fails."""
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        ).encode()
        try:
            reader, writer = self._idle.pop() if self._idle else await self._connect()
        except OSError:
            return 0, b""
        try:
            writer.write(head + body)
            status, answer = await _read_response(reader)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            writer.close()
            return 0, b""
        self._idle.append((reader, writer))
        return status, answer

    async def aclose(self) -> None:
        """Closes the idle connections."""
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()
        self._idle.clear()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port)


async def run_open_loop(
    client: HttpClient, bodies: Sequence[bytes], *, rate: float, seconds: float, seed: int
) -> list[Outcome]:
    """Sends POST /score at Poisson times of the given rate (requests/s), bodies in turn."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0 / rate, size=int(rate * seconds * 1.2) + 100)
    times = np.cumsum(gaps)
    times = times[times < seconds]
    start = time.monotonic()

    async def one(scheduled: float, body: bytes) -> Outcome:
        late = time.monotonic() - start - scheduled
        status, answer = await client.post("/score", body)
        latency = time.monotonic() - start - scheduled
        return Outcome(scheduled=scheduled, latency=latency, late=late, status=status, body=answer)

    tasks: list[asyncio.Task[Outcome]] = []
    for number, scheduled in enumerate(times.tolist()):
        wait = start + scheduled - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(scheduled, bodies[number % len(bodies)])))
    return list(await asyncio.gather(*tasks))


async def measure_saturation(
    client: HttpClient, bodies: Sequence[bytes], *, concurrency: int, seconds: float
) -> float:
    """Requests per second that a closed loop of so many callers gets answered with 200."""
    stop = time.monotonic() + seconds
    counts = [0] * concurrency

    async def caller(index: int) -> None:
        number = index
        while time.monotonic() < stop:
            status, _ = await client.post("/score", bodies[number % len(bodies)])
            counts[index] += status == 200
            number += concurrency

    await asyncio.gather(*(caller(index) for index in range(concurrency)))
    return sum(counts) / seconds


def quantiles_ms(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Latency p50, p90, p99 and maximum, milliseconds; empty without outcomes."""
    if not outcomes:
        return {}
    latency = np.array([outcome.latency for outcome in outcomes]) * 1e3
    values = [*np.quantile(latency, [0.5, 0.9, 0.99]), latency.max()]
    return {
        name: round(float(v), 2)
        for name, v in zip(("p50", "p90", "p99", "max"), values, strict=True)
    }


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = int(lines[0].split(b" ")[1])
    length: Any = None  # Any: bytes until it is found
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = value
    if length is None:
        raise ValueError("an answer without a content-length")
    return status, await reader.readexactly(int(length))
