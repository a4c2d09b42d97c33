"""The name of the backend, and how vLLM chooses it for a layer."""

from __future__ import annotations

import copyreg
import functools
import logging
from typing import TYPE_CHECKING, Any

from vllm_sparsek.compat.version import SUPPORTED_TEXT, require_supported_vllm, vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

NAME = "SPARSEK"
BACKEND_PATH = "vllm_sparsek.attention.backend.SparseKBackend"

logger = logging.getLogger("vllm.sparsek")


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
