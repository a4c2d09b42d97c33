"""Specification of write: what the caches hold of a new token."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.gather import scale_numbers
from vllm_sparsek.kernels.common.validate import FP8
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
) -> None:
    """Store keys, values and scores of new tokens.

    The score is that of the token as it came, not of what an fp8 cache keeps of it, and must
    not depend on the tokens beside it, to the last bit.

    Args:
        key, value: [T, H, D]; keys are rotated.
        positions: [T] int32 absolute positions.
        slot_mapping: [>= T] int64, physical slot of every token; -1 is padding.
        linear: the scorer.
        kv_cache: [num_blocks, H, page, 2 * D], written in place.
        scores: [num_blocks, H, page] float32, written in place.
        kv_scales: of an fp8 cache: its numbers times k_scale, v_scale are keys and values.
    """
    page = kv_cache.shape[2]
    for token, slot in enumerate(slot_mapping[: key.shape[0]].tolist()):
        if slot < 0:
            continue
        block, offset, position = slot // page, slot % page, int(positions[token])
        k, v = key[token].double(), value[token].double()  # [H, D]
        if kv_scales is None:
            held = torch.cat([key[token], value[token]], dim=-1)
        else:
            k_scale, v_scale = scale_numbers(kv_scales)
            most = torch.finfo(FP8).max
            held = torch.cat([k / k_scale, v / v_scale], dim=-1).float().clamp(-most, most)
        kv_cache[block, :, offset] = held.to(kv_cache.dtype)
        unrotated, by_key, by_value = linear.weight.double()
        u = (by_key * k + by_value * v).sum(-1) + linear.bias.double()
        u += linear.slope.double() * position
        if linear.inv_freq is not None:
            u += (unrotated * turn_back(k, position, linear.inv_freq, linear.interleaved)).sum(-1)
        scores[block, :, offset] = u.float()


def turn_back(
    key: torch.Tensor, position: int, inv_freq: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """R(-position) key [H, D] float64, pair by pair; what belongs to no pair stays."""
    key, pairs = key.clone(), inv_freq.shape[0]
    for j in range(pairs):
        first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + pairs)
        angle = (torch.tensor(float(position)) * inv_freq[j].cpu()).double()
        a, b = key[:, first].clone(), key[:, second].clone()
        key[:, first] = a * angle.cos() + b * angle.sin()
        key[:, second] = b * angle.cos() - a * angle.sin()
    return key
