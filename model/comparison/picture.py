"""A comparison's picture: accuracy against cost, the arms that no other one beats joined."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from model.comparison.results import ArmSummary, Summary

KEPT, OTHER = "#1b5e8c", "#8a8a8a"
# Where a name may stand, as (right, up) in points from its dot, the nearest first.
OFFSETS = tuple(
    (distance * x, distance * y)
    for distance in (8, 14, 22, 32, 44, 58, 74, 92)
    for x, y in ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
)


def draw_frontier(summary: Summary, path: Path) -> None:
    """Writes a PNG with a panel per cumulative step; arms without a measured cost are left out."""
    metrics = [metric for metric, kept in summary.frontier.items() if kept]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.6 * len(metrics), 5.2), dpi=130, layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)  # Any: its methods have no types
        panels = np.atleast_1d(figure.subplots(1, len(metrics)))
        for panel, metric in zip(panels, metrics, strict=True):
            _draw_panel(panel, summary, metric)
        canvas.draw()
        # Labels are placed last: what is free is known once the axes have their final place.
        figure.set_layout_engine("none")
        for panel, metric in zip(panels, metrics, strict=True):
            _place_names(panel, _shown(summary, metric), metric, summary.frontier[metric], canvas)
        canvas.print_png(str(path))


def _shown(summary: Summary, metric: str) -> list[ArmSummary]:
    return [arm for arm in summary.arms if arm.microseconds is not None and metric in arm.metrics]


def _draw_panel(panel: Any, summary: Summary, metric: str) -> None:  # Any: matplotlib's Axes
    arms = {arm.name: arm for arm in _shown(summary, metric)}
    kept = summary.frontier[metric]
    for arm in arms.values():
        estimate = arm.metrics[metric]
        panel.errorbar(
            [arm.microseconds],
            [estimate.mean],
            yerr=None if estimate.deviation is None else [estimate.deviation],
            fmt="o" if arm.kind == "net" else "s",
            color=KEPT if arm.name in kept else OTHER,
            markerfacecolor=KEPT if arm.name in kept else "white",
            markersize=6,
            capsize=2.5,
            elinewidth=0.9,
        )
    line = [(arms[name].microseconds, arms[name].metrics[metric].mean) for name in kept]
    panel.plot(*zip(*line, strict=True), color=KEPT, linewidth=1.0, alpha=0.6, zorder=0)
    panel.set_xscale("log")
    panel.margins(x=0.18, y=0.12)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leads(value) else "")
    panel.grid(visible=True, linewidth=0.4, alpha=0.5)
    panel.set_xlabel("CPU microseconds per candidate, 100 candidates a request (log scale)")
    panel.set_ylabel(f"{metric} (bars: standard deviation over seeds)")
    panel.set_title(f"{metric}: filled and joined where no arm is cheaper and better", fontsize=9)
    if any(arm.kind != "net" for arm in arms.values()):
        for mark, text in (("o", "network in ONNX Runtime"), ("s", "LightGBM's own predict")):
            panel.plot([], [], mark, color=OTHER, markerfacecolor="white", label=text)
        panel.legend(loc="lower right", frameon=False, fontsize=8)


def _leads(value: float) -> bool:
    """Minor ticks of a log axis that have a number."""
    return round(value / 10 ** np.floor(np.log10(value))) in (2, 3, 5, 7)


def _place_names(
    panel: Any,  # Any: matplotlib's Axes
    arms: Sequence[ArmSummary],
    metric: str,
    kept: Sequence[str],
    canvas: Any,  # Any: its methods have no types
) -> None:
    """Each name at the nearest place that no dot, bar, line or other name takes."""
    taken = []
    for arm in arms:
        estimate = arm.metrics[metric]
        half = estimate.deviation or 0.0
        low, high = panel.transData.transform(
            [(arm.microseconds, estimate.mean - half), (arm.microseconds, estimate.mean + half)]
        )
        taken.append(Bbox([[low[0] - 6, low[1] - 6], [low[0] + 6, high[1] + 6]]))
    at = {arm.name: (arm.microseconds, arm.metrics[metric].mean) for arm in arms}
    corners = panel.transData.transform([at[name] for name in kept])
    for start, stop in pairwise(corners):
        for point in np.linspace(start, stop, 60):
            taken.append(Bbox([point - 2, point + 2]))
    legend = panel.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    frame = panel.get_window_extent()
    for arm in arms:
        estimate = arm.metrics[metric]
        name = panel.annotate(
            arm.name,
            (arm.microseconds, estimate.mean),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=KEPT if arm.name in kept else "#444444",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": OTHER, "shrinkB": 4},
        )
        for x, y in OFFSETS:
            name.set_position((x, y))
            name.set_ha("left" if x > 0 else "right" if x < 0 else "center")
            box = _text_box(name, canvas)
            if (
                frame.containsx(box.x0)
                and frame.containsx(box.x1)
                and not box.count_overlaps(taken)
            ):
                break
        taken.append(_text_box(name, canvas).padded(1.0))


def _text_box(name: Any, canvas: Any) -> Bbox:  # Any: matplotlib's Annotation and canvas
    """Of the text alone, without the line that leads to it."""
    name.update_positions(canvas.get_renderer())
    box: Bbox = Text.get_window_extent(name, canvas.get_renderer())
    return box
