"""Select: which units every item and KV head keeps."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.dispatch import (
    check_shape,
    check_tensor,
    implementation,
    require,
)
from vllm_sparsek.kernels.common.validate import check_heads
from vllm_sparsek.kernels.select.chunk import ChunkBases
from vllm_sparsek.kernels.select.memo import SelectionMemo

POOLINGS = ("lse", "max", "mean")


def select(
    scores: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    budget: Budget,
    pooling: str,
    soft: bool,
    units_out: torch.Tensor,
    gates_out: torch.Tensor | None = None,
    impl: str = "auto",
    memo: SelectionMemo | None = None,
    bases: ChunkBases | None = None,
) -> None:
    """Exact top-k of the scores that compete, for all items and KV heads.

    Args:
        scores: [num_blocks, H, page] float32 token scores in the paged score cache, no NaN.
        block_table: [rows, max_blocks] int32, physical block of every logical block. With one
            column a row is one block, and its length no multiple of the unit.
        item_row: [items] int32, row of the block table; negative: an empty (padding) item.
        item_position: [items] int32, query position; its selection position follows from it.
        budget: the budget; its unit is 1 or, for pages, the page of the cache.
        pooling: how token scores become page scores (lse, max, mean).
        soft: also write the value weights of mode ``soft_v``.
        units_out: [items, H, K] int32, contiguous; written: ascending unit indices, padded
            with -1. K is at least what any item and head keeps (``budget.max_units``).
        gates_out: [items, H, K] float32 of the same strides, needed if ``soft``; written:
            clip(u - tau, 0, 1) of every kept unit, 0 in the padding.
        impl: auto, triton, cpu or reference.
        memo: keeps lists from step to step (Triton only); ``units_out`` and ``gates_out`` must
            then be the ones of the step before.
        bases: what the items of a chunk share (Triton only; not with ``soft`` or ``memo``).

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = scores.device
    check_tensor("scores", scores, 3, torch.float32, device)
    check_tensor("block_table", block_table, 2, torch.int32, device)
    check_tensor("item_row", item_row, 1, torch.int32, device)
    check_tensor("item_position", item_position, 1, torch.int32, device)
    check_tensor("units_out", units_out, 3, torch.int32, device)
    check_shape("item_position", item_position, tuple(item_row.shape))
    check_shape("units_out", units_out, (item_row.shape[0], scores.shape[1], units_out.shape[2]))
    check_heads(budget, scores.shape[1])
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
    if soft:
        if gates_out is None:
            raise ValueError("gates_out is needed when soft is set")
        check_tensor("gates_out", gates_out, 3, torch.float32, device)
        check_shape("gates_out", gates_out, tuple(units_out.shape))
        if gates_out.stride() != units_out.stride():
            raise ValueError(f"gates_out must have the strides of units_out, {units_out.stride()}")
    module = implementation("select", impl, device)
    gates_out = gates_out if soft else None
    if module.__name__.endswith("reference"):
        units, gates = module.select(
            scores, block_table, item_row, item_position, budget, pooling, soft,
            units_out.shape[2],
        )  # fmt: skip
        units_out.copy_(units)
        if gates_out is not None:
            gates_out.copy_(gates)
        return
    if not module.__name__.endswith("triton"):
        if memo is not None or bases is not None:
            raise ValueError("memo and bases are for the Triton implementation: leave them out")
        module.select(
            scores, block_table, item_row, item_position, budget, pooling, soft, units_out,
            gates_out,
        )  # fmt: skip
        return
    require(module.supported(budget.unit, scores.shape[2], block_table.shape[1]))
    if memo is not None:
        check_tensor("memo.stamps", memo.stamps, 3, torch.int32, device)
        check_shape("memo.stamps", memo.stamps, (*units_out.shape[:2], 4))
        check_tensor("memo.step", memo.step, 1, torch.int32, device)
    if bases is not None:
        if soft or memo is not None:
            raise ValueError("bases are for hard selection without memo: leave them out")
        check_tensor("bases.item_base", bases.item_base, 1, torch.int32, device)
        check_shape("bases.item_base", bases.item_base, tuple(item_row.shape))
        check_tensor("bases.bounds", bases.bounds, 2, torch.int32, device)
        check_shape("bases.bounds", bases.bounds, (bases.bounds.shape[0], 3))
    module.select(
        scores, block_table, item_row, item_position, budget, pooling, soft, units_out, gates_out,
        memo, bases,
    )  # fmt: skip
