"""Everything that depends on vLLM's version, and every wrap of a vLLM class.

Contract: vLLM 0.32 and 0.33. Each wrap names what would make it unnecessary. Others use the names
below, as ``compat.NAME``. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from vllm_sparsek.compat.batch import (
    hook_prompt_lengths,
    prompt_lengths,
    to_device,
    with_requests,
)
from vllm_sparsek.compat.cache import add_score_cache, cache_numbers, hook_kv_cache_groups
from vllm_sparsek.compat.dense import (
    cpu_kernel_isa,
    dense_builder_class,
    dense_impl_class,
    dense_query,
    dense_takes_fp8,
    flash_attention_3,
)
from vllm_sparsek.compat.graphs import AttentionPath, DecodeGraphs, decode_graphs
from vllm_sparsek.compat.model import (
    ParentWatch,
    layer_index,
    layer_of,
    mark_compiled_graphs,
    max_decode_rows,
    num_layers,
    query_projection,
    sparsek_settings,
    total_kv_heads,
)
from vllm_sparsek.compat.selection import (
    BACKEND_PATH,
    NAME,
    hook_platform,
    is_selected,
    logger,
    register_backend,
)
from vllm_sparsek.compat.version import (
    UnsupportedVllmError,
    require_supported_vllm,
    vllm_version,
)
from vllm_sparsek.compat.warmup import at_startup, block_table_width

__all__ = [
    "BACKEND_PATH",
    "NAME",
    "AttentionPath",
    "DecodeGraphs",
    "ParentWatch",
    "UnsupportedVllmError",
    "add_score_cache",
    "at_startup",
    "block_table_width",
    "cache_numbers",
    "cpu_kernel_isa",
    "decode_graphs",
    "dense_builder_class",
    "dense_impl_class",
    "dense_query",
    "dense_takes_fp8",
    "flash_attention_3",
    "hook_kv_cache_groups",
    "hook_platform",
    "hook_prompt_lengths",
    "is_selected",
    "layer_index",
    "layer_of",
    "logger",
    "mark_compiled_graphs",
    "max_decode_rows",
    "num_layers",
    "prompt_lengths",
    "query_projection",
    "register_backend",
    "require_supported_vllm",
    "sparsek_settings",
    "to_device",
    "total_kv_heads",
    "vllm_version",
    "with_requests",
]
