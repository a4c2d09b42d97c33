"""What the selections of one chunk of a prompt share.

The refresh blocks of a chunk select from contexts that differ by a few units at the end. The best
units of what competes at the chunk's start, its *base*, are found once; every block then looks at
them and at what left the window since.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChunkBases:
    """Where items start from.

    Attributes:
        item_base: [items] int32, the base of every item.
        bounds: [bases, 3] int32: row of the block table, position of the first item (at its refresh
            block's start), and of the last one, which keeps most.
        longest: no first item's position is higher.
        span: no last item's position is further from that of its base's first.
    """

    item_base: torch.Tensor
    bounds: torch.Tensor
    longest: int
    span: int


@functools.lru_cache(maxsize=512)
def row_bases(
    batch: int,
    queries: int,
    keys: int,
    refresh: int,
    device: torch.device,
    low: int,
    high: int,
) -> ChunkBases:
    """Bases of items ``low``..``high`` of rows of equal length, all refresh blocks of all rows.

    A base costs a look at its context, an item a look at what the items before it in its base
    added: about the root of the items of a row share one.

    Args:
        batch, queries, keys: rows, and the last ``queries`` of ``keys`` positions of each.
        refresh: R.
    """
    blocks = (keys - 1) // refresh - (keys - queries) // refresh + 1
    per_base = math.isqrt(blocks)
    per_row = -(-blocks // per_base)
    item = torch.arange(low, high)
    base = item // blocks * per_row + item % blocks // per_base
    used = torch.arange(int(base[0]), int(base[-1]) + 1)
    first = used % per_row * per_base
    last = (first + per_base).clamp(max=blocks) - 1
    position = (torch.stack([first, last], dim=1) + (keys - queries) // refresh) * refresh
    bounds = torch.cat([(used // per_row)[:, None], position], dim=1)
    return ChunkBases(
        (base - base[0]).int().to(device), bounds.int().to(device), int(position[:, 0].max()),
        int((position[:, 1] - position[:, 0]).max()),
    )  # fmt: skip
