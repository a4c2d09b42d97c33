"""The operations of training: the SparseK operator, and thresholds of all prefixes."""

from __future__ import annotations

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.prefix import api as prefix_api
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs
from vllm_sparsek.serving_bench.kernel_bench.work import SCORE_BYTES, Work


def _scores(inputs: Inputs) -> torch.Tensor:
    """[rows, n] float32."""
    case = inputs.case
    generator = torch.Generator(device=inputs.device).manual_seed(0)
    shape = (case.batch, case.context)
    return torch.randn(shape, generator=generator, device=inputs.device)


def _prefix(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    assert budget is not None
    z = _scores(inputs)
    tau, expiry = torch.empty_like(z), torch.empty_like(z, dtype=torch.int32)

    def call() -> torch.Tensor:
        prefix_api.prefix(z, budget.k, tau, expiry)
        return tau

    return Prepared([call], None, Work(3 * z.numel() * SCORE_BYTES), capturable=False)


def _operator(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    from vllm_sparsek.training.operator import sparsek

    assert budget is not None
    z = _scores(inputs)
    least = Work(2 * z.numel() * SCORE_BYTES)
    return Prepared([lambda: sparsek(z, budget.k)], None, least, capturable=False)


ARMS = (
    Arm("sparsek-prefix", ("training",), "training", _prefix, sparse=True),
    Arm("sparsek-operator", ("training",), "training", _operator, sparse=True),
)
