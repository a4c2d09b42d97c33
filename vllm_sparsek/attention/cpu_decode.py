"""Decode on the CPU, where Python runs every step: select once every R positions.

A static selection is a function of the tokens before it, so it is kept from step to step under
the physical blocks it was made from. An entry that one step did not use is dropped: blocks that
were freed and filled again in between can never be taken for their earlier content. A selection
by the query is made anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.gather import (
    cache_rows,
    kept_gates,
    kept_positions,
    window_positions,
)
from vllm_sparsek.kernels.decode.cpu import attend_rows

# (query [items, Hq, D], block_table, item_row, item_position, budget, units_out, gates_out)
Select = Callable[
    [
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Budget, torch.Tensor,
        torch.Tensor | None,
    ],
    None,
]  # fmt: skip


# of every part of ``Budget.by_heads``: cache rows [heads, m] and gates [heads, m] or None
Kept = list[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class CpuDecodeRow:
    """One sparse decode row.

    Attributes:
        row: row of the batch and the block table; position: query position.
        key: (selection position, physical blocks the selection reads).
    """

    row: int
    position: int
    key: tuple[int, bytes]


@dataclass
class CpuDecoder:
    """One layer's decode.

    Attributes:
        kv_heads: H; budget: the budget; soft: see ``select``; scale: softmax scale.
        query_aware: every step selects by its own query.
    """

    kv_heads: int
    budget: Budget
    soft: bool
    scale: float
    query_aware: bool
    _kept: dict[tuple[int, bytes], Kept] = field(default_factory=dict)
    _parts: list[tuple[slice, Budget]] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = self.budget.by_heads(self.kv_heads)

    def forward(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        select: Select,
        block_table: torch.Tensor,
        rows: list[CpuDecodeRow],
        windows: dict[int, torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """Attend the sparse decode rows of one step.

        Args:
            query, output: [T, Hq, D], row r is token r; kv_cache: [num_blocks, H, page, 2 * D];
            select: writes the units of items; block_table: [rows, max_blocks] int32.
            rows: the rows; windows: window rows by row, filled by the first layer of a step.
        """
        used = {}
        group = query.shape[1] // self.kv_heads
        for row in rows:
            found = None if self.query_aware else self._kept.get(row.key)
            if found is None:
                found = self._select(query, kv_cache, select, block_table, row)
            if not self.query_aware:
                used[row.key] = found
            window = windows.get(row.row)
            if window is None:
                position = window_positions(self.kv_heads, row.position, row.position, self.budget)
                window = cache_rows(kv_cache, block_table[row.row], position)
                windows[row.row] = window
            for (part, _), (kept, gates) in zip(self._parts, found, strict=True):
                index = torch.cat([kept, window[part]], dim=1)
                mine = slice(part.start * group, part.stop * group)
                output[row.row, mine] = attend_rows(
                    query[row.row, mine], kv_cache, index, gates, self.scale
                )
        self._kept = used

    def _select(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        select: Select,
        block_table: torch.Tensor,
        row: CpuDecodeRow,
    ) -> Kept:
        start = self.budget.selection_position(row.position)
        shape = (1, self.kv_heads, self.budget.units_kept(start))
        units = torch.empty(shape, dtype=torch.int32)
        gates = torch.empty(shape, dtype=torch.float32) if self.soft else None
        select(
            query[row.row : row.row + 1], block_table, torch.tensor([row.row], dtype=torch.int32),
            torch.tensor([row.position], dtype=torch.int32), self.budget, units, gates,
        )  # fmt: skip
        found: Kept = []
        for part, own in self._parts:
            kept = kept_positions(units[0, part], row.position, row.position, own)
            rows = cache_rows(kv_cache, block_table[row.row], kept, part.start)
            weights = None if gates is None else kept_gates(gates[0, part], kept.shape[1], own)
            found.append((rows, weights))
        return found
