"""Tells whether a file or a bundle on disk is still the one that was read."""

import os
from dataclasses import dataclass
from pathlib import Path

from model.contract.bundle import MANIFEST


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Changes with every replacement of the file, and with every writing to it."""

    device: int
    inode: int
    modified_ns: int
    size: int


@dataclass(frozen=True, slots=True)
class BundleIdentity:
    """Changes when a link on the way to the bundle points elsewhere, or its manifest changes."""

    path: Path
    manifest: FileIdentity | None


def file_identity(path: Path) -> FileIdentity | None:
    """The file's identity; None if it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return FileIdentity(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def bundle_identity(path: Path) -> BundleIdentity:
    """The bundle's identity; its `path` is free of links, so that it is read from one place."""
    real = Path(os.path.realpath(path))
    return BundleIdentity(real, file_identity(real / MANIFEST))
