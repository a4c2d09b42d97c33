"""vllm-sparsek: learned sparse attention as a plugin for stock vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparsek.dense import attention_forward

__version__ = "0.1.0"
__all__ = ["__version__", "attention_forward"]


def __getattr__(name: str) -> Any:
    # torch is imported when the function is asked for: plugins are loaded in every process
    if name == "attention_forward":
        from vllm_sparsek.dense import attention_forward

        return attention_forward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
