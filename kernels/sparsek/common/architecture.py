"""GPUs newer than the installed Triton: the generic path.

Triton compiles for one architecture, and fails for one that it or its assembler does not know.
On such a GPU kernels are compiled for GENERIC instead, as PTX, which the driver translates when it
loads them: CUDA promises that for PTX of every earlier architecture without architecture-specific
features (CUDA C++ Programming Guide, "PTX compatibility"). They use none of the newer GPU's own
instructions, so they are right but not as fast as they could be.

``python -m vllm_sparsek.kernels.common.architecture 130`` exits with 0 if the installed Triton
compiles for compute capability 13.0.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import subprocess
import sys
from typing import Any

import torch

from vllm_sparsek.kernels.common.compile_targets import SHARED_LIMIT, compile_kernel

# the last architecture whose code Triton does not tie to that architecture alone; it has FP8
GENERIC = 89
# of CUDA 12.4: a driver takes no later PTX than its own, and Triton writes the latest it knows
PTX_VERSION = 84
PROBE_SECONDS = 300

logger = logging.getLogger(__name__)


def prepare(device: torch.device) -> None:
    """Let Triton kernels run on ``device`` even if Triton does not know its architecture.

    Logs one line if it does not. Holds for all Triton kernels that this process compiles later.

    Raises:
        RuntimeError: the installed Triton can neither compile for the GPU nor emit PTX for it.
    """
    major, minor = torch.cuda.get_device_capability(device)
    _prepare(major * 10 + minor)


@functools.cache
def _prepare(capability: int) -> None:
    # what came before sm_90, and what our tests compile for, needs no probe
    if capability <= 90 or capability in SHARED_LIMIT or _compiles(capability):
        return
    import triton

    _take_generic_path()
    logger.warning(
        "sparsek: compute capability %d.%d is newer than Triton %s knows: kernels are compiled for "
        "%d.%d and translated by the driver, slower than a newer Triton could make them",
        *divmod(capability, 10), triton.__version__, *divmod(GENERIC, 10),
    )  # fmt: skip


def _compiles(capability: int) -> bool:
    """Whether Triton compiles an attention kernel for ``capability``.

    In a process of its own: a compiler that meets the unknown may print its state or abort.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(capability)],
            env=environment, capture_output=True, timeout=PROBE_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _take_generic_path() -> None:
    from triton import knobs

    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        raise RuntimeError(
            "this GPU is newer than the installed Triton: install Triton 3.6 or later"
        )
    knobs.runtime.override_arch = f"sm{GENERIC}"
    knobs.runtime.add_stages_inspection_hook = _end_with_ptx


def _end_with_ptx(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook: called with nothing for a cache key, else to change a compilation's stages."""
    if not arguments:
        key = f"sparsek-ptx-{PTX_VERSION}-{GENERIC}"
        return key, key
    backend, stages, options, *_ = arguments
    options = dataclasses.replace(options, ptx_version=PTX_VERSION)
    # the latter two would be made for the GPU at hand, whatever the override says
    stages["llir"] = lambda source, metadata: backend.make_llir(source, metadata, options, GENERIC)
    stages["ptx"] = lambda source, metadata: backend.make_ptx(source, metadata, options, GENERIC)
    stages["cubin"] = lambda source, metadata: source.encode() + b"\0"
    return None


if __name__ == "__main__":
    from vllm_sparsek.kernels.prefill.triton import COMPILE_CASES

    compile_kernel(COMPILE_CASES[0], int(sys.argv[1]))
