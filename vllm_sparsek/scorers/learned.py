"""A scorer fitted to a model: linear or a small MLP on [k, v] of the token's KV head.

File format (safetensors), one set of tensors a layer, ``H`` KV heads, ``D`` head_dim:

    layers.{i}.weight [H, 2 * D]   layers.{i}.bias [H]                          (linear)
    layers.{i}.w1 [H, hidden, 2 * D]  .b1 [H, hidden]  .w2 [H, hidden]  .b2 [H]   (mlp)

Metadata: ``format`` = ``sparsek-scorer-v1``, ``kind`` = ``linear`` or ``mlp``, ``input`` =
``key_value`` (rotated keys, as a backend sees them), optional ``position_slope`` (added score
per position).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from vllm_sparsek.scorers.base import Scorer

FORMAT = "sparsek-scorer-v1"


class ScorerFileError(ValueError):
    """A scorer file that does not fit; the message names the file and the tensor."""


@dataclass(frozen=True)
class LearnedScorer(Scorer):
    """One layer's scorer: ``w2 . relu(w1 [k, v] + b1) + b2``, or ``w . [k, v] + b`` without w1.

    Attributes:
        weight: [H, 2 * D] (linear) or [H, hidden] (MLP) float32; bias: [H].
        hidden_weight: [H, hidden, 2 * D] or None; hidden_bias: [H, hidden] or None; float64:
            how a matrix product rounds depends on the number of tokens, and a score must not.
        position_slope: score added per position.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    hidden_weight: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None
    position_slope: float = 0.0
    trained: ClassVar[bool] = True

    def score(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See ``Scorer.score``."""
        x = torch.cat([key, value], dim=-1).float()  # [T, H, 2D]
        if self.hidden_weight is not None and self.hidden_bias is not None:
            x = torch.einsum("thd,hmd->thm", x.double(), self.hidden_weight) + self.hidden_bias
            x = x.relu().float()
        scores = (x * self.weight).sum(-1) + self.bias
        if self.position_slope:
            scores = scores + positions.float()[:, None] * self.position_slope
        return scores


def load_layer(
    path: str,
    layer: int,
    num_kv_heads: int,
    head_dim: int,
    heads: slice | None = None,
    device: torch.device | str = "cpu",
) -> LearnedScorer:
    """Read one layer's scorer.

    Args:
        path: the safetensors file.
        layer: layer index.
        num_kv_heads: KV heads of the whole model, before tensor parallelism.
        head_dim: D.
        heads: the KV heads of this rank; default all.
        device: where the tensors go.

    Raises:
        ScorerFileError: no such file, not a scorer file, a missing layer, a wrong shape, NaN.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ScorerFileError(f"sparsek: scorer_path {path}: no such file.")
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ScorerFileError(f"sparsek: {path} is not a safetensors file: {error}") from None
    with file:
        meta = file.metadata() or {}
        if meta.get("format") != FORMAT:
            raise ScorerFileError(
                f"sparsek: {path} is not a scorer file: metadata format is "
                f"{meta.get('format')!r}, expected {FORMAT!r}."
            )
        if meta.get("input", "key_value") != "key_value":
            raise ScorerFileError(
                f"sparsek: {path} scores {meta['input']!r}; this version supports key_value."
            )
        kind, width = meta.get("kind", "linear"), 2 * head_dim
        names = set(file.keys())

        def tensor(name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
            full = f"layers.{layer}.{name}"
            if full not in names:
                found = {re.match(r"layers\.(\d+)\.", n) for n in names}
                layers = sorted(int(match[1]) for match in found if match)
                known = f"layers {layers[0]}..{layers[-1]}" if layers else "no layers"
                raise ScorerFileError(
                    f"sparsek: {path} has no tensor {full} (it has {known}): it was fitted "
                    "to another model."
                )
            t = file.get_tensor(full).float()
            if len(t.shape) != len(shape) or any(
                want is not None and want != got for want, got in zip(shape, t.shape, strict=True)
            ):
                needs = ", ".join("any" if size is None else str(size) for size in shape)
                raise ScorerFileError(
                    f"sparsek: {path}: tensor {full} has shape {list(t.shape)}, the model "
                    f"needs [{needs}]: it was fitted to another model."
                )
            if not torch.isfinite(t).all():
                raise ScorerFileError(f"sparsek: {path}: tensor {full} holds NaN or infinity.")
            return t[heads if heads is not None else slice(None)].contiguous().to(device)

        try:
            slope = float(meta.get("position_slope", 0.0))
        except ValueError:
            raise ScorerFileError(
                f"sparsek: {path}: position_slope is {meta['position_slope']!r}, not a number."
            ) from None
        h = num_kv_heads
        if kind == "linear":
            return LearnedScorer(tensor("weight", (h, width)), tensor("bias", (h,)),
                                 position_slope=slope)  # fmt: skip
        if kind == "mlp":
            w1 = tensor("w1", (h, None, width))
            hidden = w1.shape[1]
            return LearnedScorer(tensor("w2", (h, hidden)), tensor("b2", (h,)), w1.double(),
                                 tensor("b1", (h, hidden)).double(), slope)  # fmt: skip
        raise ScorerFileError(f"sparsek: {path}: unknown kind {kind!r}; known are linear, mlp.")
