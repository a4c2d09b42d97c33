"""Gathering cached keys and values on the CPU."""

from __future__ import annotations

import math

import torch

from vllm_sparsek.kernels.common.budget import Budget


def kv_rows(kv_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The cache as a table with one row per (block, KV head, token).

    Args:
        kv_cache: [num_blocks, H, page, 2 * D], every (block, head) contiguous.

    Returns:
        rows [R, 2 * D] (a view) and the rows from one block to the next.
    """
    num_blocks, heads, page, width = kv_cache.shape
    block, head, token, last = kv_cache.stride()
    if (head, token, last) != (page * width, width, 1) or block % width:
        raise ValueError(
            f"kv_cache strides {kv_cache.stride()}: every (block, head) must be contiguous"
        )
    step = block // width
    total = (num_blocks - 1) * step + heads * page
    return kv_cache.as_strided((total, width), (width, 1)), step


def gather_context(
    kv_cache: torch.Tensor, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a whole context, copied page by page.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; blocks: [max_blocks] int32.
        length: tokens of the context.

    Returns:
        key, value: [H, length, D].
    """
    heads, page, width = kv_cache.shape[1:]
    rows, step = kv_rows(kv_cache)
    # rows of one (block, head) are contiguous: whole pages are copied at memory speed
    pages = rows.as_strided((rows.shape[0] // page, page * width), (page * width, 1))
    if step % page:
        raise ValueError("kv_cache blocks must lie a whole number of (head, page) rows apart")
    used = blocks[: -(-length // page)].long() * (step // page)
    index = used + torch.arange(heads)[:, None]
    found = pages.index_select(0, index.flatten()).view(heads, -1, width)[:, :length]
    key, value = found.split(width // 2, dim=-1)
    return key, value


def kept_positions(units: torch.Tensor, position: int, last: int, budget: Budget) -> torch.Tensor:
    """Positions of the sinks and the kept units that queries ``position``..``last`` read.

    Args:
        units: [H, K] kept units padded with -1.
        position, last: query positions inside one refresh block.
        budget: the budget.

    Returns:
        [H, sinks + kept] int64.
    """
    heads = units.shape[0]
    first = budget.first_unit()
    start = budget.selection_position(position)
    kept = max(0, min(budget.units_kept(start), budget.end_unit(start) - first))
    chosen = units[:, :kept].long()
    if budget.unit > 1:
        chosen = (chosen[..., None] * budget.unit + torch.arange(budget.unit)).flatten(1)
    sinks = torch.arange(min(first * budget.unit, last + 1)).expand(heads, -1)
    return torch.cat([sinks, chosen], dim=1)


def kept_gates(gates: torch.Tensor, kept: int, budget: Budget) -> torch.Tensor:
    """Value weights of the ``kept`` positions of ``kept_positions``: 1 for the sinks.

    Args:
        gates: [H, K] weights of the kept units; kept: sinks + kept tokens; budget: the budget.

    Returns:
        [H, kept] float32.
    """
    sinks = min(budget.first_unit() * budget.unit, kept)
    chosen = gates.repeat_interleave(budget.unit, dim=1)[:, : kept - sinks]
    return torch.cat([torch.ones(gates.shape[0], sinks), chosen], dim=1)


def window_positions(heads: int, position: int, last: int, budget: Budget) -> torch.Tensor:
    """Positions of the window of queries ``position``..``last``: [H, window] int64."""
    end = budget.end_unit(budget.selection_position(position)) * budget.unit
    return torch.arange(min(end, last + 1), last + 1).expand(heads, -1)


def token_table(cache: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """A cache of any strides as a table that has a row for every token of every KV head.

    Args:
        cache: [num_blocks, H, page, width], last stride 1.

    Returns:
        rows [R, width] (a view, whose rows may overlap), and the rows from one block, one head
        and one token to the next.
    """
    sizes = cache.shape[:3]
    strides = [
        stride if size > 1 else 0 for size, stride in zip(sizes, cache.stride(), strict=False)
    ]
    unit = math.gcd(*strides) or cache.shape[3]
    block, head, token = (stride // unit for stride in strides)
    total = 1 + (sizes[0] - 1) * block + (sizes[1] - 1) * head + (sizes[2] - 1) * token
    return cache.as_strided((total, cache.shape[3]), (unit, 1)), (block, head, token)


def cache_rows(
    cache: torch.Tensor, blocks: torch.Tensor, position: torch.Tensor, first_head: int = 0
) -> torch.Tensor:
    """Rows of ``token_table`` of one request's tokens.

    Args:
        cache: [num_blocks, H, page, width]; blocks: [max_blocks] int32.
        position: [heads, m] token positions of the KV heads from ``first_head`` on.

    Returns:
        [heads, m] int64.
    """
    page = cache.shape[2]
    _, (block, head, token) = token_table(cache)
    index = blocks[position // page].long() * block + position % page * token
    return index + (first_head + torch.arange(position.shape[0]))[:, None] * head


def take_rows(cache: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Tokens of a cache: rows [H, m] of ``token_table(cache)`` -> [H, m, width] of ``dtype``."""
    table, _ = token_table(cache)
    found = table.index_select(0, rows.flatten()).view(*rows.shape, cache.shape[3])
    return found.to(dtype)


def weigh_values(value: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    """Values [H, m, D] with the first g weighed by gates [H, g]; without gates as they are."""
    if gates is None:
        return value
    weighted = value[:, : gates.shape[1]].float() * gates[..., None]
    return torch.cat([weighted.to(value.dtype), value[:, gates.shape[1] :]], dim=1)


def scale_numbers(kv_scales: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[float, float]:
    """k_scale and v_scale of an fp8 cache as numbers; 1 of any other."""
    return (1.0, 1.0) if kv_scales is None else (kv_scales[0].item(), kv_scales[1].item())
