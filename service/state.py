"""The serving state: one bundle, its session and the item table encoded by it, built together."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

from model.contract.blocks import Blocks
from model.contract.bundle import Manifest, read_bundle
from model.contract.encode import Encoder
from service.batch_plan import BatchObserver, BatchPlan, Tiling
from service.batcher import MicroBatcher
from service.features import FeatureSource
from service.items import ItemTable, empty_item_table, load_item_table
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
    """

    manifest: Manifest
    encoder: Encoder
    runtime: Runtime
    cost: RunCost
    items: ItemTable
    features: FeatureSource

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
    return math.inf if num_cores() == 1 else _INLINE_S


def num_cores() -> int:
    """Cores that this process may run on at the same time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_serving_state(
    bundle_path: Path, item_snapshot: Path | None, *, batch: BatchSettings
) -> ServingState:
    """Reads, verifies and tests a bundle, and encodes the items by it. Blocks for seconds.

    Args:
        bundle_path: The bundle's directory.
        item_snapshot: Parquet file of items; None leaves every item unknown.
        batch: Threads and rows of the model runs.

    Raises:
        BundleError: The bundle is missing, damaged, of another version, or answers otherwise here
            than where it was made.
        LogError: The item snapshot is missing or damaged.
    """
    bundle = read_bundle(bundle_path)
    encoder = Encoder(bundle.fitted)
    if item_snapshot is None:
        _log.warning("no item snapshot: items are known by what each request says of them")
        items = empty_item_table(encoder)
    else:
        items = load_item_table(item_snapshot, encoder)
    runtime, cost = load_runtime(
        bundle,
        encoder,
        num_runners=batch.num_runners,
        intra_op_threads=batch.intra_op_threads,
        max_batch_rows=batch.max_batch_rows,
    )
    _log.info("bundle %s: %d items encoded", bundle.manifest.bundle_id, len(items))
    return ServingState(
        manifest=bundle.manifest,
        encoder=encoder,
        runtime=runtime,
        cost=cost,
        items=items,
        features=FeatureSource(encoder, items),
    )
