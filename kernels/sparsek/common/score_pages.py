"""How a page of the score cache is laid out.

The score cache is a sibling of the KV cache with the same block ids. One block holds, for
every KV head, either the fp32 scores of its tokens and, for scorers that need one, an *anchor*:
the running sum of the unit keys of all pages up to and including this one. Or, for query-aware
selection, *bounds*: the smallest and largest value of every channel of the keys of every unit.
Bounds are values of keys as the cache holds them, so the cache's dtype holds them exactly.
"""

from __future__ import annotations

import torch


def floats_per_token(num_kv_heads: int, page: int, anchor_dim: int) -> int:
    """fp32 numbers per token that make room for one page's scores and anchors."""
    return -(-num_kv_heads * (page + anchor_dim) // page)


def split_score_cache(
    cache: torch.Tensor, num_kv_heads: int, anchor_dim: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of one layer's score cache.

    Args:
        cache: [num_blocks, 1, page, floats_per_token] float32; one block is contiguous,
            blocks may lie any stride apart.
        num_kv_heads: KV heads H of this rank.
        anchor_dim: D if the scorer keeps anchors, else 0.

    Returns:
        scores [num_blocks, H, page] and anchors [num_blocks, H, D] or None; both are views.
    """
    num_blocks, _, page, floats = cache.shape
    if cache.stride()[2:] != (floats, 1):
        raise ValueError(f"score cache blocks must be contiguous, got strides {cache.stride()}")
    block_stride = cache.stride(0)
    scores = cache.as_strided((num_blocks, num_kv_heads, page), (block_stride, page, 1))
    if anchor_dim == 0:
        return scores, None
    anchors = cache.as_strided(
        (num_blocks, num_kv_heads, anchor_dim),
        (block_stride, anchor_dim, 1),
        cache.storage_offset() + num_kv_heads * page,
    )
    return scores, anchors


def bounds_per_token(num_kv_heads: int, page: int, unit: int, head_dim: int) -> int:
    """Numbers per token that make room for the bounds of one page's units."""
    return -(-num_kv_heads * (page // unit) * 2 * head_dim // page)


def split_bounds_cache(
    cache: torch.Tensor, num_kv_heads: int, unit: int, head_dim: int
) -> torch.Tensor:
    """The bounds of one layer as a view of its cache.

    Args:
        cache: [num_blocks, 1, page, bounds_per_token] of the keys' dtype; one block is
            contiguous, blocks may lie any stride apart.
        num_kv_heads: KV heads H of this rank; unit: tokens per bound; head_dim: D.

    Returns:
        [num_blocks, H, page // unit, 2, D]: minimum and maximum of every unit's keys.
    """
    num_blocks, _, page, width = cache.shape
    if cache.stride()[2:] != (width, 1):
        raise ValueError(f"score cache blocks must be contiguous, got strides {cache.stride()}")
    units = page // unit
    return cache.as_strided(
        (num_blocks, num_kv_heads, units, 2, head_dim),
        (cache.stride(0), units * 2 * head_dim, 2 * head_dim, head_dim, 1),
    )
