"""A scorer fitted to a model: linear or a small MLP on features of one token.

``scorer_file`` describes the file; KVzap (arXiv 2601.07891) published scorers of
this kind on the hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from vllm_sparsek.kernels.score import api
from vllm_sparsek.kernels.write import api as write_api
from vllm_sparsek.kernels.write.linear import LinearScore
from vllm_sparsek.scorers import features
from vllm_sparsek.scorers.base import ScoreBatch, Scorer
from vllm_sparsek.scorers.scorer_file import ScorerFileError
from vllm_sparsek.scorers.scorer_reader import ScorerReader

# elements of the widest intermediate tensor: tokens are scored in slices of this size
SLICE_ELEMENTS = 1 << 24
# features by their place in ``LinearScore.weight``
IN_KERNEL = ("key_unrotated", "key", "value")


@dataclass(frozen=True)
class LearnedScorer(Scorer):
    """One layer's scorer: ``w2 . act(w1 x + b1) + b2``, or ``w . x + b`` without w1.

    A score is the same to the last bit however many tokens are scored with it: see
    ``kernels.score.api.project``.

    Attributes:
        weight: [H, W] (linear) or [H, m] (MLP) float32; bias: [H] float32.
        hidden_weight: [H or 1, m, W] or None; hidden_bias: [H or 1, m] or None; float32, on the
            CPU float64, which ``project`` needs there.
        activation: of the MLP, ``relu`` or ``gelu``.
        slope: [H] float32 score added per position, or None.
        inputs: features in order, see ``scorer_file``.
        rope: rotation to undo, needed by ``key_unrotated``.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    hidden_weight: torch.Tensor | None = None
    hidden_bias: torch.Tensor | None = None
    activation: str = "relu"
    slope: torch.Tensor | None = None
    inputs: tuple[str, ...] = ("key", "value")
    rope: features.Rope | None = None
    trained: ClassVar[bool] = True

    @property
    def reads_hidden(self) -> bool:
        """See ``Scorer.reads_hidden``."""
        return "hidden" in self.inputs

    @property
    def writes_kv(self) -> bool:
        """See ``Scorer.writes_kv``."""
        return self.linear is not None

    @cached_property
    def linear(self) -> LinearScore | None:
        """What the kernel that writes keys, values and scores takes; None if it is more."""
        if self.hidden_weight is not None or self.reads_hidden:
            return None
        heads, head_dim = self.weight.shape[0], self.weight.shape[1] // len(self.inputs)
        weight = self.weight.new_zeros(3, heads, head_dim)
        for name, part in zip(self.inputs, self.weight.split(head_dim, dim=1), strict=True):
            weight[IN_KERNEL.index(name)] += part
        slope = torch.zeros_like(self.bias) if self.slope is None else self.slope
        if "key_unrotated" not in self.inputs or self.rope is None:
            return LinearScore(weight, self.bias, slope)
        return LinearScore(weight, self.bias, slope, self.rope.inv_freq, self.rope.interleaved)

    def score(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``Scorer.score``; hidden: [T, E] in the model's dtype if ``reads_hidden``."""
        width = self.weight.shape[1] if self.hidden_weight is None else self.hidden_weight.shape[2]
        step = max(1, SLICE_ELEMENTS // (width * self.weight.shape[0]))
        scores = key.new_empty((key.shape[0], self.weight.shape[0]), dtype=torch.float32)
        for low in range(0, key.shape[0], step):
            part = slice(low, low + step)
            x = features.concatenate(
                self.inputs, key[part], value[part], positions[part],
                None if hidden is None else hidden[part], self.rope,
            )  # fmt: skip
            if self.hidden_weight is not None and self.hidden_bias is not None:
                x = self._hidden_layer(x, self.hidden_weight, self.hidden_bias)
            heads = self.weight.shape[0]
            scores[part] = api.project(
                x.expand(-1, heads, -1), self.weight[:, None], self.bias[:, None]
            )[..., 0]
        if self.slope is not None:
            scores += positions.float()[:, None] * self.slope
        return scores

    def _hidden_layer(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """[T, H or 1, W] -> [T, H or 1, m] float32."""
        heads = max(x.shape[1], weight.shape[0])
        x = api.project(
            x.expand(-1, heads, -1), weight.expand(heads, -1, -1), bias.expand(heads, -1)
        )
        return x.relu() if self.activation == "relu" else torch.nn.functional.gelu(x)

    def write(self, batch: ScoreBatch) -> None:
        """See ``Scorer.write``."""
        assert batch.scores is not None
        if self.linear is not None:
            write_api.write_tokens(
                batch.key, batch.value, batch.positions, batch.slot_mapping, self.linear,
                batch.kv_cache, batch.scores, batch.kv_scales,
            )  # fmt: skip
            return
        scores = self.score(batch.key, batch.value, batch.positions, batch.hidden)
        api.write_scores(scores, batch.slot_mapping, batch.scores)


def load_layer(
    path: str,
    layer: int,
    num_kv_heads: int,
    head_dim: int,
    heads: slice | None = None,
    device: torch.device | str = "cpu",
    hidden_size: int = 0,
) -> LearnedScorer:
    """Read one layer's scorer.

    Args:
        path: the scorer file.
        layer: layer index.
        num_kv_heads: KV heads of the whole model, before tensor parallelism.
        head_dim: D.
        heads: the KV heads of this rank; default all.
        device: where the tensors go.
        hidden_size: E, needed by scorers that read ``hidden``.

    Raises:
        ScorerFileError: no such file, not a scorer file, a missing layer, a wrong shape, NaN.
    """
    heads = slice(None) if heads is None else heads
    with ScorerReader(path) as file:
        header, h = file.header, num_kv_heads

        def tensor(name: str, *shape: int | None) -> torch.Tensor:
            t = file.tensor(f"layers.{layer}.{name}", shape)
            return (t[heads] if t.shape[0] == h else t).contiguous().to(device)

        width = header.width(head_dim, hidden_size)
        w1 = b1 = None
        if header.kind == "linear":
            weight, bias = tensor("weight", h, width), tensor("bias", h)
        else:
            # one hidden layer for all heads, or one for every head
            own = 1 if file.shape(f"layers.{layer}.w1")[:1] == [1] else h
            w1 = tensor("w1", own, None, width)
            b1 = tensor("b1", own, w1.shape[1])
            weight, bias = tensor("w2", h, w1.shape[1]), tensor("b2", h)
            if w1.device.type == "cpu":
                w1, b1 = w1.double(), b1.double()
        slope = None
        if f"layers.{layer}.slope" in file.names:
            slope = tensor("slope", h) + header.position_slope
        elif header.position_slope:
            slope = torch.full_like(bias, header.position_slope)
        rope = None
        if header.rope is not None:
            inv_freq = file.tensor("inv_freq", (None,)).to(device)
            if 2 * inv_freq.shape[0] > head_dim:
                raise ScorerFileError(
                    f"sparsek: {path}: inv_freq has {inv_freq.shape[0]} entries, more than half "
                    f"of head_dim {head_dim}: it was fitted to another model."
                )
            rope = features.Rope(inv_freq, header.rope == "gptj")
    return LearnedScorer(weight, bias, w1, b1, header.activation, slope, header.features, rope)
