"""Published files as they are downloaded: found, opened packed or not, read in chunks of lines.

Knows archives, lines and Parquet parts; what the columns mean is each reader's business.
"""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl

from model.contract.errors import LogError

CHUNK_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 20  # a longer line is no line of these files
PART_ROWS = 500_000
# What is being read, bytes of the file done, bytes of the file.
Progress = Callable[[str, int, int], None]

_PACKED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some whole lines of a file, without their ends; the first has number `first_line`, from 1."""

    file: "PublishedFile"
    first_line: int
    lines: pl.Series

    def refuse(self, row: int, reason: str) -> LogError:
        """The error that names the file, the line and what is wrong with it; raised by the caller.

        Args:
            row: of this chunk, from 0.
            reason: what was expected and what was found.
        """
        number = self.first_line + row
        return LogError(
            f"{self.file.name}, line {number}: {reason}", path=self.file.path, row_number=number - 1
        )

    def fields(self, separator: str, names: tuple[str, ...]) -> pl.DataFrame:
        """The lines' fields as text.

        Raises:
            LogError: a line has more or fewer of them.
        """
        counts = self.lines.str.count_matches(separator, literal=True) + 1
        wrong = counts != len(names)
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise self.refuse(row, f"expected {len(names)} fields, got {counts[row]}")
        # One more than there are separators: the last field is whole.
        split = self.lines.str.split_exact(separator, len(names) - 1)
        return split.struct.rename_fields(list(names)).struct.unnest()

    def require(self, fits: pl.Series, texts: pl.Series, *, name: str, expected: str) -> None:
        """Refuses the first line in which a field does not fit; null counts as unfit.

        Raises:
            LogError: there is one.
        """
        fits = fits.fill_null(False)
        if not fits.all():
            row = int((~fits).arg_max() or 0)
            raise self.refuse(row, f"{name} is {shorten(texts[row])}, expected {expected}")

    def integers(self, texts: pl.Series, *, name: str) -> pl.Series:
        """Int64.

        Raises:
            LogError: one is no integer.
        """
        values = texts.cast(pl.Int64, strict=False)
        self.require(values.is_not_null(), texts, name=name, expected="an integer")
        return values

    def numbers(self, texts: pl.Series, *, name: str, is_required: bool = True) -> pl.Series:
        """Float64, null where the text is empty.

        Raises:
            LogError: one is no finite number, or is empty and required.
        """
        values = texts.cast(pl.Float64, strict=False)
        fits = values.is_finite().fill_null(False)
        if not is_required:
            fits |= texts == ""
        self.require(fits, texts, name=name, expected="a finite number")
        return values

    def flags(self, texts: pl.Series, *, name: str) -> pl.Series:
        """Int8, 0 or 1.

        Raises:
            LogError: one is neither.
        """
        self.require(texts.is_in(["0", "1"]), texts, name=name, expected="0 or 1")
        return texts.cast(pl.Int8)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A text file as published: by itself, gzipped, or a member of a zip or tar.gz archive.

    Attributes:
        path: of the file on disk.
        member: its name in the archive, None when `path` is the file itself.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"

    def chunks(
        self, *, progress: Progress, chunk_bytes: int = CHUNK_BYTES, skip_header: bool = False
    ) -> Iterator[Chunk]:
        """Its lines, some `chunk_bytes` (of text, unpacked) at a time.

        Raises:
            LogError: it cannot be read or unpacked, is no UTF-8, or has a line without end.
        """
        size = self.path.stat().st_size
        first_line, skip = 1, int(skip_header)
        with self._open() as (stream, raw):
            for text in _whole_lines(self._blocks(stream, chunk_bytes), self):
                lines = self._decode(text, first_line).split("\n")
                if not lines[-1]:
                    lines.pop()
                series = pl.Series("line", lines[skip:], dtype=pl.String).str.strip_suffix("\r")
                if len(series):
                    yield Chunk(file=self, first_line=first_line + skip, lines=series)
                first_line, skip = first_line + len(lines), 0
                progress(Path(self.member or self.path).name, raw.tell(), size)

    def header(self) -> str:
        """The first line."""
        with self._open() as (stream, _):
            for text in _whole_lines(self._blocks(stream, 1 << 16), self):
                return self._decode(text, 1).split("\n")[0].rstrip("\r")
        raise LogError(f"{self.name} is empty", path=self.path)

    def _blocks(self, stream: IO[bytes], size: int) -> Iterator[bytes]:
        try:
            while block := stream.read(size):
                yield block
        except _PACKED as exc:
            raise LogError(f"{self.name} cannot be read: {exc}", path=self.path) from exc

    def _decode(self, text: bytes, first_line: int) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as exc:
            line = first_line + text.count(b"\n", 0, exc.start)
            raise LogError(
                f"{self.name}, line {line}: expected UTF-8", path=self.path, row_number=line - 1
            ) from exc

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The text's bytes, and the file on disk under it, whose position tells how far one is."""
        with ExitStack() as stack:
            try:
                raw = stack.enter_context(self.path.open("rb"))
                stream = _unpacked(raw, self, stack)
            except (*_PACKED, KeyError) as exc:
                raise LogError(f"{self.name} cannot be opened: {exc}", path=self.path) from exc
            yield stream, raw


def find_file(directory: Path, *names: str, archives: tuple[str, ...] = ()) -> PublishedFile:
    """Finds a file by one of its names (any case) in a directory or one directly under it.

    Beside the file itself `NAME.gz` is taken, `STEM.zip` with the file in it, and the archives
    named (zip or tar.gz) if they have it.

    Raises:
        LogError: there is none, or no such directory.
    """
    if not directory.is_dir():
        raise LogError(f"no directory {directory}", path=directory)
    places = sorted(p for pattern in ("*", "*/*") for p in directory.glob(pattern) if p.is_file())
    by_name: dict[str, Path] = {}
    for path in places:
        by_name.setdefault(path.name.lower(), path)
    for name in map(str.lower, names):
        for packed in (name, f"{name}.gz"):
            if packed in by_name:
                return PublishedFile(path=by_name[packed])
        stem = name.partition(".")[0]
        for archive in (f"{stem}.zip", *archives):
            packed_at = by_name.get(archive.lower())
            member = None if packed_at is None else _member(packed_at, name)
            if packed_at is not None and member is not None:
                return PublishedFile(path=packed_at, member=member)
    wanted = ", ".join((*names, *archives))
    raise LogError(f"{directory} has none of {wanted} (nor packed as .gz or .zip)", path=directory)


class PartWriter:
    """Writes frames as `part-00000.parquet` and so on, each of `part_rows` rows but the last.

    The parts do not depend on how the rows come in. They lie in a hidden directory until `close`
    puts them in place of what was there; leaving it without `close` leaves the old ones as they
    are.
    """

    def __init__(self, directory: Path, *, part_rows: int = PART_ROWS) -> None:
        self._directory, self._part_rows = directory, part_rows
        self._temporary = directory.with_name(f".{directory.name}.tmp")
        self._pending: list[pl.DataFrame] = []
        self._num_pending = self._num_parts = self.num_rows = 0
        self._temporary.mkdir(parents=True, exist_ok=True)
        _remove_parts(self._temporary)

    def write(self, frame: pl.DataFrame) -> None:
        """Adds rows; columns are those of the first frame."""
        self._pending.append(frame)
        self._num_pending += len(frame)
        self.num_rows += len(frame)
        if self._num_pending >= self._part_rows:
            self._flush(self._part_rows)

    def close(self) -> None:
        """Writes what is left and puts the parts in place."""
        if self._num_pending or not self._num_parts:
            self._flush(1)
        self._directory.mkdir(exist_ok=True)
        _remove_parts(self._directory)
        for part in sorted(self._temporary.glob("part-*.parquet")):
            part.replace(self._directory / part.name)
        self._temporary.rmdir()

    def _flush(self, fewest: int) -> None:
        if not self._pending:
            return
        frame = pl.concat(self._pending)
        start = 0
        while len(frame) - start >= fewest:
            part = frame[start : start + self._part_rows].rechunk()
            part.write_parquet(self._temporary / f"part-{self._num_parts:05d}.parquet")
            self._num_parts += 1
            start += self._part_rows
        # A copy: a slice would keep the whole frame.
        rest = frame[min(start, len(frame)) :].clone().rechunk()
        self._pending, self._num_pending = [rest], len(rest)


def is_kept(hashes: pl.Series, *, share: float) -> pl.Series:
    """Whether a thing of this uint64 hash is in the subset; what is kept at a share is at larger.

    By the lower half of the hash, `split_names` goes by the upper one.
    """
    lower = hashes.to_numpy() & np.uint64(0xFFFFFFFF)
    return pl.Series(lower.astype(np.float64) < share * 2.0**32)


def split_names(hashes: pl.Series, *, held_out: float = 0.1) -> pl.Series:
    """Names of splits by uint64 hashes: train, and half of `held_out` each validation, calibration.

    The published files name train and test only; the parts between come out of train.
    """
    share = hashes.to_numpy().astype(np.float64) / 2.0**64
    names = np.full(len(share), "train", "U11")
    names[share < held_out] = "validation"
    names[share < held_out / 2] = "calibration"
    return pl.Series(names.tolist(), dtype=pl.String)


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Parquet, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        frame.write_parquet(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def shorten(text: object) -> str:
    """A field's text for a message."""
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _unpacked(raw: IO[bytes], file: PublishedFile, stack: ExitStack) -> IO[bytes]:
    name = file.path.name.lower()
    if file.member is None:
        if not name.endswith(".gz"):
            return raw
        return stack.enter_context(io.BufferedReader(gzip.GzipFile(fileobj=raw)))
    if name.endswith(".zip"):
        return stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(file.member))
    packed = stack.enter_context(tarfile.TarFile.open(fileobj=raw, mode="r:gz"))
    extracted = packed.extractfile(file.member)
    if extracted is None:
        raise KeyError(f"{file.member} is no file")
    return stack.enter_context(extracted)


def _member(archive: Path, name: str) -> str | None:
    """The archive's member of that file name."""
    try:
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as zipped:
                members = zipped.namelist()
        else:
            # Of a tar.gz the list of members costs unpacking all of it; it ends where it is found.
            with tarfile.open(archive, "r:gz") as packed:
                members = []
                for entry in packed:
                    members.append(entry.name)
                    if Path(entry.name).name.lower() == name:
                        break
    except _PACKED as exc:
        raise LogError(f"{archive} cannot be read: {exc}", path=archive) from exc
    return next((m for m in members if Path(m).name.lower() == name), None)


def _whole_lines(blocks: Iterator[bytes], file: PublishedFile) -> Iterator[bytes]:
    """Blocks cut after their last line's end; the last one as it is."""
    rest: list[bytes] = []
    length = 0
    for block in blocks:
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*rest, block[:cut]])
            rest, length = [], 0
        rest.append(block[cut:])
        length += len(block) - cut
        if length > MAX_LINE_BYTES:
            raise LogError(f"{file.name}: a line is longer than {MAX_LINE_BYTES:,} bytes")
    if length:
        yield b"".join(rest)


def _remove_parts(directory: Path) -> None:
    for part in directory.glob("part-*.parquet"):
        part.unlink()
