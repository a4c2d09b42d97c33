"""`vllm-sparsek bench kernels`: from the command line to the exit status."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparsek.arguments import has_modules, names

if TYPE_CHECKING:
    from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row

DESCRIPTION = """\
Time our kernels beside PyTorch's, xFormers', FlashAttention-3 and vLLM's own on one CUDA GPU. Every
result is held to float64 first; what is wrong gets no speed-up.
"""
EPILOG = """\
examples:
  vllm-sparsek bench kernels                 # everything: all sets, all groups, all sweeps
  vllm-sparsek bench kernels --config gpt4   # the tiers
  vllm-sparsek bench kernels --run micro     # a quick look at each of our kernels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--run",
        dest="groups",
        type=names,
        metavar="A,B",
        help="groups to run: micro, tiers, decode, select, score, prefill, long (default: all)",
    )
    parser.add_argument("--sweep", action="store_true", help="run the context and budget sweeps")
    parser.add_argument(
        "--config", metavar="NAME", help="run one set of cases, a file in configs/kernels"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: bench-results/<time in UTC>"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="run each kernel once under Nsight Compute instead, into metrics.json",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="show an earlier run's tables and plot again"
    )


def _line(row: Row) -> str:
    """One finished row, on the terminal while others run."""
    what = f"{row.group:<8} {row.case:<52} {row.budget or '':<28} {row.arm:<22}"
    if row.status != "ok" or row.us is None:
        return f"{what} {row.status}: {row.reason}"
    gate = "" if row.gate is None else " green" if row.gate else f" RED: {row.reason}"
    return f"{what} {row.us:>12,.1f} us{gate}"


def faults(results: Results) -> list[str]:
    """Our arms that failed, and any arm whose result is wrong."""
    return [
        f"{row.arm} on {row.case}: {row.reason}"
        for row in results.rows
        if row.gate is False or (row.status == "failed" and row.arm.startswith("sparsek"))
    ]


def _show(results: Results, output: Path) -> None:
    from vllm_sparsek.serving_bench.kernel_bench import report

    if has_modules("jinja2", "matplotlib", "rich"):
        report.show(results, output)
    else:
        print(f"note: no tables, no plot; later: vllm-sparsek bench kernels --report {output}")


def _measure(args: argparse.Namespace, output: Path) -> int:
    """Run the benchmark; what was finished is written whatever happens."""
    from vllm_sparsek.serving_bench import environment
    from vllm_sparsek.serving_bench.errors import BenchError, Interrupted
    from vllm_sparsek.serving_bench.kernel_bench import cases, measure, report
    from vllm_sparsek.serving_bench.kernel_bench.results import Results
    from vllm_sparsek.serving_bench.kernel_bench.run import Runner, facts, require_gpu
    from vllm_sparsek.serving_bench.processes import interruptible

    choice = cases.choose(args.config, args.groups, args.sweep)
    device = require_gpu()
    _make(output)
    results = Results(
        command=["vllm-sparsek", *sys.argv[1:]],
        started_utc=environment.utc_now(),
        environment=facts(device),
        tiers=choice.tiers,
    )

    def done(row: Row) -> None:
        print(_line(row), flush=True)

    def save() -> None:
        report.save_data(results, output)

    status, message = 0, ""
    try:
        with interruptible():
            results.ceilings = asdict(measure.ceilings())
            l2_bytes = results.environment["gpu"]["l2_bytes"]
            Runner(results, device, l2_bytes, done, save).run(choice.cases)
    except BenchError as error:
        status, message = 1, str(error)
    except Interrupted as stop:
        status, message = 128 + stop.signum, f"stopped by signal {stop.signum}"
    if not status and (wrong := faults(results)):
        status, message = 1, f"{len(wrong)} results failed or are wrong, first: {wrong[0]}"
    results.error = message or None
    save()
    _show(results, output)
    print(f"results: {output / report.CSV_NAME}")
    if status:
        # last, so that it is what remains on the screen
        print(f"error: {message}", file=sys.stderr)
    return status


def _profile(args: argparse.Namespace, output: Path) -> int:
    from vllm_sparsek.serving_bench import environment
    from vllm_sparsek.serving_bench.errors import BenchError, Interrupted
    from vllm_sparsek.serving_bench.kernel_bench import profile
    from vllm_sparsek.serving_bench.kernel_bench.run import facts, require_gpu
    from vllm_sparsek.serving_bench.processes import interruptible

    if args.sweep:
        raise BenchError("--profile runs no sweeps: leave out --sweep")
    about = {
        "command": ["vllm-sparsek", *sys.argv[1:]],
        "started_utc": environment.utc_now(),
        "environment": facts(require_gpu()),
    }
    _make(output)
    try:
        with interruptible():
            profile.run(args.config, args.groups, output, about)
    except Interrupted as stop:
        print(f"error: stopped by signal {stop.signum}", file=sys.stderr)
        return 128 + stop.signum
    return 0


def _make(output: Path) -> None:
    from vllm_sparsek.serving_bench.errors import BenchError

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write to --output {output}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit status.

    0: all done. 1: failed, or a result is wrong, after one line that says so; what was finished is
    reported. 128 + n: ended by signal n.
    """
    if not has_modules("pydantic", "yaml"):
        return 1
    from vllm_sparsek.serving_bench import environment
    from vllm_sparsek.serving_bench.errors import BenchError
    from vllm_sparsek.serving_bench.kernel_bench import report

    output = args.output or Path("bench-results") / environment.utc_now().replace(":", "")
    try:
        if args.report is not None:
            earlier, output = report.load(args.report), args.output or args.report
            _make(output)
            _show(earlier, output)
            return 0
        if args.profile:
            return _profile(args, output)
        return _measure(args, output)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
