"""The roofline plot: useful TFLOP/s over the flops per byte that attention asks for."""

from __future__ import annotations

import numpy as np

from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row
from vllm_sparsek.serving_bench.report.plot import COLOURS, new_figure, plain, to_png

MARKERS = {"decode": "o", "prefill": "s"}
# beside the lowest and highest point
MARGIN = 2.0


def points(results: Results) -> list[tuple[Row, float, float]]:
    """Rows with flops and a green gate: flops per byte and TFLOP/s."""
    return [
        (row, row.flops / row.bytes, row.tflops)
        for row in results.rows
        if row.gate and row.flops and row.bytes and row.tflops
    ]


def render(results: Results) -> bytes:
    """The plot as PNG; a point counts useful pairs and necessary bytes only."""
    figure = new_figure(10.0, 6.5)
    axes = figure.add_subplot()
    shown = points(results)
    copy, matmul = (results.ceilings.get(k) for k in ("copy_gb_per_s", "matmul_tflops"))
    intensities = [x for _, x, _ in shown] or [1.0, 1e4]
    low, high = min(intensities) / MARGIN, max(intensities) * MARGIN
    if copy and matmul:
        x = np.geomspace(low, max(high, MARGIN * matmul * 1e3 / copy), 200)
        axes.plot(x, np.minimum(x * copy / 1e3, matmul), color="#333333", linewidth=1.2)
        axes.text(x[-1], matmul, f"bf16 matmul {matmul:.0f} TFLOP/s", ha="right", va="bottom")
        axes.text(x[0], x[0] * copy / 1e3, f"  copy {copy:,.0f} GB/s", ha="left", va="top")
    arms = list(dict.fromkeys(row.arm for row, _, _ in shown))
    named: set[tuple[str, str]] = set()
    for row, intensity, tflops in shown:
        key = (row.arm, row.kind)
        axes.plot(
            intensity,
            tflops,
            MARKERS.get(row.kind, "^"),
            color=COLOURS[arms.index(row.arm) % len(COLOURS)],
            markersize=5,
            alpha=0.75,
            label=None if key in named else f"{row.arm}, {row.kind}",
        )
        named.add(key)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful flops per byte that must move")
    axes.set_ylabel("useful TFLOP/s")
    plain(axes, f"Attention kernels on {results.environment.get('device')}")
    if named:
        axes.legend(loc="lower right", fontsize=8, ncols=2, frameon=False)
    return to_png(figure)
