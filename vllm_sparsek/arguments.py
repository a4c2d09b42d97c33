"""What the command lines share: types of arguments, and the check for an optional dependency."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable


def names(text: str) -> list[str]:
    """Names separated by commas, each once, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("needs at least one name")
    return list(dict.fromkeys(found))


def at_least(least: int) -> Callable[[str], int]:
    """An integer that is not smaller than ``least``."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return integer


positive = at_least(1)


def has_modules(*modules: str) -> bool:
    """Whether what the extra ``bench`` brings can be imported; if not, says so on stderr."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        print(f"error: {error.name} is missing: pip install 'vllm-sparsek[bench]'", file=sys.stderr)
        return False
    return True
