"""vLLM's own attention: the dense path, and FlashAttention-3."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dense_impl_class(device_type: str) -> type:
    """vLLM's own dense attention, on the CPU with a step that packs our cache layout for it."""
    if device_type == "cuda":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

        return FlashAttentionImpl
    from vllm_sparsek.attention.dense_cpu import CpuDenseImpl

    return CpuDenseImpl


def dense_builder_class(device_type: str) -> type:
    """Metadata builder that belongs to ``dense_impl_class``."""
    if device_type == "cuda":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

        return FlashAttentionMetadataBuilder
    from vllm_sparsek.attention.dense_cpu import CpuDenseBuilder

    return CpuDenseBuilder


def dense_takes_fp8() -> bool:
    """Whether vLLM's FlashAttention reads an fp8 KV cache on this GPU."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return bool(FlashAttentionBackend.supports_kv_cache_dtype("fp8"))


def dense_query(dense: Any, query: torch.Tensor, layer: Any) -> torch.Tensor:
    """``query`` [T, Hq, D] as the dense path takes it beside an fp8 KV cache.

    vLLM's attention layer quantises queries for implementations that ask for it. Ours does not:
    sparse queries keep their 16 bits. What reads densely gets what FLASH_ATTN would get.
    """
    if not dense.supports_quant_query_input:
        return query
    from vllm import _custom_ops as ops

    quantised, _ = ops.scaled_fp8_quant(query.flatten(1), layer._q_scale)
    return quantised.view(query.shape)


@functools.cache
def flash_attention_3() -> tuple[Any, str]:
    """vLLM's ``flash_attn_varlen_func`` if it runs FlashAttention-3 here, else None and why not."""
    try:
        from vllm.vllm_flash_attn import (
            fa_version_unsupported_reason,
            flash_attn_varlen_func,
            is_fa_version_supported,
        )

        if not is_fa_version_supported(3):
            return None, f"no FlashAttention-3: {fa_version_unsupported_reason(3)}"
    # a wheel for another driver or torch fails in its own ways
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return None, f"no FlashAttention-3 from vLLM: {type(error).__name__}: {''.join(first)}"
    return flash_attn_varlen_func, ""


def cpu_kernel_isa(dtype: torch.dtype, page: int, head_size: int) -> str:
    """Instruction set that vLLM's CPU attention kernel uses for a cache of this shape."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, page, head_size, "auto")
