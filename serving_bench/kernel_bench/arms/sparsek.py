"""Ours, through the kernels' `api.py`: attention, full selection, and both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from vllm_sparsek import compat
from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.engines import attention_module
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared, by_request, nan_like
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs, Items

Call = Callable[[], torch.Tensor]


def _decode(
    inputs: Inputs, budget: Budget, s: int, items: Items, units: torch.Tensor, impl: str = "auto"
) -> Call:
    case, query = inputs.case, inputs.query[s]
    out = nan_like(query)
    bound = budget.max_tokens_attended(case.context)
    shapes = decode_api.workspace_shapes(*query.shape, bound)
    space = (
        torch.empty(shapes[0], device=inputs.device),
        torch.empty(shapes[1], device=inputs.device),
    )

    def call() -> torch.Tensor:
        decode_api.decode(
            query, inputs.kv_cache, inputs.table, items.row, items.position, units, None, budget,
            inputs.scale, out, space, bound, inputs.kv_scales, impl=impl,
        )  # fmt: skip
        return by_request(out, case)

    return call


def _prefill(
    inputs: Inputs, budget: Budget, s: int, items: Items, units: torch.Tensor, impl: str = "auto"
) -> Call:
    query = inputs.query[s]
    out = nan_like(query)

    def call() -> torch.Tensor:
        prefill_api.prefill(
            query, *inputs.kv_cache.chunk(2, dim=-1), inputs.table, items.row, items.position,
            items.start, items.length, units, None, budget, inputs.scale, out, inputs.kv_scales,
            impl=impl,
        )  # fmt: skip
        return by_request(out, inputs.case)

    return call


def _fp8_products(inputs: Inputs, budget: Budget, impl: str) -> bool:
    """Whether the engine that will run multiplies in fp8, as FlashAttention-3 over an fp8 cache."""
    case = inputs.case
    if inputs.kv_scales is None:
        return False
    # as decode/api.py and prefill/api.py choose it
    rows = (budget.refresh if case.kind == "prefill" else 1) * case.query_heads // case.kv_heads
    key, value = inputs.kv_cache.chunk(2, dim=-1)
    module = attention_module(case.kind, impl, inputs.query[0], rows, key, value, None, budget)
    return module.__name__.endswith("fa3")


def _attend(inputs: Inputs, gate: Gate, budget: Budget | None, impl: str = "auto") -> Prepared:
    """The selection is given; what an engine makes of it first is part of its time."""
    assert budget is not None
    attend = _decode if inputs.case.kind == "decode" else _prefill
    calls = [
        attend(inputs, budget, s, inputs.items(budget.refresh, s), inputs.units(budget, s), impl)
        for s in range(inputs.sets)
    ]
    judge = gate.sparse(budget, _fp8_products(inputs, budget, impl))
    return Prepared(calls, judge, work.attention(inputs.case, budget))


def _select(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    """Nothing is kept from an earlier call."""
    assert budget is not None

    def make(s: int) -> Call:
        items = inputs.items(budget.refresh, s)
        units = inputs.empty_units(budget, items.row.numel())

        def call() -> torch.Tensor:
            inputs.select(budget, items, units)
            return units

        return call

    calls = [make(s) for s in range(inputs.sets)]
    return Prepared(calls, gate.selection(budget), work.selection(inputs.case, budget))


def _both(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    """Full selection, then attention."""
    assert budget is not None
    case = inputs.case
    attend = _decode if case.kind == "decode" else _prefill

    def make(s: int) -> Call:
        items = inputs.items(budget.refresh, s)
        units = inputs.empty_units(budget, items.row.numel())
        attention = attend(inputs, budget, s, items, units)

        def call() -> torch.Tensor:
            inputs.select(budget, items, units)
            return attention()

        return call

    calls = [make(s) for s in range(inputs.sets)]
    least = work.attention(case, budget) + work.selection(case, budget)
    return Prepared(calls, gate.sparse(budget, _fp8_products(inputs, budget, "auto")), least)


def _select_by_query(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    """Random bounds: the time does not depend on what they are."""
    assert budget is not None
    case = inputs.case
    shape = (inputs.kv_cache.shape[0], case.kv_heads, case.page // budget.unit, 2, case.head_dim)
    bounds = torch.randn(shape, device=inputs.device).to(inputs.kv_cache.dtype)
    per_call = (case.batch, case.kv_heads, case.context // budget.unit)

    def make(s: int) -> Call:
        items = inputs.items(budget.refresh, s)
        units = inputs.empty_units(budget, items.row.numel())
        scratch = torch.empty(per_call, device=inputs.device)

        def call() -> torch.Tensor:
            bounds_api.select_by_query(
                inputs.query[s], bounds, inputs.table, items.row, items.position, budget, units,
                scratch,
            )  # fmt: skip
            return units

        return call

    read = bounds.numel() // bounds.shape[0] * case.batch * case.context // case.page
    least = work.Work(read * bounds.element_size())
    return Prepared([make(s) for s in range(inputs.sets)], None, least)


def _no_fa3(case: Case, budget: Budget | None) -> str:
    if case.cache is not None and case.kind == "decode":
        return f"the cache is {case.cache}: decode's queries would be rounded to it"
    _, reason = compat.flash_attention_3()
    return reason


def _no_hopper(case: Case, budget: Budget | None) -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        return ""
    return "needs a GPU of compute capability 9.0"


ARMS = (
    Arm(
        "sparsek", ("prefill", "decode"), "attention+selection", _both, sparse=True,
        quantised=True,
    ),
    Arm(
        "sparsek-attend", ("prefill", "decode"), "attention", _attend, sparse=True,
        quantised=True,
    ),
    # the engines of ``sparsek-attend`` side by side, whatever configs/engines says
    Arm(
        "sparsek-triton", ("prefill", "decode"), "attention", partial(_attend, impl="triton"),
        sparse=True, by_name=True, quantised=True,
    ),
    Arm(
        "sparsek-fa3", ("prefill", "decode"), "attention", partial(_attend, impl="fa3"),
        sparse=True, unavailable=_no_fa3, by_name=True, quantised=True,
    ),
    Arm(
        "sparsek-hopper", ("prefill",), "attention", partial(_attend, impl="hopper"), sparse=True,
        unavailable=_no_hopper, by_name=True,
    ),
    Arm(
        "sparsek-select", ("prefill", "decode", "select"), "selection", _select, sparse=True,
        quantised=True,
    ),
    Arm(
        "sparsek-select-by-query", ("decode",), "selection", _select_by_query, sparse=True,
        by_name=True,
    ),
)  # fmt: skip
