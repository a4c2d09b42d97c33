"""Write: keys, values and linear scores of new tokens into their paged caches."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.dispatch import check_shape, check_tensor, implementation
from vllm_sparsek.kernels.common.validate import FLOATS, FP8, check_kv_scales
from vllm_sparsek.kernels.write.linear import LinearScore


def write_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    linear: LinearScore,
    kv_cache: torch.Tensor,
    scores: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """Store keys, values and scores of new tokens, in one launch on CUDA.

    Args:
        key, value: [T, H, D]; keys are rotated.
        positions: [>= T] int32 absolute positions.
        slot_mapping: [>= T] int64, physical slot of every token; -1 is padding.
        linear: the scorer.
        kv_cache: [num_blocks, H, page, 2 * D] of key's dtype or float8_e4m3fn, written in place.
        scores: [num_blocks, H, page] float32 view of the score cache, written in place.
        kv_scales: k_scale, v_scale of an fp8 cache, one float32 each: its numbers times them
            are keys and values.
        impl: auto, triton, cpu or reference.

    Raises:
        ValueError, TypeError: an argument, named in the message, does not fit.
        RuntimeError: ``impl`` cannot run here.
    """
    device = key.device
    check_tensor("key", key, 3, FLOATS, device)
    tokens, heads, head_dim = key.shape
    check_tensor("value", value, 3, key.dtype, device)
    check_shape("value", value, tuple(key.shape))
    check_tensor("positions", positions, 1, torch.int32, device)
    check_tensor("slot_mapping", slot_mapping, 1, torch.int64, device)
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        if tensor.shape[0] < tokens:
            raise ValueError(f"{name} has {tensor.shape[0]} entries for {tokens} tokens")
    check_tensor("kv_cache", kv_cache, 4, (key.dtype, FP8), device)
    num_blocks, _, page, _ = kv_cache.shape
    check_shape("kv_cache", kv_cache, (num_blocks, heads, page, 2 * head_dim))
    check_tensor("scores", scores, 3, torch.float32, device)
    check_shape("scores", scores, (num_blocks, heads, page))
    check_kv_scales(kv_scales, "kv_cache", kv_cache, device)
    check_tensor("linear.weight", linear.weight, 3, torch.float32, device)
    check_shape("linear.weight", linear.weight, (3, heads, head_dim))
    for name, vector in (("linear.bias", linear.bias), ("linear.slope", linear.slope)):
        check_tensor(name, vector, 1, torch.float32, device)
        check_shape(name, vector, (heads,))
    if linear.inv_freq is not None:
        check_tensor("linear.inv_freq", linear.inv_freq, 1, torch.float32, device)
        if 2 * linear.inv_freq.shape[0] > head_dim:
            raise ValueError(
                f"linear.inv_freq has {linear.inv_freq.shape[0]} pairs, keys have {head_dim} "
                "components"
            )
    implementation("write", impl, device).write_tokens(
        key, value, positions, slot_mapping, linear, kv_cache, scores, kv_scales
    )
