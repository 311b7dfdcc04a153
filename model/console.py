"""What the trainer's verbs show: spinners and bars on stderr, tables of metrics on stdout."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


@contextmanager
def spinner() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr whose text is what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=text)


@contextmanager
def reading_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr per thing that is read: what it is, bytes done, bytes of it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}  # Any: rich's task ids

        def on_bytes(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield on_bytes


@contextmanager
def training_progress() -> Iterator[Any]:  # Any: model.train.Progress, which imports torch
    """A bar per epoch on stderr, and a line per evaluation."""
    from model.train import Progress as TrainingProgress

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.5f}"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[int, Any] = {}  # Any: rich's task ids

        def on_rows(epoch: int, done: int, total: int, loss: float) -> None:
            if epoch not in tasks:
                tasks[epoch] = bars.add_task(f"epoch {epoch + 1}", total=total, loss=loss)
            bars.update(tasks[epoch], completed=done, loss=loss)

        def on_evaluation(step: int, metrics: dict[str, Any]) -> None:
            aucs = ", ".join(
                f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("auc_")
            )
            bars.console.print(f"step {step}: validation {aucs}")

        yield TrainingProgress(on_rows=on_rows, on_evaluation=on_evaluation)


def print_findings(findings: Iterable[Mapping[str, Any]]) -> None:
    """One line on stderr per finding of `model.checks`."""
    for finding in findings:
        click.echo(f"check: {finding['message']}", err=True)


def print_metrics(by_name: dict[str, dict[str, Any]]) -> None:
    """One row per metric, one column per named set; sets of other metrics have their own table."""
    first = next(iter(by_name.values()))
    alike = {name: metrics for name, metrics in by_name.items() if metrics.keys() <= first.keys()}
    table = Table("metric", *(name.replace("_", " ") for name in alike))
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(map(len, first))
    for metric in first:
        if metric in ("step", "loss"):
            continue
        table.add_row(metric, *(_cell(metrics.get(metric)) for metrics in alike.values()))
    Console().print(table)
    others = {name: metrics for name, metrics in by_name.items() if name not in alike}
    if others:
        print_metrics(others)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(f"{float(part):.3f}" for part in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and value >= 10 else f"{value:.6g}"
    return "" if value is None else str(value)


def without_nan(value: Any) -> Any:  # Any: JSON values
    """NaN (an AUC of one class only) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
