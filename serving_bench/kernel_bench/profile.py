"""Nsight Compute over each kernel: run `ncu`, read its CSV, write `metrics.json`."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import cases
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.results import Row
from vllm_sparsek.serving_bench.processes import Child, wait
from vllm_sparsek.serving_bench.writing import write_atomically

METRICS_NAME = "metrics.json"
LOG_NAME = "ncu.log"
SCHEMA_VERSION = 1
TARGET = "vllm_sparsek.serving_bench.kernel_bench.profile_target"
MARKER = "sparsek_profile_marker"
LIMIT_SECONDS = 900

# our names of what Nsight Compute calls so
METRICS = {
    "duration_ns": "gpu__time_duration.sum",
    "sm_throughput_pct": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_active_pct": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram_throughput_pct": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_throughput_pct": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors_pct": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}
# to nanoseconds, bytes and percent; --print-units base asks for these
UNITS = {
    "": 1.0, "%": 1.0, "ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6,
    "msecond": 1e6, "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip
# the user's aims, by what bounds the kernel: metric, percent it should exceed
AIMS = {"compute": ("sm_throughput_pct", 85.0), "memory": ("dram_throughput_pct", 75.0)}


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, grid and block as printed, and METRICS (None: not available)."""

    name: str
    grid: str
    block: str
    metrics: dict[str, float | None]


def profiled_cases(config: str | None, groups: list[str] | None) -> list[Case]:
    """The chosen cases that are meant to be profiled. BenchError if there are none."""
    chosen = [case for case in cases.choose(config, groups).cases if case.profile]
    if not chosen:
        raise BenchError("none of these cases is meant for --profile: leave out --run or --config")
    return chosen


def command(ncu: str, log: Path, target: list[str]) -> list[str]:
    """The command line of Nsight Compute. Clocks stay as they are."""
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--profile-from-start", "off", "--metrics", ",".join(METRICS.values()),
        "--log-file", str(log), *target,
    ]  # fmt: skip


def _value(text: str | None, unit: str | None) -> float | None:
    try:
        return float((text or "").replace(",", "")) * UNITS[unit or ""]
    # n/a, or a unit that we cannot convert
    except (ValueError, KeyError):
        return None


def parse(text: str) -> list[Kernel]:
    """Kernels in the order launched, from `ncu --csv --page raw` (units in the second row)."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        return []
    table = [line for line in lines[head:] if line.startswith('"')]
    found = []
    units: dict[str, str] = {}
    for row in csv.DictReader(table):
        # the row of units has no ID
        if not (row.get("ID") or "").strip().isdecimal():
            units = row
            continue
        found.append(
            Kernel(
                row.get("Kernel Name") or "",
                row.get("Grid Size") or "",
                row.get("Block Size") or "",
                {
                    name: _value(row.get(metric), units.get(metric))
                    for name, metric in METRICS.items()
                },
            )
        )
    return found


def segments(kernels: list[Kernel]) -> Iterator[list[Kernel]]:
    """The kernels between markers, one list per marker."""
    current: list[Kernel] | None = None
    for kernel in kernels:
        if MARKER in kernel.name:
            if current is not None:
                yield current
            current = []
        elif current is not None:
            current.append(kernel)
    if current is not None:
        yield current


def assign(rows: list[Row], kernels: list[Kernel]) -> list[dict[str, Any]]:
    """What goes into metrics.json: every kernel with its case, arm and whether it meets its aim.

    Args:
        rows: the manifest; rows that ran have a marker each, in order.
        kernels: as parsed.

    Raises:
        BenchError: markers and rows do not match.
    """
    parts = list(segments(kernels))
    ran = [row for row in rows if row.status == "ok"]
    if len(parts) != len(ran):
        raise BenchError(f"{len(ran)} arms ran, but Nsight Compute recorded {len(parts)}")
    found = []
    for row, part in zip(ran, parts, strict=True):
        total = sum(kernel.metrics["duration_ns"] or 0.0 for kernel in part)
        bound = "compute" if row.kind == "prefill" else "memory"
        metric, above = AIMS[bound]
        for kernel in part:
            duration, reached = kernel.metrics["duration_ns"], kernel.metrics[metric]
            found.append(
                {
                    "group": row.group,
                    "case": row.case,
                    "budget": row.budget,
                    "arm": row.arm,
                    "note": row.note,
                    "must_move_bytes": row.bytes,
                    "kernel": kernel.name,
                    "grid": kernel.grid,
                    "block": kernel.block,
                    "share_of_arm": duration / total if duration and total else None,
                    "bound": bound,
                    "aim": {"metric": metric, "above": above},
                    "met": None if reached is None else reached > above,
                    **kernel.metrics,
                }
            )
    return found


def _line(entry: dict[str, Any]) -> str:
    def percent(name: str) -> str:
        value = entry[name]
        return "    -" if value is None else f"{value:5.1f}"

    duration = entry["duration_ns"]
    us = "-" if duration is None else f"{duration / 1e3:,.1f}"
    met = {True: "met", False: "missed", None: "-"}[entry["met"]]
    return (
        f"{entry['group']:<8} {entry['arm']:<22} {entry['kernel'][:44]:<44} {us:>10} us  "
        f"SM {percent('sm_throughput_pct')}  warps {percent('warps_active_pct')}  "
        f"DRAM {percent('dram_throughput_pct')}  L2 {percent('l2_throughput_pct')} %  "
        f"{entry['bound']}: {met}"
    )


def _fault(log: str, code: int | None) -> str:
    """Why Nsight Compute has nothing to show."""
    if "ERR_NVGPUCTRPERM" in log:
        return (
            "this user may not read the GPU's performance counters: see "
            "https://developer.nvidia.com/ERR_NVGPUCTRPERM"
        )
    wrong = [line for line in log.splitlines() if line.startswith("==ERROR==")]
    return wrong[0] if wrong else f"ncu ended with status {code} and recorded no kernel"


def run(config: str | None, groups: list[str] | None, output: Path, about: dict[str, Any]) -> None:
    """Profile, print a line per kernel, write metrics.json into ``output``.

    Raises:
        BenchError: no `ncu`, no permission, or nothing was recorded.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise BenchError("Nsight Compute is missing: no `ncu` on PATH")
    profiled_cases(config, groups)
    with tempfile.TemporaryDirectory() as folder:
        log, manifest = Path(folder) / "ncu.csv", Path(folder) / "manifest.json"
        said = Path(folder) / "output.log"
        target = [sys.executable, "-m", TARGET, str(manifest), config or ""]
        target += [",".join(groups)] if groups else []
        # the working directory must not shadow the installed package
        env = {**os.environ, "PYTHONSAFEPATH": "1"}
        line = command(ncu, log, target)
        with Child(line, said, env) as child:
            done = wait(child, LIMIT_SECONDS)
            code = child.returncode
        text, own = (
            path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            for path in (log, said)
        )
        kernels = parse(text)
        if not done or not kernels or not manifest.is_file():
            write_atomically(output / LOG_NAME, (text + own).encode())
            fault = _fault(text + own, code) if done else f"ncu took more than {LIMIT_SECONDS} s"
            raise BenchError(f"{fault} (log: {output / LOG_NAME})")
        rows = [Row.model_validate(row) for row in json.loads(manifest.read_text())]
    entries = assign(rows, kernels)
    left_out = [
        {"case": row.case, "arm": row.arm, "status": row.status, "reason": row.reason}
        for row in rows
        if row.status != "ok"
    ]
    content = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "metrics": METRICS,
        "kernels": entries,
        "left_out": left_out,
    }
    write_atomically(output / METRICS_NAME, (json.dumps(content, indent=1) + "\n").encode())
    for entry in entries:
        print(_line(entry))
    for missing in left_out:
        print(f"{missing['arm']} on {missing['case']}: {missing['status']}: {missing['reason']}")
    print(f"metrics: {output / METRICS_NAME}")
