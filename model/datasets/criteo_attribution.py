"""Criteo attribution modelling for bidding as impression log and events.

Published as `criteo_attribution_dataset.tsv.gz`: tab separated with a header, one row an
impression, sorted by time (seconds from 0). `conversion` there does not imply `click`, and one
conversion marks every impression of its path. Here a conversion is counted once: at the last
clicked impression of those that carry its id; one without a clicked impression is not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError
from model.contract.ids import canonical_ids, hash_ids
from model.datasets.published import (
    CHUNK_BYTES,
    Chunk,
    PartWriter,
    Progress,
    PublishedFile,
    find_file,
    is_kept,
    write_frame,
)

FILE = "criteo_attribution_dataset.tsv"
CATEGORIES = tuple(f"cat{k}" for k in range(1, 10))
REQUIRED = (
    *("timestamp", "uid", "campaign", "conversion", "conversion_timestamp", "conversion_id"),
    *("attribution", "click", "time_since_last_click", *CATEGORIES),
)
Ints = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class CriteoSummary:
    """What was read and written.

    Attributes:
        published_conversions: rows marked as the choice of label says, whatever their click.
        unclicked: those of them without a click.
        repeated: clicked ones whose conversion counts at a later row.
        without_id: clicked ones without a conversion id, each counted by itself.
    """

    rows: int = 0
    clicks: int = 0
    conversions: int = 0
    campaigns: int = 0
    published_conversions: int = 0
    unclicked: int = 0
    repeated: int = 0
    without_id: int = 0


@dataclass(kw_only=True)
class _Marked:
    """Clicked rows marked as conversions, in the order of the file."""

    rows: list[Ints] = field(default_factory=list)
    ids: list[Ints] = field(default_factory=list)
    times: list[Ints] = field(default_factory=list)


def write_criteo_attribution(
    source: Path,
    out: Path,
    *,
    label: Literal["attributed", "any"] = "attributed",
    keep: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress,
) -> CriteoSummary:
    """Writes impressions/ and events/ (Parquet parts) and items.parquet; reads the file twice.

    Memory is bounded by the number of conversions.

    Args:
        source: directory with the published file.
        out: made if it is not there.
        label: which conversions count: those attributed to Criteo, or any within the 30 days.
        keep: share of users kept, by their id.
        chunk_bytes: of text, read at once; what is written does not depend on it.
        progress: told how far the file is read.

    Raises:
        LogError: the file is missing, its header lacks a column, or a line is not of the format.
    """
    file = find_file(source, FILE)
    header = tuple(file.header().split("\t"))
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise LogError(f"{file.name}, line 1: no column {', '.join(missing)}", path=file.path)
    out.mkdir(parents=True, exist_ok=True)
    summary = CriteoSummary()

    def chunks(what: str) -> Iterator[Chunk]:
        return file.chunks(
            progress=lambda _, done, total: progress(what, done, total),
            chunk_bytes=chunk_bytes,
            skip_header=True,
        )

    counted = _counted_rows(chunks("finding conversions"), header, label, summary)
    impressions, events = PartWriter(out / "impressions"), PartWriter(out / "events")
    campaigns: set[str] = set()
    for frame in _impressions(chunks("writing impressions"), header, counted, label, keep):
        impressions.write(frame)
        events.write(_events(frame))
        summary.rows += len(frame)
        summary.clicks += int(frame["click"].sum())
        summary.conversions += int(frame["conversion"].sum())
        campaigns.update(frame["item_id"].unique().to_list())
    _require_rows(summary, file)
    impressions.close()
    events.close()
    write_frame(pl.DataFrame({"item_id": sorted(campaigns)}), out / "items.parquet")
    summary.campaigns = len(campaigns)
    return summary


def _counted_rows(
    chunks: Iterator[Chunk], header: tuple[str, ...], label: str, summary: CriteoSummary
) -> Ints:
    """Numbers of the rows at which a conversion counts, ascending, from 0."""
    marked, first = _Marked(), 0
    for chunk in chunks:
        lines = chunk.fields("\t", header)
        is_click, is_marked = (flag == 1 for flag in _flags(chunk, lines, label))
        summary.published_conversions += int(is_marked.sum())
        summary.unclicked += int((is_marked & ~is_click).sum())
        times = chunk.integers(lines["timestamp"], name="timestamp").to_numpy()
        ids = chunk.integers(lines["conversion_id"], name="conversion_id").to_numpy()
        rows = np.flatnonzero((is_click & is_marked).to_numpy())
        marked.rows.append(rows + first)
        marked.ids.append(ids[rows])
        marked.times.append(times[rows])
        first += len(lines)
    empty = [np.empty(0, np.int64)]
    rows, ids, times = (
        np.concatenate(parts + empty) for parts in (marked.rows, marked.ids, marked.times)
    )
    is_alone = ids < 0
    summary.without_id = int(is_alone.sum())
    order = np.lexsort((rows, times, ids))
    order = order[~is_alone[order]]
    is_last = np.ones(len(order), np.bool_)
    is_last[:-1] = ids[order][1:] != ids[order][:-1]
    summary.repeated = int((~is_last).sum())
    return np.sort(np.concatenate([rows[order[is_last]], rows[is_alone]]))


def _flags(chunk: Chunk, lines: pl.DataFrame, label: str) -> tuple[pl.Series, pl.Series]:
    """Click, and the mark that is the label's."""
    name = "attribution" if label == "attributed" else "conversion"
    flags = {n: chunk.flags(lines[n], name=n) for n in ("click", "conversion", "attribution")}
    return flags["click"], flags[name]


def _impressions(
    chunks: Iterator[Chunk], header: tuple[str, ...], counted: Ints, label: str, keep: float
) -> Iterator[pl.DataFrame]:
    first = 0
    for chunk in chunks:
        lines = chunk.fields("\t", header)
        rows = np.arange(first, first + len(lines))
        first += len(lines)
        conversion = pl.Series(np.isin(rows, counted, assume_unique=True))
        happened = chunk.integers(lines["conversion_timestamp"], name="conversion_timestamp")
        since = chunk.numbers(lines["time_since_last_click"], name="time_since_last_click")
        user = lines["uid"]
        frame = pl.DataFrame(
            {
                "user_id": user,
                "item_id": lines["campaign"],
                "time": chunk.integers(lines["timestamp"], name="timestamp"),
                "click": _flags(chunk, lines, label)[0],
                "conversion": conversion.cast(pl.Int8),
                "conversion_time": happened.set(~conversion | (happened < 0), None),
                "time_since_last_click": since.set(since < 0, None).cast(pl.Float32),
                **{name: lines[name].set(lines[name] == "", None) for name in CATEGORIES},
            }
        )
        if keep < 1.0:
            hashes = pl.Series(hash_ids(canonical_ids(user.to_list())))
            frame = frame.filter(is_kept(hashes, share=keep))
        yield frame


def _events(frame: pl.DataFrame) -> pl.DataFrame:
    """Clicks at the impression's time, conversions at their own; by impression."""
    columns = ("user_id", "item_id", "time", "event")
    frame = frame.with_row_index("_row")
    clicks = frame.filter(pl.col("click") == 1).with_columns(event=pl.lit("click"))
    bought = frame.filter(pl.col("conversion_time").is_not_null())
    bought = bought.with_columns(time=pl.col("conversion_time"), event=pl.lit("conversion"))
    both = pl.concat([clicks.select("_row", *columns), bought.select("_row", *columns)])
    return both.sort("_row", maintain_order=True).drop("_row")


def _require_rows(summary: CriteoSummary, file: PublishedFile) -> None:
    if not summary.rows:
        raise LogError(f"{file.name}: no rows to write", path=file.path)
