"""How many CPU cores this process may use, by affinity and quota, and how long a quota held it."""

import os
from dataclasses import dataclass
from pathlib import Path

_V1_CONTROLLER = "cpu"


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """Attributes: `affinity` in cores; `quota` in cores, None if there is none."""

    affinity: int
    quota: float | None

    @property
    def cores(self) -> float:
        """The smaller of the two."""
        return self.affinity if self.quota is None else min(self.affinity, self.quota)

    @property
    def whole_cores(self) -> int:
        """Cores that can be kept busy all the time, at least 1."""
        return max(1, int(self.cores))


def read_cpu_limits(root: Path = Path("/")) -> CpuLimits:
    """Reads the limits as they are now.

    A quota may be set on any group above the process's own: the smallest holds. Both versions of
    the kernel's control groups are read, and what is not there limits nothing.

    Args:
        root: Where `proc` and `sys` are; for tests.
    """
    found = [
        quota
        for directory, is_v2 in _group_directories(root)
        if (quota := _quota_v2(directory) if is_v2 else _quota_v1(directory)) is not None
    ]
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return CpuLimits(affinity=affinity or 1, quota=min(found, default=None))


def read_throttled_s(root: Path = Path("/")) -> float:
    """Seconds that a quota has held back the processes of this container so far; 0 without one.

    The kernel counts for the whole control group, not for a process. Of the groups above each
    other the one that was held back longest is told.

    Args:
        root: See `read_cpu_limits`.
    """
    found = [
        _statistic(directory, "throttled_usec") / 1e6
        if is_v2
        else _statistic(directory, "throttled_time") / 1e9
        for directory, is_v2 in _group_directories(root)
    ]
    return max(found, default=0.0)


def _group_directories(root: Path) -> list[tuple[Path, bool]]:
    """Directories of the process's groups and of all above them, and whether of version 2."""
    directories: list[tuple[Path, bool]] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mount = root / "sys/fs/cgroup"
        elif _V1_CONTROLLER in controllers.split(","):
            mount = root / "sys/fs/cgroup" / _V1_CONTROLLER
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted: then the mount
        # itself is the container's group.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        directories += [
            (mount.joinpath(*parts[:depth]), not controllers) for depth in range(len(parts) + 1)
        ]
    return directories


def _quota_v2(directory: Path) -> float | None:
    quota, _, period = _read(directory / "cpu.max").strip().partition(" ")
    return _cores(quota, period)


def _quota_v1(directory: Path) -> float | None:
    quota = _read(directory / "cpu.cfs_quota_us").strip()
    return _cores(quota, _read(directory / "cpu.cfs_period_us").strip())


def _statistic(directory: Path, name: str) -> float:
    for line in _read(directory / "cpu.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return float(value)
    return 0.0


def _cores(quota: str, period: str) -> float | None:
    # No quota is "max" in version 2 and -1 in version 1.
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
