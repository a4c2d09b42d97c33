"""Three CUDA graphs of a decode batch: which is captured, which replayed, by a stand-in for vLLM's
manager (capturing takes a GPU)."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from types import SimpleNamespace

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_sparsek import compat
from vllm_sparsek.compat import Path

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
ONE, TWO, HALVES = (
    cudagraph_utils.BatchExecutionDescriptor(FULL, n, n, num_ubatches=u)
    for n, u in ((1, 1), (2, 1), (2, 2))
)
MODES = {PIECEWISE: [TWO], FULL: [HALVES, TWO, ONE]}


def make_manager(backend="SPARSEK", descs=MODES):
    """A manager of a wrapped class; a graph is the path that it holds, None for both."""

    class Manager:
        def __init__(self):
            chosen = SimpleNamespace(backend=SimpleNamespace(name=backend))
            self.vllm_config = SimpleNamespace(attention_config=chosen)
            self.graphs, self._capture_mem_samples, self.captured = {}, None, []
            self._capture_descs = descs

        def capture(self, model, progress_bar_desc="all"):
            for mode, found in self._capture_descs.items():
                for desc in found:
                    self.captured.append((mode, desc, progress_bar_desc))
                    if mode is FULL:
                        assert desc not in self.graphs
                        self.graphs[desc] = graphs.capturing
                        if self._capture_mem_samples is not None:
                            self._capture_mem_samples.append(desc.num_tokens)
            if model is None and graphs.capturing is Path.SPARSE:
                raise RuntimeError("out of memory")

        def run_fullgraph(self, desc):
            return self.graphs[desc]

    graphs = compat.DecodeGraphs()
    graphs.wrap(Manager)
    return graphs, Manager()


def test_a_batch_of_one_path_replays_a_graph_of_that_path_alone():
    graphs, manager = make_manager()
    manager.capture("model")
    for path in (None, Path.DENSE, Path.SPARSE, None, Path.SPARSE):
        graphs.batch = path
        assert manager.run_fullgraph(ONE) is manager.run_fullgraph(TWO) is path


def test_microbatches_replay_the_graph_of_both_paths():
    graphs, manager = make_manager()
    manager.capture("model")
    graphs.batch = Path.DENSE
    assert manager.run_fullgraph(HALVES) is None


def test_pieces_are_captured_once_and_what_was_there_stays():
    graphs, manager = make_manager()
    manager.capture("model")
    assert [mode for mode, *_ in manager.captured] == [PIECEWISE] + 9 * [FULL]
    assert len({title for *_, title in manager.captured}) == 3
    assert manager._capture_descs is MODES
    assert set(manager.graphs.values()) == {None}
    assert graphs.capturing is None


def test_graphs_are_captured_anew_after_vllm_has_dropped_its_own():
    graphs, manager = make_manager()
    manager.capture("model")
    manager.graphs.clear()
    manager.capture("model")
    for path in Path:
        graphs.batch = path
        assert manager.run_fullgraph(ONE) is path


def test_the_memory_of_a_shape_is_that_of_its_three_graphs():
    _, manager = make_manager(descs={FULL: [TWO, ONE]})
    manager._capture_mem_samples = samples = []
    manager.capture("model")
    assert samples == [6, 3]


@pytest.mark.parametrize("backend, descs", [("FLASH_ATTN", MODES), ("SPARSEK", {PIECEWISE: [TWO]})])
def test_other_backends_and_modes_have_vllms_graphs_alone(backend, descs):
    graphs, manager = make_manager(backend, descs)
    manager.capture("model")
    assert {title for *_, title in manager.captured} == {"all"}
    graphs.batch = Path.SPARSE
    assert {manager.run_fullgraph(desc) for desc in descs.get(FULL, [])} <= {None}


def test_a_failed_capture_leaves_nothing_behind():
    graphs, manager = make_manager()
    with pytest.raises(RuntimeError, match="out of memory"):
        manager.capture(None)
    assert graphs.capturing is None
    assert manager._capture_descs is MODES


def test_wrapping_again_changes_nothing():
    graphs, manager = make_manager()
    before = type(manager).capture
    graphs.wrap(type(manager))
    assert type(manager).capture is before


def test_vllms_manager_has_what_is_wrapped():
    manager = cudagraph_utils.ModelCudaGraphManager
    assert "progress_bar_desc" in signature(manager.capture).parameters
    assert "desc" in signature(manager.run_fullgraph).parameters
    descriptor = {field.name for field in fields(cudagraph_utils.BatchExecutionDescriptor)}
    assert "num_ubatches" in descriptor
    made = cudagraph_utils.CudaGraphManager.__init__.__code__.co_names
    assert {"graphs", "_capture_descs", "_capture_mem_samples", "vllm_config"} <= set(made)
