"""Files that are whole or not there, and CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file, so that an interrupt leaves the old one or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_rows(rows: list[dict[str, object]], path: Path, fields: Sequence[str] = ()) -> None:
    """Write rows as CSV: `fields` first, then the others in the order in which they appear."""
    stream = io.StringIO(newline="")
    names = list(dict.fromkeys([*fields, *(name for row in rows for name in row)]))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, stream.getvalue().encode())
