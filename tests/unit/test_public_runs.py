"""From published files to a run's data by one command each, on small files of the formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.reader_memory import write_ali_ccp_files
from model.config import load_config
from model.contract.spec import load_schema
from model.dataset import EncodedData, prepare
from model.verbs import train
from model.verbs_data import data


def made(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(data, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def prepared(out: Path) -> EncodedData:
    config = load_config(out / "train.toml")
    schema = load_schema(config.data.schema_file)
    return prepare(config, schema=schema, progress=lambda _: None)


def write_ali_ccp(path: Path) -> Path:
    path.mkdir()
    write_ali_ccp_files(path, num_bytes=600_000, seed=1, rows_per_request=6, mean_user_entries=12)
    return path


def write_aliexpress(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(1)
    for fold, pages in (("train", 400), ("test", 100)):
        users, items = [], []
        for page in range(pages):
            search = f"{fold}-{page}"
            users.append(",".join([search, *map(str, rng.integers(1, 9, 32))]))
            for _ in range(5):
                label = int(rng.choice(3, p=[0.7, 0.2, 0.1]))
                values = np.round(rng.random(47), 3)
                items.append(",".join([search, *map(str, values), str(label)]))
        (path / f"NL_user_{fold}.csv").write_text("\n".join(users))
        (path / f"NL_item_{fold}.csv").write_text("\n".join(items))
    return path


def write_criteo(path: Path) -> Path:
    path.mkdir()
    rng = np.random.default_rng(1)
    names = ["timestamp", "uid", "campaign", "conversion", "conversion_timestamp", "conversion_id"]
    names += ["attribution", "click", "click_pos", "click_nb", "cost", "cpo"]
    names += ["time_since_last_click", *(f"cat{k}" for k in range(1, 10))]
    lines = ["\t".join(names)]
    for row in range(4000):
        click, sold = (rng.random(2) < (0.3, 0.2)).tolist()
        sold_at = row * 600 + 50 if sold else -1
        fields: list[object] = [row * 600, int(rng.integers(200)), int(rng.integers(20))]
        fields += [int(sold), sold_at, row if sold else -1, int(sold), int(click)]
        fields += [-1, -1, 0.1, 0.2, -1 if row % 2 else row, *rng.integers(1, 5, 9).tolist()]
        lines.append("\t".join(map(str, fields)))
    (path / "criteo_attribution_dataset.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_ali_ccp_trains_by_one_command(tmp_path: Path) -> None:
    source, out = write_ali_ccp(tmp_path / "in"), tmp_path / "out"
    summary = made("ali-ccp", str(source), str(out), "--slots", "4")
    # A small run: small tables, one short epoch.
    schema = (out / "schema.toml").read_text()
    for size in (20000, 200000, 100000):
        schema = schema.replace(f"num_buckets = {size}\n", "num_buckets = 500\n")
    (out / "schema.toml").write_text(schema)
    command = [str(out / "train.toml"), "--run", str(tmp_path / "run"), "--json"]
    command += ["--cache", str(tmp_path / "cache"), "--set", "optimizer.min_steps=0"]

    result = CliRunner().invoke(train, command)

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["data"]
    assert report["rows_read"] == sum(summary["rows"].values()) > 4_000
    assert {n: s["rows"] for n, s in report["splits"].items()} == summary["rows"]
    assert report["findings"] == []


def test_ali_ccp_histories_reach_the_network_by_weight(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made("ali-ccp", str(write_ali_ccp(tmp_path / "in")), str(out), "--slots", "8")

    encoded = prepared(out)

    split = encoded.splits["test"]
    assert split.request_history.shape[1] == 4 * 8
    places = (split.request_history != 0).sum(axis=1)
    assert places.max() == 32
    # Some id takes several places of a row.
    first = split.request_history[:, :8]
    assert any(len(set(row.tolist()) - {0}) < (row != 0).sum() for row in first)


@pytest.mark.parametrize(
    ("verb", "write"),
    [("aliexpress", write_aliexpress), ("criteo-attribution", write_criteo)],
    ids=["aliexpress", "criteo-attribution"],
)
def test_the_other_logs_are_ready_to_train(tmp_path: Path, verb: str, write: Any) -> None:
    out = tmp_path / "out"
    summary = made(verb, str(write(tmp_path / "in")), str(out))

    encoded = prepared(out)

    rows = summary["rows"]
    num_rows = sum(rows.values()) if isinstance(rows, dict) else rows
    assert sum(len(split) for split in encoded.splits.values()) == num_rows
    assert encoded.report["rows_broken_chain"] == 0


def test_counts_and_the_next_command_are_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = CliRunner().invoke(
        data, ["aliexpress", str(write_aliexpress(tmp_path / "in")), str(out)]
    )

    assert result.exit_code == 0, result.output
    assert "pages: 500" in result.stdout
    assert "train.toml --run RUN" in result.stdout.replace("\n", "")


def test_a_directory_without_the_files_is_an_error_of_the_data(tmp_path: Path) -> None:
    result = CliRunner().invoke(data, ["criteo-attribution", str(tmp_path), str(tmp_path / "out")])

    assert "criteo_attribution_dataset.tsv" in str(result.exception)
