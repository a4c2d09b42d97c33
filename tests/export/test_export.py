"""export-kernels: what it writes compiles, links and launches what Python launches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.dense import attention_forward

HERE = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
ARCH = "".join(str(part) for part in torch.cuda.get_device_capability()) if GPU else "90"
SETTINGS = {"k": 40, "window": 17, "sinks": 5, "refresh": 64}
SHIPPED = ("sparsek.h", "sparsek.cpp", "sparsek_kernels.h")


def command(*arguments, **environment):
    """Run the command line in a process in which Triton does not interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "vllm_sparsek.cli", "export-kernels", *arguments],
        env={**env, **environment}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    done = command("--out", str(out), "--arch", ARCH, "--dtype", "fp16", "--head-dim", "64",
                   "--group", "2", "--granularity", "token,page",
                   "--mode", "hard,soft_v")  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(path.name for path in out.iterdir()) == sorted(SHIPPED)
    return out


@pytest.fixture(scope="module")
def compiler():
    """The C++ compiler and what finds cuda.h, which comes with Triton."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if found is None:
        pytest.skip("needs a C++ compiler: apt-get install g++, or set CXX")
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    assert (include / "cuda.h").is_file()
    return [found, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-isystem", include]


@pytest.fixture(scope="module")
def program(exported, compiler, tmp_path_factory):
    """The test's main linked with what was exported and the driver, or with a stand-in for it."""
    path = tmp_path_factory.mktemp("program") / "main"
    sources = [HERE / "main.cpp", exported / "sparsek.cpp"]
    if GPU:
        from triton.backends.nvidia.driver import libcuda_dirs

        driver = [*(f"-L{folder}" for folder in libcuda_dirs()), "-l:libcuda.so.1"]
    else:
        driver = [HERE / "fake_cuda.cpp"]
    done = subprocess.run(
        [*compiler, "-I", exported, *sources, *driver, "-o", path],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return path


BY_HEAD, BY_TOKEN = False, True
CASES = {
    "token": ((2, 2, 301, 301), BY_HEAD, SETTINGS),
    "long-lists": ((2, 1, 3, 1700), BY_TOKEN, {**SETTINGS, "k": 1200}),
    "short-page": ((1, 2, 70, 333), BY_HEAD, {**SETTINGS, "granularity": "page"}),
    "soft": ((3, 2, 200, 200), BY_TOKEN, {**SETTINGS, "mode": "soft_v", "refresh": 16}),
    # 257 places in the longest list: one more than a multiple
    "share-page-soft": ((2, 3, 1, 1000), BY_HEAD, {**SETTINGS, "granularity": "page",
                        "mode": "soft_v", "k": 0.11, "k_min": 32, "window": 49}),
    "more-than-there-is": ((1, 2, 301, 301), BY_TOKEN, {**SETTINGS, "k": 400}),
    "everything-fits": ((1, 1, 33, 33), BY_HEAD, {**SETTINGS, "window": 100}),
}  # fmt: skip


def tensors(shape, by_token, device="cpu"):
    """q, k, v and scores; q lies by token, k as said, v as k with room after every token."""
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(batch, queries, 2 * heads, 64, generator=generator).half().transpose(1, 2)
    wide = torch.randn(batch, heads, keys, 192, generator=generator).half()
    k, v = wide[..., :64].contiguous(), wide[..., 64:]
    if by_token:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    scores = torch.randn(batch, heads, keys, generator=generator)
    return [t.to(device) for t in (q, k, v[..., :64], scores)]


def run(program, folder, shape, by_token, settings, arch=ARCH, types="", **changed):
    """Write the inputs, run the program; its parameters with ``changed`` ones."""
    q, k, v, scores = tensors(shape, by_token)
    config = SparseKConfig.resolve(additional={"scorer": "knorm", **settings}, env={})
    share = config.k if isinstance(config.k, float) else 0.0
    params = {
        "dtype": 0, "batch": q.shape[0], "query_heads": q.shape[1], "kv_heads": k.shape[1],
        "queries": q.shape[2], "keys": k.shape[2], "head_dim": 64, "scale": 0.125,
        "k_tokens": config.k_min if share else config.k, "k_share": share,
        "window": config.window, "sinks": config.sinks, "refresh": config.refresh,
        "pages": int(config.granularity == "page"), "soft_v": int(config.mode == "soft_v"),
        "out_bytes": 2 * q.numel(), "score_strides": scores.stride()[:2],
        "q_strides": q.stride()[:3], "out_strides": q.stride()[:3], "k_strides": k.stride()[:3],
        "v_strides": v.stride()[:3], **changed,
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("scores", scores)):
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        tensor.as_strided((span,), (1,)).numpy().tofile(folder / f"{name}.bin")
    lines = [
        f"{key} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in params.items()
    ]
    (folder / "params.txt").write_text("\n".join(lines) + "\n")
    return subprocess.run(
        [program, folder], capture_output=True, text=True, timeout=120,
        env={**os.environ, "FAKE_ARCH": arch, "SPARSEK_TYPES": types},
    )  # fmt: skip


def result(folder, like):
    """out.bin with the shape and strides of ``like``."""
    flat = torch.frombuffer(bytearray((folder / "out.bin").read_bytes()), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_program_without_python_computes_what_python_computes(case, program, tmp_path):
    shape, by_token, settings = case
    done = run(program, tmp_path, shape, by_token, settings)
    assert done.returncode == 0, done.stderr
    q, k, v, scores = tensors(shape, by_token, "cuda")
    expected = attention_forward(
        q, k, v, scores=scores, config=settings, scale=0.125, impl="triton"
    ).cpu()
    assert expected.isfinite().all()
    torch.testing.assert_close(result(tmp_path, expected), expected, rtol=0, atol=1e-3)


class Recorder:
    """Stands for a kernel and keeps what it is launched with, by the names of its parameters."""

    def __init__(self, kernel):
        self.names, self.call = kernel.arg_names, None

    def __getitem__(self, grid):
        def launch(*arguments, **constexprs):
            names = [name for name in self.names if name not in constexprs]
            self.call = grid, dict(zip(names, arguments, strict=True)), constexprs

        return launch

    @property
    def types(self):
        """As fake_cuda.cpp wants them: of the exported kernel, whose strides have 64 bits."""
        known = {"scale_log2": "f", "share_bits": "l", "per_block": "l"}
        return "".join(
            known.get(name, "p" if name.endswith("_ptr") else "l" if name[:7] == "stride_" else "i")
            for name in self.call[1]
        )


# where the launcher keeps its lists is its own affair
OWN = {"stride_table_row", "stride_units_item", "stride_units_head", "stride_out_item"}


@pytest.mark.skipif(GPU, reason="the stand-in for the driver is for machines without a GPU")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_launcher_launches_what_python_launches(case, program, tmp_path, monkeypatch):
    from vllm_sparsek.kernels.common import dispatch
    from vllm_sparsek.kernels.prefill import triton as prefill_triton
    from vllm_sparsek.kernels.select import triton as select_triton

    shape, by_token, settings = case
    recorders = {}
    for module, name in (
        (select_triton, "select_fwd_kernel"), (prefill_triton, "lists_fwd_kernel"),
        (prefill_triton, "prefill_fwd_kernel"),
    ):  # fmt: skip
        recorders[name] = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorders[name])
    # the launcher leaves it to the selection to pool pages
    monkeypatch.setattr(select_triton, "POOLED_BYTES", 0)
    monkeypatch.setattr(dispatch, "capability", lambda *_: (True, ""))
    dispatch.implementation.cache_clear()
    q, k, v, scores = tensors(shape, by_token)
    attention_forward(q, k, v, scores=scores, config=settings, scale=0.125, impl="triton")
    dispatch.implementation.cache_clear()

    types = "items_fwd_kernel=ppppiiiii;" + "".join(
        f"{name}={recorder.types};" for name, recorder in recorders.items()
    )
    # of contiguous keys and scores no strides say so
    unsaid = {} if by_token else {"k_strides": (0, 0, 0)}
    done = run(program, tmp_path, shape, by_token, settings, types=types, score_strides=(0, 0),
               **unsaid)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    # q, k, v, scores, out, workspace, in this order
    memory = [(int(line[1]), int(line[2])) for line in lines if line[0] == "alloc"]
    launches = [line[1:] for line in lines if line[0] == "launch"]
    assert [launch[0] for launch in launches] == ["items_fwd_kernel", *recorders] * 2
    assert launches[:4] == launches[4:]
    # every kernel is loaded once
    assert sum(line[0] == "load" for line in lines) == 4

    items = [int(word) for word in launches[0][6:]]
    batch, heads, queries, keys = shape
    refresh = settings["refresh"]
    blocks = (keys - 1) // refresh - (keys - queries) // refresh + 1
    assert items[4:] == [queries, keys, refresh, blocks, batch * blocks]
    places = {"q_ptr": 0, "k_ptr": 1, "v_ptr": 2, "scores_ptr": 3, "out_ptr": 4}
    # main.cpp allocates 16 bytes more than the workspace needs
    low, high = memory[5][0], memory[5][0] + memory[5][1] - 16
    for launch, (name, recorder) in zip(launches[1:], recorders.items(), strict=False):
        grid, expected, _ = recorder.call
        assert [int(n) for n in launch[1:4]] == [*grid, 1][:3]
        found = dict(zip(expected, launch[6:], strict=True))
        for parameter, value in expected.items():
            if parameter in places:
                assert int(found[parameter]) == memory[places[parameter]][0], parameter
            elif parameter.endswith("_ptr"):
                assert low <= int(found[parameter]) < high, parameter
                assert int(found[parameter]) % 16 == 0
            elif parameter == "scale_log2":
                assert float(found[parameter]) == pytest.approx(value, rel=1e-7)
            elif parameter not in OWN and (name, parameter) != (
                "select_fwd_kernel", "stride_out_head"
            ):  # fmt: skip
                assert int(found[parameter]) == value, (name, parameter)
        # the lists of all kernels are the same, and hold what the widest selection keeps
        if name == "select_fwd_kernel":
            units, gates = int(found["units_ptr"]), int(found["gates_ptr"])
            strides = int(found["stride_out_item"]), int(found["stride_out_head"])
            assert strides[1] >= int(found["max_units"])
            assert strides[0] == heads * strides[1]
            end = max(units, gates) + batch * blocks * strides[0] * 4
            assert (gates != units) == (settings.get("mode") == "soft_v")
            assert gates == units or gates >= units + batch * blocks * strides[0] * 4
        else:
            assert units == int(found["units_ptr"])
            assert strides == (int(found["stride_units_item"]), int(found["stride_units_head"]))
        if name == "lists_fwd_kernel":
            slots = int(found["slots_ptr"])
            assert slots >= end
            assert slots + batch * blocks * heads * int(found["width"]) * 4 <= high
        if name == "prefill_fwd_kernel":
            assert slots == int(found["slots_ptr"])
            assert gates == int(found["gates_ptr"])
        else:
            # the first item of row r holds r: a table of one column
            assert int(found["block_table_ptr"]) == items[0]
            assert int(found["stride_table_row"]) == blocks


WRONG = {
    "batch": ({"batch": 0}, "batch is 0"),
    "heads": ({"query_heads": 3}, "query_heads is 3"),
    "queries": ({"queries": 302}, "queries is 302"),
    "k": ({"k_tokens": 0}, "k_tokens is 0"),
    "share": ({"k_share": 1.0}, "k_share is 1"),
    "sinks": ({"sinks": -1}, "sinks is -1"),
    "stride": ({"v_strides": (64, 64, 65)}, r"v_strides[2] is 65"),
    "no-token-stride": ({"k_strides": (64, 64, 0)}, "k_strides[0] is 64: it must be a multiple"),
    "between-rows": ({"v_strides": (80, 64, 64)}, "multiple of v_strides[2], 64"),
    "unlike": (
        {"v_strides": (64 * 301, 64, 64)},
        "k_strides: 602 tokens from row to row, v_strides: 301",
    ),
    "far": (
        {"k_strides": (2**37, 64, 64), "v_strides": (2**38, 128, 128)},
        "k_strides: 2147483648 "
        "tokens from row to row; with batch 2 and keys 301 at most 2147483346",
    ),
    "long-list": ({"window": 2**31 - 1}, "window is 2147483647"),
    "alignment": ({"shift_q": 2}, "q is not aligned to 16 bytes"),
    "workspace": ({"less_workspace": 1}, "workspace_bytes is"),
    "head-dim": ({"head_dim": 96}, f"no kernel was exported for sm_{ARCH} fp16 head_dim 96"),
    "dtype": ({"dtype": 1}, f"there are: sm_{ARCH} fp16 head_dim 64 group 2 tokens;"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_params_that_cannot_be_used_are_refused_by_name(wrong, program, tmp_path):
    changed, says = wrong
    done = run(program, tmp_path, (2, 2, 301, 301), BY_HEAD, SETTINGS, **changed)
    assert done.returncode == 1
    assert says in done.stderr
    assert "launch" not in done.stdout


@pytest.mark.skipif(GPU, reason="the stand-in for the driver is for machines without a GPU")
def test_a_gpu_that_nothing_was_exported_for_is_an_error(program, tmp_path):
    done = run(program, tmp_path, (1, 1, 64, 64), BY_HEAD, SETTINGS, arch="103")
    assert done.returncode == 1
    assert "no kernel was exported for sm_103 fp16 head_dim 64 group 2 tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "75"], "75 is none of"),
        (["--dtype", "fp8"], "fp8 is none of"),
        (["--head-dim", "x"], "no list of integers"),
        (["--mode", "soft"], "soft is none of"),
    ],
    ids=["arch", "dtype", "head-dim", "mode"],
)
def test_choices_are_checked_before_anything_is_compiled(arguments, says, tmp_path):
    done = command("--out", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--out", str(tmp_path / "file"), "--head-dim", "64")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error:")
    assert "Traceback" not in done.stderr


def test_binaries_name_no_folder_of_the_machine_that_made_them(exported):
    text = (exported / "sparsek_kernels.h").read_text()
    arrays = re.findall(r"kCubin\d+\[\] = \{([\d,\n]*)\}", text)
    assert len(arrays) == text.count("{Kind::k") == 11
    for array in arrays:
        binary = bytes(int(number) for number in re.findall(r"\d+", array))
        assert binary.startswith(b"\177ELF")
        assert b"triton.py" not in binary


@pytest.mark.parametrize(
    ("needs", "says"),
    [({"num_ctas": 2}, "clusters"), ({"global_scratch_size": 64}, "global scratch memory")],
)
def test_a_kernel_the_launcher_cannot_start_is_not_exported(needs, says, monkeypatch, tmp_path):
    from types import SimpleNamespace

    from vllm_sparsek.export import kernels

    plain = {
        "global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1,
        "launch_cooperative_grid": False, "launch_pdl": False,
    }  # fmt: skip
    metadata = SimpleNamespace(**{**plain, **needs})
    compiled = SimpleNamespace(metadata=metadata, asm={})
    monkeypatch.setattr(kernels, "compile_kernel", lambda *_: compiled)
    chosen = kernels.variants([90], ["fp16"], [64], [1], ["token"], ["hard"], 64)
    with pytest.raises(kernels.ExportError, match=f"needs {says}"):
        kernels.export(chosen, tmp_path)
