"""The bundle: one directory, named by its digest, that holds all a service needs to score.

Files: manifest.json (versions, digests, names, training configuration, metrics), schema.json
(schema and fitted vocabularies), model.onnx, golden.json and golden.npz (raw requests, their
blocks, their probabilities) and, if it has it, histograms.json (of the encoded training features).
Beside model.onnx there may be the same network in two parts: item_side.onnx, what its first layer
makes of an item, and model_by_item.onnx, which adds that. Written whole or not at all.
"""

import hashlib
import io
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from model.contract.blocks import Blocks, CandidateBlock, RequestBlock
from model.contract.encode import Encoder
from model.contract.errors import (
    BundleCorrupt,
    BundleIncompatible,
    BundleNotFound,
    BundleRejected,
    ContractError,
)
from model.contract.histograms import FeatureHistograms
from model.contract.ids import HASH_NAME, HASH_SEED
from model.contract.record import RECORD_VERSION
from model.contract.spec import CONTRACT_VERSION, FittedSchema, describe_errors

PARITY_ABSOLUTE = 1e-5
PARITY_RELATIVE = 1e-3  # beside the absolute bound: a median pCTCVR of 5e-5 needs it

MANIFEST, SCHEMA, MODEL = "manifest.json", "schema.json", "model.onnx"
ITEM_SIDE, MODEL_BY_ITEM = "item_side.onnx", "model_by_item.onnx"
GOLDEN_RAW, GOLDEN_ENCODED, HISTOGRAMS = "golden.json", "golden.npz", "histograms.json"


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a bundle is, and from what it was made.

    Attributes:
        bundle_id: hexadecimal digest over everything else; the directory's name.
        outputs: the graph's outputs in the order of `Schema.output_names`.
        training: resolved configuration, data time range (RFC 3339), row counts.
        metrics: by split, as written by the evaluation.
        calibration: method and parameters per step.
        item_features: those that item_side.onnx reads; none in a bundle without the two parts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contract_version: int
    record_version: int
    hash_name: str
    hash_seed: int
    bundle_id: str
    created_at: str
    schema_sha256: str
    steps: tuple[str, ...]
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    files: dict[str, FileEntry]
    training: dict[str, Any]  # Any: a trainer's configuration, opaque to the service
    metrics: dict[str, Any]
    calibration: dict[str, Any]
    tool_versions: dict[str, str]
    item_features: tuple[str, ...] = ()

    @property
    def made_at(self) -> float | None:
        """`created_at` in unix seconds; None if it is no time with an offset."""
        try:
            made_at = datetime.fromisoformat(self.created_at)
        except ValueError:
            return None
        return None if made_at.tzinfo is None else made_at.timestamp()


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Raw requests with the blocks they encode to and the probabilities they score.

    Attributes:
        time: unix seconds, float64 [R].
        request_columns: raw columns of the requests, JSON values [R].
        candidate_columns: raw columns of the candidates, JSON values [N].
        blocks: their encoding.
        expected: by output name, float32 [N].
    """

    time: npt.NDArray[np.float64]
    request_columns: Mapping[str, list[Any]]  # Any: JSON values
    candidate_columns: Mapping[str, list[Any]]
    blocks: Blocks
    expected: Mapping[str, npt.NDArray[np.float32]]

    def encode(self, encoder: Encoder) -> Blocks:
        """Encodes the raw requests anew."""
        return Blocks(
            request=encoder.request_block(self.request_columns, time=self.time),
            candidate=encoder.candidate_block(
                self.candidate_columns, time=self.time[self.blocks.request_of]
            ),
            request_of=self.blocks.request_of,
        )


@dataclass(frozen=True, kw_only=True)
class ItemParts:
    """The network in two parts, of which the first need not know the request.

    Attributes:
        features: candidate features that only `item_side` reads.
        item_side: ONNX, candidate_ids and candidate_dense to item_sum, float32 [N, H].
        model: ONNX, the inputs of model.onnx and item_sum to its outputs.
    """

    features: tuple[str, ...]
    item_side: bytes
    model: bytes


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle read from disk, every digest verified.

    Attributes:
        histograms: of the training rows; None if it has none of this version.
        parts: None if it has none.
    """

    path: Path
    manifest: Manifest
    fitted: FittedSchema
    model: bytes
    golden: Golden
    histograms: FeatureHistograms | None = None
    parts: ItemParts | None = None


def write_bundle(parent: Path, *, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Writes a bundle under `parent` and returns its directory.

    Args:
        parent: directory of bundles; made if it is not there.
        manifest: the manifest's fields but for those computed here (versions, id, files).
        files: content by name; all but the manifest.
    """
    entries = {
        name: FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in files.items()
    }
    fields = {
        **manifest,
        "contract_version": CONTRACT_VERSION,
        "record_version": RECORD_VERSION,
        "hash_name": HASH_NAME,
        "hash_seed": HASH_SEED,
        "files": {name: entry.model_dump() for name, entry in sorted(entries.items())},
    }
    bundle_id = _digest(fields)
    whole = Manifest.model_validate({**fields, "bundle_id": bundle_id})
    target = parent / bundle_id
    if target.exists():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{bundle_id}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        # What is not set is left out: services of before know nothing of it.
        text = whole.model_dump_json(indent=1, exclude_unset=True)
        content = {**files, MANIFEST: (text + "\n").encode()}
        for name, data in content.items():
            _write_synced(temporary / name, data)
        _sync_directory(temporary)
        temporary.rename(target)
        _sync_directory(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def read_bundle(path: Path) -> Bundle:
    """Reads a bundle and verifies every size, digest and version.

    Raises:
        BundleNotFound, BundleCorrupt, BundleIncompatible: naming the path or the file.
    """
    manifest = _read_manifest(path)
    files = {name: _read_file(path, name, entry) for name, entry in manifest.files.items()}
    for name in (SCHEMA, MODEL, GOLDEN_RAW, GOLDEN_ENCODED):
        if name not in files:
            raise BundleCorrupt(f"{path}: the manifest lists no {name}", where=name)
    try:
        fitted = FittedSchema.model_validate_json(files[SCHEMA])
        golden = _read_golden(files[GOLDEN_RAW], files[GOLDEN_ENCODED])
    except ValidationError as exc:
        raise BundleCorrupt(f"{path}: {SCHEMA}: {describe_errors(exc)}", where=SCHEMA) from exc
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as exc:
        raise BundleCorrupt(f"{path}: unreadable golden rows: {exc}") from exc
    if fitted.schema_.sha256 != manifest.schema_sha256:
        raise BundleCorrupt(f"{path}: the schema is not the manifest's", where=SCHEMA)
    return Bundle(
        path=path,
        manifest=manifest,
        fitted=fitted,
        model=files[MODEL],
        golden=golden,
        histograms=_histograms(path, files),
        parts=_item_parts(path, manifest, files),
    )


def check_golden_blocks(bundle: Bundle, encoder: Encoder) -> None:
    """Encodes the golden requests on this machine and compares the blocks.

    Raises:
        BundleRejected: they differ from what the trainer wrote.
    """
    try:
        fresh = bundle.golden.encode(encoder)
    except ContractError as exc:
        raise BundleRejected(f"{bundle.path}: golden rows: {exc}", where=GOLDEN_RAW) from exc
    expected = bundle.golden.blocks.feeds()
    for name, array in fresh.feeds().items():
        same = np.array_equal(array, expected[name]) or (
            array.dtype == np.float32
            and array.shape == expected[name].shape
            and np.allclose(array, expected[name], rtol=1e-6, atol=1e-6)
        )
        if not same:
            raise BundleRejected(
                f"{bundle.path}: golden rows encode to another {name} here", where=GOLDEN_ENCODED
            )


def parity_excess(
    expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]
) -> tuple[float, float, bool]:
    """Largest absolute and relative difference of two probability arrays, and whether both fit.

    A NaN or infinity on either side does not fit.
    """
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    if wide.shape != other.shape or not (np.isfinite(wide).all() and np.isfinite(other).all()):
        return float("inf"), float("inf"), False
    if not wide.size:
        return 0.0, 0.0, True
    absolute = np.abs(wide - other)
    relative = absolute / np.maximum(np.abs(wide), np.finfo(np.float32).tiny)
    largest, largest_relative = float(absolute.max()), float(relative.max())
    fits = largest <= PARITY_ABSOLUTE and largest_relative <= PARITY_RELATIVE
    return largest, largest_relative, fits


def golden_files(golden: Golden) -> dict[str, bytes]:
    """The two files golden rows are kept in."""
    raw = {
        "time": golden.time.tolist(),
        "request": dict(golden.request_columns),
        "candidate": dict(golden.candidate_columns),
    }
    blocks = golden.blocks
    arrays: dict[str, npt.NDArray[Any]] = {
        "request_ids": blocks.request.ids,
        "request_dense": blocks.request.dense,
        "request_history": blocks.request.history,
        "candidate_ids": blocks.candidate.ids,
        "candidate_dense": blocks.candidate.dense,
        "request_of": blocks.request_of,
        **{f"expected_{name}": values for name, values in golden.expected.items()},
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return {
        GOLDEN_RAW: json.dumps(raw, allow_nan=False).encode(),
        GOLDEN_ENCODED: buffer.getvalue(),
    }


def _histograms(path: Path, files: Mapping[str, bytes]) -> FeatureHistograms | None:
    if HISTOGRAMS not in files:
        return None
    try:
        return FeatureHistograms.parse(files[HISTOGRAMS])
    except ValueError as exc:
        raise BundleCorrupt(f"{path}: unreadable histograms: {exc}", where=HISTOGRAMS) from exc


def _item_parts(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> ItemParts | None:
    present = [name for name in (ITEM_SIDE, MODEL_BY_ITEM) if name in files]
    if not present and not manifest.item_features:
        return None
    if len(present) != 2 or not manifest.item_features:
        raise BundleCorrupt(
            f"{path}: the manifest must list {ITEM_SIDE}, {MODEL_BY_ITEM} and item_features "
            "together",
            where=MANIFEST,
        )
    return ItemParts(
        features=manifest.item_features, item_side=files[ITEM_SIDE], model=files[MODEL_BY_ITEM]
    )


def _read_golden(raw_bytes: bytes, encoded_bytes: bytes) -> Golden:
    raw = json.loads(raw_bytes)
    with np.load(io.BytesIO(encoded_bytes), allow_pickle=False) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    return Golden(
        time=np.array(raw["time"], np.float64),
        request_columns=raw["request"],
        candidate_columns=raw["candidate"],
        blocks=Blocks(
            request=RequestBlock(
                ids=content["request_ids"],
                dense=content["request_dense"],
                history=content["request_history"],
            ),
            candidate=CandidateBlock(
                ids=content["candidate_ids"], dense=content["candidate_dense"]
            ),
            request_of=content["request_of"],
        ),
        expected={
            name.removeprefix("expected_"): values
            for name, values in content.items()
            if name.startswith("expected_")
        },
    )


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads((path / MANIFEST).read_bytes(), parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise BundleNotFound(f"no bundle at {path} (no {MANIFEST})", where=str(path)) from exc
    except OSError as exc:
        raise BundleNotFound(f"{path}: {exc.strerror}", where=str(path)) from exc
    except (ValueError, RecursionError) as exc:
        raise BundleCorrupt(f"{path}: {MANIFEST} is not JSON", where=MANIFEST) from exc
    version = content.get("contract_version") if isinstance(content, dict) else None
    if version != CONTRACT_VERSION:
        raise BundleIncompatible(
            f"{path}: contract version {version}, this service reads {CONTRACT_VERSION}",
            where=MANIFEST,
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as exc:
        raise BundleCorrupt(f"{path}: {MANIFEST}: {describe_errors(exc)}", where=MANIFEST) from exc
    if (manifest.hash_name, manifest.hash_seed) != (HASH_NAME, HASH_SEED):
        raise BundleIncompatible(f"{path}: ids are hashed by another function", where=MANIFEST)
    if _digest({k: v for k, v in content.items() if k != "bundle_id"}) != manifest.bundle_id:
        raise BundleCorrupt(f"{path}: {MANIFEST} differs from its digest", where=MANIFEST)
    return manifest


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _read_file(path: Path, name: str, entry: FileEntry) -> bytes:
    if Path(name).name != name:
        raise BundleCorrupt(f"{path}: {name!r} is no file name", where=name)
    try:
        content = (path / name).read_bytes()
    except OSError as exc:
        raise BundleCorrupt(f"{path}: {name}: {exc.strerror}", where=name) from exc
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise BundleCorrupt(f"{path}: {name} differs from its digest", where=name)
    return content


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
