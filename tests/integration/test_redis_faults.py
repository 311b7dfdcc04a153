"""Redis that refuses, stalls, dies, comes back, or answers late or oddly."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio
from redis_rig import (
    PATIENT,
    ScriptedServer,
    echo,
    error_of,
    is_idle,
    opened,
    until,
)

from service.errors import (
    RecordCorrupt,
    StoreError,
    StoreMisconfigured,
    StoreTimeout,
    StoreUnavailable,
)
from service.settings import StoreSettings
from service.stores import open_store
from service.stores.base import OnlineStore
from service.stores.embedded import EmbeddedRedis

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that a test may maltreat."""
    with EmbeddedRedis(tmp_path) as started:
        yield started


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# What it refuses.


async def configure(server: EmbeddedRedis, *command: str) -> None:
    async with redis.asyncio.Redis.from_url(server.url) as client:
        await client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py has none


async def test_refused_port_and_missing_socket_are_unavailable(tmp_path: Path) -> None:
    for url in (f"redis://127.0.0.1:{free_port()}", f"unix://{tmp_path}/none"):
        async with opened(url) as store:
            assert await error_of(store.ping()) is StoreUnavailable
            assert await error_of(store.get("u1")) is StoreUnavailable
            assert await error_of(store.set_many([("u", b"1")], ttl_s=None)) is StoreUnavailable


async def test_wrong_credentials_and_rights_are_misconfigured(own_server: EmbeddedRedis) -> None:
    port = free_port()
    socket_path = own_server.url.removeprefix("unix://")
    await configure(own_server, "CONFIG", "SET", "port", str(port))
    await configure(own_server, "ACL", "SETUSER", "blind", "on", ">x", "~*", "-@all", "+ping")
    await configure(own_server, "CONFIG", "SET", "requirepass", "right")
    bad_urls = [
        f"redis://:wrong@127.0.0.1:{port}",
        f"redis://127.0.0.1:{port}",
        f"redis://nobody:wrong@127.0.0.1:{port}",
        f"redis://:right@127.0.0.1:{port}/99",
        f"unix://:wrong@{socket_path}",
        f"unix://{socket_path}",
        f"unix://:right@{socket_path}?db=99",
    ]
    for url in bad_urls:
        async with opened(url) as store:
            assert await error_of(store.ping()) is StoreMisconfigured, url
            assert await error_of(store.get("u1")) is StoreMisconfigured, url
            assert await error_of(store.set_many([("u", b"")], ttl_s=None)) is StoreMisconfigured
    async with opened(f"redis://blind:x@127.0.0.1:{port}") as store:
        await store.ping()
        assert await error_of(store.get("u1")) is StoreMisconfigured
    for url in (f"redis://:right@127.0.0.1:{port}/3", f"unix://:right@{socket_path}?db=3"):
        async with opened(url) as store:
            await store.ping()
            await store.set_many([("u1", b"1")], ttl_s=None)
            assert await store.get("u1") == b"1"


async def test_error_text_names_no_password(own_server: EmbeddedRedis) -> None:
    await configure(own_server, "CONFIG", "SET", "requirepass", "right")
    async with opened(own_server.url.replace("unix://", "unix://:hunter2@")) as store:
        with pytest.raises(StoreMisconfigured) as caught:
            await store.ping()
    assert "hunter2" not in str(caught.value) + repr(caught.value.__cause__)


async def test_key_of_another_type_harms_only_its_user(own_server: EmbeddedRedis) -> None:
    await configure(own_server, "HSET", "ctr:user:u1", "f", "v")
    async with opened(own_server.url) as store:
        await store.set_many([("u2", b"2")], ttl_s=None)
        for _ in range(20):
            assert await error_of(store.get("u1")) is RecordCorrupt
        assert await store.get("u2") == b"2"


# What it does when it fails.


async def test_stopped_server_times_out_costs_little_and_recovers(
    own_server: EmbeddedRedis,
) -> None:
    async with opened(own_server.url, timeout_ms=200, breaker_failures=5) as store:
        await store.set_many([("u1", b"1")], ttl_s=None)
        assert await store.get("u1") == b"1"
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            first = await asyncio.gather(*(error_of(store.get("u1")) for _ in range(100)))
            assert set(first) == {StoreTimeout}
            started_at = time.monotonic()
            later = [await error_of(store.get("u1")) for _ in range(200)]
            took_s = time.monotonic() - started_at
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        # Asked one after another without a breaker they would take 40 s.
        assert later.count(StoreUnavailable) >= 190
        assert took_s < 10

        async def is_back() -> bool:
            return await error_of(store.get("u1")) is None

        await until(is_back, limit_s=2)
        assert await store.get("u1") == b"1"


async def test_killed_and_restarted_server_has_its_data_and_is_used_again(
    own_server: EmbeddedRedis,
) -> None:
    async with opened(own_server.url) as store:
        await store.set_many([("u1", b"1")], ttl_s=None)
        os.kill(own_server.pid, signal.SIGKILL)

        async def is_down() -> bool:
            return await error_of(store.get("u1")) is StoreUnavailable

        await until(is_down)
        url = own_server.url

        def restart() -> None:
            os.waitpid(own_server.pid, 0)
            own_server.start()

        await asyncio.to_thread(restart)
        assert own_server.url == url

        async def is_back() -> bool:
            return await error_of(store.get("u1")) is None

        await until(is_back, limit_s=2)
        assert await store.get("u1") == b"1"


async def test_idle_connections_that_a_restart_closed_cost_no_error(
    own_server: EmbeddedRedis,
) -> None:
    async with opened(own_server.url) as store:
        await store.set_many([("u1", b"1")], ttl_s=None)
        assert await asyncio.gather(*(store.get("u1") for _ in range(10))) == [b"1"] * 10
        await configure(own_server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert await asyncio.gather(*(store.get("u1") for _ in range(10))) == [b"1"] * 10


@pytest.mark.parametrize("num_turns", range(7))
async def test_stall_of_our_own_loop_is_not_taken_for_a_slow_store(
    own_server: EmbeddedRedis, num_turns: int
) -> None:
    async with opened(own_server.url, timeout_ms=100, breaker_failures=1) as store:
        await store.set_many([("u1", b"1")], ttl_s=None)
        await store.get("u1")
        task = asyncio.create_task(store.get("u1"))
        for _ in range(num_turns):
            await asyncio.sleep(0)  # From not begun to answered.
        time.sleep(0.2)  # noqa: ASYNC251 - the stall
        assert await task == b"1"


# Replies that a real server gives only in odd moments.


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", StoreUnavailable),
        (b"-ERR max number of clients reached\r\n", StoreUnavailable),
        (b"-MASTERDOWN Link with MASTER is down\r\n", StoreUnavailable),
        (b"-CLUSTERDOWN The cluster is down\r\n", StoreUnavailable),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", StoreMisconfigured),
        (b"-NOAUTH Authentication required.\r\n", StoreMisconfigured),
        (b"-NOPERM this user has no permissions\r\n", StoreMisconfigured),
        (b"-ERR unknown command\r\n", StoreMisconfigured),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", StoreMisconfigured),
    ],
)
async def test_error_reply_is_told_apart(reply: bytes, expected: type[StoreError]) -> None:
    async with ScriptedServer(lambda _: reply).running() as fake, opened(fake.url) as store:
        assert await error_of(store.get("u1")) is expected


async def test_connection_closed_instead_of_a_reply_is_unavailable() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.close()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with listener, opened(f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as s:
        assert await error_of(s.get("u1")) is StoreUnavailable


@pytest.mark.parametrize("credentials", ["", ":password@"])
async def test_reply_or_handshake_that_comes_late_leaves_a_usable_connection(
    credentials: str,
) -> None:
    async with ScriptedServer(echo).running() as fake:
        url = fake.url.replace("redis://", f"redis://{credentials}")
        async with opened(url, timeout_ms=50, key_prefix="") as store:
            fake.may_reply.clear()
            assert await error_of(store.get("late")) is StoreTimeout
            assert not await is_idle(store)()
            fake.may_reply.set()
            await until(is_idle(store))
            assert await store.get("next") == b"next"
            assert fake.num_connections == 1


async def test_abandoned_replies_are_never_given_to_the_next_caller() -> None:
    async with (
        ScriptedServer(echo).running() as fake,
        opened(fake.url, max_connections=2, key_prefix="") as store,
    ):
        for round_number in range(30):
            fake.may_reply.clear()
            doomed = [asyncio.create_task(store.get(f"d{round_number}.{i}")) for i in range(2)]
            num_gets = 2 * (round_number + 1) + round_number * 4

            async def are_sent(expected: int = num_gets) -> bool:
                return fake.num_gets >= expected

            await until(are_sent)
            for task in doomed:
                task.cancel()
            mates = [asyncio.create_task(store.get(f"m{round_number}.{i}")) for i in range(4)]
            await asyncio.sleep(0)
            fake.may_reply.set()
            assert await asyncio.gather(*mates) == [
                f"m{round_number}.{i}".encode() for i in range(4)
            ]
        assert fake.num_connections == 1


async def test_concurrent_lookups_share_a_round_trip() -> None:
    """All have been sent before the first is answered, over one connection."""
    async with (
        ScriptedServer(echo).running() as fake,
        opened(fake.url, key_prefix="") as store,
    ):
        assert await store.get("u") == b"u"
        fake.may_reply.clear()
        tasks = [asyncio.create_task(store.get(f"u{i}")) for i in range(20)]

        async def are_sent() -> bool:
            return fake.num_gets == 21

        await until(are_sent)
        assert not any(task.done() for task in tasks)
        fake.may_reply.set()
        assert await asyncio.gather(*tasks) == [f"u{i}".encode() for i in range(20)]
        assert fake.num_connections == 1


async def test_connection_that_stays_silent_is_given_up_for_a_new_one() -> None:
    async with (
        ScriptedServer(echo).running() as fake,
        opened(
            fake.url, timeout_ms=30, connect_timeout_ms=30, breaker_failures=1000, key_prefix=""
        ) as store,
    ):
        await until(lambda: _answers(store, "first"))
        fake.may_reply.clear()
        assert await error_of(store.get("lost")) is StoreTimeout
        await until(is_idle(store))  # without a reply
        fake.may_reply = asyncio.Event()  # that of the new connection
        fake.may_reply.set()
        await until(lambda: _answers(store, "next"))
        assert fake.num_connections == 2


async def _answers(store: OnlineStore, user_id: str) -> bool:
    try:
        return await store.get(user_id) == user_id.encode()
    except StoreError:
        return False


async def test_connection_lost_again_at_the_second_try_is_unavailable() -> None:
    """The one retry is for a connection that had been of use; the next has not."""
    num_connections = 0

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        await reader.readuntil(b"u1\r\n")
        if num_connections == 1:
            writer.write(b"$1\r\n1\r\n")
            await reader.readuntil(b"u1\r\n")
        writer.close()

    listener = await asyncio.start_server(answer_once, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    async with listener, opened(url) as store:
        assert await store.get("u1") == b"1"
        assert await error_of(store.get("u1")) is StoreUnavailable
        assert num_connections == 2


async def test_waiting_for_a_connection_is_part_of_the_time() -> None:
    async with (
        ScriptedServer(echo).running() as fake,
        opened(fake.url, timeout_ms=50, max_connections=1, breaker_failures=1000) as store,
    ):
        fake.may_reply.clear()
        started_at = time.monotonic()
        errors = await asyncio.gather(*(error_of(store.get(f"u{i}")) for i in range(20)))
        assert set(errors) == {StoreTimeout}
        assert time.monotonic() - started_at < 5
        assert fake.num_gets == 1
        fake.may_reply.set()


async def test_cancelled_probe_does_not_keep_the_breaker_half_open() -> None:
    async with (
        ScriptedServer(echo).running() as fake,
        opened(fake.url, breaker_failures=1, breaker_open_ms=1, key_prefix="") as store,
    ):
        fake.reply = lambda _: b"-LOADING soon\r\n"
        assert await error_of(store.get("u1")) is StoreUnavailable
        fake.reply = echo
        fake.may_reply.clear()
        num_gets = fake.num_gets
        probe = asyncio.create_task(store.get("probe"))

        async def is_sent() -> bool:
            nonlocal probe
            if probe.done():
                await error_of(probe)
                probe = asyncio.create_task(store.get("probe"))
            return fake.num_gets > num_gets

        await until(is_sent)
        assert await error_of(store.get("u2")) is StoreUnavailable
        probe.cancel()
        fake.may_reply.set()

        async def is_back() -> bool:
            return await error_of(store.get("u3")) is None

        await until(is_back)
        assert await store.get("u3") == b"u3"


async def test_close_ends_a_command_that_is_not_answered() -> None:
    async with ScriptedServer(echo).running() as fake:
        store = open_store(fake.url, StoreSettings(timeout_ms=50, connect_timeout_ms=5000))
        fake.may_reply.clear()
        caller = asyncio.create_task(store.get("u1"))

        async def is_sent() -> bool:
            return fake.num_gets == 1

        await until(is_sent)
        await store.aclose()
        assert await is_idle(store)()
        assert await error_of(caller) in {StoreTimeout, StoreUnavailable}


async def test_close_sends_nothing_more_for_those_who_wait_for_a_connection() -> None:
    async with ScriptedServer(echo).running() as fake:
        store = open_store(fake.url, StoreSettings(max_connections=1, key_prefix="", **PATIENT))
        fake.may_reply.clear()
        first, second = (asyncio.create_task(store.get(name)) for name in ("first", "second"))

        async def is_sent() -> bool:
            return fake.num_gets == 1

        await until(is_sent)
        closing = asyncio.create_task(store.aclose())
        await asyncio.sleep(0)
        fake.may_reply.set()
        assert await first == b"first"
        assert await error_of(second) is StoreUnavailable
        await closing
        assert fake.num_gets == 1
