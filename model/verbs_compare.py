"""The verb `ctr compare`: runs what is not finished, then shows the tables and the picture."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from model.comparison.plan import Plan, execute, load_compare, make_plan
from model.comparison.pool import Report
from model.comparison.results import Summary, read_json, summarise
from model.comparison.tables import markdown, tables
from model.comparison.worker import Task
from model.console import without_nan
from model.contract.errors import TrainError
from model.verbs import CACHE, JSON, PATH

SUMMARY, MARKDOWN, PICTURE = "summary.json", "table.md", "frontier.png"


@click.command()
@click.argument("comparison", type=PATH, metavar="COMPARE")
@click.option("--out", type=PATH, required=True, help="Directory of results; finished runs stay.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="cores",
    help="Runs at a time; they share the cores.",
)
@click.option("--only", multiple=True, metavar="ARM", help="Run this arm only; may be repeated.")
@CACHE
@JSON
def compare(
    comparison: Path, out: Path, workers: int, only: tuple[str, ...], cache: Path, as_json: bool
) -> None:
    """Compare architectures, objectives and LightGBM over seeds; finished runs are kept."""
    config = load_compare(comparison)
    plan = make_plan(config, out=out, cache=cache, only=only)
    with _progress(plan, only) as report:
        failures = execute(plan, num_workers=workers, report=report, only=only)
    summary = summarise(
        plan.runs, reference=config.reference, sort_by=config.sort_by, failures=failures
    )
    if summary is not None:
        _show(summary, out, as_json=as_json)
    if failures:
        told = "; ".join(f"{name}: {error}" for name, error in failures.items())
        raise TrainError(f"{len(failures)} failed, run again to repeat them: {told}")


def _show(summary: Summary, out: Path, *, as_json: bool) -> None:
    from model.comparison.picture import draw_frontier

    content = without_nan(summary.dump())
    (out / SUMMARY).write_text(json.dumps(content, indent=1))
    (out / MARKDOWN).write_text(markdown(summary))
    if any(summary.frontier.values()):
        draw_frontier(summary, out / PICTURE)
    if as_json:
        click.echo(json.dumps(content))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in tables(summary):
        for part in table.parts(console.width):
            console.print(part.rich())
    if summary.missing:
        console.print(f"without a finished run: {', '.join(summary.missing)}")
    if all(arm.name != summary.reference for arm in summary.arms):
        console.print(f"no differences: the reference {summary.reference} has no finished run")
    for arm in summary.arms:
        if not arm.same_test_rows:
            console.print(f"{arm.name}: no intervals, its test rows are not the reference's")
    console.print(f"{out / MARKDOWN}, {out / SUMMARY}, {out / PICTURE}")


@contextmanager
def _progress(plan: Plan, only: tuple[str, ...]) -> Iterator[Report]:
    """A bar of the runs, a line per task under way, and one line for each that ended."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}", markup=False),
    )
    taken = [t for name, tasks in plan.runs.items() if name in only or not only for t in tasks]
    finished = sum(task.name in plan.finished for task in taken)
    lines: dict[str, int] = {}
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        # Errors have brackets and are long: neither markup nor line breaks.
        tell = partial(bars.console.print, markup=False, highlight=False, soft_wrap=True)
        total = bars.add_task("runs", total=len(taken), completed=finished, doing="")
        if finished:
            tell(f"{finished} of {len(taken)} runs are finished and kept")
        for task in taken:
            if task.name in plan.changed:
                tell(f"{task.name}: its result is of another configuration or data; again")

        def on_start(task: Task) -> None:
            with lock:
                lines[task.name] = bars.add_task(task.name, total=None, doing="starting")

        def on_say(task: Task, text: str) -> None:
            bars.update(lines[task.name], doing=text)  # type: ignore[arg-type]  # rich's own id

        def on_end(task: Task, seconds: float, error: str | None) -> None:
            bars.remove_task(lines.pop(task.name))  # type: ignore[arg-type]  # rich's own id
            tell(f"{task.name}: {_outcome(task, error)} ({seconds:.0f} s)")
            if task.kind == "train" and error is None:
                bars.advance(total)

        yield Report(on_start=on_start, on_say=on_say, on_end=on_end)


def _outcome(task: Task, error: str | None) -> str:
    if error is not None:
        return f"FAILED: {error}"
    result = read_json(task.result_path) if task.kind == "train" else None
    if result is None:
        return "done"
    names = [f"auc_{name}" for name in result["spaces"]["cumulative"]]
    return ", ".join(f"{name} {result['test'].get(name) or float('nan'):.4f}" for name in names)
