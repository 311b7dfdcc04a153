import json
import shutil
import threading
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from model.contract.bundle import MODEL, read_bundle
from model.contract.errors import BundleCorrupt, BundleNotFound
from service.cli import cli
from service.registry import CURRENT, HISTORY, VERSIONS, Registry, RegistryError


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    (tmp_path / "registry").mkdir()
    return Registry(tmp_path / "registry")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles with other weights each."""
    parent = tmp_path_factory.mktemp("bundles")
    return [tiny.write(parent, seed=seed) for seed in (3, 4, 5)]


@pytest.fixture
def bundles(tmp_path: Path, made: list[Path]) -> list[Path]:
    """Copies, to be damaged."""
    return [Path(shutil.copytree(path, tmp_path / "bundles" / path.name)) for path in made]


def test_published_bundle_is_a_whole_copy_behind_the_pointer(
    registry: Registry, bundles: list[Path]
) -> None:
    move = registry.publish(bundles[0])

    assert move is not None
    assert (move.action, move.bundle, move.before) == ("publish", bundles[0].name, None)
    assert registry.current == bundles[0].name
    read = read_bundle(registry.path / CURRENT)
    assert read.model == (bundles[0] / MODEL).read_bytes()
    assert not (registry.path / VERSIONS / bundles[0].name).is_symlink()


def test_publishing_what_is_current_moves_nothing(registry: Registry, bundles: list[Path]) -> None:
    registry.publish(bundles[0])

    assert registry.publish(bundles[0]) is None
    assert len(registry.history()) == 1


def test_damaged_bundle_is_not_published(registry: Registry, bundles: list[Path]) -> None:
    registry.publish(bundles[0])
    (bundles[1] / MODEL).write_bytes(b"damaged")

    with pytest.raises(BundleCorrupt):
        registry.publish(bundles[1])

    assert registry.current == bundles[0].name
    assert [m.bundle_id for m in registry.versions()] == [bundles[0].name]


def test_rolling_back_twice_goes_back_by_two(registry: Registry, bundles: list[Path]) -> None:
    for path in bundles:
        registry.publish(path)

    pointed = []
    for _ in range(2):
        registry.roll_back()
        pointed.append(registry.current)
    with pytest.raises(RegistryError, match="nothing was served before"):
        registry.roll_back()

    assert pointed == [bundles[1].name, bundles[0].name]
    assert registry.current == bundles[0].name


def test_after_a_roll_back_and_a_new_bundle_the_one_before_is_what_was_rolled_back_to(
    registry: Registry, bundles: list[Path]
) -> None:
    registry.publish(bundles[0])
    registry.publish(bundles[1])
    registry.roll_back()
    registry.publish(bundles[2])
    registry.roll_back()

    assert registry.current == bundles[0].name


def test_roll_back_to_the_beginning_of_an_id(registry: Registry, bundles: list[Path]) -> None:
    for path in bundles:
        registry.publish(path)

    registry.roll_back(bundles[0].name[:6])

    assert registry.current == bundles[0].name


@pytest.mark.parametrize(
    ("to", "reason"), [("", "3 bundles here"), ("zz", "no bundle here")], ids=["all", "none"]
)
def test_roll_back_to_what_is_not_one_bundle_is_refused(
    registry: Registry, bundles: list[Path], to: str, reason: str
) -> None:
    for path in bundles:
        registry.publish(path)

    with pytest.raises(RegistryError, match=reason):
        registry.roll_back(to)

    assert registry.current == bundles[2].name


def test_roll_back_to_a_damaged_bundle_is_refused(registry: Registry, bundles: list[Path]) -> None:
    registry.publish(bundles[0])
    registry.publish(bundles[1])
    (registry.path / VERSIONS / bundles[0].name / MODEL).write_bytes(b"damaged")

    with pytest.raises(BundleCorrupt):
        registry.roll_back()

    assert registry.current == bundles[1].name


def test_published_at_the_same_time_all_are_kept_and_one_is_current(
    registry: Registry, bundles: list[Path]
) -> None:
    threads = [threading.Thread(target=registry.publish, args=(path,)) for path in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    moves = registry.history()
    assert {move.bundle for move in moves} == {path.name for path in bundles}
    assert [move.before for move in moves] == [None, *(move.bundle for move in moves[:-1])]
    assert registry.current == moves[-1].bundle


def test_damaged_history_is_named(registry: Registry, bundles: list[Path]) -> None:
    registry.publish(bundles[0])
    (registry.path / HISTORY).write_text("no json\n")

    with pytest.raises(RegistryError, match=HISTORY):
        registry.history()


def test_no_registry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no registry"):
        Registry(tmp_path / "nowhere").roll_back()


def ctr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_verbs_publish_list_and_roll_back(tmp_path: Path, bundles: list[Path]) -> None:
    where = ("--registry", tmp_path / "made")
    assert ctr("bundle", "publish", bundles[0], *where).exit_code == 0
    published = ctr("bundle", "publish", bundles[1], *where, "--json")
    listed = ctr("bundle", "list", *where, "--json")
    rolled_back = ctr("bundle", "rollback", *where)
    status = ctr("bundle", "status", *where)

    assert json.loads(published.stdout)["move"]["before"] == bundles[0].name
    rows = json.loads(listed.stdout)["bundles"]
    assert {row["bundle"]: row["is_current"] for row in rows} == {
        bundles[0].name: False,
        bundles[1].name: True,
    }
    assert f"{bundles[0].name} (was {bundles[1].name})" in rolled_back.stdout
    assert f"{bundles[0].name}, rolled back to at" in status.stdout


def test_list_is_a_table_with_the_current_one_marked(tmp_path: Path, bundles: list[Path]) -> None:
    where = ("--registry", tmp_path / "made")
    ctr("bundle", "publish", bundles[0], *where)

    lines = ctr("bundle", "list", *where).stdout.splitlines()

    (row,) = [line for line in lines if bundles[0].name in line]
    assert "*" in row


def test_publishing_no_bundle_is_an_error(tmp_path: Path) -> None:
    result = ctr("bundle", "publish", tmp_path, "--registry", tmp_path / "made")

    assert isinstance(result.exception, BundleNotFound)
