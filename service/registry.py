"""A folder of published bundles, and the pointer to the one to be served.

    REGISTRY/versions/ID/     bundles, each whole
    REGISTRY/current          a link to one of them: what `CTR_BUNDLE` names
    REGISTRY/history.jsonl    every move of the pointer, oldest first

A service that serves `current` looks where it points every `CTR_RELOAD_POLL_S`. Moving it is one
rename: whoever looks sees the bundle before or the one after.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from model.contract.bundle import Manifest, copy_bundle, read_bundle, read_manifest
from model.contract.errors import ContractError

VERSIONS, CURRENT, HISTORY = "versions", "current", "history.jsonl"
_LOCK = ".lock"


class RegistryError(ContractError):
    """The registry cannot do what it was asked for."""


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One move of the pointer.

    Attributes:
        at: RFC 3339.
        action: Why it moved.
        bundle: Where it points since.
        before: Where it pointed; None for the first.
    """

    at: str
    action: Literal["publish", "rollback"]
    bundle: str
    before: str | None


_MOVE = msgspec.json.Decoder(Move)


class Registry:
    """One folder; processes that change it take turns."""

    def __init__(self, path: Path) -> None:
        """Makes nothing yet."""
        self.path = path

    @property
    def current(self) -> str | None:
        """Id of the bundle that is pointed to; None before the first was published."""
        try:
            return (self.path / CURRENT).readlink().name
        except FileNotFoundError:
            return None

    def versions(self) -> list[Manifest]:
        """Manifests of all bundles here, oldest first.

        Raises:
            BundleError: One is damaged.
        """
        with contextlib.suppress(FileNotFoundError):
            found = [p for p in (self.path / VERSIONS).iterdir() if not p.name.startswith(".")]
            return sorted(map(read_manifest, found), key=lambda m: (m.created_at, m.bundle_id))
        return []

    def history(self) -> list[Move]:
        """All moves of the pointer, oldest first.

        Raises:
            RegistryError: A line is damaged.
        """
        try:
            lines = (self.path / HISTORY).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        try:
            return [_MOVE.decode(line) for line in lines]
        except msgspec.MsgspecError as exc:
            raise RegistryError(f"{self.path / HISTORY}: {exc}", where=HISTORY) from exc

    def publish(self, bundle: Path) -> Move | None:
        """Takes a copy of the bundle, every digest verified, and points to it.

        Returns:
            None if it is the one that is pointed to already.

        Raises:
            BundleError: It is not a whole bundle; the pointer stays.
        """
        (self.path / VERSIONS).mkdir(parents=True, exist_ok=True)
        with self._turn():
            copied = copy_bundle(bundle, self.path / VERSIONS)
            return self._point(copied.name, "publish")

    def roll_back(self, to: str | None = None) -> Move | None:
        """Points to a bundle that was published before.

        Args:
            to: Its id, or the beginning of it; None is the one served before the present one was
                published, so that rolling back twice goes back by two.

        Returns:
            None if it is the one that is pointed to already.

        Raises:
            RegistryError: There is none, or the beginning fits several.
            BundleError: It is damaged, or gone; the pointer stays.
        """
        with self._turn():
            bundle = self._before() if to is None else self._find(to)
            # What has lain here for long may have been damaged, or taken away, since.
            read_bundle(self.path / VERSIONS / bundle)
            return self._point(bundle, "rollback")

    def _before(self) -> str:
        published: list[str] = []
        for move in self.history():
            if move.action == "rollback" and move.bundle in published:
                last = len(published) - 1 - published[::-1].index(move.bundle)
                del published[last + 1 :]
            else:
                published.append(move.bundle)
        if len(published) < 2:
            raise RegistryError(
                f"{self.path}: nothing was served before {self.current}", where=HISTORY
            )
        return published[-2]

    def _find(self, beginning: str) -> str:
        ids = [manifest.bundle_id for manifest in self.versions()]
        found = [i for i in ids if i.startswith(beginning)]
        if len(found) != 1:
            what = "no bundle here" if not found else f"{len(found)} bundles here"
            raise RegistryError(
                f"{self.path}: {what} with an id that begins with {beginning!r}; there "
                f"are {', '.join(ids) or 'none'}",
                where=VERSIONS,
            )
        return found[0]

    def _point(self, bundle: str, action: Literal["publish", "rollback"]) -> Move | None:
        before = self.current
        if before == bundle:
            return None
        # Relative, so that it holds wherever the directory is mounted.
        point(self.path / CURRENT, Path(VERSIONS) / bundle)
        move = Move(
            at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            action=action,
            bundle=bundle,
            before=before,
        )
        with (self.path / HISTORY).open("ab") as file:
            file.write(msgspec.json.encode(move) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return move

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if not self.path.is_dir():
            raise RegistryError(f"no registry at {self.path}", where=str(self.path))
        with (self.path / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # Gone with the file's descriptor.
            yield


def point(link: Path, target: Path) -> None:
    """Lets a link point to the target, in one step if it points elsewhere; for one at a time."""
    new = link.with_name(f".{link.name}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)
