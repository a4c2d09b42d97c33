"""xFormers' memory-efficient attention: causal, and causal within a local window."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared, import_fault
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs


def _unavailable(case: Case, budget: Budget | None) -> str:
    if case.queries < case.context:
        return "LowerTriangularMask takes whole prompts only"
    if case.query_heads != case.kv_heads:
        return "takes as many KV heads as query heads here"
    return import_fault("xformers.ops.fmha.attn_bias")


def _unavailable_local(case: Case, budget: Budget | None) -> str:
    if case.local_window is None:
        return "the case has no local_window"
    return _unavailable(case, budget)


def _prepare(inputs: Inputs, gate: Gate, local_window: int | None) -> Prepared:
    from xformers.ops import memory_efficient_attention_forward
    from xformers.ops.fmha.attn_bias import (
        LowerTriangularFromBottomRightLocalAttentionMask,
        LowerTriangularMask,
    )

    case = inputs.case
    if local_window is None:
        mask = LowerTriangularMask()
    else:
        mask = LowerTriangularFromBottomRightLocalAttentionMask(_window_size=local_window)

    def make(s: int) -> Callable[[], torch.Tensor]:
        query = inputs.query[s].view(case.batch, case.queries, case.query_heads, case.head_dim)
        key, value = (
            half.contiguous() for half in inputs.key_value(s).split(case.head_dim, dim=-1)
        )
        return lambda: memory_efficient_attention_forward(query, key, value, attn_bias=mask)

    return Prepared(
        [make(s) for s in range(inputs.sets)],
        gate.dense(local_window),
        work.attention(case, None, local_window),
        "" if local_window is None else f"window {local_window}",
    )


ARMS = (
    Arm(
        "xformers",
        ("prefill",),
        "attention",
        lambda inputs, gate, budget: _prepare(inputs, gate, None),
        unavailable=_unavailable,
    ),
    Arm(
        "xformers-local",
        ("prefill",),
        "attention",
        lambda inputs, gate, budget: _prepare(inputs, gate, inputs.case.local_window),
        unavailable=_unavailable_local,
    ),
)
