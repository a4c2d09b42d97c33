"""CUDA graphs of decode batches."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_sparsek.compat.selection import is_selected


class AttentionPath(enum.Enum):
    """What the queries of a row read: all of their context, or a selection."""

    DENSE = "dense"
    SPARSE = "sparse"


class DecodeGraphs:
    """Three full CUDA graphs of a decode batch: one holds both paths, two hold one path each.

    What a row reads changes between replays of a graph, so vLLM's own holds both paths. Kernels of
    a path that no row takes find nothing to do, but launching and joining them costs microseconds
    a layer; where all rows of a batch take one path, a graph of that path alone is replayed.
    Ends when a backend can choose among graphs of its own.

    Attributes:
        capturing: the path whose graphs are being captured, None if they hold both.
        batch: the path that all rows of the batch take that was built last, None if not all one.
    """

    def __init__(self) -> None:
        self.capturing: AttentionPath | None = None
        self.batch: AttentionPath | None = None

    def hook(self) -> None:
        """Capture and replay all three in the runners of this process (runner V2)."""
        module = sys.modules.get("vllm.v1.worker.gpu.cudagraph_utils")
        if module is not None:
            self.wrap(module.ModelCudaGraphManager)

    def wrap(self, manager_class: Any) -> None:
        """Make a class of vLLM's graph managers capture and replay all three."""
        capture, run = manager_class.capture, manager_class.run_fullgraph
        if hasattr(capture, "sparsek_original"):
            return

        @contextmanager
        def graphs_of(manager: Any, path: AttentionPath) -> Iterator[None]:
            both = manager.graphs
            manager.graphs = manager.__dict__.setdefault("sparsek_graphs", {}).setdefault(path, {})
            try:
                yield
            finally:
                manager.graphs = both

        @functools.wraps(capture)
        def capture_all(manager: Any, *args: Any, **kwargs: Any) -> None:
            capture(manager, *args, **kwargs)
            shapes = manager._capture_descs
            full = {mode: descs for mode, descs in shapes.items() if mode.name == "FULL"}
            if not full or not is_selected(manager.vllm_config):
                return
            manager._capture_descs = full
            try:
                for path in AttentionPath:
                    self.capturing = path
                    title = f"Capturing CUDA graphs of {path.value} batches"
                    with graphs_of(manager, path):
                        manager.graphs.clear()
                        capture(manager, *args, **{**kwargs, "progress_bar_desc": title})
            finally:
                self.capturing, manager._capture_descs = None, shapes
            samples = manager._capture_mem_samples
            if samples:
                # vLLM reckons what all graphs need from those of two shapes: of each, all three
                shapes_sampled = len(samples) // (1 + len(AttentionPath))
                samples[:] = [sum(samples[i::shapes_sampled]) for i in range(shapes_sampled)]

        @functools.wraps(run)
        def run_one(manager: Any, desc: Any) -> Any:
            path = self.batch
            graphs = getattr(manager, "sparsek_graphs", {}).get(path, {})
            # microbatches are built one by one: the last says nothing of the others
            if path is None or desc not in graphs or desc.num_ubatches > 1:
                return run(manager, desc)
            with graphs_of(manager, path):
                return run(manager, desc)

        capture_all.sparsek_original = capture  # type: ignore[attr-defined]
        manager_class.capture = capture_all
        manager_class.run_fullgraph = run_one


decode_graphs = DecodeGraphs()
