"""Which implementation of an operation runs, and the checks that all of them share."""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch

IMPLEMENTATIONS = ("triton", "cpu", "reference")
# engines of attention beside our Triton kernels: FlashAttention-3, and what needs a Hopper GPU
ENGINES = {"decode": ("fa3",), "prefill": ("fa3", "hopper")}

logger = logging.getLogger(__name__)


@functools.cache
def _triton_interpreted() -> bool | None:
    """Whether Triton kernels run in the interpreter; None without Triton."""
    try:
        device = importlib.import_module("vllm_sparsek.kernels.common.device")
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    return not isinstance(device.units_kept, JITFunction)


def capability(impl: str, device: torch.device) -> tuple[bool, str]:
    """Whether ``impl`` (triton, fa3, hopper, cpu or reference) runs on tensors of ``device``.

    What engines need besides Triton, ``fits`` of their modules says.

    Returns:
        ok and, if it does not, the reason.
    """
    if impl not in ("triton", "fa3", "hopper"):
        return device.type == "cpu", f"{impl!r} takes CPU tensors, got {device}"
    interpreted = _triton_interpreted()
    if interpreted is None:
        return False, f"{impl!r} needs the triton package"
    # the interpreter knows no Gluon
    if device.type == "cuda" or (interpreted and impl != "hopper"):
        return True, ""
    return False, f"{impl!r} takes CUDA tensors (or the interpreter), got {device}"


@functools.lru_cache(maxsize=256)
def implementation(operation: str, impl: str, device: torch.device) -> ModuleType:
    """The module of ``impl`` for ``operation``, imported on first use.

    Args:
        operation: write, score, bounds, select, decode, prefill or prefix.
        impl: triton, cpu, reference, one of the operation's ``ENGINES``, or auto: triton on CUDA
            tensors, else cpu.
        device: where the tensors are.

    Raises:
        ValueError: ``impl`` is not the name of an implementation.
        RuntimeError: ``impl`` cannot run here, with the reason.
    """
    chosen = impl
    if impl == "auto":
        chosen = "cpu" if device.type == "cpu" else "triton"
        logger.info("sparsek %s runs on %s: %s", operation, device.type, chosen)
    known = (*IMPLEMENTATIONS, *ENGINES.get(operation, ()))
    if chosen not in known:
        raise ValueError(f"{operation}: impl must be auto or one of {known}, got {impl!r}")
    ok, reason = capability(chosen, device)
    if not ok:
        raise RuntimeError(f"{operation}: implementation {reason}")
    if chosen not in ("cpu", "reference") and device.type == "cuda" and torch.cuda.is_available():
        # imports what imports this
        from vllm_sparsek.kernels.common.architecture import prepare

        prepare(device)
    return importlib.import_module(f"vllm_sparsek.kernels.{operation}.{chosen}")


def require(supported: tuple[bool, str]) -> None:
    """Raise ValueError with the reason unless a capability check said yes."""
    if not supported[0]:
        raise ValueError(supported[1])


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dims: int,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Refuse a tensor of the wrong rank, dtype, device or inner stride, naming it.

    Raises:
        ValueError: rank, device or last stride; TypeError: dtype.
    """
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in (dtype if isinstance(dtype, tuple) else (dtype,)):
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension: {tensor.stride()}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of the wrong shape, naming it.

    Raises:
        ValueError: the shape differs.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
