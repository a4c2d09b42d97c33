"""Test caches laid out as vLLM's allocator does it, and the items that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select import reference as select_reference
from vllm_sparsek.kernels.select.memo import SelectionMemo

NAN = float("nan")


def paged_view(
    num_blocks: int,
    heads: int,
    page: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str,
    layers: int = 3,
) -> torch.Tensor:
    """[num_blocks, H, page, width] of NaN: one layer of several that share every block."""
    block = heads * page * width
    storage = torch.full((num_blocks, layers, block), NAN, dtype=dtype, device=device)
    return storage[:, 1].unflatten(1, (heads, page, width))


@dataclass
class Paged:
    """Requests of given lengths in a paged cache; block 0 is nobody's, unused slots are NaN.

    Attributes:
        key, value: [n, H, D] per request, float64.
        token_scores: [n, H] per request, float32.
        kv_cache: [num_blocks, H, page, 2 * D]; scores: [num_blocks, H, page] float32.
        block_table: [rows, max_blocks] int32.
    """

    lengths: list[int]
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    token_scores: list[torch.Tensor]
    kv_cache: torch.Tensor
    scores: torch.Tensor
    block_table: torch.Tensor

    def to(self, device: torch.device | str) -> Paged:
        """The same on ``device``, strides kept."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device == torch.device(device):
                return tensor
            result = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            return result.copy_(tensor)

        return Paged(
            self.lengths, self.key, self.value, self.token_scores,
            moved(self.kv_cache), moved(self.scores), moved(self.block_table),
        )  # fmt: skip


def slots(paged_table: torch.Tensor, row: int, positions: torch.Tensor, page: int) -> torch.Tensor:
    """Physical slots [n] int64 of token positions of one request."""
    blocks = paged_table[row, positions // page].long()
    return blocks * page + positions % page


def build(
    lengths: list[int],
    heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    levels: int | None = None,
) -> Paged:
    """A cache on the CPU with random keys, values and scores.

    Args:
        lengths: tokens of every request.
        heads, head_dim, page, dtype: shape and dtype of the cache.
        seed: of all random numbers.
        levels: if given, scores take only so many different values: many ties.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-n // page) for n in lengths]
    num_blocks = sum(needed) + 3
    kv_cache = paged_view(num_blocks, heads, page, 2 * head_dim, dtype, "cpu")
    scores = paged_view(num_blocks, heads, page, 1, torch.float32, "cpu")[..., 0]
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    block_table = torch.zeros(len(lengths), max([*needed, 1]) + 2, dtype=torch.int32)
    keys, values, all_scores = [], [], []
    for row, n in enumerate(lengths):
        for p in range(needed[row]):
            block_table[row, p] = free.pop()
        key = torch.randn(n, heads, head_dim, generator=generator).to(dtype)
        value = torch.randn(n, heads, head_dim, generator=generator).to(dtype)
        u = torch.randn(n, heads, generator=generator)
        if levels is not None:
            u = torch.randint(levels, (n, heads), generator=generator).float() - levels // 2
        at = torch.arange(n)
        block, offset = block_table[row, at // page].long(), at % page
        kv_cache[block, :, offset] = torch.cat([key, value], dim=-1)
        scores[block, :, offset] = u
        keys.append(key.double())
        values.append(value.double())
        all_scores.append(u)
    return Paged(lengths, keys, values, all_scores, kv_cache, scores, block_table)


FP8 = torch.float8_e4m3fn
SCALES = (0.031, 0.017)  # of keys and values: no powers of two, so that neither is lost unseen


def quantised(
    paged: Paged, scales: tuple[float, float] = SCALES
) -> tuple[Paged, tuple[torch.Tensor, torch.Tensor]]:
    """The same requests in a float8_e4m3fn cache, and its kv_scales; both on the CPU.

    ``key`` and ``value`` of the result are what the cache holds, times its scales.
    """
    num_blocks, heads, page, width = paged.kv_cache.shape
    by_channel = torch.tensor(scales).repeat_interleave(width // 2)
    kv_cache = paged_view(num_blocks, heads, page, width, FP8, "cpu")
    kv_cache.copy_((paged.kv_cache.float() / by_channel).to(FP8))
    k_scale, v_scale = (torch.tensor(scale) for scale in scales)

    def held(tensors: list[torch.Tensor], scale: torch.Tensor) -> list[torch.Tensor]:
        return [(t.float() / scale).to(FP8).double() * scale for t in tensors]

    found = dataclasses.replace(
        paged, key=held(paged.key, k_scale), value=held(paged.value, v_scale), kv_cache=kv_cache
    )
    return found, (k_scale, v_scale)


def items_of(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """item_row and item_position from (row, position) pairs."""
    row = torch.tensor([pair[0] for pair in pairs], dtype=torch.int32)
    return row, torch.tensor([pair[1] for pair in pairs], dtype=torch.int32)


def chosen(
    paged: Paged, row: torch.Tensor, position: torch.Tensor, budget: Budget, soft: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference's selection."""
    return select_reference.select(
        paged.scores, paged.block_table, row, position, budget, "lse", soft
    )


def kept_lists(
    page: int, unit: int, pooling: str, high: float, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Lists of long and short contexts that the kernel makes and refreshes, and the reference's.

    Args:
        page, unit, pooling: of the selection, from 1,250 pages.
        high: is added to the scores of 400 neighbours in every 4,099 tokens of the cache.
        device: the kernel's.
    """
    length = 1250 * page
    paged = build([length, 300], 2, 8, page)
    tokens = torch.arange(paged.scores.shape[0] * page).view(-1, 1, page)
    paged.scores += high * (tokens % 4099 < 400)
    there = paged.to(device)
    budget = Budget(1024, 16, 4, 16, unit)
    shape = (2, 2, budget.max_units(length))
    got = torch.full(shape, 77, dtype=torch.int32, device=device)
    stamps = torch.full((2, 2, 4), -2, dtype=torch.int32, device=device)
    memo = SelectionMemo(stamps, torch.zeros(1, dtype=torch.int32, device=device))
    for last in (length - 49, length - 48):
        row, position = items_of([(0, last), (1, 280)])
        expected, _ = select_reference.select(
            paged.scores, paged.block_table, row, position, budget, pooling, max_units=shape[2]
        )
        memo.step.add_(1)
        select_api.select(
            there.scores, there.block_table, row.to(device), position.to(device), budget, pooling,
            False, got, impl="triton", memo=memo,
        )  # fmt: skip
        yield got.cpu(), expected


def assert_within_twice(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, eps: float
) -> None:
    """The error of ``got`` is at most twice that of low-precision eager attention, plus eps.

    Args:
        got: the kernel's output; eager: the same attention in plain torch at the tensors'
            precision; exact: float64.
        eps: what rounding of the result alone may cost.
    """
    error = (got.double().cpu() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    assert error <= 2 * eager_error + eps, f"error {error:.3g}, eager {eager_error:.3g}"


# rounding of outputs of magnitude up to about four
EPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def eager_one(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    position: int,
    units: torch.Tensor,
    gates: torch.Tensor | None,
    budget: Budget,
    scale: float,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """One query's attention with every step rounded to the query's dtype; as ``attend_one``."""
    from vllm_sparsek.kernels.decode.reference import visible_positions

    page, heads, head_dim = kv_cache.shape[2], kv_cache.shape[1], query.shape[-1]
    group = query.shape[0] // heads
    out = torch.empty_like(query)
    for head in range(heads):
        mine = slice(head * group, (head + 1) * group)
        kept = units[head][units[head] >= 0]
        at = visible_positions(position, kept, budget)
        rows = kv_cache[blocks[at // page].long(), head, at % page].to(query.dtype)
        key, value = rows.split(head_dim, dim=-1)
        if kv_scales is not None:
            key, value = (x * s.to(x.dtype) for x, s in zip((key, value), kv_scales, strict=True))
        weights = torch.softmax(query[mine] @ key.T * scale, dim=-1)
        if gates is not None:
            weight = torch.ones(at.numel(), dtype=torch.float32)
            sinks = min(budget.first_unit() * budget.unit, position + 1)
            gate = gates[head][units[head] >= 0].repeat_interleave(budget.unit)
            weight[sinks : sinks + gate.numel()] = gate
            weights = weights * weight.to(weights.dtype)
        out[mine] = weights @ value
    return out
