"""The command `vllm-sparsek`. Import-light: a command's module is imported when it is named."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

DISTRIBUTION = "vllm-sparsek"


@dataclass(frozen=True)
class Command:
    """A subcommand: the words that name it, its module, one line of help.

    The module has `add_arguments(parser)` and `run(args) -> int`, the exit status.
    """

    words: tuple[str, ...]
    module: str
    help: str


# a new command is one entry here
COMMANDS = (
    Command(
        ("bench", "serve"),
        "vllm_sparsek.serving_bench.cli",
        "compare attention backends under vLLM's own serving benchmark",
    ),
    Command(
        ("bench", "kernels"),
        "vllm_sparsek.serving_bench.kernel_bench.cli",
        "time the kernels beside PyTorch's, xFormers', FlashAttention-3 and vLLM's",
    ),
    Command(
        ("fit",), "vllm_sparsek.training.cli", "fit a scorer to a model from its own attention"
    ),
    Command(
        ("demo",),
        "vllm_sparsek.serving_bench.demo.cli",
        "a real model and question on this machine, then a small benchmark",
    ),
    Command(
        ("import-scorer",),
        "vllm_sparsek.scorer_import",
        "convert a published KVzap scorer into a scorer file",
    ),
    Command(
        ("export-kernels",),
        "vllm_sparsek.export.cli",
        "compile the kernels for C++: a header, a launcher and the binaries as one source file",
    ),
    Command(
        ("eval",),
        "vllm_sparsek.evaluation.cli",
        "quality of sparse attention against dense: perplexity, RULER's tasks, passkey",
    ),
)
# the words that only group commands
GROUPS: dict[tuple[str, ...], str] = {("bench",): "measure speed"}


class _Version(argparse.Action):
    """Looks the version up only when asked, since that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
        parser.exit()


def build_parser(
    argv: Sequence[str], commands: Sequence[Command] = COMMANDS
) -> argparse.ArgumentParser:
    """Return the parser; of all the commands, only the one that `argv` names is imported."""
    parser = argparse.ArgumentParser(
        prog=DISTRIBUTION, description="Learned sparse attention for stock vLLM."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers: dict[tuple[str, ...], argparse._SubParsersAction] = {
        (): parser.add_subparsers(metavar="COMMAND", required=True)
    }
    for command in commands:
        for depth in range(1, len(command.words)):
            group = command.words[:depth]
            if group not in subparsers:
                about = GROUPS[group]
                child = subparsers[group[:-1]].add_parser(group[-1], help=about, description=about)
                subparsers[group] = child.add_subparsers(metavar="COMMAND", required=True)
        leaf = subparsers[command.words[:-1]].add_parser(command.words[-1], help=command.help)
        if tuple(argv[: len(command.words)]) == command.words:
            module = importlib.import_module(command.module)
            module.add_arguments(leaf)
            leaf.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv).parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
