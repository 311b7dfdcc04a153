"""Builds the service from its settings and takes it down again in reverse order."""

import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from model.contract.blocks import Blocks
from service.admission import Admission
from service.api import add_routes
from service.batcher import MicroBatcher
from service.errors import StoreError, StoreMisconfigured
from service.exchange import ScoreExchange, Scoring
from service.gate import Gate
from service.item_files import ItemOpener, open_in_memory
from service.loop_lag import LagProbe
from service.observe import Metrics
from service.request_log import RequestLog
from service.runtime import Outputs
from service.sampler import Sampler
from service.scorer import Scorer
from service.settings import Settings
from service.state import ServingState
from service.status import ServiceStatus
from service.stores import open_store
from service.stores.base import OnlineStore
from service.swap import Swapper
from service.worker_metrics import WorkerMetrics

_log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    *,
    store: OnlineStore | None = None,
    registry: CollectorRegistry | None = None,
    open_items: ItemOpener = open_in_memory,
    share_metrics: Callable[[Metrics], WorkerMetrics] | None = None,
) -> FastAPI:
    """Makes the app; files and connections are opened by its lifespan, and closed by it.

    `app.state.status` is its `ServiceStatus`, for the server that drains it, and
    `app.state.scoring` for a protocol that answers before the app sees a request.
    `app.state.reload()` asks for the bundle and the items to be loaded again.

    Args:
        settings: Without `store.url`, a store must be given. Without `bundle`, the service runs
            and is not ready.
        store: In place of the one that `settings.store.url` names; closed with the app.
        registry: For the metrics; None makes one of the app's own.
        open_items: Makes item tables.
        share_metrics: For one of several workers; None answers /metrics for this process alone.

    Raises:
        StoreMisconfigured: Neither a store nor its URL is given, or the URL is not understood.
            The lifespan raises it for a wrong password, and the errors of `load_serving_state`.
    """
    store = _make_store(settings) if store is None else store
    metrics = Metrics(registry)
    status = ServiceStatus(metrics)
    request_log = _make_request_log(settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if share_metrics is not None:
                shared = await stack.enter_async_context(share_metrics(metrics))
                status.render_metrics = shared.render
            if request_log is not None:
                await stack.enter_async_context(request_log)
            stack.push_async_callback(store.aclose)
            await _check_store(store)
            if settings.bundle is not None:
                swapper = _make_swapper(status, settings, store=store, open_items=open_items)
                stack.push_async_callback(swapper.aclose)
                await swapper.start()
                app.state.reload = swapper.request
            stack.enter_context(LagProbe(metrics.loop_was_late))
            yield
            status.begin_drain()

    app = FastAPI(lifespan=lifespan, redirect_slashes=False)
    app.state.status = status
    app.state.reload = lambda: None
    gate = _make_gate(status, settings)
    exchange = ScoreExchange(status, limits=settings.limits, gate=gate, request_log=request_log)
    scoring = Scoring(exchange=exchange, gate=gate, status=status, new_id=_new_request_id)
    app.state.scoring = scoring
    add_routes(app, scoring, limits=settings.limits)
    return app


def _make_store(settings: Settings) -> OnlineStore:
    if settings.store.url is None:
        raise StoreMisconfigured(
            "CTR_STORE__URL is not set and no store was given (`ctr serve` starts a Redis of "
            "its own; memory:// holds nothing)"
        )
    return open_store(settings.store.url.get_secret_value(), settings.store)


def _make_request_log(settings: Settings, metrics: Metrics) -> RequestLog | None:
    if settings.request_log.dir is None:
        return None
    return RequestLog(settings.request_log, metrics=metrics)


def _make_gate(status: ServiceStatus, settings: Settings) -> Gate:
    gate = Gate(
        Admission(),
        model_wait_s=status.model_wait_s,
        metrics=status.metrics,
        limits=settings.limits,
    )
    status.metrics.wait_predicted(lambda: gate.predicted_wait_s)
    return gate


def _new_request_id() -> str:
    return os.urandom(16).hex()


def _make_swapper(
    status: ServiceStatus, settings: Settings, *, store: OnlineStore, open_items: ItemOpener
) -> Swapper:
    sampler: Sampler | None = None

    def make_scorer(state: ServingState, batcher: MicroBatcher[Blocks, Outputs]) -> Scorer:
        nonlocal sampler
        if settings.health.sample_every and (
            sampler is None or sampler.bundle != state.manifest.bundle_id
        ):
            # Other items alone go on with what has been sampled.
            sampler = status.metrics.make_sampler(
                state.manifest.bundle_id,
                state.encoder,
                state.histograms,
                every=settings.health.sample_every,
                window_s=settings.health.drift_window_s,
            )
        status.metrics.ages_known(
            bundle_made_at=state.manifest.made_at, items_as_of=state.items.as_of
        )
        return Scorer(
            state,
            store=store,
            batcher=batcher,
            metrics=status.metrics,
            settings=settings.store,
            sampler=sampler,
        )

    return Swapper(status, settings=settings, open_items=open_items, make_scorer=make_scorer)


async def _check_store(store: OnlineStore) -> None:
    try:
        await store.ping()
    except StoreMisconfigured:
        raise
    except StoreError as exc:
        # An outage must not keep the fleet from starting: answers are degraded until it ends.
        _log.warning("the online store cannot be reached yet: %s", exc)
