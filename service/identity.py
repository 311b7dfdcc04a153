"""Tells whether a file or a bundle on disk is still the one that was read."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Changes with every replacement of the file, and with every writing to it."""

    device: int
    inode: int
    modified_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class BundleIdentity:
    """Changes when a link on the way to the bundle points elsewhere, or one of its files changes.

    Attributes:
        path: Free of links, so that the bundle is read from one place.
        files: By name, ascending, without hidden ones: those are still being written.
    """

    path: Path
    files: tuple[tuple[str, FileIdentity | None], ...]


def file_identity(path: Path) -> FileIdentity | None:
    """The file's identity; None if it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return FileIdentity(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def bundle_identity(path: Path) -> BundleIdentity:
    """The bundle's identity; without files if its directory cannot be looked at."""
    real = Path(os.path.realpath(path))
    try:
        names = sorted(entry.name for entry in real.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    return BundleIdentity(real, tuple((name, file_identity(real / name)) for name in names))
