"""The trainer's verbs of `ctr`: each parses, calls, prints; progress goes to stderr."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from model.console import print_findings, print_metrics, spinner, training_progress, without_nan
from model.contract.errors import EncodeError, GateError, LogError
from model.contract.times import format_time, parse_time

PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
CACHE = click.option(
    "--cache",
    type=PATH,
    default=Path(".ctr-cache"),
    show_default=True,
    help="Where encoded impressions are kept between verbs.",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one value of the configuration; may be repeated.",
)


@click.command()
@click.argument("log", type=PATH)
@click.option("--out", type=PATH, help="Write the schema here instead of to stdout.")
@click.option("--user", help="The user id column.")
@click.option("--item", help="The item id column.")
@click.option("--time", help="The impression's time column.")
@click.option("--label", "labels", multiple=True, help="Label columns, in the chain's order.")
def schema(
    log: Path,
    out: Path | None,
    user: str | None,
    item: str | None,
    time: str | None,
    labels: tuple[str, ...],
) -> None:
    """Propose a schema for an impression log (Parquet or CSV), to be read and corrected."""
    from model.propose import propose_schema

    proposal = propose_schema(log, user_id=user, item_id=item, time=time, labels=labels)
    if out is None:
        click.echo(proposal.toml, nl=False)
    elif out.exists():
        raise click.UsageError(f"{out} exists; it may hold your corrections")
    else:
        out.write_text(proposal.toml)
        click.echo(f"wrote {out}")
    for name, reason in proposal.refused.items():
        click.echo(f"left out {name!r}: {reason}", err=True)
    print_findings(finding.as_json() for finding in proposal.findings)


@click.command()
@click.argument("config_file", type=PATH, metavar="CONFIG")
@click.option("--run", "run_dir", type=PATH, required=True, help="Run directory; resumed if there.")
@CACHE
@SET
@JSON
def train(
    config_file: Path, run_dir: Path, cache: Path, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Train a model; a run that was stopped goes on where its checkpoint is."""
    from model.config import load_config
    from model.dataset import load_data
    from model.evaluate import calibrate_run
    from model.run import write_config, write_run
    from model.train import train as fit

    config = load_config(config_file, overrides=overrides)
    with spinner() as say:
        encoded = load_data(config, cache=cache, progress=say)
    print_findings(encoded.report["findings"])  # type: ignore[arg-type]  # as `prepare` wrote it
    write_config(run_dir, config)
    with training_progress() as progress:
        result = fit(config, encoded, run_dir=run_dir, progress=progress)
    with spinner() as say:
        say("fitting calibrators")
        calibrators = calibrate_run(result.net, encoded, config)
    training = {
        "data": encoded.report,
        "evaluations": result.state.evaluations,
        "best_step": result.state.best_step,
        "rows_per_second": result.rows_per_second,
        "criterion": result.criterion,
        "parameters": sum(p.numel() for p in result.net.parameters()),
        "dense_parameters": sum(p.numel() for p in result.net.parameters())
        - sum(p.numel() for p in result.net.embedding_parameters()),
    }
    write_run(
        run_dir,
        config=config,
        fitted=encoded.fitted,
        net=result.net,
        calibrators=calibrators,
        training=training,
    )
    best = next(e for e in result.state.evaluations if e["step"] == result.state.best_step)
    if as_json:
        click.echo(json.dumps({"run": str(run_dir), "validation": best, **training}))
        return
    click.echo(
        f"{run_dir}: best at step {result.state.best_step} of {result.state.step}, "
        f"{result.rows_per_second:,.0f} rows/s, {training['dense_parameters']:,} dense parameters\n"
        f"{encoded.report['rows_read']:,} rows read, "
        f"{encoded.report['rows_broken_chain']:,} dropped as they break the chain, "
        f"{_masked(encoded.report):,} masked as too young for a step"
    )
    if config.optimizer.with_validation:
        click.echo("The validation rows were trained on: their figures are of rows seen.")
    print_metrics({"validation": best})


@click.command()
@click.argument("run_dir", type=PATH, metavar="RUN")
@CACHE
@JSON
def evaluate(run_dir: Path, cache: Path, as_json: bool) -> None:
    """Measure a run on its test rows: as served, without user records, and the base rate."""
    from model.dataset import load_data
    from model.evaluate import evaluate_run
    from model.run import EVALUATION, read_run

    run = read_run(run_dir)
    with spinner() as say:
        encoded = load_data(run.config, cache=cache, progress=say)
        if encoded.fitted != run.fitted:
            raise LogError(f"{run_dir} was trained on other data or by another schema")
        say("scoring the test rows")
        result = evaluate_run(run, encoded)
    (run_dir / EVALUATION).write_text(json.dumps(without_nan(result), indent=1))
    if as_json:
        click.echo(json.dumps(without_nan(result)))
    else:
        print_metrics(result)


@click.command()
@click.argument("run_dir", type=PATH, metavar="RUN")
@click.option("--out", type=PATH, required=True, help="Directory of bundles.")
@click.option(
    "--ignore-gates", is_flag=True, help="Write it though gates fail; the manifest names them."
)
@CACHE
@JSON
def export(run_dir: Path, out: Path, ignore_gates: bool, cache: Path, as_json: bool) -> None:
    """Write a run as a bundle: ONNX, schema, golden rows.

    Refused if ONNX scores otherwise, or the test metrics fail a gate of the configuration.
    """
    from model.contract.encode import Encoder
    from model.dataset import load_data
    from model.export import export_bundle
    from model.gates import check_gates
    from model.run import read_run

    run = read_run(run_dir)
    failures = check_gates(run.config.gates, run.evaluation, schema=run.fitted.schema_)
    if failures and not ignore_gates:
        raise GateError(failures)
    with spinner() as say:
        encoded = load_data(run.config, cache=cache, progress=say)
        say("exporting and comparing with the network")
        path = export_bundle(
            run.net,
            run.calibrators,
            encoder=Encoder(run.fitted),
            train=encoded.splits["train"],
            out=out,
            training={
                "config": run.config.model_copy(
                    update={"data": _names_only(run.config.data)}
                ).dump(),
                "time_range": [format_time(t) for t in run.training["data"]["time_range"]],
                "splits": run.training["data"]["splits"],
                "best_step": run.training["best_step"],
                **({"failed_gates": failures} if failures else {}),
            },
            metrics=without_nan(run.evaluation),
            last_time=run.last_time,
        )
    for failure in failures:
        click.echo(f"exported though {failure}", err=True)
    click.echo(json.dumps({"bundle": str(path)}) if as_json else str(path))


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--against-plain",
    type=PATH,
    metavar="RUN",
    help="The bundle's run: time its plain export, too, runs interleaved.",
)
@JSON
def inspect(bundle: Path, against_plain: Path | None, as_json: bool) -> None:
    """Show what a bundle holds and what it costs to run."""
    from model.contract.bundle import read_bundle
    from model.cost import cost_against_plain, plain_model_of, run_cost

    read = read_bundle(bundle)
    manifest = read.manifest
    cost = run_cost(read)
    if against_plain is not None:
        cost |= cost_against_plain(read, plain_model_of(against_plain))
    if as_json:
        click.echo(json.dumps({"manifest": manifest.model_dump(mode="json"), "cost": cost}))
        return
    table = Table("what", "value", title=f"bundle {manifest.bundle_id}", show_header=False)
    table.add_row("made", manifest.created_at)
    table.add_row("steps", " -> ".join(manifest.steps))
    table.add_row("outputs", ", ".join(manifest.outputs))
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry.bytes:,} bytes")
    for name, fitted in manifest.calibration.items():
        table.add_row(f"calibration of {name}", fitted["method"])
    for key, value in cost.items():
        table.add_row(key, f"{value:,}")
    Console().print(table)
    schema_table = Table("feature", "kind", "scope", "source", "codes", title="schema")
    for feature in read.fitted.schema_.features:
        codes = read.fitted.vocabularies.get(feature.name)
        size = f"{len(codes):,}" if codes is not None else ""
        schema_table.add_row(feature.name, feature.kind, feature.scope, feature.source, size)
    Console().print(schema_table)
    if manifest.metrics:
        print_metrics(manifest.metrics)


@click.command()
@click.argument("run_or_config", type=PATH, metavar="RUN_OR_CONFIG")
@click.option("--as-of", required=True, metavar="TIME", help="RFC 3339, or 'end' of the log.")
@click.option("--out", type=PATH, required=True, help="Directory for the two files.")
@JSON
def snapshot(run_or_config: Path, as_of: str, out: Path, as_json: bool) -> None:
    """Make user records (records.parquet) and the item snapshot (items.parquet) as of a time."""
    from model.run import config_of
    from model.snapshot import last_event_time, write_snapshot

    config = config_of(run_or_config)
    with spinner() as say:
        time = last_event_time(config) if as_of == "end" else _as_of_time(as_of)
        made = write_snapshot(config, as_of=time, out=out, progress=say)
    facts = {
        "as_of": format_time(time),
        **{key: str(v) if isinstance(v, Path) else v for key, v in vars(made).items()},
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    click.echo(
        f"{made.records}: {made.num_users:,} user records as of {facts['as_of']}, median "
        f"{made.median_record_bytes:,} bytes, largest {made.largest_record_bytes:,}\n"
        f"{made.items}: {made.num_items:,} items"
    )


def _as_of_time(text: str) -> float:
    try:
        return parse_time(text, field="--as-of")
    except EncodeError as exc:
        raise click.BadParameter(exc.reason, param_hint="--as-of") from exc


def _masked(report: dict[str, Any]) -> int:
    return sum(split["masked"] for split in report["splits"].values())


def _names_only(data_config: Any) -> Any:  # Any: model.config.DataConfig
    """File names without their directories: a bundle does not tell where its maker kept files."""
    names = {name: Path(v.name) for name, v in data_config if isinstance(v, Path)}
    return data_config.model_copy(update=names)
