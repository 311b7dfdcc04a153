"""Item tables in files: built once, by a process of its own, and mapped by every worker.

Knows neither the format of a table nor that of a snapshot.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Protocol

from model.contract.bundle import Manifest
from model.contract.encode import Encoder
from model.contract.errors import LogError
from service.identity import file_identity
from service.item_sums import ItemSums
from service.items import ItemTable, map_item_file
from service.refusal import ItemBuildError

_POLL_S = 0.02
_EXIT_REFUSED, _EXIT_FAILED = 3, 4  # those of `item_build`, without its imports
_WHOLE, _PART, _REFUSED = _SUFFIXES = (".items", ".part", ".refused")


class ItemOpener(Protocol):
    """Makes the table of a snapshot for a bundle."""

    async def __call__(
        self,
        snapshot: Path,
        *,
        bundle_path: Path,
        manifest: Manifest,
        encoder: Encoder,
        item_sums: ItemSums | None = None,
    ) -> ItemTable:
        """Opens it.

        Args:
            snapshot: Parquet file of items.
            bundle_path: Whose features the rows are encoded for.
            manifest: The bundle's.
            encoder: The bundle's.
            item_sums: The bundle's; None for a table without sums.

        Raises:
            LogError: The snapshot is missing or damaged, or does not fit the bundle; as
                `ItemBuildError`, if trying again may help.
        """
        ...


async def open_in_memory(
    snapshot: Path,
    *,
    bundle_path: Path,
    manifest: Manifest,
    encoder: Encoder,
    item_sums: ItemSums | None = None,
) -> ItemTable:
    """An `ItemOpener` that builds the table in this process, for itself alone."""
    from service.item_snapshot import load_item_table

    del bundle_path, manifest
    return await asyncio.to_thread(load_item_table, snapshot, encoder, item_sums=item_sums)


class ItemFiles:
    """An `ItemOpener` over a directory that several processes may use at once.

    The first one to want a table builds it, holding the directory's lock; the others wait and map
    it. A snapshot that was refused is refused again, without being read, until it changes.
    """

    def __init__(self, directory: Path, *, log_level: str) -> None:
        """Makes nothing yet.

        Args:
            directory: Exists; removed by whoever made it.
            log_level: Of the building process.
        """
        self._directory = directory
        self._log_level = log_level

    async def __call__(
        self,
        snapshot: Path,
        *,
        bundle_path: Path,
        manifest: Manifest,
        encoder: Encoder,
        item_sums: ItemSums | None = None,
    ) -> ItemTable:
        """See `ItemOpener`.

        Raises:
            LogError: See there; `ItemBuildError` if there is no room for the table, or its process
                was killed.
            OSError: The process cannot be started.
        """
        has_sums = item_sums is not None
        key = await asyncio.to_thread(_key, snapshot, manifest, has_sums)
        path = self._directory / f"{key}{_WHOLE}"
        async with self._locked():
            if not await asyncio.to_thread(self._exists, path, snapshot):
                await self._build(snapshot, bundle_path, path, has_sums)
            return await asyncio.to_thread(map_item_file, path, encoder, item_sums=item_sums)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        with contextlib.closing(self._open_lock()) as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
            yield  # Closing the file gives the lock back, as does the end of this process.

    def _open_lock(self) -> IO[bytes]:
        return (self._directory / "lock").open("ab")

    def _exists(self, path: Path, snapshot: Path) -> bool:
        refusal = path.with_suffix(_REFUSED)
        if refusal.exists():
            raise LogError(refusal.read_text(), path=snapshot)
        return path.exists()

    async def _build(self, snapshot: Path, bundle_path: Path, path: Path, has_sums: bool) -> None:
        part = path.with_suffix(_PART)
        code, text = await self._run(bundle_path, snapshot, part, str(int(has_sums)))
        await asyncio.to_thread(self._put_away, path, code, text)
        if code == _EXIT_REFUSED:
            raise LogError(text, path=snapshot)
        if code == _EXIT_FAILED:
            raise ItemBuildError(text, path=snapshot)
        if code:
            raise ItemBuildError(
                f"item snapshot {snapshot}: the process that encodes it ended with status {code}",
                path=snapshot,
            )

    def _put_away(self, path: Path, code: int, text: str) -> None:
        # Nobody else has the lock. Workers keep what they have mapped; one that asks for a table
        # again which is gone builds it again.
        whole = None if code else path.with_suffix(_PART)
        old = [found for found in self._directory.iterdir() if found.suffix in _SUFFIXES]
        for found in old:
            if found != whole and (not code or found.suffix != _WHOLE):
                found.unlink()
        if whole is not None:
            whole.rename(path)
        elif code == _EXIT_REFUSED:
            path.with_suffix(_REFUSED).write_text(text)

    async def _run(self, *arguments: Path | str) -> tuple[int, str]:
        words = [*map(str, arguments), self._log_level]
        command = [sys.executable, "-m", "service.item_build", *words]
        process = await asyncio.to_thread(
            subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            # Its few words fit into the pipe, so it need not be read before the end.
            await asyncio.to_thread(process.wait)
        finally:
            process.kill()
            text, _ = process.communicate()
        return process.returncode, text.strip()


def _key(snapshot: Path, manifest: Manifest, has_sums: bool) -> str:
    identity = file_identity(snapshot)
    if identity is None:
        raise LogError(f"item snapshot {snapshot}: there is no such file", path=snapshot)
    text = repr((manifest.bundle_id, str(snapshot.resolve()), identity, has_sums))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
