"""Runs Triton kernels without a GPU: must be imported before the kernels are."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator

import torch

from vllm_sparsek import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter multiplies the bit patterns of bfloat16 numbers: float16 stands in there
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# numpy's matrix product rounds a row by where it lies in the tile, tensor cores do not
BITWISE = 0.0 if DEVICE == "cuda" else 2e-6
VARIABLE = "TRITON_INTERPRET"
# modules of these names hold device code or launch it; each imports from those before it
LAYERS = (
    "pooling", "device", "early_launch", "sifting", "expiry", "dispatch", "page_tables", "triton",
    "fa3",
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
    decorated for a GPU if something (vllm, say) imported triton before: wrap those again. The
    kernels are imported for a GPU and then again, so that one run shows what any order would.
    """
    if DEVICE == "cuda":
        return
    # Gluon has no interpreter, and takes no functions of Triton's that were wrapped for it: its
    # kernels are imported before, to be compiled
    importlib.import_module("vllm_sparsek.kernels.prefill.hopper")
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

        for module in map(importlib.import_module, kernel_modules()):
            importlib.reload(module)
            native = [
                name for name, value in vars(module).items() if isinstance(value, JITFunction)
            ]
            assert not native, f"{module.__name__}: {native} would not run in the interpreter"


def kernel_modules() -> list[str]:
    """Modules that hold device code or launch it, those that others import first."""
    found = (
        info.name
        for info in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + ".")
        if info.name.rpartition(".")[2] in LAYERS
    )
    # the common room first within a layer
    return sorted(
        found, key=lambda name: (LAYERS.index(name.rpartition(".")[2]), "common" not in name)
    )
