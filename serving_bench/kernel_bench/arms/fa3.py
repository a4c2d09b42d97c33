"""FlashAttention-3 from vLLM's wheel: dense, and over the page tables of a selection.

Beside an fp8 cache it takes queries in fp8, which are given, rounds probabilities to it, and
returns bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.serving_bench.kernel_bench import measure, work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import (
    Arm,
    Prepared,
    by_request,
    import_fault,
    nan_like,
)
from vllm_sparsek.serving_bench.kernel_bench.arms.page_tables import one_head_pages, page_tables
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate, Verdict
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs

Call = Callable[[], torch.Tensor]

# of decode, where the right number of splits matters; 0 is the library's own choice
NUM_SPLITS = (0, 1, 2, 4, 8)


def _unavailable(case: Case, budget: Budget | None) -> str:
    fault = import_fault("vllm.vllm_flash_attn")
    if fault:
        return fault
    from vllm.vllm_flash_attn import fa_version_unsupported_reason, is_fa_version_supported

    if not is_fa_version_supported(3):
        return str(fa_version_unsupported_reason(3))
    return ""


def _operands(inputs: Inputs, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as the library takes them beside the cache, and an output."""
    if inputs.kv_scales is None:
        return query, nan_like(query)
    return query.to(FP8), nan_like(query.to(torch.bfloat16))


def _descale(inputs: Inputs, requests: int, heads: int) -> dict[str, torch.Tensor]:
    """Scales of an fp8 cache, as keyword arguments; of another one, none."""
    if inputs.kv_scales is None:
        return {}
    one = torch.ones(1, device=inputs.device)
    names = ("q_descale", "k_descale", "v_descale")
    scales = (one, *inputs.kv_scales)
    return {n: s.view(1).expand(requests, heads) for n, s in zip(names, scales, strict=True)}


def _best(make: Callable[[int, int], Call], inputs: Inputs) -> tuple[list[Call], str]:
    """Calls for all input sets, in decode with the number of splits that is fastest."""
    if inputs.case.queries > 1:
        return [make(s, 0) for s in range(inputs.sets)], ""
    best = min(NUM_SPLITS, key=lambda splits: measure.quick(make(0, splits)))
    return [make(s, best) for s in range(inputs.sets)], f"num_splits {best}"


def _dense_prefill(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    case = inputs.case
    starts = [
        torch.arange(case.batch + 1, dtype=torch.int32, device=inputs.device) * n
        for n in (case.queries, case.context)
    ]
    descale = _descale(inputs, case.batch, case.kv_heads)

    def make(s: int) -> Call:
        query, out = _operands(inputs, inputs.query[s])
        key, value = (
            half.flatten(0, 1).contiguous()
            for half in inputs.key_value(s).split(case.head_dim, dim=-1)
        )

        def call() -> torch.Tensor:
            flash_attn_varlen_func(
                query, key, value, case.queries, starts[0], case.context, cu_seqlens_k=starts[1],
                softmax_scale=inputs.scale, causal=True, out=out, fa_version=3, **descale,
            )  # fmt: skip
            return by_request(out, case)

        return call

    judge = gate.dense(fp8_products=bool(descale))
    return Prepared([make(s) for s in range(inputs.sets)], judge, work.attention(case, None))


def _dense_decode(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    case = inputs.case
    key, value = inputs.kv_cache.transpose(1, 2).split(case.head_dim, dim=-1)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=inputs.device)
    lengths = torch.full_like(starts[1:], case.context)
    descale = _descale(inputs, case.batch, case.kv_heads)

    def make(s: int, splits: int) -> Call:
        query, out = _operands(inputs, inputs.query[s])
        table = inputs.table[inputs.rows(s)]

        def call() -> torch.Tensor:
            flash_attn_varlen_func(
                query, key, value, 1, starts, case.context, seqused_k=lengths, block_table=table,
                softmax_scale=inputs.scale, causal=True, out=out, num_splits=splits, fa_version=3,
                **descale,
            )  # fmt: skip
            return by_request(out, case)

        return call

    calls, note = _best(make, inputs)
    judge = gate.dense(fp8_products=bool(descale))
    return Prepared(calls, judge, work.attention(case, None), note)


def _dense(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    prepare = _dense_decode if inputs.case.kind == "decode" else _dense_prefill
    return prepare(inputs, gate, budget)


def _pages(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    """Selection, page tables and the order of the queries are given, not timed."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    assert budget is not None
    case = inputs.case
    group = case.query_heads // case.kv_heads
    key, value = one_head_pages(inputs, budget.unit)

    def tables(s: int) -> tuple[torch.Tensor, ...]:
        items = inputs.items(budget.refresh, s)
        made = page_tables(inputs, budget, items, inputs.units(budget, s))
        each = (case.batch, items.per_request, case.kv_heads)
        # queries of one KV head lie together: requests are ordered (row, head, item)
        table = made.table.view(*each, -1).transpose(1, 2).flatten(0, 2).contiguous()
        lengths = made.lengths.view(each[:2])[:, None].expand(-1, case.kv_heads, -1).flatten()
        new = items.length.view(each[:2])[:, None].expand(-1, case.kv_heads, -1).flatten()
        starts = torch.zeros(new.numel() + 1, dtype=torch.int32, device=inputs.device)
        starts[1:] = new.cumsum(0)
        query = inputs.query[s].view(case.batch, case.queries, case.kv_heads, group, case.head_dim)
        query = query.transpose(1, 2).flatten(0, 2).contiguous()  # [B * H * queries, G, D]
        return query, table, lengths.contiguous(), starts

    made = [tables(s) for s in range(inputs.sets)]
    longest = max(int(lengths.max()) for _, _, lengths, _ in made)
    descale = _descale(inputs, made[0][2].numel(), 1)

    def make(s: int, splits: int) -> Call:
        query, table, lengths, starts = made[s]
        query, out = _operands(inputs, query)

        def call() -> torch.Tensor:
            flash_attn_varlen_func(
                query, key, value, min(budget.refresh, case.queries), starts, longest,
                seqused_k=lengths, block_table=table, softmax_scale=inputs.scale, causal=True,
                out=out, num_splits=splits, fa_version=3, **descale,
            )  # fmt: skip
            return out

        return call

    judge = gate.sparse(budget, fp8_products=bool(descale))

    def check(output: torch.Tensor) -> Verdict:
        shape = (case.batch, case.kv_heads, case.queries, group, case.head_dim)
        return judge(output.view(shape).transpose(1, 2).flatten(2, 3))

    calls, note = _best(make, inputs)
    return Prepared(calls, check, work.attention(case, budget), note)


ARMS = (
    Arm(
        "fa3", ("prefill", "decode"), "attention", _dense, unavailable=_unavailable,
        quantised=True,
    ),
    Arm(
        "fa3-pages", ("prefill", "decode"), "attention", _pages, sparse=True,
        unavailable=_unavailable, quantised=True,
    ),
)  # fmt: skip
