"""The score cache: a sibling layer whose blocks have the same ids as the KV blocks.

It is counted when vLLM sizes the KV cache, and shared, prefix-cached and freed with its block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_sparsek import compat
from vllm_sparsek.cache.spec import sparsek_spec
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.score_pages import (
    bounds_per_token,
    floats_per_token,
    split_bounds_cache,
    split_score_cache,
)
from vllm_sparsek.scorers import scorer_class


class ScoreViews(NamedTuple):
    """What a layer's score cache holds; which of them is not None depends on the scorer.

    Attributes:
        scores: [num_blocks, H, page] float32; anchors: [num_blocks, H, D] float32.
        bounds: [num_blocks, H, page // unit, 2, D] in the KV cache's dtype, of an fp8 cache
            before its scale.
    """

    scores: torch.Tensor | None = None
    anchors: torch.Tensor | None = None
    bounds: torch.Tensor | None = None


class ScoreCacheBuilder(AttentionMetadataBuilder[None]):
    """Needs no metadata of its own; never lowers the CUDA graph support of the group."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> None:
        """Nothing to build."""
        return None


class ScoreCacheBackend(AttentionBackend):
    """What vLLM asks of a layer that owns a cache."""

    @staticmethod
    def get_name() -> str:
        """Name in logs."""
        return "SPARSEK_SCORES"

    @staticmethod
    def get_impl_cls() -> Any:
        """Scores are read and written by the attention layer itself."""
        raise NotImplementedError("the score cache has no forward of its own")

    @staticmethod
    def get_builder_cls() -> type[ScoreCacheBuilder]:
        """The builder."""
        return ScoreCacheBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """As the attention backend's."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """As the attention backend's."""
        return (KVCacheLayout.LBHNC,)


class ScoreCache(nn.Module, AttentionLayerBase):
    """Paged scores (and anchors) of one attention layer, or bounds of its keys.

    Attributes:
        kv_cache: [num_blocks, 1, page, numbers per token], bound by vLLM: float32, or the
            KV cache's dtype for bounds.
    """

    def __init__(
        self,
        layer_name: str,
        num_kv_heads: int,
        head_dim: int,
        key_dtype: torch.dtype,
        config: SparseKConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_name = layer_name
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.key_dtype = key_dtype
        self.scorer = scorer_class(config.scorer_name)
        self.anchor_dim = head_dim if self.scorer.needs_anchor else 0
        self.kv_cache = torch.tensor([])
        self._views: ScoreViews | None = None

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The cache's backend."""
        return ScoreCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Key-only pages of the main block size."""
        page = vllm_config.cache_config.block_size
        if self.scorer.query_aware:
            unit = self.config.budget(page).unit
            width = bounds_per_token(self.num_kv_heads, page, unit, self.head_dim)
            dtype = self.key_dtype
        else:
            width = floats_per_token(self.num_kv_heads, page, self.anchor_dim)
            dtype = torch.float32
        spec = FullAttentionSpec(
            block_size=page, num_kv_heads=1, head_size=width, head_size_v=0, dtype=dtype
        )
        return sparsek_spec(spec, self.config, vllm_config.model_config.max_model_len)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the allocated tensor."""
        self.kv_cache = kv_cache
        if self.scorer.query_aware:
            unit = self.config.budget(kv_cache.shape[2]).unit
            bounds = split_bounds_cache(kv_cache, self.num_kv_heads, unit, self.head_dim)
            self._views = ScoreViews(bounds=compat.cache_numbers(bounds))
        else:
            self._views = ScoreViews(
                *split_score_cache(kv_cache, self.num_kv_heads, self.anchor_dim)
            )

    def views(self) -> ScoreViews:
        """What the scorer writes and selection reads."""
        assert self._views is not None, "the score cache is read before vLLM allocated it"
        return self._views
