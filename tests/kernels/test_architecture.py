"""GPUs that the installed Triton does not know: one log line, PTX for the driver, right results."""

from __future__ import annotations

import json
import subprocess

import pytest
from processes import run_python

from vllm_sparsek.kernels.common import architecture
from vllm_sparsek.kernels.common.compile_targets import SHARED_LIMIT

# of no GPU that Triton 3.6 to 3.9 knows
UNKNOWN = 130
NATIVE = {"TRITON_INTERPRET": "0"}
# a process in which the GPU says that it is of compute capability 13.0
PRETEND = """
import logging, sys
import torch
logging.basicConfig(stream=sys.stdout, format="LOG %(levelname)s %(message)s")
torch.cuda.get_device_capability = lambda device=None: (13, 0)
"""
COMPILE = """
import json
from vllm_sparsek.kernels.common import architecture, compile_targets
for device in (0, 0, 1):
    architecture.prepare(torch.device("cuda", device))
last = {case[0]: case for _, case in compile_targets.compile_cases(130)}
for kernel, case in last.items():
    binary = compile_targets.compile_kernel(case, 130).asm["cubin"]
    print("PTX " + json.dumps([kernel.__name__, binary.decode()]))
"""
RUN = """
sys.path.insert(0, {folder!r})
import test_decode, test_fp8, test_prefill
from triton import knobs
device = torch.device("cuda", 0)
case = "d128-g3-bf16"
test_decode.test_decode_is_as_exact_as_low_precision_attention(test_decode.CASES[case], device)
test_prefill.test_prefill_is_as_exact_as_low_precision_attention(
    test_prefill.CASES["r64-bf16-g3"], device)
for attend in (test_fp8.decode, test_fp8.prefill):
    test_fp8.test_attention_is_as_exact_as_over_a_cache_without_quantisation(
        test_fp8.CASES[case], attend, device)
print("ARCH", knobs.runtime.override_arch)
"""


@pytest.mark.parametrize("capability", [80, 86, 89, 90, *SHARED_LIMIT])
def test_architectures_that_are_tested_are_not_probed(capability, monkeypatch):
    def fail(*_):
        raise AssertionError("probed")

    monkeypatch.setattr(architecture, "_compiles", fail)
    monkeypatch.setattr(architecture, "_take_generic_path", fail)
    architecture._prepare.__wrapped__(capability)


def test_a_newer_architecture_that_triton_compiles_for_is_left_to_it(monkeypatch, caplog):
    def fail():
        raise AssertionError("generic")

    monkeypatch.setattr(architecture, "_compiles", lambda capability: True)
    monkeypatch.setattr(architecture, "_take_generic_path", fail)
    architecture._prepare.__wrapped__(UNKNOWN)
    assert not caplog.records


def test_the_probe_says_what_triton_compiles_for():
    assert architecture._compiles(90)
    assert not architecture._compiles(UNKNOWN)


def test_a_probe_that_does_not_end_counts_as_no(monkeypatch):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("probe", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert not architecture._compiles(UNKNOWN)


def test_an_unknown_gpu_gets_one_line_and_ptx_that_later_architectures_take(tmp_path):
    out = run_python(PRETEND + COMPILE, {**NATIVE, "TRITON_CACHE_DIR": str(tmp_path / "cache")})
    lines = out.splitlines()
    (line,) = [line for line in lines if line.startswith("LOG ")]
    assert line.startswith("LOG WARNING sparsek: compute capability 13.0 is newer than Triton")
    kernels = [json.loads(line[4:]) for line in lines if line.startswith("PTX ")]
    assert {"decode_fwd_kernel", "prefill_fwd_kernel"} < {name for name, _ in kernels}
    for name, ptx in kernels:
        # C reads it to the first zero
        assert ptx.index("\0") == len(ptx) - 1, name
        assert "\n.target sm_89\n" in ptx, name
        assert "\n.version 8.4\n" in ptx, name

    # what a driver does with it
    from triton import knobs

    path = tmp_path / "kernel.ptx"
    for _, ptx in kernels:
        path.write_text(ptx[:-1])
        for later in ("sm_90", "sm_100", "sm_120"):
            tool = [knobs.nvidia.ptxas_blackwell.path, f"--gpu-name={later}", str(path)]
            done = subprocess.run([*tool, "-o", str(tmp_path / "out")], capture_output=True)
            assert done.returncode == 0, done.stderr.decode()


@pytest.mark.gpu
def test_kernels_of_the_generic_path_run_and_are_exact(request, tmp_path):
    code = PRETEND + RUN.format(folder=str(request.path.parent))
    out = run_python(code, {**NATIVE, "TRITON_CACHE_DIR": str(tmp_path)})
    assert out.count("is newer than Triton") == 1
    assert "ARCH sm89" in out
    # nothing was assembled here: the driver was given PTX
    binaries = list(tmp_path.rglob("*_fwd_kernel.cubin"))
    assert binaries
    assert all(path.read_bytes().endswith(b"\n\0") for path in binaries)
