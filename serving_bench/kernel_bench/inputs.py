"""The tensors of a case: a paged cache with shuffled blocks, its scores, queries, selections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select.chunk import row_bases
from vllm_sparsek.kernels.select.triton import shares_base
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.cases import Case

POOLING = "lse"
# k_scale and v_scale of fp8 caches: no powers of two, and far from each other, so that none is lost
# or taken for the other unseen; the largest of many normal numbers fits
KV_SCALES = (0.031, 0.017)
# input sets take turns: together they should be this much larger than the L2 cache
L2_MULTIPLE = 2
MAX_SETS = 48
MAX_CACHE_BYTES = 32 * 2**30  # of all sets together
QUANTISED_AT_ONCE = 2**28  # numbers that are made in another dtype first


def input_sets(case: Case, l2_bytes: int) -> int:
    """How many input sets keep a call from finding its inputs in an L2 cache of that size."""
    if case.kind == "training":
        return 1
    if case.kind in ("prefill", "decode"):
        least = min(work.attention(case, budget).bytes for budget in (None, *case.budgets))
    elif case.kind == "select":
        least = min(work.selection(case, budget).bytes for budget in case.budgets)
    else:
        least = work.kv_write(case).bytes
    width = 2 * case.head_dim * work.cache_item_bytes(case)
    cache = case.batch * case.context * case.kv_heads * width
    wanted = -(-L2_MULTIPLE * l2_bytes // least)
    return int(max(1, min(wanted, MAX_SETS, MAX_CACHE_BYTES // cache)))


@dataclass(frozen=True)
class Items:
    """Queries that share a selection, of one input set, in order of request and position.

    Attributes:
        row: [items] int32, row of the block table; position, length: [items] int32, of the
            first query and how many; start: [items] int32, index of the first query in the set.
        per_request: items of each request.
    """

    row: torch.Tensor
    position: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    per_request: int


class Inputs:
    """Inputs of one case; input set s has its own requests s * batch ... in one shared cache.

    Attributes:
        query: [sets, batch * queries, Hq, D].
        kv_cache: [blocks, H, page, 2 * D]; scores: [blocks, H, page] float32; block 0 is nobody's.
        kv_scales: k_scale and v_scale of an fp8 cache, float32 tensors of one element; else None.
        table: [sets * batch, pages] int32.
    """

    def __init__(self, case: Case, device: torch.device, sets: int = 1, seed: int = 0):
        self.case, self.device, self.sets = case, device, sets
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        rows, pages = sets * case.batch, -(-case.context // case.page)
        blocks = rows * pages + 1

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        heads, width = case.kv_heads, 2 * case.head_dim
        self.kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
        if case.cache is None:
            self.kv_cache = normal(blocks, heads, case.page, width, dtype=dtype)
        else:
            k_scale, v_scale = (torch.tensor(scale, device=device) for scale in KV_SCALES)
            self.kv_scales = k_scale, v_scale
            shape, cache_dtype = (blocks, heads, case.page, width), getattr(torch, case.cache)
            self.kv_cache = torch.empty(shape, dtype=cache_dtype, device=device)
            for part in self.kv_cache.split(max(1, QUANTISED_AT_ONCE // math.prod(shape[1:]))):
                part.copy_(self._quantised(normal(*part.shape, dtype=dtype)))
        self.scores = normal(blocks, heads, case.page)
        order = torch.randperm(blocks - 1, device=device, generator=generator) + 1
        self.table = order.int().view(rows, pages)
        tokens = case.batch * case.queries
        self.query = normal(sets, tokens, case.query_heads, case.head_dim, dtype=dtype)
        self._units: dict[tuple[Budget, int], torch.Tensor] = {}

    def _scales(self) -> torch.Tensor:
        """[2 * D] float32: what the numbers of an fp8 cache's row are multiplied by."""
        assert self.kv_scales is not None
        return torch.stack(self.kv_scales).repeat_interleave(self.case.head_dim)

    def _quantised(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., 2 * D] keys and values in fp8, as vLLM writes them: beyond it, its largest."""
        most = torch.finfo(FP8).max
        return (rows.float() / self._scales()).clamp(-most, most).to(FP8)

    def dequantised(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., 2 * D] float64: the keys and values that rows of the cache stand for."""
        exact = rows.float().double()
        return exact if self.kv_scales is None else exact * self._scales().double()

    @property
    def scale(self) -> float:
        """The softmax scale."""
        return float(self.case.head_dim**-0.5)

    def rows(self, s: int) -> slice:
        """Rows of the block table that belong to input set ``s``."""
        return slice(s * self.case.batch, (s + 1) * self.case.batch)

    def ints(self, values: list[int]) -> torch.Tensor:
        """An int32 tensor on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def items(self, refresh: int, s: int) -> Items:
        """The items of input set ``s``."""
        case = self.case
        positions = work.item_positions(case, refresh)
        first = case.context - case.queries
        ends = [*positions[1:].tolist(), case.context]
        length = [end - begin for begin, end in zip(positions.tolist(), ends, strict=True)]
        each, batch = len(length), case.batch
        row = torch.arange(batch, dtype=torch.int32, device=self.device) + s * batch
        position = self.ints(positions.tolist()).repeat(batch)
        # a request's queries lie together
        base = (row - s * batch).repeat_interleave(each) * case.queries
        return Items(
            row.repeat_interleave(each), position, base + position - first,
            self.ints(length).repeat(batch), each,
        )  # fmt: skip

    def empty_units(self, budget: Budget, items: int) -> torch.Tensor:
        """[items, H, K] int32 for the lists of so many items."""
        shape = (items, self.case.kv_heads, budget.max_units(self.case.context))
        return torch.empty(shape, dtype=torch.int32, device=self.device)

    def select(self, budget: Budget, items: Items, units: torch.Tensor) -> None:
        """Our full selection, shared between the items of a prompt as the package does."""
        case, bases = self.case, None
        if case.kind == "prefill" and self.sets == 1 and self.device.type == "cuda":
            last = budget.selection_position(case.context - 1)
            competing = budget.units_competing(last)
            if shares_base(units.shape[2], competing):
                bases = row_bases(
                    case.batch, case.queries, case.context, budget.refresh, self.device,
                    0, items.row.numel(),
                )  # fmt: skip
        select_api.select(
            self.scores, self.table, items.row, items.position, budget, POOLING, False, units,
            bases=bases,
        )  # fmt: skip

    def units(self, budget: Budget, s: int) -> torch.Tensor:
        """[items, H, K]: what our selection keeps for input set ``s``; made once, then kept."""
        if (budget, s) not in self._units:
            items = self.items(budget.refresh, s)
            units = self.empty_units(budget, items.row.numel())
            self.select(budget, items, units)
            self._units[budget, s] = units
        return self._units[budget, s]

    def forget(self) -> None:
        """Drop the selections: the next budget needs the memory."""
        self._units.clear()

    def cached(self, *at: torch.Tensor | int) -> torch.Tensor:
        """What the cache holds at indices of its blocks, heads and slots, a copy."""
        if self.kv_scales is None:
            return self.kv_cache[at]
        # earlier versions of torch index no fp8 tensors
        return self.kv_cache.view(torch.uint8)[at].view(self.kv_cache.dtype)

    def key_value(self, s: int) -> torch.Tensor:
        """[batch, context, H, 2 * D]: the cache of input set ``s`` without pages, a copy."""
        pages = self.cached(self.table[self.rows(s)].long())  # [batch, pages, H, page, 2D]
        return pages.transpose(2, 3).flatten(1, 2)[:, : self.case.context].contiguous()

    def slots(self, s: int) -> torch.Tensor:
        """[batch * queries] int64: where the new tokens of input set ``s`` lie in the cache."""
        case = self.case
        at = torch.arange(case.context - case.queries, case.context, device=self.device)
        blocks = self.table[self.rows(s)][:, at // case.page].long()  # [batch, queries]
        return (blocks * case.page + at % case.page).flatten()
