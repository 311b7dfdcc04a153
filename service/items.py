"""The item table: every item of a snapshot encoded once, found by item id.

Only arrays, in memory or mapped from a file that several workers share. Knows no request: what a
request says of its candidates is written over a copy by the scorer.
"""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract.blocks import CandidateBlock
from model.contract.columns import Columns
from model.contract.encode import Encoder
from model.contract.record import Keys
from service.item_index import Ids, ItemIndex, build_index
from service.item_sums import ItemSums
from service.mapped_file import MappedFile

Arrays = Mapping[str, npt.NDArray[Any]]  # Any: dtypes differ by array

_MAGIC = b"ctr-items-1\n"
_ALIGNMENT = 64  # bytes: a cache line
_NO_TIME = np.zeros(1, np.float64)


@dataclass(frozen=True, kw_only=True)
class CandidateRows:
    """Encoded rows of one request's candidates; copies, which the caller may write to.

    Attributes:
        block: Ids int64 [N, F] and dense float32 [N, D]; features that are not the item's hold
            their defaults. Its sums are there if the table has them, see `renew_sums`.
        keys: uint64 [N, M], key hash of the candidate's attribute per match feature.
        is_known: bool [N], False where the snapshot has no such item.
    """

    block: CandidateBlock
    keys: Keys
    is_known: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ItemRows:
    """The encoded rows, in the order of the index, and one of defaults at the end.

    Attributes:
        ids: [n + 1, F] int32, or int64 if a code does not fit.
        dense: float32 [n + 1, D].
        keys: uint64 [n + 1, M].
        sums: float32 [n + 1, H], or None for a model that reads none.
    """

    ids: npt.NDArray[Any]
    dense: npt.NDArray[np.float32]
    keys: Keys
    sums: npt.NDArray[np.float32] | None = None


class ItemTable:
    """Encoded items and one row of defaults for every other item. Immutable."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        index: ItemIndex,
        rows: ItemRows,
        item_sums: ItemSums | None = None,
        file: MappedFile | None = None,
        as_of: float | None = None,
    ) -> None:
        """Takes what `load_item_table` built.

        Args:
            encoder: The one that encoded the rows.
            index: Says which row an item has.
            rows: Made read-only.
            item_sums: What the rows' sums were made by; None if there are none.
            file: In which index and rows lie, if they do.
            as_of: Time of the snapshot, unix seconds; None for a table of none.
        """
        self.file = file
        self.as_of = as_of
        self._encoder = encoder
        self._index = index
        self._ids, self._dense, self._keys = rows.ids, rows.dense, rows.keys
        self._sums, self._item_sums = rows.sums, item_sums
        self.summed_features = frozenset() if item_sums is None else item_sums.features
        for array in self._arrays():
            array.setflags(write=False)

    def __len__(self) -> int:
        """Number of items, without the default row."""
        return self._index.num_items

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, those of the index of ids included."""
        index = self._index
        arrays = (*self._arrays(), index.starts, index.keys, index.checks)
        return sum(array.nbytes for array in arrays)

    @property
    def num_sum_bytes(self) -> int:
        """Those of them that hold sums."""
        return 0 if self._sums is None else self._sums.nbytes

    def take(self, item_ids: Ids) -> CandidateRows:
        """Rows of the items, in the order asked.

        An item that is not in the table has defaults, but for what is made from its id alone:
        the feature whose raw column is the item id column, and match keys on that column.

        Args:
            item_ids: Canonical ids, all of them text or all integers; repeats allowed.

        Raises:
            EncodeError: A feature made from the item id cannot be made from this one.
        """
        rows = self._index.find(item_ids)
        # All rows are there; "clip" copies without a second buffer.
        sums = self._sums
        block = CandidateBlock(
            ids=self._ids.take(rows, axis=0, mode="clip").astype(np.int64, copy=False),
            dense=self._dense.take(rows, axis=0, mode="clip"),
            item_sum=None if sums is None else sums.take(rows, axis=0, mode="clip"),
        )
        keys = self._keys.take(rows, axis=0, mode="clip")
        is_known = rows != self._index.num_items
        if not is_known.all():
            self._write_unknown(block, keys, item_ids, np.flatnonzero(~is_known))
        return CandidateRows(block=block, keys=keys, is_known=is_known)

    def renew_sums(self, block: CandidateBlock, rows: npt.NDArray[np.intp]) -> None:
        """Makes the sums of some candidates anew, in place.

        To be done where an item is not known or one of `summed_features` has been written over,
        once all has been written.
        """
        assert block.item_sum is not None
        assert self._item_sums is not None
        block.item_sum[rows] = self._item_sums.of(block.take(rows))

    def _arrays(self) -> list[npt.NDArray[Any]]:
        sums = [] if self._sums is None else [self._sums]
        return [self._ids, self._dense, self._keys, *sums]

    def _write_unknown(
        self, block: CandidateBlock, keys: Keys, item_ids: Ids, rows: npt.NDArray[np.intp]
    ) -> None:
        columns: Columns = {self._encoder.schema.log.item_id: [item_ids[row] for row in rows]}
        unknown = CandidateBlock(ids=block.ids[rows], dense=block.dense[rows])
        self._encoder.overwrite_candidates(unknown, columns)
        block.ids[rows], block.dense[rows] = unknown.ids, unknown.dense
        keys[rows] = self._encoder.match_keys(columns, num_rows=len(rows))


def empty_item_table(encoder: Encoder) -> ItemTable:
    """A table without items: everything is scored by its id and what the request says."""
    index, _ = build_index([])
    rows = ItemRows(**{name: np.empty(*spec) for name, spec in row_specs(encoder, 0).items()})
    write_default_row(encoder, rows)
    return ItemTable(encoder, index=index, rows=rows)


def row_specs(
    encoder: Encoder, num_items: int, *, item_sums: ItemSums | None = None
) -> dict[str, tuple[tuple[int, int], "np.dtype[Any]"]]:
    """Shape and dtype of each array of `ItemRows` for a table of `num_items`."""
    layout = encoder.candidate_layout
    largest_code = max((encoder.table_size(name) for name in layout.ids), default=0)
    fits = largest_code <= np.iinfo(np.int32).max
    height = num_items + 1
    specs: dict[str, tuple[tuple[int, int], np.dtype[Any]]] = {
        "ids": ((height, len(layout.ids)), np.dtype(np.int32 if fits else np.int64)),
        "dense": ((height, len(layout.dense_columns)), np.dtype(np.float32)),
        "keys": ((height, len(layout.matches)), np.dtype(np.uint64)),
    }
    if item_sums is not None:
        specs["sums"] = ((height, item_sums.width), np.dtype(np.float32))
    return specs


def write_default_row(encoder: Encoder, rows: ItemRows) -> None:
    """Writes the last row: an item of which nothing is known, not even its id."""
    default = encoder.candidate_block({}, time=_NO_TIME)
    rows.ids[-1], rows.dense[-1] = default.ids[0], default.dense[0]
    rows.keys[-1] = encoder.match_keys({}, num_rows=1)[0]


def create_item_file(
    path: Path,
    *,
    index: ItemIndex,
    encoder: Encoder,
    item_sums: ItemSums | None = None,
    as_of: float | None = None,
) -> ItemRows:
    """Makes the file of a table, index written, and returns its rows, mapped, to be filled.

    The file is whole once the rows have been written: give it its name only then.

    Raises:
        OSError: There is no room, or it cannot be written.
    """
    index_arrays = {"starts": index.starts, "index_keys": index.keys, "checks": index.checks}
    specs = {name: (array.shape, array.dtype) for name, array in index_arrays.items()}
    specs |= row_specs(encoder, index.num_items, item_sums=item_sums)
    entries, offset = {}, 4096
    for name, (shape, dtype) in specs.items():
        entries[name] = {"offset": offset, "shape": list(shape), "dtype": dtype.str}
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    header = {
        "num_items": index.num_items,
        "seed": index.seed,
        "window": index.window,
        "arrays": entries,
        "as_of": as_of,
    }
    with path.open("wb+") as file:
        file.truncate(offset)
        if hasattr(os, "posix_fallocate"):
            # Without it a mapped page for which there is no room would kill the process.
            os.posix_fallocate(file.fileno(), 0, offset)
        file.write(_MAGIC + json.dumps(header).encode() + b"\n")
        file.flush()
        arrays = _arrays(mmap.mmap(file.fileno(), 0), entries)
    for name, array in index_arrays.items():
        arrays[name][...] = array
    return _rows(arrays)


def map_item_file(path: Path, encoder: Encoder, *, item_sums: ItemSums | None = None) -> ItemTable:
    """The table in a file, read where it lies: processes that map it hold it once together.

    The table's `file` is to be closed, by a thread, once nobody uses the table any more.

    Args:
        path: Made by `create_item_file`, its rows by an equal encoder.
        encoder: Of the bundle.
        item_sums: Of the bundle; None for a file that was made without.

    Raises:
        OSError: It cannot be mapped.
        ValueError: It is another kind of file, or has sums and should have none, or the other way.
    """
    file = MappedFile(path)
    if file.memory.readline() != _MAGIC:
        file.close()
        raise ValueError(f"{path} is no item table of this version")
    header = json.loads(file.memory.readline())
    if ("sums" in header["arrays"]) != (item_sums is not None):
        file.close()
        raise ValueError(f"{path} is an item table for another form of the model")
    arrays = _arrays(file.memory, header["arrays"])
    index = ItemIndex(
        num_items=header["num_items"],
        seed=header["seed"],
        window=header["window"],
        starts=arrays["starts"],
        keys=arrays["index_keys"],
        checks=arrays["checks"],
    )
    return ItemTable(
        encoder,
        index=index,
        rows=_rows(arrays),
        item_sums=item_sums,
        file=file,
        as_of=header["as_of"],
    )


def _rows(arrays: Arrays) -> ItemRows:
    return ItemRows(
        ids=arrays["ids"], dense=arrays["dense"], keys=arrays["keys"], sums=arrays.get("sums")
    )


def _arrays(mapped: mmap.mmap, entries: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    arrays = {}
    for name, entry in entries.items():
        count = int(np.prod(entry["shape"], dtype=np.int64))
        flat = np.frombuffer(mapped, entry["dtype"], count, entry["offset"])
        arrays[name] = flat.reshape(entry["shape"])
    return arrays
