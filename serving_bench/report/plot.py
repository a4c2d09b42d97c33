"""The plot: throughput bars per workload and arm, with density and KV hit rate written at them."""

from __future__ import annotations

import io
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_sparsek.serving_bench.results import Results

# Okabe and Ito's colours, told apart by the colour-blind
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#000000")
DPI = 150
_PANELS = (
    ("prompt_tokens_per_s", "prompt tokens/s"),
    ("generation_tokens_per_s", "generation tokens/s"),
)
_FOOTNOTE = "d: density, the share of the context that is read. hit: prefix-cache hit rate."
# inches; a bar needs room for its figures
_BAR_INCHES = 0.8
_BAR_HEIGHT_SHARE = 0.92


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; not pyplot: no global state, no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def plain(axes: Axes, title: str) -> None:
    """Give axes the look that all plots share."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _annotation(row: dict[str, float | None]) -> str:
    density, hits = row.get("density"), row.get("kv_hit_rate")
    return "\n".join(
        (
            "d n/a" if density is None else f"d {density:.2f}",
            "hit n/a" if hits is None else f"hit {100 * hits:.0f}%",
        )
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _panel(axes: Axes, results: Results, rows: dict, name: str, title: str) -> None:
    arms = list(dict.fromkeys(arm for arm, _ in rows))
    workloads = [w for w in results.workloads if any(w == have for _, have in rows)]
    width = _BAR_HEIGHT_SHARE / len(arms)
    top = max((run.metrics.get(name) or 0.0 for run in results.runs), default=0.0) or 1.0
    for i, arm in enumerate(arms):
        for j, workload in enumerate(workloads):
            row = rows.get((arm, workload))
            if row is None:
                continue
            x = j + (i - (len(arms) - 1) / 2) * width
            value = row[name]
            axes.bar(
                x,
                value or 0.0,
                width * 0.9,
                color=COLOURS[i % len(COLOURS)],
                label=arm if j == 0 else None,
            )
            single = [
                v
                for run in results.runs
                if (run.arm, run.workload) == (arm, workload)
                and (v := run.metrics.get(name)) is not None
            ]
            if len(single) > 1:
                middle = median(single)
                axes.errorbar(
                    x,
                    middle,
                    [[middle - min(single)], [max(single) - middle]],
                    color="#333333",
                    capsize=3,
                )
            label = "n/a" if value is None else _number(value)
            highest = max([*single, value or 0.0])
            axes.text(x, highest + 0.02 * top, label, ha="center", va="bottom", fontsize=9,
                      fontweight="bold")  # fmt: skip
            axes.text(x, highest + 0.09 * top, _annotation(row), ha="center", va="bottom",
                      fontsize=7.5, color="#444444")  # fmt: skip
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_xlim(-0.5, len(workloads) - 0.5)
    axes.set_ylim(0, top * 1.32)
    plain(axes, title)


def render(results: Results) -> bytes:
    """Return the plot as PNG: medians, whiskers from the lowest to the highest repeat."""
    rows = {(row["arm"], row["workload"]): row for row in results.summary()}
    arms = list(dict.fromkeys(arm for arm, _ in rows))
    bars = len(arms) * len({workload for _, workload in rows})
    figure = new_figure(max(7.0, 1.5 + bars * _BAR_INCHES), 7.5)
    for axes, (name, title) in zip(figure.subplots(2, 1), _PANELS, strict=True):
        _panel(axes, results, rows, name, title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(arms)), frameon=False
    )
    # of a folder, the end says more than where it lies
    model = "/".join(results.model.rstrip("/").split("/")[-2:])
    figure.suptitle(f"{model} on {results.environment.get('device')}", x=0.01, ha="left")
    figure.axes[0].set_title(_FOOTNOTE, loc="right", fontsize=8, color="#444444")
    return to_png(figure)
