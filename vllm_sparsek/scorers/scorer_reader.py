"""Reading scorer files; ``scorer_file`` says what is in them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vllm_sparsek.scorers.scorer_file import ScorerFileError, ScorerHeader, refuse_nan


class ScorerReader:
    """A scorer file, open for reading: ``with ScorerReader(path) as file``.

    Attributes:
        path: the file; header: its checked metadata.

    Raises:
        ScorerFileError: no such file, not safetensors, not a scorer file.
    """

    def __init__(self, path: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        if not Path(path).is_file():
            raise ScorerFileError(f"sparsek: scorer_path {path}: no such file.")
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ScorerFileError(f"sparsek: {path} is not a safetensors file: {error}") from None
        self.header = ScorerHeader.parse(path, self._file.metadata() or {})
        self.names = frozenset(self._file.keys())

    def __enter__(self) -> ScorerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def layers(self) -> list[int]:
        """Indices of the layers in the file, ascending."""
        found = (re.match(r"layers\.(\d+)\.", name) for name in self.names)
        return sorted({int(match[1]) for match in found if match})

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor; of one that is not there, []."""
        return self._file.get_slice(name).get_shape() if name in self.names else []

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor as float32.

        Args:
            name: its name in the file.
            shape: what it must have; None is any size.

        Raises:
            ScorerFileError: missing, another shape, NaN or infinity.
        """
        if name not in self.names:
            layers = self.layers()
            known = f"layers {layers[0]}..{layers[-1]}" if layers else "no layers"
            raise ScorerFileError(
                f"sparsek: {self.path} has no tensor {name} (it has {known}): it was fitted "
                "to another model."
            )
        t = self._file.get_tensor(name).float()
        if len(t.shape) != len(shape) or any(
            want is not None and want != got for want, got in zip(shape, t.shape, strict=True)
        ):
            needs = ", ".join("any" if size is None else str(size) for size in shape)
            raise ScorerFileError(
                f"sparsek: {self.path}: tensor {name} has shape {list(t.shape)}, the model "
                f"needs [{needs}]: it was fitted to another model."
            )
        refuse_nan(self.path, name, t)
        return t
