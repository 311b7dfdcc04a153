"""Finds table rows by item id, in arrays alone: so workers can share the index as a mapped file.

Ids are hashed to several times as many buckets, and rows lie in bucket order: a look-up reads, for
all ids of a request at once, the key of its bucket's first row, and if need be those that follow.
The keys are the ids themselves where all of them are 64-bit integers, else 128-bit digests of their
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Ids = Sequence[str] | Sequence[int]
Rows = npt.NDArray[np.intp]
Words = npt.NDArray[np.uint64]

_WORD_BITS = 64
_NUM_TRIES = 8
_EXTRA_BITS = 2  # four to eight buckets an item: few items share one
_GOOD_WINDOW = 10  # of a million ids without a pattern at most 6 share a bucket
# Odd, so that multiplying is a bijection of 64-bit words: equal products mean equal ids.
_MULTIPLIER = 0x9E3779B97F4A7C15


class DuplicateIdError(ValueError):
    """An id is there twice; `row` is where it is met again first."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}: the id is there twice")
        self.row = row


@dataclass(frozen=True, kw_only=True)
class ItemIndex:
    """Immutable; safe to share between threads.

    Attributes:
        num_items: Rows are 0 to num_items - 1.
        seed: Of the digests; for integers the odd multiplier.
        window: Most ids in one bucket.
        starts: int32 [2 ** k], the first row of each bucket.
        keys: [num_items + window] by row, and then as many repeats of the last: int64 ids, or
            uint64 first halves of digests.
        checks: uint64 [num_items], second halves of digests; empty for integers.
    """

    num_items: int
    seed: int
    window: int
    starts: npt.NDArray[np.int32]
    keys: npt.NDArray[Any]  # Any: int64 or uint64
    checks: Words

    @property
    def has_integers(self) -> bool:
        """Whether every id of the table is an integer of 64 bits."""
        return self.keys.dtype == np.int64

    def find(self, item_ids: Ids) -> Rows:
        """Row of each id, `num_items` for one that is not in the table; intp [N].

        An integer id is never taken for another. For text the chance is that of two equal 128-bit
        digests: below 1e-31 for a table of a million items.

        Args:
            item_ids: Canonical ids, all of them text or all integers; repeats allowed.
        """
        if not self.num_items or not len(item_ids):
            return np.full(len(item_ids), self.num_items, np.intp)
        if self.has_integers:
            return self._find_integers(item_ids)
        return self._find_digests(_digests(_texts(item_ids), self.seed))

    def _find_integers(self, item_ids: Ids) -> Rows:
        try:
            if isinstance(item_ids[0], int):
                return self._find_keys(np.array(item_ids, np.int64))
            numbers = list(map(int, item_ids))
            # "07" and "1_0" are numbers to Python, and other ids than "7" and "10".
            if list(map(str, numbers)) == item_ids:
                return self._find_keys(np.array(numbers, np.int64))
        except (OverflowError, ValueError):
            pass
        rows = np.full(len(item_ids), self.num_items, np.intp)
        known = {i: number for i, x in enumerate(item_ids) if (number := _integer(x)) is not None}
        if known:
            rows[list(known)] = self._find_keys(np.array(list(known.values()), np.int64))
        return rows

    def _find_keys(self, ids: npt.NDArray[np.int64]) -> Rows:
        rows, missing = self._rows_of(ids.view(np.uint64) * self._multiplier, ids)
        rows[missing] = self.num_items
        return rows

    def _find_digests(self, digests: Words) -> Rows:
        first = np.ascontiguousarray(digests[:, 0])
        rows, missing = self._rows_of(first, first)
        # A row of the padding is never a match, and has no check.
        rows[self.checks.take(rows, mode="clip") != digests[:, 1]] = self.num_items
        rows[missing] = self.num_items
        return rows

    def _rows_of(self, hashes: Words, keys: npt.NDArray[Any]) -> tuple[Rows, Rows]:
        """Row of each key, and which of the keys have none."""
        rows: Rows = self.starts.take((hashes >> self._shift).view(np.int64)).astype(np.intp)
        missing: Rows = (self.keys.take(rows) != keys).nonzero()[0]
        # Nearly all stand first in their bucket; the few others are looked for step by step.
        for _ in range(1, self.window):
            if not len(missing):
                break
            rows[missing] += 1
            missing = missing[self.keys.take(rows[missing]) != keys[missing]]
        return rows, missing

    # Made once: numpy's scalars and small arrays cost as much as a step of the look-up.
    @cached_property
    def _multiplier(self) -> np.uint64:
        return np.uint64(self.seed)

    @cached_property
    def _shift(self) -> np.uint64:
        return np.uint64(_WORD_BITS - (len(self.starts).bit_length() - 1))


def build_index(ids: npt.NDArray[np.int64] | Sequence[str]) -> tuple[ItemIndex, Rows]:
    """Builds the index; O(n log n).

    Args:
        ids: int64, or the canonical texts if one of them is no such integer.

    Returns:
        The index, and which of `ids` each of its rows is, intp [n].

    Raises:
        DuplicateIdError: An id is there twice.
    """
    if not len(ids):
        return _empty_index(ids), np.empty(0, np.intp)
    if isinstance(ids, np.ndarray):
        return _build_integers(ids)
    for seed in range(_NUM_TRIES):
        digests = _digests(ids, seed)
        order = np.argsort(digests[:, 0], kind="stable")
        same = _same_as_before(digests[:, 0], order)
        twice = [row for before, row in same if ids[before] == ids[row]]
        if twice:
            raise DuplicateIdError(min(twice))
        if not same:
            first = digests[order, 0]
            starts, window = _buckets(first)
            return ItemIndex(
                num_items=len(ids),
                seed=seed,
                window=window,
                starts=starts,
                keys=_pad(first, window),
                checks=digests[order, 1].copy(),
            ), order
    raise AssertionError("digests of different ids were equal for every seed")


def _build_integers(ids: npt.NDArray[np.int64]) -> tuple[ItemIndex, Rows]:
    best: tuple[int, int, npt.NDArray[np.int32], Rows] | None = None
    for number in range(_NUM_TRIES):
        # Ids with a pattern may crowd a few buckets under one multiplier; hardly under all.
        multiplier = pow(_MULTIPLIER, 2 * number + 1, 1 << _WORD_BITS)
        products = _products(ids, multiplier)
        order = np.argsort(products, kind="stable")
        if not number and (same := _same_as_before(products, order)):
            raise DuplicateIdError(min(row for _, row in same))
        starts, window = _buckets(products[order])
        if best is None or window < best[0]:
            best = window, multiplier, starts, order
        if window <= _GOOD_WINDOW:
            break
    assert best is not None  # The first try has set it.
    window, multiplier, starts, order = best
    return ItemIndex(
        num_items=len(ids),
        seed=multiplier,
        window=window,
        starts=starts,
        keys=_pad(ids[order], window),
        checks=np.empty(0, np.uint64),
    ), order


def _empty_index(ids: npt.NDArray[np.int64] | Sequence[str]) -> ItemIndex:
    return ItemIndex(
        num_items=0,
        seed=0,
        window=0,
        starts=np.zeros(1, np.int32),
        keys=np.empty(0, np.int64 if isinstance(ids, np.ndarray) else np.uint64),
        checks=np.empty(0, np.uint64),
    )


def _buckets(hashes: Words) -> tuple[npt.NDArray[np.int32], int]:
    """First position of each bucket in the sorted hashes, and the size of the fullest."""
    bits = _EXTRA_BITS + max(1, (len(hashes) - 1).bit_length())
    buckets = (hashes >> np.uint64(_WORD_BITS - bits)).view(np.int64)
    counts = np.bincount(buckets, minlength=1 << bits)
    starts = np.cumsum(counts) - counts
    # An empty bucket behind the last key starts where the last key is: in bounds, and no match.
    return np.minimum(starts, len(hashes) - 1).astype(np.int32), int(counts.max())


def _pad(keys: npt.NDArray[Any], window: int) -> npt.NDArray[Any]:
    return np.concatenate([keys, np.full(window, keys[-1])])


def _same_as_before(hashes: Words, order: Rows) -> list[tuple[int, int]]:
    ordered = hashes[order]
    places = np.flatnonzero(ordered[1:] == ordered[:-1])
    return list(zip(order[places].tolist(), order[places + 1].tolist(), strict=True))


def _products(ids: npt.NDArray[np.int64], multiplier: int) -> Words:
    return ids.view(np.uint64) * np.uint64(multiplier)


def _digests(ids: Sequence[str], seed: int) -> Words:
    try:
        data = b"".join(map(xxhash.xxh3_128_digest, map(str.encode, ids), repeat(seed)))
    except UnicodeEncodeError:
        # Lone surrogates: not what valid text is encoded to, so they equal no other id.
        encoded = [value.encode("utf-8", "surrogatepass") for value in ids]
        data = b"".join(map(xxhash.xxh3_128_digest, encoded, repeat(seed)))
    return np.frombuffer(data, np.uint64).reshape(-1, 2)


def _texts(item_ids: Ids) -> Sequence[str]:
    return item_ids if isinstance(item_ids[0], str) else list(map(str, item_ids))  # type: ignore[return-value]  # all are text


def _integer(item_id: object) -> int | None:
    try:
        number = int(str(item_id))
    except ValueError:
        return None
    is_canonical = str(number) == str(item_id)
    return number if is_canonical and -(2**63) <= number < 2**63 else None
