"""vLLM's Triton backend: decode over the paged cache, scratch as its metadata builder makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import (
    Arm,
    Prepared,
    by_request,
    import_fault,
    nan_like,
)
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs

MODULE = "vllm.v1.attention.ops.triton_unified_attention"
BACKEND = "vllm.v1.attention.backends.triton_attn"


def _unavailable(case: Case, budget: Budget | None) -> str:
    fault = import_fault(MODULE) or import_fault(BACKEND)
    if fault:
        return fault
    from vllm.triton_utils import HAS_TRITON

    return "" if HAS_TRITON else "vLLM has switched Triton off on this machine"


def _prepare(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    from vllm.v1.attention.backends.triton_attn import (
        MIN_LAUNCH_GRID_SIZE_2D,
        NUM_PAR_SOFTMAX_SEGMENTS,
    )
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    case, device = inputs.case, inputs.device
    key, value = inputs.kv_cache.transpose(1, 2).split(case.head_dim, dim=-1)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full_like(starts[1:], case.context)
    descale = torch.ones(1, device=device).expand(case.batch, case.kv_heads)
    # batches up to this split the context into segments
    split_below = MIN_LAUNCH_GRID_SIZE_2D // case.kv_heads
    shape = (split_below, case.query_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    padded = 1 << (case.head_dim - 1).bit_length()
    partial = torch.empty(*shape, padded, device=device)
    highest, total = torch.empty(shape, device=device), torch.empty(shape, device=device)

    def make(s: int) -> Callable[[], torch.Tensor]:
        query, out = inputs.query[s], nan_like(inputs.query[s])
        table = inputs.table[inputs.rows(s)]

        def call() -> torch.Tensor:
            unified_attention(
                q=query, k=key, v=value, out=out, cu_seqlens_q=starts, max_seqlen_q=1,
                seqused_k=lengths, max_seqlen_k=case.context, softmax_scale=inputs.scale,
                causal=True, window_size=(-1, -1), block_table=table, softcap=0,
                q_descale=None, k_descale=descale, v_descale=descale,
                seq_threshold_3D=split_below, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
                softmax_segm_output=partial, softmax_segm_max=highest, softmax_segm_expsum=total,
            )  # fmt: skip
            return by_request(out, case)

        return call

    return Prepared([make(s) for s in range(inputs.sets)], gate.dense(), work.attention(case, None))


ARMS = (Arm("vllm-triton", ("decode",), "attention", _prepare, unavailable=_unavailable),)
