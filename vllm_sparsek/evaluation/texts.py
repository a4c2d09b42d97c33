"""Real texts: for perplexity, and to hide needles in."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sparsek.serving_bench.errors import BenchError

# modules every Python has; together about 500 kB of source
SOURCE_MODULES = (
    "argparse.py", "tarfile.py", "typing.py", "subprocess.py", "shutil.py", "inspect.py",
    "unittest/mock.py", "http/client.py",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text, its name in reports, and the hash that says which one it was."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read(paths: Sequence[Path]) -> list[Text]:
    """The files the user named.

    Raises:
        BenchError: a file that is missing, not UTF-8 or empty; two of one name.
    """
    found: list[Text] = []
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"--text {path} cannot be read: {error}") from error
        if not content.strip():
            raise BenchError(f"--text {path} is empty")
        if any(text.name == path.stem for text in found):
            raise BenchError(f"--text {path}: another text is called {path.stem!r} already")
        found.append(Text(path.stem, content))
    return found


def default() -> list[Text]:
    """What every machine with Python has: its reference manual (prose) and library (source)."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    source = "\n\n".join((library / name).read_text("utf-8") for name in SOURCE_MODULES)
    return [
        Text(f"python-{version}-manual", "\n\n".join(topics[name] for name in sorted(topics))),
        Text(f"python-{version}-source", source),
    ]


def windows(ids: Sequence[int], start: Sequence[int], length: int, count: int) -> list[list[int]]:
    """Up to ``count`` windows of a text, evenly spread, none overlapping another.

    Args:
        ids: the text's token ids; start: ids in front of each window (BOS).
        length: tokens of a window, start included.
    """
    step = length - len(start)
    fit = len(ids) // step
    count = min(count, fit)
    return [
        [*start, *ids[first * step : (first + 1) * step]]
        for first in (index * fit // count for index in range(count))
    ]
