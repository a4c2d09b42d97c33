"""What SparseK attention does not do yet: one clear error each, before weights load."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionType

from vllm_sparsek import compat

HEAD_SIZES = (64, 80, 96, 128, 256)
# --kv-cache-dtype: two names of float8_e4m3fn with one scale a layer for keys, one for values
FP8_CACHES = ("fp8", "fp8_e4m3")
WITHOUT = "or serve without --attention-backend sparsek"


class UnsupportedError(ValueError):
    """A feature SparseK attention lacks; names the feature and the setting that helps."""


def _refuse(feature: str, remedy: str) -> NoReturn:
    raise UnsupportedError(f"sparsek attention does not support {feature} yet: {remedy}.")


def _refuse_unsupported_type(attn_type: str) -> None:
    if attn_type == AttentionType.ENCODER_DECODER:
        _refuse("cross attention", "serve without --attention-backend sparsek")
    if attn_type != AttentionType.DECODER:
        _refuse("encoder attention", "serve without --attention-backend sparsek")


def refuse_unsupported_layer(layer: Any, device_type: str) -> None:
    """Check one layer at backend selection.

    Args:
        layer: vLLM's AttentionSelectorConfig.
        device_type: "cuda" or "cpu".

    Raises:
        UnsupportedError: names the feature and what to do.
    """
    if layer.use_mla:
        _refuse("MLA models", "serve without --attention-backend sparsek")
    _refuse_unsupported_type(layer.attn_type)
    if layer.has_sliding_window:
        _refuse(
            "models whose every layer has a sliding window",
            f"pass --disable-sliding-window, {WITHOUT}",
        )
    if layer.has_sink:
        _refuse("learned attention sinks (gpt-oss)", "serve without --attention-backend sparsek")
    if layer.use_mm_prefix:
        _refuse("bidirectional image prefixes", "serve without --attention-backend sparsek")
    if layer.use_non_causal:
        _refuse("non-causal attention", "serve without --attention-backend sparsek")
    if layer.use_rswa:
        _refuse("reference sliding windows", "serve without --attention-backend sparsek")
    if layer.kv_cache_dtype in FP8_CACHES:
        _refuse_unsupported_fp8(layer, device_type)
    elif layer.kv_cache_dtype not in (None, "auto", "float16", "bfloat16"):
        _refuse(
            f"a {layer.kv_cache_dtype} KV cache",
            f"pass --kv-cache-dtype fp8 (e4m3, one scale a layer) or auto, {WITHOUT}",
        )
    if layer.use_kv_connector:
        _refuse("KV connectors", f"drop --kv-transfer-config, {WITHOUT}")
    if layer.use_pcp or layer.use_dcp:
        _refuse("context parallelism", f"set the context parallel sizes to 1, {WITHOUT}")
    if layer.use_batch_invariant:
        _refuse("VLLM_BATCH_INVARIANT", f"unset it, {WITHOUT}")
    if layer.head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        _refuse(f"head_dim {layer.head_size}", f"supported are {sizes}; serve without it")
    if layer.dtype == torch.float32 and device_type == "cuda":
        _refuse("float32 on CUDA", f"pass --dtype bfloat16 or float16, {WITHOUT}")
    if layer.block_size is not None and layer.block_size % 16:
        _refuse(f"--block-size {layer.block_size}", "use a multiple of 16")


def _refuse_unsupported_fp8(layer: Any, device_type: str) -> None:
    remedy = f"pass --kv-cache-dtype auto, {WITHOUT}"
    if device_type != "cuda":
        _refuse(f"an {layer.kv_cache_dtype} KV cache on the CPU", remedy)
    if layer.use_per_head_quant_scales:
        _refuse("KV cache scales per head", remedy)
    # our kernels take one from 8.9 on; queries that read densely need vLLM's
    if not compat.dense_takes_fp8():
        _refuse(
            f"an {layer.kv_cache_dtype} KV cache on this GPU (vLLM's FlashAttention, which reads "
            "short contexts, takes one on compute capability 9.0 and 10.x)",
            remedy,
        )


def refuse_unsupported_impl(
    vllm_config: VllmConfig,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    extra: dict[str, Any],
) -> None:
    """Check what vLLM only tells the implementation's constructor.

    Raises:
        UnsupportedError: names the feature and what to do.
    """
    _refuse_unsupported_type(attn_type)
    if alibi_slopes is not None:
        _refuse("ALiBi", "serve without --attention-backend sparsek")
    if logits_soft_cap:
        _refuse("logit soft caps", "serve without --attention-backend sparsek")
    if kv_sharing_target_layer_name is not None:
        _refuse("layers that share another layer's KV cache",
                "serve without --attention-backend sparsek")  # fmt: skip
    given = [name for name, value in extra.items() if value is not None]
    if given:
        _refuse(f"attention with {', '.join(given)}", "serve without --attention-backend sparsek")
    refuse_unsupported_config(vllm_config)


def refuse_unsupported_config(vllm_config: VllmConfig) -> None:
    """Check what the configuration alone tells, before a model or an engine process exists.

    Raises:
        UnsupportedError: names the feature and what to do.
    """
    if vllm_config.speculative_config is not None:
        _refuse("speculative decoding", f"drop --speculative-config, {WITHOUT}")
    if vllm_config.kv_transfer_config is not None:
        _refuse("KV connectors", f"drop --kv-transfer-config, {WITHOUT}")
    if vllm_config.model_config.is_hybrid:
        _refuse("models that mix attention with state-space layers",
                "serve without --attention-backend sparsek")  # fmt: skip
    if vllm_config.parallel_config.enable_dbo:
        _refuse("dual batch overlap", f"drop --enable-dbo, {WITHOUT}")
    cache = vllm_config.cache_config
    if cache.cache_dtype in FP8_CACHES and cache.kv_cache_dtype_skip_layers:
        _refuse("layers without an fp8 KV cache beside layers with one",
                f"drop --kv-cache-dtype-skip-layers, {WITHOUT}")  # fmt: skip
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        _refuse("context parallelism", f"set the context parallel sizes to 1, {WITHOUT}")


def refuse_unsupported_with_hidden(vllm_config: VllmConfig) -> None:
    """Check what a scorer that reads hidden states excludes.

    Raises:
        UnsupportedError: names the feature and what to do.
    """
    # LoRA layers call the projection's parts, not the projection
    if vllm_config.lora_config is not None:
        _refuse("LoRA with a scorer that reads hidden states",
                "use a scorer of key and value, or drop --enable-lora")  # fmt: skip


def refuse_without_projection(layer_name: str) -> NoReturn:
    """Refuse a model whose attention has no projection to take hidden states from.

    Raises:
        UnsupportedError: names the layer and what to do.
    """
    _refuse(f"a scorer that reads hidden states in {layer_name}, which has no qkv_proj or q_proj",
            "use a scorer of key and value")  # fmt: skip
