"""Ahead-of-time compilation of every Triton kernel for GPUs that need not be there.

``python -m vllm_sparsek.kernels.common.compile_targets 90 120`` compiles for compute
capabilities 9.0 and 12.0 and prints one JSON line per kernel.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Collection, Iterator
from typing import Any

from vllm_sparsek.kernels.common.validate import FP8_CAPABILITY

# bounds takes select's kernel: it comes after it
MODULES = (
    "write.triton", "score.triton", "select.triton", "select.expiry", "bounds.triton",
    "decode.triton", "prefill.triton", "prefill.hopper", "prefix.triton", "common.page_tables",
)  # fmt: skip
# kernels in Gluon for one generation of GPUs alone
ONLY = {"prefill.hopper": 90}
WARP_SIZE = 32
# shared memory one block may use, bytes, by compute capability (CUDA programming guide)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024}

# the first with programmatic dependent launch, see ``early_launch``
EARLY_CAPABILITY = 90


def early_launch_known(capability: int) -> bool:
    """Whether kernels of ``capability`` are launched early: not those of GPUs we do not know."""
    return capability >= EARLY_CAPABILITY and capability in SHARED_LIMIT


def of_heads(
    case: tuple[Any, str, dict[str, Any], dict[str, int]],
) -> tuple[Any, str, dict[str, Any], dict[str, int]]:
    """The case for budgets whose KV heads differ: ``k`` and ``share_bits`` are pointers."""
    kernel, types, constexprs, options = case
    names = [name for name in kernel.arg_names if name not in constexprs]
    listed = [
        f"*{kind}" if name in ("k", "share_bits") else kind
        for name, kind in zip(names, types.split(), strict=True)
    ]
    return kernel, " ".join(listed), constexprs, options


def compile_cases(
    capability: int,
) -> Iterator[tuple[str, tuple[Any, str, dict[str, Any], dict[str, int]]]]:
    """(name, case) of every kernel variant that is registered and that ``capability`` runs.

    All do but those that read an FP8 cache, and ``ONLY`` some. They are compiled as they are
    launched there: early or not.
    """
    for path in MODULES:
        if ONLY.get(path, capability) != capability:
            continue
        module = importlib.import_module(f"vllm_sparsek.kernels.{path}")
        for case in module.COMPILE_CASES:
            kernel, types, constexprs, options = case
            if "fp8" in types and capability < FP8_CAPABILITY:
                continue
            if "EARLY" in constexprs:
                constexprs = {**constexprs, "EARLY": early_launch_known(capability)}
            dtype = types.split()[0].removeprefix("*")
            variant = "-".join(f"{name}={value}" for name, value in constexprs.items())
            yield f"{path.partition('.')[0]}-{kernel.__name__}-{dtype}-{variant}", (
                kernel, types, constexprs, options,
            )  # fmt: skip


def compile_kernel(
    case: tuple[Any, str, dict[str, Any], dict[str, int]],
    capability: int,
    any_multiple: Collection[str] = (),
) -> Any:
    """Compile one case for ``capability`` (90 means 9.0); needs no GPU.

    Pointers and strides are declared divisible by 16, as the launcher finds them, save the
    strides named in ``any_multiple``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constexprs, options = case
    remaining = iter(types.split())
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constexprs else next(remaining)
        stride = name.startswith("stride_") and name not in any_multiple
        if signature[name].startswith("*") or stride:
            attributes[(index,)] = [["tt.divisibility", 16]]
    if next(remaining, None) is not None:
        raise ValueError(f"{kernel.__name__}: more argument types than arguments")
    make_source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        make_source = GluonASTSource
    source = make_source(kernel, signature, constexprs, attributes)
    target = GPUTarget("cuda", capability, WARP_SIZE)
    return triton.compile(source, target=target, options=options)


def main(capabilities: list[int]) -> None:
    """Compile every case and print {capability, name, shared, cubin, error} as JSON lines."""
    for capability in capabilities:
        for name, case in compile_cases(capability):
            result: dict[str, Any] = {"capability": capability, "name": name, "error": None}
            try:
                compiled = compile_kernel(case, capability)
                result["shared"] = compiled.metadata.shared
                result["cubin"] = len(compiled.asm["cubin"])
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
