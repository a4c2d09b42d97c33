"""The plot of a fit: how the loss went down, and what every layer keeps."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_sparsek.training.fit import SHARE, LayerReport

DPI = 120


def draw(reports: list[LayerReport], title: str) -> bytes:
    """A PNG with two panels.

    Args:
        reports: one a layer; title: what was fitted.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for report in reports:
        shade = report.layer / max(1, reports[-1].layer)
        left.plot(report.losses, color=(0.0, 0.3 + 0.5 * shade, 0.8 - 0.5 * shade), linewidth=0.8)
    left.set(xlabel="round of budgets", ylabel="attention dropped", yscale="log",
             title="training loss, a line a layer (blue: first, green: last)")  # fmt: skip
    layers = [report.layer for report in reports]
    right.plot(layers, [report.recall for report in reports], marker="o", label="far attention")
    right.plot(
        layers, [report.answer_recall for report in reports], marker="s", label="answers' attention"
    )
    right.set(xlabel="layer", ylabel="share kept", ylim=(0, 1.02),
              title=f"kept at {SHARE:.0%} of the context, windows held out")  # fmt: skip
    right.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()
