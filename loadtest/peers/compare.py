"""Interleaved rounds over this service and its peers, and the ratios."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import numpy as np
import onnxruntime as ort

from loadtest.openloop import http_request
from loadtest.peers.encoded import encode_bodies
from loadtest.peers.model_cpu import model_cpu_us
from loadtest.peers.peer import PEERS, Format, Launch, Outputs, peer_python, running_peer
from loadtest.rig import free_port
from loadtest.stand import WARM_UP_S, Measured, StandOptions, Target, core_pair, open_stand
from loadtest.summary import median_of
from model.contract.blocks import Blocks
from model.contract.bundle import MODEL, parity_excess
from service.settings import BatchSettings
from service.state import load_serving_state

OURS = "this service"
MAX_FAILED_SHARE = 0.01
_NO_OUTPUTS = ("item_id", "status")
_ONNX_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}

Key = tuple[str, str]  # server, format
Pair = tuple[Measured, Measured]  # closed loop, open loop


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare.

    Attributes:
        stand: Bundle, items, records of this service.
        bodies: Of POST /score by what they are called; the first are those the peers get, encoded.
        venvs: Directory of the peers' environments.
        peers: Names out of `PEERS`.
        plain_model: ONNX file for the peers, run with one request row per candidate; None gives
            them the served graph.
        rounds: Of all servers, one after another.
        seconds: Of each run.
        rate: Of the open loop, which all servers must be able to keep.
        max_requests: Most requests that a peer joins into one run.
    """

    stand: StandOptions
    bodies: Mapping[str, list[bytes]]
    venvs: Path
    peers: Sequence[str]
    plain_model: Path | None
    rounds: int
    seconds: float
    rate: float
    max_requests: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One server asked in one format: medians of the rounds.

    Attributes:
        request_bytes: Mean length of a request, head included.
        saturation_per_s: Closed loop.
        cpu_us: Server CPU per request at saturation, whole process tree.
        outside_us: Without the model's own CPU, measured alone for the same graph and rows.
        at_rate_cpu_us: Server CPU per request in the open loop.
        at_rate_outside_us: Likewise without the model's.
        p50_ms, p99_ms: Of the open loop.
        rss_mib: Resident memory of the tree.
        void: Open loops that do not count.
        each: Figures of every round.
    """

    server: str
    format: str
    request_bytes: int
    saturation_per_s: float
    cpu_us: float
    outside_us: float
    at_rate_cpu_us: float
    at_rate_outside_us: float
    p50_ms: float
    p99_ms: float
    rss_mib: float
    void: int
    each: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows; the first is this service.

    Attributes:
        graph: `served` or `plain`: what the peers run. This service runs the served one.
        model_us: CPU of one model run by graph, microseconds, median.
        rate: Of the open loops, requests per second.
        run_by_metrics_us: Model run of this service per request at saturation, by its /metrics.
    """

    graph: str
    model_us: dict[str, float]
    rate: float
    run_by_metrics_us: float
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Plain data."""
        return asdict(self)


def compare(options: CompareOptions, *, progress: Callable[[str], None]) -> Comparison:
    """Runs the rounds.

    Raises:
        RuntimeError: A peer does not start, fails requests, or answers otherwise than this service.
    """
    blocks = _encoded(options)
    served = options.stand.bundle / MODEL
    server_cpu, _ = core_pair(pin=options.stand.pin)
    model_us = {"served": model_cpu_us(served, blocks, cpu=server_cpu)}
    if options.plain_model is not None:
        plain = options.plain_model
        model_us["plain"] = model_cpu_us(plain, blocks, cpu=server_cpu, gather=True)
    graph = "served" if options.plain_model is None else "plain"
    runs: dict[Key, list[Pair]] = {}
    sizes: dict[Key, int] = {}
    for number in range(options.rounds):
        expected: Outputs | None = None
        for server in (OURS, *options.peers):
            with _opened(server, options, blocks) as targets:
                for name, (target, read) in targets.items():
                    key = (server, name)
                    expected = _check_answer(key, target, read, expected)
                    pair = _measure(key, target, options, seed=options.seed + number)
                    runs.setdefault(key, []).append(pair)
                    sizes[key] = round(sum(map(len, target.requests)) / len(target.requests))
                    progress(f"round {number + 1}, {server}, {name}: {_text(pair)}")
    own = [closed for closed, _ in next(iter(runs.values()))]
    return Comparison(
        graph=graph,
        model_us=model_us,
        rate=options.rate,
        run_by_metrics_us=round(
            median_of([run.server.run_us for run in own if run.server and run.server.run_us]), 1
        ),
        rows=[
            _row(key, pairs, sizes[key], model_us["served" if key[0] == OURS else graph])
            for key, pairs in runs.items()
        ],
    )


Read = Callable[[bytes], Outputs] | None


@contextmanager
def _opened(
    server: str, options: CompareOptions, blocks: Sequence[Blocks]
) -> Iterator[dict[str, tuple[Target, Read]]]:
    """One server, running, with a target for each format."""
    if server == OURS:
        with open_stand(options.stand, next(iter(options.bodies.values()))) as stand:
            yield {name: (stand.target(b), _read_ours) for name, b in options.bodies.items()}
        return
    server_cpu, generator_cpu = core_pair(pin=options.stand.pin)
    peer = PEERS[server]
    with tempfile.TemporaryDirectory() as directory:
        launch = _launch(server, options, Path(directory))
        with running_peer(peer, launch, cpu=server_cpu) as (url, pid):
            yield {
                entry.name: (
                    Target(
                        url=url,
                        requests=[_request(url, peer.path, entry, one) for one in blocks],
                        pid=pid,
                        has_metrics=False,
                        generator_cpu=generator_cpu,
                    ),
                    entry.read,
                )
                for entry in peer.formats
            }


def _launch(server: str, options: CompareOptions, directory: Path) -> Launch:
    model = options.plain_model or options.stand.bundle / MODEL
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return Launch(
        python=peer_python(options.venvs, server),
        port=free_port(),
        directory=directory,
        environment={
            "PEER_MODEL": str(model.resolve()),
            "PEER_MAX_REQUESTS": str(options.max_requests),
            "PEER_GATHER": "0" if options.plain_model is None else "1",
            "OMP_NUM_THREADS": "1",
        },
        inputs={
            entry.name: (int(entry.shape[1]), _ONNX_TYPES[entry.type])
            for entry in session.get_inputs()
            if entry.name != "request_of"
        },
        outputs=tuple(entry.name for entry in session.get_outputs()),
    )


def _measure(key: Key, target: Target, options: CompareOptions, *, seed: int) -> Pair:
    target.saturate(WARM_UP_S)
    closed = target.saturate(options.seconds, seed=seed)
    opened = target.at_rate(options.rate, options.seconds, seed=seed)
    for run in (closed, opened):
        if run.server is None or run.summary.failed_share > MAX_FAILED_SHARE:
            raise RuntimeError(f"{key[0]}, {key[1]}: statuses {run.summary.statuses}")
    return closed, opened


def _check_answer(key: Key, target: Target, read: Read, expected: Outputs | None) -> Outputs | None:
    """Compares the answer to the first request with this service's, which is the first asked."""
    if read is None:
        return expected
    head, _, body = target.requests[0].partition(b"\r\n\r\n")
    path = head.split(b" ", 2)[1].decode()
    answer = httpx.post(f"{target.url}{path}", content=body, headers=_JSON, timeout=30.0)
    answer.raise_for_status()
    outputs = read(answer.content)
    if expected is None:
        return outputs
    for name, values in expected.items():
        largest, relative, fits = parity_excess(
            values.astype(np.float32), outputs[name].astype(np.float32)
        )
        if not fits:
            raise RuntimeError(
                f"{key[0]}, {key[1]}: {name} differs by {largest:.2g}, relative {relative:.2g}"
            )
    return expected


_JSON = {"content-type": "application/json"}


def _read_ours(body: bytes) -> Outputs:
    answer: Any = msgspec.json.decode(body)  # Any: JSON
    columns = answer.get("columns")
    if columns is None:
        items = answer["items"]
        columns = {name: [item.get(name) for item in items] for name in items[0]}
    return {n: np.array(values) for n, values in columns.items() if n not in _NO_OUTPUTS}


def _request(url: str, path: str, entry: Format, blocks: Blocks) -> bytes:
    body, headers = entry.encode(blocks)
    return http_request(urlsplit(url).netloc, path, body, headers=headers)


def _encoded(options: CompareOptions) -> list[Blocks]:
    stand = options.stand
    # Peers run the whole graph: they keep nothing of an item.
    state = load_serving_state(
        stand.bundle, stand.items, batch=BatchSettings(), with_item_sums=False
    )
    try:
        return encode_bodies(state, next(iter(options.bodies.values())), stand.records)
    finally:
        state.runtime.close()


def _row(key: Key, pairs: Sequence[Pair], size: int, model_us: float) -> Row:
    each = [
        {
            "saturation_per_s": closed.summary.achieved_per_s,
            "cpu_us": closed.server.cpu_us,
            "at_rate_cpu_us": opened.server.cpu_us,
            "p50_ms": opened.summary.latency_ms["p50"],
            "p99_ms": opened.summary.latency_ms["p99"],
            "rss_mib": opened.server.rss_mib,
        }
        for closed, opened in pairs
        if closed.server is not None and opened.server is not None
    ]
    middle = {name: median_of([entry[name] for entry in each]) for name in each[0]}
    return Row(
        server=key[0] if key[0] == OURS else PEERS[key[0]].title,
        format=key[1],
        request_bytes=size,
        saturation_per_s=round(middle["saturation_per_s"], 1),
        cpu_us=round(middle["cpu_us"], 1),
        outside_us=round(middle["cpu_us"] - model_us, 1),
        at_rate_cpu_us=round(middle["at_rate_cpu_us"], 1),
        at_rate_outside_us=round(middle["at_rate_cpu_us"] - model_us, 1),
        p50_ms=round(middle["p50_ms"], 3),
        p99_ms=round(middle["p99_ms"], 3),
        rss_mib=round(middle["rss_mib"], 1),
        void=sum(opened.summary.void is not None for _, opened in pairs),
        each=each,
    )


def _text(pair: Pair) -> str:
    closed = pair[0]
    cpu = "" if closed.server is None else f", CPU {closed.server.cpu_us:.0f} us"
    return f"{closed.summary.achieved_per_s:.0f}/s{cpu}"
