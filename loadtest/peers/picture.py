"""The picture of a comparison."""

from pathlib import Path

from loadtest.peers.compare import OURS, Comparison


def draw(path: Path, result: Comparison) -> None:
    """Server CPU per request, with and without the model run, and throughput."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(reversed(result.rows))
    labels = [f"{row.server}\n{row.format}" for row in rows]
    colors = ["tab:blue" if row.server == OURS else "tab:grey" for row in rows]
    height = 1.2 + 0.55 * len(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    outside = [row.outside_us for row in rows]
    model = [row.cpu_us - row.outside_us for row in rows]
    left.barh(labels, outside, color=colors)
    left.barh(labels, model, left=outside, color="tab:orange", alpha=0.6, label="model run alone")
    left.set(xlabel="server CPU per request at saturation, us")
    left.legend()
    bars = right.barh(labels, [row.saturation_per_s for row in rows], color=colors)
    right.bar_label(bars, fmt="%.0f")
    right.set(xlabel=f"requests/s on one core; peers run the {result.graph} graph")
    right.set_yticklabels([])
    right.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
