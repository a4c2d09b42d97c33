"""Kernels that are launched while the one before them on the stream still runs.

A decode step is a chain of short kernels, and launching one takes about as long as running it. On
GPUs with programmatic dependent launch (CUDA C++ Programming Guide) a kernel may be launched before
the one before it has ended. ``begin`` is the first thing that such a kernel does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_sparsek.kernels.common.compile_targets import early_launch_known
from vllm_sparsek.kernels.common.validate import compute_capability


@functools.cache
def launch_early(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch on ``device``: EARLY, a constexpr, and Triton's option for it."""
    if device.type != "cuda" or not early_launch_known(compute_capability(device)):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


@triton.jit
def begin(EARLY: tl.constexpr):
    """Lets the next kernel be launched, and waits until all before have ended and written.

    A kernel that waits with all its programs ends after all kernels before it: who waits for it
    has waited for them.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
