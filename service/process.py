"""What this process uses of the machine, read from the kernel when somebody asks."""

import os
import time
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def resident_bytes(root: Path = Path("/")) -> float | None:
    """Memory in RAM, pages shared with others included; None where the kernel does not tell."""
    try:
        fields = (root / "proc/self/statm").read_text().split()
    except OSError:
        return None
    return float(fields[1]) * _PAGE_BYTES


def open_files(root: Path = Path("/")) -> float | None:
    """Open file descriptors, sockets included; None where the kernel does not tell."""
    try:
        # One of them is the listing's own.
        return float(sum(1 for _ in (root / "proc/self/fd").iterdir()) - 1)
    except OSError:
        return None


def cpu_seconds() -> float:
    """CPU time of all threads so far, user and system."""
    return time.process_time()
