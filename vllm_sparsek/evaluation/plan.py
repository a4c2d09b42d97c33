"""What is to be run: arms, and the cells (arm, budget, column, length) of the evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparsek.config import SparseKConfig, SparseKConfigError
from vllm_sparsek.evaluation import oracle
from vllm_sparsek.serving_bench.errors import BenchError

DENSE = "dense"
# all: every query is sparse. decode: prompts are read densely. question: contexts are read
# densely, the question and the answer sparsely
COLUMNS = ("all", "decode", "question")
PERPLEXITY = "perplexity"

SINKS = 16
# the window is this share of a budget, up to a limit in tokens
WINDOW_SHARE = 0.25
WINDOW_LIMIT = 512


@dataclass(frozen=True)
class Arm:
    """One way of choosing what to read.

    Attributes:
        label: name in reports; settings: of ``SparseKConfig``, less the budget; None: dense.
    """

    label: str
    settings: dict[str, Any] | None = field(hash=False)

    @property
    def scorer(self) -> str:
        """The scorer's name, or ``dense``."""
        return DENSE if self.settings is None else str(self.settings["scorer"])

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The settings for a report: a scorer's file by its name and hash, not by its folder."""
        if self.settings is None or "scorer_path" not in self.settings:
            return self.settings
        path = self.settings["scorer_path"]
        return {**self.settings, "scorer_path": Path(path).name, "sha256": file_sha256(path)}


@dataclass(frozen=True)
class Cell:
    """One engine: an arm with a budget at a context length, seen in one column.

    Attributes:
        arm: label; budget: share of the context, None for dense; column: see ``COLUMNS``, or
            ``dense``; length: tokens of the context.
        settings: the ``sparsek`` settings of the engine, None for dense.
    """

    arm: str
    budget: float | None
    column: str
    length: int
    settings: dict[str, Any] | None = field(hash=False)

    @property
    def label(self) -> str:
        """For progress and messages."""
        if self.budget is None:
            return f"{self.arm} {self.length}"
        return f"{self.arm} {self.budget:.0%} {self.column} {self.length}"

    @property
    def stem(self) -> str:
        """For file names."""
        return slug(self.label)


def parse_arm(text: str) -> Arm:
    """``NAME[=FILE][:key=value]...`` as an arm; values are JSON or plain text.

    Raises:
        BenchError: not of this form.
    """
    head, *extras = text.split(":")
    name, _, path = head.partition("=")
    if name == DENSE:
        if path or extras:
            raise BenchError(f"--scorers {text}: the dense arm has no settings")
        return Arm(DENSE, None)
    settings: dict[str, Any] = {"scorer": name}
    if name == "learned" and not path:
        raise BenchError("--scorers learned needs its file: learned=scorer.safetensors")
    if path:
        if not Path(path).is_file():
            raise BenchError(f"--scorers {head}: no such file")
        settings["scorer_path"] = str(Path(path).resolve())
    for extra in extras:
        key, equals, value = extra.partition("=")
        if not equals:
            raise BenchError(f"--scorers {text}: {extra!r} is not of the form key=value")
        settings[key] = value_of(value)
    return Arm(text if not path else ":".join([f"{name}={Path(path).stem}", *extras]), settings)


def value_of(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def budget_settings(scorer: str, share: float, length: int) -> dict[str, int]:
    """k, window and sinks that together are a share of the context.

    recency's window takes the whole budget.

    Raises:
        BenchError: nothing is left to select.
    """
    total = round(share * length)
    window = min(round(WINDOW_SHARE * total), WINDOW_LIMIT)
    if scorer == "recency":
        window = total - SINKS - 1
    k = total - window - SINKS
    if k < 1 or window < 1:
        raise BenchError(
            f"a budget of {share:g} of {length} tokens leaves nothing to select: "
            "raise --budgets or --lengths"
        )
    return {"k": k, "window": window, "sinks": SINKS}


def column_settings(column: str, length: int) -> dict[str, Any]:
    """What makes a column; a budget is one of every query that exceeds it."""
    if column == "decode":
        return {"prefill": "dense", "dense_until": 0}
    return {"prefill": "sparse", "dense_until": length if column == "question" else 0}


def cells_of(
    arms: Sequence[Arm], budgets: Sequence[float], columns: Sequence[str], lengths: Sequence[int]
) -> tuple[list[Cell], dict[tuple[str, str], str]]:
    """All cells, dense first, and why there are none for an (arm label, column).

    Raises:
        BenchError: settings that can be used in no column.
    """
    oracle.register()
    cells = [Cell(DENSE, None, DENSE, length, None) for length in lengths]
    unavailable: dict[tuple[str, str], str] = {}
    for arm in arms:
        if arm.settings is None:
            continue
        error: SparseKConfigError | None = None
        for column in columns:
            for length in lengths:
                for budget in budgets:
                    settings = {
                        **budget_settings(arm.scorer, budget, length),
                        **column_settings(column, length),
                        **arm.settings,
                    }
                    try:
                        SparseKConfig.resolve(additional=settings, env={})
                    except SparseKConfigError as refused:
                        error = refused
                        unavailable[arm.label, column] = str(refused)
                        continue
                    cells.append(Cell(arm.label, budget, column, length, settings))
        if error and not any(cell.arm == arm.label for cell in cells):
            raise BenchError(f"--scorers {arm.label}: {error}")
    return cells, unavailable


def slug(text: str) -> str:
    """A name that can be a file's."""
    return re.sub(r"[^\w.]+", "-", text)


def fingerprint(*parts: Any) -> str:
    """A short hash of JSON-able values: the same work has the same one."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: str) -> str:
    """Hash of a scorer's file: another file of the same name is another arm."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
