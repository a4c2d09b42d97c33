"""Writing new tokens: vLLM's KV write, ours with a learned score, and scoring kernels alone.

One call is what one layer launches in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm_sparsek.kernels.bounds import api as bounds_api
from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.score import api as score_api
from vllm_sparsek.scorers.base import ScoreBatch
from vllm_sparsek.scorers.features import Rope
from vllm_sparsek.scorers.learned import LearnedScorer
from vllm_sparsek.serving_bench.kernel_bench import work
from vllm_sparsek.serving_bench.kernel_bench.arms.base import Arm, Prepared, import_fault
from vllm_sparsek.serving_bench.kernel_bench.cases import Case
from vllm_sparsek.serving_bench.kernel_bench.gate import Gate, Verdict, check_equal
from vllm_sparsek.serving_bench.kernel_bench.inputs import Inputs

# what `vllm-sparsek fit` fits by default
FEATURES = ("key", "key_unrotated", "value")
ROPE_BASE = 500000.0
# float32 sums of a few hundred products against float64
SCORE_TOLERANCE = 1e-4

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one input set: key, value [T, H, D], and the batch a scorer gets."""

    key: torch.Tensor
    value: torch.Tensor
    batch: ScoreBatch

    def in_cache(self, cache: torch.Tensor) -> torch.Tensor:
        """What a cache [blocks, H, page, ...] holds at the tokens' slots: [T, H, ...]."""
        slots, page = self.batch.slot_mapping, cache.shape[2]
        return cache[slots // page, :, slots % page]


def _new_tokens(inputs: Inputs, s: int) -> NewTokens:
    case, device = inputs.case, inputs.device
    tokens = case.batch * case.queries
    generator = torch.Generator(device=device).manual_seed(s)
    shape = (2, tokens, case.kv_heads, case.head_dim)
    key, value = torch.randn(shape, generator=generator, device=device).to(inputs.kv_cache.dtype)
    positions = torch.arange(case.context - case.queries, case.context, device=device)
    batch = ScoreBatch(
        key=key,
        value=value,
        positions=positions.int().repeat(case.batch),
        slot_mapping=inputs.slots(s),
        kv_cache=inputs.kv_cache,
        block_table=inputs.table[inputs.rows(s)],
        query_start_loc=inputs.ints([i * case.queries for i in range(case.batch + 1)]),
        seq_lens=inputs.ints([case.context] * case.batch),
        scores=inputs.scores,
        anchors=None,
    )
    return NewTokens(key, value, batch)


def _scorer(inputs: Inputs) -> LearnedScorer:
    """A linear scorer of random weights."""
    case, device = inputs.case, inputs.device
    generator = torch.Generator(device=device).manual_seed(0)
    width = len(FEATURES) * case.head_dim
    weight = torch.randn(case.kv_heads, width, generator=generator, device=device) * width**-0.5
    bias = torch.zeros(case.kv_heads, device=device)
    even = torch.arange(0, case.head_dim, 2, device=device)
    rope = Rope(ROPE_BASE ** -(even.float() / case.head_dim), interleaved=False)
    return LearnedScorer(weight, bias, inputs=FEATURES, rope=rope)


def _vllm_write(inputs: Inputs, new: NewTokens) -> Callable[[], None]:
    from vllm import _custom_ops as ops

    keys, values = inputs.kv_cache.transpose(1, 2).split(inputs.case.head_dim, dim=-1)
    one = torch.ones(1, device=inputs.device)
    slots = new.batch.slot_mapping
    return lambda: ops.reshape_and_cache_flash(
        new.key, new.value, keys, values, slots, "auto", one, one
    )


def _write(inputs: Inputs, gate: Gate, budget: Budget | None, score: bool) -> Prepared:
    new = [_new_tokens(inputs, s) for s in range(inputs.sets)]
    scorer = _scorer(inputs)

    def make(tokens: NewTokens) -> Call:
        write = partial(scorer.write, tokens.batch) if score else _vllm_write(inputs, tokens)

        def call() -> torch.Tensor:
            write()
            return inputs.kv_cache

        return call

    def judge(cache: torch.Tensor) -> Verdict:
        first = new[0]
        verdict = check_equal(first.in_cache(cache), torch.cat([first.key, first.value], dim=-1))
        if not score or not verdict.ok:
            return verdict
        return check_equal(first.in_cache(inputs.scores), _exact_scores(scorer, first),
                           SCORE_TOLERANCE)  # fmt: skip

    least = work.kv_write(inputs.case)
    if score:
        # scores are only written: keys and values are at hand
        least += work.Work(work.score_write(inputs.case).bytes // 2)
    return Prepared([make(tokens) for tokens in new], judge, least)


def _exact_scores(scorer: LearnedScorer, new: NewTokens) -> torch.Tensor:
    """[T, H] float64."""
    assert scorer.rope is not None
    key, value = new.key.double(), new.value.double()
    unrotated = scorer.rope.undo(new.key, new.batch.positions).double()
    x = torch.cat([key, unrotated, value], dim=-1)  # [T, H, W]
    return (x * scorer.weight.double()).sum(-1) + scorer.bias.double()


def _scores(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    new = [_new_tokens(inputs, s) for s in range(inputs.sets)]
    u = torch.randn(new[0].key.shape[:2], device=inputs.device)

    def make(tokens: NewTokens) -> Call:
        def call() -> torch.Tensor:
            score_api.write_scores(u, tokens.batch.slot_mapping, inputs.scores)
            return inputs.scores

        return call

    return Prepared(
        [make(tokens) for tokens in new],
        lambda scores: check_equal(new[0].in_cache(scores), u),
        work.score_write(inputs.case),
    )


def _keydiff(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    case, scores = inputs.case, inputs.scores
    anchors = torch.zeros(scores.shape[0], case.kv_heads, case.head_dim, device=inputs.device)

    def make(tokens: NewTokens) -> Call:
        b = tokens.batch

        def call() -> torch.Tensor:
            score_api.keydiff(
                b.kv_cache, b.block_table, b.query_start_loc, b.seq_lens, scores, anchors
            )
            return scores

        return call

    calls = [make(_new_tokens(inputs, s)) for s in range(inputs.sets)]
    return Prepared(calls, None, work.score_write(case))


def _bounds(inputs: Inputs, gate: Gate, budget: Budget | None) -> Prepared:
    case = inputs.case
    shape = (inputs.kv_cache.shape[0], case.kv_heads, 1, 2, case.head_dim)
    bounds = torch.zeros(shape, dtype=inputs.kv_cache.dtype, device=inputs.device)

    def make(slots: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            bounds_api.write_bounds(inputs.kv_cache, slots, bounds)
            return bounds

        return call

    calls = [make(inputs.slots(s)) for s in range(inputs.sets)]
    return Prepared(calls, None, work.score_write(case))


def _unavailable(case: Case, budget: Budget | None) -> str:
    fault = import_fault("vllm._custom_ops")
    if fault:
        return fault
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        return "this vLLM has no reshape_and_cache_flash"
    return ""


ARMS = (
    Arm(
        "vllm-kv-write",
        ("score",),
        "write",
        lambda inputs, gate, budget: _write(inputs, gate, budget, score=False),
        unavailable=_unavailable,
    ),
    Arm(
        "sparsek-kv-write",
        ("score",),
        "write+score",
        lambda inputs, gate, budget: _write(inputs, gate, budget, score=True),
    ),
    Arm("sparsek-scores", ("score",), "score", _scores),
    Arm("sparsek-keydiff", ("score",), "score", _keydiff),
    Arm("sparsek-bounds", ("score",), "score", _bounds),
)
