import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import tiny
from click.testing import CliRunner

from model.contract.errors import BundleNotFound, GateError, LogError, ParityError
from model.contract.record import pack_record
from service import cli
from service.cli import VERBS
from service.errors import InvalidRequest, StoreMisconfigured
from service.settings import SettingsError
from service.verbs import load_records, score, serve

RECORD = pack_record(tiny.record())
BODY = {"user_id": 7, "time": tiny.NOON_TEXT, "candidates": [1, "2", 99]}


def run_main(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ctr", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture
def body_file(tmp_path: Path) -> Path:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(BODY))
    return path


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        (
            "from service.cli import cli; cli.main(['--help'], standalone_mode=False)",
            ("torch", "fastapi", "polars", "onnxruntime", "model.verbs", "service.verbs"),
        ),
        ("import service.app, service.server, service.verbs", ("torch", "onnx", "sklearn")),
        ("import service.scorer", ("fastapi", "starlette", "redis")),
    ],
)
def test_imports_stay_lean(statement: str, forbidden: tuple[str, ...]) -> None:
    check = f"import sys; {statement}; print([m for m in {forbidden!r} if m in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_main(["--help"], monkeypatch, capsys)

    assert code == 0
    for name, (_, text) in VERBS.items():
        assert name in out
        assert text in out


def test_own_verbs_are_where_the_table_says() -> None:
    group = cli.LazyGroup()
    own = {name for name, (target, _) in VERBS.items() if target.startswith("service.verbs:")}

    assert own == {"serve", "score", "load-records"}
    commands = {name: group.get_command(None, name) for name in own}  # type: ignore[arg-type]  # not read
    assert commands == {"serve": serve, "score": score, "load-records": load_records}


@pytest.mark.parametrize("arguments", [["nothing"], ["serve", "--colour", "red"], ["load-records"]])
def test_wrong_usage_ends_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(arguments, monkeypatch, capsys)[0] == 2


@pytest.mark.parametrize("verb", ["serve", "score"])
def test_no_bundle_ends_with_2(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_main([verb], monkeypatch, capsys)

    assert code == 2
    assert "--bundle DIR" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (BundleNotFound("no bundle at x"), 3, "no bundle at x"),
        (LogError("two\nlines"), 3, "two; lines"),
        (ParityError("differs", max_abs_diff=1.0, tolerance=0.1), 4, "differs"),
        (GateError(["auc_ctr is 0.5", "ne_ctr is 2"]), 4, "not exported: auc_ctr is 0.5; ne_ctr"),
        (SettingsError("CTR_X: no such setting"), 2, "CTR_X: no such setting"),
        (StoreMisconfigured("wrong password"), 2, "wrong password"),
        (InvalidRequest("expected an id", field="user_id"), 3, "request: user_id: expected an id"),
        (ModuleNotFoundError("No module", name="torch.nn"), 2, "the package 'torch' is not"),
        (
            ModuleNotFoundError("No module", name="lightgbm"),
            2,
            "the package 'lightgbm' is not installed; pip install 'ctr-scoring[compare]' brings it",
        ),
    ],
)
def test_known_error_is_one_line_and_its_exit_code(
    error: Exception,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(serve, "callback", fail)

    actual, out, err = run_main(["serve"], monkeypatch, capsys)

    assert actual == code
    assert out == ""
    assert err.startswith(f"ctr: {text}")
    assert err.count("\n") == 1


def test_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(serve, "callback", fail)
    monkeypatch.setattr(sys, "argv", ["ctr", "serve"])

    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("verb", ["serve", "score"])
def test_missing_bundle_ends_with_3(
    verb: str,
    tmp_path: Path,
    body_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CTR_STORE__URL", "memory://")
    arguments = [verb, "--bundle", str(tmp_path / "nowhere")]
    if verb == "score":
        arguments.append(str(body_file))
    else:
        arguments += ["--port", "0"]
    monkeypatch.setattr("service.log_lines.configure_logging", lambda level: None)

    code, _, err = run_main(arguments, monkeypatch, capsys)

    assert code == 3
    assert err.splitlines() == [f"ctr: no bundle at {tmp_path / 'nowhere'} (no manifest.json)"]


def test_taken_port_ends_with_2(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    monkeypatch.setenv("CTR_STORE__URL", "memory://")
    monkeypatch.setattr("service.log_lines.configure_logging", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run_main(
            ["serve", "--bundle", str(tiny_bundle), "--port", str(port)], monkeypatch, capsys
        )

    assert code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in err


def test_score_prints_the_answer_as_json(
    tiny_bundle: Path, tiny_items: Path, body_file: Path
) -> None:
    options = ["--bundle", str(tiny_bundle), "--items", str(tiny_items), "--json"]

    result = CliRunner().invoke(score, [str(body_file), *options])

    answer = json.loads(result.stdout)
    assert answer["bundle"] == tiny_bundle.name
    assert answer["user_status"] == "unknown"
    assert [item["item_id"] for item in answer["items"]] == [1, "2", 99]
    assert [item["status"] for item in answer["items"]] == ["ok", "ok", "unknown_item"]


def test_score_reads_stdin_and_prints_a_table(tiny_bundle: Path, tiny_items: Path) -> None:
    result = CliRunner().invoke(
        score,
        ["--bundle", str(tiny_bundle), "--items", str(tiny_items)],
        input=json.dumps({**BODY, "context": {"weather": 1}}),
    )

    assert result.exit_code == 0
    for text in ("item_id", "pctcvr", "unknown_item", "user unknown", "ignored: weather"):
        assert text in result.stdout


@pytest.mark.parametrize("form", ["packed", "parquet"])
def test_score_uses_a_record(
    tiny_bundle: Path, tiny_items: Path, body_file: Path, tmp_path: Path, form: str
) -> None:
    path = tmp_path / "record"
    if form == "packed":
        path.write_bytes(RECORD)
    else:
        pl.DataFrame({"user_id": ["6", "7"], "record": [b"", RECORD]}).write_parquet(path)
    options = ["--bundle", str(tiny_bundle), "--items", str(tiny_items), "--json"]

    result = CliRunner().invoke(score, [str(body_file), *options, "--record", str(path)])

    assert json.loads(result.stdout)["user_status"] == "ok"


def test_score_refuses_a_bad_request_by_its_field(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "request.json"
    path.write_text('{"user_id": 7, "candidates": []}')

    code, _, err = run_main(["score", "--bundle", str(tiny_bundle), str(path)], monkeypatch, capsys)

    assert code == 3
    assert err == "ctr: request: candidates: there is none, expected at least 1\n"


def test_load_records_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTR_STORE__URL", "memory://")
    path = tmp_path / "records.parquet"
    pl.DataFrame({"user_id": ["6", "7"], "record": [RECORD, RECORD]}).write_parquet(path)

    result = CliRunner().invoke(load_records, [str(path)])

    assert result.exit_code == 0
    assert result.stdout == "2 user records written\n"


def test_load_records_refuses_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CTR_STORE__URL", "memory://")
    path = tmp_path / "records.parquet"
    pl.DataFrame({"user_id": ["6", "7"], "record": [RECORD, b"no"]}).write_parquet(path)

    code, _, err = run_main(["load-records", str(path)], monkeypatch, capsys)

    assert code == 3
    assert "row 1: " in err


def test_unknown_setting_ends_with_2(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CTR_PROT", "8000")
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    code, _, err = run_main(["serve", "--bundle", str(tiny_bundle)], monkeypatch, capsys)

    assert code == 2
    assert "CTR_PROT" in err
