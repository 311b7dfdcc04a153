"""A chain of three steps through the real verbs and the real service: ordered in every answer."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import pytest
import tomli_w
import torch
from click.testing import CliRunner
from conftest import StartApp
from fakes import FailingStore

from model import export, verbs
from model.comparison.picture import draw_frontier
from model.comparison.plan import CompareConfig, Plan, make_plan
from model.comparison.results import summarise
from model.comparison.tables import markdown
from model.comparison.worker import do
from model.config import GatesConfig
from model.contract.bundle import read_bundle
from model.contract.spec import load_schema
from model.contract.times import format_time
from model.gates import check_gates
from model.run import read_run
from service.errors import StoreUnavailable
from service.materialize import load_records
from service.settings import load_settings
from service.stores.base import OnlineStore
from service.stores.memory import MemoryStore
from service.verbs import score

DAY = 86_400
START = 1_700_000_000 // DAY * DAY
NUM_REQUESTS, PER_REQUEST, NUM_DAYS = 600, 4, 40
NUM_USERS, NUM_ITEMS = 30, 24
OUTPUTS = ("p_category", "p_click", "p_conversion", "p_conversion_given_click")
NUM_POSTS = 120
ROUNDING = 2.0**-24  # relative, of one product in float32
HOSTILE_IDS = ("", "\x00", "-1", "1e309", "nan", "9" * 400, "💥", "' OR 1=1 --", "null", "\ud7ff")

SCHEMA: dict[str, Any] = {
    "log": {"request_id": "request_id"},
    "steps": [{"name": name, "label": name} for name in ("category", "click", "conversion")],
    "features": [
        {"name": "hour", "kind": "time_part", "part": "hour"},
        {"name": "town", "kind": "categorical", "scope": "user", "source": "store"},
        {
            "name": "purchases",
            "kind": "numeric",
            "scope": "user",
            "source": "store",
            "log1p": True,
            "minimum": 0,
            "statistic": {"event": "buy", "aggregate": "count"},
        },
        {"name": "item_id", "kind": "categorical", "scope": "item", "source": "items"},
        {"name": "brand", "kind": "categorical", "scope": "item", "source": "items"},
        {"name": "discount", "kind": "numeric", "scope": "cross", "source": "request"},
        {"name": "bought_item", "kind": "match", "attribute": "item_id", "events": ["buy"]},
    ],
}
NET = {"embedding": 4, "width": 8, "patterns": 2, "pattern_hidden": 16, "pattern": 12, "head": 8}
CONFIG: dict[str, Any] = {
    "data": {
        "schema_file": "schema.toml",
        **{name: f"{name}.parquet" for name in ("impressions", "events", "items", "users")},
    },
    "split": {"train_share": 0.6, "test_share": 0.2},
    "net": {"architecture": "tafe", "options": NET},
    "objective": {"name": "e2e", "step_weights": [1.0, 1.0, 2.0]},
    "alignment": {"mode": "prior"},
    "optimizer": {
        "batch_rows": 128,
        "learning_rate": 1e-2,
        "average_decay": 0.9,
        "min_steps": 0,
        "max_epochs": 3,
        "num_threads": 1,
    },
}


def write_shop(path: Path) -> None:
    """Users like a brand; what they like they look at, then click, then buy more often."""
    rng = np.random.default_rng(11)
    brand_of, taste = rng.integers(0, 4, NUM_ITEMS), rng.integers(0, 4, NUM_USERS)
    time = np.sort(START + rng.integers(0, NUM_DAYS * DAY, NUM_REQUESTS))
    user = rng.integers(0, NUM_USERS, NUM_REQUESTS)
    request = np.repeat(np.arange(NUM_REQUESTS), PER_REQUEST)
    item = np.concatenate([rng.choice(NUM_ITEMS, PER_REQUEST, False) for _ in range(NUM_REQUESTS)])
    is_liked = brand_of[item] == taste[user[request]]
    labels = np.ones((3, len(item)), np.int64)
    for t, (liked, other) in enumerate(((0.8, 0.3), (0.7, 0.4), (0.6, 0.3))):
        drawn = rng.random(len(item)) < np.where(is_liked, liked, other)
        labels[t] = drawn & (labels[t - 1] == 1 if t else True)
    log = pl.DataFrame(
        {
            "request_id": request,
            "user_id": user[request],
            "item_id": item,
            "time": time[request],
            "discount": rng.random(len(item)),
            **dict(zip(("category", "click", "conversion"), labels, strict=True)),
        }
    )
    log.write_parquet(path / "impressions.parquet")
    bought = log.filter(pl.col("conversion") == 1).select("user_id", "item_id", "time")
    bought.with_columns(event=pl.lit("buy")).write_parquet(path / "events.parquet")
    brands = [f"brand {i}" for i in brand_of.tolist()]
    pl.DataFrame({"item_id": range(NUM_ITEMS), "brand": brands}).write_parquet(
        path / "items.parquet"
    )
    towns = ["north" if i % 2 else "south" for i in range(NUM_USERS)]
    pl.DataFrame({"user_id": range(NUM_USERS), "town": towns}).write_parquet(path / "users.parquet")
    (path / "schema.toml").write_text(tomli_w.dumps(SCHEMA))
    (path / "train.toml").write_text(tomli_w.dumps(CONFIG))


def ctr(command: click.Command, *arguments: object) -> str:
    done = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Made:
    """Where the verbs wrote, and what they said."""

    path: Path
    bundle: Path
    trained: str
    evaluation: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    before = torch.get_num_threads()
    path = tmp_path_factory.mktemp("three")
    write_shop(path)
    cache = ("--cache", path / "cache")
    trained = ctr(verbs.train, path / "train.toml", "--run", path / "run", *cache)
    evaluated = ctr(verbs.evaluate, path / "run", *cache, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "NUM_PARITY_ROWS", 10_000)
        exported = ctr(verbs.export, path / "run", "--out", path / "bundles", *cache, "--json")
    ctr(verbs.snapshot, path / "run", "--as-of", "end", "--out", path / "snapshot")
    yield Made(
        path=path,
        bundle=Path(json.loads(exported)["bundle"]),
        trained=trained,
        evaluation=json.loads(evaluated),
    )
    torch.set_num_threads(before)


def test_metrics_are_of_three_cumulative_steps_and_two_conditional_ones(made: Made) -> None:
    test = made.evaluation["test"]

    assert {name for name in test if name.startswith("auc_")} == {
        "auc_p_category",
        "auc_p_click",
        "auc_p_conversion",
        "auc_click_given_category",
        "auc_conversion_given_click",
    }
    assert test["rows_click_given_category"] == test["positives_p_category"]
    assert test["rows_conversion_given_click"] == test["positives_p_click"]
    assert "auc_click_given_category" in made.trained


@pytest.mark.parametrize("name", ["p_category", "p_click", "p_conversion"])
def test_every_step_is_learnt(name: str, made: Made) -> None:
    assert made.evaluation["test"][f"auc_{name}"] > 0.6
    assert made.evaluation["test"][f"ne_{name}"] < 1.0


def test_every_step_has_its_calibrator_and_every_output_its_name(made: Made) -> None:
    manifest = read_bundle(made.bundle).manifest

    assert tuple(manifest.steps) == tuple(manifest.calibration)
    assert tuple(manifest.steps) == ("category", "click", "conversion")
    assert tuple(manifest.outputs) == OUTPUTS


def test_inspect_shows_the_chain(made: Made) -> None:
    shown = " ".join(ctr(verbs.inspect, made.bundle).split())

    assert "category -> click -> conversion" in shown
    assert "calibration of category" in shown
    assert "p_conversion_given_click" in shown


def test_gates_are_of_the_three_steps(made: Made) -> None:
    gates = GatesConfig(max_pcoc_error=1e-9, max_ne={"ne_p_category": 0.0})

    failures = check_gates(gates, made.evaluation, schema=load_schema(made.path / "schema.toml"))

    assert [text.split()[0] for text in failures] == [
        "pcoc_p_category",
        "pcoc_p_click",
        "pcoc_p_conversion",
        "ne_p_category",
    ]


def random_body(rng: np.random.Generator) -> dict[str, Any]:
    """Known and unknown users and items, hostile ids, values missing or far off, 1 to 40 rows."""
    num_rows = int(rng.integers(1, 41))

    def identity(known: int) -> int | str | float:
        kind = rng.integers(4)
        if kind == 0:
            return HOSTILE_IDS[rng.integers(1, len(HOSTILE_IDS))]  # an empty one is refused
        if kind == 1:
            return int(rng.integers(-(2**53), 2**53))
        return int(rng.integers(known))

    end = START + NUM_DAYS * DAY
    time = {} if rng.random() < 0.5 else {"time": format_time(end + int(rng.integers(DAY)))}
    discounts = (None, 0.3, -1e30, 1e30, 0.0, 5e-324)
    return {
        **time,
        "user_id": identity(NUM_USERS),
        "candidates": {
            "item_id": [identity(NUM_ITEMS) for _ in range(num_rows)],
            "discount": [discounts[rng.integers(len(discounts))] for _ in range(num_rows)],
        },
        "user_features": {} if rng.random() < 0.7 else {"purchases": float(rng.integers(10**6))},
    }


def test_step_that_is_not_served_changes_no_number(made: Made) -> None:
    run, golden = read_run(made.path / "run"), read_bundle(made.bundle).golden
    schema = run.fitted.schema_
    hidden = schema.steps[0].model_copy(update={"served": False})
    shorter = schema.model_copy(update={"steps": (hidden, *schema.steps[1:])})
    graph = export.scoring_graph(run.net, run.calibrators, schema=shorter)

    scored = export.run_torch(graph, golden.blocks, shorter.output_names)

    assert tuple(scored) == ("pctr", "pctcvr", "pcvr")
    for name, served_as in zip(scored, OUTPUTS[1:], strict=True):
        np.testing.assert_array_equal(scored[name], golden.expected[served_as])


@pytest.mark.anyio
@pytest.mark.parametrize("is_store_lost", [False, True])
async def test_every_candidate_of_every_answer_is_ordered(
    is_store_lost: bool, made: Made, start_app: StartApp
) -> None:
    """p_category >= p_click >= p_conversion exactly; the last is the product up to rounding."""
    settings = load_settings(
        bundle=made.bundle,
        item_snapshot=made.path / "snapshot" / "items.parquet",
        limits={"timeout_ms": 20_000, "max_timeout_ms": 30_000},
        store={"timeout_ms": 1000},
    )
    store: OnlineStore = FailingStore(StoreUnavailable()) if is_store_lost else MemoryStore()
    if not is_store_lost:
        await load_records(made.path / "snapshot" / "records.parquet", store, ttl_s=None)
    rng = np.random.default_rng(5)
    bodies = [random_body(rng) for _ in range(NUM_POSTS)]

    async with start_app(settings, store) as app:
        responses = []
        for start in range(0, NUM_POSTS, 8):  # together: they share micro-batches
            posts = [app.client.post("/score", json=b) for b in bodies[start : start + 8]]
            responses += await asyncio.gather(*posts)

    assert [response.status_code for response in responses] == [200] * NUM_POSTS
    answers = [response.json() for response in responses]
    found = {answer["user_status"] for answer in answers}
    assert found == ({"degraded"} if is_store_lost else {"ok", "stale", "unknown"})
    items = [item for answer in answers for item in answer["items"]]
    assert len(items) == sum(len(body["candidates"]["item_id"]) for body in bodies)
    assert len(items) > 2000
    assert {tuple(item) for item in items} == {("item_id", *OUTPUTS, "status")}
    assert {item["status"] for item in items} == {"ok", "unknown_item"}
    category, clicked, bought, given = (
        np.array([item[name] for item in items], np.float64) for name in OUTPUTS
    )
    assert (category <= 1.0).all()
    assert (category >= clicked).all()
    assert (clicked >= bought).all()
    assert (bought > 0.0).all()
    np.testing.assert_allclose(bought, clicked * given, rtol=ROUNDING, atol=0)
    assert len(np.unique(bought)) > 100  # not one number for all


def test_score_verb_shows_the_chain(made: Made) -> None:
    request = made.path / "request.json"
    request.write_text(json.dumps({"user_id": 3, "candidates": [1, 2, 99]}))

    shown = ctr(
        score,
        request,
        *("--bundle", made.bundle, "--items", made.path / "snapshot" / "items.parquet"),
        *("--record", made.path / "snapshot" / "records.parquet", "--json"),
    )

    items = json.loads(shown)["items"]
    assert [item["item_id"] for item in items] == [1, 2, 99]
    assert all(item["p_category"] >= item["p_click"] >= item["p_conversion"] for item in items)


@pytest.fixture(scope="module")
def compared(made: Made) -> Plan:
    """LightGBM and a network with free heads, each once, in this process."""
    config = CompareConfig.model_validate(
        {
            "config": made.path / "train.toml",
            "reference": "lightgbm",
            "seeds": [1],
            "draws": 20,
            "arms": [
                {"name": "lightgbm", "kind": "lightgbm", "options": {"max_rounds": 20}},
                {
                    "name": "aitm",
                    "set": [
                        "net.architecture=aitm",
                        "net.options={embedding=4, bottom=[8], widths=[8, 8]}",
                        "objective.name=hinge",
                    ],
                },
            ],
        }
    )
    plan = make_plan(config, out=made.path / "out", cache=made.path / "cache")
    for tasks in plan.runs.values():
        for kind in ("train", "cost"):
            do(tasks[0].model_copy(update={"kind": kind}), say=lambda text: None)
    return plan


def test_comparison_tells_of_every_space(compared: Plan) -> None:
    summary = summarise(compared.runs, reference="lightgbm")

    assert summary is not None
    assert summary.sort_by == "auc_p_conversion"
    assert list(summary.frontier) == ["auc_p_category", "auc_p_click", "auc_p_conversion"]
    text = markdown(summary)
    for name in ("p_category", "click_given_category", "conversion_given_click", "p_conversion"):
        assert f"auc_{name} " in text
    net = next(arm for arm in summary.arms if arm.name == "aitm")
    assert net.metrics["auc_click_given_category"].interval is not None


def test_picture_has_a_panel_per_step(compared: Plan, tmp_path: Path) -> None:
    summary = summarise(compared.runs, reference="lightgbm")
    assert summary is not None

    draw_frontier(summary, tmp_path / "frontier.png")

    width = int.from_bytes((tmp_path / "frontier.png").read_bytes()[16:20], "big")
    assert width == pytest.approx(3 * 6.6 * 130, abs=2)


def test_boosted_chain_has_a_model_per_step(compared: Plan) -> None:
    content = json.loads(compared.runs["lightgbm"][0].result_path.read_text())

    rows = [fit["rows"] for fit in content["criterion"]["fits"]]
    assert len(rows) == 3
    assert rows == sorted(rows, reverse=True)
    assert content["test"]["auc_p_category"] > 0.6
