"""From raw answers to scores: intervals, the loss against dense, and the headline of each cell."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_sparsek.evaluation.plan import DENSE, PERPLEXITY, Cell
from vllm_sparsek.evaluation.prompts import Job
from vllm_sparsek.evaluation.tasks import TASKS
from vllm_sparsek.evaluation.tasks.sample import recall

SCHEMA_VERSION = 1
# tasks at which dense itself fails say nothing about sparsity
LEAST_DENSE_SCORE = 0.2
_Z95 = 1.96
_RESAMPLES = 1000


@dataclass(frozen=True)
class Row:
    """One measure of one cell.

    Attributes:
        measure: ``score`` (mean recall, 0..1), ``loss`` (nats a token), ``increase`` (of the
            perplexity over dense, 0.01 is 1 %); ``loss_last`` and ``increase_last`` are those
            of the last quarter of the windows.
        task: the task, or the text; low, high: 95 % interval, None where there is none.
        n: samples, or windows.
        dense: the dense arm's value; relative: value / dense, of scores.
        density, decode_density: share of the context that was read, by all queries and by
            those of generated tokens.
        seconds: wall time of the job.
    """

    arm: str
    budget: float | None
    column: str
    length: int
    task: str
    measure: str
    value: float
    low: float | None
    high: float | None
    n: int
    dense: float | None
    relative: float | None
    density: float | None
    decode_density: float | None
    seconds: float


@dataclass(frozen=True)
class Summary:
    """The headline of one cell; None: not measured, or nothing to compare.

    Attributes:
        increase, increase_last: of the perplexity over dense, all texts together.
        ruler: mean score of the RULER tasks compared; ruler_relative: over dense's.
        worst, worst_task: lowest score relative to dense, of all tasks compared.
        density: of decode queries where there are any, else of all.
    """

    arm: str
    budget: float | None
    column: str
    length: int
    density: float | None
    increase: float | None = None
    increase_last: float | None = None
    ruler: float | None = None
    ruler_relative: float | None = None
    worst: float | None = None
    worst_task: str | None = None


@dataclass
class Results:
    """Everything one invocation measured or found measured."""

    command: list[str]
    model: str
    started_utc: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    arms: dict[str, Any]
    unavailable: list[dict[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    error: str | None = None

    def left_out(self) -> dict[int, list[str]]:
        """Per length, the tasks that are not compared because dense scores too little."""
        found: dict[int, list[str]] = {}
        for row in self.rows:
            if row.arm == DENSE and row.measure == "score" and row.value < LEAST_DENSE_SCORE:
                found.setdefault(row.length, []).append(row.task)
        return found

    def summaries(self) -> list[Summary]:
        """One per cell, in the order measured."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            key = (row.arm, row.budget, row.column, row.length)
            groups.setdefault(key, []).append(row)
        left_out = self.left_out()
        return [summarize(rows, left_out.get(rows[0].length, [])) for rows in groups.values()]

    def to_json(self) -> dict[str, Any]:
        """JSON-able values: everything, and the summaries."""
        return {
            "schema_version": SCHEMA_VERSION,
            **asdict(self),
            "left_out": self.left_out(),
            "summary": [asdict(summary) for summary in self.summaries()],
        }


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a mean of n values between 0 and 1 (Wilson's, for a binomial share).

    Shares of a sample (two of four values found) vary less than all-or-nothing ones with the
    same mean, so the interval is at worst too wide.
    """
    z2 = _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # rounding must not push an end past the mean at 0 or 1
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def increase(
    ours: Sequence[dict[str, float]], dense: Sequence[dict[str, float]], part: str
) -> float:
    """Relative increase of the perplexity over dense on the same windows.

    Args:
        ours, dense: what the worker measured of each window.
        part: which of its sums: "" or "_last".
    """
    tokens = sum(window[f"tokens{part}"] for window in dense)
    difference = sum(a[f"nll{part}"] - b[f"nll{part}"] for a, b in zip(ours, dense, strict=True))
    return math.exp(difference / tokens) - 1


def increase_interval(
    ours: Sequence[dict[str, float]], dense: Sequence[dict[str, float]], part: str
) -> tuple[float | None, float | None]:
    """95 % interval by resampling the pairs of windows; none for a single window."""
    count = len(dense)
    if count < 2:
        return None, None
    rng = random.Random(0)
    drawn = []
    for _ in range(_RESAMPLES):
        chosen = rng.choices(range(count), k=count)
        drawn.append(increase([ours[i] for i in chosen], [dense[i] for i in chosen], part))
    drawn.sort()
    return drawn[int(0.025 * _RESAMPLES)], drawn[int(0.975 * _RESAMPLES) - 1]


def _share(counters: dict[str, int], prefix: str) -> float | None:
    context = counters.get(f"{prefix}context_tokens")
    return counters[f"{prefix}tokens_attended"] / context if context else None


def rows_of(
    cell: Cell, job: Job, record: dict[str, Any], dense_record: dict[str, Any] | None
) -> list[Row]:
    """The rows of one job of one cell.

    Args:
        record, dense_record: what the worker wrote for this cell and for the dense one.
    """
    counters = record["counters"]
    is_dense = cell.arm == DENSE

    def row(measure: str, value: float, ends: tuple[float | None, float | None], n: int,
            dense: float | None, relative: float | None) -> Row:  # fmt: skip
        return Row(
            cell.arm, cell.budget, cell.column, cell.length, job.name.removeprefix("perplexity: "),
            measure, value, *ends, n, dense, relative,
            1.0 if is_dense else _share(counters, ""),
            1.0 if is_dense else _share(counters, "decode_"), record["seconds"],
        )  # fmt: skip

    if job.task != PERPLEXITY:
        value = score(record["answers"], job.references)
        n = len(job.references)
        dense = score(dense_record["answers"], job.references) if dense_record else None
        relative = value / dense if dense else None
        return [row("score", value, wilson(value, n), n, dense, relative)]
    ours, rows = record["losses"], []
    theirs = dense_record["losses"] if dense_record else None
    for part in ("", "_last"):
        dense = mean_loss(theirs, part) if theirs else None
        rows.append(row(f"loss{part}", mean_loss(ours, part), (None, None), len(ours), dense, None))
        if theirs and not is_dense:
            ends = increase_interval(ours, theirs, part)
            value = increase(ours, theirs, part)
            rows.append(row(f"increase{part}", value, ends, len(ours), None, None))
    return rows


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean recall of the answers."""
    pairs = zip(answers, references, strict=True)
    return sum(recall(answer, wanted) for answer, wanted in pairs) / len(answers)


def mean_loss(windows: Sequence[dict[str, float]], part: str) -> float:
    """Nats a token."""
    tokens = sum(window[f"tokens{part}"] for window in windows)
    return sum(window[f"nll{part}"] for window in windows) / tokens


def summarize(rows: Sequence[Row], left_out: Sequence[str]) -> Summary:
    """The headline of one cell's rows."""
    first = rows[0]
    compared = [r for r in rows if r.measure == "score" and r.task not in left_out]
    compared = [r for r in compared if r.relative is not None]
    ruler = [r for r in compared if TASKS[r.task].ruler]
    worst = min(compared, key=lambda r: r.relative or 0.0, default=None)
    # of the answers to tasks; where only texts were read, of reading them
    scores = [r.decode_density for r in rows if r.measure == "score"]
    densities = [d for d in scores or [r.density for r in rows] if d is not None]

    def pooled(measure: str) -> float | None:
        found = [r for r in rows if r.measure == measure]
        # texts weigh as many windows as they have
        total = sum(r.n for r in found)
        if not total:
            return None
        return math.exp(sum(r.n * math.log1p(r.value) for r in found) / total) - 1

    return Summary(
        first.arm, first.budget, first.column, first.length,
        density=sum(densities) / len(densities) if densities else None,
        increase=pooled("increase"),
        increase_last=pooled("increase_last"),
        ruler=sum(r.value for r in ruler) / len(ruler) if ruler else None,
        ruler_relative=sum(r.value for r in ruler) / sum(r.dense or 0 for r in ruler)
        if ruler else None,
        worst=worst.relative if worst else None,
        worst_task=worst.task if worst else None,
    )  # fmt: skip
