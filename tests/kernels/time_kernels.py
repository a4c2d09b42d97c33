"""How long the kernels take on this GPU: medians of CUDA graph replays.

    python tests/kernels/time_kernels.py [--context 32768] [--rows 16]

Without a GPU only the training operations are timed, on small rows: medians of plain calls.
Not a benchmark: no baseline, no report. It tells which kernel to look at.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.prefill import api as prefill_api
from vllm_sparsek.kernels.prefix import api as prefix_api
from vllm_sparsek.kernels.score import api as score_api
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.training.operator import sparsek

QUERY_HEADS, HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
WINDOW, SINKS, PREFILL_REFRESH = 256, 4, 128
# score rows of training: layers x KV heads of a 0.5B model, or few and short ones for a CPU
TRAINING_ROWS = {"cuda": (48, 32768, 2048), "cpu": (8, 2048, 256)}  # rows, n, k
WARMUP, REPLAYS, CALLS = 3, 25, 10  # calls inside one graph, so that its launch costs little


def microseconds(call: Callable[[], None]) -> float:
    """Median time of one call in a CUDA graph."""
    for _ in range(WARMUP):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median time of one plain call: training runs outside of CUDA graphs."""
    times = []
    for _ in range(WARMUP + REPLAYS):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[WARMUP:])


def training(device: str) -> None:
    """Print the times of the SparseK operator and of its prefix version."""
    rows, n, k = TRAINING_ROWS[device]
    z = torch.randn(rows, n, device=device, requires_grad=True)
    p = sparsek(z, k)
    weight = torch.randn_like(p)
    forward = milliseconds(lambda: sparsek(z, k), device)
    backward = milliseconds(lambda: torch.autograd.grad(p, z, weight, retain_graph=True), device)
    tau, expiry = torch.empty_like(p), torch.empty_like(p, dtype=torch.int32)
    prefix = milliseconds(lambda: prefix_api.prefix(z.detach(), k, tau, expiry), device)
    shape = f"{device}, {rows} rows of {n} float32 scores, k={k}; milliseconds"
    print(f"sparsek: forward {forward:.2f}, backward {backward:.2f} ({shape})", flush=True)
    print(f"prefix: thresholds and expiry times {prefix:.2f} ({shape})", flush=True)


class Bench:
    """A batch of equally long contexts in a shuffled paged cache."""

    def __init__(self, rows: int, context: int):
        device = torch.device("cuda")
        blocks = rows * context // PAGE + 1
        self.rows, self.context, self.device = rows, context, device
        self.kv = torch.randn(
            blocks, HEADS, PAGE, 2 * HEAD_DIM, dtype=torch.bfloat16, device=device
        )
        self.scores = torch.randn(blocks, HEADS, PAGE, device=device)
        self.anchors = torch.zeros(blocks, HEADS, HEAD_DIM, device=device)
        table = torch.randperm(blocks - 1, device=device) + 1
        self.table = table.int().view(rows, context // PAGE)

    def ints(self, values: list[int]) -> torch.Tensor:
        """An int32 tensor on the GPU."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def select(self, row: torch.Tensor, position: torch.Tensor, budget: Budget, soft: bool):
        """A call that selects, and where it writes."""
        shape = (row.numel(), HEADS, budget.max_units(self.context))
        units = torch.empty(shape, dtype=torch.int32, device=self.device)
        gates = torch.empty(shape, device=self.device) if soft else None

        def call() -> None:
            select_api.select(
                self.scores, self.table, row, position, budget, "lse", soft, units, gates
            )

        return call, units, gates

    def decode(self, budget: Budget, soft: bool = False) -> tuple[float, float]:
        """Microseconds of select and of decode for one query per row."""
        row = self.ints(list(range(self.rows)))
        position = self.ints([self.context - 1] * self.rows)
        select, units, gates = self.select(row, position, budget, soft)
        query = torch.randn(
            self.rows, QUERY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=self.device
        )
        out = torch.empty_like(query)
        bound = budget.max_tokens_attended(self.context)
        workspace = tuple(
            torch.empty(shape, device=self.device)
            for shape in decode_api.workspace_shapes(*query.shape, bound)
        )

        def decode() -> None:
            decode_api.decode(
                query, self.kv, self.table, row, position, units, gates, budget,
                HEAD_DIM**-0.5, out, workspace, bound,
            )  # fmt: skip

        return microseconds(select), microseconds(decode)

    def by_query(self, budget: Budget) -> float:
        """Microseconds of selection by one query per row."""
        shape = (self.kv.shape[0], HEADS, PAGE // budget.unit, 2, HEAD_DIM)
        bounds = torch.randn(shape, device=self.device).bfloat16()
        query = torch.randn(self.rows, QUERY_HEADS, HEAD_DIM, device=self.device).bfloat16()
        row = self.ints(list(range(self.rows)))
        position = self.ints([self.context - 1] * self.rows)
        width = budget.max_units(self.context)
        units = torch.empty(self.rows, HEADS, width, dtype=torch.int32, device=self.device)
        scratch = torch.empty(self.rows, HEADS, self.context // budget.unit, device=self.device)
        return microseconds(
            lambda: bounds_api.select_by_query(
                query, bounds, self.table, row, position, budget, units, scratch
            )
        )

    def write_bounds(self, new: int) -> float:
        """Microseconds of write_bounds for ``new`` tokens of every row."""
        shape = (self.kv.shape[0], HEADS, 1, 2, HEAD_DIM)
        bounds = torch.empty(shape, dtype=self.kv.dtype, device=self.device)
        slot = torch.arange(self.rows * new, device=self.device)
        return microseconds(lambda: bounds_api.write_bounds(self.kv, slot, bounds))

    def prefill(self, budget: Budget, tokens: int) -> tuple[float, float]:
        """Microseconds of select and of prefill for the last ``tokens`` of one row."""
        refresh = budget.refresh
        items = tokens // refresh
        row = self.ints([0] * items)
        position = self.ints([self.context - tokens + i * refresh for i in range(items)])
        start = self.ints([i * refresh for i in range(items)])
        length = self.ints([refresh] * items)
        select, units, gates = self.select(row, position, budget, False)
        query = torch.randn(tokens, QUERY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=self.device)
        out = torch.empty_like(query)

        def prefill() -> None:
            prefill_api.prefill(
                query, self.kv, self.table, row, position, start, length, units, gates, budget,
                HEAD_DIM**-0.5, out,
            )  # fmt: skip

        return microseconds(select), microseconds(prefill)

    def score(self, new: int) -> tuple[float, float]:
        """Microseconds of write_scores and of keydiff for ``new`` tokens of every row."""
        tokens = self.rows * new
        u = torch.randn(tokens, HEADS, device=self.device)
        slot = torch.arange(tokens, device=self.device)
        start = self.ints([i * new for i in range(self.rows + 1)])
        ends = self.ints([self.context] * self.rows)
        return (
            microseconds(lambda: score_api.write_scores(u, slot, self.scores)),
            microseconds(
                lambda: score_api.keydiff(
                    self.kv, self.table, start, ends, self.scores, self.anchors
                )
            ),
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8192, help="prefill tokens")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        training("cpu")
        return
    bench = Bench(arguments.rows, arguments.context)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {arguments.rows} x {arguments.context} tokens,")
    print(f"Hq {QUERY_HEADS}, H {HEADS}, D {HEAD_DIM}, bf16, page {PAGE}; microseconds")
    print(f"{'what':<36}{'select':>10}{'attend':>10}")
    for unit in (1, PAGE):
        for k in (512, 1024, 2048):
            select, attend = bench.decode(Budget(k, WINDOW, SINKS, 1, unit))
            print(f"{f'decode k={k} unit={unit}':<36}{select:>10.1f}{attend:>10.1f}", flush=True)
    select = bench.by_query(Budget(1024, WINDOW, SINKS, 1, PAGE))
    print(f"{'decode k=1024 unit=16 by query':<36}{select:>10.1f}")
    select, attend = bench.decode(Budget(1024, WINDOW, SINKS, 1), soft=True)
    print(f"{'decode k=1024 unit=1 soft_v':<36}{select:>10.1f}{attend:>10.1f}")
    for unit in (1, PAGE):
        budget = Budget(2048, WINDOW, SINKS, PREFILL_REFRESH, unit)
        select, attend = bench.prefill(budget, arguments.chunk)
        label = f"prefill {arguments.chunk} R={PREFILL_REFRESH} k=2048 unit={unit}"
        print(f"{label:<36}{select:>10.1f}{attend:>10.1f}", flush=True)
    for new in (1, 512):
        write, keydiff = bench.score(new)
        bounds = bench.write_bounds(new)
        print(f"score {new} new a row: write {write:.1f}, keydiff {keydiff:.1f}, "
              f"bounds {bounds:.1f}", flush=True)  # fmt: skip
    training("cuda")


if __name__ == "__main__":
    main()
