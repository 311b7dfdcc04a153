"""A file mapped for reading, which a running service can let go of without a pause."""

import contextlib
import mmap
import os
import time
from pathlib import Path

import numpy as np

_STEP_BYTES = 4 << 20


class MappedFile:
    """Open until `close`; arrays over `memory` keep the mapping alive, not the file."""

    def __init__(self, path: Path) -> None:
        """Maps all of it, and touches every page, so that nobody has to wait for one later.

        Raises:
            OSError: It cannot be opened or mapped.
            ValueError: It is empty.
        """
        # A descriptor beside the mapping's own, see `close`.
        self._fd = os.open(path, os.O_RDONLY)
        try:
            self.memory = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise
        np.frombuffer(self.memory, np.uint8)[:: mmap.PAGESIZE].max()

    def close(self) -> None:
        """Lets the file go. For a thread: it takes long, and holds the interpreter's lock little.

        Unmapping holds that lock until every page is given back, and the last process that has a
        deleted file gives all of it back to the disk: 150 ms for 250 MB. So pages are given back
        in steps, and the file last, by a call that holds no lock. If arrays are still there, their
        mapping goes with them.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for start in range(0, len(self.memory), _STEP_BYTES):
                length = min(_STEP_BYTES, len(self.memory) - start)
                self.memory.madvise(mmap.MADV_DONTNEED, start, length)
                time.sleep(0)
        with contextlib.suppress(BufferError):
            self.memory.close()
        os.close(self._fd)
