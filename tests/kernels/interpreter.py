"""Runs Triton kernels without a GPU: must be imported before the kernels are."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies the bit patterns of bfloat16 numbers: float16 stands in there
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# numpy's matrix product rounds a row by where it lies in the tile, tensor cores do not
BITWISE = 0.0 if DEVICE == "cuda" else 2e-6
VARIABLE = "TRITON_INTERPRET"
# bounds takes select's kernel: it is imported after it
KERNEL_MODULES = (
    "score.triton", "select.triton", "bounds.triton", "decode.triton", "prefill.triton",
)  # fmt: skip


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """The interpreter's variable is set inside only: engine processes must not inherit it."""
    if DEVICE == "cuda":
        yield
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def use_interpreter() -> None:
    """Import the kernels so that they run in the interpreter where there is no GPU.

    Triton decides for every function when it is decorated. Its own library functions were
    decorated for a GPU if something (vllm, say) imported triton before: wrap those again.
    """
    if DEVICE == "cuda":
        return
    with interpreting():
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        wrapped: dict[str, InterpretedFunction] = {}
        for name, module in list(sys.modules.items()):
            if not name.startswith("triton.language"):
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    key = f"{value.fn.__module__}.{value.fn.__name__}"
                    wrapped.setdefault(key, InterpretedFunction(value.fn))
                    setattr(module, attribute, wrapped[key])
        assert not isinstance(tl.sum, JITFunction)

        import importlib

        # kernels that were imported for a GPU are imported anew
        prefix = "vllm_sparsek.kernels."
        for name in ("common.device", "common.dispatch", *KERNEL_MODULES):
            loaded = sys.modules.get(prefix + name)
            if loaded is not None:
                importlib.reload(loaded)
            else:
                importlib.import_module(prefix + name)
