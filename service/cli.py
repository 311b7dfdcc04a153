"""The console script `ctr`: a table of verbs, imported when called, and the exit codes."""

import importlib
import sys
from collections.abc import Callable

import click

from model.contract.errors import ContractError, GateError, ParityError

# Verb -> ("module:command", help). Strings, so that `ctr --help` imports none of them.
VERBS = {
    "quickstart": (
        "service.quickstart:quickstart",
        "From real logs to scored candidates in one go",
    ),
    "bootstrap": (
        "service.bootstrap:bootstrap",
        "Make what a service needs for the demo, unless it is there",
    ),
    "data": ("model.verbs_data:data", "Make impression logs: public data, or simulated"),
    "schema": ("model.verbs:schema", "Propose a schema file for your own logs"),
    "train": ("model.verbs:train", "Train a model on impression logs"),
    "evaluate": ("model.verbs:evaluate", "Measure a trained model on its test rows"),
    "compare": (
        "model.verbs_compare:compare",
        "Compare architectures, objectives and LightGBM",
    ),
    "export": ("model.verbs:export", "Write a trained model as a bundle"),
    "inspect": ("model.verbs:inspect", "Show what a bundle holds"),
    "materialize": (
        "model.verbs:snapshot",
        "Make user records and the item snapshot as of a time",
    ),
    "load-records": ("service.verbs:load_records", "Write user records to the online store"),
    "bundle": (
        "service.verbs_bundle:bundle",
        "Publish bundles, list them, roll back, see what is served",
    ),
    "serve": ("service.verbs:serve", "Answer POST /score from a bundle"),
    "score": ("service.verbs:score", "Score one request from a file, without a server"),
    "replay": ("service.verbs_log:replay", "Score logged requests again, by any bundle"),
    "forget": ("service.verbs_log:forget", "Delete a user's record and logged requests"),
    "bench": ("loadtest.bench:bench", "CPU time of each part of a request, alone"),
    "load": ("loadtest.verb:load", "Put load on a service and measure what its callers see"),
}

EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_GATE = 4

_OWN_PACKAGES = ("model", "service", "loadtest")
# Packages that no other extra than this one brings.
_EXTRA_OF = {"lightgbm": "compare", "hdrh": "load"}


class LazyGroup(click.Group):
    """A group whose commands are in `VERBS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order one needs them."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports one verb."""
        del ctx
        if cmd_name not in VERBS:
            return None
        module_name, _, attribute = VERBS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the verbs without importing them."""
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="ctr-scoring")
def cli() -> None:
    """From impression logs to calibrated click and conversion probabilities, served.

    Results go to stdout, progress and logs to stderr. Exit codes: 2 usage or settings, 3 data or
    bundle, 4 a gate failed, 1 a bug.
    """


def main() -> None:
    """Runs the verb on the command line and ends the process with its exit code."""
    run_and_exit(lambda: cli.main(prog_name="ctr"))


def run_and_exit(command: Callable[[], object]) -> None:
    """Runs a command that ends the process; a known error becomes one line and its exit code."""
    try:
        command()
    except Exception as exc:
        known = _exit_code(exc)
        if known is None:
            raise
        code, text = known
        click.echo("ctr: " + "; ".join(text.splitlines()), err=True)
        sys.exit(code)


def _exit_code(exc: Exception) -> tuple[int, str] | None:
    if isinstance(exc, GateError | ParityError):
        return EXIT_GATE, str(exc)
    if isinstance(exc, ContractError):
        return EXIT_DATA, str(exc)
    if isinstance(exc, ModuleNotFoundError):
        package = (exc.name or "").partition(".")[0]
        if package in _OWN_PACKAGES:
            return None
        extra = _EXTRA_OF.get(package)
        brings = "all that the verbs need" if extra is None else "it"
        return EXIT_USAGE, (
            f"the package {package!r} is not installed; pip install "
            f"'ctr-scoring[{extra or 'demo'}]' brings {brings}"
        )
    if isinstance(exc, OSError) and exc.filename is not None:
        return EXIT_DATA, f"{exc.filename}: {exc.strerror}"
    # Imported here: `ctr --help` must stay quick, and the trainer runs without the service's parts.
    from service.errors import RequestRejected, StoreError

    if isinstance(exc, RequestRejected):
        field = getattr(exc, "field", None)
        return EXIT_DATA, f"request: {exc}" if field is None else f"request: {field}: {exc}"
    if isinstance(exc, StoreError):
        return EXIT_USAGE, str(exc)
    settings = sys.modules.get("service.settings")
    if settings is not None and isinstance(exc, settings.SettingsError):
        return EXIT_USAGE, str(exc)
    return None
