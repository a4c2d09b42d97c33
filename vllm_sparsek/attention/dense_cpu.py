"""Plain causal attention on the CPU: vLLM's own kernel, over the cache layout we read sparsely.

vLLM's CPU cache packs keys for an instruction set, in which single tokens cannot be gathered.
Ours does not; a row's context is packed into scratch before vLLM's kernel reads it, which costs
little beside attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparsek import compat
from vllm_sparsek.kernels.common.gather import gather_context, kv_rows

# tokens per block of the scratch cache: what every instruction set of the kernel takes
SCRATCH_PAGE = 32


@dataclass
class CpuDenseRow:
    """One row to attend.

    Attributes:
        row: row of the block table; first: index of its first query; queries, length: numbers
            of queries and of context tokens.
        query_start_loc: [2] int32; seq_lens: [1] int32; schedule: the kernel's own plan.
    """

    row: int
    first: int
    queries: int
    length: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    schedule: torch.Tensor


@dataclass
class CpuDenseMetadata:
    """The rows of one step, the block table they read, and the kernel's instruction set."""

    rows: list[CpuDenseRow]
    block_table: torch.Tensor
    isa: str


class CpuDenseBuilder:
    """Builds CpuDenseMetadata."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        num_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        assert num_heads is not None
        self.num_heads = num_heads
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.head_size = kv_cache_spec.head_size
        self.dtype = kv_cache_spec.dtype
        self.isa = compat.cpu_kernel_isa(self.dtype, SCRATCH_PAGE, self.head_size)

    def build(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
    ) -> CpuDenseMetadata:
        """Rows with a context length of 0 are left out."""
        starts = common.query_start_loc_cpu.tolist()
        assert common.seq_lens_cpu_upper_bound is not None
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        rows = [
            self._row(row, starts[row], starts[row + 1] - starts[row], length)
            for row, length in enumerate(lengths)
            if length > 0 and starts[row + 1] > starts[row]
        ]
        return CpuDenseMetadata(rows, common.block_table_tensor, self.isa)

    def _row(self, row: int, first: int, queries: int, length: int) -> CpuDenseRow:
        query_start_loc = torch.tensor([0, queries], dtype=torch.int32)
        seq_lens = torch.tensor([length], dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return CpuDenseRow(row, first, queries, length, query_start_loc, seq_lens, schedule)


class CpuDenseImpl:
    """Dense attention with the call signature of vLLM's implementations."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_: Any, **__: Any
    ) -> None:
        self.scale = scale
        self.head_size = head_size

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write key, value [T, H, D] to the slots of ``slot_mapping`` [<= T]; -1 is padding."""
        slots = slot_mapping
        fresh = torch.cat([key[: slots.numel()], value[: slots.numel()]], dim=-1)
        if slots.numel() and bool((slots < 0).any()):
            fresh, slots = fresh[slots >= 0], slots[slots >= 0]
        rows, step = kv_rows(kv_cache)
        heads, page, width = kv_cache.shape[1:]
        index = (slots // page * step + slots % page)[:, None] + torch.arange(heads) * page
        rows.index_copy_(0, index.flatten(), fresh.to(rows.dtype).view(-1, width))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CpuDenseMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """query [T, Hq, D], kv_cache [num_blocks, H, page, 2 * D] -> output [T, Hq, D]."""
        m = attn_metadata
        for row in m.rows:
            cached_key, cached_value = gather_context(kv_cache, m.block_table[row.row], row.length)
            blocks = -(-row.length // SCRATCH_PAGE)
            scratch = kv_cache.new_empty(
                (blocks, kv_cache.shape[1], 2 * SCRATCH_PAGE, self.head_size)
            )
            # the kernel multiplies what lies behind the context by zero: it must be a number
            scratch[-1].zero_()
            packed_key, packed_value = scratch.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(
                cached_key.transpose(0, 1), cached_value.transpose(0, 1), packed_key,
                packed_value, torch.arange(row.length), m.isa,
            )  # fmt: skip
            part = slice(row.first, row.first + row.queries)
            ops.cpu_attention_with_kv_cache(
                query=query[part],
                key_cache=packed_key,
                value_cache=packed_value,
                output=output[part],
                query_start_loc=row.query_start_loc,
                seq_lens=row.seq_lens,
                scale=self.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=torch.arange(blocks, dtype=torch.int32)[None],
                softcap=0,
                scheduler_metadata=row.schedule,
                s_aux=None,
            )
        return output
