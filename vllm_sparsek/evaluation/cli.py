"""`vllm-sparsek eval`: from the command line to a plan, and to the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sparsek.arguments import has_modules, names, positive

if TYPE_CHECKING:
    from vllm_sparsek.evaluation.results import Results
    from vllm_sparsek.evaluation.run import Plan

DESCRIPTION = """\
Measure what sparse attention costs in quality, through vLLM: perplexity of long texts, retrieval
and tracking tasks after RULER, a passkey and a conversation, each sparse arm against dense.

Three columns: all (every query is sparse), decode (prompts are read densely), question (contexts
are read densely, the question about them and the answer sparsely).
"""
EPILOG = """\
The same command continues where it was interrupted: what --output holds is not run again.

example:
  vllm-sparsek eval MODEL --scorers dense,learned=scorer.safetensors,keydiff,recency,random \\
      --lengths 4096,8192 --text book.txt essays.txt
"""
COLUMNS = "all,decode,question"

DEFAULT_SCORERS = "quest,keydiff,knorm,recency,random"


def _lengths(text: str) -> list[int]:
    return [positive(part) for part in names(text)]


def _shares(text: str) -> list[float]:
    shares = [float(part) for part in names(text)]
    if not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError("shares lie between 0 and 1")
    return shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="name or folder of the model")
    parser.add_argument(
        "--scorers", type=names, default=names(DEFAULT_SCORERS), metavar="A,B",
        help="arms: a scorer, learned=FILE, or oracle (keeps the needles), each with further "
        f"settings as NAME:key=value; dense always runs (default: {DEFAULT_SCORERS})",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=_shares, default=[0.12, 0.25, 0.5], metavar="S,S",
        help="shares of the context: k, window and sinks together (default: 0.12,0.25,0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--columns", type=names, default=names(COLUMNS), metavar="A,B",
        help=f"what is read sparsely (default: {COLUMNS})",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=_lengths, default=[4096], metavar="N,N",
        help="tokens of the contexts and windows, multiples of 64 (default: 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", type=names, metavar="A,B", help="tasks, perplexity among them (default: all)"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="texts for perplexity; the first one is also what needles are hidden in (default: "
        "Python's manual and library)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=positive, default=50, metavar="N", help="of each task (default: 50)"
    )
    parser.add_argument(
        "--windows", type=positive, default=8, metavar="N", help="of each text (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument(
        "--split", default="test",
        help="wordings: test, or tune to choose settings with (default: test)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: eval-results/<name of the model>"
    )
    parser.add_argument(
        "--engine-arg", action="append", default=[], metavar="KEY=VALUE",
        help="argument of vllm.LLM; repeatable, e.g. --engine-arg dtype=float16",
    )  # fmt: skip
    parser.add_argument(
        "--engines", type=positive, default=1, metavar="N",
        help="engines at the same time; on a GPU each needs its share of the memory, see "
        "--engine-arg kv_cache_memory_bytes=BYTES (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=positive, default=3600, metavar="S",
        help="seconds one task of one arm may take (default: 3600)",
    )  # fmt: skip


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    from vllm_sparsek.serving_bench.config import nearest
    from vllm_sparsek.serving_bench.errors import BenchError

    for name in names:
        if name not in known:
            raise BenchError(f"{option} {name}: unknown; {nearest(name, list(known))}")


def make_plan(
    args: argparse.Namespace, worker: Sequence[str] | None = None
) -> tuple[Plan, Results]:
    """Turn options into a plan and an empty record. Raises BenchError on what cannot be run."""
    from vllm_sparsek.evaluation import plan, prompts, texts
    from vllm_sparsek.evaluation.results import Results
    from vllm_sparsek.evaluation.run import WORKER, Plan
    from vllm_sparsek.evaluation.tasks import SPLITS, TASKS
    from vllm_sparsek.serving_bench import environment
    from vllm_sparsek.serving_bench.errors import BenchError

    known = [plan.PERPLEXITY, *TASKS]
    tasks = args.tasks or known
    _check_names("--tasks", tasks, known)
    _check_names("--columns", args.columns, plan.COLUMNS)
    _check_names("--split", [args.split], SPLITS)
    arms = [plan.parse_arm(text) for text in args.scorers]
    if len({arm.label for arm in arms}) < len(arms):
        raise BenchError("--scorers: two arms have the same name")
    cells, unavailable = plan.cells_of(arms, args.budgets, args.columns, args.lengths)
    engine: dict[str, Any] = {}
    for argument in args.engine_arg:
        key, equals, value = argument.partition("=")
        if not equals:
            raise BenchError(f"--engine-arg {argument} is not of the form KEY=VALUE")
        engine[key.replace("-", "_")] = plan.value_of(value)
    request = prompts.Request(
        model=args.model, tasks=tasks, lengths=args.lengths, samples=args.samples,
        windows=args.windows, seed=args.seed, split=args.split,
        texts=texts.read(args.text) or texts.default(),
    )  # fmt: skip
    output = args.output or Path("eval-results") / Path(args.model).name
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write to --output {output}: {error}") from error
    limit = engine.get("max_model_len") or prompts.context_limit(args.model)
    tokenizer = prompts.load_tokenizer(args.model)
    jobs = prompts.prepare(request, tokenizer, limit, output / "prompts")
    made = Plan(
        args.model, cells, jobs, engine, output, args.timeout, worker or WORKER,
        args.engines,
    )  # fmt: skip
    results = Results(
        command=["vllm-sparsek", *sys.argv[1:]],
        model=args.model,
        started_utc=environment.utc_now(),
        environment=environment.collect(),
        settings={
            "tasks": list(tasks), "lengths": args.lengths, "samples": args.samples,
            "windows": args.windows, "seed": args.seed, "split": args.split,
            "engine": engine, "filler": request.texts[0].name,
            "texts": {text.name: text.sha256 for text in request.texts},
        },
        arms={arm.label: arm.recorded for arm in arms},
        unavailable=[
            {"arm": arm, "column": column, "reason": reason}
            for (arm, column), reason in unavailable.items()
        ],
    )  # fmt: skip
    return made, results


def run(args: argparse.Namespace, worker: Sequence[str] | None = None) -> int:
    """Run the evaluation; return the exit status. `worker`: command in place of the engine's.

    0: all done. 1: failed, after one line that says why; what was finished is reported. 128 + n:
    ended by signal n.
    """
    if not has_modules("jinja2", "matplotlib", "pydantic", "rich"):
        return 1
    from rich.console import Console

    from vllm_sparsek.evaluation import report
    from vllm_sparsek.evaluation.run import Runner, collect
    from vllm_sparsek.evaluation.store import Store
    from vllm_sparsek.serving_bench.errors import BenchError, Interrupted
    from vllm_sparsek.serving_bench.processes import interruptible
    from vllm_sparsek.serving_bench.progress import Progress

    console = Console()
    results = None
    status = 0
    try:
        with interruptible():
            plan, results = make_plan(args, worker)
            store = Store(plan.output / "results.jsonl")

            def save() -> None:
                results.rows = collect(plan, store)
                report.save_data(results, plan.output)

            runner = Runner(plan, store, save)
            with Progress(console, len(runner.pending())) as progress:
                runner.run(progress)
    except BenchError as error:
        status, message = 1, str(error)
    except Interrupted as stop:
        status = 128 + stop.signum
        message = f"stopped by signal {stop.signum}; the same command goes on from here"
    if results is not None:
        results.error = message if status else None
        results.rows = collect(plan, store)
        if results.rows:
            report.save_all(results, plan.output)
            report.show(results, console)
            console.print(f"report: {plan.output / 'report.html'}", soft_wrap=True, markup=False)
    if status:
        # last, so that it is what remains on the screen
        print(f"error: {message}", file=sys.stderr)
    return status
