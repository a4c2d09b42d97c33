"""Write on the CPU, vectorised torch. Same meaning and signature as the reference."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.gather import scale_numbers
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.kernels.write.linear import LinearScore, turn_back


def write_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    linear: LinearScore,
    kv_cache: torch.Tensor,
    scores: torch.Tensor,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``reference.write_tokens``."""
    slots, positions = slot_mapping[: key.shape[0]], positions[: key.shape[0]]
    real = slots >= 0
    if not bool(real.all()):
        slots, key, value, positions = slots[real], key[real], value[real], positions[real]
    block, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
    k, v = key.float(), value.float()
    held = torch.cat([key, value], dim=-1)
    if kv_scales is not None:
        most = torch.finfo(FP8).max
        k_scale, v_scale = scale_numbers(kv_scales)
        held = torch.cat([k / k_scale, v / v_scale], dim=-1).clamp(-most, most)
    kv_cache[block, :, offset] = held.to(kv_cache.dtype)
    scores[block, :, offset] = token_scores(k, v, positions, linear)


def token_scores(
    key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, linear: LinearScore
) -> torch.Tensor:
    """[T, H] float32 of key, value [T, H, D] float32.

    Row sums, whose order does not depend on the number of tokens.
    """
    unrotated, by_key, by_value = linear.weight
    u = (key * by_key).sum(-1) + (value * by_value).sum(-1) + linear.bias
    if linear.inv_freq is not None:
        u += (turn_back(key, positions, linear.inv_freq, linear.interleaved) * unrotated).sum(-1)
    return u + positions.float()[:, None] * linear.slope
