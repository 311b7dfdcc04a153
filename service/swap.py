"""Keeps one serving state in service, and replaces it whole when its files change or on demand.

The new state is built and tested beside the old one, which goes on answering; a request keeps the
one that it began with. What is refused is reported, and the old state stays.
"""

import asyncio
import contextlib
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from model.contract.blocks import Blocks
from model.contract.bundle import MANIFEST
from model.contract.errors import ContractError
from service.batcher import MicroBatcher
from service.identity import BundleIdentity, FileIdentity, bundle_identity, file_identity
from service.item_files import ItemOpener
from service.observe import SwapPart
from service.runtime import Outputs
from service.scorer import Scorer
from service.settings import Settings
from service.state import ServingState, open_serving_state, with_items
from service.status import ServiceStatus

_log = logging.getLogger(__name__)

# Twice the longest time-out (one to receive a body, one to score it), and this to answer.
_MARGIN_S = 1.0


@dataclass(frozen=True, slots=True)
class _Sources:
    bundle: BundleIdentity
    items: FileIdentity | None
    are_there: bool  # whether there is something to read in each place that the settings name


@dataclass(frozen=True, kw_only=True)
class _Serving:
    sources: _Sources
    state: ServingState
    batcher: MicroBatcher[Blocks, Outputs]


class Swapper:
    """For one event loop. Owns the state in service: `aclose` ends it."""

    def __init__(
        self,
        status: ServiceStatus,
        *,
        settings: Settings,
        open_items: ItemOpener,
        make_scorer: Callable[[ServingState, MicroBatcher[Blocks, Outputs]], Scorer],
    ) -> None:
        """Starts nothing yet.

        Args:
            status: Gets each new scorer.
            settings: With a bundle.
            open_items: Makes item tables.
            make_scorer: From a state and the batcher in front of its runtime.
        """
        self._status = status
        self._settings = settings
        self._open_items = open_items
        self._make_scorer = make_scorer
        self._serving: _Serving | None = None
        self._is_wanted = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Builds the first state, serves it, and begins to watch.

        With `wait_for_bundle`, what is not there or is refused is waited for.

        Raises:
            BundleError, LogError: See `load_serving_state`.
        """
        sources = await asyncio.to_thread(self._look)
        refused: _Sources | None = None
        if not self._settings.wait_for_bundle:
            self._serve(await self._open(sources))
        elif not sources.are_there:
            _log.info("not ready: no bundle at %s, or no items", self._settings.bundle)
        elif not await self._try(sources, "bundle"):
            refused = sources
        self._watcher = asyncio.create_task(self._watch(refused))

    def request(self) -> None:
        """Asks for a whole new state even if no file has changed; returns at once."""
        self._is_wanted.set()

    async def aclose(self) -> None:
        """Stops watching, and ends the state in service."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        self._status.set_scorer(None)
        if self._serving is not None:
            await self._close(self._serving)

    def _look(self) -> _Sources:
        assert self._settings.bundle is not None  # See `__init__`.
        snapshot = self._settings.item_snapshot
        bundle = bundle_identity(self._settings.bundle)
        items = None if snapshot is None else file_identity(snapshot)
        is_bundle_there = file_identity(bundle.path / MANIFEST) is not None
        return _Sources(
            bundle=bundle,
            items=items,
            are_there=is_bundle_there and (snapshot is None or items is not None),
        )

    async def _open(self, sources: _Sources) -> _Serving:
        state = await open_serving_state(
            sources.bundle.path,
            self._settings.item_snapshot,
            batch=self._settings.batch,
            open_items=self._open_items,
            with_item_sums=self._settings.item_sums,
        )
        batcher = state.make_batcher(batch=self._settings.batch, observer=self._status.metrics)
        return _Serving(sources=sources, state=state, batcher=batcher)

    def _serve(self, serving: _Serving) -> None:
        metrics, state = self._status.metrics, serving.state
        metrics.bundle_served(bundle=state.manifest.bundle_id, schema=state.manifest.schema_sha256)
        metrics.run_cost_known(state.cost)
        metrics.item_table_changed(rows=len(state.items))
        # The status alone keeps the scorer, so that it is gone once the last request has left it.
        self._status.set_scorer(self._make_scorer(state, serving.batcher))
        self._serving = serving

    async def _watch(self, refused: _Sources | None) -> None:
        interval_s = self._settings.reload_poll_s or None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._is_wanted.wait()
            is_wanted = self._is_wanted.is_set()
            self._is_wanted.clear()
            found = await asyncio.to_thread(self._look)
            served = None if self._serving is None else self._serving.sources
            if served is None and not found.are_there:
                continue
            if is_wanted or found not in (served, refused):
                is_whole = is_wanted or served is None or found.bundle != served.bundle
                refused = (
                    None if await self._try(found, "bundle" if is_whole else "items") else found
                )

    async def _try(self, found: _Sources, part: SwapPart) -> bool:
        is_first = self._serving is None
        try:
            if part == "bundle":
                await self._swap_all(found)
            else:
                await self._swap_items(found)
        except ContractError as exc:
            _log.error("refused, what is in service stays: %s", exc)
        except Exception:  # noqa: BLE001 - the outer edge of the task: logged and counted
            _log.exception("nothing new could be loaded, what is in service stays")
        else:
            if not is_first:
                self._status.metrics.swapped(part)
            return True
        self._status.metrics.swap_refused(part)
        return False

    async def _swap_all(self, found: _Sources) -> None:
        await self._replace(await self._open(found))

    async def _swap_items(self, found: _Sources) -> None:
        assert self._serving is not None  # `start` has set it.
        state = await with_items(
            self._serving.state,
            self._settings.item_snapshot,
            bundle_path=found.bundle.path,
            open_items=self._open_items,
        )
        await self._replace(_Serving(sources=found, state=state, batcher=self._serving.batcher))

    async def _replace(self, serving: _Serving) -> None:
        """Puts the new state in service, and ends what the old one has of its own.

        That is done when the last request has left it.
        """
        old = self._serving
        if old is None:
            self._serve(serving)
            return
        is_left = asyncio.Event()
        leaving = weakref.finalize(
            self._status.require_scorer(),
            asyncio.get_running_loop().call_soon_threadsafe,
            is_left.set,
        )
        self._serve(serving)
        try:
            # Every request has ended by then, should something else keep the scorer.
            async with asyncio.timeout(self._settings.limits.max_timeout_ms / 500 + _MARGIN_S):
                await is_left.wait()
        except TimeoutError:
            _log.warning("what was in service is still held by something; it is closed anyway")
        finally:
            leaving.detach()
            if old.batcher is not serving.batcher:
                await self._close(old)
            file = old.state.items.file
            del old
            if file is not None:
                await asyncio.to_thread(file.close)

    async def _close(self, serving: _Serving) -> None:
        await serving.batcher.close(self._settings.drain_timeout_ms / 1000)
        serving.state.runtime.close()
