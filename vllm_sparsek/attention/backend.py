"""The backend as vLLM sees it: capabilities only."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_sparsek import compat
from vllm_sparsek.attention.impl import SparseKImpl
from vllm_sparsek.attention.metadata import SparseKMetadataBuilder
from vllm_sparsek.attention.support import FP8_CACHES, HEAD_SIZES

compat.require_supported_vllm()


class SparseKBackend(AttentionBackend):
    """SparseK attention over vLLM's paged KV cache."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FP8_CACHES]

    @staticmethod
    def get_name() -> str:
        """Name of the enum member."""
        return compat.NAME

    @staticmethod
    def get_impl_cls() -> type[SparseKImpl]:
        """The implementation."""
        return SparseKImpl

    @staticmethod
    def get_builder_cls() -> type[SparseKMetadataBuilder]:
        """The metadata builder."""
        return SparseKMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Pages of any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes of the kernels."""
        return list(HEAD_SIZES)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Ampere and later."""
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Every (block, KV head) contiguous: one gather reads one token's K and V."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The same pages, with SparseK's rule for what may be prefix-cached."""
        from vllm_sparsek.attention.settings import current_settings
        from vllm_sparsek.cache.spec import sparsek_spec

        return sparsek_spec(spec, *current_settings())
