"""``vllm-sparsek export-kernels``: the kernels for C++."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_sparsek.arguments import names, positive

# what the Triton attention kernels take; repeated here because asking them imports torch
HEAD_DIMS = (64, 80, 96, 128, 256)
ARCHS = (80, 86, 89, 90, 100, 103, 120)
DTYPES = ("fp16", "bf16", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See ``cli.Command``."""
    parser.add_argument("--out", required=True, type=Path, help="folder to write into")
    add = parser.add_argument
    add("--arch", type=_integers(ARCHS), default=[90], metavar="90,100",
        help="compute capabilities; default 90")  # fmt: skip
    add("--dtype", type=_words(*DTYPES), default=["fp16"], metavar="fp16,bf16",
        help="of fp16, bf16, fp32; default fp16")  # fmt: skip
    add("--head-dim", type=_integers(HEAD_DIMS), default=[128], metavar="64,128",
        help="of 64, 80, 96, 128, 256; default 128")  # fmt: skip
    add("--group", type=_integers(), default=[1], metavar="1,4",
        help="query heads per KV head; default 1")  # fmt: skip
    add("--granularity", type=_words("token", "page"), default=["token"], metavar="token,page",
        help="what competes for a place; default token")  # fmt: skip
    add("--mode", type=_words("hard", "soft_v"), default=["hard"], metavar="hard,soft_v",
        help="default hard")  # fmt: skip
    add("--refresh", type=positive, default=64,
        help="refresh interval the tiles are made for; any other runs too. Default 64")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """See ``cli.Command``."""
    from vllm_sparsek.export.kernels import ExportError, export, variants

    chosen = variants(
        args.arch, args.dtype, args.head_dim, args.group, args.granularity, args.mode, args.refresh
    )
    try:
        written = export(chosen, args.out)
    except (ExportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in written)
    print(f"{args.out}: {', '.join(path.name for path in written)}, {len(chosen)} kernels, "
          f"{size / 2**20:.1f} MiB")  # fmt: skip
    return 0


def _words(*known: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = names(text)
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return found

    return parse


def _integers(known: tuple[int, ...] = ()) -> Callable[[str], list[int]]:
    def parse(text: str) -> list[int]:
        try:
            found = [positive(name) for name in names(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of integers") from None
        for value in found:
            if known and value not in known:
                choices = ", ".join(str(one) for one in known)
                raise argparse.ArgumentTypeError(f"{value} is none of {choices}")
        return found

    return parse
