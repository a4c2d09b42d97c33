"""Gathering cached keys and values on the CPU."""

from __future__ import annotations

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


def gather_visible(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    first_position: int,
    last_position: int,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values that queries first..last of one refresh block read.

    Args:
        kv_cache: [num_blocks, H, page, 2 * D]; blocks: [max_blocks] int32.
        first_position, last_position: query positions inside one refresh block.
        units: [H, K] kept units padded with -1; gates: [H, K] value weights or None.
        budget: the budget.

    Returns:
        key [H, m, D], value [H, m, D] (already weighted by the gates) and position [H, m].
    """
    heads, page, width = kv_cache.shape[1:]
    start = budget.selection_position(first_position)
    first, end = budget.first_unit(), budget.end_unit(start)
    kept = max(0, min(budget.units_kept(start), end - first))
    sinks = torch.arange(min(first * budget.unit, last_position + 1)).expand(heads, -1)
    chosen = units[:, :kept].long()
    if budget.unit > 1:
        chosen = (chosen[..., None] * budget.unit + torch.arange(budget.unit)).flatten(1)
    window_start = min(end * budget.unit, last_position + 1)
    window = torch.arange(window_start, last_position + 1).expand(heads, -1)
    position = torch.cat([sinks, chosen, window], dim=1)  # [H, m]
    rows, step = kv_rows(kv_cache)
    index = blocks[position // page].long() * step + position % page
    index += torch.arange(heads)[:, None] * page
    found = rows.index_select(0, index.flatten()).view(heads, -1, width)
    key, value = found.split(width // 2, dim=-1)
    if gates is not None:
        gate = gates[:, :kept].repeat_interleave(budget.unit, dim=1)
        weight = torch.ones(heads, position.shape[1])
        weight[:, sinks.shape[1] : sinks.shape[1] + gate.shape[1]] = gate
        value = (value.float() * weight[..., None]).to(value.dtype)
    return key, value, position
