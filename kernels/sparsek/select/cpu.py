"""Select on the CPU, vectorised over KV heads. Same meaning as the reference."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.projection import sparsek_gates
from vllm_sparsek.kernels.select.reference import unit_scores


def top_units(z: torch.Tensor, keep: int) -> torch.Tensor:
    """Ascending indices of the ``keep`` highest of each row; of equals the earlier stay.

    Args:
        z: [H, n] with n >= keep.
        keep: how many.

    Returns:
        [H, keep] int64.
    """
    if keep == z.shape[1]:
        return torch.arange(keep).expand(z.shape[0], -1)
    # topk does not say which of equal values it takes: it only serves to find the threshold
    threshold = z.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = z > threshold, z == threshold
    room = keep - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(z.shape[0], keep)


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
) -> None:
    """See ``reference.select``; results go to ``units_out`` and ``gates_out``."""
    page = scores.shape[2]
    units_out.fill_(-1)
    if gates_out is not None:
        gates_out.zero_()
    pooled: dict[int, torch.Tensor] = {}
    rows, positions = item_row.tolist(), item_position.tolist()
    longest: dict[int, int] = {}
    for row, position in zip(rows, positions, strict=True):
        end = budget.end_unit(budget.selection_position(position))
        longest[row] = max(longest.get(row, 0), end)
    for item, (row, position) in enumerate(zip(rows, positions, strict=True)):
        if row < 0:
            continue
        start = budget.selection_position(position)
        first, end = budget.first_unit(), budget.end_unit(start)
        if end <= first:
            continue
        if row not in pooled:
            # all items of a row read prefixes of the same unit scores
            blocks = block_table[row, : -(-longest[row] * budget.unit // page)].long()
            tokens = scores[blocks].transpose(0, 1).flatten(1)
            pooled[row] = unit_scores(tokens, budget.unit, pooling)
        for part, own in budget.by_heads(scores.shape[1]):
            z, keep = pooled[row][part, first:end], min(own.units_kept(start), end - first)
            order = top_units(z, keep)
            units_out[item, part, :keep] = (order + first).int()
            if gates_out is not None:
                gate = sparsek_gates(z, keep).masked_fill(z == float("-inf"), 1.0)
                gates_out[item, part, :keep] = gate.gather(1, order).float()
