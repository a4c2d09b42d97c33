"""Keeping a selection from one decode step to the next.

Scores never change and a selection is made once every R positions. In between, the list of the
step before still stands; at the next one it already holds all that can still be kept of the units
it was chosen from. Which is the case is decided on the device, so that one captured CUDA graph
serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectionMemo:
    """What identifies the selections that ``units_out`` holds from the step before.

    An item's list is known if, one step ago, the same item had the same first block and the same
    last block that competed then. It stands while the selection position is the same. At a later
    one it is merged with the units that left the window since; gates, and lists that grow, are
    made anew. A list that one step did not use is never taken up again: its blocks may have been
    freed and filled anew since. Two requests that hold the same last block one step apart share
    the whole prefix, and so the selection.

    Under a memo, items with a negative row are skipped without writing their lists.

    Attributes:
        stamps: [items, H, 4] int32, contiguous: selection position, first block, last block,
            step; anything negative to begin with.
        step: [1] int32 on the device, one more at every step.
    """

    stamps: torch.Tensor
    step: torch.Tensor
