"""Times on the GPU: CUDA graphs for short calls, events around long ones, and the ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

WARMUP = 2
SAMPLES = 21
QUICK_SAMPLES = 5  # to choose between settings of a library
# below this, the host's launches are a visible share of the time
GRAPH_BELOW_US = 2000.0
CALLS_PER_GRAPH = 10  # at least, so that the graph's own launch costs little
COPY_BYTES = 2 * 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and the 20th and 80th percentile.

    how: "graph" or "events". note: why a short call was not replayed from a graph.
    """

    us: float
    p20: float
    p80: float
    samples: int
    how: str
    note: str = ""


def _timing(times: list[float], how: str, note: str = "") -> Timing:
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), cuts[0], cuts[3], len(times), how, note)


def _events(calls: Sequence[Call], samples: int, per_sample: int = 1) -> list[float]:
    """Microseconds per call of so many samples; nothing waits for the GPU in between."""
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(samples)
    ]
    for i, (begin, end) in enumerate(marks):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1000 / per_sample for begin, end in marks]


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that makes every call at least once, and how many calls it makes."""
    passes = -(-CALLS_PER_GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # the outer context restores the stream even if the capture fails
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        for _ in range(passes):
            for call in calls:
                call()
    return graph, passes * len(calls)


def time_calls(calls: Sequence[Call], capturable: bool = True, samples: int = SAMPLES) -> Timing:
    """Time calls that do the same on different inputs; they take turns.

    Args:
        calls: one per input set.
        capturable: short calls are replayed from a CUDA graph.
        samples: measurements, the median of which counts.
    """
    for call in calls:
        call()
    for _ in range(WARMUP):
        calls[0]()
    torch.cuda.synchronize()
    if not capturable or statistics.median(_events(calls, 3)) >= GRAPH_BELOW_US:
        return _timing(_events(calls, samples), "events")
    try:
        graph, made = _capture(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()
        first = str(error).splitlines()[0]
        return _timing(_events(calls, samples), "events", f"not captured: {first}")
    for _ in range(WARMUP):
        graph.replay()
    return _timing(_events([graph.replay], samples, made), "graph")


def quick(call: Call) -> float:
    """Microseconds of a call, roughly: for choosing a setting."""
    return time_calls([call], samples=QUICK_SAMPLES).us


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best: device copy, read and write counted, and bf16 matmul."""

    copy_gb_per_s: float
    matmul_tflops: float


def ceilings() -> Ceilings:
    """Measure them: a copy of 2 GiB, and 8192 x 8192 matrices."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    copy = _timing(_events([lambda: target.copy_(source)], WARMUP + SAMPLES)[WARMUP:], "events")
    n = MATMUL_SIZE
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    matmul = _timing(
        _events([lambda: torch.mm(a, b, out=out)], WARMUP + SAMPLES)[WARMUP:], "events"
    )
    return Ceilings(2 * COPY_BYTES / copy.us / 1e3, 2 * n**3 / matmul.us / 1e6)
