"""Kernels of sparse prefill compile before vLLM serves, not while the first long prompt waits.

Profiling runs have no metadata, and captured graphs hold decode alone. So the layer's own selection
and attention are run before, on its own caches, for items as few as they can be: Triton compiles
for types, alignments and tile sizes, and of a prompt only its length and that of its chunk change
a tile. Left to the first request: what prefill runs where prompts are read densely (generated
tokens of a preempted request), and pages that are pooled for hundreds of rows at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_sparsek import compat
from vllm_sparsek.attention.metadata import LEAST_PER_BASE, PrefillItems
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select.chunk import ChunkBases

if TYPE_CHECKING:
    from vllm_sparsek.attention.impl import SparseKImpl

logger = init_logger(__name__)


def register(impl: SparseKImpl, layer: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Have a layer's kernels of sparse prefill compiled at startup, if prompts will need them.

    Args:
        impl, layer: the implementation and its attention layer; dtype: of queries.
        device: of the layer; on a CPU nothing compiles.
    """
    if device.type != "cuda" or impl.config.query_aware or not impl.config.sparse_prefill:
        return
    budget = impl.budget(impl.vllm_config.cache_config.block_size)
    warmup = PrefillWarmup(
        budget, impl.num_heads, impl.num_kv_heads, impl.head_size, impl.kv_cache_dtype, dtype, impl,
        layer,
    )  # fmt: skip
    compat.at_startup(warmup)


@dataclass(frozen=True)
class PrefillWarmup:
    """Runs one layer's sparse prefill; equal for layers whose kernels are the same.

    Attributes:
        budget, num_heads, num_kv_heads, head_size, kv_cache_dtype: of the layer; dtype: of queries.
        impl, layer: the implementation and its attention layer.
    """

    budget: Budget
    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_cache_dtype: str
    dtype: torch.dtype
    impl: SparseKImpl = field(compare=False, repr=False)
    layer: Any = field(compare=False, repr=False)

    def __call__(self) -> None:
        """Run it; what fails is logged, and left to the first request."""
        try:
            self.run()
        except Exception as error:
            logger.warning(
                "sparsek: kernels of sparse prefill were not compiled ahead, the first long prompt "
                "will wait for them: %s: %s", type(error).__name__, error,
            )  # fmt: skip

    @torch.inference_mode()
    def run(self) -> None:
        """One query an item, all of block 0; the caches are read and nothing of them is written.

        The memory it takes is that of a few items.
        """
        impl = self.impl
        cache = compat.cache_numbers(self.layer.kv_cache)
        device, page, limit = cache.device, cache.shape[2], impl.max_model_len
        columns = compat.block_table_width(limit, page)
        tables = [torch.zeros((1, columns), dtype=torch.int32, device=device)]
        if self.budget.unit > 1:
            # beside another row, four items are too few to walk the scores of pages once for all
            tables.append(tables[0].repeat(2, 1))
        shape = (1, self.num_heads, self.head_size)
        query = torch.zeros(shape, dtype=self.dtype, device=device)
        out = torch.empty_like(query)
        kv_scales = (self.layer._k_scale, self.layer._v_scale) if impl.fp8 else None
        first = impl.config.first_sparse_position(page, limit)
        if first == limit:
            return
        steps = [make_items(first, None, device)]
        if impl.config.mode == "hard":
            tokens = impl.vllm_config.scheduler_config.max_num_batched_tokens
            found = bases_of(self.budget, first, limit, tokens)
            steps += [make_items(longest, span, device) for longest, span in found]
        for table in tables:
            for items in steps:
                impl._prefill(query, cache, kv_scales, table, items, out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def make_items(position: int, span: int | None, device: torch.device) -> PrefillItems:
    """Items of one query each at ``position``: with a base as many as share one, else one.

    Args:
        span: of the base, see ``ChunkBases``; None for an item that selects by itself.
    """
    count = 1 if span is None else LEAST_PER_BASE
    zeros = torch.zeros(count, dtype=torch.int32, device=device)
    bases = None
    if span is not None:
        bounds = torch.tensor([[0, position, position + span]], dtype=torch.int32, device=device)
        bases = ChunkBases(zeros, bounds, longest=position, span=span)
    return PrefillItems(zeros, zeros + position, zeros, zeros + 1, bases)


def bases_of(budget: Budget, first: int, limit: int, tokens: int) -> list[tuple[int, int]]:
    """(longest, span) of bases so that every tile size which selection chooses is chosen once.

    Sizes are powers of two that follow from how many units compete for a base, for its last item,
    and for an item beside the base's list.

    Args:
        budget: of the layer; first: the first sparse position; limit: of contexts.
        tokens: of the largest batch.
    """
    refresh, width = budget.refresh, budget.max_units(limit)
    most = max(LEAST_PER_BASE, math.isqrt(tokens // refresh + 2))
    spans = range((LEAST_PER_BASE - 1) * refresh, most * refresh, refresh)
    # the shortest of those alike
    by_size = {_log2(width + -(-span // budget.unit)): span for span in reversed(spans)}
    found = {}
    for size, span in by_size.items():
        for longest in range(budget.selection_position(first), limit, refresh):
            of_base, of_item = (budget.units_competing(at) for at in (longest, longest + span))
            # pages of sinks are scored, too, where all that compete are pooled
            pooled = budget.first_unit() + of_item
            found[size, _log2(of_base), _log2(of_item), _log2(pooled)] = longest, span
    return list(found.values())


def _log2(size: int) -> int:
    """Of the least power of two that is not below ``size``."""
    return (max(size, 1) - 1).bit_length()
