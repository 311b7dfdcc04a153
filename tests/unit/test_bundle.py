import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from model.contract import bundle as bundle_module
from model.contract.bundle import (
    GOLDEN_ENCODED,
    GOLDEN_RAW,
    HISTOGRAMS,
    MANIFEST,
    MODEL,
    SCHEMA,
    check_golden_blocks,
    parity_excess,
    read_bundle,
    write_bundle,
)
from model.contract.encode import Encoder
from model.contract.errors import (
    BundleCorrupt,
    BundleIncompatible,
    BundleNotFound,
    BundleRejected,
)
from model.contract.spec import FittedSchema

FILES = (SCHEMA, MODEL, GOLDEN_RAW, GOLDEN_ENCODED, HISTOGRAMS)


@pytest.fixture
def path(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the tiny bundle, to be damaged."""
    copy = tmp_path / tiny_bundle.name
    copy.mkdir()
    for file in tiny_bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def rewritten(path: Path, **files: bytes | None) -> Path:
    """The same bundle written anew with files replaced or left out: every digest is right."""
    content = {name: (path / name).read_bytes() for name in FILES}
    content |= {name: data for name, data in files.items() if data is not None}
    for name, data in files.items():
        if data is None:
            del content[name]
    manifest = json.loads((path / MANIFEST).read_bytes())
    computed = ("contract_version", "record_version", "hash_name", "hash_seed", "files")
    kept = {k: v for k, v in manifest.items() if k not in (*computed, "bundle_id")}
    return write_bundle(path.parent / "again", manifest=kept, files=content)


def edit_manifest(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    manifest = json.loads((path / MANIFEST).read_bytes())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_what_is_written_is_read_back(path: Path) -> None:
    bundle = read_bundle(path)

    assert bundle.fitted == tiny.fitted_schema()
    assert bundle.manifest.outputs == ("pctr", "pctcvr", "pcvr")
    assert bundle.manifest.steps == ("click", "conversion")
    assert bundle.model == (path / MODEL).read_bytes()
    assert len(bundle.golden.blocks) == 40
    assert set(bundle.golden.expected) == {"pctr", "pctcvr", "pcvr"}
    assert bundle.golden.request_columns["age_band"][:2] == ["25-34", None]
    assert bundle.histograms is None


def test_versions_are_written_into_the_manifest(path: Path) -> None:
    manifest = read_bundle(path).manifest

    assert (manifest.contract_version, manifest.record_version) == (1, 1)
    assert (manifest.hash_name, manifest.hash_seed) == ("xxh64", 0x43545230)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2023-11-15T12:00:00Z", 1_700_049_600.0),
        ("2023-11-15T13:00:00+01:00", 1_700_049_600.0),
        ("2023-11-15T12:00:00", None),
        ("yesterday", None),
    ],
)
def test_time_of_making_is_told_in_seconds(path: Path, text: str, seconds: float | None) -> None:
    manifest = read_bundle(path).manifest.model_copy(update={"created_at": text})

    assert manifest.made_at == seconds


def test_directory_is_named_by_the_digest(path: Path) -> None:
    assert path.name == read_bundle(path).manifest.bundle_id
    assert len(path.name) == 16


def test_equal_content_has_one_name_and_other_content_another(path: Path) -> None:
    assert rewritten(path).name == path.name
    assert rewritten(path, **{HISTOGRAMS: b'{"a": 1}'}).name != path.name


def test_writing_a_bundle_that_is_there_leaves_it(path: Path) -> None:
    first = rewritten(path)
    before = (first / MANIFEST).stat().st_mtime_ns

    assert rewritten(path) == first
    assert (first / MANIFEST).stat().st_mtime_ns == before


def test_golden_rows_encode_to_the_blocks_beside_them(path: Path) -> None:
    check_golden_blocks(read_bundle(path), Encoder(tiny.fitted_schema()))


def test_golden_rows_that_encode_otherwise_are_refused(path: Path) -> None:
    other = FittedSchema(
        schema=tiny.schema(),
        vocabularies={**tiny.VOCABULARIES, "brand": ("bolt", "acme", "7")},
        moments=tiny.fitted_schema().moments,
    )

    with pytest.raises(BundleRejected, match="another candidate_ids here"):
        check_golden_blocks(read_bundle(path), Encoder(other))


def test_golden_rows_that_cannot_be_encoded_are_refused(path: Path) -> None:
    raw = json.loads((path / GOLDEN_RAW).read_bytes())
    raw["candidate"]["price"][0] = "dear"
    broken = read_bundle(rewritten(path, **{GOLDEN_RAW: json.dumps(raw).encode()}))

    with pytest.raises(BundleRejected, match="golden rows: feature 'price'"):
        check_golden_blocks(broken, Encoder(tiny.fitted_schema()))


def test_a_write_that_fails_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(target: Path, data: bytes) -> None:
        if target.name == MANIFEST:
            raise OSError("disk full")
        target.write_bytes(data)

    monkeypatch.setattr(bundle_module, "_write_synced", fail)

    with pytest.raises(OSError, match="disk full"):
        rewritten(path)

    assert list((tmp_path / "again").iterdir()) == []


@pytest.mark.parametrize("place", ["nowhere", f"{MANIFEST}/below"])
def test_no_bundle_there(path: Path, place: str) -> None:
    with pytest.raises(BundleNotFound, match="no bundle at"):
        read_bundle(path / place)


def test_a_directory_without_a_manifest_is_no_bundle(path: Path) -> None:
    (path / MANIFEST).unlink()

    with pytest.raises(BundleNotFound, match=MANIFEST):
        read_bundle(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()

    with pytest.raises(BundleCorrupt, match=name) as caught:
        read_bundle(path)

    assert caught.value.where == name


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_named(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)

    with pytest.raises(BundleCorrupt, match=f"{name} differs from its digest"):
        read_bundle(path)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_named(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-1])

    with pytest.raises(BundleCorrupt, match=f"{name} differs from its digest"):
        read_bundle(path)


@pytest.mark.parametrize("name", [name for name in FILES if name != HISTOGRAMS])
def test_a_bundle_written_without_a_file_is_refused(path: Path, name: str) -> None:
    with pytest.raises(BundleCorrupt, match=f"the manifest lists no {name}"):
        read_bundle(rewritten(path, **{name: None}))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff"])
def test_a_manifest_that_is_no_json_is_corrupt(path: Path, data: bytes) -> None:
    (path / MANIFEST).write_bytes(data)

    with pytest.raises(BundleCorrupt, match=r"manifest\.json is not JSON"):
        read_bundle(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_contract_version_is_incompatible(path: Path, version: object) -> None:
    edit_manifest(path, lambda m: m.update(contract_version=version))

    with pytest.raises(BundleIncompatible, match=rf"contract version {version}, .* reads 1"):
        read_bundle(path)


def test_a_manifest_that_is_no_map_is_incompatible(path: Path) -> None:
    (path / MANIFEST).write_text("[]")

    with pytest.raises(BundleIncompatible, match="contract version None"):
        read_bundle(path)


@pytest.mark.parametrize("change", [{"hash_seed": 1}, {"hash_name": "fnv"}])
def test_another_hash_of_ids_is_incompatible(path: Path, change: dict[str, object]) -> None:
    edit_manifest(path, lambda m: m.update(change))

    with pytest.raises(BundleIncompatible, match="hashed by another function"):
        read_bundle(path)


def test_a_missing_field_of_the_manifest_is_named(path: Path) -> None:
    edit_manifest(path, lambda m: m.pop("outputs"))

    with pytest.raises(BundleCorrupt, match="outputs: Field required"):
        read_bundle(path)


@pytest.mark.parametrize("value", [["pctr", "pcvr", "pctcvr"], ["pctr"]])
def test_an_edited_manifest_differs_from_its_digest(path: Path, value: list[str]) -> None:
    edit_manifest(path, lambda m: m.update(outputs=value))

    with pytest.raises(BundleCorrupt, match=r"manifest\.json differs from its digest"):
        read_bundle(path)


def test_a_nan_in_the_manifest_is_corrupt(path: Path) -> None:
    edit_manifest(path, lambda m: m.update(metrics={"auc_ctr": float("nan")}))

    with pytest.raises(BundleCorrupt, match=r"manifest\.json"):
        read_bundle(path)


def test_a_nan_is_not_written(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_bundle(tmp_path / "again", manifest={"metrics": {"auc_ctr": float("nan")}}, files={})

    assert not (tmp_path / "again").exists()


def test_a_path_among_the_file_names_is_refused(path: Path) -> None:
    edit_manifest(path, lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}))  # type: ignore[attr-defined]  # a JSON map
    content = json.loads((path / MANIFEST).read_bytes())
    fields = {k: v for k, v in content.items() if k != "bundle_id"}
    edit_manifest(path, lambda m: m.update(bundle_id=bundle_module._digest(fields)))

    with pytest.raises(BundleCorrupt, match=r"'\.\./x' is no file name"):
        read_bundle(path)


def test_a_schema_of_another_manifest_is_refused(path: Path) -> None:
    other = json.loads((path / SCHEMA).read_bytes())
    other["schema"]["time_zone"] = "UTC"

    with pytest.raises(BundleCorrupt, match="the schema is not the manifest's"):
        read_bundle(rewritten(path, **{SCHEMA: json.dumps(other).encode()}))


def test_a_schema_that_contradicts_itself_is_named(path: Path) -> None:
    other = json.loads((path / SCHEMA).read_bytes())
    other["moments"]["price"]["std"] = 0

    with pytest.raises(BundleCorrupt, match=r"schema\.json: moments\.price\.std"):
        read_bundle(rewritten(path, **{SCHEMA: json.dumps(other).encode()}))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (GOLDEN_RAW, b"{"),
        (GOLDEN_RAW, b"{}"),
        (GOLDEN_RAW, b"[]"),
        (GOLDEN_ENCODED, b"no archive"),
        (GOLDEN_ENCODED, b""),
    ],
)
def test_unreadable_golden_rows_are_corrupt(path: Path, name: str, data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="unreadable golden rows"):
        read_bundle(rewritten(path, **{name: data}))


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff",
        b'{"version": 2}',
        b'{"version": 2, "ids": {}, "numbers": {"a": {"edges": [1], "counts": [1], "missing": 0}}}',
        b'{"version": 2, "ids": {}, "numbers": '
        b'{"a": {"edges": [2, 1], "counts": [1, 1, 1], "missing": 0}}}',
    ],
    ids=["no JSON", "no text", "nothing in it", "a count too few", "edges not in order"],
)
def test_unreadable_histograms_are_corrupt(path: Path, data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="unreadable histograms"):
        read_bundle(rewritten(path, **{HISTOGRAMS: data}))


@pytest.mark.parametrize("data", [None, b"{}", b'{"hour": {"missing": 0.0, "codes": {}}}'])
def test_bundle_without_histograms_of_this_version_is_read(path: Path, data: bytes | None) -> None:
    assert read_bundle(rewritten(path, **{HISTOGRAMS: data})).histograms is None


@pytest.mark.parametrize(
    ("expected", "actual", "fits"),
    [
        ([0.5], [0.500009], True),
        ([0.5], [0.50002], False),  # 2e-5 absolute
        ([5e-5], [5.004e-5], True),
        ([5e-5], [5.01e-5], False),  # 1e-7 absolute, but 2e-3 relative
        ([0.5, 0.5], [0.5, 0.6], False),
        ([np.nan], [np.nan], False),
        ([0.5], [np.inf], False),
        ([0.5], [0.5, 0.5], False),
        ([], [], True),
    ],
)
def test_parity_needs_both_bounds(expected: list[float], actual: list[float], fits: bool) -> None:
    found = parity_excess(np.array(expected, np.float32), np.array(actual, np.float32))

    assert found[2] is fits


def test_parity_tells_the_largest_differences() -> None:
    largest, relative, _ = parity_excess(
        np.array([0.5, 0.25], np.float32), np.array([0.5, 0.375], np.float32)
    )

    assert (largest, relative) == (0.125, 0.5)
