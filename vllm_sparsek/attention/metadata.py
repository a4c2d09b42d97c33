"""What all SparseK layers share in one step: which rows and queries are sparse, and where.

Everything is computed on the host from lengths vLLM already has there and copied once:
nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparsek import compat
from vllm_sparsek.attention.cpu_decode import CpuDecodeRow
from vllm_sparsek.attention.settings import layer_budget, settings_of
from vllm_sparsek.kernels.common.budget import mean_tokens_attended
from vllm_sparsek.kernels.select.chunk import ChunkBases
from vllm_sparsek.metrics import StepCounters

# items that are worth a base, which costs about as much as one selection
LEAST_PER_BASE = 4


@dataclass
class PrefillItems:
    """Queries of prefill rows, grouped by the selection they share.

    Every tensor begins at a multiple of 16 bytes: without it, kernels would be compiled once more.

    Attributes:
        row: [items] int32 row of the block table; position: [items] int32 absolute position
            of the first query; query_start: [items] int32 its index in the batch;
            query_len: [items] int32, 1..R.
        bases: one per row, or None where every item selects by itself.
    """

    row: torch.Tensor
    position: torch.Tensor
    query_start: torch.Tensor
    query_len: torch.Tensor
    bases: ChunkBases | None


@dataclass
class SparseKMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        num_actual_tokens: tokens of the batch, with CUDA graph padding.
        query_start_loc: [rows + 1] int32; seq_lens: [rows] int32; block_table:
            [rows, max_blocks] int32; slot_mapping: [tokens] int64.
        positions: [tokens] int32 absolute positions.
        dense: metadata of the dense path for rows with dense queries, or None if no row has.
        dense_all: the same for layers that are always dense, or None without such layers.
        num_decodes: rows at the front of the batch with one query each.
        decode_row: [num_decodes] int32, the row, or -1 where it is read densely.
        decode_position: [num_decodes] int32.
        step: [1] int32 on the device, one more at every step.
        sparse_decodes: whether any decode row is sparse (in a CUDA graph of both paths: true).
        items: sparse queries of the prefill rows, or None.
        cpu_rows: sparse decode rows, on the CPU only; cpu_windows: what layers share of them.
    """

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    dense: Any | None
    dense_all: Any | None
    num_decodes: int
    decode_row: torch.Tensor
    decode_position: torch.Tensor
    step: torch.Tensor
    sparse_decodes: bool
    items: PrefillItems | None
    cpu_rows: list[CpuDecodeRow] = field(default_factory=list)
    cpu_windows: dict[int, torch.Tensor] = field(default_factory=dict)


class SparseKMetadataBuilder(AttentionMetadataBuilder[SparseKMetadata]):
    """Splits every batch into dense and sparse work.

    Persistent buffers hold all that changes between replays of a CUDA graph.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.config = settings_of(vllm_config)
        self.page = kv_cache_spec.block_size
        self.budget = self.config.budget(self.page)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.first_sparse = self.config.first_sparse_position(self.page, self.max_model_len)
        layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        always_dense = sum(layer.impl.always_dense for layer in layers.values())
        # the nominal budget decides which rows are sparse; how much is kept is up to the layers
        self.layer_budgets = [
            layer_budget(vllm_config, self.page, layer.impl.layer)
            for layer in layers.values()
            if not layer.impl.always_dense
        ]
        if len(set(self.layer_budgets)) < 2:
            self.layer_budgets = self.layer_budgets[:1] or [self.budget]
        self.dense_share = always_dense / max(len(layers), 1)
        make_dense = compat.dense_builder_class(device.type)
        self.dense_builder = make_dense(kv_cache_spec, layer_names, vllm_config, device)
        self.dense_all_builder = (
            make_dense(kv_cache_spec, layer_names, vllm_config, device) if always_dense else None
        )
        self.max_rows = compat.max_decode_rows(vllm_config)
        self.max_tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, self.max_rows)
        # decode_row | decode_position | dense seq_lens | step and padding | positions
        self.positions_at = 3 * self.max_rows + 4
        self.buffer = torch.zeros(
            self.positions_at + self.max_tokens, dtype=torch.int32, device=device
        )
        self.share_bases = (
            device.type == "cuda" and self.config.mode == "hard" and not self.config.query_aware
        )
        self.step = 0
        self.counters = StepCounters.create(vllm_config)
        self.capturing = False

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SparseKMetadata:
        """Build for a graph that holds both paths, or one: see ``compat.DecodeGraphs``."""
        self.capturing = True
        try:
            return self.build(0, common_attn_metadata)
        finally:
            self.capturing = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseKMetadata:
        """See the class and ``SparseKMetadata``."""
        common = common_attn_metadata
        rows, tokens = common.num_reqs, common.num_actual_tokens
        num_decodes, *_ = split_decodes_and_prefills(common, decode_threshold=1)
        starts_in_batch = common.query_start_loc_cpu[: rows + 1].numpy().astype(np.int64)
        query_lens = np.diff(starts_in_batch)
        if common.seq_lens_cpu_upper_bound is None:
            ends = np.full(rows, self.max_model_len, dtype=np.int64)
        else:
            ends = common.seq_lens_cpu_upper_bound[:rows].numpy().astype(np.int64)
        # row r reads sparsely from position sparse_from[r] on
        sparse_from = np.full(rows, self.first_sparse, dtype=np.int64)
        prompts = compat.prompt_lengths(common)
        if prompts is not None and not self.config.sparse_prefill:
            sparse_from = np.maximum(sparse_from, prompts)
        real = query_lens > 0
        has_sparse = real & (ends > sparse_from)
        has_dense = real & (ends - query_lens < sparse_from)
        graphs = compat.decode_graphs
        captured = graphs.capturing if self.capturing else None
        if self.capturing:
            has_dense = np.full(rows, captured is compat.AttentionPath.DENSE)
            has_sparse = ~has_dense
        elif prompts is not None:
            self._count(num_decodes, starts_in_batch, query_lens, ends, sparse_from)

        graphs.batch = None
        if not has_sparse.any():
            graphs.batch = compat.AttentionPath.DENSE
        elif not has_dense.any():
            graphs.batch = compat.AttentionPath.SPARSE
        n = int(starts_in_batch[-1])
        self.step = (self.step + 1) % (1 << 31)
        packed = np.zeros(self.positions_at + max(tokens, n), dtype=np.int32)
        packed[3 * self.max_rows] = self.step
        packed[:num_decodes] = np.where(has_sparse, np.arange(rows), -1)[:num_decodes]
        packed[self.max_rows : self.max_rows + num_decodes] = (ends - 1)[:num_decodes]
        packed[2 * self.max_rows : 2 * self.max_rows + rows] = np.where(has_dense, ends, 0)
        packed[self.positions_at : self.positions_at + n] = token_positions(
            starts_in_batch, query_lens, ends
        )
        self.buffer[: packed.size].copy_(compat.to_device(packed, self.device), non_blocking=True)
        decode_row, decode_position, dense_seq_lens = (
            self.buffer[part * self.max_rows : (part + 1) * self.max_rows] for part in range(3)
        )

        decode_only = num_decodes == rows
        dense = dense_all = None
        # a decode batch may be replayed from a graph that holds the dense path in any case
        if (has_dense & has_sparse).any():
            requests = dense_requests(starts_in_batch, ends, sparse_from)
            # a schedule made ahead has room for the rows of a batch, not for more requests
            dense = self.dense_builder.build(0, compat.with_requests(common, *requests), True)
        elif has_dense.any() or (
            decode_only
            and self.device.type != "cpu"
            and captured is not compat.AttentionPath.SPARSE
        ):
            masked = common.replace(seq_lens=dense_seq_lens[:rows])
            if self.device.type == "cpu":
                masked = masked.replace(
                    seq_lens_cpu_upper_bound=torch.from_numpy(np.where(has_dense, ends, 0))
                )
            dense = self.dense_builder.build(0, masked, fast_build)
        if self.dense_all_builder is not None:
            dense_all = self.dense_all_builder.build(0, common, fast_build)
        return SparseKMetadata(
            num_actual_tokens=tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            positions=self.buffer[self.positions_at : self.positions_at + tokens],
            dense=dense,
            dense_all=dense_all,
            num_decodes=num_decodes,
            decode_row=decode_row[:num_decodes],
            decode_position=decode_position[:num_decodes],
            step=self.buffer[3 * self.max_rows : 3 * self.max_rows + 1],
            sparse_decodes=bool(has_sparse[:num_decodes].any()),
            items=self._items(num_decodes, starts_in_batch, query_lens, ends, sparse_from),
            cpu_rows=self._cpu_rows(common.block_table_tensor, has_sparse[:num_decodes], ends),
        )

    def _cpu_rows(
        self, block_table: torch.Tensor, has_sparse: np.ndarray, ends: np.ndarray
    ) -> list[CpuDecodeRow]:
        """Sparse decode rows, with what identifies their selection."""
        if self.device.type != "cpu":
            return []
        table, rows = block_table.numpy(), []
        for row in np.flatnonzero(has_sparse).tolist():
            position = int(ends[row]) - 1
            start = self.budget.selection_position(position)
            competing = self.budget.end_unit(start) * self.budget.unit
            blocks = table[row, : -(-competing // self.page)].tobytes()
            rows.append(CpuDecodeRow(row, position, (start, blocks)))
        return rows

    def _items(
        self,
        num_decodes: int,
        starts_in_batch: np.ndarray,
        query_lens: np.ndarray,
        ends: np.ndarray,
        sparse_from: np.ndarray,
    ) -> PrefillItems | None:
        """Sparse queries of prefill rows, cut at multiples of R; one by one if each selects."""
        refresh = 1 if self.config.query_aware else self.budget.refresh
        parts = []
        for row in range(num_decodes, len(ends)):
            start, end = ends[row] - query_lens[row], ends[row]
            first = max(start, sparse_from[row])
            if first >= end:
                continue
            blocks = np.arange(first // refresh, (end - 1) // refresh + 1)
            position = np.maximum(blocks * refresh, first)
            stop = np.minimum((blocks + 1) * refresh, end)
            query_start = starts_in_batch[row] + position - start
            parts.append((np.full_like(position, row), position, query_start, stop - position))
        if not parts:
            return None
        items = [part[0].size for part in parts]
        count = sum(items)
        packed = np.zeros((4, -(-count // 4) * 4), dtype=np.int32)
        packed[:, :count] = np.concatenate([np.stack(part) for part in parts], axis=1)
        there = compat.to_device(packed, self.device)[:, :count]
        row_, position_, query_start_, query_len_ = there
        worth_it = self.share_bases and count >= LEAST_PER_BASE * len(parts)
        bases = self._bases(parts, items) if worth_it else None
        return PrefillItems(row_, position_, query_start_, query_len_, bases)

    def _bases(self, parts: Sequence[Sequence[np.ndarray]], items: list[int]) -> ChunkBases:
        """Bases of the items of every row; about the root of a row's items share one.

        A base costs a look at its context, an item a look at what its base's items added.
        """
        of_item: list[np.ndarray] = []
        bounds: list[tuple[int, int, int]] = []
        for (row, position, *_), count in zip(parts, items, strict=True):
            per_base = max(LEAST_PER_BASE, math.isqrt(count))
            of_item.append(len(bounds) + np.arange(count, dtype=np.int32) // per_base)
            for low in range(0, count, per_base):
                last = min(low + per_base, count) - 1
                bounds.append((row[low], position[low], position[last]))
        found = np.array(bounds)
        found[:, 1:] -= found[:, 1:] % self.budget.refresh
        return ChunkBases(
            compat.to_device(np.concatenate(of_item), self.device),
            compat.to_device(found.astype(np.int32), self.device),
            longest=int(found[:, 1].max()),
            span=int((found[:, 2] - found[:, 1]).max()),
        )

    def _count(
        self,
        num_decodes: int,
        starts_in_batch: np.ndarray,
        query_lens: np.ndarray,
        ends: np.ndarray,
        sparse_from: np.ndarray,
    ) -> None:
        """Add this step to the counters: what the queries could read and what they do read."""
        if self.counters is None:
            return
        positions = token_positions(starts_in_batch, query_lens, ends)
        context = positions + 1
        sparse = positions >= np.repeat(sparse_from, query_lens)
        attended = context.astype(np.float64)
        attended[sparse] = mean_tokens_attended(self.layer_budgets, positions[sparse])
        # averaged over the layers of the group
        attended = attended + (context - attended) * self.dense_share
        self.counters.add(attended, context, num_decodes, dense=not sparse.any())


def dense_requests(
    starts_in_batch: np.ndarray, ends: np.ndarray, sparse_from: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch as the dense path reads it: sparse queries are requests of their own, of length 0.

    Args:
        starts_in_batch: [rows + 1] first token of every row; ends: [rows] its context, all
            queries included; sparse_from: [rows] position of its first sparse query.

    Returns:
        starts [requests + 1], context lengths [requests] and rows [requests].
    """
    lens = np.diff(starts_in_batch)
    dense = np.clip(sparse_from - (ends - lens), 0, lens)
    row = np.repeat(np.arange(len(lens)), 2)
    queries = np.stack([dense, lens - dense], axis=1).ravel()
    length = np.stack([ends - lens + dense, np.zeros_like(ends)], axis=1).ravel()
    there = queries > 0
    starts = np.concatenate([[0], queries[there].cumsum()])
    return starts, length[there], row[there]


def token_positions(
    starts_in_batch: np.ndarray, query_lens: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """[tokens] absolute position of every token of the batch, int64."""
    shift = np.repeat(ends - query_lens - starts_in_batch[:-1], query_lens)
    return shift + np.arange(starts_in_batch[-1])
