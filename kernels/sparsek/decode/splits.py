"""How decode cuts lists into splits, and the workspace that takes. Needs no Triton."""

from __future__ import annotations

# list tokens per program; the split must not depend on the batch, or outputs would
SPLIT_TOKENS = 256
MAX_SPLITS = 64  # bounds the workspace of budgets that grow with the context


def split_sizes(max_tokens: int) -> tuple[int, int]:
    """(splits, tokens per split, a power of 2) for lists of up to ``max_tokens`` tokens."""
    tokens = SPLIT_TOKENS
    while tokens * MAX_SPLITS < max_tokens:
        tokens *= 2
    return -(-max_tokens // tokens), tokens


def workspace_shapes(
    items: int, query_heads: int, head_dim: int, max_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two float32 tensors that ``decode`` takes as its workspace.

    Args:
        items: items of the call.
        query_heads, head_dim: Hq and D.
        max_tokens: as given to ``decode``, usually ``budget.max_tokens_attended(...)``.

    Returns:
        acc [items, Hq, splits, D] and stats [items, Hq, splits, 2].
    """
    splits, _ = split_sizes(max_tokens)
    return (items, query_heads, splits, head_dim), (items, query_heads, splits, 2)
