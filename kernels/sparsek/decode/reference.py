"""Specification of attention over a selection. Plain torch, float64-capable, for reading.

Decode and prefill share this meaning; prefill's reference calls it item by item.
"""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget


def visible_positions(position: int, kept_units: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Positions the query at ``position`` reads, given the units its selection keeps.

    Args:
        position: absolute query position.
        kept_units: [kept] unit indices without padding.
        budget: the budget.

    Returns:
        [m] int64: the sinks, the kept units and the window, ascending when ``kept_units`` is.
    """
    first = budget.first_unit()
    end = budget.end_unit(budget.selection_position(position))
    inside = torch.arange(budget.unit)
    sinks = torch.arange(min(first * budget.unit, position + 1))
    kept = (kept_units.long()[:, None] * budget.unit + inside).flatten()
    window = torch.arange(min(end * budget.unit, position + 1), position + 1)
    return torch.cat([sinks, kept, window])


def attend_one(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    blocks: torch.Tensor,
    position: int,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    scale: float,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Output of one query token.

    Args:
        query: [Hq, D].
        key_cache, value_cache: [num_blocks, H, page, D].
        blocks: [max_blocks], the request's row of the block table.
        position: absolute query position.
        units: [H, K] kept units padded with -1; gates: [H, K] or None.
        budget, scale: the budget and the softmax scale.
        kv_scales: k_scale and v_scale of an fp8 cache: what its numbers are multiplied by.

    Returns:
        [Hq, D] in the query's dtype.
    """
    heads, page = key_cache.shape[1:3]
    group = query.shape[0] // heads
    out = torch.empty_like(query)
    for head in range(heads):
        kept = units[head][units[head] >= 0]
        visible = visible_positions(position, kept, budget)
        at = blocks[visible // page].long(), head, visible % page
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        key, value = key_cache[at].to(exact), value_cache[at].to(exact)  # [m, D]
        if kv_scales is not None:
            key, value = key * kv_scales[0], value * kv_scales[1]
        q = query[head * group : (head + 1) * group].to(key.dtype)
        weights = torch.softmax(q @ key.T * scale, dim=-1)  # [G, m]
        if gates is not None:
            m = torch.ones(visible.numel(), dtype=weights.dtype)
            sinks = min(budget.first_unit() * budget.unit, position + 1)
            gate = gates[head][units[head] >= 0].to(m.dtype).repeat_interleave(budget.unit)
            m[sinks : sinks + gate.numel()] = gate
            weights = weights * m
        out[head * group : (head + 1) * group] = (weights @ value).to(query.dtype)
    return out


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    item_row: torch.Tensor,
    item_position: torch.Tensor,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    scale: float,
    out: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """One query per item: ``out[i]`` is written for every item with ``item_row[i] >= 0``.

    Args:
        query: [items, Hq, D]; kv_cache: [num_blocks, H, page, 2 * D].
        block_table: [rows, max_blocks] int32.
        item_row: [items] int32 (negative: skip, ``out[i]`` keeps its value).
        item_position: [items] int32, absolute position of the query.
        units: [items, H, K] int32; gates: [items, H, K] float32 or None.
        budget, scale: the budget and the softmax scale.
        out: [items, Hq, D], written in place.
        kv_scales: see ``attend_one``.
    """
    for item, (row, position) in enumerate(
        zip(item_row.tolist(), item_position.tolist(), strict=True)
    ):
        if row < 0:
            continue
        out[item] = attend_one(
            query[item], *kv_cache.chunk(2, dim=-1), block_table[row], position, units[item],
            None if gates is None else gates[item], budget, scale, kv_scales,
        )  # fmt: skip
