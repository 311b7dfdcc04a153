"""The commands `python -m loadtest.peers install` and `python -m loadtest.peers compare`."""

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from loadtest.peers.compare import OURS, CompareOptions, Comparison, compare
from loadtest.peers.peer import PEERS, install
from loadtest.peers.picture import draw
from loadtest.report import machine, write_json
from loadtest.rig import leave_on_sigterm
from loadtest.stand import StandOptions
from loadtest.workload import (
    Workload,
    make_bodies,
    parse_candidates,
    read_bodies,
    read_population,
)
from service.cli import EXIT_GATE

_PATH = click.Path(path_type=Path)
_NAMES = click.Choice(list(PEERS))
_TIMEOUT_MS = 2000  # nothing is to be refused: costs are compared, not admission
_BATCH_ROWS = 400
# Server CPU outside the model, ours by the peer's, in comparison (a), both asked in JSON. Binary
# tensors and base64 are shown beside it: a caller with ids has nothing to put into them.
BOUNDED_FORMAT = "JSON"
BOUNDS = {PEERS["triton"].title: 0.5, PEERS["bentoml"].title: 0.25, PEERS["litserve"].title: 0.25}
NOTE = (
    "Peers receive encoded rows and do less work: no ids to look up, no user record, no encoding. "
    "Outside: CPU of the whole process tree per request without the model run's own CPU, measured "
    "alone for the same graph and rows."
)


@click.group()
def cli() -> None:
    """Compare this service with general model servers on one core each."""


@cli.command("install")
@click.option("--venvs", type=_PATH, required=True, help="Directory of the environments.")
@click.option("--peer", "peers", multiple=True, type=_NAMES, help="Only these.")
def install_command(venvs: Path, peers: tuple[str, ...]) -> None:
    """Make the peers' virtual environments from their pinned requirements (3 GB, minutes)."""
    install(venvs, list(peers or PEERS), progress=lambda text: click.echo(text, err=True))


@cli.command("compare")
@click.option("--venvs", type=_PATH, required=True, help="Made by install.")
@click.option("--bundle", type=_PATH, required=True)
@click.option("--items", type=_PATH, required=True)
@click.option("--records", type=_PATH, required=True)
@click.option("--bodies", type=_PATH, help="JSON lines of POST /score; else drawn by Zipf's law.")
@click.option("--columns/--no-columns", default=False, help="Also ask us for columns.")
@click.option(
    "--against-plain",
    type=_PATH,
    metavar="RUN",
    help="Peers get the plain export of this training run: comparison (b).",
)
@click.option("--peer", "peers", multiple=True, type=_NAMES, help="Only these.")
@click.option("--candidates", default=100, show_default=True)
@click.option("--distinct", default=300, show_default=True, help="Different bodies.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=10.0, show_default=True, help="Of each run.")
@click.option("--rate", default=100.0, show_default=True, help="Of the open loops.")
@click.option("--pin/--no-pin", default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--out", type=_PATH, required=True, help="Directory for peers.json and peers.png.")
def compare_command(
    venvs: Path,
    bundle: Path,
    items: Path,
    records: Path,
    bodies: Path | None,
    columns: bool,
    against_plain: Path | None,
    peers: tuple[str, ...],
    candidates: int,
    distinct: int,
    rounds: int,
    seconds: float,
    rate: float,
    pin: bool,
    seed: int,
    out: Path,
) -> None:
    """Interleaved rounds: closed loop, then an open loop at one rate for all.

    Exit code 4 when a ratio is missed or an open loop is void.
    """
    leave_on_sigterm()
    rows = _rows(bodies, (bundle, items, records), candidates, distinct, seed)
    asked = {"JSON ids, rows": rows}
    if columns:
        asked["JSON ids, columns"] = [_with_columns(body) for body in rows]
    plain_model = None if against_plain is None else _write_plain(against_plain, out)
    # In (a) all servers run one graph.
    settings = {"CTR_ITEM_SUMS": "false"} if against_plain is None else {}
    result = compare(
        CompareOptions(
            stand=StandOptions(
                bundle=bundle, items=items, records=records, pin=pin, settings=settings
            ),
            bodies=asked,
            venvs=venvs,
            peers=peers or tuple(PEERS),
            plain_model=plain_model,
            rounds=rounds,
            seconds=seconds,
            rate=rate,
            max_requests=max(1, _BATCH_ROWS // candidates),
            seed=seed,
        ),
        progress=lambda text: click.echo(text, err=True),
    )
    _show(result)
    failed = _problems(result)
    name = "peers" if plain_model is None else "peers-plain"
    content = {"machine": machine(), "note": NOTE, **result.as_json(), "problems": failed}
    write_json(out / f"{name}.json", content)
    draw(out / f"{name}.png", result)
    for problem in failed:
        click.echo(problem, err=True)
    sys.exit(EXIT_GATE if failed else 0)


def _rows(
    bodies: Path | None,
    population: tuple[Path, Path, Path],
    candidates: int,
    distinct: int,
    seed: int,
) -> list[bytes]:
    if bodies is not None:
        return read_bodies(bodies, timeout_ms=_TIMEOUT_MS)
    workload = Workload(
        candidates=parse_candidates(str(candidates)),
        timeout_ms=_TIMEOUT_MS,
        distinct=distinct,
        seed=seed,
    )
    return make_bodies(read_population(*population), workload)


def _write_plain(run: Path, out: Path) -> Path:
    from model.cost import plain_model_of  # Imports torch.

    out.mkdir(parents=True, exist_ok=True)
    path = out / "plain.onnx"
    path.write_bytes(plain_model_of(run))
    return path


def _with_columns(body: bytes) -> bytes:
    return body[:-1] + b',"layout":"columns"}'


def _show(result: Comparison) -> None:
    title = f"Peers run the {result.graph} graph; open loop at {result.rate:g} requests/s"
    table = Table(title=title, title_justify="left", caption=NOTE, caption_justify="left")
    for name in ("server", "asked in"):
        table.add_column(name)
    columns = ("bytes", "requests/s", "ours by it", "CPU us", "outside us", "ours by it")
    for name in (*columns, "outside us, open loop", "ours by it", "p50 ms", "p99 ms", "RSS MiB"):
        table.add_column(name, justify="right")
    ours = result.rows[0]
    for row in result.rows:
        table.add_row(
            row.server,
            row.format,
            f"{row.request_bytes:,}",
            f"{row.saturation_per_s:.0f}",
            f"{ours.saturation_per_s / row.saturation_per_s:.2f}",
            f"{row.cpu_us:.0f}",
            f"{row.outside_us:.0f}",
            f"{ours.outside_us / row.outside_us:.2f}",
            f"{row.at_rate_outside_us:.0f}",
            f"{ours.at_rate_outside_us / row.at_rate_outside_us:.2f}",
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}{' void' if row.void else ''}",
            f"{row.rss_mib:.0f}",
        )
    console = Console()
    Console(width=None if console.is_terminal else 170).print(table)
    text = ", ".join(f"{name} graph {us:.0f} us" for name, us in result.model_us.items())
    click.echo(
        f"model run alone: {text}; of this service's CPU at saturation its own /metrics counts "
        f"{result.run_by_metrics_us:.0f} us a request as model run"
    )


def _problems(result: Comparison) -> list[str]:
    ours = next(row for row in result.rows if row.server == OURS)
    found = [
        f"{row.server}, {row.format}: {row.void} open loops are void, the generator was late"
        for row in result.rows
        if row.void
    ]
    if result.graph != "served":
        return found
    for row in result.rows:
        bound = BOUNDS.get(row.server)
        if bound is None or row.format != BOUNDED_FORMAT:
            continue
        ratio = ours.outside_us / row.outside_us
        if ratio > bound:
            found.append(
                f"{row.server}, {row.format}: our CPU outside the model is {ratio:.2f} of its, "
                f"expected at most {bound:g}"
            )
    return found


if __name__ == "__main__":
    cli()
