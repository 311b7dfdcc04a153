"""The serving state: one bundle, its session and the item table encoded by it, built together."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from model.contract.blocks import Blocks
from model.contract.bundle import Bundle, Manifest, read_bundle
from model.contract.encode import Encoder
from model.contract.histograms import FeatureHistograms
from service.batch_plan import BatchObserver, BatchPlan, Tiling
from service.batcher import MicroBatcher
from service.cpu_limits import read_cpu_limits
from service.features import FeatureSource
from service.item_files import ItemOpener
from service.item_sums import ItemSums
from service.items import ItemTable, empty_item_table
from service.run_cost import RunCost
from service.runtime import Outputs, Runtime, cut, join, load_runtime
from service.settings import BatchSettings

_log = logging.getLogger(__name__)

_INLINE_S = 500e-6


@dataclass(frozen=True, kw_only=True)
class ServingState:
    """What answers are made from; a request keeps the one it began with.

    Attributes:
        manifest: The bundle's.
        encoder: By the bundle's fitted schema.
        runtime: Tested on the golden rows; closed by the owner of the state.
        cost: Of the runtime's runs, measured here.
        items: Encoded by `encoder`.
        features: Puts a request's features together from `encoder` and `items`.
        histograms: Of the bundle's training rows; None if it has none.
        item_sums: Of the bundle, if `runtime` adds the items' sums; None if it reads no sums.
    """

    manifest: Manifest
    encoder: Encoder
    runtime: Runtime
    cost: RunCost
    items: ItemTable
    features: FeatureSource
    histograms: FeatureHistograms | None = None
    item_sums: ItemSums | None = None

    def make_batcher(
        self, *, batch: BatchSettings, observer: BatchObserver
    ) -> MicroBatcher[Blocks, Outputs]:
        """A micro-batcher in front of the runtime; closed before it."""
        return MicroBatcher(
            self.runtime.run_together,
            size=len,
            threads=self.runtime.threads,
            observer=observer,
            plan=BatchPlan(
                cost=self.cost,
                max_queue_rows=batch.max_queue_rows,
                num_runners=batch.num_runners,
                inline_s=_inline_s(batch.inline_us),
            ),
            tiling=Tiling(cut=cut, join=join),
        )


def _inline_s(inline_us: int | None) -> float:
    if inline_us is not None:
        return inline_us / 1e6
    # On one core a thread takes from the loop what it needs, and the switches come on top.
    return math.inf if read_cpu_limits().whole_cores == 1 else _INLINE_S


def load_serving_state(
    bundle_path: Path,
    item_snapshot: Path | None,
    *,
    batch: BatchSettings,
    with_item_sums: bool = True,
) -> ServingState:
    """Reads, verifies and tests a bundle, and encodes the items by it. Blocks for seconds.

    Args:
        bundle_path: The bundle's directory.
        item_snapshot: Parquet file of items; None leaves every item unknown.
        batch: Threads and rows of the model runs.
        with_item_sums: Keep what the model's first layer makes of each item, if the bundle has
            the parts for it and there are items.

    Raises:
        BundleError: The bundle is missing, damaged, of another version, or answers otherwise here
            than where it was made.
        LogError: The item snapshot is missing or damaged.
    """
    # Imported here: a service whose tables are built by another process does without polars.
    from service.item_snapshot import load_item_table

    bundle, encoder, item_sums = _read(bundle_path, item_snapshot, with_item_sums)
    items = (
        _no_items(encoder)
        if item_snapshot is None
        else load_item_table(item_snapshot, encoder, item_sums=item_sums)
    )
    runtime, cost = _load(bundle, encoder, batch, item_sums)
    return _complete(bundle, encoder, item_sums, runtime, cost, items)


async def open_serving_state(
    bundle_path: Path,
    item_snapshot: Path | None,
    *,
    batch: BatchSettings,
    open_items: ItemOpener,
    with_item_sums: bool = True,
    pause: Callable[[float], None] | None = None,
) -> ServingState:
    """Like `load_serving_state`, beside an event loop that goes on.

    Args:
        bundle_path: See there.
        item_snapshot: See there.
        batch: See there.
        open_items: Makes the item table.
        with_item_sums: See there.
        pause: Called, on another thread, between the model runs that are measured; see `sweep`.

    Raises:
        BundleError, LogError: See there.
    """
    bundle, encoder, item_sums = await asyncio.to_thread(
        _read, bundle_path, item_snapshot, with_item_sums
    )
    # First, for it takes less: a bundle that is refused takes no time of an encoding process.
    runtime, cost = await asyncio.to_thread(_load, bundle, encoder, batch, item_sums, pause=pause)
    try:
        items = await _open(
            item_snapshot, open_items, bundle_path, bundle.manifest, encoder, item_sums
        )
    except BaseException:
        runtime.close()
        raise
    return _complete(bundle, encoder, item_sums, runtime, cost, items)


async def with_items(
    state: ServingState, item_snapshot: Path | None, *, bundle_path: Path, open_items: ItemOpener
) -> ServingState:
    """The same bundle, and the same runtime, with the items of a snapshot as it is now.

    Args:
        state: Stays as it is.
        item_snapshot: See `load_serving_state`.
        bundle_path: The state's.
        open_items: Makes the item table.

    Raises:
        LogError: The item snapshot is missing or damaged.
    """
    items = await _open(
        item_snapshot, open_items, bundle_path, state.manifest, state.encoder, state.item_sums
    )
    _log_items(state.manifest, items)
    return replace(state, items=items, features=FeatureSource(state.encoder, items))


async def _open(
    item_snapshot: Path | None,
    open_items: ItemOpener,
    bundle_path: Path,
    manifest: Manifest,
    encoder: Encoder,
    item_sums: ItemSums | None,
) -> ItemTable:
    if item_snapshot is None:
        return _no_items(encoder)
    return await open_items(
        item_snapshot,
        bundle_path=bundle_path,
        manifest=manifest,
        encoder=encoder,
        item_sums=item_sums,
    )


def _read(
    bundle_path: Path, item_snapshot: Path | None, with_item_sums: bool
) -> tuple[Bundle, Encoder, ItemSums | None]:
    bundle = read_bundle(bundle_path)
    parts = bundle.parts if with_item_sums and item_snapshot is not None else None
    return bundle, Encoder(bundle.fitted), None if parts is None else ItemSums(parts)


def _log_items(manifest: Manifest, items: ItemTable) -> None:
    _log.info(
        "bundle %s: %d items encoded in %.1f MB, %.1f MB of them sums of the model's first layer",
        manifest.bundle_id,
        len(items),
        items.num_bytes / 1e6,
        items.num_sum_bytes / 1e6,
    )


def _no_items(encoder: Encoder) -> ItemTable:
    _log.warning("no item snapshot: items are known by what each request says of them")
    return empty_item_table(encoder)


def _load(
    bundle: Bundle,
    encoder: Encoder,
    batch: BatchSettings,
    item_sums: ItemSums | None,
    *,
    pause: Callable[[float], None] | None = None,
) -> tuple[Runtime, RunCost]:
    return load_runtime(
        bundle,
        encoder,
        num_runners=batch.num_runners,
        intra_op_threads=batch.intra_op_threads,
        max_batch_rows=batch.max_batch_rows,
        item_sums=item_sums,
        pause=pause,
    )


def _complete(
    bundle: Bundle,
    encoder: Encoder,
    item_sums: ItemSums | None,
    runtime: Runtime,
    cost: RunCost,
    items: ItemTable,
) -> ServingState:
    _log_items(bundle.manifest, items)
    return ServingState(
        manifest=bundle.manifest,
        encoder=encoder,
        runtime=runtime,
        cost=cost,
        items=items,
        features=FeatureSource(encoder, items),
        histograms=bundle.histograms,
        item_sums=item_sums,
    )
