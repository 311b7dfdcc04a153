"""The shipped comparisons: every arm can be built, on the shipped schema, at a like size."""

from pathlib import Path

import pytest
import torch

import model
from model.comparison.plan import Arm, load_compare
from model.config import TrainConfig, load_config
from model.contract.encode import Encoder
from model.contract.spec import Categorical, FittedSchema, load_schema
from model.criterion import Criterion
from model.datasets.journey_files import COPIED, write_files
from model.nets import build_net
from model.nets.layers import Net, NetSpec

SHIPPED = Path(model.__file__).parent / "datasets"
COMPARE = (
    "lightgbm",
    "single_task",
    "esmm",
    "cross_stitch",
    "mmoe",
    "ple",
    "aitm",
    "escm2_ipw",
    "escm2_dr",
    "esmm_adaftr",
    "tafe",
    "tafe_adaftr",
    "lightgbm_with_validation",
    "esmm_wide",
    "esmm_wide_category",
    "esmm_wide_with_validation",
    "default",
)
TREES = ("lightgbm", "lightgbm_with_validation")
WIDE = ("esmm_wide", "esmm_wide_category", "esmm_wide_with_validation")
ABLATIONS = (
    "tafe",
    "tafe_no_selector",
    "tafe_no_se",
    "tafe_no_attention",
    "tafe_one_pattern",
    "tafe_plain",
    "tafe_gate",
    "tafe_sparsemax",
    "tafe_hinge",
    "tafe_chain",
    "tafe_ipw",
    "tafe_fixed",
    "tafe_prior",
    "tafe_robust",
    "tafe_naive",
    "bottom_none",
    "bottom_fixed",
    "bottom_prior",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ctr data complete-journey` writes beside the log."""
    path = tmp_path_factory.mktemp("journey")
    write_files(path)
    return path


def arms_of(written: Path, name: str) -> dict[str, Arm]:
    return {arm.name: arm for arm in load_compare(written / f"{name}.toml").all_arms()}


def config_of(written: Path, comparison: str, arm: str) -> TrainConfig:
    overrides = arms_of(written, comparison)[arm].overrides
    return load_config(written / "tafe.toml", overrides=overrides)


def net_of(config: TrainConfig) -> Net:
    """The run's network; vocabularies do not matter to the dense parameters."""
    assert config.data.schema_file is not None
    schema = load_schema(config.data.schema_file)
    names = [feature.name for feature in schema.features if isinstance(feature, Categorical)]
    fitted = FittedSchema(schema=schema, vocabularies=dict.fromkeys(names, ("a", "b")), moments={})
    spec = NetSpec.of(Encoder(fitted))
    torch.manual_seed(0)
    return build_net(config.net.architecture, spec=spec, options=config.net.options)


def num_dense(net: Net) -> int:
    tables = sum(p.numel() for p in net.embedding_parameters())
    return sum(p.numel() for p in net.parameters()) - tables


def test_every_shipped_file_is_written(written: Path) -> None:
    shipped = {path.name for path in SHIPPED.glob("complete_journey_*.toml")}

    assert {f"complete_journey_{name}.toml" for name in COPIED} == shipped
    assert {path.name for path in written.iterdir()} == {
        "schema_category.toml",
        "schema_three_steps.toml",
        *(f"{name}.toml" for name in COPIED),
    }


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("schema", {"click": True, "conversion": True}),
        ("schema_category", {"category": False, "click": True, "conversion": True}),
        ("schema_three_steps", {"category": True, "click": True, "conversion": True}),
    ],
)
def test_schemas_differ_in_their_steps_only(
    name: str, served: dict[str, bool], written: Path
) -> None:
    shipped, other = load_schema(written / "schema.toml"), load_schema(written / f"{name}.toml")

    assert {step.name: step.served for step in other.steps} == served
    assert {step.label for step in other.steps} == set(served)
    assert other.model_copy(update={"steps": shipped.steps}) == shipped


def test_three_step_run_is_the_other_with_a_weight_more(written: Path) -> None:
    two, three = (load_config(written / f"{n}.toml") for n in ("tafe", "tafe_three_steps"))

    assert three.objective.step_weights == (1.0, 1.0, 2.0)
    assert three.data.schema_file == written.resolve() / "schema_three_steps.toml"
    same = three.model_copy(update={"data": two.data, "objective": two.objective})
    assert same == two


def test_arms_are_those_of_the_plan(written: Path) -> None:
    assert tuple(arms_of(written, "compare")) == COMPARE
    assert tuple(arms_of(written, "ablations")) == ABLATIONS


@pytest.mark.parametrize(
    ("comparison", "reference"), [("compare", "lightgbm"), ("ablations", "tafe")]
)
def test_arms_have_three_seeds(comparison: str, reference: str, written: Path) -> None:
    config = load_compare(written / f"{comparison}.toml")

    assert config.seeds == (1, 2, 3)
    assert config.reference == reference


@pytest.mark.parametrize(
    ("comparison", "arm"),
    [("compare", arm) for arm in COMPARE if arm not in TREES]
    + [("ablations", arm) for arm in ABLATIONS],
)
def test_every_arm_can_be_built(comparison: str, arm: str, written: Path) -> None:
    config = config_of(written, comparison, arm)

    net = net_of(config)
    criterion = Criterion(config, net, step_rates=[0.04] * net.heads.output.weight.shape[0])

    has_tower = config.objective.name == "dr"
    assert (criterion.imputation is not None) is has_tower
    has_alignment = config.alignment.mode != "off"
    assert any("_alignment" in name for name in criterion.state_dict()) is has_alignment


def test_default_arm_is_the_shipped_run(written: Path) -> None:
    assert config_of(written, "compare", "default") == load_config(written / "train.toml")


def test_arms_of_the_comparison_are_of_a_size(written: Path) -> None:
    """papers.md 2.4: dense budgets within 20 %, here of each other: the largest of the smallest."""
    sizes = {
        arm: num_dense(net_of(config_of(written, "compare", arm)))
        for arm in COMPARE
        if arm not in (*TREES, *WIDE)
    }

    assert len(sizes) == 12
    assert max(sizes.values()) <= 1.2 * min(sizes.values())


@pytest.mark.parametrize("comparison", ["compare", "ablations"])
def test_no_two_arms_are_the_same(comparison: str, written: Path) -> None:
    names = [n for n, arm in arms_of(written, comparison).items() if arm.kind == "net"]

    configs = [config_of(written, comparison, name).model_dump_json() for name in names]

    assert len(set(configs)) == len(names) >= 10
