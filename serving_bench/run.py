"""Run each workload on each arm: start, warm up, measure, stop, and report after every run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_sparsek.serving_bench import client, environment, metrics, quality, server
from vllm_sparsek.serving_bench.config import AnySize, Arm
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.processes import Child, shown
from vllm_sparsek.serving_bench.progress import Progress
from vllm_sparsek.serving_bench.results import Results, Run
from vllm_sparsek.serving_bench.server import Endpoint

# added to a run's seed
_WARMUP_SEED = 2**31


@dataclass(frozen=True)
class Plan:
    """What to run. base_url: measure this endpoint instead of starting servers.

    startup_timeout: seconds. vllm: the command in front of `serve` and `bench`. quality: a text
    that every arm's perplexity is measured on; None: of no arm.
    """

    model: str | None
    arms: dict[str, Arm]
    sizes: dict[str, AnySize]
    scale: str
    output: Path
    repeat: int = 1
    base_url: str | None = None
    port: int | None = None
    server_args: Sequence[str] = ()
    startup_timeout: float = 1800.0
    quality: Path | None = None
    vllm: Sequence[str] = server.VLLM

    @property
    def steps(self) -> int:
        """Number of steps in all: servers to start, runs, windows to read."""
        once = (self.base_url is None) + (self.quality is not None)
        return len(self.arms) * (len(self.sizes) * self.repeat + once)


def _seed(workload_index: int, repeat: int) -> int:
    """Distinct per (workload, repeat), or a later run would find its prompts cached.

    The same for all arms, so that they are asked the same.
    """
    return 1 + workload_index + 1000 * repeat


class Runner:
    """Carries a plan out, adding to `results`; `save` is called after every run."""

    def __init__(
        self, plan: Plan, results: Results, progress: Progress, save: Callable[[], None]
    ) -> None:
        self.plan = plan
        self.results = results
        self.progress = progress
        self.save = save
        self._window: quality.Window | None = None

    def run(self) -> None:
        """Run everything. Raises BenchError at the first failure; finished runs are kept."""
        for name, arm in self.plan.arms.items():
            if self.plan.base_url is not None:
                endpoint = server.inspect(self.plan.base_url, self.plan.model)
                self._workloads(name, arm, endpoint, None)
            else:
                self._serve(name, arm)

    def _serve(self, name: str, arm: Arm) -> None:
        assert self.plan.model is not None, "a server needs a model"
        port = self.plan.port or server.free_port()
        server.check_port(port)
        command = server.serve_command(
            self.plan.vllm, self.plan.model, arm, port, self.plan.server_args
        )
        log = self.plan.output / "logs" / f"server-{name}.log"
        base_url = f"http://{server.HOST}:{port}"
        started = time.monotonic()
        with server.start(command, arm, log) as child:
            try:
                with self.progress.task(f"{name}: starting the server") as tick:
                    server.wait_ready(child, base_url, self.plan.startup_timeout, tick)
                self.results.startup_s[name] = time.monotonic() - started
                endpoint = server.inspect(base_url, self.plan.model)
                self._workloads(name, arm, endpoint, child)
            except BenchError as error:
                server.show_tail(log, self.progress.say)
                raise BenchError(f"arm {name!r}, model {self.plan.model!r}: {error}") from error

    def _workloads(self, name: str, arm: Arm, endpoint: Endpoint, child: Child | None) -> None:
        for workload, size in self.plan.sizes.items():
            client.check_length(workload, size, endpoint)
        for index, (workload, size) in enumerate(self.plan.sizes.items()):
            for repeat in range(self.plan.repeat):
                label = f"{name}: {workload}"
                if self.plan.repeat > 1:
                    label += f" {repeat + 1}/{self.plan.repeat}"
                with self.progress.task(label):
                    run = self._measure(
                        name, arm, workload, size, repeat, _seed(index, repeat), endpoint, child
                    )
                self.results.runs.append(run)
                self.save()
                if run.failed:
                    total = run.failed + run.completed
                    self.progress.say(f"  ! {label}: {run.failed} of {total} requests failed")
        # last, outside all readings of the server's counters
        if self.plan.quality is not None:
            self._quality(name, endpoint, child, self.plan.quality)

    def _quality(self, name: str, endpoint: Endpoint, child: Child | None, text: Path) -> None:
        with self.progress.task(f"{name}: quality"):
            if self._window is None:
                # the first arm's, so that all arms read the same
                self._window = quality.window(text, endpoint, child)
                self.results.quality_window = self._window.to_json()
            self.results.perplexity[name] = quality.perplexity(self._window, endpoint, child)
        self.save()
        change = self.results.quality(name)["perplexity_change"]
        if change is not None:
            self.progress.say(f"{name}: quality: {100 * change:+.1f} % perplexity against dense")

    def _measure(
        self,
        name: str,
        arm: Arm,
        workload: str,
        size: AnySize,
        repeat: int,
        seed: int,
        endpoint: Endpoint,
        child: Child | None,
    ) -> Run:
        stem = f"{name}-{workload}-{repeat}"
        raw = self.plan.output / "raw" / f"{stem}.json"
        log = self.plan.output / "logs" / f"client-{stem}.log"
        command = client.bench_command(self.plan.vllm, endpoint, size, raw, seed)
        if repeat == 0 and size.warmup:
            client.warm_up(endpoint, size, seed + _WARMUP_SEED, child)
        started_utc = environment.utc_now()
        before = metrics.scrape_settled(endpoint.base_url)
        with metrics.PeakKvUsage(endpoint.base_url) as usage:
            result = client.run(command, raw, log, child)
        after = metrics.scrape_settled(endpoint.base_url)
        # an endpoint that we did not start may be anything: its density is what it says
        dense = arm.dense and child is not None
        values = metrics.derive(before, after, result.duration_s, dense)
        values["kv_usage_peak"] = usage.peak
        return Run(
            arm=name,
            workload=workload,
            scale=self.plan.scale,
            repeat=repeat,
            seed=seed,
            started_utc=started_utc,
            duration_s=result.duration_s,
            completed=result.completed,
            failed=result.failed,
            metrics={**values, **result.latency_ms},
            client_command=shown(command),
            server_command=shown(child.command) if child is not None else None,
            vllm_result=result.raw,
        )
