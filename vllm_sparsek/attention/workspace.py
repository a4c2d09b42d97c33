"""Memory of decode, allocated once: scratch that all layers share, and each layer's lists."""

from __future__ import annotations

import functools

import torch

from vllm_sparsek.attention.side_stream import SideStream
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode.api import workspace_shapes

# of all layers together; decode batches of more rows select anew at every step
KEPT_BYTES = 1 << 30


class DecodeWorkspace:
    """Selection lists and partial results for up to ``rows`` decode rows.

    Attributes:
        units: [rows, H, K] int32; gates: [rows, H, K] float32 or None.
        unit_scores: [rows, H, units of the longest context] float32 or None.
        partials: the two float32 tensors decode takes.
        max_tokens: upper bound of the tokens one row reads.
        side: a stream for dense attention beside it, on CUDA.
    """

    def __init__(
        self,
        rows: int,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        budget: Budget,
        max_model_len: int,
        soft: bool,
        query_aware: bool,
        device: torch.device,
    ) -> None:
        shape = (rows, kv_heads, budget.max_units(max_model_len))
        self.max_tokens = budget.max_tokens_attended(max_model_len)
        self.units = torch.empty(shape, dtype=torch.int32, device=device)
        self.gates = torch.empty(shape, dtype=torch.float32, device=device) if soft else None
        self.unit_scores = None
        if query_aware:
            shape = (rows, kv_heads, max(1, max_model_len // budget.unit))
            self.unit_scores = torch.empty(shape, dtype=torch.float32, device=device)
        acc, stats = workspace_shapes(rows, query_heads, head_dim, self.max_tokens)
        self.partials = (
            torch.empty(acc, dtype=torch.float32, device=device),
            torch.empty(stats, dtype=torch.float32, device=device),
        )
        self.side = SideStream(device) if device.type == "cuda" else None


class KeptSelections:
    """One layer's selection lists, kept from step to step.

    Attributes:
        units: [rows, H, K] int32; gates: [rows, H, K] float32 or None.
        stamps: [rows, H, 4] int32, see ``SelectionMemo``.
    """

    def __init__(
        self, rows: int, kv_heads: int, width: int, soft: bool, device: torch.device
    ) -> None:
        shape = (rows, kv_heads, width)
        self.units = torch.empty(shape, dtype=torch.int32, device=device)
        self.gates = torch.empty(shape, dtype=torch.float32, device=device) if soft else None
        self.stamps = torch.full((rows, kv_heads, 4), -2, dtype=torch.int32, device=device)


def rows_that_fit(kv_heads: int, width: int, layers: int, soft: bool) -> int:
    """Decode rows whose lists all layers may keep within KEPT_BYTES."""
    return KEPT_BYTES // (layers * kv_heads * width * (8 if soft else 4))


@functools.lru_cache(maxsize=8)
def decode_workspace(
    rows: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    budget: Budget,
    max_model_len: int,
    soft: bool,
    query_aware: bool,
    device: torch.device,
) -> DecodeWorkspace:
    """The workspace of all layers with these shapes."""
    return DecodeWorkspace(
        rows, query_heads, kv_heads, head_dim, budget, max_model_len, soft, query_aware, device
    )
