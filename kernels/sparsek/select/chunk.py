"""What the selections of one chunk of a prompt share.

The refresh blocks of a chunk select from contexts that differ by a few units at the end. The best
units of what competes at the chunk's start, its *base*, are found once; every block then looks at
them and at what left the window since.
"""

from __future__ import annotations

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
        first_item: [bases + 1] int32, where the items of every base begin, one base after another
            and ascending: each list is then made from the one before, one item at a time. For
            many bases and KV heads at once, of few items each.
    """

    item_base: torch.Tensor
    bounds: torch.Tensor
    longest: int
    first_item: torch.Tensor | None = None
