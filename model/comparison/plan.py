"""`ctr compare`: arms times seeds on one data set, each run in a process; finished runs are kept.

Knows what is to be run and what is finished; what a run does is `worker`'s business,
what the results say is `results`'s.
"""

import hashlib
import importlib.util
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.comparison.boosting import BoostingOptions
from model.comparison.pool import Report, run_tasks
from model.comparison.results import read_draws, read_json
from model.comparison.worker import COST, Task
from model.config import TrainConfig, load_config
from model.contract.errors import SpecError
from model.contract.spec import describe_errors, load_schema
from model.dataset import cache_key, is_cached

RESULT_VERSION = 1  # of the result files and of what is measured; older results are made again


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Arm(_Section):
    """One thing that is compared.

    Attributes:
        kind: "net" is a network by the base configuration and its overrides; "lightgbm" a chain of
            boosted trees by its options.
        overrides: `set` in the file: `section.key=value`, as `ctr train --set` takes them.
        options: of a LightGBM chain, see `BoostingOptions`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=80)
    kind: Literal["net", "lightgbm"] = "net"
    overrides: tuple[str, ...] = Field(default=(), alias="set")
    options: BoostingOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "lightgbm" and self.overrides:
            raise ValueError("'set' is of networks; a lightgbm arm has 'options'")
        if self.kind == "net" and self.options is not None:
            raise ValueError("'options' are of lightgbm; a network's arm has 'set'")
        return self

    @property
    def boosting(self) -> BoostingOptions | None:
        """Options of a LightGBM chain; None for a network."""
        return (self.options or BoostingOptions()) if self.kind == "lightgbm" else None


class Grid(_Section):
    """Every architecture with every objective, as arms named `architecture+objective`.

    Each architecture has its default options: the base configuration's are of one architecture.
    """

    architectures: tuple[str, ...] = Field(min_length=1)
    objectives: tuple[str, ...] = Field(min_length=1)

    def arms(self) -> list[Arm]:
        """The cross product."""
        return [
            Arm(
                name=f"{architecture}+{objective}",
                overrides=(
                    f"net.architecture={architecture}",
                    "net.options={}",
                    f"objective.name={objective}",
                ),
            )
            for architecture in self.architectures
            for objective in self.objectives
        ]


class CompareConfig(_Section):
    """A comparison's file.

    Attributes:
        config: the base run's configuration, relative to the file.
        overrides: `set` in the file, of all networks, before the arm's own.
        reference: the arm that differences are taken to.
        draws: of users, for the intervals.
        sort_by: metric that orders the table; the AUC of the last step on all impressions when
            empty.
    """

    config: Path
    overrides: tuple[str, ...] = Field(default=(), alias="set")
    reference: str
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    draws: int = Field(default=300, ge=20)
    sort_by: str = ""
    arms: tuple[Arm, ...] = ()
    grid: Grid | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [arm.name for arm in self.all_arms()]
        if not names:
            raise ValueError("there are no arms: [[arms]] or [grid]")
        for what, values in (("arm", names), ("seed", [str(seed) for seed in self.seeds])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]!r} is there twice")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is no arm; arms: {', '.join(names)}")
        return self

    def all_arms(self) -> list[Arm]:
        """Those listed, then the grid's."""
        return [*self.arms, *(self.grid.arms() if self.grid else ())]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison consists of.

    Attributes:
        runs: every arm's tasks, one per seed, by arm.
        finished: names of runs whose results are there already.
        changed: names of runs whose results are of another configuration or of other data.
    """

    config: CompareConfig
    runs: dict[str, list[Task]]
    finished: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)


def load_compare(path: Path) -> CompareConfig:
    """Reads a comparison's TOML.

    Raises:
        SpecError: the file is at fault; every fault is named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        config = CompareConfig.model_validate(content)
    except FileNotFoundError as exc:
        raise SpecError(f"no comparison at {path}", where=str(path)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise SpecError(f"{path} is not TOML: {exc}", where=str(path)) from exc
    except ValidationError as exc:
        raise SpecError(f"{path}: {describe_errors(exc)}", where=str(path)) from exc
    return config.model_copy(update={"config": (path.parent / config.config).resolve()})


def make_plan(config: CompareConfig, *, out: Path, cache: Path, only: Sequence[str] = ()) -> Plan:
    """Tasks of every run, and which of them are finished.

    Args:
        config: of the comparison.
        out: where results are kept.
        cache: of encoded data.
        only: arms to take; all when empty.

    Raises:
        SpecError: an arm's configuration is at fault, or `only` names no arm.
        LogError: a table cannot be read.
    """
    arms = {arm.name: arm for arm in config.all_arms()}
    unknown = [name for name in only if name not in arms]
    if unknown:
        raise SpecError(f"no arm {unknown[0]!r}; there are {', '.join(arms)}", where=unknown[0])
    data_keys: dict[str, str] = {}
    runs: dict[str, list[Task]] = {}
    for name, arm in arms.items():
        runs[name] = []
        for seed in config.seeds:
            run = _run_config(config, arm, seed)
            described = json.dumps([run.data.model_dump(mode="json"), run.split.model_dump()])
            if described not in data_keys:
                data_keys[described] = cache_key(run, load_schema(run.data.schema_file))
            task = Task(
                kind="train",
                arm=name,
                seed=seed,
                config=run,
                cache=cache.resolve(),
                arm_dir=(out / name).resolve(),
                data_key=data_keys[described],
                fingerprint=_fingerprint(run, arm, seed, data_keys[described]),
                num_draws=config.draws,
                boosting=arm.boosting,
            )
            runs[name].append(task)
    plan = Plan(config=config, runs=runs)
    for task in (task for tasks in runs.values() for task in tasks):
        known = _known_fingerprint(task.result_path)
        if known not in (None, task.fingerprint):
            plan.changed.add(task.name)
        elif known is not None and read_draws(task.predictions_path) is not None:
            plan.finished.add(task.name)
    return plan


def execute(
    plan: Plan, *, num_workers: int, report: Report, only: Sequence[str] = ()
) -> dict[str, str]:
    """Makes every run that is not finished, then times each arm's scoring, alone.

    Returns:
        Errors by the name of the task; the others went on.
    """
    taken = [
        task for name, tasks in plan.runs.items() if name in only or not only for task in tasks
    ]
    todo = [task for task in taken if task.name not in plan.finished]
    for task in (task for task in taken if task.name in plan.finished):
        drawn = read_draws(task.predictions_path)
        if drawn is None or len(drawn.values) != task.num_draws:
            todo.append(task.model_copy(update={"kind": "draw"}))
    _check_extra(todo)
    cores = len(os.sched_getaffinity(0))
    failures = _prepare(todo, num_threads=cores, report=report)
    todo = [task for task in todo if is_cached(task.cache, task.data_key)]
    # By the workers asked for, however few runs are left: a resumed comparison trains as before.
    shares = [_with_threads(task, max(1, cores // num_workers)) for task in todo]
    failures |= run_tasks(shares, num_workers=num_workers, report=report)
    costs = [task for task in (_cost_task(plan.runs[name]) for name in plan.runs) if task]
    return failures | run_tasks(
        [task for task in costs if task.arm in only or not only], num_workers=1, report=report
    )


def _prepare(tasks: Sequence[Task], *, num_threads: int, report: Report) -> dict[str, str]:
    """Encodes what the cache lacks, once and alone; in a process, which gives its memory back."""
    lacking = {
        task.data_key: task.model_copy(update={"kind": "prepare", "num_threads": num_threads})
        for task in reversed(tasks)
        if not is_cached(task.cache, task.data_key)
    }
    return run_tasks(list(reversed(lacking.values())), num_workers=1, report=report)


def _run_config(config: CompareConfig, arm: Arm, seed: int) -> TrainConfig:
    overrides = (*config.overrides, *arm.overrides)
    if any(entry.partition("=")[0].strip() == "optimizer.seed" for entry in overrides):
        raise SpecError(f"arm {arm.name!r} sets optimizer.seed, which 'seeds' does", where=arm.name)
    try:
        return load_config(config.config, overrides=[*overrides, f"optimizer.seed={seed}"])
    except SpecError as exc:
        raise SpecError(f"arm {arm.name!r}: {exc}", where=arm.name) from exc


def _fingerprint(config: TrainConfig, arm: Arm, seed: int, data_key: str) -> str:
    """Of all that decides a run's result: not of paths, nor of the number of threads."""
    if arm.boosting is None:
        described = config.model_dump_json(exclude={"data": True, "optimizer": {"num_threads"}})
    else:
        described = arm.boosting.model_dump_json() + config.calibration.model_dump_json()
    content = json.dumps([RESULT_VERSION, arm.kind, seed, data_key, described])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _known_fingerprint(path: Path) -> str | None:
    content = read_json(path)
    return None if content is None else str(content["fingerprint"])


def _with_threads(task: Task, num_threads: int) -> Task:
    optimizer = task.config.optimizer.model_copy(update={"num_threads": num_threads})
    config = task.config.model_copy(update={"optimizer": optimizer})
    return task.model_copy(update={"config": config, "num_threads": num_threads})


def _cost_task(runs: Sequence[Task]) -> Task | None:
    """Times the arm's first finished run, unless that is known."""
    for task in runs:
        if _known_fingerprint(task.result_path) == task.fingerprint:
            known = _known_fingerprint(task.arm_dir / COST)
            if known == task.fingerprint:
                return None
            return task.model_copy(update={"kind": "cost"})
    return None


def _check_extra(tasks: Sequence[Task]) -> None:
    """Before hours of training, not after."""
    needed: Mapping[str, bool] = {"lightgbm": any(task.boosting for task in tasks)}
    for module, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
