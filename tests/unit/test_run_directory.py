import multiprocessing
import signal
from pathlib import Path

from service.run_directory import run_directory


def test_directory_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with run_directory(tmp_path) as directory:
        (directory / "0.items").write_bytes(b"x")
        mode = directory.stat().st_mode & 0o777

    assert mode == 0o700
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    with run_directory(tmp_path) as first, run_directory(tmp_path) as second:
        assert first.exists()
        assert first != second


def test_directory_of_a_killed_service_is_removed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_be_killed, args=(tmp_path,))
    process.start()
    process.join(60)
    (abandoned,) = tmp_path.iterdir()

    with run_directory(tmp_path):
        assert not abandoned.exists()

    assert process.exitcode == -signal.SIGKILL


def test_path_is_short_enough_for_sockets(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()

    with run_directory(deep) as directory:
        assert len(bytes(directory / "255.sock")) <= 103


def _be_killed(parent: Path) -> None:
    with run_directory(parent):
        signal.raise_signal(signal.SIGKILL)
