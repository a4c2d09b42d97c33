"""The engines' raw results, one JSON line a job: what makes an interrupted run resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Store:
    """Records by the id of their job. A line that an interrupt cut short is dropped.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._read = 0
        self.refresh()
        if path.exists():
            os.truncate(path, self._read)

    def refresh(self) -> None:
        """Read what was appended since the last time; half a line is left for the next time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._read)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self.records[record["id"]] = record
