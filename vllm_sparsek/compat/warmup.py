"""Work that vLLM does before it serves: kernels of layers compile while nobody waits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def at_startup(call: Callable[[], None]) -> None:
    """Have vLLM make ``call`` once before it serves, when its KV caches are allocated.

    Must be called while the runner builds its model. Calls that are equal, and hash alike, are made
    once. None is made where JIT warm-up is off (``kernel_config.enable_jit_warmup``, which
    ``--enforce-eager`` turns off). An exception of ``call`` ends the start.
    """
    _warmups().register_warmup(call)


@functools.cache
def _warmups() -> Any:
    from vllm.model_executor.warmup.jit_warmup import VllmJitKernel

    class SparseKWarmup(VllmJitKernel[Callable[[], None]]):
        """To vLLM's registry a kernel; what it calls a key to compile is a call to make."""

        def get_warmup_keys(self, call: Callable[[], None]) -> list[Callable[[], None]]:
            return [call]

        def compile(self, compile_key: Callable[[], None]) -> None:
            compile_key()

    return SparseKWarmup()


def block_table_width(tokens: int, page: int) -> int:
    """Columns of the block tables of runners whose requests have up to ``tokens`` tokens."""
    from vllm.v1.worker.block_table import get_block_table_width

    return get_block_table_width(-(-tokens // page), page)
