"""Leaks planted in a log are named with their figure, by `ctr schema` and by `ctr train`."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from model.checks import Finding, rows_with_step, sampled_requests
from model.config import DataConfig, TrainConfig
from model.contract.errors import LogError
from model.contract.spec import Schema, parse_schema
from model.dataset import prepare
from model.propose import Proposal, propose_schema
from model.verbs import schema as schema_verb

NUM_REQUESTS, PER_REQUEST = 1500, 5
NUM_ROWS = NUM_REQUESTS * PER_REQUEST
RNG = np.random.default_rng(5)
REQUEST = np.repeat(np.arange(NUM_REQUESTS), PER_REQUEST)
USER = REQUEST * 7 % 120
PLACE = np.tile(np.arange(1, PER_REQUEST + 1), NUM_REQUESTS)
# Users and items differ, and the first places are clicked more.
CLICK = (RNG.random(NUM_ROWS) < 0.5 / PLACE).astype(np.int64)
CONVERSION = CLICK * (RNG.random(NUM_ROWS) < 0.3)
NUMBER = RNG.normal(size=NUM_ROWS)


def clean() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "request_id": REQUEST,
            "user_id": USER,
            "item_id": (REQUEST * 17 + PLACE * 61) % 300,
            "time": 1_700_000_000 + REQUEST * 60,
            "click": CLICK,
            "conversion": CONVERSION,
            "price": NUMBER,
            "brand": np.array(["acme", "bolt", "crux"])[(USER + PLACE) % 3],
            "half_known": pl.Series(NUMBER).set(pl.Series(np.arange(NUM_ROWS) % 2 == 0), None),
        }
    )


def log_schema(*names: str, **changes: Any) -> Schema:
    frame = planted()
    features = [
        {
            "name": name,
            "kind": "categorical" if frame[name].dtype == pl.String else "numeric",
            "scope": "cross",
            "source": "request",
        }
        for name in names
    ]
    steps = [{"name": n, "label": n} for n in ("click", "conversion")]
    log = {"request_id": "request_id", **changes}
    return parse_schema({"log": log, "steps": steps, "features": features})


def planted() -> pl.DataFrame:
    mostly = np.arange(NUM_ROWS) % 10 != 0
    return clean().with_columns(
        copy=pl.Series(CLICK),
        said=pl.Series(np.array(["no", "yes"])[CONVERSION]),
        near=pl.Series(CLICK * 3.0 + NUMBER),
        filled=pl.Series(NUMBER).set(pl.Series((CLICK == 0) | ~mostly), None),
        # Also a few rows without a click have one: it does not decide, it is filled afterwards.
        mostly_filled=pl.Series(NUMBER).set(
            pl.Series(((CLICK == 0) & (np.arange(NUM_ROWS) % 40 != 1)) | ~mostly), None
        ),
        delivered=pl.Series(NUMBER).set(
            pl.Series(((CONVERSION == 0) & (np.arange(NUM_ROWS) % 40 != 1)) | ~mostly), None
        ),
        nth=pl.Series(PLACE),
        place_rank=pl.Series(PLACE % 3),
    )


def findings(tmp_path: Path, frame: pl.DataFrame, schema: Schema) -> list[dict[str, Any]]:
    """Those of training, by the very function that `ctr train` calls."""
    path = tmp_path / "log.parquet"
    frame.write_parquet(path)
    config = TrainConfig(data=DataConfig(impressions=path, schema_file=tmp_path / "s.toml"))
    report = prepare(config, schema=schema, progress=lambda _: None).report
    found: Any = report["findings"]
    return list(found)


def of(found: list[dict[str, Any]], check: str) -> dict[str, dict[str, Any]]:
    return {finding["subject"]: finding for finding in found if finding["check"] == check}


def test_a_clean_log_has_no_findings(tmp_path: Path) -> None:
    assert findings(tmp_path, clean(), log_schema("price", "brand", "half_known")) == []


def test_training_ends_on_features_that_decide_a_label(tmp_path: Path) -> None:
    with pytest.raises(LogError) as caught:
        findings(tmp_path, planted(), log_schema("price", "copy", "said"))

    message = str(caught.value)
    assert "feature 'copy' decides step 'click'" in message
    assert "feature 'said' decides step 'conversion' of rows with 'click'" in message
    assert "'price'" not in message


def test_training_names_what_separates_a_label_almost_alone(tmp_path: Path) -> None:
    found = of(findings(tmp_path, planted(), log_schema("price", "near")), "separates")

    assert set(found) == {"near"}
    assert found["near"]["figure"] == pytest.approx(0.983, abs=0.01)
    assert "AUC is 0.98" in found["near"]["message"]


def test_training_names_columns_that_are_filled_after_the_event(tmp_path: Path) -> None:
    schema = log_schema("half_known", "mostly_filled", "delivered")

    found = of(findings(tmp_path, planted(), schema), "presence")

    assert set(found) == {"mostly_filled", "delivered"}
    assert "% of rows with step 'click' have a value, 2" in found["mostly_filled"]["message"]
    assert "step 'click'" in found["mostly_filled"]["message"]
    assert "of rows with 'click'" in found["delivered"]["message"]


def test_training_names_positions_by_what_they_do_and_by_name(tmp_path: Path) -> None:
    found = of(findings(tmp_path, planted(), log_schema("price", "nth", "place_rank")), "position")

    assert set(found) == {"nth", "place_rank"}
    # The rates are 0.5 and 0.1, of some 1050 training rows at each place.
    assert re.search(r"\(rate 5\d\.\d\d% at 1, 1\d\.\d\d% at 5\)", found["nth"]["message"])
    assert found["nth"]["figure"] == pytest.approx(0.4, abs=0.05)
    assert "by its name" in found["place_rank"]["message"]


def test_training_names_duplicated_impressions(tmp_path: Path) -> None:
    frame = clean()

    found = of(
        findings(tmp_path, pl.concat([frame, frame[:750]]), log_schema("price")), "duplicates"
    )

    assert found["impressions"]["figure"] == pytest.approx(750 / (NUM_ROWS + 750))
    assert "750 rows (9.1%)" in found["impressions"]["message"]


def test_training_names_time_that_goes_backwards(tmp_path: Path) -> None:
    frame = clean()
    # Every second pair of requests changes places in the file.
    shuffled = pl.concat([frame[3750:], frame[:3750]])
    frame = frame.with_columns(
        conversion_time=pl.when(pl.col("conversion") == 1).then(pl.col("time") - 5)
    )
    schema = log_schema("price")
    steps = [schema.steps[0], schema.steps[1].model_copy(update={"time": "conversion_time"})]
    timed = schema.model_copy(update={"steps": tuple(steps)})

    early = of(findings(tmp_path, frame, timed), "backwards")

    assert set(early) == {"conversion"}
    assert early["conversion"]["figure"] == 1.0
    # One step back in 7,500 rows is one file after the other; a tenth is disorder.
    assert of(findings(tmp_path, shuffled, schema), "backwards") == {}
    mixed = clean().with_columns(pl.Series("time", 1_700_000_000 + (REQUEST ^ 1) * 60))
    found = of(findings(tmp_path, mixed, schema), "backwards")
    assert found["time"]["figure"] == pytest.approx(750 / NUM_ROWS)


def test_training_names_users_and_requests_across_splits(tmp_path: Path) -> None:
    names = np.array(["train", "validation", "calibration", "test"])
    frame = clean().with_columns(split=pl.Series(names[np.arange(NUM_ROWS) % 4].tolist()))

    found = findings(tmp_path, frame, log_schema("price", split="split"))

    assert set(of(found, "users")) == {"validation", "calibration", "test"}
    assert of(found, "requests")["test"]["figure"] == 1.0
    # Test has rows of the first request: nearly all of train is later.
    assert of(found, "overlap")["test"]["figure"] > 0.99


def test_a_split_by_time_shares_users_and_is_not_blamed_for_it(tmp_path: Path) -> None:
    frame = clean()
    assert frame["user_id"].n_unique() == 120  # of 1500 requests: each is in every split

    assert of(findings(tmp_path, frame, log_schema("price")), "users") == {}


def test_training_names_features_that_drift(tmp_path: Path) -> None:
    frame = clean().with_columns(
        later=pl.Series(NUMBER + np.arange(NUM_ROWS) / 2000),
        theme=pl.Series(np.where(np.arange(NUM_ROWS) < 6000, "autumn", "winter")),
    )
    schema = parse_schema(
        {
            "log": {"request_id": "request_id"},
            "steps": [{"name": n, "label": n} for n in ("click", "conversion")],
            "features": [
                {"name": "price", "kind": "numeric", "scope": "cross", "source": "request"},
                {"name": "later", "kind": "numeric", "scope": "cross", "source": "request"},
                {"name": "theme", "kind": "categorical", "scope": "context", "source": "request"},
            ],
        }
    )

    found = [f for f in findings(tmp_path, frame, schema) if f["check"] == "drift"]

    assert [finding["subject"] for finding in found] == ["theme", "later"]
    assert "population stability index from train to test is" in found[0]["message"]


def propose(tmp_path: Path, frame: pl.DataFrame) -> Proposal:
    path = tmp_path / "log.parquet"
    frame.write_parquet(path)
    return propose_schema(path)


def test_schema_leaves_out_planted_leaks_with_their_figures(tmp_path: Path) -> None:
    proposal = propose(tmp_path, planted())

    assert set(proposal.refused) == {
        *("copy", "said", "near", "filled", "mostly_filled", "delivered"),
    }
    assert "AUC 1.0000" in proposal.refused["copy"]
    assert "AUC 0.98" in proposal.refused["near"]
    assert "filled only where 'click' is 1" in proposal.refused["filled"]
    assert "of its rows have a value" in proposal.refused["delivered"]


def test_schema_proposes_a_position_for_the_log_only_whatever_its_name(tmp_path: Path) -> None:
    proposal = propose(tmp_path, planted())

    before, _, after = proposal.toml.partition('name = "nth"')
    assert before
    assert 'source = "log_only"' in after.partition("[[features]]")[0]
    assert [f for f in proposal.findings if f.check == "position"] == []


def test_schema_finds_what_is_wrong_with_the_rows(tmp_path: Path) -> None:
    frame = clean()

    proposal = propose(tmp_path, pl.concat([frame, frame[:750]]))

    checks = {finding.check: finding for finding in proposal.findings}
    assert checks["duplicates"].figure == pytest.approx(750 / (NUM_ROWS + 750))
    assert propose(tmp_path, frame).findings == []


def test_the_verb_prints_findings_to_stderr(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    frame = clean()
    pl.concat([frame, frame[:750]]).write_parquet(path)

    result = CliRunner().invoke(schema_verb, [str(path)])

    assert result.exit_code == 0
    assert "check: duplicated impressions: 750 rows (9.1%)" in result.stderr
    assert "check:" not in result.stdout


def test_a_sample_has_whole_requests() -> None:
    request = np.repeat(np.arange(5000), 4)

    rows = sampled_requests(request, max_rows=2000)

    assert 1500 < len(rows) < 2500
    assert (np.bincount(request[rows]) % 4 == 0).all()
    assert sampled_requests(request[:100], max_rows=2000).tolist() == list(range(100))


def test_the_later_step_is_judged_on_all_rows_with_the_one_before() -> None:
    labels = np.zeros((300_000, 2), np.int8)
    labels[::1000, 0] = 1

    assert rows_with_step(labels, 0).tolist() == list(range(0, 300_000, 1000))


def test_labels_may_be_true_or_false(tmp_path: Path) -> None:
    frame = clean().with_columns(pl.col("click", "conversion").cast(pl.Boolean))

    assert propose(tmp_path, pl.concat([frame, frame[:750]])).findings != []


def test_a_finding_is_plain_data() -> None:
    finding = Finding(check="drift", subject="x", figure=1.0, message="m")

    assert finding.as_json() == {
        "check": "drift",
        "subject": "x",
        "figure": 1.0,
        "message": "m",
        "is_certain": False,
    }
