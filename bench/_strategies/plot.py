"""The picture: mean and P99 JCT over the rate, a column for each mix, a line for each strategy, bars for intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .intervals import estimate, mean, p99
from .judge import Group

BESIDE = 0.01


def draw(groups: Sequence[Group], path: Path) -> None:
    """Write a PNG. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    mixes = list(dict.fromkeys(group.mix.name for group in groups))
    labels = list(dict.fromkeys(s.strategy.label for group in groups for s in group.sides.values()))
    colours = pyplot.get_cmap("tab10")
    figure, axes = pyplot.subplots(2, len(mixes), figsize=(4.2 * len(mixes), 7.5), squeeze=False, sharex="col")
    for column, name in enumerate(mixes):
        some = [group for group in groups if group.mix.name == name]
        for row, (title, statistic) in enumerate({"mean": mean, "P99": p99}.items()):
            axis: Any = axes[row][column]
            for index, label in enumerate(labels):
                points = [
                    (group.rate, estimate(side.jct(), statistic).scaled(1e3))
                    for group in some
                    for side in group.sides.values()
                    if side.strategy.label == label
                ]
                if not points:
                    continue
                # Bars of one rate stand beside one another.
                rates = [rate * (1 if len(points) > 1 else 1 + BESIDE * index) for rate, _ in points]
                values = [found.value for _, found in points]
                errors = [[f.value - f.low for _, f in points], [f.high - f.value for _, f in points]]
                is_baseline = any(
                    s.strategy.kind == "baseline" for g in some for s in g.sides.values() if s.strategy.label == label
                )
                style = "--" if is_baseline else "-"
                axis.errorbar(
                    rates, values, errors, label=label, color=colours(index % 10), ls=style, marker="o", ms=3, capsize=2
                )
            axis.set_yscale("log")
            for some_axis in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                some_axis(ticker.StrMethodFormatter("{x:g}"))
            axis.grid(alpha=0.3, which="both")
            if row == 0:
                axis.set_title(name, fontsize=10)
            else:
                axis.set_xlabel("requests/s")
            if column == 0:
                axis.set_ylabel(f"{title} JCT, ms")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
