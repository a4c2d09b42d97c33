"""What a linear scorer is to the kernels: weights of one layer, and the rotation to undo."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearScore:
    """``u = w0 . R(-position) key + w1 . key + w2 . value + bias + slope * position``.

    R is the rotary position embedding (Su et al., arXiv 2104.09864); its angles are formed in
    float32, as models form them.

    Attributes:
        weight: [3, H, D] float32: w0, w1, w2 of every KV head.
        bias, slope: [H] float32.
        inv_freq: [rot / 2] float32, rotation per position of every pair, or None: w0 is not read.
        interleaved: pairs are (2j, 2j + 1), else (j, j + rot / 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    slope: torch.Tensor
    inv_freq: torch.Tensor | None = None
    interleaved: bool = False


def turn_back(
    key: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """R(-position) key; components beyond rot stay as they are.

    Sines and cosines are taken in float64 and rounded, which is the same however many positions
    there are.

    Args:
        key: [T, H, D] rotated; positions: [T]; inv_freq, interleaved: see ``LinearScore``.

    Returns:
        [T, H, D] float32.
    """
    angle = (positions.float()[:, None] * inv_freq).double()
    cos, sin = (x.float()[:, None] for x in (angle.cos(), angle.sin()))  # [T, 1, rot / 2]
    key, rot = key.float(), 2 * inv_freq.shape[0]
    axis = -1 if interleaved else -2
    a, b = key[..., :rot].unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(axis)
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=axis).flatten(-2)
    return torch.cat([turned, key[..., rot:]], dim=-1)
