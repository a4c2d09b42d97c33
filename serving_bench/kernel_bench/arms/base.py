"""What an arm is: somebody who runs a case."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.kernel_bench.cases import Case, Kind
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate, Judge
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs
from vllm_sparsek.serving_bench.kernel_bench.work import Work


@dataclass(frozen=True)
class Prepared:
    """An arm ready to run a case.

    Attributes:
        calls: one per input set, each returning what ``judge`` looks at.
        judge: holds the result of ``calls[0]`` to the truth; None: the kernel's own tests do.
        work: what one call must do at least.
        note: a setting that was chosen for this case.
        capturable: may be replayed from a CUDA graph; training runs outside of them.
    """

    calls: list[Callable[[], torch.Tensor]]
    judge: Judge | None
    work: Work
    note: str = ""
    capturable: bool = True


@dataclass(frozen=True)
class Arm:
    """One adapter.

    Attributes:
        name: as in the YAML files and the results.
        kinds: the kinds of cases it runs.
        part: what it does, joined by +: attention, selection, write, score, training. Speed-ups
            compare arms whose parts contain those of the dense arm.
        prepare: (inputs, gate, budget) -> Prepared; budget is None for a dense arm.
        sparse: runs once per budget instead of once per case.
        unavailable: (case, budget) -> why it cannot run, "" if it can. Imports what it needs.
        by_name: runs only where a case names it.
        quantised: runs over a quantised cache as well.
    """

    name: str
    kinds: tuple[Kind, ...]
    part: str
    prepare: Callable[[Inputs, Gate, Budget | None], Prepared]
    sparse: bool = False
    unavailable: Callable[[Case, Budget | None], str] = lambda case, budget: ""
    by_name: bool = False
    quantised: bool = False

    def takes(self, case: Case) -> bool:
        """Whether the arm is meant for the case."""
        if case.kind not in self.kinds:
            return False
        return not self.by_name if case.arms is None else self.name in case.arms

    def fault(self, case: Case, budget: Budget | None) -> str:
        """Why the arm cannot run the case, "" if it can."""
        if case.cache is not None and not self.quantised:
            return f"the cache is {case.cache}: it reads none of another dtype than the queries'"
        return self.unavailable(case, budget)


@functools.cache
def import_fault(module: str) -> str:
    """Why a module cannot be imported, in one line; "" if it can."""
    try:
        importlib.import_module(module)
    # a library built for another driver or torch fails in its own ways
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def nan_like(tensor: torch.Tensor) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full_like(tensor, float("nan"))


def by_request(tensor: torch.Tensor, case: Case) -> torch.Tensor:
    """[batch * queries, Hq, D] as [batch, queries, Hq, D]."""
    return tensor.view(case.batch, case.queries, *tensor.shape[1:])
