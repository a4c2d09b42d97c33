"""The kernel benchmark as a whole: the runner, the command line, Nsight Compute, a GPU."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    CASES,
    CPU,
    DECODE,
    FP8_CHUNK,
    FP8_DECODE,
    PREFILL,
    TOKENS,
    call_once,
    results,
    row,
)

from vllm_sparsek import cli
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.kernel_bench import cases, measure, profile, report
from vllm_sparsek.serving_bench.kernel_bench import cli as kernel_cli
from vllm_sparsek.serving_bench.kernel_bench import run as driver
from vllm_sparsek.serving_bench.kernel_bench.arms import ARMS, sparsek
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared
from vllm_sparsek.serving_bench.kernel_bench.cli import faults

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(arm for arm in sparsek.ARMS if arm.name == "sparsek-attend")


def do_nothing():
    """In place of writing files."""


def raising(error):
    """An arm that fails while it prepares."""

    def prepare(inputs, gate, budget):
        raise error

    return Arm("broken", ("decode", "prefill"), "attention", prepare)


def wrong(inputs, gate, budget):
    """An arm that writes nothing."""
    output = torch.full((2, 1, 4, 64), float("nan"))
    return Prepared([lambda: output], gate.dense(), sparsek._attend(inputs, gate, TOKENS).work)


def run_with(monkeypatch, arms, chosen=(DECODE,), time=call_once):
    """Results of cases run by given arms on the CPU."""
    monkeypatch.setattr(driver, "arms_of", lambda case: [*arms])
    run, seen = results(), []
    driver.Runner(run, CPU, 200_000, seen.append, do_nothing, time).run(list(chosen))
    assert seen == run.rows
    return run


# the runner


def test_every_kind_of_case_runs_and_what_is_ours_is_right():
    run, seen = results(), []
    driver.Runner(run, CPU, 200_000, seen.append, do_nothing, call_once).run(list(CASES))
    ours = [found for found in run.rows if found.arm.startswith("sparsek")]
    assert {found.kind for found in ours if found.status == "ok"} == {case.kind for case in CASES}
    assert [found for found in ours if found.status != "ok"] == []
    assert not [found for found in run.rows if found.gate is False]
    assert faults(run) == []


def test_over_an_fp8_cache_ours_run_and_arms_that_read_none_are_unavailable():
    run = results()
    runner = driver.Runner(run, CPU, 200_000, lambda row: None, do_nothing, call_once)
    runner.run([FP8_DECODE, FP8_CHUNK])
    ours = [found for found in run.rows if found.arm.startswith("sparsek")]
    assert {found.arm for found in ours} == {"sparsek", "sparsek-attend", "sparsek-select"}
    assert {(found.status, found.gate, found.cache) for found in ours} == {
        ("ok", True, "float8_e4m3fn")
    }
    others = {found.arm: found for found in run.rows if found not in ours}
    assert {found.status for found in others.values()} == {"unavailable"}
    for name in ("sdpa", "sdpa-cudnn", "xformers", "xformers-local", "vllm-triton"):
        assert others[name].reason.startswith("the cache is float8_e4m3fn"), name
    assert faults(run) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("first line\nsecond line"), "ValueError: first line"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (AssertionError(), "AssertionError"),
    ],
    ids=["exception", "out of memory", "no message"],
)
def test_an_arm_that_fails_is_noted_and_the_others_run(monkeypatch, error, reason):
    run = run_with(monkeypatch, [raising(error), *OURS], (DECODE, PREFILL))
    broken = [found for found in run.rows if found.arm == "broken"]
    assert [(found.status, found.reason, found.us) for found in broken] == [
        ("failed", reason, None)
    ] * 2
    assert [found.status for found in run.rows if found.arm != "broken"] == ["ok"] * 4


def test_inputs_that_do_not_fit_fail_the_case_alone(monkeypatch):
    real = driver.Inputs

    def inputs(case, device, sets):
        if case is PREFILL:
            raise torch.OutOfMemoryError("too much")
        return real(case, device, sets)

    monkeypatch.setattr(driver, "Inputs", inputs)
    run = run_with(monkeypatch, OURS, (PREFILL, DECODE))
    assert [found.status for found in run.rows] == ["failed", "ok", "ok"]
    assert run.rows[0].reason == "inputs: OutOfMemoryError: too much"
    assert faults(run) == [f"sparsek-attend on {PREFILL.name}: {run.rows[0].reason}"]


def test_a_wrong_result_is_timed_but_has_no_speed_up_and_ends_the_command_with_1(monkeypatch):
    arm = Arm("wrong", ("decode",), "attention", wrong)
    case = replace(DECODE, against="wrong")
    run = run_with(monkeypatch, [arm, *OURS], (case,))
    first, *others = run.rows
    assert (first.gate, first.us, first.reason) == (False, 1.0, "differs from float64")
    assert all(found.gate for found in others)
    assert [run.speedup(found) for found in run.rows] == [None] * 3
    assert faults(run) == [f"wrong on {case.name}: differs from float64"]


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    runner = driver.Runner(results(), torch.device("cuda"), 1, print, do_nothing, call_once)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(
        BenchError, match=r"the GPU is lost after broken on .*illegal memory access"
    ):
        runner._require_alive(row("broken"))


# the command line


@pytest.mark.parametrize(
    "options",
    [[], ["--config", "gpt4"], ["--sweep"], ["--run", "micro"], ["--profile"]],
    ids=["all", "config", "sweep", "micro", "profile"],
)
def test_without_a_gpu_the_command_says_so_in_one_line(monkeypatch, capsys, tmp_path, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "kernels", *options]) == 1
    said = capsys.readouterr()
    assert said.err == f"error: {driver.NO_GPU}\n"
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["bench", "bench-profile"])
def test_without_a_gpu_make_says_so_in_one_line(target):
    # of the command's own line and make's, the first is ours
    command = f"{sys.executable} -m vllm_sparsek.cli"
    done = subprocess.run(
        ["make", "-s", target, f"SPARSEK={command}"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said[-1] == f"error: {driver.NO_GPU}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["bench", "bench-profile"])
def test_where_nothing_is_installed_make_says_what_it_takes_in_one_line(target):
    done = subprocess.run(
        ["make", "-s", target, "SPARSEK=no-such-command"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [
        "error: the kernel benchmark needs a CUDA GPU, and this package beside its vLLM: "
        "pip install ."
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "tiles"], "error: no group 'tiles' to --run; did you mean 'tiers'?"),
        (["--profile", "--sweep"], "error: --profile runs no sweeps: leave out --sweep"),
        (["--report", "nowhere"], "error: cannot read nowhere/kernels.json:"),
    ],
    ids=["group", "profile", "report"],
)
def test_a_wrong_option_is_one_line(capsys, options, message):
    assert cli.main(["bench", "kernels", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The command, but with a CPU for a GPU and small cases."""
    monkeypatch.setattr(driver, "require_gpu", lambda: CPU)
    facts = {"device": "CPU", "gpu": {"l2_bytes": 200_000}, "versions": {}, "commit": None}
    monkeypatch.setattr(driver, "facts", lambda device: facts)
    monkeypatch.setattr(measure, "ceilings", lambda: measure.Ceilings(4000.0, 600.0))
    tiers = cases.choose("gpt4").tiers
    choice = cases.Choice([DECODE, PREFILL], tiers)
    monkeypatch.setattr(cases, "choose", lambda *asked: choice)

    def timed_by(time):
        monkeypatch.setattr(driver, "Runner", functools.partial(driver.Runner, time=time))

    timed_by(call_once)
    return timed_by


def test_a_run_writes_data_plot_and_tables_and_shows_them_again(on_the_cpu, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["bench", "kernels", "--output", str(output)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "speed-up over sdpa" in said.out
    assert said.out.splitlines()[-1] == f"results: {output / 'kernels.csv'}"
    assert {path.name for path in output.iterdir()} == {
        "kernels.csv", "kernels.json", "roofline.png"
    }  # fmt: skip
    run = report.load(output)
    assert run.ceilings == {"copy_gb_per_s": 4000.0, "matmul_tflops": 600.0}
    assert run.error is None
    (output / "roofline.png").unlink()
    elsewhere = output / "new" / "folder"
    again = ["bench", "kernels", "--report", str(output), "--output", str(elsewhere)]
    assert cli.main(again) == 0
    assert (elsewhere / "roofline.png").stat().st_size
    assert cli.main(["bench", "kernels", "--report", str(output)]) == 0
    assert "T3" in capsys.readouterr().out
    assert (output / "roofline.png").is_file()


def test_without_the_bench_extra_the_data_are_written_all_the_same(
    on_the_cpu, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(kernel_cli, "has_modules", lambda *modules: "rich" not in modules)
    assert cli.main(["bench", "kernels", "--output", str(tmp_path)]) == 0
    assert f"later: vllm-sparsek bench kernels --report {tmp_path}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.csv", "kernels.json"}


def test_ctrl_c_writes_what_is_there(on_the_cpu, tmp_path, capsys):
    seen = []

    def interrupted(calls, capturable):
        seen.append(calls)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return call_once(calls, capturable)

    on_the_cpu(interrupted)
    assert cli.main(["bench", "kernels", "--output", str(tmp_path)]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: stopped by signal 2\n"
    run = report.load(tmp_path)
    assert run.error == "stopped by signal 2"
    assert sum(found.status == "ok" for found in run.rows) == 2
    assert (tmp_path / "roofline.png").is_file()


def test_wrong_results_end_the_command_with_1(on_the_cpu, tmp_path, capsys, monkeypatch):
    arm = Arm("wrong", ("decode",), "attention", wrong)
    monkeypatch.setattr(driver, "arms_of", lambda case: [arm])
    monkeypatch.setattr(cases, "choose", lambda *asked: cases.Choice([DECODE], {}))
    assert cli.main(["bench", "kernels", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "RED" in said.out
    assert said.err == (
        f"error: 1 results failed or are wrong, first: wrong on {DECODE.name}: "
        "differs from float64\n"
    )


# Nsight Compute

NCU_HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC",' + ",".join(f'"{name}"' for name in profile.METRICS.values())
)
NCU_UNITS = '"","","","","","","","","","","","ns","%","%","%","%","%","byte","byte"'


def ncu_line(number, name, *metrics):
    """A kernel as Nsight Compute prints it."""
    values = ",".join(f'"{value}"' for value in metrics)
    return (
        f'"{number}","4242","python3.12","127.0.0.1","{name}","1","7","(128, 1, 1)",'
        f'"(512, 96, 1)","0","9.0",{values}'
    )


FULL = ("12,345.00", "88.5", "45.25", "30.1", "40", "33.3", "1,000,000", "5")
MARKER_LINE = ("1,024", "0", "1", "0", "0", "0", "32", "0")
NCU_CSV = "\n".join(
    [
        "==PROF== Connected to process 4242 (/usr/bin/python3.12)",
        '==PROF== Profiling "sparsek_profile_marker" - 0: 0%....50%....100% - 9 passes',
        "==PROF== Disconnected from process 4242",
        NCU_HEAD,
        NCU_UNITS,
        ncu_line(0, "sparsek_profile_marker", *MARKER_LINE),
        ncu_line(1, "void cudnn::fort_native_sdpa<A, (int)128>(Params, B const &)", *FULL),
        ncu_line(2, "sparsek_profile_marker", *MARKER_LINE),
        ncu_line(3, "select_fwd_kernel", *FULL),
        ncu_line(4, "prefill_fwd_kernel", "37,035", "80", "n/a", "", *FULL[4:]),
    ]
)


def test_nsight_computes_csv_is_read_with_its_units_and_gaps():
    kernels = profile.parse(NCU_CSV)
    assert [kernel.name for kernel in kernels][1:] == [
        "void cudnn::fort_native_sdpa<A, (int)128>(Params, B const &)", "sparsek_profile_marker",
        "select_fwd_kernel", "prefill_fwd_kernel",
    ]  # fmt: skip
    last = kernels[-1]
    assert (last.grid, last.block) == ("(512, 96, 1)", "(128, 1, 1)")
    assert last.metrics["duration_ns"] == 37035.0
    assert last.metrics["warps_active_pct"] is None
    assert last.metrics["dram_throughput_pct"] is None
    assert last.metrics["dram_read_bytes"] == 1e6
    assert profile.parse("==ERROR== nothing\n") == []
    scaled = NCU_CSV.replace('"ns"', '"us"').replace('"byte"', '"Kbyte"')
    metrics = profile.parse(scaled)[-1].metrics
    assert (metrics["duration_ns"], metrics["dram_read_bytes"]) == (37035e3, 1e9)
    assert profile.parse(NCU_CSV.replace('"ns"', '"cycle"'))[-1].metrics["duration_ns"] is None


def test_kernels_go_to_the_arm_whose_marker_precedes_them():
    dense, ours = row("sdpa-cudnn"), row("sparsek", budget=TOKENS)
    skipped = row("xformers", status="unavailable", us=None)
    entries = profile.assign([dense, skipped, ours], profile.parse(NCU_CSV))
    assert [(entry["arm"], entry["kernel"][:10]) for entry in entries] == [
        ("sdpa-cudnn", "void cudnn"), ("sparsek", "select_fwd"), ("sparsek", "prefill_fw")
    ]  # fmt: skip
    assert [entry["met"] for entry in entries] == [True, True, False]
    assert entries[0]["aim"] == {"metric": "sm_throughput_pct", "above": 85.0}
    assert entries[2]["share_of_arm"] == pytest.approx(0.75)
    decode = row("fa3", DECODE)
    assert profile.assign([decode, ours], profile.parse(NCU_CSV))[0]["met"] is False
    with pytest.raises(BenchError, match="1 arms ran, but Nsight Compute recorded 2"):
        profile.assign([dense], profile.parse(NCU_CSV))


def test_the_target_calls_every_arm_once_behind_a_marker_and_keeps_account(monkeypatch, tmp_path):
    target = importlib.import_module(profile.TARGET)
    assert set(target.PARTS) < {arm.name for arm in ARMS}
    assert target.sparsek_profile_marker.__name__ == profile.MARKER
    happened = []

    class Marker:
        def __getitem__(self, grid):
            return lambda tensor: happened.append("marker")

    monkeypatch.setattr(target, "sparsek_profile_marker", Marker())
    monkeypatch.setattr(target, "require_gpu", lambda: CPU)
    quantised = replace(PREFILL, cache="float8_e4m3fn", context=64, queries=64)
    chosen = [DECODE, PREFILL, quantised]
    monkeypatch.setattr(target, "profiled_cases", lambda config, groups: chosen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: happened.append(name))
    manifest = tmp_path / "manifest.json"
    assert target.main([str(manifest)]) == 0
    rows = json.loads(manifest.read_text())
    ran = [entry for entry in rows if entry["status"] == "ok"]
    assert {entry["arm"] for entry in ran} >= {"sparsek", "sdpa"}
    over_fp8 = {entry["arm"]: entry["status"] for entry in rows if entry["cache"] is not None}
    assert (over_fp8["sparsek"], over_fp8["sdpa"]) == ("ok", "unavailable")
    assert not {entry["arm"] for entry in rows} & set(target.PARTS)
    assert {entry["budget"] for entry in ran} == {None, "s4+k24+w16 R32 token"}
    # one recorded marker for every arm that ran, none for one that failed while it got warm
    assert "failed" in {entry["status"] for entry in rows}
    assert "".join(happened).count("startmarkerstop") == len(ran)


FAKE_NCU = """#!{python}
import json, sys
arguments = sys.argv[1:]
log = arguments[arguments.index("--log-file") + 1]
manifest = arguments[arguments.index("-m") + 2]
open(log, "w").write(open({csv!r}).read())
open(manifest, "w").write(open({rows!r}).read())
json.dump(arguments, open({seen!r}, "w"))
sys.exit({status})
"""


@pytest.fixture
def fake_ncu(monkeypatch, tmp_path):
    """Puts a stand-in for ncu that "records" a text on the PATH; it notes how it was called."""
    monkeypatch.setattr(driver, "require_gpu", lambda: CPU)
    monkeypatch.setattr(driver, "facts", lambda device: {"device": "CPU"})

    def install(text, status=0):
        places = {name: str(tmp_path / name) for name in ("csv", "rows", "seen")}
        Path(places["csv"]).write_text(text)
        rows = [row("sdpa-cudnn"), row("sparsek", budget=TOKENS)]
        Path(places["rows"]).write_text(json.dumps([found.model_dump() for found in rows]))
        (tmp_path / "bin").mkdir()
        command = tmp_path / "bin" / "ncu"
        command.write_text(FAKE_NCU.format(python=sys.executable, status=status, **places))
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        return Path(places["seen"])

    return install


def test_a_profile_writes_metrics_and_leaves_the_clocks_alone(fake_ncu, tmp_path, capsys):
    seen = fake_ncu(NCU_CSV)
    output = tmp_path / "out"
    assert (
        cli.main(["bench", "kernels", "--profile", "--run", "tiers", "--output", str(output)]) == 0
    )
    assert "prefill_fwd_kernel" in capsys.readouterr().out
    content = json.loads((output / "metrics.json").read_text())
    assert [entry["arm"] for entry in content["kernels"]] == ["sdpa-cudnn", "sparsek", "sparsek"]
    assert content["environment"] == {"device": "CPU"}
    arguments = json.loads(seen.read_text())
    assert arguments[arguments.index("--clock-control") + 1] == "none"
    assert set(profile.METRICS.values()) == set(
        arguments[arguments.index("--metrics") + 1].split(",")
    )
    assert arguments[-1] == "tiers"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", "may not read"),
        ("==ERROR== Failed to find metric x\n", "==ERROR== Failed to find metric x"),
        ("", "ncu ended with status 1 and recorded no kernel"),
    ],
    ids=["permission", "error", "silence"],
)
def test_a_profile_that_records_nothing_says_why(fake_ncu, tmp_path, capsys, text, message):
    fake_ncu(text, status=1)
    assert cli.main(["bench", "kernels", "--profile", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_without_nsight_compute_the_profile_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(driver, "require_gpu", lambda: CPU)
    monkeypatch.setattr(driver, "facts", lambda device: {})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["bench", "kernels", "--profile", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: Nsight Compute is missing: no `ncu` on PATH\n"


# a GPU


@pytest.mark.gpu
def test_on_a_gpu_every_arm_that_is_there_runs_and_is_right(capsys):
    mha = replace(
        PREFILL, query_heads=4, kv_heads=4, context=256, queries=256, budgets=(
            Budget(32, 32, 0, 64), Budget(32, 32, 0, 64, 16)
        ),
    )  # fmt: skip
    select = replace(DECODE, kind="select", context=4096, against=None,
                     budgets=(Budget(512, 64, 4, 1),))  # fmt: skip
    run, device = results(), torch.device("cuda")
    ceilings = measure.ceilings()
    assert ceilings.copy_gb_per_s > 100
    chosen = [*(replace(case, dtype="float16") for case in CASES[:-1]), CASES[-1], mha, select]
    engines = ("fa3", "fa3-pages", "sparsek", "sparsek-attend", "sparsek-triton", "sparsek-fa3")
    # what Triton's kernels need for fp8
    if torch.cuda.get_device_capability() >= (8, 9):
        chosen += [replace(c, arms=engines, dtype="bfloat16") for c in (FP8_DECODE, FP8_CHUNK)]
    driver.Runner(run, device, 2**20, print, do_nothing).run(chosen)
    with capsys.disabled():
        for found in run.rows:
            if found.status != "ok":
                print(f"\n{found.arm} on {found.case}: {found.status}: {found.reason}")
    # cuDNN does not take every small shape, and says so
    failed = [found for found in run.rows if found.status == "failed"]
    failed = [
        found
        for found in failed
        if not (found.arm == "sdpa-cudnn" and "No available kernel" in found.reason)
    ]
    assert [(found.arm, found.case, found.reason) for found in failed] == []
    assert [(r.arm, r.case, r.reason) for r in run.rows if r.gate is False] == []
    timed = [found for found in run.rows if found.status == "ok"]
    assert timed and all(found.us and found.us > 0 for found in timed)
    assert {found.timing for found in timed if "select" in found.arm} == {"graph"}
