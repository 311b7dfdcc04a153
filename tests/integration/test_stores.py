"""One behaviour suite over every online store, and how a store is opened."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest
from redis_rig import error_of, opened, until

from service.errors import StoreMisconfigured, StoreUnavailable
from service.settings import StoreSettings
from service.stores import STORES, open_store
from service.stores.base import OnlineStore
from service.stores.embedded import EmbeddedRedis

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[OnlineStore]:
    """A store without records."""
    is_memory = request.param == "memory"
    url = "memory://" if is_memory else request.getfixturevalue("server").url
    async with opened(url, key_prefix=f"{uuid4()}:") as made:
        yield made


# Behaviour of every store.


async def test_unknown_user_has_no_record(store: OnlineStore) -> None:
    assert await store.get("u1") is None


@pytest.mark.parametrize("record", [b"", b"\x00\xff\r\n$3", bytes(range(256)) * 400])
async def test_record_comes_back_byte_for_byte(store: OnlineStore, record: bytes) -> None:
    assert await store.set_many([("u1", record)], ttl_s=None) == 1
    assert await store.get("u1") == record


async def test_ids_are_any_text(store: OnlineStore) -> None:
    ids = ["", " ", "a b", "\n", "0", "00", "übung", "用户", "*", "x" * 1000]
    await store.set_many([(user_id, user_id.encode()) for user_id in ids], ttl_s=None)
    assert [await store.get(user_id) for user_id in ids] == [user_id.encode() for user_id in ids]


async def test_later_record_replaces_earlier_and_repeats_are_counted(store: OnlineStore) -> None:
    assert await store.set_many([("u1", b"1"), ("u2", b"2"), ("u1", b"3")], ttl_s=None) == 3
    assert await store.get("u1") == b"3"
    assert await store.set_many([("u1", b"4")], ttl_s=60) == 1
    assert await store.get("u1") == b"4"
    assert await store.get("u2") == b"2"


async def test_deleted_record_is_gone_and_was_there_once(store: OnlineStore) -> None:
    await store.set_many([("u1", b"1"), ("u2", b"2")], ttl_s=None)
    assert await store.delete("u1")
    assert not await store.delete("u1")
    assert await store.get("u1") is None
    assert await store.get("u2") == b"2"


async def test_nothing_to_write(store: OnlineStore) -> None:
    assert await store.set_many([], ttl_s=None) == 0


async def test_more_records_than_one_pipeline_holds(store: OnlineStore) -> None:
    records = ((f"u{i}", f"r{i}".encode()) for i in range(1203))
    assert await store.set_many(records, ttl_s=None) == 1203
    for i in (0, 499, 500, 501, 999, 1000, 1202):
        assert await store.get(f"u{i}") == f"r{i}".encode()
    assert await store.get("u1203") is None


async def test_more_bytes_than_one_pipeline_holds(store: OnlineStore) -> None:
    big = bytes(700_000)
    assert await store.set_many([(f"u{i}", big) for i in range(4)], ttl_s=None) == 4
    assert await store.get("u3") == big


async def test_records_expire_unless_written_again_without_expiry(store: OnlineStore) -> None:
    await store.set_many([("short", b"1"), ("kept", b"1"), ("long", b"1")], ttl_s=1)
    await store.set_many([("kept", b"2")], ttl_s=None)
    await store.set_many([("long", b"2")], ttl_s=3600)
    assert await store.get("short") == b"1"

    async def is_gone() -> bool:
        return await store.get("short") is None

    await until(is_gone)
    assert await store.get("kept") == b"2"
    assert await store.get("long") == b"2"


@pytest.mark.parametrize("ttl_s", [0, -1])
async def test_expiry_below_a_second_is_a_misuse(store: OnlineStore, ttl_s: int) -> None:
    with pytest.raises(ValueError, match="ttl_s"):
        await store.set_many([("u1", b"1")], ttl_s=ttl_s)


async def test_closed_store_says_so_and_closes_twice(store: OnlineStore) -> None:
    await store.ping()
    await store.aclose()
    await store.aclose()
    assert await error_of(store.get("u1")) is StoreUnavailable
    assert await error_of(store.set_many([("u1", b"1")], ttl_s=None)) is StoreUnavailable
    assert await error_of(store.delete("u1")) is StoreUnavailable
    assert await error_of(store.ping()) is StoreUnavailable


async def test_cancelled_callers_neighbours_get_their_own_records(store: OnlineStore) -> None:
    await store.set_many([(f"u{i}", f"r{i}".encode()) for i in range(50)], ttl_s=None)
    rng = random.Random(7)
    num_cancelled = 0
    for _ in range(20):
        tasks = {asyncio.create_task(store.get(f"u{i}")): i for i in range(50)}
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        doomed = set(rng.sample(list(tasks), 20))
        for task in doomed:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, asyncio.CancelledError) and task in doomed:
                num_cancelled += 1
            else:
                assert result == f"r{tasks[task]}".encode()
    assert num_cancelled > 0


# Opening a store.


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hunter2",
        "hunter2://h",
        "http://:hunter2@h",
        "redis:hunter2",
        "redis://:hunter2@h:port",
        "redis://:hunter2@h:6379?socket_timeout=100&password=hunter2",
        "redis://h?decode_responses=hunter2",
        "unix:///s?db=hunter2",
    ],
)
async def test_url_that_cannot_be_used_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(StoreMisconfigured, match="store URL") as caught:
        open_store(url, StoreSettings())
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["memory://", "redis://:p@h:1/2", "rediss://u:p@h:1?ssl_cert_reqs=none", "unix://:p@/s?db=1"],
)
async def test_every_scheme_opens_without_connecting(url: str) -> None:
    async with opened(url):
        pass
    assert url.partition(":")[0] in STORES
