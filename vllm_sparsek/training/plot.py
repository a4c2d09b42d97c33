"""The plot of a fit: how the loss went down, and what every layer keeps."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllm_sparsek.training.fit import SHARE, FitReport

DPI = 120


def draw(report: FitReport, title: str) -> bytes:
    """A PNG with two panels, or three if the fit was refined.

    Args:
        report: of the fit; title: what was fitted.
    """
    reports = report.layers
    panels = 3 if report.refinement else 2
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right, *last = figure.subplots(1, panels)
    for layer in reports:
        shade = layer.layer / max(1, reports[-1].layer)
        left.plot(layer.losses, color=(0.0, 0.3 + 0.5 * shade, 0.8 - 0.5 * shade), linewidth=0.8)
    left.set(xlabel="round of budgets", ylabel="attention dropped", yscale="log",
             title="training loss, a line a layer (blue: first, green: last)")  # fmt: skip
    layers = [layer.layer for layer in reports]
    right.plot(layers, [layer.recall for layer in reports], marker="o", label="far attention")
    right.plot(
        layers, [layer.answer_recall for layer in reports], marker="s", label="answers' attention"
    )
    right.set(xlabel="layer", ylabel="share kept", ylim=(0, 1.02),
              title=f"kept at {SHARE:.0%} of the context, windows held out")  # fmt: skip
    right.legend()
    for panel in last:
        panel.plot(report.refinement, linewidth=0.8)
        panel.set(xlabel="step", ylabel="loss", yscale="log", title="refinement")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()
