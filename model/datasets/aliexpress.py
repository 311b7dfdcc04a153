"""The AliExpress searching system's log (one country) as impressions and pages' user attributes.

Published per country as `nl_item_train.csv`, `nl_user_train.csv` and likewise `test`, each in a zip
of its own, without header. A user row is one search result page; item rows name it. There is no
user, no item and no clock: the page stands for the user, an item is the number of its row, `time`
is one day per file. Columns are named by file and number: `user_2` to `user_33`, `item_2` to
`item_48`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    split_names,
)

COUNTRIES = ("NL", "ES", "FR", "US", "RU")
FOLDS = ("train", "test")
DAY_S = 86_400
USER_COLUMNS = ("search_id", *(f"user_{k}" for k in range(2, 34)))
ITEM_COLUMNS = ("search_id", *(f"item_{k}" for k in range(2, 49)), "label")
CATEGORICAL = frozenset(
    [f"user_{k}" for k in (*range(2, 9), 32, 33)]
    + [f"item_{k}" for k in (19, 34, 35, 36, 40, 41, 42)]
)


@dataclass(kw_only=True)
class AliExpressSummary:
    """What was written, by split: impressions, clicks, conversions; and pages.

    Attributes:
        without_page: impressions whose page has no user row; its attributes are missing.
    """

    rows: dict[str, int] = field(default_factory=dict)
    clicks: dict[str, int] = field(default_factory=dict)
    conversions: dict[str, int] = field(default_factory=dict)
    pages: int = 0
    without_page: int = 0


def write_aliexpress(
    source: Path,
    out: Path,
    *,
    country: str | None = None,
    keep: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress,
) -> AliExpressSummary:
    """Writes impressions/ and users/ (Parquet parts); memory is bounded by the number of pages.

    Args:
        source: directory with one country's files, or with a folder per country.
        out: made if it is not there.
        country: two letters; None takes the one whose files are there.
        keep: share of pages kept, by their id.
        chunk_bytes: of text, read at once; what is written does not depend on it.
        progress: told how far each file is read.

    Raises:
        LogError: a file is missing, several countries are there and none is named, or a line is
            not of the format.
    """
    prefix = country or _only_country(source)
    files = {
        (kind, fold): find_file(source, f"{prefix}_{kind}_{fold}.csv")
        for fold in FOLDS
        for kind in ("user", "item")
    }
    out.mkdir(parents=True, exist_ok=True)
    summary = AliExpressSummary()
    users, impressions = PartWriter(out / "users"), PartWriter(out / "impressions")
    pages: list[pl.Series] = []
    num_rows = 0
    for fold in FOLDS:
        chunks = files["user", fold].chunks(progress=progress, chunk_bytes=chunk_bytes)
        known = []
        for chunk in chunks:
            frame = _users(chunk, keep=keep)
            known.append(frame["user_id"])
            users.write(frame)
        pages += known
        shown = []
        chunks = files["item", fold].chunks(progress=progress, chunk_bytes=chunk_bytes)
        for lines, frame in _impressions(chunks, fold=fold, keep=keep, first_row=num_rows):
            num_rows += lines
            impressions.write(frame)
            shown.append(_count(frame, summary))
        summary.without_page += _without_page(shown, known)
    summary.pages = _refuse_repeats(pages, files["user", "train"])
    users.close()
    impressions.close()
    return summary


def schema_content() -> dict[str, Any]:  # Any: TOML values
    """The schema: the page's attributes are the user's, an item's are those of the pair."""
    features = []
    for name in (*USER_COLUMNS[1:], *ITEM_COLUMNS[1:-1]):
        feature: dict[str, Any] = {
            "name": name,
            "kind": "categorical" if name in CATEGORICAL else "numeric",
            "scope": "user" if name.startswith("user_") else "cross",
            "source": "request",
        }
        if name in CATEGORICAL:
            feature["min_count"] = 10
        features.append(feature)
    return {
        "log": {"request_id": "request_id", "split": "split"},
        "steps": [{"name": name, "label": name} for name in ("click", "conversion")],
        "features": features,
    }


def train_content() -> dict[str, Any]:  # Any: TOML values
    """A first run; requests carry everything, so that there is no record or id to leave out."""
    return {
        "data": {"impressions": "impressions", "users": "users", "schema_file": "schema.toml"},
        "net": {"architecture": "shared_bottom"},
        "objective": {"name": "e2e", "step_weights": [1.0, 2.0]},
        "optimizer": {"drop_record_share": 0.0, "drop_id_share": 0.0},
    }


def _only_country(source: Path) -> str:
    found = []
    reason: LogError | None = None
    for country in COUNTRIES:
        try:
            find_file(source, f"{country}_item_train.csv")
        except LogError as exc:
            reason = exc
        else:
            found.append(country)
    if len(found) > 1:
        raise LogError(
            f"{source} has files of {', '.join(found)}: name one with --country", path=source
        )
    if not found:
        raise LogError(
            f"{source} has no XX_item_train.csv of {', '.join(COUNTRIES)} (nor packed)", path=source
        ) from reason
    return found[0]


def _users(chunk: Chunk, *, keep: float) -> pl.DataFrame:
    lines = chunk.fields(",", USER_COLUMNS)
    columns = _typed(chunk, lines, USER_COLUMNS[1:])
    frame = pl.DataFrame({"user_id": _pages(chunk, lines), **columns})
    return frame.filter(is_kept(_hashes(frame["user_id"]), share=keep))


def _impressions(
    chunks: Iterator[Chunk], *, fold: str, keep: float, first_row: int
) -> Iterator[tuple[int, pl.DataFrame]]:
    """The number of lines and the kept impressions of each chunk."""
    for chunk in chunks:
        lines = chunk.fields(",", ITEM_COLUMNS)
        label = lines["label"]
        chunk.require(label.is_in(["0", "1", "2"]), label, name="label", expected="0, 1 or 2")
        page = _pages(chunk, lines)
        hashes = _hashes(page)
        is_test = fold == "test"
        frame = pl.DataFrame(
            {
                "user_id": page,
                "request_id": page,
                "item_id": pl.int_range(len(lines), eager=True) + first_row,
                "time": pl.Series([DAY_S if is_test else 0] * len(lines), dtype=pl.Int64),
                "split": pl.Series(["test"] * len(lines)) if is_test else split_names(hashes),
                "click": (label != "0").cast(pl.Int8),
                "conversion": (label == "2").cast(pl.Int8),
                **_typed(chunk, lines, ITEM_COLUMNS[1:-1]),
            }
        )
        first_row += len(lines)
        yield len(lines), frame.filter(is_kept(hashes, share=keep))


def _pages(chunk: Chunk, lines: pl.DataFrame) -> pl.Series:
    page = lines["search_id"]
    chunk.require(page != "", page, name="search id", expected="one")
    return page


def _hashes(texts: pl.Series) -> pl.Series:
    """uint64 of each text; each distinct one is hashed once."""
    distinct = texts.unique()
    table = pl.DataFrame({"v": distinct, "hash": hash_ids(canonical_ids(distinct.to_list()))})
    return texts.to_frame("v").join(table, on="v", how="left", maintain_order="left")["hash"]


def _typed(chunk: Chunk, lines: pl.DataFrame, names: tuple[str, ...]) -> dict[str, pl.Series]:
    """Categories as text, the others as numbers; what is empty is missing."""
    columns = {}
    for name in names:
        texts = lines[name]
        if name in CATEGORICAL:
            columns[name] = texts.set(texts == "", None)
        else:
            numbers = chunk.numbers(texts, name=name, is_required=False)
            columns[name] = numbers.cast(pl.Float32)
    return columns


def _count(frame: pl.DataFrame, summary: AliExpressSummary) -> pl.DataFrame:
    """Counts by split into the summary; impressions of each page are returned."""
    counts = frame.group_by("split").agg(
        pl.len().alias("rows"), pl.col("click", "conversion").cast(pl.Int64).sum()
    )
    for split, rows, clicks, conversions in counts.iter_rows():
        summary.rows[split] = summary.rows.get(split, 0) + rows
        summary.clicks[split] = summary.clicks.get(split, 0) + clicks
        summary.conversions[split] = summary.conversions.get(split, 0) + conversions
    return frame.group_by("user_id").agg(pl.len().alias("rows"))


def _without_page(shown: list[pl.DataFrame], known: list[pl.Series]) -> int:
    """Impressions of a fold whose page is not among its user rows."""
    if not shown or not known:
        return sum(int(part["rows"].sum()) for part in shown)
    pages = pl.concat(known).to_frame("user_id")
    return int(pl.concat(shown).join(pages, on="user_id", how="anti")["rows"].sum())


def _refuse_repeats(pages: list[pl.Series], file: PublishedFile) -> int:
    joined = pl.concat(pages) if pages else pl.Series("user_id", [], dtype=pl.String)
    repeats = joined.is_duplicated()
    if repeats.any():
        first = joined.filter(repeats)[0]
        raise LogError(f"{file.name}: search id {first!r} has two user rows", path=file.path)
    return len(joined)
