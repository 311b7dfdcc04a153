"""Readers of the public logs, on small files of the published formats."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract.errors import LogError
from model.contract.spec import load_schema
from model.datasets.ali_ccp import AliCcpSummary, write_ali_ccp
from model.datasets.aliexpress import AliExpressSummary, write_aliexpress
from model.datasets.criteo_attribution import CriteoSummary, write_criteo_attribution
from model.datasets.public_files import (
    write_ali_ccp_files,
    write_aliexpress_files,
    write_criteo_attribution_files,
)
from model.datasets.published import Chunk, PublishedFile, find_file


def silent(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def entries(*triples: tuple[str, int, float]) -> str:
    return "\x01".join(f"{f}\x02{i}\x03{v}" for f, i, v in triples)


def line(*fields: object) -> str:
    return ",".join(map(str, fields)) + "\n"


COMMON_TRAIN = line(
    "84dceed2e3a667f8",
    8,
    entries(
        ("101", 900, 1.0),
        ("121", 21, 1.0),
        ("124", 31, 1.0),
        ("109_14", 7, 3.0),
        ("109_14", 8, 1.0),
        ("110_14", 70, 1.0),
        ("110_14", 71, 1.0),
        ("129", 41, 1.0),
    ),
) + line("5d5e3a667f8dceed", 1, entries(("101", 901, 1.0)))
SKELETON_TRAIN = (
    line(
        1,
        1,
        1,
        "84dceed2e3a667f8",
        10,
        entries(
            ("205", 500, 1.0),
            ("206", 60, 1.0),
            ("207", 61, 1.0),
            ("210", 62, 1.0),
            ("210", 63, 1.0),
            ("216", 64, 1.0),
            ("508", 65, 0.5),
            ("853", 66, 0.25),
            ("853", 67, 2.0),
            ("301", 9, 1.0),
        ),
    )
    # A conversion without a click: dropped.
    + line(2, 0, 1, "84dceed2e3a667f8", 1, entries(("205", 501, 1.0)))
    + line(3, 1, 0, "5d5e3a667f8dceed", 2, entries(("205", 500, 1.0), ("205", 777, 1.0)))
)
COMMON_TEST = line("84dceed2e3a667f8", 1, entries(("101", 902, 1.0)))
SKELETON_TEST = line(1, 0, 0, "84dceed2e3a667f8", 1, entries(("205", 502, 1.0)))
ALI_CCP = {
    "common_features_train.csv": COMMON_TRAIN,
    "sample_skeleton_train.csv": SKELETON_TRAIN,
    "common_features_test.csv": COMMON_TEST,
    "sample_skeleton_test.csv": SKELETON_TEST,
}


def put(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def read_ali_ccp(tmp_path: Path, files: dict[str, str], **options: Any) -> AliCcpSummary:
    return write_ali_ccp(put(tmp_path / "in", files), tmp_path / "out", progress=silent, **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return pl.read_parquet(path / "*.parquet").to_dicts()


def test_ali_ccp_impressions_are_the_skeleton_joined_with_its_request(tmp_path: Path) -> None:
    read_ali_ccp(tmp_path, ALI_CCP)

    first, second, third = rows(tmp_path / "out" / "impressions")
    split = first.pop("split")
    assert split in ("train", "validation", "calibration")
    assert first == {
        "user_id": 900,
        "time": 0,
        "request_id": 0,
        "sample_id": 1,
        "click": 1,
        "conversion": 1,
        "item_id": 500,
        "category": 60,
        "shop": 61,
        "brand": 64,
        "position": 9,
        "category_cross": 65,
        "category_cross_value": 0.5,
        "shop_cross": None,
        "shop_cross_value": None,
        "brand_cross": None,
        "brand_cross_value": None,
        "node_1": 62,
        "node_2": 63,
        "node_3": None,
        "count_of_node": 2,
        "weight_of_node": 2.0,
        "node_cross_1": 67,
        "node_cross_2": 66,
        "node_cross_3": None,
        "count_of_node_cross": 2,
        "weight_of_node_cross": 2.25,
    }
    assert (second["sample_id"], second["user_id"], second["item_id"]) == (3, 901, 500)
    # The same index in the other file is another request, later than those of train.
    assert (third["user_id"], third["time"], third["split"]) == (902, 2, "test")


def test_ali_ccp_user_versions_hold_weighted_histories(tmp_path: Path) -> None:
    read_ali_ccp(tmp_path, ALI_CCP, slots=4)

    first, second, _ = rows(tmp_path / "out" / "users")
    assert (first["user_id"], first["time"]) == (900, 0)
    assert (first["profile_category"], first["gender"], first["geography"]) == (21, 31, 41)
    assert first["past_categories"] == [7, 7, 7, 8]  # weights 3 and 1
    assert first["top_of_past_categories"] == 7
    assert first["count_of_past_categories"] == 2
    assert first["weight_of_past_categories"] == 4.0
    assert first["past_shops"] == [70, 71]  # alike
    assert first["past_brands"] is None
    assert second["profile_category"] is None


def test_ali_ccp_counts_what_it_drops(tmp_path: Path) -> None:
    files = dict(ALI_CCP)
    files["sample_skeleton_test.csv"] = line(
        1, 0, 0, "84dceed2e3a667f8", 5, entries(("205", 502, 1.0), ("999", 1, 1.0))
    )

    summary = read_ali_ccp(tmp_path, files)

    assert summary.broken_chain == 1
    assert summary.repeated == 1
    assert summary.unknown_fields == 1
    assert summary.wrong_counts == 1
    assert sum(summary.rows.values()) == 3
    assert sum(summary.conversions.values()) == 1
    assert summary.positions == {9: 1}


def test_ali_ccp_items_have_their_last_attributes(tmp_path: Path) -> None:
    read_ali_ccp(tmp_path, ALI_CCP)

    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item_id"].to_list() == [500, 502]
    assert items["category"].to_list() == [None, None]  # the second line of item 500 has none


def test_ali_ccp_from_tar_archives_equals_that_from_files(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for fold in ("train", "test"):
        with tarfile.open(packed / f"sample_{fold}.tar.gz", "w:gz") as archive:
            for name, text in ALI_CCP.items():
                if fold in name:
                    info = tarfile.TarInfo(f"./data/{name}")
                    info.size = len(text.encode())
                    archive.addfile(info, io.BytesIO(text.encode()))
    read_ali_ccp(tmp_path, ALI_CCP)

    write_ali_ccp(packed, tmp_path / "out2", progress=silent)

    assert rows(tmp_path / "out2" / "impressions") == rows(tmp_path / "out" / "impressions")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "sample_skeleton_train.csv",
            SKELETON_TRAIN + "4,1,0\n",
            r"sample_skeleton_train.csv, line 4: expected 6 fields, got 3",
        ),
        (
            "sample_skeleton_train.csv",
            SKELETON_TRAIN + line(4, 2, 0, "84dceed2e3a667f8", 0, ""),
            r"line 4: click is '2', expected 0 or 1",
        ),
        (
            "sample_skeleton_train.csv",
            SKELETON_TRAIN + line(4, 1, 0, "gone", 1, entries(("205", 5, 1.0))),
            r"line 4: common_feature_index is 'gone', expected one of the common features",
        ),
        (
            "common_features_train.csv",
            COMMON_TRAIN + line("x", 1, "101\x02900"),
            r"common_features_train.csv, line 3: feature '101\\x02900': expected field",
        ),
        (
            "common_features_train.csv",
            COMMON_TRAIN + line("x", 2, entries(("101", 9, 1.0), ("109_14", 7, -1.0))),
            r"line 3: feature '109_14\\x027\\x03-1.0': expected .* a value of 0 or more",
        ),
        (
            "common_features_train.csv",
            COMMON_TRAIN + line("x", 1, entries(("121", 9, 1.0))),
            r"line 3: features is '121\\x029\\x031.0', expected a 101",
        ),
        (
            "common_features_train.csv",
            COMMON_TRAIN + COMMON_TRAIN,
            r"index '84dceed2e3a667f8' is there twice",
        ),
    ],
)
def test_ali_ccp_names_file_and_line_of_what_is_malformed(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(LogError, match=message):
        read_ali_ccp(tmp_path, {**ALI_CCP, name: text})


def test_failed_reading_leaves_the_old_parts(tmp_path: Path) -> None:
    read_ali_ccp(tmp_path, ALI_CCP)
    before = rows(tmp_path / "out" / "impressions")

    with pytest.raises(LogError):
        read_ali_ccp(tmp_path, {**ALI_CCP, "sample_skeleton_test.csv": "broken\n"})

    assert rows(tmp_path / "out" / "impressions") == before


def test_a_smaller_share_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    common = "".join(line(f"index{k}", 1, entries(("101", k, 1.0))) for k in range(40))
    skeleton = "".join(line(k, 0, 0, f"index{k}", 1, entries(("205", 1, 1.0))) for k in range(40))
    files = {
        **ALI_CCP,
        "common_features_train.csv": common,
        "sample_skeleton_train.csv": skeleton,
    }
    kept = []
    for share in (0.25, 0.75, 1.0):
        read_ali_ccp(tmp_path, files, keep=share)
        kept.append({r["sample_id"] for r in rows(tmp_path / "out" / "impressions")})

    assert 0 < len(kept[0]) < len(kept[1]) < 40
    assert kept[0] < kept[1] < kept[2]


# AliExpress


def user_line(search: str, **values: str) -> str:
    fields = [search, *(values.get(f"c{k}", str(k)) for k in range(2, 34))]
    return ",".join(fields) + "\n"


def item_line(search: str, label: str, **values: str) -> str:
    fields = [search, *(values.get(f"c{k}", str(k / 2)) for k in range(2, 49)), label]
    return ",".join(fields) + "\n"


ALIEXPRESS = {
    "NL_user_train.csv": user_line("10") + user_line("11", c2="", c9=""),
    "NL_item_train.csv": item_line("10", "0") + item_line("10", "2") + item_line("11", "1"),
    "NL_user_test.csv": user_line("20"),
    "NL_item_test.csv": item_line("20", "0") + item_line("21", "0"),
}


def read_aliexpress(tmp_path: Path, files: dict[str, str], **options: Any) -> AliExpressSummary:
    return write_aliexpress(
        put(tmp_path / "in", files), tmp_path / "out", progress=silent, **options
    )


def test_aliexpress_labels_and_ids(tmp_path: Path) -> None:
    read_aliexpress(tmp_path, ALIEXPRESS)

    log = pl.read_parquet(tmp_path / "out" / "impressions" / "*.parquet")
    assert log["click"].to_list() == [0, 1, 1, 0, 0]
    assert log["conversion"].to_list() == [0, 1, 0, 0, 0]
    assert log["user_id"].to_list() == ["10", "10", "11", "20", "21"]
    assert log["request_id"].to_list() == log["user_id"].to_list()
    assert log["item_id"].to_list() == [0, 1, 2, 3, 4]
    assert log["time"].to_list() == [0, 0, 0, 86400, 86400]
    assert log["split"].to_list()[3:] == ["test", "test"]


def test_aliexpress_columns_have_their_numbers_and_types(tmp_path: Path) -> None:
    read_aliexpress(tmp_path, ALIEXPRESS)

    log = pl.read_parquet(tmp_path / "out" / "impressions" / "*.parquet")
    users = pl.read_parquet(tmp_path / "out" / "users" / "*.parquet")
    categorical = [n for n in log.columns if n.startswith("item_") and log[n].dtype == pl.String]
    assert categorical == [f"item_{k}" for k in (19, 34, 35, 36, 40, 41, 42)]
    assert log["item_19"][0] == "9.5"
    assert log["item_20"][0] == 10.0
    texts = [n for n in users.columns if users[n].dtype == pl.String]
    assert texts == ["user_id", *(f"user_{k}" for k in (*range(2, 9), 32, 33))]
    assert len(users.columns) == 33
    assert users.row(1, named=True)["user_2"] is None
    assert users["user_9"].to_list() == [9.0, None, 9.0]


def test_aliexpress_counts_impressions_without_a_page(tmp_path: Path) -> None:
    summary = read_aliexpress(tmp_path, ALIEXPRESS)

    assert (summary.pages, summary.without_page) == (3, 1)


def test_aliexpress_reads_a_countrys_zips(tmp_path: Path) -> None:
    folder = tmp_path / "packed" / "NL"
    folder.mkdir(parents=True)
    for name, text in ALIEXPRESS.items():
        with zipfile.ZipFile(folder / f"{Path(name).stem.lower()}.zip", "w") as archive:
            archive.writestr(name, text)
    read_aliexpress(tmp_path, ALIEXPRESS)

    write_aliexpress(tmp_path / "packed", tmp_path / "out2", progress=silent)

    assert rows(tmp_path / "out2" / "impressions") == rows(tmp_path / "out" / "impressions")


def test_aliexpress_of_two_countries_asks_which(tmp_path: Path) -> None:
    both = {**ALIEXPRESS, **{n.replace("NL", "ES"): t for n, t in ALIEXPRESS.items()}}

    with pytest.raises(LogError, match="files of NL, ES: name one with --country"):
        read_aliexpress(tmp_path, both)

    assert read_aliexpress(tmp_path, both, country="ES").pages == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("NL_item_test.csv", item_line("20", "3"), "line 1: label is '3', expected 0, 1 or 2"),
        ("NL_item_test.csv", "20,1\n", "line 1: expected 49 fields, got 2"),
        ("NL_user_test.csv", user_line("20", c10="abc"), "user_10 is 'abc', expected a finite"),
        ("NL_user_test.csv", user_line("20") * 2, "search id '20' has two user rows"),
    ],
)
def test_aliexpress_refuses_what_is_malformed(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(LogError, match=message):
        read_aliexpress(tmp_path, {**ALIEXPRESS, name: text})


# Criteo attribution

HEADER = (
    "timestamp uid campaign conversion conversion_timestamp conversion_id attribution click "
    "click_pos click_nb cost cpo time_since_last_click cat1 cat2 cat3 cat4 cat5 cat6 cat7 cat8 cat9"
)


def criteo_line(
    time: int, user: int, *, click: int, sale: int = -1, sold_at: int = -1, attributed: int = 0
) -> str:
    values: list[object] = [time, user, 77, int(sold_at >= 0), sold_at, sale, attributed, click]
    values += [-1, -1, 0.001, 0.5, 60 if click else -1, *(f"v{k}" for k in range(1, 9)), ""]
    return "\t".join(map(str, values)) + "\n"


CRITEO = HEADER.replace(" ", "\t") + "\n"
CRITEO += criteo_line(0, 1, click=0)
# Sale 5: three impressions of its path; the second and third were clicked.
CRITEO += criteo_line(10, 2, click=0, sale=5, sold_at=900, attributed=1)
CRITEO += criteo_line(20, 2, click=1, sale=5, sold_at=900, attributed=1)
CRITEO += criteo_line(30, 2, click=1, sale=5, sold_at=900, attributed=1)
# Sale 6: clicked, not attributed.
CRITEO += criteo_line(40, 3, click=1, sale=6, sold_at=901)
# Sale 7: seen and never clicked.
CRITEO += criteo_line(50, 4, click=0, sale=7, sold_at=902, attributed=1)


def read_criteo(tmp_path: Path, text: str, **options: Any) -> CriteoSummary:
    source = put(tmp_path / "in", {"criteo_attribution_dataset.tsv": text})
    return write_criteo_attribution(source, tmp_path / "out", progress=silent, **options)


def test_criteo_conversion_counts_once_at_its_last_click(tmp_path: Path) -> None:
    summary = read_criteo(tmp_path, CRITEO)

    log = pl.read_parquet(tmp_path / "out" / "impressions" / "*.parquet")
    assert log["click"].to_list() == [0, 0, 1, 1, 1, 0]
    assert log["conversion"].to_list() == [0, 0, 0, 1, 0, 0]
    assert log["conversion_time"].to_list() == [None, None, None, 900, None, None]
    assert log["time_since_last_click"].to_list() == [None, None, 60.0, 60.0, 60.0, None]
    assert log["cat9"].null_count() == 6
    assert (summary.published_conversions, summary.unclicked, summary.repeated) == (4, 2, 1)
    assert (summary.conversions, summary.without_id) == (1, 0)


def test_criteo_any_conversion_counts_those_of_others_too(tmp_path: Path) -> None:
    read_criteo(tmp_path, CRITEO, label="any")

    log = pl.read_parquet(tmp_path / "out" / "impressions" / "*.parquet")
    assert log["conversion"].to_list() == [0, 0, 0, 1, 1, 0]


def test_criteo_events_are_clicks_and_conversions_at_their_times(tmp_path: Path) -> None:
    read_criteo(tmp_path, CRITEO)

    events = pl.read_parquet(tmp_path / "out" / "events" / "*.parquet")
    assert events.select("user_id", "time", "event").rows() == [
        ("2", 20, "click"),
        ("2", 30, "click"),
        ("2", 900, "conversion"),
        ("3", 40, "click"),
    ]
    assert pl.read_parquet(tmp_path / "out" / "items.parquet")["item_id"].to_list() == ["77"]


def test_criteo_is_read_gzipped(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with gzip.open(packed / "criteo_attribution_dataset.tsv.gz", "wt") as file:
        file.write(CRITEO)
    read_criteo(tmp_path, CRITEO)

    write_criteo_attribution(packed, tmp_path / "out2", progress=silent)

    assert rows(tmp_path / "out2" / "impressions") == rows(tmp_path / "out" / "impressions")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CRITEO.replace("\tattribution", "\tother", 1), "line 1: no column attribution"),
        (CRITEO + "1\t2\n", "line 8: expected 22 fields, got 2"),
        (CRITEO + criteo_line(1, 1, click=0).replace("0.001", "x"), None),
        (CRITEO + criteo_line(60, 1, click=7), "line 8: click is '7', expected 0 or 1"),
        (HEADER.replace(" ", "\t") + "\n", "no rows to write"),
    ],
)
def test_criteo_refuses_what_is_malformed(tmp_path: Path, text: str, message: str | None) -> None:
    if message is None:  # a column that is not read
        read_criteo(tmp_path, text)
        return
    with pytest.raises(LogError, match=message):
        read_criteo(tmp_path, text)


# What all readers share


@settings(deadline=None, max_examples=10)
@given(chunk_bytes=st.integers(1, 600))
@pytest.mark.parametrize(
    ("files", "read"),
    [
        (ALI_CCP, read_ali_ccp),
        (ALIEXPRESS, read_aliexpress),
        (
            {"t": CRITEO},
            lambda path, files, **options: read_criteo(path, files["t"], **options),
        ),
    ],
    ids=["ali-ccp", "aliexpress", "criteo-attribution"],
)
def test_what_is_written_does_not_depend_on_the_chunks(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, str],
    read: Callable[..., Any],
    chunk_bytes: int,
) -> None:
    whole, parts = (tmp_path_factory.mktemp("chunks") for _ in range(2))

    expected = read(whole, files)
    got = read(parts, files, chunk_bytes=chunk_bytes)

    assert got == expected
    written = {p.relative_to(whole): p.read_bytes() for p in (whole / "out").rglob("*.parquet")}
    assert len(written) >= 2
    for name, content in written.items():
        assert (parts / name).read_bytes() == content


def chunks_of(path: Path, **options: Any) -> list[Chunk]:
    return list(PublishedFile(path=path).chunks(progress=silent, **options))


def test_lines_keep_their_numbers_and_lose_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"h\r\na\r\nb\r\n\r\nc")

    found = chunks_of(path, chunk_bytes=4, skip_header=True)

    assert [text for chunk in found for text in chunk.lines] == ["a", "b", "", "c"]
    assert [chunk.first_line for chunk in found] == [2, 3, 5]


def test_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"a\nb\n\xff\n")

    with pytest.raises(LogError, match=r"t.csv, line 3: expected UTF-8"):
        chunks_of(path)


def test_damaged_gzip_is_an_error_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a\n" * 1000)[:-10])

    with pytest.raises(LogError, match="cannot be read"):
        chunks_of(path)


def test_missing_file_is_named_with_the_archives_looked_into(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"has none of a.csv, b.tar.gz"):
        find_file(tmp_path, "a.csv", archives=("b.tar.gz",))


def test_configuration_files_are_valid(tmp_path: Path) -> None:
    write_ali_ccp_files(tmp_path, slots=30, position=4)
    ali = load_schema(tmp_path / "schema.toml")
    histories = [f for f in ali.features if f.kind == "history"]
    assert [f.max_length for f in histories] == [30] * 4
    assert ali.feature("position").serving_value == 4
    write_aliexpress_files(tmp_path)
    assert len(load_schema(tmp_path / "schema.toml").features) == 79
    write_criteo_attribution_files(tmp_path)
    assert load_schema(tmp_path / "schema.toml").steps[1].time == "conversion_time"
