"""A directory for what the processes of one running service share; gone when the service is."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "ctr-run-"
_LOCK = "alive"
# A unix socket's path must fit into 103 bytes, and this much of it is the name in the directory.
_MAX_PATH_BYTES = 103 - len("/255.sock")


@contextlib.contextmanager
def run_directory(parent: Path | None = None) -> Iterator[Path]:
    """Makes a directory that only this user can read, and removes it at the end.

    Item tables lie in it, so those of services that were killed are removed at the start: nobody
    holds the lock of such a directory any more.

    Args:
        parent: None takes the system's directory for temporary files, or /tmp if sockets in it
            would have too long a path.

    Raises:
        OSError: It cannot be made.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_abandoned(parent)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    if len(os.fsencode(directory)) > _MAX_PATH_BYTES:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    try:
        with (directory / _LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for lock_path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        # Another user's directory cannot be opened, one that is in use cannot be locked.
        with contextlib.suppress(OSError), lock_path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent, ignore_errors=True)
