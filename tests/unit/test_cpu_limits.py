import os
from pathlib import Path

import pytest

from service.cpu_limits import CpuLimits, read_cpu_limits
from service.settings import load_settings
from service.verbs import _fit_to_cpu


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1f\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": "what 0"}, None),
    ],
    ids=["none", "v2", "v2 without", "v2 above", "v1 in a container", "v1 without", "nonsense"],
)
def test_smallest_quota_holds(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    limits = read_cpu_limits(write(tmp_path, files))

    assert limits == CpuLimits(affinity=len(os.sched_getaffinity(0)), quota=quota)


@pytest.mark.parametrize(
    ("affinity", "quota", "cores", "whole"),
    [(4, None, 4, 4), (4, 2.5, 2.5, 2), (2, 8.0, 2, 2), (2, 0.5, 0.5, 1)],
)
def test_cores_are_the_smaller_of_the_two(
    affinity: int, quota: float | None, cores: float, whole: int
) -> None:
    limits = CpuLimits(affinity, quota)

    assert (limits.cores, limits.whole_cores) == (cores, whole)


def test_no_workers_are_one_per_core() -> None:
    fitted = _fit_to_cpu(load_settings(workers=0))

    assert fitted.workers == read_cpu_limits().whole_cores


def test_more_threads_than_cores_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    num_cores = read_cpu_limits().whole_cores
    batch = {"num_runners": 2, "intra_op_threads": 3}

    fitted = _fit_to_cpu(load_settings(workers=num_cores, batch=batch))

    (warning,) = caplog.messages
    assert warning.startswith(f"{num_cores} workers x 2 runners x 3 threads are more than the")
    assert fitted.workers == num_cores
