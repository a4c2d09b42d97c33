"""CUDA graphs of decode batches."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_sparsek.compat.selection import is_selected


class DecodeGraphs:
    """Two full CUDA graphs of a decode batch: one holds both paths, one the dense path alone.

    What a row reads changes between replays of a graph, so a graph must hold sparse attention
    even where all contexts are within the budget. The kernels find nothing to do then, but
    launching and joining them costs microseconds a layer; the second graph has none of them.
    Ends when a backend can choose among graphs of its own.

    Attributes:
        capturing_dense: dense graphs are being captured.
        batch_is_dense: no row of the batch that was built last reads sparsely.
    """

    def __init__(self) -> None:
        self.capturing_dense = False
        self.batch_is_dense = False

    def hook(self) -> None:
        """Capture and replay both in the runners of this process (runner V2)."""
        module = sys.modules.get("vllm.v1.worker.gpu.cudagraph_utils")
        if module is not None:
            self.wrap(module.ModelCudaGraphManager)

    def wrap(self, manager_class: Any) -> None:
        """Make a class of vLLM's graph managers capture and replay both."""
        capture, run = manager_class.capture, manager_class.run_fullgraph
        if hasattr(capture, "sparsek_original"):
            return

        @contextmanager
        def dense_graphs(manager: Any) -> Iterator[None]:
            every = manager.graphs
            manager.graphs = manager.__dict__.setdefault("sparsek_dense_graphs", {})
            try:
                yield
            finally:
                manager.graphs = every

        @functools.wraps(capture)
        def capture_both(manager: Any, *args: Any, **kwargs: Any) -> None:
            capture(manager, *args, **kwargs)
            shapes = manager._capture_descs
            full = {mode: descs for mode, descs in shapes.items() if mode.name == "FULL"}
            if not full or not is_selected(manager.vllm_config):
                return
            self.capturing_dense, manager._capture_descs = True, full
            title = {"progress_bar_desc": "Capturing CUDA graphs of dense batches"}
            try:
                with dense_graphs(manager):
                    manager.graphs.clear()
                    capture(manager, *args, **{**kwargs, **title})
                samples = manager._capture_mem_samples
                if samples:
                    # vLLM reckons what all graphs need from those of two shapes
                    half = len(samples) // 2
                    samples[:] = map(sum, zip(samples[:half], samples[half:], strict=True))
            finally:
                self.capturing_dense, manager._capture_descs = False, shapes

        @functools.wraps(run)
        def run_either(manager: Any, desc: Any) -> Any:
            dense = getattr(manager, "sparsek_dense_graphs", {})
            # microbatches are built one by one: the last says nothing of the others
            if not self.batch_is_dense or desc not in dense or desc.num_ubatches > 1:
                return run(manager, desc)
            with dense_graphs(manager):
                return run(manager, desc)

        capture_both.sparsek_original = capture  # type: ignore[attr-defined]
        manager_class.capture = capture_both
        manager_class.run_fullgraph = run_either


decode_graphs = DecodeGraphs()
