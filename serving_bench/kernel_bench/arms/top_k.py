"""Top-k of contiguous rows: vLLM's operations and torch's. The rows are given, not gathered."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.select.reference import unit_scores
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared, import_fault
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import check_top_k
from vllm_sparsek.serving_bench.kernel_bench.inputs import POOLING, Inputs

# what vLLM's persistent and cooperative kernels take
ROW_K = (512, 1024, 2048)
COOPERATIVE_ROWS = 64
WORKSPACE_BYTES = 1024 * 1024
ALIGNMENT = 4  # floats

Run = Callable[[torch.Tensor, int], Callable[[], torch.Tensor]]


def _rows(inputs: Inputs, budget: Budget, s: int) -> torch.Tensor:
    """[batch * H, n] float32: scores of the units that compete, rows aligned."""
    case = inputs.case
    start = budget.selection_position(case.context - 1)
    first, end = budget.first_unit(), budget.end_unit(start)
    blocks = inputs.scores[inputs.table[inputs.rows(s)].long()]  # [batch, pages, H, page]
    tokens = blocks.transpose(1, 2).flatten(2).flatten(0, 1)  # [batch * H, tokens]
    z = unit_scores(tokens[:, : end * budget.unit], budget.unit, POOLING)[:, first:]
    width = -(-z.shape[1] // ALIGNMENT) * ALIGNMENT
    rows = torch.full((z.shape[0], width), float("-inf"), device=inputs.device)
    rows[:, : z.shape[1]] = z
    return rows[:, : z.shape[1]]


def _prepared(inputs: Inputs, budget: Budget | None, run: Run) -> Prepared:
    assert budget is not None
    rows = [_rows(inputs, budget, s) for s in range(inputs.sets)]
    k = min(budget.units_kept(inputs.case.context - 1), rows[0].shape[1])
    return Prepared(
        [run(row, k) for row in rows],
        lambda indices: check_top_k(rows[0], indices),
        work.selection(inputs.case, budget),
        "contiguous scores given",
    )


def _output(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [rows, 1] and room for indices [rows, k], int32."""
    lengths = torch.full((rows.shape[0], 1), rows.shape[1], dtype=torch.int32, device=rows.device)
    return lengths, torch.full((rows.shape[0], k), -1, dtype=torch.int32, device=rows.device)


def _torch(rows: torch.Tensor, k: int) -> Callable[[], torch.Tensor]:
    return lambda: rows.topk(k, sorted=False).indices


def _per_row(rows: torch.Tensor, k: int) -> Callable[[], torch.Tensor]:
    from vllm import _custom_ops as ops

    lengths, out = _output(rows, k)

    def call() -> torch.Tensor:
        ops.top_k_per_row_decode(
            rows, 1, lengths, out, rows.shape[0], rows.stride(0), rows.stride(1), k
        )
        return out

    return call


def _workspace(operation: str) -> Run:
    def run(rows: torch.Tensor, k: int) -> Callable[[], torch.Tensor]:
        lengths, out = _output(rows, k)
        space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=rows.device)
        op = getattr(torch.ops._C, operation)

        def call() -> torch.Tensor:
            op(rows, lengths, out, space, k, rows.shape[1])
            return out

        return call

    return run


def _unavailable(operation: str) -> Callable[[Case, Budget | None], str]:
    def unavailable(case: Case, budget: Budget | None) -> str:
        assert budget is not None
        fault = import_fault("vllm._custom_ops")
        if fault:
            return fault
        if not hasattr(torch.ops._C, operation):
            return f"this vLLM has no {operation}"
        kept = budget.units_kept(case.context - 1)
        if operation != "top_k_per_row_decode" and kept not in ROW_K:
            return f"takes k of {ROW_K}, not {kept}"
        rows = case.batch * case.kv_heads
        if operation == "cooperative_topk" and rows > COOPERATIVE_ROWS:
            return f"takes up to {COOPERATIVE_ROWS} rows, not {rows}"
        return ""

    return unavailable


def _arm(name: str, run: Run, operation: str = "") -> Arm:
    return Arm(
        name,
        ("select",),
        "selection",
        lambda inputs, gate, budget: _prepared(inputs, budget, run),
        sparse=True,
        unavailable=_unavailable(operation) if operation else lambda case, budget: "",
    )


ARMS = (
    _arm("torch-topk", _torch),
    _arm("vllm-topk-per-row", _per_row, "top_k_per_row_decode"),
    _arm("vllm-topk-persistent", _workspace("persistent_topk"), "persistent_topk"),
    _arm("vllm-topk-cooperative", _workspace("cooperative_topk"), "cooperative_topk"),
)
