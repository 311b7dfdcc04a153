"""Files in Ali-CCP's format of any size, made and read: rows per second and peak memory.

    python -m loadtest.reader_memory --gigabytes 1

The reader runs in a process of its own, whose largest resident set the system tells. Ids and
weights are drawn at random: the figures are of the format, not of the data.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

USER_SCALARS = ("121", "122", "124", "125", "126", "127", "128", "129")
USER_BAGS = ("109_14", "110_14", "127_14", "150_14")
ITEM_SCALARS = ("206", "207", "216", "301")
CROSSES = ("508", "509", "702")
ROWS_PER_REQUEST = 58  # 42.3 M rows of train, 730,600 distinct requests
MEAN_USER_ENTRIES = 600
BLOCK_REQUESTS = 500
READ = """
import json, resource, sys, time
from pathlib import Path
from model.datasets.ali_ccp import write_ali_ccp
started = time.perf_counter()
summary = write_ali_ccp(Path(sys.argv[1]), Path(sys.argv[2]), progress=lambda *_: None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
print(json.dumps({
    "rows": sum(summary.rows.values()), "requests": summary.requests, "peak_bytes": peak,
    "seconds": time.perf_counter() - started, "cpu_seconds": cpu,
}))
"""


def write_ali_ccp_files(
    directory: Path,
    *,
    num_bytes: int,
    seed: int,
    rows_per_request: int = ROWS_PER_REQUEST,
    mean_user_entries: int = MEAN_USER_ENTRIES,
) -> None:
    """The four files, of about so many bytes together, nine tenths of them of train."""
    rng = np.random.default_rng(seed)
    for fold, share in (("train", 0.9), ("test", 0.1)):
        common = directory / f"common_features_{fold}.csv"
        skeleton = directory / f"sample_skeleton_{fold}.csv"
        written = sample = request = 0
        with common.open("w") as users, skeleton.open("w") as rows:
            while written < share * num_bytes:
                names = [f"{fold}{request + k:012x}" for k in range(BLOCK_REQUESTS)]
                request += BLOCK_REQUESTS
                text = "".join(_common_line(n, rng, mean_user_entries) for n in names)
                lines = _skeleton_lines(names, rng, rows_per_request, first=sample)
                sample += len(lines)
                written += users.write(text) + rows.write("".join(lines))


def _entry(field: str, number: int, value: float = 1.0) -> str:
    return f"{field}\x02{number}\x03{value}"


def _common_line(name: str, rng: np.random.Generator, mean_entries: int) -> str:
    entries = [_entry("101", int(rng.integers(400_000)))]
    scalars = rng.integers(1, 50, len(USER_SCALARS)).tolist()
    entries += [_entry(f, k) for f, k in zip(USER_SCALARS, scalars, strict=True)]
    for field in USER_BAGS:
        count = int(rng.geometric(1.0 / max(mean_entries // len(USER_BAGS), 1)))
        ids = rng.integers(100_000, 3_000_000, count).tolist()
        weights = np.round(np.log1p(rng.geometric(0.3, count)), 5).tolist()
        entries += [_entry(field, k, w) for k, w in zip(ids, weights, strict=True)]
    return f"{name},{len(entries)},{chr(1).join(entries)}\n"


def _skeleton_lines(
    names: list[str], rng: np.random.Generator, rows_per_request: int, *, first: int
) -> list[str]:
    count = rows_per_request * len(names)
    items: list[int] = rng.integers(1, 4_000_000, count).tolist()
    # Some items are clicked more: something is there to be learnt.
    rates: npt.NDArray[np.float64] = np.where(np.array(items) % 5 == 0, 0.12, 0.02)
    clicks = rng.random(count) < rates
    conversions = clicks & (rng.random(count) < 0.05)
    crosses = np.round(rng.random((count, len(CROSSES) + 2)), 5).tolist()
    nodes = rng.integers(1, 9, count).tolist()
    lines = []
    for k, item in enumerate(items):
        entries = [_entry("205", item)]
        entries += [_entry(f, item % (97 * (j + 1))) for j, f in enumerate(ITEM_SCALARS)]
        entries += [_entry("210", item % 1000 + n) for n in range(nodes[k])]
        entries += [_entry(f, item % 500, crosses[k][j]) for j, f in enumerate(CROSSES)]
        entries += [_entry("853", item % 700 + n, crosses[k][-1 - n]) for n in range(2)]
        lines.append(
            f"{first + k},{int(clicks[k])},{int(conversions[k])},{names[k // rows_per_request]},"
            f"{len(entries)},{chr(1).join(entries)}\n"
        )
    return lines


@click.command()
@click.option("--gigabytes", type=click.FloatRange(min=0.001), default=1.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--directory", type=click.Path(path_type=Path), help="Where files are made, gone after."
)
def main(gigabytes: float, seed: int, directory: Path | None) -> None:
    """Makes the files, reads them in another process, prints what it took as JSON."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        source, out = Path(name) / "in", Path(name) / "out"
        source.mkdir()
        needed = int(gigabytes * 1e9)
        if shutil.disk_usage(source).free < 2 * needed:
            raise click.UsageError(f"{name} has no room for {2 * needed:,} bytes")
        started = time.perf_counter()
        write_ali_ccp_files(source, num_bytes=needed, seed=seed)
        sizes = {path.name: path.stat().st_size for path in sorted(source.iterdir())}
        made_s = time.perf_counter() - started
        command = [sys.executable, "-c", READ, str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        found |= {
            "bytes": sum(sizes.values()),
            "rows_per_second": found["rows"] / found["seconds"],
            "made_seconds": made_s,
            "peak_bytes_of_children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "written_bytes": sum(p.stat().st_size for p in out.rglob("*.parquet")),
        }
    click.echo(json.dumps({"files": sizes, **found}, indent=1))


if __name__ == "__main__":
    main()
