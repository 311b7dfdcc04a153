"""One request from its parts to its scores: features, micro-batch, statuses. Knows no HTTP."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from model.contract.blocks import Blocks
from model.contract.errors import RecordError
from model.contract.ids import canonical_id
from model.contract.record import UserRecord, unpack_record
from service.batcher import MicroBatcher
from service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RecordCorrupt,
    StoreError,
    StoreTimeout,
)
from service.features import Candidates, EncodedRequest, Id
from service.observe import Metrics
from service.runtime import Outputs
from service.sampler import Sampler
from service.settings import StoreSettings
from service.state import ServingState
from service.stores.base import OnlineStore

_log = logging.getLogger(__name__)

UserStatus = Literal["ok", "unknown", "stale", "degraded"]

# Of the time that is left, the look-up may use this share, or less if the store's own time-out is
# shorter: what remains is for the model, so that a silent store costs the record, not the answer.
_STORE_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """A request, parsed but not yet compared with a schema.

    Attributes:
        user_id: As sent.
        candidates: What to score.
        time: Unix seconds; None means now.
        context: Raw values by raw column name.
        user_features: Raw values that replace those of the user record.
    """

    user_id: Id
    candidates: Candidates
    time: float | None = None
    context: Mapping[str, object] = field(default_factory=dict)
    user_features: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """The answer, candidates in the order asked.

    Attributes:
        bundle_id: Of the bundle that scored.
        user_status: What became of the user record: used, not there, used although old, or not
            read.
        degraded: What was replaced by defaults because it could not be had; empty if nothing.
        ignored_features: Names in the request that are no features of it.
        item_ids: As sent.
        outputs: Probabilities by output name, float32 [N].
        is_known: bool [N], False for items that are not in the item table.
        is_finite: bool [N], False where an output is NaN or infinite.
    """

    bundle_id: str
    user_status: UserStatus
    degraded: tuple[str, ...]
    ignored_features: tuple[str, ...]
    item_ids: Sequence[Id]
    outputs: Outputs
    is_known: npt.NDArray[np.bool_]
    is_finite: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _User:
    record: UserRecord | None
    status: UserStatus


class Scorer:
    """Scores requests by one serving state. For one event loop; owns nothing it was given."""

    def __init__(
        self,
        state: ServingState,
        *,
        store: OnlineStore,
        batcher: MicroBatcher[Blocks, Outputs],
        metrics: Metrics,
        settings: StoreSettings,
        sampler: Sampler | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes the parts of the service.

        Args:
            state: Bundle, encoder, item table.
            store: User records.
            batcher: In front of the state's runtime.
            metrics: Told of everything that is not as it should be.
            settings: Says at what age a record is stale.
            sampler: Of the state's bundle; None looks at no values.
            clock: Unix seconds, for requests that name no time.
        """
        self.state = state
        self._store = store
        self._batcher = batcher
        self._metrics = metrics
        self._max_record_age_s = settings.max_record_age_s
        self._sampler = sampler
        self._clock = clock

    @property
    def model_wait_s(self) -> float:
        """Predicted seconds until the model will have run what it was given."""
        return self._batcher.predicted_wait_s

    async def score(self, request: ScoreRequest, *, deadline: float) -> ScoreResult:
        """Scores one request.

        Args:
            request: With at least one candidate.
            deadline: Absolute, in the event loop's time.

        Raises:
            InvalidRequest: A value does not fit the bundle's schema; the field is named.
            DeadlineExceeded: The deadline passed first.
            ServiceError: What `MicroBatcher.submit` raises; never a `StoreError`.
        """
        if deadline <= asyncio.get_running_loop().time():
            raise DeadlineExceeded("the deadline had passed before the request was looked at")
        user_id = _canonical_user_id(request.user_id)
        request_time = self._clock() if request.time is None else request.time
        started_at = time.perf_counter()
        user = await self._find_user(user_id, deadline)
        looked_up_at = time.perf_counter()
        self._metrics.stage_finished(stage="features", seconds=looked_up_at - started_at)
        user, encoded = self._encode(request, request_time, user)
        self._metrics.stage_finished(stage="encode", seconds=time.perf_counter() - looked_up_at)
        user_status = self._judge_user(user, request_time)
        outputs = await self._batcher.submit(encoded.blocks, deadline)
        if self._sampler is not None and self._sampler.is_due():
            self._sampler.take(encoded.blocks, outputs)
        is_finite = _finite_rows(outputs)
        self._count(encoded, is_finite)
        return ScoreResult(
            bundle_id=self.state.manifest.bundle_id,
            user_status=user_status,
            degraded=("user_features",) if user_status == "degraded" else (),
            ignored_features=encoded.ignored,
            item_ids=request.candidates.item_ids,
            outputs=outputs,
            is_known=encoded.is_known,
            is_finite=is_finite,
        )

    async def _find_user(self, user_id: str, deadline: float) -> _User:
        if not self.state.features.uses_store:
            return _User(None, "ok")
        share_s = _STORE_SHARE * (deadline - asyncio.get_running_loop().time())
        try:
            if share_s >= self._store.max_get_s:  # then a timer of ours would never fire
                data = await self._store.get(user_id)
            else:
                async with asyncio.timeout(share_s):
                    data = await self._store.get(user_id)
            if data is None:
                return _User(None, "unknown")
            return _User(unpack_record(data), "ok")
        except TimeoutError:
            self._metrics.store_failed(StoreTimeout())
        except StoreError as exc:
            self._metrics.store_failed(exc)
        except RecordError as exc:
            self._refuse_record(exc)
        return _User(None, "degraded")

    def _encode(
        self, request: ScoreRequest, request_time: float, user: _User
    ) -> tuple[_User, EncodedRequest]:
        try:
            return user, self._encode_with(request, request_time, user.record)
        except RecordError as exc:
            self._refuse_record(exc)
        return _User(None, "degraded"), self._encode_with(request, request_time, None)

    def _encode_with(
        self, request: ScoreRequest, request_time: float, record: UserRecord | None
    ) -> EncodedRequest:
        return self.state.features.encode(
            user_id=request.user_id,
            time=request_time,
            context=request.context,
            user_features=request.user_features,
            candidates=request.candidates,
            record=record,
        )

    def _refuse_record(self, error: RecordError) -> None:
        self._metrics.store_failed(RecordCorrupt())
        _log.debug("a user record cannot be used: %s", error)

    def _judge_user(self, user: _User, request_time: float) -> UserStatus:
        if user.status == "unknown":
            self._metrics.unknown_user()
        elif user.status == "degraded":
            self._metrics.degraded("user_features")
        elif user.record is not None:
            age_s = max(0.0, request_time - user.record.updated_at)
            self._metrics.record_used(age_seconds=age_s)
            if age_s > self._max_record_age_s:
                self._metrics.degraded("stale_user_features")
                return "stale"
        return user.status

    def _count(self, encoded: EncodedRequest, is_finite: npt.NDArray[np.bool_]) -> None:
        num_rows = len(is_finite)
        self._metrics.unknown_items(num_rows - int(np.count_nonzero(encoded.is_known)))
        self._metrics.ignored_features(len(encoded.ignored))
        self._metrics.non_finite_outputs(num_rows - int(np.count_nonzero(is_finite)))


def _finite_rows(outputs: Outputs) -> npt.NDArray[np.bool_]:
    arrays = list(outputs.values())
    # The sum of an array is finite only if all of it is; so are sums of probabilities.
    if all(math.isfinite(np.add.reduce(array)) for array in arrays):
        return np.ones(len(arrays[0]), np.bool_)
    return np.asarray(np.isfinite(np.array(arrays)).all(axis=0), np.bool_)


def _canonical_user_id(user_id: Id) -> str:
    try:
        canonical = canonical_id(user_id)
    except TypeError as exc:
        raise InvalidRequest(str(exc), field="user_id") from exc
    if canonical is None:
        raise InvalidRequest("the user id is empty", field="user_id")
    return canonical
