"""What Nsight Compute runs: every arm of the profiled cases once, a marker kernel before each.

    python -m vllm_sparsek.serving_bench.kernel_bench.profile_target MANIFEST [CASE_SET [GROUP,..]]

MANIFEST is a JSON file that is written: one entry per marker, in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench.arms import arms_of
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs
from vllm_sparsek.serving_bench.kernel_bench.profile import profiled_cases
from vllm_sparsek.serving_bench.kernel_bench.results import Row, new_row, with_work
from vllm_sparsek.serving_bench.kernel_bench.run import first_line, require_gpu

# their kernels run as parts of the arm `sparsek`
PARTS = ("sparsek-attend", "sparsek-select")


@triton.jit
def sparsek_profile_marker(out_ptr):
    """Stands before the kernels of an arm."""
    tl.store(out_ptr, 1)


def _profile(row: Row, arm: Arm, inputs: Inputs, budget: Budget | None) -> None:
    prepared = arm.prepare(inputs, Gate(inputs), budget)
    with_work(row, prepared.work)
    row.note = prepared.note
    mark = torch.zeros(1, dtype=torch.int32, device=inputs.device)
    call = prepared.calls[0]
    # compiled and warm before anything is recorded
    sparsek_profile_marker[(1,)](mark)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        sparsek_profile_marker[(1,)](mark)
        call()
        torch.cuda.synchronize()
    # its marker is recorded, so it has a place in the account
    except Exception as error:
        row.reason = first_line(error)
    finally:
        torch.cuda.profiler.stop()


def main(argv: list[str]) -> int:
    """Run; the manifest is written after every arm."""
    device = require_gpu()
    manifest = Path(argv[0])
    groups = argv[2].split(",") if len(argv) > 2 else None
    cases = profiled_cases(argv[1] if len(argv) > 1 and argv[1] else None, groups)
    done: list[Row] = []
    for case_id, case in enumerate(cases):
        torch.cuda.empty_cache()
        inputs = Inputs(case, device)
        arms = arms_of(case)
        whole = any(arm.name == "sparsek" for arm in arms)
        for arm in arms:
            if whole and arm.name in PARTS:
                continue
            budget = case.budgets[0] if arm.sparse else None
            row = new_row(case_id, case, budget, arm.name, arm.part)
            reason = arm.fault(case, budget)
            if reason:
                row.status, row.reason = "unavailable", reason
            else:
                try:
                    _profile(row, arm, inputs, budget)
                # whatever a library raises, the others can still be profiled
                except Exception as error:
                    row.status, row.reason = "failed", first_line(error)
            done.append(row)
            manifest.write_text(json.dumps([r.model_dump() for r in done]), encoding="utf-8")
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
