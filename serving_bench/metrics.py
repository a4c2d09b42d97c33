"""Read a vLLM server's Prometheus metrics and turn two readings into rates."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from vllm_sparsek.serving_bench import http

PROMPT_TOKENS = "vllm:prompt_tokens_total"
PROMPT_TOKENS_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
GENERATION_TOKENS = "vllm:generation_tokens_total"
CACHE_QUERIES = "vllm:prefix_cache_queries_total"
CACHE_HITS = "vllm:prefix_cache_hits_total"
PREEMPTIONS = "vllm:num_preemptions_total"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
ATTENDED = "sparsek:tokens_attended_total"
CONTEXT = "sparsek:context_tokens_total"
DECODE_ATTENDED = "sparsek:decode_tokens_attended_total"
DECODE_CONTEXT = "sparsek:decode_context_tokens_total"
DENSE_STEPS = "sparsek:dense_steps_total"
STEPS = "sparsek:steps_total"

_KEPT_PREFIXES = ("vllm:", "sparsek:")
POLL_SECONDS = 0.25
SETTLE_SECONDS = 3.0


@dataclass(frozen=True)
class Snapshot:
    """All samples of one reading: name → [(labels, value)]."""

    samples: dict[str, list[tuple[dict[str, str], float]]]

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum over engines (and other labels) of a metric; None if it is absent."""
        values = [
            value
            for have, value in self.samples.get(name, [])
            if all(have.get(key) == wanted for key, wanted in labels.items())
        ]
        return sum(values) if values else None

    def highest(self, name: str) -> float | None:
        """Return the highest value over engines, for gauges that are shares."""
        return max((value for _, value in self.samples.get(name, [])), default=None)


def parse(text: str) -> Snapshot:
    """Parse Prometheus text, keeping vLLM's and our own metrics. Raises ValueError on garbage."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(_KEPT_PREFIXES):
            continue
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))
    return Snapshot(samples)


def scrape(base_url: str) -> Snapshot:
    """Read `/metrics`; empty where the endpoint has none, so that all it tells is n/a."""
    try:
        return parse(http.get(f"{base_url}/metrics"))
    except http.HTTP_ERRORS:
        return Snapshot({})


def scrape_settled(base_url: str, seconds: float = SETTLE_SECONDS) -> Snapshot:
    """Read `/metrics` once no request runs and the token count stands still, or after `seconds`.

    The last token reaches the client a moment before it reaches the counters.
    """
    deadline = time.monotonic() + seconds
    last = scrape(base_url)
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        now = scrape(base_url)
        idle = not ((now.total(RUNNING) or 0) + (now.total(WAITING) or 0))
        if idle and now.total(GENERATION_TOKENS) == last.total(GENERATION_TOKENS):
            return now
        last = now
    return last


class PeakKvUsage(threading.Thread):
    """Poll the KV cache's usage until stopped; `peak` is a share of 1, None if never seen."""

    def __init__(self, base_url: str) -> None:
        super().__init__(daemon=True)
        self._url = base_url
        self._done = threading.Event()
        self.peak: float | None = None

    def run(self) -> None:
        """Poll. Only the gauge's lines are parsed, to leave the server's cores alone."""
        while not self._done.is_set():
            try:
                text = http.get(f"{self._url}/metrics")
            except http.HTTP_ERRORS:
                text = ""
            lines = [line for line in text.splitlines() if line.startswith(KV_USAGE)]
            usage = parse("\n".join(lines) + "\n").highest(KV_USAGE)
            if usage is not None:
                self.peak = max(usage, self.peak or 0.0)
            self._done.wait(POLL_SECONDS)

    def __enter__(self) -> PeakKvUsage:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self.join(timeout=5.0)


def delta(before: Snapshot, after: Snapshot, name: str, **labels: str) -> float | None:
    """Return a counter's growth; None if it is absent or was reset in between."""
    end = after.total(name, **labels)
    if end is None:
        return None
    # a counter without samples yet starts at 0
    growth = end - (before.total(name, **labels) or 0.0)
    return growth if growth >= 0 else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole; None if either is unknown or the whole is 0."""
    return part / whole if part is not None and whole else None


def derive(
    before: Snapshot, after: Snapshot, duration_s: float, dense: bool
) -> dict[str, float | None]:
    """Return what a run's two readings say; None is "not available".

    Rates are tokens per second of the client's duration; hit rate, density and the share of dense
    steps are shares of 1. `dense`: the whole context is read by definition.
    """
    prompt = delta(before, after, PROMPT_TOKENS)
    generation = delta(before, after, GENERATION_TOKENS)
    prefill = delta(before, after, PROMPT_TOKENS_BY_SOURCE, source="local_compute")
    hits = delta(before, after, CACHE_HITS)
    density = ratio(delta(before, after, ATTENDED), delta(before, after, CONTEXT))
    decode_density = ratio(
        delta(before, after, DECODE_ATTENDED), delta(before, after, DECODE_CONTEXT)
    )
    return {
        "prompt_tokens": prompt,
        "generation_tokens": generation,
        "prefill_tokens": prefill,
        "prompt_tokens_per_s": ratio(prompt, duration_s),
        "generation_tokens_per_s": ratio(generation, duration_s),
        "prefill_tokens_per_s": ratio(prefill, duration_s),
        "kv_hit_rate": ratio(hits, delta(before, after, CACHE_QUERIES)),
        "preemptions": delta(before, after, PREEMPTIONS),
        "density": 1.0 if dense else density,
        "decode_density": 1.0 if dense else decode_density,
        "dense_step_share": ratio(delta(before, after, DENSE_STEPS), delta(before, after, STEPS)),
    }
