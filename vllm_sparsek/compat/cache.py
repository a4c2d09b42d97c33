"""The KV cache: what it holds, the score cache beside it, and how layers are grouped."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def cache_numbers(cache: torch.Tensor) -> torch.Tensor:
    """A KV cache as the numbers it holds: vLLM allocates float8_e4m3fn as uint8."""
    import torch

    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def add_score_cache(
    vllm_config: VllmConfig,
    layer_name: str,
    num_kv_heads: int,
    head_dim: int,
    key_dtype: torch.dtype,
    config: Any,
) -> Any:
    """Give an attention layer a sibling that owns its paged score cache.

    vLLM allocates a cache for every layer of the static forward context; one with the same
    kind of spec and block size joins the attention layer's group and shares its block ids.
    """
    from vllm_sparsek.cache.scores import ScoreCache

    context = vllm_config.compilation_config.static_forward_context
    cache = ScoreCache(f"{layer_name}.sparsek_scores", num_kv_heads, head_dim, key_dtype, config)
    context[cache.layer_name] = cache
    return cache


def hook_kv_cache_groups(spec_class: type) -> None:
    """Keep SparseK layers, their score caches and layers with a sliding window in one group.

    vLLM gives each kind of layer a group with block ids of its own and makes the pages of all
    groups equally large. A score cache would leave its layer's group and its blocks would be
    somebody else's memory. In one group, as with ``--disable-hybrid-kv-cache-manager``, block
    ids and page sizes stay as they are; layers with a sliding window keep their whole context.
    Ends when vLLM lets a layer's second cache follow the first into its group.

    Args:
        spec_class: the spec of SparseK layers and score caches.
    """
    try:
        # 0.33: every grouping goes through one function, whichever builder makes it
        planning: Any = importlib.import_module("vllm.v1.core.kv_cache_planning")
        name = "get_kv_cache_groups_from_builder"
    except ModuleNotFoundError:
        planning = importlib.import_module("vllm.v1.core.kv_cache_utils")
        name = "get_kv_cache_groups"
    original = getattr(planning, name)
    if hasattr(original, "sparsek_original"):
        return

    @functools.wraps(original)
    def group_layers(*args: Any) -> Any:
        kv_cache_spec: dict[str, Any] = args[-1]
        ours = {n: spec for n, spec in kv_cache_spec.items() if isinstance(spec, spec_class)}
        if ours and len(ours) < len(kv_cache_spec):
            planning.unify_hybrid_kv_cache_specs(kv_cache_spec)
            # a group's manager follows its first layer, and ours knows what may be prefix-cached
            ordered = {**ours, **kv_cache_spec}
            kv_cache_spec.clear()
            kv_cache_spec.update(ordered)
        groups = original(*args)
        if ours and len(groups) > 1:
            raise RuntimeError(
                "sparsek: vLLM split the layers of this model into several KV cache groups, "
                "which is not supported yet: serve without --attention-backend sparsek."
            )
        return groups

    group_layers.sparsek_original = original  # type: ignore[attr-defined]
    setattr(planning, name, group_layers)
