"""What processes use, read from /proc: CPU time and memory of a whole process tree. Linux only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def tree(pid: int) -> list[int]:
    """The process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        current = pending.pop()
        found.append(current)
        pending += children.get(current, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that the tree has used, children that ended included; to 10 ms."""
    total = 0
    for member in tree(pid):
        fields = _stat(member)
        if fields:
            # utime, stime, cutime, cstime
            total += sum(int(value) for value in fields[11:15])
    return total * _TICK_S


def resident_bytes(pid: int) -> int:
    """Resident memory of the tree; pages that its members share count once per member."""
    total = 0
    for member in tree(pid):
        try:
            text = Path(f"/proc/{member}/statm").read_text()
        except OSError:
            continue  # It ended meanwhile.
        total += int(text.split()[1]) * _PAGE_BYTES
    return total


def proportional_bytes(pid: int) -> int:
    """Resident memory of the tree in which a page shared by n processes counts as n-th parts."""
    total = 0
    for member in tree(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # It ended meanwhile.
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Processes started inside the block run on this core only; None changes nothing."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> list[int]:
    """The cores this process may use."""
    return sorted(os.sched_getaffinity(0))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()
