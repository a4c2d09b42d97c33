"""Compiles the kernels of the dense-layout attention and writes them as one C++ header."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from triton import knobs

from vllm_sparsek.dense import PAGE
from vllm_sparsek.kernels.common.compile_targets import compile_kernel
from vllm_sparsek.kernels.prefill import triton as prefill
from vllm_sparsek.kernels.select import triton as select

SOURCES = ("sparsek.h", "sparsek.cpp")
GENERATED = "sparsek_kernels.h"
DTYPES = {"fp16": "kFloat16", "bf16": "kBFloat16", "fp32": "kFloat32"}
# strides that the launcher takes as they come
ANY_MULTIPLE = ("stride_score_block", "stride_score_head", "stride_table_row")
C_TYPES = {"i32": "int32_t", "i64": "int64_t", "fp32": "float"}
BYTES_PER_LINE = 24


class ExportError(RuntimeError):
    """A kernel that the launcher cannot start, or that does not compile."""


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        kind: items, select, lists or prefill; arch: 90 means compute capability 9.0.
        case: kernel, argument types, constexprs and options, see ``compile_targets``.
        dtype, head_dim, group: of prefill alone; pages: of all but items; soft: of select and
            prefill.
    """

    kind: str
    arch: int
    case: tuple[Any, str, dict[str, Any], dict[str, int]]
    dtype: str = "fp16"
    head_dim: int = 0
    group: int = 0
    pages: bool = False
    soft: bool = False


def variants(
    archs: list[int],
    dtypes: list[str],
    head_dims: list[int],
    groups: list[int],
    granularities: list[str],
    modes: list[str],
    refresh: int,
) -> list[Variant]:
    """All combinations; ``refresh`` decides the tiles of prefill, which takes any."""
    found = []
    for arch in archs:
        found.append(Variant("items", arch, prefill.ITEMS_CASE))
        units = {"token": 1, "page": PAGE}
        for granularity in granularities:
            case = prefill.lists_case(0, units[granularity])
            found.append(Variant("lists", arch, case, pages=granularity == "page"))
        for granularity, mode in itertools.product(granularities, modes):
            pages, soft, unit = granularity == "page", mode == "soft_v", units[granularity]
            case = select.compile_case(0, unit, "lse", soft, "", None)
            found.append(Variant("select", arch, case, pages=pages, soft=soft))
            for dtype, head_dim, group in itertools.product(dtypes, head_dims, groups):
                case = prefill.compile_case(dtype, dtype, group, head_dim, unit, refresh, soft)
                found.append(Variant("prefill", arch, case, dtype, head_dim, group, pages, soft))
    return found


def export(chosen: list[Variant], out: Path) -> list[Path]:
    """Compile and write ``sparsek.h``, ``sparsek.cpp`` and ``sparsek_kernels.h``.

    Args:
        chosen: what to compile; needs no GPU.
        out: the folder, made if it is not there.

    Raises:
        ExportError: a kernel does not compile, or needs what the launcher does not provide.
        OSError: the folder cannot be written.
    """
    arguments: dict[str, list[tuple[str, str]]] = {}
    rows, binaries = [], []
    for index, variant in enumerate(chosen):
        compiled, listed = _compile(variant)
        arguments.setdefault(variant.kind, listed)
        metadata, cubin = compiled.metadata, compiled.asm["cubin"]
        block = variant.case[2].get("BLOCK_M" if variant.kind == "prefill" else "BLOCK", 0)
        rows.append(
            f"    {{Kind::k{variant.kind.capitalize()}, {variant.arch}, "
            f"Dtype::{DTYPES[variant.dtype]}, {variant.head_dim}, {variant.group}, {block}, "
            f"{_bool(variant.pages)}, {_bool(variant.soft)}, \"{metadata.name}\", "
            f"kCubin{index}, {metadata.num_warps * 32}, {metadata.shared}}},"
        )  # fmt: skip
        binaries.append(_array(f"kCubin{index}", cubin))
    text = [
        "// Written by vllm-sparsek export-kernels: the kernels, and their parameters in order.",
        "",
        f"constexpr int64_t kListMultiple = {prefill.LIST_MULTIPLE};  // of the width of lists",
        "",
        *(line for kind, listed in arguments.items() for line in _macro(kind, listed)),
        *binaries,
        "const Kernel kKernels[] = {",
        *rows,
        "};",
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source = resources.files("vllm_sparsek.export") / name
        (out / name).write_text(source.read_text())
    (out / GENERATED).write_text("\n".join(text))
    return [out / name for name in (*SOURCES, GENERATED)]


def _compile(variant: Variant) -> tuple[Any, list[tuple[str, str]]]:
    """The compiled kernel, and names and types of its parameters."""
    kernel, types, constexprs, options = variant.case
    names = [name for name in kernel.arg_names if name not in constexprs]
    # 64 bits hold every stride
    listed = [
        (name, "i64" if name.startswith("stride_") else kind)
        for name, kind in zip(names, types.split(), strict=True)
    ]
    case = (kernel, " ".join(kind for _, kind in listed), constexprs, options)
    what = f"{variant.kind} for sm_{variant.arch} with {constexprs}"
    try:
        with knobs.compilation.scope():
            # line tables are most of a binary, and name folders of this machine
            knobs.compilation.disable_line_info = True
            compiled = compile_kernel(case, variant.arch, ANY_MULTIPLE)
    except Exception as error:
        raise ExportError(f"{what} does not compile: {type(error).__name__}: {error}") from error
    metadata = compiled.metadata
    unmet = {
        "global scratch memory": metadata.global_scratch_size > 0,
        "profile scratch memory": metadata.profile_scratch_size > 0,
        "clusters": metadata.num_ctas != 1,
        "a cooperative grid": metadata.launch_cooperative_grid,
        "a programmatic dependent launch": metadata.launch_pdl,
        "tensor descriptors": bool(getattr(metadata, "tensordesc_meta", None)),
    }
    for need, needed in unmet.items():
        if needed:
            raise ExportError(f"{what} needs {need}: the C++ launcher does not provide it")
    # Triton appends pointers to scratch memory, as many as its version has kinds of it
    scratch = _parameters(compiled.asm["ptx"]) - len(listed)
    if not 0 <= scratch <= 2:
        raise ExportError(f"{what} has {scratch} parameters more than arguments")
    return compiled, listed + [("", "scratch")] * scratch


def _parameters(ptx: str) -> int:
    entry = ptx[ptx.index(".entry") :]
    return entry[: entry.index(")")].count(".param")


def _macro(kind: str, listed: list[tuple[str, str]]) -> list[str]:
    """The list of parameters as a macro over a struct, and a check of their types."""
    names = ["&none" if not name else f"&(a).{name}" for name, _ in listed]
    struct = f"{kind.capitalize()}Arguments"
    lines = [f"#define SPARSEK_{kind.upper()}_ARGUMENTS(a) {', '.join(names)}"]
    for name, type_ in listed:
        if name:
            expected = "CUdeviceptr" if type_.startswith("*") else C_TYPES[type_]
            lines.append(
                f"static_assert(std::is_same<decltype({struct}::{name}), {expected}>::value, "
                f'"{kind}: {name}");'
            )
    return [*lines, ""]


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _array(name: str, data: bytes) -> str:
    lines = [
        ",".join(str(byte) for byte in data[low : low + BYTES_PER_LINE]) + ","
        for low in range(0, len(data), BYTES_PER_LINE)
    ]
    body = "\n".join(lines)
    return f"alignas(16) const unsigned char {name}[] = {{\n{body}\n}};\n"
