import asyncio
import time
from pathlib import Path

import pytest

from service.cpu_limits import read_throttled_s
from service.loop_lag import LagProbe
from service.process import open_files, resident_bytes


def test_memory_and_files_are_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc/self/fd").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("900 25 3 1 0 80 0\n")
    for number in range(4):
        (tmp_path / "proc/self/fd" / str(number)).touch()

    assert resident_bytes(tmp_path) == 25 * 4096
    assert open_files(tmp_path) == 3


def test_what_the_kernel_does_not_tell_is_none(tmp_path: Path) -> None:
    assert resident_bytes(tmp_path) is None
    assert open_files(tmp_path) is None


@pytest.mark.parametrize(
    ("group", "path", "text", "seconds"),
    [
        ("0::/\n", "cpu.stat", "usage_usec 9\nthrottled_usec 2500000\n", 2.5),
        ("0::/a\n", "a/cpu.stat", "throttled_usec 500000\n", 0.5),
        ("3:cpu,cpuacct:/x\n", "cpu/cpu.stat", "nr_throttled 3\nthrottled_time 1500000000\n", 1.5),
        ("0::/\n", "cpu.stat", "throttled_usec nonsense\n", 0.0),
        ("0::/\n", "elsewhere", "", 0.0),
    ],
    ids=["v2", "v2 below", "v1", "nonsense", "none"],
)
def test_throttled_time_is_that_of_the_container(
    tmp_path: Path, group: str, path: str, text: str, seconds: float
) -> None:
    for name, content in (("proc/self/cgroup", group), (f"sys/fs/cgroup/{path}", text)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    assert read_throttled_s(tmp_path) == seconds


@pytest.mark.anyio
async def test_probe_sees_a_pause_of_the_loop() -> None:
    seen: asyncio.Queue[float] = asyncio.Queue()
    with LagProbe(seen.put_nowait):
        time.sleep(0.08)  # noqa: ASYNC251 - the pause to be seen
        async with asyncio.timeout(20):
            first = await seen.get()

    # It was to be woken after 20 ms; the rest of the pause is lateness.
    assert first >= 0.055


@pytest.mark.anyio
async def test_closed_probe_measures_no_more() -> None:
    seen: list[float] = []
    with LagProbe(seen.append):
        pass
    await asyncio.sleep(0.05)

    assert seen == []
