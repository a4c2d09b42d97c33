"""PyTorch's scaled_dot_product_attention: its own choice of kernel, and cuDNN's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs


def _unavailable(case: Case, budget: Budget | None) -> str:
    if case.queries < case.context:
        return "its causal mask takes whole prompts only"
    return ""


# what PyTorch chooses from by itself; importing vLLM on a GPU forbids cuDNN's for the whole process
OWN_CHOICE = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _prepare(inputs: Inputs, gate: Gate, cudnn: bool) -> Prepared:
    case = inputs.case
    allowed = [SDPBackend.CUDNN_ATTENTION] if cudnn else OWN_CHOICE

    def make(s: int) -> Callable[[], torch.Tensor]:
        query = inputs.query[s].view(case.batch, case.queries, case.query_heads, case.head_dim)
        query = query.transpose(1, 2).contiguous()  # [B, Hq, S, D]
        key, value = (
            half.transpose(1, 2).contiguous()
            for half in inputs.key_value(s).split(case.head_dim, dim=-1)
        )
        gqa = case.query_heads != case.kv_heads

        def call() -> torch.Tensor:
            with sdpa_kernel(allowed):
                return scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=gqa
                )

        return call

    judge = gate.dense()
    return Prepared(
        [make(s) for s in range(inputs.sets)],
        lambda output: judge(output.transpose(1, 2)),
        work.attention(case, None),
    )


ARMS = tuple(
    Arm(
        name,
        ("prefill",),
        "attention",
        lambda inputs, gate, budget, cudnn=cudnn: _prepare(inputs, gate, cudnn),
        unavailable=_unavailable,
    )
    for name, cudnn in (("sdpa", False), ("sdpa-cudnn", True))
)
