"""Who runs a case: one file a library, each reporting why it is unavailable if it is."""

from __future__ import annotations

from vllm_sparsek.serving_bench.config import nearest
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench.arms import (
    fa3,
    kv_write,
    sdpa,
    sparsek,
    top_k,
    training,
    vllm_triton,
    xformers,
)
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm
from vllm_sparsek.serving_bench.kernel_bench.cases import Case

# dense ones first: speed-ups refer to them
ARMS: tuple[Arm, ...] = (
    *sdpa.ARMS, *xformers.ARMS, *vllm_triton.ARMS, *fa3.ARMS, *top_k.ARMS, *kv_write.ARMS,
    *sparsek.ARMS, *training.ARMS,
)  # fmt: skip


def arms_of(case: Case) -> list[Arm]:
    """The arms that are meant for a case, in order.

    Raises:
        BenchError: the case names an arm that does not exist or does not run its kind.
    """
    named = [name for name in (*(case.arms or ()), case.against) if name is not None]
    fitting = {arm.name for arm in ARMS if case.kind in arm.kinds}
    for name in named:
        if name not in fitting:
            raise BenchError(f"{case.name}: no arm {name!r}; {nearest(name, sorted(fitting))}")
    return [arm for arm in ARMS if arm.takes(case)]
