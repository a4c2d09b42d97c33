"""The model and its layers, as vLLM's configuration and modules describe them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def sparsek_settings(vllm_config: VllmConfig) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """(checkpoint's sparsek_config, additional_config["sparsek"], checkpoint folder)."""
    import os

    additional = vllm_config.additional_config
    direct = additional.get("sparsek", {}) if isinstance(additional, dict) else {}
    model = vllm_config.model_config
    checkpoint = getattr(model.hf_config, "sparsek_config", None) or {}
    folder = model.model if os.path.isdir(model.model) else None
    return checkpoint, direct, folder


def total_kv_heads(vllm_config: VllmConfig, local_heads: int) -> tuple[int, slice]:
    """KV heads of the whole model, and those this tensor-parallel rank holds."""
    size = vllm_config.parallel_config.tensor_parallel_size
    if size == 1:
        return local_heads, slice(0, local_heads)
    from vllm.distributed import get_tensor_model_parallel_rank

    total = vllm_config.model_config.get_total_num_kv_heads()
    rank = get_tensor_model_parallel_rank()
    # with fewer KV heads than ranks, vLLM gives neighbouring ranks copies of one head
    first = rank * total // size
    return total, slice(first, first + local_heads)


def num_layers(vllm_config: VllmConfig) -> int:
    """Layers on this pipeline-parallel rank."""
    return vllm_config.model_config.get_num_layers(vllm_config.parallel_config)


def layer_index(layer_name: str) -> int:
    """Index of a layer from its name (``model.layers.7.self_attn.attn`` -> 7)."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def max_decode_rows(vllm_config: VllmConfig) -> int:
    """Most rows of a decode batch, CUDA graph padding included."""
    return max(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )


def mark_compiled_graphs(vllm_config: VllmConfig, mark: str) -> None:
    """Keep graphs that were compiled under another ``mark`` from being used.

    vLLM finds compiled graphs by a hash that knows nothing of scorer files.
    """
    additional = vllm_config.additional_config
    if isinstance(additional, dict):
        vllm_config.additional_config = {**additional, "sparsek_graph": mark}


def layer_of(impl: Any, vllm_config: VllmConfig) -> tuple[str, Any]:
    """(name, layer) of the attention layer that owns ``impl``.

    vLLM tells an implementation neither; both are in the static forward context once the
    model is built.
    """
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise RuntimeError("sparsek: an attention layer is not in vLLM's static forward context")


class ParentWatch:
    """Waits for the attention layer that owns an implementation to become part of a module.

    Ends when vLLM tells an implementation of its layer's neighbours.

    Attributes:
        parent: the module, or None until then.
    """

    def __init__(self, impl: Any) -> None:
        from torch.nn.modules.module import register_module_module_registration_hook

        self.parent: torch.nn.Module | None = None
        self._impl = impl
        self._handle = register_module_module_registration_hook(self._registered)

    def _registered(self, module: Any, name: str, child: Any) -> None:
        if getattr(child, "impl", None) is self._impl:
            self.parent = module

    def stop(self) -> torch.nn.Module | None:
        """Stop waiting; returns ``parent``."""
        self._handle.remove()
        return self.parent


def query_projection(parent: torch.nn.Module) -> torch.nn.Module | None:
    """The projection of an attention module that makes the queries, or None."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    children = dict(parent.named_children())
    for child in children.values():
        if isinstance(child, QKVParallelLinear):
            return child
    return children.get("q_proj")
