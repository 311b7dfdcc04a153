"""Keeps one serving state in service, and replaces it whole when its files change or on demand.

The new state is built and tested beside the old one, which goes on answering; a request keeps the
one that it began with. What is refused is reported, and the old state stays; it is tried again
when its files change, and also, later and later, if the fault may not be theirs.
"""

import asyncio
import contextlib
import logging
import math
import time
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
from service.refusal import may_pass
from service.runtime import Outputs
from service.scorer import Scorer
from service.settings import Settings
from service.state import ServingState, open_serving_state, with_items
from service.status import ServiceStatus

_log = logging.getLogger(__name__)

# Twice the longest time-out (one to receive a body, one to score it), and this to answer.
_MARGIN_S = 1.0
# Of the time of a model run that is measured beside the requests: so they keep three quarters of a
# core that they share with it.
_REST = 3.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # before what failed is tried again
_MAX_TOLD = 100


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


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """What was tried last; `retry_at` in the loop's time, infinite for a refusal."""

    sources: _Sources
    part: SwapPart
    pause_s: float
    retry_at: float


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
        self._told: set[tuple[type[Exception], str]] = set()  # since the last success

    async def start(self) -> None:
        """Builds the first state, serves it, and begins to watch.

        With `wait_for_bundle`, what is not there or is refused is waited for.

        Raises:
            BundleError, LogError: See `load_serving_state`.
        """
        sources = await asyncio.to_thread(self._look)
        failure: _Failure | None = None
        if not self._settings.wait_for_bundle:
            self._serve(await self._open(sources, pause=None))
        elif not sources.are_there:
            _log.info("not ready: no bundle at %s, or no items", self._settings.bundle)
        else:
            failure = await self._try(sources, "bundle", None)
        self._watcher = asyncio.create_task(self._watch(failure))

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

    async def _open(self, sources: _Sources, *, pause: Callable[[float], None] | None) -> _Serving:
        state = await open_serving_state(
            sources.bundle.path,
            self._settings.item_snapshot,
            batch=self._settings.batch,
            open_items=self._open_items,
            with_item_sums=self._settings.item_sums,
            pause=pause,
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

    async def _watch(self, failure: _Failure | None) -> None:
        while True:
            is_wanted = await self._wait(failure)
            found = await asyncio.to_thread(self._look)
            if failure is not None and found != failure.sources:
                failure = None
            part = self._part_to_swap(found, failure, is_wanted)
            if part is not None:
                failure = await self._try(found, part, failure)

    async def _wait(self, failure: _Failure | None) -> bool:
        """Waits until it is time to look; whether a swap was asked for."""
        wait_s = self._settings.reload_poll_s or math.inf
        if failure is not None:
            wait_s = min(wait_s, max(0.0, failure.retry_at - asyncio.get_running_loop().time()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(wait_s) else wait_s):
                await self._is_wanted.wait()
        is_wanted = self._is_wanted.is_set()
        self._is_wanted.clear()
        return is_wanted

    def _part_to_swap(
        self, found: _Sources, failure: _Failure | None, is_wanted: bool
    ) -> SwapPart | None:
        if self._serving is None and not found.are_there:
            return None
        if is_wanted:
            return "bundle"
        if failure is not None:
            is_due = asyncio.get_running_loop().time() >= failure.retry_at
            return failure.part if is_due else None
        if self._serving is None:
            return "bundle"
        if found == self._serving.sources:
            return None
        return "bundle" if found.bundle != self._serving.sources.bundle else "items"

    async def _try(
        self, found: _Sources, part: SwapPart, before: _Failure | None
    ) -> _Failure | None:
        """Swaps; what failed, None if nothing did. `before` is of the same sources."""
        is_first = self._serving is None
        try:
            if part == "bundle":
                await self._swap_all(found)
            else:
                await self._swap_items(found)
        except Exception as exc:  # noqa: BLE001 - the outer edge of the task: logged and counted
            self._status.metrics.swap_refused(part)
            pause_s = _FIRST_PAUSE_S
            if before is not None:
                pause_s = min(_LONGEST_PAUSE_S, 2 * before.pause_s)
            self._tell(exc, pause_s)
            now = asyncio.get_running_loop().time()
            retry_at = now + pause_s if may_pass(exc) else math.inf
            return _Failure(sources=found, part=part, pause_s=pause_s, retry_at=retry_at)
        if not is_first:
            self._status.metrics.swapped(part)
        self._told.clear()
        return None

    def _tell(self, error: Exception, pause_s: float) -> None:
        """Logs an error, unless it was logged since the last success."""
        told = type(error), str(error)
        if told in self._told:
            return
        if len(self._told) == _MAX_TOLD:
            self._told.clear()
        self._told.add(told)
        if not may_pass(error):
            _log.error("refused, what is in service stays: %s", error)
            return
        # A traceback only for what nobody has thought of.
        _log.error(
            "not loaded, tried again in %.0f s and later and later, what is in service stays: %s",
            pause_s,
            error,
            exc_info=None if isinstance(error, ContractError) else error,
        )

    async def _swap_all(self, found: _Sources) -> None:
        pause = None if self._serving is None else _rest
        await self._replace(await self._open(found, pause=pause))

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


def _rest(seconds: float) -> None:
    time.sleep(_REST * seconds)
