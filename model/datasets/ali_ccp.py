"""Ali-CCP (Alibaba Click and Conversion Prediction) as impression log, user versions and items.

Published as `sample_skeleton_{train,test}.csv` and `common_features_{train,test}.csv` (in
`sample_train.tar.gz` and `sample_test.tar.gz`), without header; features are joined by the control
characters 1, 2 and 3: `field 2 id 3 value 1 field 2 id 3 value ...`. A line of the common features
is the user's side of one request, its md5-like index is what skeleton lines name.

The data have no clock: `time` is the number of the common features' line, test after train. Rows
with a conversion and no click are dropped, as all public readers do. Validation and calibration
come out of train by user, so that no user is in two of the three.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from model.contract.errors import LogError
from model.contract.ids import canonical_ids, hash_ids
from model.datasets.bags import Bags, first_values, heaviest, slot_lists
from model.datasets.published import (
    CHUNK_BYTES,
    Chunk,
    PartWriter,
    Progress,
    PublishedFile,
    find_file,
    is_kept,
    shorten,
    split_names,
    write_frame,
)

FOLDS = ("train", "test")
# One id each; of a field with a match's strength the value is kept, too.
USER_FIELDS = {
    "101": "user_id",
    "121": "profile_category",
    "122": "profile_group",
    "124": "gender",
    "125": "age",
    "126": "consumption_1",
    "127": "consumption_2",
    "128": "occupation",
    "129": "geography",
}
ITEM_FIELDS = {
    "205": "item_id",
    "206": "category",
    "207": "shop",
    "216": "brand",
    "301": "position",
}
CROSS_FIELDS = {"508": "category_cross", "509": "shop_cross", "702": "brand_cross"}
# Many weighted ids each.
USER_BAGS = {
    "109_14": "past_categories",
    "110_14": "past_shops",
    "127_14": "past_brands",
    "150_14": "past_nodes",
}
CANDIDATE_BAGS = {"210": "node", "853": "node_cross"}
ITEM_COLUMNS = ("category", "shop", "brand", "node_1", "node_2", "node_3", "count_of_node")
NUM_HEAVIEST = 3
USER_PART_ROWS = 50_000
SKELETON = ("sample_id", "click", "conversion", "index", "feature_num", "features")
COMMON = ("index", "feature_num", "features")


@dataclass(kw_only=True)
class AliCcpSummary:
    """What was read and written.

    Attributes:
        rows, clicks, conversions: written, by split.
        broken_chain: rows with a conversion and no click, dropped.
        repeated: entries left out as a field of one value had a second.
        unknown_fields: entries of fields that this reader does not know, left out.
        wrong_counts: lines whose feature_num is not the number of their entries.
    """

    rows: dict[str, int] = field(default_factory=dict)
    clicks: dict[str, int] = field(default_factory=dict)
    conversions: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    items: int = 0
    broken_chain: int = 0
    repeated: int = 0
    unknown_fields: int = 0
    wrong_counts: int = 0
    positions: dict[int, int] = field(default_factory=dict)


def write_ali_ccp(
    source: Path,
    out: Path,
    *,
    slots: int = 50,
    keep: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress,
) -> AliCcpSummary:
    """Writes impressions/, users/ (Parquet parts) and items.parquet.

    Memory is bounded by the number of requests and of items, not of rows. A history of the user
    has `slots` places, see `bags.slot_lists`.

    Args:
        source: directory with the published files.
        out: made if it is not there.
        slots: places of each of the user's histories.
        keep: share of users kept, by their id.
        chunk_bytes: of text, read at once; what is written does not depend on it.
        progress: told how far each file is read.

    Raises:
        LogError: a file is missing, or a line is not of the format.
    """
    files = {name: _find(source, *name) for name in _names()}
    out.mkdir(parents=True, exist_ok=True)
    summary = AliCcpSummary()
    impressions = PartWriter(out / "impressions")
    users = PartWriter(out / "users", part_rows=USER_PART_ROWS)
    items = _Items()
    for fold in FOLDS:
        requests = []
        chunks = files["common_features", fold].chunks(progress=progress, chunk_bytes=chunk_bytes)
        for made, frame in _common(chunks, fold=fold, slots=slots, keep=keep, summary=summary):
            requests.append(made)
            users.write(frame)
        known = _known_requests(requests, files["common_features", fold])
        chunks = files["sample_skeleton", fold].chunks(progress=progress, chunk_bytes=chunk_bytes)
        for frame in _skeleton(chunks, known, summary=summary):
            impressions.write(frame)
            items.add(frame)
    users.close()
    impressions.close()
    table = items.table()
    write_frame(table, out / "items.parquet")
    summary.items = len(table)
    return summary


def _names() -> list[tuple[str, str]]:
    return [(name, fold) for fold in FOLDS for name in ("common_features", "sample_skeleton")]


def _find(source: Path, name: str, fold: str) -> PublishedFile:
    return find_file(source, f"{name}_{fold}.csv", archives=(f"sample_{fold}.tar.gz",))


def _common(
    chunks: Iterator[Chunk], *, fold: str, slots: int, keep: float, summary: AliCcpSummary
) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Of each chunk: its requests (index, user, time, split, kept), and the kept user versions."""
    for chunk in chunks:
        lines = chunk.fields(",", COMMON)
        bags = _bags(chunk, lines, (*USER_FIELDS, *USER_BAGS), summary)
        columns = _scalars(bags, USER_FIELDS, summary)
        chunk.require(
            columns["user_id"].is_not_null(), lines["features"], name="features", expected="a 101"
        )
        hashes = pl.Series(hash_ids(canonical_ids(columns["user_id"].to_list())))
        is_test = fold == "test"
        split = pl.Series(["test"] * len(lines)) if is_test else split_names(hashes)
        made = pl.DataFrame(
            {
                "index": lines["index"],
                "user_id": columns["user_id"],
                "time": pl.int_range(len(lines), eager=True) + summary.requests,
                "split": split,
                "is_kept": is_kept(hashes, share=keep),
            }
        )
        summary.requests += len(lines)
        for number, name in USER_BAGS.items():
            bag = bags[number]
            columns[name] = slot_lists(bag, slots=slots)
            columns[f"top_of_{name}"] = heaviest(bag, 1)[0]
            columns[f"count_of_{name}"] = pl.Series(bag.counts)
            columns[f"weight_of_{name}"] = pl.Series(bag.totals)
        version = made.select("user_id", "time").hstack(
            pl.DataFrame({name: c for name, c in columns.items() if name != "user_id"})
        )
        yield made, version.filter(made["is_kept"])


def _known_requests(parts: list[pl.DataFrame], file: PublishedFile) -> pl.DataFrame:
    if not parts:
        raise LogError(f"{file.name} has no lines", path=file.path)
    known = pl.concat(parts)
    repeats = known["index"].is_duplicated()
    if repeats.any():
        first = known["index"].filter(repeats)[0]
        raise LogError(f"{file.name}: index {first!r} is there twice", path=file.path)
    return known


def _skeleton(
    chunks: Iterator[Chunk], requests: pl.DataFrame, *, summary: AliCcpSummary
) -> Iterator[pl.DataFrame]:
    """Impressions of each chunk."""
    for chunk in chunks:
        lines = chunk.fields(",", SKELETON)
        click = chunk.flags(lines["click"], name="click")
        conversion = chunk.flags(lines["conversion"], name="conversion")
        sample = chunk.integers(lines["sample_id"], name="sample_id")
        request = lines.select("index").join(
            requests, on="index", how="left", maintain_order="left"
        )
        chunk.require(
            request["time"].is_not_null(),
            lines["index"],
            name="common_feature_index",
            expected="one of the common features",
        )
        bags = _bags(chunk, lines, (*ITEM_FIELDS, *CROSS_FIELDS, *CANDIDATE_BAGS), summary)
        columns = _scalars(bags, ITEM_FIELDS, summary)
        chunk.require(
            columns["item_id"].is_not_null(), lines["features"], name="features", expected="a 205"
        )
        columns |= _candidate_columns(bags, summary)
        frame = pl.DataFrame(
            {
                "user_id": request["user_id"],
                "time": request["time"],
                "request_id": request["time"],
                "split": request["split"],
                "sample_id": sample,
                "click": click,
                "conversion": conversion,
                **columns,
            }
        )
        is_intact = click >= conversion
        summary.broken_chain += int((request["is_kept"] & ~is_intact).sum())
        frame = frame.filter(request["is_kept"] & is_intact)
        _count(frame, summary)
        yield frame


def _bags(
    chunk: Chunk, lines: pl.DataFrame, fields: tuple[str, ...], summary: AliCcpSummary
) -> dict[str, Bags]:
    """The entries of the lines' feature lists, by field.

    Raises:
        LogError: an entry is not of the form, or a value no number of 0 or more.
    """
    given = chunk.integers(lines["feature_num"], name="feature_num")
    texts = lines["features"]
    entries = (
        pl.DataFrame({"row": np.arange(len(lines)), "text": texts.str.split("\x01")})
        .filter(texts != "")
        .explode("text")
    )
    row = entries["row"].to_numpy()
    summary.wrong_counts += int((np.bincount(row, minlength=len(lines)) != given.to_numpy()).sum())
    halves = entries["text"].str.split_exact("\x02", 1).struct.rename_fields(["field", "rest"])
    pair = halves.struct.field("rest").str.split_exact("\x03", 1)
    pair = pair.struct.rename_fields(["id", "value"])
    ids = pair.struct.field("id").cast(pl.Int64, strict=False)
    values = pair.struct.field("value").cast(pl.Float64, strict=False)
    fits = (ids.is_not_null() & values.is_finite() & (values >= 0)).fill_null(False)
    if not fits.all():
        bad = int((~fits).arg_max() or 0)
        raise chunk.refuse(
            int(row[bad]),
            f"feature {shorten(entries['text'][bad])}: expected field \\x02 id \\x03 value, an "
            "integer id and a value of 0 or more",
        )
    code = halves.struct.field("field").replace_strict(
        list(fields), list(range(len(fields))), default=len(fields), return_dtype=pl.UInt8
    )
    codes, id_array, value_array = code.to_numpy(), ids.to_numpy(), values.to_numpy()
    summary.unknown_fields += int((codes == len(fields)).sum())
    return {
        name: _bag(codes == k, row, id_array, value_array, len(lines))
        for k, name in enumerate(fields)
    }


def _bag(
    mask: npt.NDArray[np.bool_],
    row: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    num_rows: int,
) -> Bags:
    return Bags(rows=row[mask], ids=ids[mask], weights=values[mask], num_rows=num_rows)


def _scalars(
    bags: dict[str, Bags], names: dict[str, str], summary: AliCcpSummary
) -> dict[str, pl.Series]:
    columns = {}
    for number, name in names.items():
        columns[name], _, more = first_values(bags[number])
        summary.repeated += more
    return columns


def _candidate_columns(bags: dict[str, Bags], summary: AliCcpSummary) -> dict[str, pl.Series]:
    columns = {}
    for number, name in CROSS_FIELDS.items():
        columns[name], columns[f"{name}_value"], more = first_values(bags[number])
        summary.repeated += more
    for number, name in CANDIDATE_BAGS.items():
        bag = bags[number]
        for k, series in enumerate(heaviest(bag, NUM_HEAVIEST), start=1):
            columns[f"{name}_{k}"] = series
        columns[f"count_of_{name}"] = pl.Series(bag.counts)
        columns[f"weight_of_{name}"] = pl.Series(bag.totals)
    return columns


def _count(frame: pl.DataFrame, summary: AliCcpSummary) -> None:
    counts = frame.group_by("split").agg(
        pl.len().alias("rows"), pl.col("click", "conversion").cast(pl.Int64).sum()
    )
    for split, rows, clicks, conversions in counts.iter_rows():
        summary.rows[split] = summary.rows.get(split, 0) + rows
        summary.clicks[split] = summary.clicks.get(split, 0) + clicks
        summary.conversions[split] = summary.conversions.get(split, 0) + conversions
    for position, rows in frame["position"].drop_nulls().value_counts().iter_rows():
        summary.positions[position] = summary.positions.get(position, 0) + rows


class _Items:
    """Every item's attributes, the last seen."""

    def __init__(self) -> None:
        self._parts: list[pl.DataFrame] = []
        self._num_pending = self._num_known = 0

    def add(self, frame: pl.DataFrame) -> None:
        part = frame.select("item_id", *ITEM_COLUMNS)
        part = part.unique("item_id", keep="last", maintain_order=True)
        self._parts.append(part)
        self._num_pending += len(part)
        # Merging costs the table; so it waits until there is as much to add again.
        if self._num_pending > max(self._num_known, 200_000):
            self._parts = [self.table()]
            self._num_known, self._num_pending = len(self._parts[0]), 0

    def table(self) -> pl.DataFrame:
        joined = pl.concat(self._parts)
        return joined.unique("item_id", keep="last").sort("item_id")
