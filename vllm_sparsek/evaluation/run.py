"""Run the cells, one engine each, dense first; what is in the store already is not run again."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparsek.config import ENV_PREFIX
from vllm_sparsek.evaluation import oracle
from vllm_sparsek.evaluation.plan import DENSE, PERPLEXITY, Cell, file_sha256, fingerprint
from vllm_sparsek.evaluation.prompts import Job
from vllm_sparsek.evaluation.results import Row, rows_of
from vllm_sparsek.evaluation.store import Store
from vllm_sparsek.evaluation.tasks import TASKS
from vllm_sparsek.serving_bench import environment
from vllm_sparsek.serving_bench.demo.cli import CPU_ENV
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.processes import Child, cause, tail
from vllm_sparsek.serving_bench.progress import Progress

# not -m, which puts the working directory on the path
WORKER = (
    sys.executable,
    "-c",
    "import sys; sys.path.pop(0); from vllm_sparsek.evaluation.worker import main; main()",
)
POLL_SECONDS = 0.1
END_SECONDS = 10
# eager: answers are short, and graphs would have to be captured anew for every cell. Small
# chunks bound the memory that log-probabilities over the vocabulary take
ENGINE = {"enforce_eager": True, "max_num_batched_tokens": 2048}
CPU_ENGINE = {"gpu_memory_utilization": 0.3, "max_num_seqs": 8}


@dataclass(frozen=True)
class Plan:
    """What to run, on what.

    Attributes:
        jobs: per length; engine: arguments of ``vllm.LLM`` from the user.
        timeout: seconds one job may take. worker: command that takes a specification's path.
        engines: how many run at the same time.
    """

    model: str
    cells: Sequence[Cell]
    jobs: dict[int, list[Job]]
    engine: dict[str, Any]
    output: Path
    timeout: float
    worker: Sequence[str] = WORKER
    engines: int = 1

    def jobs_of(self, cell: Cell) -> list[Job]:
        """The jobs that mean something in a cell.

        Perplexity of a prompt shows only what reads prompts sparsely; the oracle needs needles.
        """
        jobs = self.jobs[cell.length]
        if cell.column not in (DENSE, "all"):
            jobs = [job for job in jobs if job.task != PERPLEXITY]
        if cell.settings is not None and cell.settings["scorer"] == oracle.NAME:
            jobs = [job for job in jobs if job.task in TASKS and TASKS[job.task].has_needles]
        return jobs

    def steps(self) -> list[tuple[Cell, Job]]:
        """Every job of every cell, in order."""
        return [(cell, job) for cell in self.cells for job in self.jobs_of(cell)]

    def id_of(self, cell: Cell, job: Job) -> str:
        """Of a job's result: depends on all that the result depends on."""
        scorer = (cell.settings or {}).get("scorer_path")
        settings = {k: v for k, v in (cell.settings or {}).items() if k != "scorer_path"}
        digest = file_sha256(scorer) if scorer else None
        return fingerprint(self.model, self.engine, settings, digest, job.digest)

    def engine_arguments(self, cell: Cell) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``; the user's win."""
        arguments = {
            "model": self.model,
            "max_model_len": max(job.longest for job in self.jobs[cell.length]),
            **ENGINE,
            **({} if environment.gpus() else CPU_ENGINE),
            **self.engine,
        }
        if cell.settings is not None:
            arguments["attention_backend"] = "sparsek"
            arguments["additional_config"] = {"sparsek": cell.settings}
            if cell.settings["scorer"] == oracle.NAME:
                arguments |= {"max_num_seqs": 1, "enable_prefix_caching": False}
        return arguments


def engine_environment() -> dict[str, str]:
    """Of the worker: no settings but the cell's, and the engine in the worker's own process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
    device = {} if environment.gpus() else CPU_ENV
    return {**device, **inherited, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Runner:
    """Carries a plan out; `save` is called after every cell."""

    def __init__(self, plan: Plan, store: Store, save: Callable[[], None]) -> None:
        self.plan = plan
        self.store = store
        self.save = save

    def pending(self) -> list[tuple[Cell, Job]]:
        """The steps without a result."""
        steps = self.plan.steps()
        return [step for step in steps if self.plan.id_of(*step) not in self.store.records]

    def run(self, progress: Progress) -> None:
        """Run what is missing. Raises BenchError at the first failure; results are kept."""
        by_cell = itertools.groupby(self.pending(), key=lambda step: step[0])
        waiting = deque((cell, [job for _, job in steps]) for cell, steps in by_cell)
        running: list[Generator[None]] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.plan.engines:
                    running.append(self._run_cell(*waiting.popleft(), progress))
                time.sleep(POLL_SECONDS)
                for cell in list(running):
                    if next(cell, self) is self:
                        running.remove(cell)
                        self.save()
        finally:
            for cell in running:
                cell.close()

    def _run_cell(self, cell: Cell, jobs: list[Job], progress: Progress) -> Generator[None]:
        """Run one cell's engine; every ``next`` looks whether there is something new."""
        logs = self.plan.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        spec = logs / f"{cell.stem}.json"
        log = spec.with_suffix(".log")
        ids = [self.plan.id_of(cell, job) for job in jobs]
        content = {
            "llm": self.plan.engine_arguments(cell),
            "results": str(self.store.path),
            "jobs": [
                {"id": id_, "kind": job.kind, "prompts": str(job.path)}
                for id_, job in zip(ids, jobs, strict=True)
            ],
        }
        spec.write_text(json.dumps(content, indent=1))
        try:
            child = Child([*self.plan.worker, str(spec)], log, env=engine_environment())
        except OSError as error:
            raise BenchError(f"cannot start {self.plan.worker[0]}: {error}") from error
        with child:
            for id_, job in zip(ids, jobs, strict=True):
                label = f"{cell.label}: {job.name}"
                with progress.task(label) as tick:
                    yield from self._await(child, id_, label, tick, progress.say)
            # the last result is out: the engine has nothing left but to end
            deadline = time.monotonic() + END_SECONDS
            while child.returncode is None and time.monotonic() < deadline:
                yield

    def _await(
        self,
        child: Child,
        id_: str,
        label: str,
        tick: Callable[[], None],
        say: Callable[[str], None],
    ) -> Generator[None]:
        deadline = time.monotonic() + self.plan.timeout
        while True:
            ended = child.returncode is not None
            self.store.refresh()
            if id_ in self.store.records:
                return
            if ended:
                for line in tail(child.log):
                    say(f"  | {line}")
                reason = cause(child.log)
                said = f": {reason}" if reason else f" (exit status {child.returncode})"
                raise BenchError(f"{label}: the engine died{said} [log: {child.log}]")
            if time.monotonic() >= deadline:
                raise BenchError(
                    f"{label}: no result after {self.plan.timeout:.0f} s, see --timeout"
                    f" [log: {child.log}]"
                )
            tick()
            yield


def collect(plan: Plan, store: Store) -> list[Row]:
    """Rows of all that the plan asks for and the store has."""
    dense_cells = {cell.length: cell for cell in plan.cells if cell.arm == DENSE}
    rows = []
    for cell, job in plan.steps():
        record = store.records.get(plan.id_of(cell, job))
        if record is not None:
            dense = store.records.get(plan.id_of(dense_cells[cell.length], job))
            rows += rows_of(cell, job, record, dense)
    return rows
