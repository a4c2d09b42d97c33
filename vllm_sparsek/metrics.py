"""SparseK's numbers on the server's ``/metrics``.

The engine's worker counts into a small file mapped into memory; a stat logger in the API
process reads it when the endpoint is scraped. Both find it by the instance id they share.
"""

from __future__ import annotations

import atexit
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_sparsek import compat

# name after "sparsek:" and help text of every counter, in the file's order
COUNTERS = (
    ("tokens_attended", "Context tokens read, summed over queries, mean over layers."),
    ("context_tokens", "Context tokens there were, summed over queries."),
    ("decode_tokens_attended", "The same as tokens_attended, of decode queries alone."),
    ("decode_context_tokens", "The same as context_tokens, of decode queries alone."),
    ("dense_steps", "Engine steps in which no query was sparse."),
    ("steps", "Engine steps."),
)
_FORMAT = struct.Struct(f"{len(COUNTERS)}q")
_ZEROS = (0,) * len(COUNTERS)


def _path(vllm_config: VllmConfig, engine: int) -> Path:
    name = f"vllm-sparsek-{os.getuid()}-{vllm_config.instance_id}-{engine}.counters"
    return Path(tempfile.gettempdir()) / name


def read_counters(vllm_config: VllmConfig, engine: int = 0) -> dict[str, int]:
    """What the engine's worker has counted so far: values of ``COUNTERS`` by name.

    Zeros where nobody counts: before the worker starts, or under another backend.
    """
    values: tuple[int, ...] = _ZEROS
    with suppress(OSError, struct.error):
        values = _FORMAT.unpack(_path(vllm_config, engine).read_bytes())
    return {name: value for (name, _), value in zip(COUNTERS, values, strict=True)}


class StepCounters:
    """Counters of one engine, written by its first worker."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(_FORMAT.pack(*_ZEROS))
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), _FORMAT.size)
        self._values = list(_ZEROS)
        # workers leave through multiprocessing, which runs finalizers and no atexit functions
        Finalize(None, path.unlink, kwargs={"missing_ok": True}, exitpriority=0)

    @classmethod
    def create(cls, vllm_config: VllmConfig) -> StepCounters | None:
        """Counters for this process, or None where another rank of the engine counts."""
        parallel = vllm_config.parallel_config
        if parallel.rank != 0:
            return None
        return cls(_path(vllm_config, parallel.data_parallel_index))

    def add(self, attended: np.ndarray, context: np.ndarray, decodes: int, dense: bool) -> None:
        """Count one step.

        Args:
            attended, context: [queries] tokens read (mean over layers) and readable.
            decodes: queries at the front of the batch that belong to decode rows.
            dense: no query of the step was sparse.
        """
        amounts = (attended.sum(), context.sum(), attended[:decodes].sum(),
                   context[:decodes].sum(), dense, 1)  # fmt: skip
        for index, amount in enumerate(amounts):
            self._values[index] += int(amount)
        self._map[:] = _FORMAT.pack(*self._values)


class _Collector:
    """Prometheus collector over the counters of all engines of one instance."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.engines: set[int] = set()
        # a worker that was killed leaves its file
        atexit.register(self.unlink)

    def unlink(self) -> None:
        """Remove the files of all engines; a running worker counts on unseen."""
        for engine in self.engines:
            _path(self.vllm_config, engine).unlink(missing_ok=True)

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["engine", "model_name"]
        counters = [
            CounterMetricFamily(f"sparsek:{name}", text, labels=labels) for name, text in COUNTERS
        ]
        density = GaugeMetricFamily(
            "sparsek:density", "Share of the context read since the start.", labels=labels
        )
        model = self.vllm_config.model_config.served_model_name
        model = model[0] if isinstance(model, list) else str(model)
        for engine in sorted(self.engines):
            values = read_counters(self.vllm_config, engine)
            for counter, value in zip(counters, values.values(), strict=True):
                counter.add_metric([str(engine), model], value)
            if values["context_tokens"]:
                share = values["tokens_attended"] / values["context_tokens"]
                density.add_metric([str(engine), model], share)
        yield from counters
        yield density


class SparseKStatLogger(StatLoggerBase):
    """``vllm.stat_logger_plugins``: exports the counters; does nothing for other backends."""

    _collectors: ClassVar[dict[str, _Collector]] = {}

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        if not compat.is_selected(vllm_config):
            return
        from prometheus_client import REGISTRY

        key = vllm_config.instance_id
        if key not in self._collectors:
            for old in self._collectors.values():
                REGISTRY.unregister(old)  # type: ignore[arg-type]
            self._collectors.clear()
            self._collectors[key] = _Collector(vllm_config)
            REGISTRY.register(self._collectors[key])  # type: ignore[arg-type]
        self._collectors[key].engines.add(engine_index)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        """Nothing to record: the worker counts."""

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
