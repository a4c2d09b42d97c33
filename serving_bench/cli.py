"""`vllm-sparsek bench serve`: from the command line to a plan, and to the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparsek.arguments import has_modules, names, positive

if TYPE_CHECKING:
    from vllm_sparsek.serving_bench.run import Plan

DESCRIPTION = """\
Start `vllm serve MODEL` once per arm, drive each server with vLLM's own benchmark client, and
compare prompt tokens/s, generation tokens/s, KV hit rate, latencies and density.
"""
EPILOG = """\
example:
  vllm-sparsek bench serve MODEL --arms dense,sparsek --scale gpu --server-arg=--max-model-len=65536
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name or folder of the model")
    parser.add_argument(
        "--arms", type=names, metavar="A,B", help="arms to compare (default: dense,sparsek)"
    )
    parser.add_argument(
        "--workloads", type=names, metavar="A,B", help="workloads to run (default: all)"
    )
    parser.add_argument("--scale", default="gpu", help="size of the workloads (default: gpu)")
    parser.add_argument(
        "--bench-config", type=Path, metavar="FILE", help="YAML with further arms and workloads"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: bench-results/<time in UTC>"
    )
    parser.add_argument(
        "--base-url", metavar="URL", help="measure this endpoint instead of starting servers"
    )
    parser.add_argument("--port", type=positive, help="port of the servers (default: a free one)")
    parser.add_argument(
        "--server-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="passed to `vllm serve`; repeatable, e.g. --server-arg=--max-model-len=8192",
    )
    parser.add_argument(
        "--startup-timeout",
        type=positive,
        default=1800,
        metavar="S",
        help="seconds a server may take to start (default: 1800)",
    )
    parser.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="runs per arm and workload"
    )
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="TEXT_FILE",
        help="also compare the perplexity of this text's start, at most 8128 tokens; an arm that"
        " reads prompts densely (quest and other training-free scorers) has the dense arm's",
    )


def make_plan(args: argparse.Namespace, vllm: Sequence[str] | None = None) -> Plan:
    """Turn options into a plan. Raises BenchError on what argparse cannot see."""
    from vllm_sparsek.serving_bench import config, environment, quality, server
    from vllm_sparsek.serving_bench.errors import BenchError
    from vllm_sparsek.serving_bench.run import Plan

    bench = config.load(args.bench_config)
    if args.base_url is not None:
        if args.port is not None or args.server_arg:
            raise BenchError("--base-url starts no server: leave out --port and --server-arg")
        names = args.arms or ["endpoint"]
        if len(names) > 1:
            raise BenchError("--base-url measures one endpoint: give --arms one name")
        # a name only: what the endpoint runs is not ours to say
        arms = {names[0]: config.Arm(description="an endpoint that was already running")}
    else:
        if args.model is None:
            raise BenchError("name a MODEL to serve, or an endpoint with --base-url")
        arms = {name: bench.arm(name) for name in args.arms or ["dense", "sparsek"]}
    if args.quality is not None:
        # before a server is started
        quality.read(args.quality)
    workloads = args.workloads or list(bench.workloads)
    stamp = environment.utc_now().replace(":", "")
    return Plan(
        model=args.model,
        arms=arms,
        sizes={name: bench.size(name, args.scale) for name in workloads},
        scale=args.scale,
        output=args.output or Path("bench-results") / stamp,
        repeat=args.repeat,
        base_url=args.base_url.rstrip("/").removesuffix("/v1") if args.base_url else None,
        port=args.port,
        server_args=args.server_arg,
        startup_timeout=args.startup_timeout,
        quality=args.quality,
        vllm=vllm or server.VLLM,
    )


def run(args: argparse.Namespace, vllm: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status. `vllm`: command to use in place of vLLM's.

    0: all done. 1: failed, after one line that says why; what was finished is reported. 128 + n:
    ended by signal n.
    """
    if not has_modules("jinja2", "matplotlib", "prometheus_client", "pydantic", "rich"):
        return 1
    from rich.console import Console

    from vllm_sparsek.serving_bench import environment, report
    from vllm_sparsek.serving_bench.errors import BenchError, Interrupted
    from vllm_sparsek.serving_bench.processes import interruptible
    from vllm_sparsek.serving_bench.progress import Progress
    from vllm_sparsek.serving_bench.results import Results
    from vllm_sparsek.serving_bench.run import Runner

    console = Console()
    results = None
    status = 0
    try:
        plan = make_plan(args, vllm)
        try:
            plan.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"cannot write to --output {plan.output}: {error}") from error
        results = Results(
            command=["vllm-sparsek", *sys.argv[1:]],
            model=plan.model or str(plan.base_url),
            started_utc=environment.utc_now(),
            environment=environment.collect(),
            arms={name: arm.model_dump() for name, arm in plan.arms.items()},
            workloads={name: size.model_dump() for name, size in plan.sizes.items()},
        )
        with interruptible(), Progress(console, plan.steps) as progress:
            Runner(plan, results, progress, lambda: report.save_data(results, plan.output)).run()
    except BenchError as error:
        status, message = 1, str(error)
    except Interrupted as stop:
        status, message = 128 + stop.signum, f"stopped by signal {stop.signum}"
    if results is not None and not status and (failed := sum(run.failed for run in results.runs)):
        status, message = 1, f"{failed} requests failed, so the throughputs do not compare"
    if results is not None:
        results.error = message if status else None
        if results.runs:
            report.save_all(results, plan.output)
            report.show(results, console)
            console.print(f"report: {plan.output / 'report.html'}", soft_wrap=True, markup=False)
    if status:
        # last, so that it is what remains on the screen
        print(f"error: {message}", file=sys.stderr)
    return status
