"""Plain causal attention on the CPU, over the cache layout that the sparse path reads.

vLLM's own CPU kernel packs keys for its instruction set, in which single tokens cannot be
gathered; torch's attention kernel reads ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparsek.kernels.common.gather import gather_context, kv_rows

# queries per attention call when part of the context is already cached: bounds the mask
CHUNK = 512


@dataclass
class CpuDenseMetadata:
    """Rows to attend: (row, index of the first query, queries, context length)."""

    rows: list[tuple[int, int, int, int]]
    block_table: torch.Tensor


class CpuDenseBuilder:
    """Builds CpuDenseMetadata."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        pass

    def build(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False
    ) -> CpuDenseMetadata:
        """Rows with a context length of 0 are left out."""
        starts = common.query_start_loc_cpu.tolist()
        assert common.seq_lens_cpu_upper_bound is not None
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        rows = [
            (row, starts[row], starts[row + 1] - starts[row], length)
            for row, length in enumerate(lengths)
            if length > 0 and starts[row + 1] > starts[row]
        ]
        return CpuDenseMetadata(rows, common.block_table_tensor)


class CpuDenseImpl:
    """Dense attention with the call signature of vLLM's implementations."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_: Any, **__: Any
    ) -> None:
        self.scale = scale
        self.num_kv_heads = num_kv_heads
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
        heads = kv_cache.shape[1]
        for row, first, count, length in attn_metadata.rows:
            k, v = gather_context(kv_cache, attn_metadata.block_table[row], length)
            k, v = k[:, None], v[:, None]
            q = query[first : first + count].view(count, heads, -1, self.head_size)
            q = q.permute(1, 2, 0, 3)  # [H, G, T, D]
            group = q.shape[1]
            if count == 1:
                o = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=self.scale)
                output[first] = o.reshape(-1, self.head_size)
                continue
            k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
            if count == length:
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
                output[first : first + count] = o.permute(2, 0, 1, 3).flatten(1, 2)
                continue
            for low in range(0, count, CHUNK):
                high = min(low + CHUNK, count)
                seen = length - count + high
                causal = torch.arange(seen) <= torch.arange(seen - (high - low), seen)[:, None]
                o = F.scaled_dot_product_attention(
                    q[:, :, low:high], k[:, :, :seen], v[:, :, :seen],
                    attn_mask=causal, scale=self.scale,
                )  # fmt: skip
                output[first + low : first + high] = o.permute(2, 0, 1, 3).flatten(1, 2)
        return output
