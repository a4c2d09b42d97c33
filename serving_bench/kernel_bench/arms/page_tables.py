"""Selections as page tables: every (item, KV head) becomes a request of its own.

The cache [blocks, H, page, 2 * D] is seen as blocks * H pages of one head each, or, for units of
one token, as blocks * H * page pages of one token. The table lists sinks, kept units and window in
this order, so that a causal mask aligned to the bottom right is the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs, Items


@dataclass(frozen=True)
class PageTables:
    """table: [items, H, N] int32 page ids; lengths: [items] int32 tokens; most: of any item."""

    table: torch.Tensor
    lengths: torch.Tensor
    most: int


def one_head_pages(inputs: Inputs, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, unit, 1, D] of the cache, views."""
    case = inputs.case
    if unit not in (1, case.page):
        raise ValueError(f"units of {unit} tokens are no pages of a cache of {case.page}")
    key, value = inputs.kv_cache.view(-1, unit, 2 * case.head_dim).split(case.head_dim, dim=-1)
    return key.unsqueeze(2), value.unsqueeze(2)


def page_tables(inputs: Inputs, budget: Budget, items: Items, units: torch.Tensor) -> PageTables:
    """Tables of the pages that every (item, KV head) reads up to the item's last query.

    Args:
        inputs, budget, items: the items of one input set.
        units: [items, H, K] int32, what the selection keeps.
    """
    case, unit, first = inputs.case, budget.unit, budget.first_unit()
    start = items.position // budget.refresh * budget.refresh
    last = items.position + items.length - 1
    end = ((start - budget.window + 1) // unit).clamp(min=first)
    kept = (end - first).clamp(max=min(budget.units_kept(0), units.shape[2]))
    sinks = (last + 1).clamp(max=first * unit)
    lengths = sinks + kept * unit + (last + 1 - end * unit).clamp(min=0)
    most = int(lengths.max())

    place = torch.arange(-(-most // unit), device=units.device)[None]  # [1, N]
    slot = (place - first).clamp(0, units.shape[2] - 1).expand(units.shape[0], -1)
    chosen = units.gather(2, slot[:, None].expand(-1, units.shape[1], -1))  # [items, H, N]
    after = end[:, None] + place - first - kept[:, None]
    beyond = place >= first + kept[:, None]
    index = torch.where(beyond[:, None], after[:, None].int(), chosen)
    index = torch.where(place[:, None] < first, place[:, None].int(), index)
    # places beyond the list are not read, but must be ids of pages
    index = torch.minimum(index, (last // unit)[:, None, None]).clamp_(min=0)
    row, head = items.row[:, None, None], torch.arange(case.kv_heads, device=units.device)
    per_page = case.page // unit
    block = inputs.table[row, index // per_page]
    table = (block * case.kv_heads + head[:, None].int()) * per_page + index % per_page
    return PageTables(table.int(), lengths.int(), most)
