"""What Dockerfile and docker-compose.yml promise, as far as it shows without an engine.

`tests/e2e/compose_stack.py` runs them.
"""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from service.cli import VERBS, cli
from service.settings import Settings, setting_rows

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())  # Any: YAML
SERVICES: dict[str, Any] = COMPOSE["services"]  # Any: YAML

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def defaulted(text: str) -> str:
    """With every ${NAME:-default} replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def stage(name: str) -> str:
    """The instructions of one stage of the Dockerfile."""
    (found,) = re.findall(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    return str(found)


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "deploy" / "requirements.py"
    spec = importlib.util.spec_from_file_location("deploy_requirements", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_service_and_grafana_are_published_and_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"service", "grafana"}
    for (port,) in ports.values():
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", defaulted(port))


def test_redis_is_reached_over_a_network_that_leads_nowhere_else() -> None:
    assert SERVICES["redis"]["networks"] == ["store"]
    assert COMPOSE["networks"]["store"] == {"internal": True}
    assert "store" not in SERVICES["grafana"]["networks"] + SERVICES["prometheus"]["networks"]


@each_service
def test_image_has_a_tag_that_is_not_latest(name: str) -> None:
    image = defaulted(SERVICES[name]["image"])
    assert re.fullmatch(r"[a-z/-]+:[\w.-]+", image)
    assert not image.endswith(":latest")


@each_service
def test_service_has_limits_a_restart_policy_and_nothing_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory"}
    assert service["restart"] in ("unless-stopped", "on-failure:3", "no")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", ["redis", "prometheus", "grafana"])
def test_what_goes_on_for_ever_is_started_again_and_checked(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert SERVICES[name]["healthcheck"]["test"]


def test_service_is_started_again_and_its_image_checks_it() -> None:
    assert SERVICES["service"]["restart"] == "unless-stopped"
    assert "python -m service.health_check" in stage("serve")


def test_redis_writes_every_record_to_its_volume() -> None:
    command = SERVICES["redis"]["command"]
    assert "--appendonly yes" in command
    assert "--dir /data" in command
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_service_gets_longer_to_stop_than_it_takes_to_drain() -> None:
    environment = SERVICES["service"]["environment"]
    settings = {name: field.default for name, field in Settings.model_fields.items()}
    drain_ms = sum(
        int(environment.get(f"CTR_{name.upper()}", settings[name]))
        for name in ("drain_delay_ms", "drain_timeout_ms")
    )
    assert seconds(SERVICES["service"]["stop_grace_period"]) * 1000 > drain_ms + 2000


def test_service_waits_for_neither_redis_nor_bundle() -> None:
    assert "depends_on" not in SERVICES["service"]
    assert SERVICES["service"]["environment"]["CTR_WAIT_FOR_BUNDLE"] == "true"


def test_service_reads_what_bootstrap_writes() -> None:
    environment = SERVICES["service"]["environment"]
    assert environment["CTR_BUNDLE"] == "/models/current"
    assert environment["CTR_ITEM_SNAPSHOT"] == "/models/items.parquet"
    assert "models:/models:ro" in SERVICES["service"]["volumes"]
    assert "models:/models" in SERVICES["bootstrap"]["volumes"]
    assert "--models /models" in SERVICES["bootstrap"]["command"]


def test_profiles_are_train_and_load_alone() -> None:
    profiles = {name: s["profiles"] for name, s in SERVICES.items() if "profiles" in s}
    assert profiles == {"train": ["train"], "load": ["load"]}


@each_service
def test_settings_given_to_a_service_exist(name: str) -> None:
    known = {row.variable for row in setting_rows()}
    given = {n for n in SERVICES[name].get("environment", {}) if n.startswith("CTR_")}
    assert given <= known


@each_service
def test_verbs_called_exist(name: str) -> None:
    verbs = re.findall(r"\bctr ([a-z-]+)", str(SERVICES[name].get("command", "")))
    assert set(verbs) <= set(VERBS)


def test_no_secret_is_written_down() -> None:
    names = {n for s in SERVICES.values() for n in s.get("environment", {})}
    assert [name for name in names if re.search(r"PASSWORD|SECRET|TOKEN|KEY$", name)] == []


def test_grafana_shows_and_lets_nobody_change() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_files_mounted_from_here_exist() -> None:
    sources = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume.startswith("./")
    }
    assert len(sources) == 3
    assert [source for source in sources if not (ROOT / source).is_dir()] == []


def test_prometheus_scrapes_the_service_under_the_name_that_rules_use() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    assert targets["scoring"] == ["service:8000"]
    assert "/etc/prometheus/rules/*.yml" in config["rule_files"]


def test_base_image_is_pinned_to_the_python_that_is_tested() -> None:
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.M)
    assert re.fullmatch(r"python:3\.11[\w.-]*-slim[\w-]*", image)


@pytest.mark.parametrize("name", ["serve", "train"])
def test_image_runs_as_a_user_without_rights(name: str) -> None:
    assert re.findall(r"^USER (\S+)$", stage(name), re.M) == ["10001:10001"]


def test_serve_is_what_a_plain_build_makes() -> None:
    assert re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.M)[-1] == "serve"


def test_serve_takes_packages_without_torch(script: ModuleType) -> None:
    assert "--from=serve-packages" in stage("serve")
    assert "-r /src/serve.txt" in stage("serve-packages")
    assert "pyproject.toml serve > serve.txt" in stage("requirements")
    found = script.requirements(PYPROJECT, ["serve"])
    assert [line for line in found if line.startswith("torch")] == []
    assert any(line.startswith("onnxruntime") for line in found)


def test_requirements_of_the_trainer_include_those_of_the_extras_it_names(
    script: ModuleType,
) -> None:
    found = script.requirements(PYPROJECT, ["demo", "load"])
    assert "torch==2.13.0" in found
    assert set(script.requirements(PYPROJECT, ["serve"])) < set(found)
    assert [line for line in found if "ctr-scoring" in line] == []


@pytest.mark.parametrize("name", ["serve-packages", "train-packages"])
def test_a_change_of_the_code_installs_no_packages_anew(name: str) -> None:
    copied = re.findall(r"^COPY (.*)$", stage(name), re.M)
    assert copied
    assert all(line.startswith("--from=requirements ") for line in copied)


def test_images_are_made_from_named_files_alone() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == {
        *("pyproject.toml", "README.md", "model", "service", "loadtest"),
        *("deploy", "deploy/requirements.py"),
    }


@pytest.mark.parametrize("name", ["bootstrap", "train", "load"])
def test_verbs_understand_what_they_are_called_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(defaulted(SERVICES[name]["command"]))
    if words[0] == "sh":
        words = shlex.split(words[2].partition("&& exec ")[2])
    assert words[0] == "ctr"
    called: list[dict[str, Any]] = []  # Any: what click parsed
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None
    monkeypatch.setattr(command, "callback", lambda **given: called.append(given))

    command.main(words[2:], standalone_mode=False)

    assert len(called) == 1
