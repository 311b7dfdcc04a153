import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.bootstrap import bootstrap, publish
from service.quickstart import Trip

TRIP = Trip(request={"user_id": 7}, time="2017-12-01T00:00:00Z", outcome=[], products=[])


@pytest.fixture
def snapshot(tmp_path: Path, tiny_items: Path) -> Path:
    path = tmp_path / "snapshot"
    path.mkdir()
    shutil.copy(tiny_items, path / "items.parquet")
    (path / "records.parquet").write_bytes(b"records")
    return path


@pytest.fixture
def models(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A place with a bundle that is not published."""
    path = tmp_path / "models"
    shutil.copytree(tiny_bundle, path / "bundles" / tiny_bundle.name)
    return path


def test_what_is_published_holds_wherever_it_is_mounted(
    models: Path, snapshot: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    publish(models, bundle=models / "bundles" / tiny_bundle.name, snapshot=snapshot, trip=TRIP)

    moved = models.rename(tmp_path / "elsewhere")
    assert (moved / "current").resolve() == moved / "bundles" / tiny_bundle.name
    assert (moved / "current" / "manifest.json").is_file()
    assert (moved / "items.parquet").read_bytes() == (snapshot / "items.parquet").read_bytes()
    assert json.loads((moved / "request.json").read_text()) == {"user_id": 7}


def test_what_is_published_takes_the_place_of_what_was(
    models: Path, snapshot: Path, tiny_bundle: Path
) -> None:
    (models / "current").symlink_to("bundles/of-before")
    (models / "items.parquet").write_bytes(b"of before")
    (models / ".current").symlink_to("bundles/half-published")

    publish(models, bundle=models / "bundles" / tiny_bundle.name, snapshot=snapshot, trip=TRIP)

    assert (models / "current").readlink() == Path("bundles") / tiny_bundle.name
    assert (models / "items.parquet").read_bytes() == (snapshot / "items.parquet").read_bytes()
    assert sorted(path.name for path in models.iterdir()) == [
        *("bundles", "current", "items.parquet", "records.parquet", "request.json"),
    ]


def test_nothing_is_made_where_a_bundle_and_items_are(
    models: Path, snapshot: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    publish(models, bundle=models / "bundles" / tiny_bundle.name, snapshot=snapshot, trip=TRIP)
    work = tmp_path / "work"

    done = CliRunner().invoke(bootstrap, ["--models", str(models), "--work", str(work)])

    assert done.exit_code == 0
    assert done.output == f"{models}: bundle {tiny_bundle.name} is there, nothing to do\n"
    assert not work.exists()
