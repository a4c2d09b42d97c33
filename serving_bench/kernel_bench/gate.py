"""Whether a result is right: a sample of it against float64 over the same selection.

What attention may be wrong by is the kernel tests' budget, made relative to each sampled output's
largest number: twice the error of plain torch at the tensors' precision, plus one rounding. Over an
fp8 cache the truth is attention over the keys and values that it stands for. Engines that multiply
in fp8 round queries and probabilities to it, too: so does the plain torch that they are held to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.common.validate import FP8
from vllm_sparsek.kernels.decode.reference import visible_positions
from vllm_sparsek.kernels.select.reference import unit_scores
from vllm_sparsek.serving_bench.kernel_bench.inputs import POOLING, Inputs

SAMPLES = 48
# largest |difference| the project's user allows, by dtype
USER_BOUND = {"float16": 2e-3}
# two ways to pool a page's scores may round differently: pages this near the threshold may swap
NEAR_TIE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """Whether a result is right.

    max_diff: largest |difference|, None where lists are compared. error_share: of attention, the
    largest error as a share of what that output may be wrong by.
    """

    ok: bool
    max_diff: float | None = None
    error_share: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """One query of one head: request, index among the request's new tokens, query head."""

    row: int
    query: int
    head: int


def samples(inputs: Inputs, count: int = SAMPLES) -> list[Sample]:
    """The first and the last query of a request, and others at random; always the same ones."""
    case, draw = inputs.case, random.Random(0)
    fixed = [Sample(0, 0, 0), Sample(case.batch - 1, case.queries - 1, case.query_heads - 1)]
    return fixed + [
        Sample(
            draw.randrange(case.batch),
            draw.randrange(case.queries),
            draw.randrange(case.query_heads),
        )
        for _ in range(count - len(fixed))
    ]


def _attend(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """[D] of query [D] over rows [n, 2 * D], every step rounded to the dtype of the arguments."""
    head_dim = query.shape[0]
    weights = torch.softmax((rows[:, :head_dim] @ query) * scale, dim=0)
    return weights @ rows[:, head_dim:]


def _attend_in_fp8(
    query: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    kv_scales: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """[D] of query [D] over fp8 rows [n, 2 * D], all operands of products rounded to fp8."""
    key, value = rows.float().chunk(2, dim=1)
    logits = (key @ query.to(FP8).float()) * kv_scales[0] * scale
    weights = (logits - logits.amax()).exp()
    return weights.to(FP8).float() @ value * kv_scales[1] / weights.sum()


class Expected:
    """The sampled outputs of attention in float64, and the error that is allowed.

    Args:
        inputs: the inputs; set 0 is checked.
        visible: (request, position, KV head) -> positions [n] that the query reads.
        fp8_products: who is judged multiplies in the cache's fp8, and returns bfloat16.
    """

    def __init__(
        self,
        inputs: Inputs,
        visible: Callable[[int, int, int], torch.Tensor],
        fp8_products: bool = False,
    ):
        case = inputs.case
        self.inputs, self.samples = inputs, samples(inputs)
        group = case.query_heads // case.kv_heads
        exact, eager = [], []
        for at in self.samples:
            head = at.head // group
            position = case.context - case.queries + at.query
            seen = visible(at.row, position, head).to(inputs.device)
            blocks = inputs.table[at.row, seen // case.page].long()
            rows = inputs.cached(blocks, head, seen % case.page)  # [n, 2D]
            query = inputs.query[0, at.row * case.queries + at.query, at.head]
            meant = inputs.dequantised(rows)
            exact.append(_attend(query.double(), meant, inputs.scale))
            if fp8_products:
                assert inputs.kv_scales is not None
                rounded = _attend_in_fp8(query, rows, inputs.scale, inputs.kv_scales)
            else:
                rounded = _attend(query, meant.to(query.dtype), inputs.scale)
            eager.append(rounded.double())
        self.exact = torch.stack(exact)  # [samples, D]
        largest = self.exact.abs().amax(1)  # [samples]
        eager_error = (torch.stack(eager) - self.exact).abs().amax(1)
        # outputs of few tokens are large: they must not excuse the others
        written = torch.bfloat16 if fp8_products else inputs.query.dtype
        relative = 2 * (eager_error / largest).max() + torch.finfo(written).eps
        self.allowed = relative * largest

    def check(self, output: torch.Tensor) -> Verdict:
        """Judge ``output`` [batch, queries, Hq, D] of input set 0."""
        got = torch.stack([output[at.row, at.query, at.head] for at in self.samples])
        error = (got.double() - self.exact).abs().amax(1)
        share = (error / self.allowed).max().item()
        # a nan is not at most anything
        ok = share <= 1
        return Verdict(ok, error.max().item(), share, "" if ok else "differs from float64")


def expect_dense(
    inputs: Inputs, local_window: int | None = None, fp8_products: bool = False
) -> Expected:
    """Everything up to the query is read, or the last ``local_window`` tokens of it."""

    def visible(row: int, position: int, head: int) -> torch.Tensor:
        first = 0 if local_window is None else max(0, position + 1 - local_window)
        return torch.arange(first, position + 1)

    return Expected(inputs, visible, fp8_products)


def expect_sparse(inputs: Inputs, budget: Budget, fp8_products: bool = False) -> Expected:
    """Sinks, window and what our selection keeps; ``check_selection`` judges the selection."""
    units, items = inputs.units(budget, 0), inputs.items(budget.refresh, 0)
    first = items.position[: items.per_request].tolist()

    def visible(row: int, position: int, head: int) -> torch.Tensor:
        item = row * items.per_request + sum(start <= position for start in first) - 1
        kept = units[item, head].cpu()
        return visible_positions(position, kept[kept >= 0], budget)

    return Expected(inputs, visible, fp8_products)


def check_selection(inputs: Inputs, budget: Budget, units: torch.Tensor) -> Verdict:
    """Judge the lists ``units`` [items, H, K] of input set 0 as sets, on a sample of them."""
    case = inputs.case
    items = inputs.items(budget.refresh, 0)
    group = case.query_heads // case.kv_heads
    for at in samples(inputs):
        starts = items.position[: items.per_request].tolist()
        position = case.context - case.queries + at.query
        within = sum(begin <= position for begin in starts) - 1
        item, head = at.row * items.per_request + within, at.head // group
        start = budget.selection_position(position)
        first, end = budget.first_unit(), budget.end_unit(start)
        keep = min(budget.units_kept(start), end - first)
        blocks = inputs.table[at.row].long()
        tokens = inputs.scores[blocks, head].flatten()[None]  # [1, n]
        z = unit_scores(tokens[:, : end * budget.unit], budget.unit, POOLING)[0, first:end]
        # stable sort: of equal scores the earlier unit stays
        order = torch.sort(z, descending=True, stable=True).indices
        wanted = set((order[:keep] + first).tolist())
        got = [unit for unit in units[item, head].tolist() if unit >= 0]
        where = f"request {at.row}, position {position}, KV head {head}"
        if len(got) != keep or len(set(got)) != keep:
            return Verdict(False, reason=f"{len(set(got))} units instead of {keep}: {where}")
        odd = sorted(wanted.symmetric_difference(got))
        if odd and (odd[0] < first or odd[-1] >= end):
            return Verdict(False, reason=f"a unit that does not compete: {where}")
        near = 0.0 if budget.unit == 1 else NEAR_TIE
        threshold = z[order[keep - 1]] if keep else z.new_zeros(())
        if any(abs(z[unit - first] - threshold) > near or not near for unit in odd):
            return Verdict(False, reason=f"not the top {keep}: {where}")
    return Verdict(True)


def check_top_k(values: torch.Tensor, indices: torch.Tensor) -> Verdict:
    """Judge indices [rows, k] of the largest of values [rows, n]; of equal ones any will do."""
    k = indices.shape[1]
    if int(indices.min()) < 0 or int(indices.max()) >= values.shape[1]:
        return Verdict(False, reason="an index outside the row")
    ordered = indices.long().sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        return Verdict(False, reason="an index twice")
    got = values.gather(1, ordered).sort(-1).values
    ok = torch.equal(got, values.topk(k).values.sort(-1).values)
    return Verdict(ok, reason="" if ok else f"not the top {k}")


def check_equal(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 0.0) -> Verdict:
    """Judge a tensor that must be equal, up to ``tolerance``."""
    worst = (got.double() - wanted.double()).abs().max().item()
    ok = worst <= tolerance
    return Verdict(ok, worst, reason="" if ok else "wrong values")


Judge = Callable[[torch.Tensor], Verdict]


class Gate:
    """Judges for the arms of one case; what is expected is worked out once for all of them.

    ``fp8_products``: see ``Expected``.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self._expected: dict[tuple[Budget | int | None, bool], Expected] = {}
        self._selection: dict[Budget, Verdict] = {}

    def dense(self, local_window: int | None = None, fp8_products: bool = False) -> Judge:
        """Judge [batch, queries, Hq, D] of dense attention, or of a local window."""

        def judge(output: torch.Tensor) -> Verdict:
            key = local_window, fp8_products
            if key not in self._expected:
                self._expected[key] = expect_dense(self.inputs, *key)
            return self._expected[key].check(output)

        return judge

    def sparse(self, budget: Budget, fp8_products: bool = False) -> Judge:
        """Judge [batch, queries, Hq, D] of attention over our selection, and the selection."""

        def judge(output: torch.Tensor) -> Verdict:
            key = budget, fp8_products
            if key not in self._expected:
                self._expected[key] = expect_sparse(self.inputs, *key)
            if budget not in self._selection:
                units = self.inputs.units(budget, 0)
                self._selection[budget] = check_selection(self.inputs, budget, units)
            verdict = self._expected[key].check(output)
            chosen = self._selection[budget]
            if not chosen.ok:
                return replace(verdict, ok=False, reason=f"selection: {chosen.reason}")
            return verdict

        return judge

    def selection(self, budget: Budget) -> Judge:
        """Judge lists [items, H, K]."""
        return lambda units: check_selection(self.inputs, budget, units)
