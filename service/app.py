"""Builds the service from its settings and takes it down again in reverse order."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from model.contract.blocks import Blocks
from service.admission import Admission
from service.api import ScoringApp, ServiceStatus, add_routes
from service.batcher import MicroBatcher
from service.errors import StoreError, StoreMisconfigured
from service.gate import Gate
from service.observe import Metrics
from service.runtime import Outputs
from service.scorer import Scorer
from service.settings import Settings
from service.state import ServingState, load_serving_state
from service.stores import open_store
from service.stores.base import OnlineStore

_log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    store: OnlineStore | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """Makes the app; files and connections are opened by its lifespan, and closed by it.

    `app.state.status` is its `ServiceStatus`, for the server that drains it, and `app.state.gate`
    its `Gate`, for a protocol that refuses requests before the app sees them.

    Args:
        settings: Without `store.url`, a store must be given. Without `bundle`, the service runs
            and is not ready.
        store: In place of the one that `settings.store.url` names; closed with the app.
        registry: For the metrics; None makes one of the app's own.

    Raises:
        StoreMisconfigured: Neither a store nor its URL is given, or the URL is not understood.
            The lifespan raises it for a wrong password, and the errors of `load_serving_state`.
    """
    if store is None:
        if settings.store.url is None:
            raise StoreMisconfigured(
                "CTR_STORE__URL is not set and no store was given (`ctr serve` starts a Redis of "
                "its own; memory:// holds nothing)"
            )
        store = open_store(settings.store.url.get_secret_value(), settings.store)
    metrics = Metrics(registry)
    status = ServiceStatus(metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        async with AsyncExitStack() as stack:
            stack.push_async_callback(store.aclose)
            await _check_store(store)
            if settings.bundle is not None:
                state = await asyncio.to_thread(
                    load_serving_state,
                    settings.bundle,
                    settings.item_snapshot,
                    batch=settings.batch,
                )
                stack.callback(state.runtime.close)
                batcher = state.make_batcher(batch=settings.batch, observer=metrics)
                stack.push_async_callback(batcher.close, settings.drain_timeout_ms / 1000)
                _serve(state, status, batcher=batcher, store=store, settings=settings)
                stack.callback(status.set_scorer, None)
            yield
            status.begin_drain()

    app = ScoringApp(lifespan=lifespan, redirect_slashes=False)
    app.state.status = status
    app.state.gate = gate = _make_gate(status, settings)
    add_routes(app, status, limits=settings.limits, gate=gate, new_id=_new_request_id)
    return app


def _make_gate(status: ServiceStatus, settings: Settings) -> Gate:
    return Gate(
        Admission(),
        model_wait_s=status.model_wait_s,
        metrics=status.metrics,
        limits=settings.limits,
    )


def _serve(
    state: ServingState,
    status: ServiceStatus,
    *,
    batcher: MicroBatcher[Blocks, Outputs],
    store: OnlineStore,
    settings: Settings,
) -> None:
    status.metrics.bundle_served(
        bundle=state.manifest.bundle_id, schema=state.manifest.schema_sha256
    )
    status.metrics.run_cost_known(state.cost)
    status.metrics.item_table_changed(rows=len(state.items))
    status.set_scorer(
        Scorer(state, store=store, batcher=batcher, metrics=status.metrics, settings=settings.store)
    )


async def _check_store(store: OnlineStore) -> None:
    try:
        await store.ping()
    except StoreMisconfigured:
        raise
    except StoreError as exc:
        # An outage must not keep the fleet from starting: answers are degraded until it ends.
        _log.warning("the online store cannot be reached yet: %s", exc)


def _new_request_id() -> str:
    return os.urandom(16).hex()
