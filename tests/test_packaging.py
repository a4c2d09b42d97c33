"""The wheel: one top-level package with everything in it, and nothing that shadows others."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STAND_INS = ("stand-in.safetensors", "stand-in.json")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders behind."""
    import shutil

    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("vllm_sparsek", "kernels", "serving_bench", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # the build must take them whether or not there is a real one yet
    for name in STAND_INS:
        (source / "configs" / "scorers" / name).touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
         "--wheel-dir", str(out), str(source)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the wheel's content."""
    target = tmp_path_factory.mktemp("installed")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target",
         str(target), str(wheel)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(installed, code):
    """Run code with the wheel's content first on the path, away from the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=installed, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def text_of(wheel, suffix):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{suffix}")]
        return archive.read(name).decode()


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_only_top_level_name_is_the_package(names):
    top = {name.split("/")[0] for name in names}
    (metadata,) = [name for name in top if name.endswith(".dist-info")]
    assert top == {"vllm_sparsek", metadata}


def test_every_source_file_is_in_the_wheel(names):
    folders = {
        "vllm_sparsek": "vllm_sparsek", "kernels/sparsek": "vllm_sparsek/kernels",
        "serving_bench": "vllm_sparsek/serving_bench", "configs": "vllm_sparsek/configs",
    }  # fmt: skip
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".h", ".cpp") or path.name == "py.typed"
    }
    for name in ("kernels/decode/triton.py", "configs/balanced.yaml", "configs/bench/arms.yaml",
                 "serving_bench/report/report.html.j2", "py.typed"):  # fmt: skip
        assert f"vllm_sparsek/{name}" in expected
    assert expected <= names


def test_shipped_scorers_and_their_logs_are_in_the_wheel(names):
    folder = ROOT / "configs" / "scorers"
    real = {path.name for kind in ("safetensors", "json") for path in folder.glob(f"*.{kind}")}
    inside = {Path(name) for name in names if name.startswith("vllm_sparsek/configs/scorers/")}
    assert {path.name for path in inside} == {"__init__.py", *STAND_INS, *real}


def test_nothing_else_is_in_the_wheel(names):
    scorers = "vllm_sparsek/configs/scorers/"
    inside = {name for name in names if ".dist-info/" not in name and not name.startswith(scorers)}
    assert {Path(name).suffix for name in inside if not name.endswith("py.typed")} == {
        ".py", ".yaml", ".j2", ".h", ".cpp"
    }  # fmt: skip


def test_metadata_says_what_is_needed(wheel):
    metadata = Parser().parsestr(text_of(wheel, "METADATA"))
    assert metadata["Name"] == "vllm-sparsek"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert [r for r in needed if r.startswith("vllm")] == ["vllm<0.34,>=0.32"]
    # vLLM brings the torch it was built against
    assert not [r for r in needed if r.startswith(("torch", "triton"))]
    assert "MIT" in text_of(wheel, "licenses/LICENSE")


def test_entry_points_are_those_vllm_looks_for(wheel):
    parser = configparser.ConfigParser()
    parser.read_string(text_of(wheel, "entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"vllm-sparsek": "vllm_sparsek.cli:main"},
        "vllm.general_plugins": {"sparsek": "vllm_sparsek.plugin:register"},
        "vllm.platform_plugins": {"sparsek": "vllm_sparsek.plugin:platform_hook"},
        "vllm.stat_logger_plugins": {"sparsek": "vllm_sparsek.metrics:SparseKStatLogger"},
    }


def test_the_installed_wheel_imports_from_where_it_was_installed(installed):
    code = """
import importlib, pkgutil, vllm_sparsek
print("FROM", vllm_sparsek.__file__)
from vllm_sparsek.config import SparseKConfig, preset_names
for name in preset_names():
    SparseKConfig.resolve(additional={"preset": name}, env={})
print("PRESETS", preset_names())
for module in ("kernels.select.api", "kernels.decode.api", "kernels.prefill.api",
               "kernels.score.api", "kernels.common.budget", "plugin", "cli",
               "scorers.learned", "serving_bench.config"):
    found = importlib.import_module("vllm_sparsek." + module)
    print("MODULE", found.__file__)
"""
    out = run(installed, code)
    paths = [line.split()[1] for line in out.splitlines() if line.startswith(("FROM", "MODULE"))]
    assert len(paths) == 10
    assert all(path.startswith(str(installed)) for path in paths)
    assert "PRESETS ['balanced', 'quality', 'throughput']" in out


def test_no_other_library_is_shadowed(installed):
    # transformers imports HuggingFace's "kernels" if there is one
    code = f"""
import importlib.util
for name in ("kernels", "sparsek", "serving_bench", "configs", "tests"):
    spec = importlib.util.find_spec(name)
    place = spec and (spec.origin or list(spec.submodule_search_locations or []))
    print("SHADOW" if place and {str(installed)!r} in str(place) else "FREE", name)
"""
    out = run(installed, code)
    assert "SHADOW" not in out
    assert out.count("FREE") == 5


def test_the_command_runs_from_the_installed_wheel(installed):
    out = run(installed, "import sys; sys.argv = ['vllm-sparsek', '--help']\n"
              "from vllm_sparsek.cli import main\n"
              "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code")  # fmt: skip
    assert "bench" in out
