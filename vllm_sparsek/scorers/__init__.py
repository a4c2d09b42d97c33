"""Scorers by name. To add one: write a module with a ``Scorer``, name it here, test it.

Import-light on purpose: the configuration checks names before torch is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_sparsek.config import SparseKConfig
    from vllm_sparsek.scorers.base import Scorer

SCORERS = {
    "keydiff": "vllm_sparsek.scorers.keydiff.KeyDiffScorer",
    "knorm": "vllm_sparsek.scorers.knorm.KNormScorer",
    "recency": "vllm_sparsek.scorers.recency.RecencyScorer",
    "random": "vllm_sparsek.scorers.random.RandomScorer",
    "quest": "vllm_sparsek.scorers.quest.QuestScorer",
    "learned": "vllm_sparsek.scorers.learned.LearnedScorer",
}


def scorer_class(name: str) -> type[Scorer]:
    """The scorer class of a name in ``SCORERS``."""
    module, _, attribute = SCORERS[name].rpartition(".")
    return getattr(import_module(module), attribute)


def make_scorer(
    config: SparseKConfig,
    layer: int,
    num_kv_heads: int,
    head_dim: int,
    heads: slice,
    device: torch.device,
    hidden_size: int = 0,
) -> Scorer:
    """The scorer of one layer.

    Args:
        config: names the scorer and, for ``learned``, its file.
        layer: layer index.
        num_kv_heads: KV heads of the whole model.
        head_dim: D.
        heads: KV heads of this rank.
        device: device of the layer.
        hidden_size: width of the model's hidden states, for scorers that read them.
    """
    name = config.scorer_name
    if name == "learned":
        from vllm_sparsek.scorers.learned import load_layer

        assert config.scorer_path is not None
        return load_layer(
            config.scorer_path, layer, num_kv_heads, head_dim, heads, device, hidden_size
        )
    cls = scorer_class(name)
    return cls(seed=config.seed) if name == "random" else cls()  # type: ignore[call-arg]
