"""Scorers that ship with the package, found by the model that they were fitted to."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vllm_sparsek.scorers.scorer_reader import ScorerReader


def shipped_folder() -> Path:
    """Where the package keeps them."""
    return Path(str(files("vllm_sparsek.configs.scorers")))


def shipped_scorer(fingerprint: str | None) -> Path | None:
    """The shipped scorer of a model.

    Args:
        fingerprint: the model's, of ``model_id.model_fingerprint``; None is no model.

    Returns:
        A scorer file whose ``model`` is the fingerprint, the first by name; None without one.

    Raises:
        ScorerFileError: a file of the folder is no scorer file.
    """
    if fingerprint is None:
        return None
    for path in sorted(shipped_folder().glob("*.safetensors")):
        with ScorerReader(str(path)) as file:
            if file.header.model == fingerprint:
                return path
    return None
