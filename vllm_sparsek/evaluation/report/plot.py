"""Quality against density, one line an arm: perplexity, RULER's average, the worst task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from vllm_sparsek.evaluation.plan import COLUMNS, DENSE
from vllm_sparsek.evaluation.results import Results, Summary
from vllm_sparsek.serving_bench.report.plot import COLOURS, new_figure, plain, to_png

# what needs no knowledge of the text: drawn dashed
FLOORS = ("recency", "random")
TITLES = {
    "all": "everything sparse",
    "decode": "sparse decode after dense prefill",
    "question": "sparse question after a dense context",
}
_X_LABEL = "density: share of the context that an answer's queries read"
_PANEL_INCHES = 4.6


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a title, which cells, and the value of a cell in per cent."""

    title: str
    column: str
    value: Callable[[Summary], float | None]


@dataclass(frozen=True)
class Plot:
    """One figure a length; dense: where the dense model lies, in per cent."""

    name: str
    y_label: str
    dense: float
    panels: Sequence[Panel]


PLOTS = (
    Plot(
        "perplexity",
        "perplexity over dense, %",
        0.0,
        (
            Panel("whole windows, everything sparse", "all", lambda s: s.increase),
            Panel("last quarter of the windows", "all", lambda s: s.increase_last),
        ),
    ),
    Plot(
        "ruler",
        "RULER average, % of dense",
        100.0,
        [Panel(TITLES[column], column, lambda s: s.ruler_relative) for column in COLUMNS],
    ),
    Plot(
        "worst",
        "worst task, % of dense",
        100.0,
        [Panel(TITLES[column], column, lambda s: s.worst) for column in COLUMNS],
    ),
)


def _points(panel: Panel, summaries: Sequence[Summary], arm: str) -> list[tuple[float, float]]:
    points = []
    for summary in summaries:
        value = panel.value(summary)
        density = summary.density if summary.density is not None else summary.budget
        if summary.arm == arm and summary.column == panel.column and value is not None:
            points.append((density or 0.0, 100 * value))
    return sorted(points)


def _draw(axes: Axes, plot: Plot, panel: Panel, summaries: list[Summary], arms: list[str]) -> None:
    for index, arm in enumerate(arms):
        points = _points(panel, summaries, arm)
        if points:
            floor = arm.split(":")[0] in FLOORS
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                linestyle="--" if floor else "-",
                color=COLOURS[index % len(COLOURS)],
                label=arm,
            )
    axes.axhline(plot.dense, color="#888888", linewidth=1)
    axes.set_xlim(0, 1)
    if plot.dense:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(_X_LABEL, fontsize=8)
    axes.set_ylabel(plot.y_label)
    plain(axes, panel.title)


def render(results: Results) -> dict[str, bytes]:
    """PNGs by file name, for every plot and length that has something to show."""
    arms = [arm for arm in results.arms if arm != DENSE]
    everything = results.summaries()
    rendered = {}
    for length in dict.fromkeys(summary.length for summary in everything):
        summaries = [summary for summary in everything if summary.length == length]
        for plot in PLOTS:
            panels = [p for p in plot.panels if any(_points(p, summaries, arm) for arm in arms)]
            if not panels:
                continue
            figure = new_figure(max(7.0, _PANEL_INCHES * len(panels)), 4.6)
            labelled: dict[str, Any] = {}
            every = figure.subplots(1, len(panels), squeeze=False, sharey=bool(plot.dense))[0]
            for axes, panel in zip(every, panels, strict=True):
                _draw(axes, plot, panel, summaries, arms)
                labelled |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
            figure.legend(labelled.values(), labelled.keys(), loc="outside lower center",
                          ncols=min(6, len(labelled)), frameon=False)  # fmt: skip
            model = "/".join(results.model.rstrip("/").split("/")[-2:])
            figure.suptitle(f"{model}, contexts of {length} tokens", x=0.01, ha="left")
            rendered[f"{plot.name}-{length}.png"] = to_png(figure)
    return rendered
