"""A bundle of which any byte has changed is refused, whichever file it is in."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from model.contract.bundle import (
    GOLDEN_ENCODED,
    GOLDEN_RAW,
    HISTOGRAMS,
    MANIFEST,
    MODEL,
    SCHEMA,
)
from model.contract.errors import BundleError, BundleNotFound
from service.settings import BatchSettings
from service.state import load_serving_state

FILES = (MANIFEST, SCHEMA, MODEL, GOLDEN_RAW, GOLDEN_ENCODED, HISTOGRAMS)


def copy(bundle: Path, target: Path) -> Path:
    return Path(shutil.copytree(bundle, target / bundle.name))


def load(bundle: Path) -> None:
    load_serving_state(bundle, None, batch=BatchSettings()).runtime.close()


def test_these_are_all_files_of_a_bundle(tiny_bundle: Path) -> None:
    assert {path.name for path in tiny_bundle.iterdir()} == set(FILES)


def test_the_bundle_itself_is_accepted(tiny_bundle: Path, tmp_path: Path) -> None:
    load(copy(tiny_bundle, tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_bit_flip_is_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    path = copy(tiny_bundle, tmp_path) / name
    content = path.read_bytes()
    rng = np.random.default_rng(len(content))
    for _ in range(20):
        place, bit = int(rng.integers(len(content))), int(rng.integers(8))
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)

        with pytest.raises(BundleError):
            load(path.parent)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_file_is_refused(
    tiny_bundle: Path, tmp_path: Path, name: str, keep: float
) -> None:
    path = copy(tiny_bundle, tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])

    with pytest.raises(BundleError):
        load(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    path = copy(tiny_bundle, tmp_path) / name
    path.unlink()

    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        load(path.parent)


def test_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="nowhere"):
        load(tmp_path / "nowhere")
