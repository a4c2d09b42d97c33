"""What a result depends on besides the code: hardware, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

PACKAGES = ("vllm", "torch", "triton", "vllm-sparsek")
_COMMAND_TIMEOUT_SECONDS = 10


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """Return an installed package's version, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[str]:
    """Return the names of the GPUs that CUDA_VISIBLE_DEVICES shows; importing torch is not needed.

    Those given by UUID are all reported, as nvidia-smi sees them.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    found = names.splitlines() if names else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    indices = [part.strip() for part in visible.split(",") if part.strip()]
    if not all(part.isdecimal() for part in indices):
        return found
    return [found[int(part)] for part in indices if int(part) < len(found)]


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None without one."""
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def cpu() -> str:
    """Return the CPU's model and the number of logical cores we may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {cores} cores"


def commit() -> str | None:
    """Return the commit of the checkout this file lies in, `+dirty` if modified; else None."""
    here = Path(__file__).resolve().parent
    head = _output("git", "rev-parse", "HEAD", cwd=here)
    # an installed wheel may lie inside some other repository's virtual environment
    if head is None or _output("git", "ls-files", "--error-unmatch", __file__, cwd=here) is None:
        return None
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=here)
    return f"{head}+dirty" if dirty else head


def collect() -> dict[str, object]:
    """Return the environment as JSON-able values. On a foreign endpoint, it is the client's."""
    found = gpus()
    return {
        "device": f"{len(found)} x {found[0]}" if len(found) > 1 else found[0] if found else cpu(),
        "gpus": found,
        "cpu": cpu(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
    }
