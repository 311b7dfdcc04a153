import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tiny
from fakes import FailingStore, SilentStore
from prometheus_client import CollectorRegistry

from model.contract.blocks import Blocks
from model.contract.record import pack_record
from service.batch_plan import BatchPlan
from service.batcher import MicroBatcher
from service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    StoreError,
    StoreTimeout,
    StoreUnavailable,
)
from service.features import Candidates, GivenColumn
from service.observe import Metrics
from service.runtime import Outputs
from service.scorer import Scorer, ScoreRequest, ScoreResult
from service.settings import BatchSettings, StoreSettings
from service.state import ServingState
from service.stores.base import OnlineStore
from service.stores.memory import MemoryStore

pytestmark = pytest.mark.anyio


@dataclass
class Rig:
    scorer: Scorer
    store: OnlineStore
    registry: CollectorRegistry

    async def score(self, *, seconds: float = 20.0, **fields: Any) -> ScoreResult:
        defaults: dict[str, Any] = {
            "user_id": 7,
            "time": tiny.NOON,
            "candidates": Candidates(item_ids=[1]),
        }
        deadline = asyncio.get_running_loop().time() + seconds
        return await self.scorer.score(ScoreRequest(**{**defaults, **fields}), deadline=deadline)

    def count(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"scoring_{name}_total", labels)
        assert value is not None, name
        return value


Run = Callable[[list[Blocks]], list[Outputs]]


@asynccontextmanager
async def rig(
    state: ServingState,
    *,
    store: OnlineStore | None = None,
    run: Run | None = None,
    settings: StoreSettings | None = None,
    clock: Callable[[], float] = lambda: tiny.NOON,
) -> AsyncIterator[Rig]:
    if store is None:
        store = MemoryStore()
        await store.set_many([("7", pack_record(tiny.record()))], ttl_s=None)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    if run is None:
        batcher = state.make_batcher(batch=BatchSettings(), observer=metrics)
    else:
        batcher = MicroBatcher(
            run,
            size=len,
            threads=state.runtime.threads,
            observer=metrics,
            plan=BatchPlan(cost=state.cost, max_queue_rows=1000),
        )
    scorer = Scorer(
        state,
        store=store,
        batcher=batcher,
        metrics=metrics,
        settings=settings or StoreSettings(),
        clock=clock,
    )
    try:
        yield Rig(scorer, store, registry)
    finally:
        await batcher.close(10)


@pytest.fixture
async def plain(tiny_state: ServingState) -> AsyncIterator[Rig]:
    async with rig(tiny_state) as made:
        yield made


async def test_known_user_and_items(plain: Rig, tiny_state: ServingState) -> None:
    result = await plain.score(candidates=Candidates(item_ids=[3, "1", 3.0]))

    assert result.user_status == "ok"
    assert result.degraded == ()
    assert result.item_ids == [3, "1", 3.0]
    assert result.is_known.all()
    assert result.is_finite.all()
    assert result.bundle_id == tiny_state.manifest.bundle_id
    pctr, pcvr, pctcvr = (result.outputs[name] for name in ("pctr", "pcvr", "pctcvr"))
    assert pctr[0] == pctr[2] != pctr[1]
    assert (pctcvr <= pctr).all()
    np.testing.assert_allclose(pctcvr, pctr * pcvr, rtol=1e-6)


async def test_user_without_record_is_unknown(plain: Rig) -> None:
    result = await plain.score(user_id="nobody")

    assert result.user_status == "unknown"
    assert result.degraded == ()
    assert plain.count("unknown_users") == 1


@pytest.mark.parametrize("user_id", [7, "7", 7.0])
async def test_user_id_has_one_form(plain: Rig, user_id: object) -> None:
    assert (await plain.score(user_id=user_id)).user_status == "ok"


@pytest.mark.parametrize("user_id", [7.5, ""])
async def test_user_id_that_is_none_is_refused(plain: Rig, user_id: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await plain.score(user_id=user_id)

    assert caught.value.field == "user_id"


async def test_unknown_items_are_scored_and_counted(plain: Rig) -> None:
    result = await plain.score(candidates=Candidates(item_ids=[1, 98, 99]))

    assert result.is_known.tolist() == [True, False, False]
    assert np.isfinite(result.outputs["pctr"]).all()
    assert plain.count("unknown_items") == 2


async def test_ignored_features_are_told_and_counted(plain: Rig) -> None:
    result = await plain.score(context={"weather": "rain"}, user_features={"mood": 1})

    assert result.ignored_features == ("mood", "weather")
    assert plain.count("ignored_features") == 2


async def test_time_is_now_if_not_given(tiny_state: ServingState) -> None:
    async with rig(tiny_state, clock=lambda: tiny.NOON + 5 * 3600) as evening:
        now = await evening.score(time=None)
        noon = await evening.score(time=tiny.NOON)
        same = await evening.score(time=tiny.NOON + 5 * 3600)

    assert now.outputs["pctr"] == same.outputs["pctr"] != noon.outputs["pctr"]


@pytest.mark.parametrize(
    ("age_s", "status"), [(0, "ok"), (3600, "ok"), (3601, "stale"), (-10 * tiny.DAY, "ok")]
)
async def test_record_age_is_told_as_of_the_request(
    tiny_state: ServingState, age_s: float, status: str
) -> None:
    settings = StoreSettings(max_record_age_s=3600)
    async with rig(tiny_state, settings=settings) as aged:
        record = pack_record(tiny.record(updated_at=tiny.NOON - age_s))
        await aged.store.set_many([("7", record)], ttl_s=None)
        result = await aged.score()

    assert result.user_status == status
    assert result.degraded == ()
    assert aged.count("degraded", reason="stale_user_features") == (status == "stale")
    assert aged.registry.get_sample_value("scoring_record_age_seconds_count") == 1


async def test_stale_record_is_used(plain: Rig, tiny_state: ServingState) -> None:
    settings = StoreSettings(max_record_age_s=1)
    async with rig(tiny_state, settings=settings) as stale:
        aged, fresh = await stale.score(), await plain.score()

    assert aged.user_status == "stale"
    assert aged.outputs["pctr"] == fresh.outputs["pctr"]


@pytest.mark.parametrize("error", [StoreUnavailable("down"), StoreTimeout("slow")])
async def test_store_failure_degrades_and_is_counted(
    tiny_state: ServingState, error: StoreError
) -> None:
    async with rig(tiny_state, store=FailingStore(error)) as broken:
        result = await broken.score()
        unknown = await broken.score(user_id="nobody")

    assert result.user_status == "degraded"
    assert result.degraded == ("user_features",)
    assert result.outputs["pctr"] == unknown.outputs["pctr"]
    assert broken.count("store_errors", code=error.code) == 2
    assert broken.count("degraded", reason="user_features") == 2


async def test_silent_store_leaves_time_for_the_model(tiny_state: ServingState) -> None:
    store = SilentStore()
    async with rig(tiny_state, store=store) as silent:
        result = await silent.score(seconds=0.4)

    assert result.user_status == "degraded"
    assert store.num_abandoned == 1
    assert silent.count("store_errors", code="store_timeout") == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no record",
        pack_record(tiny.record())[:-5],
        pack_record(tiny.record(features={"trips": "many"})),
    ],
)
async def test_damaged_record_degrades_and_is_counted(
    tiny_state: ServingState, data: bytes
) -> None:
    async with rig(tiny_state) as damaged:
        await damaged.store.set_many([("7", data)], ttl_s=None)
        result = await damaged.score()
        unknown = await damaged.score(user_id="nobody")

    assert result.user_status == "degraded"
    assert result.degraded == ("user_features",)
    assert result.outputs["pctr"] == unknown.outputs["pctr"]
    assert damaged.count("store_errors", code="record_corrupt") == 1


async def test_bad_inline_value_beside_a_damaged_record_is_still_refused(
    tiny_state: ServingState,
) -> None:
    async with rig(tiny_state) as damaged:
        record = pack_record(tiny.record(features={"trips": "many"}))
        await damaged.store.set_many([("7", record)], ttl_s=None)

        with pytest.raises(InvalidRequest) as caught:
            await damaged.score(context={"basket": "much"})

    assert caught.value.field == "context.basket"


async def test_inline_features_stand_in_for_a_store_that_is_down(
    tiny_state: ServingState, plain: Rig
) -> None:
    record = tiny.record()
    times = record.histories["recent"].times.tolist()
    inline = {
        **{name: record.features[name] for name in ("age_band", "trips", "last_trip")},
        "recent": [3, 1],
        "recent_time": times,
    }
    matches = {
        "bought_item_count": [3],
        "bought_item_last_time": [tiny.NOON - 12 * tiny.DAY],
        "bought_brand_count": [9],
        "bought_brand_last_time": [tiny.NOON - 2 * tiny.DAY],
    }
    candidates = Candidates(
        item_ids=[1], columns={name: GivenColumn(values=v) for name, v in matches.items()}
    )
    async with rig(tiny_state, store=FailingStore(StoreUnavailable("down"))) as broken:
        degraded = await broken.score(user_features=inline, candidates=candidates)

    # Recent events are the one part that a caller cannot give.
    await plain.store.set_many([("7", pack_record(tiny.record(recents={})))], ttl_s=None)
    full = await plain.score()
    assert degraded.outputs["pctr"] == full.outputs["pctr"]


async def test_store_is_not_asked_when_nothing_is_stored(tiny_state: ServingState) -> None:
    features = replace(tiny_state).features
    storeless = type(features)(tiny_state.encoder, tiny_state.items)
    storeless.uses_store = False
    store = FailingStore(StoreUnavailable("down"))

    async with rig(replace(tiny_state, features=storeless), store=store) as made:
        result = await made.score()

    assert result.user_status == "ok"


async def test_deadline_in_the_past_is_refused_at_once(plain: Rig) -> None:
    with pytest.raises(DeadlineExceeded):
        await plain.score(seconds=0.0)


async def test_non_finite_outputs_are_told_and_counted(tiny_state: ServingState) -> None:
    def run(requests: list[Blocks]) -> list[Outputs]:
        good = np.array([0.5, 0.5, 0.5], np.float32)
        bad = np.array([0.5, np.nan, np.inf], np.float32)
        return [{"pctr": good, "pctcvr": bad, "pcvr": good} for _ in requests]

    async with rig(tiny_state, run=run) as broken:
        result = await broken.score(candidates=Candidates(item_ids=[1, 2, 3]))

    assert result.is_finite.tolist() == [True, False, False]
    assert broken.count("non_finite_outputs") == 2


async def test_failed_run_is_inference_failed(tiny_state: ServingState) -> None:
    def run(requests: list[Blocks]) -> list[Outputs]:
        raise RuntimeError("broken graph")

    async with rig(tiny_state, run=run) as broken:
        with pytest.raises(InferenceFailed):
            await broken.score()


async def test_invalid_request_does_not_harm_its_neighbours(plain: Rig) -> None:
    good, bad = await asyncio.gather(
        plain.score(), plain.score(context={"basket": "x"}), return_exceptions=True
    )

    assert isinstance(good, ScoreResult)
    assert isinstance(bad, InvalidRequest)
