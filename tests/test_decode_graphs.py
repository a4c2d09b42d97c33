"""Three CUDA graphs of a decode batch: which is captured, which replayed, by a stand-in for vLLM's
manager (capturing takes a GPU), and what a batch says of itself."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_sparsek import compat
from vllm_sparsek.attention.metadata import SparseKMetadataBuilder
from vllm_sparsek.compat import AttentionPath
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget

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
            if model is None and graphs.capturing is AttentionPath.SPARSE:
                raise RuntimeError("out of memory")

        def run_fullgraph(self, desc):
            return self.graphs[desc]

    graphs = compat.DecodeGraphs()
    graphs.wrap(Manager)
    return graphs, Manager()


def test_a_batch_of_one_path_replays_a_graph_of_that_path_alone():
    graphs, manager = make_manager()
    manager.capture("model")
    for path in (None, AttentionPath.DENSE, AttentionPath.SPARSE, None, AttentionPath.SPARSE):
        graphs.batch = path
        assert manager.run_fullgraph(ONE) is manager.run_fullgraph(TWO) is path


def test_microbatches_replay_the_graph_of_both_paths():
    graphs, manager = make_manager()
    manager.capture("model")
    graphs.batch = AttentionPath.DENSE
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
    for path in AttentionPath:
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
    graphs.batch = AttentionPath.SPARSE
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


class DenseBuilder:
    """Stands for the dense path's builder: keeps the context lengths that it was given."""

    def build(self, common_prefix_len, common, fast_build=False):
        return common.seq_lens


@pytest.fixture
def builder(monkeypatch):
    """A builder as on a GPU, whose rows read sparsely from position 100 on."""
    monkeypatch.setattr(compat, "decode_graphs", compat.DecodeGraphs())
    monkeypatch.setattr(compat, "to_device", lambda array, device: torch.from_numpy(array))
    monkeypatch.setattr(compat, "prompt_lengths", lambda common: None)
    made = object.__new__(SparseKMetadataBuilder)
    vars(made).update(
        config=SparseKConfig(scorer="knorm", k=64, window=32), page=16, max_model_len=4096,
        budget=Budget(64, 32, 4, 16), first_sparse=100, dense_builder=DenseBuilder(),
        dense_all_builder=None, max_rows=4, max_tokens=16, positions_at=16,
        buffer=torch.zeros(32, dtype=torch.int32), share_bases=False, step=0, counters=None,
        capturing=False, device=torch.device("cuda"),
    )  # fmt: skip
    return made


def decode_batch(*contexts):
    """One query a row."""
    rows, lens = len(contexts), torch.tensor(contexts, dtype=torch.int32)
    start = torch.arange(rows + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start, query_start_loc_cpu=start, seq_lens=lens, num_reqs=rows,
        num_actual_tokens=rows, max_query_len=1, max_seq_len=max(contexts),
        block_table_tensor=torch.zeros(rows, 256, dtype=torch.int32),
        slot_mapping=torch.zeros(rows, dtype=torch.int64), seq_lens_cpu_upper_bound=lens,
    )  # fmt: skip


@pytest.mark.parametrize(
    "contexts, path",
    [((50, 60), AttentionPath.DENSE), ((200, 300), AttentionPath.SPARSE), ((50, 300), None)],
)
def test_a_batch_has_the_path_that_all_its_rows_take(contexts, path, builder):
    metadata = builder.build(0, decode_batch(*contexts))
    assert compat.decode_graphs.batch is path
    # whatever is replayed finds what it reads
    assert metadata.dense is not None
    assert metadata.decode_row.tolist() == [r if n > 100 else -1 for r, n in enumerate(contexts)]


@pytest.mark.parametrize("path", [None, *AttentionPath])
def test_a_graph_is_captured_with_the_paths_that_it_holds(path, builder):
    compat.decode_graphs.capturing = path
    metadata = builder.build_for_cudagraph_capture(decode_batch(4096, 4096))
    assert (metadata.dense is None) == (path is AttentionPath.SPARSE)
    assert metadata.sparse_decodes == (path is not AttentionPath.DENSE)
