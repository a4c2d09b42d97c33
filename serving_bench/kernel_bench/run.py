"""Drives the arms over the cases; one that fails is noted and the others go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench import environment
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import measure
from vllm_sparsek.serving_bench.kernel_bench.arms import arms_of
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import USER_BOUND, Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs, input_sets
from vllm_sparsek.serving_bench.kernel_bench.results import Results, Row, new_row, with_work

NO_GPU = "the kernel benchmark needs a CUDA GPU, and torch finds none"

Report = Callable[[Row], None]
Measure = Callable[[list[measure.Call], bool], measure.Timing]


def require_gpu() -> torch.device:
    """The CUDA device, or BenchError."""
    if not torch.cuda.is_available():
        raise BenchError(NO_GPU)
    return torch.device("cuda", torch.cuda.current_device())


def facts(device: torch.device) -> dict[str, Any]:
    """Where a result was measured, as JSON-able values."""
    found = environment.collect()
    found["versions"]["xformers"] = environment.version("xformers")
    gpu = torch.cuda.get_device_properties(device)
    found["gpu"] = {
        "name": gpu.name,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": environment.driver(),
    }
    return found


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_arm(
    row: Row, arm: Arm, inputs: Inputs, gate: Gate, budget: Budget | None,
    time: Measure,
) -> None:  # fmt: skip
    """Fill ``row``: the result is judged first, then timed. Raises whatever the arm raises."""
    case = inputs.case
    prepared = arm.prepare(inputs, gate, budget)
    with_work(row, prepared.work)
    row.note = prepared.note
    output = prepared.calls[0]()
    if prepared.judge is not None:
        verdict = prepared.judge(output)
        row.gate, row.reason = verdict.ok, verdict.reason
        row.max_diff, row.error_share = verdict.max_diff, verdict.error_share
        if "attention" in row.part:
            row.user_bound = USER_BOUND.get(case.dtype)
    del output
    timing = time(prepared.calls, prepared.capturable)
    row.us, row.us_p20, row.us_p80 = timing.us, timing.p20, timing.p80
    row.samples, row.timing = timing.samples, timing.how
    row.note = "; ".join(filter(None, (row.note, timing.note)))


class Runner:
    """Measures cases into ``results``.

    Args:
        results: filled as rows are done.
        device: where.
        l2_bytes: size of its L2 cache: input sets that take turns do not fit it.
        report: called with every row when it is done; save: after every case.
        time: takes the times.
    """

    def __init__(
        self,
        results: Results,
        device: torch.device,
        l2_bytes: int,
        report: Report,
        save: Callable[[], None],
        time: Measure = measure.time_calls,
    ):
        self.results, self.device, self.l2_bytes = results, device, l2_bytes
        self.report, self.save, self.time = report, save, time

    def run(self, cases: list[Case]) -> None:
        """Measure every case.

        Raises:
            BenchError: a case names an arm that does not exist, or the GPU is lost.
        """
        plans = [(case, arms_of(case)) for case in cases]
        for case_id, (case, arms) in enumerate(plans):
            self._case(case_id, case, arms)
            self.save()

    def _case(self, case_id: int, case: Case, arms: list[Arm]) -> None:
        _free()
        try:
            inputs = Inputs(case, self.device, input_sets(case, self.l2_bytes))
        except torch.OutOfMemoryError as error:
            for arm in arms:
                row = new_row(case_id, case, None, arm.name, arm.part)
                row.status, row.reason = "failed", f"inputs: {first_line(error)}"
                self._done(row)
            return
        gate = Gate(inputs)
        for arm in arms:
            if not arm.sparse:
                self._arm(case_id, arm, inputs, gate, None)
        for budget in case.budgets:
            for arm in arms:
                if arm.sparse:
                    self._arm(case_id, arm, inputs, gate, budget)
            inputs.forget()

    def _arm(
        self, case_id: int, arm: Arm, inputs: Inputs, gate: Gate, budget: Budget | None
    ) -> None:
        case = inputs.case
        row = new_row(case_id, case, budget, arm.name, arm.part)
        reason = arm.fault(case, budget)
        if reason:
            row.status, row.reason = "unavailable", reason
            self._done(row)
            return
        try:
            run_arm(row, arm, inputs, gate, budget, self.time)
        # whatever a library raises, the other arms can still be measured
        except Exception as error:
            row.status, row.reason, row.us = "failed", first_line(error), None
        self._done(row)
        if row.status == "failed":
            self._require_alive(row)
            _free()

    def _done(self, row: Row) -> None:
        self.results.rows.append(row)
        self.report(row)

    def _require_alive(self, row: Row) -> None:
        """A kernel that reads where it must not takes the whole process's GPU with it."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise BenchError(
                f"the GPU is lost after {row.arm} on {row.case}: {first_line(error)}"
            ) from error
