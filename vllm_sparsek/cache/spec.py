"""KV cache spec of SparseK layers: full attention, except for what may be prefix-cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparsek import compat
from vllm_sparsek.config import SparseKConfig


@dataclass(frozen=True, kw_only=True)
class SparseKSpec(FullAttentionSpec):
    """Pages of a SparseK layer or of its score cache."""


@dataclass(frozen=True, kw_only=True)
class PromptCachedSpec(SparseKSpec):
    """Only blocks whose tokens were all read densely are prefix-cached.

    With dense prefill and sparse decode, the K/V of a generated token differ from what a
    prompt with the same tokens would give. Were they cached, a later request's answer would
    depend on whether an earlier one happened to generate its prompt.

    Attributes:
        dense_tokens: tokens at the start of every request that are read densely anyway.
    """

    dense_tokens: int = 0

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge the specs of a group's layers."""
        merge: Any = FullAttentionSpec.merge
        return replace_as(merge.__func__(FullAttentionSpec, specs), cls,
                          dense_tokens=specs[0].dense_tokens)  # fmt: skip


class PromptCachedManager(FullAttentionManager):
    """FullAttentionManager that stops caching blocks where a request turns sparse."""

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Cache full blocks of the prompt and of what was read densely after it."""
        assert isinstance(self.kv_cache_spec, PromptCachedSpec)
        dense = max(request.num_prompt_tokens, self.kv_cache_spec.dense_tokens)
        super().cache_blocks(
            request,
            min(num_tokens, dense),
            retention_interval=retention_interval,
            replay_boundaries=replay_boundaries,
        )


def sparsek_spec(spec: AttentionSpec, config: SparseKConfig, max_model_len: int) -> SparseKSpec:
    """The same pages under the rule for prefix caching that the settings ask for."""
    if config.sparse_prefill:
        return replace_as(spec, SparseKSpec)
    dense = config.first_sparse_position(spec.block_size, max_model_len)
    return replace_as(spec, PromptCachedSpec, dense_tokens=dense)


# the built-in specs register only while the list is empty: they must come first
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    SparseKSpec, FullAttentionManager, uniform_type_base_spec=FullAttentionSpec
)
KVCacheSpecRegistry.register(
    PromptCachedSpec, PromptCachedManager, uniform_type_base_spec=FullAttentionSpec
)
# processes that plan the cache unpickle these specs, so they import this module
compat.hook_kv_cache_groups(SparseKSpec)
