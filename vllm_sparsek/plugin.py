"""Entry points that vLLM calls in every one of its processes. Import-light and idempotent."""

from __future__ import annotations


def register() -> None:
    """``vllm.general_plugins``: make ``--attention-backend sparsek`` known to this process."""
    from vllm_sparsek import compat

    compat.register_backend()
    compat.hook_platform()


def platform_hook() -> None:
    """``vllm.platform_plugins``: registers the name early; never claims the platform.

    ``LLM(attention_config=...)`` and ``vllm bench`` validate their configuration before
    general plugins are loaded. vLLM swallows exceptions raised here.
    """
    from vllm_sparsek import compat

    compat.register_backend()
