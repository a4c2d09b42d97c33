"""Which GPUs launch kernels early: see ``kernels.common.early_launch``."""

from __future__ import annotations

import pytest
import torch

from vllm_sparsek.kernels.common import early_launch
from vllm_sparsek.kernels.common.compile_targets import compile_cases

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "capability, early", [(80, False), (89, False), (90, True), (120, True), (130, False)]
)
def test_kernels_are_launched_early_where_we_compile_for_it(capability, early, monkeypatch):
    monkeypatch.setattr(early_launch, "compute_capability", lambda _: capability)
    found = early_launch.launch_early.__wrapped__(GPU)
    assert found == ({"EARLY": True, "launch_pdl": True} if early else {"EARLY": False})


def test_the_interpreter_launches_one_after_the_other():
    assert early_launch.launch_early(torch.device("cpu")) == {"EARLY": False}


@pytest.mark.parametrize("capability, early", [(80, False), (90, True), (120, True)])
def test_kernels_are_compiled_as_they_are_launched(capability, early):
    found = {
        kernel.__name__: constexprs["EARLY"]
        for _, (kernel, _, constexprs, _) in compile_cases(capability)
        if "EARLY" in constexprs
    }
    names = ("write_tokens_fwd_kernel", "select_fwd_kernel", "decode_fwd_kernel")
    assert found == dict.fromkeys(names, early)
