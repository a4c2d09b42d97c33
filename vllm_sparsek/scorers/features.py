"""What a fitted scorer sees of a token: names of features to numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.write.linear import turn_back


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, to be undone (Su et al., arXiv 2104.09864).

    Attributes:
        inv_freq: [rot / 2] float32, rotation per position of every pair.
        interleaved: pairs are (2j, 2j + 1) (GPT-J), else (j, j + rot / 2) (GPT-NeoX).
    """

    inv_freq: torch.Tensor
    interleaved: bool

    def undo(self, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """R(-position) key [T, H, D], positions [T]: [T, H, D] float32."""
        return turn_back(key, positions, self.inv_freq, self.interleaved)


def concatenate(
    names: tuple[str, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    hidden: torch.Tensor | None,
    rope: Rope | None,
) -> torch.Tensor:
    """The features of tokens, side by side.

    Args:
        names: from ``scorer_file.FEATURES``, in order.
        key, value: [T, H, D]; positions: [T].
        hidden: [T, E], needed by ``hidden``; rope: needed by ``key_unrotated``.

    Returns:
        [T, H, W] float32; [T, 1, W] if no feature depends on the KV head.
    """
    parts = []
    for name in names:
        if name == "hidden":
            if hidden is None:
                raise ValueError("this scorer reads hidden states, and none were given")
            parts.append(hidden.float()[:, None])
        elif name == "key_unrotated":
            assert rope is not None
            parts.append(rope.undo(key, positions))
        else:
            parts.append((key if name == "key" else value).float())
    heads = max(part.shape[1] for part in parts)
    return torch.cat([part.expand(-1, heads, -1) for part in parts], dim=-1)
