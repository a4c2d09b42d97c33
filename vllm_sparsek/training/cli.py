"""`vllm-sparsek fit`: from the command line to a fit, its log and its plot."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from vllm_sparsek.arguments import at_least, has_modules

DESCRIPTION = """\
Fit a scorer to a model: which tokens of a long context each KV head should keep, learned from
what the model's own dense attention looks at. The model stays as it is. Minutes, on one GPU or
a few CPU cores; an interrupted fit goes on when the same command is given again.
"""
EPILOG = """\
example:
  vllm-sparsek fit MODEL --data book.txt chats/ src/ --out scorer.safetensors
  vllm serve MODEL --attention-backend sparsek \\
      --additional-config '{"sparsek": {"scorer_path": "scorer.safetensors"}}'
"""
DEFAULT_FEATURES = "key_unrotated,key,value"
# ways to refine, and how many steps each takes
REFINE_STEPS = {"outputs": 18, "logits": 20}


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not shares or not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError("shares of the context lie between 0 and 1")
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="name or folder of the model")
    parser.add_argument(
        "--data", nargs="+", default=(), metavar="PATH",
        help="text files, or folders of .txt, .md and .py files, like what the model will read "
        "(default: the source of Python's standard library)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the scorer file")
    parser.add_argument(
        "--windows", type=at_least(3), default=10,
        help="training windows; 40%% are retrieval prompts, two are held out (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--window-tokens", type=at_least(2048), default=8192, help="length of one (default: 8192)"
    )
    parser.add_argument(
        "--input", default=DEFAULT_FEATURES, metavar="A,B",
        help="what a scorer sees of a token: key_unrotated, key, value, hidden "
        f"(default: {DEFAULT_FEATURES})",
    )  # fmt: skip
    parser.add_argument(
        "--hidden-units", type=at_least(0), default=0, metavar="N",
        help="width of a small MLP instead of a linear scorer (default: 0, linear)",
    )  # fmt: skip
    parser.add_argument(
        "--shares", type=_shares, default=(0.12, 0.25, 0.5), metavar="A,B",
        help="budgets to fit for, as shares of the context (default: 0.12,0.25,0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=at_least(0), default=60,
        help="steps of gradient descent a layer after the closed form (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--refine", choices=tuple(REFINE_STEPS),
        help="train scorers on after that, by the error of each layer's output or by what the "
        "model's next tokens lose with all layers sparse (default: neither)",
    )  # fmt: skip
    parser.add_argument(
        "--refine-steps", type=at_least(1), metavar="N",
        help="steps of it, with outputs for every layer (default: "
        + ", ".join(f"{kind} {steps}" for kind, steps in REFINE_STEPS.items()) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--uniform-layers", action="store_true", help="give every layer and KV head the same budget"
    )
    parser.add_argument(
        "--measure-heads", action="store_true",
        help="try budgets by the measured damage of every KV head alone, too; wants a GPU",
    )  # fmt: skip
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    """Run the fit; return the exit status."""
    if not has_modules("matplotlib", "rich"):
        return 1
    import torch
    from rich.console import Console

    from vllm_sparsek.scorers.scorer_file import FEATURES
    from vllm_sparsek.serving_bench.errors import Interrupted
    from vllm_sparsek.serving_bench.processes import interruptible
    from vllm_sparsek.serving_bench.progress import Progress
    from vllm_sparsek.training.fit import FitSettings, fit
    from vllm_sparsek.training.plot import draw
    from vllm_sparsek.training.solve import SolveSettings

    features = tuple(name.strip() for name in args.input.split(","))
    unknown = [name for name in features if name not in FEATURES]
    problem = None
    if unknown:
        problem = f"--input {unknown[0]}: unknown; known are {', '.join(FEATURES)}."
    elif not args.out.parent.is_dir():
        problem = f"--out {args.out}: there is no folder {args.out.parent}."
    elif args.out.suffix != ".safetensors":
        problem = f"--out {args.out}: the name must end in .safetensors."
    elif args.measure_heads and args.uniform_layers:
        problem = "--measure-heads: not with --uniform-layers."
    elif args.refine_steps and not args.refine:
        problem = "--refine-steps: only with --refine outputs or --refine logits."
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    settings = FitSettings(
        model=args.model,
        data=tuple(args.data),
        window_tokens=args.window_tokens,
        windows=args.windows,
        features=features,
        layer_budgets=not args.uniform_layers,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        solve=SolveSettings(
            shares=args.shares, hidden_units=args.hidden_units, steps=args.steps, seed=args.seed
        ),
        refine=args.refine,
        measure_heads=args.measure_heads,
        refine_steps=args.refine_steps or REFINE_STEPS.get(args.refine, 0),
    )
    try:
        with interruptible(), Progress(Console(), steps=args.windows + 2) as progress:
            report = fit(settings, args.out, progress)
    except (ValueError, OSError) as error:
        # texts, the scorer file, or a model that transformers cannot load: its first line says it
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 128 + stop.signum
    log = args.out.with_suffix(".json")
    log.write_text(json.dumps({"settings": asdict(settings), **asdict(report)}, indent=1))
    plot = args.out.with_suffix(".png")
    plot.write_bytes(draw(report, args.out.name))
    recall = fmean(layer.recall for layer in report.layers)
    print(f"{args.out}: keeps {recall:.1%} of far attention at a quarter of the context.")
    print(f"log: {log}, plot: {plot}")
    return 0
