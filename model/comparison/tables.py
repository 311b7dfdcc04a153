"""A comparison's tables: the same cells for the console and as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.table import Table

from model.comparison.results import ArmSummary, Estimate, Summary

Cell = Callable[[ArmSummary], str]


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A title, a line that explains it, column names and rows of as many cells."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        """For the console."""
        table = Table(title=self.title, caption=self.caption or None, title_justify="left")
        for name in self.columns:
            table.add_column(name, no_wrap=True, justify="left" if name == "arm" else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def parts(self, width: int) -> list["TextTable"]:
        """The columns in tables of at most `width` characters, each with the arms' names.

        Nothing is cut: a column that alone is wider than that has a table of its own. The caption
        is below the last one.
        """
        widths = [max(map(len, cells)) + 3 for cells in zip(self.columns, *self.rows, strict=True)]
        groups: list[list[int]] = [[]]
        for index in range(1, len(self.columns)):
            taken = 1 + widths[0] + sum(widths[i] for i in groups[-1])
            if groups[-1] and taken + widths[index] > width:
                groups.append([])
            groups[-1].append(index)
        return [
            replace(
                self,
                title=self.title if number == 0 else f"{self.title}, continued",
                caption=self.caption if number == len(groups) - 1 else "",
                columns=tuple(self.columns[i] for i in (0, *group)),
                rows=[tuple(row[i] for i in (0, *group)) for row in self.rows],
            )
            for number, group in enumerate(groups)
        ]

    def markdown(self) -> str:
        """A heading, the table, the caption."""
        lines = [
            f"**{self.title}**",
            "",
            f"| {' | '.join(self.columns)} |",
            "|" + "|".join(" --- " if name == "arm" else " ---: " for name in self.columns) + "|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
            "",
            self.caption,
        ]
        return "\n".join(lines) + "\n"


def tables(summary: Summary) -> list[TextTable]:
    """Accuracy, differences to the reference, calibration, cost."""
    return [
        _accuracy(summary),
        *([_differences(summary)] if len(summary.arms) > 1 else []),
        _calibration(summary),
        _cost(summary),
    ]


def markdown(summary: Summary) -> str:
    """All tables, and what is missing."""
    text = "\n".join(table.markdown() for table in tables(summary))
    if summary.missing:
        text += f"\nWithout a finished run: {', '.join(summary.missing)}.\n"
    return text


def _accuracy(summary: Summary) -> TextTable:
    on_all, among = summary.spaces["cumulative"], summary.spaces["conditional"]
    names = [f"auc_{name}" for name in (*on_all[:1], *among, *on_all[1:])]
    names += [f"gauc_user_by_impressions_{name}" for name in on_all]

    def marked(metric: str) -> Cell:
        kept = summary.frontier.get(metric, ())
        return lambda arm: _with_deviation(arm.metrics.get(metric)) + "*" * (arm.name in kept)

    columns: dict[str, Cell] = {"seeds": lambda arm: str(len(arm.seeds))}
    columns |= {name.replace("_by_impressions", ""): marked(name) for name in names}
    caption = (
        "Mean ± standard deviation over seeds, test rows. * no arm is both cheaper and better. "
        "gauc_user: AUC within users, weighted by their impressions."
    )
    return _table(summary, "Accuracy", caption, columns)


def _differences(summary: Summary) -> TextTable:
    on_all, among = summary.spaces["cumulative"], summary.spaces["conditional"]
    names = [f"auc_{name}" for name in (*on_all[:1], *among, *on_all[1:])]
    names += [f"log_loss_{name}" for name in on_all]
    caption = (
        f"In units of 0.001. 95 % interval of {summary.num_draws} draws of users, the same for "
        "both sides, seeds averaged. Below 0 is better for a loss."
    )
    columns: dict[str, Cell] = {name: _difference_of(name) for name in names}
    return _table(summary, f"Difference to {summary.reference}", caption, columns)


def _calibration(summary: Summary) -> TextTable:
    columns: dict[str, Cell] = {}
    for name in summary.spaces["cumulative"]:
        columns |= {
            f"log_loss_{name}": _mean_of(f"log_loss_{name}", "{:.5f}"),
            f"pcoc_{name}": _mean_of(f"pcoc_{name}", "{:.3f}"),
            f"raw pcoc_{name}": _mean_of(f"raw_pcoc_{name}", "{:.3f}"),
            f"ece_{name}": _mean_of(f"ece_{name}", "{:.2e}"),
        }
    caption = "PCOC: predicted over observed; raw: before calibration. Means over seeds."
    return _table(summary, "Loss and calibration", caption, columns)


def _cost(summary: Summary) -> TextTable:
    columns: dict[str, Cell] = {
        "us per candidate": lambda arm: (
            "" if arm.microseconds is None else f"{arm.microseconds:.2f}"
        ),
        "runtime": lambda arm: arm.runtime,
        "parameters": lambda arm: f"{arm.parameters:,}",
        "dense parameters": lambda arm: f"{arm.dense_parameters:,}",
        "training rows/s": lambda arm: f"{arm.rows_per_second:,.0f}",
    }
    caption = "CPU time of one request of 100 candidates on one thread, over 100."
    return _table(summary, "Cost", caption, columns)


def _table(summary: Summary, title: str, caption: str, columns: dict[str, Cell]) -> TextTable:
    rows = [(arm.name, *(cell(arm) for cell in columns.values())) for arm in summary.arms]
    return TextTable(title=title, caption=caption, columns=("arm", *columns), rows=rows)


def _with_deviation(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    spread = "" if estimate.deviation is None else f" ± {estimate.deviation:.4f}"
    return f"{estimate.mean:.4f}{spread}"


def _difference_of(metric: str) -> Cell:
    def cell(arm: ArmSummary) -> str:
        estimate = arm.metrics.get(metric)
        if estimate is None or estimate.difference is None:
            return ""
        text = f"{estimate.difference * 1e3:+.2f}"
        if estimate.interval is None:
            return text
        low, high = estimate.interval
        return f"{text} [{low * 1e3:+.2f}, {high * 1e3:+.2f}]"

    return cell


def _mean_of(metric: str, form: str) -> Cell:
    return lambda arm: form.format(arm.metrics[metric].mean) if metric in arm.metrics else ""
