"""What selection adds to a decode step: keys written, lists selected, attention, as in a layer.

    python tests/gpu/decode_step.py OUT.json

Times sequences of steps over several layers in CUDA graphs, so that nothing is in the caches, with
attention alone, with selection between refreshes and at a refresh, and with the KV write before:
once as kernels are launched, once each after the other has ended. Prints a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.decode import api as decode_api
from vllm_sparsek.kernels.decode import triton as decode_triton
from vllm_sparsek.kernels.select import api as select_api
from vllm_sparsek.kernels.select import triton as select_triton
from vllm_sparsek.kernels.select.memo import SelectionMemo
from vllm_sparsek.kernels.write import api as write_api
from vllm_sparsek.kernels.write import triton as write_triton
from vllm_sparsek.kernels.write.linear import LinearScore

DEVICE = torch.device("cuda", 0)
QUERY_HEADS, HEADS, D, PAGE = 32, 8, 128, 16
LAYERS, STEPS, REPEATS = 4, 8, 9
# requests, context, unit, R
CASES = [
    (16, 32768, 1, 64), (16, 32768, 1, 16), (16, 32768, 16, 64), (16, 32768, 16, 16),
    (1, 131072, 1, 64), (16, 8192, 1, 64),
]  # fmt: skip
# name: (KV write, selection, whether steps move on by a refresh block)
SEQUENCES = {
    "attention": (False, False, False),
    "between": (False, True, False),
    "at_refresh": (False, True, True),
    "write": (True, False, False),
    "write_between": (True, True, False),
    "write_at_refresh": (True, True, True),
}


class Step:
    """Tensors of some layers, and the steps over them."""

    def __init__(self, rows: int, context: int, unit: int, refresh: int) -> None:
        blocks = rows * context // PAGE
        self.context, self.refresh = context, refresh
        self.budget = Budget(1776, 256, 16, refresh, unit)
        self.kv_cache = torch.randn(blocks, HEADS, PAGE, 2 * D, device=DEVICE).bfloat16()
        self.row = torch.arange(rows, device=DEVICE).int()
        self.position = torch.full((rows,), context - 1, device=DEVICE).int()
        self.step = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.max_tokens = self.budget.max_tokens_attended(131072)
        zeros = torch.zeros(HEADS, device=DEVICE)
        weight = 0.02 * torch.randn(3, HEADS, D, device=DEVICE)
        self.linear = LinearScore(weight, zeros, zeros, torch.rand(D // 2, device=DEVICE))
        self.layers = [self._layer(rows, blocks) for _ in range(LAYERS)]

    def _layer(self, rows: int, blocks: int) -> dict[str, Any]:
        table = torch.randperm(blocks, device=DEVICE).int().view(rows, -1)
        stamps = torch.full((rows, HEADS, 4), -2, dtype=torch.int32, device=DEVICE)
        width = self.budget.max_units(131072)
        query = torch.randn(rows, QUERY_HEADS, D, device=DEVICE).bfloat16()
        shapes = decode_api.workspace_shapes(*query.shape, self.max_tokens)
        return {
            "table": table, "scores": torch.randn(blocks, HEADS, PAGE, device=DEVICE),
            "units": torch.zeros(rows, HEADS, width, dtype=torch.int32, device=DEVICE),
            "memo": SelectionMemo(stamps, self.step), "query": query,
            "out": torch.zeros_like(query), "slot": table[:, -1].long() * PAGE + PAGE - 1,
            "key": torch.randn(rows, HEADS, D, device=DEVICE).bfloat16(),
            "workspace": tuple(torch.empty(shape, device=DEVICE) for shape in shapes),
        }  # fmt: skip

    def select(self, layer: dict[str, Any]) -> None:
        """Selection of one layer."""
        select_api.select(
            layer["scores"], layer["table"], self.row, self.position, self.budget, "lse", False,
            layer["units"], memo=layer["memo"],
        )  # fmt: skip

    def run(self, write: bool, select: bool, moves: bool) -> None:
        """STEPS steps."""
        for _ in range(STEPS):
            self.position.add_(self.refresh if moves else 0)
            self.step.add_(1)
            for layer in self.layers:
                if write:
                    write_api.write_tokens(
                        layer["key"], layer["key"], self.position, layer["slot"], self.linear,
                        self.kv_cache, layer["scores"],
                    )  # fmt: skip
                if select:
                    self.select(layer)
                decode_api.decode(
                    layer["query"], self.kv_cache, layer["table"], self.row, self.position,
                    layer["units"], None, self.budget, D**-0.5, layer["out"], layer["workspace"],
                    self.max_tokens,
                )  # fmt: skip

    def begin(self) -> None:
        """Lists of a position some refresh blocks back, as the step before left them."""
        self.position.fill_(self.context - 1 - STEPS * self.refresh - 3)
        self.step.add_(5)
        for layer in self.layers:
            self.select(layer)
        torch.cuda.synchronize()

    def time(self, *sequence: bool) -> float:
        """Microseconds a layer and step."""
        self.begin()
        self.run(*sequence)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(*sequence)
        times = []
        for _ in range(REPEATS):
            self.begin()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            torch.cuda.synchronize()
            times.append(1000 * first.elapsed_time(last) / STEPS / LAYERS)
        return median(times)


def measure(step: Step) -> dict[str, float]:
    """Times of all sequences, and selection's part, amortised, as a share of attention's time."""
    times = {name: step.time(*sequence) for name, sequence in SEQUENCES.items()}
    added = {
        before: (times[f"{before}between"] - alone) * (1 - 1 / step.refresh)
        + (times[f"{before}at_refresh"] - alone) / step.refresh
        for before, alone in (("", times["attention"]), ("write_", times["write"]))
    }
    shares = {f"{before}share": 100 * us / times["attention"] for before, us in added.items()}
    return {name: round(value, 2) for name, value in (times | shares).items()}


def main(out: Path) -> None:
    """Measure all cases."""
    torch.manual_seed(0)
    found = []
    late = {"EARLY": False}
    for rows, context, unit, refresh in CASES:
        step = Step(rows, context, unit, refresh)
        for early in (True, False):
            if not early:
                for module in (decode_triton, select_triton, write_triton):
                    patch.object(module, "launch_early", lambda device: late).start()
            found.append(
                {"rows": rows, "context": context, "unit": unit, "refresh": refresh, "early": early}
                | measure(step)
            )
            patch.stopall()
            print(" ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    device = torch.cuda.get_device_name(DEVICE)
    out.write_text(
        json.dumps({"device": device, "torch": torch.__version__, "steps": found}, indent=1)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
