"""`ctr bench`: CPU time of the parts of one request, each alone, and of the whole server.

CPU time, not time: other processes on the machine change it little, waiting not at all. Every round
measures all parts one after another, and the median over rounds is shown.
"""

import asyncio
import dataclasses
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
from rich.console import Console
from rich.table import Table

from service.settings import Settings, load_settings
from service.verbs import store_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

    from service.stores.base import OnlineStore

_TIMEOUT_S = 60.0
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
        if settings.bundle is None:
            raise click.UsageError("no bundle: give --bundle DIR or set CTR_BUNDLE")
        store = settings.store.model_copy(update={"data_dir": Path(folder) / "redis"})
        lines = [
            json.dumps({**json.loads(line), "layout": layout})
            for line in requests.read_text().splitlines()
        ]
        bodies = Path(folder) / "bodies.jsonl"
        bodies.write_text("\n".join(lines))
        with (
            store_settings(settings.model_copy(update={"store": store})) as complete,
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
    async with app.router.lifespan_context(app), _serving(app) as port:
        if records is not None:
            await load_records(records, store, ttl_s=None)
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CLIENT, str(port), str(len(lines)), str(bodies)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        os.sched_setaffinity(client.pid, cpus[1:] or cpus)
        try:
            loops = await _loops(app, store, settings, lines, client)
            taken: dict[str, list[float]] = {name: [] for name in loops}
            for _ in range(rounds + 1):  # the first warms up
                for name, loop in loops.items():
                    started_at = time.process_time()
                    await loop()
                    seconds = time.process_time() - started_at
                    taken[name].append(seconds * 1e6 / len(lines))
        finally:
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


# Any: the client is a process, of which typeshed has no public name under this module.
async def _loops(
    app: "FastAPI", store: "OnlineStore", settings: Settings, lines: Sequence[bytes], client: Any
) -> dict[str, Callable[[], Awaitable[None]]]:
    """By name, what handles every body once."""
    from model.contract.ids import canonical_id
    from model.contract.record import UserRecord, unpack_record
    from service.observe import Metrics
    from service.wire import encode_answer, parse_body

    scorer = app.state.status.require_scorer()
    state, now = scorer.state, asyncio.get_running_loop().time
    batcher = state.make_batcher(batch=settings.batch, observer=Metrics())
    parsed = [parse_body(line, limits=settings.limits) for line in lines]
    user_ids = [canonical_id(body.request.user_id) or "" for body in parsed]
    stored = [await store.get(user_id) for user_id in user_ids]
    data = [record for record in stored if record is not None]
    records = [None if record is None else unpack_record(record) for record in stored]
    bare = [r and dataclasses.replace(r, matches={}) for r in records]

    def encode(index: int, of: Sequence[UserRecord | None]) -> Any:  # Any: EncodedRequest
        request = parsed[index].request
        return state.features.encode(
            user_id=request.user_id,
            time=time.time() if request.time is None else request.time,
            context=request.context,
            user_features=request.user_features,
            candidates=request.candidates,
            record=of[index],
        )

    blocks = [encode(index, records).blocks for index in range(len(lines))]
    results = [await scorer.score(p.request, deadline=now() + _TIMEOUT_S) for p in parsed]

    def all_of(work: Callable[[int], object]) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            for index in range(len(lines)):
                work(index)

        return loop

    def each(work: Callable[[int], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            for index in range(len(lines)):
                await work(index)

        return loop

    async def request(index: int) -> None:
        body = parse_body(lines[index], limits=settings.limits)
        result = await scorer.score(body.request, deadline=now() + _TIMEOUT_S)
        encode_answer(result, request_id="0" * 32, layout=body.layout)

    async def whole() -> None:
        client.stdin.write(b"\n")
        answered = int(await client.stdout.readline())
        if answered != len(lines):
            raise RuntimeError(f"{answered} of {len(lines)} requests were answered with 200")

    return {
        "decode": all_of(lambda i: parse_body(lines[i], limits=settings.limits)),
        "store": each(lambda i: store.get(user_ids[i])),
        "record": all_of(lambda i: unpack_record(data[i]) if i < len(data) else None),
        "encode_all": all_of(lambda i: encode(i, records)),
        "encode": all_of(lambda i: encode(i, bare)),
        "session": all_of(lambda i: state.runtime.run(blocks[i])),
        "submit": each(lambda i: batcher.submit(blocks[i], now() + _TIMEOUT_S)),
        "respond": all_of(
            lambda i: encode_answer(results[i], request_id="0" * 32, layout=parsed[i].layout)
        ),
        "request": each(request),
        "whole": whole,
    }


@asynccontextmanager
async def _serving(app: "FastAPI") -> "AsyncIterator[int]":
    """Serves the app, inside its lifespan already, on a free port."""
    import uvicorn

    from service.http1 import Http1Protocol

    config = uvicorn.Config(
        app,
        http=Http1Protocol,
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
