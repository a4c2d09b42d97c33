"""Keeping a selection from one decode step to the next.

Scores never change and a selection is made once every R positions: in between, the list of the
step before still stands. Whether it does is decided on the device, so that a captured CUDA
graph serves both cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectionMemo:
    """What identifies the selections that ``units_out`` holds from the step before.

    An item's list stands if, one step ago, the same item had the same selection position,
    first block and last competing block. A list that one step did not use is never taken up
    again: its blocks may have been freed and filled anew since. Two requests that hold the same
    last block one step apart share the whole prefix, and so the selection.

    Under a memo, items with a negative row are skipped without writing their lists.

    Attributes:
        stamps: [items, H, 4] int32, contiguous: selection position, first block, last block,
            step; anything negative to begin with.
        step: [1] int32 on the device, one more at every step.
    """

    stamps: torch.Tensor
    step: torch.Tensor
