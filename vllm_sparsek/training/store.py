"""The work folder of a fit: every finished step as a file, so that an interrupted fit goes on.

Files appear whole or not at all. The folder remembers the settings it was made with; other
settings start anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class Store:
    """Tensors by step name under one folder.

    Attributes:
        folder: the work folder.
        resumed: whether steps of an earlier run were found.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Open or create the folder.

        Args:
            folder: where; what an earlier fit with other settings left there is removed.
            settings: everything the steps depend on, as JSON can hold it.
        """
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        record = folder / "settings.json"
        try:
            self.resumed = json.loads(record.read_text()) == settings
        except (OSError, ValueError):
            self.resumed = False
        if not self.resumed:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(settings, indent=1))

    def _path(self, step: str) -> Path:
        return self.folder / f"{step}.safetensors"

    def has(self, step: str) -> bool:
        """Whether a step is finished."""
        return self._path(step).is_file()

    def write(self, step: str, tensors: dict[str, torch.Tensor], record: Any = None) -> None:
        """Keep the tensors of a finished step, and a record of it that JSON can hold.

        Raises:
            OSError: the folder cannot hold them; earlier steps stay.
        """
        temporary = self._path(step).with_suffix(".tmp")
        found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        try:
            save_file(found, temporary, {"record": json.dumps(record)})
            os.replace(temporary, self._path(step))
        except SafetensorError as error:
            raise OSError(f"{self._path(step)} cannot be written: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, step: str, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors of a finished step whose names start with ``prefix``, which is cut off."""
        with safe_open(self._path(step), framework="pt") as file:
            return {
                name[len(prefix) :]: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }

    def record(self, step: str) -> Any:
        """The record of a finished step."""
        with safe_open(self._path(step), framework="pt") as file:
            return json.loads(file.metadata()["record"])

    def remove(self) -> None:
        """Delete the folder once the fit is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
