"""`ctr bench`: CPU time of the parts of one request, each alone, and of the whole server.

CPU time, not time: other processes on the machine change it little, waiting not at all. Every round
measures all parts one after another, and the median over rounds is shown.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from service.settings import Settings, load_settings
from service.verbs import require_bundle, store_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from model.contract.blocks import Blocks
    from model.contract.record import UserRecord
    from service.features import EncodedRequest
    from service.scorer import ScoreResult
    from service.stores.base import OnlineStore

_TIMEOUT_S = 60.0
_STORE_TIMEOUT_MS = 5000
_REQUEST_ID = "0" * 32
# Sends bodies over one connection, one after another, and says how many were answered with 200.
_CLIENT = """
import json, socket, sys
port, count, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
bodies = [line.encode() for line in open(path).read().splitlines()]
head = b"POST /score HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: "
requests = [head + str(len(b)).encode() + b"\\r\\n\\r\\n" + b for b in bodies]
sock = socket.create_connection(("127.0.0.1", port))
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in sys.stdin:
    answered = 0
    for i in range(count):
        sock.sendall(requests[i % len(requests)])
        data = b""
        while b"\\r\\n\\r\\n" not in data:
            data += sock.recv(65536)
        top, _, rest = data.partition(b"\\r\\n\\r\\n")
        length = int(top.lower().split(b"content-length: ")[1].split(b"\\r\\n")[0])
        while len(rest) < length:
            rest += sock.recv(65536)
        answered += top.startswith(b"HTTP/1.1 200")
    print(answered, flush=True)
"""

# Name -> what it covers, in the order of a request. `http` and `rest` are differences.
PARTS = {
    "http": "sockets, event loop, uvicorn, request id: the whole without the rows below",
    "decode": "the body's JSON to a request",
    "store": "one look-up of the user record",
    "record": "the record's bytes to arrays",
    "match": "match features: what encoding costs more with the record's entries",
    "encode": "all other features: item table, inline values, user and context",
    "batcher": "hand-over to the runner's thread and back, without the run",
    "session": "the ONNX run",
    "respond": "scores to the answer's JSON",
    "rest": "scorer and metrics, and what the parts cost more in company than alone",
}


@click.command()
@click.argument("requests", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle directory (CTR_BUNDLE).")
@click.option("--items", type=click.Path(path_type=Path), help="Item snapshot (CTR_ITEM_SNAPSHOT).")
@click.option("--records", type=click.Path(path_type=Path), help="User records to load first.")
@click.option(
    "--layout", type=click.Choice(["rows", "columns"]), default="rows", help="Of answers."
)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print microseconds by part as JSON.")
def bench(
    requests: Path,
    bundle: Path | None,
    items: Path | None,
    records: Path | None,
    layout: str,
    rounds: int,
    as_json: bool,
) -> None:
    """Microseconds of CPU per request of each part, for bodies of POST /score, one a line.

    Without CTR_STORE__URL a Redis server of its own is used, in a directory that is removed.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(bundle=bundle, item_snapshot=items)
        require_bundle(settings)
        # Long time-outs: a busy machine makes things late, and CPU time is what is asked for.
        store = settings.store.model_copy(
            update={"data_dir": Path(folder) / "redis", "timeout_ms": _STORE_TIMEOUT_MS}
        )
        limits = settings.limits.model_copy(update={"timeout_ms": settings.limits.max_timeout_ms})
        lines = [
            json.dumps({**json.loads(line), "layout": layout})
            for line in requests.read_text().splitlines()
        ]
        bodies = Path(folder) / "bodies.jsonl"
        bodies.write_text("\n".join(lines))
        with (
            store_settings(
                settings.model_copy(update={"store": store, "limits": limits})
            ) as complete,
            asyncio.Runner(loop_factory=_loop_factory()) as runner,
        ):
            parts = runner.run(measure(complete, bodies, records=records, rounds=rounds))
    if as_json:
        click.echo(json.dumps({name: round(us, 1) for name, us in parts.items()}))
    else:
        _print(parts)


async def measure(
    settings: Settings, bodies: Path, *, records: Path | None, rounds: int
) -> dict[str, float]:
    """Microseconds per request by name of `PARTS`, and of the `whole`.

    Args:
        settings: With bundle and store URL.
        bodies: File of request bodies, one a line.
        records: Parquet of user records to load first.
        rounds: How often everything is measured.
    """
    from service.app import create_app
    from service.materialize import load_records
    from service.stores import open_store

    assert settings.store.url is not None  # `store_settings` has set it.
    lines = (await asyncio.to_thread(bodies.read_bytes)).splitlines()
    store = open_store(settings.store.url.get_secret_value(), settings.store)
    app = create_app(settings, store=store)
    cpus = sorted(os.sched_getaffinity(0))
    # The server on one core, as a worker would be: threads that move between cores cost more.
    os.sched_setaffinity(0, cpus[:1])
    async with app.router.lifespan_context(app), serving(app) as port:
        if records is not None:
            await load_records(records, store, ttl_s=None)
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CLIENT, str(port), str(len(lines)), str(bodies)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        os.sched_setaffinity(client.pid, cpus[1:] or cpus)
        bench = _Bench(app, store, settings, lines, client)
        try:
            await bench.prepare()
            loops = bench.loops()
            taken: dict[str, list[float]] = {name: [] for name in loops}
            for _ in range(rounds + 1):  # the first warms up
                for name, loop in loops.items():
                    started_at = time.process_time()
                    await loop()
                    seconds = time.process_time() - started_at
                    taken[name].append(seconds * 1e6 / len(lines))
        finally:
            os.sched_setaffinity(0, cpus)
            await bench.close()
            client.kill()
            await client.wait()
    return _parts({name: statistics.median(values[1:]) for name, values in taken.items()})


def _parts(measured: dict[str, float]) -> dict[str, float]:
    parts = {name: measured[name] for name in ("decode", "store", "record")}
    parts["match"] = measured["encode_all"] - measured["encode"]
    parts["encode"] = measured["encode"]
    parts["batcher"] = measured["submit"] - measured["session"]
    parts |= {name: measured[name] for name in ("session", "respond")}
    parts["rest"] = measured["request"] - sum(parts.values())
    parts["http"] = measured["whole"] - measured["request"]
    return {**{name: parts[name] for name in PARTS}, "whole": measured["whole"]}


class _Bench:
    """What is measured, ready: bodies with their records, blocks and scores."""

    # Any: the client is a process, of which typeshed has no public name under this module.
    def __init__(
        self,
        app: "FastAPI",
        store: "OnlineStore",
        settings: Settings,
        lines: Sequence[bytes],
        client: Any,
    ) -> None:
        from model.contract.ids import canonical_id
        from service.observe import Metrics
        from service.wire import parse_body

        self._limits, self._lines, self._client, self._store = (
            settings.limits,
            lines,
            client,
            store,
        )
        self._scorer = app.state.status.require_scorer()
        self._state = self._scorer.state
        self._batcher = self._state.make_batcher(batch=settings.batch, observer=Metrics())
        self._parsed = [parse_body(line, limits=settings.limits) for line in lines]
        self._user_ids = [canonical_id(body.request.user_id) or "" for body in self._parsed]
        self._data: list[bytes] = []
        self._records: list[UserRecord | None] = []
        self._bare: list[UserRecord | None] = []
        self._blocks: list[Blocks] = []
        self._results: list[ScoreResult] = []

    async def prepare(self) -> None:
        """Does every request once."""
        from model.contract.record import unpack_record

        for index, body in enumerate(self._parsed):
            data = await self._store.get(self._user_ids[index])
            record = None if data is None else unpack_record(data)
            self._data += [] if data is None else [data]
            self._records.append(record)
            self._bare.append(record and msgspec.structs.replace(record, matches={}))
            self._blocks.append(self._encode(index, self._records).blocks)
            self._results.append(await self._scorer.score(body.request, deadline=_deadline()))

    def loops(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """By name, what handles every body once."""
        from model.contract.record import unpack_record
        from service.wire import encode_answer, parse_body

        def respond(index: int) -> None:
            layout = self._parsed[index].layout
            encode_answer(self._results[index], request_id=_REQUEST_ID, layout=layout)

        def read(index: int) -> None:
            if index < len(self._data):
                unpack_record(self._data[index])

        return {
            "decode": self._all(lambda i: parse_body(self._lines[i], limits=self._limits)),
            "store": self._each(lambda i: self._store.get(self._user_ids[i])),
            "record": self._all(read),
            "encode_all": self._all(lambda i: self._encode(i, self._records)),
            "encode": self._all(lambda i: self._encode(i, self._bare)),
            "session": self._all(lambda i: self._state.runtime.run(self._blocks[i])),
            "submit": self._each(lambda i: self._batcher.submit(self._blocks[i], _deadline())),
            "respond": self._all(respond),
            "request": self._each(self._request),
            "whole": self._whole,
        }

    async def close(self) -> None:
        """Stops the batcher."""
        await self._batcher.close(0)

    def _all(self, work: Callable[[int], object]) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            for index in range(len(self._lines)):
                work(index)

        return loop

    def _each(self, work: Callable[[int], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            for index in range(len(self._lines)):
                await work(index)

        return loop

    def _encode(self, index: int, records: "Sequence[UserRecord | None]") -> "EncodedRequest":
        request = self._parsed[index].request
        encoded: EncodedRequest = self._state.features.encode(
            user_id=request.user_id,
            time=time.time() if request.time is None else request.time,
            context=request.context,
            user_features=request.user_features,
            candidates=request.candidates,
            record=records[index],
        )
        return encoded

    async def _request(self, index: int) -> None:
        from service.wire import encode_answer, parse_body

        body = parse_body(self._lines[index], limits=self._limits)
        result = await self._scorer.score(body.request, deadline=_deadline())
        encode_answer(result, request_id=_REQUEST_ID, layout=body.layout)

    async def _whole(self) -> None:
        self._client.stdin.write(b"\n")
        answered = int(await self._client.stdout.readline())
        if answered != len(self._lines):
            raise RuntimeError(f"{answered} of {len(self._lines)} requests were answered with 200")


def _deadline() -> float:
    return asyncio.get_running_loop().time() + _TIMEOUT_S


@asynccontextmanager
async def serving(app: "FastAPI") -> "AsyncIterator[int]":
    """Serves the app, inside its lifespan already, and tells the port.

    The protocol is the server's own.
    """
    import uvicorn

    from service.server import http_protocol

    config = uvicorn.Config(
        app,
        http=http_protocol(app),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        port=0,
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await server.shutdown()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop


def _print(parts: dict[str, float]) -> None:
    console = Console()
    without = parts["whole"] - parts["session"]
    table = Table(
        caption=f"outside the ONNX run: {without:.0f} us", caption_justify="left", title=None
    )
    for name, justify in (("part", "left"), ("us", "right"), ("share", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's literals
    for name, us in parts.items():
        share = f"{us / parts['whole']:.0%}"
        table.add_row(name, f"{us:.1f}", share, PARTS.get(name, "the server, one client"))
    console.print(table)
